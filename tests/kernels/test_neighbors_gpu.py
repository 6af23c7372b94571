"""Neighbor search on a GPU: equal to the CPU's at size, repeatable, capturable, no waiting."""

from dataclasses import replace

import pytest
import torch

from helpers.fake_gpu import dirty_memory
from helpers.strategies import full_lattice
from pointformer import TokenSet, balanced_cluster, knn, nearest_clusters

pytestmark = pytest.mark.gpu
SIZES = [(200_000,), (50_000,) * 4, (100_000, 0, 7, 99_993)]


def scattered(sizes, dimensions, layout="mixed", seed=0):
    """Positions with ties, or of uneven density."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(sum(sizes), dimensions, generator=generator)
    if layout == "blob":  # nine points in ten in a hundredth of the area
        crowded = torch.rand(len(positions), generator=generator) < 0.9
        positions[crowded] *= 0.01 ** (1 / dimensions)
        return positions
    if layout == "equal":
        return torch.full_like(positions, 0.25)
    if layout == "row":
        return positions * torch.tensor([4096.0, 1.0, 1.0])[:dimensions]
    positions *= 500
    positions[::3] = positions[::3].floor()
    return positions


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine.cpu(), other.cpu())


@pytest.mark.parametrize("k", [1, 6, 16, 40])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_knn_is_that_of_the_cpu(dimensions, sizes, k):
    positions = scattered(sizes, dimensions)
    kwargs = {"sizes": sizes, "include_self": False, "return_distance": True}
    theirs = knn(positions, k, **kwargs)
    with dirty_memory():
        ours = knn(positions.cuda(), k, **kwargs)
    assert_same(ours, theirs)
    assert_same(knn(positions.cuda(), k, **kwargs), ours)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_knn_of_queries_is_that_of_the_cpu(dimensions, sizes):
    points = scattered(sizes, dimensions)
    asking = [size // 3 + 1 for size in sizes]
    query = scattered(asking, dimensions, seed=1) * 1.1 - 20
    kwargs = {"sizes": sizes, "query_sizes": asking, "return_distance": True}
    ours = knn(points.cuda(), 5, query_positions=query.cuda(), **kwargs)
    assert_same(ours, knn(points, 5, query_positions=query, **kwargs))


@pytest.mark.parametrize("scope", ["token", "tile"])
@pytest.mark.parametrize("curve", ["hilbert", "snake"])
@pytest.mark.parametrize("sizes", SIZES)
def test_clusters_are_those_of_the_cpu(sizes, curve, scope):
    positions = scattered(sizes, 2)
    clusters = balanced_cluster(positions, sizes=sizes, curve=curve, global_size=10)
    positions = positions[clusters.order]
    on_gpu = balanced_cluster(positions.cuda(), sizes=sizes, curve=curve, global_size=10**9)
    on_gpu = replace(on_gpu, global_size=10)
    kwargs = {"scope": scope, "include_own": True}
    with dirty_memory():
        ours = nearest_clusters(positions.cuda(), on_gpu, **kwargs)
    on_cpu = balanced_cluster(positions, sizes=sizes, curve=curve, global_size=10**9)
    on_cpu = replace(on_cpu, global_size=10)
    theirs = nearest_clusters(positions, on_cpu, **kwargs)
    assert_same([ours.cluster_index], [theirs.cluster_index])


@pytest.mark.parametrize("layout", ["equal", "blob", "row"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_uneven_density(dimensions, layout):
    positions = scattered((300_000,), dimensions, layout)
    if layout != "equal":  # where the CPU takes long
        ours = knn(positions.cuda(), 4, return_distance=True)
        assert_same(ours, knn(positions, 4, return_distance=True))
    clusters = balanced_cluster(positions)
    positions = positions[clusters.order]
    theirs = nearest_clusters(positions, clusters).cluster_index
    on_gpu = balanced_cluster(positions.cuda(), global_size=len(positions))
    on_cpu = balanced_cluster(positions, global_size=len(positions))
    assert_same([on_gpu.centers], [on_cpu.centers])
    on_gpu = replace(on_gpu, global_size=0)
    assert_same([nearest_clusters(positions.cuda(), on_gpu).cluster_index], [theirs])


def milliseconds(run):
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = []
    for _ in range(5):
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return min(times)


def test_time_does_not_depend_on_density():
    times = []
    for layout in ("mixed", "blob", "equal"):
        positions = scattered((1_000_000,), 2, layout).cuda()
        times.append(milliseconds(lambda x=positions: knn(x, 6, check_values=False)))
    assert max(times) < 10 * times[0]


def test_nothing_waits_for_the_device():
    positions = full_lattice((64, 48)).repeat(2, 1).cuda()
    batch = {"sizes": (3072,) * 2}
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        clusters = balanced_cluster(positions, extent=(64, 48), check_values=False, **batch)
        ordered = positions[clusters.order]
        for scope in ("token", "tile"):
            nearest_clusters(ordered, clusters, scope=scope, include_own=True, check_values=False)
        knn(positions, 8, include_self=False, check_values=False, **batch)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_a_graph_replays():
    features = torch.rand(2, 3, 48, 64, device="cuda")
    tokens = TokenSet.from_grid(features).cluster()
    positions = tokens.positions.clone()

    def run():
        lists = nearest_clusters(positions, tokens.clusters, scope="tile", include_own=True)
        return lists.cluster_index, *knn(
            positions, 6, sizes=tokens.sizes, include_self=False, return_distance=True
        )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    positions.copy_(positions.flip(1) + 0.25)
    graph.replay()
    assert_same(captured, run())
