"""Classes of pictures as wholes: folders as ImageNet has them, SPLIT/CLASS/NAME.EXT, and labels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pointformer._checks import brief
from pointformer.annotations import Category
from pointformer.data.annotations import (
    Annotation,
    Dataset,
    Entry,
    category_table,
    named_categories,
)
from pointformer.data.discovery import composed, is_litter, is_picture, picture_name, pictures_in
from pointformer.data.images import image_size
from pointformer.data.packed import PictureFile

_MOST_CLASSES = 65536  # more different labels are taken for something else


def class_folders(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the folders that have a picture in them, sorted by code points."""
    return [name for name in _folders(folder) if _has(os.path.join(folder, name), is_picture)]


def _folders(folder: str | os.PathLike[str]) -> list[str]:
    try:
        with os.scandir(folder) as found:
            return sorted(e.name for e in found if not is_litter(e.name) and e.is_dir())
    except OSError:
        return []


def _has(folder: str, wanted: Callable[[str], bool]) -> bool:
    with os.scandir(folder) as found:  # of a thousand pictures the first is enough
        return any(wanted(entry.path) for entry in found)


def read_class_folders(
    root: str | os.PathLike[str],
    *,
    categories: Sequence[Category] | Sequence[str] | None = None,
    beside: Iterable[str | os.PathLike[str]] = (),
    skip_bad: bool = False,
) -> Dataset:
    """A folder of pictures for each class: `root`/CLASS/NAME.EXT, for classification.

    A picture is called CLASS/NAME; pictures in deeper folders are of their CLASS too. Of a folder
    that is none of the classes, but has something other than pictures in it, a warning tells.

    Args:
        categories: the classes or their names, which are those of the folders; a class may have
            none. `None`: the folders in `root` and `beside`, sorted by their names.
        beside: folders of other splits, so that a class that a split lacks is still counted.

    Raises:
        ValueError: naming the folder, if there are no pictures or a folder is none of the classes.
    """
    root = Path(root)
    classes = class_folders(root)
    table = category_table(categories)
    if table is None:
        found = {*classes, *(name for other in beside for name in class_folders(other))}
        table = named_categories(sorted({composed(name) for name in found}))
    numbers = {composed(category.name): number for number, category in enumerate(table)}
    unknown = [name for name in classes if composed(name) not in numbers]
    lost = [
        name
        for name in _folders(root)
        if composed(name) not in numbers
        and name not in classes
        and _has(os.path.join(root, name), lambda path: not is_litter(os.path.basename(path)))
    ]
    if lost:
        warnings.warn(
            f"{root}: the folders {brief(lost)} are no classes: no picture lies directly in them",
            stacklevel=2,
        )
    problems = {
        name: f"{root / name}: is none of the {len(numbers)} classes "
        f"({', '.join(list(numbers)[:5])}{', ...' if len(numbers) > 5 else ''})"
        for name in unknown
    }
    entries = []
    for name in _folders(root):
        number = numbers.get(composed(name))
        if number is None:
            continue
        for image in pictures_in(root / name, deep=True):
            title = picture_name(image.relative_to(root))
            read = partial(read_class, title, image, number)
            entries.append(Entry(title, image, None, read, number))
    return Dataset(root, table, entries, problems, skip_bad)


def read_class(name: str, image: PictureFile, label: int) -> Annotation:
    return Annotation(name, image, image_size(image), name, label=label)


def labeled_classes(labels: Iterable[int | str], source: object) -> tuple[Category, ...]:
    """A class for each label, in their order; what is a number is the class's id.

    Of a negative one beside 0, which often marks what has no label, a warning tells.

    Raises:
        ValueError: naming the source, if some are numbers and some are names, or there are so many
            that they are something else, such as captions.
    """
    found = set(labels)
    numbers = sorted(label for label in found if isinstance(label, int))
    names = sorted(label for label in found if isinstance(label, str))
    if numbers and names:
        raise ValueError(
            f"{source}: expected labels that are all numbers or all names of classes, got "
            f"{numbers[0]} and {names[0]!r:.80}"
        )
    if len(found) > _MOST_CLASSES:
        raise ValueError(
            f"{source}: expected labels of classes, got {len(found)} different ones, such as "
            f"{(names or numbers)[0]!r:.80}"
        )
    if numbers and numbers[0] < 0 and 0 in numbers:  # -1 and 1 are two classes
        warnings.warn(
            f"{source}: the label {numbers[0]} is a class, as {numbers[-1]} is; leave out samples "
            "that have it for want of one",
            stacklevel=2,
        )
    classes = named_categories(names or map(str, numbers))
    return (
        tuple(
            replace(category, id=label) for category, label in zip(classes, numbers, strict=False)
        )
        or classes
    )


class ClassNumbers:
    """The numbers of classes by what labels say, which is their ids or their names."""

    def __init__(self, classes: Sequence[Category]) -> None:
        self._by_id = {category.id: number for number, category in enumerate(classes)}
        self._by_name = {category.name: number for number, category in enumerate(classes)}
        names = [f"{category.id} {category.name}" for category in classes[:5]]
        self._classes = ", ".join(names + ["..."] * (len(classes) > 5))

    def of(self, label: int | str) -> int:
        """The number of the class.

        Raises:
            ValueError: it is none of the classes.
        """
        if isinstance(label, str):
            number = self._by_name.get(label)
        else:
            number = self._by_id.get(label)
        if number is None:
            raise ValueError(
                f"label {label!r:.80} is none of the {len(self._by_id)} classes ({self._classes})"
            )
        return number
