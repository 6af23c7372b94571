"""Grids of tokens: feature maps of any backbone as the token sets that heads take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pointformer import TokenSet
from pointformer._checks import check_tensor, describe
from pointformer.models.backbone import StageOutput, whole_cells
from pointformer.models.config import GridConfig


def token_sets(maps: Sequence[Tensor]) -> list[TokenSet]:
    """One token set per feature map, all on the lattice of the finest one.

    Map i stands on every 2**i-th row and column of the first: its positions are multiples of 2**i,
    so that each coarse token sits on a token of every finer map, which heads rely on.

    Args:
        maps: (B, C_i, H_i, W_i), finest first, each half as high and wide as the one before;
            halves may be rounded up or down.

    Returns:
        Token sets in raster order whose extent is that of the first map.

    Raises:
        ValueError: a map's height or width does not follow from the first one's.
    """
    if not isinstance(maps, list | tuple) or not maps:
        raise TypeError(f"maps: expected a list of feature maps, got {describe(maps)}")
    for values in maps:
        check_tensor("maps", values, ("B", "C", "H", "W"))
    sets: list[TokenSet] = []
    for i, values in enumerate(maps):
        tokens, stride = TokenSet.from_grid(values), 2**i
        for side, finest in zip(values.shape[-2:], maps[0].shape[-2:], strict=True):
            if not max(finest // stride, 1) <= side <= math.ceil(finest / stride):
                raise ValueError(
                    f"maps: map {i} is {tuple(values.shape[-2:])}, expected the first one's "
                    f"{tuple(maps[0].shape[-2:])} divided by {stride}"
                )
        extent = sets[0].extent if sets else tokens.extent
        sets.append(
            TokenSet(
                tokens.positions * stride,
                tokens.features,
                tokens.sizes,
                extent,
                same_positions=True,
            )
        )
    return sets


def by_shape(
    run: Callable[[Tensor], list[StageOutput]], images: Tensor | Sequence[Tensor]
) -> list[StageOutput]:
    """`run` on batches (B, C, H, W): all images of a list that have the same size in one batch.

    The samples come back in the order of `images`. Stages without scores only.
    """
    if isinstance(images, Tensor):
        return run(images)
    rows: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    outputs = [run(torch.stack([images[row] for row in same])) for same in rows.values()]
    if len(outputs) == 1:
        return outputs[0]
    order = [row for same in rows.values() for row in same]
    places = sorted(range(len(order)), key=order.__getitem__)

    def packed(parts: list[TokenSet]) -> TokenSet:
        samples = [sample for part in parts for sample in part]
        return TokenSet.cat([samples[place] for place in places])

    return [
        StageOutput(
            packed([part.tokens for part in stage]), packed([part.inputs for part in stage]), None
        )
        for stage in zip(*outputs, strict=True)
    ]


class GridBackbone(nn.Module):
    """Any module that gives feature maps of strides 4, 8, 16, 32, as a backbone for heads.

    The last row and column of images are repeated until the last stride divides their sides, and
    the maps cut to ceil(side / stride): the image's own part. What enters a stage is not known of
    a foreign module, so `inputs` of a stage are its features, and there are no scores.

    Args:
        module: gives for images (B, 3, H, W) a list (or a dict) of maps (B, C_i, H_i, W_i), finest
            first, such as `timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))`.
        dims: channels C_i of the maps; `None` asks `module.feature_info`, as timm has it.
        in_channels, image_size: of the images; the size is for reports only.

    Raises:
        ValueError: at the first call, if a map has other channels or another stride.
    """

    def __init__(
        self,
        module: nn.Module,
        dims: Sequence[int] | None = None,
        *,
        in_channels: int = 3,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {describe(module)}")
        if dims is None:
            if not hasattr(module, "feature_info"):
                raise ValueError("dims: needed, as the module has no feature_info to ask")
            dims = module.feature_info.channels()  # type: ignore[operator, union-attr]
        self.module = module
        dims = cast("tuple[int, ...]", dims)  # what they are the configuration checks
        self.config = GridConfig(dims, image_size=image_size, in_channels=in_channels)
        self.impl: str | None = None

    def forward(self, images: Tensor | Sequence[Tensor]) -> list[StageOutput]:
        return by_shape(self._stages, images)

    def _stages(self, images: Tensor) -> list[StageOutput]:
        dims = self.config.dims
        strides = [4 * 2**i for i in range(len(dims))]
        height, width = images.shape[-2:]
        padded = whole_cells(images, strides[-1])
        maps = self.module(padded)
        maps = list(maps.values()) if isinstance(maps, Mapping) else list(maps)
        if len(maps) != len(dims):
            raise ValueError(f"module: expected {len(dims)} maps, one for each of dims, "
                             f"got {len(maps)}")  # fmt: skip
        for i, (values, dim, stride) in enumerate(zip(maps, dims, strides, strict=True)):
            expected = (len(images), dim, padded.shape[-2] // stride, padded.shape[-1] // stride)
            if tuple(values.shape) != expected:
                raise ValueError(
                    f"module: expected map {i} to be {expected} (batch, channels, height, width; "
                    f"stride {stride}) for images {tuple(padded.shape)}, got {tuple(values.shape)}"
                )
        cut = [
            values[..., : math.ceil(height / stride), : math.ceil(width / stride)]
            for values, stride in zip(maps, strides, strict=True)
        ]
        return [StageOutput(tokens, tokens, None) for tokens in token_sets(cut)]
