"""Weighted sums of listed rows in plain torch: any dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_gather(features: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum over j of `weights[q, j] * features[index[q, j]]`, entries of -1 left out: (Q, C)."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    known = index >= 0
    factors = torch.where(known, weights.to(dtype), 0.0)
    rows = torch.where(known, index, features.shape[0])  # an extra token of zeros
    extended = torch.cat(
        [features.to(dtype), features.new_zeros(1, features.shape[1], dtype=dtype)]
    )
    return (factors[..., None] * extended[rows.long()]).sum(1).to(features.dtype)
