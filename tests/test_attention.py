"""Neighborhood attention: the reference, and the fused CPU path against it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pointformer.clusters import Clusters, Neighborhoods
from pointformer.ops import neighborhood_attention
from pointformer.reference.relative_position import relative_position

PARITY = np.load(Path(__file__).parent / "parity" / "ops.npz")


def cut(sizes, cluster_size):
    """Cluster lengths of every sample, as even as possible (some are shorter than others)."""
    return [
        [len(part) for part in np.array_split(range(n), -(-n // cluster_size))] if n else []
        for n in sizes
    ]


def clusters_of(positions, lengths, cluster_size):
    flat = [length for sample in lengths for length in sample]
    offsets = torch.tensor([0, *np.cumsum(flat)], dtype=torch.int32)
    centers = torch.stack([p.mean(0) for p in positions.split(flat)]) if flat else positions[:0]
    return Clusters(
        order=torch.arange(len(positions)),
        offsets=offsets,
        centers=centers,
        sizes=tuple(sum(sample) for sample in lengths),
        counts=tuple(len(sample) for sample in lengths),
        cluster_size=cluster_size,
    )


def nearest(positions, clusters, radius):
    """Brute-force nearest clusters of each sample, -1 where it has fewer than `radius`."""
    index = torch.full((len(positions), radius), -1, dtype=torch.int32)
    token = cluster = 0
    for size, count in zip(clusters.sizes, clusters.counts, strict=True):
        centers = clusters.centers[cluster : cluster + count]
        distance = torch.cdist(positions[token : token + size].double(), centers.double())
        found = distance.sort(dim=1, stable=True).indices[:, :radius] + cluster
        index[token : token + size, : found.shape[1]] = found.int()
        token, cluster = token + size, cluster + count
    return Neighborhoods(index, clusters)


def make_inputs(
    sizes=(19, 5),
    dimensions=2,
    heads=2,
    channels=8,
    cluster_size=3,
    radius=3,
    features=None,
    bias=True,
    blank=True,
    dtype=torch.float64,
    lattice=False,
    seed=0,
):
    """(tensors that take gradients, positions, neighborhoods) of a made-up token set."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = sum(sizes)
    positions = torch.rand(tokens, dimensions, generator=generator) * 10
    if lattice:  # equal positions within a neighborhood
        positions = positions.round() / 2
    lengths = cut(sizes, cluster_size)
    neighborhoods = nearest(positions, clusters_of(positions, lengths, cluster_size), radius)
    if features is None:
        features = 5 if dimensions == 2 else 7
    tensors = {name: normal(tokens, heads, channels) for name in ("query", "key", "value")}
    if features:
        tensors["position_weight"] = normal(heads, features) / 2
    if bias:
        tensors["position_bias"] = normal(heads)
    if blank:
        tensors["blank_key"] = normal(heads, channels)
        tensors["blank_value"] = normal(heads, channels)
    return tensors, positions, neighborhoods


def attend(tensors, positions, neighborhoods, **options):
    tensors = dict(tensors)
    query, key, value = (tensors.pop(name) for name in ("query", "key", "value"))
    return neighborhood_attention(query, key, value, positions, neighborhoods, **tensors, **options)


def gradients(tensors, positions, neighborhoods, cotangent, **options):
    """The output, and the gradient of each tensor by its name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = attend(leaves, positions, neighborhoods, **options)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype))
    return output.detach(), dict(zip(leaves, grads, strict=True))


def brute_force(tensors, positions, neighborhoods, scale):
    """The definition, one query at a time."""
    offsets = neighborhoods.clusters.offsets.tolist()
    rows_out = []
    for i, clusters in enumerate(neighborhoods.cluster_index.tolist()):
        rows = [j for c in clusters if c >= 0 for j in range(offsets[c], offsets[c + 1])]
        logits = scale * torch.einsum("hd,jhd->hj", tensors["query"][i], tensors["key"][rows])
        delta = positions[rows].to(logits.dtype) - positions[i]
        if "position_weight" in tensors:
            weight = tensors["position_weight"]
            phi = relative_position(delta, full=weight.shape[1] != delta.shape[1])
            logits = logits + weight @ phi.T
        if "position_bias" in tensors:
            logits = logits + tensors["position_bias"][:, None]
        values = tensors["value"][rows]
        if "blank_key" in tensors:
            blank = scale * (tensors["query"][i] * tensors["blank_key"]).sum(-1, keepdim=True)
            logits = torch.cat([logits, blank], -1)
            values = torch.cat([values, tensors["blank_value"][None]])
        rows_out.append(torch.einsum("hj,jhd->hd", logits.softmax(-1), values))
    return torch.stack(rows_out)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("options", [{}, {"blank": False}, {"features": 0, "bias": False}])
def test_reference_is_the_definition(dimensions, options):
    inputs = make_inputs(dimensions=dimensions, **options)
    output = attend(*inputs, scale=0.3)
    torch.testing.assert_close(output, brute_force(*inputs, scale=0.3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_reference_gradcheck(dimensions, blank, full):
    tensors, positions, neighborhoods = make_inputs(
        sizes=(7, 2),
        dimensions=dimensions,
        channels=2,
        heads=1,
        blank=blank,
        lattice=True,
        features=None if full else dimensions,
    )
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        return attend(named, positions, neighborhoods)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("case", ["mask", "full", "global"])
def test_released_attention(case):
    """Values and gradients of the released AFF's attention in float64."""
    data = {
        name.removeprefix(f"attn_{case}_"): torch.from_numpy(PARITY[name])
        for name in PARITY.files
        if name.startswith(f"attn_{case}_")
    }
    batch, tokens = data["positions"].shape[:2]
    positions = data["positions"].flatten(0, 1).float()
    # The released clusters are full, but for the last one of a sample.
    lengths = [[min(8, tokens - i) for i in range(0, tokens, 8)]] * batch
    clusters = clusters_of(positions, lengths, 8)
    per_sample = clusters.counts[0]
    first = torch.arange(batch)[:, None, None] * per_sample
    if case == "global":
        nearest_clusters = torch.arange(per_sample).expand(batch, tokens, per_sample)
    else:
        nearest_clusters = data["nearest_clusters"]
    neighborhoods = Neighborhoods((nearest_clusters + first).flatten(0, 1).int(), clusters)
    names = {
        "query": "q",
        "key": "k",
        "value": "v",
        "position_weight": "bias_weight",
        "position_bias": "bias_bias",
        "blank_key": "blank_k",
        "blank_value": "blank_v",
    }

    def packed(name):
        return data[name].flatten(0, 1) if data[name].dim() == 4 else data[name]

    output, grads = gradients(
        {name: packed(theirs) for name, theirs in names.items()},
        positions,
        neighborhoods,
        packed("cotangent"),
        scale=float(data["scale"]),
    )
    torch.testing.assert_close(output, packed("out"), rtol=0, atol=1e-10)
    for name, theirs in names.items():
        torch.testing.assert_close(grads[name], packed(f"grad_{theirs}"), rtol=0, atol=1e-10)
