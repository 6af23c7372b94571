"""Panoptic quality (Kirillov et al., arXiv 1801.00868) with COCO's rules for void and crowds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pointformer.annotations import VOID, Category, Overlaps
from pointformer.data import Annotation
from pointformer.metrics.metric import map_of


@dataclass(frozen=True)
class Quality:
    """Means over `classes` classes, in [0, 1]; NaN if there are none.

    `pq` is panoptic quality, `sq` the mean IoU of matched segments, `rq` their F1 score.
    """

    pq: float
    sq: float
    rq: float
    classes: int


@dataclass(frozen=True, eq=False)
class PanopticScores:
    """Scores over a data set.

    Attributes:
        pq, sq, rq: (K,) per class; NaN for classes without any segment.
        true_positives, false_positives, false_negatives: (K,) segments.
    """

    all: Quality
    things: Quality
    stuff: Quality
    pq: np.ndarray
    sq: np.ndarray
    rq: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray


class PanopticQuality:
    """Panoptic quality of segment maps.

    A predicted and an annotated segment of one class match if their IoU exceeds 1/2, where the
    prediction's pixels on void do not count. Crowds are neither matched nor missed. A prediction
    without a match is not counted if more than half of it lies on void and on crowds of its class.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)
        self._sums = np.zeros((2, len(self.categories)), np.int64)
        self.counts = np.zeros((3, len(self.categories)), np.int64)

    def update(self, predicted: Any, annotation: Annotation) -> None:
        """Add one picture.

        Args:
            predicted: with `ids`, (H, W) integers, 0 where there is no segment, and `segments`
                with `id` and `category`, such as the models' panoptic results.
            annotation: with a map of ids.

        Raises:
            TypeError: ids are not integers.
            ValueError: if sizes differ, or ids in the predicted map and segments do not agree.
        """
        if annotation.ids is None:
            raise ValueError(f"annotation: {annotation.name} has no map of ids")
        found = {int(s.id): int(s.category) for s in predicted.segments}
        known = {s.id: s for s in annotation.segments if s.category != VOID}
        predicted_ids = map_of(predicted.ids, annotation.ids.shape, annotation.name)
        overlaps = Overlaps.of(annotation.ids, predicted_ids)
        names, values = overlaps.first.tolist(), overlaps.second.tolist()
        agree = set(found) == set(values) - {0} and len(found) == len(predicted.segments)
        if not agree or 0 in found:
            raise ValueError(
                f"predicted: expected one segment for each id in the map of {annotation.name}, "
                f"got {len(predicted.segments)} segments for {len(values)} values"
            )
        if any(not 0 <= category < len(self.categories) for category in found.values()):
            raise ValueError(f"predicted: unknown category in the segments of {annotation.name}")
        rows, columns, pixels = overlaps.rows, overlaps.columns, overlaps.pixels
        classes = np.array([found.get(value, VOID) for value in values], np.int64)
        segments = [known.get(name) for name in names]
        truth = np.array([VOID if s is None else s.category for s in segments], np.int64)
        crowd = np.array([s is not None and s.crowd for s in segments], bool)
        void = overlaps.second_areas(truth[rows] == VOID)
        same = (truth[rows] == classes[columns]) & (truth[rows] != VOID)
        # Pixels that a spurious segment is not blamed for.
        excused = void + overlaps.second_areas(same & crowd[rows])

        predicted_areas = overlaps.second_areas()
        union = overlaps.first_areas()[rows] + (predicted_areas - void)[columns] - pixels
        # At most one pair of each segment, as segments do not overlap.
        matches = same & ~crowd[rows] & (2 * pixels > union)
        hits = truth[rows[matches]]
        for category, iou in zip(hits.tolist(), pixels[matches] / union[matches], strict=True):
            self._sums[:, category] += divmod(round(float(iou) * 2**53), 2**23)
        missed = (truth != VOID) & ~crowd
        missed[rows[matches]] = False
        spurious = (classes != VOID) & (2 * excused <= predicted_areas)
        spurious[columns[matches]] = False
        for counts, some in zip(self.counts, (hits, classes[spurious], truth[missed]), strict=True):
            np.add.at(counts, some, 1)

    def merge(self, other: PanopticQuality) -> None:
        """Add the pictures of another part of the data set."""
        self._sums += other._sums
        self.counts += other.counts

    def state(self) -> dict[str, np.ndarray]:
        """The counts, and the sums that `iou` is of."""
        return {"sums": self._sums, "counts": self.counts}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the counts and sums of a `state`."""
        self._sums, self.counts = np.array(state["sums"]), np.array(state["counts"])

    @property
    def iou(self) -> np.ndarray:
        """(K,) sums of the IoU of matched segments.

        Each is over 1/2, and so a multiple of 2^-53: sums of integers do not depend on the order.
        """
        return self._sums[0] / 2**30 + self._sums[1] / 2**53

    def compute(self) -> dict[str, float]:
        """PQ, SQ and RQ by name: of all classes, of things, of stuff."""
        scores = self.scores()
        groups = (("", scores.all), (" things", scores.things), (" stuff", scores.stuff))
        return {
            f"{name}{kind}": getattr(group, name.lower())
            for kind, group in groups
            for name in ("PQ", "SQ", "RQ")
        }

    def scores(self) -> PanopticScores:
        """Scores of all pictures so far."""
        hits, spurious, missed = self.counts
        weight = hits + spurious / 2 + missed / 2
        present = weight > 0
        iou = self.iou
        pq = np.where(present, iou / np.maximum(weight, 0.5), np.nan)
        rq = np.where(present, hits / np.maximum(weight, 0.5), np.nan)
        sq = np.where(present, iou / np.maximum(hits, 1), np.nan)
        things = np.array([category.is_thing for category in self.categories], bool)

        def quality(chosen: np.ndarray) -> Quality:
            chosen = chosen & present
            n = int(chosen.sum())
            if n == 0:
                return Quality(math.nan, math.nan, math.nan, 0)
            mean_pq, mean_sq, mean_rq = (float(v[chosen].mean()) for v in (pq, sq, rq))
            return Quality(mean_pq, mean_sq, mean_rq, n)

        every = np.ones(len(things), bool)
        counts = (hits.copy(), spurious.copy(), missed.copy())
        parts = quality(every), quality(things), quality(~things)
        return PanopticScores(*parts, pq, sq, rq, *counts)
