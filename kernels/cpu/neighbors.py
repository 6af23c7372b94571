"""Nearest points on CPU: a box tree over points in curve order, searched per block of queries.

The tree is implicit. Eight consecutive points form a leaf, the boxes of eight consecutive leaves
form a node, and so on up to one root per sample, so that it adapts to any density and takes memory
in proportion to the points alone. Unused lanes hold NaN: they compare false with every bound.

Eight consecutive queries are searched together. Let r be the distance from the middle of their
bounding box to the last of its nearest points, and rho the box's half diagonal: each query has that
many points within r + rho, so its nearest ones are no farther from the box. These candidates are
collected once, and a vector with a lane for each query keeps the nearest of them. Where there are
too many (queries far apart, or many equal points) the tree is searched for each query alone. The
result of one search bounds the next, because consecutive queries are usually near each other.
"""

import numba
import numpy as np
import torch

from pointformer.kernels.cpu.clustering import curve_code
from pointformer.kernels.cpu.runtime import called, kernel
from pointformer.kernels.cpu.simd import (
    advance,
    allocate,
    as_int32,
    bits_less_equal,
    f32,
    free,
    load,
    maximum,
    next_float,
    plus,
    pointer,
    splat,
    store,
    where_less,
    zero,
)
from pointformer.kernels.tables import shifted_copies

_LANES = 8
_BLOCKS_PER_CHUNK = 32  # of work for a thread
STACK = 8 * 12  # seven waiting per level, 11 levels hold 2**33 points
_MOST_IN_BLOCK = 32  # longer lists are searched for each query alone: inserting is quadratic
_MARGIN = f32(1.00001)  # bounds are computed in float32
_TINY = f32(1e-36)  # and squares of small differences underflow
_LAST = np.int32(2**31 - 1)
_CURVE_BITS = 42  # of a position's number along the curve, for all axes together


@called
def _square(dx, dy, dz):
    return plus(plus(dx * dx, dy * dy), dz * dz)


@called
def point_distances(points, leaf, x, y, z):
    """Squared distances of a leaf's points to a position."""
    base = leaf * 24
    return _square(load(points, base) - x, load(points, base + 8) - y, load(points, base + 16) - z)


@called
def _gap(low, high, box_low, box_high):
    # NaN second: it must win.
    return maximum(zero(), maximum(low - box_high, box_low - high))


@called
def box_distances(boxes, node, low, high):
    """Squared distances of a node's boxes to a box."""
    base = node * 48
    return _square(
        _gap(load(boxes, base), load(boxes, base + 24), low[0], high[0]),
        _gap(load(boxes, base + 8), load(boxes, base + 32), low[1], high[1]),
        _gap(load(boxes, base + 16), load(boxes, base + 40), low[2], high[2]),
    )


@called
def _point_gaps(points, leaf, low, high):
    """Squared distances of a leaf's points to a box."""
    base = leaf * 24
    x, y, z = load(points, base), load(points, base + 8), load(points, base + 16)
    return _square(
        _gap(x, x, low[0], high[0]), _gap(y, y, low[1], high[1]), _gap(z, z, low[2], high[2])
    )


@called
def _widen(square, dx, dy, dz):
    """Squared radius that holds a ball of squared radius `square` after a move by (dx, dy, dz)."""
    moved = np.sqrt(square + _TINY) + np.sqrt(dx * dx + dy * dy + dz * dz + _TINY)
    return moved * moved * _MARGIN


@called
def _bounding_box(place):
    """Corners of the box around eight positions (3 x 8)."""
    low = high = (place[0], place[8], place[16])
    for lane in range(1, _LANES):
        x, y, z = place[lane], place[8 + lane], place[16 + lane]
        low = (min(low[0], x), min(low[1], y), min(low[2], z))
        high = (max(high[0], x), max(high[1], y), max(high[2], z))
    return low, high


@called
def _collect(tree, sample, low, high, reach, stack, candidates, capacity):
    """Slots of the points within `reach` (squared) of a box by ascending id; -1 if too many."""
    points, ids, boxes, children, _, root = tree
    if not reach < np.inf:  # a list starts with infinite distances, so none can enter it
        return -1
    limit = splat(reach)
    low = (splat(low[0]), splat(low[1]), splat(low[2]))
    high = (splat(high[0]), splat(high[1]), splat(high[2]))
    found = 0
    depth = 1
    stack[0] = root[sample]
    while depth > 0:
        depth -= 1
        code = stack[depth]
        if code >= 0:
            bits = bits_less_equal(box_distances(boxes, code, low, high), limit)
            for back in range(_LANES):
                lane = _LANES - 1 - back
                stack[depth] = children[code * _LANES + lane]
                depth += (bits >> lane) & 1
        else:
            bits = bits_less_equal(_point_gaps(points, ~code, low, high), limit)
            for lane in range(_LANES):
                candidates[found] = ~code * _LANES + lane
                found += (bits >> lane) & 1
            if found > capacity - _LANES:
                return -1
    for gap in (132, 23, 4, 1):  # Shell sort; most lists are in order already
        for i in range(gap, found):
            slot = candidates[i]
            j = i
            while j >= gap and ids[candidates[j - gap]] > ids[slot]:
                candidates[j] = candidates[j - gap]
                j -= gap
            candidates[j] = slot
    return found


@called
def _search_block(points, candidates, found, limit, reach, place, distance, choice):
    """The nearest candidates of eight queries, the earlier of equal ones first.

    Places that are left have a distance beyond `reach`, unless that is infinite.
    """
    x, y, z = load(place, 0), load(place, _LANES), load(place, 2 * _LANES)
    beyond = splat(next_float(reach))
    for slot in range(limit):
        store(distance, slot * _LANES, beyond)
        store(choice, slot * _LANES, zero())
    last = 0  # the lists are no longer
    for i in range(found):
        base = (candidates[i] >> 3) * 24 + (candidates[i] & 7)
        new = _square(
            splat(points[base]) - x, splat(points[base + 8]) - y, splat(points[base + 16]) - z
        )
        here = load(distance, last * _LANES)
        if bits_less_equal(here, new) == 255:
            continue
        name = splat(f32(i))
        here_name = load(choice, last * _LANES)
        for back in range(last):
            at = (last - back) * _LANES
            above = load(distance, at - _LANES)
            above_name = load(choice, at - _LANES)
            store(distance, at, where_less(new, here, where_less(new, above, above, new), here))
            store(
                choice,
                at,
                where_less(new, here, where_less(new, above, above_name, name), here_name),
            )
            here, here_name = above, above_name
        store(distance, 0, where_less(new, here, new, here))
        store(choice, 0, where_less(new, here, name, here_name))
        last = min(last + 1, limit - 1)


@called
def _search_one(tree, sample, limit, worst, x, y, z, scratch, out_index, out_distance):
    """The nearest points of one query by distance, then id; the last is no farther than `worst`."""
    points, ids, boxes, children, least, root = tree
    stack, gaps, squares = scratch
    x, y, z = splat(x), splat(y), splat(z)
    center = (x, y, z)
    worst_id = _LAST
    found = 0
    depth = 0
    code = root[sample]
    while True:
        if code >= 0:
            near = box_distances(boxes, code, center, center)
            bits = bits_less_equal(near, splat(worst))
            store(squares, 0, near)
            nearest = depth
            for back in range(_LANES):
                lane = _LANES - 1 - back
                stack[depth] = code * _LANES + lane
                gaps[depth] = squares[lane]
                if gaps[depth] <= gaps[nearest]:
                    nearest = depth
                depth += (bits >> lane) & 1
            if depth > nearest + 1:  # the nearest child is next
                stack[nearest], stack[depth - 1] = stack[depth - 1], stack[nearest]
                gaps[nearest], gaps[depth - 1] = gaps[depth - 1], gaps[nearest]
        else:
            near = point_distances(points, ~code, x, y, z)
            bits = bits_less_equal(near, splat(worst))
            store(squares, 0, near)
            for lane in range(_LANES):
                square = squares[lane]
                name = ids[~code * _LANES + lane]
                if ((bits >> lane) & 1) == 0 or square > worst:
                    continue
                if square == worst and name > worst_id:
                    continue
                slot = min(found, limit - 1)
                while slot > 0 and (
                    out_distance[slot - 1] > square
                    or (out_distance[slot - 1] == square and out_index[slot - 1] > name)
                ):
                    out_distance[slot] = out_distance[slot - 1]
                    out_index[slot] = out_index[slot - 1]
                    slot -= 1
                out_distance[slot] = square
                out_index[slot] = name
                found = min(found + 1, limit)
                if found == limit:
                    worst, worst_id = out_distance[limit - 1], out_index[limit - 1]
        # The next subtree that may still hold one of the nearest.
        while depth > 0:
            depth -= 1
            entry = stack[depth]
            if gaps[depth] < worst or (gaps[depth] == worst and least[entry] <= worst_id):
                code = children[entry]
                break
        else:
            return


@called
def _least(numbers, first, count):
    least = numbers[first]
    for i in range(first + 1, first + count):
        least = min(least, numbers[i])
    return least


@called
def _build_sample(positions, dimensions, ids, first, count, leaf, node, tree):
    """Fill one sample's leaves and nodes; returns the code of its root."""
    points, slots, boxes, children, least = tree
    for i in range(count):
        base = (leaf + i // _LANES) * 24 + i % _LANES
        for axis in range(3):
            value = f32(0.0)
            if axis < dimensions:
                value = positions[(first + i) * dimensions + axis]
            points[base + 8 * axis] = value
        slots[leaf * _LANES + i] = ids[first + i]
    groups = (count + _LANES - 1) // _LANES
    if groups <= 1:
        return ~leaf
    for group in range(groups):
        entry = node * _LANES + group
        base = (node + group // _LANES) * 48 + group % _LANES
        members = min(_LANES, count - group * _LANES)
        for axis in range(3):
            start = (leaf + group) * 24 + 8 * axis
            low = high = points[start]
            for lane in range(1, members):
                low, high = min(low, points[start + lane]), max(high, points[start + lane])
            boxes[base + 8 * axis] = low
            boxes[base + 24 + 8 * axis] = high
        children[entry] = ~(leaf + group)
        least[entry] = _least(slots, (leaf + group) * _LANES, members)
    below = node
    while groups > _LANES:
        count, groups = groups, (groups + _LANES - 1) // _LANES
        node = below + groups
        for group in range(groups):
            entry = node * _LANES + group
            base = (node + group // _LANES) * 48 + group % _LANES
            members = min(_LANES, count - group * _LANES)
            for axis in range(3):
                start = (below + group) * 48 + 8 * axis
                low, high = boxes[start], boxes[start + 24]
                for lane in range(1, members):
                    low = min(low, boxes[start + lane])
                    high = max(high, boxes[start + 24 + lane])
                boxes[base + 8 * axis] = low
                boxes[base + 24 + 8 * axis] = high
            children[entry] = below + group
            least[entry] = _least(least, (below + group) * _LANES, members)
        below = node
    return node


@kernel
def _build(positions, dimensions, ids, offsets, first_leaf, first_node, tree):
    for sample in numba.prange(len(offsets) - 1):
        first, count = offsets[sample], offsets[sample + 1] - offsets[sample]
        nodes = (
            pointer(tree[0]),
            pointer(tree[1]),
            pointer(tree[2]),
            pointer(tree[3]),
            pointer(tree[4]),
        )
        tree[5][sample] = _build_sample(
            pointer(positions), dimensions, pointer(ids), first, count, first_leaf[sample],
            first_node[sample], nodes,
        )  # fmt: skip


@kernel
def _search(
    query, dimensions, rows, first_rows, last_rows, samples, limits, reach, tree, width, index,
    distance,
):  # fmt: skip
    """Blocks of up to eight queries, `rows[first_rows[b]:last_rows[b]]` of one sample each."""
    blocks = len(samples)
    in_block = min(width, _MOST_IN_BLOCK)
    for chunk in numba.prange((blocks + _BLOCKS_PER_CHUNK - 1) // _BLOCKS_PER_CHUNK):
        points, ids = pointer(tree[0]), pointer(tree[1])
        nodes = (
            points,
            ids,
            pointer(tree[2]),
            pointer(tree[3]),
            pointer(tree[4]),
            pointer(tree[5]),
        )
        capacity = 64 + 128 * in_block + _LANES
        place = allocate(3 * _LANES + _LANES + 2 * STACK + 2 * in_block * (1 + _LANES) + capacity)
        squares = advance(place, 3 * _LANES)
        lists = advance(squares, _LANES)
        choice = advance(lists, in_block * _LANES)
        gaps = advance(choice, in_block * _LANES)
        stack = as_int32(advance(gaps, STACK))
        middle_distance = advance(gaps, 2 * STACK)
        middle_index = as_int32(advance(middle_distance, in_block))
        candidates = as_int32(advance(middle_distance, 2 * in_block))
        scratch = (stack, gaps, squares)
        positions, found_rows, squared = pointer(query), pointer(index), pointer(distance)
        # The last position searched for, and the squared distance of its last neighbor.
        last_sample, last, last_square = -1, (f32(0.0), f32(0.0), f32(0.0)), f32(0.0)
        for block in range(chunk * _BLOCKS_PER_CHUNK, min(blocks, (chunk + 1) * _BLOCKS_PER_CHUNK)):
            sample = samples[block]
            limit = limits[sample]
            first, count = first_rows[block], last_rows[block] - first_rows[block]
            for lane in range(count):
                row = rows[first + lane]
                for slot in range(row * width + limit, row * width + width):
                    found_rows[slot] = -1
                    squared[slot] = np.inf
            if limit == 0:
                continue
            for lane in range(_LANES):
                row = rows[first + min(lane, count - 1)]
                for axis in range(dimensions):
                    place[axis * _LANES + lane] = positions[row * dimensions + axis]
            if sample != last_sample:
                last_square = f32(np.inf)
            last_sample = sample
            found = -1
            if limit <= _MOST_IN_BLOCK:
                low, high = _bounding_box(place)
                half = f32(0.5)
                x, y, z = (
                    half * low[0] + half * high[0],
                    half * low[1] + half * high[1],
                    half * low[2] + half * high[2],
                )
                # The middle is rounded.
                dx, dy, dz = (
                    max(high[0] - x, x - low[0]),
                    max(high[1] - y, y - low[1]),
                    max(high[2] - z, z - low[2]),
                )
                worst = _widen(last_square, x - last[0], y - last[1], z - last[2])
                worst = min(worst, _widen(reach, dx, dy, dz))
                middle_distance[limit - 1] = np.inf  # unless there are enough
                _search_one(
                    nodes, sample, limit, worst, x, y, z, scratch, middle_index, middle_distance
                )
                last, last_square = (x, y, z), middle_distance[limit - 1]
                around = min(_widen(last_square, dx, dy, dz), _MARGIN * reach + _TINY)
                # At even density this many points are in reach: rather not begin with too many.
                if around * f32(limit) <= last_square * f32(capacity):
                    found = _collect(
                        nodes, sample, low, high, around, scratch[0], candidates, capacity
                    )
            if found >= 0:
                _search_block(points, candidates, found, limit, reach, place, lists, choice)
                for lane in range(count):
                    own = rows[first + lane] * width
                    for slot in range(limit):
                        at = slot * _LANES + lane
                        if lists[at] > reach:
                            break
                        found_rows[own + slot] = ids[candidates[np.int32(choice[at])]]
                        squared[own + slot] = lists[at]
                continue
            for lane in range(count):
                own = rows[first + lane] * width
                x, y, z = place[lane], place[8 + lane], place[16 + lane]
                worst = min(reach, _widen(last_square, x - last[0], y - last[1], z - last[2]))
                _search_one(
                    nodes, sample, limit, worst, x, y, z, scratch,
                    advance(found_rows, own), advance(squared, own),
                )  # fmt: skip
                last, last_square = (x, y, z), squared[own + limit - 1]
        free(place)


def offsets_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


def curve_order(positions, sizes):
    """Rows sorted by sample, along a Hilbert curve in each: locality for any input order.

    The cells of the curve divide a sample's box. One that gets more points than a leaf, because few
    points far away made the box large, is divided again in the same way.
    """
    rows, dimensions = positions.shape
    if rows == 0:
        return np.empty(0, np.int64)
    filled = np.flatnonzero(sizes)
    starts = offsets_of(sizes)[filled]
    low = np.minimum.reduceat(positions, starts)
    side = (np.maximum.reduceat(positions, starts) * f32(0.5) - low * f32(0.5)).max(1)
    lengths = np.asarray(sizes)[filled]
    curve_bits = min(_CURVE_BITS, 63 - len(filled).bit_length())
    bits = curve_bits // dimensions
    # Positions all equal, or nearly, fall into one cell.
    scale = f32((1 << bits) - 1) / np.maximum(side, f32(1e-30))
    low, scale = np.repeat(low, lengths, 0), np.repeat(scale, lengths)[:, None]
    cells = ((positions * f32(0.5) - low * f32(0.5)) * scale).astype(np.int64)
    shape = torch.full((1, dimensions), 1 << bits)
    keys = curve_code("hilbert", torch.from_numpy(cells), shape, bits)
    sample = np.repeat(np.arange(len(filled)), lengths)
    keys, order = torch.sort(keys + torch.from_numpy(sample << curve_bits), stable=True)
    keys, order = keys.numpy(), order.numpy()
    first = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [rows]])
    run = np.diff(first)
    crowded = (run > _LANES) & (run < lengths[sample[first[:-1]]])  # all of a sample: equal points
    if crowded.any():
        inside = np.repeat(crowded, run)
        again = order[inside]
        order[inside] = again[curve_order(positions[again], run[crowded])]
    return order


def plant_tree(points, ids, sizes):
    """The tree over points whose rows follow a curve in each sample."""
    leaves = -(-np.asarray(sizes, np.int64) // _LANES)
    nodes = np.zeros_like(leaves)
    groups = leaves.copy()
    while (groups > 1).any():
        groups = np.where(groups > 1, -(-groups // _LANES), 0)
        nodes += groups
    first_leaf, first_node = offsets_of(leaves), offsets_of(nodes)
    slots, entries = int(first_leaf[-1]) * _LANES, int(first_node[-1]) * _LANES
    tree = (
        np.full(3 * slots, np.nan, np.float32),
        np.full(slots, _LAST, np.int32),
        np.full(6 * entries, np.nan, np.float32),
        np.empty(entries, np.int32),
        np.full(entries, _LAST, np.int32),
        np.empty(len(leaves), np.int32),
    )
    dimensions = points.shape[1]
    _build(
        points.reshape(-1),
        dimensions,
        ids,
        offsets_of(sizes),
        first_leaf[:-1],
        first_node[:-1],
        tree,
    )
    return tree


def nearest(query, points, query_sizes, point_sizes, limits, width, reach, along_curve, copies):
    """See `pointformer.kernels.neighbors`."""
    points = points.detach().contiguous().numpy()
    query = points if query is None else query.detach().contiguous().numpy()
    # Filled: a search around NaN, which traced graphs do not check for, finds nothing.
    index = np.full((len(query), width), -1, np.int32)
    distance = np.full((len(query), width), np.inf, np.float32)
    if along_curve:
        ids = np.arange(len(points), dtype=np.int32)
        rows = np.arange(len(query))
        in_order = points
    else:
        order = curve_order(points, point_sizes)
        rows = order if query is points else curve_order(query, query_sizes)
        ids, in_order = order.astype(np.int32), points[order]
    limits = np.minimum(np.asarray(limits, np.int64), np.asarray(point_sizes, np.int64))
    blocks = -(-np.asarray(query_sizes, np.int64) // _LANES)
    samples = np.repeat(np.arange(len(blocks)), blocks)
    ends = offsets_of(query_sizes)
    nth = np.arange(len(samples)) - offsets_of(blocks)[samples]
    first_rows = ends[samples] + nth * _LANES
    last_rows = np.minimum(first_rows + _LANES, ends[samples + 1])
    tree = plant_tree(in_order, ids, point_sizes)
    _search(
        query.reshape(-1), query.shape[1], rows, first_rows, last_rows, samples, limits, f32(reach),
        tree, width, index.reshape(-1), distance.reshape(-1),
    )  # fmt: skip
    index = shifted_copies(torch.from_numpy(index), copies, len(points))
    return index, torch.from_numpy(distance).repeat(copies, 1)
