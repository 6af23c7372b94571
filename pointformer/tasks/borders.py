"""Objects of one kind as three classes of pixels: the target from a map of ids, the loss, and from
logits back to ids."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.measure import label
from skimage.segmentation import watershed
from torch import Tensor

from pointformer.annotations import VOID
from pointformer.nn.parallel import WHOLE, BatchPart

CLASSES = BACKGROUND, INSIDE, BORDER = range(3)  # of `Output.BORDERS`


def instance_target(instances: np.ndarray, border_width: int = 2) -> np.ndarray:
    """Classes that a dense head learns in order to tell instances apart.

    BORDER is every pixel of an instance with another instance at most `border_width` pixels
    (Euclidean) away; the instance's other pixels are INSIDE. An edge to the background is no
    border: at strides of 2 to 4 pixels a rim would leave nothing inside of small objects.

    Args:
        instances: (H, W) integers, 0 is background.
        border_width: in pixels; 0 gives no border.

    Returns:
        (H, W) uint8 of BACKGROUND, INSIDE, BORDER.
    """
    height, width = instances.shape
    foreground = instances != 0
    border = np.zeros((height, width), bool)
    for down in range(min(border_width, height - 1) + 1):
        for right in range(-min(border_width, width - 1), min(border_width, width - 1) + 1):
            half_plane = down > 0 or right > 0  # the other half are the same pairs, swapped
            if not half_plane or down**2 + right**2 > border_width**2:
                continue
            here = slice(0, height - down), slice(max(0, -right), width - max(0, right))
            there = slice(down, height), slice(max(0, right), width - max(0, -right))
            touch = instances[here] != instances[there]
            touch &= foreground[here]
            touch &= foreground[there]
            border[here] |= touch
            border[there] |= touch
    return foreground + border.astype(np.uint8)


def dense_loss(
    logits: Tensor, target: Tensor, class_weights: Tensor, part: BatchPart = WHOLE
) -> dict[str, Tensor]:
    """Weighted cross-entropy, and one minus the soft Dice score of each foreground class.

    Args:
        logits: (B, classes, H, W) float.
        target: (B, H, W) int64; class 0 is background, VOID does not count.
        class_weights: (classes,) float.
        part: of a batch that several processes share.

    Returns:
        "cross_entropy" and "dice"; their sum is the loss.
    """
    known, logits = target != VOID, logits.float()
    entropy = F.cross_entropy(logits, target, class_weights, ignore_index=VOID, reduction="sum")
    weight = class_weights[target[known]].sum()
    probability = logits.softmax(1)[:, 1:] * known[:, None]
    truth = F.one_hot(target.clamp(min=0), logits.shape[1])[..., 1:]
    truth = truth.movedim(-1, 1).to(probability.dtype)
    overlap = (probability * truth).sum((0, 2, 3))
    both = (probability + truth).sum((0, 2, 3))
    sums = part.total(torch.cat([torch.stack([entropy, weight]), overlap, both]))
    (entropy, weight), (overlap, both) = sums[:2], sums[2:].view(2, -1)
    # The constant keeps a class that is absent from the batch from dominating.
    dice = (2 * overlap + 100) / (both + 100)
    # Where no pixel is known the sum is 0, and no mean a number.
    mean = entropy / weight.clamp(min=torch.finfo(weight.dtype).tiny)
    return {"cross_entropy": mean, "dice": (1 - dice).mean()}


def instances_from_logits(
    logits: np.ndarray,
    *,
    foreground_threshold: float = 0.5,
    marker_threshold: float = 0.8,
    smoothing: float = 1.0,
    confidence: float = 0.825,
    min_size: int = 16,
) -> np.ndarray:
    """Instances by a watershed grown from where the inside is certain.

    Markers are the connected regions whose smoothed probability of INSIDE exceeds
    `marker_threshold`; they grow, the most probable pixels first, over the pixels whose
    probability of not being BACKGROUND exceeds `foreground_threshold`.

    Args:
        logits: (3, H, W) floats, for BACKGROUND, INSIDE, BORDER.
        smoothing: standard deviation, in pixels, of the Gaussian for the markers; 0 is none.
        confidence: instances whose mean probability of not being BACKGROUND is less are dropped.
        min_size: instances of fewer pixels are dropped.

    Returns:
        (H, W) int32, 0 is background, instances are 1..n.

    Raises:
        ValueError: if `logits` has another shape.
    """
    if logits.ndim != 3 or len(logits) != len(CLASSES):
        raise ValueError(f"logits: expected shape (3, H, W), got {logits.shape}")
    exponentials = np.exp(logits.astype(np.float32) - logits.max(0))
    background, inside, _ = exponentials / exponentials.sum(0)
    foreground = 1 - background
    if smoothing > 0:
        inside = ndimage.gaussian_filter(inside, smoothing)
    mask = foreground > foreground_threshold
    markers = label(mask & (inside > marker_threshold), connectivity=1)
    grown = watershed(-inside, markers, mask=mask).ravel()
    areas = np.bincount(grown)
    kept = (areas >= min_size) & (np.bincount(grown, foreground.ravel()) >= confidence * areas)
    kept[0] = False
    return (np.cumsum(kept) * kept)[grown].astype(np.int32).reshape(mask.shape)
