"""Models on pictures: whole or in windows, as they are or in scaled and mirrored copies; on points:
whole or in regions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pointformer import TokenSet
from pointformer._checks import check_count, describe
from pointformer.data import Picture, Reading
from pointformer.data.transforms import Resize, resized
from pointformer.models import Model, Output
from pointformer.models.inference import evaluating
from pointformer.segmentation.regions import Region, Regions, blend_regions
from pointformer.segmentation.tiling import Tile, windows_of
from pointformer.tasks import TASKS, Task

_BYTES_PER_PIXEL = 300  # at the least: 430 were measured with the smallest model, on 2048 x 2048


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 array to a (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, 2, 0)))


def windows_for(
    model: Model,
    picture: Picture,
    tile: int | None = None,
    overlap: int | None = None,
    resize: Resize | None = None,
) -> list[Tile]:
    """The windows of a picture that a model is to see, see `windows_of`.

    Args:
        tile: in pixels of what the model sees.
        resize: see `predict`.

    Raises:
        ValueError: the tile or the overlap cannot be, or a window needs more memory than the
            machine has: systems end a program that takes more, unasked.
    """
    down, right = _magnification(picture, resize)
    if tile is not None and resize is not None:
        check_count("tile", tile)
        tile = max(1, round(tile / max(down, right)))
    windows = windows_of(*picture.shape, tile, overlap)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not on_cpu or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return windows
    height, width = _seen_size(windows[0], (down, right))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if height * width * _BYTES_PER_PIXEL > memory:
        raise ValueError(
            f"{picture.name}: {height} x {width} pixels at once need more than "
            f"{height * width * _BYTES_PER_PIXEL / 2**30:.0f} GiB, the machine has "
            f"{memory / 2**30:.0f}; use a tile (--tile), or a smaller one"
        )
    return windows


def predict(
    model: Model,
    task: Task,
    picture: Picture,
    windows: Sequence[Tile],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    min_score: float | None = None,
    resize: Resize | None = None,
) -> tuple[Any, tuple[int, ...]]:
    """Run a model, in eval mode, on the windows of a picture and join its predictions.

    Args:
        task: of the model.
        picture: what is found is in its pixels.
        windows: that it is seen in, one at a time; see `windows_for`.
        scales: sides of copies over those of the picture, whose predictions are averaged.
        flip: also average over mirrored copies.
        min_score: see `Task.decode`.
        resize: the model sees the picture in this size, each window its part of it. `None`: as it
            is.

    Returns:
        The task's prediction for the whole picture; and the tokens in each stage of the backbone,
        summed over windows and copies.

    Raises:
        ValueError: a scale is not positive, or the task cannot average.
    """
    check_copies(task, scales, flip)
    device = next(model.parameters()).device
    tokens: list[list[int]] = []
    magnification = _magnification(picture, resize)

    def look(image: Tensor, size: tuple[int, int]) -> Any:
        output, stages = model(image, with_stages=True)
        tokens.append([stage.tokens.num_tokens for stage in stages])
        del stages
        seen = (int(image.shape[2]), int(image.shape[3]))
        wanted = None if seen == size else [size]
        (found,) = task.decode(output, [seen], wanted, min_score=min_score)
        return found

    def parts() -> Iterator[Any]:
        for window in windows:
            pixels = picture[window.window]
            if resize is not None:
                size = _seen_size(window, magnification)
                pixels = resized(pixels, size, resize.interpolation)
            image = model.preprocess(to_tensor(pixels).to(device))[None]
            copies = [
                (look(copy.flip(3) if mirrored else copy, window.size), mirrored)
                for copy in _scaled(image, scales)
                for mirrored in ((False, True) if flip else (False,))
            ]
            yield copies[0][0] if len(copies) == 1 else task.average(copies)

    with evaluating(model):
        found = task.join(picture.shape, windows, parts())
    return found, tuple(sum(stage) for stage in zip(*tokens, strict=True))


def predict_points(
    model: Model,
    task: Task,
    points: TokenSet,
    region: int | None = None,
    *,
    progress: Callable[[Regions], Iterable[Region]] = iter,
) -> Any:
    """Run a model, in eval mode, on a point set of one sample, whole or in regions.

    Args:
        task: of the model.
        region: points that the model sees at once, if there are more: in overlapping `Regions`,
            whose scores are averaged. `None`: as in its training (`RandomRegion`); all, if it was
            not trained on regions.
        progress: goes through the regions, for example with a bar (`tqdm`).

    Returns:
        The task's prediction for all points.

    Raises:
        ValueError: `region` is given for a task that has one prediction for the whole.
    """
    by_point = task.output is Output.POINT_CLASSES
    if region is not None and not by_point:
        raise ValueError(f"region: the task {task.name!r} is about whole point sets; leave it out")
    size = region_of(model) if region is None and by_point else region
    with evaluating(model):
        if size is None:
            return predict_sets(model, task, [points])[0]
        points = points.input_order()
        parts = progress(Regions(points, size))
        regions = ((part, _seen(model, part.tokens)) for part in parts)
        scores = blend_regions(points.num_tokens, regions)
        (found,) = task.decode(scores, [(points.num_tokens, 1)])
    return found


def predict_sets(model: Model, task: Task, sets: Sequence[TokenSet]) -> list[Any]:
    """The task's predictions for whole point sets, of one sample each, that a model, in eval mode,
    sees at once."""
    with evaluating(model):
        output = _seen(model, TokenSet.cat(sets))
        return task.decode(output, [(points.num_tokens, 1) for points in sets])


def region_of(model: Model) -> int | None:
    """Points of the regions that a model was trained on, `None` if on whole sets or if it does not
    say."""
    found = recipe_value(model, "augmentation.points.region.points")
    return found if isinstance(found, int) else None


def reading_of(model: Model, given: Reading) -> Reading:
    """How a model's pictures are read: as given, and else as in its training."""
    reading = given.copy()
    if given.get("channel") is None:
        reading["channel"] = recipe_value(model, "data.channel")
    if given.get("plane") is None and given.get("project") is None:  # which go together
        reading["plane"] = recipe_value(model, "data.plane")
        reading["project"] = recipe_value(model, "data.project")
    return reading


def recipe_value(model: Model, field: str) -> Any:
    """A field of the recipe that `pointformer train` leaves in `Model.trained`, `None` where there
    is none."""
    found: Any = model.trained
    for key in ("recipe", *field.split(".")):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _seen(model: Model, points: TokenSet) -> Any:
    return model(model.preprocess(points.to(next(model.parameters()).device)))


def _magnification(picture: Picture, resize: Resize | None) -> tuple[float, float]:
    """Height and width of what the model sees, over those of the picture."""
    shape = picture.shape
    down, right = shape if resize is None else resize.size_of(shape)
    return down / shape[0], right / shape[1]


def _seen_size(window: Tile, magnification: tuple[float, float]) -> tuple[int, int]:
    """Height and width of a window as the model sees it."""
    height, width = (
        max(1, round(side * factor))
        for side, factor in zip(window.size, magnification, strict=True)
    )
    return height, width


def check_copies(task: Task, scales: Sequence[float], flip: bool) -> None:
    """Check that predictions of such copies can be averaged: queries of several do not correspond,
    and point sets have none.

    Raises:
        ValueError: they cannot, or a scale is not positive.
    """
    listed = scales.tolist() if isinstance(scales, np.ndarray) else scales
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise TypeError(f"scales: expected positive numbers, got {describe(scales)}")
    known = [type(scale) in (int, float) and 0 < scale < math.inf for scale in listed]
    if not known or not all(known):
        raise ValueError(f"scales: expected positive numbers, got {tuple(listed)}")
    if not task.averages and (flip or tuple(scales) != (1.0,)):
        averaging = dict.fromkeys(kind.name for kind in TASKS if kind.averages)
        raise ValueError(
            f"scales, flip: only for the tasks {', '.join(averaging)}, not for {task.name!r}"
        )


def _scaled(image: Tensor, scales: Sequence[float]) -> Iterator[Tensor]:
    """An image (1, C, H, W) in other sizes."""
    height, width = image.shape[2:]
    for scale in scales:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        if size == (height, width):
            yield image
        else:
            yield nn.functional.interpolate(
                image, size, mode="bilinear", align_corners=False, antialias=scale < 1
            )
