"""The loss of mask heads: Hungarian matching and losses on sampled points (Mask2Former).

Masks are compared on points, not on pixels: the matcher takes one uniform set per image, the losses
take the most uncertain of a larger uniform set and some more. All in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pointformer.models.mask2former import MaskPredictions
from pointformer.nn.parallel import WHOLE, BatchPart


@dataclass(frozen=True)
class Targets:
    """The objects of one image.

    Attributes:
        classes: (G,) int64, 0 to K - 1.
        masks: (G, H, W) bool at the image's resolution, or the float shares of larger cells.
        stride: pixels of the image per cell of the masks, in both directions; H and W are the
            image's height and width divided by it, rounded up.
    """

    classes: Tensor
    masks: Tensor
    stride: int = 1


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms, the same in the matcher's costs; `no_object` weighs its class.

    Its published tenth makes queries say that they are objects sooner than they are, which is well
    for scores that are only compared, as in COCO's AP; where a threshold on them decides what is
    shown, 1 is better.
    """

    classes: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1
    temperature: float = 0.1
    middles: float = 2.0


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, H, W) at points (N, P, 2) or (P, 2), x and y in [0, 1]: (N, P).

    0 and 1 are the outer borders of the first and last pixel; outside of the pixels' centers the
    maps fade to zero.
    """
    points = points.expand(len(maps), *points.shape[-2:])
    grid = (2 * points - 1)[:, None]
    sampled = nn.functional.grid_sample(maps[:, None].float(), grid, align_corners=False)
    return sampled[:, 0, 0]


def sample_targets(
    targets: Targets, points: Tensor, cells: Sequence[int], stride: int = 4
) -> Tensor:
    """`sample_points` of target masks, at points given for mask logits.

    Args:
        cells: height and width of the grid of mask logits. It reaches beyond an image whose sides
            the stride does not divide, and no object is there.
        stride: pixels of the image per cell of that grid.
    """
    height, width = targets.masks.shape[1:]
    x = points[..., 0] * (cells[1] * stride / (width * targets.stride))
    y = points[..., 1] * (cells[0] * stride / (height * targets.stride))
    return sample_points(targets.masks, torch.stack([x, y], -1))


def uncertain_points(
    logits: Tensor,
    count: int,
    oversample: float = 3.0,
    importance: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points (N, count, 2) where mask logits (N, H, W) are near zero, and some anywhere.

    Of `oversample * count` uniform points per mask the `importance * count` with the smallest
    absolute logit are kept; the rest is uniform.
    """
    device = logits.device
    many = torch.rand(len(logits), int(count * oversample), 2, device=device, generator=generator)
    chosen = int(importance * count)
    order = sample_points(logits, many).abs().topk(chosen, dim=1, largest=False).indices
    picked = many.gather(1, order[..., None].expand(-1, -1, 2))
    rest = torch.rand(len(logits), count - chosen, 2, device=device, generator=generator)
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
    with torch.autocast(mask_logits.device.type, enabled=False):
        probability = class_logits.float().softmax(1)[:, classes]
        logits, masks = mask_logits.float(), masks.float()
        inside = nn.functional.softplus(-logits)  # cross-entropy if the point is in the object
        outside = nn.functional.softplus(logits)
        entropy = (inside @ masks.T + outside @ (1 - masks).T) / logits.shape[1]
        share = logits.sigmoid()
        total = share.sum(1)[:, None] + masks.sum(1)
        dice = 1 - (2 * share @ masks.T + 1) / (total + 1)
        return weights.mask * entropy + weights.dice * dice - weights.classes * probability


@torch.no_grad()
def match(
    class_logits: Tensor,
    mask_logits: Tensor,
    targets: Targets,
    weights: LossWeights,
    points: int,
    stride: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and objects of one image that belong together, (min(Q, G),) each.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        points: how many points masks are compared at, the same for all masks.
        stride: pixels of the image per cell of the mask logits.
    """
    device = class_logits.device
    if len(targets.classes) == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return empty, empty
    at = torch.rand(points, 2, device=device, generator=generator)
    cost = matching_cost(
        class_logits.float(),
        sample_points(mask_logits, at),
        targets.classes,
        sample_targets(targets, at, mask_logits.shape[-2:], stride),
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
    part: BatchPart = WHOLE,
) -> dict[str, Tensor]:
    """Weighted loss terms of all layers, each with its own matching.

    Args:
        predictions: of a head in training, the earlier layers as `auxiliary`.
        targets: one for each image of the batch. A batch without any object is fine.
        points, oversample, importance: see `uncertain_points`.
        part: of a batch that several processes share; points are drawn for each image apart.

    Returns:
        "classes", "mask" and "dice", summed over the layers, and "temperature" for a head with
        learned clusterings (the sum of their absolute temperatures), and "middles" for one whose
        queries start from tokens (`middle_loss`). Their sum is the loss.

    Raises:
        ValueError: the number of targets, a class or a mask's size does not fit; the message names
            the image.
    """
    weights = weights or LossWeights()
    batch, _, outputs = predictions.class_logits.shape
    if len(targets) != batch:
        raise ValueError(f"targets: expected one for each of {batch} images, got {len(targets)}")
    layers = [(layer, layer.masks()) for layer in (*predictions.auxiliary, predictions)]
    for number, (target, maps) in enumerate(zip(targets, layers[-1][1], strict=True)):
        _check(number, target, outputs - 1, maps.shape[-2:], predictions.stride)
    generators = part.generators(batch, predictions.class_logits.device)
    sums = [
        _layer_sums(
            layer.class_logits.float(), masks, targets, weights, generators,
            (points, oversample, importance), predictions.stride,
        )
        for layer, masks in layers
    ]  # fmt: skip
    middles = sums[0].new_zeros(())
    if predictions.middles is not None:
        middles = middle_loss(predictions, targets)
    objects = middles.new_tensor(sum(len(target.classes) for target in targets))
    all_sums = part.total(torch.cat([*sums, torch.stack([middles, objects])]))
    entropy, weight, mask, dice = all_sums[:-2].view(-1, 4).unbind(1)
    middles, objects = all_sums[-2:]
    objects = objects.clamp(min=1)
    weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)  # 0 where nothing counts
    total = {
        "classes": weights.classes * (entropy / weight).sum(),
        "mask": weights.mask * mask.sum() / objects,
        "dice": weights.dice * dice.sum() / objects,
    }
    if predictions.temperatures:
        temperatures = torch.stack([t.abs() for t in predictions.temperatures])
        total["temperature"] = weights.temperature * temperatures.sum()
    if predictions.middles is not None:
        total["middles"] = weights.middles * middles / objects
    return total


@torch.no_grad()
def middle_targets(
    targets: Targets, positions: Tensor, cells: Sequence[int], stride: int
) -> Tensor:
    """(N,) how much tokens are in the middle of an object, 0 to 1; 1 for one token of each.

    A Gaussian around the object's centroid whose deviation is half the radius of a disk of its
    area, inside of the object: a hollow one has its middle where it is nearest to its centroid.

    Args:
        positions: (N, 2) of the tokens, in cells of the head's grid.
        cells: height and width of that grid.
        stride: pixels of the image per cell of it.
    """
    if len(targets.classes) == 0 or len(positions) == 0:
        return positions.new_zeros(len(positions))
    masks = targets.masks.float()
    scale = targets.stride / stride  # cells of the grid per cell of the masks
    height, width = masks.shape[1:]
    rows, columns = (torch.arange(n, device=masks.device) + 0.5 for n in (height, width))
    mass = masks.sum((1, 2)).clamp(min=1e-6)
    y, x = (masks.sum(2) @ rows) / mass, (masks.sum(1) @ columns) / mass
    center = scale * torch.stack([x, y], 1)
    places = positions + 0.5
    extent = places.new_tensor([cells[1], cells[0]])
    inside = sample_targets(targets, places / extent, cells, stride)
    square = (places - center[:, None]).square().sum(2)
    deviation = mass * scale**2 / (4 * math.pi)
    # Objects between the tokens have shares near zero everywhere: still one token is theirs.
    weight = (inside + 1e-6).log() - square / (2 * deviation[:, None])
    return (weight - weight.amax(1, keepdim=True)).exp().amax(0)


def middle_loss(predictions: MaskPredictions, targets: Sequence[Targets]) -> Tensor:
    """Focal loss of the tokens that queries are made of, summed: their `middle_targets`.

    The focal loss for targets between 0 and 1 (quality focal loss): binary cross-entropy, weighted
    by the squared distance of probability and target.
    """
    tokens = predictions.middles
    assert tokens is not None
    places = tokens.positions.split(tokens.sizes)
    maps = predictions.masks()
    wanted = torch.cat(
        [
            middle_targets(target, positions, grid.shape[-2:], predictions.stride)
            for target, positions, grid in zip(targets, places, maps, strict=True)
        ]
    )
    logits = tokens.features[:, 0].float()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return ((logits.sigmoid() - wanted).square() * entropy).sum()


def _check(number: int, target: Targets, classes: int, cells: Sequence[int], stride: int) -> None:
    name = f"targets: image {number}"
    if len(target.classes) != len(target.masks):
        raise ValueError(f"{name} has {len(target.classes)} classes for {len(target.masks)} masks")
    if len(target.classes) == 0:
        return
    least, largest = int(target.classes.min()), int(target.classes.max())
    if least < 0 or largest >= classes:
        wrong = least if least < 0 else largest
        raise ValueError(f"{name} has class {wrong}, the head has {classes} classes")
    expected = [math.ceil(side * target.stride / stride) for side in target.masks.shape[1:]]
    if list(cells) != expected:
        raise ValueError(
            f"{name} has masks of {tuple(target.masks.shape[1:])} cells of {target.stride} pixels, "
            f"which does not fit the head's {tuple(cells)} cells of {stride} pixels"
        )


def _layer_sums(
    class_logits: Tensor,
    masks: Tensor | Sequence[Tensor],
    targets: Sequence[Targets],
    weights: LossWeights,
    generators: Sequence[torch.Generator],
    sampling: tuple[int, float, float],
    stride: int,
) -> Tensor:
    """(4,) cross-entropy of the classes and its weight, cross-entropy and dice of the masks."""
    nothing = class_logits.shape[2] - 1
    wanted = torch.full(class_logits.shape[:2], nothing, device=class_logits.device)
    mask_loss = dice = class_logits.new_zeros(())
    for image, (target, generator) in enumerate(zip(targets, generators, strict=True)):
        maps = masks[image]
        queries, chosen = match(
            class_logits[image], maps, target, weights, sampling[0], stride, generator
        )
        wanted[image, queries] = target.classes[chosen].to(wanted)
        if len(queries) == 0:
            mask_loss = mask_loss + 0 * maps.sum()  # keeps the masks in the graph
            continue
        logits = maps[queries].float()
        with torch.no_grad():
            at = uncertain_points(logits, *sampling, generator)
            some = replace(target, classes=target.classes[chosen], masks=target.masks[chosen])
            labels = sample_targets(some, at, maps.shape[-2:], stride)
        values = sample_points(logits, at)
        mask_loss = mask_loss + mask_cross_entropy(values, labels).sum()
        dice = dice + dice_loss(values, labels).sum()
    class_weights = class_logits.new_ones(nothing + 1)
    class_weights[nothing] = weights.no_object
    entropy = nn.functional.cross_entropy(
        class_logits.flatten(0, 1), wanted.flatten(), class_weights, reduction="sum"
    )
    return torch.stack([entropy, class_weights[wanted].sum(), mask_loss, dice])
