"""Average precision of instance maps, TP / (TP + FP + FN), as in StarDist and the 2018 Data
Science Bowl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from pointformer.annotations import Objects, Overlaps, SegmentMap
from pointformer.data import Annotation
from pointformer.metrics.metric import map_of

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
        ValueError: if the shapes differ, or there is no threshold or one outside (0, 1].
    """
    if predicted.ndim != 2 or predicted.shape != annotated.shape:
        raise ValueError(
            "predicted, annotated: expected two maps of one shape (H, W), "
            f"got {predicted.shape} and {annotated.shape}"
        )
    _check_thresholds(thresholds)
    overlaps = Overlaps.of(predicted, annotated)
    rows, columns, pixels = overlaps.rows, overlaps.columns, overlaps.pixels
    union = overlaps.first_areas()[rows] + overlaps.second_areas()[columns] - pixels
    objects = (overlaps.first[rows] != 0) & (overlaps.second[columns] != 0)
    iou = np.where(objects, pixels / union, -1)
    found, known = (int((ids != 0).sum()) for ids in (overlaps.first, overlaps.second))
    counts = np.empty((len(thresholds), 3), np.int64)
    for row, threshold in enumerate(thresholds):
        candidates = iou >= threshold - 1e-9
        matched = _most_pairs(rows[candidates], columns[candidates])
        counts[row] = matched, found - matched, known - matched
    return counts


class InstanceAP:
    """Average precision of what is shown of objects, regardless of class, as StarDist counts it.

    Args:
        thresholds: IoU thresholds in (0, 1].
        min_scores: from which objects are shown. Of several, scores are those of the best one: with
            the highest AP at the first threshold, of equals the one nearest to 0.5.

    Raises:
        ValueError: there is no threshold or one outside (0, 1], or no score.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = IOU_THRESHOLDS,
        min_scores: Sequence[float] = (0.5,),
    ) -> None:
        self.thresholds, self.min_scores = tuple(thresholds), tuple(min_scores)
        _check_thresholds(self.thresholds)
        if not self.min_scores:
            raise ValueError("min_scores: expected at least one")
        # Of each picture, those of `match_instances` for each of the scores.
        self.counts: list[np.ndarray] = []

    def update(self, predicted: SegmentMap | Objects, annotation: Annotation) -> None:
        """Add one picture. Of objects, those that are shown count, drawn as a map; on crowds none
        do.

        Raises:
            TypeError: a map is not of integers.
            ValueError: if the sizes differ.
        """
        truth, crowd = annotation.instances()
        counts = []
        for least in self.min_scores:
            shown = predicted
            if isinstance(shown, Objects):
                shown = shown.confident(least).segment_map()
            drawn = map_of(shown.ids, truth.shape, annotation.name)
            found = np.where(crowd, 0, drawn)
            counts.append(match_instances(found, truth, self.thresholds))
        self.counts.append(np.stack(counts))

    def merge(self, other: InstanceAP) -> None:
        """Add the pictures of another part of the data set."""
        self.counts += other.counts

    def state(self) -> dict[str, np.ndarray]:
        """The counts of each picture."""
        return {"counts": self._stacked()}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the pictures of a `state`."""
        self.counts = list(state["counts"])

    def _stacked(self) -> np.ndarray:
        """(pictures, len(min_scores), len(thresholds), 3) int64."""
        none = np.zeros((len(self.min_scores), len(self.thresholds), 3), np.int64)
        return np.stack([none, *self.counts])[1:]

    def best_min_score(self) -> float:
        """That of `min_scores` with which scores are best."""
        precision = _precision(self._stacked().sum(0))[:, 0]
        best = [s for s, p in zip(self.min_scores, precision, strict=True) if p == max(precision)]
        return min(best, key=lambda score: abs(score - 0.5))

    def compute(self) -> dict[str, float]:
        """The pooled scores by name: at the first threshold, and the mean."""
        scores = self.scores()
        return {
            f"AP at IoU {self.thresholds[0]:g} (TP / (TP + FP + FN))": scores.pooled[0],
            "mean AP (TP / (TP + FP + FN))": scores.mean,
        }

    def scores(self) -> AveragePrecision:
        """Scores of all pictures so far.

        Where neither map of a picture has an instance, the picture's own score is 1. So is the
        pooled score if there are no instances at all.
        """
        stacked = self._stacked()[:, self.min_scores.index(self.best_min_score())]
        total = stacked.sum(0)
        per_image = _precision(stacked).mean(0) if self.counts else np.ones(len(self.thresholds))
        return AveragePrecision(
            thresholds=self.thresholds,
            true_positives=tuple(total[:, 0].tolist()),
            false_positives=tuple(total[:, 1].tolist()),
            false_negatives=tuple(total[:, 2].tolist()),
            pooled=tuple(_precision(total).tolist()),
            per_image=tuple(per_image.tolist()),
        )


def average_precision(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> AveragePrecision:
    """Score (predicted, annotated) instance maps of a data set; see `InstanceAP.scores` and
    `match_instances`."""
    metric = InstanceAP(thresholds)
    metric.counts = [match_instances(*pair, metric.thresholds)[None] for pair in pairs]
    return metric.scores()


def _check_thresholds(thresholds: Sequence[float]) -> None:
    if len(thresholds) == 0 or not all(0 < threshold <= 1 for threshold in thresholds):
        raise ValueError(f"thresholds: expected values in (0, 1], got {tuple(thresholds)}")


def _precision(counts: np.ndarray) -> np.ndarray:
    instances = counts.sum(-1)
    return np.where(instances == 0, 1.0, counts[..., 0] / np.maximum(instances, 1))


def _most_pairs(rows: np.ndarray, columns: np.ndarray) -> int:
    """How many of some pairs a one-to-one matching can have."""
    if max(np.bincount(rows).max(initial=0), np.bincount(columns).max(initial=0)) <= 1:
        return len(rows)  # overlaps above a half are unique
    table = csr_array((np.ones(len(rows), np.int8), (rows, columns)))
    return int((maximum_bipartite_matching(table) >= 0).sum())
