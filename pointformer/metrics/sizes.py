"""Recall by class and size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pointformer.annotations import VOID, Category, Objects, SegmentMap
from pointformer.data import Annotation
from pointformer.data.point_sets import PointAnnotation
from pointformer.metrics.metric import class_scores_of, map_of

SIDES = (8, 16, 32, 96)
"""Limits between groups of sizes: the root of the area, in pixels."""


@dataclass(frozen=True)
class SizeScores:
    """Counts by class and size.

    Attributes:
        found, annotated: (K, len(sides) + 1) int64.
        sides: the first side of every group of sizes but the first.
    """

    found: np.ndarray
    annotated: np.ndarray
    sides: tuple[float, ...]

    @property
    def recall(self) -> np.ndarray:
        """(K, len(sides) + 1) in [0, 1], NaN where nothing is annotated."""
        with np.errstate(invalid="ignore"):
            return self.found / self.annotated


class RecallBySize:
    """The share of what is annotated that is found, for each class and group of sizes.

    For predictions of objects and segments: an annotated object is found if one that is shown, of
    its class, has an IoU of at least 0.5 with it; a segment of an uncountable class if at least
    half of its pixels have its class. For classes of pixels: a connected part is found if at least
    half of its pixels have its class. For classes of pictures: a picture is found if its class has
    the highest score. Of points, and of classes of point sets, the share is of those that have
    their class; they have no size, and are all in the first group. Crowds do not count. Sizes are
    roots of annotated areas, in pixels.

    Args:
        categories: of what is annotated.
        sides: where groups of sizes end, ascending.
        min_score: from which `Objects` are shown.
    """

    def __init__(
        self,
        categories: Sequence[Category],
        sides: Sequence[float] = SIDES,
        min_score: float = 0.5,
    ) -> None:
        self.categories, self.sides, self.min_score = tuple(categories), tuple(sides), min_score
        self.counts = np.zeros((2, len(self.categories), len(self.sides) + 1), np.int64)

    def update(self, predicted: Any, annotation: Annotation | PointAnnotation) -> None:
        """Add one picture or point set.

        Args:
            predicted: `Objects`, a `SegmentMap`, classes (H, W) of a picture, (n,) of points, or
                scores (K,).

        Raises:
            TypeError: a map is not of integers.
            ValueError: a map has another size than the picture, a score is NaN, or the annotated
                class has none.
        """
        if isinstance(predicted, Objects):
            predicted = predicted.confident(self.min_score).segment_map()
        if isinstance(annotation, PointAnnotation):
            self._add_set(predicted, annotation)
        elif isinstance(predicted, SegmentMap):
            self._add_segments(predicted, annotation)
        elif predicted.ndim == 2:
            self._add_parts(predicted, annotation)
        elif annotation.label != VOID:
            best = int(class_scores_of(predicted, annotation).argmax())
            self._add(annotation.label, math.prod(annotation.size), best == annotation.label)

    def _add(self, category: int, area: float, found: bool) -> None:
        group = int(np.searchsorted(self.sides, area**0.5, "right"))
        self.counts[:, category, group] += (found, 1)

    def _add_segments(self, predicted: SegmentMap, annotation: Annotation) -> None:
        kinds = np.array([VOID, *(segment.category for segment in predicted.segments)])
        areas = np.array([0, *(segment.area for segment in predicted.segments)])
        drawn = map_of(predicted.ids, annotation.size, annotation.name)
        number = {segment.id: n for n, segment in enumerate(predicted.segments, 1)}
        for segment, mask in zip(annotation.segments, annotation.masks(), strict=True):
            if segment.crowd or not mask.area:
                continue
            ids, overlaps = np.unique(drawn[mask.window][mask.pixels], return_counts=True)
            places = np.array([number.get(id, 0) for id in ids.tolist()])
            same = kinds[places] == segment.category
            if self.categories[segment.category].is_thing:
                union = areas[places] + mask.area - overlaps
                found = bool((same & (2 * overlaps >= union)).any())
            else:
                found = bool(2 * overlaps[same].sum() >= mask.area)
            self._add(segment.category, mask.area, found)

    def _add_parts(self, predicted: np.ndarray, annotation: Annotation) -> None:
        from scipy import ndimage  # slow to import

        annotated = annotation.classes()
        predicted = map_of(predicted, annotated.shape, annotation.name)
        for category in np.unique(annotated[annotated != VOID]).tolist():
            parts, count = ndimage.label(annotated == category)
            areas = np.bincount(parts.ravel(), minlength=count + 1)
            hits = np.bincount(parts[predicted == category], minlength=count + 1)
            for area, hit in zip(areas[1:].tolist(), hits[1:].tolist(), strict=True):
                self._add(category, area, 2 * hit >= area)

    def _add_set(self, predicted: np.ndarray, annotation: PointAnnotation) -> None:
        annotated = annotation.labels
        if annotated is not None:
            predicted = map_of(predicted, annotated.shape, annotation.name)
        else:
            if annotation.label == VOID:
                return
            annotated = np.array([annotation.label])
            predicted = class_scores_of(predicted, annotation).argmax(0, keepdims=True)
        for row, chosen in ((0, annotated == predicted), (1, True)):
            known = annotated[chosen & (annotated != VOID)]
            self.counts[row, :, 0] += np.bincount(known, minlength=len(self.categories))

    def merge(self, other: RecallBySize) -> None:
        """Add the pictures of another part of the data set."""
        self.counts += other.counts

    def state(self) -> dict[str, np.ndarray]:
        """The counts."""
        return {"counts": self.counts}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the counts of a `state`."""
        self.counts = np.array(state["counts"])

    def scores(self) -> SizeScores:
        """Counts of all pictures so far."""
        return SizeScores(self.counts[0].copy(), self.counts[1].copy(), self.sides)

    def compute(self) -> dict[str, float]:
        """Recall by the group of sizes, over all classes; NaN where nothing is annotated."""
        found, annotated = self.counts.sum(1)
        return {
            f"recall, {name}": hit / total if total else float("nan")
            for name, hit, total in zip(
                size_names(self.sides), found.tolist(), annotated.tolist(), strict=True
            )
        }


def size_names(sides: Sequence[float]) -> list[str]:
    """Names of the groups of sizes: "below 8 px", "8 to 16 px" and so on."""
    between = [f"{low:g} to {high:g} px" for low, high in itertools.pairwise(sides)]
    return [f"below {sides[0]:g} px", *between, f"from {sides[-1]:g} px"] if sides else ["all"]
