"""Made-up inputs of interpolation, and the accuracy that its implementations are held to."""

from functools import partial

import torch

from helpers.gradients import assert_as_accurate_as_eager, value_and_gradients
from pointformer import interpolate


def make_case(
    tokens=30, queries=41, k=4, channels=11, dimensions=2, exponent=6.0, drop=0.1, seed=0
):
    """Arguments of `interpolate`; positions on a coarse lattice, so that some coincide."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, max(tokens, 1), (queries, k), generator=g)
    index[torch.rand(index.shape, generator=g) < drop] = -1
    return {
        "features": torch.randn(tokens, channels, generator=g),
        "positions": torch.randint(-6, 7, (tokens, dimensions), generator=g) / 2,
        "query_positions": torch.randint(-6, 7, (queries, dimensions), generator=g) / 2,
        "neighbor_index": index if tokens else torch.full_like(index, -1),
        "power": torch.tensor(exponent),
    }


def with_gradients(case, dtype=torch.float32, names=("features", "power"), **kwargs):
    return value_and_gradients(interpolate, case, names, dtype, **kwargs)


def assert_as_accurate(case, impl="cpu", **kwargs):
    def spare(name, exact):
        allowed = 4e-6 * exact[name].abs().max() + 2e-6
        if name == "power":  # a sum over all queries and channels, which may cancel
            allowed += 5e-7 * exact["out"].numel() ** 0.5
        return allowed

    assert_as_accurate_as_eager(partial(with_gradients, case), impl, spare, **kwargs)
