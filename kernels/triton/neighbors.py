"""Nearest points on GPUs: a box tree over points in curve order, searched for each query alone.

The tree is implicit: a leaf is eight consecutive rows, a node eight consecutive leaves or nodes. It
spans the rows of the whole batch, and a query enters only nodes with rows of its own sample. It
adapts to any density and takes memory in proportion to the points.

The search fills the list of K from a leaf nearby and those beside it, then visits what else may be
closer. The leaf is the one at the same place along the curve, or else found by a walk down. Where
to go next is known from the current row and a bit for every open child on the way down: eight bits
per level in one integer of 64, enough for 8**9 points.
Distances and indices are compared as one integer, so ties go to the lowest index; bounds of boxes
are rounded as distances are, so they need no margin. Longer lists take several passes.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.tables import from_host, starts_of
from pointformer.kernels.triton.clustering import (
    HILBERT,
    curve_code,
    halvings,
    of_sample,
    sample_of,
)
from pointformer.kernels.triton.runtime import Variant

_FAR = tl.constexpr((1 << 63) - 1)
_NONE = tl.constexpr((1 << 63) - 64)  # keys from here on are places in a list that is not full
_IN_LIST = 32  # the longest list kept in registers
_LISTS = (4, 8, 16, _IN_LIST)
_QUERIES = 8  # of a warp, which loads the eight boxes or points of each at once
_ROWS = 512  # three levels of the tree at once
_BLOCK = 256
_CURVE_BITS = (48, 42)  # of a place along the curve, for all axes together: in few samples, in many
_FEW_SAMPLES = 1 << 15
_QUARTILES_FROM = 1024  # points of the batch


@triton.jit
def _level_start(points, level):
    """Where the boxes of a level are: there is room for more than points / 8**(level + 1)."""
    return (points - (points >> (3 * level))) // 7 + 2 * level


@triton.jit
def _even(x, center, reach):
    """Distance from the center in units of `reach`, beyond it 1 + its logarithm."""
    offset = x * 0.5 - center * 0.5
    distance = tl.abs(offset)
    reach = reach * 0.5
    within = tl.minimum(distance, reach) / reach
    beyond = tl.maximum(tl.log(tl.maximum(distance, reach)) - tl.log(reach), 0.0)
    return tl.where(offset < 0, -within - beyond, within + beyond)


@triton.jit(do_not_specialize=("starts", "tokens", "samples"))
def curve_order_fwd_kernel(
    positions, low, high, center, reach, keys, starts, tokens, samples,
    D: tl.constexpr, BITS: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sort keys (sample, place along a Hilbert curve through the box of the whole batch).

    The cells are even up to `reach` (1,) from `center` (D,), and grow with the distance beyond:
    few points far away leave the others their resolution.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    stored = row < tokens
    row = tl.minimum(row, tokens - 1)
    reach = tl.maximum(tl.load(reach), 1e-30)
    side = 1e-30  # the box' longest side
    for axis in tl.static_range(D):
        middle = tl.load(center + axis)
        first = _even(tl.load(low + axis), middle, reach)
        side = tl.maximum(side, _even(tl.load(high + axis), middle, reach) - first)
    last = (1 << (BITS // D)) - 1.0
    base = positions + row.to(tl.int64) * D
    x = tl.zeros((BLOCK,), tl.int32)
    y = x
    z = x
    for axis in tl.static_range(D):
        middle = tl.load(center + axis)
        first = _even(tl.load(low + axis), middle, reach)
        cell = (_even(tl.load(base + axis), middle, reach) - first) * (last / side)
        cell = tl.where(cell > 0, tl.minimum(cell, last), 0.0).to(tl.int32)
        if axis == 0:
            x = cell
        elif axis == 1:
            y = cell
        else:
            z = cell
    code = curve_code(x, y, z, BITS // D, D, HILBERT)
    sample = sample_of(row, starts, samples, RAGGED).to(tl.int64)
    tl.store(keys + row, (sample << BITS) | code, mask=stored)


@triton.jit
def _store_levels(values, out, points, level, top, FOLD: tl.constexpr):
    """Fold 512 values of the level below by eights, three times, and store what becomes of them."""
    for step in tl.static_range(3):
        values = tl.reshape(values, (64 >> (3 * step), 8))
        values = tl.max(values, 1) if FOLD == "max" else tl.min(values, 1)
        if level + step < top:
            node = tl.program_id(0) * (64 >> (3 * step)) + tl.arange(0, 64 >> (3 * step))
            place = _level_start(points, level + step) + node
            within = (node << (3 * (level + step + 1))) < points
            tl.store(out + place, values, mask=within)


@triton.jit(do_not_specialize=("points", "room", "level", "top"))
def box_tree_fwd_kernel(
    positions, order, boxes, least, points, room, level, top,
    D: tl.constexpr, LEAVES: tl.constexpr, BY_ORDER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Three levels of boxes, from the points (LEAVES) or from the level below `level`.

    boxes (2 * D, room): lower, then upper corners; least (room,): lowest index of a point.
    """
    node = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    here = (node << (3 * level)) < points
    below = _level_start(points, level - 1) + node
    for axis in tl.static_range(D):
        if LEAVES:
            low = tl.load(positions + node.to(tl.int64) * D + axis, mask=here, other=float("inf"))
            high = tl.where(here, low, -float("inf"))
        else:
            low = tl.load(boxes + axis * room + below, mask=here, other=float("inf"))
            high = tl.load(boxes + (D + axis) * room + below, mask=here, other=-float("inf"))
        _store_levels(low, boxes + axis * room, points, level, top, "min")
        _store_levels(high, boxes + (D + axis) * room, points, level, top, "max")
    if BY_ORDER:
        if LEAVES:
            name = tl.load(order + node, mask=here, other=0x7FFFFFFF).to(tl.int32)
        else:
            name = tl.load(least + below, mask=here, other=0x7FFFFFFF)
        _store_levels(name, least, points, level, top, "min")


@triton.jit
def _key(square, name):
    """One integer that is ordered like (squared distance, index)."""
    bits = square.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return (bits.to(tl.int64) << 32) | name.to(tl.int64)


@triton.jit
def _gap(planes, room, place, inside, x, D: tl.constexpr):
    """Distance along one axis to the boxes at `place` (8, TQ)."""
    low = tl.load(planes + place, mask=inside, other=0.0)
    high = tl.load(planes + D * room + place, mask=inside, other=0.0)
    return tl.maximum(tl.maximum(low - x[None, :], x[None, :] - high), 0.0)


@triton.jit
def _child_keys(
    boxes, least, child, level, start, end, x, y, z, points, room,
    D: tl.constexpr, BY_ORDER: tl.constexpr,
):  # fmt: skip
    """Keys (8, TQ) below which no point of a child lies; `child` (TQ,) is the first of eight."""
    child = child[None, :] + tl.arange(0, 8)[:, None]
    shift = 3 * level + 3
    first = child << shift
    inside = (first < end[None, :]) & (first + (1 << shift) > start[None, :])
    place = _level_start(points, level) + child
    gap = _gap(boxes, room, place, inside, x, D)
    square = gap * gap
    gap = _gap(boxes + room, room, place, inside, y, D)
    square += gap * gap
    if D == 3:
        gap = _gap(boxes + 2 * room, room, place, inside, z, D)
        square += gap * gap
    if BY_ORDER:
        name = tl.load(least + place, mask=inside, other=0)
    else:
        name = tl.maximum(first, start[None, :])
    return tl.where(inside, _key(square, name), _FAR)


@triton.jit
def _leaf_keys(
    positions, order, row, start, end, floor, x, y, z, D: tl.constexpr, BY_ORDER: tl.constexpr
):
    """Keys (8, TQ) of a leaf's points, those up to `floor` left out; `row` (TQ,) is the first."""
    row = row[None, :] + tl.arange(0, 8)[:, None]
    inside = (row >= start[None, :]) & (row < end[None, :])
    base = positions + row.to(tl.int64) * D
    difference = tl.load(base, mask=inside, other=0.0) - x[None, :]
    square = difference * difference
    difference = tl.load(base + 1, mask=inside, other=0.0) - y[None, :]
    square += difference * difference
    if D == 3:
        difference = tl.load(base + 2, mask=inside, other=0.0) - z[None, :]
        square += difference * difference
    name = tl.load(order + row, mask=inside, other=0) if BY_ORDER else row
    key = _key(square, name)
    return tl.where(inside & (key > floor[None, :]), key, _FAR)


@triton.jit
def _insert(nearest, worst, keys):
    """Put keys (8, TQ) into the lists `nearest` (K, TQ), in the places of the `worst` (TQ,)."""
    least = tl.min(keys, 0)
    while tl.max((least < worst).to(tl.int32), 0) > 0:
        closer = least < worst
        nearest = tl.where((nearest == worst[None, :]) & closer[None, :], least[None, :], nearest)
        worst = tl.max(nearest, 0)
        keys = tl.where(keys == least[None, :], _FAR, keys)
        least = tl.min(keys, 0)
    return nearest, worst


_SEARCH_INTEGERS = (
    "query_starts", "point_starts", "limits", "queries", "samples", "points", "room", "top",
    "seeds", "listed", "width",
)  # fmt: skip


@triton.jit(do_not_specialize=_SEARCH_INTEGERS)
def nearest_fwd_kernel(
    query, positions, query_order, order, boxes, least, index, distance,
    query_starts, point_starts, limits,
    queries, samples, points, room, top, seeds, listed, width,
    D: tl.constexpr, K: tl.constexpr, BY_ORDER: tl.constexpr, ALIGNED: tl.constexpr,
    RAGGED: tl.constexpr, TQ: tl.constexpr,
):  # fmt: skip
    """Fill the places from `listed` on, K at most, of the lists `index`, `distance` (Q, width).

    `top` is the level of the root, `seeds` how many leaves are searched first: their points are
    enough for all places up to the last one to fill. ALIGNED: queries and points follow the curve
    in step.
    """
    row = tl.program_id(0) * TQ + tl.arange(0, TQ)  # (TQ,)
    stored = row < queries
    row = tl.minimum(row, queries - 1)
    sample = sample_of(row, query_starts, samples, RAGGED)
    if RAGGED:
        start = tl.load(point_starts + sample)
        end = tl.load(point_starts + sample + 1)
        first_query = tl.load(query_starts + sample)
        last_query = tl.load(query_starts + sample + 1)
    else:
        start = sample * point_starts
        end = start + point_starts
        first_query = sample * query_starts
        last_query = first_query + query_starts
    aligned = (row - first_query).to(tl.int64) * (end - start) // (last_query - first_query)
    aligned = start + aligned.to(tl.int32)
    wanted = of_sample(limits, sample, RAGGED) - listed
    wanted = tl.where(stored, wanted, 0)
    if BY_ORDER:
        row = tl.load(query_order + row).to(tl.int32)
    base = query + row.to(tl.int64) * D
    x = tl.load(base)
    y = tl.load(base + 1)
    z = tl.load(base + 2) if D == 3 else x
    out = row.to(tl.int64) * width
    floor = tl.full((TQ,), -1, tl.int64)
    if listed > 0:
        last = tl.load(index + out + listed - 1)
        floor = tl.where(last < 0, _FAR, _key(tl.load(distance + out + listed - 1), last))

    slot = tl.arange(0, K)[:, None]
    # Unused places never are the worst; the others differ, so that one at a time is replaced.
    nearest = tl.where(slot < wanted[None, :], _FAR - slot.to(tl.int64), -1)  # (K, TQ)
    worst = tl.max(nearest, 0)

    child = tl.arange(0, 8)[:, None]
    home = aligned >> 3
    if not ALIGNED:
        home = tl.zeros((TQ,), tl.int32)
        for step in range(top):
            level = top - 1 - step
            keys = _child_keys(
                boxes, least, home * 8, level, start, end, x, y, z, points, room, D, BY_ORDER
            )
            closest = keys == tl.min(keys, 0)[None, :]
            home = home * 8 + tl.min(tl.where(closest, child, 7), 0)
    first_seed = tl.minimum(home - (seeds - 1) // 2, ((end - 1) >> 3) - seeds + 1)
    first_seed = tl.maximum(first_seed, start >> 3)
    for seed in range(seeds):
        keys = _leaf_keys(
            positions, order, (first_seed + seed) * 8, start, end, floor, x, y, z, D, BY_ORDER
        )
        nearest, worst = _insert(nearest, worst, keys)

    level = tl.where((wanted > 0) & (top > 0), top, -1)  # of the node to visit; -1: done
    path = tl.zeros((TQ,), tl.int32)  # its first row
    pending = tl.zeros((TQ,), tl.int64)  # bit 8 * level + i: child i of that level waits
    while tl.max(level, 0) >= 0:
        if tl.max(level, 0) > 0:
            below = tl.maximum(level - 1, 0)
            first = path >> (3 * below + 3)
            keys = _child_keys(
                boxes, least, first, below[None, :], start, end, x, y, z, points, room, D, BY_ORDER
            )
            leaf = first[None, :] + child
            known = (leaf >= first_seed[None, :]) & (leaf < first_seed[None, :] + seeds)
            known = known & (below[None, :] == 0)
            opened = (keys < worst[None, :]) & (level[None, :] > 0) & ~known
            bits = tl.sum(tl.where(opened, 1 << child, 0), 0)
            pending |= bits.to(tl.int64) << (8 * below)
        if tl.min(tl.abs(level), 0) == 0:
            keys = _leaf_keys(positions, order, path, start, end, floor, x, y, z, D, BY_ORDER)
            keys = tl.where(level[None, :] == 0, keys, _FAR)
            nearest, worst = _insert(nearest, worst, keys)
        lowest = pending & -pending  # the deepest level is next
        bit = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
        pending ^= lowest
        level = tl.where(lowest != 0, bit >> 3, -1)
        shift = 3 * level + 3
        path = ((path >> (shift + 3)) << (shift + 3)) + ((bit & 7) << shift)

    keys = tl.where(nearest < 0, _FAR, nearest)
    for place in tl.static_range(K):
        least_key = tl.min(keys, 0)
        keys = tl.where(keys == least_key[None, :], _FAR, keys)
        found = least_key < _NONE
        square = (least_key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if listed + place < width:
            name = tl.where(found, least_key, -1).to(tl.int32)
            tl.store(index + out + listed + place, name, mask=stored)
            square = tl.where(found, square, float("inf"))
            tl.store(distance + out + listed + place, square, mask=stored)


def _search_rounds(a):
    # Data decides on insertions and visits: these are what the interpreter counted for the centers
    # of clusters of eight on a lattice of 32 x 32, six of each token.
    return {
        "span": halvings(a["samples"]),
        "step": a["top"],
        "seed": a["seeds"],
        "seed.least": 4.1 * a["seeds"],
        "level": a["top"] + 1.9,
        "level.least": 3.1,
    }


@cache
def _order_variant(dimensions, ragged, bits):
    return Variant(
        curve_order_fwd_kernel,
        (
            *(torch.float32,) * 5,
            torch.int64,
            torch.int32 if ragged else "i32",
            "i32",
            "i32",
        ),
        {"D": dimensions, "BITS": bits, "RAGGED": ragged, "BLOCK": _BLOCK},
        rounds=lambda a: {"step": a["BITS"] // a["D"], "span": halvings(a["samples"])},
    )


@cache
def _tree_variant(dimensions, leaves, by_order):
    order = torch.int64 if by_order else torch.int32
    return Variant(
        box_tree_fwd_kernel,
        (torch.float32, order, torch.float32, torch.int32, *("i32",) * 4),
        {"D": dimensions, "LEAVES": leaves, "BY_ORDER": by_order, "ROWS": _ROWS},
    )


@cache
def _search_variant(dimensions, width, by_order, aligned, ragged):
    order = torch.int64 if by_order else torch.int32
    tables = torch.int32 if ragged else "i32"
    return Variant(
        nearest_fwd_kernel,
        (
            *(torch.float32, torch.float32, order, order, torch.float32, torch.int32),
            *(torch.int32, torch.float32, tables, tables, tables),
            *("i32",) * 8,
        ),
        {
            "D": dimensions,
            "K": next(k for k in _LISTS if width <= k),
            "BY_ORDER": by_order,
            "ALIGNED": aligned,
            "RAGGED": ragged,
            "TQ": _QUERIES,
        },
        num_warps=1,
        fp_fusion=False,
        rounds=_search_rounds,
    )


def variants():
    for dimensions in (2, 3):
        for ragged in (False, True):
            for bits in _CURVE_BITS:
                yield _order_variant(dimensions, ragged, bits)
            for by_order, aligned in ((False, True), (True, True), (True, False)):
                for width in _LISTS:
                    yield _search_variant(dimensions, width, by_order, aligned, ragged)
        for leaves in (False, True):
            for by_order in (False, True):
                yield _tree_variant(dimensions, leaves, by_order)


def _curve_order(positions, sizes):
    """Rows sorted by sample, along a Hilbert curve in each: (T,) int64."""
    tokens, dimensions = positions.shape
    low, high = positions.aminmax(dim=0)
    # Of a part of the points the middle half, but for rows that a lattice's period would pick.
    some = positions[:: tokens // _QUARTILES_FROM | 1].sort(0).values
    first, third = some[len(some) // 4], some[3 * len(some) // 4]
    reach = (third - first).amax()  # twice: where all of an even density lies
    reach = 2 * torch.where(reach > 0, reach, (high * 0.5 - low * 0.5).amax())
    center = first * 0.5 + third * 0.5
    keys = torch.empty(tokens, dtype=torch.int64, device=positions.device)
    ragged = len(set(sizes)) > 1
    starts = sizes[0]
    if ragged:
        starts = from_host(starts_of(sizes), torch.int32, positions.device)
    variant = _order_variant(dimensions, ragged, _CURVE_BITS[len(sizes) >= _FEW_SAMPLES])
    grid = (triton.cdiv(tokens, _BLOCK),)
    variant.launch(grid, positions, low, high, center, reach, keys, starts, tokens, len(sizes))
    return torch.sort(keys, stable=True).indices


def _plant(positions, order):
    """The tree over rows that follow a curve: boxes (2 * D, room), lowest indices (room,), levels
    below the root.
    """
    points, dimensions = positions.shape
    top = 0
    while 8 ** (top + 1) < points:
        top += 1
    room = (points - (points >> (3 * top))) // 7 + 2 * top  # `_level_start`
    boxes = torch.empty(2 * dimensions, room, device=positions.device, dtype=torch.float32)
    least = torch.empty(room, dtype=torch.int32, device=positions.device)
    by_order = order is not None
    for level in range(0, top, 3):
        variant = _tree_variant(dimensions, level == 0, by_order)
        grid = (triton.cdiv(points, 8**level * _ROWS),)
        names = order if by_order else least
        variant.launch(grid, positions, names, boxes, least, points, room, level, top)
    return boxes, least, top


def nearest(query, points, query_sizes, point_sizes, limits, width, along_curve):
    """See `pointformer.kernels.neighbors`."""
    points = points.detach().contiguous()
    asking = points if query is None else query.detach().contiguous()
    queries, dimensions = asking.shape
    device = points.device
    index = torch.empty(queries, width, dtype=torch.int32, device=device)
    distance = torch.empty(queries, width, device=device, dtype=torch.float32)
    if queries == 0 or width == 0 or len(points) == 0:
        return index.fill_(-1), distance.fill_(torch.inf)
    order = query_order = None
    if not along_curve:
        order = _curve_order(points, point_sizes)
        query_order = order if query is None else _curve_order(asking, query_sizes)
        points = points[order]
    boxes, least, top = _plant(points, order)
    limits = [min(pair) for pair in zip(limits, point_sizes, strict=True)]
    ragged = len(set(zip(query_sizes, point_sizes, limits, strict=True))) > 1
    tables = (query_sizes[0], point_sizes[0], limits[0])
    if ragged:
        columns = [starts_of(query_sizes), starts_of(point_sizes), [*limits, 0]]
        tables = from_host(columns, torch.int32, device)
    names = (least, least) if along_curve else (query_order, order)
    aligned = along_curve or query is None
    longest = min(width, _IN_LIST)
    variant = _search_variant(dimensions, longest, not along_curve, aligned, ragged)
    grid = (triton.cdiv(queries, _QUERIES),)
    for listed in range(0, width, variant.constants["K"]):
        last = min(width, listed + variant.constants["K"])
        seeds = -(-last // 8) + 2  # the outer leaves may belong to other samples for the most part
        variant.launch(
            grid, asking, points, *names, boxes, least, index, distance, *tables,
            queries, len(query_sizes), len(points), boxes.shape[1], top, seeds, listed, width,
        )  # fmt: skip
    return index, distance
