"""Mask2Former's transformer decoder on tokens: queries that become classes and masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pointformer import TokenSet, knn
from pointformer.models.layers import (
    MultiheadAttention,
    at_least_float32,
    pack_samples,
    pad_samples,
    sine_encoding,
)
from pointformer.nn.blocks import FeedForward


@dataclass(frozen=True)
class MaskPredictions:
    """Output of a segmentation head for a batch: Q queries, each with a class and a mask.

    Attributes:
        class_logits: (B, Q, K + 1), the last one for "no object"; float32 (or float64) whatever
            the model's dtype, because scores and losses are made of them.
        mask_logits: (T, Q), packed over the tokens of the finest stage; likewise.
        tokens: the finest stage's token set.
        stride: pixels of the image per cell of its grid, in both directions.
        auxiliary: the same, after earlier layers, for training; empty in the entries themselves.
        temperatures: of learned clusterings, for their loss term; empty for heads without.
        middles: logits (., 1) of tokens being in the middle of an object, for their loss term;
            `None` for heads whose queries do not start from tokens.
    """

    class_logits: Tensor
    mask_logits: Tensor
    tokens: TokenSet
    stride: int = 4
    auxiliary: tuple[MaskPredictions, ...] = ()
    temperatures: tuple[Tensor, ...] = ()
    middles: TokenSet | None = None

    def masks(self) -> Tensor | list[Tensor]:
        """Mask logits on the finest grid: (B, Q, h, w), or a list of (Q, h, w) with the images'
        heights and widths divided by `stride`, rounded up."""
        return self.tokens.with_features(self.mask_logits).to_grid(check_values=False)


torch.export.register_dataclass(MaskPredictions, serialized_type_name="pointformer.MaskPredictions")


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
        self,
        x: Tensor,
        position: Tensor,
        memory: Tensor,
        code: Tensor,
        allowed: Tensor,
        present: Tensor | None = None,
    ) -> Tensor:
        x = self.cross_norm(x + self.cross(x + position, memory + code, memory, allowed))
        among = None if present is None else present[:, None].expand(-1, x.shape[1], -1)
        x = self.attn_norm(x + self.attn(x + position, x + position, x, among))
        return self.mlp_norm(x + self.mlp(x))


class Queries(NamedTuple):
    """Starting points of the queries.

    Attributes:
        content: (B, Q, C).
        code: (B, Q, C) or (Q, C), of where they are.
        positions: (B, Q, 2); `None` for those that are nowhere.
        present: (B, Q), which of them there are; `None`: all.
    """

    content: Tensor
    code: Tensor
    positions: Tensor | None = None
    present: Tensor | None = None


class TokenQueries(nn.Module):
    """Queries at the tokens that are most likely in the middle of an object, as in FastInst.

    Tokens that no neighbor exceeds come first, so that an object seldom has two. A sample with
    fewer tokens than `queries` has no more than these.
    """

    neighbors = 9  # a grid's 3 x 3
    prior = 0.01  # probability of every token at first, as in the focal loss

    def __init__(self, dim: int, queries: int) -> None:
        super().__init__()
        self.queries = queries
        self.norm = nn.LayerNorm(dim)
        self.middle = nn.Linear(dim, 1)
        self.content = nn.Linear(dim, dim)
        nn.init.constant_(self.middle.bias, math.log(self.prior / (1 - self.prior)))

    def forward(
        self, tokens: TokenSet, code: Tensor, impl: str | None = None
    ) -> tuple[Queries, TokenSet]:
        """Queries from the tokens (T, dim), and all tokens' logits (T, 1).

        Args:
            code: (T, dim) of the tokens' positions.
        """
        features = self.norm(tokens.features)
        logits = self.middle(features)
        chosen, present = self._choose(tokens, logits.detach()[:, 0], impl)
        content, code, positions = (values[chosen] for values in (features, code, tokens.positions))
        return Queries(self.content(content), code, positions, present), tokens.with_features(
            logits
        )

    def _choose(
        self, tokens: TokenSet, logits: Tensor, impl: str | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows of tokens (B, Q), and which of them count."""
        logits = at_least_float32(logits)  # in which peaks of half precision are no ties
        near = knn(
            tokens.positions, self.neighbors, sizes=tokens.sizes, check_values=False, impl=impl
        )
        around = logits[near.clamp(min=0).long()].masked_fill(near < 0, -torch.inf)
        score = logits.sigmoid() + (logits >= around.amax(1))  # peaks have more than all others
        padded, _ = pad_samples(score, tokens.sizes)
        padded = nn.functional.pad(padded, (0, max(0, self.queries - padded.shape[1])))
        places = padded.argsort(dim=1, descending=True, stable=True)[:, : self.queries]
        starts = tokens.batch_offsets[:-1, None]
        if min(tokens.sizes) >= self.queries:
            return starts + places, None
        counts = torch.tensor(tokens.sizes, device=places.device)[:, None]  # padding comes last
        return starts + places.minimum(counts - 1), places < counts


class Spotlight(nn.Module):
    """A bump of mask logits around each query's position, so that masks are local from the start.

    The query says how far off its center is and how wide it is. Far from it the logits fall by
    `height`, not further: what tokens' features say can always outweigh that.
    """

    height = 9.0
    floor = -6.0
    width = 3.0  # at the start, in cells of the finest grid

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shape = nn.Linear(dim, 3)
        nn.init.zeros_(self.shape.weight)
        nn.init.zeros_(self.shape.bias)

    def forward(self, x: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        """(B, Q, N) from queries (B, Q, C) at (B, Q, 2) and tokens at (B, N, 2)."""
        shift, scale = self.shape(x).split([2, 1], 2)
        width = self.width * scale.clamp(-5, 5).exp()
        center = positions + width * shift
        square = (center[:, :, None] - tokens[:, None]).square().sum(3)
        return self.floor + self.height * (-0.5 * square / width.square()).exp()


class MaskDecoder(nn.Module):
    """Queries look at the levels in turn, each where its mask was after the layer before.

    Args:
        num_classes: K.
        levels: levels of the memory, coarsest first.
        token_queries: queries start from tokens and know where they are, see `TokenQueries` and
            `Spotlight`; otherwise they are learned, the same for all pictures, as published.
        stride: of the finest tokens, see `MaskPredictions`.
    """

    never = -20.0  # class logits of queries that are not there; finite, for the loss

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
        token_queries: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.stride = stride
        self.position_norm = position_norm
        self.token_queries = TokenQueries(dim, queries) if token_queries else None
        self.spotlight = Spotlight(dim) if token_queries else None
        if not token_queries:
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
        places, _ = pad_samples(mask_features.positions, mask_features.sizes)
        memory = [self._memory(mask_features, level, i, impl) for i, level in enumerate(levels)]
        queries, middles = self._queries(mask_features, impl)
        x = queries.content
        predictions = [self._predict(x, queries, masks_of, places)]
        for i, layer in enumerate(self.layers):
            features, code, rows, present = memory[i % len(memory)]
            allowed = self.allowed(predictions[-1][1], rows, present)
            x = layer(x, queries.code, features, code, allowed, queries.present)
            predictions.append(self._predict(x, queries, masks_of, places))
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
        return replace(last, auxiliary=tuple(earlier), middles=middles)

    def _queries(self, tokens: TokenSet, impl: str | None) -> tuple[Queries, TokenSet | None]:
        """Starting points of the queries, and the logits that chose them, if any did."""
        if self.token_queries is None:
            content = self.query.expand(tokens.batch_size, -1, -1)
            return Queries(content, self.query_position), None
        code = sine_encoding(tokens, self.dim, self.position_norm)
        return self.token_queries(tokens, code, impl)

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

    def _predict(
        self, x: Tensor, queries: Queries, mask_features: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, K + 1) and mask logits (B, Q, N) of the queries as they stand."""
        x = self.norm(x)
        masks = self.mask_embed(x) @ mask_features.transpose(1, 2)
        if self.spotlight is not None:
            assert queries.positions is not None
            masks = masks + self.spotlight(x, queries.positions, places)
        classes = self.classify(x)
        if queries.present is not None:
            nothing = classes.new_full(classes.shape[2:], self.never)
            nothing[-1] = 0
            classes = torch.where(queries.present[..., None], classes, nothing)
        return classes, masks

    @staticmethod
    def allowed(mask_logits: Tensor, rows: Tensor, present: Tensor | None) -> Tensor:
        """Tokens that each query may see, (B, Q, N) bool: those in its mask, all if that is empty.

        A token of a level sits on a token of the finest one: the mask there is the mask here.
        """
        index = rows[:, None].expand(-1, mask_logits.shape[1], -1)
        inside = mask_logits.detach().gather(2, index).sigmoid() >= 0.5
        if present is not None:
            inside = inside & present[:, None]
        empty = ~inside.any(2, keepdim=True)
        return inside | (empty if present is None else empty & present[:, None])
