"""What `segment` writes of a point cloud."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pointformer.cli.results import Found

if TYPE_CHECKING:
    from pointformer.segmentation.clouds import SegmentedCloud

KINDS = ("above.png", "side.png", "classes.csv")


def found(result: SegmentedCloud, source: Path) -> Found:
    """The files of one cloud, besides the summary: itself with classes, pictures and a table."""
    from pointformer.data.points import class_limit, points_suffix
    from pointformer.data.points.asprs import class_codes

    codes = class_codes(result.categories, class_limit(source))
    drawn: Callable[[], dict[str, Any]] = cache(partial(_pictures, result))
    writers: dict[str, Callable[[Path], None]] = {
        f"points{points_suffix(source)}": partial(
            _write_points, result=result, source=source, codes=codes
        ),
        "above.png": lambda path: drawn()["above"].save(path),
    }
    if result.tokens.dimensions > 2:
        writers["side.png"] = lambda path: drawn()["side"].save(path)
    writers["classes.csv"] = partial(_write_table, result=result, codes=codes)
    counts, names = result.counts(), [category.name for category in result.categories]
    best = sorted(range(len(codes)), key=lambda n: -counts[n])[:3]
    total = len(result.classes)
    shares = ", ".join(f"{names[n]} {100 * counts[n] / total:.1f}%" for n in best if counts[n])
    return Found(
        writers,
        {
            "points": total,
            "seconds": round(result.seconds, 4),
            "rates": [round(rate, 4) for rate in result.rates],
            "classes": {
                str(code): c.name for code, c in zip(codes, result.categories, strict=True)
            },
        },
        f"{total} points in {result.seconds:.2f} s: {shares}",
    )


def _pictures(result: SegmentedCloud) -> dict[str, Any]:
    from pointformer.segmentation.cloud_drawing import cloud_pictures

    return cloud_pictures(result)


def _write_points(path: Path, result: SegmentedCloud, source: Path, codes: Sequence[int]) -> None:
    import torch

    from pointformer.data.points import write_classes

    table = torch.tensor(codes)
    write_classes(path, source, table[torch.from_numpy(result.classes).long()], overwrite=True)


def _write_table(path: Path, result: SegmentedCloud, codes: Sequence[int]) -> None:
    counts, scores = result.counts(), result.mean_scores()
    total = int(counts.sum())
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["code", "class", "points", "share", "mean_score"])
        for number in np.argsort(codes, kind="stable"):
            score = f"{scores[number]:.4f}" if counts[number] else ""
            share = f"{counts[number] / total:.6f}"
            name = result.categories[number].name
            rows.writerow([codes[number], name, counts[number], share, score])
        rows.writerow(["", "total", total, "1.000000", f"{result.scores.mean(dtype=float):.4f}"])
