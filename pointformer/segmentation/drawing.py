"""Drawings of predictions and tokens: outlined objects, tokens kept, importance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pointformer.models.backbone import StageOutput

if TYPE_CHECKING:
    from pointformer.annotations import Category
    from pointformer.segmentation.segment import Segmentation

GAP, CAPTION, PANEL = 8, 24, 400
# Dark to light and evenly spaced in lightness, so that it reads in gray as well.
_HEAT = np.array(
    [(8, 4, 40), (72, 16, 110), (152, 38, 110), (222, 74, 70), (250, 150, 30), (252, 244, 160)]
)


def caption_font() -> Any:
    """Of captions and legends."""
    return ImageFont.load_default(14)


def outline(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the image with the rim of every object of `labels` (H, W) colored."""
    from skimage.segmentation import find_boundaries

    picture = image.copy()
    rim = find_boundaries(labels, mode="inner")
    ids = labels[rim]
    # Hues a golden ratio apart, so that neighboring ids differ.
    hue = (ids * 0.61803398875) % 1.0
    phase = hue[:, None] * 6 + np.array([5.0, 3.0, 1.0])
    color = 1 - np.clip(np.minimum(phase % 6, 4 - phase % 6), 0, 1)
    picture[rim] = (80 + 175 * color).astype(np.uint8)
    return picture


def overlay(result: Segmentation) -> Image.Image:
    """Draw the result of `segment`: outlines, colors and a legend where classes have names."""
    picture = result.image
    if result.categories is None:
        return Image.fromarray(outline(picture, result.labels))
    colors = np.array([(0, 0, 0), *(result.categories[c].color for c in result.classes)])
    tinted = picture * 0.5 + colors[result.labels] * 0.5
    picture = np.where(result.labels[..., None] > 0, tinted, picture).astype(np.uint8)
    picture = outline(picture, result.labels)
    shown = [result.categories[number] for number in sorted(set(result.classes))]
    return with_legend(Image.fromarray(picture), shown)


def with_legend(picture: Image.Image, categories: Sequence[Category]) -> Image.Image:
    """The picture above a row of color keys, in as many lines as its width needs."""
    font = caption_font()
    places, x, y, widest = [], GAP, GAP, picture.width
    for category in categories:
        width = 20 + round(font.getlength(category.name)) + 2 * GAP
        if x + width > picture.width and x > GAP:
            x, y = GAP, y + 20
        places.append((x, y))
        x += width
        widest = max(widest, GAP + width)  # of one that is wider than the picture, too
    height = y + 20 + GAP if categories else 0
    sheet = Image.new("RGB", (widest, picture.height + height), "white")
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for (x, y), category in zip(places, categories, strict=True):
        y += picture.height
        draw.rectangle((x, y + 2, x + 14, y + 16), fill=category.color, outline="black")
        draw.text((x + 20, y), category.name, "black", font)
    return sheet


def heat(values: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 colors for values in [0, 1]."""
    at = np.linspace(0, 1, len(_HEAT))
    values = np.clip(values, 0, 1)
    return np.stack([np.interp(values, at, _HEAT[:, c]) for c in range(3)], -1).astype(np.uint8)


def focus_picture(image: np.ndarray, stages: list[StageOutput], stride: int) -> Image.Image:
    """Draw the tokens that an AFF kept and their scores, as in Figure 1 of the paper.

    Top row: the image, then the tokens that each merge kept, as red dots. Bottom row: a legend, and
    under each merge the importance scores (0 to 1) that decided it, nearest token per cell.

    Args:
        image: (H, W, 3) uint8.
        stages: the backbone's output for this one image.
        stride: pixels per cell of the first stage's grid.
    """
    height, width = image.shape[:2]
    scale = PANEL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    photo = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    total = stages[0].tokens.num_tokens
    top = [(photo, f"input, {width} x {height} px")]
    bottom = [(heat_legend(size), "importance")]
    for number, (before, after) in enumerate(itertools.pairwise(stages), 1):
        kept = after.tokens
        share = 100 * kept.num_tokens / total
        dots = _dots(photo, kept.positions.cpu().numpy(), stride * scale)
        top.append((dots, f"kept by merge {number}: {kept.num_tokens} tokens ({share:.1f}%)"))
        if before.scores is not None:
            scores = _nearest(before, stages[0])
            cells = Image.fromarray(heat(scores)).resize(
                (round(scores.shape[1] * stride * scale), round(scores.shape[0] * stride * scale)),
                Image.Resampling.NEAREST,
            )
            bottom.append((cells.crop((0, 0, *size)), f"scores of stage {number}"))
    return panels([top, bottom], size)


def _dots(photo: Image.Image, positions: np.ndarray, pitch: float) -> Image.Image:
    """The photo, dimmed, with a dot at the middle of each token's cell."""
    picture = Image.blend(photo, Image.new("RGB", photo.size, (16, 16, 24)), 0.35)
    draw = ImageDraw.Draw(picture)
    radius = float(np.clip(pitch * 0.3, 0.5, 2.5))
    for x, y in (positions + 0.5) * pitch:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 60, 50))
    return picture


def _nearest(stage: StageOutput, first: StageOutput) -> np.ndarray:
    """(h, w) score of the nearest token for every cell of the first stage's grid."""
    from pointformer import interpolate

    assert stage.scores is not None
    cells = interpolate(
        stage.scores[:, None].float(), stage.tokens.positions, first.tokens.positions, k=1
    )
    grid = first.tokens.with_features(cells).to_grid()
    assert isinstance(grid, torch.Tensor)
    return grid[0, 0].cpu().numpy()


def heat_legend(size: tuple[int, int]) -> Image.Image:
    """The colors of `heat` from 0 to 1."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    width = max(1, size[0] - 2 * GAP)
    bar = heat(np.tile(np.linspace(0, 1, width), (20, 1)))
    picture.paste(Image.fromarray(bar), (GAP, GAP))
    font = caption_font()
    draw.text((GAP, GAP + 24), "0", "black", font)
    draw.text((size[0] - GAP, GAP + 24), "1", "black", font, anchor="ra")
    return picture


def panels(rows: list[list[tuple[Image.Image, str]]], size: tuple[int, int]) -> Image.Image:
    """Pictures of one size, (width, height) in pixels, with captions, in rows."""
    columns = max(len(row) for row in rows)
    font = caption_font()
    widest = max(font.getlength(caption) for row in rows for _, caption in row)
    step = (max(size[0], math.ceil(widest)) + GAP, size[1] + CAPTION + GAP)
    sheet = Image.new("RGB", (columns * step[0] + GAP, len(rows) * step[1] + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (panel, caption) in enumerate(row):
            left, upper = GAP + c * step[0], GAP + r * step[1]
            draw.text((left, upper), caption, "black", font)
            sheet.paste(panel, (left, upper + CAPTION))
    return sheet
