"""A step of training: of any model, any task, any data set.

A step depends on the recipe, the weights and its number only: the order of the pictures, and all
random numbers, are functions of the seed and the step. So a run that was ended at any moment and
continued from a checkpoint is, bit for bit, the run that was not, given as many threads on the same
kind of machine: torch's sums depend on these.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pointformer import TokenSet
from pointformer.data import Annotation
from pointformer.models import Model
from pointformer.models.backbone import StageOutput
from pointformer.processes import Processes
from pointformer.tasks import Task
from pointformer.tasks.scores import score_loss
from pointformer.train.ending import Ending
from pointformer.train.loading import Batch
from pointformer.train.optimization import Average, clip_gradients
from pointformer.train.recipe import Recipe

_FORMAT = 1  # of `Trainer.state`
_RATES = 2  # what random numbers are for, besides those of `loading`


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
        self._names: list[str] = []  # pictures of the last step

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
            with self._drawn_rates():
                total = self._gradients(batch)
        except ValueError as error:
            self.check()  # weights of a step before that went wrong are no fault of these pictures
            self._check_weights()
            where = f"step {self.steps}, with {', '.join(batch.names)}"
            raise ValueError(f"{error} (at {where})") from error
        gradient = clip_gradients(self.model, recipe.optimizer.clip).detach()
        total["gradient"] = self.processes.whole(gradient)
        self.check()
        self._unchecked = self.steps, batch.names, total
        self._names = batch.names
        self.optimizer.step()
        self.steps += 1
        if self.average is not None:
            self.average.update(self.model, self.steps)

    def _drawn_rates(self) -> contextlib.AbstractContextManager[None]:
        """The model at the rates of this step, the same in all processes."""
        if self.recipe.rates is None:
            return contextlib.nullcontext()
        seeds = np.random.SeedSequence(self.recipe.seed, spawn_key=(_RATES, self.steps))
        rates = self.recipe.rates.draw(self.model, np.random.default_rng(seeds))
        return self.model.reconfigured(rate=rates)

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

    def _normalized(self, images: Any) -> Any:
        if isinstance(images[0], TokenSet):
            images = TokenSet.cat(images)
        if isinstance(images, Tensor | TokenSet):
            return self.model.preprocess(images.to(self.processes.device, non_blocking=True))
        return [self._normalized(image) for image in images]

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
        output, _ = self._output(images)
        others = [annotations[index] for index in partners.tolist()]
        part = self.processes.part
        terms = self.task.loss(output, annotations, part)
        return {
            name: share * terms[name] + (1 - share) * term
            for name, term in self.task.loss(output, others, part).items()
        }

    def _loss(self, images: Any, annotations: Sequence[Annotation]) -> dict[str, Tensor]:
        output, stages = self._output(images)
        part, weight = self.processes.part, self.recipe.score_weight
        terms = self.task.loss(output, annotations, part)
        if weight:
            stride = self.model.image_config.patch_stride
            terms["scores"] = weight * score_loss(stages, annotations, stride, part)
        return terms

    def _output(self, images: Any) -> tuple[Any, list[StageOutput]]:
        """Of the model, and what its backbone gave where the scores have a loss."""
        half = self.recipe.precision == "bfloat16"
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=half):
            if not self.recipe.score_weight:
                return self.wrapped(images), []
            return self.wrapped(images, with_stages=True)

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
            own = [] if math.isfinite(float(total[bad[0]])) else names
            pictures = [name for some in self.processes.gathered(own) for name in some]
            if not self.processes.main:
                raise SystemExit(1)  # the main process says it for all
            raise FloatingPointError(
                f"the {bad[0]} is {values[bad[0]]} at step {step}, with {', '.join(pictures)}; "
                "a lower optimizer.learning_rate may help"
            )
        self.seconds, told = found[-2:]
        self.ends = told > 0
        self.recent.append(values)

    def _check_weights(self) -> None:
        """Look at what the last step has made, of which no loss is known yet.

        Raises:
            FloatingPointError: a weight, or its square, is not finite.
        """
        parts = [getattr(p, "to_local", lambda p=p: p)().detach() for p in self.model.parameters()]
        finite = torch.stack([part.float().square().sum().isfinite() for part in parts]).all()
        if self.processes.mean(finite.double()).item() < 1:
            if not self.processes.main:
                raise SystemExit(1)  # the main process says it for all
            raise FloatingPointError(
                f"weights are too large or not finite after step {self.steps - 1}, with "
                f"{', '.join(self._names)}; a lower optimizer.learning_rate may help"
            )

    def state(self) -> dict[str, Any]:
        """All that a run continues from; the same however many processes there are, and all of them
        ask for it together.

        Raises:
            FloatingPointError: the last loss, its gradient or the weights are not finite.
        """
        self.check()
        self._check_weights()
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
