"""Batches of thousands of samples take the steps of batches of a few: none is taken per sample."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pointformer import (
    TokenSet,
    interpolate,
    knn,
    nearest_clusters,
    neighborhood_attention,
    scored_merge,
    select_centers,
    spread_scores,
)


class Counting(TorchDispatchMode):
    """How often each of torch's functions runs, and ours."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def cases(samples):
    """Functions that run on a batch of so many samples of about 10 points."""
    g = torch.Generator().manual_seed(0)
    sizes = (torch.arange(samples) % 8 + 6).tolist()  # of 6 to 13: as many rounds in all batches
    total = sum(sizes)
    positions, features = torch.rand(total, 3, generator=g), torch.rand(total, 16, generator=g)
    fields = {"label": torch.arange(total)}
    sides = [(1.0, 1.0, 1.0)] * samples
    tokens = TokenSet(positions, features, sizes, sides, fields=fields)
    clustered = tokens.cluster(8)
    around = clustered.neighborhoods(2)
    heads = clustered.features.view(total, 1, 16)
    scores = torch.rand(total, generator=g)
    selecting = {"sizes": sizes, "extent": sides, "rate": 0.3, "stride": 0.5, "lattice": False}
    index, counts = select_centers(scores, clustered.positions, **selecting)
    net = {
        "weight": torch.randn(4, 7),
        **dict.fromkeys(("bias", "norm_weight", "norm_bias"), torch.ones(4)),
    }
    parts = tokens.to_list()
    places = clustered.positions
    two = {"sizes": sizes, "query_sizes": sizes}
    return {
        "TokenSet": lambda: TokenSet(positions, features, sizes, sides, fields=fields),
        "batch": lambda: TokenSet(positions, features, batch=tokens.sample_index),
        "from_world": lambda: TokenSet.from_world(positions.double(), features, sizes),
        "world_positions": TokenSet.from_world(positions.double(), None, sizes).world_positions,
        "cluster": lambda: tokens.cluster(8),
        "cluster in boxes": lambda: TokenSet(positions, features, sizes).cluster(8),
        "nearest_clusters": lambda: nearest_clusters(places, clustered.clusters, 2),
        "attention": lambda: neighborhood_attention(heads, heads, heads, places, around),
        "select_centers": lambda: select_centers(scores, places, **selecting),
        "spread_scores": lambda: spread_scores(scores, places, sizes=sizes, spread=0.1),
        "select": lambda: clustered.select(index, counts),
        "select mask": lambda: clustered.select(scores > 0.5),
        "merge": lambda: scored_merge(clustered.features, scores, places, index, around, **net),
        "knn": lambda: knn(positions, 3, sizes=sizes),
        "interpolate": lambda: interpolate(features, positions, positions, **two),
        "to_list": tokens.to_list,
        "cat": lambda: TokenSet.cat(parts),
        "from_list": lambda: TokenSet.from_list([part.positions for part in parts]),
        "input_order": clustered.input_order,
        "to": lambda: clustered.to("cpu", torch.bfloat16),
        "detach": clustered.detach,
    }


FEW, MANY = cases(16), cases(400)


@pytest.mark.parametrize("name", FEW)
def test_no_step_per_sample(name):
    found = []
    for batch in (FEW, MANY):
        with Counting() as counting:
            batch[name]()
        found.append(counting.calls)
    few, many = found
    more = {function: (few[function], n) for function, n in many.items() if n > few[function] + 8}
    assert not more
