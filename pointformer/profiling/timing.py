"""Times of one call, on a CPU or a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_SCRATCH_PER_CACHE = 4  # a buffer of so many L2 caches leaves nothing else in one


@dataclass(frozen=True)
class Times:
    """20%, 50% and 80% quantiles of repeated timings, in seconds."""

    q20: float = 0.0
    q50: float = 0.0
    q80: float = 0.0

    @property
    def quantiles(self) -> tuple[float, float, float]:
        return self.q20, self.q50, self.q80

    @staticmethod
    def of(seconds: Sequence[float]) -> Times:
        values = torch.tensor(seconds, dtype=torch.float64)
        return Times(*torch.quantile(values, torch.tensor([0.2, 0.5, 0.8]).double()).tolist())

    def __add__(self, other: Times) -> Times:
        return Times(self.q20 + other.q20, self.q50 + other.q50, self.q80 + other.q80)

    def __sub__(self, other: Times) -> Times:
        return Times(self.q20 - other.q20, self.q50 - other.q50, self.q80 - other.q80)

    def __mul__(self, calls: int) -> Times:
        return Times(self.q20 * calls, self.q50 * calls, self.q80 * calls)


def time_call(
    run: Callable[[], object], device: torch.device, repeats: int, *, warm: bool = False
) -> Times:
    """Time `run()` `repeats` times after a warm-up.

    On a GPU by CUDA events, with a cold L2 cache: a buffer of several times its size is overwritten
    before each repetition. Nothing waits for the device between the first and the last repetition,
    and the overwriting takes longer than the host needs to launch what `run` launches, so that the
    time is the device's, not the host's. With `warm` a repetition that is not timed stands between
    the overwriting and the timed one. On a CPU by its clock, with the caches as the repetition
    before left them.
    """
    if device.type == "cuda":
        return _time_on_gpu(run, device, repeats, warm)
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return Times.of(seconds)


def _time_on_gpu(
    run: Callable[[], object], device: torch.device, repeats: int, warm: bool
) -> Times:
    with torch.cuda.device(device):
        for _ in range(3):
            run()
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        scratch = torch.empty(_SCRATCH_PER_CACHE * cache, dtype=torch.uint8, device=device)
        scratch.zero_()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        launching = time.perf_counter() - begin
        flush = _events(scratch.zero_)
        torch.cuda.synchronize()
        flushes = math.ceil(3 * launching / (flush[0].elapsed_time(flush[1]) * 1e-3)) + 1
        pairs = []
        for _ in range(repeats):
            for _ in range(flushes):
                scratch.zero_()
            if warm:
                run()
            pairs.append(_events(run))
        torch.cuda.synchronize()
    return Times.of([start.elapsed_time(end) * 1e-3 for start, end in pairs])


def _events(run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end
