"""AutoFocusFormer (AFF): a backbone whose tokens sit where the content is.

Paper: "AutoFocusFormer: Image Segmentation off the Grid", CVPR 2023. A stage clusters its tokens
once, lets each attend to its nearest clusters in every block, scores them, and merges
neighbourhoods around the best: fewer tokens, still on the positions that matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from pointformer import (
    Neighborhoods,
    TokenSet,
    nearest_clusters,
    neighborhood_attention,
    scored_merge,
    select_centers,
)
from pointformer.models.config import AFFConfig

HIDDEN = 1 << 22  # numbers that a hidden layer holds at a time at inference


def position_features(expanded: bool) -> int:
    """How many numbers describe a relative position in 2-D: (dx, dy[, dist, sin, cos])."""
    return 5 if expanded else 2


def drop_path(x: Tensor, rate: float, tokens: TokenSet, training: bool) -> Tensor:
    """Zero a residual branch (T, C) for whole samples with probability `rate`, rescale the rest."""
    if not training or rate == 0:
        return x
    keep = torch.rand(tokens.batch_size, 1, device=x.device) >= rate
    return x * (keep.to(x.dtype) / (1 - rate))[tokens.sample_index]


def by_rows(function: Callable[..., Tensor], *inputs: Tensor, width: int) -> Tensor:
    """`function(*inputs)`, at most `HIDDEN / width` rows at a time where no gradient is recorded.

    For functions that treat every row alone. What they need inside would take several times the
    memory of their result, and on CPUs fresh memory takes longer than the layers that fill it.
    """
    rows, total = max(1, HIDDEN // width), len(inputs[0])
    if total <= rows or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*inputs)
    result = torch.empty(0)
    for first in range(0, total, rows):
        part = function(*(x[first : first + rows] for x in inputs))
        if first == 0:
            result = part.new_empty(total, *part.shape[1:])
        result[first : first + rows] = part
    return result


class GELU(nn.GELU):
    """GELU that overwrites its input, a layer's output, where no gradient is recorded: to fill new
    memory would take as long as the function itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class PatchEmbed(nn.Module):
    """Two 3x3 convolutions from an image to one token per `stride` pixels (rounded up)."""

    def __init__(self, in_channels: int, dim: int, stride: int) -> None:
        super().__init__()
        first, second = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stride]
        self.conv1 = nn.Conv2d(in_channels, dim // 2, 3, first, 1)
        self.bn = nn.BatchNorm2d(dim // 2)
        self.act = GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, second, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor | Sequence[Tensor]) -> TokenSet:
        """Tokens of a batch (B, C, H, W), or of a list of (C, H, W) images of any sizes."""
        if isinstance(images, Tensor):
            tokens = TokenSet.from_grid(self._convolve(images))
        else:
            maps: list[Tensor] = [images[0]] * len(images)
            for shape in {tuple(image.shape) for image in images}:
                same = [i for i, image in enumerate(images) if tuple(image.shape) == shape]
                batch = self._convolve(torch.stack([images[i] for i in same]))
                for i, sample in zip(same, batch, strict=True):
                    maps[i] = sample
            tokens = TokenSet.from_grid(maps)
        return tokens.with_features(self.norm(tokens.features))

    def _convolve(self, images: Tensor) -> Tensor:
        return self.conv2(self.act(self.bn(self.conv1(images))))


class Attention(nn.Module):
    """Neighbourhood attention with a learned position bias and a blank token (section 3.2, 4.3).

    `forward` leaves the output projection `proj` to the block, which runs it on a few rows.
    """

    def __init__(self, dim: int, heads: int, expanded_position: bool, blank_token: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)  # per head: the key's channels, then the value's
        self.position = nn.Linear(position_features(expanded_position), heads)
        self.proj = nn.Linear(dim, dim)
        if blank_token:
            self.blank_key = nn.Parameter(torch.randn(dim))
            self.blank_value = nn.Parameter(torch.randn(dim))
        else:
            self.register_parameter("blank_key", None)
            self.register_parameter("blank_value", None)

    def forward(
        self, x: Tensor, positions: Tensor, neighborhoods: Neighborhoods, impl: str | None
    ) -> Tensor:
        query = rearrange(self.q(x), "t (h d) -> t h d", h=self.heads)
        key, value = rearrange(self.kv(x), "t (h two d) -> two t h d", h=self.heads, two=2).unbind(
            0
        )
        blank_key = blank_value = None
        if self.blank_key is not None:
            blank_key = self.blank_key.view(self.heads, -1)
            blank_value = self.blank_value.view(self.heads, -1)
        out = neighborhood_attention(
            query,
            key,
            value,
            positions,
            neighborhoods,
            position_weight=self.position.weight,
            position_bias=self.position.bias,
            blank_key=blank_key,
            blank_value=blank_value,
            impl=impl,
        )
        return out.flatten(1)


class Mlp(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = GELU()
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """Pre-norm transformer block on a token set."""

    def __init__(self, config: AFFConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(
            dim, config.heads[stage], config.expanded_position, config.blank_token
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        if config.layer_scale > 0:
            self.gamma1 = nn.Parameter(torch.full((dim,), config.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((dim,), config.layer_scale))
        else:
            self.register_parameter("gamma1", None)
            self.register_parameter("gamma2", None)

    def forward(self, tokens: TokenSet, neighborhoods: Neighborhoods, impl: str | None) -> TokenSet:
        x = tokens.features
        attended = self.attn(self.norm1(x), tokens.positions, neighborhoods, impl)

        def rest(x: Tensor, attended: Tensor) -> Tensor:
            x = x + self._scaled(self.attn.proj(attended), self.gamma1, tokens)
            return x + self._scaled(self.mlp(self.norm2(x)), self.gamma2, tokens)

        if self.training:  # paths are dropped for whole samples
            return tokens.with_features(rest(x, attended))
        return tokens.with_features(by_rows(rest, x, attended, width=self.mlp.fc1.out_features))

    def _scaled(self, branch: Tensor, gamma: Tensor | None, tokens: TokenSet) -> Tensor:
        if gamma is not None:
            branch = branch * gamma
        return drop_path(branch, self.drop_path_rate, tokens, self.training)


class AdaptiveMerge(nn.Module):
    """Scores tokens, keeps the best and merges the neighbourhoods around them (section 3.3)."""

    mid_channels = 4

    def __init__(self, config: AFFConfig, stage: int) -> None:
        super().__init__()
        dim, mid = config.dims[stage], self.mid_channels
        self.stride = 2 ** (stage + 1)
        self.score = nn.Linear(dim, 1)
        features = position_features(config.expanded_position)
        self.weight_net = nn.Sequential(nn.Linear(features, mid), nn.LayerNorm(mid), nn.GELU())
        self.norm = nn.LayerNorm(mid * dim)
        self.linear = nn.Linear(mid * dim, config.dims[stage + 1])

    def scores(self, x: Tensor) -> Tensor:
        """(T,) importance in (0, 1), float32."""
        return torch.sigmoid(self.score(x).float())[:, 0]

    def forward(
        self,
        tokens: TokenSet,
        neighborhoods: Neighborhoods,
        scores: Tensor,
        config: AFFConfig,
        impl: str | None,
    ) -> TokenSet:
        first = self.stride == 2
        index, sizes = select_centers(
            scores.detach(),
            tokens.positions,
            sizes=tokens.sizes,
            extent=tokens.extent,
            rate=config.rate,
            alpha=config.alpha,
            stride=self.stride,
            # On the full grid of the first stage both priors are the same.
            prior="grid" if first and config.prior == "adaptive" else config.prior,
            reserve=config.reserve,
            impl=impl,
        )
        linear, norm, _ = self.weight_net
        merged = scored_merge(
            tokens.features,
            scores,
            tokens.positions,
            index,
            neighborhoods,
            weight=linear.weight,
            bias=linear.bias,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            impl=impl,
        )
        features = self.linear(self.norm(merged))
        return TokenSet(tokens.positions[index], features, sizes, tokens.extent, tokens.origin)


class PatchMerge(nn.Module):
    """Swin's patch merging: 2x2 tokens of the grid into one (Table 5's alternative)."""

    def __init__(self, config: AFFConfig, stage: int) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.stride = 2**stage
        self.norm = nn.LayerNorm(4 * dim)
        self.linear = nn.Linear(4 * dim, config.dims[stage + 1], bias=False)

    def forward(self, tokens: TokenSet) -> TokenSet:
        assert tokens.extent is not None
        stride = self.stride
        grid = TokenSet(
            torch.floor(tokens.positions / stride),
            tokens.features,
            tokens.sizes,
            [tuple(math.ceil(side / stride) for side in extent) for extent in tokens.extent],
        )
        maps = grid.to_grid()
        merged = [self._merge(m) for m in maps] if isinstance(maps, list) else self._merge(maps)
        coarse = TokenSet.from_grid(merged)
        return TokenSet(
            coarse.positions * (2 * stride),
            self.linear(self.norm(coarse.features)),
            coarse.sizes,
            tokens.extent,
        )

    @staticmethod
    def _merge(maps: Tensor) -> Tensor:
        height, width = maps.shape[-2:]
        maps = nn.functional.pad(maps, (0, width % 2, 0, height % 2))
        return rearrange(maps, "... c (h y) (w x) -> ... (x y c) h w", y=2, x=2)


@dataclass(frozen=True)
class StageOutput:
    """What a stage saw and thought.

    Attributes:
        tokens: the stage's tokens after its blocks, in cluster order; features (T, C).
        inputs: the same tokens as they came into the stage, embedded or merged; features (T, C).
        scores: (T,) importance of each token, in (0, 1); `None` in a stage that scores none.
    """

    tokens: TokenSet
    inputs: TokenSet
    scores: Tensor | None


class Stage(nn.Module):
    """Cluster once, attend in every block, then merge into the next stage's tokens."""

    def __init__(self, config: AFFConfig, stage: int, drop_path_rates: Sequence[float]) -> None:
        super().__init__()
        self.index = stage
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in drop_path_rates)
        self.merge: AdaptiveMerge | PatchMerge | None = None
        if stage + 1 < len(config.dims):
            self.merge = (AdaptiveMerge if config.merge == "adaptive" else PatchMerge)(
                config, stage
            )

    def forward(
        self, tokens: TokenSet, config: AFFConfig, impl: str | None
    ) -> tuple[StageOutput, TokenSet | None]:
        size = config.neighborhood_size[self.index]
        tokens = tokens.cluster(
            config.cluster_size,
            curve=config.curve,
            anchors=config.anchors,
            remainder=config.remainder,
            global_size=size,
            impl=impl,
        )
        assert tokens.clusters is not None
        neighborhoods = nearest_clusters(
            tokens.positions,
            tokens.clusters,
            round(size / config.cluster_size),
            scope=config.scope,
            global_size=size,
            impl=impl,
        )
        neighborhoods = neighborhoods.with_plan(training=torch.is_grad_enabled(), impl=impl)
        inputs = tokens
        for block in self.blocks:
            tokens = block(tokens, neighborhoods, impl)
        if isinstance(self.merge, AdaptiveMerge):
            scores = self.merge.scores(tokens.features)
            merged = self.merge(tokens, neighborhoods, scores, config, impl)
            return StageOutput(tokens, inputs, scores), merged
        merged = None if self.merge is None else self.merge(tokens)
        return StageOutput(tokens, inputs, None), merged


class AFF(nn.Module):
    """The backbone: images to one `StageOutput` per stage.

    Args:
        config: see `AFFConfig`; `rate`, `alpha` and `neighborhood_size` may be changed later with
            `reconfigure`, on trained weights too.
        impl: implementation of the ops, for tests: `None` picks the device's fast path.

    Shapes:
        images: (B, 3, H, W), or a list of (3, H, W) of any sizes; normalized, float.
        positions: (x, y) indices of the first stage's grid, in every stage: a token that survives
            keeps its position. The grid has ceil(W / stride) x ceil(H / stride) cells.
    """

    def __init__(self, config: AFFConfig, impl: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.impl = impl
        self.patch_embed = PatchEmbed(config.in_channels, config.dims[0], config.patch_stride)
        blocks = sum(config.depths)
        rates = [config.drop_path * block / max(blocks - 1, 1) for block in range(blocks)]
        firsts = [sum(config.depths[:stage]) for stage in range(len(config.dims))]
        self.stages = nn.ModuleList(
            Stage(config, stage, rates[first : first + config.depths[stage]])
            for stage, first in enumerate(firsts)
        )
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def reconfigure(self, **changes: object) -> None:
        """Change `rate`, `alpha` or `neighborhood_size`, which no weight's shape depends on."""
        fixed = sorted(set(changes) - {"rate", "alpha", "neighborhood_size"})
        if fixed:
            raise ValueError(
                f"reconfigure: {', '.join(fixed)} cannot change after the model was made; "
                "rate, alpha and neighborhood_size can"
            )
        self.config = self.config.override(**changes)

    def forward(self, images: Tensor | Sequence[Tensor]) -> list[StageOutput]:
        tokens = self.patch_embed(images)
        outputs = []
        for stage in self.stages:
            output, tokens = stage(tokens, self.config, self.impl)
            outputs.append(output)
        return outputs
