"""The `pointformer` command with models of points that merge by voxels instead of by scores.

    python bench/points/voxel.py train lidar.yaml DATA --out OUT

Everything else is as in the library: a yardstick for scored merging. Voxels are pooled as in
Point Transformer V3: a layer, the maximum over each voxel, a norm and an activation, at the mean
position. Their side is 1 in the model's units in the first stage and doubles in each; what is
above comes down by the decoder's interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointformer import TokenSet, voxel_pool
from pointformer.cli import main
from pointformer.clusters import Neighborhoods
from pointformer.models import points

FIRST_DIM = 32  # channels of the first stage of `point_nano`, which double as sides do


class VoxelMerge(nn.Module):
    """In place of `ScoredMerge`, called as it is; scores and chosen rows are of no use to it."""

    def __init__(self, dim: int, out_dim: int, *, dimensions: int) -> None:
        super().__init__()
        self.side = dim / FIRST_DIM
        self.linear = nn.Linear(dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def scores(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), device=x.device)

    def forward(
        self,
        tokens: TokenSet,
        neighborhoods: Neighborhoods,
        scores: Tensor,
        index: Tensor,
        sizes: Sequence[int],
        impl: str | None = None,
    ) -> TokenSet:
        voxels = voxel_pool(
            tokens.positions,
            self.linear(tokens.features),
            self.side,
            sizes=tokens.sizes,
            reduce="max",
            check_values=False,
            impl=impl,
        )
        assert voxels.features is not None
        return TokenSet(voxels.positions, F.gelu(self.norm(voxels.features)), voxels.sizes)


def use_voxels() -> None:
    """Models of points that are made from now on merge by voxels."""
    points.ScoredMerge = VoxelMerge  # type: ignore[assignment,misc]


if __name__ == "__main__":
    use_voxels()
    raise SystemExit(main())
