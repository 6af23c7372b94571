"""Balanced clustering on CPU: curve codes, one pass over the tokens for the keys, one for centers.

Plain float32 arithmetic in the order of the reference, never contracted: ties decide the order.
"""

import numpy as np
import torch
from numba import njit, prange

from pointformer.kernels.cpu.runtime import called, kernel

f32 = np.float32
_CHUNK = 4096
_HILBERT, _MORTON, _SNAKE = range(3)
_CURVES = {"hilbert": _HILBERT, "morton": _MORTON, "snake": _SNAKE}


@njit(inline="always")
def _transpose_hilbert(axes, bits):
    """Skilling's transform of coordinates to the bits of the Hilbert number, in place."""
    dimensions = len(axes)
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


@njit(inline="always")
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
def _codes(cells, shape, curve, bits, out):
    rows, dimensions = cells.shape
    for chunk in prange((rows + _CHUNK - 1) // _CHUNK):
        axes = np.empty(dimensions, np.int64)
        for row in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, rows)):
            for axis in range(dimensions):
                axes[axis] = cells[row, axis]
            code = 0
            if curve == _SNAKE:
                code = axes[dimensions - 1]
                own = min(row, shape.shape[0] - 1)  # one shape for all, or one per row
                for axis in range(dimensions - 2, -1, -1):
                    length = shape[own, axis]
                    forward = code % 2 == 0
                    code = code * length + (axes[axis] if forward else length - 1 - axes[axis])
            elif curve == _MORTON:
                for axis in range(dimensions):
                    code |= _spread(axes[axis], dimensions) << axis
            else:
                _transpose_hilbert(axes, bits)
                for axis in range(dimensions):
                    code |= _spread(axes[axis], dimensions) << (dimensions - 1 - axis)
            out[row] = code


@njit(inline="always")
def _squared_distance(point, target):
    total = (point[0] - target[0]) * (point[0] - target[0])
    for axis in range(1, len(point)):
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
    positions, offsets, origin, cell_size, unit, shape, first_cell, anchor_of_cell, anchors, out
):
    tokens, dimensions = positions.shape
    for chunk in prange((tokens + _CHUNK - 1) // _CHUNK):
        start = chunk * _CHUNK
        sample = sample_of(offsets, start)
        point = np.empty(dimensions, np.float32)
        for row in range(start, min(start + _CHUNK, tokens)):
            while row >= offsets[sample + 1]:
                sample += 1
            index = 0
            for axis in range(dimensions - 1, -1, -1):
                relative = positions[row, axis] - origin[sample, axis]
                last = shape[sample, axis] - 1
                cell = np.floor(relative / cell_size[sample, axis])
                index *= last + 1
                if cell > 0:  # false for NaN, which traced graphs do not check for
                    index += np.int64(min(cell, f32(last)))
                point[axis] = relative / unit[sample, axis]
            anchor = anchor_of_cell[first_cell[sample] + index]
            ratio = _squared_distance(point, anchors[anchor - 1]) / (
                _squared_distance(point, anchors[anchor + 1]) + f32(1e-5)
            )
            bits = np.int64(f32(ratio).view(np.int32)) & 0x7FFFFFFF
            out[row] = (anchor << 31) | bits


@kernel
def _centers(positions, order, offsets, out):
    clusters, dimensions = out.shape
    for chunk in prange((clusters + _CHUNK - 1) // _CHUNK):
        for cluster in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, clusters)):
            start, end = offsets[cluster], offsets[cluster + 1]
            for axis in range(dimensions):
                total = f32(0.0)
                for row in range(start, end):
                    total += positions[order[row], axis]
                out[cluster, axis] = total / f32(end - start)


def curve_code(curve, cells, shape, bits):
    rows, dimensions = cells.shape
    bits += -bits % dimensions
    out = torch.empty(rows, dtype=torch.int64)
    shape = shape.contiguous().view(-1, dimensions)
    _codes(cells.contiguous().numpy(), shape.numpy(), _CURVES[curve], bits, out.numpy())
    return out


def keys(positions, *tables):
    out = torch.empty(positions.shape[0], dtype=torch.int64)
    arrays = [tensor.contiguous().numpy() for tensor in (positions, *tables)]
    _keys(*arrays, out.numpy())
    return out


def centers(positions, order, offsets):
    out = torch.empty(offsets.shape[0] - 1, positions.shape[1], dtype=torch.float32)
    _centers(positions.contiguous().numpy(), order.numpy(), offsets.numpy(), out.numpy())
    return out
