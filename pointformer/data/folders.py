"""Data sets in folders: SPLIT/images/NAME.EXT beside SPLIT/labels or SPLIT/instances/NAME.png."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pointformer._files import atomic_path
from pointformer.data.annotations import (
    VOID,
    Annotation,
    Category,
    Dataset,
    Entry,
    Objects,
    Segment,
    check_ids,
    check_size,
    distinct_color,
    listed_segments,
    named_categories,
    read_json,
)
from pointformer.data.images import read_image, read_instances
from pointformer.data.labels import label_entries, paired_files, write_map

_SEGMENTS = "segments.json"


@dataclass(frozen=True)
class Sample:
    """A picture (H, W, 3) uint8 and its instance map (H, W) int32, 0 being background."""

    name: str
    image: np.ndarray
    instances: np.ndarray


def load_split(root: str | os.PathLike[str], split: str) -> list[Sample]:
    """Read `root`/`split` into memory, sorted by name.

    Every file in its folder `images` needs an instance map of the same size and stem, as PNG, in
    its folder `instances`.

    Raises:
        ValueError: naming the folder or file, if there are no pictures, a map is missing or
            unreadable, or its size differs from the picture's.
    """
    folder = Path(root) / split
    paths = sorted(path for path in (folder / "images").glob("[!.]*") if path.is_file())
    if not paths:
        raise ValueError(f"{folder}: expected pictures in its folder 'images', found none")
    samples = []
    for path in paths:
        image = read_image(path)
        map_path = folder / "instances" / f"{path.stem}.png"
        instances = read_instances(map_path)
        if instances.shape != image.shape[:2]:
            raise ValueError(
                f"{map_path}: expected the picture's height and width {image.shape[:2]}, "
                f"got {instances.shape}"
            )
        samples.append(Sample(path.stem, image, instances))
    return samples


def read_folder(
    root: str | os.PathLike[str],
    split: str = "",
    task: str = "semantic",
    *,
    categories: Sequence[Category] | Sequence[str] | None = None,
    folder: str | None = None,
    void: Sequence[int] | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """A plain folder: `root`/SPLIT/images/NAME.EXT beside `root`/SPLIT/`folder`/NAME.png.

    Args:
        task: "semantic": the PNGs hold class ids. "instance": they hold ids of objects, 0 is
            background. If there is a file segments.json in `root` or the split's folder, it tells
            the objects' classes as {"classes": {ID: NAME}, "images": {NAME: {"segments": [{"id":
            ID, "class": ID, "crowd": 0}, ...]}}}; else all are of the first category.
        categories: classes or their names, numbered from 0; not needed for instances.
        folder: name of the PNGs' folder; "labels" or "instances", by the task.
        void: labels that mean void (default: 255), or ids of regions with objects of any class
            that are not told apart (default: none).

    Raises:
        ValueError: naming the file, if a label is out of range, a PNG's ids are not those of the
            JSON, an annotation has no picture or a picture no annotation.
    """
    if task not in ("semantic", "instance"):
        raise ValueError(f"task: expected semantic or instance, got {task!r}")
    base = Path(root) / split
    labels = base / (folder or ("labels" if task == "semantic" else "instances"))
    table = _category_table(categories)
    if task == "semantic":
        if table is None:
            raise ValueError(f"{labels}: which labels there are is needed: pass categories")
        entries = label_entries(base / "images", labels, table, (255,) if void is None else void)
        return Dataset(labels, table, entries, skip_bad=skip_bad)
    classes, listed, source = None, None, Path(root) / _SEGMENTS
    if base != Path(root) and (base / _SEGMENTS).is_file():
        source = base / _SEGMENTS
    if source.is_file():
        classes, listed = _read_segments(source)
    table = table or classes or named_categories(("object",))
    entries = []
    for name, image, path in paired_files(base / "images", labels):
        infos = None if listed is None else listed.get(name, [])
        read = partial(
            _read_objects, name, image, path, source, infos, _class_numbers(table), void or ()
        )
        entries.append(Entry(name, image, path, read))
    return Dataset(labels, table, entries, skip_bad=skip_bad)


def _category_table(
    categories: Sequence[Category] | Sequence[str] | None,
) -> tuple[Category, ...] | None:
    if categories is None:
        return None
    first = next(iter(categories), None)
    if first is None:
        raise ValueError("categories: expected at least one")
    return named_categories(categories) if isinstance(first, str) else tuple(categories)  # type: ignore[arg-type]


def _class_numbers(categories: Sequence[Category]) -> dict[int, int]:
    return {category.id: n for n, category in enumerate(categories)}


def _read_segments(path: Path) -> tuple[tuple[Category, ...], dict[str, list[dict]]]:
    content = read_json(path)
    try:
        names = {int(number): str(name) for number, name in content["classes"].items()}
        segments = {name: list(image["segments"]) for name, image in content["images"].items()}
        infos = [info for infos in segments.values() for info in infos]
        complete = all(isinstance(info[key], int) for info in infos for key in ("id", "class"))
    except (KeyError, TypeError, ValueError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(
            f"{path}: expected {{'classes': {{id: name}}, 'images': {{name: {{'segments': "
            "[{'id', 'class'}]}}}"
        )
    table = tuple(
        Category(number, names[number], True, distinct_color(n))
        for n, number in enumerate(sorted(names))
    )
    return table, segments


def _read_objects(
    name: str,
    image: Path,
    path: Path,
    source: Path,
    infos: list[dict] | None,
    classes: dict[int, int],
    void: Sequence[int],
) -> Annotation:
    ids = read_instances(path)
    check_size(path, ids.shape, image)
    if infos is None:
        infos = [
            {"id": int(n), "class": min(classes)} for n in np.unique(ids) if n not in (0, *void)
        ]
    areas = check_ids(path, ids, [info["id"] for info in infos], source.name, (0, *void))
    segments = listed_segments(source, name, infos, classes, areas)
    for value in void:
        area = int((ids == value).sum())
        if area:
            segments.append(Segment(value, VOID, area, crowd=True))
    return Annotation(name, image, ids.shape, name, ids=ids, segments=tuple(segments))


def write_folder_objects(
    root: str | os.PathLike[str],
    predictions: Iterable[tuple[str, Any]],
    categories: Sequence[Category],
) -> None:
    """Write predicted objects as instances/NAME.png and segments.json, for `read_folder`.

    Args:
        predictions: names of pictures, and objects with `masks` (N, H, W), `classes` (N,) and
            `scores` (N,). Where masks overlap, the pixel goes to the higher score; an object that
            has no pixel left is not written.
    """
    root = Path(root)
    images = {}
    for name, predicted in predictions:
        found = Objects.of(predicted, np.shape(predicted.masks)[1:])
        ids = np.zeros(found.masks.shape[1:], np.int32)
        for n in np.argsort(found.scores, kind="stable"):
            ids[found.masks[n]] = n + 1
        write_map(root / "instances" / f"{name}.png", ids)
        kept = (np.unique(ids[ids > 0]) - 1).tolist()
        classes, scores = found.classes.tolist(), found.scores.tolist()
        rows = [{"id": n + 1, "class": categories[classes[n]].id, "score": scores[n]} for n in kept]
        images[name] = {"segments": rows}
    content = {"classes": {c.id: c.name for c in categories}, "images": images}
    with atomic_path(root / _SEGMENTS) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
