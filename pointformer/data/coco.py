"""COCO's JSON for objects (polygons, run lengths, crowds) and for panoptic segments (with PNGs).

Reading polygons and writing run lengths needs the package pycocotools.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
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
    check_ids,
    check_size,
    listed_segments,
    parse_categories,
    read_json,
)
from pointformer.data.images import read_image
from pointformer.data.labels import write_png

_TYPES: dict[str, Any] = {
    "id": int | str,
    "image_id": int | str,
    "category_id": int,
    "file_name": str,
    "height": int,
    "width": int,
    "iscrowd": int,
    "area": int | float,
    "score": int | float,
    "segments_info": list,
}


def mask_tools() -> Any:
    """The module pycocotools.mask."""
    try:
        from pycocotools import mask
    except ImportError:
        raise ImportError("COCO's masks need pycocotools: pip install pointformer[eval]") from None
    return mask


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths of (H, W) bool as COCO writes them: `size` and `counts`, a string."""
    mask = np.asarray(mask, bool)
    height, width = mask.shape
    columns = np.flatnonzero(mask.any(0))
    ends = np.zeros(0, np.int64)
    if len(columns):
        first, last = columns[0], columns[-1] + 1
        inner = np.pad(mask[:, first:last].T.ravel(), 1)
        ends = np.flatnonzero(inner[1:] != inner[:-1]) + first * height
    counts = np.diff(np.r_[0, ends, height * width])
    counts = counts if counts[-1] else counts[:-1]  # the last run is not empty
    size = [height, width]
    encoded = mask_tools().frPyObjects({"counts": counts.tolist(), "size": size}, *size)
    return {"size": size, "counts": encoded["counts"].decode()}


def decode_mask(segmentation: Any, size: tuple[int, int], source: str) -> np.ndarray:
    """(H, W) bool from polygons or from run lengths, compressed or not.

    Raises:
        ValueError: beginning with `source`, if it is none of these or for another size.
    """
    try:
        if isinstance(segmentation, list) and segmentation:
            return _filled_polygons(segmentation, size)
        given, counts = tuple(segmentation["size"]), segmentation["counts"]
        if isinstance(counts, str | bytes):
            counts = _run_lengths(counts)
        counts = np.array(counts, np.int64)
        valid = counts.ndim == 1 and (counts >= 0).all() and counts.sum() == math.prod(given)
    except (KeyError, TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise ValueError(f"{source}: expected polygons or run lengths as a mask")
    if given != tuple(size):
        raise ValueError(f"{source}: expected a mask of {tuple(size)}, got {given}")
    runs = np.arange(len(counts)) % 2 == 1
    return np.repeat(runs, counts).reshape(size[1], size[0]).T


def _run_lengths(text: str | bytes) -> np.ndarray:
    """Run lengths from COCO's string: 5 bits a character, lowest first, bit 5 set if more follow.

    From the fourth on, runs are stored as the difference to the run before last.
    """
    text = text.encode("ascii") if isinstance(text, str) else text
    codes = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(ends) or ends[-1] != len(codes) - 1 or codes.min() < 0 or codes.max() > 63:
        raise ValueError("no run lengths")
    starts = np.r_[0, ends[:-1] + 1]
    lengths = ends + 1 - starts
    if lengths.max() > 7:
        raise ValueError("a run longer than any picture")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    counts = np.add.reduceat((codes & 31) << shifts, starts)
    counts -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)  # the last bit is the sign
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def _filled_polygons(polygons: list, size: tuple[int, int]) -> np.ndarray:
    tools, reach = mask_tools(), max(size)
    for polygon in polygons:
        corners = np.array(polygon, float)
        # pycocotools neither checks this nor comes back from coordinates that are far out.
        inside = (corners >= -reach) & (corners <= 2 * reach)
        if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2 or not inside.all():
            raise ValueError("no polygon")
    return decode_mask(tools.merge(tools.frPyObjects(polygons, *size)), size, "polygons")


def read_coco_instances(
    path: str | os.PathLike[str], images: str | os.PathLike[str], *, skip_bad: bool = False
) -> Dataset:
    """Objects of COCO's instances_*.json.

    Args:
        images: folder of the pictures.

    Raises:
        ValueError: naming the file, if an annotation is malformed, of an unknown category or of a
            picture that is not there.
    """
    path, images = Path(path), Path(images)
    content = read_json(path)
    categories = parse_categories(_rows(content, "categories", path), path)
    classes = {category.id: n for n, category in enumerate(categories)}
    pictures = _pictures(content, path)
    problems: dict[str, str] = {}
    annotations: dict[Any, list[dict]] = {key: [] for key in pictures}
    keys = ("id", "image_id", "category_id", "segmentation")
    for row in _checked(_rows(content, "annotations", path), keys, path, "annotations"):
        what = f"annotation {row['id']}"
        if row["image_id"] not in pictures:
            problems[what] = f"{path}: {what} is of image {row['image_id']}, which is not listed"
        elif row["category_id"] not in classes:
            name = _stem(pictures[row["image_id"]]["file_name"])
            problems[name] = f"{path}: {what} is of the unknown category {row['category_id']}"
        else:
            annotations[row["image_id"]].append(row)
    entries = []
    for key, picture in pictures.items():
        name, image = _stem(picture["file_name"]), images / picture["file_name"]
        read = partial(_read_objects, path, name, image, picture, annotations[key], classes)
        entries.append(Entry(name, image, None, read))
    return Dataset(path, categories, entries, problems, skip_bad)


def _read_objects(
    path: Path,
    name: str,
    image: Path,
    picture: dict,
    rows: list[dict],
    classes: dict[int, int],
) -> Annotation:
    size = picture["height"], picture["width"]
    check_size(path, size, image)
    segments = []
    for row in rows:
        mask = decode_mask(row["segmentation"], size, f"{path}: annotation {row['id']}")
        segments.append(
            Segment(
                row["id"],
                classes[row["category_id"]],
                float(row.get("area", mask.sum())),
                bool(row.get("iscrowd", 0)),
                float(row.get("score", 1)),
                mask,
            )
        )
    return Annotation(name, image, size, picture["id"], segments=tuple(segments))


def write_coco_results(
    path: str | os.PathLike[str],
    predictions: Iterable[tuple[int | str, Any]],
    categories: Sequence[Category],
) -> None:
    """Write predicted objects as COCO's results JSON, with run lengths.

    Args:
        predictions: image id (the annotation's `id`) and objects with `masks` (N, H, W),
            `classes` (N,) and `scores` (N,).
    """
    rows = []
    for image_id, predicted in predictions:
        found = Objects.of(predicted, np.shape(predicted.masks)[1:])
        for mask, category, score in zip(
            found.masks, found.classes.tolist(), found.scores.tolist(), strict=True
        ):
            row = {"image_id": image_id, "category_id": categories[category].id, "score": score}
            rows.append({**row, "segmentation": encode_mask(mask)})
    _write_json(path, rows)


class CocoResults:
    """Predicted objects in COCO's results JSON; masks are decoded when asked for.

    Raises:
        ValueError: naming the file, if a row is malformed or of an unknown category.
    """

    def __init__(self, path: str | os.PathLike[str], categories: Sequence[Category]) -> None:
        self.path = Path(path)
        self.classes = {category.id: n for n, category in enumerate(categories)}
        self.rows: dict[Any, list[dict]] = {}
        keys = ("image_id", "category_id", "segmentation", "score")
        for row in _checked(read_json(path, list), keys, self.path, "results"):
            if row["category_id"] not in self.classes:
                raise ValueError(f"{path}: {row['category_id']} is an unknown category")
            self.rows.setdefault(row["image_id"], []).append(row)

    def objects(self, annotation: Annotation) -> Objects:
        """What was predicted for the picture of an annotation; may be nothing."""
        rows, size = self.rows.get(annotation.id, []), annotation.size
        source = f"{self.path}: a result for image {annotation.id}"
        masks = [decode_mask(row["segmentation"], size, source) for row in rows]
        return Objects(
            np.stack(masks) if masks else np.zeros((0, *size), bool),
            np.array([self.classes[row["category_id"]] for row in rows], np.int64),
            np.array([row["score"] for row in rows], np.float32),
        )


def read_coco_panoptic(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    categories: Sequence[Category] | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Segments of COCO's panoptic JSON with a folder of PNGs, id = R + 256 G + 65536 B.

    Args:
        images: folder of the pictures; `None` to read predictions, which need none.
        categories: the classes, if the file does not list them.

    Raises:
        ValueError: naming the file, if a PNG's ids are not those in the JSON, a category is
            unknown, or an annotation's picture is not there.
    """
    path, folder = Path(path), Path(folder)
    content = read_json(path)
    if categories is None:
        categories = parse_categories(_rows(content, "categories", path), path)
    classes = {category.id: n for n, category in enumerate(categories)}
    pictures = _pictures(content, path) if images is not None else {}
    problems: dict[str, str] = {}
    entries = []
    keys = ("image_id", "file_name", "segments_info")
    for row in _checked(_rows(content, "annotations", path), keys, path, "annotations"):
        key, image = row["image_id"], None
        name = _stem(row["file_name"])
        if images is not None:
            if key not in pictures:
                problems[name] = f"{path}: {name} is of image {key}, which is not listed"
                continue
            image = Path(images) / pictures[key]["file_name"]
            name = _stem(pictures[key]["file_name"])
        png = folder / row["file_name"]
        read = partial(_read_panoptic, path, name, image, png, row, classes)
        entries.append(Entry(name, image, png, read))
    return Dataset(path, categories, entries, problems, skip_bad)


def _read_panoptic(
    path: Path, name: str, image: Path | None, png: Path, row: dict, classes: dict[int, int]
) -> Annotation:
    ids = read_image(png) @ np.array([1, 256, 65536], np.int32)
    check_size(png, ids.shape, image)
    infos = _checked(row["segments_info"], ("id", "category_id"), path, f"segments of {name}")
    if not all(isinstance(info["id"], int) for info in infos):
        raise ValueError(f"{path}: expected numbers as ids in the segments of {name}")
    areas = check_ids(png, ids, [info["id"] for info in infos], path.name)
    infos = [
        {**info, "class": info["category_id"], "crowd": info.get("iscrowd", 0)} for info in infos
    ]
    segments = listed_segments(path, name, infos, classes, areas)
    return Annotation(name, image, ids.shape, row["image_id"], ids=ids, segments=tuple(segments))


def write_coco_panoptic(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    predictions: Iterable[tuple[Annotation, Any]],
    categories: Sequence[Category],
) -> None:
    """Write segments as COCO's panoptic JSON and PNGs.

    Args:
        predictions: the annotation, for its name and id, and what was predicted, with `ids`
            (H, W), 0 where there is no segment, and `segments` with `id`, `category` and `score`
            (and `crowd`, if need be).

    Raises:
        ValueError: if an id is not from 1 to 2 ** 24 - 1.
    """
    images, rows = [], []
    for annotation, predicted in predictions:
        ids = np.asarray(predicted.ids)
        listed = [int(segment.id) for segment in predicted.segments]
        if listed and not (min(listed) > 0 and max(listed) < 1 << 24):
            raise ValueError(f"{annotation.name}: expected ids of 1 to {(1 << 24) - 1}")
        ids = np.where(np.isin(ids, listed), ids, 0)
        png = f"{annotation.name}.png"
        channels = [(ids >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)]
        write_png(Path(folder) / png, np.stack(channels, 2))
        infos = []
        for segment in predicted.segments:
            mask = ids == int(segment.id)
            infos.append(
                {
                    "id": int(segment.id),
                    "category_id": categories[int(segment.category)].id,
                    "area": int(mask.sum()),
                    "bbox": _box(mask),
                    "iscrowd": int(getattr(segment, "crowd", False)),
                    "score": float(segment.score),
                }
            )
        rows.append({"image_id": annotation.id, "file_name": png, "segments_info": infos})
        size = {"height": ids.shape[0], "width": ids.shape[1]}
        file_name = annotation.image.name if annotation.image else f"{annotation.name}.jpg"
        images.append({"id": annotation.id, "file_name": file_name, **size})
    table = [
        {"id": c.id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)}
        for c in categories
    ]
    _write_json(path, {"images": images, "annotations": rows, "categories": table})


def _box(mask: np.ndarray) -> list[int]:
    """x, y, width, height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0, 0, 0, 0]
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


def _stem(file_name: str) -> str:
    return os.path.splitext(file_name)[0]


def _rows(content: dict, key: str, path: Path) -> list:
    if not isinstance(content.get(key), list):
        raise ValueError(f"{path}: expected a list {key!r}")
    return content[key]


def _checked(rows: Any, keys: Sequence[str], path: Path, what: str) -> list[dict]:
    """`rows` if they are dicts with all the keys, and values are of the types they should be."""
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: expected {what} as objects with keys, got {row!r:.40}")
        lacks = [key for key in keys if key not in row]
        lacks += [k for k, types in _TYPES.items() if k in row and not isinstance(row[k], types)]
        if lacks:
            raise ValueError(f"{path}: entry {number} of the {what} has no valid {lacks[0]!r}")
    return rows


def _pictures(content: dict, path: Path) -> dict[Any, dict]:
    keys = ("id", "file_name", "height", "width")
    rows = _checked(_rows(content, "images", path), keys, path, "images")
    return {row["id"]: row for row in rows}


def _write_json(path: str | os.PathLike[str], content: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
