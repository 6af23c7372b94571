"""Small objects found and the main score where less is painted: of models of classes of pixels.

    python bench/study/thresholds.py MODEL RECIPE DATA [field=value ...]
    python bench/study/thresholds.py                     (the table only)

A model that finds more may only call more its objects. Here the score of the background is
multiplied before the highest wins; two models are compared where both are at their best. A line
for each model is added to the results, unless it is there, and thresholds.md is made of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import RESULTS
from objects import SIDE
from tables import markdown
from trained import Trained, add_arguments, add_line, measured

from pointformer.metrics import RecallBySize, SemanticIoU

THRESHOLDS = RESULTS.with_name("thresholds.jsonl")
FACTORS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, THRESHOLDS)
    measured(parser, arguments, lambda trained, options: measure(trained, options.results), page)


def measure(trained: Trained, results: Path) -> None:
    """Add the line, if it is not there yet."""
    if trained.lines(results):
        return
    categories, background = trained.task.categories, trained.background()
    things = [SemanticIoU(len(categories)) for _ in FACTORS]
    sizes = [RecallBySize(categories, (SIDE,)) for _ in FACTORS]
    for number in range(len(trained.validation)):
        annotation, scores, _ = trained.seen(number)
        for factor, iou, recall in zip(FACTORS, things, sizes, strict=True):
            changed = scores.copy()
            changed[background] *= factor
            predicted = changed.argmax(0)
            iou.update(predicted, annotation)
            recall.update(predicted, annotation)
    found = []
    for recall in sizes:
        hits, all_of = recall.counts[:, [n for n in range(len(categories)) if n not in background]]
        found.append(round(float(hits[:, 0].sum() / max(all_of[:, 0].sum(), 1)), 4))
    main_score = [round(iou.scores().mean_iou, 4) for iou in things]
    add_line(results, {**trained.about(), "factors": FACTORS, "small": found, "main": main_score})


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
        rows.append([line["model"], f"{line['data']} ({line['pictures']})", *cells])
    names = ("model", "data (pictures)", *(f"background x {factor:g}" for factor in FACTORS))
    return (
        "# Where less is painted\n\nMade by `python bench/study/thresholds.py`; see "
        "../study/README.md.\n\n"
        f"{markdown(names, rows)}\n"
    )


if __name__ == "__main__":
    main()
