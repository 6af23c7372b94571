"""Bytes that a call must at least move to and from memory, operations it must at least do.

Counted from the arguments of the call. Each input that it depends on is read once and each output
written once, in the dtypes of the call; what an implementation stores in between is not work but
choice. An operation is an addition, a multiplication or a division: a multiply-add is two.

T tokens of C channels (all heads together) in D dimensions, Q queries (where no others are given,
the tokens), K clusters, R clusters per query, E entries of such lists that are not -1, P pairs of a
query (or a center) and a neighbor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pointformer
from pointformer import Neighborhoods, TokenSet
from pointformer.models.complexity import (
    attention_multiply_adds,
    layer_multiply_adds,
    merge_multiply_adds,
)

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Work:
    """Least bytes to move and operations to do; a sum of calls adds both."""

    bytes: int = 0
    operations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)

    def __mul__(self, calls: int) -> Work:
        return Work(self.bytes * calls, self.operations * calls)


def num_bytes(*tensors: Tensor | None) -> int:
    """Of all elements, as if each tensor were contiguous."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def cluster_lengths(neighborhoods: Neighborhoods) -> Tensor:
    """(Q, R) int64 tokens in each cluster of `cluster_index`, 0 where it is -1."""
    index = neighborhoods.cluster_index.long()
    lengths = neighborhoods.clusters.offsets.diff().long()
    if len(lengths) == 0:
        return torch.zeros_like(index)
    return lengths[index.clamp(min=0)].where(index >= 0, 0)


def _lists(neighborhoods: Neighborhoods) -> int:
    return num_bytes(neighborhoods.cluster_index, neighborhoods.clusters.offsets)


def clustering(a: Arguments, output: TokenSet) -> Work:
    """`TokenSet.cluster`: find the order, and bring the tokens into it.

    Bytes: positions, features and fields in, once; out in the new order; order (8 T), offsets
    (4 (K+1)) and centers (4 K D).
    Operations: per token the squared distances to two anchors and their ratio, 2 (3 D - 1) + 1,
    where its sample is larger than `global_size`; and D additions for the center.
    """
    tokens, clusters = a["self"], output.clusters
    assert clusters is not None
    sorted_tokens = sum(size for size in tokens.sizes if size > a["global_size"])
    dimensions = tokens.dimensions
    return Work(
        2 * num_bytes(tokens.positions, tokens.features, *tokens.fields.values())
        + num_bytes(clusters.order, clusters.offsets, clusters.centers),
        sorted_tokens * (6 * dimensions - 1) + tokens.num_tokens * dimensions,
    )


def nearest_clusters(a: Arguments, output: Neighborhoods) -> Work:
    """`nearest_clusters`.

    Bytes: positions (4 T D) and centers (4 K D) in, the lists (4 T R) out.
    Operations: the squared distance of every listed cluster, E (3 D - 1).
    """
    positions, clusters = a["positions"], a["clusters"]
    entries = int((output.cluster_index >= 0).sum())
    return Work(
        num_bytes(positions, clusters.centers, output.cluster_index),
        entries * (3 * positions.shape[1] - 1),
    )


def knn(a: Arguments, output: Tensor | tuple[Tensor, Tensor]) -> Work:
    """`knn`.

    Bytes: points and queries in, lists (and distances) out. Operations: the squared distance of
    every listed point, E (3 D - 1).
    """
    found = output if isinstance(output, tuple) else (output,)
    entries = int((found[0] >= 0).sum())
    return Work(
        num_bytes(a["positions"], a["query_positions"], *found),
        entries * (3 * a["positions"].shape[1] - 1),
    )


def plan(a: Arguments, output: Neighborhoods) -> Work:
    """`Neighborhoods.with_plan`, whatever the implementation's lists are.

    Bytes: the lists (4 T R) in; for training, offsets (4 (K+1)) and queries (4 E) of the inverse
    lists out. No arithmetic.
    """
    moved = num_bytes(output.cluster_index)
    if a["training"]:
        entries = int((output.cluster_index >= 0).sum())
        moved += 4 * (output.clusters.num_clusters + 1 + entries)
    return Work(moved)


def _learned(a: Arguments) -> int:
    """Bytes of the weights and blank tokens, which are small."""
    names = ("position_weight", "position_bias", "position_value", "blank_key", "blank_value")
    return num_bytes(*(a[name] for name in names))


def _relative_values(a: Arguments, output: Tensor) -> tuple[int, int]:
    """Operations of the features' means and of their products with `position_value`."""
    if a["position_value"] is None:
        return 0, 0
    pairs = int(cluster_lengths(a["neighborhoods"]).sum())
    features = a["position_value"].shape[2]
    return 2 * pairs * output.shape[1] * features, 2 * output.numel() * features


def neighborhood_attention(a: Arguments, output: Tensor) -> Work:
    """The forward pass of `neighborhood_attention`.

    Bytes: query, key and value in, output out (2 Q C + 2 T C elements); positions, those of other
    queries, lists, cluster offsets and the learned weights in.
    Operations: 4 (P + Q) C for scores and weighted values, the Q for a blank token if there is one,
    2 P H F for a position bias of F features, and 2 P H F + 2 Q C F for relative values.
    """
    neighborhoods, weight = a["neighborhoods"], a["position_weight"]
    blanks = 0 if a["blank_key"] is None else len(output)
    pairs = int(cluster_lengths(neighborhoods).sum())
    channels = output.shape[1] * output.shape[2]
    bias_weights = 0 if weight is None else weight.numel()
    moments, products = _relative_values(a, output)
    return Work(
        num_bytes(*(a[name] for name in ("query", "key", "value", "positions", "query_positions")))
        + num_bytes(output)
        + _lists(neighborhoods)
        + _learned(a),
        2 * attention_multiply_adds(pairs, blanks, channels, bias_weights) + moments + products,
    )


def neighborhood_attention_backward(a: Arguments, output: Tensor) -> Work:
    """The backward pass of `neighborhood_attention`.

    Bytes: query, key, value, output and its gradient in, three gradients out (4 Q C + 4 T C
    elements); one float32 per query and head, the logarithm of the softmax's sum; positions, those
    of other queries, lists, offsets, inverse lists (4 E + 4 (K+1)); learned weights in, their
    gradients out.
    Operations: five products where the forward pass has two (scores again, and the gradients of
    value, probabilities, query and key): 10 (P + Q) C; the bias again and its gradient: 4 P H F.
    Relative values: the features' means again and the gradient of probabilities, 4 P H F, those of
    the means and of the weights, 4 Q C F.
    """
    neighborhoods, weight = a["neighborhoods"], a["position_weight"]
    forward = neighborhood_attention(a, output)
    entries = int((neighborhoods.cluster_index >= 0).sum())
    inverse = 4 * (entries + neighborhoods.clusters.num_clusters + 1)
    softmax = 4 * output.shape[0] * output.shape[1]
    pairs = int(cluster_lengths(neighborhoods).sum())
    bias = 0 if weight is None else 2 * pairs * weight.numel()
    moments, products = _relative_values(a, output)
    return Work(
        forward.bytes
        + num_bytes(output, a["query"], a["key"], a["value"])
        + softmax
        + inverse
        + _learned(a),
        (forward.operations - bias - moments - products) * 5 // 2 + 2 * (bias + moments + products),
    )


def _used(index: Tensor) -> int:
    """Number of different rows in a list."""
    return int((torch.unique(index) >= 0).sum())


def _scored_merge(a: Arguments) -> Work:
    """Bytes that both passes of `scored_merge` read, and the operations of the forward pass."""
    centered = a["neighborhoods"].select(a["center_index"])
    listed = torch.unique(centered.cluster_index)
    lengths = centered.clusters.offsets.diff()
    tokens = int(lengths[listed[listed >= 0].long()].sum())
    point = num_bytes(a["positions"][:1])
    row = num_bytes(a["features"][:1], a["scores"][:1]) + point
    read = (
        tokens * row
        + centered.num_queries * point
        + num_bytes(a["center_index"])
        + _lists(centered)
    )
    return _merge(a, read, int(cluster_lengths(centered).sum()))


def _merge(a: Arguments, read: int, pairs: int) -> Work:
    mid, features = a["weight"].shape
    return Work(
        read + _net(a), 2 * merge_multiply_adds(pairs, a["features"].shape[1], mid, features)
    )


def _net(a: Arguments) -> int:
    """Bytes of a merge's weight net."""
    return num_bytes(a["weight"], a["bias"], a["norm_weight"], a["norm_bias"])


def scored_merge(a: Arguments, output: Tensor) -> Work:
    """The forward pass of `scored_merge`.

    Bytes: features, score and position of each token that is in the neighborhood of any center, the
    centers' rows, positions and lists, cluster offsets, and the weight net in; output out.
    Operations: 2 P M (C + F): weighted sums, and the Linear layer of the weight net.
    """
    return _scored_merge(a) + Work(num_bytes(output))


def scored_merge_backward(a: Arguments, output: Tensor) -> Work:
    """The backward pass of `scored_merge`.

    Bytes: what the forward pass reads, and the output's gradient, in; gradients of all T features
    and scores and of the weight net out.
    Operations: twice those of the forward pass, for the gradients of weights and of features.
    """
    forward = _scored_merge(a)
    moved = num_bytes(output, a["features"], a["scores"]) + _net(a)
    return Work(forward.bytes + moved, 2 * forward.operations)


def _point_conv(a: Arguments) -> Work:
    """Bytes that both passes of `point_conv` read, and the operations of the forward pass."""
    index, centers = a["neighbor_index"], a["center_positions"]
    row = num_bytes(a["features"][:1], a["positions"][:1])
    centers = a["positions"] if centers is None else centers
    read = _used(index) * row + num_bytes(index, centers)
    return _merge(a, read, int((index >= 0).sum()))


def point_conv(a: Arguments, output: Tensor) -> Work:
    """The forward pass of `point_conv`.

    Bytes: features and position of each token that is listed, center positions, lists and the
    weight net in; output out. Operations: as `scored_merge`.
    """
    return _point_conv(a) + Work(num_bytes(output))


def point_conv_backward(a: Arguments, output: Tensor) -> Work:
    """The backward pass of `point_conv`: as that of `scored_merge`, without scores."""
    forward = _point_conv(a)
    moved = num_bytes(output, a["features"]) + _net(a)
    return Work(forward.bytes + moved, 2 * forward.operations)


def weighted_gather(a: Arguments, output: Tensor) -> Work:
    """The forward pass of `weighted_gather`.

    Bytes: features of each token that is listed, lists and weights in; output out. Operations: 2 C
    per pair.
    """
    index, features = a["index"], a["features"]
    read = _used(index) * num_bytes(features[:1]) + num_bytes(index, a["weights"])
    pairs = int((index >= 0).sum())
    return Work(read + num_bytes(output), 2 * pairs * features.shape[1])


def weighted_gather_backward(a: Arguments, output: Tensor) -> Work:
    """The backward pass of `weighted_gather`.

    Bytes: what the forward pass reads and the output's gradient in; gradients of all T features and
    of the weights out. Operations: twice those of the forward pass.
    """
    forward = weighted_gather(a, output)
    moved = num_bytes(a["features"], a["weights"])
    return Work(forward.bytes + moved, 2 * forward.operations)


def _places(a: Arguments) -> tuple[int, int]:
    """Bytes that both passes of `deformable_attention` read, and pairs of a place and a token."""
    names = ("value", "positions", "offsets", "weights", "query_positions", "query_sample")
    read = num_bytes(*(a[name] for name in names), a["lookup"])
    return read, a["weights"].numel() * a["lookup"].shape[2]


def deformable_attention(a: Arguments, output: Tensor) -> Work:
    """The forward pass of `deformable_attention`.

    Bytes: all its tensors in, as if each token and each cell were looked at by some query; output
    out. Operations: per pair of a place and a token the squared distance 5, its weight 5 and 2 d
    for the weighted sum.
    """
    read, pairs = _places(a)
    return Work(read + num_bytes(output), pairs * (5 + 5 + 2 * output.shape[2]))


def deformable_attention_backward(a: Arguments, output: Tensor) -> Work:
    """The backward pass of `deformable_attention`.

    Bytes: what the forward pass reads and the output's gradient in; gradients of value, offsets and
    weights out. Operations: distances and weights again and their gradients, and 4 d per pair for
    the gradients of value and weights.
    """
    read, pairs = _places(a)
    moved = num_bytes(output, a["value"], a["offsets"], a["weights"])
    return Work(read + moved, pairs * (2 * (5 + 5) + 4 * output.shape[2]))


def select_centers(a: Arguments, output: tuple[Tensor, tuple[int, ...]]) -> Work:
    """`select_centers`.

    Bytes: scores and positions in, rows of the kept tokens out. Operations: alpha times the score
    plus the prior, 2 T.
    """
    return Work(num_bytes(a["scores"], a["positions"], output[0]), 2 * len(a["scores"]))


def interpolation(a: Arguments) -> tuple[int, int, int]:
    """Bytes of positions and given lists, tokens that any query uses, and pairs."""
    index, queries, positions = a["neighbor_index"], a["query_positions"], a["positions"]
    given = num_bytes(index)
    if index is None:
        sizes = {"sizes": a["sizes"], "query_sizes": a["query_sizes"]}
        index = pointformer.knn(positions, a["k"], query_positions=queries, **sizes)
    tokens = _used(index)
    point = num_bytes(positions[:1])
    return num_bytes(queries) + given + tokens * point, tokens, int((index >= 0).sum())


def interpolate(a: Arguments, output: Tensor) -> Work:
    """The forward pass of `interpolate`, with its search if it has to search.

    Bytes: features and positions of each token that any query uses, query positions, and the lists
    if they are given, in; output out.
    Operations: per pair the squared distance 3 D - 1, its weight 5 (least, ratio, power, sum, norm)
    and 2 C for the weighted sum.
    """
    read, tokens, pairs = interpolation(a)
    channels = a["features"].shape[1]
    per_pair = 3 * a["positions"].shape[1] - 1 + 5 + 2 * channels
    return Work(read + tokens * num_bytes(a["features"][:1]) + num_bytes(output), pairs * per_pair)


def interpolate_backward(a: Arguments, output: Tensor) -> Work:
    """The backward pass of `interpolate` for its features.

    Bytes: the output's gradient, positions and lists (given or found) in; gradient of all T
    features out. Operations: weights as in the forward pass, and 2 C per pair.
    """
    read, _, pairs = interpolation(a)
    found = 4 * pairs if a["neighbor_index"] is None else 0
    per_pair = 3 * a["positions"].shape[1] - 1 + 5 + 2 * a["features"].shape[1]
    return Work(read + found + num_bytes(output, a["features"]), pairs * per_pair)


def layer(a: Arguments, output: Tensor) -> Work:
    """The forward pass of a Linear or convolution layer.

    Bytes: input, weight and bias in, output out. Operations: two per multiply-add; the bias is one
    more for each number of the output.
    """
    module: nn.Linear | nn.Conv2d = a["self"]
    bias = 0 if module.bias is None else output.numel()
    return Work(
        num_bytes(a["input"], module.weight, module.bias, output),
        2 * layer_multiply_adds(module, output) + bias,
    )


def layer_backward(a: Arguments, output: Tensor) -> Work:
    """The backward pass of a Linear or convolution layer.

    Bytes: the output's gradient, input and weight in; gradients of weight, bias and, where the
    input takes one, of the input out.
    Operations: those of the forward pass for the weight (and its bias), and again for the input.
    """
    module: nn.Linear | nn.Conv2d = a["self"]
    products = 2 * layer_multiply_adds(module, output)
    bias = 0 if module.bias is None else output.numel()
    differentiable = a["input"].requires_grad
    read = num_bytes(output, a["input"], module.weight)
    written = num_bytes(module.weight, module.bias, a["input"] if differentiable else None)
    return Work(read + written, products * (2 if differentiable else 1) + bias)
