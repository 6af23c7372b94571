"""Configurations of the backbones by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Self


class _Config:
    """What the configurations share: checks, and copies with changes."""

    dims: tuple[int, ...]
    heads: tuple[int, ...]

    def _per_stage(self, *names: str) -> None:
        """Make fields tuples of one value per stage; one number is for all stages."""
        stages = len(self.dims)
        for name in names:
            value = getattr(self, name)
            if isinstance(value, int):
                value = (value,) * stages
            if len(value) != stages:
                raise ValueError(
                    f"{name}: expected one value for each of {stages} stages, got {value}"
                )
            object.__setattr__(self, name, tuple(value))

    def _check_heads(self) -> None:
        for stage, (dim, heads) in enumerate(zip(self.dims, self.heads, strict=True)):
            if dim % heads:
                raise ValueError(f"heads: stage {stage} has {dim} channels for {heads} heads")

    def _check_choice(self, name: str, choices: tuple) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")

    def override(self, **changes: object) -> Self:
        """A copy with some fields changed; an unknown field is an error that lists the known."""
        known = {field.name for field in fields(self)}  # type: ignore[arg-type]
        unknown = sorted(set(changes) - known)
        if unknown:
            raise TypeError(
                f"unknown option {', '.join(unknown)}; known options: {', '.join(sorted(known))}"
            )
        return replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class AFFConfig(_Config):
    """Everything that defines an AutoFocusFormer backbone.

    Attributes:
        dims, depths, heads: channels, blocks and attention heads of each stage.
        mlp_ratio: hidden width of a block's MLP over its channels.
        cluster_size: tokens per cluster.
        neighborhood_size: tokens that a token attends to, per stage: the nearest
            `round(neighborhood_size / cluster_size)` clusters. A sample with no more tokens than
            this is global: everything attends to everything.
        rate: share of the tokens kept by each merge, in (0, 1].
        alpha: weight of the learned score against the grid prior (Table 6).
        image_size: native input size in pixels, for reports; any size works.
        patch_stride: pixels per token of the first stage: 4, 2 or 1.
        layer_scale: initial value of the residual branches' scale; 0 means no scale.
        drop_path: drop rate of the residual branches at the last block, growing linearly to it.
        in_channels: channels of the image.
        curve, anchors, remainder: see `balanced_cluster`.
        scope: neighbourhoods per "token" or per "tile"; see `nearest_clusters`.
        prior: "adaptive" (the paper), "grid" (multiples of the stage's stride) or `None`.
        reserve: always keep the tokens on each stage's coarse grid.
        expanded_position: position bias from (dx, dy, dist, sin, cos), not from (dx, dy) alone.
        blank_token: a learned key and value in every neighbourhood (section 4.3).
        merge: "adaptive" (section 3.3), or "patch" for Swin's 2x2 merging on the grid.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: float = 3.0
    cluster_size: int = 8
    neighborhood_size: tuple[int, ...] = (48, 48, 48, 49)
    rate: float = 0.25
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
    prior: str | None = "adaptive"
    reserve: bool = True
    expanded_position: bool = True
    blank_token: bool = True
    merge: str = "adaptive"

    def __post_init__(self) -> None:
        self._per_stage("dims", "depths", "heads", "neighborhood_size")
        self._check_heads()
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate: expected a number in (0, 1], got {self.rate}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha: expected a number of at least 0, got {self.alpha}")
        self._check_choice("patch_stride", (1, 2, 4))
        self._check_choice("prior", ("adaptive", "grid", None))
        self._check_choice("scope", ("token", "tile"))
        self._check_choice("merge", ("adaptive", "patch"))
        self._check_choice("remainder", ("spread", "last"))
        if min(self.neighborhood_size) < self.cluster_size:
            raise ValueError(
                f"neighborhood_size: {self.neighborhood_size} is less than one cluster of "
                f"{self.cluster_size} tokens"
            )


@dataclass(frozen=True)
class SwinConfig(_Config):
    """The baseline with windows of a grid instead of clusters; the fields of `AFFConfig` it shares
    mean the same.

    Attributes:
        window_size: tokens along the side of a window.
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

    def __post_init__(self) -> None:
        self._per_stage("dims", "depths", "heads")
        self._check_heads()
        self._check_choice("patch_stride", (1, 2, 4))
        if self.window_size < 1:
            raise ValueError(f"window_size: expected at least 1, got {self.window_size}")


@dataclass(frozen=True)
class GridConfig(_Config):
    """What heads need to know of a backbone that is not ours, see `GridBackbone`."""

    dims: tuple[int, ...]
    image_size: int = 224
    patch_stride: int = 4
    in_channels: int = 3

    def __post_init__(self) -> None:
        self._per_stage("dims")


def config_from(values: Mapping[str, object]) -> AFFConfig | SwinConfig:
    """The configuration whose fields these are, as `dataclasses.asdict` gives them."""
    for kind in (AFFConfig, SwinConfig):
        known = {field.name for field in fields(kind)}
        needed = {field.name for field in fields(kind) if field.default is MISSING}
        if needed <= set(values) <= known:
            return kind(**values)  # type: ignore[arg-type]
    raise ValueError(f"no backbone of this package has the options {', '.join(sorted(values))}")


# The released models pin the order that their weights were trained with.
_RELEASED = {"curve": "snake", "remainder": "last"}
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
    shared = {field.name for field in fields(SwinConfig)} - {"window_size"}
    return SwinConfig(**{name: getattr(config, name) for name in shared})


CONFIGS: dict[str, AFFConfig | SwinConfig] = {
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
    "swin_mini": _on_a_grid(_MINI),
    "swin_tiny": _on_a_grid(_TINY),
    "swin_small": _on_a_grid(_SMALL),
}
