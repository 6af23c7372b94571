"""Exact neighbor search: both implementations against a definition written in numpy."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.strategies import UNEVEN, cloud, scattered
from pointformer import (
    Clusters,
    Neighborhoods,
    TokenSet,
    balanced_cluster,
    knn,
    nearest_clusters,
)
from pointformer.kernels.cpu import neighbors as cpu
from pointformer.kernels.neighbors import fused_nearest

PARITY = Path(__file__).parents[1] / "parity"
IMPLS = ("reference", "cpu")
LAYOUTS = ("uniform", "lattice", "equal", "tiny", "huge", "blob", "far", *UNEVEN)


def brute_force(query, points, count):
    """The `count` nearest rows and their squared distances, ties to the lowest row."""
    square = (query[:, None] - points) ** 2
    total = square[..., 0] + square[..., 1]
    if points.shape[1] == 3:
        total = total + square[..., 2]
    order = np.argsort(total, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(total, order, 1)


def layout(rng, kind, shape):
    """Float32 positions of a kind that is known for trouble."""
    if kind in UNEVEN:
        return cloud(rng, kind, *shape)[0].astype(np.float32)
    uniform = rng.random(shape)
    positions = {
        "uniform": uniform * 100,
        "lattice": np.floor(uniform * 9),
        "equal": np.full(shape, 3.5),
        "tiny": uniform**6 * 1e-20,  # squares underflow
        "huge": (uniform - 0.5) * 9e18,  # squares nearly overflow
        "far": uniform * 4 + 2.0**22,  # steps of 1/2: sums and middles are rounded
        "blob": np.where(rng.random((shape[0], 1)) < 0.7, uniform * 0.01 + 7, uniform * 100),
    }
    return positions[kind].astype(np.float32)


@st.composite
def ragged_points(draw, largest=150):
    """(generator, kind, dimensions, points per sample)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(0, largest), min_size=1, max_size=4))
    return rng, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([2, 3])), sizes


@given(ragged_points(), st.integers(1, 40) | st.sampled_from([128, 129]), st.booleans(), st.data())
def test_knn_is_brute_force(points, k, with_query, data):
    rng, kind, dimensions, sizes = points
    positions = layout(rng, kind, (sum(sizes), dimensions))
    query, query_sizes, include_self = None, None, True
    if with_query:
        query_sizes = [data.draw(st.integers(0, 60)) for _ in sizes]
        query = layout(rng, kind, (sum(query_sizes), dimensions))
    else:
        include_self = data.draw(st.booleans())
    asking, asking_sizes = (query, query_sizes) if with_query else (positions, sizes)
    index = np.full((len(asking), k), -1)
    square = np.full((len(asking), k), np.inf, np.float32)
    first, start = 0, 0
    for queries, size in zip(asking_sizes, sizes, strict=True):
        sample = positions[start : start + size]
        for row in range(first, first + queries):
            order, distance = brute_force(asking[row : row + 1], sample, size)
            order, distance = order[0] + start, distance[0]
            if not include_self:
                others = order != row
                order, distance = order[others], distance[others]
            listed = min(k, len(order))
            index[row, :listed], square[row, :listed] = order[:listed], distance[:listed]
        first, start = first + queries, start + size
    for impl in IMPLS:
        found, distance = knn(
            torch.from_numpy(positions),
            k,
            query_positions=None if query is None else torch.from_numpy(query),
            sizes=sizes,
            query_sizes=query_sizes,
            include_self=include_self,
            return_distance=True,
            impl=impl,
        )
        assert found.dtype == torch.int32
        np.testing.assert_array_equal(found, index)
        np.testing.assert_array_equal(distance, torch.from_numpy(square).sqrt())


def lists_by_definition(positions, clusters, limits, tile, include_own):
    """Neighborhoods token by token; `positions` (T, D) numpy."""
    assignment = clusters.assignment.numpy()
    centers = clusters.centers.numpy()
    lists, row, first = [], 0, 0
    for size, count, limit in zip(clusters.sizes, clusters.counts, limits, strict=True):
        for start in range(row, row + size, tile):
            members = positions[start : min(start + tile, row + size)]
            total = np.zeros(positions.shape[1], np.float32)
            for member in members:
                total = total + member
            mean = total / np.float32(len(members)) if tile > 1 else members[0]
            order = brute_force(mean[None], centers[first : first + count], count)[0][0] + first
            chosen = order[:limit]
            if include_own:
                own = set(assignment[start : start + len(members)])
                by_need = sorted(range(count), key=lambda i: order[i] not in own)
                chosen = order[sorted(by_need[:limit])]
            lists += [list(chosen)] * len(members)
        row, first = row + size, first + count
    width = max(limits)
    return np.array([x + [-1] * (width - len(x)) for x in lists]).reshape(len(lists), width)


@given(
    ragged_points(),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
    st.integers(0, 60),
    st.booleans(),
)
def test_nearest_clusters_are_brute_force(
    points, cluster_size, num_clusters, tile, include_own, global_size, in_order
):
    rng, kind, dimensions, sizes = points
    positions = torch.from_numpy(layout(rng, kind, (sum(sizes), dimensions)))
    clusters = balanced_cluster(
        positions, cluster_size, sizes=sizes, global_size=global_size if in_order else 10**6
    )
    clusters = replace(clusters, global_size=global_size)
    positions = positions[clusters.order]
    limits = [
        count if size <= global_size else min(num_clusters, count)
        for size, count in zip(sizes, clusters.counts, strict=True)
    ]
    expected = lists_by_definition(positions.numpy(), clusters, limits, tile, include_own)
    for impl in IMPLS:
        found = nearest_clusters(
            positions,
            clusters,
            num_clusters,
            scope="token" if tile == 1 else "tile",
            tile_size=tile,
            include_own=include_own,
            impl=impl,
        )
        assert found.cluster_index.dtype == torch.int32
        np.testing.assert_array_equal(found.cluster_index, expected)


@given(ragged_points(), st.integers(1, 8))
def test_ragged_batch_is_its_samples(points, num_clusters):
    rng, kind, dimensions, sizes = points
    positions = torch.from_numpy(layout(rng, kind, (sum(sizes), dimensions)))
    clusters = balanced_cluster(positions, 8, sizes=sizes)
    positions = positions[clusters.order]
    together = nearest_clusters(positions, clusters, num_clusters).cluster_index
    first = 0
    for part, index, count in zip(
        positions.split(sizes), together.split(sizes), clusters.counts, strict=True
    ):
        centers = clusters.centers[first : first + count]
        offsets = clusters.offsets[first : first + count + 1]
        alone = nearest_clusters(
            part,
            Clusters(
                torch.arange(len(part)), offsets - offsets[0], centers, (len(part),), (count,), 8
            ),
            num_clusters,
        ).cluster_index
        assert torch.equal(index[:, : alone.shape[1]] - first, alone)
        assert bool((index[:, alone.shape[1] :] == -1).all())
        first += count


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["mini_160x192", "mini_224", "tiny_224"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parity(name, stage, impl):
    stored = np.load(PARITY / f"{name}.npz")
    expected = stored[f"s{stage}_nearest_clusters"].astype(np.int64)
    batch, tokens, _ = expected.shape
    count = -(-tokens // 8)
    lattice = stored[f"s{stage}_positions"].reshape(-1, 2).astype(np.float32)
    positions = torch.from_numpy(lattice)
    sizes = (tokens,) * batch
    starts = [sample * tokens + 8 * c for sample in range(batch) for c in range(count)]
    offsets = torch.tensor([*starts, batch * tokens], dtype=torch.int32)
    centers = torch.stack([positions[a:b].mean(0) for a, b in pairwise(offsets.tolist())])
    clusters = Clusters(torch.arange(batch * tokens), offsets, centers, sizes, (count,) * batch, 8)
    found = nearest_clusters(positions, clusters, 6, impl=impl).cluster_index
    first = count * np.arange(batch)[:, None, None]
    np.testing.assert_array_equal(found.numpy().reshape(expected.shape) - first, expected)


def test_edges_run_from_members_to_queries():
    positions = torch.rand(30, 2, generator=torch.Generator().manual_seed(0))
    clusters = balanced_cluster(positions, 4)
    neighborhoods = nearest_clusters(positions[clusters.order], clusters, 3)
    token, query = neighborhoods.to_edge_index()
    assignment = clusters.assignment
    pairs = {(int(c), q) for q, row in enumerate(neighborhoods.cluster_index) for c in row}
    expected = {(t, q) for t in range(30) for q in range(30) if (int(assignment[t]), q) in pairs}
    assert set(zip(token.tolist(), query.tolist(), strict=True)) == expected
    assert len(token) == len(expected)


@given(
    sizes=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    listed=st.integers(1, 30),
    kept=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_thinned_lists_are_those_of_the_formula(sizes, listed, kept, seed):
    """In whole numbers; the nearest and the farthest stay, in order, and nothing is twice there."""
    g = torch.Generator().manual_seed(seed)
    tokens = TokenSet(torch.rand(sum(sizes), 2, generator=g), torch.zeros(sum(sizes), 1), sizes)
    whole = tokens.cluster(4, global_size=16).neighborhoods(listed)
    thinned = whole.thinned(kept)
    for all_of, found in zip(
        whole.cluster_index.tolist(), thinned.cluster_index.tolist(), strict=True
    ):
        own = [cluster for cluster in all_of if cluster >= 0]
        expected = own
        if whole.num_clusters > kept and len(own) > kept:
            n, last = len(own), max(1, kept - 1)
            roots = [max(m for m in range(1, n + 1) if m**last <= n**i) for i in range(kept)]
            expected = [own[max(root - 1, i)] for i, root in enumerate(roots)]
            assert expected[-1] == own[-1] or kept == 1
        assert [cluster for cluster in found if cluster >= 0] == expected
        assert found == sorted(found, key=lambda c: (c < 0, own.index(c) if c >= 0 else 0))
    assert thinned.num_clusters == min(kept, whole.num_clusters)
    assert torch.equal(whole.nearest(kept).cluster_index, whole.cluster_index[:, :kept])


@pytest.mark.parametrize("places", [[0, 3, 15, 63], [0, 1, 3, 7, 15, 31, 63]])
def test_thinned_lists_have_whole_roots(places):
    """Of 64 the third and sixth ones, of which floating point falls short."""
    positions = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    whole = TokenSet(positions, torch.zeros(64, 1)).cluster(1).neighborhoods(64)
    assert whole.num_clusters == 64
    thinned = whole.thinned(len(places)).cluster_index
    assert torch.equal(thinned, whole.cluster_index[:, places])


def test_thinned_lists_of_samples_alike_stay_those_of_the_first():
    tokens = TokenSet.from_grid(torch.zeros(3, 1, 24, 20)).cluster(8)
    whole = tokens.neighborhoods(18)
    thinned, short = whole.thinned(6), whole.nearest(6)
    assert whole.copies == thinned.copies == short.copies == 3
    index = thinned.cluster_index.unflatten(0, (3, -1))
    count = tokens.clusters.counts[0]
    assert torch.equal(index[1], index[0] + count)
    assert torch.equal(index[2], index[0] + 2 * count)
    assert whole.thinned(18) is whole


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_runs_give_the_same_lists(threads):
    positions = torch.rand(5000, 3, generator=torch.Generator().manual_seed(1))
    expected = knn(positions, 5, impl="reference", return_distance=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(2):
            found = knn(positions, 5, impl="cpu", return_distance=True)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def leaves_per_block(positions, k):
    """Of eight points each that hold the k nearest of eight queries, as the kernel finds them: in
    the middle, and the share of blocks for which they are too many to search together."""
    order = cpu.curve_order(positions, (len(positions),))
    tree = cpu.plant_tree(positions[order], order.astype(np.int32), (len(positions),))
    buffer, spare = np.empty((2, cpu._MOST_LEAVES), np.int32)
    scratch = (np.empty(96, np.int32), np.empty(96, np.float32), np.empty(8, np.float32))
    index, distance = np.empty(k, np.int32), np.empty(k, np.float32)
    found = []
    for start in range(0, len(order) - 8, 8 * 7):
        block = np.pad(positions[order[start : start + 8]], [(0, 0), (0, 1)])
        reach = np.float32(0)
        for query in block:
            cpu._search_one(tree, 0, k, np.float32(np.inf), *query, scratch, index, distance)
            reach = max(reach, distance[-1])
        box = (tuple(block.min(0)), tuple(block.max(0)))
        found.append(cpu._leaves_within(tree, 0, *box, reach, buffer, spare))
    found = np.array(found)
    return np.median(found), (found < 0).mean()


@pytest.mark.parametrize("area", [1.0, 0.01, 1e-4])
@pytest.mark.parametrize("tokens", [4000, 64000])
def test_work_does_not_depend_on_density_or_size(tokens, area):
    """Nine points in ten in a part of the area: still a few dozen candidates for eight queries."""
    rng = np.random.default_rng(0)
    positions = rng.random((tokens, 2))
    positions[: tokens * 9 // 10] *= np.sqrt(area)
    median, too_many = leaves_per_block(positions.astype(np.float32), 4)
    assert median < 10
    assert too_many < 0.05


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("given_query", [False, True])
def test_registered_op(dimensions, given_query):
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(50, dimensions, generator=generator, requires_grad=True)
    query = torch.rand(20, dimensions, generator=generator, requires_grad=True)
    asking = (query, points, [12, 8]) if given_query else (None, points, [30, 20])
    torch.library.opcheck(fused_nearest, (*asking, [30, 20], [3, 4], 4, 0.5, given_query, 1, "cpu"))


def test_compiles_into_one_graph():
    positions = torch.rand(64, 2, generator=torch.Generator().manual_seed(3))
    clusters = balanced_cluster(positions, 8)
    positions = positions[clusters.order]

    def both(positions, clusters):
        lists = nearest_clusters(positions, clusters, 3, scope="tile", include_own=True)
        return lists.cluster_index, knn(positions, 4, return_distance=True)[1]

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(positions, clusters), both(positions, clusters), strict=True):
        assert torch.equal(a, b)


@given(
    ragged_points(largest=40).filter(lambda points: points[1] not in ("tiny", "huge")),
    st.integers(1, 9),
    st.booleans(),
)
def test_distances_equal_torch_cluster(points, k, include_self):
    """Of equally far points others may be listed, within what rounding leaves open."""
    pytest.importorskip("torch_cluster", reason="torch-cluster is not installed (extra: pyg)")
    rng, kind, dimensions, sizes = points
    positions = torch.from_numpy(layout(rng, kind, (sum(sizes), dimensions)))
    kwargs = {"sizes": sizes, "include_self": include_self, "return_distance": True}
    index, theirs = knn(positions, k, impl="torch_cluster", **kwargs)
    own_index, ours = knn(positions, k, **kwargs)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)
    assert torch.equal(index < 0, own_index < 0)
    gap = positions[:, None] - positions[index.long().clamp(min=0)]
    named = gap.double().norm(dim=2).where(index >= 0, torch.inf)
    torch.testing.assert_close(theirs.double(), named, rtol=1e-6, atol=0)
    listed = index.sort(1).values
    assert not bool(((listed[:, 1:] == listed[:, :-1]) & (listed[:, 1:] >= 0)).any())


@given(ragged_points(largest=60), st.integers(1, 6))
def test_clusters_equal_torch_cluster(points, num_clusters):
    pytest.importorskip("torch_cluster", reason="torch-cluster is not installed (extra: pyg)")
    rng, _, dimensions, sizes = points
    positions = torch.from_numpy(layout(rng, "uniform", (sum(sizes), dimensions)))  # no ties
    clusters = balanced_cluster(positions, 4, sizes=sizes, global_size=20)
    positions = positions[clusters.order]
    theirs, ours = (
        nearest_clusters(positions, clusters, num_clusters, impl=impl).cluster_index
        for impl in ("torch_cluster", None)
    )
    assert torch.equal(theirs, ours)


def test_torch_cluster_is_an_error_where_it_is_not_installed():
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(
            ValueError, match=r"torch-cluster is not installed \(pip install.*'reference'"
        ),
    ):
        knn(POINTS, 1, impl="torch_cluster")


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["1e6", "1e12", "strays", "blobs"])
def test_points_far_away_do_not_matter(kind, dimensions):
    """Neither for the lists nor for the work: eight consecutive points are near each other."""
    positions = scattered(kind, 4000, dimensions)
    for found, expected in zip(
        knn(positions, 5, return_distance=True),
        knn(positions, 5, return_distance=True, impl="reference"),
        strict=True,
    ):
        assert torch.equal(found, expected)

    def spread(positions):
        order = torch.from_numpy(cpu.curve_order(positions.numpy(), [4000]))
        leaves = positions[order].view(500, 8, dimensions)
        return (leaves.amax(1) - leaves.amin(1)).amax(1).median()

    even = 100.0 if kind != "blobs" else 0.15
    assert spread(positions) < 1.5 * spread(scattered("even", 4000, dimensions)) * even / 100


@pytest.mark.parametrize("along_curve", [False, True])
@pytest.mark.parametrize("levels", [4, 12, 2**20])
def test_queries_in_any_order_and_hundreds_of_equal_points(levels, along_curve):
    """Queries far apart in a block, and more candidates for one than are sorted together."""
    g = torch.Generator().manual_seed(0)
    positions = (torch.rand(4000, 2, generator=g) * levels).round()
    lists = (
        knn(positions, 9, return_distance=True, along_curve=along_curve, impl=impl)
        for impl in IMPLS
    )
    for expected, found in zip(*lists, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_nothing_is_lost_where_float32_is_coarse(dimensions):
    """Far from the origin the middle of a block is rounded by as much as neighbors are apart."""
    rng = np.random.default_rng(0)
    positions = torch.from_numpy(layout(rng, "far", (40 * 300, dimensions)))
    sizes = [300] * 40
    clusters = balanced_cluster(positions, 8, sizes=sizes)
    ordered = positions[clusters.order]
    for search in (
        lambda impl: knn(positions, 16, sizes=sizes, impl=impl),
        lambda impl: nearest_clusters(ordered, clusters, 6, impl=impl).cluster_index,
    ):
        assert torch.equal(search("cpu"), search("reference"))


def test_cells_are_divided_until_points_are_equal():
    rng = np.random.default_rng(0)
    nested = np.concatenate([rng.random((40, 2)) * 10.0**-n for n in range(25)])
    nested = np.concatenate([nested, nested[:1].repeat(30, 0)]).astype(np.float32)
    order = cpu.curve_order(nested, [500, 530])
    assert sorted(order[:500]) == list(range(500))
    assert sorted(order[500:]) == list(range(500, 1030))


POINTS = torch.rand(20, 2)
CLUSTERS = balanced_cluster(POINTS, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_clusters(POINTS[:9], CLUSTERS), "positions: expected 20 rows"),
        (lambda: nearest_clusters(POINTS, CLUSTERS, 0), "num_clusters"),
        (lambda: nearest_clusters(POINTS, CLUSTERS, scope="row"), "scope: expected one of"),
        (lambda: nearest_clusters(POINTS, CLUSTERS, tile_size=0), "tile_size"),
        (lambda: nearest_clusters(POINTS * torch.nan, CLUSTERS), "sample 0 has a NaN"),
        (lambda: nearest_clusters(POINTS, POINTS), "clusters: expected Clusters"),
        (lambda: nearest_clusters(torch.rand(20, 3), CLUSTERS), "clusters.centers: expected shape"),
        (lambda: nearest_clusters(POINTS[CLUSTERS.order], CLUSTERS, impl="gpu"), "impl='gpu'"),
        (lambda: nearest_clusters(POINTS, CLUSTERS, 2.5), "num_clusters: .* got 2.5"),
        (lambda: knn(POINTS, 0), "k: expected"),
        (lambda: knn(POINTS, None), "k: expected a positive integer, got None"),
        (lambda: knn(POINTS * 1e19, 2), "sample 0 is farther than 4.6e.18 .* larger units"),
        (lambda: knn(POINTS, 2, sizes=[3, 4]), "sizes"),
        (lambda: knn(POINTS, 2, query_positions=POINTS, include_self=False), "include_self"),
        (lambda: knn(POINTS, 2, query_sizes=[20]), "query_sizes"),
        (
            lambda: knn(POINTS, 2, query_positions=POINTS, query_sizes=[10, 10]),
            "query_sizes: expected 1",
        ),
        (lambda: knn(POINTS, 2, query_positions=POINTS * torch.inf), "query_positions: sample 0"),
        (lambda: knn(POINTS.double(), 2), "positions: expected dtype float32"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_what_is_not_looked_for_passes():
    positions = torch.rand(20, 2)
    clusters = balanced_cluster(positions, 4)
    nearest_clusters(positions, clusters, 2, check_values=False)  # rows in input order
    Neighborhoods.from_lists(torch.tensor([[1, 1]]), positions, check_values=False)  # twice


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_dense_sample_does_not_narrow_the_search_in_the_next(dimensions):
    dense = torch.rand(100, dimensions, generator=torch.Generator().manual_seed(0)) / 1000
    axes = [torch.arange(20.0), torch.arange(15.0), torch.zeros(1)][:dimensions]
    positions = torch.cat([dense, torch.cartesian_prod(*axes) * 5])
    found, expected = (knn(positions, 3, sizes=(100, 300), impl=impl) for impl in IMPLS)
    assert torch.equal(found, expected)
