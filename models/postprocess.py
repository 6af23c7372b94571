"""From classes and masks of queries to semantic maps, instances and panoptic segments.

Thresholds are Mask2Former's published ones. Masks are upsampled bilinearly from the finest grid to
the padded image, cropped to the image, and then resized to `output_sizes` where given.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Sized

import torch
from torch import Tensor, nn

from pointformer.annotations import Mask, Objects, Segment, SegmentMap
from pointformer.models.mask2former import MaskPredictions

Sizes = Sequence[tuple[int, int]]
_AT_ONCE = 16  # masks of whole images


def image_masks(
    predictions: MaskPredictions, image_sizes: Sizes, output_sizes: Sizes | None = None
) -> list[Tensor]:
    """Mask logits per image: (Q, H, W), `image_sizes` being (H, W) of the images the model saw."""
    stride = predictions.stride
    cells = _cells(predictions, image_sizes)
    _check_one_each("output_sizes", output_sizes, len(cells))
    wanted: Sequence[tuple[int, int] | None] = (
        [None] * len(cells) if output_sizes is None else output_sizes
    )
    return [
        _on_image(maps, stride, image_size, output_size)
        for maps, image_size, output_size in zip(cells, image_sizes, wanted, strict=True)
    ]


def _cells(predictions: MaskPredictions, image_sizes: Sizes) -> list[Tensor]:
    """Mask logits per image on the finest grid's cells, (Q, h, w), which `image_sizes` must fit."""
    cells, stride = predictions.masks(), predictions.stride
    _check_one_each("image_sizes", image_sizes, len(cells))
    for number, (maps, (height, width)) in enumerate(zip(cells, image_sizes, strict=True)):
        if tuple(maps.shape[-2:]) != (-(-height // stride), -(-width // stride)):
            raise ValueError(
                f"image_sizes: image {number} cannot be {height} x {width}, its masks have "
                f"{maps.shape[-2]} x {maps.shape[-1]} cells of {stride} x {stride} pixels"
            )
    return list(cells)


def _check_one_each(name: str, sizes: Sized | None, images: int) -> None:
    if sizes is not None and len(sizes) != images:
        raise ValueError(f"{name}: expected one for each of {images} images, got {len(sizes)}")


def _on_image(
    maps: Tensor, stride: int, image_size: tuple[int, int], output_size: tuple[int, int] | None
) -> Tensor:
    """(Q, h, w) logits of cells as (Q, H, W) of the image's pixels, or of the output's."""
    height, width = image_size
    maps = _resize(maps, [stride * side for side in maps.shape[-2:]])[..., :height, :width]
    return maps if output_size is None else _resize(maps, output_size)


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
    _check_one_each("output_sizes", output_sizes, len(classes))
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
) -> list[Objects]:
    """The `top` pairs of query and class per image as objects, best first.

    Their score is the class probability times the mean mask probability inside.

    Args:
        top: as published, for COCO; `None`: as many as there are queries, if that is more.
        min_score: leave out objects with a smaller score.
        things: the classes that are countable; all if `None`. Others are left out.
    """
    found = []
    sizes = image_sizes if output_sizes is None else output_sizes
    _check_one_each("output_sizes", output_sizes, len(image_sizes))
    for number, cells in enumerate(_cells(predictions, image_sizes)):
        probability = predictions.class_logits[number].softmax(1)[:, :-1]
        classes = probability.shape[1]
        most = max(100, len(probability)) if top is None else top
        scores, pair = probability.flatten().topk(min(most, probability.numel()))
        query, category = pair // classes, pair % classes
        if things is not None:
            kept = torch.isin(category, torch.tensor(sorted(things), device=category.device))
            query, category, scores = query[kept], category[kept], scores[kept]
        masks: dict[int, Mask] = {}
        inside = torch.zeros(len(probability), dtype=scores.dtype, device=scores.device)
        chosen = query.unique()
        for some in chosen.split(_AT_ONCE) if len(chosen) else ():
            target = None if output_sizes is None else output_sizes[number]
            logits = _on_image(cells[some], predictions.stride, image_sizes[number], target)
            pixels = logits > 0
            total = (logits.sigmoid() * pixels).flatten(1).sum(1)
            inside[some] = (total / (pixels.flatten(1).sum(1) + 1e-6)).to(inside.dtype)
            masks |= zip(some.tolist(), map(Mask.of, pixels.cpu()), strict=True)
        scores = scores * inside[query]
        order = scores.argsort(descending=True, stable=True)
        order = order[scores[order] >= min_score]
        places = [n for n in order.tolist() if masks[int(query[n])].area]
        found.append(
            Objects(
                [masks[int(query[n])] for n in places],
                category[places].cpu(),
                scores[places].float().cpu(),
                sizes[number],
            )
        )
    return found


def panoptic(
    predictions: MaskPredictions,
    image_sizes: Sizes,
    output_sizes: Sizes | None = None,
    *,
    things: Collection[int],
    min_score: float = 0.8,
    min_visible: float = 0.8,
) -> list[SegmentMap]:
    """Segments that do not overlap; those of one class that is not in `things` are joined.

    Their score is that of the best query in them.

    Args:
        things: the classes that are countable.
        min_score: queries need a class with more than this probability.
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
                    ids[visible] = int(first.id)
                    best = max(first.score, score)
                    segments[place] = Segment(first.id, label, first.area + size, score=best)
                    continue
                if label not in things:
                    joined[label] = len(segments)
                ids[visible] = len(segments) + 1
                segments.append(Segment(len(segments) + 1, label, size, score=score))
        results.append(SegmentMap(ids.cpu().numpy(), tuple(segments)))
    return results
