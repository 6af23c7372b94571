"""Cityscapes: leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png beside gtFine/SPLIT/CITY/.

Files hold label ids (0 to 33), of which 19 are scored, 8 of them things. An instance picture holds
label ids, and 1000 * label id + n for the n-th object of a label; a thing's bare label id is a
group of objects that are not told apart.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pointformer._files import path_inside
from pointformer.annotations import Category, Mask, Objects, Segment
from pointformer.data.annotations import (
    Annotation,
    CategoryTable,
    Dataset,
    Entry,
    category_ids,
    check_size,
)
from pointformer.data.categories import CITYSCAPES, CITYSCAPES_THINGS
from pointformer.data.discovery import pictures_in
from pointformer.data.images import read_labels
from pointformer.data.labels import LabelTable, read_label_file
from pointformer.data.writing import write_png, write_text

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
    table = LabelTable({category.id: n for n, category in enumerate(categories)}, LABEL_IDS)
    ending = f"_gtFine_{kind}.png"
    pictures, maps = _by_name(images, "_leftImg8bit.png"), _by_name(labels, ending)
    entries = []
    for folder, name in sorted(pictures.keys() | maps.keys()):
        image = pictures.get((folder, name), images / folder / f"{name}_leftImg8bit.png")
        path = maps.get((folder, name), labels / folder / f"{name}{ending}")
        if task == "semantic":
            read = partial(read_label_file, name, image, path, table)
        else:
            read = partial(_read_segments, name, image, path, categories)
        entries.append(Entry(name, image, path, read))
    return Dataset(labels, categories, entries, skip_bad=skip_bad)


def _by_name(folder: Path, ending: str) -> dict[tuple[Path, str], Path]:
    """Files by their folder, a city or none, and their name without the ending."""
    return {
        (path.parent.relative_to(folder), path.name[: -len(ending)]): path
        for path in pictures_in(folder, deep=True)
        if path.name.lower().endswith(ending.lower())
    }


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

    Files that these writers wrote before are replaced, others never.

    Args:
        name: CITY_SEQUENCE_FRAME, the annotation's.
        predicted: with `masks` (N, H, W), `classes` (N,) and `scores` (N,).
        categories: the classes, with label ids.

    Raises:
        ValueError: if a class is not in `categories`, a score is not finite, the name leads out of
            the folder, or another file is in the way.
    """
    text = path_inside(folder, f"{name}_pred.txt")
    found = Objects.of(predicted)
    if not np.isfinite(found.scores).all():
        raise ValueError(f"{name}: expected finite scores")
    labels = category_ids(found.classes, categories)
    lines = []
    for n, (mask, label, score) in enumerate(
        zip(found.masks, labels, found.scores.tolist(), strict=True)
    ):
        picture = text.with_name(f"{text.stem}_{n}.png")
        write_png(picture, mask.dense(found.size).astype(np.uint8) * 255)
        lines.append(f"{picture.name} {label} {score:.9g}\n")

    def ours(old: str) -> bool:
        return all(line.startswith(f"{text.stem}_") for line in old.splitlines())

    write_text(text, "".join(lines), ours)


def read_cityscapes_objects(
    folder: str | os.PathLike[str], annotation: Annotation, categories: Sequence[Category]
) -> Objects:
    """Read what was predicted for one picture from NAME*.txt, as the benchmark does.

    Predictions of labels that are not among the categories are left out.

    Raises:
        ValueError: naming the file, if there is none or several, or one is not as it should be.
    """
    pattern = f"{glob.escape(annotation.name)}*.txt"
    paths = sorted(
        path
        for path in Path(folder).rglob(pattern)
        # frame_10.txt is not of frame_1
        if not path.name[len(PurePosixPath(annotation.name).name)].isalnum()
    )
    if len(paths) != 1:
        found = " and ".join(path.name for path in paths[:2]) or "none"
        raise ValueError(f"{folder}: expected one file {annotation.name}*.txt, found {found}")
    classes = CategoryTable(tuple(categories)).numbers()
    masks, labels, scores = [], [], []
    for number, line in enumerate(_lines(paths[0]), 1):
        if not line.strip():
            continue
        try:
            picture, label, score = line.rsplit(maxsplit=2)
            label_id, confidence = float(label), float(score)
            if not (label_id.is_integer() and math.isfinite(confidence)):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{paths[0]}: expected PICTURE LABEL CONFIDENCE in line {number}, got {line!r:.80}"
            ) from None
        if label_id not in classes:
            continue
        # Pictures may lie elsewhere in the folder: "../masks/a.png".
        place = os.path.normpath(paths[0].parent.relative_to(folder) / picture)
        try:
            mask_path = path_inside(folder, place, follow_links=True)
        except ValueError as error:
            raise ValueError(f"{paths[0]}: line {number}: {error}") from None
        mask = read_labels(mask_path) != 0
        if mask.shape != tuple(annotation.size):
            raise ValueError(
                f"{mask_path}: expected height and width {tuple(annotation.size)}, got {mask.shape}"
            )
        masks.append(Mask.of(mask))
        labels.append(classes[int(label_id)])
        scores.append(confidence)
    return Objects(masks, labels, scores, annotation.size)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected text in UTF-8, but {error}") from None
