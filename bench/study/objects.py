"""What becomes of small objects by how many tokens they get: of models of classes of pixels.

    python bench/study/objects.py MODEL RECIPE DATA [field=value ...]
    python bench/study/objects.py                     (the table only)

An object is a connected part of a class, other than background, below 32 x 32 px; a token of the
last stage is on it if the middle of its cell is. It is found if at least half of its pixels have
its class, and seen if at least half have any but background. A line for each model is added to the
results, unless it is there, and objects.md is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cells import RESULTS
from scipy import ndimage
from tables import page_of, shares
from trained import Trained, measured_once

from pointformer.annotations import VOID

OBJECTS = RESULTS.with_name("objects.jsonl")
SIDE = 32  # pixels
LEAST = (0, 1, 2, 4)  # tokens, from which on a group of objects has them


def main(arguments: Sequence[str] | None = None) -> None:
    measured_once(__doc__, arguments, OBJECTS, measure, page)


def measure(trained: Trained) -> dict[str, Any]:
    """The numbers of a line."""
    rows = [row for number in range(len(trained.validation)) for row in small(trained, number)]
    tokens, found, seen = np.array(rows, np.int64).reshape(-1, 3).T
    group = np.searchsorted(LEAST, tokens, "right") - 1
    counts = {
        name: np.bincount(group, weights, len(LEAST)).astype(int).tolist()
        for name, weights in (("objects", None), ("found", found), ("seen", seen))
    }
    return {"score": "small objects", "least": LEAST, "tokens": int(tokens.sum()), **counts}


def small(trained: Trained, number: int) -> list[tuple[int, bool, bool]]:
    """For each small object of a picture: tokens on it, whether it is found, and seen."""
    annotation, scores, stages = trained.seen(number)
    classes, predicted = annotation.classes(), scores.argmax(0)
    stride: int = trained.model.config.patch_stride
    middles = (stages[-1].tokens.positions * stride + stride // 2).long().numpy()
    x, y = np.minimum(middles, np.array(classes.shape[::-1]) - 1).T
    background = trained.background()
    rows = []
    for kind in np.unique(classes[classes != VOID]).tolist():
        if kind in background:
            continue
        parts, count = ndimage.label(classes == kind)
        counted = [
            np.bincount(which.ravel(), minlength=count + 1)[1:].tolist()
            for which in (
                parts,
                parts[y, x],
                parts[predicted == kind],
                parts[~np.isin(predicted, background)],
            )
        ]
        for area, tokens, right, any_kind in zip(*counted, strict=True):
            if area < SIDE**2:
                rows.append((tokens, 2 * right >= area, 2 * any_kind >= area))
    return rows


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    rows = []
    for line in lines:
        objects = np.array(line["objects"])
        row = [
            line["model"],
            f"{line['data']} ({line['pictures']})",
            str(objects.sum()),
            f"{line['tokens'] / max(objects.sum(), 1):.1f}",
        ]
        for name in ("objects", "seen", "found"):
            counts = np.array(line[name])
            of = objects.sum() if name == "objects" else objects
            whole = [] if name == "objects" else [(counts.sum(), objects.sum())]
            pairs = [*whole, *np.broadcast(counts, of)]
            row.append(shares(*zip(*pairs, strict=True)))
        rows.append(row)
    ends = zip(LEAST, [n - 1 for n in LEAST[1:]], strict=False)
    groups = " / ".join(f"{n} to {last}" if last > n else str(n) for n, last in ends)
    groups += f" / {LEAST[-1]} or more"
    names = (
        "model", "data (pictures)", "small objects", "tokens on each", f"with {groups} tokens, %",
        "seen, %: all, and of these", "found, %: all, and of these",
    )  # fmt: skip
    return page_of("Small objects and their tokens", "objects.py", names, rows)


if __name__ == "__main__":
    main()
