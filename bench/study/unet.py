"""The `pointformer` command with a U-Net (Ronneberger et al. 2015) in the place of AFF's backbone.

    python bench/study/unet.py train nuclei_stars.yaml DATA --out OUT score_weight=0
    python bench/study/unet.py instances OUT/model.safetensors OUT/recipe.yaml DATA

(`instances` is instances.py with it; a U-Net has no scores of tokens, hence no weight of them.)
Head, loss and training are those of the recipe: a yardstick for `aff_nano.nuclei`, with about as
many weights. Pictures go down to strides 2, 4, ..., 32 by two convolutions each; on the way up each
map meets what was there on the way down, and those at strides 4 to 32 are what the head reads.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import instances
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointformer import cli
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


def main(arguments: Sequence[str]) -> int:
    model.AFF = UNet  # type: ignore[misc, assignment]
    if arguments[:1] == ["instances"]:
        instances.main(arguments[1:])
        return 0
    return cli.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
