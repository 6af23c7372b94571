"""The protocol of all metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np

from pointformer.data import Annotation
from pointformer.data.point_sets import PointAnnotation


class Metric(Protocol):
    """Scores of predictions, one picture after the other.

    Parts of a data set can be scored apart, each by a metric made alike, and merged; in between
    they can be kept as arrays. Each metric has its scores in detail in `scores()`.
    """

    def update(self, predicted: Any, annotation: Annotation) -> None:
        """Add one picture: what a task's model finds in it, and what is annotated."""

    def merge(self, other: Self) -> None:
        """Add the pictures of another metric, none of which may be here already."""

    def state(self) -> dict[str, np.ndarray]:
        """All pictures so far as numbers, by names that do not depend on them."""

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take a `state` of a metric made alike, in the place of the pictures so far."""

    def compute(self) -> dict[str, float]:
        """Scores of all pictures so far by name, in [0, 1]; NaN where there is nothing to score."""


def map_of(values: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """What is predicted for each pixel, (H, W), or point: integers, as many as are annotated.

    Raises:
        TypeError: they are not integers.
        ValueError: the shape is another.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "iu":
        raise TypeError(
            f"predicted: expected the map of {name} to be of integers, got {values.dtype}"
        )
    if values.shape != shape:
        raise ValueError(
            f"predicted: expected the map of {name} to be of shape {shape}, got {values.shape}"
        )
    return values


def class_scores_of(values: Any, annotation: Annotation | PointAnnotation) -> np.ndarray:
    """Predicted scores of the classes, (K,).

    Raises:
        ValueError: there are several of a class, the annotated class is not one of them, or one
            is NaN, which is neither more nor less than any other.
    """
    values = np.asarray(values)
    if values.ndim != 1:
        raise ValueError(
            f"predicted: expected a score of each class of {annotation.name}, got shape "
            f"{values.shape}"
        )
    if not 0 <= annotation.label < len(values):
        raise ValueError(
            f"annotation: {annotation.name} has class {annotation.label}, the prediction "
            f"{len(values)} classes"
        )
    if np.isnan(values).any():
        raise ValueError(f"predicted: the scores of {annotation.name} have NaN")
    return values


def array_of(value: Any) -> np.ndarray:
    """A value that JSON can hold, as (N,) uint8; numbers keep all their bits."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def value_of(array: np.ndarray) -> Any:
    """The value that `array_of` was given, tuples as lists."""
    return json.loads(array.tobytes())
