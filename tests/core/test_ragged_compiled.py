"""Ragged batches under torch.compile: other sizes are no reason to compile again."""

import random

import pytest
import torch

from pointformer import (
    TokenSet,
    interpolate,
    knn,
    neighborhood_attention,
    scored_merge,
    select_centers,
)

NET = {
    "weight": torch.randn(4, 7, generator=torch.Generator().manual_seed(0)),
    **dict.fromkeys(("bias", "norm_weight", "norm_bias"), torch.ones(4)),
}


def attend(tokens, around):
    heads = tokens.features.view(-1, 2, 8)
    return neighborhood_attention(heads, heads, heads, tokens.positions, around).flatten(1)


def search(tokens):
    index = knn(tokens.positions, 3, sizes=tokens.sizes)
    sizes = {"sizes": tokens.sizes, "query_sizes": tokens.sizes}
    places = tokens.positions
    return index, interpolate(tokens.features, places, places + 0.01, **sizes)


def cluster(tokens):
    tokens = tokens.cluster(8, adaptive=False)  # what compiled code can do
    return attend(tokens, tokens.neighborhoods(6)), tokens.fields["label"]


def merge_and_back(tokens):
    fine = tokens.cluster(8, adaptive=False)
    scores = fine.features[:, 0]
    index, sizes = select_centers(
        scores, fine.positions, sizes=fine.sizes, extent=fine.extent, rate=0.25, stride=0.25,
        lattice=False, along_curve=True, reserve=False,
    )  # fmt: skip
    around = fine.neighborhoods(6)
    merged = scored_merge(fine.features, scores, fine.positions, index, around, **NET)
    coarse = fine.select(index, sizes, features=merged)
    sizes = {"sizes": coarse.sizes, "query_sizes": fine.sizes}
    return interpolate(coarse.features, coarse.positions, fine.positions, **sizes)


def batch(step, samples):
    """Samples of 20 to 300 tokens, fewer than six clusters among them, each with its canvas."""
    draw = random.Random(step)
    sizes = [draw.randint(20, 300) for _ in range(samples or draw.randint(2, 6))]
    g = torch.Generator().manual_seed(step)
    total = sum(sizes)
    places, features = torch.rand(total, 3, generator=g), torch.rand(total, 16, generator=g)
    extent = [(1 + draw.random(), 1.0, 1.0) for _ in sizes]
    return TokenSet(places, features, sizes, extent, fields={"label": torch.arange(total)})


def compilations(function, inputs):
    """How many graphs there were after each input; results are those of the plain function."""
    torch._dynamo.reset()
    graphs, counts = [], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for arguments in inputs:
        found, expected = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(found, expected)
        counts.append(len(graphs))
    return counts


def test_any_number_of_samples_where_clusters_are_given():
    def given_(step):
        tokens = batch(step, None).cluster(8)
        return tokens, tokens.neighborhoods(6)

    counts = compilations(attend, (given_(step) for step in range(6)))
    assert counts[-1] <= 2, counts


@pytest.mark.parametrize(
    "function",
    [
        search,
        pytest.param(cluster, marks=pytest.mark.long),
        pytest.param(merge_and_back, marks=pytest.mark.long),
    ],
)
def test_other_sizes(function):
    counts = compilations(function, ((batch(step, 4),) for step in range(7)))
    assert counts[-1] <= 3, counts
    assert counts[-1] == counts[-4], counts
