"""What the backbones share: patches in, blocks, 2 x 2 merging, and what a stage gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pointformer import TokenSet, add_norm
from pointformer.models.config import AFFConfig, SwinConfig
from pointformer.models.layers import GELU, FeedForward
from pointformer.models.parallel import WHOLE, BatchPart

# A residual branch (T, C) and its scale (C,), if it has one, before they are added.
Branch = tuple[Tensor, Tensor | None]
HIDDEN = 1 << 22  # numbers that a hidden layer holds at a time at inference


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


def drop_path(
    x: Tensor, rate: float, tokens: TokenSet, training: bool, part: BatchPart = WHOLE
) -> Tensor:
    """Zero a residual branch (T, C) for whole samples with probability `rate`, rescale the rest."""
    if not training or rate == 0:
        return x
    factor = part.bernoulli(1 - rate, tokens.batch_size, x)[:, None].div_(1 - rate)
    if tokens.is_uniform and tokens.batch_size:
        samples = x.view(tokens.batch_size, -1, x.shape[1])
        return (samples * factor[:, None]).view(x.shape)
    return x * factor[tokens.sample_index]


def add_branch(x: Tensor, branch: Branch) -> Tensor:
    """(T, C) with the branch."""
    rows, scale = branch
    return x + rows if scale is None else torch.addcmul(x, rows, scale)


def by_rows(function: Callable[..., Tensor], *inputs: Tensor, width: int) -> Tensor:
    """`function(*inputs)`, on CPUs at most `HIDDEN / width` rows at a time at inference.

    For functions that treat every row alone. What they need inside would take several times the
    memory of their result, and on CPUs fresh memory takes longer than the layers that fill it. On
    GPUs memory is used again, and every part would be a dozen launches more.
    """
    rows, total = max(1, HIDDEN // width), len(inputs[0])
    whole = total <= rows or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if whole or inputs[0].device.type != "cpu":
        return function(*inputs)
    result = torch.empty(0)
    for first in range(0, total, rows):
        part = function(*(x[first : first + rows] for x in inputs))
        if first == 0:
            result = part.new_empty(total, *part.shape[1:])
        result[first : first + rows] = part
    return result


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


class BlockAttention(nn.Module):
    """Attention that leaves its output projection to the block."""

    proj: nn.Linear


class Block(nn.Module):
    """Pre-norm transformer block on a token set.

    Args:
        attention: called as `attention(x, tokens, *where, impl=impl)` with normalized features
            x (T, C). It leaves its output projection `proj` to the block, which runs it on a few
            rows.
        dim, hidden: channels C, and hidden ones of the feed-forward layer.
        layer_scale: initial value of the residual branches' scale; 0 means no scale.
        drop_path_rate: of the residual branches.

    Attributes:
        recompute: keep only the input for the backward pass, and run the block again there.
        part: of the batch that this process has.
    """

    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(
        self,
        attention: BlockAttention,
        dim: int,
        hidden: int,
        layer_scale: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.recompute = False
        self.part = WHOLE
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden)
        for name in ("gamma1", "gamma2"):
            scale = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale > 0 else None
            self.register_parameter(name, scale)

    def forward(
        self,
        tokens: TokenSet,
        *where: object,
        pending: Branch | None = None,
        impl: str | None = None,
    ) -> tuple[TokenSet, Branch | None]:
        """Tokens whose features lack a last branch, which is left to the next block's LayerNorm.

        Args:
            where: tells the attention who sees whom.
            pending: what the block before left; `None` for none.
        """
        x, normed = tokens.features, None
        if pending is None:
            normed = self.norm1(x)
        else:
            x, normed = self._add_norm(x, pending, self.norm1, impl)
        attended = self.attn(normed, tokens, *where, impl=impl)

        def branches(x: Tensor, attended: Tensor) -> tuple[Tensor, Branch]:
            branch = self._dropped(self.attn.proj(attended), tokens), self.gamma1
            x, normed = self._add_norm(x, branch, self.norm2, impl)
            return x, (self._dropped(self.mlp(normed), tokens), self.gamma2)

        if self.training or x.device.type != "cpu":  # paths are dropped for whole samples
            x, pending = branches(x, attended)
            return tokens.with_features(x), pending
        width = self.mlp.fc1.out_features
        x = by_rows(lambda *rows: add_branch(*branches(*rows)), x, attended, width=width)
        return tokens.with_features(x), None

    @staticmethod
    def _add_norm(
        x: Tensor, branch: Branch, norm: nn.LayerNorm, impl: str | None
    ) -> tuple[Tensor, Tensor]:
        rows, scale = branch
        return add_norm(x, rows, norm.weight, norm.bias, scale=scale, eps=norm.eps, impl=impl)

    def _dropped(self, branch: Tensor, tokens: TokenSet) -> Tensor:
        return drop_path(branch, self.drop_path_rate, tokens, self.training, self.part)


def run_blocks(
    blocks: nn.ModuleList, tokens: TokenSet, where: Sequence[tuple], impl: str | None
) -> TokenSet:
    """The tokens after all blocks, each with its part of `where`."""
    pending = None
    for block, seen in zip(blocks, where, strict=True):
        run: Callable = block
        if block.recompute and torch.is_grad_enabled():
            run = partial(checkpoint, block, use_reentrant=False)
        tokens, pending = run(tokens, *seen, pending=pending, impl=impl)
    return tokens if pending is None else tokens.with_features(add_branch(tokens.features, pending))


class PatchMerge(nn.Module):
    """Swin's patch merging: 2x2 tokens of the grid into one (Table 5's alternative)."""

    def __init__(self, config: AFFConfig | SwinConfig, stage: int) -> None:
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
        maps = grid.to_grid(check_values=False)
        merged = [self._merge(m) for m in maps] if isinstance(maps, list) else self._merge(maps)
        coarse = TokenSet.from_grid(merged)
        return TokenSet(
            coarse.positions * (2 * stride),
            self.linear(self.norm(coarse.features)),
            coarse.sizes,
            tokens.extent,
            same_positions=coarse.same_positions,
        )

    @staticmethod
    def _merge(maps: Tensor) -> Tensor:
        height, width = maps.shape[-2:]
        maps = nn.functional.pad(maps, (0, width % 2, 0, height % 2))
        return rearrange(maps, "... c (h y) (w x) -> ... (x y c) h w", y=2, x=2)


class Backbone(nn.Module):
    """Patches, then stages of blocks.

    Args:
        config: of the backbone.
        stage: makes one, called as `stage(config, index, drop_path_rates)`, a rate for each block.
        impl: implementation of the ops, for tests: `None` picks the device's fast path.
    """

    def __init__(
        self,
        config: AFFConfig | SwinConfig,
        stage: Callable[..., nn.Module],
        impl: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.impl = impl
        self.patch_embed = PatchEmbed(config.in_channels, config.dims[0], config.patch_stride)
        blocks = sum(config.depths)
        rates = [config.drop_path * block / max(blocks - 1, 1) for block in range(blocks)]
        firsts = [sum(config.depths[:index]) for index in range(len(config.dims))]
        self.stages = nn.ModuleList(
            stage(config, index, rates[first : first + config.depths[index]])
            for index, first in enumerate(firsts)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
