"""Star-convex objects (StarDist, Schmidt et al. 2018): targets from a map of ids, their loss, and
from scores and rays back to objects.

A picture is seen in cells of 2 x 2 pixels. Ray k of R leaves the center of a cell at the angle
2 pi (k + 1/2) / R from the x axis to the y axis, which points down, and ends where the cell's
object does. Around a center c with rays r_k the object is the polygon of the corners
c + r_k (cos, sin), which is all of it if every point of it can be seen from c.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from pointformer.annotations import Mask, Objects
from pointformer.models.heads import STAR_CELL
from pointformer.nn.parallel import WHOLE, BatchPart

_STEP = 0.5  # pixels between samples of a ray near an outline
_LENGTHS = 2.0**-6, 2.0**14  # pixels, that rays can have
LEARNED = 0.2  # score from which on a cell's rays are learned: others lie in no object's middle
_FULL = 64  # cells of an object that counts no more than others
_VOTERS = 64  # polygons that vote for an outline, at most
_CANDIDATES = 128  # looked at together, most of which will turn out to be covered
_AT_ONCE = 2**21  # pixels and ends of rows in memory


class StarTargets(NamedTuple):
    """Of the h x w cells of a picture.

    Attributes:
        ids: (h, w) int32, the object of each cell: of those in its pixels the one deepest there; 0
            where there is none.
        scores: (h, w) float32 from 0 to 1: how deep a cell lies within its object, over how deep
            the deepest one does. Every object that has a cell has one of score 1.
        weights: (h, w) float32, 1 but in objects of fewer than 64 cells: the root of 64 over their
            number, so that small ones are worth learning.
        cells: (n,) int64 positions in the flattened map of the cells whose rays are learned.
        rays: (n, R) float32 pixels.
    """

    ids: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    cells: np.ndarray
    rays: np.ndarray


def star_targets(instances: np.ndarray, rays: int) -> StarTargets:
    """What a head learns in order to find the objects of a map of ids.

    Args:
        instances: (H, W) integers, 0 is background, every other value an object.
        rays: how many, R.
    """
    depth = _depths(instances)
    ids_in, depths_in = _by_cell(instances.astype(np.int32)), _by_cell(depth)
    deepest = depths_in.argmax(2)[..., None]
    own, inside = (np.take_along_axis(v, deepest, 2)[..., 0] for v in (ids_in, depths_in))
    numbers, which, counts = np.unique(own, return_inverse=True, return_counts=True)
    which = which.reshape(own.shape)
    most = np.zeros(len(numbers), np.float32)
    np.maximum.at(most, which, inside)
    scores = inside / np.maximum(most, 1)[which]
    weights = np.sqrt(np.maximum(_FULL / counts, 1))[which]
    weights[own == 0] = 1
    cells = np.flatnonzero(scores >= LEARNED)
    return StarTargets(
        own,
        scores.astype(np.float32),
        weights.astype(np.float32),
        cells,
        ray_lengths(instances, cells, own.ravel()[cells], rays, depth),
    )


def _by_cell(values: np.ndarray) -> np.ndarray:
    """(h, w, 4): the pixels of each cell, 0 beyond the picture."""
    down, right = (-side % STAR_CELL for side in values.shape)
    whole = np.pad(values, ((0, down), (0, right)))
    height, width = (side // STAR_CELL for side in whole.shape)
    cells = whole.reshape(height, STAR_CELL, width, STAR_CELL).swapaxes(1, 2)
    return cells.reshape(height, width, -1)


def any_in_cells(pixels: np.ndarray) -> np.ndarray:
    """(h, w) bool: cells with any of these pixels (H, W) bool."""
    return np.logical_or.reduce(_by_cell(pixels), 2)


def _depths(ids: np.ndarray) -> np.ndarray:
    """(H, W) float32: 1 in an object's pixels that touch others or the picture's border with a
    side; further inside 1 more than the distance to the nearest of these; 0 in the background."""
    around = np.pad(ids, 1)
    outline = np.zeros(around.shape, bool)
    for here, there in (
        ((slice(1, None), slice(None)), (slice(-1), slice(None))),
        ((slice(None), slice(1, None)), (slice(None), slice(-1))),
    ):
        differs = around[here] != around[there]
        outline[here] |= differs
        outline[there] |= differs
    depths = ndimage.distance_transform_edt((around != 0) & ~outline)[1:-1, 1:-1] + 1
    return np.where(ids != 0, depths, 0).astype(np.float32)


def ray_directions(rays: int) -> tuple[np.ndarray, np.ndarray]:
    """(R,) float64 cosines and sines of the rays' angles."""
    angles = 2 * math.pi * (np.arange(rays) + 0.5) / rays
    return np.cos(angles), np.sin(angles)


def ray_lengths(
    ids: np.ndarray, cells: np.ndarray, objects: np.ndarray, rays: int, depth: np.ndarray
) -> np.ndarray:
    """How far rays go within the objects.

    They are sampled every half pixel, but where the outline is known to be farther: the middle
    between the last sample within and the first one beyond is at most a quarter off.

    Args:
        ids: (H, W) integers.
        cells: (n,) positions in the flattened map of cells, where the rays begin.
        objects: (n,) their objects' ids.
        rays: how many.
        depth: of `_depths`.

    Returns:
        (n, rays) float32 pixels; at least 1/4.
    """
    width = ids.shape[1]
    across = -(-width // STAR_CELL)
    padded = np.pad(ids, 1).ravel()  # of 0, which no object has
    # Both ends of a step may be 0.71 off the pixels that they are in, whose depths are known.
    safe = np.maximum(np.pad(depth, 1).ravel() - 2.5, _STEP)
    cosines, sines = (part.astype(np.float32) for part in ray_directions(rays))
    middle = STAR_CELL / 2 + 0.5  # pixels are points at whole numbers, one is padding
    top = (cells // across * STAR_CELL + middle).astype(np.float32)
    left = (cells % across * STAR_CELL + middle).astype(np.float32)
    lengths = np.zeros(len(cells) * rays, np.float32)
    going = np.arange(len(lengths))
    y, x = np.repeat(top, rays), np.repeat(left, rays)
    down, right = np.tile(sines, len(cells)), np.tile(cosines, len(cells))
    owner = np.repeat(objects, rays)
    step = np.full(len(lengths), _STEP / 2, np.float32)  # first in the nearest pixel
    while len(going):
        y, x = y + step * down, x + step * right
        place = np.rint(y).astype(np.int64) * (width + 2) + np.rint(x).astype(np.int64)
        within = padded[place] == owner
        lengths[going] += np.where(within, step, 0)
        going, y, x, down, right, owner, place = (
            values[within] for values in (going, y, x, down, right, owner, place)
        )
        step = safe[place]
    return (lengths + _STEP / 2).reshape(len(cells), rays)


def star_loss(
    output: list[Tensor],
    targets: list[StarTargets],
    classes: list[np.ndarray],
    known: list[np.ndarray],
    num_classes: int,
    part: BatchPart = WHOLE,
) -> dict[str, Tensor]:
    """How far off the scores are, and how little the stars overlap.

    The first is the quality focal loss (Li et al. 2020), |y - p|^2 times the cross-entropy of the
    probability p and the wanted score y: where few cells belong to objects, as in pictures from the
    air, the many others would otherwise decide it. Both are over the sum of the wanted scores, or
    over 64 where that is less.

    The second is the logarithm of sum_k max(r_k, r'_k) / sum_k min(r_k, r'_k) of the rays r and the
    wanted ones r' (the polar IoU loss of PolarMask, Xie et al. 2020), with the wanted scores as
    weights: other than a difference in pixels it is the same for small objects and large ones.

    Args:
        output: of B images, each (K + R, h, w).
        targets: of these.
        classes: for each of them the class of each cell (h, w), of any value outside of objects.
        known: (h, w) bool, the cells that count.
        num_classes: K.
        part: of a batch that several processes share.

    Returns:
        "score" and "shape", whose sum is the loss.
    """
    entropy = shape = weight = output[0].new_zeros((), dtype=torch.float32)
    for maps, target, category, counts in zip(output, targets, classes, known, strict=True):
        device, maps = maps.device, maps.float()
        logits, logarithms = maps[:num_classes].flatten(1), maps[num_classes:].flatten(1)
        rows = torch.from_numpy(np.where(target.ids != 0, category, 0).ravel()).long()
        wanted = torch.zeros(num_classes, rows.numel())
        wanted[rows, torch.arange(rows.numel())] = torch.from_numpy(target.scores.ravel())
        cells_weight = torch.from_numpy((target.weights * counts).ravel()).to(device)
        wanted = wanted.to(device)
        bits = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        bits = bits * (wanted - logits.sigmoid()).square()
        entropy = entropy + (bits * cells_weight).sum()
        chosen = target.cells[counts.ravel()[target.cells]]
        rays = target.rays[counts.ravel()[target.cells]]
        places = torch.from_numpy(chosen).to(device)
        lengths = logarithms[:, places].T.clamp(*map(math.log, _LENGTHS)).exp()
        truth = torch.from_numpy(rays).to(device)
        ratio = torch.maximum(lengths, truth).sum(1) / torch.minimum(lengths, truth).sum(1)
        share = torch.from_numpy(target.scores.ravel()[chosen]).to(device) * cells_weight[places]
        shape = shape + (ratio.log() * share).sum()
        weight = weight + share.sum()
    entropy, shape, weight = part.total(torch.stack([entropy, shape, weight]))
    weight = weight.clamp(min=_FULL)  # there may be no object
    return {"score": entropy / weight, "shape": shape / weight}


def stars_to_objects(
    scores: np.ndarray,
    rays: np.ndarray,
    size: tuple[int, int],
    scale: tuple[float, float] = (1.0, 1.0),
    *,
    overlap: float = 0.4,
) -> Objects:
    """Objects of the best cells, by non-maximum suppression; their outlines by vote.

    From the highest score down, of equals from the first on, a cell whose center no object covers
    yet gives one, unless objects cover more than a share `overlap` of its polygon. Later cells
    whose center this polygon is the first to cover vote with it, if they have at least half of its
    score. The object has the pixels whose centers lie in more than half of their polygons, weighted
    by score; of more than 64 polygons some vote.

    Args:
        scores: (K, h, w) floats from 0 to 1; cells below 0.2 do not count.
        rays: (R, h, w) their lengths, in pixels of what the model saw.
        size: (H, W) of the picture in which the objects are wanted.
        scale: height and width of a pixel of what the model saw, in pixels of the picture.
        overlap: see above.

    Returns:
        Objects, best first, of at least one pixel each, which may overlap.
    """
    best = scores.max(0, initial=0)
    rows, columns = np.nonzero(best >= LEARNED)
    values = best[rows, columns]
    order = np.argsort(-values, kind="stable")
    rows, columns, values = rows[order], columns[order], values[order]
    classes = scores[:, rows, columns].argmax(0) if len(scores) else rows
    # Pixels are points at whole numbers.
    middles = [
        (place + 0.5) * STAR_CELL * unit - 0.5
        for place, unit in zip((rows, columns), scale, strict=True)
    ]
    lengths = rays[:, rows, columns].T.clip(*_LENGTHS)
    cosines, sines = ray_directions(len(rays))
    corners = np.stack([
        middle[:, None] + lengths * direction * unit
        for middle, direction, unit in zip(middles, (sines, cosines), scale, strict=True)
    ])  # fmt: skip
    last = np.array(size)[:, None] - 1
    centers = np.rint(middles).astype(np.int64).reshape(2, -1).clip(0, last)
    kept, cover = _kept(corners, centers, size, overlap)
    choice = cover[*centers]
    choice[kept] = np.arange(len(kept))  # a center may be beyond the pixels of a small polygon
    voters = _voters(values, choice, kept)
    masks = _outlines(corners[:, voters], choice[voters], values[voters], centers[:, kept], size)
    return Objects(masks, classes[kept], values[kept].astype(np.float32), size)


def _kept(
    corners: np.ndarray, centers: np.ndarray, size: tuple[int, int], overlap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the polygons (2, n, R), best first, give an object: (objects,) indices, ascending;
    and (H, W) which object covers a pixel first, -1 where none does."""
    cover = np.full(size, -1)
    kept: list[int] = []
    start, end = 0, centers.shape[1]
    while start < end:
        some = start + np.flatnonzero(cover[*centers[:, start:]] < 0)[:_CANDIDATES]
        start = some[-1] + 1 if len(some) else end
        numbers = np.arange(len(some))
        masks = _outlines(corners[:, some], numbers, numbers + 1, centers[:, some], size)
        for n, mask in zip(some.tolist(), masks, strict=True):
            if cover[*centers[:, n]] >= 0:
                continue
            before = cover[mask.window]
            free = mask.pixels & (before < 0)
            if mask.area - np.count_nonzero(free) <= overlap * mask.area:
                before[free] = len(kept)
                kept.append(n)
    return np.array(kept, np.int64), cover


def _voters(scores: np.ndarray, choice: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Which polygons vote, by the object that they are for, best first; of the many of a large
    object every second, or third, ..., so that they are from all over it."""
    voters = np.flatnonzero(choice >= 0)
    best = kept[choice[voters]]
    voters = voters[(voters >= best) & (scores[voters] >= scores[best] / 2)]
    voters = voters[np.argsort(choice[voters], kind="stable")]
    counts = np.bincount(choice[voters], minlength=len(kept))
    rank = np.arange(len(voters)) - np.repeat(counts.cumsum() - counts, counts)
    return voters[rank % -(-counts // _VOTERS)[choice[voters]] == 0]


def _outlines(
    corners: np.ndarray,
    choice: np.ndarray,
    scores: np.ndarray,
    centers: np.ndarray,
    size: tuple[int, int],
) -> list[Mask]:
    """The pixels in more than half of the polygons that vote for an object, weighted by score.

    On a row of pixels a star begins at an edge that goes up and ends at one that goes down: it does
    not fold over. So a running sum along rows of what begins and what ends is all votes at once.

    Args:
        corners: (2, n, R) y and x of n polygons.
        choice: (n,) which object each is for, ascending; each has at least one.
        scores: (n,).
        centers: (2, objects), the one pixel of those that would have none.
        size: (H, W) of the picture.
    """
    if not len(choice):
        return []
    # Whole numbers, so that what begins and what ends cancels to the last bit.
    weights = np.rint(scores * 2**20).astype(np.int64)
    starts = np.searchsorted(choice, np.arange(centers.shape[1] + 1))
    halves = np.add.reduceat(weights, starts[:-1]) / 2
    bounds = np.stack([np.minimum.reduceat(corners.min(2), starts[:-1], 1),
                       np.maximum.reduceat(corners.max(2), starts[:-1], 1)])  # fmt: skip
    low, high = np.ceil(bounds).astype(np.int64).clip(0, np.array(size)[:, None])
    heights, widths = high - low + [[0], [1]]  # a column more, in which all has ended
    memory = (heights * widths + 2 * heights * np.diff(starts)).cumsum()
    masks = []
    for some in np.split(np.arange(len(halves)), np.flatnonzero(np.diff(memory // _AT_ONCE)) + 1):
        polygons = np.s_[starts[some[0]] : starts[some[-1] + 1]]
        own = choice[polygons]
        places = (heights * widths)[some].cumsum()
        votes = np.zeros(places[-1], np.int64)
        places -= (heights * widths)[some]
        polygon, row, column, sign = _crossings(corners[:, polygons], size)
        which = own[polygon]
        column = column.clip(low[1, which], high[1, which]) - low[1, which]
        place = places[which - some[0]] + (row - low[0, which]) * widths[which] + column
        np.add.at(votes, place, sign * weights[polygons][polygon])
        for n, place in zip(some.tolist(), places.tolist(), strict=True):
            box = votes[place : place + heights[n] * widths[n]].reshape(heights[n], widths[n])
            mask = Mask.of(box.cumsum(1)[:, :-1] > halves[n], *low[:, n].tolist())
            if not mask.pixels.size:
                y, x = centers[:, n].tolist()
                mask = Mask(y, x, np.ones((1, 1), bool))
            masks.append(mask)
    return masks


def _crossings(
    corners: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where the edges of polygons (2, n, R) cross the H rows of pixels: the polygon, the row, the
    first column that is not left of the edge, and 1 where the polygon begins, -1 where it ends."""
    ends = np.roll(corners, -1, 2)
    rows = np.ceil(np.stack([corners[0], ends[0]])).astype(np.int64).clip(0, size[0])
    crossed = np.abs(rows[1] - rows[0]).ravel()
    edge = np.repeat(np.arange(crossed.size), crossed)
    row = rows.min(0).ravel()[edge] + np.arange(len(edge))
    row -= np.repeat(crossed.cumsum() - crossed, crossed)
    (y, x), (next_y, next_x) = (v.reshape(2, -1)[:, edge] for v in (corners, ends))
    column = np.ceil(x + (row - y) * (next_x - x) / (next_y - y)).astype(np.int64)
    return edge // corners.shape[2], row, column, np.where(next_y < y, 1, -1)
