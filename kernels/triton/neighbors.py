"""Nearest points on GPUs: a box tree over points in curve order, searched by tiles of queries.

The tree is implicit: a leaf is eight consecutive rows, a node 32 consecutive leaves or nodes. It
spans the rows of the whole batch; a query sees only what has rows of its own sample. It adapts to
any density and takes memory in proportion to the points.

A tile is 32 queries of one sample, neighbors along the curve: a warp whose threads each hold the
list of a query in registers, sorted. First each query bounds its list from above, by the points
that stand beside it in the order of the curve. Then the tile goes down the tree and takes what any
of its queries can use: the 32 children of a node are tested against the box of the tile, a thread
each, and those that pass against each query. So threads do the same at the same time, whatever the
density; a tile that is torn apart by a gap costs what its parts do.

Leaves are visited in the order of their rows: of equally far points the first has the lowest row.
Where rows are not the points' indices, indices are compared too. Bounds of boxes are rounded as
distances are, so they need no margin. Longer lists take several passes.
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

_INFINITE = tl.constexpr(0x7F800000)  # bits of a float
_NOWHERE = tl.constexpr(0x7FFFFFFF)
_LEAF = tl.constexpr(8)
_CHILDREN = tl.constexpr(32)
_IN_LIST = 32  # the longest list kept in registers
_LISTS = (4, 6, 10, 16, _IN_LIST)
_QUERIES = 32  # of a tile
_BESIDE = 10  # points that bound the list of a query, besides as many as are listed
_ROWS = 1024  # two levels of the tree at once
_BLOCK = 256
_CURVE_BITS = (48, 42)  # of a place along the curve, for all axes together: in few samples, in many
_FEW_SAMPLES = 1 << 15
_QUARTILES_FROM = 1024  # points of the batch


@triton.jit
def _log_rows(level):
    """Of a box."""
    return 3 + 5 * level


@triton.jit
def _level_start(points, level):
    """Where the boxes of a level are: there is room for all that have rows, on each of them."""
    return (points - (points >> (5 * level))) * 4 // 31 + 2 * level


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
def _store_levels(values, out, points, level, top, FOLD: tl.constexpr, FANS: tl.constexpr):
    """Fold values of the level below by groups, twice, and store what becomes of them."""
    for step in tl.static_range(2):
        values = tl.reshape(values, (values.shape[0] // FANS[step], FANS[step]))
        values = tl.max(values, 1) if FOLD == "max" else tl.min(values, 1)
        if level + step <= top:
            node = tl.program_id(0) * values.shape[0] + tl.arange(0, values.shape[0])
            within = (node << _log_rows(level + step)) < points
            tl.store(out + _level_start(points, level + step) + node, values, mask=within)


@triton.jit(do_not_specialize=("points", "room", "level", "top"))
def box_tree_fwd_kernel(
    positions, order, rows, boxes, least, points, room, level, top,
    D: tl.constexpr, LEAVES: tl.constexpr, BY_ORDER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Two levels of boxes, from the points (LEAVES) or from the level below `level`.

    rows (8 * leaves, D): the points in order, filled up to full leaves; boxes (2 * D, room): lower,
    then upper corners; least (room,): lowest index of a point.
    """
    node = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    FANS: tl.constexpr = (8 if LEAVES else 32, 32)
    if LEAVES:
        here = node < points
        name = tl.load(order + node, mask=here, other=0x7FFFFFFF) if BY_ORDER else node
        base = positions + name.to(tl.int64) * D
        copy = rows + node.to(tl.int64) * D
        copied = node < (points + 7) // 8 * 8
        below = node
    else:
        below = _level_start(points, level - 1) + node
        here = (node << _log_rows(level - 1)) < points
    for axis in tl.static_range(D):
        if LEAVES:
            low = tl.load(base + axis, mask=here, other=float("inf"))
            high = tl.where(here, low, -float("inf"))
            tl.store(copy + axis, low, mask=copied)
        else:
            low = tl.load(boxes + axis * room + below, mask=here, other=float("inf"))
            high = tl.load(boxes + (D + axis) * room + below, mask=here, other=-float("inf"))
        _store_levels(low, boxes + axis * room, points, level, top, "min", FANS)
        _store_levels(high, boxes + (D + axis) * room, points, level, top, "max", FANS)
    if BY_ORDER:
        if not LEAVES:
            name = tl.load(least + below, mask=here, other=0x7FFFFFFF)
        _store_levels(name.to(tl.int32), least, points, level, top, "min", FANS)


@triton.jit
def _bits(square):
    """Integers ordered as these floats are, which are not negative; NaN is the largest."""
    return square.to(tl.uint32, bitcast=True)


@triton.jit
def _box_squares(
    boxes, room, place, low_x, high_x, low_y, high_y, low_z, high_z, D: tl.constexpr
):  # fmt: skip
    """Bits of the squared distances between boxes of the tree and others, or points."""
    gap = tl.maximum(tl.load(boxes + place) - high_x, low_x - tl.load(boxes + D * room + place))
    gap = tl.maximum(gap, 0.0)
    square = gap * gap
    boxes += room
    gap = tl.maximum(tl.load(boxes + place) - high_y, low_y - tl.load(boxes + D * room + place))
    gap = tl.maximum(gap, 0.0)
    square += gap * gap
    if D == 3:
        boxes += room
        gap = tl.maximum(tl.load(boxes + place) - high_z, low_z - tl.load(boxes + D * room + place))
        gap = tl.maximum(gap, 0.0)
        square += gap * gap
    return _bits(square)


@triton.jit
def _point_squares(rows, row, x, y, z, D: tl.constexpr):
    """Bits of the squared distances to the points in these rows."""
    base = rows + row * D  # within int32: see `_MOST_POINTS` in pointformer.geometry.neighbors
    difference = tl.load(base) - x
    square = difference * difference
    difference = tl.load(base + 1) - y
    square += difference * difference
    if D == 3:
        difference = tl.load(base + 2) - z
        square += difference * difference
    return _bits(square)


@triton.jit
def _before(square, name, other, other_name, BY_ORDER: tl.constexpr):
    """Whether a point precedes another in a list, or may; without names: if it comes later."""
    if BY_ORDER:
        earlier = (square < other) | ((square == other) & (name < other_name))
    else:
        earlier = square < other
    return earlier


@triton.jit
def _useful(
    boxes, least, box, room, x, y, z, squares, names,
    D: tl.constexpr, K: tl.constexpr, BY_ORDER: tl.constexpr,
):  # fmt: skip
    """Whether a box may have a point for the list of any query."""
    gap = _box_squares(boxes, room, box, x, x, y, y, z, z, D)
    name = tl.load(least + box) if BY_ORDER else 0
    useful = _before(gap, name, squares[K - 1], names[K - 1], BY_ORDER)
    return tl.max(useful.to(tl.int32), 0) > 0


@triton.jit
def _insert_square(squares, square, K: tl.constexpr):
    """The sorted list `squares`, K of (TQ,), with one more in it and the last one dropped."""
    longer = (tl.minimum(squares[0], square),)
    for slot in tl.static_range(1, K):
        longer += (tl.maximum(squares[slot - 1], tl.minimum(squares[slot], square)),)
    return longer


@triton.jit
def _insert_name(squares, names, square, name, K: tl.constexpr, BY_ORDER: tl.constexpr):
    """The same of the names that belong to the squares."""
    here = _before(square, name, squares[0], names[0], BY_ORDER)
    longer = (tl.where(here, name, names[0]),)
    for slot in tl.static_range(1, K):
        above = here
        here = _before(square, name, squares[slot], names[slot], BY_ORDER)
        longer += (tl.where(above, names[slot - 1], tl.where(here, name, names[slot])),)
    return longer


@triton.jit
def _lowest_bit(bits):
    """Its number, of one or more bits."""
    lowest = (bits & -bits).to(tl.float32).to(tl.int32, bitcast=True)
    return ((lowest >> 23) & 255) - 127


_SEARCH_INTEGERS = (
    "query_starts", "point_starts", "limits", "tile_starts", "samples", "points", "room",
    "top", "beside", "listed", "width", "queries", "copies",
)  # fmt: skip


@triton.jit(do_not_specialize=_SEARCH_INTEGERS)
def nearest_fwd_kernel(
    query, rows, query_order, order, home, boxes, least, index, distance,
    query_starts, point_starts, limits, tile_starts,
    samples, points, room, top, beside, listed, width, queries, copies, reach,
    D: tl.constexpr, K: tl.constexpr, BY_ORDER: tl.constexpr, GIVEN: tl.constexpr,
    AGAIN: tl.constexpr, RAGGED: tl.constexpr, TQ: tl.constexpr,
):  # fmt: skip
    """Fill the places from `listed` on (0 unless AGAIN), K at most, of the lists `index`,
    `distance` (Q, width), and their copies for as many more queries and points. Points beyond the
    squared distance `reach` are left out.

    `top` is the level of the highest boxes, 32 at most; `beside` points around its place on the
    curve bound a query's list. That place is in `home` where queries are not the points (GIVEN) and
    follow a curve of their own; else queries and points follow the curve in step.
    """
    tile = tl.program_id(0)
    sample = sample_of(tile, tile_starts, samples, RAGGED)
    if RAGGED:
        start = tl.load(point_starts + sample)
        end = tl.load(point_starts + sample + 1)
        first_query = tl.load(query_starts + sample)
        last_query = tl.load(query_starts + sample + 1)
        tile -= tl.load(tile_starts + sample)
    else:
        start = sample * point_starts
        end = start + point_starts
        first_query = sample * query_starts
        last_query = first_query + query_starts
        tile -= sample * tile_starts
    within = tile * TQ + tl.arange(0, TQ)  # (TQ,)
    stored = first_query + within < last_query
    within = tl.minimum(within, last_query - first_query - 1)
    row = first_query + within
    beside = tl.minimum(beside, end - start)
    if GIVEN:
        place = tl.load(home + row).to(tl.int32)
    else:
        # About: it only has to be near.
        ratio = (end - start).to(tl.float32) / (last_query - first_query).to(tl.float32)
        place = start + (within.to(tl.float32) * ratio).to(tl.int32)
    place = tl.maximum(tl.minimum(place - beside // 2, end - beside), start)
    if BY_ORDER:
        row = tl.load(query_order + row).to(tl.int32)
    base = query + row.to(tl.int64) * D
    x = tl.load(base)
    y = tl.load(base + 1)
    z = tl.load(base + 2) if D == 3 else x
    out = row.to(tl.int64) * width
    wanted = tl.minimum(tl.maximum(of_sample(limits, sample, RAGGED) - listed, 0), K)
    if AGAIN:  # what is up to the last one listed is left out
        last = tl.load(index + out + listed - 1)
        floor = _bits(tl.load(distance + out + listed - 1))

    # Places that are not wanted come first, with squares that nothing precedes.
    squares = ()
    for slot in tl.static_range(K):
        unused = tl.where(slot < K - wanted, 0, _INFINITE).to(tl.uint32)
        squares += (tl.zeros((TQ,), tl.uint32) + unused,)
    for step in range(beside):
        square = _point_squares(rows, place + step, x, y, z, D)
        if AGAIN:
            name = tl.load(order + place + step).to(tl.int32) if BY_ORDER else place + step
            square = tl.where(_before(floor, last, square, name, True), square, _INFINITE)
        squares = _insert_square(squares, square, K)
    bound = tl.minimum(squares[K - 1], _bits(tl.zeros((TQ,), tl.float32) + reach))
    bound = tl.minimum(bound, _INFINITE - 1) + 1
    squares, names = (), ()
    for slot in tl.static_range(K):
        squares += (tl.where(slot < K - wanted, tl.zeros((TQ,), tl.uint32), bound),)
        names += (tl.full((TQ,), -1, tl.int32),)

    low_x, high_x = tl.min(x, 0), tl.max(x, 0)
    low_y, high_y = tl.min(y, 0), tl.max(y, 0)
    low_z, high_z = low_x, high_x
    if D == 3:
        low_z, high_z = tl.min(z, 0), tl.max(z, 0)
    lane = tl.arange(0, _CHILDREN)
    waiting = tl.zeros((_CHILDREN,), tl.int32)  # of lane l: the children at level l to be visited
    first = 0  # row of the node
    level = top  # of its children
    entered = wanted > 0
    while level >= 0:
        size = _log_rows(level)
        child = (first >> size) + lane
        farthest = tl.max(squares[K - 1], 0)
        box = _level_start(points, level) + tl.minimum(child, (points - 1) >> size)
        gap = _box_squares(boxes, room, box, low_x, high_x, low_y, high_y, low_z, high_z, D)
        near = gap <= farthest if BY_ORDER else gap < farthest
        near &= ((child << size) < end) & ((child + 1) << size > start) & entered
        if level == 0:
            leaf = tl.min(tl.where(near, child, _NOWHERE), 0)
            while leaf < _NOWHERE:
                if _useful(boxes, least, leaf, room, x, y, z, squares, names, D, K, BY_ORDER):
                    bits = tl.zeros((TQ,), tl.int32)
                    for point in tl.static_range(_LEAF):
                        square = _point_squares(rows, leaf * 8 + point, x, y, z, D)
                        useful = square < squares[K - 1]
                        if BY_ORDER:
                            useful = square <= squares[K - 1]
                        bits |= tl.where(useful, 1 << point, 0)
                    taken = tl.reduce_or(bits, 0)
                    taken &= 255 << tl.minimum(tl.maximum(start - leaf * 8, 0), 8)
                    taken &= 255 >> tl.minimum(tl.maximum(leaf * 8 + 8 - end, 0), 8)
                    while taken != 0:
                        found = leaf * 8 + _lowest_bit(taken)
                        taken &= taken - 1
                        square = _point_squares(rows, found, x, y, z, D)
                        name = tl.load(order + found).to(tl.int32) if BY_ORDER else found
                        if AGAIN:
                            square = tl.where(
                                _before(floor, last, square, name, True), square, _INFINITE
                            )
                        names = _insert_name(squares, names, square, name, K, BY_ORDER)
                        squares = _insert_square(squares, square, K)
                near &= child > leaf
                leaf = tl.min(tl.where(near, child, _NOWHERE), 0)
        else:
            waiting = tl.where(lane == level, tl.sum(tl.where(near, 1 << lane, 0), 0), waiting)
        level = tl.min(tl.where(waiting != 0, lane, _CHILDREN), 0)
        if level < _CHILDREN:
            children = tl.sum(tl.where(lane == level, waiting, 0), 0)
            waiting = tl.where(lane == level, children & (children - 1), waiting)
            size = _log_rows(level)
            first = (first >> (size + 5) << (size + 5)) + (_lowest_bit(children) << size)
            node = _level_start(points, level) + (first >> size)
            entered = _useful(boxes, least, node, room, x, y, z, squares, names, D, K, BY_ORDER)
            level -= 1
        else:
            level = -1

    for copy in range(copies):
        out = (row + copy * queries).to(tl.int64) * width
        for slot in tl.static_range(K):
            entry = slot - (K - wanted)
            entry = listed + tl.where(entry < 0, entry + K, entry)
            if entry < width:
                name = tl.where(names[slot] < 0, -1, names[slot] + copy * points)
                tl.store(index + out + entry, name, mask=stored)
                square = squares[slot].to(tl.float32, bitcast=True)
                square = tl.where(names[slot] < 0, float("inf"), square)
                tl.store(distance + out + entry, square, mask=stored)


def _search_rounds(a):
    # Counted for tiles of a lattice that ask for 6 of its clusters of 8.
    return {
        "span": halvings(a["samples"]),
        "step": min(a["beside"], a["points"] / a["samples"]),
        "level": a["top"] + 2.1,
        "leaf": 2 + a["K"],
        "taken": 4 * a["K"],
        "copy": a["copies"],
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
        writes=("keys",),
        tiles={"BLOCK": (128, 512)},
        rounds=lambda a: {"step": a["BITS"] // a["D"], "span": halvings(a["samples"])},
    )


@cache
def _tree_variant(dimensions, leaves, by_order):
    order = torch.int64 if by_order else torch.int32
    return Variant(
        box_tree_fwd_kernel,
        (*(torch.float32, order, torch.float32, torch.float32, torch.int32), *("i32",) * 4),
        {"D": dimensions, "LEAVES": leaves, "BY_ORDER": by_order, "ROWS": _ROWS},
        max_registers=128,
    )


@cache
def _search_variant(dimensions, width, by_order, given, again, ragged):
    order = torch.int64 if by_order else torch.int32
    tables = torch.int32 if ragged else "i32"
    return Variant(
        nearest_fwd_kernel,
        (
            *(torch.float32, torch.float32, order, order, torch.int64 if given else order),
            *(torch.float32, torch.int32, torch.int32, torch.float32),
            *(tables,) * 4,
            *("i32",) * 9,
            "fp32",
        ),
        {
            "D": dimensions,
            "K": next(k for k in _LISTS if width <= k),
            "BY_ORDER": by_order,
            "GIVEN": given,
            "AGAIN": again,
            "RAGGED": ragged,
            "TQ": _QUERIES,
        },
        # Later parts of a list read the earlier ones.
        writes=() if again else ("index", "distance"),
        num_warps=1,
        fp_fusion=False,
        max_registers=255 if width > 16 else None,  # else it spills a few for more warps
        rounds=_search_rounds,
    )


def variants():
    for dimensions in (2, 3):
        for ragged in (False, True):
            for bits in _CURVE_BITS:
                yield _order_variant(dimensions, ragged, bits)
            for by_order, given in ((False, False), (True, False), (True, True)):
                for width in _LISTS:
                    yield _search_variant(dimensions, width, by_order, given, False, ragged)
                yield _search_variant(dimensions, _IN_LIST, by_order, given, True, ragged)
        for leaves in (False, True):
            for by_order in (False, True):
                yield _tree_variant(dimensions, leaves, by_order)


def _frame(points):
    """Box of the points, and the center and reach of most of them: see `curve_order_fwd_kernel`."""
    low, high = points.aminmax(dim=0)
    # Of a part of the points the middle half, but for rows that a lattice's period would pick.
    some = points[:: len(points) // _QUARTILES_FROM | 1].sort(0).values
    first, third = some[len(some) // 4], some[3 * len(some) // 4]
    reach = (third - first).amax()  # twice: where all of an even density lies
    reach = 2 * torch.where(reach > 0, reach, (high * 0.5 - low * 0.5).amax())
    return low, high, first * 0.5 + third * 0.5, reach


def _curve_order(positions, sizes, frame):
    """Keys (sample, place along a Hilbert curve), sorted, and the rows that have them: (T,) int64
    each.
    """
    tokens, dimensions = positions.shape
    keys = torch.empty(tokens, dtype=torch.int64, device=positions.device)
    ragged = len(set(sizes)) > 1
    starts = sizes[0]
    if ragged:
        starts = from_host(starts_of(sizes), torch.int32, positions.device)
    variant = _order_variant(dimensions, ragged, _CURVE_BITS[len(sizes) >= _FEW_SAMPLES])
    variant.launch(
        lambda constants: (triton.cdiv(tokens, constants["BLOCK"]),),
        *(positions, *frame, keys, starts, tokens, len(sizes)),
    )
    return torch.sort(keys, stable=True)


def _plant(positions, order):
    """The tree over positions whose rows follow a curve, in this order if one is given: rows, boxes
    (2 * D, room), lowest indices (room,), the level of the highest boxes.
    """
    points, dimensions = positions.shape
    top = 0
    while 8 * 32 ** (top + 1) < points:
        top += 1
    room = (points - (points >> (5 * (top + 1)))) * 4 // 31 + 2 * (top + 1)  # `_level_start`
    leaves = triton.cdiv(points, 8)
    rows = torch.empty(8 * leaves, dimensions, device=positions.device, dtype=torch.float32)
    boxes = torch.empty(2 * dimensions, room, device=positions.device, dtype=torch.float32)
    least = torch.empty(room, dtype=torch.int32, device=positions.device)
    by_order = order is not None
    for level in range(0, top + 1, 2):
        variant = _tree_variant(dimensions, level == 0, by_order)
        below = leaves if level > 0 else 8 * leaves
        below = triton.cdiv(below, 32 ** max(level - 1, 0))
        names = order if by_order else least
        variant.launch(
            (triton.cdiv(below, _ROWS),),
            *(positions, names, rows, boxes, least, points, room, level, top),
        )
    return rows, boxes, least, top


def nearest(query, points, query_sizes, point_sizes, limits, width, reach, along_curve, copies):
    """See `pointformer.kernels.neighbors`."""
    points = points.detach().contiguous()
    asking = points if query is None else query.detach().contiguous()
    queries, dimensions = asking.shape
    device = points.device
    index = torch.empty(copies * queries, width, dtype=torch.int32, device=device)
    distance = torch.empty(copies * queries, width, device=device, dtype=torch.float32)
    if queries == 0 or width == 0 or len(points) == 0:
        return index.fill_(-1), distance.fill_(torch.inf)
    order = query_order = home = None
    if not along_curve:
        frame = _frame(points)
        keys, order = _curve_order(points, point_sizes, frame)
        query_order = order
        if query is not None:
            query_keys, query_order = _curve_order(asking, query_sizes, frame)
            home = torch.searchsorted(keys, query_keys)
    rows, boxes, least, top = _plant(points, order)
    limits = [min(pair) for pair in zip(limits, point_sizes, strict=True)]
    ragged = len(set(zip(query_sizes, point_sizes, limits, strict=True))) > 1
    given = home is not None
    longest = min(width, _IN_LIST)
    options = (dimensions, longest, not along_curve, given)
    tile = _search_variant(*options, False, ragged).constants["TQ"]
    tiles = [triton.cdiv(size, tile) for size in query_sizes]
    tables = (query_sizes[0], point_sizes[0], limits[0], tiles[0])
    if ragged:
        columns = [starts_of(query_sizes), starts_of(point_sizes), [*limits, 0], starts_of(tiles)]
        tables = from_host(columns, torch.int32, device)
    names = (least, least) if along_curve else (query_order, order)
    home = home if given else names[0]
    for listed in range(0, width, longest):
        variant = _search_variant(*options, listed > 0, ragged)
        last = min(width, listed + variant.constants["K"])
        variant.launch(
            (sum(tiles),), asking, rows, *names, home, boxes, least, index, distance, *tables,
            len(query_sizes), len(points), boxes.shape[1], top, last + _BESIDE, listed, width,
            queries, copies, float(reach),
        )  # fmt: skip
    return index, distance
