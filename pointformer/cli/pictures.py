"""What `segment` writes of a picture."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pointformer.cli.results import Found

if TYPE_CHECKING:
    from pointformer.segmentation.segment import Segmentation

_FEW, MANY = "labels.png", "labels.tif"  # which ids of 16 bits are enough for, or not


def found(result: Segmentation) -> Found:
    """The three files of one picture, besides the summary; of the two kinds of label maps the one
    that holds the ids."""
    labels = _FEW if result.num_objects <= 65535 else MANY
    height, width = result.labels.shape
    tokens = " -> ".join(str(n) for n in result.tokens)

    def writer(kind: str) -> Callable[[Path], None]:
        return lambda path: _WRITERS[kind](path, result)

    return Found(
        {kind: writer(kind) for kind in (labels, "objects.csv", "overlay.png")},
        {
            "width": width,
            "height": height,
            "count": result.num_objects,
            "seconds": round(result.seconds, 4),
            "tokens": list(result.tokens),
            "rates": [round(rate, 4) for rate in result.rates],
        },
        f"{result.num_objects} objects in {result.seconds:.2f} s, tokens {tokens}",
    )


def _write_labels(path: Path, result: Segmentation) -> None:
    from PIL import Image

    Image.fromarray(result.labels.astype("uint16")).save(path)


def _write_many_labels(path: Path, result: Segmentation) -> None:
    import tifffile

    # A PNG has no 32 bits. Fiji, napari and scikit-image read this.
    tifffile.imwrite(path, result.labels.astype("uint32"), compression="zlib")


def _write_objects(path: Path, result: Segmentation) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "class", "score", "area", "x", "y", "left", "top", "right", "bottom"])
        for item in result.objects():
            x, y = item.centroid
            kind, score = result.class_name(item.id), result.scores[item.id - 1]
            rows.writerow(
                [item.id, kind, f"{score:.3f}", item.area, f"{x:.2f}", f"{y:.2f}", *item.box]
            )


def _write_overlay(path: Path, result: Segmentation) -> None:
    from pointformer.segmentation.drawing import overlay

    overlay(result).save(path)


_WRITERS = {
    _FEW: _write_labels,
    MANY: _write_many_labels,
    "objects.csv": _write_objects,
    "overlay.png": _write_overlay,
}
KINDS = tuple(_WRITERS)
