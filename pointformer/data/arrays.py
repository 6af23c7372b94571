"""Pictures with their labels or maps in one file of NumPy arrays: NAME.npz.

Arrays are known by words in their names, as x_train and y_train, or val_images and val_labels; of
two that may be the same, the one with fewer other words counts ("labels", not "class_weights"). The
first axis is that of pictures. Files of pictures, such as JPEGs, may lie one after the other in an
array of bytes beside an array of their N + 1 offsets, after a header that they share.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pointformer._files import path_inside
from pointformer.annotations import OBJECT, Category
from pointformer.data.annotations import (
    CategoryTable,
    Dataset,
    Entry,
    category_table,
    matched_classes,
    named_categories,
)
from pointformer.data.classes import ClassNumbers, labeled_classes, read_class
from pointformer.data.discovery import picture_name
from pointformer.data.folders import read_objects
from pointformer.data.labels import LabelTable, found_classes, read_label_file
from pointformer.data.packed import FileState, Packed
from pointformer.data.stored import PictureError

# What arrays hold by words in their names, the surest first.
_KINDS: dict[str, set[str]] = {
    "header": {"header"},
    "offsets": {"offset", "offsets"},
    "names": {"classes", "categories"},
    "maps": {"mask", "masks", "seg", "segmentation", "segmentations", "semantic", "instances"},
    "labels": {"y", "label", "labels", "target", "targets", "cls", "class"},
    "files": {"scan", "scans", "jpeg", "jpegs", "jpg", "jpgs", "png", "pngs", "bytes", "files",
              "encoded"},
    "pictures": {"x", "image", "images", "img", "imgs", "picture", "pictures", "data", "input",
                 "inputs", "pixels"},
    "titles": {"file", "filename", "filenames", "path", "paths"},
}  # fmt: skip
_WORDS = set[str]().union(*_KINDS.values())
_NAMING = {"name", "names", "id", "ids", "path", "paths"}  # what they name, other words say
_CHANNELS = (1, 3, 4)


class Arrays:
    """The arrays of a .npz file by name.

    Those that are stored as they are stay in the file, the others are held in memory. Each process
    opens the file itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = FileState.of(path.stat())

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "state": self.state}

    @cached_property
    def names(self) -> list[str]:
        """
        Raises:
            ValueError: in one line that names the file, if it is no .npz file.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path}: expected a .npz file: {error}") from None
        return [name.removesuffix(".npy") for name in members if name.endswith(".npy")]

    def __getitem__(self, name: str) -> np.ndarray:
        """An array, not to be written to.

        Raises:
            ValueError: in one line that names the file and the array, if it cannot be read.
        """
        if name not in self._read:
            try:
                if FileState.of(os.stat(self.path)) != self.state:
                    raise ValueError("was changed after it was opened first; start again")
                self._read[name] = self._array(name)
            except Exception as error:  # anything, of a damaged file
                text = " ".join(str(error).split())[:300] or type(error).__name__
                raise PictureError(
                    f"{self.path}: the array {name!r} cannot be read: {text}"
                ) from None
        return self._read[name]

    @cached_property
    def _read(self) -> dict[str, np.ndarray]:
        return {}

    def _array(self, name: str) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = {(1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0}  # fmt: skip
                header = read[version](member) if version in read else None
                start = member.tell()
            if header is not None and info.compress_type == zipfile.ZIP_STORED:
                shape, fortran, dtype = header
                if not dtype.hasobject and 0 not in shape:
                    offset = _content_offset(self.path, info) + start
                    order: Literal["C", "F"] = "F" if fortran else "C"
                    return np.memmap(self.path, dtype, "r", offset, shape, order)
            with archive.open(info) as member:
                return np.lib.format.read_array(member, allow_pickle=False)


def _content_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Offset of a member's bytes in a ZIP file."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # lengths of name and extra field
        name, extra = np.frombuffer(file.read(4), "<u2").tolist()
    return info.header_offset + 30 + name + extra


@dataclass(frozen=True, slots=True)
class ArrayItem(Packed):
    """A picture or a map of an array.

    Attributes:
        arrays: of the file.
        part: the array with it.
        index: which one it is.
    """

    arrays: Arrays
    part: Part
    index: int

    def read(self) -> bytes | np.ndarray:
        return self.part.item(self.arrays, self.index)


@dataclass(frozen=True)
class Part:
    """Arrays that pictures are made of.

    Attributes:
        name: of the array.
        offsets, header: names of those of files of pictures in bytes.
    """

    name: str
    offsets: str | None = None
    header: str | None = None

    def item(self, arrays: Arrays, index: int) -> bytes | np.ndarray:
        """The file of a picture, or its samples (H, W[, C])."""
        values = arrays[self.name]
        if self.offsets is not None:
            first, end = arrays[self.offsets][index : index + 2].tolist()
            header = b"" if self.header is None else arrays[self.header].tobytes()
            return header + values[first:end].tobytes()
        if values.ndim == 1:
            return bytes(values[index])
        if values.ndim == 4 and values.shape[1] in _CHANNELS and values.shape[3] not in _CHANNELS:
            return np.moveaxis(values[index], 0, -1)
        return values[index]

    def count(self, arrays: Arrays) -> int:
        """Number of pictures.

        Raises:
            ValueError: naming the file and the array: it holds no pictures.
        """
        values = arrays[self.name]
        if self.offsets is not None:
            offsets = arrays[self.offsets]
            flat = offsets.ndim == values.ndim == 1 and offsets.size > 0
            whole = offsets.astype(np.int64) if flat and offsets.dtype.kind in "ui" else [-1]
            rising = bool((np.diff(whole, prepend=0, append=values.size) >= 0).all())
            if not (rising and values.dtype == np.uint8):
                raise ValueError(
                    f"{arrays.path}: expected bytes in {self.name!r} and in {self.offsets!r} where "
                    f"each file begins and the last one ends, got {values.dtype} {values.shape} "
                    f"and {offsets.dtype} {offsets.shape}"
                )
            return len(offsets) - 1
        shape = values.shape
        good = values.ndim == 3 or (
            values.ndim == 4 and (shape[1] in _CHANNELS or shape[3] in _CHANNELS)
        )
        if not good and not (values.ndim == 1 and values.dtype.kind == "S"):
            raise ValueError(
                f"{arrays.path}: expected pictures in {self.name!r}, as (N, H, W), (N, H, W, C) or "
                f"(N, C, H, W) of 1, 3 or 4 channels, got {values.dtype} {shape}"
            )
        return len(values)


@dataclass(frozen=True)
class Columns:
    """Which arrays of a file belong to a split, by what they hold."""

    arrays: Arrays
    kinds: Mapping[str, str]

    @property
    def pictures(self) -> Part | None:
        if "pictures" in self.kinds:
            return Part(self.kinds["pictures"])
        if "files" not in self.kinds:
            return None
        return Part(self.kinds["files"], self.kinds.get("offsets"), self.kinds.get("header"))


def find_columns(path: str | os.PathLike[str], splits: Iterable[str]) -> dict[str, Columns]:
    """The arrays of a .npz file by split, "" where their names have none of `splits`.

    Raises:
        ValueError: naming the file: it is no such file, has no pictures, or two arrays may be the
            same.
    """
    arrays = Arrays(Path(path))
    known = set(splits)
    found: dict[str, dict[str, str]] = {}
    others: dict[tuple[str, str], int] = {}  # in the name of the array that counts
    rows = []
    for name in arrays.names:
        text = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
        words = set(re.findall(r"[a-z]+", text))
        split = next(iter(sorted(words & known)), "")
        kind = _kind(words - known)
        if kind is not None:
            rows.append((len(words - known - _WORDS), split, kind, name))
    for count, split, kind, name in sorted(rows, key=lambda row: row[0]):
        if kind == "labels" and arrays[name].ndim > 2:
            kind = "maps"
        if kind == "maps" and arrays[name].ndim == 4 and 1 not in arrays[name].shape[1::2]:
            continue
        kinds = found.setdefault(split, {})
        # What is of no split is not the same as something of one, unless its name says more.
        least = [n for (other, k), n in others.items() if k == kind and split in ("", other)]
        if count > min(least, default=count) or (kind == "titles" and kind in kinds):
            continue
        if kind in kinds:
            raise ValueError(
                f"{path}: both {kinds[kind]!r} and {name!r} may be {kind}; expected one"
                + (f" of the split {split!r}" if split else "")
            )
        kinds[kind] = name
        others[split, kind] = count
    shared = found.get("", {})
    common = {kind: name for kind, name in shared.items() if kind in ("header", "names")}
    columns = {split: Columns(arrays, {**common, **kinds}) for split, kinds in found.items()}
    columns = {split: some for split, some in columns.items() if some.pictures is not None}
    if not columns:
        names = ", ".join(arrays.names[:8]) + (", ..." if len(arrays.names) > 8 else "")
        raise ValueError(
            f"{path}: expected arrays with names such as x_train and y_train, or images and "
            f"labels, got {names or 'none'}"
        )
    return columns


def _kind(words: set[str]) -> str | None:
    """What an array holds, by the words in its name."""
    kind = next((kind for kind, known in _KINDS.items() if words & known), None)
    if kind in ("files", "pictures") and words & _NAMING:
        return "titles"
    if "names" in words and (kind == "labels" or words == {"names"}):
        return "names"
    return None if "names" in words and kind == "maps" else kind


def read_arrays(
    columns: Columns,
    task: str = "classification",
    *,
    categories: Sequence[Category] | Sequence[str] | None = None,
    void: Sequence[int] | None = None,
    beside: Iterable[Columns] = (),
    skip_bad: bool = False,
) -> Dataset:
    """Pictures in arrays of a .npz file: (N, H, W), (N, H, W, C) or (N, C, H, W) of any type that
    pictures may have, or files of pictures as bytes.

    A picture is called by its name in an array such as "image_names" or "file_ids", or else, also
    where these are not a different path for each, by its number, "00017". Its class is in labels
    (N,) or (N, 1), as the id or the name of a class, or (N, K), where one of K is 1; its map in an
    array (N, H, W).

    Args:
        columns: see `find_columns`.
        task: "classification", "semantic" or "instance"; objects are all of the first class.
        categories: classes or their names. `None`: those in an array of names, as "classes", or
            else a class for each label, here and in `beside`.
        void: labels that mean void (default: 255), or ids of regions with objects of any class
            that are not told apart (default: none).
        beside: of other splits.

    Raises:
        ValueError: naming the file and the array, if something is not there, or has another shape.
    """
    arrays, pictures = columns.arrays, columns.pictures
    if task not in ("classification", "semantic", "instance"):
        raise ValueError(f"task: expected classification, semantic or instance, got {task!r}")
    assert pictures is not None
    count = pictures.count(arrays)
    kind = "labels" if task == "classification" else "maps"
    if kind not in columns.kinds:
        raise ValueError(
            f"{arrays.path}: expected an array of {kind} for the pictures {pictures.name!r}, and "
            f"the task {task!r}, there is none"
        )
    name = columns.kinds[kind]
    if len(arrays[name]) != count:
        raise ValueError(
            f"{arrays.path}: expected as many {kind} in {name!r} as there are pictures in "
            f"{pictures.name!r}, {count}, got {len(arrays[name])}"
        )
    table = category_table(categories)
    if "names" in columns.kinds and task != "instance":
        listed = named_categories(_texts(arrays, columns.kinds["names"]))
        table = matched_classes(categories, listed, arrays.path)
    images = _items(arrays, pictures, count)
    titles = _titles(columns, count) or [f"{n:0{len(str(count - 1))}d}" for n in range(count)]
    problems: dict[str, str] = {}
    entries = []
    if task == "classification":
        labels = _labels(columns)
        if table is None:
            others = [label for some in beside if "labels" in some.kinds for label in _labels(some)]
            table = labeled_classes([*labels, *others], arrays.path)
        numbers = ClassNumbers(table)
        for title, image, label in zip(titles, images, labels, strict=True):
            try:
                number = numbers.of(label)
            except ValueError as error:
                problems[title] = f"{image}: {error}"
                continue
            read = partial(read_class, title, image, number)
            entries.append(Entry(title, image, None, read, number))
        return Dataset(arrays.path, table, entries, problems, skip_bad)
    maps = _items(arrays, Part(name), count)
    if task == "semantic":
        void = (255,) if void is None else void
        table = table or found_classes(maps, f"{arrays.path}/{name}", void)
        values = LabelTable(CategoryTable(table).numbers(), void)
        for title, image, path in zip(titles, images, maps, strict=True):
            look = partial(read_label_file, title, image, path, values)
            entries.append(Entry(title, image, path, look))
    else:
        table = table or named_categories((OBJECT,))
        ids = CategoryTable(table).numbers()
        for title, image, path in zip(titles, images, maps, strict=True):
            find = partial(read_objects, title, image, path, None, ids, void or ())
            entries.append(Entry(title, image, path, find))
    return Dataset(arrays.path, table, entries, problems, skip_bad)


def _items(arrays: Arrays, part: Part, count: int) -> list[ArrayItem]:
    return [
        ArrayItem(arrays.path, arrays.state, f"{part.name}[{n}]", arrays, part, n)
        for n in range(count)
    ]


def _titles(columns: Columns, count: int) -> list[str]:
    """Names of the pictures; none where what may be names is something else."""
    if "titles" not in columns.kinds:
        return []
    try:
        values = columns.arrays[columns.kinds["titles"]].ravel()
        texts = np.char.decode(values) if values.dtype.kind == "S" else values.astype(str)
        titles = [picture_name(text.replace("\\", "/")) for text in texts.tolist()]
        for title in titles:
            path_inside("", title, follow_links=True)
    except ValueError:
        return []
    return titles if len(set(titles)) == count == len(titles) else []


def _labels(columns: Columns) -> Sequence[int | str]:
    """Of each picture."""
    arrays, name = columns.arrays, columns.kinds["labels"]
    values = arrays[name]
    if values.ndim == 2 and values.shape[1] > 1:
        chosen = values.astype(np.float64)
        if not ((chosen == 0) | (chosen == 1)).all() or not (chosen.sum(1) == 1).all():
            raise ValueError(
                f"{arrays.path}: expected one class for each picture in {name!r}, (N,), or (N, K) "
                f"where one of K is 1, got {values.dtype} {values.shape}"
            )
        return chosen.argmax(1).tolist()
    if values.dtype.kind in "US":
        return _texts(arrays, name)
    whole = values.astype(np.int64).ravel() if values.dtype.kind in "buif" else None
    if whole is None or len(whole) != len(values) or (whole != values.ravel()).any():
        raise ValueError(
            f"{arrays.path}: expected numbers or names of classes in {name!r}, got {values.dtype} "
            f"{values.shape}"
        )
    return whole.tolist()


def _texts(arrays: Arrays, name: str) -> list[str]:
    """Of an array of texts."""
    values = arrays[name]
    if values.dtype.kind not in "US" or values.size != len(values):
        raise ValueError(
            f"{arrays.path}: expected names of classes in {name!r}, got {values.dtype} "
            f"{values.shape}"
        )
    return (
        np.char.decode(values).ravel().tolist()
        if values.dtype.kind == "S"
        else values.ravel().tolist()
    )
