"""Pictures larger than memory: overlapping tiles, and what is found in them joined."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pointformer._checks import check_count
from pointformer.annotations import Mask, Objects, SegmentMap


@dataclass(frozen=True)
class Tile:
    """A window of a picture, rows `top` to `bottom` and columns `left` to `right`, ends exclusive.

    Attributes:
        core: the part (top, left, bottom, right) that this tile decides: cores do not overlap and
            cover the picture; they end in the middle of the overlaps.
        overlap: how many pixels it shares with its neighbors at the least.
    """

    top: int
    left: int
    bottom: int
    right: int
    core: tuple[int, int, int, int]
    overlap: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

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
        Tile(top, left, bottom, right, (first, start, last, end), overlap)
        for top, bottom, first, last in rows
        for left, right, start, end in columns
    ]


def windows_of(height: int, width: int, tile: int | None, overlap: int | None) -> list[Tile]:
    """`tiles` of a picture, of `tile` pixels, or one for all of it if that is `None`.

    Args:
        overlap: in pixels; `None`: 64, or half a window if that is less.

    Raises:
        ValueError: the tile is not positive, or the overlap not less than the tile.
    """
    check_count("height", height)
    check_count("width", width)
    if tile is None:
        return tiles(height, width, max(height, width), 0)
    check_count("tile", tile)
    if overlap is None:
        overlap = min(64, tile // 2)
    check_count("overlap", overlap, least=0)
    return tiles(height, width, tile, overlap)


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
    tiles overlap, an intersection over union of at least `agreement`; the best pairs come first,
    and no two objects of one tile become one. A pixel is decided by the tile whose core it is in.

    Args:
        shape: (H, W) of the picture.
        parts: for each tile its map of ids (h, w), 0 for nothing and 1 to n for objects, and the
            category of each of the n objects.
        uncountable: categories of which there is one object at the most, wherever its parts are.

    Returns:
        (H, W) int32 ids from 1 in the order of the tiles, and for each id the (part, id in it) that
        it was joined from.
    """
    categories = [kinds for _, _, kinds in parts]

    def overlaps(a: int, b: int) -> Iterator[_Pair]:
        return _overlaps_of_ids(parts[a][:2], parts[b][:2])

    roots, firsts = _joined(
        [tile for tile, _, _ in parts], categories, overlaps, agreement, uncountable
    )
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


def stitch_maps(
    shape: tuple[int, int],
    parts: Sequence[tuple[Tile, SegmentMap]],
    uncountable: Collection[int] = (),
) -> SegmentMap:
    """The segments of a picture from those of overlapping tiles, see `stitch`.

    The score of a segment is the highest of what it was joined from.
    """
    if len(parts) == 1 and not uncountable:
        return parts[0][1]
    maps = [(tile, found.ids, [s.category for s in found.segments]) for tile, found in parts]
    ids, sources = stitch(shape, maps, uncountable=uncountable)
    segments = [[parts[part][1].segments[item - 1] for part, item in own] for own in sources]
    return SegmentMap.of(
        ids,
        (own[0].category for own in segments),
        (max(segment.score for segment in own) for own in segments),
    )


def blend(
    windows: Sequence[Tile], parts: Iterable[Tensor]
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Scores of a picture from those of overlapping windows, piece by piece.

    They are averaged with weights that fall toward a window's border, over its `overlap`. A piece
    is given as soon as all its windows are known, so that only overlaps are kept in between.

    Args:
        windows: that cover the picture.
        parts: scores (K, h, w) of each window, taken one at a time.

    Yields:
        rows and columns, and the scores (K, h, w) there; together they are the picture, once.
    """
    rows = _cut([(window.top, window.bottom) for window in windows])
    columns = _cut([(window.left, window.right) for window in windows])
    pieces = [
        [
            (*row, *column)
            for row in rows[window.top, window.bottom]
            for column in columns[window.left, window.right]
        ]
        for window in windows
    ]
    missing = Counter(itertools.chain.from_iterable(pieces))
    sums: dict[tuple[int, int, int, int], tuple[Tensor, Tensor]] = {}
    for window, scores, own in zip(windows, parts, pieces, strict=True):
        fade = _fade(window, scores) if len(windows) > 1 else scores.new_ones(window.size)
        for piece in own:
            top, bottom, left, right = piece
            here = (
                slice(top - window.top, bottom - window.top),
                slice(left - window.left, right - window.left),
            )
            weight = fade[here].clone()  # a view would keep the window's
            total = scores[:, *here] * weight
            if piece in sums:
                before, weights = sums.pop(piece)
                total, weight = before + total, weights + weight
            missing[piece] -= 1
            if missing[piece]:
                sums[piece] = total, weight
            else:
                yield (slice(top, bottom), slice(left, right)), total / weight


def _cut(spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Each span in parts, cut where any span begins or ends."""
    cuts = sorted({end for span in spans for end in span})
    return {
        (begin, end): list(
            itertools.pairwise(cuts[bisect.bisect_left(cuts, begin) : bisect.bisect(cuts, end)])
        )
        for begin, end in set(spans)
    }


def _fade(window: Tile, like: Tensor) -> Tensor:
    """(h, w) weights that fall to the window's border, over the width of an overlap."""
    ramps = []
    dtype = torch.promote_types(like.dtype, torch.float32)  # half precision counts to 256
    for side in window.size:
        steps = torch.arange(side, device=like.device, dtype=dtype) + 0.5
        ramps.append((torch.minimum(steps, side - steps) / max(window.overlap, 1)).clamp(max=1))
    return ramps[0][:, None] * ramps[1]


def stitch_objects(
    shape: tuple[int, int], parts: Sequence[tuple[Tile, Objects]], agreement: float = 0.5
) -> Objects:
    """The objects of a picture from those of overlapping tiles, see `stitch`.

    They may overlap, and keep all their scores: that of a joined object is its parts' highest.

    Args:
        shape: (H, W) of the picture.
        parts: the tiles and their objects, in pixels of the tile.
    """

    def overlaps(a: int, b: int) -> Iterator[_Pair]:
        return _overlaps_of_objects(parts[a], parts[b])

    if len(parts) == 1:
        return parts[0][1]
    roots, firsts = _joined(
        [tile for tile, _ in parts], [found.classes for _, found in parts], overlaps, agreement
    )
    pieces: dict[int, list[Mask]] = {}
    scores: dict[int, float] = {}
    classes: dict[int, int] = {}
    for (tile, found), first in zip(parts, firsts, strict=False):
        top, left, bottom, right = tile.core
        core = left - tile.left, top - tile.top, right - tile.left, bottom - tile.top
        rows = zip(found.masks, found.scores.tolist(), found.classes.tolist(), strict=True)
        for item, (mask, score, kind) in enumerate(rows, int(first)):
            root = int(roots[item])
            scores[root] = max(score, scores.get(root, score))
            classes[root] = kind
            x, y = max(mask.left, core[0]), max(mask.top, core[1])
            piece = Mask.of(mask.within(*core), tile.top + y, tile.left + x)
            if piece.area:
                pieces.setdefault(root, []).append(piece)
    return Objects(
        [_union(masks) for masks in pieces.values()],
        [classes[root] for root in pieces],
        [scores[root] for root in pieces],
        shape,
    )


def _union(masks: Sequence[Mask]) -> Mask:
    if len(masks) == 1:
        return masks[0]
    lefts, tops, rights, bottoms = zip(*(mask.box for mask in masks), strict=True)
    left, top = min(lefts), min(tops)
    pixels = np.zeros((max(bottoms) - top, max(rights) - left), bool)
    for mask in masks:
        y, x = mask.top - top, mask.left - left
        pixels[y : y + mask.pixels.shape[0], x : x + mask.pixels.shape[1]] |= mask.pixels
    return Mask(top, left, pixels)


# How much two objects of two tiles agree, how much they are worth, and which (from 0) they are.
_Pair = tuple[float, float, int, int]


def _joined(
    tiles: Sequence[Tile],
    categories: Sequence[Collection[int]],
    overlaps: Callable[[int, int], Iterable[_Pair]],
    agreement: float,
    uncountable: Collection[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """For each object of all tiles the first of those it is one with, and each tile's first."""
    firsts = np.cumsum([0, *map(len, categories)])
    given = (np.asarray(kinds, np.int64) for kinds in categories)
    category = np.concatenate([np.zeros(0, np.int64), *given])
    parent = np.arange(firsts[-1])
    tile_of = np.repeat(np.arange(len(tiles)), np.diff(firsts)).tolist()
    seen_by = [{tile} for tile in tile_of]  # of all that is one with an object, by its root

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(x: int, y: int) -> None:
        low, high = sorted((root(x), root(y)))
        if low != high:
            parent[high] = low
            seen_by[low] |= seen_by[high]

    pairs = [
        (-worth * overlap, int(x + firsts[a]), int(y + firsts[b]))
        for a, b in _overlapping(tiles)
        for overlap, worth, x, y in overlaps(a, b)
        if overlap >= agreement and category[x + firsts[a]] == category[y + firsts[b]]
    ]
    for _, x, y in sorted(pairs):
        if not seen_by[root(x)] & seen_by[root(y)]:
            join(x, y)
    for kind in uncountable:
        for x, y in itertools.pairwise(np.flatnonzero(category == kind).tolist()):
            join(x, y)
    return np.array([root(item) for item in range(firsts[-1])], np.int64), firsts


def _overlapping(tiles: Sequence[Tile]) -> Iterator[tuple[int, int]]:
    top, left, bottom, right = (
        np.array([getattr(tile, side) for tile in tiles])
        for side in ("top", "left", "bottom", "right")
    )
    for b in range(len(tiles)):
        rows = (top[:b] < bottom[b]) & (top[b] < bottom[:b])
        columns = (left[:b] < right[b]) & (left[b] < right[:b])
        for a in np.flatnonzero(rows & columns).tolist():
            yield a, b


def _overlaps_of_ids(
    first: tuple[Tile, np.ndarray], second: tuple[Tile, np.ndarray]
) -> Iterator[_Pair]:
    """Intersections over unions, where both tiles are, of objects that share a pixel there."""
    (a, a_ids), (b, b_ids) = first, second
    top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
    left, right = max(a.left, b.left), min(a.right, b.right)
    mine = a_ids[top - a.top : bottom - a.top, left - a.left : right - a.left].astype(np.int64)
    other = b_ids[top - b.top : bottom - b.top, left - b.left : right - b.left].astype(np.int64)
    areas, other_areas = np.bincount(mine.ravel()), np.bincount(other.ravel())
    both = (mine > 0) & (other > 0)
    pairs, counts = np.unique(np.stack([mine[both], other[both]]), axis=1, return_counts=True)
    for (x, y), shared in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        yield shared / (areas[x] + other_areas[y] - shared), 1.0, x - 1, y - 1


def _overlaps_of_objects(
    first: tuple[Tile, Objects], second: tuple[Tile, Objects]
) -> Iterator[_Pair]:
    """The same of objects that may overlap, worth the product of their scores."""
    (a, mine), (b, other) = first, second
    top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
    left, right = max(a.left, b.left), min(a.right, b.right)
    cut = [
        [
            Mask.of(
                mask.within(left - tile.left, top - tile.top, right - tile.left, bottom - tile.top),
                max(mask.top + tile.top, top),
                max(mask.left + tile.left, left),
            )
            for mask in found.masks
        ]
        for tile, found in (first, second)
    ]
    boxes = np.array([mask.box for mask in cut[1]], np.int64).reshape(-1, 4)
    areas = np.array([mask.area for mask in cut[1]], np.int64)
    for x, mask in enumerate(cut[0]):
        near = (boxes[:, :2] < mask.box[2:]).all(1) & (boxes[:, 2:] > mask.box[:2]).all(1)
        near &= other.classes == mine.classes[x]
        for y in np.flatnonzero(near).tolist():
            shared = np.count_nonzero(mask.within(*cut[1][y].box) & cut[1][y].within(*mask.box))
            if shared:
                worth = float(mine.scores[x] * other.scores[y])
                yield shared / (mask.area + areas[y] - shared), worth, x, y
