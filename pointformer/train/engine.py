"""The training engine: any model, any task, any data set.

A step depends on the recipe, the weights and its number only: the order of the pictures, and all
random numbers, are functions of the seed and the step. So a run that was ended at any moment and
continued from a checkpoint is, bit for bit, the run that was not, given as many threads on the same
kind of machine: torch's sums depend on these.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pointformer
from pointformer._files import atomic_path
from pointformer.data import Annotation, Category, Dataset, open_splits
from pointformer.data.statistics import Statistics, examine, without_bad
from pointformer.evaluation import evaluate
from pointformer.models import Model, Output, create_model, load_released, save_model
from pointformer.models.state import is_safetensors
from pointformer.processes import Processes, started_processes
from pointformer.tasks import Task, task_of
from pointformer.train.checkpoints import (
    list_checkpoints,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from pointformer.train.ending import Ending
from pointformer.train.loading import Batch, Batches
from pointformer.train.logs import Logs
from pointformer.train.optimization import Average, Budget, clip_gradients
from pointformer.train.recipe import Recipe, write_recipe
from pointformer.train.report import draw_token_maps, save_curves

RECIPE, WEIGHTS, CHECKPOINTS = "recipe.yaml", "model.safetensors", "checkpoints"
"""What a run writes into its folder, besides its logs."""

_FORMAT = 1
_BORDER_CLASSES = 3  # background, inside, border


def make_model(recipe: Recipe, categories: Sequence[Category]) -> Model:
    """The model in the state that a run starts from.

    Raises:
        ValueError, TypeError: model, head, options, initial weights or classes do not fit.
    """
    task, kinds = recipe.task, len(categories)
    head = recipe.head
    if head is None:
        simple = "classification" if task == "classification" else "dense"
        many = task == "panoptic" or (task == "instance" and kinds > 1)
        head = "mask2former" if many else simple
    options: dict[str, Any] = {"head": head, "task": task, "categories": list(categories)}
    if (head, task) == ("dense", "instance"):
        if kinds > 1:
            raise ValueError(
                f"head: 'dense' finds objects of one class, the data set has {kinds}; use "
                "mask2former"
            )
        kinds = _BORDER_CLASSES
    options |= {"num_classes": kinds, **recipe.options}
    name, trained = recipe.model, None
    if recipe.init is not None and recipe.init_stages is not None:
        trained = _trained_model(recipe)
        name = name or trained.name
    torch.manual_seed(recipe.seed)
    if recipe.init is None or trained is not None:
        model = create_model(name or "aff_tiny", pretrained=False, **options)
    else:
        model = _trained_model(recipe, **options)
    if trained is not None and recipe.init_stages is not None:
        _copy_stages(trained, model, recipe.init_stages)
    if name not in (None, model.name):
        raise ValueError(f"init: {recipe.init} holds weights of {model.name}, not of {name}")
    return model


def _trained_model(recipe: Recipe, **options: Any) -> Model:
    """The model that `init` stands for: of a tag, in a file of ours, or a released checkpoint."""
    init = recipe.init
    assert init is not None
    if not os.path.isfile(init) or is_safetensors(init):
        return create_model(init, pretrained=True, **options)
    if recipe.model is None:
        raise ValueError(f"model: needed, as {init} does not say what it holds")
    return load_released(init, recipe.model, **options)


def _copy_stages(trained: Model, model: Model, stages: int) -> None:
    if not 0 <= stages <= len(model.config.dims):
        raise ValueError(f"init_stages: expected 0 to {len(model.config.dims)}, got {stages}")
    source: Any = trained.backbone
    target: Any = model.backbone
    parts: list[tuple[Any, Any]] = [(source.patch_embed, target.patch_embed)]
    parts += list(zip(source.stages, target.stages, strict=True))[:stages]
    try:
        for old, new in parts:
            new.load_state_dict(old.state_dict())
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"init: the backbone of {trained.name} does not fit: {first}") from None


class Trainer:
    """A model in training: weights, their average, optimizer, and what of the budget is used.

    Args:
        pictures: how many there are in a pass.
        processes: that train together; each has its part of every batch.

    Attributes:
        averaged: what is scored and saved; all processes ask for it together.
        steps, seconds: done so far.
        clock: seconds by this process's own clock, from which all agree on `seconds`.
        ending: whether this process was told to end; `ends`: whether any was.
        recent: of the steps since the last line of the log, terms of the loss and more, as means
            over all processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        task: Task,
        pictures: int,
        processes: Processes | None = None,
    ) -> None:
        self.recipe = recipe
        self.processes = processes = processes or Processes()
        self.model = model.to(processes.device)
        self.task = task
        self.epoch_steps = pictures / recipe.batch
        if recipe.freeze_batch_norm:
            for norm in _batch_norms(model):
                norm.requires_grad_(False)
        model.set_grad_checkpointing(recipe.gradient_checkpointing)
        model.set_batch_part(processes.part)
        self.average = Average(model, recipe.average) if recipe.average else None
        self._unsharded = None
        if recipe.strategy == "fsdp" and processes.world > 1:
            self._unsharded = copy.deepcopy(model).requires_grad_(False).cpu()
            if self.average is not None:
                processes.wrapped(self.average.model, recipe.strategy)
        self.wrapped = processes.wrapped(model, recipe.strategy)
        self.optimizer = recipe.optimizer.make(model, recipe.batch)
        self.steps = 0
        self.seconds = self.clock = 0.0
        self.ending, self.ends = Ending(), False
        self.recent: list[dict[str, float]] = []
        self._unchecked: tuple[int, list[str], dict[str, Tensor]] | None = None

    @property
    def averaged(self) -> Model:
        model = self.model if self.average is None else self.average.model
        if self._unsharded is None:
            return model
        self._unsharded.load_state_dict(self.processes.whole(model.state_dict()))
        whole = self._unsharded.to(self.processes.device).train(model.training)
        self.processes.same_buffers(whole)
        return whole

    @property
    def learning_rate(self) -> float:
        """Of the last step, the highest of all groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @property
    def used(self) -> float:
        """Share of the budget."""
        return self.recipe.budget.used(self.steps, self.seconds, self.epoch_steps)

    def step(self, batch: Batch) -> None:
        """One update.

        Raises:
            FloatingPointError: the loss or the gradient of the step before is not finite.
            ValueError: the model cannot take these pictures; the message names them.
        """
        recipe = self.recipe
        self.model.train()
        if recipe.freeze_batch_norm:
            for norm in _batch_norms(self.model):
                norm.eval()
        torch.manual_seed(_seed_of(recipe.seed, self.steps))
        factor = recipe.schedule.factor(self.used)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        self.optimizer.zero_grad()
        try:
            total = self._gradients(batch)
        except ValueError as error:
            self.check()  # weights of a step before that went wrong are no fault of these pictures
            where = f"step {self.steps}, with {', '.join(batch.names)}"
            raise ValueError(f"{error} (at {where})") from error
        gradient = clip_gradients(self.model, recipe.optimizer.clip).detach()
        total["gradient"] = self.processes.whole(gradient)
        self.check()
        self._unchecked = self.steps, batch.names, total
        self.optimizer.step()
        self.steps += 1
        if self.average is not None:
            self.average.update(self.model, self.steps)

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """The loss and its terms, and their gradients in the parameters."""
        total: dict[str, Tensor] = {}
        for number, (images, truth, share) in enumerate(self._parts(batch), 1):
            last = number == self.recipe.accumulate
            with self.processes.accumulating(self.wrapped, last):
                terms = self._mixed_loss(images, truth)
                loss = torch.stack(list(terms.values())).sum()
                (share * loss).backward()
            for name, term in {"loss": loss, **terms}.items():
                total[name] = total.get(name, 0) + share * term.detach()
        return total

    def _parts(self, batch: Batch) -> Iterator[tuple[Any, list[Annotation], float]]:
        """Parts of a batch, normalized, and their shares of it."""
        size = math.ceil(len(batch.annotations) / self.recipe.accumulate)
        for first in range(0, len(batch.annotations), size):
            some = slice(first, first + size)
            annotations = batch.annotations[some]
            yield (
                self._normalized(batch.images[some]),
                annotations,
                len(annotations) / len(batch.annotations),
            )

    def _normalized(self, images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(images, Tensor):
            return self.model.preprocess(images.to(self.processes.device, non_blocking=True))
        return [self._normalized(image) for image in images]  # type: ignore[misc]

    def _mixed_loss(self, images: Any, annotations: Sequence[Annotation]) -> dict[str, Tensor]:
        """The loss of mixtures of pictures, where the recipe mixes them."""
        mix = self.recipe.augmentation.mix
        if mix is None:
            return self._loss(images, annotations)
        if not isinstance(images, Tensor):
            raise ValueError(
                "augmentation.mix: needs pictures of one size, such as of resized_crop"
            )
        rng = np.random.default_rng([self.recipe.seed, self.steps])  # the same in each part
        images, partners, share = mix(images, rng)
        output = self._output(images)
        others = [annotations[index] for index in partners.tolist()]
        part = self.processes.part
        terms = self.task.loss(output, annotations, part)
        return {
            name: share * terms[name] + (1 - share) * term
            for name, term in self.task.loss(output, others, part).items()
        }

    def _loss(self, images: Any, annotations: Sequence[Annotation]) -> dict[str, Tensor]:
        return self.task.loss(self._output(images), annotations, self.processes.part)

    def _output(self, images: Any) -> Any:
        half = self.recipe.precision == "bfloat16"
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=half):
            return self.wrapped(images)

    def check(self) -> None:
        """Look at the loss of the last step, which on a GPU is known by the next one, and agree
        with the other processes on what it was, and on the time.

        Raises:
            FloatingPointError: it, or the gradient, is not finite; the message names the pictures.
        """
        if self._unchecked is None:
            return
        step, names, total = self._unchecked
        self._unchecked = None
        numbers = torch.stack([value.double() for value in total.values()])
        more = numbers.new_tensor([self.clock, self.ending.told > 0])
        found = self.processes.mean(torch.cat([numbers, more])).tolist()
        values = dict(zip(total, found, strict=False))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            own = [] if numbers.isfinite().all() else names
            pictures = [name for some in self.processes.gathered(own) for name in some]
            raise FloatingPointError(
                f"the {bad[0]} is {values[bad[0]]} at step {step}, with {', '.join(pictures)}"
            )
        self.seconds, told = found[-2:]
        self.ends = told > 0
        self.recent.append(values)

    def state(self) -> dict[str, Any]:
        """All that a run continues from; the same however many processes there are, and all of them
        ask for it together."""
        self.check()
        return {
            "format": _FORMAT,
            "recipe": asdict(self.recipe),
            "steps": self.steps,
            "seconds": self.seconds,
            "recent": self.recent,
            **self.processes.whole(
                {
                    "model": self.model.state_dict(),
                    "average": None if self.average is None else self.average.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                }
            ),
        }

    def load(self, state: dict[str, Any], source: object) -> None:
        """Continue from `state()`; the budget and what does not change the result may be others.

        Raises:
            ValueError: naming the source and the fields in which the recipe differs.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"{source}: expected a checkpoint of format {_FORMAT}")
        differing = self.recipe.differences(state["recipe"])
        if differing:
            raise ValueError(f"{source}: made with another recipe: {'; '.join(differing)}")
        models = {
            "model": self.model,
            "average": None if self.average is None else self.average.model,
        }
        for name, model in models.items():
            if model is not None:
                own = self.processes.sharded(state[name], model.state_dict())
                model.load_state_dict(own)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = state["optimizer"]["state"]
        own = self.processes.sharded(moments, dict(enumerate(parameters)))
        self.optimizer.load_state_dict({**state["optimizer"], "state": own})
        self.steps = state["steps"]
        self.seconds = self.clock = state["seconds"]
        self.recent = list(state["recent"])


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _seed_of(seed: int, step: int) -> int:
    """Of the model's random numbers in a step, for all processes; see `BatchPart`."""
    sequence = np.random.SeedSequence([seed, step])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


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
        self.ending = trainer.ending
        self.validations = 0  # that were due on the way
        self.scores: dict[str, float] | None = None  # of the end, once it is reached

    def resume(self) -> None:
        """Go on from the newest checkpoint that can be read, if there is any.

        Raises:
            ValueError: there are some, but none can be read, or it is of another recipe.
        """
        if self.main:
            for folder in (self.out, self.checkpoints):
                remove_unfinished(folder)
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
            if state["pictures"] != self._pictures():
                raise ValueError(
                    f"{path}: made with other training pictures; use another --out, and --init to "
                    "start from the weights of this run"
                )
            self.validations, self.scores = state["validations"], state["scores"]
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
            "pictures": self._pictures(),
            "validations": self.validations,
            "scores": self.scores,
        }
        if self.main:
            keep = self.recipe.checkpoints.keep
            save_checkpoint(self.checkpoints, self.trainer.steps, state, keep)

    def _pictures(self) -> str:
        """A digest of the names, on whose order the run depends."""
        names = [entry.name for entry in self.batches.dataset.entries]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def _train(self, logs: Logs) -> None:
        trainer, often, ending = self.trainer, self.recipe.checkpoints, self.ending
        saved_step, saved_seconds = trainer.steps, trainer.seconds
        logged_step, logged_seconds, waited = trainer.steps, trainer.seconds, 0.0
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
                batch = next(steps)
                waited += time.perf_counter() - start
                trainer.step(batch)
                trainer.clock += time.perf_counter() - start
                bar.update(100 * trainer.used - bar.n)
                if trainer.steps % self.recipe.log_every == 0 or trainer.used >= 1:
                    trainer.check()
                    seconds = max(trainer.seconds - logged_seconds, 1e-9)
                    rate = (trainer.steps - logged_step) * self.recipe.batch / seconds
                    loss = self._log(logs, rate, waited / seconds)
                    bar.set_postfix_str(
                        f"step {trainer.steps}, loss {loss:.3f}, {rate:.1f} images/s",
                        refresh=False,
                    )
                    logged_step, logged_seconds, waited = trainer.steps, trainer.seconds, 0.0
                if (
                    trainer.ends
                    or trainer.seconds - saved_seconds >= 60 * often.minutes
                    or (often.steps is not None and trainer.steps - saved_step >= often.steps)
                ):
                    self.save()
                    saved_step, saved_seconds = trainer.steps, trainer.seconds
                if trainer.ends:
                    self.say(f"told to end at step {trainer.steps}; the same command goes on")
                    ending.end()
        if ending.told:
            self.save()
            ending.end()

    def _log(self, logs: Logs, rate: float, waiting: float) -> float:
        """Write what was since the last line; the mean loss."""
        trainer = self.trainer
        recent, trainer.recent = trainer.recent, []
        row = {
            "epoch": trainer.steps / trainer.epoch_steps,
            "seconds": trainer.seconds,
            **{name: float(np.mean([values[name] for values in recent])) for name in recent[0]},
            "learning_rate": trainer.learning_rate,
            "images_per_second": rate,
            "waiting": waiting,
        }
        logs.add_training(trainer.steps, row)
        return row["loss"]

    def _score(self, logs: Logs, final: bool = False) -> dict[str, float]:
        """Score the averaged weights: at the end on all pictures, before on some."""
        if self.validation is None:
            return {}
        trainer, some = self.trainer, list(range(len(self.validation)))
        processes, averaged = trainer.processes, trainer.averaged
        if not final:
            order = np.random.default_rng(0).permutation(len(some))
            some = order[: self.recipe.validation.pictures].tolist()
        own = self.validation.subset(processes.own(some))
        result = evaluate(
            averaged,
            own,
            trainer.task,
            annotations=tqdm(own, "validation", leave=False, disable=not self.main),
            tile=validation_tile(self.recipe, trainer.task),
            transform=self.recipe.validation.transform(),
            processes=processes,
        )
        row = {"final": int(final), "pictures": result.pictures, **result.scores}
        logs.add_scores(trainer.steps, row)
        shown = [self.validation[index] for index in some[: self.recipe.validation.token_maps]]
        if self.main:
            draw_token_maps(averaged, shown, self.out, trainer.steps)
        first = ", ".join(f"{name} {value:.3f}" for name, value in list(result.scores.items())[:3])
        self.say(f"step {trainer.steps}, {result.pictures} pictures: {first}")
        return result.scores

    def _trained(self) -> dict[str, Any]:
        """What the file of the weights says of their training."""
        return {
            "recipe": asdict(self.recipe),
            "data": Path(self.recipe.data.path or "").resolve().name,
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
            checkpoint; the budget and what does not change the result may be others.
        say: shows a line.

    Raises:
        ValueError, TypeError: the recipe, the data or a checkpoint cannot be used.
        OSError: something cannot be read or written; the checkpoints before it are still there.
        FloatingPointError: the loss is not finite; the message names the pictures.
    """
    out = Path(out)
    if recipe.budget == Budget():
        raise ValueError("budget: expected steps, epochs or minutes, as in budget.epochs=20")
    check_folder(out)
    with started_processes(device) as processes:
        speak = say if processes.main else _silent
        training, validation = processes.alike(lambda: open_data(recipe))
        categories = training.categories
        # What cannot be is said before all is read.
        model, task = processes.alike(lambda: _made(recipe, categories, processes))
        training, statistics = _checked(training, recipe, out / "data" / "train.json", processes)
        processes.alike(statistics.check)
        if validation is not None:
            validation, _ = _checked(validation, recipe, out / "data" / "val.json", processes)
        if not (out / RECIPE).exists():
            _describe(training, validation, statistics, recipe, model, speak)
        if task.name == "instance":
            model.object_diameter = object_diameter(statistics)
        trainer = Trainer(recipe, model, task, len(training), processes)
        batches = Batches(
            training,
            recipe.augmentation.transform(),
            batch=recipe.batch,
            seed=recipe.seed,
            workers=recipe.workers,
            pin=processes.device.type == "cuda",
            rank=processes.rank,
            world=processes.world,
            accumulate=recipe.accumulate,
            weights=_weights(statistics) if recipe.data.draw == "by_objects" else None,
        )
        run = Run(trainer, batches, validation, out, speak)
        processes.alike(run.resume)
        if processes.main:
            out.mkdir(parents=True, exist_ok=True)
            with atomic_path(out / RECIPE) as temporary:
                temporary.write_text(write_recipe(recipe), "utf-8")
        return run.finish()


def _made(
    recipe: Recipe, categories: Sequence[Category], processes: Processes
) -> tuple[Model, Task]:
    own = recipe.batch // (processes.world * recipe.accumulate)
    if processes.world > 1 and recipe.augmentation.mix is not None and own % 2:
        raise ValueError(
            "augmentation.mix: mixes pictures two by two; expected an even number of pictures per "
            f"process and part of a batch, got {own}"
        )
    model = make_model(recipe, categories)
    fast = processes.device.type == "cpu" and model.backbone.impl != "reference"
    if recipe.strategy == "fsdp" and processes.world > 1 and fast:
        # They hold weights as NumPy arrays, whose memory fully_shard could not free.
        raise ValueError(
            "strategy: 'fsdp' does not work with the CPU's kernels; use ddp, or options.impl="
            "reference"
        )
    return model, task_of(model, recipe.task, categories, **recipe.loss)


def _silent(line: str) -> None:
    pass


def validation_tile(recipe: Recipe, task: Task) -> int | None:
    """Side of the windows to score in: queries know their place in a window and how many objects it
    can have."""
    tile, crop = recipe.validation.tile, recipe.augmentation.crop
    if tile is None and task.output is Output.MASKS and crop is not None:
        return crop.size if isinstance(crop.size, int) else min(crop.size)
    return tile


def check_folder(out: Path) -> None:
    """Raise `ValueError` where a new run would replace what another program wrote."""
    if (out / RECIPE).exists():
        return
    for name in (WEIGHTS, CHECKPOINTS, "log.csv", "scores.csv"):
        if os.path.lexists(out / name):
            raise ValueError(f"{out / name}: is there, but no {RECIPE} of a run; use another --out")


def _weights(statistics: Statistics) -> np.ndarray:
    """How often pictures are drawn: more where there is more to see, but not in proportion."""
    return np.sqrt([1.0 + len(facts.areas) for facts in statistics.good])


def _checked(
    dataset: Dataset, recipe: Recipe, kept: Path, processes: Processes
) -> tuple[Dataset, Statistics]:
    """The pictures that can be read, see `without_bad`, and what is in them.

    Args:
        kept: a file that spares the next start from reading all of them again.
    """
    statistics: Statistics | None = None
    for first in (True, False):  # the others take what the first has found
        read = partial(examine, dataset, recipe.task, cache=kept, progress=first)
        found = processes.alike(read if processes.main == first else lambda: None)
        statistics = found or statistics
    assert statistics is not None
    return without_bad(dataset, statistics), statistics


def _describe(
    training: Dataset,
    validation: Dataset | None,
    statistics: Statistics,
    recipe: Recipe,
    model: Model,
    say: Callable[[str], None],
) -> None:
    """Say what the model is to learn from, and where a setting will not do well."""
    say(f"{training.source}: {'; '.join(statistics.lines())}")
    scored = "no pictures to be scored on" if validation is None else (
        f"{validation.source}: {len(validation)} pictures to be scored on"
    )  # fmt: skip
    say(scored)
    for dataset in (training, validation):
        for problem in {} if dataset is None else dataset.skipped.values():
            say(f"left out: {problem}")
    crop, size, scale = recipe.augmentation.crop, None, 1.0
    if crop is not None and crop.measure == "pixels":
        size = (crop.size, crop.size) if isinstance(crop.size, int) else crop.size
        scale = max(crop.scales)
    token = getattr(model.config, "patch_stride", 4)
    for advice in statistics.advice(token, size, scale):
        say(f"advice: {advice}")


def object_diameter(statistics: Statistics) -> float | None:
    """Of a typical object, in pixels, as of a disk of its area: the median over pictures of the
    pictures' medians; `None` without objects."""
    areas = [np.median(facts.areas) for facts in statistics.good if facts.areas]
    return round(2 * math.sqrt(float(np.median(areas)) / math.pi), 1) if areas else None


def open_data(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """The pictures to learn from, and those to be scored on."""
    data = recipe.data
    if data.path is None:
        raise ValueError("data.path: expected the folder of a data set")
    return open_splits(
        data.path,
        data.format,
        recipe.task,
        train=data.train,
        val=data.val,
        val_share=data.val_share,
        seed=recipe.seed,
        categories=data.categories,
        void=data.void,
        skip_bad=data.skip_bad,
    )
