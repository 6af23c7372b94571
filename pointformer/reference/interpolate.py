"""Inverse-distance interpolation in plain torch: any dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(
    features: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    neighbor_index: Tensor,
    power: Tensor | float,
    eps: float,
) -> Tensor:
    """Shepard interpolation of `features` (T, C) to `query_positions` (Q, D): (Q, C).

    Differentiable in the features, both positions and the power. At distance 0 the weight's
    gradients are zero.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    known = neighbor_index >= 0
    rows = torch.where(known, neighbor_index, features.shape[0])  # an extra token of zeros
    extended, positions = (
        torch.cat([x.to(dtype), x.new_zeros(1, x.shape[1], dtype=dtype)])
        for x in (features, positions)
    )
    squared = (positions[rows] - query_positions[:, None].to(dtype)).square().sum(-1)
    apart = squared > 0
    exponent = power.reshape(()).to(dtype) / 2 if isinstance(power, Tensor) else power / 2
    # The inner `where` keeps infinite derivatives at 0 out of the graph.
    distance = torch.where(apart, torch.where(apart, squared, 1.0) ** exponent, 0.0)
    weights = torch.where(known, 1 / (distance + eps), 0.0)
    total = weights.sum(1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1.0)
    return (weights[..., None] * extended[rows]).sum(1).to(features.dtype)
