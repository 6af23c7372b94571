"""The base classes of tasks."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from pointformer.annotations import Category, Objects, Segment, SegmentMap
from pointformer.data.statistics import Counts
from pointformer.metrics import Metric
from pointformer.models import Output
from pointformer.nn.parallel import WHOLE, BatchPart
from pointformer.segmentation.tiling import Tile

Size = tuple[int, int]


class Truth(Protocol):
    """An annotation that tasks learn from; see `pointformer.data.Annotation`."""

    @property
    def label(self) -> int: ...

    @property
    def segments(self) -> tuple[Segment, ...]: ...

    def objects(self) -> Objects: ...

    def classes(self) -> np.ndarray: ...

    def instances(self) -> tuple[np.ndarray, np.ndarray]: ...

    def label_map(self) -> tuple[np.ndarray, np.ndarray]: ...


class Task(abc.ABC):
    """The loss of a model's head, the reading of its output, and the metrics of what is found.

    A subclass is for one kind of output, and listed in `pointformer.tasks`. What it finds in a
    picture, or in a window of one, is its prediction; the subclass says what that is.

    Attributes:
        name: what models and commands call it; several kinds of output may have the same.
        output: the kind that it reads.
        counts: what of the annotations is counted for each class, see `examine`.
        averages: whether predictions of scaled and mirrored copies can be averaged.
        categories: the classes of what is found.
        min_score: confidence from which objects that may overlap are shown.
    """

    name: ClassVar[str]
    output: ClassVar[Output]
    counts: ClassVar[Counts]
    averages: ClassVar[bool] = False
    min_score: float = 0.5

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)

    @property
    def things(self) -> list[int]:
        """The countable classes."""
        return [number for number, category in enumerate(self.categories) if category.is_thing]

    @abc.abstractmethod
    def loss(
        self, output: Any, annotations: Sequence[Truth], part: BatchPart = WHOLE
    ) -> dict[str, Tensor]:
        """Terms by name, whose sum is the loss: of the whole batch, in each process that has a part
        of it.

        Args:
            output: of the model in training, for B images.
            annotations: B, of the images' sizes.
            part: of a batch that several processes share; `BatchPart.total` makes means of sums.
        """

    @abc.abstractmethod
    def decode(
        self,
        output: Any,
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[Any]:
        """Predictions for B images, or point sets.

        Args:
            output: of the model.
            sizes: heights and widths of the images that the model saw; of point sets the numbers of
                points, and 1.
            output_sizes: those of the predictions, if others.
            min_score: confidence that what competes for pixels needs; objects that may overlap keep
                every score.
        """

    def average(self, copies: Sequence[tuple[Any, bool]]) -> Any:
        """One prediction from those of copies of one image; `True` for mirrored ones."""
        raise NotImplementedError(f"predictions of the task {self.name!r} cannot be averaged")

    def join(self, shape: Size, windows: Sequence[Tile], parts: Iterable[Any]) -> Any:
        """The prediction for a picture from those of windows that cover it.

        Args:
            shape: height and width of the picture.
            parts: in the order of the windows; taken one at a time.
        """
        raise NotImplementedError(f"the task {self.name!r} has no windows")

    def truth(self, annotation: Any) -> Any:
        """The part of an annotation that the task learns and scores."""
        return annotation

    @abc.abstractmethod
    def metrics(self) -> list[Metric]:
        """New metrics, which take what `join` gives and `truth`."""


class MapTask(Task):
    """A task whose predictions have places in the picture."""

    @abc.abstractmethod
    def shown(self, prediction: Any, min_score: float | None = None) -> SegmentMap:
        """The prediction as a map of segments; an uncountable class is one region.

        Args:
            min_score: that objects which may overlap need to be shown; `None`: the task's.
        """


def on_device(values: np.ndarray, output: Tensor) -> Tensor:
    """(...) integers as int64 where the output is."""
    return torch.from_numpy(np.ascontiguousarray(values)).long().to(output.device)
