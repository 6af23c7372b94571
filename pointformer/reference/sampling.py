"""Choosing some of the points, in plain torch: the definition of fast implementations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer.reference.neighbors import squared_distance


def farthest_points(
    positions: Tensor, sizes: Sequence[int], counts: Sequence[int], start: Sequence[int]
) -> Tensor:
    """Rows (sum of `counts`,) int64: in each sample the one that is `start` in it, then always the
    one farthest from those before, ties to the lowest row."""
    picks = []
    first = 0
    for size, count, row in zip(sizes, counts, start, strict=True):
        sample = positions[first : first + size]
        distance = positions.new_full((size,), torch.inf)
        pick = torch.tensor(row, device=positions.device)
        for _ in range(count):
            picks.append(first + pick)
            distance = torch.minimum(distance, squared_distance(sample, sample[pick]))
            distance = distance.index_fill(0, pick, -1.0)  # none is picked twice
            # The bits of these are ordered as their values are, but for -1, which is below.
            farthest = distance.amax()
            pick = (distance == farthest).int().argmax()
        first += size
    if not picks:
        return torch.empty(0, dtype=torch.int64, device=positions.device)
    return torch.stack(picks)
