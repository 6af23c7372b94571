"""Tasks of point sets: the class of a whole one, and of each of its points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pointformer.annotations import VOID, Category
from pointformer.metrics import Metric, SemanticIoU
from pointformer.models import Output
from pointformer.nn.parallel import WHOLE, BatchPart
from pointformer.tasks.classification import Classification
from pointformer.tasks.task import Size, Task, Truth, on_device


class PointClassification(Classification):
    """The class of a point set. Predictions are (K,) float32 probabilities."""

    name, output, counts = "point_classification", Output.POINT_SCORES, "sets"
    averages = False


class PointSegmentation(Task):
    """The class of each point. Predictions are (n,) int32 classes.

    Args:
        smoothing: share of the target that is spread over all classes.
    """

    name, output, counts = "point_segmentation", Output.POINT_CLASSES, "points"

    def __init__(self, categories: Sequence[Category], smoothing: float = 0.0) -> None:
        super().__init__(categories)
        self.smoothing = smoothing

    def loss(
        self, output: Tensor, annotations: Sequence[Truth], part: BatchPart = WHOLE
    ) -> dict[str, Tensor]:
        classes = np.concatenate([annotation.classes() for annotation in annotations])
        entropy = F.cross_entropy(
            output.float(),
            on_device(classes, output),
            ignore_index=VOID,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
        count = entropy.new_tensor(np.count_nonzero(classes != VOID))
        total, points = part.total(torch.stack([entropy, count]))
        return {"cross_entropy": total / points.clamp(min=1)}

    def decode(
        self,
        output: Tensor,
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[np.ndarray]:
        classes = output.argmax(1).int().cpu()
        return [part.numpy() for part in classes.split([points for points, _ in sizes])]

    def metrics(self) -> list[Metric]:
        return [SemanticIoU(len(self.categories))]
