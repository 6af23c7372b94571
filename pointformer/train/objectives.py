"""What heads learn from instance maps, and how instances are read off them, by kind of head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pointformer.instances import instance_target, instances_from_logits
from pointformer.models import Model
from pointformer.models.losses import Targets, segmentation_loss
from pointformer.models.mask2former import MaskPredictions
from pointformer.segmentation import segment


class Objective(Protocol):
    """The two ends of training: a batch's loss, and the instances in a picture."""

    def loss(self, output, instances: Sequence[np.ndarray]) -> Tensor:
        """Loss of a model's output for B maps (H, W) of ids, 0 being background."""

    def labels(self, model: Model, image: np.ndarray) -> np.ndarray:
        """Ids (H, W) int32 that a model in eval mode finds in a picture (H, W, 3) uint8."""


class DenseObjective:
    """Background, inside and border of every pixel; see `instance_target`.

    Args:
        inside_weight, border_weight: of the classes in the cross-entropy; background has 1.
    """

    def __init__(self, inside_weight: float, border_weight: float) -> None:
        self.class_weights = torch.tensor([1.0, inside_weight, border_weight])

    def loss(self, output: Tensor, instances: Sequence[np.ndarray]) -> Tensor:
        target = torch.from_numpy(np.stack([instance_target(ids) for ids in instances])).long()
        device = output.device
        return dense_loss(output, target.to(device), self.class_weights.to(device))

    def labels(self, model: Model, image: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(image).movedim(-1, 0)[None].contiguous()
        logits = model(model.preprocess(pixels.to(next(model.parameters()).device)))[0]
        return instances_from_logits(logits.cpu().numpy())


class MaskObjective:
    """Queries matched to instances, which are objects of one class.

    Args:
        points: at which masks are compared.
        window: side of the windows that a picture is looked at in, in pixels: that of the crops,
            because queries know their place in the window and how many objects it can have.
    """

    def __init__(self, points: int, window: int) -> None:
        self.points = points
        self.window = window

    def loss(self, output: MaskPredictions, instances: Sequence[np.ndarray]) -> Tensor:
        device = output.mask_logits.device
        targets = [
            replace(t, classes=t.classes.to(device), masks=t.masks.to(device))
            for t in map(instance_masks, instances)
        ]
        terms = segmentation_loss(output, targets, points=self.points)
        return torch.stack(list(terms.values())).sum()

    def labels(self, model: Model, image: np.ndarray) -> np.ndarray:
        return segment(model, image, tile=self.window).labels


def dense_loss(logits: Tensor, target: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted cross-entropy plus one minus the soft Dice score of each foreground class.

    Args:
        logits: (B, classes, H, W) float.
        target: (B, H, W) int64; class 0 is background.
        class_weights: (classes,) float.
    """
    cross_entropy = F.cross_entropy(logits, target, class_weights)
    probability = logits.softmax(1)[:, 1:]
    truth = F.one_hot(target, logits.shape[1])[..., 1:].movedim(-1, 1).to(probability.dtype)
    overlap = (probability * truth).sum((0, 2, 3))
    total = (probability + truth).sum((0, 2, 3))
    # The constant keeps a class that is absent from the batch from dominating.
    dice = (2 * overlap + 100) / (total + 100)
    return cross_entropy + (1 - dice).mean()


def instance_masks(instances: np.ndarray, stride: int = 2) -> Targets:
    """The instances of a map (H, W) as objects of class 0.

    Their masks hold shares of cells of `stride` x `stride` pixels: finer than those of the heads,
    in a quarter of the memory of the pixels'.
    """
    numbers = np.unique(instances)
    ids = torch.from_numpy(numbers[numbers != 0].astype(np.int64))
    pixels = torch.from_numpy(np.ascontiguousarray(instances).astype(np.int64))
    height, width = instances.shape
    pixels = F.pad(pixels, (0, -width % stride, 0, -height % stride))  # by the background
    masks = pixels.eq(ids[:, None, None]).float()
    if len(ids):
        masks = F.avg_pool2d(masks[:, None], stride)[:, 0]
    return Targets(torch.zeros(len(ids), dtype=torch.int64), masks, stride)
