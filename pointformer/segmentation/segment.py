"""From a picture to objects, or to regions."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Unpack

import numpy as np

from pointformer._checks import check_count, check_number
from pointformer.annotations import Category
from pointformer.data.images import Picture, Reading, open_picture
from pointformer.models import Model
from pointformer.prediction import predict, reading_of, windows_for
from pointformer.rates import TimeBudget, check_budget
from pointformer.segmentation.tiling import windows_of
from pointformer.tasks import MapTask, task_of

if TYPE_CHECKING:
    from pointformer.data.images import PictureSource


@dataclass(frozen=True)
class ObjectMeasure:
    """One object: id in the label map, area in pixels, centroid (x, y), box (left, top, right,
    bottom; right and bottom exclusive), all in pixels of the image."""

    id: int
    area: int
    centroid: tuple[float, float]
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Segmentation:
    """Result of `segment`.

    Attributes:
        picture: what was segmented; with tiles, a large TIFF file is read window by window.
        labels: (H, W) int32, 0 is background, 1..N the objects (or regions of one class).
        tokens: number of tokens in each stage of the backbone, summed over tiles.
        seconds: time for the network and for reading the objects off its map.
    """

    picture: Picture
    labels: np.ndarray
    tokens: tuple[int, ...]
    seconds: float
    classes: tuple[int, ...] = ()
    """The class of each object, by id - 1."""
    scores: tuple[float, ...] = ()
    """The confidence of each object, by id - 1; 1 where the model has none."""
    categories: tuple[Category, ...] | None = None
    """Names and colors of the classes, if the model has them."""
    rates: tuple[float, ...] = ()
    """Shares of the tokens that the model's merges kept, if it chooses them."""

    @cached_property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8, all of the picture."""
        return self.picture.read()

    @property
    def num_objects(self) -> int:
        return int(self.labels.max(initial=0))

    def class_name(self, id: int) -> str:
        """Name of an object's class, or its number where the model has no names."""
        check_count("id", id, most=len(self.classes))
        number = self.classes[id - 1]
        return str(number) if self.categories is None else self.categories[number].name

    def objects(self) -> list[ObjectMeasure]:
        """Area, centroid and box of every object, by id."""
        from scipy.ndimage import find_objects

        ids = self.labels.ravel()
        rows, columns = np.divmod(np.arange(ids.size), max(1, self.labels.shape[1]))
        areas = np.bincount(ids)
        sums = np.bincount(ids, columns), np.bincount(ids, rows)
        return [
            ObjectMeasure(
                id,
                int(areas[id]),
                (float(sums[0][id] / areas[id]), float(sums[1][id] / areas[id])),
                (box[1].start, box[0].start, box[1].stop, box[0].stop),
            )
            for id, box in enumerate(find_objects(self.labels), 1)
            if box is not None
        ]


def segment(
    model: Model,
    image: PictureSource,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    min_score: float | None = None,
    scale: float | None = None,
    diameter: float | None = None,
    budget: TimeBudget | None = None,
    **reading: Unpack[Reading],
) -> Segmentation:
    """Find the objects, or the regions, in one picture.

    Args:
        model: for semantic, instance or panoptic segmentation, such as
            `create_model("aff_nano.nuclei")`.
        image: a file, an array, a tensor or a picture of Pillow, see `open_picture`.
        tile: side of the largest window, in pixels of what the network sees, for pictures larger
            than memory; objects are joined across windows. `None`: the whole picture at once.
        overlap: of the windows, in pixels: at least the size of an object. `None`: 64, or half a
            window if that is less.
        min_score: confidence that objects (default: the model's own, or 0.5) and panoptic segments
            (default 0.8, as published) need.
        scale: the network sees the picture with sides `scale` times as long; ids are those of the
            picture's own pixels again. Objects that are much larger or smaller than those of the
            training are missed without it. `None`: 1.
        diameter: typical diameter of the objects in pixels, in the place of `scale`, for models
            that know what they were trained on (`model.object_diameter`).
        budget: of this model: it is run at the largest rate at which `Segmentation.seconds` are no
            more than those of the budget. The first picture of a size takes several times as long.
        reading: how the picture is read: channel, plane, projection, intensities; see `Reading`.
            What is not given of a file is as in the model's training.

    Raises:
        ValueError, TypeError: the image is unreadable or no picture, it needs a choice, more
            memory than there is or more time than the budget, or the model is made for another
            task.
    """
    task, factor = check_options(
        model, tile=tile, overlap=overlap, min_score=min_score, scale=scale, diameter=diameter
    )
    check_budget(budget, model)
    if isinstance(image, str | os.PathLike):
        reading = reading_of(model, reading)
    picture = open_picture(image, **reading)
    seen = picture.scaled(factor)
    windows = windows_for(model, seen, tile, overlap)
    if tile is None:
        picture = picture.loaded()
        seen = picture.scaled(factor)

    def look() -> Segmentation:
        start = time.perf_counter()
        prediction, tokens = predict(model, task, seen, windows, min_score=min_score)
        found = task.shown(prediction, min_score)
        labels = found.ids
        classes = [segment.category for segment in found.segments]
        scores = [segment.score for segment in found.segments]
        if seen.shape != picture.shape:
            labels, kept = _resized(labels, picture.shape)
            classes, scores = [classes[n - 1] for n in kept], [scores[n - 1] for n in kept]
        seconds = time.perf_counter() - start
        return Segmentation(
            picture,
            labels,
            tokens,
            seconds,
            tuple(classes),
            tuple(scores),
            model.categories,
            getattr(model.config, "rates", ()),
        )

    if budget is None:
        return look()
    return budget.run(sum(math.prod(window.size) for window in windows), look)


def check_options(
    model: Model,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    min_score: float | None = None,
    scale: float | None = None,
    diameter: float | None = None,
) -> tuple[MapTask, float]:
    """Check what `segment` is given, but for the picture.

    Returns:
        The model's task, and the side of what the network sees over that of the picture.

    Raises:
        ValueError, TypeError: naming the argument that cannot be.
    """
    task = task_of(model)
    if not isinstance(task, MapTask):
        raise ValueError(
            f"model: {model.name} is made for {task.name!r} and finds no regions; use one for "
            "semantic, instance or panoptic segmentation"
        )
    if overlap is not None:
        check_count("overlap", overlap, least=0)
    windows_of(1, 1, tile, overlap)
    if min_score is not None:
        check_number("min_score", min_score, least=0, most=1)
    return task, _scale(model, scale, diameter)


def _scale(model: Model, scale: float | None, diameter: float | None) -> float:
    """Side of what the network sees over that of the picture."""
    for name, value in (("scale", scale), ("diameter", diameter)):
        if value is not None:
            check_number(name, value, above=0)
    if diameter is None:
        return 1.0 if scale is None else scale
    if scale is not None:
        raise ValueError("scale, diameter: only one of them can be given")
    if model.object_diameter is None:
        raise ValueError(
            f"diameter: {model.name} does not know the size of the objects that it was trained on; "
            "use scale"
        )
    return model.object_diameter / diameter


def _resized(labels: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """Ids (H, W) of the nearest pixels, numbered anew, and which ids have a pixel left."""
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * (own / n)).astype(np.int64), own - 1)
        for n, own in zip(shape, labels.shape, strict=True)
    )
    labels = labels[rows[:, None], columns]
    kept = np.unique(labels[labels > 0])
    number = np.zeros(kept.max(initial=0) + 1, np.int32)
    number[kept] = np.arange(1, len(kept) + 1)
    return number[labels], kept.tolist()
