"""Mean intersection over union of class maps, from one confusion matrix over a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pointformer.annotations import VOID
from pointformer.data import Annotation
from pointformer.metrics.metric import map_of


@dataclass(frozen=True, eq=False)
class SemanticScores:
    """Scores in [0, 1].

    Attributes:
        iou: (K,) per class; NaN for classes that are neither annotated nor predicted.
        accuracy: (K,) share of a class's annotated pixels that are found; NaN if there are none.
        pixel_accuracy: share of all annotated pixels.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    pixel_accuracy: float

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that are annotated or predicted; NaN if there are none."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean over the annotated classes."""
        return _mean(self.accuracy)


class SemanticIoU:
    """Confusion matrix of class maps; pixels that are void in the annotation are ignored.

    Attributes:
        counts: (K, K + 1) int64 pixels by annotated and predicted class; the last column is for
            annotated pixels without a predicted class.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = np.zeros((num_classes, num_classes + 1), np.int64)

    def update(self, predicted: np.ndarray, annotation: Annotation) -> None:
        """Add one picture.

        Args:
            predicted: (H, W) integers, 0 to K - 1, or -1 for void.
            annotation: whose `classes()` are the truth.

        Raises:
            TypeError: the predicted map is not of integers.
            ValueError: if the sizes differ or a value is out of range.
        """
        annotated = annotation.classes()
        predicted = map_of(predicted, annotated.shape, annotation.name)
        classes = len(self.counts)
        for name, values in (("predicted", predicted), (annotation.name, annotated)):
            if values.size and (values.min() < VOID or values.max() >= classes):
                raise ValueError(
                    f"{name}: expected classes of {VOID} to {classes - 1}, "
                    f"got {values.min()} to {values.max()}"
                )
        kept = annotated != VOID
        found = predicted[kept].astype(np.int64)
        found[found == VOID] = classes
        pairs = annotated[kept].astype(np.int64) * (classes + 1) + found
        self.counts += np.bincount(pairs, minlength=self.counts.size).reshape(self.counts.shape)

    def merge(self, other: SemanticIoU) -> None:
        """Add the pictures of another part of the data set."""
        self.counts += other.counts

    def state(self) -> dict[str, np.ndarray]:
        """The counts."""
        return {"counts": self.counts}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the counts of a `state`."""
        self.counts = np.array(state["counts"])

    def compute(self) -> dict[str, float]:
        """The means of `scores` by name."""
        scores = self.scores()
        return {
            "mIoU": scores.mean_iou,
            "mean accuracy": scores.mean_accuracy,
            "pixel accuracy": scores.pixel_accuracy,
        }

    def scores(self) -> SemanticScores:
        """Scores of all pictures so far."""
        square = self.counts[:, :-1]
        hits, annotated = np.diag(square), self.counts.sum(1)
        union = annotated + square.sum(0) - hits
        total = annotated.sum()
        return SemanticScores(
            iou=np.where(union > 0, hits / np.maximum(union, 1), np.nan),
            accuracy=np.where(annotated > 0, hits / np.maximum(annotated, 1), np.nan),
            pixel_accuracy=float(hits.sum() / total) if total else float("nan"),
        )


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
