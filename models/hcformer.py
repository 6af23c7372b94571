"""HCFormer's learned clustering on tokens: masks of few tokens carried down to many.

From the paper's equations ("HCFormer: Unified Image Segmentation with Hierarchical Clustering"): at
every downsampling each fine token is assigned softly to the coarse tokens near it, by the cosine of
learned projections over a learned temperature. Masks are predicted on the coarsest tokens alone;
multiplying them by the sparse assignments, from coarse to fine, decodes them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pointformer import TokenSet, knn, weighted_gather
from pointformer.models.layers import (
    EncoderLayer,
    SelfAttention,
    pack_samples,
    pad_samples,
    sine_encoding,
)


class SoftAssignment(nn.Module):
    """Shares of each fine token in its `k` nearest coarse tokens (a grid's 3 x 3 for 9)."""

    def __init__(
        self, fine_dim: int, coarse_dim: int, k: int = 9, dim: int = 128, temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.k = k
        self.fine_norm = nn.LayerNorm(fine_dim)
        self.coarse_norm = nn.LayerNorm(coarse_dim)
        self.fine_proj = nn.Linear(fine_dim, dim, bias=False)
        self.coarse_proj = nn.Linear(coarse_dim, dim, bias=False)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        for layer in (self.fine_proj, self.coarse_proj):
            nn.init.xavier_normal_(layer.weight)

    def forward(
        self,
        fine: TokenSet,
        coarse: TokenSet,
        index: Tensor | None = None,
        impl: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rows of `coarse` (T, k), -1 for none, and the shares (T, k), which add up to 1.

        `index` replaces the nearest tokens by other candidates.
        """
        if index is None:
            index = knn(
                coarse.positions,
                self.k,
                query_positions=fine.positions,
                sizes=coarse.sizes,
                query_sizes=fine.sizes,
                same_positions=fine.same_positions and coarse.same_positions,
                check_values=False,
                impl=impl,
            )
        query = nn.functional.normalize(self.fine_proj(self.fine_norm(fine.features)), dim=1)
        key = nn.functional.normalize(self.coarse_proj(self.coarse_norm(coarse.features)), dim=1)
        known = index >= 0
        cosine = torch.einsum("tkc,tc->tk", key[index.clamp(min=0).long()], query)
        logits = cosine / (self.temperature.abs() + 1e-8)
        return index, logits.masked_fill(~known, -torch.inf).softmax(1)


class Encoder(nn.Module):
    """Plain transformer layers among the tokens of each sample, which tell them where they are.

    What makes "HCFormer+" of HCFormer. Without it nothing but their surroundings tells two objects
    apart that look the same.
    """

    def __init__(self, dim: int, layers: int, heads: int = 8, hidden: int = 2048) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(SelfAttention(dim, heads), dim, hidden) for _ in range(layers)
        )

    def forward(self, tokens: TokenSet) -> TokenSet:
        x, present = pad_samples(tokens.features, tokens.sizes)
        code, _ = pad_samples(sine_encoding(tokens, tokens.channels), tokens.sizes)
        allowed = None if present is None else present[:, None].expand(-1, x.shape[1], -1)
        for layer in self.layers:
            x = layer(x, code, allowed)
        return tokens.with_features(pack_samples(x, tokens.sizes))


def decode(
    coarse: Tensor, assignments: list[tuple[Tensor, Tensor]], impl: str | None = None
) -> Tensor:
    """Carry features (or mask logits) of the coarsest tokens (T', C) to the finest: (T, C).

    `assignments` are those of the fine to the coarse tokens of each downsampling, finest first.
    """
    for index, shares in reversed(assignments):
        coarse = weighted_gather(coarse, index, shares, impl=impl)
    return coarse
