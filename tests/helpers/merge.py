"""Made-up inputs of merging, and the accuracy that its implementations are held to."""

from functools import partial

import numpy as np
import torch
from hypothesis import strategies as st

from helpers.gradients import assert_as_accurate_as_eager, value_and_gradients
from pointformer import Clusters, Neighborhoods

NET = ("weight", "bias", "norm_weight", "norm_bias")


def weight_counts(most):
    """How many weights a net gives: often the paper's 4, and others from 3 on.

    Of one the norm leaves nothing, of two little but a sign: `test_one_weight`, `test_two_weights`.
    """
    return st.one_of(st.just(4), st.integers(3, most))


def make_clusters(sizes, cluster_size, dimensions=2):
    """Clusters of consecutive rows, as even as possible in every sample."""
    counts = [-(-n // cluster_size) for n in sizes]
    lengths = [n // k + (i < n % k) for n, k in zip(sizes, counts, strict=True) for i in range(k)]
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    centers = torch.zeros(len(lengths), dimensions)
    order = torch.arange(sum(sizes))
    return Clusters(order, offsets, centers, tuple(sizes), tuple(counts), cluster_size)


def make_neighborhoods(sizes, cluster_size, num_clusters, generator, dimensions=2, drop=0.0):
    """Random distinct clusters of each token's sample, -1 where it has too few."""
    clusters = make_clusters(sizes, cluster_size, dimensions)
    rows, first = [torch.empty(0, num_clusters, dtype=torch.int32)], 0
    for n, k in zip(sizes, clusters.counts, strict=True):
        index = torch.full((n, num_clusters), -1, dtype=torch.int32)
        shuffled = torch.rand(n, k, generator=generator).argsort(1)[:, :num_clusters]
        index[:, : shuffled.shape[1]] = shuffled.int() + first
        rows.append(index)
        first += k
    index = torch.cat(rows)
    index[torch.rand(index.shape, generator=generator) < drop] = -1
    return Neighborhoods(index, clusters)


def make_case(
    sizes=(30, 17),
    cluster_size=8,
    num_clusters=3,
    channels=11,
    dimensions=2,
    full=True,
    drop=0.1,
    seed=0,
    mid=4,
):
    """Arguments of `scored_merge`; positions on a coarse lattice, so that some coincide."""
    g = torch.Generator().manual_seed(seed)
    tokens = sum(sizes)
    width = (2 * dimensions + 1) if full else dimensions
    return {
        "features": torch.randn(tokens, channels, generator=g),
        "scores": torch.rand(tokens, generator=g),
        "positions": torch.randint(-6, 7, (tokens, dimensions), generator=g) / 2,
        "center_index": torch.randperm(tokens, generator=g)[: (tokens + 2) // 3],
        "neighborhoods": make_neighborhoods(sizes, cluster_size, num_clusters, g, dimensions, drop),
        "weight": torch.randn(mid, width, generator=g),
        "bias": torch.randn(mid, generator=g),
        "norm_weight": torch.randn(mid, generator=g),
        "norm_bias": torch.randn(mid, generator=g),
    }


def with_rounded_nets(case, count):
    """The case with weight nets in float64 whose entries are a rounding of float32 away."""
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        noise = {n: torch.rand(case[n].shape, generator=g, dtype=torch.float64) for n in NET}
        yield case | {n: case[n].double() * (1 + (2 * noise[n] - 1) * 2**-23) for n in NET}


def assert_as_accurate(op, case, names, impl="cpu", **kwargs):
    """As `assert_as_accurate_as_eager`.

    Where the weight net's outputs for a pair are nearly the same, the norm divides by little, and
    its gradient depends on the last bits of its inputs. What rounding those changes is fine: that
    the reference in float32 is sometimes closer there is luck (the kernel is as often).
    """

    def run(case, dtype, impl):
        return value_and_gradients(op, case, names, dtype, impl=impl)

    rounded = [run(other, torch.float64, "reference") for other in with_rounded_nets(case, 4)]

    def spare(name, exact):
        # The weight net's gradients are sums of similar terms, which cancel in some of them.
        scales = [exact[n].abs().max() for n in (NET if name in NET else [name])]
        changed = [(other[name] - exact[name]).abs().max() for other in rounded]
        return 4e-6 * max(scales) + 1e-6 + 8 * max(changed)

    assert_as_accurate_as_eager(partial(run, case), impl, spare, **kwargs)
