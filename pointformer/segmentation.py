"""From a picture to objects, or to regions: by the dense three-class model, or by a mask model."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pointformer.data.annotations import Category
from pointformer.data.images import read_image
from pointformer.tiling import stitch, windows_of

if TYPE_CHECKING:
    from pointformer.models import Model


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
        image: (H, W, 3) uint8, what was segmented.
        labels: (H, W) int32, 0 is background, 1..N the objects (or regions of one class).
        tokens: number of tokens in each stage of the backbone, summed over tiles.
        seconds: time for the network and for reading the objects off its map.
    """

    image: np.ndarray
    labels: np.ndarray
    tokens: tuple[int, ...]
    seconds: float
    classes: tuple[int, ...] = ()
    """The class of each object, by id - 1."""
    scores: tuple[float, ...] = ()
    """The confidence of each object, by id - 1; 1 where the model has none."""
    categories: tuple[Category, ...] | None = None
    """Names and colors of the classes, if the model has them."""

    @property
    def count(self) -> int:
        return int(self.labels.max(initial=0))

    def class_name(self, id: int) -> str:
        """Name of an object's class, or its number where the model has no names."""
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


def as_rgb(image: str | os.PathLike[str] | np.ndarray | torch.Tensor) -> np.ndarray:
    """(H, W, 3) uint8 from a file, a uint8 array (H, W[, 3]) or a uint8 tensor (3, H, W).

    Raises:
        ValueError, TypeError: the file is unreadable, or the array is no such picture.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image: expected a file, an array or a tensor, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"image: expected uint8 values, got {image.dtype}")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image: expected shape (H, W) or (H, W, 3), got {image.shape}")
    return np.ascontiguousarray(image)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 array to a (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, 2, 0)))


def segment(
    model: Model,
    image: str | os.PathLike[str] | np.ndarray | torch.Tensor,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    min_score: float | None = None,
) -> Segmentation:
    """Find the objects, or the regions, in one picture.

    Args:
        model: with the head "dense" and three classes (background, inside, border), such as
            `create_model("aff_nano", pretrained="nuclei")`, with the head "dense" and the task
            "semantic", or with a mask head and a task.
        image: a file, a uint8 array (H, W) or (H, W, 3), or a uint8 tensor (3, H, W).
        tile: side of the largest window in pixels, for pictures larger than memory; objects are
            joined across windows. `None`: the whole picture at once.
        overlap: of the windows, in pixels: at least the size of an object. `None`: 64, or half a
            window if that is less.
        min_score: confidence that mask models' objects (default 0.5) and panoptic segments (default
            0.8, as published) need.

    Raises:
        ValueError, TypeError: the image is unreadable or no picture, or the model has another head.
    """
    if model.task is None and not _finds_nuclei(model):
        raise ValueError(
            f"model: expected a dense head with 3 classes, or a mask head and a task, got "
            f"{model.name} with head {model.head_name!r} and {model.num_classes} classes"
        )
    pixels = as_rgb(image)
    start = time.perf_counter()
    height, width = pixels.shape[:2]
    windows = windows_of(height, width, tile, overlap)
    batch = to_tensor(pixels)
    found = [_segment_window(model, batch[:, *window.window], min_score) for window in windows]
    labels, classes, scores, tokens = found[0]
    if len(windows) > 1:
        parts = [(w, ids, kinds) for w, (ids, kinds, _, _) in zip(windows, found, strict=True)]
        labels, sources = stitch((height, width), parts, uncountable=_uncountable(model))
        classes = [parts[joined[0][0]][2][joined[0][1] - 1] for joined in sources]
        scores = [max(found[part][2][item - 1] for part, item in joined) for joined in sources]
        tokens = [sum(counts) for counts in zip(*(part[3] for part in found), strict=True)]
    seconds = time.perf_counter() - start
    return Segmentation(
        pixels, labels, tuple(tokens), seconds, tuple(classes), tuple(scores), model.categories
    )


def _finds_nuclei(model: Model) -> bool:
    """Whether instances are read off a map of background, inside and border."""
    return model.head_name == "dense" and model.num_classes == 3 and model.task != "semantic"


def _uncountable(model: Model) -> list[int]:
    """Classes whose pixels are one region of a picture."""
    from pointformer.models.inference import things_of

    if model.task == "semantic":
        return list(range(model.num_classes))
    things = things_of(model) if model.task == "panoptic" else range(model.num_classes)
    return sorted(set(range(model.num_classes)) - set(things))


def _segment_window(
    model: Model, image: torch.Tensor, min_score: float | None
) -> tuple[np.ndarray, list[int], list[float], list[int]]:
    """Ids (H, W) of a uint8 image (3, H, W), class and score of each, and tokens per stage."""
    from pointformer.instances import instances_from_logits
    from pointformer.models.inference import predict
    from pointformer.models.postprocess import Instances, Panoptic

    device = next(model.parameters()).device
    counts: list[int] = []

    def count(module: torch.nn.Module, inputs: object, stages: list) -> None:
        counts.extend(stage.tokens.num_tokens for stage in stages)

    hook = model.backbone.register_forward_hook(count)
    try:
        with torch.inference_mode():
            pixels = model.preprocess(image.to(device))
            if _finds_nuclei(model):
                logits = model(pixels[None])[0]
                labels = instances_from_logits(logits.float().cpu().numpy())
                objects = int(labels.max(initial=0))
                return labels, [0] * objects, [1.0] * objects, counts
            if model.task == "instance" and min_score is None:
                min_score = 0.5
            result = predict(model, pixels, min_score=min_score)
    finally:
        hook.remove()
    if isinstance(result, Instances):
        result = result.painted()
    if isinstance(result, Panoptic):
        kinds = [segment.category for segment in result.segments]
        scores = [segment.score for segment in result.segments]
        return result.ids.cpu().numpy(), kinds, scores, counts
    classes, labels = np.unique(result.cpu().numpy(), return_inverse=True)
    labels = (labels.reshape(result.shape) + 1).astype(np.int32)
    return labels, classes.tolist(), [1.0] * len(classes), counts
