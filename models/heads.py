"""Heads: from a backbone's stages to class scores, a dense map, or masks.

A head is made with the backbone's configuration and the number of classes; keyword arguments are
options that `create_model` takes too. It is called with the stages, the inputs and `impl`.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from pointformer import TokenSet, interpolate
from pointformer._checks import brief, check_count, check_flags, check_number, check_option
from pointformer.models.backbone import StageOutput, whole_cells
from pointformer.models.config import AFFConfig, PointConfig
from pointformer.models.hcformer import Encoder, SoftAssignment, decode
from pointformer.models.layers import POSITION_NORMS, at_least_float32
from pointformer.models.mask2former import MaskDecoder, MaskPredictions
from pointformer.models.pixel_decoder import PixelDecoder
from pointformer.models.points import PointDecoder
from pointformer.nn import init_linear

Images = Tensor | Sequence[Tensor]
STAR_CELL = 2  # pixels
_STAR_RADIUS = 8.0  # pixels, of objects at the start of training
_STAR_PRIOR = 0.01  # score of every cell then


class Output(Enum):
    """Kinds of head output, each with the tasks that it can serve.

    Attributes:
        tasks: names of the tasks that can be read off it.
        channels: how many classes the head must have; `None`: any number, one for each kind of
            thing to find.
    """

    TOKENS = "token sets", (), None
    SCORES = "a score for each class (B, K)", ("classification",), None
    CLASSES = "a score for each class and pixel (B, K, H, W)", ("semantic",), None
    BORDERS = "background, inside and border (B, 3, H, W)", ("instance",), 3
    POINT_SCORES = "a score for each class (B, K) of a point set", ("point_classification",), None
    POINT_CLASSES = "a score for each class and point (T, K)", ("point_segmentation",), None
    STARS = (
        "for each cell of 2 x 2 pixels a score of each class and log lengths of rays (B, K + R, "
        "H / 2, W / 2)",
        ("instance",),
        None,
    )
    MASKS = "queries, each with a class and a mask", ("semantic", "instance", "panoptic"), None

    def __init__(self, description: str, tasks: tuple[str, ...], channels: int | None) -> None:
        self.description = description
        self.tasks = tasks
        self.channels = channels

    @property
    def only_task(self) -> str | None:
        """The task, if there is but one."""
        return self.tasks[0] if len(self.tasks) == 1 else None

    def kinds(self, num_classes: int) -> int:
        """Number of kinds of things that a head of `num_classes` finds."""
        return num_classes if self.channels is None else 1


TASK_NAMES = tuple(dict.fromkeys(task for output in Output for task in output.tasks))
"""Names of all tasks that models can be made for; `pointformer.tasks` has a class for each."""


class Head(nn.Module):
    """Base of heads, which map a backbone's stages to an output.

    Attributes:
        outputs: the kinds that it can give; without a task, the first that fits the classes.
        of_points: whether it is for backbones of point sets, not of images.
    """

    outputs: tuple[Output, ...]
    of_points: bool = False


def mean_tokens(tokens: TokenSet) -> Tensor:
    """(B, C) mean of each sample's features."""
    if tokens.is_uniform and tokens.num_tokens:
        return tokens.features.view(tokens.batch_size, -1, tokens.channels).mean(1)
    features = at_least_float32(tokens.features)
    sums = features.new_zeros(tokens.batch_size, tokens.channels)
    sums = sums.index_add(0, tokens.sample_index, features)
    means = sums / tokens.batch_offsets.diff()[:, None]
    return means.to(tokens.features.dtype)


class ClassificationHead(Head):
    """LayerNorm and mean over the last stage's tokens, then a linear classifier: (B, classes)."""

    outputs = (Output.SCORES,)

    def __init__(self, config: AFFConfig, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dims[-1])
        self.linear = nn.Linear(config.dims[-1], num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, stages: list[StageOutput], images: Images, impl: str | None) -> Tensor:
        tokens = stages[-1].tokens
        return self.linear(mean_tokens(tokens.with_features(self.norm(tokens.features))))


class FeatureHead(Head):
    """One normalized token set per stage, for decoders: channels `dims`, in cluster order."""

    outputs = (Output.TOKENS,)

    def __init__(self, config: AFFConfig, num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in config.dims)

    def forward(
        self, stages: list[StageOutput], images: Images, impl: str | None
    ) -> list[TokenSet]:
        return [
            stage.tokens.with_features(norm(stage.tokens.features))
            for norm, stage in zip(self.norms, stages, strict=True)
        ]


class _MapHead(Head):
    """Base of heads whose output is a map: `_summed` has the stages from `first_stage` on, on the
    first stage's grid."""

    def __init__(self, config: AFFConfig, channels: int, first_stage: int = 0) -> None:
        super().__init__()
        _check_first_stage(first_stage, len(config.dims) - 1)
        self.channels, self.first_stage = channels, first_stage
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels))
            for dim in config.dims[first_stage:]
        )
        self.mix = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GELU())

    def forward(
        self, stages: list[StageOutput], images: Images, impl: str | None
    ) -> Tensor | list[Tensor]:
        maps = self._summed(stages, impl)
        if isinstance(images, Tensor) and isinstance(maps, Tensor):
            return self._pixels(maps, images)
        return [
            self._pixels(m[None], image[None])[0] for m, image in zip(maps, images, strict=True)
        ]

    def _pixels(self, maps: Tensor, images: Tensor) -> Tensor:
        """The output for images (B, C, H, W) from maps (B, channels, h, w)."""
        raise NotImplementedError

    def _summed(self, stages: list[StageOutput], impl: str | None) -> Tensor | list[Tensor]:
        """Each stage's tokens projected, interpolated to the first stage's grid and summed."""
        grid = stages[0].tokens
        total = grid.features.new_zeros(())
        for projection, stage in zip(self.projections, stages[self.first_stage :], strict=True):
            tokens = stage.tokens
            features = projection(tokens.features)
            if tokens is grid:
                total = total + features
                continue
            total = total + interpolate(
                features,
                tokens.positions,
                grid.positions,
                sizes=tokens.sizes,
                query_sizes=grid.sizes,
                same_positions=tokens.same_positions and grid.same_positions,
                k=3,
                power=2.0,
                check_values=False,
                impl=impl,
            )
        return grid.with_features(total).to_grid(check_values=False)


class DenseHead(_MapHead):
    """Per-pixel class scores from all stages.

    Each stage's tokens are projected, interpolated to the first stage's grid and summed; a 3x3
    convolution mixes neighbors there and a sub-pixel layer brings the map to the image's size,
    where it meets a 3x3 convolution of the image, so that outlines are not tied to the grid.

    Returns logits (B, classes, H, W), or a list of (classes, H, W) for a list of images.

    Args:
        channels, pixel_channels: of the grid, and of the pixels.
        first_stage: the first of the stages that are read, from 0: those before say nothing but
            where the grid is.
        detail: whether the image itself is read.
    """

    outputs = (Output.BORDERS, Output.CLASSES)

    def __init__(
        self,
        config: AFFConfig,
        num_classes: int,
        *,
        channels: int = 64,
        pixel_channels: int = 16,
        first_stage: int = 0,
        detail: bool = True,
    ) -> None:
        super().__init__(config, channels, first_stage)
        stride = config.patch_stride
        self.to_pixels = nn.Sequential(
            nn.Conv2d(channels, pixel_channels * stride**2, 1), nn.PixelShuffle(stride)
        )
        self.detail = (
            nn.Conv2d(config.in_channels, pixel_channels, 3, padding=1) if detail else None
        )
        self.classify = nn.Sequential(
            nn.GELU(), nn.Conv2d(pixel_channels, num_classes, 3, padding=1)
        )

    def _pixels(self, maps: Tensor, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        pixels = self.to_pixels(self.mix(maps))[..., :height, :width]
        return self.classify(pixels if self.detail is None else pixels + self.detail(images))


class StarHead(_MapHead):
    """Star-convex objects (StarDist, Schmidt et al. 2018) from all stages: for each cell of 2 x 2
    pixels a score of each class and the lengths of rays from its center to the object's outline.

    The stages meet as in `DenseHead`; a sub-pixel layer brings the sum to the cells, where it meets
    convolutions of the image, and two more convolutions mix both. At every fourth pixel objects of
    five pixels across would be lost, at every one the rays would take most of the time.

    Returns (B, classes + rays, H / 2, W / 2), sides rounded up, or a list of such maps for a list
    of images: logits of the classes, then natural logarithms of the lengths in pixels of the image.
    Ray k of R has the angle 2 pi (k + 1/2) / R from the x axis to the y axis, which points down, so
    that mirror images and quarter turns only change the order, and none runs between two pixels.

    Args:
        channels: of the first stage's grid.
        cell_channels: of the cells.
        hidden: of each cell alone, from which scores and rays are read.
        rays: in all directions, a multiple of 4.
    """

    outputs = (Output.STARS,)

    def __init__(
        self,
        config: AFFConfig,
        num_classes: int,
        *,
        channels: int = 64,
        cell_channels: int = 32,
        hidden: int = 128,
        rays: int = 32,
    ) -> None:
        super().__init__(config, channels)
        if rays % 4:
            raise ValueError(f"rays: expected a multiple of 4, got {rays}")
        stride, dim = config.patch_stride, cell_channels
        factor = max(stride // STAR_CELL, 1)
        self.tokens_across = max(STAR_CELL // stride, 1)  # a cell
        self.to_cells = nn.Sequential(
            nn.Conv2d(channels, dim * factor**2, self.tokens_across, self.tokens_across),
            nn.PixelShuffle(factor),
        )
        self.detail = nn.Sequential(
            nn.Conv2d(config.in_channels, dim, 2 * STAR_CELL, STAR_CELL, padding=1),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        self.refine = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        self.hidden = nn.Sequential(nn.GELU(), nn.Conv2d(dim, hidden, 1), nn.GELU())
        # As torch makes them, so many layers would pass on little of what they see.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        self.classify = nn.Conv2d(hidden, num_classes, 1)
        self.lengths = nn.Conv2d(hidden, rays, 1)
        # Most cells are background, which would outweigh objects at first (Lin et al. 2017).
        rare = math.log(_STAR_PRIOR / (1 - _STAR_PRIOR))
        for layer, value in ((self.classify, rare), (self.lengths, math.log(_STAR_RADIUS))):
            assert layer.bias is not None
            nn.init.constant_(layer.bias, value)

    def _pixels(self, maps: Tensor, images: Tensor) -> Tensor:
        height, width = (-(-side // STAR_CELL) for side in images.shape[-2:])
        mixed = whole_cells(self.mix(maps), self.tokens_across)
        coarse = self.to_cells(mixed)[..., :height, :width]
        cells = coarse + self.detail(whole_cells(images, STAR_CELL))
        cells = self.hidden(cells + self.refine(cells))
        return torch.cat([self.classify(cells), self.lengths(cells)], 1)


class Mask2FormerHead(Head):
    """Pixel decoder and masked-attention decoder on tokens (section 4.1): `MaskPredictions`.

    Runs in the dtype of its weights, also under autocast: the published recipe is float32 there,
    and its masks need it.

    Args:
        queries: objects that an image can have at most.
        token_queries: queries start from tokens, see `MaskDecoder`; the published ones are learned,
            which takes a hundred times as long.
        position_norm: see `sine_encoding`.
        power, learn_power: see `PixelDecoder`.
        pixel_layers, decoder_layers: layers of the two decoders.
        dim, hidden, pixel_hidden: channels of both, hidden ones of their feed-forward layers.
        first_stage: 0, or 1 where the first stage says nothing but where the grid is.
    """

    outputs = (Output.MASKS,)

    def __init__(
        self,
        config: AFFConfig,
        num_classes: int,
        *,
        first_stage: int = 0,
        queries: int = 100,
        token_queries: bool = False,
        position_norm: str = "image",
        power: float = 6.0,
        learn_power: bool = True,
        pixel_layers: int = 6,
        decoder_layers: int = 9,
        dim: int = 256,
        hidden: int = 2048,
        pixel_hidden: int = 1024,
    ) -> None:
        super().__init__()
        self.features = FeatureHead(config, num_classes)
        _check_first_stage(first_stage, 1)
        if first_stage == 1:
            self.features.norms[0] = nn.Identity()
        self.pixel_decoder = PixelDecoder(
            config.dims,
            dim,
            pixel_layers,
            hidden=pixel_hidden,
            lateral=first_stage == 0,
            position_norm=position_norm,
            power=power,
            learn_power=learn_power,
        )
        self.decoder = MaskDecoder(
            num_classes,
            len(config.dims) - 1,
            dim,
            queries,
            decoder_layers,
            hidden=hidden,
            position_norm=position_norm,
            stride=config.patch_stride,
            token_queries=token_queries,
        )

    def forward(
        self, stages: list[StageOutput], images: Images, impl: str | None
    ) -> MaskPredictions:
        with torch.autocast(stages[0].tokens.device.type, enabled=False):
            tokens = self.features([_as_weights(self, stage) for stage in stages], images, impl)
            return self.decoder(*self.pixel_decoder(tokens, impl), impl)


class HCFormerHead(Head):
    """Masks on the last stage's tokens, decoded to the first stage's by learned clusterings.

    No pixel decoder: queries look at the coarsest tokens only, and each stage's tokens learned in
    which tokens of the next one they have a share. Autocast: see `Mask2FormerHead`.
    "HCFormer+" is `encoder_layers=6`.

    Args:
        queries: objects that an image can have at most.
        token_queries: queries start from tokens, see `MaskDecoder`; the published ones are learned,
            which takes a hundred times as long.
        neighbors: coarse tokens that a fine token can be assigned to.
        temperature: of the assignments, at the start.
        encoder_layers: of an `Encoder` of the coarsest tokens.
        decoder_layers, dim, hidden: of the transformer decoder.
    """

    outputs = (Output.MASKS,)

    def __init__(
        self,
        config: AFFConfig,
        num_classes: int,
        *,
        queries: int = 100,
        token_queries: bool = False,
        neighbors: int = 9,
        temperature: float = 0.1,
        encoder_layers: int = 0,
        decoder_layers: int = 8,
        dim: int = 256,
        hidden: int = 2048,
    ) -> None:
        super().__init__()
        self.assignments = nn.ModuleList(
            SoftAssignment(fine, coarse, neighbors, temperature=temperature)
            for fine, coarse in itertools.pairwise(config.dims)
        )
        self.norm = nn.LayerNorm(config.dims[-1])
        self.project = nn.Linear(config.dims[-1], dim)
        self.encoder = Encoder(dim, encoder_layers, hidden=hidden) if encoder_layers else None
        self.mask_features = nn.Linear(dim if encoder_layers else config.dims[-1], dim)
        self.stride = config.patch_stride
        self.decoder = MaskDecoder(
            num_classes,
            1,
            dim,
            queries,
            decoder_layers,
            hidden=hidden,
            token_queries=token_queries,
        )

    def forward(
        self, stages: list[StageOutput], images: Images, impl: str | None
    ) -> MaskPredictions:
        with torch.autocast(stages[0].tokens.device.type, enabled=False):
            stages = [_as_weights(self, stage) for stage in stages]
            assignments = []
            for assign, (fine, coarse) in zip(
                self.assignments, itertools.pairwise(stages), strict=True
            ):
                assignments.append(assign(fine.tokens, coarse.inputs, impl=impl))
            coarsest = stages[-1].tokens
            coarsest = coarsest.with_features(self.norm(coarsest.features))
            memory = coarsest.with_features(self.project(coarsest.features))
            if self.encoder is not None:
                coarsest = memory = self.encoder(memory)
            mask_features = coarsest.with_features(self.mask_features(coarsest.features))
            predictions = self.decoder(mask_features, [memory], impl)
            grid = stages[0].tokens
            wanted = (*predictions.auxiliary, predictions) if self.training else (predictions,)
            masks = decode(torch.cat([p.mask_logits for p in wanted], 1), assignments, impl)
            outputs = [
                replace(p, mask_logits=part, tokens=grid, stride=self.stride, auxiliary=())
                for p, part in zip(wanted, masks.chunk(len(wanted), 1), strict=True)
            ]
            temperatures = tuple(assign.temperature for assign in self.assignments)
            *earlier, last = outputs
            return replace(last, auxiliary=tuple(earlier), temperatures=temperatures)


class PointClassificationHead(Head):
    """LayerNorm, mean and maximum over the last stage's tokens, two layers: (B, classes).

    Args:
        dropout: between the two layers.
    """

    outputs, of_points = (Output.POINT_SCORES,), True

    def __init__(self, config: PointConfig, num_classes: int, *, dropout: float = 0.5) -> None:
        super().__init__()
        dim = config.dims[-1]
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(2 * dim, dim)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dim, num_classes)
        init_linear(self)

    def forward(self, stages: list[StageOutput], points: TokenSet, impl: str | None) -> Tensor:
        tokens = stages[-1].tokens
        tokens = tokens.with_features(self.norm(tokens.features))
        pooled = torch.cat([mean_tokens(tokens), _largest(tokens)], 1)
        return self.linear(self.dropout(self.act(self.hidden(pooled))))


def _largest(tokens: TokenSet) -> Tensor:
    """(B, C) maximum of each sample's features."""
    if tokens.is_uniform and tokens.num_tokens:
        return tokens.features.view(tokens.batch_size, -1, tokens.channels).amax(1)
    sample = tokens.sample_index[:, None].expand_as(tokens.features)
    lowest = tokens.features.new_zeros(tokens.batch_size, tokens.channels)
    return lowest.scatter_reduce(0, sample, tokens.features, "amax", include_self=False)


class PointSegmentationHead(Head):
    """A `PointDecoder` and a linear classifier: logits (T, classes), rows as the points came in.

    Args:
        decoder_layers: blocks at each stage.
        neighbors: coarse tokens that a fine one is interpolated from.
    """

    outputs, of_points = (Output.POINT_CLASSES,), True

    def __init__(
        self,
        config: PointConfig,
        num_classes: int,
        *,
        decoder_layers: int = 1,
        neighbors: int = 3,
    ) -> None:
        super().__init__()
        self.decoder = PointDecoder(config, decoder_layers, neighbors)
        self.norm = nn.LayerNorm(config.dims[0])
        self.linear = nn.Linear(config.dims[0], num_classes)
        init_linear(self.linear)

    def forward(self, stages: list[StageOutput], points: TokenSet, impl: str | None) -> Tensor:
        tokens = self.decoder(stages, impl)
        return tokens.with_features(self.linear(self.norm(tokens.features))).input_order().features


def _check_first_stage(first_stage: int, last: int) -> None:
    check_count("first_stage", first_stage, least=0, most=last)


def check_options(head: str, options: Mapping[str, object]) -> None:
    """Raise if the value of a known option is of another kind than the head's annotation says."""
    parameters = inspect.signature(HEADS[head]).parameters
    for name, value in options.items():
        kind = parameters[name].annotation
        if kind == "int":
            least = 0 if name.endswith(("_layers", "_stage")) else 1
            check_count(name, value, least=least)
        elif kind == "float" and name == "dropout":
            check_number(name, value, least=0, most=1)
        elif kind == "float":
            check_number(name, value, above=0)
        elif kind == "bool":
            check_flags(**{name: value})
        else:
            check_option(name, value, POSITION_NORMS)


def tasks_of(head: str, num_classes: int) -> list[str]:
    """Names of the tasks that a head of so many classes can be made for."""
    return [task for output in _outputs_of(head, num_classes) for task in output.tasks]


def output_of(head: str, num_classes: int, task: str | None) -> Output:
    """Output of a head of so many classes, made for a task or, if `None`, for whatever comes first.

    Raises:
        ValueError: it cannot be made for the task; the message lists the possible ones.
    """
    for output in _outputs_of(head, num_classes):
        if task is None or task in output.tasks:
            return output
    possible = ", ".join(tasks_of(head, num_classes)) or "none"
    raise ValueError(
        f"task: head {head!r} with {num_classes} classes is not made for {brief(task)}; possible: "
        f"{possible}"
    )


def _outputs_of(head: str, num_classes: int) -> list[Output]:
    return [output for output in HEADS[head].outputs if output.channels in (None, num_classes)]


def head_for(task: str, kinds: int, head: str | None = None) -> tuple[str, int]:
    """The simplest head that can find so many kinds of things, or `head`; and how many classes it
    must have.

    Raises:
        ValueError: it cannot; the message names those that can.
    """
    needed = {
        name: kinds if output.channels is None else output.channels
        for name, kind in HEADS.items()
        for output in kind.outputs
        if task in output.tasks and (output.channels is None or kinds == 1)
    }
    if head is None:
        return next(iter(needed.items()))
    check_option("head", head, tuple(HEADS))
    if head not in needed:
        raise ValueError(
            f"head: {head!r} cannot find {kinds} {'kind' if kinds == 1 else 'kinds'} of things for "
            f"the task {task!r}; possible: {', '.join(needed)}"
        )
    return head, needed[head]


def options_of(head: str) -> dict[str, Any]:
    """The keyword options of a head, with their defaults."""
    parameters = inspect.signature(HEADS[head]).parameters
    return {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _as_weights(head: nn.Module, stage: StageOutput) -> StageOutput:
    """The stage's tokens in the dtype of the head's weights."""
    dtype = next(head.parameters()).dtype
    tokens, inputs = (t.with_features(t.features.to(dtype)) for t in (stage.tokens, stage.inputs))
    return replace(stage, tokens=tokens, inputs=inputs)


HEADS: dict[str, type[Head]] = {  # without a choice, the first that can learn a task is taken
    "classification": ClassificationHead,
    "dense": DenseHead,
    "features": FeatureHead,
    "stars": StarHead,
    "mask2former": Mask2FormerHead,
    "hcformer": HCFormerHead,
    "point_classification": PointClassificationHead,
    "point_segmentation": PointSegmentationHead,
}

# The module of a head that gives the classes' scores, as its weights are called.
CLASSIFIERS: dict[str, tuple[str, ...]] = {
    "classification": ("linear",),
    "dense": ("classify.1",),
    "features": (),
    "hcformer": ("decoder.classify",),
    "mask2former": ("decoder.classify",),
    "point_classification": ("linear",),
    "point_segmentation": ("linear",),
    "stars": ("classify",),
}
