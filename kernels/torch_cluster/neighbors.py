"""Nearest points by torch-cluster: a k-d tree on CPUs, brute force and a wait on GPUs."""

import torch
import torch_cluster

from pointformer.kernels.tables import shifted_copies

_MISSING = (1 << 63) - 1


def _samples(sizes, device):
    """Sample of each row."""
    lengths = torch.tensor(sizes, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(sizes)), lengths).to(device)


def nearest(query, points, query_sizes, point_sizes, limits, width, reach, along_curve, copies):
    """See `pointformer.kernels.neighbors`; of equally far points any may be listed last."""
    points = points.detach().contiguous()
    query = points if query is None else query.detach().contiguous()
    device = points.device
    sample = _samples(query_sizes, device)
    keys = torch.full((len(query), width), _MISSING, device=device)
    if keys.numel() and len(points):
        batches = _samples(point_sizes, device), sample
        row, found = torch_cluster.knn(points, query, width, *batches)
        difference = query[row] - points[found]
        squares = (difference * difference).unbind(1)
        square = squares[0] + squares[1]
        if len(squares) == 3:
            square = square + squares[2]
        slot = torch.arange(len(row), device=device) - torch.searchsorted(row, row)
        # The bits of a non-negative float32 are ordered as its value is.
        keys[row, slot] = (square.view(torch.int32).long() << 32) | found
    keys = keys.sort(1).values
    listed = torch.tensor(limits, device=device)[sample, None]
    listed = (torch.arange(width, device=device) < listed) & (keys < _MISSING)
    distance = (keys >> 32).int().view(torch.float32)
    listed &= distance <= reach
    index = torch.where(listed, keys & 0xFFFFFFFF, -1).int()
    distance = torch.where(listed, distance, torch.inf)
    return shifted_copies(index, copies, len(points)), distance.repeat(copies, 1)
