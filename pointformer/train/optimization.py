"""Optimizer and parameter groups, learning rate schedule, budget, and averages of weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pointformer.models import Model

_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
    nn.LocalResponseNorm,
)


@dataclass(frozen=True)
class Optimizer:
    """AdamW.

    Attributes:
        learning_rate: the highest, of the head; for a batch of `reference_batch`, if that is given:
            for others it is in proportion.
        backbone_rate: learning rate of the backbone over that of the head.
        weight_decay: of what decays.
        decay: "matrices": all but biases and what has one dimension, as published for
            classification. "all": all but normalization and embeddings, as published for
            segmentation.
        clip: longest gradient, all parameters together; `None`: as it is.
    """

    learning_rate: float = 1e-3
    reference_batch: int | None = None
    backbone_rate: float = 1.0
    weight_decay: float = 0.05
    decay: Literal["matrices", "all"] = "matrices"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "backbone_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"optimizer.{name}: expected a number of at least 0, got {getattr(self, name)}"
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: expected two in [0, 1), got {list(self.betas)}")
        if self.reference_batch is not None and self.reference_batch < 1:
            raise ValueError(
                "optimizer.reference_batch: expected at least 1 or null, got "
                f"{self.reference_batch}"
            )
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"optimizer.eps: expected a number of at least 0, got {self.eps}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"optimizer.clip: expected a positive number or null, got {self.clip}")

    def make(self, model: nn.Module, batch: int) -> torch.optim.AdamW:
        """The optimizer of a model's parameters; `rate` of a group is its highest learning rate."""
        scale = 1.0 if self.reference_batch is None else batch / self.reference_batch
        groups = parameter_groups(model, self)
        for group in groups:
            group["rate"] = group["lr"] = self.learning_rate * scale * group.pop("factor")
        return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps)


def parameter_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Groups that share learning rate and weight decay; `factor` multiplies the learning rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if optimizer.decay == "matrices":
                decays = parameter.dim() > 1 and name != "bias"
            else:
                decays = not isinstance(module, (*_NORMS, nn.Embedding))
            in_backbone = f"{path}.".startswith("backbone.")
            groups.setdefault((in_backbone, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optimizer.weight_decay if decays else 0.0,
            "factor": optimizer.backbone_rate if in_backbone else 1.0,
        }
        for (in_backbone, decays), parameters in groups.items()
    ]


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the highest, by the used share of the budget.

    Attributes:
        kind: "cosine", "poly" (of this `power`), "steps" (times 0.1 at each of `milestones`) or
            "constant".
        warmup: share in which it rises in a line from `start`; what follows takes the rest.
        end: what cosine and poly end with.
        power: of poly.
        milestones: shares.
    """

    kind: Literal["cosine", "poly", "steps", "constant"] = "cosine"
    warmup: float = 0.05
    start: float = 0.0
    end: float = 0.0
    power: float = 0.9
    milestones: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"schedule.warmup: expected a share in [0, 1), got {self.warmup}")
        for name, most in (("start", 1.0), ("end", 1.0), ("power", math.inf)):
            value = getattr(self, name)
            if not 0 <= value <= most or value == math.inf:
                words = "a number from 0 to 1" if most == 1 else "a number of at least 0"
                raise ValueError(f"schedule.{name}: expected {words}, got {value}")
        if any(not 0 <= share <= 1 for share in self.milestones):
            raise ValueError(
                f"schedule.milestones: expected shares from 0 to 1, got {list(self.milestones)}"
            )

    def factor(self, used: float) -> float:
        """Learning rate over the highest at a used share, from 0 to 1, of the budget."""
        if used < self.warmup:
            return self.start + (1 - self.start) * used / self.warmup
        if self.kind == "steps":
            return 0.1 ** sum(used >= share for share in self.milestones)
        share = min(1.0, (used - self.warmup) / (1 - self.warmup))
        if self.kind == "cosine":
            return self.end + (1 - self.end) * 0.5 * (1 + math.cos(math.pi * share))
        if self.kind == "poly":
            return self.end + (1 - self.end) * (1 - share) ** self.power
        return 1.0


@dataclass(frozen=True)
class Budget:
    """Training ends with what is used up first.

    Attributes:
        epochs: passes over the training pictures, also parts of one.
        minutes: of training steps, without evaluation and checkpoints. The first step of a start,
            in which kernels are compiled or loaded, counts as long as the second.
    """

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"budget.{name}: expected a positive number, got {value}")

    def used(self, steps: int, seconds: float, epoch_steps: float) -> float:
        """Share of the budget, from 0 to 1, after so many steps and seconds."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(steps / self.steps)
        if self.epochs is not None:
            shares.append(steps / max(1, math.ceil(self.epochs * epoch_steps - 1e-9)))  # rounding
        if self.minutes is not None:
            shares.append(seconds / (60 * self.minutes))
        return min(1.0, max(shares))


class Average:
    """The moving average of a model's weights, in a model of its own.

    Args:
        decay: per step; less at first, because the first weights are random.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, steps: int) -> None:
        """Take in the weights after `steps` steps; buffers are the latest."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        averages, latest = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(averages, [p.detach() for p in latest], 1 - decay)
        for kept, current in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(current)


def clip_gradients(model: nn.Module, most: float | None) -> Tensor:
    """Scale all gradients so that their joint norm is at most `most`; return the norm before.

    The norm of sharded gradients is a sharded tensor.
    """
    return nn.utils.clip_grad_norm_(
        model.parameters(), math.inf if most is None else most, error_if_nonfinite=False
    )
