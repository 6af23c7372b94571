"""Average precision of instance maps, TP / (TP + FP + FN), as in StarDist and the 2018 Data
Science Bowl."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


@dataclass(frozen=True)
class AveragePrecision:
    """Counts and scores per IoU threshold, over a data set."""

    thresholds: tuple[float, ...]
    true_positives: tuple[int, ...]
    false_positives: tuple[int, ...]
    false_negatives: tuple[int, ...]
    pooled: tuple[float, ...]
    """TP / (TP + FP + FN) of the counts summed over all images."""
    per_image: tuple[float, ...]
    """The mean over images of each image's own TP / (TP + FP + FN)."""

    @property
    def mean(self) -> float:
        """Mean over the thresholds of `pooled`."""
        return float(np.mean(self.pooled))

    def at(self, threshold: float) -> float:
        """`pooled` at one of the thresholds."""
        return self.pooled[self.thresholds.index(threshold)]


def match_instances(
    predicted: np.ndarray, annotated: np.ndarray, thresholds: Sequence[float] = IOU_THRESHOLDS
) -> np.ndarray:
    """Count the matched, the spurious and the missed instances of one image.

    A pair may match if its IoU is at least the threshold; among all one-to-one matchings, one
    with most pairs is counted.

    Args:
        predicted: (H, W) integers, 0 is background, every other value an instance.
        annotated: the same; ids need not agree or be consecutive.
        thresholds: IoU thresholds in (0, 1].

    Returns:
        (len(thresholds), 3) int64: true positives, false positives, false negatives.

    Raises:
        ValueError: if the shapes differ or a threshold is outside (0, 1].
    """
    if predicted.ndim != 2 or predicted.shape != annotated.shape:
        raise ValueError(
            "predicted, annotated: expected two maps of one shape (H, W), "
            f"got {predicted.shape} and {annotated.shape}"
        )
    if not all(0 < threshold <= 1 for threshold in thresholds):
        raise ValueError(f"thresholds: expected values in (0, 1], got {tuple(thresholds)}")
    iou = _iou_table(predicted, annotated)
    counts = np.empty((len(thresholds), 3), np.int64)
    for row, threshold in enumerate(thresholds):
        candidates = iou >= threshold - 1e-9
        # Overlaps above a half are unique; lower ones, and ties at a half, need the assignment.
        pairs = linear_sum_assignment(candidates, maximize=True)
        matched = int(candidates[pairs].sum())
        counts[row] = matched, iou.shape[0] - matched, iou.shape[1] - matched
    return counts


def average_precision(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> AveragePrecision:
    """Score (predicted, annotated) instance maps of a data set; see `match_instances`.

    Where neither map of an image has an instance, the image's own score is 1. So is the pooled
    score if there are no instances at all.
    """
    counts = [match_instances(predicted, annotated, thresholds) for predicted, annotated in pairs]
    stacked = np.stack(counts) if counts else np.zeros((0, len(thresholds), 3), np.int64)
    total = stacked.sum(0)
    per_image = _precision(stacked).mean(0) if counts else np.ones(len(thresholds))
    return AveragePrecision(
        thresholds=tuple(thresholds),
        true_positives=tuple(total[:, 0].tolist()),
        false_positives=tuple(total[:, 1].tolist()),
        false_negatives=tuple(total[:, 2].tolist()),
        pooled=tuple(_precision(total).tolist()),
        per_image=tuple(per_image.tolist()),
    )


def _precision(counts: np.ndarray) -> np.ndarray:
    instances = counts.sum(-1)
    return np.where(instances == 0, 1.0, counts[..., 0] / np.maximum(instances, 1))


def _iou_table(predicted: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of instances (background left out), float64."""
    predicted_ids, rows = np.unique(predicted, return_inverse=True)
    annotated_ids, columns = np.unique(annotated, return_inverse=True)
    shape = len(predicted_ids), len(annotated_ids)
    joint = np.bincount(rows.ravel() * shape[1] + columns.ravel(), minlength=shape[0] * shape[1])
    overlap = joint.reshape(shape)
    union = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    iou = overlap / union
    return iou[predicted_ids != 0][:, annotated_ids != 0]
