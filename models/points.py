"""Backbone and heads of point sets: balanced clusters, attention and scored merging in 2-D and 3-D.

AutoFocusFormer's stages on tokens that never were pixels. What the picture models take from a grid
is taken from the order along the curve: a merge keeps the best-scored token of each run of
1 / `rate` consecutive ones, so that tokens stay as dense as the points are, whatever the extent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pointformer import TokenSet, best_of_runs, interpolate
from pointformer._checks import check_number, describe
from pointformer.models.backbone import Backbone, StageOutput
from pointformer.models.config import PointConfig
from pointformer.nn import (
    Block,
    NeighborhoodAttention,
    PointConv,
    ScoredMerge,
    init_linear,
)
from pointformer.nn.blocks import run_blocks

_TYPICAL = 8.0  # distance from the middle, in units of the model
_STRAY = 1000  # of so many points of a sample one may be a stray below the others


class PointPreprocess(nn.Module):
    """Units of positions that a model of points expects; features and fields stay as they are.

    Args:
        unit: length of the model's unit in the units of the positions, about the distance between
            neighbors; zero is then where each sample begins along each axis, not counting the
            lowest thousandth of its points (at least one of ten or more), which may be noise:
            heights are those above the ground, whatever the origin. `None`: each sample is centered
            at its mean and scaled, so that the root mean square of the distances from there is 8:
            for objects of any size.
    """

    def __init__(self, unit: float | None = None) -> None:
        super().__init__()
        if unit is not None:
            check_number("unit", unit, above=0)
        self.unit = unit

    def extra_repr(self) -> str:
        return f"unit={self.unit}"

    def forward(self, tokens: TokenSet) -> TokenSet:
        if not isinstance(tokens, TokenSet):
            raise TypeError(f"tokens: expected a TokenSet, got {describe(tokens)}")
        positions = tokens.positions
        if self.unit is not None:
            starts = _starts(positions, tokens)
            positions = (positions - starts[tokens.sample_index]) / self.unit
        else:
            positions = positions - _means(positions, tokens)[tokens.sample_index]
            spread = _means((positions * positions).sum(1, keepdim=True), tokens).sqrt()
            scale = _TYPICAL / torch.where(spread > 0, spread, 1.0)
            positions = positions * scale[tokens.sample_index]
        return TokenSet(positions, tokens.features, tokens.sizes, fields=tokens.fields)


def _starts(positions: Tensor, tokens: TokenSet) -> Tensor:
    """(B, D) where each sample's positions (T, D) begin but for strays."""
    sample, offsets = tokens.sample_index, tokens.batch_offsets
    sizes = offsets.diff()
    strays = torch.minimum((sizes + _STRAY - 1) // _STRAY, sizes // 10)
    # A row of zeros that an empty last sample points to.
    padded = torch.cat([positions, positions.new_zeros(1, positions.shape[1])])
    starts = []
    for axis, values in enumerate(positions.unbind(1)):
        order = torch.sort(values, stable=True).indices
        order = order[torch.sort(sample[order], stable=True).indices]
        order = torch.cat([order, order.new_full((1,), len(values))])
        starts.append(padded[order[offsets[:-1] + strays], axis])
    return torch.stack(starts, 1)


def _means(values: Tensor, tokens: TokenSet) -> Tensor:
    """(B, C) means over each sample's rows (T, C). float32 does not add up a million of them."""
    wide = values if values.device.type == "mps" else values.double()
    sums = wide.new_zeros(tokens.batch_size, values.shape[1])
    sums = sums.index_add(0, tokens.sample_index, wide)
    return (sums / tokens.batch_offsets.diff().clamp(min=1)[:, None]).to(values.dtype)


class PointEmbed(nn.Module):
    """Coordinates and features of points, and of their nearest ones, to `dims[0]` channels."""

    def __init__(self, config: PointConfig) -> None:
        super().__init__()
        dim = config.dims[0]
        self.axes = ["xyz".index(axis) for axis in config.coordinates]
        self.linear = nn.Linear(len(self.axes) + config.in_channels, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.conv = PointConv(dim, dim, config.embed_neighbors, dimensions=config.dimensions)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, tokens: TokenSet, impl: str | None) -> TokenSet:
        places = tokens.positions[:, self.axes] / _TYPICAL
        inputs = torch.cat([places.to(tokens.dtype), tokens.features], 1)
        x = tokens.with_features(nn.functional.gelu(self.norm1(self.linear(inputs))))
        return x.with_features(self.norm2(x.features + self.conv(x, impl).features))


class PointStage(nn.Module):
    """Cluster once, attend in every block, then merge into the next stage's tokens."""

    def __init__(self, config: PointConfig, stage: int, drop_path_rates: Sequence[float]) -> None:
        super().__init__()
        self.index = stage
        dim = config.dims[stage]
        self.blocks = nn.ModuleList(_block(config, stage, rate) for rate in drop_path_rates)
        self.merge = None
        if stage + 1 < len(config.dims):
            self.merge = ScoredMerge(dim, config.dims[stage + 1], dimensions=config.dimensions)

    def forward(
        self, tokens: TokenSet, config: PointConfig, impl: str | None
    ) -> tuple[StageOutput, TokenSet | None]:
        size = config.neighborhood_size[self.index]
        tokens = tokens.cluster(
            config.cluster_size, curve=config.curve, global_size=size, check_values=False, impl=impl
        )
        neighborhoods = tokens.neighborhoods(
            round(size / config.cluster_size), check_values=False, impl=impl
        )
        neighborhoods = neighborhoods.with_plan(training=torch.is_grad_enabled(), impl=impl)
        inputs = tokens
        tokens = run_blocks(self.blocks, tokens, [(neighborhoods,)] * len(self.blocks), impl)
        if self.merge is None:
            return StageOutput(tokens, inputs, None, neighborhoods), None
        logits = self.merge.logits(tokens.features)
        scores = logits.sigmoid()
        index, sizes = best_of_runs(
            scores, sizes=tokens.sizes, rate=config.rates[self.index], check_values=False
        )
        merged = self.merge(tokens, neighborhoods, scores, index, sizes, impl)
        return StageOutput(tokens, inputs, scores, neighborhoods, logits), merged


def _block(config: PointConfig, stage: int, drop_path_rate: float) -> Block:
    dim = config.dims[stage]
    attention = NeighborhoodAttention(dim, config.heads[stage], dimensions=config.dimensions)
    hidden = int(dim * config.mlp_ratio)
    return Block(attention, dim, hidden, config.layer_scale, drop_path_rate)


class PointBackbone(Backbone):
    """The backbone: a batch of point sets to one `StageOutput` per stage.

    Shapes:
        tokens: positions (T, D) in the units of `PointPreprocess`, features (T, `in_channels`).
    """

    config: PointConfig

    def __init__(self, config: PointConfig, impl: str | None = None) -> None:
        super().__init__(config, PointStage, PointEmbed(config), impl)

    def reconfigure(self, **changes: object) -> None:
        """Change `rate` or `neighborhood_size`, which no weight's shape depends on."""
        fixed = sorted(set(changes) - {"rate", "neighborhood_size"})
        if fixed:
            raise ValueError(
                f"reconfigure: {', '.join(fixed)} cannot change after the model was made; "
                "rate and neighborhood_size can"
            )
        self.config = self.config.override(**changes)

    def forward(self, tokens: TokenSet) -> list[StageOutput]:
        tokens = self.patch_embed(tokens, self.impl)
        outputs = []
        for stage in self.stages:
            output, tokens = stage(tokens, self.config, self.impl)
            outputs.append(output)
        return outputs


class PointDecoder(nn.Module):
    """From the coarsest stage to the finest: interpolate, add what the stage saw, attend.

    Args:
        depth: blocks at each stage.
        neighbors: coarse tokens that a fine one is interpolated from.
    """

    def __init__(self, config: PointConfig, depth: int, neighbors: int) -> None:
        super().__init__()
        self.neighbors = neighbors
        self.up = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(coarse), nn.Linear(coarse, fine))
            for fine, coarse in itertools.pairwise(config.dims)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(_block(config, stage, 0.0) for _ in range(depth))
            for stage in range(len(config.dims) - 1)
        )
        init_linear(self)

    def forward(self, stages: Sequence[StageOutput], impl: str | None) -> TokenSet:
        """The first stage's tokens, in cluster order."""
        coarse = stages[-1].tokens
        steps = zip(stages[:-1], self.up, self.blocks, strict=True)
        for stage, up, blocks in reversed(list(steps)):
            assert isinstance(blocks, nn.ModuleList)
            tokens = stage.tokens
            raised = interpolate(
                up(coarse.features),
                coarse.positions,
                tokens.positions,
                sizes=coarse.sizes,
                query_sizes=tokens.sizes,
                k=self.neighbors,
                power=2.0,
                check_values=False,
                impl=impl,
            )
            tokens = tokens.with_features(tokens.features + raised)
            coarse = run_blocks(blocks, tokens, [(stage.neighborhoods,)] * len(blocks), impl)
        return coarse
