"""Deformable attention over points in plain torch: any dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor

from pointformer.reference.gather import rows_or_zeros
from pointformer.reference.interpolate import inverse_distance_shares


def deformable_attention(
    value: Tensor,
    positions: Tensor,
    offsets: Tensor,
    weights: Tensor,
    query_positions: Tensor,
    canvas: Tensor,
    lookup: Tensor,
    power: Tensor,
    eps: float,
) -> Tensor:
    """Weighted sum of values interpolated at `query_positions + offsets`: (Q, H, d).

    `canvas` (Q, 3) is the first cell, the width and the height of each query's canvas in `lookup`
    (cells, L, k). Differentiable in the value, the offsets, the weights and the power.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    heads, levels = offsets.shape[1:3]
    place = query_positions[:, None, None, None].to(dtype) + offsets.to(dtype)
    first, width, height = (canvas[:, i, None, None, None] for i in range(3))
    x, y = place.detach().round().unbind(-1)  # half to even
    column, row = (  # of no number any
        torch.minimum(rounded.nan_to_num(0.0).clamp(min=0), side - 1).long()
        for rounded, side in ((x, width), (y, height))
    )
    level = torch.arange(levels, device=lookup.device)[:, None]
    index = lookup[first + row * width + column, level].long()  # (Q, H, L, P, k)
    squared = (place[..., None, :] - rows_or_zeros(positions.to(dtype), index)).square().sum(-1)
    share = inverse_distance_shares(squared, index >= 0, power, eps, relative=False)
    share = share * weights[..., None].to(dtype)
    # A row of `value` per token and head, (Q, H, L, P, k, d).
    head = torch.arange(heads, device=lookup.device)[:, None, None, None]
    index = torch.where(index >= 0, index * heads + head, -1)
    sampled = rows_or_zeros(value.to(dtype).flatten(0, 1), index)
    with torch.autocast(value.device.type, enabled=False):
        return torch.einsum("qhlpk,qhlpkd->qhd", share, sampled).to(value.dtype)
