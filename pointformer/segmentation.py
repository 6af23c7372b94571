"""From a picture to objects, or to regions: by the dense three-class model, or by a mask model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch

from pointformer._checks import check_count, check_number, describe
from pointformer.annotations import Category, Objects, Segment, SegmentMap
from pointformer.data.images import Picture, Reading, open_picture
from pointformer.tiling import Tile, stitch, stitch_objects, windows_of

if TYPE_CHECKING:
    from pointformer.data.images import PictureSource
    from pointformer.models import Model


_BYTES_PER_PIXEL = 300  # at the least: 430 were measured with the smallest model, on 2048 x 2048


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

    @cached_property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8, all of the picture."""
        return self.picture.read()

    @property
    def count(self) -> int:
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


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 array to a (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, 2, 0)))


def segment(
    model: Model,
    image: PictureSource,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    min_score: float | None = None,
    scale: float | None = None,
    diameter: float | None = None,
    **reading: Unpack[Reading],
) -> Segmentation:
    """Find the objects, or the regions, in one picture.

    Args:
        model: with the head "dense" and three classes (background, inside, border), such as
            `create_model("aff_nano.nuclei")`, with the head "dense" and the task
            "semantic", or with a mask head and a task.
        image: a file, an array, a tensor or a picture of Pillow, see `open_picture`.
        tile: side of the largest window, in pixels of what the network sees, for pictures larger
            than memory; objects are joined across windows. `None`: the whole picture at once.
        overlap: of the windows, in pixels: at least the size of an object. `None`: 64, or half a
            window if that is less.
        min_score: confidence that mask models' objects (default 0.5) and panoptic segments (default
            0.8, as published) need.
        scale: the network sees the picture with sides `scale` times as long; ids are those of the
            picture's own pixels again. Objects that are much larger or smaller than those of the
            training are missed without it. `None`: 1.
        diameter: typical diameter of the objects in pixels, in the place of `scale`, for models
            that know what they were trained on (`model.object_diameter`).
        reading: how the picture is read: channel, plane, projection, intensities; see `Reading`.

    Raises:
        ValueError, TypeError: the image is unreadable or no picture, it needs a choice or more
            memory than there is, or the model has another head.
    """
    from pointformer.models.model import Model

    if not isinstance(model, Model):
        raise TypeError(f"model: expected one of create_model(), got {describe(model)}")
    if min_score is not None:
        check_number("min_score", min_score, least=0, most=1)
    factor = _scale(model, scale, diameter)
    picture = open_picture(image, **reading)
    seen = picture.scaled(factor)
    windows = windows_of(*seen.shape, tile, overlap)
    _check_memory(model, picture.name, windows[0])
    if tile is None:
        picture = open_picture(picture.read())
        seen = picture.scaled(factor)
    start = time.perf_counter()
    found, tokens = look(model, seen, windows, min_score=min_score)
    if isinstance(found, Objects):
        found = found.confident(0.5 if min_score is None else min_score).painted()
    labels = found.ids
    classes = [segment.category for segment in found.segments]
    scores = [segment.score for segment in found.segments]
    if seen.shape != picture.shape:
        labels, kept = _resized(labels, picture.shape)
        classes, scores = [classes[n - 1] for n in kept], [scores[n - 1] for n in kept]
    seconds = time.perf_counter() - start
    return Segmentation(
        picture, labels, tokens, seconds, tuple(classes), tuple(scores), model.categories
    )


def look(
    model: Model, picture: Picture, windows: Sequence[Tile], *, min_score: float | None = None
) -> tuple[Objects | SegmentMap, tuple[int, ...]]:
    """What a model finds in a picture, window by window, before anything is cut or painted over.

    Args:
        model: see `segment`.
        picture: as large as the network is to see it.
        windows: see `windows_of`.
        min_score: of panoptic segments, see `segment`; objects of mask models keep every score.

    Returns:
        `Objects` of mask models for the task "instance", else a `SegmentMap`; and the tokens in
        each stage of the backbone, summed over windows. Both joined across windows.

    Raises:
        ValueError: the model has no task and its head does not find instances.
    """
    from pointformer.models.inference import evaluating

    if model.task is None and not model.finds_instances:
        raise ValueError(
            f"model: expected a dense head with 3 classes, or a mask head and a task, got "
            f"{model.name} with head {model.head_name!r} and {model.num_classes} classes"
        )
    found, counts = [], []

    def count(module: torch.nn.Module, inputs: object, stages: list) -> None:
        counts.append([stage.tokens.num_tokens for stage in stages])

    hook = model.backbone.register_forward_hook(count)
    try:
        with evaluating(model):
            for window in windows:
                found.append(_look_at(model, to_tensor(picture[window.window]), min_score))
    finally:
        hook.remove()
    tokens = tuple(sum(stage) for stage in zip(*counts, strict=True))
    if len(windows) == 1:
        return found[0], tokens
    parts = list(zip(windows, found, strict=True))
    if isinstance(found[0], Objects):
        return stitch_objects(picture.shape, parts), tokens
    maps = [(w, part.ids, [s.category for s in part.segments]) for w, part in parts]
    ids, sources = stitch(picture.shape, maps, uncountable=_uncountable(model))
    scores = (max(found[part].segments[item - 1].score for part, item in own) for own in sources)
    kinds = (maps[own[0][0]][2][own[0][1] - 1] for own in sources)
    return segment_map(ids, kinds, scores), tokens


def segment_map(ids: np.ndarray, classes: Iterable[int], scores: Iterable[float]) -> SegmentMap:
    """A map from ids (H, W) int32, 0 and 1 to N, with the class and the score of each id."""
    areas = np.bincount(ids.ravel())[1:].tolist()
    rows = zip(areas, classes, scores, strict=True)
    return SegmentMap(
        ids, tuple(Segment(n, kind, area, score=s) for n, (area, kind, s) in enumerate(rows, 1))
    )


def _check_memory(model: Model, name: str, window: Tile) -> None:
    """Refuse what the machine cannot hold: systems end a program that takes more, unasked."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not on_cpu or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return
    height, width = window.bottom - window.top, window.right - window.left
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if height * width * _BYTES_PER_PIXEL > memory:
        raise ValueError(
            f"{name}: {height} x {width} pixels at once need more than "
            f"{height * width * _BYTES_PER_PIXEL / 2**30:.0f} GiB, the machine has "
            f"{memory / 2**30:.0f}; use a tile (--tile), or a smaller one"
        )


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


def _uncountable(model: Model) -> list[int]:
    """Classes whose pixels are one region of a picture."""
    from pointformer.models.inference import things_of

    if model.task == "semantic":
        return list(range(model.num_classes))
    things = things_of(model) if model.task == "panoptic" else range(model.num_classes)
    return sorted(set(range(model.num_classes)) - set(things))


def _look_at(model: Model, image: torch.Tensor, min_score: float | None) -> Objects | SegmentMap:
    """What a model finds in a uint8 image (3, H, W)."""
    from pointformer.instances import instances_from_logits
    from pointformer.models.inference import predict

    pixels = model.preprocess(image.to(next(model.parameters()).device))
    if model.finds_instances:
        ids = instances_from_logits(model(pixels[None])[0].float().cpu().numpy())
        objects = int(ids.max(initial=0))
        return segment_map(ids, [0] * objects, [1.0] * objects)
    result = predict(model, pixels, min_score=min_score if model.task == "panoptic" else None)
    if not isinstance(result, torch.Tensor):
        return result
    classes, ids = np.unique(result.cpu().numpy(), return_inverse=True)
    ids = (ids.reshape(result.shape) + 1).astype(np.int32)
    return segment_map(ids, classes.tolist(), [1.0] * len(classes))
