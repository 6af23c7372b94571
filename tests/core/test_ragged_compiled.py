"""Batches under torch.compile: other samples, and other numbers of them, compile nothing again."""

import random

import pytest
import torch

from pointformer import (
    TokenSet,
    batch_from_sizes,
    best_of_runs,
    curve_sample,
    farthest_point_sample,
    interpolate,
    knn,
    neighborhood_attention,
    radius,
    radius_graph,
    random_sample,
    scored_merge,
    segment_reduce,
    segment_softmax,
    select_centers,
    spread_scores,
    voxel_pool,
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
    tokens = tokens.cluster(8)
    return attend(tokens, tokens.neighborhoods(6)), tokens.fields["label"]


def merge_and_back(tokens):
    fine = tokens.cluster(8)
    scores = fine.features[:, 0]
    scores = spread_scores(scores.sigmoid(), fine.positions, sizes=fine.sizes, spread=0.1)
    index, sizes = select_centers(
        scores, fine.positions, sizes=fine.sizes, extent=fine.extent, rate=0.25, stride=0.25,
        lattice=False, along_curve=True, reserve=False,
    )  # fmt: skip
    around = fine.neighborhoods(6)
    merged = scored_merge(fine.features, scores, fine.positions, index, around, **NET)
    coarse = fine.select(index, sizes, features=merged)
    sizes = {"sizes": coarse.sizes, "query_sizes": fine.sizes}
    return interpolate(coarse.features, coarse.positions, fine.positions, **sizes)


def sample(tokens):
    places, sizes = tokens.positions, {"sizes": tokens.sizes}
    far, counts = farthest_point_sample(places, rate=0.25, **sizes)
    random, _ = random_sample(**sizes, count=5)
    return (
        batch_from_sizes(counts),
        far,
        farthest_point_sample(places, count=3, **sizes)[0],
        curve_sample(places, rate=0.1, **sizes)[0],
        tokens.sample_index[random],
        torch.zeros(len(places)).index_add(0, random, torch.ones_like(random).float())
        > 1,  # none twice
    )


def pool(tokens):
    voxels = voxel_pool(tokens.positions, tokens.features, 0.25, sizes=tokens.sizes)
    share = segment_softmax(tokens.features, sizes=tokens.sizes)
    of_samples = segment_reduce(share, "max", sizes=tokens.sizes)
    back = segment_reduce(tokens.features, "max", index=voxels.assignment)
    return (*voxels[:2], torch.as_tensor(voxels.sizes), voxels.assignment, of_samples, back)


def within(tokens):
    lists, distance = radius(tokens.positions, 0.2, sizes=tokens.sizes, return_distance=True)
    graph = radius_graph(tokens.positions, 0.2, 8, sizes=tokens.sizes)
    return lists, distance, graph, radius(tokens.positions, 0.2)


def given_batches(places, features, batch, query_batch):
    """With `batch` in the place of `sizes`; that of the queries may end with an earlier sample."""
    tokens = TokenSet(places, features, batch=batch).cluster(8)
    some = tokens.select(tokens.features[:, 0] > 0.5)
    query = places[: len(query_batch)]
    back = interpolate(
        features, places, query, batch=batch, query_batch=query_batch, check_values=False
    )
    kept = some.positions, torch.as_tensor(some.sizes)
    return attend(tokens, tokens.neighborhoods(6)), kept, back


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
        sample,
        pool,
        within,
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


def test_batch_vectors():
    def given_(step):
        tokens = batch(step)
        vector = tokens.sample_index
        return tokens.positions, tokens.features, vector, vector[: len(vector) // 2]

    counts = compilations(given_batches, (given_(step) for step in range(6)))
    assert counts[-1] <= 2, counts


def every_fourth(tokens):
    index, sizes = best_of_runs(tokens.features[:, 0], sizes=tokens.sizes, rate=0.25)
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
