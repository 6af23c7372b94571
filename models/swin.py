"""Swin, the baseline on a grid: AFF's blocks with shifted windows in the place of clusters.

The paper's Swin with daggers (Tables 2 and 3): AFF's patch embedding, widths, depths and MLPs;
attention in windows of 7 x 7 that move by half a window in every second block, with a learned bias
per offset (Swin Transformer, ICCV 2021); and 2 x 2 patches merged between stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from pointformer import TokenSet
from pointformer.models.backbone import Backbone, PatchEmbed, PatchMerge, StageOutput
from pointformer.models.config import SwinConfig
from pointformer.models.grid import by_shape
from pointformer.nn import Block
from pointformer.nn.blocks import BlockAttention, run_blocks


class Windows:
    """Windows of maps of one size: padded to whole windows and, if shifted, rolled.

    An axis that one window covers does not shift.

    Attributes:
        padded: height and width after padding.
        blocked: (windows, size**2, size**2) bool, pairs of tokens of a window that are not
            neighbors in the map, or of which one is padding; `None` if there are none. Padding
            sees padding, so that no row is blocked as a whole.
    """

    def __init__(
        self, height: int, width: int, size: int, shifted: bool, device: torch.device
    ) -> None:
        self.size = size
        self.sides = (height, width)
        self.padded = tuple(math.ceil(side / size) * size for side in self.sides)
        self.shift = tuple(size // 2 if shifted and side > size else 0 for side in self.padded)
        self.blocked: Tensor | None = None
        if any(self.shift) or self.padded != self.sides:
            self.blocked = self._blocked(device)

    def split(self, maps: Tensor) -> Tensor:
        """(B, H, W, C) to (B * windows, size**2, C)."""
        down, right = (b - a for a, b in zip(self.sides, self.padded, strict=True))
        maps = nn.functional.pad(maps, (0, 0, 0, right, 0, down))
        if any(self.shift):
            maps = maps.roll([-shift for shift in self.shift], (1, 2))
        size = self.size
        return rearrange(maps, "b (y i) (x j) c -> (b y x) (i j) c", i=size, j=size)

    def join(self, windows: Tensor) -> Tensor:
        """Undo `split`."""
        size, (rows, _) = self.size, self.padded
        columns = self.padded[1] // size
        maps = rearrange(
            windows, "(b y x) (i j) c -> b (y i) (x j) c", y=rows // size, x=columns, i=size
        )
        if any(self.shift):
            maps = maps.roll(self.shift, (1, 2))
        return maps[:, : self.sides[0], : self.sides[1]]

    def _blocked(self, device: torch.device) -> Tensor:
        wrapped, padding = [], []
        for side, padded, shift in zip(self.sides, self.padded, self.shift, strict=True):
            place = torch.arange(padded, device=device)
            wrapped.append(place >= padded - shift)
            padding.append((place + shift) % padded >= side)
        region = 2 * wrapped[0][:, None].long() + wrapped[1].long()
        region = region.masked_fill(padding[0][:, None] | padding[1], 4)
        size = self.size
        region = rearrange(region, "(y i) (x j) -> (y x) (i j)", i=size, j=size)
        return region[:, :, None] != region[:, None, :]


class WindowAttention(BlockAttention):
    """Attention inside windows, with a learned bias for each offset between two tokens."""

    index: Tensor

    def __init__(self, dim: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.empty((2 * size - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        down, right = (x.reshape(-1, 1) - x.reshape(1, -1) + size - 1 for x in (row, column))
        self.register_buffer("index", down * (2 * size - 1) + right, persistent=False)

    def forward(
        self, x: Tensor, tokens: TokenSet, windows: Windows, *, project: bool, impl: str | None
    ) -> Tensor:
        """(T, C) in raster order."""
        maps = self.qkv(x).view(tokens.batch_size, *windows.sides, -1)
        query, key, value = rearrange(
            windows.split(maps), "n t (three h d) -> three n h t d", three=3, h=self.heads
        )
        bias = rearrange(self.bias[self.index], "q k h -> 1 h q k").to(query.dtype)
        if windows.blocked is not None:
            bias = bias.masked_fill(windows.blocked[:, None], -torch.inf)
            bias = bias.repeat(len(query) // len(bias), 1, 1, 1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out = windows.join(rearrange(out, "n h t d -> n t (h d)")).reshape(x.shape)
        return self.proj(out) if project else out


class Stage(nn.Module):
    """Blocks, every second one with shifted windows, then 2 x 2 patches become one token."""

    def __init__(self, config: SwinConfig, stage: int, drop_path_rates: Sequence[float]) -> None:
        super().__init__()
        self.stride = config.strides[stage]
        self.window_size = config.window_size
        dim, heads = config.dims[stage], config.heads[stage]
        self.blocks = nn.ModuleList(
            Block(
                WindowAttention(dim, heads, config.window_size),
                dim,
                int(dim * config.mlp_ratio),
                config.layer_scale,
                rate,
            )
            for rate in drop_path_rates
        )
        self.merge = None
        if stage + 1 < len(config.dims):
            out_dim, side = config.dims[stage + 1], config.merge_sides[stage]
            self.merge = PatchMerge(dim, out_dim, self.stride, side)

    def forward(self, tokens: TokenSet, impl: str | None) -> tuple[StageOutput, TokenSet | None]:
        assert tokens.extent is not None
        width, height = (math.ceil(side / self.stride) for side in tokens.extent[0])
        windows = [
            Windows(height, width, self.window_size, shifted, tokens.device)
            for shifted in (False, True)
        ]
        inputs = tokens
        where = [(windows[i % 2],) for i in range(len(self.blocks))]
        tokens = run_blocks(self.blocks, tokens, where, impl)
        merged = None if self.merge is None else self.merge(tokens)
        return StageOutput(tokens, inputs, None), merged


class Swin(Backbone):
    """The backbone: images to one `StageOutput` per stage, without scores.

    Shapes:
        images: (B, 3, H, W), or a list of (3, H, W) of any sizes; normalized, float.
        positions: (x, y) indices of the first stage's grid of ceil(W / stride) x ceil(H / stride)
            cells, in raster order; those of stage i are multiples of `config.strides[i]`. What is
            left of a side merges with zeros.
    """

    config: SwinConfig

    def __init__(self, config: SwinConfig, impl: str | None = None) -> None:
        super().__init__(config, Stage, PatchEmbed(config), impl)

    def forward(self, images: Tensor | Sequence[Tensor]) -> list[StageOutput]:
        return by_shape(self._stages, images)

    def _stages(self, images: Tensor) -> list[StageOutput]:
        tokens = self.patch_embed(images)
        outputs = []
        for stage in self.stages:
            output, tokens = stage(tokens, self.impl)
            outputs.append(output)
        return outputs
