"""Weighted sums of listed rows in plain torch: any dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_gather(features: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum over j of `weights[q, j] * features[index[q, j]]`, entries of -1 left out: (Q, C)."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    factors = torch.where(index >= 0, weights.to(dtype), 0.0)
    return (factors[..., None] * rows_or_zeros(features.to(dtype), index)).sum(1).to(features.dtype)


def rows_or_zeros(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]` for `values` (T, ...), with zeros where the index is negative.

    Also of no values at all; rows that do not exist are an IndexError.
    """
    blank = values.new_zeros(1, *values.shape[1:])
    return torch.cat([blank, values])[(index.long() + 1).clamp(min=0)]
