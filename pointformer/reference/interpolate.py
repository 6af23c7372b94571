"""Inverse-distance interpolation in plain torch: any dtype, differentiable twice."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pointformer.reference.gather import rows_or_zeros

_FINEST = 1e-20  # of the nearest distance ** power, in units of eps: less makes no difference


def inverse_distance_shares(
    squared: Tensor, known: Tensor, power: Tensor | float, eps: float, relative: bool = True
) -> Tensor:
    """Weights `1 / ((distance / nearest distance) ** power + eps)`, normalized over the last axis.

    Divided by the nearest one, distances of any size neither overflow nor vanish. Squares up to the
    smallest normal number count as 0; there the gradient is zero.

    Args:
        squared: (..., k) squared distances.
        known: (..., k) bool, which of them there are; the others get 0.
        relative: `False` for `eps` in units of distance ** power: divided by that of the nearest.
    """
    tiny = torch.finfo(squared.dtype).tiny
    least = F.pad(squared.masked_fill(~known, torch.inf), (0, 1), value=torch.inf)
    least = least.amin(-1, keepdim=True)
    hit = least <= tiny
    # Where something has no derivative, or an infinite one, constants take its place.
    nearest = torch.where(hit | least.isinf(), 1.0, least)
    square = torch.where(known & (squared > tiny) & ~hit, squared, 1.0)
    exponent = power.reshape(()).to(squared) / 2 if isinstance(power, Tensor) else power / 2
    closeness = (nearest / square).clamp(tiny, 1.0) ** exponent
    closeness = torch.where(hit, (squared <= tiny).to(squared), closeness)
    if relative:
        softening = eps * closeness
    else:
        logarithm = exponent * nearest.log()  # of distance ** power, which may overflow
        # In logarithms, since neither factor need be a number of the type.
        finest = math.log(eps) + math.log(_FINEST)
        softening = closeness * (math.log(eps) - logarithm.clamp(finest, 80.0)).exp()
    weights = torch.where(known, closeness / (1 + softening), 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


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
    near = rows_or_zeros(positions.to(dtype), neighbor_index)  # (Q, k, D)
    squared = (near - query_positions[:, None].to(dtype)).square().sum(-1)
    weights = inverse_distance_shares(squared, neighbor_index >= 0, power, eps)
    listed = rows_or_zeros(features.to(dtype), neighbor_index)
    return (weights[..., None] * listed).sum(1).to(features.dtype)
