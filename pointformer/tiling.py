"""Pictures larger than memory: overlapping tiles, and objects joined across them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tile:
    """A window of a picture, rows `top` to `bottom` and columns `left` to `right`, ends exclusive.

    Attributes:
        core: the part (top, left, bottom, right) that this tile decides: cores do not overlap and
            cover the picture; they end in the middle of the overlaps.
    """

    top: int
    left: int
    bottom: int
    right: int
    core: tuple[int, int, int, int]

    @property
    def window(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def tiles(height: int, width: int, size: int, overlap: int) -> list[Tile]:
    """Windows of at most `size` x `size` pixels that overlap by at least `overlap`, row by row.

    Raises:
        ValueError: the overlap is not less than the size.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"overlap: expected 0 to {size - 1} pixels for tiles of {size}: {overlap}")
    rows, columns = _spans(height, size, overlap), _spans(width, size, overlap)
    return [
        Tile(top, left, bottom, right, (first, start, last, end))
        for top, bottom, first, last in rows
        for left, right, start, end in columns
    ]


def default_overlap(tile: int | None) -> int:
    """64 pixels, or half a window if that is less."""
    return 64 if tile is None else min(64, tile // 2)


def windows_of(height: int, width: int, tile: int | None, overlap: int | None) -> list[Tile]:
    """`tiles` of a picture: one for all of it if `tile` is `None`; see `default_overlap`.

    Raises:
        ValueError: the tile is not positive, or the overlap not less than the tile.
    """
    if tile is None:
        return tiles(height, width, max(height, width), 0)
    if tile < 1:
        raise ValueError(f"tile: expected at least 1 pixel, got {tile}")
    return tiles(height, width, tile, default_overlap(tile) if overlap is None else overlap)


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Begin and end of each window along one axis, and of the part that it decides."""
    if length <= size:
        return [(0, length, 0, length)]
    count = -(-(length - overlap) // (size - overlap))
    begins = [round(i * (length - size) / (count - 1)) for i in range(count)]
    middles = [(begin + before + size) // 2 for before, begin in itertools.pairwise(begins)]
    bounds = [0, *middles, length]
    return [(begins[i], begins[i] + size, bounds[i], bounds[i + 1]) for i in range(count)]


def stitch(
    shape: tuple[int, int],
    parts: Sequence[tuple[Tile, np.ndarray, Sequence[int]]],
    agreement: float = 0.5,
    uncountable: Collection[int] = (),
) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
    """One map of ids from those of overlapping tiles.

    Two objects of different tiles are the same one if they have the same category and, where the
    tiles overlap, an intersection over union of at least `agreement`.

    Args:
        shape: (H, W) of the picture.
        parts: for each tile its map of ids (h, w), 0 for nothing and 1 to n for objects, and the
            category of each of the n objects.
        uncountable: categories of which there is one object at the most, wherever its parts are.

    Returns:
        (H, W) int32 ids from 1 in the order of the tiles, and for each id the (part, id in it) that
        it was joined from.
    """
    firsts = np.cumsum([0, *(len(categories) for _, _, categories in parts)])
    given = (np.asarray(categories, np.int64) for _, _, categories in parts)
    category = np.concatenate([np.zeros(0, np.int64), *given])
    parent = np.arange(firsts[-1])

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(x: int, y: int) -> None:
        low, high = sorted((root(x), root(y)))
        parent[high] = low

    for a, b in _overlapping([tile for tile, _, _ in parts]):
        for x, y in _agreeing(parts[a], parts[b], agreement):
            x, y = x + firsts[a], y + firsts[b]
            if category[x] == category[y]:
                join(x, y)
    for kind in uncountable:
        for first, second in itertools.pairwise(np.flatnonzero(category == kind).tolist()):
            join(first, second)
    roots = np.array([root(item) for item in range(firsts[-1])], np.int64)
    whole = np.zeros(shape, np.int64)  # 1 + root
    for (tile, ids, _), first in zip(parts, firsts, strict=False):
        table = np.concatenate([[0], 1 + roots[first : first + ids.max(initial=0)]])
        top, left, bottom, right = tile.core
        inner = ids[top - tile.top : bottom - tile.top, left - tile.left : right - tile.left]
        whole[top:bottom, left:right] = table[inner]
    used = np.unique(whole[whole > 0])
    number = np.zeros(firsts[-1] + 1, np.int32)
    number[used] = np.arange(1, len(used) + 1)
    sources: list[list[tuple[int, int]]] = [[] for _ in used]
    for part, first in enumerate(firsts[:-1]):
        for item in range(first, firsts[part + 1]):
            place = number[1 + roots[item]]
            if place:
                sources[place - 1].append((part, item - int(first) + 1))
    return number[whole], sources


def _overlapping(items: Sequence[Tile]) -> Iterator[tuple[int, int]]:
    for b, second in enumerate(items):
        for a, first in enumerate(items[:b]):
            if (
                first.top < second.bottom
                and second.top < first.bottom
                and first.left < second.right
                and second.left < first.right
            ):
                yield a, b


def _agreeing(
    first: tuple[Tile, np.ndarray, Sequence[int]],
    second: tuple[Tile, np.ndarray, Sequence[int]],
    agreement: float,
) -> Iterator[tuple[int, int]]:
    """Objects (from 0) of two tiles that are the same where both tiles are."""
    (a, a_ids, _), (b, b_ids, _) = first, second
    top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
    left, right = max(a.left, b.left), min(a.right, b.right)
    mine = a_ids[top - a.top : bottom - a.top, left - a.left : right - a.left].astype(np.int64)
    other = b_ids[top - b.top : bottom - b.top, left - b.left : right - b.left].astype(np.int64)
    areas, other_areas = np.bincount(mine.ravel()), np.bincount(other.ravel())
    both = (mine > 0) & (other > 0)
    pairs, counts = np.unique(np.stack([mine[both], other[both]]), axis=1, return_counts=True)
    for (x, y), shared in zip(pairs.T, counts, strict=True):
        if shared >= agreement * (areas[x] + other_areas[y] - shared):
            yield int(x) - 1, int(y) - 1
