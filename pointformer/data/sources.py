"""Data sets by their folder, in any of the formats: which one it is, and which splits there are."""

from __future__ import annotations

import json
import mmap
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pointformer._checks import brief
from pointformer.annotations import Category
from pointformer.data.annotations import (
    Dataset,
    are_named,
    category_table,
    matched_classes,
    read_categories,
)
from pointformer.data.arrays import Columns, find_columns, read_arrays
from pointformer.data.categories import ADE20K
from pointformer.data.cityscapes import read_cityscapes
from pointformer.data.classes import class_folders, read_class_folders
from pointformer.data.coco import listed_path, read_coco_instances, read_coco_panoptic
from pointformer.data.discovery import CLOUD_SUFFIXES, archives_in, pictures_in
from pointformer.data.folders import folder_of, map_folder, read_folder, without_background
from pointformer.data.labels import found_classes, found_labels, paired_files, read_ade20k
from pointformer.data.point_sets import object_splits, read_objects, read_scenes, scene_splits
from pointformer.data.shards import read_shards, shard_files

_SAME = (("train", "training"), ("val", "validation", "valid", "dev"), ("test", "testing"))
_SPLITS = {name for names in _SAME for name in names}
_SPLIT_IN_NAME = re.compile(
    rf"(?:^|[^a-z])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?:20\d\d)?(?:$|[^a-z])"
)

_CLASS_LISTS = ("categories.json", "classes.json", "classes.txt", "labels.txt", "classnames.txt")
_BELONG = "maps of classes belong in labels/, of objects in instances/"
_PICTURES = ("images", "jpegimages", "image", "imgs", "img")
_MAPS = {"labels", "label", "masks", "mask", "instances", "annotations", "segmentationclass",
         "segmentationobject"}  # fmt: skip
_VOID = 255


class Source(NamedTuple):
    """Format and splits of a data set, as found.

    Attributes:
        path: of the data set.
        format: one of `FORMATS`.
        splits: names of its parts; "" is one that has no name.
    """

    path: Path
    format: str
    splits: tuple[str, ...]

    @property
    def lists_classes(self) -> bool:
        """Whether the files tell which classes there are, whatever else is known of them."""
        return FORMATS[self.format].lists_classes

    @property
    def is_of_clouds(self) -> bool:
        """Whether it has point clouds with classes of their points."""
        return "point_segmentation" in FORMATS[self.format].tasks

    def split(self, name: str) -> str | None:
        """The data set's own name of a split: "val" may be its "validation"."""
        if name in self.splits:
            return name
        same = next((names for names in _SAME if name.lower() in names), (name,))
        return next((s for other in same for s in self.splits if s.lower() == other), None)

    def __str__(self) -> str:
        names = ", ".join(name for name in self.splits if name)
        return f"{self.path}: {self.format}, {f'splits {names}' if names else 'no splits'}"


def find_source(
    path: str | os.PathLike[str],
    format: str | None = None,
    task: str | None = None,
    annotations: str | os.PathLike[str] | None = None,
) -> Source:
    """Format and splits of a data set.

    Args:
        path: its folder; a .npz file; a tar file or a pattern of some, see `read_shards`.
        format: one of `FORMATS`; `None`: what it looks like.
        task: of several formats that it looks like, the one that is first of all for this task.
        annotations: a JSON file of COCO's formats; `path` then is the folder of its pictures.

    Raises:
        ValueError: naming the path, if there is no such thing or it looks like no format.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if annotations is not None:
        if format is None:
            panoptic = _tells(Path(annotations), b'"segments_info"')
            format = "coco-panoptic" if panoptic else "coco"
        return Source(path, format, ("",))
    if not (path.exists() or shard_files(path)):
        raise ValueError(f"{path}: expected a data set, there is no such folder or file")

    def rank(name: str) -> int:
        tasks = FORMATS[name].tasks
        return tasks.index(task) if task in tasks else len(FORMATS)

    for name in sorted(FORMATS, key=rank) if format is None else (format,):
        splits = FORMATS[name].splits(path)
        if splits:
            return Source(path, name, tuple(splits))
    if format is None:
        raise ValueError(
            f"{path}: looks like no data set of a known format{_lacking(path)}: expected "
            "SPLIT/images beside SPLIT/labels or SPLIT/instances, a folder of pictures for each "
            "class, COCO's JSON in annotations/, leftImg8bit/ beside gtFine/, ADE20K's images/ "
            "beside annotations/, tar files of samples, a .npz file of arrays or points, or "
            "point clouds with a class per point"
        )
    hint = "; `evaluate` takes a JSON elsewhere (--annotations)" * format.startswith("coco")
    raise ValueError(f"{path}: expected {FORMATS[format].layout}, found none{hint}")


def _lacking(path: Path) -> str:
    """Parts of a folder that nearly make it a data set, in words."""
    if path.suffix.lower() == ".npz":
        return ""
    if path.suffix.lower() == ".json":
        return f" (pass the folder that has it, {path.parent})"
    for boxes, *_ in _coco_files(path, b'"bbox"').values():
        return f" ({boxes} has boxes but no outlines: each annotation needs a segmentation)"
    for folder in (path, *_folders(path)):
        inside = {f.name.lower(): f for f in _folders(folder)}
        name = _folder_of_pictures(inside)
        if name is not None:
            images = inside.pop(name)
            beside = [f"{f.name}/" for name, f in inside.items() if name not in _SPLITS]
            found = f", only {', '.join(beside[:5])}: {_BELONG}"
            found += ", pictures in images/" * (name != "images")
            return f" ({images} has neither labels/ nor instances/ beside it{found * bool(beside)})"
    classes = class_folders(path)
    if classes:
        return f" ({classes[0]} is the only folder of pictures: one class cannot be told apart)"
    if path.is_dir() and pictures_in(path):
        return " (pictures, but nothing that says what is in them)"
    if path.is_dir() and pictures_in(path, suffixes=CLOUD_SUFFIXES | {".txt", ".csv"}):
        return (
            " (files, but none of points with a column label, labels or classification; columns of "
            "text end in .xyz, .pts or .asc)"
        )
    return ""


def _folder_of_pictures(names: Collection[str]) -> str | None:
    """Which of some folders, in lower case, has pictures that the others are of; `None` if they may
    be classes."""
    first = next((name for name in _PICTURES if name in names), None)
    # "image" and "text" may be classes, "image" and "mask" are not; "JPEGImages" is Pascal VOC's.
    return first if first in _PICTURES[:2] or not _MAPS.isdisjoint(names) else None


def open_dataset(
    path: str | os.PathLike[str] | Source,
    format: str | None = None,
    task: str = "semantic",
    split: str | None = None,
    *,
    annotations: str | os.PathLike[str] | None = None,
    segments: str | os.PathLike[str] | None = None,
    categories: Sequence[Category] | Sequence[str] | None = None,
    void: Sequence[int] | None = None,
    skip_bad: bool = False,
    features: Sequence[str] = (),
) -> Dataset:
    """A data set of any format.

    Args:
        path: of its folder or file, see `find_source`, or what that found.
        format: one of `FORMATS`; `None`: what it looks like.
        task: what is to be learned or scored: "semantic", "instance", "panoptic",
            "classification", "point_classification", "point_segmentation".
        split: its name; "val" also finds "validation", and so on. `None`: "val", or all where there
            are no splits.
        annotations: the JSON file of COCO's formats; `path` is the folder of its pictures then.
        segments: folder of the PNGs of a panoptic JSON; `None`: beside it, with its name.
        categories: classes, or their names, where the format does not fix them. `None`: those that
            the data set lists (in categories.json or classes.txt), or else that are in its maps.
        void: labels of maps that mean void, see `read_folder`.
        skip_bad: leave out what is bad, see `Dataset`.
        features: of points, see `read_scenes`.

    Raises:
        ValueError: naming the path: it has no such format or split, none for this task, or what is
            in it is bad.
    """
    source = path if isinstance(path, Source) else find_source(path, format, task, annotations)
    name = source.split("val" if split is None else split)
    if name is None and split is None and source.splits == ("",):
        name = ""
    if name is None:
        names = ", ".join(other for other in source.splits if other) or "none"
        raise ValueError(f"{source.path}: has no split {split or 'val'!r}; there are: {names}")
    kind = FORMATS[source.format]
    if task not in kind.tasks:
        found = ""
        if source.format == "classes":
            folders = class_folders(source.path / source.splits[0])
            found = f"; its classes are the folders {brief(folders)}; {_BELONG}, beside images/"
        raise ValueError(
            f"{source.path}: {source.format} has nothing for the task {task!r}, only for "
            f"{', '.join(kind.tasks)}{found}"
        )
    request = _Request(
        source.path, name, task, annotations, segments, categories, void, skip_bad, features
    )
    return kind.read(request)


def open_splits(
    path: str | os.PathLike[str],
    format: str | None = None,
    task: str = "semantic",
    *,
    train: str | None = None,
    val: str | None = None,
    val_share: float = 0.1,
    seed: int = 0,
    categories: Sequence[Category] | Sequence[str] | None = None,
    void: Sequence[int] | None = None,
    skip_bad: bool = False,
    features: Sequence[str] = (),
) -> tuple[Dataset, Dataset | None]:
    """The pictures to learn from, and those to be scored on.

    Args:
        train, val: names of the splits; `None`: "train" and "val", under any of their names.
        val_share: of the pictures that are kept to be scored on where there is no split for that,
            see `Dataset.divided`; 0: none are.
        seed: of that choice.
        path, format, task, categories, void, skip_bad, features: see `open_dataset`.

    Returns:
        Both have the classes of the first. A warning tells where pictures are in both, and where a
        folder for those to be scored on has no annotations.

    Raises:
        ValueError: as `open_dataset`, or the share is none.
    """
    source = find_source(path, format, task)
    if train is None and source.splits == ("",):
        train = ""
    training = open_dataset(
        source,
        task=task,
        split="train" if train is None else train,
        categories=categories,
        void=void,
        skip_bad=skip_bad,
        features=features,
    )
    if val is not None or source.split("val") is not None:
        own = categories is not None and not source.lists_classes  # those of the labels
        validation = open_dataset(
            source,
            task=task,
            split=val,
            categories=categories if own else training.categories,
            void=void,
            skip_bad=skip_bad,
            features=features,
        )
        named = any(c.name != str(c.id) for c in training.categories)
        if task == "semantic" and not (named or skip_bad):
            _check_labels(training, validation, (_VOID,) if void is None else void)
        _warn_of_shared(training, validation)
        return training, validation
    folders = [*_folders(source.path), *_folders(source.path / "images")]
    unused = [folder for folder in folders if folder.name.lower() in _SAME[1]]
    if unused and source.splits != ("",):
        warnings.warn(
            f"{unused[0]}: has no annotations that were found, and is left out", stacklevel=2
        )
    if val_share == 0:
        return training, None
    return training.divided(val_share, seed)


def _warn_of_shared(training: Dataset, validation: Dataset) -> None:
    """Warn of pictures to be scored on that are learned from too."""
    learned = {(str(entry.image), entry.part) for entry in training.entries}
    shared = [e.image for e in validation.entries if e.image and (str(e.image), e.part) in learned]
    if shared:
        warnings.warn(
            f"{shared[0]}: is in both {training.source} and {validation.source}, as are "
            f"{len(shared)} of the {len(validation)} {validation.noun}s to be scored on: scores of "
            "what was learned by heart say little",
            stacklevel=3,
        )


def _check_labels(training: Dataset, validation: Dataset, void: Sequence[int]) -> None:
    """Raise `ValueError` where classes that were found in the maps of one split miss those of
    another."""
    maps = [entry.labels for entry in validation.entries if entry.labels is not None]
    known = {category.id for category in training.categories}
    new = sorted(found_labels(maps) - known - set(void))
    if new:
        raise ValueError(
            f"{validation.source}: holds {brief(new)}, no class of {training.source}: list all "
            "classes (data.categories, or a name in each line of classes.txt), or say that these "
            "are void (data.void)"
        )


class _Request(NamedTuple):
    path: Path
    split: str
    task: str
    annotations: str | os.PathLike[str] | None
    segments: str | os.PathLike[str] | None
    categories: Sequence[Category] | Sequence[str] | None
    void: Sequence[int] | None
    skip_bad: bool
    features: Sequence[str]


class _Format(NamedTuple):
    """A format: how it is told from others, and read.

    Attributes:
        layout: what a folder of it holds, in words.
        tasks: that it has annotations for.
        splits: names of the splits in a folder, none if it is of another format.
        lists_classes: see `Source`.
    """

    layout: str
    tasks: tuple[str, ...]
    splits: Callable[[Path], list[str]]
    read: Callable[[_Request], Dataset]
    lists_classes: bool = True


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


# Plain folders ------------------------------------------------------------------------------------


def _folder_splits(path: Path) -> list[str]:
    def has_maps(folder: Path) -> bool:
        return all(
            any((folder / name).is_dir() for name in names)
            for names in (("images",), ("labels", "instances"))
        )

    if has_maps(path):
        images, *maps = (
            {folder.name for folder in _folders(path / name)}
            for name in ("images", "labels", "instances")
            if (path / name).is_dir()
        )
        divided = [s for s in images.intersection(*maps) if s.lower() in _SPLITS]
        return [""] if pictures_in(path / "images") else sorted(divided) or [""]
    return [folder.name for folder in _folders(path) if has_maps(folder)]


def _read_folder(request: _Request) -> Dataset:
    categories, void = _classes(request), request.void
    if categories is None and request.task == "semantic":
        void = (_VOID,) if void is None else void
        images = folder_of(request.path, "images", request.split)
        labels = map_folder(request.path, "semantic", request.split)
        maps = [path for _, _, path in paired_files(images, labels)]
        categories = found_classes(maps, labels, void)
    return read_folder(
        request.path,
        request.split,
        request.task,
        categories=categories,
        void=void,
        skip_bad=request.skip_bad,
    )


def _classes(request: _Request) -> Sequence[Category] | Sequence[str] | None:
    """Those that are asked for, with the labels that the list in the folder has for them."""
    listed = _listed_classes(request.path)
    if listed is None:
        return request.categories
    if request.task == "instance" and request.categories is not None:
        listed = without_background(listed) or ()
    return matched_classes(request.categories, listed, request.path)


def _listed_classes(path: Path) -> tuple[Category, ...] | None:
    """From a list in the data set's folder, if there is one: JSON, or a name in each line."""
    for name in _CLASS_LISTS:
        file = (path if path.is_dir() else path.parent) / name
        if file.is_file():
            if file.suffix == ".json":
                return read_categories(file)
            try:
                lines = file.read_text("utf-8-sig").splitlines()
                return category_table([line.strip() for line in lines if line.strip()])
            except (OSError, ValueError) as error:
                raise ValueError(f"{file}: expected names of classes, but {error}") from None
    return None


# Folders of classes -------------------------------------------------------------------------------


def _class_splits(path: Path) -> list[str]:
    if _folder_splits(path):  # "images" and "labels" are no classes
        return []
    found = [class_folders(folder) for folder in (path, *_folders(path))]
    if any(_folder_of_pictures({name.lower() for name in names}) for names in found):
        return []  # nor are "images" and "masks"
    named = [folder for folder in _folders(path) if folder.name.lower() in _SPLITS]
    if named:
        return [folder.name for folder in named if class_folders(folder)]
    if any(_SPLIT_IN_NAME.fullmatch(name.lower()) for name in found[0]):  # COCO's train2017
        return []
    return [""] if len(found[0]) > 1 else []


def _read_classes(request: _Request) -> Dataset:
    splits = [request.path / split for split in _class_splits(request.path)]
    return read_class_folders(
        request.path / request.split,
        categories=request.categories or _listed_classes(request.path),
        beside=splits,
        skip_bad=request.skip_bad,
    )


# COCO ---------------------------------------------------------------------------------------------

_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


def _tells(path: Path, key: bytes) -> bool:
    """Whether a file has some bytes."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(key) >= 0
    except (OSError, ValueError):  # an empty file has no map
        return False


def _coco_files(path: Path, key: bytes) -> dict[str, list[Path]]:
    """JSON files of a data set that have a key, by their split."""
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in (path, *_folders(path)):
        for file in sorted(folder.glob("*.json")):
            if _tells(file, key) and _tells(file, b'"images"'):
                name = _SPLIT_IN_NAME.search(file.stem.lower())
                split = name[1] if name else folder.name if folder.name.lower() in _SPLITS else ""
                found[split].append(file)
    return found


def _coco_file(request: _Request, key: bytes) -> tuple[Path, Path]:
    """The JSON of a split, and the folder of its pictures."""
    if request.annotations is not None:
        return Path(request.annotations), request.path
    files = _coco_files(request.path, key)[request.split]
    if len(files) > 1:
        files = [file for file in files if file.stem.startswith("instances")] or files
    if len(files) > 1:
        names = " and ".join(str(file) for file in files[:2])
        raise ValueError(
            f"{request.path}: both {names} may be the annotations; move one away (`evaluate` takes "
            "--annotations)"
        )
    file = files[0]
    year = _SPLIT_IN_NAME.search(file.stem.lower())
    parts = [request.split, *([year[0].strip("_-. ")] if year else [])]
    root = request.path
    folders = [file.parent, *(root / name for name in parts)]
    folders += [root / "images" / name for name in parts]
    folders += [root / name / "images" for name in parts]
    folders += [root / "images", root]
    shown = _first_names(file)
    for folder in folders:
        for name in shown:
            try:
                if listed_path(folder, name).is_file():
                    return file, folder
            except (OSError, ValueError):
                continue  # reading says what is wrong with such names
    return file, root


def _first_names(file: Path) -> list[str]:
    """Some of the pictures' names in a JSON."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = max(0, text.find(b'"images"'))
        matches = _FILE_NAME.finditer(text[start : start + 2**20])
        raw = [match[1] for match in islice(matches, 20)]
    found = []
    for name in raw:
        try:
            found.append(json.loads(name))
        except ValueError:
            continue
    return found


def _read_coco(request: _Request) -> Dataset:
    file, images = _coco_file(request, b'"segmentation"')
    dataset = read_coco_instances(
        file, images, categories=_with_ids(request.categories), skip_bad=request.skip_bad
    )
    return _with_own_names(request, dataset)


def _read_coco_panoptic(request: _Request) -> Dataset:
    file, images = _coco_file(request, b'"segments_info"')
    folder = request.segments or file.with_suffix("")
    dataset = read_coco_panoptic(
        file, folder, images, categories=_with_ids(request.categories), skip_bad=request.skip_bad
    )
    return _with_own_names(request, dataset)


def _with_ids(
    categories: Sequence[Category] | Sequence[str] | None,
) -> tuple[Category, ...] | None:
    """Classes as the formats need them that have ids of their own."""
    if categories is None or not all(isinstance(c, Category) for c in categories):
        return None
    return tuple(c for c in categories if isinstance(c, Category))


def _with_own_names(request: _Request, dataset: Dataset, advice: str = "") -> Dataset:
    """The data set, which names its classes, unless others' names are asked for."""
    given, own = request.categories, [category.name for category in dataset.categories]
    if given is not None and _with_ids(given) is None and list(given) != own:
        raise ValueError(
            f"{request.path}: has classes with names of its own, {brief(own)}; leave categories "
            f"(data.categories) out, got {brief(list(given))}{advice}"
        )
    return dataset


# ADE20K and Cityscapes ----------------------------------------------------------------------------


def _ade20k_splits(path: Path) -> list[str]:
    if _listed_classes(path) is not None:  # others' maps in such folders have other classes
        return []
    maps = {folder.name for folder in _folders(path / "annotations")}
    own = ("training", "validation")
    return [f.name for f in _folders(path / "images") if f.name in maps and f.name in own]


def _cityscapes_splits(path: Path) -> list[str]:
    return [folder.name for folder in _folders(path / "leftImg8bit")]


def _read_ade20k(request: _Request) -> Dataset:
    dataset = read_ade20k(request.path, request.split, skip_bad=request.skip_bad)
    advice = (
        "maps of your own classes belong in labels/, not annotations/, their names in classes.txt"
    )
    if not any(Path(entry.name).name.startswith("ADE_") for entry in dataset.entries):
        warnings.warn(
            f"{request.path}: read as ADE20K by its folders, with the {len(ADE20K)} classes of "
            f"that; {advice}",
            stacklevel=2,
        )
    return _fixed(request, dataset, f"; {advice}")


def _fixed(request: _Request, dataset: Dataset, advice: str = "") -> Dataset:
    """The data set, whose classes its format fixes, if it is asked for these."""
    dataset = _with_own_names(request, dataset, advice)
    wanted, own = _with_ids(request.categories), dataset.categories
    if wanted is not None and are_named(wanted):
        ids = [category.id for category in own]
        found = matched_classes(wanted, own, request.path)
        if [category.id for category in found] != ids:
            raise ValueError(
                f"{request.path}: has the classes {brief([c.name for c in own])}; expected those "
                f"of the model in this order, it has {brief([c.name for c in wanted])}"
            )
    return dataset


# Shards and arrays --------------------------------------------------------------------------------


def _shards(path: Path) -> dict[str, list[Path]]:
    """Tar files of a data set by their split."""
    files = shard_files(path)
    found: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        parts = (file.relative_to(path) if path.is_dir() else Path(file.name)).parts
        names = (_SPLIT_IN_NAME.search(part.lower()) for part in parts)
        found[next((name[1] for name in names if name), "")].append(file)
    if len(found) == 1 and not path.is_dir():
        return {"": files}  # it is what was asked for
    return found


def _read_shards(request: _Request) -> Dataset:
    splits = _shards(request.path)
    return read_shards(
        splits.pop(request.split),
        request.task,
        root=request.path if request.path.is_dir() else None,
        categories=_classes(request),
        void=request.void,
        beside=[file for files in splits.values() for file in files],
        skip_bad=request.skip_bad,
    )


def _arrays(path: Path) -> dict[str, Columns]:
    """Content of the .npz file of a data set, or of its files, by split."""
    files = archives_in(path)
    if len(files) == 1:
        return find_columns(files[0], _SPLITS)
    found: dict[str, Columns] = {}
    for file in files:
        named = _SPLIT_IN_NAME.search(file.stem.lower())
        if named is None:
            continue
        split = named[1]
        if split in found:
            raise ValueError(
                f"{found[split].arrays.path}: expected one file of the split {split!r}, there is "
                f"{file.name} too; write them into one"
            )
        columns = find_columns(file, _SPLITS)
        found[split] = columns.get(split, next(iter(columns.values())))
    return found


def _read_arrays(request: _Request) -> Dataset:
    splits = _arrays(request.path)
    return read_arrays(
        splits.pop(request.split),
        request.task,
        categories=_classes(request),
        void=request.void,
        beside=splits.values(),
        skip_bad=request.skip_bad,
    )


FORMATS: dict[str, _Format] = {
    "cityscapes": _Format(
        "leftImg8bit/SPLIT beside gtFine/SPLIT",
        ("semantic", "instance", "panoptic"),
        _cityscapes_splits,
        lambda r: _fixed(r, read_cityscapes(r.path, r.split, r.task, skip_bad=r.skip_bad)),
    ),
    "ade20k": _Format(
        "images/training and validation beside annotations/training and validation",
        ("semantic",),
        _ade20k_splits,
        _read_ade20k,
    ),
    "coco-panoptic": _Format(
        "a JSON file of segments",
        ("panoptic", "semantic", "instance"),
        lambda path: sorted(_coco_files(path, b'"segments_info"')),
        _read_coco_panoptic,
    ),
    "coco": _Format(
        "a JSON file of objects",
        ("instance", "semantic"),
        lambda path: sorted(_coco_files(path, b'"segmentation"')),
        _read_coco,
    ),
    "folder": _Format(
        "images beside labels or instances",
        ("semantic", "instance"),
        _folder_splits,
        _read_folder,
        lists_classes=False,
    ),
    "classes": _Format(
        "a folder of pictures for each class",
        ("classification",),
        _class_splits,
        _read_classes,
        lists_classes=False,
    ),
    "shards": _Format(
        "tar files of samples",
        ("classification", "semantic", "instance"),
        lambda path: sorted(_shards(path)),
        _read_shards,
        lists_classes=False,
    ),
    "objects": _Format(
        "an archive (.npz) of objects, xyz (n, P, 3) and label (n,)",
        ("point_classification",),
        object_splits,
        lambda r: read_objects(r.path, r.split, r.categories),
        lists_classes=False,
    ),
    "scenes": _Format(
        "files of points (.npz, .las, .laz, .ply, .xyz, .pts, .asc) with a class each",
        ("point_segmentation",),
        scene_splits,
        lambda r: read_scenes(
            r.path, r.split, r.categories, features=r.features, void=r.void, skip_bad=r.skip_bad
        ),
        lists_classes=False,
    ),
    "arrays": _Format(
        "a .npz file of arrays of pictures and labels",
        ("classification", "semantic", "instance"),
        lambda path: sorted(_arrays(path)),
        _read_arrays,
        lists_classes=False,
    ),
}
"""Formats by name."""
