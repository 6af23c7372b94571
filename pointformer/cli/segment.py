"""Find the objects in pictures.

Writes, for each picture STEM: STEM_overlay.png (objects outlined, or classes in colors with a
legend), STEM_labels.png (16-bit ids), STEM_objects.csv (id, class, score, area, centroid, box) and
STEM_summary.json (count, time, tokens per stage).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from pointformer._files import atomic_path
from pointformer.cli.common import add_model_arguments, image_paths, model_from

if TYPE_CHECKING:
    from pointformer.segmentation import Segmentation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or glob pattern")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="work in windows of this side (large pictures)"
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PIXELS", help="of the windows (default: 64, at most half)"
    )
    parser.add_argument(
        "--min-score",
        type=float,
        help="of mask models' objects (default: 0.5) and panoptic segments (default: 0.8)",
    )
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from pointformer.segmentation import segment

    paths = image_paths(options.images)
    twice = [stem for stem, n in Counter(path.stem for path in paths).items() if n > 1]
    if twice:
        raise ValueError(
            f"{twice[0]}: several pictures have this name; their results would collide"
        )
    model = model_from(options, len(paths))
    options.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for path in tqdm(paths, disable=len(paths) == 1, unit="image"):
        try:
            result = segment(
                model,
                path,
                tile=options.tile,
                overlap=options.overlap,
                min_score=options.min_score,
            )
            write(result, path.stem, options.out, options.model)
        except ValueError as error:
            failures += 1
            tqdm.write(f"pointformer: error: {error}", file=sys.stderr)
            continue
        if len(paths) == 1:
            tokens = " -> ".join(str(n) for n in result.tokens)
            print(
                f"{path.name}: {result.count} objects in {result.seconds:.2f} s, tokens {tokens}; "
                f"results in {options.out}"
            )
    if len(paths) > 1:
        print(f"{len(paths) - failures} of {len(paths)} pictures done; results in {options.out}")
    return 1 if failures else 0


def write(result: Segmentation, stem: str, folder: Path, model: str) -> None:
    """The four files of one picture: all of them, or none under its final name."""
    import numpy as np
    from PIL import Image

    from pointformer.pictures import overlay

    if result.count > np.iinfo(np.uint16).max:
        raise ValueError(f"{stem}: {result.count} objects do not fit 16-bit ids")
    with contextlib.ExitStack() as files:
        picture, labels, objects, summary = (
            files.enter_context(atomic_path(folder / f"{stem}_{name}"))
            for name in ("overlay.png", "labels.png", "objects.csv", "summary.json")
        )
        overlay(result).save(picture)
        Image.fromarray(result.labels.astype(np.uint16)).save(labels)
        with objects.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(
                ["id", "class", "score", "area", "x", "y", "left", "top", "right", "bottom"]
            )
            for item in result.objects():
                x, y = item.centroid
                kind, score = result.class_name(item.id), result.scores[item.id - 1]
                rows.writerow(
                    [item.id, kind, f"{score:.3f}", item.area, f"{x:.2f}", f"{y:.2f}", *item.box]
                )
        height, width = result.labels.shape
        description = {
            "image": stem,
            "width": width,
            "height": height,
            "model": model,
            "count": result.count,
            "seconds": round(result.seconds, 4),
            "tokens": list(result.tokens),
        }
        summary.write_text(json.dumps(description, indent=2) + "\n")
