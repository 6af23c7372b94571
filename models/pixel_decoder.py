"""The pixel decoder of section 4.1: multi-scale deformable attention over points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pointformer import TokenSet, deformable_attention, interpolate, knn
from pointformer.models.layers import EncoderLayer, sine_encoding
from pointformer.nn import PointConv


class DeformableAttention(nn.Module):
    """Each token looks at `points` places per level, wherever its features send it."""

    def __init__(
        self, dim: int, heads: int, levels: int, points: int, power: float, learn_power: bool
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim: expected a multiple of {heads}, the heads, got {dim}")
        self.shape = (heads, levels, points)
        places = heads * levels * points
        self.offsets = nn.Linear(dim, places * 2)
        self.weights = nn.Linear(dim, places)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        if learn_power:
            self.power = nn.Parameter(torch.tensor([float(power)]))
        else:
            self.register_buffer("power", torch.tensor([float(power)]), persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """Heads look in eight directions, their points at distances 1, 2, ... on every level."""
        heads, _, points = self.shape
        angle = torch.arange(heads) * (2 * math.pi / heads)
        direction = torch.stack([angle.cos(), angle.sin()], 1)
        direction = direction / direction.abs().amax(1, keepdim=True)
        distance = torch.arange(1, points + 1)[:, None]
        bias = (direction[:, None, None] * distance).expand(*self.shape, 2)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.flatten())
        for layer in (self.value, self.proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, code: Tensor, lookup: TokenLookup, impl: str | None) -> Tensor:
        query = x + code
        heads = self.shape[0]
        weights = self.weights(query).view(len(x), heads, -1).softmax(-1)
        out = deformable_attention(
            self.value(x).view(len(x), heads, -1),
            lookup.positions,
            self.offsets(query).view(len(x), *self.shape, 2),
            weights.view(len(x), *self.shape),
            lookup.positions,
            lookup.sample,
            lookup.index,
            lookup.extent,
            power=self.power,
            impl=impl,
        )
        return self.proj(out.flatten(1))


class TokenLookup:
    """The tokens of all levels in one list, and where to find them from a cell of the canvas."""

    def __init__(self, grid: TokenSet, levels: Sequence[TokenSet], impl: str | None) -> None:
        self.positions = torch.cat([tokens.positions for tokens in levels])
        self.sample = torch.cat([tokens.sample_index for tokens in levels])
        assert grid.extent is not None
        self.extent = grid.extent
        start, lists = 0, []
        for tokens in levels:
            index = knn(
                tokens.positions,
                4,
                query_positions=grid.positions,
                sizes=tokens.sizes,
                query_sizes=grid.sizes,
                same_positions=tokens.same_positions and grid.same_positions,
                check_values=False,
                impl=impl,
            )
            lists.append(torch.where(index >= 0, index + start, index))
            start += tokens.num_tokens
        self.index = torch.stack(lists, 1)  # rows as in the grid's token set
        if grid.clusters is not None:  # to raster order
            self.index = self.index[grid.clusters.inverse_order]


class PixelDecoder(nn.Module):
    """Mixes the stages' tokens across levels; gives per-token mask features on the finest one.

    The coarser stages go through `layers` of deformable attention together; one step of a feature
    pyramid carries the result to the first stage's tokens, which must be a full grid.

    Args:
        dims: channels of the stages, finest first.
        dim: channels of the decoder.
        position_norm: see `sine_encoding`; the released models need "batch" to be reproduced.
        power: exponent of the distance in the interpolation, at the start if `learn_power`.
        lateral: whether the first stage's features are used, not only its positions.
    """

    def __init__(
        self,
        dims: Sequence[int],
        dim: int = 256,
        layers: int = 6,
        heads: int = 8,
        points: int = 4,
        hidden: int = 1024,
        position_norm: str = "image",
        power: float = 6.0,
        learn_power: bool = True,
        lateral: bool = True,
    ) -> None:
        super().__init__()
        if len(dims) < 2:
            raise ValueError(f"dims: expected two stages or more to decode, got {len(dims)}")
        self.dim = dim
        self.position_norm = position_norm
        coarse = list(dims[:0:-1])  # coarsest first
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, dim), nn.LayerNorm(dim)) for channels in coarse
        )
        self.level_embed = nn.Parameter(torch.randn(len(coarse), dim))
        self.layers = nn.ModuleList(
            EncoderLayer(
                DeformableAttention(
                    dim,
                    heads=heads,
                    levels=len(coarse),
                    points=points,
                    power=power,
                    learn_power=learn_power,
                ),
                dim,
                hidden,
            )
            for _ in range(layers)
        )
        self.lateral = (
            nn.Sequential(nn.Linear(dims[0], dim), nn.LayerNorm(dim)) if lateral else None
        )
        self.conv = PointConv(dim, dim)
        self.conv_norm = nn.LayerNorm(dim)
        self.mask_features = nn.Linear(dim, dim)

    def forward(
        self, stages: Sequence[TokenSet], impl: str | None = None
    ) -> tuple[TokenSet, list[TokenSet]]:
        """Mask features on the tokens of the finest stage, and the coarser levels, coarsest first.

        Args:
            stages: the token sets of the stages, finest first.
        """
        grid, levels = stages[0], list(stages[:0:-1])
        lookup = TokenLookup(grid, levels, impl)
        pairs = list(zip(levels, self.projections, strict=True))
        x = torch.cat([project(tokens.features) for tokens, project in pairs])
        code = torch.cat(
            [
                sine_encoding(tokens, self.dim, self.position_norm) + embed
                for tokens, embed in zip(levels, self.level_embed, strict=True)
            ]
        )
        for layer in self.layers:
            x = layer(x, code, lookup, impl)
        parts = x.split([tokens.num_tokens for tokens in levels])
        levels = [t.with_features(part) for t, part in zip(levels, parts, strict=True)]
        finest = levels[-1]
        upsampled = interpolate(
            finest.features,
            finest.positions,
            grid.positions,
            sizes=finest.sizes,
            query_sizes=grid.sizes,
            same_positions=finest.same_positions and grid.same_positions,
            check_values=False,
            impl=impl,
        )
        if self.lateral is not None:
            upsampled = upsampled + self.lateral(grid.features)
        fused = grid.with_features(upsampled)
        x = torch.relu(self.conv_norm(self.conv(fused, impl).features))
        return grid.with_features(self.mask_features(x)), levels
