"""Opt-in search for a kernel's fastest warps and stages, remembered on disk.

With the environment variable POINTFORMER_AUTOTUNE=1 the first launch of a kernel at a new size,
where sizes within a power of two are the same, times a few numbers of warps and stages around the
default. The winners are kept in POINTFORMER_CACHE, by default ~/.cache/pointformer, for each device
and version of the kernel. While a CUDA graph is captured nothing is timed: warm up before.

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import triton

Options = dict[str, object]


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
    """The fastest options by what is launched.

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
        self, key: str, default: Mapping[str, object], run: Callable[[Options], object]
    ) -> Options:
        """Options for what `key` names, timed by `run(options)` if they are not known yet.

        While a graph is captured nothing is timed, and what is not known gets the default.

        `run` launches the kernel and returns what was compiled. It runs many times: a kernel may
        only write what it does not read.
        """
        chosen = self.choices.get(key)
        if chosen is None and _capturing():
            return dict(default)
        if chosen is None:
            chosen = self._search(default, run)
            # Other processes write too; what was chosen here stays.
            self.choices = {**self._read(), **self.choices, key: chosen}
            self._write()
        return {**default, **chosen}

    def _search(self, default: Mapping[str, object], run: Callable[[Options], object]) -> Options:
        times: list[tuple[float, int, Options]] = []
        for number, changes in enumerate(candidates(default)):
            options = {**default, **changes}
            try:
                compiled = run(options)
                if number and getattr(compiled, "n_spills", 0):
                    continue
                times.append((self.time(lambda o=options: run(o)), number, changes))
            except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
                if number == 0:
                    raise
        return min(times)[2]

    def _read(self) -> dict[str, Options]:
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


def candidates(default: Mapping[str, object]) -> Iterator[Options]:
    """Changes of the default's warps and stages, no change first."""
    warps, stages = int(default["num_warps"]), int(default["num_stages"])  # type: ignore[call-overload]
    all_warps = dict.fromkeys([warps, max(warps // 2, 1), min(2 * warps, 16)])
    for w, s in itertools.product(all_warps, (stages, stages + 1)):
        yield {"num_warps": w, "num_stages": s}


def _median_time(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
