"""Layers are the ops on their weights, and start as they say."""

import pytest
import torch

from pointformer import TokenSet, knn, neighborhood_attention, point_conv, scored_merge
from pointformer.clusters import Neighborhoods
from pointformer.nn import (
    Block,
    NeighborhoodAttention,
    PointConv,
    ScoredMerge,
    WeightNet,
    init_linear,
)


def tokens_of(dimensions=3, channels=16, sizes=(20, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    positions = torch.rand(count, dimensions, generator=generator) * 4
    features = torch.randn(count, channels, generator=generator)
    return TokenSet(positions, features, sizes).cluster(4)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("blank", [False, True])
def test_attention_is_the_op(dimensions, blank):
    torch.manual_seed(0)
    tokens = tokens_of(dimensions)
    neighborhoods = tokens.neighborhoods(2)
    layer = NeighborhoodAttention(16, 2, dimensions=dimensions, blank_token=blank)
    query, key, value = layer.qkv(tokens.features).view(-1, 3, 2, 8).unbind(1)
    blanks = {}
    if blank:
        blanks = {name: getattr(layer, name).view(2, 8) for name in ("blank_key", "blank_value")}
    want = neighborhood_attention(
        query,
        key,
        value,
        tokens.positions,
        neighborhoods,
        position_weight=layer.position.weight,
        position_bias=layer.position.bias,
        **blanks,
    ).flatten(1)
    bare = layer(tokens.features, tokens, neighborhoods, project=False)
    torch.testing.assert_close(bare, want)
    torch.testing.assert_close(layer(tokens.features, tokens, neighborhoods), layer.proj(want))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("expanded", [False, True])
def test_relative_values_are_the_op(expanded, impl):
    torch.manual_seed(0)
    tokens = tokens_of()
    around = tokens.neighborhoods(2)
    options = {"dimensions": 3, "expanded_position": expanded, "blank_token": False}
    layer = NeighborhoodAttention(16, 2, **options, relative_value=True)
    assert layer.position_value.shape == (2, 8, 7 if expanded else 3)
    without = NeighborhoodAttention(16, 2, **options)
    without.load_state_dict(layer.state_dict(), strict=False)
    # It starts as the layer without them, and learns them.
    start = layer(tokens.features, tokens, around, impl=impl)
    torch.testing.assert_close(start, without(tokens.features, tokens, around, impl=impl))
    start.square().sum().backward()
    assert layer.position_value.grad.any()
    torch.nn.init.normal_(layer.position_value)
    query, key, value = layer.qkv(tokens.features).view(-1, 3, 2, 8).unbind(1)
    want = neighborhood_attention(
        query,
        key,
        value,
        tokens.positions,
        around,
        position_weight=layer.position.weight,
        position_bias=layer.position.bias,
        position_value=layer.position_value,
        impl="reference",
    )
    out = layer(tokens.features, tokens, around, project=False, impl=impl)
    torch.testing.assert_close(out, want.flatten(1))


def test_attention_over_lists_of_neighbors():
    """Any lists: the same numbers in the order of the input, and by the reference."""
    torch.manual_seed(0)
    tokens = tokens_of()
    index = knn(tokens.positions, 5, sizes=tokens.sizes)
    around = Neighborhoods.from_lists(index, tokens.positions)
    layer = NeighborhoodAttention(16, 2, dimensions=3)
    out = layer(tokens.features, tokens, around)
    want = layer(tokens.features, tokens, around, impl="reference")
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_point_conv_is_the_op(dimensions):
    torch.manual_seed(0)
    tokens = tokens_of(dimensions)
    layer = PointConv(16, 24, 5, dimensions=dimensions)
    index = knn(tokens.positions, 5, sizes=tokens.sizes)
    summed = point_conv(tokens.features, tokens.positions, index, **layer.weight_net.arguments())
    want = layer.linear(layer.norm(summed))
    torch.testing.assert_close(layer(tokens).features, want)


@pytest.mark.parametrize("expanded", [False, True])
def test_scored_merge_is_the_op(expanded):
    torch.manual_seed(0)
    tokens = tokens_of()
    neighborhoods = tokens.neighborhoods(2)
    layer = ScoredMerge(16, 24, dimensions=3, expanded_position=expanded)
    scores = layer.logits(tokens.features).sigmoid()
    assert scores.shape == (29,)
    assert ((scores > 0) & (scores < 1)).all()
    index = torch.tensor([0, 7, 8, 22, 21])
    merged = layer(tokens, neighborhoods, scores, index, (3, 2))
    want = scored_merge(
        tokens.features,
        scores,
        tokens.positions,
        index,
        neighborhoods,
        **layer.weight_net.arguments(),
    )
    assert torch.equal(merged.positions, tokens.positions[index])
    assert merged.sizes == (3, 2)
    torch.testing.assert_close(merged.features, layer.linear(layer.norm(want)))


def test_blocks_learn():
    """All parameters get gradients, in 3-D as in 2-D."""
    for dimensions in (2, 3):
        torch.manual_seed(0)
        tokens = tokens_of(dimensions)
        block = Block(NeighborhoodAttention(16, 2, dimensions=dimensions), 16, 32, layer_scale=0.1)
        out, (rows, scale) = block(tokens, tokens.neighborhoods(2))
        (out.features + rows * scale).square().sum().backward()
        without = [
            name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()
        ]
        assert not without


def test_linear_layers_start_as_documented():
    torch.manual_seed(0)
    block = Block(NeighborhoodAttention(128, 8), 128, 512)
    before = block.attn.blank_key.clone()
    init_linear(block)
    for layer in block.modules():
        if isinstance(layer, torch.nn.Linear):
            assert not layer.bias.any()
            assert 0.017 < layer.weight.std() < 0.023
            assert layer.weight.abs().max() <= 2
    assert torch.equal(block.attn.blank_key, before)
    assert 0.8 < before.std() < 1.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeighborhoodAttention(16, 3), "dim: expected a multiple of 3"),
        (lambda: NeighborhoodAttention(16, 2, dimensions=4), "dimensions: expected at most 3"),
        (lambda: PointConv(16, 16, 0), "k: expected a positive integer"),
        (lambda: WeightNet(5, 0), "mid: expected a positive integer"),
        (lambda: ScoredMerge(0, 16), "dim: expected a positive integer"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_heed_the_eps_of_their_norms():
    torch.manual_seed(0)
    tokens = tokens_of()
    layer = PointConv(16, 24, 5, dimensions=3)
    layer.weight_net[1].eps = 0.5
    index = knn(tokens.positions, 5, sizes=tokens.sizes)
    net = layer.weight_net.arguments() | {"eps": 0.5}
    summed = point_conv(tokens.features, tokens.positions, index, **net)
    torch.testing.assert_close(layer(tokens).features, layer.linear(layer.norm(summed)))
    block = Block(NeighborhoodAttention(16, 2, dimensions=3), 16, 32).eval()
    block.norm2.eps = 0.5
    around = tokens.neighborhoods(2)
    with torch.no_grad():
        middle = tokens.features + block.attn(block.norm1(tokens.features), tokens, around)
        expected = middle + block.mlp(block.norm2(middle))
        out, pending = block(tokens, around)
    assert pending is None
    torch.testing.assert_close(out.features, expected)


@pytest.mark.parametrize("sizes", [(0,), (0, 0), ()])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_on_no_tokens(sizes, training):
    tokens = TokenSet(torch.zeros(0, 3), torch.zeros(0, 16), sizes).cluster(4)
    block = Block(NeighborhoodAttention(16, 2, dimensions=3), 16, 32, drop_path_rate=0.5)
    out, _ = block.train(training)(tokens, tokens.neighborhoods(2))
    assert out.features.shape == (0, 16)
    assert out.sizes == sizes


def test_scores_of_layers_in_half_precision_are_float32():
    torch.manual_seed(0)
    layer = ScoredMerge(16, 24).bfloat16()
    features = torch.randn(7, 16).bfloat16()
    logits = layer.logits(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, layer.score(features)[:, 0].float())
