"""Farthest points on CPU: only what a new pick may be nearest to is looked at again.

In the box tree of the neighbor search every point knows its distance from the picks, every box the
largest one in it and the lowest row that has that. A pick no nearer to a box than this changes
nothing in it; distances of boxes are rounded as those of points are, so this is exact. The more
picks there are, the smaller the part of the tree that the next one reaches.
"""

import numpy as np
import torch
from numba import prange

from pointformer.kernels.cpu.neighbors import (
    STACK,
    box_distances,
    curve_order,
    offsets_of,
    plant_tree,
    point_distances,
)
from pointformer.kernels.cpu.runtime import called, kernel
from pointformer.kernels.cpu.simd import (
    LANES,
    advance,
    allocate,
    as_int32,
    bits_less,
    f32,
    free,
    load,
    minimum,
    pointer,
    splat,
    store,
)

_NOBODY = np.int32(2**31 - 1)


@called
def _farthest(distances, rows, first):
    """The largest of eight, and the lowest row that has it."""
    largest, row = f32(-np.inf), _NOBODY
    for slot in range(first, first + LANES):
        if distances[slot] > largest or (distances[slot] == largest and rows[slot] < row):
            largest, row = distances[slot], rows[slot]
    return largest, row


@called
def _look_again(points, ids, distances, leaf, x, y, z):
    near = point_distances(points, leaf, splat(x), splat(y), splat(z))
    store(distances, leaf * LANES, minimum(near, load(distances, leaf * LANES)))
    return _farthest(distances, ids, leaf * LANES)


@called
def _add_pick(tree, root, x, y, z, distances, largest, farthest, stack, changed):
    """Take a pick's position into account; returns the largest distance and the row that has it."""
    points, ids, boxes, children = tree
    if root < 0:
        return _look_again(points, ids, distances, ~root, x, y, z)
    center = (splat(x), splat(y), splat(z))
    depth, found = 1, 0
    stack[0] = root
    while depth > 0:
        depth -= 1
        first = stack[depth] * LANES
        bits = bits_less(box_distances(boxes, stack[depth], center, center), load(largest, first))
        for entry in range(first, first + LANES):
            if (bits >> (entry - first)) & 1:
                child = children[entry]
                if child < 0:
                    largest[entry], farthest[entry] = _look_again(
                        points, ids, distances, ~child, x, y, z
                    )
                else:
                    stack[depth] = child
                    depth += 1
                    changed[found] = entry  # after what it is a part of
                    found += 1
    while found > 0:
        found -= 1
        entry = changed[found]
        largest[entry], farthest[entry] = _farthest(largest, farthest, children[entry] * LANES)
    return _farthest(largest, farthest, root * LANES)


@kernel
def _pick(
    positions, dimensions, offsets, first_pick, start, tree, distances, largest, farthest, picked,
    out,
):  # fmt: skip
    for sample in prange(len(offsets) - 1):
        nodes = (pointer(tree[0]), pointer(tree[1]), pointer(tree[2]), pointer(tree[3]))
        where, places, taken = pointer(positions), pointer(out), pointer(picked)
        size = offsets[sample + 1] - offsets[sample]
        stack = allocate(STACK + size // LANES + 1)
        waiting = as_int32(stack)
        row = offsets[sample] + start[sample]
        spare = offsets[sample]  # rows before it are picked
        distance = f32(np.inf)
        for pick in range(first_pick[sample], first_pick[sample + 1]):
            if distance <= 0:  # what is left is where picks are
                while taken[spare] != 0:
                    spare += 1
                row = spare
            places[pick] = row
            taken[row] = 1
            if distance > 0:
                x, y = where[row * dimensions], where[row * dimensions + 1]
                z = where[row * dimensions + 2] if dimensions == 3 else f32(0.0)
                distance, row = _add_pick(
                    nodes, tree[5][sample], x, y, z, pointer(distances), pointer(largest),
                    pointer(farthest), waiting, advance(waiting, STACK),
                )  # fmt: skip
        free(stack)


def farthest_points(positions, sizes, counts, start):
    """See `pointformer.kernels.sampling`."""
    positions = positions.detach().contiguous().numpy()
    order = curve_order(positions, sizes)
    tree = plant_tree(positions[order], order.astype(np.int32), sizes)
    _, ids, _, _, least, _ = tree
    out = torch.empty(sum(counts), dtype=torch.int64)
    _pick(
        positions.reshape(-1), positions.shape[1], offsets_of(sizes), offsets_of(counts),
        np.asarray(start, np.int64), tree, np.where(ids == _NOBODY, f32(-np.inf), f32(np.inf)),
        np.where(least == _NOBODY, f32(-np.inf), f32(np.inf)), least.copy(),
        np.zeros(len(positions), np.uint8), out.numpy(),
    )  # fmt: skip
    return out
