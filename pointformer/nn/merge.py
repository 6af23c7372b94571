"""Merging and convolution of neighborhoods by weights learned from relative positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, cast

from torch import Tensor, nn

from pointformer._checks import check_count, check_flags
from pointformer.clusters import Neighborhoods
from pointformer.geometry import knn
from pointformer.ops import point_conv, scored_merge
from pointformer.tokens import TokenSet


def position_features(dimensions: int, expanded: bool) -> int:
    """How many numbers describe a relative position: the differences, and where `expanded` the
    distance and the direction."""
    check_count("dimensions", dimensions, least=2, most=3)
    check_flags(expanded_position=expanded)
    return 2 * dimensions + 1 if expanded else dimensions


class WeightNetArguments(TypedDict):
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float


class WeightNet(nn.Sequential):
    """Relative positions to `mid` weights: Linear, LayerNorm, GELU; `scored_merge` evaluates it."""

    def __init__(self, features: int, mid: int) -> None:
        check_count("features", features)
        check_count("mid", mid)
        super().__init__(nn.Linear(features, mid), nn.LayerNorm(mid), nn.GELU())

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self[0])

    def arguments(self) -> WeightNetArguments:
        """The keyword arguments of `scored_merge` and `point_conv` that describe the net."""
        norm = cast(nn.LayerNorm, self[1])
        return {
            "weight": self.linear.weight,
            "bias": self.linear.bias,
            "norm_weight": norm.weight,
            "norm_bias": norm.bias,
            "eps": norm.eps,
        }


class PointConv(nn.Module):
    """Convolution over the `k` nearest tokens: what 3x3 is on a grid (section 4.1).

    Layers start as torch's do. See `point_conv`, which LayerNorm and a Linear layer follow.

    Args:
        dim, out_dim: channels of the tokens before and after.
        k: tokens that are summed for each one, with itself.
        mid: weights of each of them, any number, on GPUs at most 32.
        dimensions: 2 or 3, axes of the positions.
    """

    def __init__(
        self, dim: int, out_dim: int, k: int = 9, mid: int = 4, *, dimensions: int = 2
    ) -> None:
        super().__init__()
        for name, count in (("dim", dim), ("out_dim", out_dim), ("k", k)):
            check_count(name, count)
        self.k = k
        self.weight_net = WeightNet(position_features(dimensions, True), mid)
        self.norm = nn.LayerNorm(mid * dim)
        self.linear = nn.Linear(mid * dim, out_dim)

    def forward(self, tokens: TokenSet, impl: str | None = None) -> TokenSet:
        """The same tokens with features (T, out_dim)."""
        index = knn(
            tokens.positions,
            self.k,
            sizes=tokens.sizes,
            same_positions=tokens.same_positions,
            check_values=False,
            impl=impl,
        )
        summed = point_conv(
            tokens.features,
            tokens.positions,
            index,
            **self.weight_net.arguments(),
            check_values=False,
            impl=impl,
        )
        return tokens.with_features(self.linear(self.norm(summed)))


class ScoredMerge(nn.Module):
    """Merge the neighborhoods of chosen tokens into fewer tokens (AutoFocusFormer, Eq. 4).

    Layers start as torch's do. See `scored_merge`, which LayerNorm and a Linear layer follow.

    Args:
        dim, out_dim: channels of the tokens before and after.
        mid: weights of each token of a neighborhood, any number, on GPUs at most 32.
        dimensions: 2 or 3, axes of the positions.
        expanded_position: weights from differences, distance and direction, not differences alone.
        center: add a Linear layer of the chosen token's own features, as of pruned transformers
            (DynamicViT, 2021). Tokens side by side share most of their neighborhoods, and what is
            merged hardly tells them apart at first.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        mid: int = 4,
        *,
        dimensions: int = 2,
        expanded_position: bool = True,
        center: bool = False,
    ) -> None:
        super().__init__()
        check_flags(center=center)
        for name, count in (("dim", dim), ("out_dim", out_dim)):
            check_count(name, count)
        self.score = nn.Linear(dim, 1)
        self.weight_net = WeightNet(position_features(dimensions, expanded_position), mid)
        self.norm = nn.LayerNorm(mid * dim)
        self.linear = nn.Linear(mid * dim, out_dim)
        self.center = None
        if center:
            self.center = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, out_dim, bias=False))

    def logits(self, x: Tensor) -> Tensor:
        """(T,) float32 of features (T, C), whose sigmoid is the tokens' importance."""
        logits: Tensor = self.score(x).float()[:, 0]
        return logits

    def forward(
        self,
        tokens: TokenSet,
        neighborhoods: Neighborhoods,
        scores: Tensor,
        index: Tensor,
        sizes: Sequence[int],
        impl: str | None = None,
    ) -> TokenSet:
        """Tokens at the chosen ones' positions with features (T', out_dim).

        Args:
            tokens: rows in cluster order.
            neighborhoods: of all of them.
            scores: (T,), factors of the tokens' weights.
            index: (T',) rows of the chosen ones, grouped by sample, `sizes` in each.
        """
        merged = scored_merge(
            tokens.features,
            scores,
            tokens.positions,
            index,
            neighborhoods,
            **self.weight_net.arguments(),
            impl=impl,
        )
        features = self.linear(self.norm(merged))
        if self.center is not None:
            features = features + self.center(tokens.features[index])
        return tokens.select(index, sizes, features=features, check_values=False)
