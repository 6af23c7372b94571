"""The loss that all tasks of mask heads share: objects matched to queries (Mask2Former)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pointformer.annotations import Category, Objects
from pointformer.models import Output
from pointformer.models.losses import LossWeights, Targets, segmentation_loss
from pointformer.models.mask2former import MaskPredictions
from pointformer.nn.parallel import WHOLE, BatchPart
from pointformer.tasks.task import Task, Truth


def targets_of(objects: Objects, stride: int) -> Targets:
    """Objects of a picture as the target of queries.

    Their masks hold shares of cells of `stride` x `stride` pixels: where these are finer than the
    head's cells little is lost, in a fraction of the memory of the pixels'.
    """
    height, width = (-(-side // stride) for side in objects.size)
    masks = np.zeros((len(objects), height, width), np.float32)
    for mask, cells in zip(objects.masks, masks, strict=True):
        before = mask.top % stride, mask.left % stride
        after = (-(start + n) % stride for start, n in zip(before, mask.pixels.shape, strict=True))
        pixels = np.pad(mask.pixels, list(zip(before, after, strict=True)))
        rows, columns = (side // stride for side in pixels.shape)
        shares = pixels.reshape(rows, stride, columns, stride).mean((1, 3), dtype=np.float32)
        top, left = mask.top // stride, mask.left // stride
        cells[top : top + rows, left : left + columns] = shares
    return Targets(torch.from_numpy(objects.classes), torch.from_numpy(masks), stride)


class MaskTask(Task):
    """Learns a query for each object, or for each class that is annotated.

    Args:
        weights, points: see `segmentation_loss`; the weights also by their names, others as they
            are.
        stride: see `targets_of`.
    """

    output = Output.MASKS

    def __init__(
        self,
        categories: Sequence[Category],
        weights: LossWeights | Mapping[str, float] | None = None,
        points: int = 12544,
        stride: int = 2,
    ) -> None:
        super().__init__(categories)
        self.weights = LossWeights(**weights) if isinstance(weights, Mapping) else weights
        self.points = points
        self.stride = stride

    def loss(
        self, output: MaskPredictions, annotations: Sequence[Truth], part: BatchPart = WHOLE
    ) -> dict[str, Tensor]:
        device = output.mask_logits.device
        targets = []
        for annotation in annotations:
            found = targets_of(self.truth(annotation).objects(), self.stride)
            classes, masks = found.classes.to(device), found.masks.to(device)
            targets.append(Targets(classes, masks, self.stride))
        return segmentation_loss(
            output, targets, weights=self.weights, points=self.points, part=part
        )
