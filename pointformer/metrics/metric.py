"""What all metrics are."""

from __future__ import annotations

from typing import Any, Protocol, Self

from pointformer.data import Annotation


class Metric(Protocol):
    """Scores of predictions, one picture after the other.

    Parts of a data set can be scored apart, each by a metric made alike, and merged. Each metric
    has its scores in detail in `scores()`.
    """

    def update(self, predicted: Any, annotation: Annotation) -> None:
        """Add one picture: what a task's model finds in it, and what is annotated."""

    def merge(self, other: Self) -> None:
        """Add the pictures of another metric, none of which may be here already."""

    def compute(self) -> dict[str, float]:
        """Scores of all pictures so far by name, in [0, 1]; NaN where there is nothing to score."""
