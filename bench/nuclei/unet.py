"""The `pointformer` command with a U-Net (Ronneberger et al. 2015) in the place of AFF's backbone.

    python bench/nuclei/unet.py train nuclei_stars.yaml DATA --out OUT
    python bench/nuclei/unet.py evaluate OUT/model.safetensors DATA --split val

Head, loss and training are those of the recipe: a yardstick for `aff_nano.nuclei`, with about as
many weights. Pictures go down to strides 2, 4, ..., 32 by two convolutions each; on the way up each
map meets what was there on the way down, and those at strides 4 to 32 are what the head reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointformer.cli import main
from pointformer.models import model
from pointformer.models.backbone import StageOutput
from pointformer.models.config import AFFConfig
from pointformer.models.grid import by_shape, token_sets

FIRST = 24  # channels at stride 2


def convolutions(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, step in ((inside, stride), (outside, 1)):
        layers += [
            nn.Conv2d(channels, outside, 3, step, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """In place of `AFF`: four stages, on grids, of its channels."""

    def __init__(self, config: AFFConfig, impl: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.impl = impl
        widths = [config.in_channels, FIRST, *config.dims]
        self.down = nn.ModuleList(convolutions(a, b, 2) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(
            convolutions(fine + coarse, fine) for fine, coarse in itertools.pairwise(config.dims)
        )

    def forward(self, images: Tensor | Sequence[Tensor]) -> list[StageOutput]:
        return by_shape(self._stages, images)

    def _stages(self, images: Tensor) -> list[StageOutput]:
        maps = [images]
        for step in self.down:
            maps.append(step(maps[-1]))
        maps = maps[2:]
        for level in reversed(range(len(self.up))):
            coarse = F.interpolate(maps[level + 1], maps[level].shape[-2:], mode="nearest")
            maps[level] = self.up[level](torch.cat([maps[level], coarse], 1))
        return [StageOutput(tokens, tokens, None) for tokens in token_sets(maps)]


if __name__ == "__main__":
    model.AFF = UNet  # type: ignore[misc, assignment]
    raise SystemExit(main())
