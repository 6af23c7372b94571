"""Attention of tokens to their neighborhoods as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pointformer._checks import check_count, check_flags
from pointformer.clusters import Neighborhoods
from pointformer.nn.blocks import BlockAttention
from pointformer.nn.merge import position_features
from pointformer.ops import neighborhood_attention
from pointformer.tokens import TokenSet


class NeighborhoodAttention(BlockAttention):
    """Multi-head attention of tokens to their neighborhoods (AutoFocusFormer, sections 3.2, 4.3).

    See `neighborhood_attention`. Layers start as torch's do, blank tokens from a standard normal
    distribution.

    Args:
        dim: channels, a multiple of `heads`; the fused kernels take multiples of 8 per head.
        dimensions: 2 or 3, axes of the positions.
        expanded_position: bias from differences, distance and direction, not differences alone.
        blank_token: a learned key and value in every neighborhood: a token may attend to nothing.
        relative_value: values from relative positions as well, whose weights start from 0.
    """

    blank_key: Tensor | None
    blank_value: Tensor | None
    position_value: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dimensions: int = 2,
        expanded_position: bool = True,
        blank_token: bool = True,
        relative_value: bool = False,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("heads", heads)
        check_flags(blank_token=blank_token, relative_value=relative_value)
        if dim % heads:
            raise ValueError(f"dim: expected a multiple of {heads}, the heads, got {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        features = position_features(dimensions, expanded_position)
        self.position = nn.Linear(features, heads)
        values = nn.Parameter(torch.zeros(heads, dim // heads, features))
        self.register_parameter("position_value", values if relative_value else None)
        self.proj = nn.Linear(dim, dim)
        for name in ("blank_key", "blank_value"):
            blank = nn.Parameter(torch.randn(dim)) if blank_token else None
            self.register_parameter(name, blank)

    def forward(
        self,
        x: Tensor,
        tokens: TokenSet,
        neighborhoods: Neighborhoods,
        *,
        project: bool = True,
        impl: str | None = None,
    ) -> Tensor:
        """(T, C) from features (T, C), rows in cluster order.

        Args:
            x: normalized features; those of `tokens` are not looked at.
            tokens: where they are.
            project: whether to run the output projection `proj`.
        """
        channels = self.qkv.out_features // (3 * self.heads)
        # Split by `unbind`, whose gradient is one copy.
        query, key, value = self.qkv(x).view(len(x), 3, self.heads, channels).unbind(1)
        blank_key = blank_value = None
        if self.blank_key is not None and self.blank_value is not None:
            blank_key = self.blank_key.view(self.heads, -1)
            blank_value = self.blank_value.view(self.heads, -1)
        out = neighborhood_attention(
            query,
            key,
            value,
            tokens.positions,
            neighborhoods,
            position_weight=self.position.weight,
            position_bias=self.position.bias,
            position_value=self.position_value,
            blank_key=blank_key,
            blank_value=blank_value,
            impl=impl,
        ).flatten(1)
        return self.proj(out) if project else out
