"""Points of one cell of a lattice as one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pointformer._checks import (
    FLOATS,
    can_read,
    check_finite,
    check_flags,
    check_number,
    check_positions,
    check_sizes,
    check_tensor,
)
from pointformer.graph.batch import batch_from_sizes
from pointformer.ops.segment import segment_reduce

_MOST_CELLS = 2.0**52  # along an axis: float64 counts no farther


class Voxels(NamedTuple):
    """The cells of a lattice that have points.

    Attributes:
        positions: (V, D) float32, the mean of each cell's points.
        features: (V, ...), or `None` where there were none.
        sizes: cells per sample, B host integers.
        assignment: (T,) int64, the cell of each point: `features[assignment]` is the way back.
    """

    positions: Tensor
    features: Tensor | None
    sizes: tuple[int, ...]
    assignment: Tensor


def voxel_pool(
    positions: Tensor,
    features: Tensor | None,
    side: float,
    *,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    reduce: str = "mean",
    check_values: bool = True,
    impl: str | None = None,
) -> Voxels:
    """Pool the points of each cell of a lattice.

    A cell is the points of one sample with the same floor(position / side), so that it does not
    depend on which other points there are. Waits for the device, to learn how many cells have some.

    Args:
        positions: (T, D) float32, D = 2 or 3, samples one after the other.
        features: (T, ...) floating, or `None`.
        side: of a cell, in the units of `positions`.
        sizes: points per sample, B host integers; `None` for one sample.
        batch: in place of `sizes` the sample of each point, see `sizes_from_batch`.
        reduce: how features are pooled, see `segment_reduce`; positions always get their mean.
        check_values: whether to look for positions that are not finite.
        impl: of `segment_reduce`.

    Returns:
        The cells, sample by sample, those of a sample in the order of z, then y, then x. Gradients
        reach positions and features.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value does not fit.
    """
    check_positions("positions", positions)
    points = len(positions)
    if features is not None:
        check_tensor("features", features, None, FLOATS, positions.device)
        if features.dim() == 0 or len(features) != points:
            raise ValueError(
                f"features: expected {points} rows as in positions, got {tuple(features.shape)}"
            )
    sizes = check_sizes("sizes", sizes, points, batch)
    side = check_number("side", side, above=0)
    check_flags(check_values=check_values)
    if check_values:
        check_finite("positions", positions, sizes)
        farthest = float(positions.detach().abs().amax()) if points and can_read(positions) else 0.0
        if farthest / side > _MOST_CELLS:
            raise ValueError(
                f"side: expected a larger one, {side:g} makes more than {_MOST_CELLS:.0e} cells "
                "along an axis"
            )
    cells = (positions.detach().double() / side).floor().long()
    sample = batch_from_sizes(sizes, positions.device)
    order = torch.arange(points, device=positions.device)
    columns = (*cells.unbind(1), sample)
    for column in columns:  # the last one counts most
        order = order[torch.sort(column[order], stable=True).indices]
    ordered = [column[order] for column in columns]
    fresh = torch.stack([column != column.roll(1) for column in ordered]).any(0)
    fresh[:1] = True
    voxel = fresh.cumsum(0) - 1
    assignment = torch.empty_like(order).index_copy_(0, order, voxel)
    first = fresh.nonzero()[:, 0]
    offsets = torch.cat([first, first.new_full((1,), points)])
    counts = torch.zeros(len(sizes), dtype=torch.int64, device=positions.device)
    counts = counts.index_add(0, sample[order[first]], torch.ones_like(first)).cpu()
    pool = partial(segment_reduce, offsets=offsets, check_values=False, impl=impl)
    if features is not None:
        features = pool(features.index_select(0, order), reduce)
    means = pool(positions.index_select(0, order), "mean")
    kept = counts if isinstance(sizes, Tensor) else tuple(counts.tolist())
    return Voxels(means, features, kept, assignment)
