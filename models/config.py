"""Configurations of the backbones by name."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class AFFConfig:
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
        stages = len(self.dims)
        for name in ("dims", "depths", "heads", "neighborhood_size"):
            value = getattr(self, name)
            if isinstance(value, int):
                value = (value,) * stages
            if len(value) != stages:
                raise ValueError(
                    f"{name}: expected one value for each of {stages} stages, got {value}"
                )
            object.__setattr__(self, name, tuple(value))
        for stage, (dim, heads) in enumerate(zip(self.dims, self.heads, strict=True)):
            if dim % heads:
                raise ValueError(f"heads: stage {stage} has {dim} channels for {heads} heads")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate: expected a number in (0, 1], got {self.rate}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha: expected a number of at least 0, got {self.alpha}")
        for name, choices in (
            ("patch_stride", (1, 2, 4)),
            ("prior", ("adaptive", "grid", None)),
            ("scope", ("token", "tile")),
            ("merge", ("adaptive", "patch")),
            ("remainder", ("spread", "last")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if min(self.neighborhood_size) < self.cluster_size:
            raise ValueError(
                f"neighborhood_size: {self.neighborhood_size} is less than one cluster of "
                f"{self.cluster_size} tokens"
            )

    def override(self, **changes: object) -> AFFConfig:
        """A copy with some fields changed; an unknown field is an error that lists the known."""
        known = {field.name for field in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise TypeError(
                f"unknown option {', '.join(unknown)}; known options: {', '.join(sorted(known))}"
            )
        return replace(self, **changes)  # type: ignore[arg-type]


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

CONFIGS: dict[str, AFFConfig] = {
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
}
