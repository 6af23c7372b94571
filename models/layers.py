"""Layers that several models share."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from pointformer import TokenSet, batch_from_sizes
from pointformer._checks import check_option
from pointformer.clusters import offsets_of
from pointformer.nn.blocks import FeedForward

POSITION_NORMS = ("image", "batch")


def at_least_float32(x: Tensor) -> Tensor:
    """For sums, scores and losses, which half precision would spoil."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MultiheadAttention(nn.Module):
    """Dense attention of few queries to many keys, by torch's own kernels."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim: expected a multiple of {heads}, the heads, got {dim}")
        self.heads = heads
        self.in_proj = nn.Linear(dim, 3 * dim)  # query, key, value
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """(B, Q, C) from (B, Q, C), (B, N, C), (B, N, C); `allowed` (B, Q, N) bool or `None`."""
        weights, biases = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        query, key, value = (
            rearrange(nn.functional.linear(x, *layer), "b n (h d) -> b h n d", h=self.heads)
            for x, *layer in zip((query, key, value), weights, biases, strict=True)
        )
        mask = None if allowed is None else allowed[:, None]
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class SelfAttention(MultiheadAttention):
    """Dense attention among the tokens of each sample; where they are counts for who sees whom."""

    def forward(self, x: Tensor, code: Tensor, allowed: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, N, C) from features and position code (B, N, C)."""
        return super().forward(x + code, x + code, x, allowed)


class EncoderLayer(nn.Module):
    """Attention, called as `attention(x, *where)`, and feed-forward, each followed by LayerNorm."""

    def __init__(self, attention: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.attn = attention
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden, nn.ReLU)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, *where: object) -> Tensor:
        x = self.norm1(x + self.attn(x, *where))
        return self.norm2(x + self.mlp(x))


def sine_encoding(
    tokens: TokenSet, channels: int, norm: str = "image", temperature: float = 10000.0
) -> Tensor:
    """Sine code of the positions: (T, channels), per axis all sines, then all cosines.

    Computed in the dtype of the positions, given in that of the features.

    A position is divided by the largest of its sample (`norm` "image") or of the whole batch
    ("batch", as the released AFF does, whose results depend on the batch for it), times 2 pi.
    """
    check_option("norm", norm, POSITION_NORMS)
    positions = tokens.positions
    axes = tokens.dimensions
    if norm == "batch" or tokens.batch_size == 1:
        peak = positions.amax(0) if len(positions) else positions.new_zeros(axes)
    else:
        sample = tokens.sample_index[:, None].expand_as(positions)
        peak = positions.new_zeros(tokens.batch_size, axes)
        peak = peak.scatter_reduce(0, sample, positions, "amax")[tokens.sample_index]
    angle = positions / (peak + 1e-6) * (2 * torch.pi)
    half = channels // (2 * axes)
    exponent = torch.arange(half, device=positions.device, dtype=positions.dtype) / half
    angle = angle[:, :, None] / temperature**exponent  # (T, D, half)
    return torch.cat([angle.sin(), angle.cos()], 2).flatten(1).to(tokens.features.dtype)


def pad_samples(rows: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Packed rows (T, C) as (B, N, C), and which of them are there, (B, N), if not all."""
    if len(set(sizes)) <= 1:
        return rows.view(len(sizes), sizes[0] if sizes else 0, *rows.shape[1:]), None
    places, shape = _places(sizes, rows.device), (len(sizes), max(sizes))
    padded = rows.new_zeros(shape[0] * shape[1], *rows.shape[1:]).index_copy(0, places, rows)
    there = torch.zeros(len(padded), dtype=torch.bool, device=rows.device)
    return padded.unflatten(0, shape), there.index_fill(0, places, True).unflatten(0, shape)


def pack_samples(padded: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Undo `pad_samples`: (B, N, C) to (T, C)."""
    if len(set(sizes)) <= 1:
        return padded.flatten(0, 1)
    return padded.flatten(0, 1).index_select(0, _places(sizes, padded.device))


def _places(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(T,): where rows are in a table of as many for each sample as the largest one has."""
    sample, starts = batch_from_sizes(sizes, device), offsets_of(sizes, device)
    return torch.arange(len(sample), device=device) + (sample * max(sizes) - starts[sample])
