"""Balanced clustering along a space-filling curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor

from pointformer._checks import (
    alike,
    brief,
    can_read,
    check_count,
    check_finite,
    check_flags,
    check_option,
    check_per_sample,
    check_positions,
    check_same_positions,
    check_sizes,
    plain_number,
)
from pointformer._dispatch import choose, lacks_nothing
from pointformer.clusters import Clusters, offsets_of
from pointformer.geometry.boxes import bounding_boxes
from pointformer.geometry.curves import CURVES, curve_code
from pointformer.kernels.clustering import (
    fused_cluster_centers,
    fused_cluster_keys,
    fused_cluster_ranges,
    fused_curve_code,
    fused_curve_keys,
    fused_kd_keys,
)
from pointformer.kernels.tables import from_host, plain_levels
from pointformer.reference import clustering as reference

_REMAINDERS = ("spread", "last")
# Cells per axis and sides of a cell, D numbers per sample, and the longest axis of each canvas:
# arrays where no graph is traced, which thousands of samples need not be copied from.
_Grids = tuple[list[int] | np.ndarray, list[float] | np.ndarray, list[int] | np.ndarray]
_MAX_CELLS = 1 << 20  # per axis: the curves' codes hold 21 bits of each coordinate
_MOST_TOKENS = 1 << 28  # on GPUs: places along the walk are counted in 32 bits
_LEAST_SIDE = 2.0**-149  # of float32; a canvas that is smaller has no cells
_CROWDED = 4  # a cell with more clusters than this is divided; even density makes hardly any


def balanced_cluster(
    positions: Tensor,
    cluster_size: int = 8,
    *,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    extent: Sequence | Tensor | None = None,
    origin: Sequence | Tensor | None = None,
    curve: str = "hilbert",
    anchors: bool = True,
    remainder: str = "spread",
    global_size: int = 0,
    adaptive: bool | None = None,
    same_positions: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> Clusters:
    """Sort the tokens of each sample along a curve and cut them into clusters of equal size.

    AutoFocusFormer, section 3.1. For n tokens and k = ceil(n / cluster_size) the canvas is divided
    into about k cells, each with an anchor at its center, and the anchors are walked along the
    curve. Tokens are ordered by the anchor of their cell, then by the ratio of the squared
    distances to the previous and the next anchor of the walk, then by input row. The order is the
    same bit for bit in every implementation and does not depend on the other samples.

    The cells are as square as they can be: with L = (volume / k) ** (1/D) an axis has
    round(side / L) of them (half to even). An axis that would get none gets one, and L follows from
    the others; an axis of length 0 has one. A single anchor has virtual neighbors one cell away
    along the longest axis; the walk is extended by linear extrapolation at both ends.

    `curve="snake"` follows the released AutoFocusFormer, made for lattices with cells of size 1:
    its anchors lie half a unit below the centers of the cells. The other curves measure in cells,
    so that the order does not depend on the unit of the positions.

    The order adapts to density, so that the canvas decides nothing and points far away cost
    nothing: where a cell holds more than four times `cluster_size` tokens, these are ordered among
    themselves as a sample of their own is, in their own bounding box, and so on. Equal ones keep
    the order of their rows. At last each pair of clusters (a sample's first and second, and so on)
    that has tokens of such a cell is cut in two as "kd" does it, forwards.

    `curve="kd"` has no cells. A sample's clusters are cut in two halves (the first has one more of
    an odd number) across the longest side of their tokens' bounding box (the first of equal ones),
    where tokens are sorted along that axis, ties by the order so far; then each half is, down to
    single clusters. The second half is walked the other way along the other axes, so that it starts
    near the end of the first. A sample of one cluster is not cut and keeps the order of its rows.

    Args:
        positions: (T, D) float32, D = 2 or 3, axes (x, y[, z]), samples one after the other.
        cluster_size: no cluster gets more tokens than this.
        sizes: tokens per sample, B host integers; `None` for one sample.
        batch: in place of `sizes` the sample of each token, see `sizes_from_batch`.
        extent: sides of each sample's canvas, B x D host numbers in the units of `positions`, or D
            numbers for all samples; tokens outside belong to the nearest cells. `None` measures the
            bounding boxes, which waits for the device.
        origin: lower corner of each sample's canvas, like `extent`; 0 by default. Without `extent`
            it is the lower corner of the bounding box and cannot be given.
        curve: "hilbert", "morton", "peano", "snake" or "kd".
        anchors: `False` for the plain order of the curve, ties by input row: of "hilbert" and
            "morton" over a fine lattice (65,536 levels along the longest axis in 2-D, 32,768 in
            3-D, 4,096 for more than 262,144 different samples), of "peano" too (59,049, 19,683 and
            2,187 levels), of "snake" over the cells described above. "kd" has none in any case.
        remainder: "spread" for ceil(n / cluster_size) clusters whose sizes differ by at most one,
            larger ones first; "last" for full clusters, where a sample's last may be short.
        global_size: samples with at most this many tokens are not worth a neighborhood: they keep
            the order of their rows, and `nearest_clusters` lists all of their clusters.
        adaptive: whether crowded cells are divided, which waits for the device. `None`: yes, but
            where it cannot wait (under `torch.compile`, but for ragged sets, and while a CUDA graph
            is captured), and not for the released order, which is that of the snake with anchors in
            a given `extent`.
        same_positions: promises that all samples have the positions of the first one, row by row,
            and its canvas: only that one is sorted.
        check_values: whether to look for positions that are not finite, or not the same where that
            is promised, which waits for the device. Never done under `torch.compile` and while a
            CUDA graph is captured.
        impl: "reference", "cpu" or "triton"; `None` chooses by device.

    Returns:
        The clusters; put features in their order with `x[clusters.order]`. Gradients of `centers`
        reach the positions.

    Raises:
        TypeError, ValueError: an argument does not fit, or a position is NaN or infinite; the
            message names the argument, and the sample.
    """
    learned = check_positions("positions", positions)
    positions = learned.detach()
    sizes = check_sizes("sizes", sizes, positions.shape[0], batch)
    dimensions = positions.shape[1]
    if isinstance(sizes, Tensor):
        sides, corners = (
            x if x is None or isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
            for x in (extent, origin)
        )
        found = _untraced(
            positions, sizes, cluster_size, sides, corners, curve, anchors, remainder, global_size,
            adaptive, check_values, impl,
        )  # fmt: skip
        return Clusters(*found[:3], sizes, found[3], cluster_size, global_size, same_positions)
    check_count("cluster_size", cluster_size)
    check_count("global_size", global_size, least=0)
    cluster_size, global_size = plain_number(cluster_size), plain_number(global_size)
    check_option("curve", curve, CURVES)
    check_option("remainder", remainder, _REMAINDERS)
    check_flags(anchors=anchors, same_positions=same_positions, check_values=check_values)
    if check_values:
        check_finite("positions", positions, sizes)
    if same_positions:
        check_same_positions("positions", positions, sizes, check_values)
    canvas = None
    if extent is not None:
        if origin is None:
            origin = (0.0,) * dimensions
        corners = check_per_sample("origin", origin, len(sizes), dimensions)
        sides = check_per_sample("extent", extent, len(sizes), dimensions, least=0)
        if same_positions and len(set(zip(corners, sides, strict=True))) > 1:
            raise ValueError(f"same_positions: expected one extent and origin, got {brief(extent)}")
        all_sides = [0.0 if side < _LEAST_SIDE else side for side in itertools.chain(*sides)]
        canvas = [*itertools.chain(*corners)], all_sides
    elif origin is not None:
        raise ValueError("origin: give extent too, or neither")
    if adaptive is not None:
        check_flags(adaptive=adaptive)
    else:
        is_released = curve == "snake" and anchors and canvas is not None
        adaptive = can_read(positions) and not is_released
    if adaptive and not can_read(positions):
        raise ValueError(
            "adaptive: True waits for the device, which is not possible here; use None"
        )

    device = positions.device
    triton_lacks = partial(_triton_lacks, positions)
    chosen = choose(
        "balanced_cluster", impl, {"cpu": lacks_nothing, "triton": triton_lacks}, device
    )
    counts = _cluster_counts(sizes, cluster_size)
    in_order = [size <= global_size for size in sizes]
    if all(in_order):
        order = torch.arange(positions.shape[0], device=device)
    else:
        different = 1 if same_positions else len(sizes)  # samples, to be sorted
        rows = positions[: sum(sizes[:different])], sizes[:different]
        in_order = in_order[:different]
        few = counts[:different]
        offsets_of_few = partial(_cluster_offsets, rows[1], few, cluster_size, remainder, device)
        kd_keys = (
            reference.kd_keys if chosen == "reference" else partial(fused_kd_keys, impl=chosen)
        )
        if curve == "kd":
            order = _kd_order(kd_keys, rows[0], few, in_order, offsets_of_few())
        else:
            if canvas is None:
                canvas = _measured_canvas(*rows)
                whole = [True] * different
            else:
                canvas = canvas[0][: different * dimensions], canvas[1][: different * dimensions]
                whole = in_order
            along_curve = partial(
                _along_curve, cluster_size=cluster_size, curve=curve, anchors=anchors, impl=chosen
            )
            keys, order = along_curve(*rows, canvas, in_order)
            if adaptive:
                ratio_bits = reference.RATIO_BITS if anchors else 0
                most = _CROWDED * cluster_size
                places, crowds = _crowded(keys >> ratio_bits, rows[1], most, whole)
                if crowds:
                    order = _divided(along_curve, rows[0], order, places, crowds, ratio_bits, most)
                    order = _cut_pairs(kd_keys, rows[0], order, places, few, offsets_of_few())
        if different < len(sizes):
            starts = torch.arange(0, len(positions), sizes[0], device=device)
            order = (order + starts[:, None]).view(-1)
    if chosen == "triton" and any(counts) and alike(sizes):
        lengths = _cluster_lengths(sizes[0], counts[0], cluster_size, remainder)
        offsets, centers = fused_cluster_ranges(
            learned, order, len(sizes), sizes[0], counts[0], *lengths, chosen
        )
        return Clusters(
            order, offsets, centers, sizes, counts, cluster_size, global_size, same_positions
        )
    offsets = _cluster_offsets(sizes, counts, cluster_size, remainder, device)
    centers_of = reference.cluster_centers
    if chosen != "reference":
        centers_of = partial(fused_cluster_centers, impl=chosen)
    centers = centers_of(learned, order, offsets)
    return Clusters(
        order, offsets, centers, sizes, counts, cluster_size, global_size, same_positions
    )


def _cluster_counts(sizes: tuple[int, ...], cluster_size: int) -> tuple[int, ...]:
    """Clusters of each sample."""
    if torch.compiler.is_compiling():
        return tuple(-(-size // cluster_size) for size in sizes)
    return tuple((-(-np.array(sizes, np.int64) // cluster_size)).tolist())


def _parts(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """First cluster of the part that each cluster is in, and the one after its last: (K,) int64."""
    bounds, counts = offsets_of(tuple(lengths), device), from_host(lengths, torch.int64, device)
    total = sum(lengths)
    first, last = (
        torch.repeat_interleave(ends, counts, output_size=total)
        for ends in (bounds[:-1], bounds[1:])
    )
    return first, last


def _kd_order(
    kd_keys: Callable[..., tuple[Tensor, Tensor]],
    positions: Tensor,
    counts: tuple[int, ...],
    in_order: Sequence[bool],
    offsets: Tensor,
) -> Tensor:
    """Rows (T,) int64 in the order of "kd", where clusters are `offsets` (K+1,) of them."""
    parts = [[1] * n if keeps else [n] for n, keeps in zip(counts, in_order, strict=True)]
    lengths = [*itertools.chain(*parts)]
    first, last = _parts(lengths, positions.device)
    own = torch.arange(len(first), device=positions.device)
    back = torch.zeros_like(own)
    order = torch.arange(len(positions), device=positions.device)
    for _ in range((max(lengths, default=1) - 1).bit_length()):
        keys, axis = kd_keys(positions, order, offsets, first, last, back)
        order = order.index_select(0, torch.sort(keys, stable=True).indices)
        middle = (first + last + 1) // 2
        is_second = own >= middle
        turned = ((1 << positions.shape[1]) - 1) ^ (1 << axis[first])
        back = torch.where(is_second, back ^ turned, back)
        first, last = first.where(~is_second, middle), last.where(is_second, middle)
    return order


def _cut_pairs(
    kd_keys: Callable[..., tuple[Tensor, Tensor]],
    positions: Tensor,
    order: Tensor,
    places: Tensor,
    counts: tuple[int, ...],
    offsets: Tensor,
) -> Tensor:
    """`order` where pairs of clusters with tokens at `places` are cut across their longest side.

    Parts of a cell have few cells, and many clusters lie in two: this makes them rounder.
    """
    own = torch.arange(len(offsets) - 1, device=positions.device)
    start, end = _parts(counts, positions.device)
    first = own - (own - start) % 2
    last = end.minimum(first + 2)
    before = torch.searchsorted(places, offsets.long())
    crowded = before[1:] > before[:-1]
    either = crowded[first] | crowded[last - 1]
    first, last = first.where(either, own), last.where(either, own + 1)
    keys, _ = kd_keys(positions, order, offsets, first, last, torch.zeros_like(own))
    return order.index_select(0, torch.sort(keys, stable=True).indices)


def _divided(
    along_curve: Callable[..., tuple[Tensor, Tensor]],
    positions: Tensor,
    order: Tensor,
    places: Tensor,
    sizes: tuple[int, ...],
    ratio_bits: int,
    most: int,
) -> Tensor:
    """`order` where the tokens at `places`, so many in each crowded cell, are ordered again.

    All cells at once, in their bounding boxes, until no cell has more than `most` tokens. Each time
    the longest side of a box is at least halved, so that the range of float32 bounds the number of
    rounds.
    """
    rows = order.index_select(0, places)
    part = positions.index_select(0, rows)
    while sizes:
        canvas, still = _measured_canvas(part, sizes), [False] * len(sizes)
        keys, again = along_curve(part, sizes, canvas, still)
        rows = rows.index_select(0, again)
        order[places] = rows
        inside, sizes = _crowded(keys >> ratio_bits, sizes, most, [True] * len(sizes))
        places, rows = places.index_select(0, inside), rows.index_select(0, inside)
        part = part.index_select(0, again.index_select(0, inside))
    return order


def _along_curve(
    positions: Tensor,
    sizes: tuple[int, ...],
    canvas: tuple[list[float], list[float]],
    in_order: Sequence[bool],
    *,
    cluster_size: int,
    curve: str,
    anchors: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Sorted keys (T,) and the row that each is of, (T,) int64.

    `canvas` has the corners and the sides of the canvases, D numbers per sample.
    """
    corners, sides = canvas
    if anchors or curve == "snake":
        grids = _anchor_grids(_cluster_counts(sizes, cluster_size), sides, in_order)
    else:
        grids = _fine_grids(sides, positions.shape[1], in_order, curve)
    keys = _sort_keys(positions, sizes, corners, grids, curve, anchors, impl)
    return torch.sort(keys, stable=True)


def _crowded(
    cells: Tensor, sizes: tuple[int, ...], most: int, whole: Sequence[bool]
) -> tuple[Tensor, tuple[int, ...]]:
    """Rows (int64) in cells with more than `most` tokens, and how many are in each such cell.

    But for cells with all of a sample where those stay `whole`: it keeps its order, or fills the
    cells of its own bounding box, so that its points are equal.
    """
    run = cells[:0]
    if (cells[most:] == cells[:-most]).any():
        run = torch.unique_consecutive(cells, return_counts=True)[1]
    starts = offsets_of(sizes, cells.device)
    sample = torch.searchsorted(starts, run.cumsum(0) - 1, right=True) - 1
    is_part = run < starts.diff()[sample]
    if not all(whole):
        is_part |= ~from_host(whole, torch.bool, cells.device)[sample]
    crowded = (run > most) & is_part
    inside = torch.repeat_interleave(crowded, run).nonzero()[:, 0]
    return inside, tuple(run[crowded].tolist())


def _measured_canvas(positions: Tensor, sizes: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Corners and sides of the samples' bounding boxes, D numbers per sample."""
    low, high = bounding_boxes(positions, sizes)
    sides = (high - low).flatten().tolist()
    if not all(map(math.isfinite, sides)):
        raise ValueError("extent: cannot measure it, a position is NaN or infinite")
    return low.flatten().tolist(), sides


def _triton_lacks(positions: Tensor) -> str | None:
    if len(positions) > _MOST_TOKENS:
        return f"positions has {len(positions)} rows, more than {_MOST_TOKENS}"
    return None


def _anchor_grid(sides: Sequence[float], clusters: int) -> tuple[list[int], list[float]]:
    """Cells per axis, about `clusters` in all, and the sides of a cell."""
    shape = [1] * len(sides)
    axes = [axis for axis, side in enumerate(sides) if side > 0]
    length = 1.0
    while axes:
        volume = math.prod([sides[axis] for axis in axes]) / max(clusters, 1)
        length = math.sqrt(volume) if len(axes) == 2 else volume ** (1 / len(axes))
        rounded = {axis: round(sides[axis] / length) for axis in axes}
        if all(rounded.values()):
            for axis, cells in rounded.items():
                shape[axis] = min(cells, _MAX_CELLS)
            break
        axes = [axis for axis in axes if rounded[axis]]
    cell = [side / cells if side > 0 else length for side, cells in zip(sides, shape, strict=True)]
    return shape, cell


def _anchor_grids(counts: tuple[int, ...], sides: list[float], in_order: Sequence[bool]) -> _Grids:
    """The grid of anchors of each sample."""
    samples = len(counts)
    dimensions = len(sides) // samples
    tiny = torch.finfo(torch.float32).tiny
    # A sample that keeps its order has one cell of infinite size: all of its tokens tie.
    if not torch.compiler.is_compiling():
        canvases, still = np.array(sides, np.float64).reshape(samples, -1), np.array(in_order)
        cells, lengths = _anchor_grid_arrays(canvases, np.array(counts))
        cells[still], lengths[still] = 1, math.inf
        lengths = np.maximum(lengths, tiny)
        return cells.ravel(), lengths.ravel(), canvases.argmax(1)
    shape, cell, longest = [], [], []  # NumPy's operations would become a part of the graph
    for row, count, keeps in zip(_rows(sides, samples), counts, in_order, strict=True):
        grid = ([1] * dimensions, [math.inf] * dimensions) if keeps else _anchor_grid(row, count)
        shape += grid[0]
        cell += [max(side, tiny) for side in grid[1]]
        longest.append(row.index(max(row)))
    return shape, cell, longest


def _rows(numbers: list, samples: int) -> Iterator[tuple]:
    """The D numbers of each sample, one by one: many tuples at once keep the collector busy."""
    dimensions = len(numbers) // samples
    return zip(*(numbers[axis::dimensions] for axis in range(dimensions)), strict=True)


def _anchor_grid_arrays(sides: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_anchor_grid` of all canvases (B, D) at once, bit for bit: (B, D) each."""
    samples, dimensions = sides.shape
    rounded = np.zeros((samples, dimensions))
    length = np.ones(samples)
    axes = sides > 0
    open_ = reduce(np.logical_or, axes.T)  # quicker than NumPy along an axis of two or three
    with np.errstate(all="ignore"):
        for _ in range(dimensions):
            volume = math.prod(np.where(axes, sides, 1.0).T) / np.maximum(clusters, 1)
            of_axes = sum(axes.T.astype(np.int64))
            roots = np.where(of_axes == 2, np.sqrt(volume), volume)
            cubes = open_ & (of_axes == 3)  # NumPy's own power is rounded otherwise
            roots[cubes] = [value ** (1 / 3) for value in volume[cubes].tolist()]
            length = np.where(open_, roots, length)
            rounded = np.where(axes, np.rint(sides / length[:, None]), rounded)
            kept = axes & (rounded > 0)
            open_ &= reduce(np.logical_or, (kept != axes).T) & reduce(np.logical_or, kept.T)
            axes = np.where(open_[:, None], kept, axes)
    shape = np.where(axes, rounded, 1).clip(1, _MAX_CELLS)
    return shape.astype(np.int64), np.where(sides > 0, sides / shape, length[:, None])


def _fine_grids(
    sides: list[float], dimensions: int, in_order: Sequence[bool], curve: str
) -> _Grids:
    """The same for the plain order of a curve: fine lattices of cells with equal sides."""
    levels = plain_levels(curve, dimensions, len(in_order))
    tiny = torch.finfo(torch.float32).tiny
    cell = []
    for row, still in zip(_rows(sides, len(in_order)), in_order, strict=True):
        side = max(row)
        cell += [math.inf if still or side == 0 else max(side / levels, tiny)] * dimensions
    return [levels] * len(cell), cell, [0] * len(in_order)


def _sort_keys(
    positions: Tensor,
    sizes: tuple[int, ...],
    corners: list[float],
    grids: _Grids,
    curve: str,
    anchors: bool,
    chosen: str,
) -> Tensor:
    """Integers (T,) int64 that sort into the order of the curve."""
    if chosen == "triton":
        shape, cell_size, longest = (x.tolist() if isinstance(x, np.ndarray) else x for x in grids)
        return fused_curve_keys(
            positions, sizes, corners, cell_size, shape, longest, curve, anchors, chosen
        )
    code_of, keys_of = curve_code, reference.cluster_keys
    if chosen != "reference":
        code_of = partial(fused_curve_code, impl=chosen)
        keys_of = partial(fused_cluster_keys, impl=chosen)
    if not anchors:
        return _plain_keys(positions, sizes, corners, grids, curve, code_of)
    walk = _anchor_walk(corners, grids, curve, code_of, positions.device)
    return keys_of(positions, offsets_of(sizes, positions.device), *walk)


def _anchor_walk(
    corners: list[float],
    grids: _Grids,
    curve: str,
    code_of: Callable[..., Tensor],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Arguments of `reference.cluster_keys`, which turns positions into keys."""
    cells_of, sides_of, longest = grids
    samples = len(longest)
    if isinstance(cells_of, np.ndarray):
        volumes = reduce(np.multiply, cells_of.reshape(samples, -1).T).tolist()
    else:
        volumes = list(map(math.prod, _rows(cells_of, samples)))
    first_cell, total = offsets_of(volumes, device), sum(volumes)
    bits = _bits_of(cells_of)
    shape = from_host(cells_of, torch.int64, device).view(samples, -1)
    cell_size = from_host(sides_of, torch.float32, device).view(samples, -1)
    origin = from_host(corners, torch.float32, device).view(samples, -1)
    unit = cell_size
    if curve == "snake":
        unit = torch.where(cell_size.isinf(), cell_size, 1.0)

    sample, cells = _cells(shape, first_cell, total)
    code = code_of(curve, cells, shape[sample], bits)
    if curve == "snake":
        rank = code + first_cell[sample]
        side = cell_size[sample]
        center = cells.float() * side + side / 2 - 0.5
    else:
        walk = torch.sort(code).indices
        if samples > 1:
            walk = walk[torch.sort(sample[walk], stable=True).indices]
        rank = torch.empty_like(walk)
        rank[walk] = torch.arange(total, device=device)
        center = cells.float() + 0.5
    anchor_of_cell = rank + 2 * sample + 1
    anchors = center.new_empty(total + 2 * samples, shape.shape[1])
    anchors[anchor_of_cell] = center
    axis = from_host(longest, torch.int64, device)
    cell_in_units = (cell_size / unit).nan_to_num(1.0)
    step = torch.zeros_like(origin).scatter(1, axis[:, None], 1.0) * cell_in_units
    _extend_walks(anchors, first_cell, step)
    return origin, cell_size, unit, shape, first_cell[:-1], anchor_of_cell, anchors


def _bits_of(cells: list[int] | np.ndarray) -> int:
    """Bits of the largest of these numbers of cells."""
    if isinstance(cells, np.ndarray):
        return int(cells.max()).bit_length()
    largest = reduce(torch.sym_max, cells, 1)  # what is compiled is for all that have as many bits
    return next(bits for bits in range(1, _MAX_CELLS.bit_length() + 1) if largest < 1 << bits)


def _cells(shape: Tensor, first_cell: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Sample (cells,) and coordinates (cells, D) of the cells of all grids, axis 0 fastest."""
    samples = torch.arange(len(shape), device=shape.device)
    sample = torch.repeat_interleave(samples, first_cell.diff(), output_size=total)
    index = torch.arange(total, device=shape.device) - first_cell[sample]
    coordinates = []
    for length in shape[sample].unbind(1):
        coordinates.append(index % length)
        index = index // length
    return sample, torch.stack(coordinates, dim=1)


def _extend_walks(anchors: Tensor, first_cell: Tensor, step: Tensor) -> None:
    """Fill the rows before and after each sample's anchors; `step` leads from a single one."""
    samples = torch.arange(len(step), device=step.device)
    first = first_cell[:-1] + 2 * samples + 1
    last = first_cell[1:] + 2 * samples
    single = (first == last)[:, None]
    start, end = anchors[first], anchors[last]
    second = torch.where(single, start + step, anchors[first + 1])
    second_last = torch.where(single, end - step, anchors[last - 1])
    anchors[first - 1] = start - (second - start)
    anchors[last + 1] = end + (end - second_last)


def _plain_keys(
    positions: Tensor,
    sizes: tuple[int, ...],
    corners: list[float],
    grids: _Grids,
    curve: str,
    code_of: Callable[..., Tensor],
) -> Tensor:
    """Sort keys (T,) int64 without anchors: (sample, place of the cell on the curve)."""
    dimensions, device = positions.shape[1], positions.device
    levels = plain_levels(curve, dimensions, len(sizes))
    samples = torch.arange(len(sizes), device=device)
    lengths = offsets_of(sizes, device).diff()
    sample = torch.repeat_interleave(samples, lengths, output_size=len(positions))
    cell, origin = (
        from_host(numbers, torch.float32, device).view(-1, dimensions)[sample]
        for numbers in (grids[1], corners)
    )
    shape = from_host(grids[0], torch.int64, device).view(-1, dimensions)[sample]
    cells = ((positions - origin) / cell).floor().clamp(min=0).minimum((shape - 1).float()).long()
    code = code_of(curve, cells, shape, (levels - 1).bit_length())
    return (sample << (levels**dimensions - 1).bit_length()) | code


def _cluster_lengths(size: int, count: int, cluster_size: int, remainder: str) -> tuple[int, int]:
    """Tokens in each of a sample's clusters (maybe fewer in its last one), and how many of the
    first ones have one more."""
    if remainder == "spread" or size % cluster_size == 0:
        return size // count, size % count
    return cluster_size, 0


def _cluster_offsets(
    sizes: tuple[int, ...],
    counts: tuple[int, ...],
    cluster_size: int,
    remainder: str,
    device: torch.device,
) -> Tensor:
    """(K+1,) int32, the row where each cluster starts, and T."""
    total = sum(counts)
    size, count = (sizes[0], counts[0]) if sizes else (0, 0)
    if count and alike(sizes):  # no copy from the host
        index = torch.arange(total + 1, dtype=torch.int32, device=device)
        length, longer = _cluster_lengths(size, count, cluster_size, remainder)
        if count * length == size:
            return index * length
        sample = index.div(count, rounding_mode="floor")
        place = index - sample * count
        return sample * size + place * length + place.clamp(max=longer)
    samples = torch.arange(len(sizes), device=device)
    first = offsets_of(counts, device)
    sample = torch.repeat_interleave(samples, first.diff(), output_size=total)
    place = torch.arange(total, device=device) - first[sample]
    start = offsets_of(sizes, device)
    if remainder == "last":
        inside = place * cluster_size
    else:
        divisor = first.diff().clamp(min=1)
        lengths, more = start.diff() // divisor, start.diff() % divisor
        inside = place * lengths[sample] + place.minimum(more[sample])
    return torch.cat([start[sample] + inside, start[-1:]]).int()


@torch.library.custom_op("pointformer::ragged_clusters", mutates_args=())
def _untraced(
    positions: Tensor,
    sizes: Tensor,
    cluster_size: int,
    extent: Tensor | None,
    origin: Tensor | None,
    curve: str,
    anchors: bool,
    remainder: str,
    global_size: int,
    adaptive: bool | None,
    check_values: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`balanced_cluster` within compiled code: order, offsets, centers and, on the host, counts."""
    clusters = balanced_cluster(
        positions, cluster_size, sizes=sizes.tolist(), extent=extent, origin=origin, curve=curve,
        anchors=anchors, remainder=remainder, global_size=global_size, adaptive=adaptive,
        check_values=check_values, impl=impl,
    )  # fmt: skip
    counts = from_host(clusters.counts, torch.int64, None)
    return clusters.order, clusters.offsets, clusters.centers, counts


@_untraced.register_fake
def _fake_untraced(positions, sizes, *options):
    clusters = torch.library.get_ctx().new_dynamic_size()
    return (
        positions.new_empty(positions.shape[0], dtype=torch.int64),
        positions.new_empty(clusters + 1, dtype=torch.int32),
        positions.new_empty(clusters, positions.shape[1]),
        torch.empty_like(sizes),
    )
