"""Small data sets of real pictures, and recipes that are done with them in seconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pointformer.annotations import Category, Segment
from pointformer.data import Annotation, Dataset
from pointformer.data.annotations import Entry
from pointformer.data.point_sets import PointDataset
from pointformer.tasks import task_of
from pointformer.train.initial import make_model
from pointformer.train.recipe import read_recipe
from pointformer.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parent / "tiny.yaml"  # a recipe
NUCLEUS = Category(1, "nucleus")
KINDS = (Category(1, "background", False), Category(2, "small"), Category(3, "large"))


def crops(count, side, times=1):
    """Pictures of nuclei, magnified, and their ids, from the example: (side, side, 3), (side, side)
    times `times`."""
    picture = np.asarray(Image.open(ROOT / "docs/nuclei.png").convert("RGB"))
    ids = np.asarray(Image.open(ROOT / "tests/cases/nuclei_instances.png")).astype(np.int32)
    steps = np.linspace(0, len(picture) - side, int(np.ceil(count**0.5))).astype(int)
    size = (side * times, side * times)
    for top, left in [(top, left) for top in steps for left in steps][:count]:
        window = slice(top, top + side), slice(left, left + side)
        colors = Image.fromarray(picture[window]).resize(size, Image.Resampling.BICUBIC)
        yield np.asarray(colors), ids[window].repeat(times, 0).repeat(times, 1)


def write_folder(root, train=4, val=2, side=64):
    """A data set as `read_folder` takes it, for the tasks "instance" and "semantic" both."""
    for split, pairs in (("train", crops(train, side)), ("val", crops(val, side))):
        for name in ("images", "instances", "labels"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
        for number, (picture, ids) in enumerate(pairs):
            Image.fromarray(picture).save(root / split / f"images/{number}.png")
            Image.fromarray(ids.astype(np.uint16)).save(root / split / f"instances/{number}.png")
            labels = (ids > 0).astype(np.uint8)
            Image.fromarray(labels).save(root / split / f"labels/{number}.png")
    return root


def dataset_of(folder, task, count=8, side=48, times=1):
    """Real pictures with what a task learns: nuclei, small and large ones, or how many."""
    categories = KINDS[1:] if task == "classification" else KINDS
    categories = categories if task in ("panoptic", "semantic", "classification") else (NUCLEUS,)
    annotations = []
    for number, (picture, ids) in enumerate(crops(count, side, times)):
        file = folder / f"{number}.png"
        Image.fromarray(picture).save(file)
        annotation = Annotation.of_objects(ids, str(number), file)
        if task != "instance":
            annotation = _with_kinds(annotation, task, number)
        annotations.append(annotation)
    entries = [Entry(a.name, a.image, None, lambda a=a: a) for a in annotations]
    return Dataset(folder, categories, entries)


def _with_kinds(annotation, task, number):
    ids = annotation.ids
    middle = np.median([0, *(segment.area for segment in annotation.segments)])
    large = [segment.id for segment in annotation.segments if segment.area > middle]
    classes = (ids > 0) + np.isin(ids, large).astype(np.int32)  # 0, 1 or 2
    if task == "classification":
        return replace(annotation, ids=None, segments=(), label=int(len(annotation.segments) > 5))
    if task == "semantic":
        return replace(annotation, ids=None, segments=(), semantic=classes.astype(np.int32))
    kept = [replace(s, category=1 + int(s.id in large)) for s in annotation.segments]
    background = int(ids.max()) + 1
    ids = np.where(ids == 0, background, ids)
    kept.append(Segment(background, 0, int((ids == background).sum())))
    return replace(annotation, ids=ids, segments=tuple(kept))


def recipe_of(folder, *changes, task="instance", **values):
    """A recipe for a tiny model."""
    return read_recipe(TINY, [f"data.path={folder}", *changes], task=task, **values)


def trainer_of(dataset, recipe):
    channels = dataset.channels if isinstance(dataset, PointDataset) else None
    model = make_model(recipe, dataset.categories, channels)
    task = task_of(model, recipe.task, dataset.categories, **recipe.loss)
    return Trainer(recipe, model, task, len(dataset))
