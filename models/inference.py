"""Running models on pictures: what they see, with test-time augmentation and in tiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pointformer.annotations import Objects, SegmentMap
from pointformer.models.mask2former import MaskPredictions
from pointformer.models.model import Model
from pointformer.models.postprocess import instances, panoptic, semantic_scores
from pointformer.tiling import default_overlap, windows_of


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode; after it, every part is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`eval_mode`, and nothing is recorded for gradients."""
    with eval_mode(model), torch.inference_mode():
        yield


@contextlib.contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Within it the model may run as in training; after it, its statistics and torch's random
    numbers on the CPU are as they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(random)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def predict(
    model: Model, image: Tensor, *, top: int | None = None, min_score: float | None = None
) -> Objects | SegmentMap | Tensor:
    """What a model sees in one image, in eval mode, by its task.

    Args:
        model: with a mask head and a task, or a dense head and the task "semantic".
        image: (3, H, W), normalized.
        top: see `instances`, for that task.
        min_score: objects and segments with less are left out; default 0 and 0.8.

    Returns:
        `Objects`, `SegmentMap`, or the class of each pixel, (H, W) int64.

    Raises:
        ValueError: the model has no task, or its head makes no masks.
    """
    with evaluating(model):
        predictions = model(image[None])
        if model.head_name == "dense" and model.task == "semantic":
            return predictions[0].argmax(0)
        if not isinstance(predictions, MaskPredictions) or model.task is None:
            raise ValueError(
                f"model: expected a mask head and a task, got {model.name} with head "
                f"{model.head_name!r} and task {model.task!r}"
            )
        sizes = [tuple(image.shape[1:])]
        if model.task == "semantic":
            return semantic_scores(predictions, sizes)[0].argmax(0)
        if model.task == "instance":
            return instances(
                predictions, sizes, top=top, min_score=min_score or 0.0, things=things_of(model)
            )[0]
        threshold = 0.8 if min_score is None else min_score
        return panoptic(predictions, sizes, things=things_of(model), min_score=threshold)[0]


def things_of(model: Model) -> list[int]:
    """The countable classes of a model; all of them where it has no category table."""
    if model.categories is None:
        return list(range(model.num_classes))
    return [number for number, category in enumerate(model.categories) if category.is_thing]


def predict_semantic(
    model: Model,
    image: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
) -> Tensor:
    """Class scores (K, H, W) of one image, averaged over scaled and mirrored copies and tiles.

    Args:
        model: with a mask head, or a dense head whose scores are then class probabilities.
        image: (3, H, W), normalized.
        scales: sides of the copies over those of the image.
        flip: also look at mirrored copies.
        tile: side of the largest window in pixels of the image; `None` for the whole image at once.
            Scores of neighboring windows are blended over their overlap.
        overlap: of the windows, in pixels; `None`: 64, or half a window if that is less.

    Raises:
        ValueError: a scale or the tile is not positive, or the overlap not less than the tile.
    """
    if min(scales) <= 0:
        raise ValueError(f"scales: expected positive numbers, got {tuple(scales)}")
    _, height, width = image.shape
    windows = windows_of(height, width, tile, overlap)
    blended = overlap if overlap is not None else default_overlap(tile)
    total: Tensor | None = None
    weights = image.new_zeros(height, width)
    with evaluating(model):
        for window in windows:
            rows, columns = window.window
            scores = _augmented(model, image[:, rows, columns], scales, flip)
            fade = _fade(*scores.shape[1:], blended, scores) if len(windows) > 1 else 1.0
            if total is None:
                total = scores.new_zeros(len(scores), height, width)
            total[:, rows, columns] += scores * fade
            weights[rows, columns] += fade
        assert total is not None
        return total / weights


def _augmented(model: Model, image: Tensor, scales: Sequence[float], flip: bool) -> Tensor:
    height, width = image.shape[1:]
    copies = []
    for scale in scales:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        scaled = image[None]
        if size != (height, width):
            scaled = nn.functional.interpolate(
                scaled, size, mode="bilinear", align_corners=False, antialias=scale < 1
            )
        for mirrored in (False, True) if flip else (False,):
            output = model(scaled.flip(3) if mirrored else scaled)
            if isinstance(output, MaskPredictions):
                (scores,) = semantic_scores(output, [size], [(height, width)])
            else:
                scores = nn.functional.interpolate(
                    output.softmax(1), (height, width), mode="bilinear", align_corners=False
                )[0]
            copies.append(scores.flip(2) if mirrored else scores)
    return torch.stack(copies).mean(0)


def _fade(height: int, width: int, overlap: int, like: Tensor) -> Tensor:
    """(H, W) weights that fall to the window's border, over the width of an overlap."""
    ramps = []
    for side in (height, width):
        steps = torch.arange(side, device=like.device, dtype=like.dtype) + 0.5
        ramps.append((torch.minimum(steps, side - steps) / max(overlap, 1)).clamp(max=1))
    return ramps[0][:, None] * ramps[1]
