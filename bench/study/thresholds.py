"""Small objects found and the main score where less is painted: of models of classes of pixels.

    python bench/study/thresholds.py MODEL RECIPE DATA [field=value ...]
    python bench/study/thresholds.py                     (the table only)

A model that finds more may only call more its objects. Here the score of the background is
multiplied before the highest wins; two models are compared where both are at their best, or find as
much (between two factors the scores are interpolated). A line for each model is added to the
results, unless it is there, and thresholds.md is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cells import RESULTS
from objects import SIDE
from tables import page_of
from trained import Trained, measured_once

from pointformer.metrics import RecallBySize, SemanticIoU

THRESHOLDS = RESULTS.with_name("thresholds.jsonl")
FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
FOUND = (0.4, 0.5, 0.6)  # shares of the small objects at which models are compared


def main(arguments: Sequence[str] | None = None) -> None:
    measured_once(__doc__, arguments, THRESHOLDS, measure, page)


def measure(trained: Trained) -> dict[str, Any]:
    """The numbers of a line."""
    categories, background = trained.task.categories, trained.background()
    overlaps = [SemanticIoU(len(categories)) for _ in FACTORS]
    recalls = [RecallBySize(categories, (SIDE,)) for _ in FACTORS]
    for number in range(len(trained.validation)):
        annotation, scores, _ = trained.seen(number)
        for factor, overlap, recall in zip(FACTORS, overlaps, recalls, strict=True):
            weighted = scores.copy()
            weighted[background] *= factor
            predicted = weighted.argmax(0)
            overlap.update(predicted, annotation)
            recall.update(predicted, annotation)
    objects = [n for n in range(len(categories)) if n not in background]
    small = []
    for recall in recalls:
        sizes = recall.scores()
        found, annotated = (int(of[objects, 0].sum()) for of in (sizes.found, sizes.annotated))
        small.append(round(found / max(annotated, 1), 4))
    main_scores = [round(overlap.scores().mean_iou, 4) for overlap in overlaps]
    return {"factors": FACTORS, "small": small, "main": main_scores}


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    rows = []
    for line in lines:
        best = max(line["main"])
        cells = [
            f"{100 * small:.1f} / " + (f"**{100 * score:.1f}**" if score == best
                                       else f"{100 * score:.1f}")
            for small, score in zip(line["small"], line["main"], strict=True)
        ]  # fmt: skip
        equal = " / ".join(at_equal(line, share) for share in FOUND)
        rows.append([line["model"], f"{line['data']} ({line['pictures']})", *cells, equal])
    names = ("model", "data (pictures)", *(f"background x {factor:g}" for factor in FACTORS),
             f"where {' / '.join(f'{100 * share:.0f}' for share in FOUND)}% are found")  # fmt: skip
    return page_of("Where less is painted", "thresholds.py", names, rows)


def at_equal(line: dict[str, Any], share: float) -> str:
    """The main score where so many small objects are found; a dash where that is never so."""
    small, scores = line["small"][::-1], line["main"][::-1]
    inside = small[0] <= share <= small[-1]
    return f"{100 * np.interp(share, small, scores):.1f}" if inside else "–"


if __name__ == "__main__":
    main()
