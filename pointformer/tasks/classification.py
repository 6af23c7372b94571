"""Classification: the class of a whole picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pointformer.annotations import VOID, Category
from pointformer.data.statistics import Counts
from pointformer.metrics import Accuracy, Metric
from pointformer.models import Output
from pointformer.nn.parallel import WHOLE, BatchPart
from pointformer.segmentation.tiling import Tile
from pointformer.tasks.task import Size, Task, Truth, on_device


class Classification(Task):
    """The class of a picture. Predictions are (K,) float32 probabilities.

    Args:
        smoothing: share of the target that is spread over all classes.
    """

    name, output, averages = "classification", Output.SCORES, True
    counts: ClassVar[Counts] = "pictures"

    def __init__(self, categories: Sequence[Category], smoothing: float = 0.0) -> None:
        super().__init__(categories)
        self.smoothing = smoothing

    def loss(
        self, output: Tensor, annotations: Sequence[Truth], part: BatchPart = WHOLE
    ) -> dict[str, Tensor]:
        target = on_device(np.array([annotation.label for annotation in annotations]), output)
        entropy = F.cross_entropy(
            output.float(),
            target,
            ignore_index=VOID,
            label_smoothing=self.smoothing,
            reduction="sum",
        )
        total, pictures = part.total(torch.stack([entropy, (target != VOID).sum().to(entropy)]))
        return {"cross_entropy": total / pictures.clamp(min=1)}

    def decode(
        self,
        output: Tensor,
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[np.ndarray]:
        return list(output.float().softmax(1).cpu().numpy())

    def average(self, copies: Sequence[tuple[np.ndarray, bool]]) -> np.ndarray:
        return np.mean([scores for scores, _ in copies], axis=0)

    def join(self, shape: Size, windows: Sequence[Tile], parts: Iterable[np.ndarray]) -> np.ndarray:
        """The mean over windows, by their areas."""
        areas = [window.size[0] * window.size[1] for window in windows]
        return np.average(list(parts), axis=0, weights=areas)

    def metrics(self) -> list[Metric]:
        return [Accuracy()]
