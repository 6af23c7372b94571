"""The processes that work together, as `torchrun` starts them; one without it.

Plain torch (DistributedDataParallel, fully_shard) and no layer over it: what is left to do here is
less than what Fabric or Accelerate need to be told.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pointformer.nn.parallel import BatchPart

T = TypeVar("T")
Strategy = Literal["ddp", "fsdp"]


class Processes:
    """This process among all that work together.

    Attributes:
        rank, world: its number, and how many there are.
        device: of its own.
        complain: shows an error of this process, if others are still at work; `None`: it waits.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
        complain: Callable[[Exception], None] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.rank = rank
        self.world = world
        self.complain = complain

    @property
    def main(self) -> bool:
        """Whether this process writes and prints for all: that of rank 0."""
        return self.rank == 0

    @property
    def part(self) -> BatchPart:
        """The part of each training batch that this process has."""
        return BatchPart(self.rank, self.world)

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """The contiguous part of some items that this process works on."""
        ends = [len(items) * number // self.world for number in (self.rank, self.rank + 1)]
        return items[slice(*ends)]

    def wrapped(self, model: nn.Module, strategy: Strategy) -> nn.Module:
        """Wrapper to call in the place of the model, so that gradients are means over processes.

        With "fsdp" the model's parameters are then sharded: each process has a part of each.
        """
        if self.world == 1:
            return model
        if strategy == "ddp":
            return DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        fully_shard(model, mesh=mesh)
        return model

    def accumulating(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """For each part of a batch: gradients are exchanged after the last one."""
        if isinstance(wrapped, DistributedDataParallel) and not last:
            return wrapped.no_sync()
        if hasattr(wrapped, "set_requires_gradient_sync"):
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def whole(self, values: Any) -> Any:
        """A nested structure of tensors, sharded ones whole; all processes do it together."""
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t, values
        )

    def sharded(self, values: Mapping[Any, Any], like: Mapping[Any, Tensor]) -> dict[Any, Any]:
        """Tensors, or dictionaries of them, as those of the same key and shape are sharded."""

        def shard(value: Any, model: Tensor) -> Any:
            if isinstance(value, dict):
                return {name: shard(part, model) for name, part in value.items()}
            if not hasattr(model, "full_tensor") or value.shape != model.shape:
                return value
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = model.device_mesh, model.placements  # type: ignore[attr-defined]
            own = value.to(self.device)
            return distribute_tensor(own, mesh, placements, src_data_rank=None)

        return {key: shard(value, like[key]) for key, value in values.items()}

    def same_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of the main one."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over processes; known to all of them, and written into `values`."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def gathered(self, value: T) -> list[T]:
        """The objects of all processes, in their order; known to all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def alike(self, work: Callable[[], T]) -> T:
        """The result of what all do alike, without messages; where it fails in one, all end and one
        of them says why."""
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            if self.world == 1:
                raise
            failure = error
        failed = [r for r, some in enumerate(self.gathered(failure is not None)) if some]
        if not failed:
            return result
        if self.rank == failed[0] and failure is not None:
            raise failure
        raise SystemExit(1)

    def apart(self, work: Callable[[], T]) -> T:
        """The result of work of its own; where it fails in one, that one says why at once, the
        others do what is theirs, and then all end."""
        if self.world == 1 or self.complain is None:
            return self.alike(work)
        failed = False
        try:
            result = work()
        except Exception as error:
            self.complain(error)
            failed = True
        if any(self.gathered(failed)):
            raise SystemExit(1)
        return result


@contextlib.contextmanager
def started_processes(
    device: str = "cpu",
    patience: float | None = None,
    complain: Callable[[Exception], None] | None = None,
) -> Iterator[Processes]:
    """Join the processes that `torchrun` started beside this one, and leave them at the end.

    Args:
        device: "cuda" is a GPU for each process of a machine.
        patience: minutes to wait for others that are alive; `None`: torch's.
        complain: see `Processes`.

    Raises:
        ValueError: there is no such device.
        ConnectionError: another one ended.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        where = torch.device(device)
        if world > 1 and where.type == "cuda" and where.index is None:
            where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {device} cannot be used: {reason}") from None
    if world == 1:
        yield Processes(where, complain=complain)
        return
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group(
        "nccl" if where.type == "cuda" else "gloo",
        timeout=None if patience is None else timedelta(minutes=patience),
    )
    rank = dist.get_rank()
    try:
        yield Processes(where, rank, world, complain)
    except RuntimeError as error:
        # What gloo raises has no type of its own.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError(
                f"process {rank} of {world}: lost the connection to another one, which ended; the "
                "same command goes on"
            ) from error
        raise
    finally:
        dist.destroy_process_group()
