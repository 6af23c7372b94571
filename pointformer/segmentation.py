"""From a picture to objects: the dense three-class model and what is read off its map."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pointformer.data.images import read_image

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
        labels: (H, W) int32, 0 is background, 1..N the objects.
        tokens: number of tokens in each stage of the backbone.
        seconds: time for the network and for reading the objects off its map.
    """

    image: np.ndarray
    labels: np.ndarray
    tokens: tuple[int, ...]
    seconds: float

    @property
    def count(self) -> int:
        return int(self.labels.max(initial=0))

    def objects(self) -> list[ObjectMeasure]:
        """Area, centroid and box of every object, by id."""
        from skimage.measure import regionprops

        return [
            ObjectMeasure(
                int(region.label),
                int(region.area),
                (float(region.centroid[1]), float(region.centroid[0])),
                (region.bbox[1], region.bbox[0], region.bbox[3], region.bbox[2]),
            )
            for region in regionprops(self.labels)
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
    model: Model, image: str | os.PathLike[str] | np.ndarray | torch.Tensor
) -> Segmentation:
    """Find the objects in one picture.

    Args:
        model: a model with the head "dense" and three classes (background, inside, border), such
            as `create_model("aff_nano", pretrained="nuclei")`.
        image: a file, a uint8 array (H, W) or (H, W, 3), or a uint8 tensor (3, H, W).

    Raises:
        ValueError, TypeError: the image is unreadable or no picture, or the model has another head.
    """
    from pointformer.instances import instances_from_logits

    if model.head_name != "dense" or model.num_classes != 3:
        raise ValueError(
            f"model: expected a dense head with 3 classes, got {model.name} with head "
            f"{model.head_name!r} and {model.num_classes} classes"
        )
    pixels = as_rgb(image)
    start = time.perf_counter()
    device = next(model.parameters()).device
    with torch.inference_mode():
        batch = model.preprocess(to_tensor(pixels).to(device))[None]
        stages = model.backbone(batch)
        logits = model.head(stages, batch, model.backbone.impl)[0]
    labels = instances_from_logits(logits.float().cpu().numpy())
    seconds = time.perf_counter() - start
    return Segmentation(pixels, labels, tuple(s.tokens.num_tokens for s in stages), seconds)
