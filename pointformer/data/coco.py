"""COCO's JSON for objects (polygons, run lengths, crowds) and for panoptic segments (with PNGs).

Reading polygons and writing run lengths needs the package pycocotools.
"""

from __future__ import annotations

import math
import os
import reprlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pointformer._files import path_inside
from pointformer.annotations import Category, Mask, Objects, Segment, masks_of
from pointformer.data.annotations import (
    Annotation,
    CategoryTable,
    Dataset,
    Entry,
    category_ids,
    check_size,
    listed_segments,
    matched_classes,
    parse_categories,
    used_categories,
)
from pointformer.data.discovery import picture_name
from pointformer.data.images import image_size, read_image
from pointformer.data.json_files import (
    FLAG,
    IDENTIFIER,
    NUMBER,
    TEXT,
    WHOLE,
    read_json,
    repeated,
    shown,
    value_of,
)
from pointformer.data.writing import to_json, write_json, write_png, write_text


def mask_tools() -> Any:
    """The module pycocotools.mask."""
    try:
        from pycocotools import mask
    except ImportError:
        raise ImportError("COCO's masks need pycocotools: pip install pointformer[eval]") from None
    return mask


def encode_mask(mask: Mask, picture: tuple[int, int]) -> dict[str, Any]:
    """Run lengths, in a picture of so many rows and columns, as COCO writes them.

    Returns:
        `size`, [H, W], and `counts`, a string.
    """
    height, width = picture
    rows, columns = mask.window
    inner = np.zeros((columns.stop - columns.start, height), bool)
    inner[:, rows] = mask.pixels.T
    inner = np.pad(inner.ravel(), 1)
    ends = np.flatnonzero(inner[1:] != inner[:-1]) + mask.left * height
    counts = np.diff(np.r_[0, ends, height * width])
    counts = counts if counts[-1] else counts[:-1]  # the last run is not empty
    size = [height, width]
    encoded = mask_tools().frPyObjects({"counts": counts.tolist(), "size": size}, *size)
    return {"size": size, "counts": encoded["counts"].decode()}


def decode_mask(segmentation: Any, size: tuple[int, int], source: str) -> Mask:
    """The object in polygons or in run lengths, compressed or not.

    Polygons are cut off at the border of the picture.

    Raises:
        ValueError: beginning with `source`, if it is none of these, for another size, or polygons
            are lines, lie outside of the picture, have corners farther out than it is long, or
            seem to be in shares of its sides instead of pixels.
    """
    if isinstance(segmentation, list) and segmentation:
        return _filled_polygons(segmentation, size, source)
    try:
        given, counts = tuple(segmentation["size"]), segmentation["counts"]
        runs = _run_lengths(counts) if isinstance(counts, str | bytes) else _numbers(counts)
    except (KeyError, TypeError, ValueError):
        runs = None
    if runs is None:
        raise ValueError(
            f"{source}: expected polygons or run lengths as a mask, "
            f"got {reprlib.repr(segmentation)}{'; a box alone is none' * (not segmentation)}"
        )
    if given != tuple(size):
        raise ValueError(f"{source}: expected a mask of {tuple(size)}, got {reprlib.repr(given)}")
    total = math.prod(size)
    if not ((runs >= 0) & (runs <= total) & (runs % 1 == 0)).all() or runs.sum() != total:
        raise ValueError(f"{source}: expected run lengths of {total} pixels together as a mask")
    height = size[0]
    inside = np.arange(len(runs)) % 2 == 1
    ends = np.cumsum(runs.astype(np.int64))
    filled = np.flatnonzero(inside & (runs > 0))
    if not len(filled):
        return Mask.of(np.zeros((0, 0), bool))
    # Only the columns with pixels: an object is small beside its picture.
    left = int(ends[filled[0] - 1]) // height
    right = -(-int(ends[filled[-1]]) // height)
    lengths: np.ndarray = np.diff(
        np.clip(ends, left * height, right * height), prepend=left * height
    )
    pixels = np.repeat(inside, lengths).reshape(right - left, height).T
    return Mask.of(pixels, left=left)


def _numbers(values: Any) -> np.ndarray | None:
    """A flat list of finite numbers as float64; `None` if it is something else."""
    if not isinstance(values, list) or not {*map(type, values)} <= {int, float}:
        return None
    try:
        numbers = np.array(values, np.float64)
    except OverflowError:
        return None
    return numbers if np.isfinite(numbers).all() else None


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


def _filled_polygons(polygons: list, size: tuple[int, int], source: str) -> Mask:
    tools, (height, width) = mask_tools(), size
    touched = has_area = False
    for polygon in polygons:
        corners = _numbers(polygon)
        # pycocotools takes four numbers for a box, and reads past the end of an odd number.
        if corners is None or len(corners) < 6 or len(corners) % 2:
            raise ValueError(
                f"{source}: expected polygons of three corners x, y or more, "
                f"got {reprlib.repr(polygon)}"
            )
        x, y = corners[::2], corners[1::2]
        # Nor does it come back from coordinates that are far out.
        reach = max(size)
        if corners.min() < -reach or corners.max() > 2 * reach:
            raise ValueError(
                f"{source}: has corners far outside of its picture of {height} x {width} pixels: "
                f"x {x.min():g} to {x.max():g}, y {y.min():g} to {y.max():g}"
            )
        touched |= bool(x.max() > 0 and y.max() > 0 and x.min() < width and y.min() < height)
        offset = np.stack([x - x[0], y - y[0]])
        along = offset[:, np.abs(offset).sum(0).argmax()]
        has_area |= bool((offset[0] * along[1] != offset[1] * along[0]).any())
    if not has_area:
        raise ValueError(f"{source}: expected polygons with an area, got {reprlib.repr(polygons)}")
    if not touched:
        raise ValueError(f"{source}: lies outside of its picture of {height} x {width} pixels")
    corners = np.concatenate(polygons)
    # A mask of the first pixel alone has whole numbers.
    if corners.min() >= 0 and corners.max() <= 1 and (corners % 1).any():
        raise ValueError(
            f"{source}: has all corners within 0 to 1, got {reprlib.repr(polygons[0])}; if these "
            "are normalized, multiply x by the picture's width and y by its height"
        )
    filled = tools.merge(tools.frPyObjects(polygons, height, width))
    return decode_mask(filled, size, source)


@dataclass(frozen=True)
class _Picture:
    """A row of "images" that is as it should be; `size` where it says one."""

    id: int | str
    name: str
    path: Path
    size: tuple[int, int] | None


class _Pictures:
    """The rows of "images", by id.

    Attributes:
        good: by id as text.
        bad: ids, as text, of rows that are malformed or ambiguous.
        problems: what is wrong with these, by the picture's name where it is known.
    """

    def __init__(self, content: dict, source: Path, folder: str | os.PathLike[str]) -> None:
        self.problems: dict[str, str] = {}
        by_id: dict[str, list[_Picture | None]] = defaultdict(list)
        by_path: dict[Path, list[_Picture]] = defaultdict(list)
        for n, row in enumerate(_rows(content, "images", source)):
            what, key = f"entry {n} of the images", None
            try:
                key = value_of(row, "id", IDENTIFIER)
                what = f"image {shown(key)}"
                path = listed_path(folder, value_of(row, "file_name", TEXT))
                name = what = picture_name(path.relative_to(folder))
                # 0 or none: the picture's own.
                height, width = value_of(row, "height", WHOLE, 0), value_of(row, "width", WHOLE, 0)
            except ValueError as error:
                self.problems[what] = f"{source}: {what}: {error}"
                if key is not None:
                    by_id[str(key)].append(None)
            else:
                picture = _Picture(key, name, path, (height, width) if height or width else None)
                by_id[str(key)].append(picture)
                by_path[path].append(picture)
        ambiguous: dict[str, Sequence[_Picture | None]] = {
            f"have the id {shown(key)}": rows for key, rows in by_id.items() if len(rows) > 1
        }
        for same in by_path.values():
            if len({picture.id for picture in same}) > 1:
                ambiguous[f"are images {shown(same[0].id)} and {shown(same[1].id)}"] = same
        for why, rows in ambiguous.items():
            pictures = [picture for picture in rows if picture is not None]
            both = " and ".join(picture.path.name for picture in pictures[:2])
            for picture in pictures:
                self.problems[picture.name] = f"{source}: the pictures {both} {why}"
        self.good = {
            key: picture
            for key, (picture, *_) in by_id.items()
            if picture is not None and picture.name not in self.problems
        }
        self.bad = by_id.keys() - self.good.keys()


def listed_path(folder: str | os.PathLike[str], file_name: str) -> Path:
    """Path of a file that a JSON names; Windows's exports separate folders by backslashes, and
    accented letters may be composed otherwise in the JSON than on the disk.

    Raises:
        ValueError: the name is none, or leads out of the folder.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in file_name):
        raise ValueError(f"expected a file name, got {reprlib.repr(file_name)}")
    path = path_inside(folder, file_name.replace("\\", "/"), follow_links=True)
    if file_name.isascii() or path.is_file():
        return path
    name = os.path.relpath(path, folder)
    others = (Path(folder) / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((other for other in others if other.is_file()), path)


@dataclass(frozen=True)
class _Row:
    """A row of "annotations" or of results that is as it should be but for its mask."""

    what: str
    id: int | str
    category: int
    area: float | None
    crowd: bool
    score: float
    segmentation: Any


def read_coco_instances(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    categories: Sequence[Category] | None = None,
    skip_bad: bool = False,
) -> Dataset:
    """Objects of COCO's instances_*.json.

    Whole numbers may be written as 3.0 or "3"; an area that is missing or null is that of the mask.
    With `skip_bad` only what is bad itself is left out: an object, with a malformed mask or an
    unknown category, not the picture; of several pictures or objects with one id, all of them.
    An object without a pixel, such as a polygon thinner than one, is no error: it is left out, and
    listed in `skipped`.

    Args:
        images: folder of the pictures, in which the file's names are looked up.
        categories: the classes, if not those that the file lists, see `parse_categories`; they are
            found in it by their names, see `matched_classes`.

    Raises:
        ValueError: naming the file and the row, if something is malformed, of an unknown category
            or of a picture that is not there, an id or a picture is there twice, or a name leads
            out of the folder.
    """
    path = Path(path)
    content = read_json(path)
    table = _categories(content, path, categories, skip_bad)
    classes = table.numbers()
    pictures = _Pictures(content, path, images)
    problems = dict(pictures.problems)
    rows = _rows(content, "annotations", path)
    objects: dict[str, list[_Row]] = defaultdict(list)
    ids = (row.get("id") if isinstance(row, dict) else None for row in rows)
    twice = repeated(str(key) for key in map(IDENTIFIER.read, ids) if key is not None)
    for n, row in enumerate(rows):
        what = f"entry {n} of the annotations"
        try:
            number = value_of(row, "id", IDENTIFIER)
            what = f"annotation {shown(number)}"
            if str(number) in twice:
                raise ValueError("there are several with this id")
            image = value_of(row, "image_id", IDENTIFIER)
            if str(image) not in pictures.bad:
                if str(image) not in pictures.good:
                    raise ValueError(f"is of image {shown(image)}, which is not listed")
                area = value_of(row, "area", NUMBER, None)
                if area is not None and area < 0:
                    raise ValueError(f"expected an area of at least 0, got {area:g}")
                objects[str(image)].append(_row(row, what, number, classes, area, 1.0))
        except ValueError as error:
            problems[what] = f"{path}: {what}: {error}"
    entries = []
    for key, picture in pictures.good.items():
        read = partial(_read_objects, path, picture, objects[key])
        entries.append(Entry(picture.name, picture.path, None, read, more=(path,)))
    return Dataset(path, table.classes, entries, problems, skip_bad, table.headings)


def _categories(
    content: dict, path: Path, categories: Sequence[Category] | None, skip_bad: bool
) -> CategoryTable:
    """The classes with the file's ids."""
    if categories is not None and "categories" not in content:
        return CategoryTable(tuple(categories))
    own = parse_categories(content, path)
    used = () if skip_bad else used_categories(content.get("annotations"))
    return CategoryTable(matched_classes(categories, own.classes, path, used), own.headings)


def _row(
    row: dict,
    what: str,
    number: int | str,
    classes: dict[int, int],
    area: float | None,
    *score: float,
) -> _Row:
    """The values that objects and results share; `score` is the default, if there is one."""
    category = value_of(row, "category_id", WHOLE)
    if category not in classes:
        raise ValueError(f"is of the unknown category {category}")
    return _Row(
        what,
        number,
        classes[category],
        area,
        value_of(row, "iscrowd", FLAG, False),
        value_of(row, "score", NUMBER, *score),
        row.get("segmentation"),
    )


def _read_objects(path: Path, picture: _Picture, rows: list[_Row]) -> Annotation:
    size = picture.size or image_size(picture.path)
    check_size(path, size, picture.path)
    segments, problems, left_out = [], {}, {}
    for row in rows:
        try:
            mask = decode_mask(row.segmentation, size, f"{path}: {row.what}")
        except ValueError as error:
            problems[row.what] = str(error)
            continue
        if mask.area:
            area = float(mask.area) if row.area is None else row.area
            segments.append(Segment(row.id, row.category, area, row.crowd, row.score, mask))
        else:  # whoever counted it could neither learn nor find it
            left_out[row.what] = f"{path}: {row.what}: has no pixel"
    return Annotation(
        picture.name,
        picture.path,
        size,
        picture.id,
        segments=tuple(segments),
        problems=problems,
        left_out=left_out,
    )


def write_coco_results(
    path: str | os.PathLike[str],
    predictions: Iterable[tuple[int | str, Any]],
    categories: Sequence[Category],
) -> None:
    """Write predicted objects as COCO's results JSON, with run lengths.

    Args:
        path: the file; one that is there already is replaced if it is a file of results.
        predictions: image id (the annotation's `id`) and objects with `masks` (N, H, W),
            `classes` (N,) and `scores` (N,).

    Raises:
        ValueError: if a class is not in `categories`, an image is there twice, a score is not
            finite or another file is at `path`.
    """
    rows, seen = [], set()
    for image_id, predicted in predictions:
        if str(image_id) in seen:
            raise ValueError(f"{path}: expected each picture once, got {shown(image_id)} twice")
        seen.add(str(image_id))
        found = Objects.of(predicted)
        ids = category_ids(found.classes, categories)
        for mask, number, score in zip(found.masks, ids, found.scores.tolist(), strict=True):
            row = {"image_id": image_id, "category_id": number, "score": score}
            rows.append({**row, "segmentation": encode_mask(mask, found.size)})
    write_text(path, to_json(rows, path), lambda old: old.startswith(("[]", '[{"image_id": ')))


class CocoResults:
    """Predicted objects in COCO's results JSON; masks are decoded when asked for.

    Raises:
        ValueError: naming the file and the row, if one is malformed or of an unknown category.
    """

    def __init__(self, path: str | os.PathLike[str], categories: Sequence[Category]) -> None:
        self.path = Path(path)
        self.rows: dict[str, list[_Row]] = defaultdict(list)
        classes = CategoryTable(tuple(categories)).numbers()
        for n, row in enumerate(read_json(path, list)):
            what = f"entry {n} of the results"
            try:
                image = value_of(row, "image_id", IDENTIFIER)
                self.rows[str(image)].append(_row(row, what, n, classes, None))
            except ValueError as error:
                raise ValueError(f"{path}: {what}: {error}") from None

    def objects(self, annotation: Annotation) -> Objects:
        """Predictions for the picture of an annotation; may be none."""
        rows, size = self.rows.get(str(annotation.id), []), annotation.size
        return Objects(
            (decode_mask(row.segmentation, size, f"{self.path}: {row.what}") for row in rows),
            [row.category for row in rows],
            [row.score for row in rows],
            size,
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
        categories: see `read_coco_instances`; a file of predictions need not list them.

    Raises:
        ValueError: naming the file, if a PNG's ids are not those in the JSON, a category is
            unknown, an annotation's picture is not there or has none, an id, a picture or a PNG is
            there twice, or a name leads out of its folder.
    """
    path = Path(path)
    content = read_json(path)
    table = _categories(content, path, categories, skip_bad)
    pictures = None if images is None else _Pictures(content, path, images)
    problems = {} if pictures is None else dict(pictures.problems)
    rows: list[tuple[_Picture, Path, Any]] = []
    for n, row in enumerate(_rows(content, "annotations", path)):
        what = f"entry {n} of the annotations"
        try:
            image = value_of(row, "image_id", IDENTIFIER)
            what = f"annotation of image {shown(image)}"
            if pictures is not None and str(image) in pictures.bad:
                continue
            if pictures is not None and str(image) not in pictures.good:
                raise ValueError("this image is not listed")
            png = listed_path(folder, value_of(row, "file_name", TEXT))
        except ValueError as error:
            problems[what] = f"{path}: {what}: {error}"
        else:
            if pictures is None:
                picture = _Picture(image, picture_name(png.relative_to(folder)), png, None)
            else:
                picture = pictures.good[str(image)]
            rows.append((picture, png, row.get("segments_info")))
    entries = []
    ids = repeated(str(picture.id) for picture, _, _ in rows)
    pngs = repeated(str(png) for _, png, _ in rows)
    for picture, png, segments in rows:
        if str(picture.id) in ids or str(png) in pngs:
            what = f"image {shown(picture.id)}" if str(picture.id) in ids else str(png)
            problems[picture.name] = f"{path}: {picture.name}: several annotations are of {what}"
        image = None if pictures is None else picture.path
        read = partial(_read_panoptic, path, picture, image, png, segments, table.numbers())
        entries.append(Entry(picture.name, image, png, read, more=(path,)))
    if pictures is not None:
        annotated = {str(picture.id) for picture, _, _ in rows}
        for key, picture in pictures.good.items():
            if key not in annotated:
                problems.setdefault(
                    picture.name, f"{path}: there is no annotation of {picture.path}"
                )
    return Dataset(path, table.classes, entries, problems, skip_bad, table.headings)


def _read_panoptic(
    path: Path,
    picture: _Picture,
    image: Path | None,
    png: Path,
    segments: Any,
    classes: dict[int, int],
) -> Annotation:
    # Colors of 16 bits are those of 8, as programs widen them.
    ids = read_image(png, intensities="full") @ np.array([1, 256, 65536], np.int32)
    check_size(png, ids.shape, image)
    if picture.size not in (None, ids.shape):
        raise ValueError(f"{path}: {picture.name}: expected the size {ids.shape}, as {png} has it")
    found, problems = listed_segments(
        path, picture.name, segments, png, ids, classes, keys=("category_id", "iscrowd")
    )
    return Annotation(
        picture.name,
        image,
        ids.shape,
        picture.id,
        ids=ids,
        segments=tuple(found),
        problems=problems,
    )


def write_coco_panoptic(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    predictions: Iterable[tuple[Annotation, Any]],
    categories: Sequence[Category],
) -> None:
    """Write segments as COCO's panoptic JSON and PNGs.

    Files that these writers wrote before are replaced, others never.

    Args:
        folder: for the PNGs, `folder`/NAME.png; a NAME with folders ("site1/a") keeps them.
        predictions: the annotation, for its name and id, and what was predicted, with `ids`
            (H, W), 0 where there is no segment, and `segments` with `id`, `category` and `score`
            (and `crowd`, if need be). A segment without a pixel is not written.

    Raises:
        ValueError: if an id is not from 1 to 2 ** 24 - 1 or is there twice, a category is not in
            `categories`, a picture is there twice, its name leads out of `folder`, or another file
            is in the way.
    """
    images: list[dict[str, Any]] = []
    rows = []
    seen: set[str] = set()
    for annotation, predicted in predictions:
        name, keys = annotation.name, {f"name {annotation.name}", f"id {annotation.id}"}
        if keys & seen:
            raise ValueError(f"{path}: expected each picture once, got {min(keys & seen)} twice")
        seen |= keys
        ids = np.asarray(predicted.ids)
        listed = [int(segment.id) for segment in predicted.segments]
        if listed and not (min(listed) > 0 and max(listed) < 1 << 24):
            raise ValueError(f"{name}: expected ids of 1 to {(1 << 24) - 1}")
        if len({*listed}) < len(listed):
            raise ValueError(f"{name}: expected different ids of segments")
        ids = np.where(np.isin(ids, listed), ids, 0)
        infos = []
        classes = np.array([int(segment.category) for segment in predicted.segments], np.int64)
        numbers = category_ids(classes, categories)
        masks = masks_of(ids, listed)
        for segment, number, mask in zip(predicted.segments, numbers, masks, strict=True):
            if mask.area:
                left, top, right, bottom = mask.box
                infos.append(
                    {
                        "id": int(segment.id),
                        "category_id": number,
                        "area": mask.area,
                        "bbox": [left, top, right - left, bottom - top],
                        "iscrowd": int(getattr(segment, "crowd", False)),
                        "score": float(segment.score),
                    }
                )
        png = f"{name}.png"
        channels = [(ids >> shift & 255).astype(np.uint8) for shift in (0, 8, 16)]
        write_png(path_inside(folder, png), np.stack(channels, 2))
        rows.append({"image_id": annotation.id, "file_name": png, "segments_info": infos})
        file_name = f"{name}.jpg"
        if annotation.image is not None:
            file_name = str(PurePosixPath(name).with_name(annotation.image.name))
        size = {"height": ids.shape[0], "width": ids.shape[1]}
        images.append({"id": annotation.id, "file_name": file_name, **size})
    table = [
        {"id": c.id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)}
        for c in categories
    ]
    write_json(path, {"images": images, "annotations": rows, "categories": table})


def _rows(content: dict, key: str, path: Path) -> list:
    if not isinstance(content.get(key), list):
        raise ValueError(f"{path}: expected a list {key!r}")
    return content[key]
