"""Point clouds of any size: overlapping regions, and what is said of their points joined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from pointformer import TokenSet, balanced_cluster
from pointformer._checks import check_count

_GROUND = 2  # axes; of 3-D points z is up
_LEAST = 1e-3  # weight at the border
_STRAY = 5e-4  # share of the points at each end that may be far from the others
_MANY = 10  # points of which one can be a stray
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a cloud, as a model sees it.

    Attributes:
        tokens: its n points; the origin is their lower corner.
        rows: (n,) int64 of the cloud, ascending.
        own: (n,) bool, whether a point is this region's own, as each is of exactly one.
        weights: (n,) float32 in (0, 1], falling from the middle to the border of the nearest.
    """

    tokens: TokenSet
    rows: np.ndarray
    own: np.ndarray
    weights: np.ndarray


class Regions:
    """Regions of a cloud of one sample, of `points` points each (half as many more at the most).

    The ground is cut in halves of equally many points until they have at most half of `points`; a
    region is such a part, its own, with the points nearest to its middle, as `RandomRegion` takes
    them. A cloud of at most `points` is one region. The same cloud has the same regions each time.

    Args:
        tokens: one sample.
        points: of a region.

    Raises:
        ValueError, TypeError: `points` is no positive integer.
    """

    def __init__(self, tokens: TokenSet, points: int) -> None:
        check_count("points", points)
        self.tokens, self.points = tokens, points
        ground = tokens.positions[:, :_GROUND].detach().cpu()
        self._parts = [np.arange(tokens.num_tokens)]
        if tokens.num_tokens > points:
            self._ground = ground.double().numpy()
            # Strays would turn the parts that they are in into strips.
            ends = torch.tensor([range_of(column) for column in self._ground.T]).float()
            ground = torch.minimum(torch.maximum(ground, ends[:, 0]), ends[:, 1])
            clusters = balanced_cluster(ground, max(1, points // 2), curve="kd")
            self._parts = np.split(clusters.order.numpy(), clusters.offsets[1:-1].numpy())
            self._tree = cKDTree(self._ground, leafsize=64)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[Region]:
        for part in self._parts:
            rows, own = np.sort(part), np.ones(len(part), bool)
            weights = np.ones(len(part), np.float32)
            if len(self._parts) > 1:
                places = self._ground[part]
                middle = np.median(places, 0)  # where its points are, not where one far away is
                far, near = self._tree.query(middle, k=self.points)
                rows = np.union1d(part, near)
                own = np.isin(rows, part, assume_unique=True)
                distance = np.sqrt(np.square(self._ground[rows] - middle).sum(1))
                weights = (1 - distance / max(np.max(far), _TINY)).astype(np.float32)
                weights = np.maximum(weights, _LEAST)
            index = torch.from_numpy(rows).to(self.tokens.positions.device)
            tokens = self.tokens.select(index, [len(rows)]).with_origin(None)
            yield Region(tokens, rows, own, weights)


def blend_regions(count: int, regions: Iterable[tuple[Region, Tensor]]) -> Tensor:
    """(T, K) float32 scores of a cloud of `count` points, on the CPU: means of those that its
    regions have (n, K), with their weights. Taken one at a time, in order."""
    sums, total = torch.zeros(0), torch.zeros(count, 1)
    for region, scores in regions:
        if not len(sums):
            sums = torch.zeros(count, scores.shape[1])
        rows, weights = torch.from_numpy(region.rows), torch.from_numpy(region.weights)[:, None]
        sums[rows] += weights * scores.float().cpu()
        total[rows] += weights
    return sums.div_(total)


def range_of(values: np.ndarray) -> tuple[float, float]:
    """Where the values lie but for a few at each end that are further from the others than these
    are from each other."""
    least, most = float(values.min()), float(values.max())
    last = len(values) - 1
    few = int(np.ceil(_STRAY * len(values))) if last >= _MANY else 0
    low, high = np.partition(values, (few, last - few))[[few, last - few]].tolist()
    if low == high:
        return least, most
    close = values[(values >= 2 * low - high) & (values <= 2 * high - low)]
    return float(close.min()), float(close.max())
