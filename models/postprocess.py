"""From classes and masks of queries to semantic maps, instances and panoptic segments.

Thresholds are Mask2Former's published ones. Masks are upsampled bilinearly from the finest grid to
the padded image, cropped to the image, and then resized to `output_sizes` where given.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pointformer.annotations import Segment
from pointformer.models.mask2former import MaskPredictions

Sizes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Instances:
    """Objects of one image, best first; their masks may overlap.

    Attributes:
        masks: (N, H, W) bool.
        classes: (N,) int64.
        scores: (N,) float32, class probability times the mask's mean probability inside.
    """

    masks: Tensor
    classes: Tensor
    scores: Tensor

    def boxes(self) -> Tensor:
        """(N, 4) int64 x0, y0, x1, y1, ends exclusive; zeros for an empty mask."""
        boxes = torch.zeros(len(self.masks), 4, dtype=torch.int64, device=self.masks.device)
        for n, mask in enumerate(self.masks):
            columns, rows = mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]
            if len(rows):
                ends = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                boxes[n] = torch.stack(ends)
        return boxes

    def confident(self, min_score: float = 0.5) -> Instances:
        """Those with at least this score."""
        kept = self.scores >= min_score
        return Instances(self.masks[kept], self.classes[kept], self.scores[kept])

    def painted(self) -> Panoptic:
        """A map without overlaps, better objects on top of worse ones; hidden ones are left out."""
        size = self.masks.shape[1:]
        owner = torch.zeros(size, dtype=torch.int64, device=self.masks.device)
        for n in reversed(range(len(self.masks))):
            owner[self.masks[n]] = n + 1
        areas = torch.bincount(owner.flatten(), minlength=len(self.masks) + 1)[1:]
        visible = areas > 0
        number = torch.cat([visible.new_zeros(1), visible.cumsum(0) * visible])
        segments = [
            Segment(
                int(number[n + 1]), int(self.classes[n]), int(area), score=float(self.scores[n])
            )
            for n, area in enumerate(areas)
            if area > 0
        ]
        return Panoptic(number[owner].int(), tuple(segments))


@dataclass(frozen=True)
class Panoptic:
    """Segments of one image that do not overlap.

    Attributes:
        ids: (H, W) int32, 0 where there is no segment.
        segments: one for each id; `area` in pixels, `score` of the best query in it.
    """

    ids: Tensor
    segments: tuple[Segment, ...]


def image_masks(
    predictions: MaskPredictions, image_sizes: Sizes, output_sizes: Sizes | None = None
) -> list[Tensor]:
    """Mask logits per image: (Q, H, W), `image_sizes` being (H, W) of the images the model saw."""
    resized = []
    for number, (maps, (height, width)) in enumerate(
        zip(predictions.masks(), image_sizes, strict=True)
    ):
        stride = predictions.stride
        if tuple(maps.shape[-2:]) != (-(-height // stride), -(-width // stride)):
            raise ValueError(
                f"image_sizes: image {number} cannot be {height} x {width}, its masks have "
                f"{maps.shape[-2]} x {maps.shape[-1]} cells of {stride} x {stride} pixels"
            )
        padded = [stride * side for side in maps.shape[-2:]]
        maps = _resize(maps, padded)[..., :height, :width]
        if output_sizes is not None and tuple(output_sizes[number]) != (height, width):
            maps = _resize(maps, output_sizes[number])
        resized.append(maps)
    return resized


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    size = (int(size[0]), int(size[1]))
    if tuple(maps.shape[-2:]) == size:
        return maps
    return nn.functional.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def semantic_scores(
    predictions: MaskPredictions, image_sizes: Sizes, output_sizes: Sizes | None = None
) -> list[Tensor]:
    """Per image (K, H, W): each class's probability times mask probability, summed over queries.

    The label map is the argmax. Resizing to `output_sizes` comes last here, as published.
    """
    scores = []
    classes = predictions.class_logits.softmax(2)[..., :-1]
    for number, maps in enumerate(image_masks(predictions, image_sizes)):
        score = torch.einsum("qk,qhw->khw", classes[number], maps.sigmoid())
        if output_sizes is not None:
            score = _resize(score, output_sizes[number])
        scores.append(score)
    return scores


def instances(
    predictions: MaskPredictions,
    image_sizes: Sizes,
    output_sizes: Sizes | None = None,
    *,
    top: int | None = 100,
    min_score: float = 0.0,
    things: Collection[int] | None = None,
) -> list[Instances]:
    """The `top` pairs of query and class per image as objects.

    Args:
        top: as published, for COCO; `None`: as many as there are queries, if that is more.
        min_score: leave out objects with a smaller score.
        things: the classes that are countable; all if `None`. Others are left out.
    """
    found = []
    for number, maps in enumerate(image_masks(predictions, image_sizes, output_sizes)):
        probability = predictions.class_logits[number].softmax(1)[:, :-1]
        classes = probability.shape[1]
        most = max(100, len(probability)) if top is None else top
        scores, pair = probability.flatten().topk(min(most, probability.numel()))
        query, category = pair // classes, pair % classes
        if things is not None:
            kept = torch.isin(category, torch.tensor(sorted(things), device=category.device))
            query, category, scores = query[kept], category[kept], scores[kept]
        logits = maps[query]
        masks = logits > 0
        inside = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
        scores = scores * inside
        order = scores.argsort(descending=True, stable=True)
        order = order[(scores[order] >= min_score) & masks[order].flatten(1).any(1)]
        found.append(Instances(masks[order], category[order], scores[order]))
    return found


def panoptic(
    predictions: MaskPredictions,
    image_sizes: Sizes,
    output_sizes: Sizes | None = None,
    *,
    things: Collection[int],
    min_score: float = 0.8,
    min_visible: float = 0.8,
) -> list[Panoptic]:
    """Segments that do not overlap; those of one class that is not in `things` are joined.

    Args:
        things: the classes that are countable.
        min_score: queries need a class with at least this probability.
        min_visible: a segment is dropped if less than this share of its mask is left to it.
    """
    results = []
    for number, maps in enumerate(image_masks(predictions, image_sizes, output_sizes)):
        probability, category = predictions.class_logits[number].softmax(1).max(1)
        nothing = predictions.class_logits.shape[2] - 1
        kept = (category != nothing) & (probability > min_score)
        probability, category, masks = probability[kept], category[kept], maps[kept].sigmoid()
        ids = torch.zeros(maps.shape[-2:], dtype=torch.int32, device=maps.device)
        segments: list[Segment] = []
        joined: dict[int, int] = {}  # class to place in segments
        if len(masks):
            owner = (probability[:, None, None] * masks).argmax(0)
            for query in range(len(masks)):
                mask = masks[query] >= 0.5
                visible, whole = owner == query, int(mask.sum())
                area = int(visible.sum())
                visible &= mask
                size = int(visible.sum())
                if size == 0 or area / whole < min_visible:
                    continue
                label, score = int(category[query]), float(probability[query])
                if label in joined:
                    place = joined[label]
                    first = segments[place]
                    ids[visible] = first.id
                    best = max(first.score, score)
                    segments[place] = Segment(first.id, label, first.area + size, score=best)
                    continue
                if label not in things:
                    joined[label] = len(segments)
                ids[visible] = len(segments) + 1
                segments.append(Segment(len(segments) + 1, label, size, score=score))
        results.append(Panoptic(ids, tuple(segments)))
    return results
