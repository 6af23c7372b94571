"""Scores of a model on an annotated data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

import pointformer
from pointformer import TokenSet
from pointformer.data.annotations import SKIP_HINT, Annotation, Dataset
from pointformer.data.images import MAX_PIXELS, Reading, open_picture
from pointformer.data.point_sets import read_sample
from pointformer.data.statistics import samples_in_words
from pointformer.data.transforms import CenterCrop, Resize
from pointformer.metrics import Metric
from pointformer.models import Model
from pointformer.models.state import weights_digest
from pointformer.prediction import (
    check_copies,
    predict,
    predict_points,
    predict_sets,
    reading_of,
    windows_for,
)
from pointformer.processes import Processes
from pointformer.scored_parts import PartsFolder, ScoredPart, joined
from pointformer.tasks import MapTask, Task, task_of

_SETS_AT_ONCE, _POINTS_AT_ONCE = 32, 2**15  # of whole point sets


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
    metrics: Callable[[], Sequence[Metric]] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: int | None = None,
    resize: Resize | None = None,
    crop: CenterCrop | None = None,
    region: int | None = None,
    processes: Processes | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
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
            "panoptic" (PQ, for things and stuff); "point_classification" and "point_segmentation"
            have the scores of the first two.
        metrics: makes those that take the place of the task's `metrics`; parts of the data set are
            scored by metrics of their own, which are merged in its order.
        scales, flip: see `predict`; not for objects and segments, because the queries of different
            copies do not correspond.
        tile: side of the windows in pixels; see `segment`.
        resize: the model sees pictures in this size, as published: `Resize(512, longest=2048)` of
            `pointformer.data.transforms`. What it finds is scored in the picture's own pixels.
        crop: for classes of pictures, the model sees but the middle, after `resize`:
            `CenterCrop(224)`.
        region: of scenes of points, see `predict_points`.
        processes: that share the pictures; the scores of all, and what was skipped, are then known
            to all of them.
        resume: folder that keeps what is scored, from which another call goes on, also with another
            number of processes: all see it. A new one, or one of the same model, pictures and
            options; half a minute of work may be lost. Pictures whose files have changed are scored
            again, with those that were kept together with them.
        progress: goes through the numbers of the pictures that are to be scored by this process,
            for example with a bar (`tqdm`).
        reading: how the pictures are read, see `pointformer.data.images.Reading`; what is not given
            is as in the model's training.

    Raises:
        ValueError: an option does not fit the task, the model is made for another, model and data
            set have different classes, there is no picture, one has another size than its
            annotation, or the folder is of something else; the message names it.
        OSError: the folder cannot be written.
    """
    if not isinstance(task, Task):
        task = task_of(model, task, dataset.categories)
    check_copies(task, scales, flip)
    _check_seen(model, task, region, tile=tile, resize=resize, crop=crop, **reading)
    if crop is not None and isinstance(task, MapTask):
        raise ValueError(
            f"crop: for classes of pictures, not for {task.name!r}, which is scored on all of a "
            "picture"
        )
    make = task.metrics if metrics is None else metrics
    processes = processes or Processes()
    options: dict[str, Any] = {
        "scales": scales,
        "flip": flip,
        "tile": tile,
        "resize": resize,
        "crop": crop,
        "region": region,
        **reading,
    }
    folder = None
    if resume is not None:
        folder = PartsFolder(Path(resume), make, [repr(entry.state) for entry in dataset.entries])

    def known() -> list[ScoredPart]:
        if folder is None or not processes.main:
            return []
        return folder.open(_made_with(model, task, dataset, make(), options))

    before = processes.alike(known)
    done = processes.gathered([(part.start, part.stop) for part in before])[0]
    missing = set(range(len(dataset))).difference(*(range(*ends) for ends in done))
    own = processes.own(sorted(missing))

    def score() -> list[ScoredPart]:
        parts: list[ScoredPart] = []
        known = dict(dataset.skipped)

        def finish(part: ScoredPart) -> None:
            part.skipped = {n: why for n, why in dataset.skipped.items() if n not in known}
            known.update(part.skipped)
            if folder is not None:
                folder.save(part)
            parts[:] = joined([*parts, part])

        part: ScoredPart | None = None
        for run in _runs(progress(own), _SETS_AT_ONCE if task.counts == "sets" else 1):
            if part is not None and (run[0] != part.stop or (folder is not None and folder.due)):
                finish(part)
                part = None
            if part is None:
                part = ScoredPart(list(make()), run[0], run[0])
            for annotation, _, prediction in predictions(model, task, dataset, run, **options):
                truth = task.truth(annotation)
                for metric in part.metrics:
                    metric.update(prediction, truth)
                part.pictures += 1
            part.stop = run[-1] + 1
        if part is not None:
            finish(part)
        return parts

    found = processes.gathered([*before, *processes.apart(score)])
    first, *others = joined(part for parts in found for part in parts) or [
        ScoredPart(list(make()), 0, 0)
    ]
    for part in others:
        first.merge(part)
    dataset.skipped.update(first.skipped)
    if first.pictures == 0:
        many = samples_in_words(0, task.counts)
        raise ValueError(f"{many} to score ({len(dataset.skipped)} skipped)")
    scores = {name: value for metric in first.metrics for name, value in metric.compute().items()}
    return Evaluation(scores, first.pictures, tuple(first.metrics))


def _check_seen(model: Model, task: Task, region: int | None, **of_pictures: object) -> None:
    """Raise `ValueError` where an option is for what the model does not take."""
    if region is not None and task.counts != "points":
        raise ValueError(f"region: is for scenes of points, not for the task {task.name!r}")
    unsaid = {"intensities": "percentiles", "max_pixels": MAX_PIXELS}
    for name, value in of_pictures.items():
        if model.of_points and value not in (None, unsaid.get(name)):
            raise ValueError(f"{name}: is for models of pictures; {model.name} takes points")


def _made_with(
    model: Model, task: Task, dataset: Dataset, metrics: Sequence[Metric], options: dict[str, Any]
) -> dict[str, Any]:
    """All that scores depend on, in JSON: SHA-256 of what is large."""
    kind = (model.name, model.config, model.head_name, model.head_options, model.num_classes)
    made = repr((*kind, model.preprocess, weights_digest(model)))
    pictures = hashlib.sha256(repr((os.path.abspath(dataset.source), dataset.categories)).encode())
    for entry in dataset.entries:
        pictures.update(repr((entry.name, entry.label, [file for file, _ in entry.state])).encode())
    return {
        "version": pointformer.__version__,
        "model": hashlib.sha256(made.encode()).hexdigest(),
        "data set": pictures.hexdigest(),
        "task": task.name,
        "shown from": task.min_score,
        "metrics": [type(metric).__name__ for metric in metrics],
        **{name: repr(value) for name, value in options.items()},
    }


def _runs(numbers: Iterable[int], most: int) -> Iterator[list[int]]:
    """Consecutive numbers together, at most so many."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run
            run = []
        run.append(number)
        if len(run) == most:
            yield run
            run = []
    if run:
        yield run


def predictions(
    model: Model,
    task: Task,
    dataset: Dataset,
    indices: Iterable[int],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: int | None = None,
    resize: Resize | None = None,
    crop: CenterCrop | None = None,
    region: int | None = None,
    **reading: Unpack[Reading],
) -> Iterator[tuple[Annotation, Any, Any]]:
    """Annotations of a data set, their pictures (H, W, 3) uint8 or points, and what the model finds
    there.

    Args:
        indices: which pictures; the other arguments, and errors, are those of `evaluate`.
    """
    reading = reading_of(model, reading)
    sets: list[tuple[Annotation, TokenSet]] = []  # to be seen at once

    def seen_sets() -> Iterator[tuple[Annotation, Any, Any]]:
        found = predict_sets(model, task, [points for _, points in sets])
        for (annotation, points), prediction in zip(sets, found, strict=True):
            yield annotation, points, prediction
        sets.clear()

    for index in indices:
        try:
            annotation = dataset[index]
        except ValueError as error:
            if not dataset.skip_bad:
                hint = "" if str(error).endswith(SKIP_HINT) else f"; {SKIP_HINT}"
                raise ValueError(f"{error}{hint}") from error
            dataset.skipped[dataset.entries[index].name] = str(error)
            continue
        try:
            image = read_sample(annotation, reading)
        except ValueError as error:
            if not dataset.skip_bad:
                raise
            dataset.skipped[dataset.entries[index].name] = str(error)
            continue
        if isinstance(image, TokenSet):
            if task.counts != "sets":
                yield annotation, image, predict_points(model, task, image, region)
                continue
            if sets and sum(p.num_tokens for _, p in sets) + image.num_tokens > _POINTS_AT_ONCE:
                yield from seen_sets()
            sets.append((annotation, image))
            continue
        seen = image
        if crop is not None:  # of what is resized
            for change in (resize, crop):
                if change is not None:
                    seen, _ = change(seen, annotation, np.random.default_rng(0))
        picture, size = open_picture(seen), resize if crop is None else None
        windows = windows_for(model, picture, tile, resize=size)
        found, _ = predict(model, task, picture, windows, scales=scales, flip=flip, resize=size)
        yield annotation, image, found
    if sets:
        yield from seen_sets()
