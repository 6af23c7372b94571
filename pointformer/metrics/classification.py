"""Top-1 and top-5 accuracy of classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pointformer.annotations import VOID
from pointformer.data import Annotation
from pointformer.metrics.metric import class_scores_of


@dataclass(frozen=True)
class AccuracyScores:
    """Scores in [0, 1]; NaN without pictures.

    Attributes:
        top1, top5: share of pictures whose class has the highest score, or one of the five highest.
        pictures: how many have a class.
    """

    top1: float
    top5: float
    pictures: int


class Accuracy:
    """Top-1 and top-5 accuracy. Pictures whose annotation has no `label` are ignored."""

    def __init__(self) -> None:
        self.counts = np.zeros(3, np.int64)  # right among one, among five, all

    def update(self, predicted: np.ndarray, annotation: Annotation) -> None:
        """Add one picture.

        Args:
            predicted: (K,) scores of the classes. Of equal ones, the first is the better guess.

        Raises:
            ValueError: the label is not one of the classes, or a score is NaN.
        """
        label = annotation.label
        if label == VOID:
            return
        predicted = class_scores_of(predicted, annotation)
        better = predicted > predicted[label]
        better[:label] |= predicted[:label] == predicted[label]
        rank = int(better.sum())
        self.counts += [rank < 1, rank < 5, 1]

    def merge(self, other: Accuracy) -> None:
        """Add the pictures of another part of the data set."""
        self.counts += other.counts

    def state(self) -> dict[str, np.ndarray]:
        """The counts."""
        return {"counts": self.counts}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the counts of a `state`."""
        self.counts = np.array(state["counts"])

    def scores(self) -> AccuracyScores:
        """Scores of all pictures so far."""
        first, five, pictures = self.counts.tolist()
        if not pictures:
            return AccuracyScores(float("nan"), float("nan"), 0)
        return AccuracyScores(first / pictures, five / pictures, pictures)

    def compute(self) -> dict[str, float]:
        """The accuracies of `scores` by name."""
        scores = self.scores()
        return {"top-1 accuracy": scores.top1, "top-5 accuracy": scores.top5}
