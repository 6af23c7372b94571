"""Balanced clustering on a GPU: equal to the CPU's at size, repeatable, capturable."""

import pytest
import torch

from helpers.fake_gpu import dirty_memory
from helpers.strategies import full_lattice
from pointformer import balanced_cluster
from pointformer.kernels.clustering import fused_cluster_centers

pytestmark = pytest.mark.gpu
CURVES = ("hilbert", "morton", "peano", "snake", "kd")


def assert_equal(ours, theirs):
    assert torch.equal(ours.order.cpu(), theirs.order.cpu())
    assert torch.equal(ours.offsets.cpu(), theirs.offsets.cpu())
    assert torch.equal(ours.centers.cpu(), theirs.centers.cpu())


@pytest.mark.parametrize("anchors", [True, False])
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("sizes", [(200_000,), (50_000,) * 4, (100_000, 0, 7, 99_993)])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_equal_to_the_cpu(dimensions, sizes, curve, anchors):
    generator = torch.Generator().manual_seed(0)
    extent = (512.0, 300.0, 77.0)[:dimensions]
    positions = torch.rand(sum(sizes), dimensions, generator=generator) * torch.tensor(extent)
    positions[::3] = positions[::3].floor()  # ties
    kwargs = {"sizes": sizes, "extent": extent, "curve": curve, "anchors": anchors}
    theirs = balanced_cluster(positions, impl="cpu", **kwargs)
    with dirty_memory():
        ours = balanced_cluster(positions.cuda(), **kwargs)
    assert_equal(ours, theirs)
    assert_equal(balanced_cluster(positions.cuda(), **kwargs), ours)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("layout", ["equal", "blob", "row", "stray"])
def test_uneven_density(layout, curve):
    generator = torch.Generator().manual_seed(1)
    positions = torch.rand(100_000, 2, generator=generator)
    if layout == "equal":
        positions[:] = 0.25
    elif layout == "blob":
        positions[:90_000] *= 0.1
    elif layout == "stray":
        positions[7] = 1e9
    else:
        positions *= torch.tensor([4096.0, 1.0])
    kwargs = {"extent": None, "curve": curve}
    assert_equal(
        balanced_cluster(positions.cuda(), **kwargs), balanced_cluster(positions, **kwargs)
    )


def test_offsets_beyond_32_bits():
    """Element offsets of positions pass 2**31 where rows do not."""
    rows = (1 << 31) // 3 + 1000
    if torch.cuda.get_device_properties(0).total_memory < 16 * 5 * rows:
        pytest.skip("needs a GPU with about 60 GB of memory")
    positions = torch.zeros(rows, 3, device="cuda")
    positions[-1000:] = 1 + torch.arange(1000, device="cuda")[:, None]
    order = torch.arange(rows, device="cuda")
    offsets = torch.tensor([0, 8, rows - 8, rows], dtype=torch.int32, device="cuda")
    centers = fused_cluster_centers(positions, order, offsets[2:], "triton")
    assert centers.tolist() == [[996.5] * 3]


def test_a_graph_replays():
    positions = full_lattice((64, 48)).repeat(2, 1).cuda()

    def run():
        clusters = balanced_cluster(positions, sizes=(3072,) * 2, extent=(64, 48))
        return clusters.order, clusters.centers

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    positions.copy_(positions.flip(0))
    graph.replay()
    for ours, theirs in zip(captured, run(), strict=True):
        assert torch.equal(ours, theirs)
