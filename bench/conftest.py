"""How all benchmarks compare: in turns within one process, by the ratio of medians."""

import os
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch


def pytest_configure(config):
    """The thread count is explicit: POINTFORMER_THREADS, or all cores.

    The OpenMP wait policy stays the runtime's own, a short spin: torch and Numba each have a team
    of threads, and with "active" the idle one would keep the cores from the other.
    """
    os.environ.pop("OMP_WAIT_POLICY", None)
    torch.set_num_threads(int(os.environ.get("POINTFORMER_THREADS", os.cpu_count() or 1)))


def pytest_ignore_collect(collection_path, config):
    """Benchmarks run with --benchmark-only, and nothing else does then."""
    return None if config.getoption("--benchmark-only", default=False) else True


@pytest.fixture
def compare(benchmark, capsys):
    """`compare(ours=function, name=function, ...)` benchmarks the first, timing the others in turn.

    Each other side's median, as a multiple of the first's, is printed and stored as extra
    information: above 1, the first is faster. So is the ratio of the CPU time of all threads, which
    other work on the machine changes less.
    """

    def run(rounds: int = 7, **sides: Callable[[], object]) -> None:
        ours, *others = sides
        times: dict[str, list[float]] = {name: [] for name in others}
        cpu_times: dict[str, list[float]] = {name: [] for name in sides}

        def run_side(name: str) -> None:
            start = time.process_time()
            sides[name]()
            cpu_times[name].append(time.process_time() - start)

        def time_others() -> None:
            for name in others:
                start = time.perf_counter()
                run_side(name)
                times[name].append(time.perf_counter() - start)

        benchmark.pedantic(
            lambda: run_side(ours), setup=time_others, rounds=rounds, warmup_rounds=1
        )
        own = benchmark.stats.stats.median
        # The first round is the warm-up.
        ratios = {name: median(values[1:]) / own for name, values in times.items()}
        used = {name: median(values[1:]) for name, values in cpu_times.items()}
        of_cpu = {name: used[name] / used[ours] for name in others}
        benchmark.extra_info.update(ratios, threads=torch.get_num_threads())
        benchmark.extra_info.update({f"{name} cpu time": x for name, x in of_cpu.items()})
        text = ", ".join(
            f"{name} {ratio:.2f}x ({of_cpu[name]:.2f}x CPU time)" for name, ratio in ratios.items()
        )
        with capsys.disabled():
            print(f"\n{benchmark.name}: {ours} {own * 1e3:.2f} ms; {text}")

    return run
