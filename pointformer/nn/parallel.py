"""Losses and random numbers of the whole batch where several processes share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchPart:
    """This process's part of a batch that several train on; all parts have as many samples.

    Attributes:
        rank, world: number of this part, and how many there are; the default is the whole batch.
    """

    rank: int = 0
    world: int = 1

    def total(self, sums: Tensor) -> Tensor:
        """The sums over the whole batch, from those over the parts.

        Every process calls it alike, and makes the same loss of what it gives; gradients then
        become those of the whole batch as means over the processes, as data-parallel training takes
        them. A loss does it once, on all that it needs, in one small message.
        """
        return sums if self.world == 1 else _Total.apply(sums, self.world)

    def bernoulli(self, probability: float, samples: int, like: Tensor) -> Tensor:
        """(samples,) of 1 with this probability, else 0, in the dtype of `like`: for the samples of
        this part what they would have in the whole batch, if torch's generators have the same state
        everywhere."""
        return self._own(like.new_empty(samples * self.world).bernoulli_(probability))

    def generators(self, samples: int, device: torch.device) -> list[torch.Generator]:
        """For each sample one of its own, whatever the others draw; as of `bernoulli`."""
        seeds = self._own(torch.randint(2**62, (samples * self.world,)))
        return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]

    def _own(self, values: Tensor) -> Tensor:
        return values.view(self.world, -1)[self.rank]


WHOLE = BatchPart()


class _Total(torch.autograd.Function):
    """A sum over processes whose gradient needs no message: what follows is the same for all."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, world: int) -> Tensor:
        ctx.world = world
        total = sums.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.world, None
