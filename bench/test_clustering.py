"""Clustering against a bare sort, a batch against one sample, and selection of centers."""

import statistics
import time

import pytest
import torch

from pointformer import balanced_cluster, select_centers

ROUNDS = 7


def compare(benchmark, name, ours, theirs):
    """Time both in turn; print and store the ratio of the medians, ours to theirs."""
    other = []

    def time_theirs():
        start = time.perf_counter()
        theirs()
        other.append(time.perf_counter() - start)

    benchmark.pedantic(ours, setup=time_theirs, rounds=ROUNDS, warmup_rounds=1)
    ratio = benchmark.stats.stats.median / statistics.median(other)
    benchmark.extra_info["ratio"] = ratio
    print(f"\n{benchmark.name}: {ratio:.2f}x {name}")


def points(count, dimensions, side):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, dimensions, generator=generator) * side


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("curve", ["hilbert", "morton", "snake"])
def test_a_million_points(benchmark, curve, dimensions):
    """Aim: at most 3x the time of sorting as many random integers."""
    positions = points(1_000_000, dimensions, 1000)
    integers = torch.randint(-(2**63), 2**63 - 1, (1_000_000,))
    compare(
        benchmark,
        "torch.sort",
        lambda: balanced_cluster(positions, extent=(1000,) * dimensions, curve=curve),
        lambda: torch.sort(integers),
    )


@pytest.mark.parametrize("size", [784, 3136])
@pytest.mark.parametrize("curve", ["hilbert", "snake"])
def test_64_samples(benchmark, curve, size):
    """Aim: at most 1.3x the time of one sample with as many tokens."""
    positions = points(64 * size, 2, 56)
    compare(
        benchmark,
        "one sample",
        lambda: balanced_cluster(positions, sizes=[size] * 64, extent=(56, 56), curve=curve),
        lambda: balanced_cluster(positions, extent=(448, 448), curve=curve),
    )


@pytest.mark.parametrize("stride", [2, 4])
def test_select_centers(benchmark, stride):
    """The first two stages of AutoFocusFormer at 224 px, batch 8."""
    y, x = torch.meshgrid(torch.arange(56.0), torch.arange(56.0), indexing="ij")
    cells = torch.stack([x.flatten(), y.flatten()], 1)
    generator = torch.Generator().manual_seed(0)
    size = 3136 * 4 // stride**2
    rows = [torch.randperm(3136, generator=generator)[:size] for _ in range(8)]
    positions, scores = torch.cat([cells[r] for r in rows]), torch.rand(8 * size)
    kwargs = {"sizes": [size] * 8, "extent": (56, 56), "rate": 0.25, "stride": stride}
    compare(
        benchmark,
        "reference",
        lambda: select_centers(scores, positions, **kwargs),
        lambda: select_centers(scores, positions, impl="reference", **kwargs),
    )
