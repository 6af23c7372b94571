"""Semantic segmentation: the class of each pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pointformer._checks import brief, check_number
from pointformer.annotations import VOID, Category, SegmentMap
from pointformer.metrics import Metric, SemanticIoU
from pointformer.models import Output
from pointformer.models.mask2former import MaskPredictions
from pointformer.models.postprocess import semantic_scores
from pointformer.nn.parallel import WHOLE, BatchPart
from pointformer.segmentation.tiling import Tile, blend
from pointformer.tasks.masks import MaskTask
from pointformer.tasks.task import MapTask, Size, Truth, on_device


class Semantic(MapTask):
    """The class of each pixel. Predictions are scores (K, h, w) in windows, classes (H, W) int32 of
    the picture."""

    name, counts, averages = "semantic", "pixels", True

    def average(self, copies: Sequence[tuple[Tensor, bool]]) -> Tensor:
        return torch.stack(
            [scores.flip(2) if mirrored else scores for scores, mirrored in copies]
        ).mean(0)

    def join(self, shape: Size, windows: Sequence[Tile], parts: Iterable[Tensor]) -> np.ndarray:
        """The classes with the highest scores, which are blended where windows overlap."""
        classes = np.empty(shape, np.int32)
        for place, scores in blend(windows, parts):
            classes[place] = scores.argmax(0).cpu().numpy()
        return classes

    def shown(self, prediction: np.ndarray, min_score: float | None = None) -> SegmentMap:
        classes, places = np.unique(prediction, return_inverse=True)
        ids = (places.reshape(prediction.shape) + 1).astype(np.int32)
        return SegmentMap.of(ids, classes.tolist(), [1.0] * len(classes))

    def metrics(self) -> list[Metric]:
        return [SemanticIoU(len(self.categories))]


class SemanticClasses(Semantic):
    """Of a head that scores classes at each pixel; void pixels do not count in its loss.

    Args:
        class_weights: how much a pixel of each class counts in the loss, one number each; `None`:
            all alike.
    """

    output = Output.CLASSES

    def __init__(
        self, categories: Sequence[Category], class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(categories)
        count = len(self.categories)
        if class_weights is None:
            class_weights = (1.0,) * count
        if not isinstance(class_weights, list | tuple) or len(class_weights) != count:
            raise ValueError(
                f"class_weights: expected one number for each of {count} classes, got "
                f"{brief(class_weights)}"
            )
        for weight in class_weights:
            check_number("class_weights", weight, least=0)
        self.class_weights = torch.tensor(class_weights, dtype=torch.float32)

    def loss(
        self,
        output: Tensor | Sequence[Tensor],
        annotations: Sequence[Truth],
        part: BatchPart = WHOLE,
    ) -> dict[str, Tensor]:
        entropy = pixels = output[0].new_zeros((), dtype=torch.float32)
        weights = self.class_weights.to(output[0].device)
        for logits, annotation in zip(output, annotations, strict=True):
            classes = annotation.classes()
            target = on_device(classes, logits)
            entropy = entropy + F.cross_entropy(
                logits[None].float(), target[None], weights, ignore_index=VOID, reduction="sum"
            )
            found = np.bincount(classes[classes != VOID].ravel(), minlength=len(weights))
            pixels = pixels + weights @ on_device(found, logits).float()
        total, count = part.total(torch.stack([entropy, pixels]))
        tiny = torch.finfo(torch.float32).tiny
        return {"cross_entropy": total / count.clamp(min=tiny)}

    def decode(
        self,
        output: Tensor | Sequence[Tensor],
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[Tensor]:
        scores = [logits.softmax(0) for logits in output]
        if output_sizes is None:
            return scores
        return [
            F.interpolate(values[None], size, mode="bilinear", align_corners=False)[0]
            for values, size in zip(scores, output_sizes, strict=True)
        ]


class SemanticMasks(MaskTask, Semantic):
    """Of a head that gives queries classes and masks: each class's shares, summed over queries."""

    def decode(
        self,
        output: MaskPredictions,
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[Tensor]:
        return semantic_scores(output, sizes, output_sizes)
