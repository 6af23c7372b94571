"""Pictures whose folder tells their class, as ImageNet has them: SPLIT/CLASS/NAME.EXT."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from pointformer.annotations import Category
from pointformer.data.annotations import Annotation, Dataset, Entry, named_categories
from pointformer.data.discovery import is_picture, picture_name, pictures_in
from pointformer.data.images import image_size


def class_folders(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the folders that have a picture in them, sorted by code points."""
    try:
        with os.scandir(folder) as found:
            folders = [entry for entry in found if not entry.name.startswith(".")]
    except OSError:
        return []
    return sorted(entry.name for entry in folders if entry.is_dir() and _has_picture(entry.path))


def _has_picture(folder: str) -> bool:
    with os.scandir(folder) as found:  # of a thousand pictures the first is enough
        return any(is_picture(entry.path) for entry in found)


def read_class_folders(
    root: str | os.PathLike[str],
    *,
    categories: Sequence[Category] | Sequence[str] | None = None,
    beside: Iterable[str | os.PathLike[str]] = (),
    skip_bad: bool = False,
) -> Dataset:
    """A folder of pictures for each class: `root`/CLASS/NAME.EXT, for classification.

    A picture is called CLASS/NAME; pictures in deeper folders are of their CLASS too.

    Args:
        categories: the classes or their names, which are those of the folders; a class may have
            none. `None`: the folders in `root` and `beside`, sorted by their names.
        beside: folders of other splits, so that a class that a split lacks is still counted.

    Raises:
        ValueError: naming the folder, if there are no pictures or a folder is none of the classes.
    """
    root = Path(root)
    folders = class_folders(root)
    if categories is None:
        names = sorted({*folders, *(name for other in beside for name in class_folders(other))})
        table = named_categories(names)
    else:
        given = [c if isinstance(c, str) else c.name for c in categories]
        table = named_categories(given)
        if all(isinstance(category, Category) for category in categories):
            table = tuple(c for c in categories if isinstance(c, Category))
    numbers = {category.name: number for number, category in enumerate(table)}
    unknown = [name for name in folders if name not in numbers]
    problems = {
        name: f"{root / name}: is none of the {len(numbers)} classes "
        f"({', '.join(list(numbers)[:5])}{', ...' if len(numbers) > 5 else ''})"
        for name in unknown
    }
    entries = []
    for name in folders:
        if name not in numbers:
            continue
        for image in pictures_in(root / name, deep=True):
            title = picture_name(image.relative_to(root))
            read = partial(_read_class, title, image, numbers[name])
            entries.append(Entry(title, image, None, read, numbers[name]))
    return Dataset(root, table, entries, problems, skip_bad)


def _read_class(name: str, image: Path, label: int) -> Annotation:
    return Annotation(name, image, image_size(image), name, label=label)
