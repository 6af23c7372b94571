"""Tasks: what models learn, how their outputs are read and how what they find is scored.

`task_of(model)` gives the task of a model. `segment`, `evaluate` and training ask the task for what
depends on it. A new one is a file with a subclass of `Task` and an entry of `TASKS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from pointformer._checks import describe
from pointformer.annotations import Category
from pointformer.models import Model
from pointformer.tasks.classification import Classification
from pointformer.tasks.instance import InstanceBorders, InstanceMasks, InstanceStars
from pointformer.tasks.panoptic import Panoptic
from pointformer.tasks.points import PointClassification, PointSegmentation
from pointformer.tasks.semantic import SemanticClasses, SemanticMasks
from pointformer.tasks.task import MapTask, Task, Truth

__all__ = ["TASKS", "MapTask", "Task", "Truth", "task_of"]

TASKS: tuple[type[Task], ...] = (
    Classification,
    SemanticClasses,
    SemanticMasks,
    InstanceBorders,
    InstanceMasks,
    InstanceStars,
    Panoptic,
    PointClassification,
    PointSegmentation,
)


def task_of(
    model: Model,
    name: str | None = None,
    categories: Sequence[Category] | None = None,
    **options: Any,
) -> Task:
    """The task that a model is made for.

    Args:
        model: its `output` and the name of its task choose; the task takes its `min_score`.
        name: of the task that it must be.
        categories: of what is found, in the place of the model's. `None`, of a model that has none:
            countable classes that are called by their numbers.
        options: of the loss, see the class of the task.

    Raises:
        TypeError: it is no model, or the task has no such option; the message lists those it has.
        ValueError: it is made for another task, for none, or has another number of classes.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model: expected one of create_model(), got {describe(model)}")
    possible = [task for task in TASKS if task.output is model.output]
    made = [task for task in possible if model.task in (None, task.name)]
    if len(made) != 1 or name not in (None, made[0].name):
        whose = f"{model.name} with head {model.head_name!r}"
        names = ", ".join(task.name for task in possible) or "none"
        if len(made) == 1:
            raise ValueError(f"model: {whose} is made for {made[0].name!r}, not for {name!r}")
        raise ValueError(
            f"model: {whose} has no task; possible: {names}"
            + (" (create_model(..., task=...))" if possible else "; expected another head")
        )
    kinds = model.output.kinds(model.num_classes)
    if categories is None:
        categories = model.categories or [Category(n, str(n)) for n in range(kinds)]
    if len(categories) != kinds:
        raise ValueError(f"model: has {kinds} classes, the data set {len(categories)}")
    known = [name for name in inspect.signature(made[0]).parameters if name != "categories"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"unknown option {', '.join(unknown)}; known options of the task: "
            f"{', '.join(known) or 'none'}"
        )
    task = made[0](categories, **options)
    if model.min_score is not None:
        task.min_score = model.min_score
    return task
