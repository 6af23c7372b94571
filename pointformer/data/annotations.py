"""Annotated pictures in one form for all file formats, and data sets of them."""

from __future__ import annotations

import colorsys
import copy
import hashlib
import itertools
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from pointformer._checks import brief
from pointformer.annotations import OBJECT, VOID, Category, Mask, Objects, Segment, masks_of
from pointformer.data.discovery import composed
from pointformer.data.images import Reading, image_size, is_turned, read_image
from pointformer.data.json_files import FLAG, NUMBER, TEXT, WHOLE, read_json, repeated, value_of
from pointformer.data.packed import FileState, PictureFile, file_of, is_there, state_of

SKIP_HINT = "skip_bad (--skip-bad) leaves out what is bad"


@dataclass(frozen=True, eq=False)
class Annotation:
    """One picture's annotation, or a prediction read from a file.

    Attributes:
        name: of the picture, unique in the data set: its path there without the suffix ("site1/a").
        image: its file, or part of a larger one; `None` for predictions.
        size: height and width in pixels.
        id: what the file format calls the picture (COCO's image id), else the name.
        semantic: (H, W) int32 classes, VOID where there is none; `None` if segments are annotated.
        ids: (H, W) int32 map of segments; ids that no segment has are void. `None` if segments
            may overlap: then each has its mask.
        segments: objects and regions; empty if classes are annotated.
        label: class of the picture as a whole, VOID where there is none.
        problems: of objects that are in the files but not in `segments`, as name and error.
        left_out: the same of objects without a pixel, which are no errors.
    """

    name: str
    image: PictureFile | None
    size: tuple[int, int]
    id: int | str
    semantic: np.ndarray | None = field(default=None, repr=False)
    ids: np.ndarray | None = field(default=None, repr=False)
    segments: tuple[Segment, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict, repr=False)
    label: int = VOID
    left_out: Mapping[str, str] = field(default_factory=dict, repr=False)

    @staticmethod
    def of_objects(
        ids: np.ndarray, name: str = "", image: PictureFile | None = None, category: int = 0
    ) -> Annotation:
        """Objects of one class from a map of ids (H, W), 0 being background."""
        values, areas = np.unique(ids, return_counts=True)
        segments = tuple(
            Segment(value, category, area)
            for value, area in zip(values.tolist(), areas.tolist(), strict=True)
            if value
        )
        return Annotation(name, image, ids.shape, name, ids=ids, segments=segments)

    def read_image(self, **reading: Unpack[Reading]) -> np.ndarray:
        """The picture, (H, W, 3) uint8.

        Args:
            reading: how it is read, see `pointformer.data.Reading`.

        Raises:
            ValueError: there is none, it cannot be read, or has another size; the message names it.
        """
        if self.image is None:
            raise ValueError(f"{self.name}: an annotation without its picture")
        image = read_image(self.image, **reading)
        if image.shape[:2] != self.size:
            height, width = self.size
            raise ValueError(
                f"{self.image}: has {image.shape[0]} x {image.shape[1]} pixels, its annotation "
                f"{height} x {width}"
            )
        return image

    def masks(self) -> list[Mask]:
        """Of each segment.

        Raises:
            ValueError: if a segment has no mask and there is no map of ids.
        """
        mapped = [segment.id for segment in self.segments if segment.mask is None]
        if mapped and self.ids is None:
            raise ValueError(f"{self.name}: segment {mapped[0]} has no mask, nor is there a map")
        found = iter([] if self.ids is None else masks_of(self.ids, mapped))
        return [next(found) if s.mask is None else s.mask for s in self.segments]

    def objects(self) -> Objects:
        """Targets of mask models: segments that are no crowds, or a mask per annotated class."""
        if self.semantic is not None:
            classes = np.unique(self.semantic[self.semantic != VOID])
            masks = masks_of(self.semantic, classes.tolist())
            return Objects(masks, classes, np.ones(len(classes)), self.size)
        pairs = zip(self.segments, self.masks(), strict=True)
        kept = [(segment, mask) for segment, mask in pairs if not segment.crowd]
        return Objects(
            [mask for _, mask in kept],
            [segment.category for segment, _ in kept],
            [segment.score for segment, _ in kept],
            self.size,
        )

    def classes(self) -> np.ndarray:
        """(H, W) int32 classes, VOID where there is none and in crowds.

        Where masks overlap, the smaller segment is on top.
        """
        if self.semantic is not None:
            return self.semantic
        return self._map_of(
            [VOID if segment.crowd else segment.category for segment in self.segments], VOID
        )

    def instances(self) -> tuple[np.ndarray, np.ndarray]:
        """(H, W) int32 numbers of the objects from 1 on, 0 elsewhere; (H, W) bool of the crowds.

        Where objects overlap, the smaller one is on top.
        """
        numbers = [None if s.crowd else n for n, s in enumerate(self.segments, 1)]
        crowds = np.zeros(self.size, bool)
        for segment, mask in zip(self.segments, self.masks(), strict=True):
            if segment.crowd:
                crowds[mask.window] |= mask.pixels
        return self._map_of(numbers, 0), crowds

    def label_map(self) -> tuple[np.ndarray, np.ndarray]:
        """(H, W) int32, the same number where the same is annotated: of the class in a map of
        classes, else of the object or segment; (H, W) bool where nothing is known."""
        if self.semantic is not None:
            return self.semantic, self.semantic == VOID
        return self.instances()

    def _map_of(self, values: Sequence[int | None], empty: int) -> np.ndarray:
        """(H, W) int32 of the segments' values but `None`, smaller segments on top.

        In a crop, what was smaller before: the same as in the picture is on top.
        """
        picture = np.full(self.size, empty, np.int32)
        areas = [s.area if s.whole is None else s.whole for s in self.segments]
        rows = zip(areas, values, self.masks(), strict=True)
        for _, value, mask in sorted(rows, key=lambda row: -row[0]):
            if value is not None:
                picture[mask.window][mask.pixels] = value
        return picture


@dataclass(frozen=True)
class Entry:
    """Source of an annotation.

    Attributes:
        name: of the picture.
        image: its file, or part of a larger one.
        labels: the same of the annotation, if it has one of its own.
        read: gives the annotation.
        label: class of the picture as a whole, where that is known without reading.
        more: other files that the annotation depends on, such as the one that lists all objects.
        part: the split, where a file has samples or points of several.
    """

    name: str
    image: PictureFile | None
    labels: PictureFile | None
    read: Callable[[], Annotation]
    label: int = VOID
    more: tuple[PictureFile, ...] = ()
    part: str = ""

    @property
    def files(self) -> list[Path]:
        """All files that it comes from."""
        return [file_of(file) for file in self._parts]

    @property
    def state(self) -> list[tuple[str, FileState | None]]:
        """Of the files, as they are now: another one when one of them changes."""
        return [(os.path.abspath(str(file)), state_of(file)) for file in self._parts]

    @property
    def _parts(self) -> list[PictureFile]:
        return [file for file in (self.image, self.labels, *self.more) if file is not None]


class Dataset(Sequence[Annotation]):
    """Annotated pictures, in order, each read from its files when asked for.

    Attributes:
        source: the file or folder of its annotations.
        categories: the classes, in order.
        entries: one per picture; has the names without reading annotations.
        skipped: what was left out so far, as name and error in one line: categories that are no
            classes, objects without a pixel ("annotation 7"); with `skip_bad`, pictures ("site1/a")
            and single objects ("annotation 12") that are bad.
    """

    noun = "picture"

    def __init__(
        self,
        source: str | os.PathLike[str],
        categories: Sequence[Category],
        entries: Iterable[Entry],
        problems: Mapping[str, str] | None = None,
        skip_bad: bool = False,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        """Raise, or with `skip_bad` skip, what is in `problems`, ambiguous, or has a file missing.

        Args:
            skipped: what is left out in any case.
        """
        self.source = source
        self.categories = tuple(categories)
        twice = repeated(str(category.id) for category in self.categories)
        if twice:
            raise ValueError(
                f"{source}: expected categories with different ids, got {min(twice)} twice"
            )
        self.skip_bad = skip_bad
        self.entries: list[Entry] = []
        problems = dict(problems or {})
        named: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            named[entry.name].append(entry)
        for name, (entry, *others) in named.items():
            if name in problems:
                continue
            problem = _ambiguous(entry, others[0]) if others else _missing(entry, source)
            if problem is None:
                self.entries.append(entry)
            else:
                problems[name] = problem
        if problems and not skip_bad:
            raise _error_of(problems)
        if not self.entries:
            left_out = [f" ({len(problems)} skipped: {problem})" for problem in problems.values()]
            raise ValueError(
                f"{source}: expected annotated {self.noun}s, found none{''.join(left_out[:1])}"
            )
        self.skipped = {**(skipped or {}), **problems}

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def digest(self) -> str:
        """Of the names of the pictures in their order."""
        names = [entry.name for entry in self.entries]
        return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()

    def subset(self, indices: Iterable[int]) -> Dataset:
        """Some of the pictures, in this order."""
        part = copy.copy(self)
        part.entries = [self.entries[index] for index in indices]
        part.skipped = dict(self.skipped)
        return part

    def divided(self, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """The data set without a share of its pictures, and that share.

        Which pictures that are is a function of their names and the seed: of each class of pictures
        (see `Entry.label`) those whose hashes are lowest. So pictures that come or go change little
        for the others. Classes of few pictures give none as long as others do.

        Raises:
            ValueError: the share is not between 0 and 1, or there is only one picture.
        """
        if not 0 < share < 1:
            raise ValueError(f"val_share: expected a number between 0 and 1, got {share}")
        if len(self) < 2:
            raise ValueError(
                f"{self.entries[0].image or self.entries[0].name}: is the only {self.noun}; "
                "expected at least two, to learn from and to be scored on (data.val_share=0 keeps "
                "none)"
            )
        by_class: dict[int, list[int]] = defaultdict(list)
        ranks = [
            hashlib.sha256(f"{seed}/{entry.name}".encode("utf-8", "surrogateescape")).digest()
            for entry in self.entries
        ]
        for index in sorted(range(len(self)), key=ranks.__getitem__):
            by_class[self.entries[index].label].append(index)
        kept = {
            index
            for members in by_class.values()
            for index in members[: min(round(share * len(members)), len(members) - 1)]
        }
        if not kept:  # of the largest class
            kept = {max(by_class.values(), key=len)[0]}
        return (
            self.subset(index for index in range(len(self)) if index not in kept),
            self.subset(sorted(kept)),
        )

    def __getitem__(self, index: int) -> Annotation:  # type: ignore[override]
        """Read one annotation; of a picture as a whole, errors are raised even with `skip_bad`."""
        if isinstance(index, slice):
            raise TypeError("a data set has no slices; index it with one number")
        annotation = self.entries[index].read()
        if annotation.problems and not self.skip_bad:
            raise _error_of(annotation.problems)
        self.skipped.update(annotation.problems)
        self.skipped.update(annotation.left_out)
        return annotation

    def __iter__(self) -> Iterator[Annotation]:
        """All annotations; with `skip_bad`, without the bad ones, which `skipped` lists then."""
        for index, entry in enumerate(self.entries):
            try:
                annotation = self[index]
            except ValueError as error:
                if not self.skip_bad:
                    raise
                self.skipped[entry.name] = str(error)
            else:
                yield annotation


def _error_of(problems: Mapping[str, str]) -> ValueError:
    first, *more = dict.fromkeys(problems.values())
    others = f" (and {len(more)} more such errors)" if more else ""
    return ValueError(f"{first}{others}; {SKIP_HINT}")


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


def category_table(
    categories: Sequence[Category] | Sequence[str] | None,
) -> tuple[Category, ...] | None:
    """Classes that are given as such or by their names; `None` if they are not given.

    Raises:
        ValueError: there are none, or two of one name.
    """
    if categories is None:
        return None
    if not categories:
        raise ValueError("categories: expected at least one")
    given = [category for category in categories if isinstance(category, Category)]
    if len(given) == len(categories):
        return tuple(given)
    names = [c.name if isinstance(c, Category) else c for c in categories]
    twice = repeated(names)
    if twice:
        raise ValueError(f"categories: expected different names, got {min(twice)!r:.80} twice")
    return named_categories(names)


def are_named(categories: Sequence[Category]) -> bool:
    """Whether classes have names that say more than a number, or than "object"."""
    return any(not (c.name.isdecimal() or c.name == OBJECT) for c in categories)


def matched_classes(
    wanted: Sequence[Category] | Sequence[str] | None,
    listed: Sequence[Category],
    source: str | os.PathLike[str],
    used: Iterable[int | None] = (),
) -> tuple[Category, ...]:
    """Classes with the ids that a data set has for their names; those that it lacks have free ones.

    Args:
        wanted: of a model or another split. Names without ids are those of the labels 0, 1, ...,
            whatever the data set lists; `None`: the classes that it lists.
        listed: as the data set lists them. Where either side has only numbers as names, not all of
            which are found, ids are the same in both.
        source: of the list.
        used: ids in annotations that must be of wanted classes.

    Raises:
        ValueError: naming the source and the classes of both sides, which have other names.
    """
    table = category_table(wanted)
    if table is None:
        return tuple(listed)
    if not all(isinstance(category, Category) for category in wanted or ()):
        return table
    key = _name_key(table, listed)
    places = {key(category.name): category.id for category in listed}
    numbers = [places.get(key(category.name)) for category in table]
    named = are_named(table) and are_named(listed)
    if numbers == [None] and len(listed) == 1:  # of one class it is clear which is meant
        numbers = [listed[0].id]
        if named:
            warnings.warn(
                f"{source}: its class {listed[0].name!r:.80} is taken for {table[0].name!r:.80}",
                stacklevel=2,
            )
    elif None in numbers and not named:
        return table
    known = set(numbers)
    none, beyond = known == {None}, {*used} - known
    others = [] if none else [c.name for c in listed if c.id in beyond]
    if none or others:
        raise ValueError(
            f"{source}: "
            + (f"annotates {brief(others)} of " if others else "lists ")
            + f"the classes {brief([c.name for c in listed])}; expected those of the model or the "
            f"training, {brief([c.name for c in table])}: give them the same names"
            + "; skip_bad (--skip-bad) leaves out what is of others"
            * bool(others)
        )
    taken = {category.id for category in listed}
    own = [None if c.id in taken else c.id for c in table]
    numbers = [n if number is None else number for n, number in zip(own, numbers, strict=True)]
    return renumbered(table, numbers, taken)


def _name_key(*tables: Sequence[Category]) -> Callable[[str], str]:
    """Names are the same in upper and lower case, where that confuses none of a table."""

    def lower(name: str) -> str:
        return composed(name).lower()

    clear = all(len({lower(c.name) for c in t}) == len({c.name for c in t}) for t in tables)
    return lower if clear else composed


def renumbered(
    categories: Sequence[Category], numbers: Sequence[int | None], taken: Iterable[int] = ()
) -> tuple[Category, ...]:
    """Classes with other ids; `None` is one that is free, beyond those of 8 bits and `taken`."""
    free = itertools.count(max([255, *taken, *(n for n in numbers if n is not None)]) + 1)
    return tuple(
        replace(category, id=next(free) if number is None else number)
        for category, number in zip(categories, numbers, strict=True)
    )


def parse_categories(content: Any, path: str | os.PathLike[str]) -> CategoryTable:
    """Classes from a JSON list of {id, name[, isthing][, color]}, or an object with one, by id.

    In an object with "annotations", a category that is the supercategory of others and is not
    annotated itself is a heading, as Roboflow's exports have one, and no class. Other categories
    are classes whether they are used or not: which there are does not depend on the split.

    Raises:
        ValueError: naming the file, if a row lacks id or name, or two have the same.
    """
    rows = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected categories as a list of {{id, name}}")
    table: dict[int, dict] = {}
    parents: dict[str, set[int]] = defaultdict(set)
    for n, row in enumerate(rows):
        try:
            number = value_of(row, "id", WHOLE)
            value_of(row, "name", TEXT)
            value_of(row, "isthing", FLAG, True)
        except ValueError as error:
            raise ValueError(f"{path}: entry {n} of the categories: {error}") from None
        if number in table:
            raise ValueError(f"{path}: expected categories with different ids, got {number} twice")
        table[number] = row
        if isinstance(row.get("supercategory"), str):
            parents[row["supercategory"]].add(number)
    headings = {}
    if isinstance(content, dict) and "annotations" in content:
        used = used_categories(content["annotations"])
        for number, row in table.items():
            if number not in used and parents[row["name"]] - {number}:
                headings[number] = row["name"]
    classes = [(number, table[number]) for number in sorted(table.keys() - headings.keys())]
    twice = repeated(row["name"] for _, row in classes)
    if twice:
        raise ValueError(
            f"{path}: expected categories with different names, got {min(twice)!r:.80} twice"
        )
    return CategoryTable(
        tuple(
            Category(
                number, row["name"], value_of(row, "isthing", FLAG, True), _color(row, position)
            )
            for position, (number, row) in enumerate(classes)
        ),
        {
            f"category {number}": f"{path}: category {number}, {name!r:.80}, is no class: it is "
            "the supercategory of others and not annotated itself"
            for number, name in headings.items()
        },
    )


@dataclass(frozen=True)
class CategoryTable:
    """The classes of a file, and which of its categories are none, as name and reason."""

    classes: tuple[Category, ...]
    headings: Mapping[str, str] = field(default_factory=dict)

    def numbers(self) -> dict[int, int]:
        """The number of each class, by its id."""
        return {category.id: n for n, category in enumerate(self.classes)}


def used_categories(annotations: Any) -> set[int | None]:
    """Ids that rows of objects, or the segments of panoptic rows, refer to."""
    if not isinstance(annotations, list):
        return set()
    rows = [row for row in annotations if isinstance(row, dict)]
    for row in rows[:]:
        segments = row.get("segments_info")
        rows += [s for s in segments if isinstance(s, dict)] if isinstance(segments, list) else []
    return {WHOLE.read(row.get("category_id")) for row in rows}


def _color(row: Mapping[str, Any], position: int) -> tuple[int, int, int]:
    """The file's, or another one: a color is no reason to refuse a file."""
    color = row.get("color")
    if isinstance(color, list) and len(color) == 3:
        channels = [WHOLE.read(channel) for channel in color]
        if all(channel is not None and 0 <= channel < 256 for channel in channels):
            return tuple(channels)
    return distinct_color(position)


def read_categories(path: str | os.PathLike[str]) -> tuple[Category, ...]:
    """Classes from a JSON file: COCO's list of {id, name, isthing, color}, or a file with one."""
    return parse_categories(read_json(path, object), path).classes


def category_ids(classes: np.ndarray, categories: Sequence[Category]) -> list[int]:
    """The ids of classes (N,) of a prediction.

    Raises:
        ValueError: if a class is not one of the categories.
    """
    if classes.size and not (classes.min() >= 0 and classes.max() < len(categories)):
        raise ValueError(
            f"predicted: expected classes 0 to {len(categories) - 1}, "
            f"got {classes.min()} to {classes.max()}"
        )
    return [categories[number].id for number in classes.tolist()]


def check_size(source: PictureFile, size: tuple[int, int], image: PictureFile | None) -> None:
    """Raise a ValueError naming `source` if the picture has another height and width."""
    found = tuple(size) if image is None else image_size(image)
    if found != tuple(size):
        turned = image is not None and found == tuple(size)[::-1] and is_turned(image)
        why = "; its orientation tag turns the picture, turn its annotation too" if turned else ""
        raise ValueError(
            f"{source}: expected the height and width of {image}, {found}, got {tuple(size)}{why}"
        )


def listed_segments(
    source: PictureFile,
    name: str,
    rows: Any,
    labels: PictureFile,
    ids: np.ndarray,
    classes: Mapping[int, int],
    void: Sequence[int] = (0,),
    keys: tuple[str, str] = ("class", "crowd"),
) -> tuple[list[Segment], dict[str, str]]:
    """Segments of a map of ids from the rows of a JSON file, and problems of single ones.

    Args:
        source, name: the file that lists them, and the annotation.
        rows: with "id", perhaps "score", and `keys`: the class and, perhaps, whether it is a crowd.
        labels, ids: the map's file and values (H, W); `void` values need not be listed.
        classes: the number of each class of the file.

    Raises:
        ValueError: if the ids of the map are not those in the rows.
    """
    if not isinstance(rows, list):
        raise ValueError(f"{source}: expected a list of the segments of {name}")
    values, counts = np.unique(ids, return_counts=True)
    areas = dict(zip(values.tolist(), counts.tolist(), strict=True))
    for value in void:
        areas.pop(value, None)
    numbers = [WHOLE.read(row.get("id")) if isinstance(row, dict) else None for row in rows]
    twice = repeated(str(number) for number in numbers if number is not None)
    segments: list[Segment] = []
    problems: dict[str, str] = {}
    for n, row in enumerate(rows):
        what = f"entry {n} of the segments of {name}"
        try:
            number = value_of(row, "id", WHOLE)
            what = f"segment {number} of {name}"
            if str(number) in twice:
                raise ValueError("there are several with this id")
            category = value_of(row, keys[0], WHOLE)
            if category not in classes:
                raise ValueError(f"is of the unknown class {category}")
            crowd, score = value_of(row, keys[1], FLAG, False), value_of(row, "score", NUMBER, 1.0)
        except ValueError as error:
            problems[what] = f"{source}: {what}: {error}"
        else:
            segments.append(Segment(number, classes[category], areas.get(number, 0), crowd, score))
    known = {number for number in numbers if number is not None}
    only_map, only_list = sorted(areas.keys() - known), sorted(known - areas.keys())
    if only_map:
        raise ValueError(f"{labels}: ids {_shortened(only_map)} are not in {source.name}")
    if only_list:
        raise ValueError(
            f"{labels}: ids {_shortened(only_list)} of {source.name} are not in the picture"
        )
    return segments, problems


def _shortened(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def _ambiguous(entry: Entry, other: Entry) -> str:
    kind, first, second = "picture", entry.image, other.image
    if first == second:
        kind, first, second = "annotation", entry.labels, other.labels
    return f"{second}: there is another {kind} {first}, both are {entry.name!r}"


def _missing(entry: Entry, source: str | os.PathLike[str]) -> str | None:
    if entry.image is not None and not is_there(entry.image):
        return f"{entry.labels or source}: annotates {entry.image}, but there is no such file"
    if entry.labels is not None and not is_there(entry.labels):
        picture = "" if entry.image is None else f" of {entry.image}"
        return f"{entry.labels}: expected the annotation{picture}, there is no such file"
    return None
