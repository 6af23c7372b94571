"""The pictures that a run learns from and is scored on."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from pointformer.data import Dataset, Reading, open_splits
from pointformer.data.statistics import (
    Statistics,
    examine,
    left_out_lines,
    samples_in_words,
    without_bad,
)
from pointformer.models import Model
from pointformer.processes import Processes
from pointformer.tasks import Task
from pointformer.train.recipe import Recipe


def open_data(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """The pictures to learn from, and those to be scored on."""
    data = recipe.data
    if data.path is None:
        raise ValueError("data.path: expected a data set")
    return open_splits(
        data.path,
        data.format,
        recipe.task,
        train=data.train,
        val=data.val,
        val_share=data.val_share,
        seed=recipe.seed,
        categories=data.categories,
        void=data.void,
        skip_bad=data.skip_bad,
        features=data.features,
    )


def checked(
    dataset: Dataset, task: Task, kept: Path, processes: Processes, reading: Reading
) -> tuple[Dataset, Statistics]:
    """The pictures that can be read, see `without_bad`, and what is in them.

    Args:
        kept: a file that spares the next start from reading all of them again.
        reading: how pictures are read, see `pointformer.data.Reading`.
    """
    statistics: Statistics | None = None
    for first in (True, False):  # the others take what the first has found
        read = partial(examine, dataset, task.counts, cache=kept, progress=first, **reading)
        found = processes.alike(read if processes.main == first else lambda: None)
        statistics = found or statistics
    assert statistics is not None
    return without_bad(dataset, statistics), statistics


def describe(
    training: Dataset,
    validation: Dataset | None,
    statistics: Statistics,
    recipe: Recipe,
    model: Model,
    say: Callable[[str], None],
) -> None:
    """Say what the model is to learn from, and where a setting will not do well."""
    say(f"{training.source}: {'; '.join(statistics.lines())}")
    if validation is None:
        say("nothing to be scored on")
    else:
        many = samples_in_words(len(validation), statistics.counts)
        say(f"{validation.source}: {many} to be scored on")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    say(f"model: {model.name} with the head {model.head_name}, {numbers:,} parameters")
    errors = [
        error
        for dataset in (training, validation)
        for error in ([] if dataset is None else dataset.skipped.values())
    ]
    for line in left_out_lines(dict.fromkeys(errors)):  # parts of one data set share some
        say(f"left out: {line}")
    crop, size, scale = recipe.augmentation.crop, None, 1.0
    if crop is not None and crop.measure == "pixels":
        size = (crop.size, crop.size) if isinstance(crop.size, int) else crop.size
        scale = max(crop.scales)
    token = getattr(model.config, "patch_stride", 4)
    for advice in statistics.advice(token, size, scale):
        say(f"advice: {advice}")


def crowdedness(statistics: Statistics) -> np.ndarray:
    """(N,) relative frequencies of drawing pictures: the root of one plus the number of objects."""
    return np.sqrt([1.0 + len(facts.areas) for facts in statistics.good])


def object_diameter(statistics: Statistics) -> float | None:
    """Diameter of a typical object in pixels, of the disk of its area; `None` without objects.

    The area is the median over pictures of each picture's median.
    """
    areas = [np.median(facts.areas) for facts in statistics.good if facts.areas]
    return round(2 * math.sqrt(float(np.median(areas)) / math.pi), 1) if areas else None
