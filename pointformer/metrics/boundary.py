"""Boundary IoU (Cheng et al., arXiv 2103.16562): masks are compared near their contours only."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage


def mask_boundary(mask: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """Pixels of a mask within a distance of its contour; the picture's rim is a contour too.

    Args:
        mask: (H, W) bool.
        dilation_ratio: that distance in units of the picture's diagonal. It is rounded to pixels,
            at least one, and diagonal steps count as one.

    Returns:
        (H, W) bool.
    """
    mask = np.asarray(mask, bool)
    distance = max(1, round(dilation_ratio * math.hypot(*mask.shape)))
    boundary = mask.copy()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows):
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        inside = mask[box].astype(np.uint8)
        for axis in (0, 1):
            inside = ndimage.minimum_filter1d(inside, 2 * distance + 1, axis, mode="constant")
        boundary[box] &= inside == 0
    return boundary


def boundary_iou(
    predicted: np.ndarray, annotated: np.ndarray, dilation_ratio: float = 0.02
) -> float:
    """IoU of the boundaries of two (H, W) masks, in [0, 1]; 1 if both masks are empty."""
    if np.shape(predicted) != np.shape(annotated):
        raise ValueError(
            "predicted, annotated: expected two masks of one shape, "
            f"got {np.shape(predicted)} and {np.shape(annotated)}"
        )
    first = mask_boundary(predicted, dilation_ratio)
    second = mask_boundary(annotated, dilation_ratio)
    union = int((first | second).sum())
    return float((first & second).sum() / union) if union else 1.0
