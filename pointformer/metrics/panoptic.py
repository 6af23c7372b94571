"""Panoptic quality (Kirillov et al., arXiv 1801.00868) with COCO's rules for void and crowds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pointformer.annotations import VOID, Category
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
        pairs = annotation.ids.astype(np.int64) << 32 | predicted_ids.astype(np.int64)
        pairs, pixels = np.unique(pairs, return_counts=True)
        names, rows = np.unique(pairs >> 32, return_inverse=True)
        values, columns = np.unique(pairs & 0xFFFFFFFF, return_inverse=True)
        overlap = np.zeros((len(names), len(values)), np.int64)
        overlap[rows, columns] = pixels
        if set(found) != set(values.tolist()) - {0} or 0 in found:
            raise ValueError(
                f"predicted: expected one segment for each id in the map of {annotation.name}, "
                f"got {len(found)} segments for {len(values)} values"
            )
        if any(not 0 <= category < len(self.categories) for category in found.values()):
            raise ValueError(f"predicted: unknown category in the segments of {annotation.name}")
        predicted_areas, areas = overlap.sum(0), overlap.sum(1)
        void = overlap[[name not in known for name in names.tolist()]].sum(0)
        excused = void.copy()  # pixels that a spurious segment is not blamed for

        classes = np.array([found.get(v, VOID) for v in values.tolist()])
        spurious = classes != VOID
        for row, name in enumerate(names.tolist()):
            segment = known.get(name)
            if segment is None:
                continue
            same = classes == segment.category
            if segment.crowd:
                excused[same] += overlap[row, same]
                continue
            union = areas[row] + predicted_areas - overlap[row] - void
            matches = np.flatnonzero(same & (2 * overlap[row] > union))
            if len(matches):  # at most one, as segments do not overlap
                iou = float(overlap[row, matches[0]] / union[matches[0]])
                self._sums[:, segment.category] += divmod(round(iou * 2**53), 2**23)
                self.counts[0, segment.category] += 1
                spurious[matches[0]] = False
            else:
                self.counts[2, segment.category] += 1
        spurious &= 2 * excused <= predicted_areas
        np.add.at(self.counts[1], classes[spurious], 1)

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
