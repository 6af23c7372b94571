"""Launches of Triton kernels on a machine without a GPU: which, how often, and what they cost.

Host code runs as it would before a GPU, on CPU tensors; in place of each kernel a note is made of
it. What kernels would compute is zero: only what was given, and what torch computes, has values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pointformer import Neighborhoods, _dispatch
from pointformer.kernels.triton import runtime
from pointformer.kernels.triton.runtime import Grid, Variant
from pointformer.profiling.machine_code import TARGET, Code, machine_code
from pointformer.profiling.ops import BACKWARD, FORWARD, Call


@dataclass(frozen=True)
class Card:
    """Limits of how fast a GPU issues instructions.

    Attributes:
        processors: streaming multiprocessors, of four schedulers that issue one instruction for a
            warp in each cycle.
        clock: cycles per second.
    """

    processors: int
    clock: float

    def issue(self, instructions: float) -> float:
        """Seconds in which all schedulers together can issue so many, of one warp each."""
        return instructions / (self.processors * 4 * self.clock)


# 132 multiprocessors: NVIDIA H100 Tensor Core GPU Architecture, table of the SXM5 card, which the
# H200 shares. The clock is what they hold under load, of at most 1.98 GHz.
HOPPER = Card(132, 1.755e9)


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        variant: the kernel and how it is compiled.
        grid: programs along each axis.
        rounds: of each loop, per program, on average.
    """

    variant: Variant
    grid: tuple[int, ...]
    rounds: Mapping[str, float]

    def instructions(self) -> float:
        """Instructions that all warps issue together, from the machine code.

        Raises:
            ValueError: the kernel does not say how many rounds a loop makes.
        """
        try:
            per_warp = code_of(self.variant).issued(self.rounds)
        except KeyError as error:
            raise ValueError(
                f"{self.variant.name}: its `rounds` do not name the loop {error}"
            ) from None
        return prod(self.grid) * self.variant.num_warps * per_warp


def issue_times(
    name: str, arguments: Mapping[str, Any], passes: Iterable[str], card: Card = HOPPER
) -> dict[str, float]:
    """Seconds to issue the instructions of an op's Triton kernels, for each of the passes.

    Args:
        name: a key of `OPS`.
        arguments: of the call by name, on the CPU. Their values decide how long lists are.
    """
    return {
        direction: card.issue(sum(launch.instructions() for launch in launches))
        for direction, launches in launches_of(name, arguments, passes).items()
    }


def launches_of(
    name: str, arguments: Mapping[str, Any], passes: Iterable[str]
) -> dict[str, list[Launch]]:
    """Launches of a call of an op, by pass."""
    given = {**arguments, "impl": "triton"}
    training = BACKWARD in passes
    if name != "plan":  # made once for the whole stage, which is not this call's work
        for key, value in given.items():
            if isinstance(value, Neighborhoods):
                with recorded():
                    given[key] = value.with_plan(training=training, impl="triton")
    call = Call(name, "", {}, {}, given)
    with recorded() as forward:
        call.run()
    found = {FORWARD: forward}
    if training:
        with recorded():
            run = call.differentiable().backward()
        with recorded() as found[BACKWARD]:
            run()
    return found


_CODES: dict[str, Code] = {}


def code_of(variant: Variant) -> Code:
    """Machine code for an H100, compiled once.

    Raises:
        ValueError: kernels are interpreted, so that none can be compiled.
    """
    if runtime.INTERPRETED:
        raise ValueError("TRITON_INTERPRET=1: kernels that are interpreted cannot be compiled")
    parts = (variant.kernel.cache_key, variant.arguments, sorted(variant.constants.items()))
    key = repr((*parts, sorted(variant._options("cuda").items())))
    if key not in _CODES:
        _CODES[key] = machine_code(variant.compile(TARGET))
    return _CODES[key]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects the launches of ops with impl="triton" on CPU tensors, instead of launching."""
    launches: list[Launch] = []

    def record(variant: Variant, grid: Grid, *arguments: Any) -> None:
        programs = variant.programs(grid)
        if 0 in programs:
            return
        names = [name for name in variant.kernel.arg_names if name not in variant.constants]
        given = dict(zip(names, arguments, strict=True)) | dict(variant.constants)
        rounds = variant.rounds(given) if variant.rounds else {}
        launches.append(Launch(variant, programs, rounds))

    with ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            made = mock.patch.object(owner, name, _zeroed(getattr(owner, name)))
            patches.enter_context(made)
        patches.enter_context(mock.patch.object(_dispatch, "_device_lacks", return_value=None))
        patches.enter_context(mock.patch.object(Variant, "launch", record))
        yield launches


def _zeroed(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Memory that no kernel fills holds zeros, written by no op of torch that would be counted."""

    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "cpu" and tensor.nbytes:
            ctypes.memset(tensor.data_ptr(), 0, tensor.nbytes)
        return tensor

    return zeros
