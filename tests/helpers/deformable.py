"""Made-up inputs of deformable attention, and what its implementations are held to."""

import torch

from helpers.gradients import value_and_gradients
from pointformer import deformable_attention, knn

LEARNED = ("value", "offsets", "weights", "power")


def make_case(
    sides=((7, 5), (4, 6)), tokens=(6, 11), heads=3, points=4, channels=5, queries=13, seed=0
):
    """Two samples with two levels each; positions on the lattice, some places outside."""
    g = torch.Generator().manual_seed(seed)
    canvas = [torch.tensor([(x, y) for y in range(h) for x in range(w)]) for w, h in sides]
    positions, lookups, start = [], [], 0
    for count in tokens:  # levels, each packed over the samples
        level = [c[torch.randperm(len(c), generator=g)[:count]].float() for c in canvas]
        lists = [knn(p, 4, query_positions=c.float()) for p, c in zip(level, canvas, strict=True)]
        rows = []
        for p, index in zip(level, lists, strict=True):
            rows.append(torch.where(index >= 0, index + start, index))
            start += len(p)
        positions += level
        lookups.append(torch.cat(rows))
    positions = torch.cat(positions)
    sample = torch.randint(0, len(sides), (queries,), generator=g)
    shape = (queries, heads, len(tokens), points)
    return {
        "value": torch.randn(len(positions), heads, channels, generator=g),
        "positions": positions,
        "offsets": 3 * torch.randn(*shape, 2, generator=g),
        "weights": torch.rand(shape, generator=g),
        "query_positions": 4 * torch.rand(queries, 2, generator=g),
        "query_sample": sample,
        "lookup": torch.stack(lookups, 1),
        "extent": sides,
        "power": torch.tensor([6.0]),
    }


def with_gradients(case, dtype=torch.float32, **kwargs):
    return value_and_gradients(deformable_attention, case, LEARNED, dtype, **kwargs)


def check_half_way(impl):
    """And far outside of the canvas to its border, as the reference."""
    case = make_case()
    case["query_positions"] = case["query_positions"].round()
    steps = torch.tensor([-3e3, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3e3])
    picks = torch.randint(0, 8, case["offsets"].shape, generator=torch.Generator().manual_seed(5))
    case["offsets"] = steps[picks]
    ours = deformable_attention(**case, impl=impl)
    torch.testing.assert_close(ours, deformable_attention(**case, impl="reference"))
