"""Pictures of point clouds: from above and from the side, with classes or tokens in color."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from pointformer.annotations import VOID
from pointformer.segmentation.drawing import (
    CAPTION,
    GAP,
    PANEL,
    caption_font,
    heat,
    heat_legend,
    panels,
    with_legend,
)
from pointformer.segmentation.regions import range_of

if TYPE_CHECKING:
    from pointformer import TokenSet
    from pointformer.annotations import Category
    from pointformer.segmentation.clouds import KeptPoints, SegmentedCloud

_SIDE = 1200  # pixels of the longer side
_LEAST = 240  # pixels of the shorter one at the least
_WHITE, _GRAY, _RED = (255, 255, 255), (150, 150, 150), (255, 60, 50)


class View:
    """Points seen along an axis, on a canvas of their own proportions.

    Points nearer to the eye hide those behind them, and are larger where there are few. The canvas
    is fitted to nearly all of the points: a few far away do not make the others small, and are
    left out.

    Args:
        across, up, toward: (n,) coordinates to the right, upward and toward the eye.
        side: pixels of the longer side.
        least: pixels that the shorter one has at least; `stretch` tells how that is done.
    """

    def __init__(
        self,
        across: np.ndarray,
        up: np.ndarray,
        toward: np.ndarray,
        side: int = _SIDE,
        least: int = _LEAST,
    ) -> None:
        (left, right), (bottom, top) = range_of(across), range_of(up)
        longest = max(right - left, top - bottom) or 1.0
        width, height = (max(1, round(side * d / longest)) for d in (right - left, top - bottom))
        self.stretch = 1.0
        """By how much lengths upward are longer than those across."""
        scale = side / longest
        self._corner, self._scale = (left, top), (scale, scale)
        self.size = max(width, least), max(height, least)
        self._margin = (self.size[0] - width) / 2, (self.size[1] - height) / 2
        if height < least and top > bottom:
            self.stretch = least * longest / (side * (top - bottom))
            self._scale, self._margin = (scale, scale * self.stretch), (self._margin[0], 0.0)
        self._ends = (right, bottom)
        columns, rows, inside = self.pixels(across, up)
        order = np.argsort(toward, kind="stable")
        order = order[inside[order]]
        self.outside = len(across) - len(order)
        """How many points lie outside of the canvas."""
        self.shown = self._nearest(columns[order], rows[order], order)
        """(height, width) int64: the point that is seen in each pixel, -1 for none."""

    def pixels(
        self, across: np.ndarray, up: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Columns and rows, int64, of points, and (n,) bool whether they are on the canvas."""
        (left, top), (right, bottom) = self._corner, self._ends
        inside = (left <= across) & (across <= right) & (bottom <= up) & (up <= top)
        x = (np.clip(across, left, right) - left) * self._scale[0] + self._margin[0]
        y = (top - np.clip(up, bottom, top)) * self._scale[1] + self._margin[1]
        # The far edges belong to the last pixels.
        columns = np.minimum(x.astype(np.int64), self.size[0] - 1)
        rows = np.minimum(y.astype(np.int64), self.size[1] - 1)
        return columns, rows, inside

    def _nearest(self, columns: np.ndarray, rows: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Disks around points, which are in the order from back to front."""
        width, height = self.size
        pitch = np.sqrt(width * height / max(1, len(points)))
        radius = float(np.clip(0.75 * pitch, 0.5, 5.0))
        reach = int(radius)
        front = np.full((height + 2 * reach, width + 2 * reach), -1, np.int64)
        turns = np.arange(len(points))
        for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
            if down * down + right * right <= radius * radius:
                layer = np.full(front.shape, -1, np.int64)
                # Of points in one pixel the last stays, which is the nearest.
                layer[rows + down + reach, columns + right + reach] = turns
                np.maximum(front, layer, out=front)
        front = front[reach : reach + height, reach : reach + width]
        return np.where(front >= 0, points[front], -1) if len(points) else front

    def draw(self, colors: np.ndarray, paper: tuple[int, int, int] = _WHITE) -> Image.Image:
        """The points in (n, 3) uint8 colors, on paper of a color."""
        table = np.concatenate([colors, np.array([paper], np.uint8)])
        return Image.fromarray(table[self.shown])


def above(positions: np.ndarray, side: int = _SIDE, least: int = _LEAST) -> View:
    """Points (n, D) from above, x to the right and y upward."""
    toward = positions[:, 2] if positions.shape[1] > 2 else np.zeros(len(positions))
    return View(positions[:, 0], positions[:, 1], toward, side, least)


def beside(positions: np.ndarray) -> View:
    """Points (n, 3) from the side: from the south, or the east if they reach further that way."""
    x, y, z = positions.T
    (left, right), (near, far) = range_of(x), range_of(y)
    return View(x, z, -y) if right - left >= far - near else View(y, z, x)


def cloud_pictures(result: SegmentedCloud) -> dict[str, Image.Image]:
    """The result of `segment_points` from "above" and, in 3-D, from the "side": points in the
    colors of their classes, the higher the brighter, with a legend."""
    positions = result.tokens.positions.cpu().numpy()
    colors = np.array([c.color for c in result.categories], np.uint8)
    shown = [c for c, n in zip(result.categories, result.counts(), strict=True) if n]
    views = {"above": above(positions)}
    if positions.shape[1] > 2:
        views["side"] = beside(positions)
    heights = positions[:, -1]
    pictures = {}
    for name, view in views.items():
        picture = view.draw(_shaded(colors[result.classes], heights))
        words = [f"{len(positions):,} points from {'above' if name == 'above' else 'the side'}"]
        words.append("the higher the brighter")
        if view.stretch > 1:
            words.append(f"heights {view.stretch:.1f} times as long")
        if view.outside:
            words.append(f"without {view.outside} far away")
        pictures[name] = with_legend(_captioned(picture, ", ".join(words)), shown)
    return pictures


def cloud_from_above(
    tokens: TokenSet, classes: np.ndarray | None = None, categories: Sequence[Category] = ()
) -> np.ndarray:
    """(H, W, 3) uint8 of points in the colors of their classes (n,), gray where these are void or
    not given, the higher the brighter."""
    positions = tokens.positions.cpu().numpy()
    colors = np.array([*(c.color for c in categories), _GRAY], np.uint8)
    if classes is None:
        classes = np.full(len(positions), VOID)
    rows = np.where(classes == VOID, len(categories), classes)
    return np.array(above(positions).draw(_shaded(colors[rows], positions[:, -1])))


def _shaded(colors: np.ndarray, heights: np.ndarray) -> np.ndarray:
    low, high = range_of(heights)
    share = np.clip((heights - low) / ((high - low) or 1.0), 0, 1)[:, None].astype(np.float32)
    return (colors * (0.65 + 0.35 * share)).astype(np.uint8)


def _captioned(picture: Image.Image, text: str) -> Image.Image:
    font = caption_font()
    width = max(picture.width, math.ceil(font.getlength(text)))
    sheet = Image.new("RGB", (width + 2 * GAP, picture.height + GAP + CAPTION), "white")
    ImageDraw.Draw(sheet).text((GAP, GAP - 2), text, "black", font)
    sheet.paste(picture, (GAP, GAP + CAPTION - 4))
    return sheet


def focus_cloud(tokens: TokenSet, stages: Sequence[KeptPoints]) -> Image.Image:
    """Draw the points that a model kept and their scores, from above, like `focus_picture`.

    Args:
        tokens: the cloud.
        stages: see `focus_points`.
    """
    from scipy.spatial import cKDTree

    positions = tokens.positions.cpu().numpy()
    view = above(positions, PANEL, PANEL // 4)
    gray = _shaded(np.full((len(positions), 3), 235, np.uint8), positions[:, -1])
    cloud = view.draw(gray)
    top = [(cloud, f"input, {len(positions):,} points")]
    bottom = [(heat_legend(view.size), "importance")]
    for number, (before, after) in enumerate(itertools.pairwise(stages), 1):
        count = len(after.rows)
        share = 100 * count / len(positions)
        dots = _dots(cloud, view, positions[after.rows])
        top.append((dots, f"kept by merge {number}: {count:,} tokens ({share:.1f}%)"))
        if before.scores is not None:
            _, near = cKDTree(positions[before.rows]).query(positions)
            colors = heat(before.scores[near])
            bottom.append((view.draw(colors, _GRAY), f"scores of stage {number}"))
    return panels([top, bottom], view.size)


def _dots(cloud: Image.Image, view: View, positions: np.ndarray) -> Image.Image:
    """The cloud, dimmed, with a dot at each token."""
    picture = Image.blend(cloud, Image.new("RGB", cloud.size, (16, 16, 24)), 0.6)
    draw = ImageDraw.Draw(picture)
    pitch = np.sqrt(picture.width * picture.height / max(1, len(positions)))
    radius = int(np.clip(pitch * 0.25, 0, 2))
    columns, rows, inside = view.pixels(positions[:, 0], positions[:, 1])
    for x, y in zip(columns[inside].tolist(), rows[inside].tolist(), strict=True):
        if radius:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_RED)
        else:
            draw.point((x, y), fill=_RED)
    return picture
