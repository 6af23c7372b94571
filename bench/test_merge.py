"""Merging, PointConv and interpolation: fused CPU paths against references and Linear layers.

Sizes are those of AFF-Mini at 224 px, batch 8.
"""

import pytest
import torch

from pointformer import (
    balanced_cluster,
    interpolate,
    knn,
    nearest_clusters,
    point_conv,
    scored_merge,
)

BATCH = 8


def lattice(side, batch=BATCH):
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1).float().repeat(batch, 1)


def weight_net():
    net = {"weight": torch.randn(4, 5), "bias": torch.randn(4)}
    return net | {"norm_weight": torch.randn(4), "norm_bias": torch.randn(4)}


def backward(function, inputs):
    """A function that runs `function` forward and backward for all `inputs`."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    cotangent = torch.randn(function(**leaves).shape)
    values = list(leaves.values())
    return lambda: torch.autograd.grad(function(**leaves), values, cotangent)


@pytest.mark.parametrize(("side", "channels", "following"), [(56, 32, 128), (28, 128, 256)])
@pytest.mark.parametrize("training", [False, True])
def test_scored_merge(compare, side, channels, following, training):
    torch.manual_seed(0)
    sizes = (side * side,) * BATCH
    extent = ((float(side), float(side)),) * BATCH
    positions = lattice(side)
    clusters = balanced_cluster(positions, sizes=sizes, extent=extent)
    positions = positions[clusters.order]
    neighborhoods = nearest_clusters(positions, clusters)
    scores = torch.rand(len(positions))
    kept = scores.view(BATCH, -1).topk(side * side // 4).indices
    centers = (kept + side * side * torch.arange(BATCH)[:, None]).flatten()
    features = torch.randn(len(positions), channels)
    inputs = {"features": features, "scores": scores, **weight_net()}

    def merge(impl, **inputs):
        fixed = {"positions": positions, "center_index": centers, "neighborhoods": neighborhoods}
        return scored_merge(**inputs, **fixed, impl=impl)

    merged = merge("cpu", **inputs)
    linear = torch.nn.Linear(4 * channels, following)
    if training:
        sides = {
            impl: backward(lambda impl=impl, **x: merge(impl, **x), inputs)
            for impl in ("cpu", "reference")
        }
        sides["linear"] = backward(lambda merged: linear(merged), {"merged": merged})
        compare(**sides)
    else:
        with torch.no_grad():
            sides = {
                "cpu": lambda: merge("cpu", **inputs),
                "reference": lambda: merge("reference", **inputs),
                "linear": lambda: linear(merged),
            }
            compare(**sides)


def test_point_conv(compare):
    torch.manual_seed(0)
    positions = lattice(56, 2)
    index = knn(positions, 9, sizes=(56 * 56,) * 2)
    features, net = torch.randn(len(positions), 256), weight_net()
    linear = torch.nn.Linear(1024, 256)
    with torch.no_grad():
        out = point_conv(features, positions, index, **net)
        sides = {
            "cpu": lambda: point_conv(features, positions, index, **net),
            "reference": lambda: point_conv(features, positions, index, **net, impl="reference"),
            "linear": lambda: linear(out),
        }
        compare(**sides)


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("training", [False, True])
def test_interpolate(compare, k, training):
    torch.manual_seed(0)
    queries = lattice(56)
    rows = torch.randperm(56 * 56)[: 28 * 28]
    positions = queries.view(BATCH, -1, 2)[:, rows].flatten(0, 1)
    sizes, query_sizes = (28 * 28,) * BATCH, (56 * 56,) * BATCH
    index = knn(positions, k, query_positions=queries, sizes=sizes, query_sizes=query_sizes)
    features = torch.randn(len(positions), 64)

    def run(impl, features):
        return interpolate(features, positions, queries, neighbor_index=index, impl=impl)

    if training:
        inputs = {"features": features}
        sides = {
            impl: backward(lambda impl=impl, **x: run(impl, **x), inputs)
            for impl in ("cpu", "reference")
        }
        compare(**sides)
    else:
        compare(**{i: lambda i=i: run(i, features) for i in ("cpu", "reference")})
