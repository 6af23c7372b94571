"""Bytes that the Triton kernels read and write, counted from a clustering that was made.

The least work of an op takes each row once. Its kernels take some rows several times, one for each
program that needs them: these reads meet in the L2 cache where it holds the rows between them. What
the cache then has to deliver decides the speed as much as what the memory has to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pointformer import Neighborhoods
from pointformer.kernels.attention import TILE, clusters_per_group
from pointformer.profiling.work import Arguments, cluster_lengths, interpolation, num_bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes that the programs of a kernel read and write together.

    Attributes:
        bytes: of all programs.
        rows: rows read per token, where the least work reads one.
    """

    bytes: int
    rows: float


def _first_of_each(values: Tensor) -> Tensor:
    """Each row's entries sorted, and those that are negative or came before replaced by -1."""
    ordered = values.sort(1).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(repeated, -1)


def tile_unions(neighborhoods: Neighborhoods, tile: int = TILE) -> Tensor:
    """Clusters that any query of a tile attends to: (tiles, tile * R), -1 for none."""
    index = neighborhoods.cluster_index
    tiles = -(-len(index) // tile)
    index = torch.nn.functional.pad(index, (0, 0, 0, tiles * tile - len(index)), value=-1)
    return _first_of_each(index.view(tiles, tile * index.shape[1]))


def _union_sizes(neighborhoods: Neighborhoods) -> tuple[int, int]:
    """Clusters and tokens in the unions of all tiles."""
    unions = tile_unions(neighborhoods)
    tokens = cluster_lengths(Neighborhoods(unions, neighborhoods.clusters)).sum()
    return int((unions >= 0).sum()), int(tokens)


def group_queries(neighborhoods: Neighborhoods) -> int:
    """Queries that attend to any cluster of a group of consecutive ones, over all groups."""
    size = clusters_per_group(neighborhoods.clusters.cluster_size)
    index = neighborhoods.cluster_index
    return int((_first_of_each(torch.where(index >= 0, index // size, -1)) >= 0).sum())


def neighborhood_attention(a: Arguments, output: Tensor) -> Traffic:
    """The forward pass: a program takes one head of a tile of queries.

    Query in, output and the two softmax numbers of each row out; key and value rows of the tile's
    union, and their positions once per head; lists of three words per cluster of the union.
    """
    clusters, rows = _union_sizes(a["neighborhoods"])
    tokens, heads, channels = output.shape
    row, point = channels * output.element_size(), num_bytes(a["positions"][:1])
    per_head = (
        tokens * (2 * row + point + 8)  # query, output
        + rows * (2 * row + point)  # key, value
        + 12 * clusters
    )
    return Traffic(heads * per_head, rows / max(tokens, 1))


def neighborhood_attention_backward(a: Arguments, output: Tensor) -> Traffic:
    """The backward pass: tiles of queries for their gradients, groups of clusters for those of keys
    and values.

    Tiles: query, output and its gradient in, query's gradient out, union rows as forward. Groups:
    key and value in, their gradients out; query and gradient rows of the queries that attend to the
    group, with position, three softmax numbers and two words of the list; with relative values the
    gradients of the features' means too. `rows` counts both.
    """
    clusters, rows = _union_sizes(a["neighborhoods"])
    queries = group_queries(a["neighborhoods"])
    tokens, heads, channels = output.shape
    row, point = channels * output.element_size(), num_bytes(a["positions"][:1])
    means = 0 if a["position_value"] is None else 4 * (2 * a["positions"].shape[1] + 1)
    per_head = (
        tokens * (4 * row + point + 12 + means)  # query, output, gradient, query's gradient
        + rows * (2 * row + point)
        + 12 * clusters
        + len(a["key"]) * (4 * row + point)  # key, value and their gradients
        + queries * (2 * row + point + 12 + 8 + means)
    )
    return Traffic(heads * per_head, (rows + queries) / max(tokens, 1))


def _merge_pairs(a: Arguments) -> int:
    return int(cluster_lengths(a["neighborhoods"].select(a["center_index"])).sum())


def scored_merge(a: Arguments, output: Tensor) -> Traffic:
    """The forward pass: features, score and position of each pair in, output out."""
    pairs = _merge_pairs(a)
    pair = num_bytes(a["features"][:1], a["scores"][:1], a["positions"][:1])
    return Traffic(pairs * pair + num_bytes(output), pairs / max(len(a["features"]), 1))


def scored_merge_backward(a: Arguments, output: Tensor) -> Traffic:
    """The backward pass: the output's gradient and the position of each pair's center in; features
    and scores in, their gradients out."""
    pairs = _merge_pairs(a)
    own = 2 * num_bytes(a["features"], a["scores"]) + num_bytes(a["positions"])
    pair = num_bytes(output[:1], a["positions"][:1])
    return Traffic(pairs * pair + own, pairs / max(len(a["features"]), 1))


def point_conv(a: Arguments, output: Tensor) -> Traffic:
    """The forward pass: features, position and list entry of each pair in, output out."""
    pairs = int((a["neighbor_index"] >= 0).sum())
    pair = num_bytes(a["features"][:1], a["positions"][:1]) + 4
    return Traffic(pairs * pair + num_bytes(output), pairs / max(len(a["features"]), 1))


def point_conv_backward(a: Arguments, output: Tensor) -> Traffic:
    """The backward pass: as that of `scored_merge`, without scores."""
    pairs = int((a["neighbor_index"] >= 0).sum())
    own = 2 * num_bytes(a["features"]) + num_bytes(a["positions"])
    pair = num_bytes(output[:1], a["positions"][:1]) + 8
    return Traffic(pairs * pair + own, pairs / max(len(a["features"]), 1))


def weighted_gather(a: Arguments, output: Tensor) -> Traffic:
    """The forward pass: features of each pair, lists and weights in, output out."""
    pairs = int((a["index"] >= 0).sum())
    moved = num_bytes(a["index"], a["weights"], output)
    return Traffic(pairs * num_bytes(a["features"][:1]) + moved, pairs / max(len(a["features"]), 1))


def weighted_gather_backward(a: Arguments, output: Tensor) -> Traffic:
    """The backward pass: for the weights, features and the output's gradient of each pair; for the
    features, the gradient of each pair, its weight and its place in the inverse lists."""
    pairs = int((a["index"] >= 0).sum())
    row = num_bytes(a["features"][:1])
    moved = num_bytes(a["index"], a["weights"], a["features"])
    rows = 3 * pairs / max(len(a["features"]), 1)
    return Traffic(pairs * (3 * row + 4 + 8) + moved, rows)


def interpolate(a: Arguments, output: Tensor) -> Traffic:
    """The forward pass: features of each pair, and for nearest distance, sum and weights its list
    entry and position three times; query positions in, output out."""
    pairs = interpolation(a)[2]
    row, point = num_bytes(a["features"][:1]), num_bytes(a["positions"][:1])
    moved = num_bytes(a["query_positions"], output)
    return Traffic(pairs * (row + 3 * (4 + point)) + moved, pairs / max(len(a["features"]), 1))


def interpolate_backward(a: Arguments, output: Tensor) -> Traffic:
    """The backward pass: sums of the weights as forward, for a learned power with features and the
    output's gradient; then for each pair the gradient, position, two numbers of its query and its
    place in the inverse lists, and the features' gradient out."""
    pairs, learned = interpolation(a)[2], isinstance(a["power"], Tensor)
    row, point = num_bytes(a["features"][:1]), num_bytes(a["positions"][:1])
    sums = pairs * 2 * (4 + point) + (2 * 4 + point) * len(output)
    if learned:
        sums += pairs * (row + 4 + point) + num_bytes(output)
    moved = num_bytes(a["features"], a["positions"])
    rows = (1 + learned) * pairs / max(len(a["features"]), 1)
    return Traffic(sums + pairs * (row + point + 2 * 4 + 8) + moved, rows)


def _places(a: Arguments) -> tuple[int, int, int]:
    """Pairs of a place and a token, bytes of a head's row, and what both passes read of places."""
    places, near = a["weights"].numel(), a["lookup"].shape[2]
    channels = a["value"].shape[2]
    read = num_bytes(a["offsets"], a["weights"]) + 4 * places * near
    return places * near, channels * a["value"].element_size(), read


def deformable_attention(a: Arguments, output: Tensor) -> Traffic:
    """The forward pass: of each place offset, weight and list; of each pair of a place and a token
    its position and a head's row; output out."""
    pairs, row, read = _places(a)
    heads = a["value"].shape[0] * a["value"].shape[1]
    return Traffic(pairs * (row + 8) + read + num_bytes(output), pairs / max(heads, 1))


def deformable_attention_backward(a: Arguments, output: Tensor) -> Traffic:
    """The backward pass: as forward with the output's gradient in, and gradients, factors and cells
    of the places out; then of each pair the gradient's row, factor and number, and the values'
    gradient out. What sorts the places is not a kernel of ours."""
    pairs, row, read = _places(a)
    heads = a["value"].shape[0] * a["value"].shape[1]
    moved = num_bytes(output, a["offsets"], a["weights"], a["value"]) + 4 * a["weights"].numel()
    per_pair = (row + 8 + 4) + (row + 4 + 8)
    return Traffic(pairs * per_pair + read + moved, 2 * pairs / max(heads, 1))
