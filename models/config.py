"""Configurations of the backbones by name."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from numbers import Integral
from typing import Any, ClassVar, Self

from pointformer._checks import (
    brief,
    check_count,
    check_flags,
    check_number,
    check_option,
)
from pointformer.geometry.curves import CURVES

_MOST_STAGES = 16  # each halves the picture's sides


class _Config:
    """Checks of configurations, and copies with changes."""

    dims: tuple[int, ...]
    heads: tuple[int, ...]
    may_be_zero: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the kind of each field by its annotation; sides and shares are not negative."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type == "int":
                check_count(field.name, value, least=0 if field.name in self.may_be_zero else 1)
                object.__setattr__(self, field.name, operator.index(value))
            elif field.type == "float":
                number = check_number(field.name, value, least=0)
                object.__setattr__(self, field.name, float(number))
            elif field.type == "bool":
                check_flags(**{field.name: value})
            elif field.type == "tuple[int, ...]":
                self._per_stage(field.name, value)

    def _per_stage(self, name: str, value: object) -> None:
        """Make the field a tuple of one number per stage; one number is for all stages."""
        stages = len(self.dims) if isinstance(self.dims, list | tuple) else 0
        if isinstance(value, Integral) and name != "dims":
            value = (value,) * stages
        if name == "dims" and not 0 < stages <= _MOST_STAGES:
            raise ValueError(
                f"dims: expected the channels of 1 to {_MOST_STAGES} stages, got {brief(value)}"
            )
        if not isinstance(value, list | tuple) or len(value) != stages:
            raise ValueError(
                f"{name}: expected one number for each of {stages} stages, got {brief(value)}"
            )
        for number in value:
            check_count(name, number)
        object.__setattr__(self, name, tuple(map(operator.index, value)))

    def _check_heads(self) -> None:
        for stage, (dim, heads) in enumerate(zip(self.dims, self.heads, strict=True)):
            if dim % heads:
                raise ValueError(f"heads: stage {stage} has {dim} channels for {heads} heads")

    def override(self, **changes: object) -> Self:
        """A copy with some fields changed; an unknown field is an error that lists the known."""
        known = {field.name for field in fields(self)}  # type: ignore[arg-type]
        unknown = sorted(set(changes) - known)
        if unknown:
            raise TypeError(
                f"unknown option {', '.join(unknown)}; known options: {', '.join(sorted(known))}"
            )
        return replace(self, **changes)  # type: ignore[type-var]


def _check_patches(config: AFFConfig | SwinConfig) -> None:
    if config.patch_stride not in (1, 2, 4):
        raise ValueError(f"patch_stride: expected 1, 2 or 4, got {brief(config.patch_stride)}")
    if config.dims[0] < 2:
        raise ValueError(f"dims: expected at least 2 channels in the first stage: {config.dims}")


class _MergingConfig(_Config):
    """Of backbones whose stages merge a share of their tokens."""

    rate: float | tuple[float, ...]

    def _check_rates(self) -> None:
        if isinstance(self.rate, list | tuple):
            object.__setattr__(self, "rate", tuple(self.rate))
            if len(self.rates) != len(self.dims) - 1:
                raise ValueError(
                    f"rate: expected one number, or one for each of {len(self.dims) - 1} merges, "
                    f"got {brief(self.rate)}"
                )
        given = self.rate if isinstance(self.rate, tuple) else (self.rate,)
        rates = tuple(check_number("rate", rate, above=0, most=1) for rate in given)
        object.__setattr__(self, "rate", rates if isinstance(self.rate, tuple) else rates[0])

    @property
    def rates(self) -> tuple[float, ...]:
        """Share of the tokens kept by each merge."""
        return self.rate if isinstance(self.rate, tuple) else (self.rate,) * (len(self.dims) - 1)


@dataclass(frozen=True)
class AFFConfig(_MergingConfig):
    """Everything that defines an AutoFocusFormer backbone.

    Attributes:
        dims, depths, heads: channels, blocks and attention heads of each stage.
        mlp_ratio: hidden width of a block's MLP over its channels.
        cluster_size: tokens per cluster.
        neighborhood_size: tokens that a token attends to, per stage: the nearest
            `round(neighborhood_size / cluster_size)` clusters. A sample with no more tokens than
            this is global: everything attends to everything.
        reach: nearest tokens of which blocks attend to `neighborhood_size`, ever fewer from near to
            far; see `Neighborhoods.thinned`. One number, or one for each stage; where it is not
            more than the neighborhood, these are the nearest, as in the paper. Merges take the
            nearest in any case. With a reach, a global sample that has more clusters than
            a neighborhood (the last one short) is thinned too.
        rate: share of the tokens kept by each merge, in (0, 1]: one number, or one for each merge.
        alpha: weight of the learned score against the grid prior (Table 6).
        image_size: native input size in pixels, for reports; any size works.
        patch_stride: pixels per token of the first stage: 4, 2 or 1.
        layer_scale: initial value of the residual branches' scale; 0 means no scale.
        drop_path: drop rate of the residual branches at the last block, growing linearly to it.
        in_channels: channels of the image.
        curve, anchors, remainder: see `balanced_cluster`.
        scope: neighborhoods per "token" or per "tile"; see `nearest_clusters`.
        include_own: the cluster that a token is in is always among these; see `nearest_clusters`.
        prior: "adaptive" (the paper), "grid" (multiples of the stage's stride) or `None`.
        reserve: always keep the tokens on each stage's coarse grid.
        reserve_share: at most this share of the kept tokens, with a coarser grid where it takes
            more; `None` for no limit, see `select_centers`. At a rate of 1/4 it hardly ever does.
        expanded_position: position bias from (dx, dy, dist, sin, cos), not from (dx, dy) alone.
        blank_token: a learned key and value in every neighborhood (section 4.3).
        merge: "adaptive" (section 3.3), or "patch" for Swin's 2x2 merging on the grid.
        ranking: what adaptive merges keep the first of. "scores": the learned ones (the paper).
            Without learning, for comparison: "gradient", the picture's in a token's cell, or
            "lattice", a regular grid at any rate and whatever `alpha` and `prior`. The learned
            scores weight what is merged in all three.
        spread: share of a token's rank that each of the 8 nearest takes which ranks higher, so
            that the kept tokens lie on more places; see `spread_scores`. 0 in the paper.
        merge_center: add the chosen token's own features in adaptive merges; see `ScoredMerge`.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: float = 3.0
    cluster_size: int = 8
    neighborhood_size: tuple[int, ...] = (48, 48, 48, 49)
    reach: int | tuple[int, ...] = 1
    rate: float | tuple[float, ...] = 0.25
    alpha: float = 4.0
    image_size: int = 224
    patch_stride: int = 4
    layer_scale: float = 0.0
    drop_path: float = 0.0
    in_channels: int = 3
    curve: str = "hilbert"
    anchors: bool = True
    remainder: str = "spread"
    scope: str = "token"
    include_own: bool = False
    prior: str | None = "adaptive"
    reserve: bool = True
    reserve_share: float | None = 0.5
    expanded_position: bool = True
    blank_token: bool = True
    merge: str = "adaptive"
    ranking: str = "scores"
    spread: float = 0.0
    merge_center: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reach, Integral):
            check_count("reach", self.reach)
            object.__setattr__(self, "reach", operator.index(self.reach))
        else:
            self._per_stage("reach", self.reach)
        self._check_heads()
        _check_patches(self)
        self._check_rates()
        if self.reserve_share is not None:
            check_number("reserve_share", self.reserve_share, above=0, most=1)
        check_number("drop_path", self.drop_path, least=0, most=1)
        check_number("spread", self.spread, least=0, most=1)
        for name, known in (
            ("curve", CURVES),
            ("remainder", ("spread", "last")),
            ("scope", ("token", "tile")),
            ("prior", ("adaptive", "grid", None)),
            ("merge", ("adaptive", "patch")),
            ("ranking", ("scores", "gradient", "lattice")),
        ):
            check_option(name, getattr(self, name), known)
        if self.spread and self.ranking == "lattice":
            raise ValueError("spread: a lattice is even already; leave it at 0")
        if min(self.neighborhood_size) < self.cluster_size:
            raise ValueError(
                f"neighborhood_size: {self.neighborhood_size} is less than one cluster of "
                f"{self.cluster_size} tokens"
            )

    @property
    def reaches(self) -> tuple[int, ...]:
        """`reach` of each stage."""
        return (self.reach,) * len(self.dims) if isinstance(self.reach, int) else self.reach


@dataclass(frozen=True)
class SwinConfig(_Config):
    """The baseline with windows of a grid instead of clusters; the fields of `AFFConfig` it shares
    mean the same.

    Attributes:
        window_size: tokens along the side of a window.
        patch_merge: tokens along the side of the squares that become one token: one number, or one
            for each merge.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: float = 3.0
    window_size: int = 7
    image_size: int = 224
    patch_stride: int = 4
    layer_scale: float = 0.0
    drop_path: float = 0.0
    in_channels: int = 3
    patch_merge: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads()
        _check_patches(self)
        check_number("drop_path", self.drop_path, least=0, most=1)
        if isinstance(self.patch_merge, list | tuple):
            object.__setattr__(self, "patch_merge", tuple(self.patch_merge))
            if len(self.merge_sides) != len(self.dims) - 1:
                raise ValueError(
                    f"patch_merge: expected one number, or one for each of {len(self.dims) - 1} "
                    f"merges, got {brief(self.patch_merge)}"
                )
        for side in self.merge_sides:
            check_count("patch_merge", side)

    @property
    def merge_sides(self) -> tuple[int, ...]:
        """Side of the squares of each merge, in tokens."""
        sides = self.patch_merge
        return sides if isinstance(sides, tuple) else (sides,) * (len(self.dims) - 1)

    @property
    def strides(self) -> tuple[int, ...]:
        """Distance between the tokens of each stage, in those of the first."""
        return tuple(itertools.accumulate(self.merge_sides, operator.mul, initial=1))


@dataclass(frozen=True)
class PointConfig(_MergingConfig):
    """Everything that defines a backbone of point sets; the fields of `AFFConfig` it shares mean
    the same.

    Attributes:
        neighborhood_size: tokens that a token attends to, per stage. A sample with no more tokens
            than this is global.
        in_channels: features of a point besides its position; may be 0.
        dimensions: 2 or 3, axes of the positions.
        coordinates: axes that are features too, as of `PointPreprocess`: "xyz" for objects in a
            known pose, "z" for scenes, "" for none.
        unit: see `PointPreprocess`.
        embed_neighbors: nearest points that a point is embedded with, itself among them.
        points: typical number in a sample, for reports; any number works.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: float = 2.0
    cluster_size: int = 8
    neighborhood_size: tuple[int, ...] = (48, 48, 48, 48)
    rate: float | tuple[float, ...] = 0.25
    layer_scale: float = 0.0
    drop_path: float = 0.0
    in_channels: int = 0
    dimensions: int = 3
    coordinates: str = "xyz"
    unit: float | None = None
    embed_neighbors: int = 16
    curve: str = "hilbert"
    points: int = 1024

    may_be_zero = ("in_channels",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads()
        check_count("dimensions", self.dimensions, least=2, most=3)
        self._check_rates()
        check_number("drop_path", self.drop_path, least=0, most=1)
        if self.unit is not None:
            check_number("unit", self.unit, above=0)
        check_option("curve", self.curve, CURVES)
        axes = "xyz"[: self.dimensions]
        known = [c for n in range(4) for c in map("".join, itertools.combinations(axes, n))]
        check_option("coordinates", self.coordinates, known)
        if not self.coordinates and not self.in_channels:
            raise ValueError("coordinates: expected some where in_channels is 0, got none")
        if min(self.neighborhood_size) < self.cluster_size:
            raise ValueError(
                f"neighborhood_size: {self.neighborhood_size} is less than one cluster of "
                f"{self.cluster_size} tokens"
            )


@dataclass(frozen=True)
class GridConfig(_Config):
    """Description of a backbone that is not ours, for heads; see `GridBackbone`."""

    dims: tuple[int, ...]
    image_size: int = 224
    patch_stride: int = 4
    in_channels: int = 3


ModelConfig = AFFConfig | SwinConfig | PointConfig
"""Of the backbones that have a name."""


def config_from(values: Mapping[str, object]) -> ModelConfig:
    """The configuration whose fields these are, as `dataclasses.asdict` gives them."""
    for kind in (AFFConfig, SwinConfig, PointConfig):
        known = {field.name for field in fields(kind)}
        needed = {field.name for field in fields(kind) if field.default is MISSING}
        if needed <= set(values) <= known:
            return kind(**values)  # type: ignore[arg-type]
    raise ValueError(f"no backbone of this package has the options {', '.join(sorted(values))}")


# The released models pin the order and the selection that their weights were trained with.
_RELEASED: dict[str, Any] = {"curve": "snake", "remainder": "last", "reserve_share": None}
_MINI = AFFConfig(
    dims=(32, 128, 256, 384), depths=(2, 2, 6, 2), heads=(2, 4, 8, 16), mlp_ratio=2.0, **_RELEASED
)
_TINY = AFFConfig(
    dims=(64, 128, 256, 512), depths=(3, 4, 18, 5), heads=(2, 4, 8, 16), drop_path=0.2, **_RELEASED
)
_SMALL = AFFConfig(
    dims=(96, 192, 384, 768),
    depths=(3, 4, 18, 2),
    heads=(3, 6, 12, 24),
    drop_path=0.3,
    layer_scale=1e-5,
    **_RELEASED,
)
_BASE = AFFConfig(
    dims=(128, 256, 512, 1024),
    depths=(3, 4, 18, 2),
    heads=(4, 8, 16, 32),
    drop_path=0.2,
    layer_scale=1e-5,
    **_RELEASED,
)


def _on_a_grid(config: AFFConfig) -> SwinConfig:
    """The paper's Swin of the same size: "same architecture configuration" (Table 2)."""
    shared = {field.name for field in fields(SwinConfig)} - {"window_size", "patch_merge"}
    return SwinConfig(**{name: getattr(config, name) for name in shared})


CONFIGS: dict[str, ModelConfig] = {
    "aff_nano": AFFConfig(
        dims=(32, 64, 128, 192),
        depths=(2, 2, 4, 2),
        heads=(2, 4, 8, 8),
        mlp_ratio=2.0,
        neighborhood_size=(48, 48, 48, 48),
        image_size=256,
    ),
    "aff_mini": _MINI,
    "aff_mini_1_5th": replace(_MINI, rate=0.2),
    "aff_tiny": _TINY,
    "aff_tiny_1_5th": replace(_TINY, rate=0.2),
    "aff_small": _SMALL,
    "aff_small_1_5th": replace(_SMALL, rate=0.2),
    "aff_base": _BASE,
    "aff_base_384": replace(_BASE, cluster_size=24, neighborhood_size=(144,) * 4, image_size=384),
    "point_nano": PointConfig(dims=(32, 64, 128, 256), depths=(1, 1, 2, 1), heads=(2, 4, 8, 8)),
    "point_small": PointConfig(
        dims=(64, 128, 256, 384), depths=(2, 2, 6, 2), heads=(4, 8, 16, 16), drop_path=0.1
    ),
    "swin_mini": _on_a_grid(_MINI),
    "swin_tiny": _on_a_grid(_TINY),
    "swin_small": _on_a_grid(_SMALL),
}


def config_of(name: str) -> ModelConfig:
    """The configuration of a model; an unknown name is an error that lists the known."""
    if not isinstance(name, str) or name not in CONFIGS:
        known = ", ".join(sorted(CONFIGS))
        raise ValueError(f"name: unknown model {brief(name)}; known models: {known}")
    return CONFIGS[name]
