"""What point clouds need, against torch-cluster, torch-scatter and scipy, in one run."""

import pytest
import torch

from helpers.strategies import scattered
from pointformer import (
    Neighborhoods,
    balanced_cluster,
    farthest_point_sample,
    knn,
    nearest_clusters,
    neighborhood_attention,
    radius,
    segment_reduce,
    segment_softmax,
)

POINTS = 200_000


@pytest.fixture
def torch_cluster():
    return pytest.importorskip("torch_cluster", reason="torch-cluster is not installed")


@pytest.fixture
def torch_scatter():
    return pytest.importorskip("torch_scatter", reason="torch-scatter is not installed")


def test_knn(compare, torch_cluster):
    """Goals: 2x scipy's k-d tree, 7x torch-cluster, and less than 1.5x the time with 1% strays."""
    from scipy.spatial import cKDTree

    positions, strays = scattered("even", POINTS, 3), scattered("strays", POINTS, 3)
    array, threads = positions.numpy(), torch.get_num_threads()
    compare(
        rounds=3,
        cpu=lambda: knn(positions, 16),
        scipy=lambda: cKDTree(array).query(array, 16, workers=threads),
        torch_cluster=lambda: torch_cluster.knn(positions, positions, 16),
        strays=lambda: knn(strays, 16),
    )


def test_attention(compare):
    """Forward and backward of 100,000 tokens, four heads of 16 channels, about 48 keys each. Goal:
    30x torch's own attention of gathered keys and values with the same bias of positions. Also the
    relative value term, which that side has not."""
    torch.manual_seed(0)
    positions = scattered("even", POINTS // 2, 3)
    clusters = balanced_cluster(positions)
    positions = positions[clusters.order]
    neighborhoods = nearest_clusters(positions, clusters).with_plan()
    rows, mask = neighborhoods.members()
    rows = rows.clamp(min=0)
    heads, width = 4, 16
    query, key, value = (
        torch.randn(len(positions), heads, width, requires_grad=True) for _ in range(3)
    )
    position_weight = (torch.randn(heads, 7) / 5).requires_grad_()
    position_value = (torch.randn(heads, width, 7) / 5).requires_grad_()
    learned = [query, key, value, position_weight]

    def ours(**more):
        return neighborhood_attention(
            query, key, value, positions, neighborhoods, position_weight=position_weight, **more
        )

    def gathered():
        offset = positions[rows] - positions[:, None]
        distance = offset.norm(dim=-1, keepdim=True)
        unit = torch.where(distance > 0, offset / distance, 0.0)
        features = torch.cat([offset, distance, unit], -1)
        bias = torch.einsum("tmf,hf->thm", features, position_weight)
        bias = bias.masked_fill(~mask[:, None], -torch.inf)
        keys, values = key[rows].transpose(1, 2), value[rows].transpose(1, 2)
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query[:, :, None], keys, values, attn_mask=bias[:, :, None])[:, :, 0]

    def trained(function, leaves, **more):
        output = function(**more)
        torch.autograd.grad(output, leaves, output.detach())

    with torch.no_grad():
        torch.testing.assert_close(ours(), gathered(), rtol=1e-3, atol=1e-3)
    compare(
        rounds=3,
        cpu=lambda: trained(ours, learned),
        value_term=lambda: trained(ours, [*learned, position_value], position_value=position_value),
        gathered=lambda: trained(gathered, learned),
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("k", [16, 48])
def test_attention_over_lists(compare, k, channels, training):
    """Of 20,000 points to their nearest ones, heads of 16 channels, forward and with `training`
    backward. Goal: 5x the reference, which gathers keys and values."""
    torch.manual_seed(0)
    positions = scattered("even", POINTS // 10, 3)
    positions = positions[balanced_cluster(positions).order]
    lists = Neighborhoods.from_lists(knn(positions, k), positions).with_plan()
    heads = channels // 16
    rows = [torch.randn(len(positions), heads, 16, requires_grad=training) for _ in range(3)]
    position_weight = (torch.randn(heads, 7) / 5).requires_grad_(training)

    def attended(impl):
        output = neighborhood_attention(
            rows[0],
            rows[1],
            rows[2],
            positions,
            lists,
            position_weight=position_weight,
            impl=impl,
        )
        if training:
            torch.autograd.grad(output, [*rows, position_weight], output.detach())

    compare(rounds=3, cpu=lambda: attended("cpu"), reference=lambda: attended("reference"))


@pytest.mark.parametrize("k", [16, 32, None])
def test_radius(compare, torch_cluster, k):
    """Goal: 3x. About 32 points are in reach."""
    positions = scattered("even", POINTS // 2, 3)
    r = 100 * (32 * 3 / (4 * torch.pi * len(positions))) ** (1 / 3)
    compare(
        rounds=3,
        cpu=lambda: radius(positions, r, k),
        torch_cluster=lambda: torch_cluster.radius(
            positions, positions, r, max_num_neighbors=k or 200
        ),
    )


def test_farthest_points(compare, torch_cluster):
    """Goal: 3x."""
    positions = scattered("even", POINTS // 2, 3)
    compare(
        rounds=2,
        cpu=lambda: farthest_point_sample(positions, count=4096),
        torch_cluster=lambda: torch_cluster.fps(
            positions, ratio=4095.5 / len(positions), random_start=False
        ),
    )


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_softmax(compare, torch_scatter, heads, order):
    """Of the 16 edges of 100,000 points. Goal: 1x."""
    from torch_scatter.composite import scatter_softmax

    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, POINTS // 2, (8 * POINTS,), generator=g)
    index = index.sort().values if order == "sorted" else index
    logits = torch.randn(len(index), heads, generator=g)
    compare(
        rounds=3,
        cpu=lambda: segment_softmax(logits, index=index, count=POINTS // 2),
        torch_scatter=lambda: scatter_softmax(logits, index, 0),
    )


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_pool(compare, torch_scatter, reduce):
    """200,000 tokens in 64 samples."""
    values = torch.randn(POINTS, 64, generator=torch.Generator().manual_seed(0))
    sizes = (POINTS // 64,) * 64
    index = torch.arange(64).repeat_interleave(POINTS // 64)
    compare(
        rounds=3,
        cpu=lambda: segment_reduce(values, reduce, sizes=sizes),
        torch_scatter=lambda: torch_scatter.scatter(values, index, 0, reduce=reduce),
    )
