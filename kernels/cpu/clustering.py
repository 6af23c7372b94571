"""Balanced clustering on CPU: curve codes, one pass over the tokens for the keys, one for centers.

Plain float32 arithmetic in the order of the reference, never contracted: ties decide the order.
"""

import numpy as np
import torch
from numba import prange

from pointformer.kernels.cpu.runtime import called, inlined, kernel
from pointformer.kernels.cpu.simd import (
    advance,
    allocate,
    as_int64,
    f32,
    float_bits,
    free,
    pointer,
)

_CHUNK = 4096
_HILBERT, _MORTON, _PEANO, _SNAKE = range(4)
_CURVES = {"hilbert": _HILBERT, "morton": _MORTON, "peano": _PEANO, "snake": _SNAKE}


@inlined
def _transpose_hilbert(axes, dimensions, bits):
    """Skilling's transform of coordinates to the bits of the Hilbert number, in place."""
    first = axes[0]
    for bit in range(bits - 1, 0, -1):  # masks, for branches would be unpredictable
        low = (1 << bit) - 1
        first ^= low & -((first >> bit) & 1)
        for i in range(1, dimensions):
            inverted = low & -((axes[i] >> bit) & 1)
            swap = (first ^ axes[i]) & (low ^ inverted)
            first ^= inverted | swap
            axes[i] ^= swap
    axes[0] = first
    for i in range(1, dimensions):
        axes[i] ^= axes[i - 1]
    parity = axes[dimensions - 1] >> 1
    for shift in (1, 2, 4, 8, 16):
        parity ^= parity >> shift
    for i in range(dimensions):
        axes[i] ^= parity


@inlined
def _spread(value, dimensions):
    """Leave room for the bits of the other axes between those of `value`."""
    if dimensions == 2:
        value = (value | (value << 16)) & 0x0000FFFF0000FFFF
        value = (value | (value << 8)) & 0x00FF00FF00FF00FF
        value = (value | (value << 4)) & 0x0F0F0F0F0F0F0F0F
        value = (value | (value << 2)) & 0x3333333333333333
        return (value | (value << 1)) & 0x5555555555555555
    value = (value | (value << 32)) & 0x001F00000000FFFF
    value = (value | (value << 16)) & 0x001F0000FF0000FF
    value = (value | (value << 8)) & 0x100F00F00F00F00F
    value = (value | (value << 4)) & 0x10C30C30C30C30C3
    return (value | (value << 2)) & 0x1249249249249249


@kernel
def _codes(cells, shape, dimensions, curve, bits, out):
    rows = out.size
    for chunk in prange((rows + _CHUNK - 1) // _CHUNK):
        memory = allocate(2 * dimensions)
        axes = as_int64(memory)
        source, lengths, codes = pointer(cells), pointer(shape), pointer(out)
        last = shape.size // dimensions - 1
        for row in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, rows)):
            for axis in range(dimensions):
                axes[axis] = source[row * dimensions + axis]
            code = 0
            if curve == _SNAKE:
                code = axes[dimensions - 1]
                own = min(row, last) * dimensions  # one shape for all, or one per row
                for axis in range(dimensions - 2, -1, -1):
                    length = lengths[own + axis]
                    forward = code % 2 == 0
                    code = code * length + (axes[axis] if forward else length - 1 - axes[axis])
            elif curve == _PEANO:
                weight = 1
                for _ in range(min(2 * bits // 3 + 1, 39 // dimensions)):
                    odd = 0  # of each axis, the digits that come before the current one
                    for axis in range(dimensions):
                        odd ^= axes[axis] & 1
                    for axis in range(dimensions):
                        odd ^= axes[axis] & 1
                        above = axes[axis] // 3
                        digit = axes[axis] - 3 * above
                        code += weight * (2 - digit if odd else digit)
                        weight *= 3
                        axes[axis] = above
                        odd ^= above & 1
            elif curve == _MORTON:
                for axis in range(dimensions):
                    code |= _spread(axes[axis], dimensions) << axis
            else:
                _transpose_hilbert(axes, dimensions, bits)
                for axis in range(dimensions):
                    code |= _spread(axes[axis], dimensions) << (dimensions - 1 - axis)
            codes[row] = code
        free(memory)


@inlined
def _squared_distance(point, target, dimensions):
    total = (point[0] - target[0]) * (point[0] - target[0])
    for axis in range(1, dimensions):
        difference = point[axis] - target[axis]
        total += difference * difference
    return total


@called
def sample_of(offsets, row):
    """The sample that a row belongs to."""
    sample, end = 0, len(offsets) - 1
    while end - sample > 1:
        middle = (sample + end) // 2
        if offsets[middle] <= row:
            sample = middle
        else:
            end = middle
    return sample


@kernel
def _keys(
    positions, offsets, origin, cell_size, unit, shape, first_cell, anchor_of_cell, anchors,
    dimensions, out,
):  # fmt: skip
    tokens = out.size
    for chunk in prange((tokens + _CHUNK - 1) // _CHUNK):
        start = chunk * _CHUNK
        sample = sample_of(offsets, start)
        point = allocate(dimensions)
        starts, place, first = pointer(offsets), pointer(positions), pointer(origin)
        sizes, units, lengths = pointer(cell_size), pointer(unit), pointer(shape)
        numbers, corners = pointer(anchor_of_cell), pointer(anchors)
        for row in range(start, min(start + _CHUNK, tokens)):
            while row >= starts[sample + 1]:
                sample += 1
            index = 0
            for axis in range(dimensions - 1, -1, -1):
                own = sample * dimensions + axis
                relative = place[row * dimensions + axis] - first[own]
                last = lengths[own] - 1
                cell = np.floor(relative / sizes[own])
                index *= last + 1
                if cell > 0:  # false for NaN, which traced graphs do not check for
                    index += np.int64(min(cell, f32(last)))
                point[axis] = relative / units[own]
            anchor = numbers[first_cell[sample] + index]
            before = advance(corners, (anchor - 1) * dimensions)
            after = advance(corners, (anchor + 1) * dimensions)
            ratio = _squared_distance(point, before, dimensions) / (
                _squared_distance(point, after, dimensions) + f32(1e-5)
            )
            out[row] = (anchor << 31) | (float_bits(f32(ratio)) & 0x7FFFFFFF)
        free(point)


@kernel
def _kd_keys(positions, order, offsets, first, last, back, dimensions, keys, axes):
    """A part of clusters at a time: its bounding box, then the keys of its rows."""
    for cluster in prange(len(first)):
        axes[cluster] = 0
        if first[cluster] == cluster:
            place, rows, out = pointer(positions), pointer(order), pointer(keys)
            start, end = offsets[cluster], offsets[last[cluster]]
            longest = f32(-1.0)
            for axis in range(dimensions):
                low = high = place[rows[start] * dimensions + axis]
                for row in range(start + 1, end):
                    value = place[rows[row] * dimensions + axis]
                    low, high = min(low, value), max(high, value)
                if high - low > longest:
                    longest = high - low
                    axes[cluster] = axis
            axis = axes[cluster]
            turned = -((back[cluster] >> axis) & 1)
            is_cut = last[cluster] - cluster > 1
            for row in range(start, end):
                ascending = 0
                if is_cut:
                    ascending = float_bits(f32(place[rows[row] * dimensions + axis] + f32(0.0)))
                    if ascending < 0:
                        ascending ^= 0x7FFFFFFF
                    ascending ^= turned
                out[row] = (cluster << 32) + (ascending + (1 << 31))


@kernel
def _centers(positions, order, offsets, dimensions, out):
    clusters = len(offsets) - 1
    for chunk in prange((clusters + _CHUNK - 1) // _CHUNK):
        place, rows = pointer(positions), pointer(order)
        for cluster in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, clusters)):
            start, end = offsets[cluster], offsets[cluster + 1]
            for axis in range(dimensions):
                total = f32(0.0)
                for row in range(start, end):
                    total += place[rows[row] * dimensions + axis]
                out[cluster * dimensions + axis] = total / f32(end - start)


def curve_code(curve, cells, shape, bits):
    rows, dimensions = cells.shape
    bits += -bits % dimensions
    out = torch.empty(rows, dtype=torch.int64)
    arrays = [tensor.contiguous().view(-1).numpy() for tensor in (cells, shape)]
    _codes(*arrays, dimensions, _CURVES[curve], bits, out.numpy())
    return out


def keys(positions, *tables):
    out = torch.empty(positions.shape[0], dtype=torch.int64)
    arrays = [tensor.contiguous().view(-1).numpy() for tensor in (positions, *tables)]
    _keys(*arrays, positions.shape[1], out.numpy())
    return out


def kd_keys(positions, order, offsets, first, last, back):
    keys, axis = torch.empty_like(order), torch.empty_like(first)
    arrays = [
        tensor.contiguous().view(-1).numpy()
        for tensor in (positions, order, offsets, first, last, back)
    ]
    _kd_keys(*arrays, positions.shape[1], keys.numpy(), axis.numpy())
    return keys, axis


def centers(positions, order, offsets):
    out = torch.empty(offsets.shape[0] - 1, positions.shape[1], dtype=torch.float32)
    arrays = positions.detach().contiguous().view(-1).numpy(), order.numpy(), offsets.numpy()
    _centers(*arrays, positions.shape[1], out.view(-1).numpy())
    return out
