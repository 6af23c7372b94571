"""Point sets with classes: whole ones (objects) and point by point (scenes), from NumPy archives.

An archive of objects has for each split arrays SPLIT_xyz (n, P, 3) and SPLIT_label (n,), or xyz
and label where there are no splits, and may have `classes`, the names. An archive of a scene has
xyz (n, 3), or xyz_cm in hundredths, label (n,), and may have `origin` (3,), which is added, `split`
(n,) with 0, 1, 2 for train, val and test, `classes`, and more numbers of points by other names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointformer.annotations import VOID, Category
from pointformer.data.annotations import Annotation, Dataset, Entry, named_categories
from pointformer.data.images import Reading
from pointformer.data.points.columns import feature_of
from pointformer.tokens import TokenSet

SPLITS = ("train", "val", "test")
_IGNORED = ("ignored", "ignore", "void", "unlabeled", "unlabelled")


@dataclass(frozen=True, eq=False)
class PointAnnotation:
    """One point set and its classes.

    Attributes:
        name: unique in the data set.
        tokens: the points, one sample.
        label: class of the whole, VOID where there is none.
        labels: (T,) int32 class of each point, VOID where there is none; `None` for objects.
        problems: see `Annotation`; none.
    """

    name: str
    tokens: TokenSet
    label: int = VOID
    labels: np.ndarray | None = None
    problems: Mapping[str, str] = field(default_factory=dict, repr=False)

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

    channels: int

    def __init__(
        self,
        source: str | os.PathLike[str],
        categories: Sequence[Category],
        entries: Iterable[Entry],
        channels: int,
    ) -> None:
        super().__init__(source, categories, entries)
        self.channels = channels


class _Archive:
    """Arrays of a file, read once; another process reads them again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays: dict[str, np.ndarray] = {}
        try:
            with np.load(path, allow_pickle=False) as file:
                self.names = tuple(file.files)
        except (OSError, ValueError) as error:
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
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.path}: {name!r} cannot be read: {error}") from None
        return self._arrays[name]

    def classes(self) -> list[str] | None:
        return [str(c) for c in self["classes"].tolist()] if "classes" in self.names else None


def _archives(path: Path) -> list[Path]:
    """The archives that a path stands for."""
    if path.is_file():
        return [path] if path.suffix == ".npz" else []
    return sorted(p for p in path.glob("*.npz") if not p.name.startswith("."))


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
    files = _archives(path)
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
    archive = _Archive(_archives(path)[0])
    start = f"{split}_" if split else ""
    xyz = _checked(archive.path, f"{start}xyz", archive[f"{start}xyz"], (None, None, 3))
    labels = _checked(archive.path, f"{start}label", archive[f"{start}label"], (len(xyz),))
    named = _named(categories, archive.classes(), [labels])
    kept = _numbered(archive.path, labels, named)
    name = archive.path.stem
    entries = []
    for index, label in enumerate(kept.tolist()):
        read: Any = partial(_read_object, archive, start, index, label)
        entries.append(Entry(f"{name}/{start}{index:05d}", archive.path, None, read, label))
    return PointDataset(path, named, entries, 0)


def _read_object(archive: _Archive, start: str, index: int, label: int) -> PointAnnotation:
    name = f"{archive.path.stem}/{start}{index:05d}"
    xyz = archive[f"{start}xyz"][index]
    return PointAnnotation(name, _tokens(name, xyz, None), label)


# Scenes -------------------------------------------------------------------------------------------


def scene_splits(path: Path) -> list[str]:
    """Splits of a folder of scenes; none if it holds no such thing."""
    files = _archives(path)
    if not files:
        return []
    try:
        archives = [_Archive(file) for file in files]
        for archive in archives:
            if not {"xyz", "xyz_cm"} & set(archive.names) or "label" not in archive.names:
                return []
            if archive["label"].ndim != 1:
                return []
        if not all("split" in archive.names for archive in archives):
            return [""]
        used = set(np.concatenate([np.unique(a["split"]) for a in archives]).tolist())
        return [name for number, name in enumerate(SPLITS) if number in used]
    except ValueError:
        return []


def read_scenes(
    path: Path,
    split: str,
    categories: Sequence[Category] | Sequence[str] | None = None,
    *,
    features: Sequence[str] = (),
    void: Sequence[int] | None = None,
) -> PointDataset:
    """Scenes whose points have a class each.

    Args:
        features: names of the arrays that points have as features, in this order. `intensity`,
            whose scale differs from scanner to scanner, is divided by its 99th percentile in the
            file, and cut off at 1.
        void: labels that are no classes; `None`: those that are named "ignored" or the like.

    Raises:
        ValueError: naming the file, if arrays do not fit each other or the classes.
    """
    archives = [_Archive(file) for file in _archives(path)]
    names = next((names for a in archives if (names := a.classes())), None)
    if void is None:
        void = [n for n, name in enumerate(names or ()) if name.lower() in _IGNORED]
    labels = [a["label"] for a in archives]
    named = _named(categories, names, labels, void)
    entries = []
    channels = len(features)
    for archive in archives:
        rows = None
        if split:
            rows = archive["split"] == SPLITS.index(split)
            if not rows.any():
                continue
        read: Any = partial(_read_scene, archive, split, tuple(features), named)
        entries.append(Entry(archive.path.stem, archive.path, None, read))
    return PointDataset(path, named, entries, channels)


def _read_scene(
    archive: _Archive, split: str, features: tuple[str, ...], categories: tuple[Category, ...]
) -> PointAnnotation:
    path = archive.path
    name = "xyz" if "xyz" in archive.names else "xyz_cm"
    xyz = _checked(path, name, archive[name], (None, 3)).astype(np.float64)
    xyz = xyz / 100 if name == "xyz_cm" else xyz
    if "origin" in archive.names:
        xyz = xyz + _checked(path, "origin", archive["origin"], (3,))
    count = len(xyz)
    labels = _checked(path, "label", archive["label"], (count,))
    columns = []
    for feature in features:
        values = _checked(path, feature, archive[feature], (count,))
        try:
            columns.append(feature_of(feature, {feature: values}))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    table = np.stack(columns, 1) if columns else None
    if split:
        rows = archive["split"] == SPLITS.index(split)
        xyz, labels = xyz[rows], labels[rows]
        table = None if table is None else table[rows]
    numbers = _numbered(path, labels, categories)
    return PointAnnotation(path.stem, _tokens(path.stem, xyz, table), labels=numbers)


def _named(
    given: Sequence[Category] | Sequence[str] | None,
    names: Sequence[str] | None,
    labels: Sequence[np.ndarray],
    void: Sequence[int] = (),
) -> tuple[Category, ...]:
    """The classes, whose ids are the labels: given, or named in the file, or found in it."""
    if given is not None and all(isinstance(c, Category) for c in given):
        return tuple(c for c in given if isinstance(c, Category))
    if given is not None:
        names = [str(name) for name in given]
    if names is not None:
        numbers = range(len(names))
    else:
        found = sorted(set().union(*(np.unique(x).tolist() for x in labels)))
        numbers, names = found, [str(n) for n in found]  # type: ignore[assignment]
    kept = [(n, name) for n, name in zip(numbers, names, strict=True) if n not in set(void)]
    colored = named_categories(name for _, name in kept)
    return tuple(
        Category(int(number), category.name, False, category.color)
        for (number, _), category in zip(kept, colored, strict=True)
    )


def _numbered(path: Path, labels: np.ndarray, categories: Sequence[Category]) -> np.ndarray:
    """Labels as places among the categories, int32; VOID where there is no such category."""
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
