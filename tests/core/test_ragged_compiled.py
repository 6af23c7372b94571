"""Batches under torch.compile: other samples, and other numbers of them, compile nothing again."""

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
from pointformer.models.points import best_of_runs

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
    tokens = tokens.cluster(8)
    return attend(tokens, tokens.neighborhoods(6)), tokens.fields["label"]


def merge_and_back(tokens):
    fine = tokens.cluster(8)
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


def batch(step, sizes=None):
    """Two to six samples, empty ones and single tokens among them, each with its canvas."""
    draw = random.Random(step)
    if sizes is None:
        sizes = [draw.choice([0, 1, 5, draw.randint(6, 300)]) for _ in range(draw.randint(2, 6))]
        sizes[0] = draw.randint(100, 300)
    g = torch.Generator().manual_seed(step)
    total = sum(sizes)
    places, features = torch.rand(total, 3, generator=g), torch.rand(total, 16, generator=g)
    places[: total // 3] *= 0.1  # crowded cells are divided
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


def test_clusters_from_outside():
    def given_(step):
        tokens = batch(step).cluster(8)
        return tokens, tokens.neighborhoods(6)

    counts = compilations(attend, (given_(step) for step in range(6)))
    assert counts[-1] <= 2, counts


def around(tokens):
    return attend(tokens, tokens.neighborhoods(6))


@pytest.mark.parametrize(
    "function",
    [
        search,
        cluster,
        pytest.param(around, marks=pytest.mark.long),
        pytest.param(merge_and_back, marks=pytest.mark.long),
    ],
)
def test_any_number_of_samples_of_any_sizes(function):
    batches = [batch(step) for step in range(6)]
    # torch compiles once more where a whole batch has none or one of something.
    small = [(120,), (90,), (0, 0), (1, 0), (7, 7, 7), (0, 0, 0), (0, 1, 0), (1, 1), (1, 5, 0)]
    batches += [batch(step, sizes) for step, sizes in enumerate(small)]
    if function is around:
        batches = [tokens.cluster(8) for tokens in batches]
    counts = compilations(function, ((tokens,) for tokens in batches))
    assert counts[5] <= 2, counts
    assert counts[-1] <= 5, counts


def every_fourth(tokens):
    index, sizes = best_of_runs(tokens.features[:, 0], tokens.sizes, 0.25)
    return tokens.select(index, sizes)


def test_sets_from_compiled_code():
    compiled = torch.compile(every_fourth, backend="eager", fullgraph=True, dynamic=True)
    for step in range(2):
        tokens = batch(step)
        found, expected = compiled(tokens), every_fourth(tokens)
        assert found.sizes == expected.sizes
        assert found.extent == expected.extent
        assert found.cluster(8).clusters.counts == expected.cluster(8).clusters.counts
        torch.testing.assert_close(found.features, expected.features)
    assert repr(found) == repr(expected)
