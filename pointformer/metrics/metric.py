"""The protocol of all metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np

from pointformer.data import Annotation


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


def array_of(value: Any) -> np.ndarray:
    """A value that JSON can hold, as (N,) uint8; numbers keep all their bits."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def value_of(array: np.ndarray) -> Any:
    """The value that `array_of` was given, tuples as lists."""
    return json.loads(array.tobytes())
