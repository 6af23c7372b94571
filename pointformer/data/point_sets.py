"""Point sets with classes: whole ones (objects) from NumPy archives, and point by point (scenes).

An archive of objects has for each split arrays SPLIT_xyz (n, P, 3) and SPLIT_label (n,), or xyz
and label where there are no splits, and may have `classes`, the names. A scene is a file of points,
see `read_scenes`; an archive of one may have `split` (n,) with 0, 1, 2 for train, val and test, and
`classes`.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from pointformer._checks import brief, describe
from pointformer.annotations import VOID, Category
from pointformer.data.annotations import (
    Annotation,
    Dataset,
    Entry,
    named_categories,
    renumbered,
)
from pointformer.data.discovery import CLOUD_SUFFIXES, archives_in, pictures_in
from pointformer.data.images import Reading
from pointformer.data.json_files import repeated
from pointformer.data.points import npz, read_points
from pointformer.data.points.asprs import class_codes, standard_code, standard_name
from pointformer.data.points.columns import column_named
from pointformer.tokens import TokenSet

SPLITS = ("train", "val", "test")
_IGNORED = (
    "ignored",
    "ignore",
    "void",
    "unlabeled",
    "unlabelled",
    "never classified",
)


@dataclass(frozen=True, eq=False)
class PointAnnotation:
    """One point set and its classes.

    Attributes:
        name: unique in the data set.
        tokens: the points, one sample.
        label: class of the whole, VOID where there is none.
        labels: (T,) int32 class of each point, VOID where there is none; `None` for objects.
        problems, left_out: see `Annotation`; none.
    """

    name: str
    tokens: TokenSet
    label: int = VOID
    labels: np.ndarray | None = None
    problems: Mapping[str, str] = field(default_factory=dict, repr=False)
    left_out: Mapping[str, str] = field(default_factory=dict, repr=False)

    def classes(self) -> np.ndarray:
        """(T,) int32 class of each point."""
        if self.labels is None:
            raise ValueError(f"{self.name}: its points have no classes")
        return self.labels


def read_sample(
    annotation: Annotation | PointAnnotation, reading: Reading
) -> np.ndarray | TokenSet:
    """The picture (H, W, 3) uint8 of an annotation, or its points."""
    if isinstance(annotation, PointAnnotation):
        return annotation.tokens
    return annotation.read_image(**reading)


class PointDataset(Dataset):
    """Point sets, each read when asked for.

    Attributes:
        channels: features of a point.
    """

    noun = "point set"
    channels: int

    def __init__(
        self,
        source: str | os.PathLike[str],
        categories: Sequence[Category],
        entries: Iterable[Entry],
        channels: int,
        problems: Mapping[str, str] | None = None,
        skip_bad: bool = False,
    ) -> None:
        super().__init__(source, categories, entries, problems, skip_bad)
        self.channels = channels


class _Archive:
    """Arrays of a file, read once; another process reads them again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays: dict[str, np.ndarray] = {}
        try:
            with np.load(path, allow_pickle=False) as file:
                self.names = tuple(file.files)
        except npz.UNREADABLE as error:
            raise ValueError(f"{path}: expected an archive of NumPy arrays: {error}") from None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arrays": {}}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            try:
                with np.load(self.path, allow_pickle=False) as file:
                    self._arrays[name] = file[name]
            except KeyError:
                known = ", ".join(self.names)
                raise ValueError(f"{self.path}: has no {name!r}; there are {known}") from None
            except npz.UNREADABLE as error:
                raise ValueError(f"{self.path}: {name!r} cannot be read: {error}") from None
        return self._arrays[name]

    def classes(self) -> list[str] | None:
        if "classes" not in self.names:
            return None
        names = self["classes"]
        return [str(c) for c in (np.char.decode(names) if names.dtype.kind == "S" else names)]


def _checked(
    path: Path, name: str, values: np.ndarray, shape: tuple[int | None, ...]
) -> np.ndarray:
    fits = values.ndim == len(shape) and all(
        want in (None, have) for have, want in zip(values.shape, shape, strict=True)
    )
    if not fits or values.dtype.kind not in "iuf":
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{path}: {name!r}: expected numbers of shape ({wanted}), got {values.dtype} of shape "
            f"{values.shape}"
        )
    return values


# Objects ------------------------------------------------------------------------------------------


def object_splits(path: Path) -> list[str]:
    """Splits of an archive of objects; none if it is no such thing."""
    files = archives_in(path)
    if len(files) != 1:
        return []
    try:
        archive = _Archive(files[0])
        found = [s for s in SPLITS if {f"{s}_xyz", f"{s}_label"} <= set(archive.names)]
        if found:
            return found
        return [""] if {"xyz", "label"} <= set(archive.names) and archive["xyz"].ndim == 3 else []
    except ValueError:
        return []


def read_objects(
    path: Path, split: str, categories: Sequence[Category] | Sequence[str] | None = None
) -> PointDataset:
    """Objects of a class each.

    Raises:
        ValueError: naming the file, if arrays do not fit each other or the classes.
    """
    archive = _Archive(archives_in(path)[0])
    start = f"{split}_" if split else ""
    xyz = _checked(archive.path, f"{start}xyz", archive[f"{start}xyz"], (None, None, 3))
    labels = _checked(archive.path, f"{start}label", archive[f"{start}label"], (len(xyz),))
    listed = archive.classes()
    found = _counted(labels)
    named = _named(categories, _names(listed, found), listed)
    _warn_of_others(path, found, named)
    kept = _numbered(archive.path, labels, named)
    name = archive.path.stem
    entries = []
    for index, label in enumerate(kept.tolist()):
        read: Any = partial(_read_object, archive, start, index, label)
        entries.append(
            Entry(f"{name}/{start}{index:05d}", archive.path, None, read, label, part=split)
        )
    return PointDataset(path, named, entries, 0)


def _read_object(archive: _Archive, start: str, index: int, label: int) -> PointAnnotation:
    name = f"{archive.path.stem}/{start}{index:05d}"
    xyz = archive[f"{start}xyz"][index]
    return PointAnnotation(name, _tokens(name, xyz, None), label)


# Scenes -------------------------------------------------------------------------------------------

_LABELS = (
    "label",
    "labels",
    "classification",
)  # columns with a class per point, the first one there


class _Scene:
    """A file of points with a class each, read once for what is asked; another process reads it
    again.

    Attributes:
        label: the column of the classes, "" if there is none.
        numbers: those of the data set for the labels in the file; `None`: the same.
        problem: why the file cannot be read, "" if it can.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[tuple[str, ...], TokenSet] = {}
        self.archive: _Archive | None = None
        self.numbers: dict[int, int] | None = None
        self.problem = ""
        names: Iterable[str] = ()
        try:
            if path.suffix.lower() == ".npz":
                self.archive = _Archive(path)
                names = self.archive.names if npz.holds_points(self.archive.names) else ()
            elif path.suffix.lower() in (".las", ".laz"):
                names = ("classification",)  # all have it
            else:
                names = read_points(path).fields
        except (ValueError, OSError) as error:
            self.problem = str(error)
        names = [*names]
        self.label = next(filter(None, (column_named(name, names) for name in _LABELS)), "")
        self.has_split = "split" in names

    @property
    def has_codes(self) -> bool:
        """Whether its labels are those of the LAS standard."""
        return column_named("classification", [self.label]) is not None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_read": {}}

    def points(self, features: tuple[str, ...] = ()) -> TokenSet:
        """With the fields `label` and, where there is one, `split`."""
        if features not in self._read:
            fields = [self.label, *["split"] * self.has_split]
            self._read = {features: read_points(self.path, fields=fields, features=features)}
            labels = self._read[features].fields[self.label]
            if labels.ndim == 2 and labels.shape[1] == 1:
                labels = labels[:, 0]
            if labels.ndim != 1 or not torch.equal(labels, labels.round()):
                raise ValueError(
                    f"{self.path}: {self.label!r}: expected an integer for each point, got "
                    f"{describe(labels)}"
                )
        return self._read[features]

    def counts(self) -> tuple[Counter[int], Counter[int]]:
        """How many points have which label in the file, and are of which split. Points are read
        again when they are asked for: data sets are larger than what is open of them."""
        fields = self.points().fields
        labels, split = (
            _counted(fields[name].flatten().long().numpy()) if name in fields else Counter()
            for name in (self.label, "split")
        )
        self._read = {}
        return labels, split

    def labels_of(self, points: TokenSet) -> np.ndarray:
        """(T,) int64 in the numbers of the data set, of what `points` gave."""
        labels = points.fields[self.label].flatten().long().numpy()
        if self.numbers is None:
            return labels
        values, places = np.unique(labels, return_inverse=True)
        return np.array([self.number_of(v) for v in values.tolist()], np.int64)[places]

    @property
    def is_renumbered(self) -> bool:
        """Whether the data set has other numbers for its labels."""
        return any(label != number for label, number in (self.numbers or {}).items())

    def number_of(self, label: int) -> int:
        """The number of the data set for a label in the file, VOID if that is none of those for
        which it has others."""
        return label if self.numbers is None else self.numbers.get(label, VOID)

    def rows(self, points: TokenSet, split: str) -> torch.Tensor | None:
        """A mask of the points of a split, `None` for all."""
        if not (split and self.has_split):
            return None
        return points.fields["split"] == SPLITS.index(split)


def _scenes(path: Path) -> dict[str, list[_Scene]]:
    """Scenes by the split that their folder or the points in them say; "" for no split."""
    if path.is_file():
        return {"": [_Scene(path)] if path.suffix.lower() in CLOUD_SUFFIXES else []}
    here = [_Scene(file) for file in pictures_in(path, suffixes=CLOUD_SUFFIXES)]
    if here:
        return {"": here}
    return {
        split: [_Scene(file) for file in pictures_in(path / split, suffixes=CLOUD_SUFFIXES)]
        for split in SPLITS
    }


def scene_splits(path: Path) -> list[str]:
    """Splits of a folder of scenes; none if it holds no such thing."""
    try:
        found = _scenes(path)
        scenes = [scene for part in found.values() for scene in part]
        if not any(scene.label for scene in scenes):
            return []
        if any(scene.archive is not None and _of_objects(scene.archive) for scene in scenes):
            return []
        scenes = [scene for scene in scenes if scene.label]
        if not found.get(""):
            return [split for split, part in found.items() if part]
        if not all(scene.has_split for scene in scenes):
            return [""]
        used = {number for scene in scenes for number in scene.counts()[1]}
        return [name for number, name in enumerate(SPLITS) if number in used]
    except (ValueError, OSError):
        return []


def _of_objects(archive: _Archive) -> bool:
    """Whether its labels are of something else than points."""
    names = [name for name in _LABELS if name in archive.names]
    shape = archive[names[0]].shape if names else (0,)
    return len(shape) > 1 and shape[1:] != (1,)


def read_scenes(
    path: Path,
    split: str,
    categories: Sequence[Category] | Sequence[str] | None = None,
    *,
    features: Sequence[str] = (),
    void: Sequence[int] | None = None,
    skip_bad: bool = False,
) -> PointDataset:
    """Scenes whose points have a class each: files that `read_points` reads (.npz, .las, .laz,
    .ply, .xyz, .pts, .asc; in folders train, val and test, or all in one) with a column `label`,
    `labels` or `classification`.

    Classes are those that archives name in `classes`; else the numbers found in any split, by the
    LAS standard's names where all are `classification`. Archives may list other classes, or in
    another order, and there may be files with codes of the LAS standard beside them: classes are
    the same by their names, whatever their numbers in the file; other files without names have the
    numbers of the archives, which must be the same then. A warning names classes of the points that
    are not among given ones: these points are void.

    Args:
        categories: classes, as a model has them, or names of the labels 0, 1, ... Classes are found
            in the files by their names in `classes`; by the LAS codes that `segment` gives them
            where all labels are `classification`; else by their ids.
        features: names of the columns that points have as features, in this order; see
            `read_points`.
        void: labels that are no classes; `None`: those below 0, and those that are named "ignored",
            "never classified" or the like.
        skip_bad: leave out files that cannot be read, see `Dataset`.

    Raises:
        OSError, ValueError: naming the file, if it cannot be read, or arrays do not fit each other
            or the classes.
        ImportError: a package of the extra `points` is missing.
    """
    found = _scenes(path)
    counts: dict[_Scene, Counter[int]] = {}
    parts: dict[_Scene, Counter[int]] = {}
    problems: dict[str, str] = {}
    for scene in (scene for part in found.values() for scene in part):
        try:
            if scene.problem:
                raise ValueError(scene.problem)
            if not scene.label:
                raise ValueError(f"{scene.path}: has no classes, none of {', '.join(_LABELS)}")
            counts[scene], parts[scene] = scene.counts()
        except (ValueError, OSError) as error:
            problems[scene.path.name] = str(error)
    listed = _common_list(counts)
    differing = next((scene for scene in counts if scene.is_renumbered), None)
    given = void is not None or not all(isinstance(c, Category) for c in categories or ())
    if differing is not None and given:
        raise ValueError(
            f"{differing.path}: numbers its classes in another way than other files of {path}, so "
            "names and void labels by number (data.categories, data.void) cannot hold for all; "
            "leave them out"
        )
    standard = bool(counts) and all(scene.has_codes for scene in counts)
    found_labels = {label for own in counts.values() for label in own}
    names = _names(listed, found_labels, standard_name if standard else str)
    if void is None:
        void = [n for n, name in names.items() if n < 0 or name.lower() in _IGNORED]
    named = _named(categories, names, listed, standard, void)
    if counts and not named:
        raise ValueError(
            f"{path}: expected points with classes, found only {', '.join(names.values())}"
        )
    used = [scene for scene in found.get("") or found.get(split, []) if scene in counts]
    labels: Counter[int] = Counter()
    for scene in used:
        for label, count in counts[scene].items():
            labels[scene.number_of(label)] += count
    _warn_of_others(path, labels, named, names, void)
    stems = Counter(scene.path.stem for scene in used)
    entries = []
    for scene in used:
        if split and scene.has_split and SPLITS.index(split) not in parts[scene]:
            continue
        name = scene.path.stem if stems[scene.path.stem] == 1 else scene.path.name
        read: Any = partial(_read_scene, scene, name, split, tuple(features), named)
        part = split if scene.has_split else ""
        entries.append(Entry(name, scene.path, None, read, part=part))
    return PointDataset(path, named, entries, len(features), problems, skip_bad)


def _read_scene(
    scene: _Scene,
    name: str,
    split: str,
    features: tuple[str, ...],
    categories: tuple[Category, ...],
) -> PointAnnotation:
    tokens = scene.points(features)
    rows = scene.rows(tokens, split)
    if rows is not None:
        tokens = tokens.select(rows).with_origin(None)
    numbers = _numbered(scene.path, scene.labels_of(tokens), categories)
    tokens = TokenSet(tokens.positions, tokens.features, tokens.sizes, origin=tokens.origin)
    return PointAnnotation(name, tokens, labels=numbers)


def _common_list(counts: Mapping[_Scene, Iterable[int]]) -> list[str] | None:
    """Names of the classes 0, 1, ... of all files, `None` if none lists any. Files that number
    them in another way are told their `numbers`.

    Args:
        counts: the labels in each file.

    Raises:
        ValueError: naming the file whose classes cannot be found by name.
    """
    lists = {s: own for s in counts if s.archive is not None and (own := s.archive.classes())}
    first = next(iter(lists), None)
    others = [scene for scene in counts if scene not in lists]
    if first is None:
        return None
    if not any(s.has_codes for s in others) and all(x == lists[first] for x in lists.values()):
        return lists[first]
    names: dict[str, str] = {}  # as first spelled, by what they are in all files
    for scene, own in lists.items():
        keys = [name.lower() for name in own]
        twice = repeated(keys)
        if twice:
            raise ValueError(
                f"{scene.path}: has two classes {min(twice)!r}, so that they cannot be found in "
                "other files by name; give them different names"
            )
        names |= {key: name for key, name in zip(keys, own, strict=True) if key not in names}
        places = {key: number for number, key in enumerate(names)}
        scene.numbers = {number: places[key] for number, key in enumerate(keys)}
    differing = next((scene for scene in lists if scene.is_renumbered), None)
    numbers = {number: number for number in range(len(names))}
    codes = {code: key for key in reversed(names) if (code := standard_code(key)) is not None}
    for scene in others:
        if not scene.has_codes and differing is not None:
            raise ValueError(
                f"{scene.path}: has classes without names beside {first.path.name} and "
                f"{differing.path.name}, which number theirs differently; name them in `classes` "
                "of an .npz archive"
            )
        if not scene.has_codes:
            scene.numbers = numbers
            continue
        own_keys = {code: codes.get(code, standard_name(code)) for code in sorted(counts[scene])}
        names |= {key: key for key in own_keys.values() if key not in names}
        places = {key: number for number, key in enumerate(names)}
        scene.numbers = {code: places[key] for code, key in own_keys.items()}
    return [*names.values()]


def _counted(labels: np.ndarray) -> Counter[int]:
    numbers, counts = np.unique(labels, return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


def _names(
    listed: Sequence[str] | None,
    labels: Iterable[int],
    name_of: Callable[[int], str] = str,
) -> dict[int, str]:
    """Names of labels: as a file lists them, or of those that are there."""
    if listed is not None:
        return dict(enumerate(listed))
    return {int(number): name_of(int(number)) for number in sorted(labels)}


def _named(
    given: Sequence[Category] | Sequence[str] | None,
    names: Mapping[int, str],
    listed: Sequence[str] | None = None,
    standard: bool = False,
    void: Sequence[int] = (),
) -> tuple[Category, ...]:
    """The classes, whose ids are the labels: given, or by the files."""
    if given is not None and all(isinstance(c, Category) for c in given):
        return _labelled([c for c in given if isinstance(c, Category)], listed, standard)
    if given is not None:
        names = {number: str(name) for number, name in enumerate(given)}
    kept = [(number, name) for number, name in names.items() if number not in set(void)]
    colored = named_categories(name for _, name in kept)
    return tuple(
        Category(number, category.name, False, category.color)
        for (number, _), category in zip(kept, colored, strict=True)
    )


def _labelled(
    categories: Sequence[Category], listed: Sequence[str] | None, standard: bool
) -> tuple[Category, ...]:
    """Classes with the labels that files have for them as ids: those that no file has get free
    ones."""
    numbers: list[int | None] = [category.id for category in categories]
    if listed is not None:
        places = {name.lower(): number for number, name in enumerate(listed)}
        by_name = [places.get(category.name.lower()) for category in categories]
        if any(number is not None for number in by_name):
            numbers = by_name
    elif standard:
        numbers = [*class_codes(categories)]
    return renumbered(categories, numbers)


def _warn_of_others(
    path: Path,
    found: Mapping[int, int],
    categories: Sequence[Category],
    names: Mapping[int, str] = MappingProxyType({}),
    void: Sequence[int] = (),
) -> None:
    """Warn of labels, by which there are how many, that are neither of the classes nor void."""
    known = {category.id for category in categories} | set(void)
    others = {number: count for number, count in found.items() if number not in known}
    if others:
        words = brief([names.get(number, str(number)) for number in sorted(others)])
        share = 100 * sum(others.values()) / sum(found.values())
        warnings.warn(
            f"{path}: {share:.2g}% have labels that are none of the classes, and count as void: "
            f"{words}",
            stacklevel=3,
        )


def _numbered(path: Path, labels: np.ndarray, categories: Sequence[Category]) -> np.ndarray:
    """Labels as places among the categories, int32; VOID where there is no such category."""
    if not labels.size:
        raise ValueError(f"{path}: has no points")
    values, places = np.unique(labels, return_inverse=True)
    known = {category.id: number for number, category in enumerate(categories)}
    table = np.array([known.get(int(value), VOID) for value in values], np.int32)
    if not (table != VOID).any():
        raise ValueError(f"{path}: expected labels of the {len(categories)} classes, found none")
    return table[places.reshape(labels.shape)]


def _tokens(name: str, xyz: np.ndarray, features: np.ndarray | None) -> TokenSet:
    positions = torch.from_numpy(np.ascontiguousarray(xyz, np.float64))
    table = torch.zeros(len(xyz), 0) if features is None else torch.from_numpy(features)
    try:
        return TokenSet.from_world(positions, table)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
