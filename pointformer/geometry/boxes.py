"""Bounding boxes of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer.clusters import offsets_of


def bounding_boxes(positions: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Lower and upper corners (B, D) of the positions (T, D) of each sample, 0 of an empty one."""
    if len(sizes) == 1 and len(positions):  # as fast as can be
        return positions.amin(0, keepdim=True), positions.amax(0, keepdim=True)
    lengths = offsets_of(tuple(sizes), positions.device).diff()
    low, high = (
        torch.segment_reduce(positions, reduce, lengths=lengths, axis=0, unsafe=True)
        for reduce in ("min", "max")
    )
    filled = (lengths > 0)[:, None]
    return low.where(filled, 0.0), high.where(filled, 0.0)
