"""Mask2Former's transformer decoder on tokens: queries that become classes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pointformer import TokenSet, knn
from pointformer.models.layers import (
    FeedForward,
    MultiheadAttention,
    at_least_float32,
    pack_samples,
    pad_samples,
    sine_encoding,
)


@dataclass(frozen=True)
class MaskPredictions:
    """What a segmentation head says of a batch: Q queries, each with a class and a mask.

    Attributes:
        class_logits: (B, Q, K + 1), the last one for "no object"; float32 (or float64) whatever
            the model's dtype, because scores and losses are made of them.
        mask_logits: (T, Q), packed over the tokens of the finest stage; likewise.
        tokens: the finest stage's token set.
        stride: pixels of the image per cell of its grid, in both directions.
        auxiliary: the same, after earlier layers, for training; empty in the entries themselves.
        temperatures: of learned clusterings, for their loss term; empty for heads without.
    """

    class_logits: Tensor
    mask_logits: Tensor
    tokens: TokenSet
    stride: int = 4
    auxiliary: tuple[MaskPredictions, ...] = ()
    temperatures: tuple[Tensor, ...] = ()

    def masks(self) -> Tensor | list[Tensor]:
        """Mask logits on the finest grid: (B, Q, h, w), or a list of (Q, h, w) with the images'
        heights and widths divided by `stride`, rounded up."""
        return self.tokens.with_features(self.mask_logits).to_grid(check_values=False)


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; each followed by its LayerNorm."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.cross = MultiheadAttention(dim, heads)
        self.cross_norm = nn.LayerNorm(dim)
        self.attn = MultiheadAttention(dim, heads)
        self.attn_norm = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden, nn.ReLU)
        self.mlp_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, position: Tensor, memory: Tensor, code: Tensor, allowed: Tensor
    ) -> Tensor:
        x = self.cross_norm(x + self.cross(x + position, memory + code, memory, allowed))
        x = self.attn_norm(x + self.attn(x + position, x + position, x))
        return self.mlp_norm(x + self.mlp(x))


class MaskDecoder(nn.Module):
    """Learned queries look at the levels in turn, each where its mask was after the layer before.

    Args:
        num_classes: K.
        levels: levels of the memory, coarsest first.
        stride: of the finest tokens, see `MaskPredictions`.
    """

    def __init__(
        self,
        num_classes: int,
        levels: int = 3,
        dim: int = 256,
        queries: int = 100,
        layers: int = 9,
        heads: int = 8,
        hidden: int = 2048,
        position_norm: str = "image",
        stride: int = 4,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.stride = stride
        self.position_norm = position_norm
        self.query = nn.Parameter(torch.randn(queries, dim))
        self.query_position = nn.Parameter(torch.randn(queries, dim))
        self.level_embed = nn.Parameter(torch.randn(levels, dim))
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, num_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, mask_features: TokenSet, levels: Sequence[TokenSet], impl: str | None = None
    ) -> MaskPredictions:
        """Predictions of all layers, the last one with the earlier ones as `auxiliary`.

        Args:
            mask_features: (T, dim) on the finest tokens.
            levels: token sets (., dim), coarsest first, whose tokens are among the finest ones.
        """
        masks_of, _ = pad_samples(mask_features.features, mask_features.sizes)
        memory = [self._memory(mask_features, level, i, impl) for i, level in enumerate(levels)]
        x = self.query.expand(mask_features.batch_size, -1, -1)
        predictions = [self._predict(x, masks_of)]
        for i, layer in enumerate(self.layers):
            features, code, rows, present = memory[i % len(memory)]
            allowed = self.allowed(predictions[-1][1], rows, present)
            x = layer(x, self.query_position, features, code, allowed)
            predictions.append(self._predict(x, masks_of))
        outputs = [
            MaskPredictions(
                at_least_float32(class_logits),
                at_least_float32(pack_samples(mask_logits.transpose(1, 2), mask_features.sizes)),
                mask_features,
                self.stride,
            )
            for class_logits, mask_logits in predictions
        ]
        *earlier, last = outputs
        return replace(last, auxiliary=tuple(earlier))

    def _memory(
        self, finest: TokenSet, level: TokenSet, index: int, impl: str | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Features (B, N, dim), their code, the finest rows they sit on (B, N), which are there."""
        code = sine_encoding(level, self.dim, self.position_norm)
        rows = knn(
            finest.positions,
            1,
            query_positions=level.positions,
            sizes=finest.sizes,
            query_sizes=level.sizes,
            same_positions=finest.same_positions and level.same_positions,
            check_values=False,
            impl=impl,
        )[:, 0].long()
        rows = rows - finest.batch_offsets[level.sample_index]
        features, present = pad_samples(level.features + self.level_embed[index], level.sizes)
        (code, _), (rows, _) = (pad_samples(x, level.sizes) for x in (code, rows))
        return features, code, rows, present

    def _predict(self, x: Tensor, mask_features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, K + 1) and mask logits (B, Q, N) of the queries as they stand."""
        x = self.norm(x)
        return self.classify(x), self.mask_embed(x) @ mask_features.transpose(1, 2)

    @staticmethod
    def allowed(mask_logits: Tensor, rows: Tensor, present: Tensor | None) -> Tensor:
        """Where each query may look, (B, Q, N) bool: inside its mask, everywhere if that is empty.

        A token of a level sits on a token of the finest one: the mask there is the mask here.
        """
        index = rows[:, None].expand(-1, mask_logits.shape[1], -1)
        inside = mask_logits.detach().gather(2, index).sigmoid() >= 0.5
        if present is not None:
            inside = inside & present[:, None]
        empty = ~inside.any(2, keepdim=True)
        return inside | (empty if present is None else empty & present[:, None])
