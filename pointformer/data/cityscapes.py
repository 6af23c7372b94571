"""Cityscapes: leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png beside gtFine/SPLIT/CITY/.

Files hold label ids (0 to 33), of which 19 are scored, 8 of them things. An instance picture holds
label ids, and 1000 * label id + n for the n-th object of a label; a thing's bare label id is a
group of objects that are not told apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pointformer._files import atomic_path
from pointformer.data.annotations import (
    Annotation,
    Category,
    Dataset,
    Entry,
    Objects,
    Segment,
    check_size,
)
from pointformer.data.categories import CITYSCAPES, CITYSCAPES_THINGS
from pointformer.data.images import read_labels
from pointformer.data.labels import label_table, read_label_file, write_png

LABEL_IDS = range(34)
OBJECT_LABEL_IDS = range(24, 34)
"""Labels whose objects are told apart, scored or not."""


def read_cityscapes(
    root: str | os.PathLike[str],
    split: str = "val",
    task: str = "semantic",
    *,
    skip_bad: bool = False,
) -> Dataset:
    """Cityscapes with fine annotations.

    Args:
        task: "semantic": maps of 19 classes. "instance": objects of 8 classes; the map of ids is
            the file's. "panoptic": segments of 19 classes. Groups are crowds.

    Raises:
        ValueError: naming the file, if one is missing or holds an unknown label.
    """
    if task not in ("semantic", "instance", "panoptic"):
        raise ValueError(f"task: expected semantic, instance or panoptic, got {task!r}")
    images, labels = Path(root) / "leftImg8bit" / split, Path(root) / "gtFine" / split
    kind = "labelIds" if task == "semantic" else "instanceIds"
    categories = CITYSCAPES_THINGS if task == "instance" else CITYSCAPES
    table = label_table({category.id: n for n, category in enumerate(categories)}, LABEL_IDS)
    places = _names(images, "_leftImg8bit.png") | _names(labels, f"_gtFine_{kind}.png")
    entries = []
    for city, name in sorted(places):
        image = images / city / f"{name}_leftImg8bit.png"
        path = labels / city / f"{name}_gtFine_{kind}.png"
        if task == "semantic":
            read = partial(read_label_file, name, image, path, table)
        else:
            read = partial(_read_segments, name, image, path, categories)
        entries.append(Entry(name, image, path, read))
    return Dataset(labels, categories, entries, skip_bad=skip_bad)


def _names(folder: Path, ending: str) -> set[tuple[str, str]]:
    paths = folder.glob(f"*/[!.]*{ending}")
    return {(path.parent.name, path.name.removesuffix(ending)) for path in paths}


def _read_segments(
    name: str, image: Path, path: Path, categories: Sequence[Category]
) -> Annotation:
    ids = read_labels(path)
    check_size(path, ids.shape, image)
    classes = {category.id: n for n, category in enumerate(categories)}
    segments = []
    for value, area in zip(*(v.tolist() for v in np.unique(ids, return_counts=True)), strict=True):
        label = value if value < 1000 else value // 1000
        if label not in (LABEL_IDS if value < 1000 else OBJECT_LABEL_IDS):
            raise ValueError(
                f"{path}: {value} is neither one of the labels 0 to {LABEL_IDS[-1]} nor an object "
                f"of the labels {OBJECT_LABEL_IDS[0]} to {OBJECT_LABEL_IDS[-1]}"
            )
        if label in classes:
            crowd = value < 1000 and categories[classes[label]].is_thing
            segments.append(Segment(value, classes[label], area, crowd))
    return Annotation(name, image, ids.shape, name, ids=ids, segments=tuple(segments))


def write_cityscapes_objects(
    folder: str | os.PathLike[str], name: str, predicted: Any, categories: Sequence[Category]
) -> None:
    """Write predicted objects as the benchmark takes them: NAME_pred.txt and a PNG for each.

    Args:
        name: CITY_SEQUENCE_FRAME, the annotation's.
        predicted: with `masks` (N, H, W), `classes` (N,) and `scores` (N,).
        categories: the classes, with label ids.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = Objects.of(predicted, np.shape(predicted.masks)[1:])
    lines = []
    for n, (mask, category, score) in enumerate(
        zip(found.masks, found.classes.tolist(), found.scores.tolist(), strict=True)
    ):
        picture = f"{name}_pred_{n}.png"
        write_png(folder / picture, mask.astype(np.uint8) * 255)
        lines.append(f"{picture} {categories[category].id} {score:.9g}\n")
    with atomic_path(folder / f"{name}_pred.txt") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def read_cityscapes_objects(
    folder: str | os.PathLike[str], annotation: Annotation, categories: Sequence[Category]
) -> Objects:
    """Read what was predicted for one picture from NAME*.txt, as the benchmark does.

    Predictions of labels that are not among the categories are left out.

    Raises:
        ValueError: naming the file, if there is none or several, or one is not as it should be.
    """
    paths = sorted(Path(folder).rglob(f"{annotation.name}*.txt"))
    if len(paths) != 1:
        found = " and ".join(path.name for path in paths[:2]) or "none"
        raise ValueError(f"{folder}: expected one file {annotation.name}*.txt, found {found}")
    classes = {category.id: n for n, category in enumerate(categories)}
    masks, labels, scores = [], [], []
    for number, line in enumerate(paths[0].read_text(encoding="utf-8").splitlines(), 1):
        try:
            picture, label, score = line.split(" ")
            label_id, confidence = int(float(label)), float(score)
        except ValueError:
            raise ValueError(
                f"{paths[0]}: expected PICTURE LABEL CONFIDENCE in line {number}, got {line!r:.80}"
            ) from None
        if label_id not in classes:
            continue
        mask = read_labels(paths[0].parent / picture) != 0
        if mask.shape != tuple(annotation.size):
            raise ValueError(
                f"{paths[0].parent / picture}: expected height and width "
                f"{tuple(annotation.size)}, got {mask.shape}"
            )
        masks.append(mask)
        labels.append(classes[label_id])
        scores.append(confidence)
    return Objects(
        np.stack(masks) if masks else np.zeros((0, *annotation.size), bool),
        np.array(labels, np.int64),
        np.array(scores, np.float32),
    )
