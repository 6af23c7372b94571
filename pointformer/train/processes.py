"""The processes that train one model together, as `torchrun` starts them; one without it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """This process among all that work on a run.

    Attributes:
        rank, world: its number, and how many there are.
        device: of its own.
    """

    def __init__(self, device: str | torch.device = "cpu", rank: int = 0, world: int = 1) -> None:
        self.device = torch.device(device)
        self.rank = rank
        self.world = world

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """What to call in the place of the model, so that gradients are means over processes."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model)

    def mean(self, values: Tensor) -> Tensor:
        """Over processes; known to all of them."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def gathered(self, value: Any) -> list[Any]:
        """The objects of all processes, in their order; known to all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def started_processes(device: str = "cpu") -> Iterator[Processes]:
    """Join the processes that `torchrun` started beside this one, and leave them at the end.

    Args:
        device: "cuda" is a GPU for each process of a machine.

    Raises:
        ValueError: there is no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    where = torch.device(device)
    if world > 1 and where.type == "cuda" and where.index is None:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {where} cannot be used: {reason}") from None
    if world == 1:
        yield Processes(where)
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Processes(where, dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
