"""A run of training in a folder: from a recipe to scores and a model, through interruptions."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import pointformer
from pointformer._files import atomic_path
from pointformer.data import Dataset
from pointformer.data.point_sets import PointDataset
from pointformer.data.statistics import samples_in_words
from pointformer.evaluation import evaluate
from pointformer.metrics import InstanceAP
from pointformer.models import Model, Output, save_model
from pointformer.processes import Processes, started_processes
from pointformer.tasks import Task, task_of
from pointformer.tasks.instance import Instance, InstanceMasks, InstanceStars
from pointformer.train.checkpoints import (
    list_checkpoints,
    newest_checkpoint,
    owned,
    remove_unfinished,
    save_checkpoint,
)
from pointformer.train.curves import save_curves
from pointformer.train.initial import make_model
from pointformer.train.loading import Batch, Batches
from pointformer.train.logs import Logs
from pointformer.train.optimization import Budget
from pointformer.train.pictures import (
    checked,
    crowdedness,
    describe,
    object_diameter,
    open_data,
)
from pointformer.train.recipe import Recipe, write_recipe
from pointformer.train.report import draw_token_maps
from pointformer.train.trainer import Trainer

RECIPE, WEIGHTS, CHECKPOINTS = "recipe.yaml", "model.safetensors", "checkpoints"
"""Files that a run writes into its folder, besides its logs."""
MIN_SCORES = tuple(n / 20 for n in range(4, 20))  # from which objects may be shown, to choose from


class Run:
    """A trainer at work in a folder: what it sees, and what is written.

    Args:
        trainer: as far as it is.
        batches: of the training pictures.
        validation: what the model is scored on; `None`: nothing.
        out: folder of the run.
        say: shows a line.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Batches,
        validation: Dataset | None,
        out: Path,
        say: Callable[[str], None] = tqdm.write,
    ) -> None:
        self.trainer = trainer
        self.batches = batches
        self.validation = validation
        self.out = out
        self.say = say
        self.recipe = trainer.recipe
        self.main = trainer.processes.main
        self.checkpoints = out / CHECKPOINTS
        self.alone = trainer.processes.world == 1
        self.ending = trainer.ending
        self.validations = 0  # that were due on the way
        self.scores: dict[str, float] | None = None  # of the end, once it is reached
        self.min_score: float | None = None  # chosen with the last ones
        self.budget: dict[str, Any] | None = None  # of the run before that this one goes on with

    def resume(self) -> None:
        """Go on from the newest checkpoint that can be read, if there is any.

        Raises:
            ValueError: there are some, but none can be read, or it is of another recipe.
        """
        if self.main:
            remove_unfinished(self.out)
        paths = list_checkpoints(self.checkpoints)
        newest, problems = newest_checkpoint(paths)
        for problem in problems:
            self.say(f"{problem}; an earlier checkpoint is looked for")
        if newest is None and paths:
            raise ValueError(
                f"{self.checkpoints}: no checkpoint can be read; remove the folder to start anew"
            )
        if newest is not None:
            path, state = newest
            self.trainer.load(state, path)
            if state["pictures"] != self.batches.dataset.digest:
                raise ValueError(
                    f"{path}: made with other training pictures; use another --out, and --init to "
                    "start from the weights of this run"
                )
            self.validations, self.scores = state["validations"], state["scores"]
            self.min_score = state["min_score"]
            self.budget = state["recipe"]["budget"]
            self.say(f"goes on from {path.name}")

    def finish(self) -> dict[str, float]:
        """Train until the budget is used up; score and save the averaged weights.

        Raises:
            OSError, FloatingPointError, ValueError: see `train`; the message says which checkpoint
                is from before.
        """
        trainer = self.trainer
        try:
            if trainer.steps == 0:  # one from before, should the first steps fail
                self.save()
            with Logs(self.out, trainer.steps, self.main) as logs:
                if trainer.used < 1:
                    self.scores = None
                    self._train(logs)
                    self.save()
                if self.scores is None:
                    self.scores = self._score(logs, final=True)
                    self.save()
            averaged = trainer.averaged
            averaged.min_score = self.min_score
            if self.main:
                save_model(averaged, self.out / WEIGHTS, trained=self._trained())
                save_curves(self.out)
            self.say(f"the model is in {self.out / WEIGHTS}")
        except (OSError, FloatingPointError, ValueError) as error:
            saved = [path.name for path in list_checkpoints(self.checkpoints)[:1]]
            where = f"{saved[0]} is from before" if saved else "there is no checkpoint"
            text = str(error)
            if isinstance(error, OSError) and error.strerror:
                text = f"{error.filename or self.out}: {error.strerror}"
            kinds = (OSError, FloatingPointError, ValueError)
            kind = next(kind for kind in kinds if isinstance(error, kind))
            raise kind(f"{text}; {where}") from error
        return self.scores

    def save(self) -> None:
        """Write a checkpoint."""
        state = {
            **self.trainer.state(),
            "pictures": self.batches.dataset.digest,  # on whose order the run depends
            "validations": self.validations,
            "scores": self.scores,
            "min_score": self.min_score,
        }
        if self.main:
            keep = self.recipe.checkpoints.keep
            save_checkpoint(self.checkpoints, self.trainer.steps, state, keep)

    def _train(self, logs: Logs) -> None:
        trainer, often, ending = self.trainer, self.recipe.checkpoints, self.ending
        saved_step, saved_seconds = trainer.steps, trainer.seconds
        logged_step, worked, waited, loading, done = trainer.steps, 0.0, 0.0, 0.0, 0
        steps = self.batches.steps(trainer.steps)
        bar = tqdm(
            disable=not self.main,
            total=100.0,
            initial=round(100 * trainer.used, 2),
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
        )
        with contextlib.closing(steps), bar, ending.awaited():
            while trainer.used < 1:
                due = int(trainer.used * (self.recipe.validation.times + 1))
                if due > self.validations:
                    if trainer.steps > saved_step:
                        self.save()
                        saved_step, saved_seconds = trainer.steps, trainer.seconds
                    with ending.at_once():
                        self._score(logs)
                    self.validations = due
                start = time.perf_counter()
                batch = self._next(steps)
                waited += time.perf_counter() - start
                loading += batch.seconds / max(1, self.recipe.workers)
                # The first step compiles kernels or loads them: nothing is lost with it, and it
                # counts as long as the second.
                with ending.at_once() if done == 0 else contextlib.nullcontext():
                    trainer.step(batch)
                lasted = time.perf_counter() - start
                worked += lasted
                trainer.clock += lasted * (0, 2, 1)[min(done, 2)]
                done += 1
                bar.update(100 * trainer.used - bar.n)
                if trainer.steps % self.recipe.log_every == 0 or trainer.used >= 1:
                    trainer.check()
                    pictures = (trainer.steps - logged_step) * self.recipe.batch
                    rate = pictures / worked
                    loss = self._log(logs, rate, pictures / loading, waited / worked)
                    bar.set_postfix_str(
                        f"step {trainer.steps}, loss {loss:.3f}, {rate:.1f} samples/s",
                        refresh=False,
                    )
                    logged_step, worked, waited, loading = trainer.steps, 0.0, 0.0, 0.0
                ends = trainer.ends or (self.alone and ending.told > 0)
                if (
                    ends
                    or trainer.seconds - saved_seconds >= 60 * often.minutes
                    or (often.steps is not None and trainer.steps - saved_step >= often.steps)
                ):
                    self.save()
                    saved_step, saved_seconds = trainer.steps, trainer.seconds
                if ends:
                    self._say_end()
                    ending.end()
        if ending.told:
            self.save()
            ending.end()

    def _next(self, steps: Iterator[Batch]) -> Batch:
        """The next batch. It may be long in coming: who is told to end meanwhile saves and ends,
        but for one of several processes, whom the others wait for in the step."""
        if not self.alone:
            return next(steps)
        try:
            with self.ending.at_once():
                return next(steps)
        except (KeyboardInterrupt, SystemExit):
            self.save()
            self._say_end()
            raise

    def _say_end(self) -> None:
        self.say(f"told to end at step {self.trainer.steps}; the same command goes on")

    def _log(self, logs: Logs, rate: float, loaded: float, waiting: float) -> float:
        """Write what was since the last line: pictures per second, those that could be loaded, the
        share of the time that was waited for them, and more; the mean loss."""
        trainer = self.trainer
        recent, trainer.recent = trainer.recent, []
        row = {
            "epoch": trainer.steps / trainer.epoch_steps,
            "seconds": trainer.seconds,
            **{name: float(np.mean([values[name] for values in recent])) for name in recent[0]},
            "learning_rate": trainer.learning_rate,
            "images_per_second": rate,
            "loaded_per_second": loaded,
            "waiting": waiting,
        }
        logs.add_training(trainer.steps, row)
        return row["loss"]

    def _score(self, logs: Logs, final: bool = False) -> dict[str, float]:
        """Score the averaged weights, on the way on some pictures, at the end on all; objects are
        shown from the score on that is best there."""
        if self.validation is None:
            return {}
        trainer, some = self.trainer, list(range(len(self.validation)))
        processes, averaged, task = trainer.processes, trainer.averaged, trainer.task
        metrics = None
        if isinstance(task, InstanceStars | InstanceMasks):
            metrics = partial(task.metrics, MIN_SCORES)
        if not final:
            order = np.random.default_rng(0).permutation(len(some))
            some = order[: self.recipe.validation.pictures].tolist()
        result = evaluate(
            averaged,
            self.validation.subset(some),
            task,
            metrics=metrics,
            progress=partial(tqdm, desc="validation", leave=False, disable=not self.main),
            tile=validation_tile(self.recipe, task),
            resize=self.recipe.validation.resize,
            crop=self.recipe.validation.crop,
            region=validation_region(self.recipe, task),
            processes=processes,
            **self.recipe.data.reading,
        )
        for metric in result.metrics:
            if metrics is not None and isinstance(metric, InstanceAP):
                self.min_score = metric.best_min_score()
        row = {"final": int(final), "pictures": result.pictures, **result.scores}
        logs.add_scores(trainer.steps, row)
        shown = [self.validation[index] for index in some[: self.recipe.validation.token_maps]]
        if self.main and not trainer.model.of_points:
            draw_token_maps(averaged, shown, self.out, trainer.steps, self.recipe.data.reading)
        first = ", ".join(f"{name} {value:.3f}" for name, value in list(result.scores.items())[:3])
        many = samples_in_words(result.pictures, task.counts)
        self.say(f"step {trainer.steps}, {many}: {first}")
        return result.scores

    def _trained(self) -> dict[str, Any]:
        """Description of the training for the file of the weights, which others will read: names of
        files and folders, but not where they are on this machine."""
        recipe = asdict(self.recipe)
        name = Path(self.recipe.data.path or "").resolve().name
        recipe["data"]["path"] = name
        if self.recipe.init is not None:
            recipe["init"] = Path(self.recipe.init).name
        return {
            "recipe": recipe,
            "data": name,
            "pictures": self.batches.dataset.digest,
            "steps": self.trainer.steps,
            "minutes": round(self.trainer.seconds / 60, 1),
            "scores": {k: v if math.isfinite(v) else None for k, v in (self.scores or {}).items()},
            "pointformer": pointformer.__version__,
        }


def train(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    say: Callable[[str], None] = tqdm.write,
) -> dict[str, float]:
    """Train, or go on with an interrupted run, until the budget is used up; return the scores then.

    In `out` there are then recipe.yaml, data/ (what is in the pictures), checkpoints/, log.csv,
    scores.csv, curves.png, tokens/, tensorboard/ and model.safetensors, which `create_model` takes.

    Args:
        device: "cuda" is a GPU for each process of `torchrun`.
        out: folder of a new run, or of one with the same recipe, which goes on from its newest
            checkpoint; the budget and what does not change the result may be others. A run that is
            done and had more than the budget stays as it is.
        say: shows a line.

    Raises:
        ValueError, TypeError: the recipe, the data or a checkpoint cannot be used, or another
            command trains in `out`.
        OSError: something cannot be read or written; the checkpoints before it are still there.
        FloatingPointError: the loss is not finite; the message names the pictures.
    """
    out = Path(out)
    if recipe.budget == Budget():
        raise ValueError("budget: expected steps, epochs or minutes, as in budget.epochs=20")
    check_folder(out)
    with started_processes(device) as processes, contextlib.ExitStack() as stack:
        speak = say if processes.main else _silent
        training, validation = processes.alike(lambda: open_data(recipe))
        # What cannot be is said before all is read.
        model, task = processes.alike(lambda: _made(recipe, training, processes))
        processes.alike(lambda: stack.enter_context(owned(out)) if processes.main else None)
        reading = recipe.data.reading
        training, statistics = checked(
            training, task, out / "data" / "train.json", processes, reading
        )
        processes.alike(statistics.check)
        if validation is not None:
            validation, scored = checked(
                validation, task, out / "data" / "val.json", processes, reading
            )
            about = f"{validation.source} (to be scored on; see data.val and data.val_share)"
            processes.alike(lambda: scored.check_content(about))
        if not (out / RECIPE).exists():
            describe(training, validation, statistics, recipe, model, speak)
        if isinstance(task, Instance):
            model.object_diameter = object_diameter(statistics)
        trainer = Trainer(recipe, model, task, len(training), processes)
        batches = Batches(
            training,
            recipe.augmentation.transform(isinstance(training, PointDataset)),
            batch=recipe.batch,
            reading=reading,
            seed=recipe.seed,
            workers=recipe.workers,
            pin=processes.device.type == "cuda",
            rank=processes.rank,
            world=processes.world,
            accumulate=recipe.accumulate,
            weights=crowdedness(statistics) if recipe.data.draw == "by_objects" else None,
        )
        run = Run(trainer, batches, validation, out, speak)
        processes.alike(run.resume)
        over = run.budget not in (None, asdict(recipe.budget)) and trainer.used >= 1
        if over and run.scores is not None and (out / WEIGHTS).is_file():
            speak(
                f"nothing to train: {trainer.steps} steps are done, which is all of this budget; "
                f"{out} is as it was"
            )
            return run.scores
        if processes.main:
            with atomic_path(out / RECIPE) as temporary:
                temporary.write_text(write_recipe(recipe), "utf-8")
        return run.finish()


def _made(recipe: Recipe, training: Dataset, processes: Processes) -> tuple[Model, Task]:
    own = recipe.batch // (processes.world * recipe.accumulate)
    if processes.world > 1 and recipe.augmentation.mix is not None and own % 2:
        raise ValueError(
            "augmentation.mix: mixes pictures two by two; expected an even number of pictures per "
            f"process and part of a batch, got {own}"
        )
    channels = training.channels if isinstance(training, PointDataset) else None
    model = make_model(recipe, training.categories, channels)
    if recipe.rates is not None:
        recipe.rates.check(model)
    fast = processes.device.type == "cpu" and model.backbone.impl != "reference"
    if recipe.strategy == "fsdp" and processes.world > 1 and fast:
        # They hold weights as NumPy arrays, whose memory fully_shard could not free.
        raise ValueError(
            "strategy: 'fsdp' does not work with the CPU's kernels; use ddp, or options.impl="
            "reference"
        )
    return model, task_of(model, recipe.task, training.categories, **recipe.loss)


def _silent(line: str) -> None:
    pass


def validation_tile(recipe: Recipe, task: Task) -> int | None:
    """Side of the windows to score in: queries know their place in a window and how many objects it
    can have."""
    tile, crop = recipe.validation.tile, recipe.augmentation.crop
    if tile is None and task.output is Output.MASKS and crop is not None:
        return crop.size if isinstance(crop.size, int) else min(crop.size)
    return tile


def validation_region(recipe: Recipe, task: Task) -> int | None:
    """Points of the regions to score scenes in: those of training."""
    region = recipe.augmentation.points.region
    return None if region is None or task.output is not Output.POINT_CLASSES else region.points


def check_folder(out: Path) -> None:
    """Raise `ValueError` where a new run would replace what another program wrote."""
    if (out / RECIPE).exists():
        if (out / CHECKPOINTS).exists() and not (out / CHECKPOINTS).is_dir():
            raise ValueError(f"{out / CHECKPOINTS}: expected the folder of a run, this is a file")
        return
    for name in (WEIGHTS, CHECKPOINTS, "log.csv", "scores.csv"):
        if os.path.lexists(out / name):
            raise ValueError(f"{out / name}: is there, but no {RECIPE} of a run; use another --out")
