"""Data sets in folders: SPLIT/images/NAME.EXT beside SPLIT/labels or SPLIT/instances/NAME.png, or
images/SPLIT beside labels/SPLIT or instances/SPLIT."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pointformer._files import path_inside
from pointformer.annotations import OBJECT, VOID, Category, Objects, Overlaps, Segment
from pointformer.data.annotations import (
    Annotation,
    CategoryTable,
    Dataset,
    Entry,
    category_ids,
    category_table,
    check_size,
    listed_segments,
    matched_classes,
    named_categories,
    parse_categories,
)
from pointformer.data.discovery import MAP_SUFFIXES, composed, pictures_by_name
from pointformer.data.images import read_instances, read_labels
from pointformer.data.json_files import WHOLE, read_json
from pointformer.data.labels import (
    MOST_PNG_IDS,
    label_entries,
    paired_files,
    without_maps,
    write_map,
)
from pointformer.data.packed import PictureFile
from pointformer.data.writing import remove_ours, write_json

_SEGMENTS = "segments.json"


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
    """A plain folder: `root`/SPLIT/images/NAME.EXT beside `root`/SPLIT/`folder`/NAME.png, or
    `root`/images/SPLIT/NAME.EXT beside `root`/`folder`/SPLIT/NAME.png.

    NAME may have folders ("site1/a"). Maps may be TIFF, BMP, GIF and PGM files too.

    Args:
        task: "semantic": the maps hold class ids. "instance": they hold ids of objects, 0 is
            background. If there is a file segments.json in `root` or the split's folder, it tells
            the objects' classes as {"classes": {ID: NAME}, "images": {NAME: {"segments": [{"id":
            ID, "class": ID, "crowd": 0}, ...]}}}; else, if `categories` has several and there are
            maps labels/NAME.png of class ids too, an object is of the class of most of its pixels;
            else all are of the first category.
        categories: classes or their names, numbered from 0; not needed for instances, where one
            called "background" is none.
        folder: name of the maps' folder; "labels" or "instances", by the task.
        void: labels that mean void (default: 255), or ids of regions with objects of any class
            that are not told apart (default: none).

    Raises:
        ValueError: naming the file, if a label is out of range, a map's ids are not those of the
            JSON, an annotation has no picture or a picture no annotation, or there are two of one
            name (a.png and a.jpg).
    """
    if task not in ("semantic", "instance"):
        raise ValueError(f"task: expected semantic or instance, got {task!r}")
    base = Path(root) / split
    images = folder_of(root, "images", split)
    labels = map_folder(root, task, split) if folder is None else folder_of(root, folder, split)
    table = category_table(categories)
    if task == "semantic":
        if table is None:
            raise ValueError(f"{labels}: which labels there are is needed: pass categories")
        entries = label_entries(images, labels, table, (255,) if void is None else void)
        return Dataset(labels, table, entries, skip_bad=skip_bad)
    source = Path(root) / _SEGMENTS
    if (base / _SEGMENTS).is_file():
        source = base / _SEGMENTS
    listed = None
    if source.is_file():
        classes, segments = _read_segments(source)
        used = () if skip_bad else _used_classes(segments)
        own = without_background(classes) or ()
        table = matched_classes(categories, own, source, used)
        listed = source, segments
    table = without_background(table) or named_categories((OBJECT,))
    numbers = CategoryTable(table).numbers()
    maps: dict[str, Path] = {}
    classes_of = folder_of(root, "labels", split)
    if listed is None and len(table) > 1 and classes_of.is_dir():
        maps = {name: path for name, _, path in paired_files(images, classes_of)}
    entries = _instance_entries(images, labels, listed, maps, numbers, void or ())
    problems = {}
    if listed is not None and source.parent != base:
        others = _pictures_of_other_splits(Path(root), images)
        problems = {
            entry.name: f"{source}: {entry.name} may be {entry.image} or {others[entry.name]}: "
            f"expected a {_SEGMENTS} in the folder of each split"
            for entry in entries
            if entry.name in others
        }
    return Dataset(labels, table, entries, problems, skip_bad)


def folder_of(root: str | os.PathLike[str], name: str, split: str) -> Path:
    """SPLIT/NAME, or NAME/SPLIT where there is only that."""
    path, other = Path(root) / split / name, Path(root) / name / split
    return other if other.is_dir() and not path.is_dir() else path


def map_folder(root: str | os.PathLike[str], task: str, split: str) -> Path:
    """The folder of the maps for a task, "semantic" or "instance".

    Raises:
        ValueError: there is only that of the other task; the message says what is in it.
    """
    name, other = ("labels", "instances") if task == "semantic" else ("instances", "labels")
    path, there = folder_of(root, name, split), folder_of(root, other, split)
    if there.is_dir() and not path.is_dir():
        if there == Path(root) / other / split:
            path = Path(root) / name / split
        holds = "" if pictures_by_name(there, MAP_SUFFIXES) else f" ({without_maps(there)})"
        raise ValueError(
            f"{path}: there is no such folder, only {there}{holds}; maps of objects, for "
            "the task instance, belong in instances/, of classes, for semantic, in labels/"
        )
    return path


def without_background(
    categories: Sequence[Category] | Sequence[str] | None,
) -> tuple[Category, ...] | None:
    """Classes that objects may have; `None` if there are none."""
    table = category_table(categories or None) or ()
    return tuple(c for c in table if c.name.lower().strip("_") != "background") or None


def _used_classes(segments: Mapping[str, Any]) -> set[int | None]:
    rows = [row for some in segments.values() if isinstance(some, list) for row in some]
    return {WHOLE.read(row.get("class")) for row in rows if isinstance(row, dict)}


def _pictures_of_other_splits(root: Path, images: Path) -> dict[str, Path]:
    beside = root.glob("*/images") if images.name == "images" else images.parent.iterdir()
    return {
        name: path
        for folder in sorted(beside)
        if folder != images
        for name, (path, *_) in pictures_by_name(folder).items()
    }


def _read_segments(path: Path) -> tuple[tuple[Category, ...], dict[str, Any]]:
    """Classes, and for each picture's name what should be a list of its segments."""
    content = read_json(path)
    names, images = content.get("classes"), content.get("images")
    if not isinstance(names, dict) or not isinstance(images, dict):
        raise ValueError(
            f"{path}: expected {{'classes': {{id: name}}, 'images': {{name: {{'segments': "
            "[{'id', 'class'}]}}}"
        )
    rows = [{"id": number, "name": name} for number, name in names.items()]
    segments = {
        composed(name): image.get("segments") if isinstance(image, dict) else None
        for name, image in images.items()
    }
    return parse_categories(rows, path).classes, segments


def _instance_entries(
    images: Path,
    labels: Path,
    listed: tuple[Path, dict[str, Any]] | None,
    maps: dict[str, Path],
    classes: dict[int, int],
    void: Sequence[int],
) -> list[Entry]:
    """Entries of two folders; `listed` is the JSON file and its rows for each name, `maps` those
    of classes."""
    entries = []
    for name, image, path in paired_files(images, labels):
        rows = None if listed is None else (listed[0], listed[1].get(name, []))
        read = partial(read_objects, name, image, path, rows, classes, void, maps.get(name))
        more = (*([] if listed is None else listed[:1]), *([maps[name]] if name in maps else []))
        entries.append(Entry(name, image, path, read, more=more))
    return entries


def read_objects(
    name: str,
    image: PictureFile,
    path: PictureFile,
    listed: tuple[PictureFile, Any] | None,
    classes: dict[int, int],
    void: Sequence[int],
    class_map: PictureFile | None = None,
) -> Annotation:
    """Objects from a map of ids.

    Args:
        path: the map; `void` values in it are crowds of any class.
        listed: the file that lists them, and its rows; `None`: they are of the class of most of
            their pixels in `class_map`, without it of the first class.
        classes: the number of each class by its id.
    """
    ids = read_instances(path)
    check_size(path, ids.shape, image)
    if listed is None:
        numbers = [n for n in np.unique(ids).tolist() if n not in (0, *void)]
        own = dict.fromkeys(numbers, min(classes))
        if class_map is not None:
            labels = read_labels(class_map)
            check_size(class_map, labels.shape, image)
            most = Overlaps.of(ids, labels).most_shared()
            own = {n: most[n] for n in numbers}
        listed = class_map or path, [{"id": n, "class": label} for n, label in own.items()]
    source, rows = listed
    segments, problems = listed_segments(source, name, rows, path, ids, classes, (0, *void))
    for value in void:
        area = int((ids == value).sum())
        if area:
            segments.append(Segment(value, VOID, area, crowd=True))
    return Annotation(
        name, image, ids.shape, name, ids=ids, segments=tuple(segments), problems=problems
    )


def write_folder_objects(
    root: str | os.PathLike[str],
    predictions: Iterable[tuple[str, Any]],
    categories: Sequence[Category],
) -> None:
    """Write predicted objects as instances/NAME.png and segments.json, for `read_folder`.

    With more than 65,535 objects in a picture it is NAME.tif, of 32 bits.
    Files that these writers wrote before are replaced, others never.

    Args:
        predictions: names of pictures, which keep their folders ("site1/a"), and objects with
            `masks` (N, H, W), `classes` (N,) and `scores` (N,). Where masks overlap, the pixel
            goes to the higher score; an object that has no pixel left is not written.

    Raises:
        ValueError: if a class is not in `categories`, a name is there twice or leads out of the
            folder, a score is not finite, or another file is in the way.
    """
    root = Path(root)
    images: dict[str, Any] = {}
    for name, predicted in predictions:
        if name in images:
            raise ValueError(f"{root}: expected each picture once, got {name} twice")
        objects = Objects.of(predicted)
        category_ids(objects.classes, categories)  # of hidden ones too
        found = objects.segment_map()
        path, other = (path_inside(root / "instances", f"{name}{end}") for end in (".png", ".tif"))
        if len(found.segments) > MOST_PNG_IDS:
            path, other = other, path
        write_map(path, found.ids)
        remove_ours(other)
        rows = [
            {"id": s.id, "class": categories[s.category].id, "score": s.score}
            for s in found.segments
        ]
        images[name] = {"segments": rows}
    table = {str(category.id): category.name for category in categories}
    write_json(root / _SEGMENTS, {"classes": table, "images": images})
