"""Neighborhood merging in plain torch: any dtype, differentiable twice, memory O(Q * S * C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pointformer.reference.gather import rows_or_zeros
from pointformer.reference.relative_position import relative_position


def merge(
    features: Tensor,
    scores: Tensor,
    positions: Tensor,
    center_positions: Tensor,
    rows: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """Sum each neighborhood's features under learned weights (AutoFocusFormer, Eq. 4).

    Args:
        features: (T, C).
        scores: (T,), factors of the tokens' weights.
        positions: (T, D).
        center_positions: (Q, D).
        rows: (Q, S) int64, tokens of each neighborhood, where `mask` (Q, S) is True.
        weight, bias, norm_weight, norm_bias: (M, F), (M,), (M,), (M,), the weight net.

    Returns:
        (Q, M * C) in the dtype of `features`, channel m * C + c.
    """
    out_dtype = features.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    rows = torch.where(mask, rows, -1)
    features, scores, positions = (
        rows_or_zeros(x.to(dtype), rows) for x in (features, scores, positions)
    )
    delta = positions - center_positions[:, None].to(dtype)
    phi = relative_position(delta, full=weight.shape[1] > delta.shape[-1])
    with torch.autocast(features.device.type, enabled=False):
        logits = F.linear(phi, weight.to(dtype), bias.to(dtype))
        logits = F.layer_norm(logits, bias.shape, norm_weight.to(dtype), norm_bias.to(dtype), eps)
        weights = F.gelu(logits) * scores[..., None]
        return torch.einsum("qsm,qsc->qmc", weights, features).flatten(1).to(out_dtype)
