"""Nearest points by brute force: the definition that fast implementations are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PAIRS_AT_ONCE = 1 << 23  # bounds the memory of a distance table


def squared_distance(query: Tensor, points: Tensor) -> Tensor:
    """dx*dx + dy*dy [+ dz*dz] of broadcast positions (..., D), one rounding per operation."""
    difference = query - points
    square = difference * difference
    total = square[..., 0] + square[..., 1]
    return total + square[..., 2] if square.shape[-1] == 3 else total


def nearest(
    query: Tensor,
    points: Tensor,
    query_sizes: Sequence[int],
    point_sizes: Sequence[int],
    limits: Sequence[int],
    width: int,
    reach: float = torch.inf,
) -> tuple[Tensor, Tensor]:
    """The nearest points of the same sample, ties to the lowest row.

    Args:
        query: (Q, D) float32.
        points: (P, D) float32.
        query_sizes: queries per sample.
        point_sizes: points per sample.
        limits: per sample, how many points to list, at most `width`.
        width: columns of the result.
        reach: squared distance of the farthest points to list.

    Returns:
        Rows of `points` (Q, width) int32, nearest first, -1 where there is none, and squared
        distances (Q, width) float32, infinite there.
    """
    index = torch.full((len(query), width), -1, dtype=torch.int32, device=query.device)
    distance = torch.full((len(query), width), torch.inf, device=query.device, dtype=torch.float32)
    first_query, first_point = 0, 0
    for queries, count, limit in zip(query_sizes, point_sizes, limits, strict=True):
        listed = min(count, limit)
        candidates = points[first_point : first_point + count]
        row = torch.arange(count, device=points.device)
        step = max(1, _PAIRS_AT_ONCE // max(count, 1))
        for start in range(first_query, first_query + queries if listed else first_query, step):
            rows = slice(start, min(start + step, first_query + queries))
            table = squared_distance(query[rows, None], candidates)
            # The bits of a non-negative float32 are ordered as its value is.
            key = (table.view(torch.int32).long() << 32) | row
            key = key.topk(listed, largest=False, sorted=True).values
            index[rows, :listed] = ((key & 0xFFFFFFFF) + first_point).int()
            distance[rows, :listed] = (key >> 32).int().view(torch.float32)
        first_query += queries
        first_point += count
    beyond = distance > reach
    return index.masked_fill(beyond, -1), distance.masked_fill(beyond, torch.inf)
