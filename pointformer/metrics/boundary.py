"""Boundary IoU (Cheng et al., arXiv 2103.16562): masks are compared near their contours only."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from pointformer.annotations import Mask


def boundary_distance(size: tuple[int, int], dilation_ratio: float = 0.02) -> int:
    """Width in pixels of the band along its contour in which a mask is compared.

    Args:
        size: height and width of the picture.
        dilation_ratio: share of the picture's diagonal; the width is rounded, at least one pixel.
    """
    return max(1, round(dilation_ratio * math.hypot(*size)))


def boundary_of(mask: Mask, distance: int) -> Mask:
    """Pixels of a mask within a distance of its contour; the picture's rim is a contour too.

    Args:
        distance: in pixels; diagonal steps count as one.
    """
    inside = mask.pixels.astype(np.uint8)
    for axis in (0, 1):
        inside = ndimage.minimum_filter1d(inside, 2 * distance + 1, axis, mode="constant")
    return Mask(mask.top, mask.left, mask.pixels & (inside == 0))


def mask_boundary(mask: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """`boundary_of` a mask (H, W) at its `boundary_distance`, (H, W) bool."""
    mask = np.asarray(mask, bool)
    return boundary_of(Mask.of(mask), boundary_distance(mask.shape, dilation_ratio)).dense(
        mask.shape
    )


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
