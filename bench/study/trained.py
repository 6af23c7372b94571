"""A trained model and the data that it is scored on, for what the study asks of models it has."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from cells import BACKGROUND, read_lines
from tables import MAIN

import pointformer
from pointformer.data import Category, Dataset
from pointformer.evaluation import evaluate
from pointformer.metrics import Metric, RecallBySize
from pointformer.models import Model, complexity_of, create_model
from pointformer.models.backbone import StageOutput
from pointformer.prediction import to_tensor
from pointformer.segmentation.regions import Regions
from pointformer.tasks import Task, task_of
from pointformer.train.pictures import open_data
from pointformer.train.recipe import Recipe, read_recipe
from pointformer.train.run import validation_region, validation_tile

TIMED = 16  # pictures whose time is measured
_TYPICAL = 8192  # points, where the recipe has no regions
SIDES = (16, 32, 96)  # pixels: limits between the groups of sizes of objects
RECALL = "recall, "  # in the names of its scores


def made_on() -> dict[str, Any]:
    """The machine and the versions, of each line of results."""
    return {
        "machine": f"{platform.machine()} CPU, 1 thread",
        "versions": {"pointformer": pointformer.__version__, "torch": torch.__version__},
    }


def rounded(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Scores as results have them: `None` for NaN, without recall by size."""
    return {
        name: None if score != score else round(score, 4)
        for name, score in scores.items()
        if RECALL not in name
    }


def kinds_of(categories: Sequence[Category]) -> dict[int, str]:
    """Number and name of the classes of objects: all but the background."""
    return {n: c.name for n, c in enumerate(categories) if c.name != BACKGROUND}


def with_recall(task: Task, validation: Dataset) -> Callable[[], list[Metric]]:
    """Metrics of the task, and what is found by class and size."""
    return lambda: [*task.metrics(), RecallBySize(validation.categories, SIDES, task.min_score)]


def recall_of(metrics: Sequence[Metric]) -> tuple[float, np.ndarray, np.ndarray]:
    """The share of objects below 32 pixels that is found; found and annotated objects, (K, 4) each,
    by class as in `kinds_of` and by size as `SIDES` divides them."""
    metric = next(m for m in metrics if isinstance(m, RecallBySize))
    kinds, scores = [*kinds_of(metric.categories)], metric.scores()
    found, annotated = scores.found[kinds], scores.annotated[kinds]
    return round(float(found[:, :2].sum() / max(annotated[:, :2].sum(), 1)), 4), found, annotated


@dataclass(frozen=True)
class Trained:
    """A model, what it is scored on, and how.

    Attributes:
        name: for tables.
        weights: digest of the weights and buffers.
    """

    name: str
    weights: str
    model: Model
    task: Task
    validation: Dataset
    recipe: Recipe

    @classmethod
    def open(cls, options: argparse.Namespace) -> Trained:
        """What the arguments of `add_arguments` say."""
        data = [] if options.data is None else [f"data.path={options.data}"]
        recipe = read_recipe(options.recipe, [*data, *options.changes])
        model = create_model(options.model, pretrained=True).eval()
        _, validation = open_data(recipe)
        if validation is None:
            raise ValueError(f"{recipe.data.path}: nothing to be scored on")
        if options.limit is not None:
            validation = validation.subset(range(min(options.limit, len(validation))))
        task = task_of(model, recipe.task, validation.categories)
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update(value.numpy().tobytes())
        name = options.name or name_of(options.model)
        return cls(name, digest.hexdigest()[:16], model, task, validation, recipe)

    def about(self) -> dict[str, Any]:
        """Of each line of the results. `sight`: how it sees pictures, where that is anything but
        whole, at their own size."""
        sight = {name: value for name, value in self.sight().items() if value is not None}
        return {
            "model": self.name,
            "weights": self.weights,
            "data": Path(self.recipe.data.path or "").resolve().name,
            "pictures": len(self.validation),
            "score": MAIN[self.task.name],
            **({"sight": json.loads(json.dumps(sight, default=asdict))} if sight else {}),
            **made_on(),
        }

    def lines(self, results: Path) -> list[dict[str, Any]]:
        """Those of this model on these data that are in a file already."""
        about = self.about()
        same = ("model", "weights", "data", "pictures", "sight")
        return [
            line
            for line in read_lines(results)
            if all(line.get(name) == about.get(name) for name in same)
        ]

    def seen(self, number: int) -> tuple[Any, np.ndarray, list[StageOutput]]:
        """An annotated picture, the scores (K, H, W) of its classes, and the backbone's stages."""
        annotation: Any = self.validation[number]
        image = self.model.preprocess(to_tensor(annotation.read_image()))
        with torch.inference_mode():
            output, stages = self.model(image[None], with_stages=True)
        (decoded,) = self.task.decode(output, [annotation.classes().shape])
        return annotation, decoded.numpy(), stages

    def sight(self) -> dict[str, Any]:
        """How the model sees what it is scored on: arguments of `evaluate`."""
        return {
            "tile": validation_tile(self.recipe, self.task),
            "resize": self.recipe.validation.resize,
            "crop": self.recipe.validation.crop,
            "region": validation_region(self.recipe, self.task),
        }

    def background(self) -> list[int]:
        """The classes that are no object."""
        return [n for n, c in enumerate(self.task.categories) if c.name == BACKGROUND]

    def scores(self) -> dict[str, float | None]:
        """By name, of all that it is scored on; of pictures also the share of "small" objects that
        are found."""
        pictures = not self.model.of_points
        metrics = with_recall(self.task, self.validation) if pictures else None
        result = evaluate(self.model, self.validation, self.task, metrics=metrics, **self.sight())
        scores = rounded(result.scores)
        return {**scores, "small": recall_of(result.metrics)[0]} if pictures else scores

    def multiply_adds(self) -> int:
        """Of a picture of the first one's size, or of a region of points."""
        if self.model.of_points:
            points = validation_region(self.recipe, self.task) or _TYPICAL
            return complexity_of(self.model, points=points).total
        return complexity_of(self.model, *self.validation[0].read_image().shape[:2]).total

    def cpu_seconds(self) -> float:
        """Of the network on a picture, or on a region of points: the median of some."""
        some = range(min(len(self.validation), TIMED))
        return cpu_seconds([self.model], [self._input(number) for number in some])[0]

    def _input(self, number: int) -> Any:
        annotation: Any = self.validation[number]
        if self.model.of_points:
            size = validation_region(self.recipe, self.task) or annotation.tokens.num_tokens
            return next(iter(Regions(annotation.tokens, size))).tokens
        return to_tensor(annotation.read_image())


def cpu_seconds(models: Sequence[Model], inputs: Sequence[Any]) -> list[float]:
    """Of each network on an input, as `Model.preprocess` takes it: medians, taken in turns."""
    times = []
    with torch.inference_mode():
        for each in [inputs[0], *inputs]:  # the first one warms up
            row = []
            for model in models:
                ready = model.preprocess(each)
                ready = ready if model.of_points else ready[None]
                start = time.process_time()
                model(ready)
                row.append(time.process_time() - start)
            times.append(row)
    return [round(median(own), 4) for own in zip(*times[1:], strict=True)]


def name_of(model: str) -> str:
    """In tables: NAME.TAG, or of a file the name of its folder."""
    path = Path(model)
    return path.resolve().parent.name if path.is_file() else model


def add_arguments(parser: argparse.ArgumentParser, results: Path) -> None:
    parser.add_argument("model", nargs="?", help="NAME.TAG or file")
    parser.add_argument("recipe", nargs="?", help="how the data are read and scored: file or name")
    parser.add_argument("data", nargs="?", help="data set (default: the recipe's)")
    parser.add_argument("changes", nargs="*", metavar="field=value", help="of the recipe")
    parser.add_argument("--name", help="of the model in tables (default: its own, or its folder's)")
    parser.add_argument("--limit", type=int, help="score only the first so many pictures")
    parser.add_argument("--results", type=Path, default=results, help="file of the lines")


def measured(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    measure: Callable[[Trained, argparse.Namespace], None],
    page: Callable[[Sequence[dict[str, Any]]], str],
) -> tuple[Path, list[dict[str, Any]]]:
    """What a script does whose parser has `add_arguments`: it adds lines, where a model is named,
    and writes the page of all beside them. Returns the file of the lines, and these."""
    options = parser.parse_intermixed_args(arguments)
    if options.recipe is not None:
        torch.set_num_threads(1)
        measure(Trained.open(options), options)
    elif options.model is not None:
        parser.error("MODEL needs a RECIPE")
    lines = read_lines(options.results)
    options.results.with_suffix(".md").write_text(page(lines), "utf-8")
    return options.results, lines


def measured_once(
    about: str,
    arguments: Sequence[str] | None,
    results: Path,
    measure: Callable[[Trained], dict[str, Any]],
    page: Callable[[Sequence[dict[str, Any]]], str],
) -> None:
    """`measured` for a script that has one line for each model: with what `measure` finds, unless
    it is there. `about` is the script's docstring."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    add_arguments(parser, results)

    def add(trained: Trained, options: argparse.Namespace) -> None:
        if not trained.lines(options.results):
            add_line(options.results, {**trained.about(), **measure(trained)})

    measured(parser, arguments, add, page)


def add_line(results: Path, line: dict[str, Any]) -> None:
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
