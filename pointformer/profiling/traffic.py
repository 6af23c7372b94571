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
from pointformer.profiling.work import Arguments, cluster_lengths, num_bytes


@dataclass(frozen=True)
class Traffic:
    """What the programs of a kernel read and write together.

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
    group, with position, three softmax numbers and two words of the list. `rows` counts both.
    """
    clusters, rows = _union_sizes(a["neighborhoods"])
    queries = group_queries(a["neighborhoods"])
    tokens, heads, channels = output.shape
    row, point = channels * output.element_size(), num_bytes(a["positions"][:1])
    per_head = (
        tokens * (4 * row + point + 12)  # query, output, gradient, query's gradient
        + rows * (2 * row + point)
        + 12 * clusters
        + tokens * (4 * row + point)  # key, value and their gradients
        + queries * (2 * row + point + 12 + 8)
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
