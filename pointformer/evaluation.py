"""Scores of a model on an annotated data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from pointformer.data.annotations import Annotation, Dataset
from pointformer.data.images import Reading, open_picture
from pointformer.data.transforms import Transform
from pointformer.metrics import Metric
from pointformer.models import Model
from pointformer.prediction import check_copies, predict, windows_for
from pointformer.processes import Processes
from pointformer.tasks import Task, task_of


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, in [0, 1] or NaN where nothing is to be scored, and of how many pictures.

    Attributes:
        metrics: what the scores are of, with more detail in their `scores()`.
    """

    scores: dict[str, float]
    pictures: int
    metrics: tuple[Metric, ...] = ()


def evaluate(
    model: Model,
    dataset: Dataset,
    task: Task | str | None = None,
    *,
    annotations: Iterable[Annotation] | None = None,
    metrics: Sequence[Metric] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: int | None = None,
    transform: Transform | None = None,
    processes: Processes | None = None,
    **reading: Unpack[Reading],
) -> Evaluation:
    """Run a model over a data set and score it by the field's measures.

    Args:
        model: of one class per class of the data set; one that finds the borders of objects, for
            data of one class.
        dataset: with the classes of the model, in its order. With `skip_bad` pictures that cannot
            be read are left out too, and listed in `dataset.skipped`.
        task: the model's, or its name: "classification" (top-1 and top-5 accuracy), "semantic"
            (mean IoU), "instance" (AP of COCO where pycocotools is installed, of Cityscapes for its
            classes where cityscapesscripts is; AP as StarDist counts it, regardless of class) or
            "panoptic" (PQ, for things and stuff).
        annotations: what to go through in the place of `dataset`, for example with a progress bar.
        metrics: in the place of the task's.
        scales, flip: see `predict`; not for objects and segments, because the queries of different
            copies do not correspond.
        tile: side of the windows in pixels; see `segment`.
        transform: what is done with pictures and annotations before, as classes of pictures are
            published: `Chain([Resize(256), CenterCrop(224)])` of `pointformer.data.transforms`.
        processes: that share the work, each with its own part of the data set (`Dataset.subset`);
            the scores of all pictures, and what was skipped, are then known to all.
        reading: how the pictures are read, see `pointformer.data.images.Reading`.

    Raises:
        ValueError: an option does not fit the task, the model is made for another, model and data
            set have different classes, there is no picture, or one has another size than its
            annotation; the message names it.
    """
    if not isinstance(task, Task):
        task = task_of(model, task, dataset.categories)
    check_copies(task, scales, flip)
    scored = list(task.metrics() if metrics is None else metrics)
    processes = processes or Processes()
    pictures = 0
    for annotation, _, prediction in predictions(
        model,
        task,
        dataset,
        annotations=annotations,
        scales=scales,
        flip=flip,
        tile=tile,
        transform=transform,
        **reading,
    ):
        truth = task.truth(annotation)
        for metric in scored:
            metric.update(prediction, truth)
        pictures += 1
    first, *others = processes.gathered((scored, pictures, dataset.skipped))
    scored, pictures, _ = first
    for metrics, count, _ in others:
        for metric, other in zip(scored, metrics, strict=True):
            metric.merge(other)
        pictures += count
    for _, _, skipped in (first, *others):
        dataset.skipped.update(skipped)
    if pictures == 0:
        raise ValueError(f"no picture to score ({len(dataset.skipped)} skipped)")
    scores = {name: value for metric in scored for name, value in metric.compute().items()}
    return Evaluation(scores, pictures, tuple(scored))


def predictions(
    model: Model,
    task: Task,
    dataset: Dataset,
    *,
    annotations: Iterable[Annotation] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: int | None = None,
    transform: Transform | None = None,
    **reading: Unpack[Reading],
) -> Iterator[tuple[Annotation, np.ndarray, Any]]:
    """Annotations of a data set, their pictures (H, W, 3) uint8, and what the model finds there.

    Arguments and errors are those of `evaluate`.
    """
    for annotation in dataset if annotations is None else annotations:
        try:
            image = annotation.read_image(**reading)
        except ValueError as error:
            if not dataset.skip_bad:
                raise
            dataset.skipped[annotation.name] = str(error)
            continue
        if transform is not None:
            image, annotation = transform(image, annotation, np.random.default_rng(0))
        picture = open_picture(image)
        windows = windows_for(model, picture, tile)
        found, _ = predict(model, task, picture, windows, scales=scales, flip=flip)
        yield annotation, image, found
