"""Pictures of what a model did: outlined objects, tokens kept, importance."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pointformer.models.aff import StageOutput

_GAP, _CAPTION, _PANEL = 8, 24, 400
# Dark to light and evenly spaced in lightness, so that it reads in grey as well.
_HEAT = np.array(
    [(8, 4, 40), (72, 16, 110), (152, 38, 110), (222, 74, 70), (250, 150, 30), (252, 244, 160)]
)


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


def heat(values: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 colors for values in [0, 1]."""
    at = np.linspace(0, 1, len(_HEAT))
    values = np.clip(values, 0, 1)
    return np.stack([np.interp(values, at, _HEAT[:, c]) for c in range(3)], -1).astype(np.uint8)


def focus_picture(image: np.ndarray, stages: list[StageOutput], stride: int) -> Image.Image:
    """What an AFF looked at, as in Figure 1 of the paper.

    Top row: the image, then the tokens that each merge kept, as red dots. Bottom row: a legend, and
    under each merge the importance scores (0 to 1) that decided it, nearest token per cell.

    Args:
        image: (H, W, 3) uint8.
        stages: the backbone's output for this one image.
        stride: pixels per cell of the first stage's grid.
    """
    height, width = image.shape[:2]
    scale = _PANEL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    photo = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    total = stages[0].tokens.num_tokens
    top = [(photo, f"input, {width} x {height} px")]
    bottom = [(_legend(size), "importance")]
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
    return _table([top, bottom], size)


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


def _legend(size: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    width = max(1, size[0] - 2 * _GAP)
    bar = heat(np.tile(np.linspace(0, 1, width), (20, 1)))
    picture.paste(Image.fromarray(bar), (_GAP, _GAP))
    font = ImageFont.load_default(14)
    draw.text((_GAP, _GAP + 24), "0", "black", font)
    draw.text((size[0] - _GAP, _GAP + 24), "1", "black", font, anchor="ra")
    return picture


def _table(rows: list[list[tuple[Image.Image, str]]], size: tuple[int, int]) -> Image.Image:
    """Panels with captions, in rows."""
    columns = max(len(row) for row in rows)
    step = (size[0] + _GAP, size[1] + _CAPTION + _GAP)
    sheet = Image.new("RGB", (columns * step[0] + _GAP, len(rows) * step[1] + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for r, row in enumerate(rows):
        for c, (panel, caption) in enumerate(row):
            left, upper = _GAP + c * step[0], _GAP + r * step[1]
            draw.text((left, upper), caption, "black", font)
            sheet.paste(panel, (left, upper + _CAPTION))
    return sheet
