"""Neighborhood attention: the fused CPU path against the reference and the block's Linear layers.

Sizes are those of AFF-Mini's stages at 224 px, batch 8; its last stage is global.
"""

import pytest
import torch

from pointformer import balanced_cluster, nearest_clusters, neighborhood_attention

BATCH = 8
STAGES = [(56, 32, 2), (28, 128, 4), (14, 256, 8), (7, 384, 16)]


def stage(side, channels, heads):
    """Leaves that take gradients, positions and neighborhoods of a stage."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([x.flatten(), y.flatten()], 1).float().repeat(BATCH, 1)
    sizes = (side * side,) * BATCH
    clusters = balanced_cluster(
        positions, sizes=sizes, extent=((float(side), float(side)),) * BATCH, global_size=49
    )
    positions = positions[clusters.order]
    neighborhoods = nearest_clusters(positions, clusters).with_plan()
    tokens, width = len(positions), channels // heads
    leaves = {
        "query": torch.randn(tokens, heads, width),
        "key_value": torch.randn(tokens, heads, 2, width),
        "position_weight": torch.randn(heads, 5) / 5,
        "position_bias": torch.randn(heads),
        "blank_key": torch.randn(heads, width),
        "blank_value": torch.randn(heads, width),
    }
    return leaves, positions, neighborhoods


def block_linears(channels):
    """The Linear layers of a transformer block: query, key and value, projection, MLP."""
    pairs = [(1, 1), (1, 2), (1, 1), (1, 2), (2, 1)]
    return [torch.nn.Linear(a * channels, b * channels) for a, b in pairs]


@pytest.mark.parametrize(("side", "channels", "heads"), STAGES)
@pytest.mark.parametrize("training", [False, True])
def test_neighborhood_attention(compare, side, channels, heads, training):
    leaves, positions, neighborhoods = stage(side, channels, heads)
    linears = block_linears(channels)
    inputs = [torch.randn(len(positions), layer.in_features) for layer in linears]
    if training:
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        inputs = [x.requires_grad_() for x in inputs]

    def attention(impl):
        query, key_value, *_ = leaves.values()
        learned = {n: x for n, x in leaves.items() if n not in ("query", "key_value")}
        key, value = key_value.unbind(2)
        output = neighborhood_attention(
            query, key, value, positions, neighborhoods, **learned, impl=impl
        )
        if training:
            torch.autograd.grad(output, list(leaves.values()), output.detach())

    def linear():
        for layer, x in zip(linears, inputs, strict=True):
            output = layer(x)
            if training:
                torch.autograd.grad(output, [x, layer.weight, layer.bias], output.detach())

    sides = {
        "cpu": lambda: attention("cpu"),
        "reference": lambda: attention("reference"),
        "linear": linear,
    }
    with torch.set_grad_enabled(training):
        compare(**sides)
