"""What is annotated in pictures, in one form for all file formats, and data sets of it.

Classes are numbered 0 to K - 1 in the order of a data set's category table; the numbers that files
use are the table's ids. Maps of classes have VOID where nothing is annotated.
"""

from __future__ import annotations

import colorsys
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pointformer.data.images import image_size

VOID = -1


@dataclass(frozen=True)
class Category:
    """A class: its number in files, its name, whether it is countable, and a color (R, G, B)."""

    id: int
    name: str
    is_thing: bool = True
    color: tuple[int, int, int] = (128, 128, 128)


@dataclass(frozen=True)
class Segment:
    """One object, or one region of stuff.

    Attributes:
        id: its value in the annotation's map of ids, or its number in the file.
        category: class, 0 to K - 1; VOID for a crowd that may be of any class.
        area: in pixels; from the file where that says so, which COCO sizes objects by.
        crowd: a region of several objects that are not told apart; scores ignore it.
        score: confidence of a prediction.
        mask: (H, W) bool; `None` where the map of ids has it.
    """

    id: int
    category: int
    area: float
    crowd: bool = False
    score: float = 1.0
    mask: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects as arrays: masks (N, H, W) bool, classes (N,) int64, scores (N,) float32."""

    masks: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    @staticmethod
    def of(predicted: Any, size: tuple[int, int]) -> Objects:
        """Arrays of an object with `masks`, `classes` and `scores`, tensors on the CPU included.

        Raises:
            ValueError: if the lengths differ or the masks are not of the height and width `size`.
        """
        masks = np.asarray(predicted.masks).astype(bool, copy=False)
        classes, scores = np.asarray(predicted.classes), np.asarray(predicted.scores, np.float32)
        if masks.shape != (len(classes), *size) or scores.shape != classes.shape:
            raise ValueError(
                f"predicted: expected masks ({len(classes)}, {size[0]}, {size[1]}), classes and "
                f"scores, got {masks.shape}, {classes.shape} and {scores.shape}"
            )
        return Objects(masks, classes.astype(np.int64), scores)


@dataclass(frozen=True, eq=False)
class Annotation:
    """One picture's annotation, or a prediction read from a file.

    Attributes:
        name: of the picture, unique in the data set.
        image: its file; `None` for predictions.
        size: height and width in pixels.
        id: what the file format calls the picture (COCO's image id), else the name.
        semantic: (H, W) int32 classes, VOID where there is none; `None` if segments are annotated.
        ids: (H, W) int32 map of segments; ids that no segment has are void. `None` if segments
            may overlap: then each has its mask.
        segments: objects and regions; empty if classes are annotated.
    """

    name: str
    image: Path | None
    size: tuple[int, int]
    id: int | str
    semantic: np.ndarray | None = field(default=None, repr=False)
    ids: np.ndarray | None = field(default=None, repr=False)
    segments: tuple[Segment, ...] = ()

    def mask(self, segment: Segment) -> np.ndarray:
        """(H, W) bool."""
        if segment.mask is not None:
            return segment.mask
        if self.ids is None:
            raise ValueError(f"{self.name}: segment {segment.id} has no mask, nor is there a map")
        return np.equal(self.ids, segment.id)

    def objects(self) -> Objects:
        """What a mask model learns: segments that are no crowds, or a mask per annotated class."""
        if self.semantic is not None:
            classes = np.unique(self.semantic[self.semantic != VOID])
            masks = self.semantic == classes[:, None, None]
            return Objects(masks, classes.astype(np.int64), np.ones(len(classes), np.float32))
        segments = [segment for segment in self.segments if not segment.crowd]
        masks = [self.mask(segment) for segment in segments]
        return Objects(
            np.stack(masks) if masks else np.zeros((0, *self.size), bool),
            np.array([segment.category for segment in segments], np.int64),
            np.array([segment.score for segment in segments], np.float32),
        )

    def classes(self) -> np.ndarray:
        """(H, W) int32 classes, VOID where there is none and in crowds.

        Where masks overlap, the smaller segment is on top.
        """
        if self.semantic is not None:
            return self.semantic
        classes = np.full(self.size, VOID, np.int32)
        for segment in sorted(self.segments, key=lambda segment: -segment.area):
            classes[self.mask(segment)] = VOID if segment.crowd else segment.category
        return classes


@dataclass(frozen=True)
class Entry:
    """Where an annotation comes from: `labels` is its own file, if it has one."""

    name: str
    image: Path | None
    labels: Path | None
    read: Callable[[], Annotation]


class Dataset(Sequence[Annotation]):
    """Annotated pictures, in order, each read from its files when asked for.

    Attributes:
        categories: the classes, in order.
        entries: one per picture; has the names without reading annotations.
        skipped: with `skip_bad`, what was left out so far, as name and error in one line.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        categories: Sequence[Category],
        entries: Iterable[Entry],
        problems: Mapping[str, str] | None = None,
        skip_bad: bool = False,
    ) -> None:
        """Raise, or with `skip_bad` skip, what is in `problems` or has a file missing."""
        problems = dict(problems or {})
        self.categories = tuple(categories)
        self.skip_bad = skip_bad
        self.entries: list[Entry] = []
        for entry in entries:
            if entry.name in problems:
                continue
            problem = _missing(entry, source)
            if problem is None:
                self.entries.append(entry)
            else:
                problems[entry.name] = problem
        if problems and not skip_bad:
            more = f" (and {len(problems) - 1} more such errors)" if len(problems) > 1 else ""
            raise ValueError(next(iter(problems.values())) + more)
        names = [entry.name for entry in self.entries]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{source}: expected different names of pictures, got {twice} twice")
        if not self.entries:
            skipped = f", {len(problems)} skipped" if problems else ""
            raise ValueError(f"{source}: expected annotated pictures, found none{skipped}")
        self.skipped = problems

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Annotation:  # type: ignore[override]
        """Read one annotation; errors are raised even with `skip_bad`."""
        if isinstance(index, slice):
            raise TypeError("a data set has no slices; index it with one number")
        return self.entries[index].read()

    def __iter__(self) -> Iterator[Annotation]:
        """All annotations; with `skip_bad`, without the bad ones, which `skipped` lists then."""
        for entry in self.entries:
            try:
                annotation = entry.read()
            except ValueError as error:
                if not self.skip_bad:
                    raise
                self.skipped[entry.name] = str(error)
            else:
                yield annotation


def distinct_color(index: int) -> tuple[int, int, int]:
    """A color for the class number `index`, far from those of its neighbors."""
    hue = index * 0.618034 % 1  # the golden ratio spreads any number of hues
    rgb = colorsys.hsv_to_rgb(hue, (0.85, 0.6)[index // 2 % 2], (0.95, 0.7)[index % 2])
    return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


def named_categories(names: Iterable[str], first: int = 0) -> tuple[Category, ...]:
    """Countable classes with ids from `first` on."""
    return tuple(
        Category(first + index, name, True, distinct_color(index))
        for index, name in enumerate(names)
    )


def read_json(path: str | os.PathLike[str], kind: type = dict) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: in one line that names the file, if it is missing, no JSON or no `kind`.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a JSON file, there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, but {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}")
    return content


def parse_categories(rows: Any, path: str | os.PathLike[str]) -> tuple[Category, ...]:
    """Classes from a JSON list of {id, name[, isthing][, color]}, sorted by id."""
    try:
        rows = sorted(rows, key=lambda row: row["id"])
        categories = tuple(
            Category(
                int(row["id"]),
                str(row["name"]),
                bool(row.get("isthing", True)),
                tuple(row.get("color") or distinct_color(index)),  # type: ignore[arg-type]
            )
            for index, row in enumerate(rows)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: expected categories as a list of {{id, name}}") from None
    if len({category.id for category in categories}) < len(categories):
        raise ValueError(f"{path}: expected categories with different ids")
    return categories


def read_categories(path: str | os.PathLike[str]) -> tuple[Category, ...]:
    """Classes from a JSON file: COCO's list of {id, name, isthing, color}, or a file with one."""
    content = read_json(path, object)
    rows = content.get("categories") if isinstance(content, dict) else content
    return parse_categories(rows, path)


def check_size(source: Path, size: tuple[int, int], image: Path | None) -> None:
    """Raise a ValueError naming `source` if the picture has another height and width."""
    if image is not None and image_size(image) != tuple(size):
        raise ValueError(
            f"{source}: expected the height and width of {image}, {image_size(image)}, "
            f"got {tuple(size)}"
        )


def check_ids(
    source: Path, ids: np.ndarray, listed: Sequence[int], where: str, void: Sequence[int] = (0,)
) -> dict[int, int]:
    """Area of each id of a map.

    Raises:
        ValueError: naming `source`, if `listed`, the ids in `where`, are not those of the map;
            `void` values need not be listed.
    """
    values, counts = np.unique(ids, return_counts=True)
    areas = dict(zip(values.tolist(), counts.tolist(), strict=True))
    if len(set(listed)) < len(listed):
        raise ValueError(f"{source}: {where} lists an id twice")
    for value in void:
        areas.pop(value, None)
    only_map, only_list = sorted(areas.keys() - {*listed}), sorted({*listed} - areas.keys())
    if only_map:
        raise ValueError(f"{source}: ids {_shortened(only_map)} are not in {where}")
    if only_list:
        raise ValueError(f"{source}: ids {_shortened(only_list)} of {where} are not in the picture")
    return areas


def listed_segments(
    source: Path,
    name: str,
    infos: Iterable[Mapping[str, Any]],
    classes: Mapping[int, int],
    areas: Mapping[int, int],
) -> list[Segment]:
    """Segments of an annotation from rows with "id", "class", and perhaps "crowd" and "score".

    Args:
        source, name: the file that lists them, and the annotation, for messages.
        classes: number of each class of the file.
        areas: of the ids, see `check_ids`.

    Raises:
        ValueError: naming both, if a class is not among `classes` or a score is no number.
    """
    segments = []
    for info in infos:
        number, kind = info["id"], info["class"]
        if kind not in classes:
            raise ValueError(f"{source}: segment {number} of {name} is of the unknown class {kind}")
        crowd, score = bool(info.get("crowd", 0)), info.get("score", 1)
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise ValueError(f"{source}: segment {number} of {name} has the score {score!r}")
        segments.append(Segment(number, classes[kind], areas[number], crowd, float(score)))
    return segments


def _shortened(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _missing(entry: Entry, source: str | os.PathLike[str]) -> str | None:
    if entry.image is not None and not entry.image.is_file():
        return f"{entry.labels or source}: annotates {entry.image}, but there is no such file"
    if entry.labels is not None and not entry.labels.is_file():
        picture = "" if entry.image is None else f" of {entry.image}"
        return f"{entry.labels}: expected the annotation{picture}, there is no such file"
    return None
