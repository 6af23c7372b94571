"""Point clouds of any size: overlapping regions, each of which decides the points in its middle."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.spatial import cKDTree

from pointformer import TokenSet, balanced_cluster
from pointformer._checks import check_count

_GROUND = 2  # axes; of 3-D points z is up


class Regions:
    """Regions of a cloud of one sample, of `points` points each (half as many more at the most).

    The ground is cut in halves of equally many points until they have at most half of `points`;
    these decide their points, and a region is such a part with the points nearest to its middle,
    as `RandomRegion` takes them. A cloud of at most `points` is one region.

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
            clusters = balanced_cluster(ground, max(1, points // 2), curve="kd")
            self._parts = np.split(clusters.order.numpy(), clusters.offsets[1:-1].numpy())
            self._ground = ground.double().numpy()
            self._tree = cKDTree(self._ground, leafsize=64)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[TokenSet, np.ndarray, np.ndarray]]:
        """Each region's tokens, whose origin is the region's lower corner; the rows in the cloud
        that it decides, int64; and the places of these among its tokens."""
        for part in self._parts:
            rows = decided = np.sort(part)
            if len(self._parts) > 1:
                places = self._ground[decided]
                middle = (places.min(0) + places.max(0)) / 2
                _, near = self._tree.query(middle, k=min(self.points, len(self._ground)))
                rows = np.union1d(decided, near)
            index = torch.from_numpy(rows).to(self.tokens.positions.device)
            tokens = self.tokens.select(index, [len(rows)]).with_origin(None)
            yield tokens, decided, np.searchsorted(rows, decided)
