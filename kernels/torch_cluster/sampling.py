"""Farthest points by torch-cluster, which looks at all points for each pick."""

import torch
import torch_cluster


def farthest_points(positions, sizes, counts, start):
    """See `pointformer.kernels.sampling`; where picks are all that is left it repeats them."""
    device = positions.device
    filled = [(size, count) for size, count in zip(sizes, counts, strict=True) if count]
    if not filled:
        return torch.empty(0, dtype=torch.int64, device=device)
    # It rounds ratio * size up.
    ratios = [(count - 0.5) / size for size, count in filled]
    ratio = torch.tensor(ratios, dtype=torch.float32, device=device)
    kept = torch.tensor(counts, device=device) > 0
    lengths = torch.tensor(sizes, device=device)
    sample = torch.repeat_interleave(torch.arange(len(sizes), device=device), lengths)
    rows = kept[sample].nonzero()[:, 0]
    batch = torch.unique_consecutive(sample[rows], return_inverse=True)[1]
    points = positions.detach()[rows]
    return rows[torch_cluster.fps(points, batch, ratio, random_start=False)]
