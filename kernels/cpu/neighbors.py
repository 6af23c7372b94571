"""Nearest points on CPU: a box tree over points in curve order, searched per block of queries.

The tree is implicit. Eight consecutive points form a leaf, the boxes of eight consecutive leaves
form a node, and so on up to one root per sample, so that it adapts to any density and takes memory
in proportion to the points alone. Unused lanes hold NaN: they compare false with every bound.

Eight consecutive queries are searched together. A guess is made of how far their neighbors are,
from the block before, and the leaves within that distance of the queries' bounding box are copied:
all points as near to one of the queries are among these candidates. A query that has enough of them
as near is answered. It asks for those within a guess from the query before, sixteen at a time; they
are somewhat more than it needs, and are sorted by one integer of squared distance and id each, by
counting for each of them how many are less: no branches, and few steps where they are few.

Where the guess is too large, too many leaves are found at once. Then let r be the distance from the
box's middle to the last of its nearest points, and rho the box's half diagonal: each query has that
many points within r + rho. Queries for which a guess was too small, or that are too far apart, or
have too many candidates because many points are equal, are searched alone, down the tree.
"""

import numba
import numpy as np
import torch

from pointformer.kernels.cpu.clustering import curve_code
from pointformer.kernels.cpu.runtime import called, kernel
from pointformer.kernels.cpu.simd import (
    LANES,
    advance,
    allocate,
    as_float32,
    as_int32,
    as_int64,
    bits_less_equal,
    count_less,
    f32,
    float_bits,
    free,
    high_halves,
    load,
    load16,
    load_longs,
    low_halves,
    lowest_bit,
    maximum,
    plus,
    pointer,
    prefetch,
    splat,
    splat16,
    splat_long,
    store,
    store_first,
    store_longs,
    zero,
)
from pointformer.kernels.tables import shifted_copies

STACK = 8 * 12  # seven waiting per level, 11 levels hold 2**33 points
_BLOCK = 8  # queries searched together
_BLOCKS_PER_CHUNK = 64  # of work for a thread
_MOST_IN_BLOCK = 128  # longer lists are searched for each query alone
_MOST_LEAVES = 256
_MOST_CANDIDATES = _MOST_LEAVES * LANES
_MOST_SORTED = 64  # and twice as many as are listed: sorting is quadratic
# Squared distances that the last neighbors are hardly beyond, relative to the farthest of the block
# before and to that of the query before; and the largest, relative to that of a block's middle.
_SAME_REACH = f32(1.25)
_SAME_DENSITY = f32(1.35)
_MOST_WIDENED = f32(32.0)
_LAST_KEY = np.int64(2**63 - 1)
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
def _widen(square, dx, dy, dz):
    """Squared radius that holds a ball of squared radius `square` after a move by (dx, dy, dz)."""
    moved = np.sqrt(square + _TINY) + np.sqrt(dx * dx + dy * dy + dz * dz + _TINY)
    return moved * moved * _MARGIN


@called
def _bounding_box(place, count):
    """Corners of the box around the first `count` positions of a block."""
    low = high = (place[0], place[_BLOCK], place[2 * _BLOCK])
    for lane in range(1, count):
        x, y, z = place[lane], place[_BLOCK + lane], place[2 * _BLOCK + lane]
        low = (min(low[0], x), min(low[1], y), min(low[2], z))
        high = (max(high[0], x), max(high[1], y), max(high[2], z))
    return low, high


@called
def _leaves_within(tree, sample, low, high, reach, leaves, spare):
    """List the leaves within `reach` (squared) of a box; returns how many, -1 if too many.

    The tree is walked level by level: the entries of one are all nodes, or all leaves.
    """
    _, _, boxes, children, _, root = tree
    limit = splat(reach)
    low = (splat(low[0]), splat(low[1]), splat(low[2]))
    high = (splat(high[0]), splat(high[1]), splat(high[2]))
    count = 1
    leaves[0] = root[sample]
    while count > 0 and leaves[0] >= 0:
        found = 0
        for i in range(count):
            node = leaves[i]
            bits = bits_less_equal(box_distances(boxes, node, low, high), limit)
            for lane in range(LANES):
                spare[found] = children[node * LANES + lane]
                found += (bits >> lane) & 1
            if found > _MOST_LEAVES - LANES:
                return -1
        for i in range(found):
            leaves[i] = spare[i]
        count = found
    for i in range(count):
        leaves[i] = ~leaves[i]
    return count


@called
def _copy_leaves(tree, leaves, count, candidates, ids):
    """Candidates and their ids, from leaves; returns how many words of 64 have all of them."""
    points, names, names_here = tree[0], as_float32(tree[1]), as_float32(ids)
    for i in range(count):
        first = leaves[i] * LANES
        for axis in range(3):
            at = axis * _MOST_CANDIDATES + i * LANES
            store(candidates, at, load(points, 3 * first + axis * LANES))
        store(names_here, i * LANES, load(names, first))
    words = (count + LANES - 1) // LANES
    for i in range(count, words * LANES):
        store(candidates, i * LANES, splat(f32(np.nan)))
    return words


@called
def _keys_within(candidates, ids, words, x, y, z, reach, squares, keys):
    """Keys of the candidates within `reach` (squared) of a position; returns how many."""
    x, y, z, limit = splat16(x), splat16(y), splat16(z), splat16(reach)
    found = 0
    for word in range(words):
        bits = 0
        for part in range(0, 64, 16):
            at = word * 64 + part
            square = _square(
                load16(candidates, at) - x,
                load16(candidates, at + _MOST_CANDIDATES) - y,
                load16(candidates, at + 2 * _MOST_CANDIDATES) - z,
            )
            store(squares, part, square)
            bits |= bits_less_equal(square, limit) << part
        while bits != 0:
            lane = lowest_bit(bits)
            keys[found] = (float_bits(squares[lane]) << 32) | np.int64(ids[word * 64 + lane])
            found += 1
            bits &= bits - 1
    return found


@called
def _sort(keys, count, places, ranked):
    """Sort keys, all different: the place of one is the number of those less than it."""
    for i in range(count, (count + 15) // 16 * 16):
        keys[i] = _LAST_KEY
    for i in range(0, count, 16):
        a, b = load_longs(keys, i), load_longs(keys, i + LANES)
        less_a = less_b = splat_long(np.int64(0))
        for j in range(count):
            key = splat_long(keys[j])
            less_a, less_b = count_less(less_a, key, a), count_less(less_b, key, b)
        store_longs(places, i, less_a)
        store_longs(places, i + LANES, less_b)
    for i in range(count):
        ranked[places[i]] = keys[i]


@called
def _write(keys, count, width, index, distance):
    """A query's list from sorted keys, and nothing in the other places."""
    names = as_float32(index)
    for slot in range(0, count - LANES + 1, LANES):
        key = load_longs(keys, slot)
        store(names, slot, low_halves(key))
        store(distance, slot, high_halves(key))
    rest = count % LANES
    if rest > 0:
        key = load_longs(keys, count - rest)
        store_first(names, count - rest, low_halves(key), rest)
        store_first(distance, count - rest, high_halves(key), rest)
    for slot in range(count, width):
        index[slot] = -1
    for slot in range(count, width):
        distance[slot] = np.inf


@called
def _search_together(
    candidates, words, memory, place, pending, limit, around, reach, last, farthest, rows, width,
    index, distance,
):  # fmt: skip
    """Answer those `pending` queries of a block that have their nearest among the candidates, which
    are all points within `around` of the block; returns which it could not, the last that it could
    with the squared distance of its last neighbor, and the largest of these distances."""
    ids, squares, keys, places, ranked = memory
    waiting = pending
    while waiting != 0:
        lane = lowest_bit(waiting)
        waiting &= waiting - 1
        x, y, z = place[lane], place[_BLOCK + lane], place[2 * _BLOCK + lane]
        near = min(around, last[3] * _SAME_DENSITY)
        found = _keys_within(candidates, ids, words, x, y, z, near, squares, keys)
        if found < limit and near < around:
            found = _keys_within(candidates, ids, words, x, y, z, around, squares, keys)
        if (found < limit and around < reach) or found > _MOST_SORTED + 2 * limit:
            continue
        _sort(keys, found, places, ranked)
        own = rows[lane] * width
        _write(ranked, min(found, limit), width, advance(index, own), advance(distance, own))
        pending &= ~(1 << lane)
        if found >= limit:
            last = (x, y, z, distance[own + limit - 1])
        farthest = max(farthest, distance[own + limit - 1])
    return pending, last, farthest


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
            for back in range(LANES):
                lane = LANES - 1 - back
                stack[depth] = code * LANES + lane
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
            for lane in range(LANES):
                square = squares[lane]
                name = ids[~code * LANES + lane]
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
        base = (leaf + i // LANES) * 24 + i % LANES
        for axis in range(3):
            value = f32(0.0)
            if axis < dimensions:
                value = positions[(first + i) * dimensions + axis]
            points[base + 8 * axis] = value
        slots[leaf * LANES + i] = ids[first + i]
    groups = (count + LANES - 1) // LANES
    if groups <= 1:
        return ~leaf
    for group in range(groups):
        entry = node * LANES + group
        base = (node + group // LANES) * 48 + group % LANES
        members = min(LANES, count - group * LANES)
        for axis in range(3):
            start = (leaf + group) * 24 + 8 * axis
            low = high = points[start]
            for lane in range(1, members):
                low, high = min(low, points[start + lane]), max(high, points[start + lane])
            boxes[base + 8 * axis] = low
            boxes[base + 24 + 8 * axis] = high
        children[entry] = ~(leaf + group)
        least[entry] = _least(slots, (leaf + group) * LANES, members)
    below = node
    while groups > LANES:
        count, groups = groups, (groups + LANES - 1) // LANES
        node = below + groups
        for group in range(groups):
            entry = node * LANES + group
            base = (node + group // LANES) * 48 + group % LANES
            members = min(LANES, count - group * LANES)
            for axis in range(3):
                start = (below + group) * 48 + 8 * axis
                low, high = boxes[start], boxes[start + 24]
                for lane in range(1, members):
                    low = min(low, boxes[start + lane])
                    high = max(high, boxes[start + 24 + lane])
                boxes[base + 8 * axis] = low
                boxes[base + 24 + 8 * axis] = high
            children[entry] = below + group
            least[entry] = _least(least, (below + group) * LANES, members)
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
    """Blocks of queries, `rows[first_rows[b]:last_rows[b]]` of one sample each."""
    blocks = len(samples)
    in_block = min(width, _MOST_IN_BLOCK)
    for chunk in numba.prange((blocks + _BLOCKS_PER_CHUNK - 1) // _BLOCKS_PER_CHUNK):
        nodes = (
            pointer(tree[0]),
            pointer(tree[1]),
            pointer(tree[2]),
            pointer(tree[3]),
            pointer(tree[4]),
            pointer(tree[5]),
        )
        candidates = allocate(
            10 * _MOST_CANDIDATES + 64 + 2 * _MOST_LEAVES + 3 * _BLOCK + 2 * STACK + 2 * in_block
        )
        ids = as_int32(advance(candidates, 3 * _MOST_CANDIDATES))
        keys = as_int64(advance(candidates, 4 * _MOST_CANDIDATES))
        places, ranked = advance(keys, _MOST_CANDIDATES), advance(keys, 2 * _MOST_CANDIDATES)
        squares = advance(candidates, 10 * _MOST_CANDIDATES)
        leaves = as_int32(advance(squares, 64))
        spare = advance(leaves, _MOST_LEAVES)
        place = as_float32(advance(spare, _MOST_LEAVES))
        gaps = advance(place, 3 * _BLOCK)
        stack = as_int32(advance(gaps, STACK))
        middle_distance = advance(gaps, 2 * STACK)
        middle_index = as_int32(advance(middle_distance, in_block))
        scratch = (stack, gaps, squares)
        memory = (ids, squares, keys, places, ranked)
        positions, found_rows, squared = pointer(query), pointer(index), pointer(distance)
        last_sample = -1
        # The last position searched for, and the squared distance of its last neighbor.
        last = (f32(0.0), f32(0.0), f32(0.0), f32(np.inf))
        farthest = f32(np.inf)  # of the neighbors of the block before
        for block in range(chunk * _BLOCKS_PER_CHUNK, min(blocks, (chunk + 1) * _BLOCKS_PER_CHUNK)):
            sample = samples[block]
            limit = limits[sample]
            count = last_rows[block] - first_rows[block]
            own_rows = advance(pointer(rows), first_rows[block])
            for lane in range(count):
                row = own_rows[lane]
                prefetch(squared, row * width)
                prefetch(as_float32(found_rows), row * width)
                for axis in range(dimensions):
                    place[axis * _BLOCK + lane] = positions[row * dimensions + axis]
            if sample != last_sample:
                last = (last[0], last[1], last[2], f32(np.inf))
                farthest = f32(np.inf)
            last_sample = sample
            pending = (1 << count) - 1
            if 0 < limit <= _MOST_IN_BLOCK:
                low, high = _bounding_box(place, count)
                around = min(reach, farthest * _SAME_REACH)
                number = _leaves_within(nodes, sample, low, high, around, leaves, spare)
                if number < 0:
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
                    worst = _widen(last[3], x - last[0], y - last[1], z - last[2])
                    worst = min(worst, _widen(reach, dx, dy, dz))
                    middle_distance[limit - 1] = np.inf  # unless there are enough
                    _search_one(
                        nodes, sample, limit, worst, x, y, z, scratch, middle_index,
                        middle_distance,
                    )  # fmt: skip
                    last = (x, y, z, middle_distance[limit - 1])
                    around = min(_widen(last[3], dx, dy, dz), reach)
                    if around <= _MOST_WIDENED * last[3]:  # rather not begin with too many
                        number = _leaves_within(nodes, sample, low, high, around, leaves, spare)
                if number >= 0:
                    words = _copy_leaves(nodes, leaves, number, candidates, ids)
                    pending, last, farthest = _search_together(
                        candidates, words, memory, place, pending, limit, around, reach, last,
                        f32(0.0), own_rows, width, found_rows, squared,
                    )  # fmt: skip
            while pending != 0:
                lane = lowest_bit(pending)
                pending &= pending - 1
                own = own_rows[lane] * width
                _write(ranked, 0, width, advance(found_rows, own), advance(squared, own))
                if limit == 0:  # a sample without points
                    continue
                x, y, z = place[lane], place[_BLOCK + lane], place[2 * _BLOCK + lane]
                worst = min(reach, _widen(last[3], x - last[0], y - last[1], z - last[2]))
                _search_one(
                    nodes, sample, limit, worst, x, y, z, scratch,
                    advance(found_rows, own), advance(squared, own),
                )  # fmt: skip
                if squared[own + limit - 1] < np.inf:
                    last = (x, y, z, squared[own + limit - 1])
                farthest = max(farthest, squared[own + limit - 1])
        free(candidates)


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
    crowded = (run > LANES) & (run < lengths[sample[first[:-1]]])  # all of a sample: equal points
    if crowded.any():
        inside = np.repeat(crowded, run)
        again = order[inside]
        order[inside] = again[curve_order(positions[again], run[crowded])]
    return order


def plant_tree(points, ids, sizes):
    """The tree over points whose rows follow a curve in each sample."""
    leaves = -(-np.asarray(sizes, np.int64) // LANES)
    nodes = np.zeros_like(leaves)
    groups = leaves.copy()
    while (groups > 1).any():
        groups = np.where(groups > 1, -(-groups // LANES), 0)
        nodes += groups
    first_leaf, first_node = offsets_of(leaves), offsets_of(nodes)
    slots, entries = int(first_leaf[-1]) * LANES, int(first_node[-1]) * LANES
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
    index = np.empty((len(query), width), np.int32)
    distance = np.empty((len(query), width), np.float32)
    if along_curve:
        ids = np.arange(len(points), dtype=np.int32)
        rows = np.arange(len(query))
        in_order = points
    else:
        order = curve_order(points, point_sizes)
        rows = order if query is points else curve_order(query, query_sizes)
        ids, in_order = order.astype(np.int32), points[order]
    limits = np.minimum(np.asarray(limits, np.int64), np.asarray(point_sizes, np.int64))
    blocks = -(-np.asarray(query_sizes, np.int64) // _BLOCK)
    samples = np.repeat(np.arange(len(blocks)), blocks)
    ends = offsets_of(query_sizes)
    nth = np.arange(len(samples)) - offsets_of(blocks)[samples]
    first_rows = ends[samples] + nth * _BLOCK
    last_rows = np.minimum(first_rows + _BLOCK, ends[samples + 1])
    tree = plant_tree(in_order, ids, point_sizes)
    _search(
        query.reshape(-1), query.shape[1], rows, first_rows, last_rows, samples, limits, f32(reach),
        tree, width, index.reshape(-1), distance.reshape(-1),
    )  # fmt: skip
    found = torch.from_numpy(index), torch.from_numpy(distance)
    if copies == 1:
        return found
    return shifted_copies(found[0], copies, len(points)), found[1].repeat(copies, 1)
