"""Parts of all backbones: patches in, 2 x 2 merging, and a stage's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from pointformer import Neighborhoods, TokenSet
from pointformer.models.config import AFFConfig, PointConfig, SwinConfig
from pointformer.nn.blocks import GELU, init_linear


@dataclass(frozen=True)
class StageOutput:
    """Tokens before and after a stage of the backbone, and their scores.

    Attributes:
        tokens: the stage's tokens after its blocks, in cluster order; features (T, C).
        inputs: the same tokens as they came into the stage, embedded or merged; features (T, C).
        scores: (T,) importance of each token, in [0, 1], by which it is kept; `None` in a stage
            that scores none.
        neighborhoods: of the tokens, where a decoder attends to them again.
        logits: (T,) of the learned scores, which weight what is merged, also where something else
            says what is kept; before the sigmoid, which may be 1 to the last bit.
    """

    tokens: TokenSet
    inputs: TokenSet
    scores: Tensor | None
    neighborhoods: Neighborhoods | None = None
    logits: Tensor | None = None


def whole_cells(maps: Tensor, cell: int) -> Tensor:
    """Maps (B, C, H, W) whose last row and column are repeated until cells divide their sides."""
    down, right = (-side % cell for side in maps.shape[-2:])
    if down == right == 0:
        return maps
    return nn.functional.pad(maps, (0, right, 0, down), mode="replicate")


class PatchEmbed(nn.Module):
    """Two 3x3 convolutions from an image to one token per `patch_stride` pixels (rounded up).

    Where that does not divide a side, the last pixels are repeated: convolutions would see gray
    beyond them, as they do nowhere else at the end of a side, and as of no picture in training
    whose crops are whole patches.
    """

    def __init__(self, config: AFFConfig | SwinConfig) -> None:
        super().__init__()
        dim = config.dims[0]
        first, second = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[config.patch_stride]
        self.conv1 = nn.Conv2d(config.in_channels, dim // 2, 3, first, 1)
        self.bn = nn.BatchNorm2d(dim // 2)
        self.act = GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, second, 1)
        self.norm = nn.LayerNorm(dim)
        self.stride = config.patch_stride

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
        images = whole_cells(images, self.stride)
        return self.conv2(self.act(self.bn(self.conv1(images))))


class PatchMerge(nn.Module):
    """Swin's patch merging: squares of the grid's tokens into one each (Table 5's alternative).

    Args:
        dim, out_dim: channels of the tokens before and after.
        stride: distance between the tokens before, in cells of the first stage's grid.
        side: of the squares, in tokens.
    """

    def __init__(self, dim: int, out_dim: int, stride: int, side: int = 2) -> None:
        super().__init__()
        self.stride, self.side = stride, side
        self.norm = nn.LayerNorm(side**2 * dim)
        self.linear = nn.Linear(side**2 * dim, out_dim, bias=False)

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
            coarse.positions * (self.side * stride),
            self.linear(self.norm(coarse.features)),
            coarse.sizes,
            tokens.extent,
            same_positions=coarse.same_positions,
        )

    def _merge(self, maps: Tensor) -> Tensor:
        side, (height, width) = self.side, maps.shape[-2:]
        maps = nn.functional.pad(maps, (0, -width % side, 0, -height % side))
        return rearrange(maps, "... c (h y) (w x) -> ... (x y c) h w", y=side, x=side)


class Backbone(nn.Module):
    """Patches, or points, then stages of blocks.

    Args:
        config: of the backbone.
        stage: makes one, called as `stage(config, index, drop_path_rates)`, a rate for each block.
        embed: what comes before them.
        impl: implementation of the ops, for tests: `None` picks the device's fast path.
    """

    def __init__(
        self,
        config: AFFConfig | SwinConfig | PointConfig,
        stage: Callable[..., nn.Module],
        embed: nn.Module,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.impl = impl
        self.patch_embed = embed
        blocks = sum(config.depths)
        rates = [config.drop_path * block / max(blocks - 1, 1) for block in range(blocks)]
        firsts = [sum(config.depths[:index]) for index in range(len(config.dims))]
        self.stages = nn.ModuleList(
            stage(config, index, rates[first : first + config.depths[index]])
            for index, first in enumerate(firsts)
        )
        init_linear(self)
