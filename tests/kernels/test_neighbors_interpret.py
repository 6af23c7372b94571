"""Exact neighbor search in Triton's interpreter: the lists of the CPU, bit for bit."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.fake_gpu import dirty_memory, fake_gpu
from helpers.strategies import scattered, tokens
from pointformer import Clusters, TokenSet, balanced_cluster, knn, nearest_clusters, radius
from pointformer.kernels.neighbors import fused_nearest
from pointformer.kernels.triton import neighbors as kernels
from pointformer.kernels.triton.runtime import INTERPRETED

PARITY = Path(__file__).parents[1] / "parity"

if not INTERPRETED:
    reason = "kernels run compiled here: set TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def many_queries_per_program():
    """What a program costs here hardly depends on its queries."""
    with mock.patch.object(kernels, "_QUERIES", 256):
        yield


def assert_same(run):
    with dirty_memory():
        ours = run("triton")
    for mine, theirs in zip(ours, run("cpu"), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@given(
    sample=tokens(max_size=25, max_samples=3),
    k=st.sampled_from([1, 3, 6, 13]),
    scale=st.sampled_from([1.0, 1.0, 1e-21, 1e15]),  # squares that underflow, very large ones
    data=st.data(),
)
def test_knn_is_that_of_the_cpu(sample, k, scale, data):
    positions = sample.positions * scale
    kwargs = {"include_self": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        sizes = [data.draw(st.integers(0, 9)) for _ in sample.sizes]
        query = torch.rand(sum(sizes), sample.dimensions) * 40 * scale
        kwargs = {"query_positions": query, "query_sizes": sizes}
    kwargs |= {"sizes": sample.sizes, "return_distance": True}
    kwargs["along_curve"] = data.draw(st.booleans())
    with mock.patch.multiple(kernels, _IN_LIST=8, _LISTS=(4, 8)):  # longer ones take two passes
        assert_same(lambda impl: knn(positions, k, impl=impl, **kwargs))


@given(
    sample=tokens(max_size=25, max_samples=3),
    r=st.sampled_from([0.0, 1.0, 2.0, 30.0]),  # on lattices with points on the border
    k=st.sampled_from([2, 6, 13]),
    along_curve=st.booleans(),
)
def test_radius_is_that_of_the_cpu(sample, r, k, along_curve):
    kwargs = {"sizes": sample.sizes, "return_distance": True, "along_curve": along_curve}
    with mock.patch.multiple(kernels, _IN_LIST=8, _LISTS=(4, 8)):  # longer ones take two passes
        assert_same(lambda impl: radius(sample.positions, r, k, impl=impl, **kwargs))


@given(
    sample=tokens(max_size=50, max_samples=3),
    cluster_size=st.integers(1, 9),
    num_clusters=st.integers(1, 9),
    tile=st.sampled_from([1, 3, 16]),
    include_own=st.booleans(),
    global_size=st.sampled_from([0, 20]),
)
def test_clusters_are_those_of_the_cpu(
    sample, cluster_size, num_clusters, tile, include_own, global_size
):
    clusters = balanced_cluster(
        sample.positions, cluster_size, sizes=sample.sizes, global_size=global_size
    )
    positions = sample.positions[clusters.order]
    kwargs = {
        "scope": "token" if tile == 1 else "tile",
        "tile_size": tile,
        "include_own": include_own,
    }
    assert_same(
        lambda impl: [
            nearest_clusters(positions, clusters, num_clusters, impl=impl, **kwargs).cluster_index
        ]
    )


@pytest.mark.long
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_tree_of_several_levels(dimensions):
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(1500, dimensions, generator=generator)
    positions[:1300] *= 0.01
    query = positions[::40] + 0.001
    kwargs = {"query_positions": query, "sizes": [700, 800], "query_sizes": [18, 20]}
    assert_same(lambda impl: knn(positions, 6, return_distance=True, impl=impl, **kwargs))
    assert_same(lambda impl: knn(positions.round(decimals=1), 40, impl=impl, **kwargs)[None])


def test_a_tree_made_by_two_launches():
    positions = torch.rand(8500, 2, generator=torch.Generator().manual_seed(1))
    positions[:7000] *= 0.02
    query = positions[::2000] + 1e-4
    kwargs = {"query_positions": query, "sizes": [300, 8200], "query_sizes": [1, 4]}
    assert_same(lambda impl: knn(positions, 4, return_distance=True, impl=impl, **kwargs))


@pytest.mark.long
@pytest.mark.parametrize("along_curve", [False, True])
def test_a_tree_of_four_levels(along_curve):
    """More than 262,144 points: nodes of three levels wait at once."""
    count = 8 * 32**3 + 5000
    positions = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    positions[: count // 2] *= 0.01
    positions = positions[balanced_cluster(positions).order]
    query = positions[torch.arange(6) * count // 6] + 1e-4
    kwargs = {"query_positions": query, "return_distance": True, "along_curve": along_curve}
    with mock.patch.object(kernels, "_BLOCK", 1 << 14):
        assert_same(lambda impl: knn(positions, 6, impl=impl, **kwargs))


@pytest.mark.parametrize("stage", [2, 3])
def test_released_neighborhoods(stage):
    stored = np.load(PARITY / "mini_224.npz")
    expected = stored[f"s{stage}_nearest_clusters"][0].astype(np.int64)
    positions = torch.from_numpy(stored[f"s{stage}_positions"][0].astype(np.float32))
    offsets = torch.arange(0, len(positions) + 8, 8).clamp(max=len(positions)).int()
    centers = torch.stack([part.mean(0) for part in positions.split(8)])
    counts = (len(centers),)
    order = torch.arange(len(positions))
    clusters = Clusters(order, offsets, centers, (len(positions),), counts, 8)
    found = nearest_clusters(positions, clusters, 6, impl="triton").cluster_index
    np.testing.assert_array_equal(found, expected)


def points_per_query(positions, query):
    """Points that a tile of far apart queries looks at, for each of them."""
    looks = mock.Mock(wraps=kernels._point_squares)
    with mock.patch.object(kernels, "_point_squares", looks):
        knn(positions, 4, query_positions=query, impl="triton")
    return looks.call_count / len(query)


@pytest.mark.parametrize("area", [1.0, 1e-4])
@pytest.mark.parametrize("count", [500, 4000])
def test_work_does_not_depend_on_density_or_size(count, area):
    """Nine points in ten in a part of the area: still a few points per query."""
    rng = np.random.default_rng(0)
    positions = rng.random((count, 2))
    positions[: count * 9 // 10] *= np.sqrt(area)
    positions = torch.from_numpy(positions.astype(np.float32))
    query = positions[:: count // 48] + 1e-4
    assert points_per_query(positions, query) < 30


@pytest.mark.parametrize(
    ("kind", "dimensions"), [("1e6", 3), ("1e12", 2), ("strays", 2), ("blobs", 3)]
)
def test_work_does_not_depend_on_points_far_away(kind, dimensions):
    positions = scattered(kind, 2000, dimensions)
    near = positions if kind == "blobs" else scattered("even", 2000, dimensions)
    assert points_per_query(positions, near[::40] + 1e-3) < 40


@pytest.mark.parametrize("given_query", [False, True])
def test_registered_op(given_query):
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(30, 2, generator=generator, requires_grad=True)
    query = torch.rand(12, 2, generator=generator, requires_grad=True)
    asking = (query, points, [7, 5]) if given_query else (None, points, [18, 12])
    torch.library.opcheck(
        fused_nearest, (*asking, [18, 12], [3, 4], 4, 0.5, given_query, 1, "triton")
    )


def test_compiles_into_one_graph():
    positions = torch.rand(40, 2, generator=torch.Generator().manual_seed(3))
    clusters = balanced_cluster(positions, 8)
    positions = positions[clusters.order]

    def both(positions, clusters):
        options = {"scope": "tile", "include_own": True, "impl": "triton"}
        lists = nearest_clusters(positions, clusters, 3, **options)
        return lists.cluster_index, knn(positions, 4, return_distance=True, impl="triton")[1]

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(positions, clusters), both(positions, clusters), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("widths", [(12, 12), (15, 9)])
@pytest.mark.parametrize("scope", ["token", "tile"])
def test_batches_can_be_captured(scope, widths):
    """Uniform ones and ragged ones: nothing is copied from the host."""
    with fake_gpu():
        maps = [torch.rand(3, 8, width, device="cuda") for width in widths]
        tokens = TokenSet.from_grid(maps).cluster()
        neighborhoods = nearest_clusters(
            tokens.positions, tokens.clusters, scope=scope, include_own=True
        )
        assert neighborhoods.cluster_index.shape == (192, 6)
        for query in (None, torch.rand(40, 2, device="cuda")):
            sizes = None if query is None else [20, 20]
            index, distance = knn(
                tokens.positions, 3, query_positions=query, sizes=tokens.sizes, query_sizes=sizes,
                include_self=query is not None, return_distance=True,
            )  # fmt: skip
            assert index.shape == distance.shape == (192 if query is None else 40, 3)


def test_too_many_points_are_an_error():
    positions = torch.zeros(1, 2).expand(8**9 + 1, 2)
    with pytest.raises(ValueError, match=r"positions has 134217729 rows.*impl='reference'"):
        knn(positions, 1, check_values=False, impl="triton")
