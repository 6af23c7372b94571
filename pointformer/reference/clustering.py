"""Balanced clustering in plain torch: the sort keys and the cluster centers."""

from __future__ import annotations

import torch
from torch import Tensor

from pointformer.reference.neighbors import squared_distance

RATIO_BITS = 31


def cluster_keys(
    positions: Tensor,
    offsets: Tensor,
    origin: Tensor,
    cell_size: Tensor,
    unit: Tensor,
    shape: Tensor,
    first_cell: Tensor,
    anchor_of_cell: Tensor,
    anchors: Tensor,
) -> Tensor:
    """Sort keys of AutoFocusFormer's clustering (section 3.1): (anchor, ratio) in one integer.

    The ratio is that of the squared distances to the previous and the next anchor, in float32
    without fused operations. The bits of a non-negative float32 order like an integer.

    Args:
        positions: (T, D) float32.
        offsets: (B+1,) int64, start of each sample.
        origin: (B, D) float32, subtracted from the positions.
        cell_size: (B, D) float32.
        unit: (B, D) float32, positions are divided by it before they meet the anchors.
        shape: (B, D) int64, cells per axis.
        first_cell: (B,) int64, where each sample starts in `anchor_of_cell`.
        anchor_of_cell: (cells of all samples,) int64, row in `anchors`.
        anchors: (A, D) float32 in curve order, with one extra row before and after each sample's.

    Returns:
        (T,) int64.
    """
    samples = torch.arange(len(shape), device=positions.device)
    sample = torch.repeat_interleave(samples, offsets.diff(), output_size=len(positions))
    relative = positions - origin[sample]
    cell = (relative / cell_size[sample]).floor().clamp(min=0)
    cell = cell.minimum((shape[sample] - 1).float()).long()
    index = cell[:, -1]
    for axis in range(cell.shape[1] - 2, -1, -1):
        index = index * shape[sample, axis] + cell[:, axis]
    anchor = anchor_of_cell[first_cell[sample] + index]
    point = relative / unit[sample]
    ratio = squared_distance(point, anchors[anchor - 1]) / (
        squared_distance(point, anchors[anchor + 1]) + 1e-5
    )
    bits = ratio.view(torch.int32).long() & ((1 << RATIO_BITS) - 1)
    return (anchor << RATIO_BITS) | bits


def kd_keys(
    positions: Tensor, order: Tensor, offsets: Tensor, first: Tensor, last: Tensor, back: Tensor
) -> tuple[Tensor, Tensor]:
    """Sort keys that order each part of the clusters across the longest side of its bounding box.

    Args:
        positions: (T, D) float32.
        order: (T,) int64, the rows of the positions so far.
        offsets: (K+1,) int32, start of each cluster in that order.
        first, last: (K,) int64, the clusters first to last - 1 of the part that a cluster is in.
        back: (K,) int64, bit a is set where the part is walked backwards along axis a.

    Returns:
        Keys (T,) int64, equal inside parts of one cluster, and (K,) int64, the axis of the part
        that starts with each cluster; 0 where none does.
    """
    clusters = torch.arange(len(first), device=first.device)
    lengths = offsets.diff().long()
    cluster = torch.repeat_interleave(clusters, lengths, output_size=len(order))
    starts, ends = offsets[:-1].long(), offsets[last].long()
    rows = torch.where(first == clusters, ends - starts, 0)
    place = positions[order] + 0.0  # -0 is 0
    low, high = (
        torch.segment_reduce(place, reduce, lengths=rows, axis=0, unsafe=True)
        for reduce in ("min", "max")
    )
    side = (high - low).where((rows > 0)[:, None], 0.0)
    axis, longest = torch.zeros_like(first), side[:, 0]
    for other in range(1, positions.shape[1]):
        longer = side[:, other] > longest
        axis, longest = axis.where(~longer, other), torch.where(longer, side[:, other], longest)
    part = first[cluster]
    along = axis[part]
    bits = place.gather(1, along[:, None])[:, 0].contiguous().view(torch.int32).long()
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers ordered like the floats
    ascending = torch.where((back[part] >> along) & 1 == 1, ~ascending, ascending)
    ascending = torch.where(last[part] - part > 1, ascending, 0)
    return (part << 32) + (ascending + (1 << 31)), axis


def cluster_centers(positions: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Mean position of each cluster: members added in row order in float32, one division.

    Args:
        positions: (T, D) float32.
        order: (T,) int64, input row of each row.
        offsets: (K+1,) int32, start of each cluster.

    Returns:
        (K, D) float32.
    """
    start, end = offsets[:-1].long(), offsets[1:].long()
    lengths = end - start
    total = positions.new_zeros(len(start), positions.shape[1])
    longest = int(lengths.max()) if len(start) else 0
    for member in range(longest):
        row = start + member
        value = positions[order[row.clamp(max=len(order) - 1)]]
        total = total + torch.where((row < end)[:, None], value, 0.0)
    return total / lengths[:, None].float()
