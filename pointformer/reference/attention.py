"""Neighborhood attention by gathering every neighborhood: readable, and slow for it."""

from __future__ import annotations

import torch
from torch import Tensor

from pointformer.clusters import Neighborhoods
from pointformer.reference.gather import rows_or_zeros
from pointformer.reference.relative_position import relative_position


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    neighborhoods: Neighborhoods,
    *,
    query_positions: Tensor,
    position_weight: Tensor | None,
    position_bias: Tensor | None,
    position_value: Tensor | None,
    blank_key: Tensor | None,
    blank_value: Tensor | None,
    scale: float,
) -> Tensor:
    """See `pointformer.ops.neighborhood_attention`; float64 inputs are computed in float64."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        rows, mask = neighborhoods.members()  # (Q, M)
        rows = torch.where(mask, rows, -1)
        scaled = query.to(dtype) * scale
        logits = torch.einsum("thd,tmhd->thm", scaled, rows_or_zeros(key.to(dtype), rows))
        delta = rows_or_zeros(positions.to(dtype), rows) - query_positions.to(dtype)[:, None]
        if position_weight is not None:
            features = relative_position(delta, position_weight.shape[-1] != delta.shape[-1])
            logits = logits + torch.einsum("tmf,hf->thm", features, position_weight.to(dtype))
        if position_bias is not None:
            logits = logits + position_bias.to(dtype)[:, None]
        # The lowest number instead of minus infinity: an empty neighborhood then gives 0, not NaN.
        logits = logits.masked_fill(~mask[:, None], torch.finfo(dtype).min)
        if blank_key is not None:
            blank = torch.einsum("thd,hd->th", scaled, blank_key.to(dtype))
            logits = torch.cat([logits, blank[..., None]], -1)
        attention = logits.softmax(-1)
        members = attention[..., : rows.shape[1]].masked_fill(~mask[:, None], 0.0)
        values = rows_or_zeros(value.to(dtype), rows)
        output = torch.einsum("thm,tmhd->thd", members, values)
        if position_value is not None:
            features = relative_position(delta, position_value.shape[-1] != delta.shape[-1])
            moments = torch.einsum("thm,tmf->thf", members, features)
            output = output + torch.einsum("thf,hdf->thd", moments, position_value.to(dtype))
        if blank_value is not None:
            output = output + attention[..., -1:] * blank_value.to(dtype)
        return output.to(query.dtype)
