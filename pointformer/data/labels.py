"""Pictures whose values are class numbers: ADE20K's format, and what others share."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from pointformer._checks import brief
from pointformer.annotations import VOID, Category
from pointformer.data.annotations import (
    Annotation,
    Dataset,
    Entry,
    check_size,
    named_categories,
)
from pointformer.data.categories import ADE20K
from pointformer.data.discovery import MAP_SUFFIXES, is_litter, pictures_by_name
from pointformer.data.images import read_labels
from pointformer.data.packed import PictureFile
from pointformer.data.writing import write_png, write_tiff

MOST_PNG_IDS = 65535
_UNKNOWN = VOID - 1
_LARGEST_INDEX = (1 << 20) - 1  # larger labels, of 32 bits, are searched for, not looked up
_LOSSY = {".jpg", ".jpeg"}
_ENDING = re.compile(r"[-_. ][A-Za-z][A-Za-z_-]*")  # no number, which may tell pictures apart


def read_ade20k(
    root: str | os.PathLike[str], split: str = "validation", *, skip_bad: bool = False
) -> Dataset:
    """ADE20K scene parsing: images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png.

    Label 0 is void, label n is class n - 1.

    Args:
        root: the folder ADEChallengeData2016.
        split: "training" or "validation".

    Raises:
        ValueError: naming the file, if one is missing or has a label above 150.
    """
    root = Path(root)
    entries = label_entries(root / "images" / split, root / "annotations" / split, ADE20K, (0,))
    return Dataset(root / "annotations" / split, ADE20K, entries, skip_bad=skip_bad)


def label_entries(
    images: Path, labels: Path, categories: Sequence[Category], void: Sequence[int]
) -> list[Entry]:
    """Entries for all pictures and all label PNGs of two folders, which must have equal names."""
    table = LabelTable({category.id: n for n, category in enumerate(categories)}, void)
    return [
        Entry(name, image, path, partial(read_label_file, name, image, path, table))
        for name, image, path in paired_files(images, labels)
    ]


def paired_files(images: Path, labels: Path) -> list[tuple[str, Path, Path]]:
    """Names, pictures and maps of two folders, in their folders too: "site1/a" has one in each.

    A picture without a map, or a map without a picture, is there with the path that is missing;
    of pictures or maps with one name (a.png and a.jpg) there is every pair. Maps may all have one
    ending more than the pictures: "a_mask" is the map of "a" if all end in "_mask".

    Raises:
        ValueError: if there are no pictures, or no map is of any of them.
    """
    pictures, maps = pictures_by_name(images), pictures_by_name(labels, MAP_SUFFIXES)
    if not pictures:
        raise ValueError(f"{images}: expected pictures, found none")
    ending = "" if pictures.keys() & maps.keys() else _ending(pictures.keys(), maps.keys())
    if ending is None:
        raise ValueError(_unpaired(images, labels, min(pictures), min(maps, default=None)))
    if ending:
        maps = {name.removesuffix(ending): paths for name, paths in maps.items()}
    suffix = next(iter(pictures.values()))[0].suffix
    return [
        (name, image, path)
        for name in sorted(pictures.keys() | maps.keys())
        for image in pictures.get(name, [images / f"{name}{suffix}"])
        for path in maps.get(name, [labels / f"{name}{ending}.png"])
    ]


def _ending(pictures: Collection[str], maps: Collection[str]) -> str | None:
    """What the names of all maps have behind those of pictures, if there is one such ending."""
    first = min(maps, default="")
    endings = {first.removeprefix(first[:n]) for n in range(len(first)) if first[:n] in pictures}
    fitting = [
        ending
        for ending in endings
        if _ENDING.fullmatch(ending)
        and all(name.endswith(ending) and name.removesuffix(ending) in pictures for name in maps)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _unpaired(images: Path, labels: Path, picture: str, found: str | None) -> str:
    """Why no picture has a map, and what to do, in words.

    Args:
        picture, found: the name of the first picture, and of the first map if there is one.
    """
    expected = f"{labels}: expected maps of the pictures in {images}"
    if found is None:
        return f"{expected}, {without_maps(labels)}"
    return (
        f"{expected}, but none has the name of a picture: maps are called as {found!r:.80}, "
        f"pictures as {picture!r:.80}; use the same names, or one ending behind these for all "
        f"maps, as {picture + '_mask'!r:.80}"
    )


def without_maps(folder: Path) -> str:
    """What there is in the place of maps, in words."""
    if not folder.is_dir():
        return "there is no such folder"
    files = (path for path in folder.rglob("*") if path.is_file() and not is_litter(path.name))
    kinds = sorted({path.suffix.lower() or path.name for path in files})
    if not kinds:
        return "it is empty"
    hint = ""
    if ".txt" in kinds:
        hint = (
            "; boxes and outlines as YOLO has them are to be converted, to maps or to COCO's JSON "
            "with segmentation"
        )
    elif _LOSSY.intersection(kinds):
        hint = "; JPEG changes the numbers in maps: write them anew, converting does not help"
    return f"it holds {', '.join(kinds[:5])}, but no PNG or TIFF{hint}"


def found_labels(maps: Iterable[PictureFile]) -> set[int]:
    """The labels in some maps; what is wrong with a map is said when it is read."""

    def labels(path: PictureFile) -> set[int]:
        try:
            return set(np.unique(read_labels(path)).tolist())
        except ValueError:
            return set()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return set[int]().union(*pool.map(labels, maps))


def found_classes(
    maps: Iterable[PictureFile], source: object, void: Sequence[int]
) -> tuple[Category, ...]:
    """A class for each label in some maps, but for those that are void.

    Raises:
        ValueError: naming the source, if there are none, or so many that they must be objects; of
            maps that cannot be read, the first.
    """
    maps = list(maps)
    found = found_labels(maps)
    kept = sorted(found - set(void))
    if maps and not found:
        read_labels(maps[0])  # says what is wrong with all
    if not kept:
        raise ValueError(
            f"{source}: expected labels, found "
            + (f"only void ({', '.join(map(str, sorted(found)))})" if found else "none")
            + "; data.void says which labels are void" * bool(found)
        )
    if len(kept) == 1 and len(found) == 2 and found & set(void):
        raise ValueError(
            f"{source}: the maps hold only {kept[0]}, and {min(found & set(void))}, which "
            "is void; if both are classes, void is to be empty (data.void=[])"
        )
    if len(kept) > 4096:
        raise ValueError(
            f"{source}: holds {len(kept)} different labels; maps of objects belong in "
            "a folder 'instances', for the task 'instance'"
        )
    return tuple(
        Category(label, other.name, other.is_thing, other.color)
        for label, other in zip(kept, named_categories(map(str, kept)), strict=True)
    )


class LabelTable:
    """The classes of a file's labels.

    Args:
        classes: by label.
        void: labels that become VOID, where they have no class.
    """

    def __init__(self, classes: dict[int, int], void: Iterable[int]) -> None:
        rows = sorted((dict.fromkeys(void, VOID) | classes).items())
        self._labels = np.array([label for label, _ in rows], np.int64)
        self._classes = np.array([number for _, number in rows], np.int32)

    def classes_of(self, values: np.ndarray, path: PictureFile) -> np.ndarray:
        """(H, W) int32 classes of the labels in a file.

        Raises:
            ValueError: naming the file, the value and its place, if a label is not in the table.
        """
        largest = int(self._labels[-1])
        if largest <= _LARGEST_INDEX:
            table = np.full(largest + 2, _UNKNOWN, np.int32)  # the last is of what is beyond
            table[self._labels[self._labels >= 0]] = self._classes[self._labels >= 0]
            classes = table[np.minimum(values, largest + 1)]
        else:
            place = np.minimum(np.searchsorted(self._labels, values), len(self._labels) - 1)
            classes = np.where(self._labels[place] == values, self._classes[place], _UNKNOWN)
        unknown = classes == _UNKNOWN
        if unknown.any():
            row, column = np.argwhere(unknown)[0].tolist()
            known = self._labels.tolist()
            gaps = len(known) <= known[-1] - known[0]
            raise ValueError(
                f"{path}: label {values[row, column]} at row {row}, column {column} is outside the "
                f"{len(known)} known labels "
                f"{brief(known) if gaps else f'{known[0]} to {known[-1]}'}"
            )
        return classes


def read_label_file(
    name: str, image: PictureFile, path: PictureFile, table: LabelTable
) -> Annotation:
    values = read_labels(path)
    check_size(path, values.shape, image)
    classes = table.classes_of(values, path)
    return Annotation(name, image, values.shape, name, semantic=classes)


def write_labels(
    path: str | os.PathLike[str],
    classes: np.ndarray,
    categories: Sequence[Category],
    *,
    void: int,
) -> None:
    """Write a map of classes as a PNG of the categories' ids.

    Args:
        classes: (H, W) integers, 0 to K - 1 or VOID.
        void: the label for VOID: 0 in ADE20K and Cityscapes, 255 in most others.

    Raises:
        ValueError: if a class is out of range.
    """
    classes = np.asarray(classes)
    if classes.size and (classes.min() < VOID or classes.max() >= len(categories)):
        raise ValueError(
            f"classes: expected {VOID} to {len(categories) - 1}, "
            f"got {classes.min()} to {classes.max()}"
        )
    ids = np.array([*(category.id for category in categories), void])  # VOID is the last one
    write_map(path, ids[classes])


def write_map(path: str | os.PathLike[str], values: np.ndarray) -> None:
    """Write (H, W) integers as a gray PNG of 8 bits, or 16 if a value needs them.

    A path that ends in .tif gets a TIFF file of 32 bits, for more ids than that.

    Raises:
        ValueError: if a value is negative or above 65535 (of a .tif, 2 ** 31 - 1), or the file of
            somebody else is there.
    """
    values, tiff = np.asarray(values), Path(path).suffix.lower() == ".tif"
    largest, limit = values.max(initial=0), (1 << 31) - 1 if tiff else MOST_PNG_IDS
    if values.min(initial=0) < 0 or largest > limit:
        kind = "32-bit map" if tiff else "PNG"
        raise ValueError(
            f"{os.fspath(path)}: a {kind} holds 0 to {limit}, got {values.min()} to {largest}"
        )
    if tiff:
        write_tiff(path, values.astype(np.int32))
    else:
        write_png(path, values.astype(np.uint8 if largest < 256 else np.uint16))
