"""Opt-in search for a kernel's fastest tiles, warps and stages, remembered on disk.

With the environment variable POINTFORMER_AUTOTUNE=1 the first launch of a kernel at a new size,
where sizes within a power of two are the same, times other tiles and numbers of warps and stages
than the default's. What computes other results than the default is refused with a warning. The
winners are kept in POINTFORMER_CACHE, by default ~/.cache/pointformer, for each device and version
of the kernel. While a CUDA graph is captured nothing is timed: warm up before.

Results are the same bits from run to run with the same choice; another choice may add up in another
order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

# What differs from the default: constants by name, "num_warps" and "num_stages".
Choice = dict[str, int]
# By how much sums in another order may differ, relative to what is typical of a tensor: products
# are rounded to the dtype of the inputs.
_BUDGETS = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
_BUDGET = 1e-4  # of float32
_INFINITE = 1e30  # what is beyond stands for infinity, and is not typical


def enabled() -> bool:
    """Whether tuning is asked for."""
    return os.environ.get("POINTFORMER_AUTOTUNE", "0") == "1"


@functools.cache
def tuner() -> Tuner:
    """The process's tuner."""
    folder = os.environ.get("POINTFORMER_CACHE") or Path.home() / ".cache" / "pointformer"
    return Tuner(Path(folder) / "autotune.json", _median_time)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def size_class(grid: tuple[int, ...]) -> int:
    """Programs of a launch, rounded up to a power of two."""
    programs = 1
    for count in grid:
        programs *= count
    return triton.next_power_of_2(programs)


class Tuner:
    """The fastest right choice by what is launched.

    Args:
        path: JSON file of earlier choices. One that cannot be read counts as empty, one that cannot
            be written is left alone: choices then last as long as the process.
        time: gives the time of a function, in any unit.
    """

    def __init__(self, path: Path, time: Callable[[Callable[[], object]], float]) -> None:
        self.path = path
        self.time = time
        self.choices = self._read()

    def best(
        self,
        key: str,
        choices: Sequence[Choice],
        run: Callable[[Choice], object],
        outputs: Sequence[Tensor],
        budget: float = _BUDGET,
    ) -> Choice:
        """The choice for what `key` names, searched if none of `choices` is known for it.

        While a graph is captured nothing is timed, and what is not known gets the default.

        Args:
            key: what a choice depends on.
            choices: the default, which changes nothing, first.
            run: launches the kernel and returns what was compiled. It runs many times: a kernel
                may only write what it does not read.
            outputs: all tensors that it writes. They are left as they were.
            budget: see `agree`.
        """
        known = self.choices.get(key)
        if known is not None and known in choices:
            return known
        if _capturing():
            return choices[0]
        chosen = self._search(key, choices, run, outputs, budget)
        if chosen is None:
            return choices[0]
        # Other processes write too; what was chosen here stays.
        self.choices = {**self._read(), **self.choices, key: chosen}
        self._write()
        return chosen

    def _search(
        self,
        key: str,
        choices: Sequence[Choice],
        run: Callable[[Choice], object],
        outputs: Sequence[Tensor],
        budget: float,
    ) -> Choice | None:
        """`None` where there is no memory to compare at the moment."""
        try:
            before = [output.clone() for output in outputs]
        except torch.OutOfMemoryError:
            return None
        expected: list[Tensor] = []
        times: list[tuple[float, int]] = []
        for number, choice in enumerate(choices):
            for output in outputs:
                _spoil(output)
            try:
                compiled = run(choice)
            except torch.AcceleratorError:  # the device is of no use any more
                raise
            except (triton.TritonError, RuntimeError, AssertionError):
                if number == 0:
                    raise
                continue  # it needs more than there is, or cannot be compiled
            if number == 0:
                try:
                    expected = [output.clone() for output in outputs]
                except torch.OutOfMemoryError:
                    return None
            elif getattr(compiled, "n_spills", 0):
                continue
            elif not all(agree(*pair, budget) for pair in zip(outputs, expected, strict=True)):
                warnings.warn(
                    f"{key.split(' ')[0]}: {choice} computes other results than the default and is "
                    "not used; please report it with the GPU and the version of Triton",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            times.append((self.time(functools.partial(run, choice)), number))
        for output, content in zip(outputs, before, strict=True):
            output.copy_(content)
        return choices[min(times)[1]]

    def _read(self) -> dict[str, Choice]:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".partial", delete=False
            ) as file:
                json.dump(self.choices, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)


def choices(warps: int, stages: int, tiles: Mapping[str, Sequence[int]]) -> Iterator[Choice]:
    """Changes of the default's warps and stages and of its tiles, no change first.

    Args:
        warps, stages: the default's.
        tiles: for constants by name the values that they may have, the default's first.
    """
    all_warps = dict.fromkeys([warps, max(warps // 2, 1), min(2 * warps, 16)])
    ranges = {"num_warps": all_warps, "num_stages": (stages, stages + 1), **tiles}
    default = [next(iter(values)) for values in ranges.values()]
    for numbers in itertools.product(*ranges.values()):
        chosen = zip(ranges, numbers, default, strict=True)
        yield {name: number for name, number, usual in chosen if number != usual}


def budget_of(dtypes: Sequence[object]) -> float:
    """For `agree`, of a kernel whose arguments have these dtypes, among other types."""
    return max((_BUDGETS[x] for x in _BUDGETS if x in dtypes), default=_BUDGET)


def agree(result: Tensor, expected: Tensor, budget: float) -> bool:
    """Whether integers are the same, and floats up to `budget` times their own size or what is
    typical of the tensor, NaN where NaN is expected."""
    if not expected.is_floating_point():
        return torch.equal(result, expected)
    numbers = expected[expected.abs() < _INFINITE]
    typical = torch.linalg.vector_norm(numbers, dtype=torch.float64) / max(len(numbers), 1) ** 0.5
    return torch.allclose(
        result, expected, rtol=budget, atol=budget * typical.item(), equal_nan=True
    )


def _spoil(output: Tensor) -> None:
    """What no kernel would compute, to tell what one leaves out."""
    if output.is_floating_point():
        output.fill_(torch.nan)
    else:
        output.fill_(torch.iinfo(output.dtype).min if output.dtype != torch.bool else True)


def _median_time(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
