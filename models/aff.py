"""AutoFocusFormer (AFF): a backbone whose tokens sit where the content is.

Paper: "AutoFocusFormer: Image Segmentation off the Grid", CVPR 2023. A stage clusters its tokens
once, lets each attend to its nearest clusters in every block, scores them, and merges
neighborhoods around the best: fewer tokens, still on the positions that matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pointformer import Neighborhoods, TokenSet, select_centers, spread_scores
from pointformer.models.backbone import Backbone, PatchEmbed, PatchMerge, StageOutput
from pointformer.models.config import AFFConfig
from pointformer.nn import Block, NeighborhoodAttention, ScoredMerge
from pointformer.nn.blocks import run_blocks

_RANKING = "ranking"  # the field of tokens that are not ranked by learned scores


def gradients(images: Tensor | Sequence[Tensor], stride: int) -> Tensor:
    """(T,) in [0, 1) of the cells of `stride` pixels, in raster order: the steepest change of
    brightness in the cell, over itself and the mean of the picture's cells."""
    found = []
    for image in images:
        gray = nn.functional.pad(image.mean(0)[None], (1, 1, 1, 1), mode="replicate")[0]
        across, down = gray[1:-1, 2:] - gray[1:-1, :-2], gray[2:, 1:-1] - gray[:-2, 1:-1]
        steep = torch.hypot(across, down)[None]
        cells = nn.functional.max_pool2d(steep, stride, ceil_mode=True).flatten().float()
        found.append(cells / (cells + cells.mean()).clamp(min=torch.finfo(torch.float32).tiny))
    return torch.cat(found)


def evenness(positions: Tensor) -> Tensor:
    """(T,) in (0, 1] of integer positions (T, 2): the n highest are an even lattice, whatever n is
    (the order of Bayer's dither matrix of 2048 x 2048, 1973)."""
    x, y = positions.long().unbind(1)
    order = torch.zeros_like(x)
    bits = 11
    for bit in range(bits):
        across, down = x >> bit & 1, y >> bit & 1
        order = 4 * order + 2 * (across ^ down) + down
    return 1 - order.float() / 4**bits


class AdaptiveMerge(ScoredMerge):
    """Keeps the tokens that score best and merges the neighborhoods around them (section 3.3)."""

    def __init__(self, config: AFFConfig, stage: int) -> None:
        dims = config.dims[stage : stage + 2]
        super().__init__(
            *dims, expanded_position=config.expanded_position, center=config.merge_center
        )
        self.index = stage
        self.stride = 2 ** (stage + 1)

    def forward(  # type: ignore[override]
        self,
        tokens: TokenSet,
        neighborhoods: Neighborhoods,
        scores: Tensor,
        ranking: Tensor,
        config: AFFConfig,
        impl: str | None,
    ) -> TokenSet:
        """Merge by `scores` around the first of `ranking`, both (T,)."""
        prior = config.prior if config.ranking != "lattice" else None
        if self.stride == 2 and prior == "adaptive":
            prior = "grid"  # on the full grid of the first stage both are the same
        check_values = not scores.is_cuda  # which would wait for it
        if config.spread:
            ranking = spread_scores(
                ranking,
                tokens.positions,
                sizes=tokens.sizes,
                spread=config.spread,
                along_curve=True,
                check_values=check_values,
                impl=impl,
            )
        index, sizes = select_centers(
            ranking.detach(),
            tokens.positions,
            sizes=tokens.sizes,
            extent=tokens.extent,
            rate=config.rates[self.index],
            alpha=config.alpha,
            stride=self.stride,
            prior=prior,
            reserve=config.reserve,
            reserve_share=config.reserve_share,
            along_curve=True,
            check_values=check_values,
            impl=impl,
        )
        return super().forward(tokens, neighborhoods, scores, index, sizes, impl)


class Stage(nn.Module):
    """Cluster once, attend in every block, then merge into the next stage's tokens."""

    def __init__(self, config: AFFConfig, stage: int, drop_path_rates: Sequence[float]) -> None:
        super().__init__()
        self.index = stage
        dim, heads = config.dims[stage], config.heads[stage]
        self.blocks = nn.ModuleList(
            Block(
                NeighborhoodAttention(
                    dim,
                    heads,
                    expanded_position=config.expanded_position,
                    blank_token=config.blank_token,
                ),
                dim,
                int(dim * config.mlp_ratio),
                config.layer_scale,
                rate,
            )
            for rate in drop_path_rates
        )
        self.merge: AdaptiveMerge | PatchMerge | None = None
        if stage + 1 < len(config.dims):
            if config.merge == "adaptive":
                self.merge = AdaptiveMerge(config, stage)
            else:
                self.merge = PatchMerge(dim, config.dims[stage + 1], 2**stage)

    def forward(
        self, tokens: TokenSet, config: AFFConfig, impl: str | None
    ) -> tuple[StageOutput, TokenSet | None]:
        size = config.neighborhood_size[self.index]
        count, reach = (
            round(number / config.cluster_size) for number in (size, config.reaches[self.index])
        )
        tokens = tokens.cluster(
            config.cluster_size,
            curve=config.curve,
            anchors=config.anchors,
            remainder=config.remainder,
            global_size=size,
            adaptive=False,  # nor are cells of a lattice crowded much, and GPUs would wait
            check_values=False,  # the positions are a lattice's
            impl=impl,
        )
        listed = tokens.neighborhoods(
            max(count, reach),
            scope=config.scope,
            include_own=config.include_own,
            check_values=False,  # the positions are a lattice's
            impl=impl,
        )
        wide = reach > count
        seen = listed.thinned(count) if wide else listed
        seen = seen.with_plan(training=torch.is_grad_enabled(), impl=impl)
        inputs = tokens
        tokens = run_blocks(self.blocks, tokens, [(seen,)] * len(self.blocks), impl)
        if isinstance(self.merge, AdaptiveMerge):
            logits = self.merge.logits(tokens.features)
            scores = logits.sigmoid()
            ranking = tokens.fields.get(_RANKING, scores)
            nearest = listed.nearest(count) if wide else seen
            merged = self.merge(tokens, nearest, scores, ranking, config, impl)
            return StageOutput(tokens, inputs, ranking, logits=logits), merged
        merged = None if self.merge is None else self.merge(tokens)
        return StageOutput(tokens, inputs, None), merged


class AFF(Backbone):
    """The backbone: images to one `StageOutput` per stage.

    Args:
        config: see `AFFConfig`; `rate`, `alpha`, `spread`, `neighborhood_size` and `reach` may be
            changed later with `reconfigure`, on trained weights too.
        impl: see `Backbone`.

    Shapes:
        images: (B, 3, H, W), or a list of (3, H, W) of any sizes; normalized, float.
        positions: (x, y) indices of the first stage's grid, in every stage: a token that survives
            keeps its position. The grid has ceil(W / stride) x ceil(H / stride) cells.
    """

    config: AFFConfig

    def __init__(self, config: AFFConfig, impl: str | None = None) -> None:
        super().__init__(config, Stage, PatchEmbed(config), impl)

    def reconfigure(self, **changes: object) -> None:
        """Change `rate`, `alpha`, `spread`, `neighborhood_size` or `reach`, on which no weight's
        shape depends."""
        free = ("rate", "alpha", "spread", "neighborhood_size", "reach")
        fixed = sorted(set(changes) - set(free))
        if fixed:
            raise ValueError(
                f"reconfigure: {', '.join(fixed)} cannot change after the model was made; "
                f"{', '.join(free)} can"
            )
        self.config = self.config.override(**changes)

    def forward(self, images: Tensor | Sequence[Tensor]) -> list[StageOutput]:
        tokens = self.patch_embed(images)
        if self.config.ranking == "gradient":
            tokens = tokens.with_fields(**{_RANKING: gradients(images, self.config.patch_stride)})
        elif self.config.ranking == "lattice":
            tokens = tokens.with_fields(**{_RANKING: evenness(tokens.positions)})
        outputs = []
        for stage in self.stages:
            output, tokens = stage(tokens, self.config, self.impl)
            outputs.append(output)
        return outputs
