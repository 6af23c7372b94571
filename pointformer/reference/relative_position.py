"""Features of a relative position that attention biases and merge weights are linear in."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_position(delta: Tensor, full: bool = True) -> Tensor:
    """The relative position features phi of AutoFocusFormer (section 4.2).

    Args:
        delta: (..., D) neighbor minus query, D = 2 or 3.
        full: add the distance and the direction; else `delta` itself is returned.

    Returns:
        (..., F). For D = 2, F = 5: dx, dy, distance, sine = dy/distance, cosine = dx/distance. For
        D = 3, F = 7: dx, dy, dz, distance, unit vector (x, y, z). At distance 0 all are zero, and
        so are the gradients of distance and direction. Below 1.1e-19 (the root of the smallest
        normal float32 number) both lose digits with their squares, and may be zero.
    """
    if not full:
        return delta
    squared = (delta * delta).sum(-1, keepdim=True)
    apart = squared > 0
    # The inner `where` keeps infinite derivatives at 0 out of the graph.
    distance = torch.where(apart, squared, 1.0).sqrt()
    direction = torch.where(apart, delta / distance, 0.0)
    if delta.shape[-1] == 2:
        direction = direction.flip(-1)  # the released weights expect the sine first
    return torch.cat([delta, torch.where(apart, distance, 0.0), direction], -1)
