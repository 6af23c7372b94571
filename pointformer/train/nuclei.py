"""Train a model for instance segmentation of nuclei, with any of the heads that can learn it.

    python -m pointformer.train.nuclei --data DIR --out DIR --minutes 40 [--head mask2former]

DIR holds train/ and val/, each with images/NAME.png and instances/NAME.png. In the output folder,
`checkpoint.pt` is what `--resume` continues from, `log.jsonl` has the losses and scores, and
`model.safetensors` the averaged weights at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import pointformer
from pointformer._files import atomic_path
from pointformer.data import (
    Annotation,
    Category,
    Dataset,
    read_folder,
)
from pointformer.data.transforms import Chain, RandomCrop, RandomCurves, RandomFlip, RandomTurn
from pointformer.evaluation import evaluate
from pointformer.metrics import AveragePrecision, InstanceAP
from pointformer.models import Model, Output, create_model, save_model
from pointformer.tasks import Task, task_of

# Mask heads of the size of a small backbone; the defaults are those of the released models.
HEAD_OPTIONS: dict[str, dict[str, int]] = {
    "dense": {},
    "mask2former": {
        "queries": 60,
        "dim": 128,
        "hidden": 512,
        "pixel_hidden": 512,
        "pixel_layers": 3,
        "decoder_layers": 6,
    },
    "hcformer": {"queries": 60, "dim": 128, "hidden": 512, "decoder_layers": 6},
}


@dataclass(frozen=True)
class Recipe:
    """What decides the result besides the data and the budget.

    Attributes:
        alpha: weight of the learned scores in the merges (0: a uniform grid); None: the model's.
        rate: share of tokens kept per merge; None: the model's.
        crop: height and width of the crops, in pixels.
        backbone_rate: learning rate of the backbone over that of the rest.
        warmup: share of the budget in which the learning rate rises.
        average: decay per step of the weights' moving average.
        border_weight, inside_weight, points: of the loss, see `pointformer.tasks.instance`.
        pretrained: tag of the weights whose backbone to start from; empty for random ones.
        pretrained_stages: how many of its stages to take. The deep ones of a model with a dense
            head, which hardly needs them, can be worse than random ones.
    """

    model: str = "aff_nano"
    head: str = "dense"
    pretrained: str = ""
    pretrained_stages: int = 2
    alpha: float | None = None
    rate: float | None = None
    batch: int = 8
    crop: int = 256
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    backbone_rate: float = 1.0
    warmup: float = 0.05
    average: float = 0.995
    inside_weight: float = 1.0
    border_weight: float = 3.0
    points: int = 1024
    seed: int = 0

    def create(self) -> Model:
        """The model in its initial state.

        Raises:
            ValueError: nothing is known of how the head learns instances.
        """
        if self.head not in HEAD_OPTIONS:
            raise ValueError(f"head: expected one of {', '.join(HEAD_OPTIONS)}, got {self.head!r}")
        torch.manual_seed(self.seed)
        changes = {"alpha": self.alpha, "rate": self.rate}
        overrides = {name: value for name, value in changes.items() if value is not None}
        options: dict[str, object] = {"num_classes": 3}
        if self.head != "dense":
            nucleus = Category(1, "nucleus")
            options = {"num_classes": 1, "task": "instance", "categories": [nucleus]}
        options |= HEAD_OPTIONS[self.head]
        model = create_model(self.model, head=self.head, **options, **overrides)
        stages = len(model.config.dims)
        if not 0 <= self.pretrained_stages <= stages:
            raise ValueError(
                f"pretrained_stages: expected 0 to {stages}, got {self.pretrained_stages}"
            )
        if self.pretrained:
            trained = create_model(f"{self.model}.{self.pretrained}")
            model.backbone.patch_embed.load_state_dict(trained.backbone.patch_embed.state_dict())
            for stage in range(self.pretrained_stages):
                weights = trained.backbone.stages[stage].state_dict()
                model.backbone.stages[stage].load_state_dict(weights)
        return model

    def task(self, model: Model) -> Task:
        """What the model's head learns."""
        options: dict[Output, dict[str, Any]] = {
            Output.BORDERS: {
                "inside_weight": self.inside_weight,
                "border_weight": self.border_weight,
            },
            Output.MASKS: {"points": self.points},
        }
        return task_of(model, "instance", **options[model.output])

    def tile(self, task: Task) -> int | None:
        """Side of the windows that pictures are looked at in: queries know their place in a window
        and how many objects it can have, so for these it is that of the crops."""
        return self.crop if task.output is Output.MASKS else None


@dataclass(frozen=True)
class Budget:
    """Steps, minutes, or both: training ends with the first that is used up."""

    steps: int | None = None
    minutes: float | None = None

    def used(self, steps: int, seconds: float) -> float:
        """Share of the budget, from 0 to 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(steps / max(self.steps, 1))
        if self.minutes is not None:
            shares.append(seconds / max(60 * self.minutes, 1e-9))
        return min(1.0, max(shares))


def parameter_groups(
    model: nn.Module, weight_decay: float, backbone_rate: float = 1.0
) -> list[dict]:
    """Decay matrices and kernels, not norms, biases and other parameters of one dimension.

    `factor` of a group multiplies the learning rate: `backbone_rate` in the backbone, else 1.
    """
    groups = []
    for backbone, factor in ((False, 1.0), (True, backbone_rate)):
        parameters = [
            p
            for name, p in model.named_parameters()
            if p.requires_grad and name.startswith("backbone.") == backbone
        ]
        for matrices, decay in ((True, weight_decay), (False, 0.0)):
            some = [p for p in parameters if (p.dim() > 1) == matrices]
            groups.append({"params": some, "weight_decay": decay, "factor": factor})
    return groups


def learning_rate_factor(used: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero, over the used share of the budget."""
    if used < warmup:
        return used / warmup
    return 0.5 * (1 + math.cos(math.pi * (used - warmup) / (1 - warmup)))


class Trainer:
    """A model in training: its weights, their moving average, the optimizer, and what was used.

    The random numbers of a step depend only on the seed and the step, so that a resumed run
    continues exactly.
    """

    def __init__(
        self, model: Model, task: Task, dataset: Dataset, recipe: Recipe, budget: Budget
    ) -> None:
        self.model = model
        self.task = task
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self.samples = [  # all in memory
            (annotation.read_image(), annotation) for annotation in dataset
        ]
        crop = RandomCrop(recipe.crop, scales=(0.7, 1.6), logarithmic=True, beyond="mirror")
        self.transform = Chain((crop, RandomFlip(), RandomTurn(), RandomCurves()))
        # Crowded pictures are drawn more often, but not in proportion to their nuclei.
        weights = np.sqrt([2.0 + len(annotation.segments) for _, annotation in self.samples])
        self.probabilities = weights / weights.sum()
        self.recipe = recipe
        self.budget = budget
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe.weight_decay, recipe.backbone_rate),
            lr=0.0,
            betas=(0.9, 0.98),
        )
        self.device = next(model.parameters()).device
        self.steps = 0
        self.seconds = 0.0

    @property
    def used(self) -> float:
        return self.budget.used(self.steps, self.seconds)

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, list[Annotation]]:
        """Normalized crops (B, 3, S, S) and what is in them."""
        images, truth = [], []
        for index in rng.choice(len(self.samples), self.recipe.batch, p=self.probabilities):
            whole, annotated = self.samples[index]
            image, annotation = self.transform(whole, annotated, rng)
            images.append(image)
            truth.append(annotation)
        pixels = torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous()
        return self.model.preprocess(pixels.to(self.device)), truth

    def step(self) -> float:
        """One update; returns the loss."""
        start = time.perf_counter()
        rng = np.random.default_rng([self.recipe.seed, self.steps])
        torch.manual_seed(int(rng.integers(2**62)))
        factor = learning_rate_factor(self.used, self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * factor * group["factor"]
        self.model.train()
        images, annotations = self.batch(rng)
        terms = self.task.loss(self.model(images), annotations)
        loss = torch.stack(list(terms.values())).sum()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.steps}")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        self._average()
        self.seconds += time.perf_counter() - start
        return value

    @torch.no_grad()
    def _average(self) -> None:
        # A shorter memory at first: the first weights are random.
        decay = min(self.recipe.average, (1 + self.steps) / (10 + self.steps))
        parameters = zip(self.averaged.parameters(), self.model.parameters(), strict=True)
        for average, current in parameters:
            average.lerp_(current, 1 - decay)
        buffers = zip(self.averaged.buffers(), self.model.buffers(), strict=True)
        for kept, latest in buffers:
            kept.copy_(latest)

    def save(self, path: Path) -> None:
        """Write a checkpoint, complete or not at all."""
        state = {
            "recipe": asdict(self.recipe),
            "steps": self.steps,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe; the budget may be another.

        Raises:
            ValueError: it is unreadable, or naming the fields in which its recipe differs.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: expected a checkpoint, but {reason}") from None
        if not isinstance(state, dict) or not {"recipe", "optimizer", "steps"} <= state.keys():
            raise ValueError(f"{path}: expected a checkpoint of this script")
        recipe = asdict(self.recipe)
        differing = [
            f"{name} {state['recipe'].get(name)!r}, now {value!r}"
            for name, value in recipe.items()
            if state["recipe"].get(name) != value
        ]
        if differing:
            raise ValueError(f"{path}: made with another recipe: {'; '.join(differing)}")
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.seconds = state["steps"], state["seconds"]


def score(
    trainer: Trainer, dataset: Dataset, annotations: Sequence[Annotation] | Dataset
) -> AveragePrecision:
    """Of the averaged weights, on some of a data set's pictures."""
    metric = InstanceAP()
    evaluate(
        trainer.averaged,
        dataset,
        trainer.task,
        annotations=tqdm(annotations, "evaluating", leave=False),
        metrics=[metric],
        tile=trainer.recipe.tile(trainer.task),
    )
    return metric.scores()


def train(
    trainer: Trainer,
    validation: Dataset,
    out: Path,
    *,
    checkpoint_minutes: float = 5.0,
    evaluation_minutes: float = 10.0,
    evaluation_samples: int = 16,
) -> AveragePrecision:
    """Train until the budget is used up; return the scores of the averaged weights.

    Writes `checkpoint.pt` and `log.jsonl` in `out`. While training, only the first
    `evaluation_samples` of a fixed shuffle of `validation` are scored; at the end all are.
    """
    order = np.random.default_rng(0).permutation(len(validation))
    subset = [validation[index] for index in order[:evaluation_samples].tolist()]
    checkpoint = out / "checkpoint.pt"
    last_checkpoint = last_evaluation = trainer.seconds
    recent: list[float] = []
    with (
        (out / "log.jsonl").open("a") as log,
        tqdm(
            total=100.0, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        ) as bar,
    ):

        def record(**entry: object) -> None:
            entry = {"step": trainer.steps, "seconds": round(trainer.seconds, 1), **entry}
            log.write(json.dumps(entry) + "\n")
            log.flush()

        def scored(name: str, annotations: Sequence[Annotation] | Dataset) -> AveragePrecision:
            result = score(trainer, validation, annotations)
            record(**{name: {"AP50": result.at(0.5), "AP": result.mean, "pooled": result.pooled}})
            tqdm.write(
                f"step {trainer.steps}, {trainer.seconds / 60:.1f} min: "
                f"AP50 {result.at(0.5):.3f}, mean AP {result.mean:.3f} on "
                f"{len(annotations)} pictures"
            )
            return result

        while trainer.used < 1:
            recent.append(trainer.step())
            bar.update(100 * trainer.used - bar.n)
            if trainer.steps % 20 == 0:
                loss = float(np.mean(recent))
                recent.clear()
                speed = trainer.steps * trainer.recipe.batch / trainer.seconds
                record(loss=loss, crops_per_second=speed)
                bar.set_postfix_str(
                    f"step {trainer.steps}, loss {loss:.3f}, {speed:.1f} crops/s", refresh=False
                )
            if trainer.seconds - last_checkpoint >= 60 * checkpoint_minutes:
                last_checkpoint = trainer.seconds
                trainer.save(checkpoint)
            if trainer.seconds - last_evaluation >= 60 * evaluation_minutes:
                last_evaluation = trainer.seconds
                scored("subset", subset)
        trainer.save(checkpoint)
        return scored("validation", validation)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pointformer.train.nuclei", description="Train nuclei segmentation."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--minutes", type=float, help="budget of training time")
    parser.add_argument("--steps", type=int, help="budget of steps")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--evaluation-minutes", type=float, default=10.0)
    types = {"model": str, "alpha": float, "rate": float}
    for field in fields(Recipe):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=types.get(field.name, type(field.default)),
            default=field.default,
            help=f"default: {field.default}",
        )
    arguments = parser.parse_args(argv)
    if arguments.minutes is None and arguments.steps is None:
        parser.error("expected --minutes or --steps")
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in fields(Recipe)})
    checkpoint = arguments.out / "checkpoint.pt"
    weights = arguments.out / "model.safetensors"
    for path in (checkpoint, weights, arguments.out / "log.jsonl"):
        if path.exists() and not arguments.resume:
            raise ValueError(f"{path} exists: pass --resume, or another --out")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = recipe.create().to(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    budget = Budget(arguments.steps, arguments.minutes)
    training, validation = (
        read_folder(arguments.data, split, "instance") for split in ("train", "val")
    )
    trainer = Trainer(model, recipe.task(model), training, recipe, budget)
    if arguments.resume:
        trainer.load(checkpoint)
    scores = train(
        trainer,
        validation,
        arguments.out,
        checkpoint_minutes=arguments.checkpoint_minutes,
        evaluation_minutes=arguments.evaluation_minutes,
    )
    trained = {
        "recipe": asdict(recipe),
        "data": arguments.data.resolve().name,
        "steps": trainer.steps,
        "minutes": round(trainer.seconds / 60, 1),
        "scores": {"AP50": scores.at(0.5), "AP": scores.mean},
        "pointformer": pointformer.__version__,
    }
    save_model(trainer.averaged, weights, trained=trained)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit code is 1 where input or output cannot be used."""
    arguments = _parse(argv)
    try:
        _run(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
