"""What trains mask heads: Hungarian matching and losses on sampled points (Mask2Former).

Masks are compared on points, not on pixels: the matcher takes one uniform set per image, the losses
take the most uncertain of a larger uniform set and some more. All in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pointformer.models.mask2former import MaskPredictions


@dataclass(frozen=True)
class Targets:
    """The objects of one image.

    Attributes:
        classes: (G,) int64, 0 to K - 1.
        masks: (G, H, W) bool or float, at the image's resolution or any other.
    """

    classes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms, the same in the matcher's costs; `no_object` weighs its class."""

    classes: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1
    temperature: float = 0.1


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, H, W) at points (N, P, 2) or (P, 2), x and y in [0, 1]: (N, P).

    0 and 1 are the outer borders of the first and last pixel; outside of the pixels' centers the
    maps fade to zero.
    """
    points = points.expand(len(maps), *points.shape[-2:])
    grid = (2 * points - 1)[:, None]
    sampled = nn.functional.grid_sample(maps[:, None].float(), grid, align_corners=False)
    return sampled[:, 0, 0]


def uncertain_points(
    logits: Tensor, count: int, oversample: float = 3.0, importance: float = 0.75
) -> Tensor:
    """Points (N, count, 2) where mask logits (N, H, W) are near zero, and some anywhere.

    Of `oversample * count` uniform points per mask the `importance * count` with the smallest
    absolute logit are kept; the rest is uniform.
    """
    device = logits.device
    many = torch.rand(len(logits), int(count * oversample), 2, device=device)
    chosen = int(importance * count)
    order = sample_points(logits, many).abs().topk(chosen, dim=1, largest=False).indices
    picked = many.gather(1, order[..., None].expand(-1, -1, 2))
    rest = torch.rand(len(logits), count - chosen, 2, device=device)
    return torch.cat([picked, rest], 1)


def mask_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) mean binary cross-entropy over the points, (N, P) each."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.mean(1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) values of 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), over points (N, P)."""
    probability = logits.sigmoid()
    overlap = (probability * targets).sum(1)
    return 1 - (2 * overlap + 1) / (probability.sum(1) + targets.sum(1) + 1)


@torch.no_grad()
def matching_cost(
    class_logits: Tensor,
    mask_logits: Tensor,
    classes: Tensor,
    masks: Tensor,
    weights: LossWeights,
) -> Tensor:
    """(Q, G) cost of giving each query each object: class probability, cross-entropy and dice.

    Args:
        class_logits: (Q, K + 1).
        mask_logits, masks: (Q, P) and (G, P), at the same points.
        classes: (G,).
    """
    probability = class_logits.softmax(1)[:, classes]
    points = mask_logits.shape[1]
    inside = nn.functional.softplus(-mask_logits)  # cross-entropy if the point is in the object
    outside = nn.functional.softplus(mask_logits)
    entropy = (inside @ masks.T + outside @ (1 - masks).T) / points
    share = mask_logits.sigmoid()
    total = share.sum(1)[:, None] + masks.sum(1)
    dice = 1 - (2 * share @ masks.T + 1) / (total + 1)
    return weights.mask * entropy + weights.dice * dice - weights.classes * probability


@torch.no_grad()
def match(
    class_logits: Tensor, mask_logits: Tensor, targets: Targets, weights: LossWeights, points: int
) -> tuple[Tensor, Tensor]:
    """Queries and objects of one image that belong together, (min(Q, G),) each.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        points: how many points masks are compared at, the same for all masks.
    """
    device = class_logits.device
    if len(targets.classes) == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return empty, empty
    at = torch.rand(points, 2, device=device)
    cost = matching_cost(
        class_logits.float(),
        sample_points(mask_logits, at),
        targets.classes,
        sample_points(targets.masks, at),
        weights,
    )
    finite = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)  # diverged queries come last
    queries, objects = linear_sum_assignment(finite.cpu().numpy())
    return torch.as_tensor(queries, device=device), torch.as_tensor(objects, device=device)


def segmentation_loss(
    predictions: MaskPredictions,
    targets: Sequence[Targets],
    *,
    weights: LossWeights | None = None,
    points: int = 12544,
    oversample: float = 3.0,
    importance: float = 0.75,
) -> dict[str, Tensor]:
    """Weighted loss terms of all layers, each with its own matching.

    Args:
        predictions: of a head in training, the earlier layers as `auxiliary`.
        targets: one for each image of the batch. A batch without any object is fine.
        points, oversample, importance: see `uncertain_points`.

    Returns:
        "classes", "mask" and "dice", summed over the layers, and "temperature" for a head with
        learned clusterings (the sum of their absolute temperatures). Their sum is the loss.

    Raises:
        ValueError: the number of targets or a class does not fit; the message names the image.
    """
    weights = weights or LossWeights()
    batch, _, outputs = predictions.class_logits.shape
    if len(targets) != batch:
        raise ValueError(f"targets: expected one for each of {batch} images, got {len(targets)}")
    for number, target in enumerate(targets):
        if len(target.classes) and int(target.classes.max()) >= outputs - 1:
            raise ValueError(
                f"targets: image {number} has class {int(target.classes.max())}, the head has "
                f"{outputs - 1} classes"
            )
    objects = max(sum(len(target.classes) for target in targets), 1)
    total: dict[str, Tensor] = {}
    for layer in (*predictions.auxiliary, predictions):
        masks = layer.masks()
        terms = _layer_loss(
            layer.class_logits.float(), masks, targets, weights, objects,
            (points, oversample, importance),
        )  # fmt: skip
        for name, value in terms.items():
            total[name] = total[name] + value if name in total else value
    if predictions.temperatures:
        temperatures = torch.stack([t.abs() for t in predictions.temperatures])
        total["temperature"] = weights.temperature * temperatures.sum()
    return total


def _layer_loss(
    class_logits: Tensor,
    masks: Tensor | Sequence[Tensor],
    targets: Sequence[Targets],
    weights: LossWeights,
    objects: int,
    sampling: tuple[int, float, float],
) -> dict[str, Tensor]:
    nothing = class_logits.shape[2] - 1
    wanted = torch.full(class_logits.shape[:2], nothing, device=class_logits.device)
    mask_loss = dice = class_logits.new_zeros(())
    for image, target in enumerate(targets):
        maps = masks[image]
        queries, chosen = match(class_logits[image], maps, target, weights, sampling[0])
        wanted[image, queries] = target.classes[chosen]
        if len(queries) == 0:
            mask_loss = mask_loss + 0 * maps.sum()  # keeps the masks in the graph
            continue
        logits = maps[queries].float()
        with torch.no_grad():
            at = uncertain_points(logits, *sampling)
            labels = sample_points(target.masks[chosen], at)
        values = sample_points(logits, at)
        mask_loss = mask_loss + mask_cross_entropy(values, labels).sum()
        dice = dice + dice_loss(values, labels).sum()
    class_weights = class_logits.new_ones(nothing + 1)
    class_weights[nothing] = weights.no_object
    classes = nn.functional.cross_entropy(
        class_logits.flatten(0, 1), wanted.flatten(), class_weights
    )
    return {
        "classes": weights.classes * classes,
        "mask": weights.mask * mask_loss / objects,
        "dice": weights.dice * dice / objects,
    }
