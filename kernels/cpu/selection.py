"""Selection of merging centers on a lattice, on CPU: linear passes and one sort of integers."""

import numpy as np
import torch
from numba import prange

from pointformer.kernels.cpu.clustering import sample_of
from pointformer.kernels.cpu.runtime import called, kernel
from pointformer.kernels.cpu.simd import f32, float_bits, pointer

_CHUNK = 4096
_NONE, _GRID, _ADAPTIVE = range(3)
_PRIORS = {"none": _NONE, "grid": _GRID, "adaptive": _ADAPTIVE}


@kernel
def _occupancy(positions, offsets, extent, first_cell, dimensions, count):
    """Tokens per cell of every canvas, up to two; tokens outside are left out."""
    for sample in prange(len(offsets) - 1):
        where, size, cells = pointer(positions), pointer(extent), pointer(count)
        for row in range(offsets[sample], offsets[sample + 1]):
            cell = 0
            inside = True
            for axis in range(dimensions - 1, -1, -1):
                coordinate = np.int64(where[row * dimensions + axis])
                length = size[sample * dimensions + axis]
                inside &= 0 <= coordinate < length
                cell = cell * length + coordinate
            if inside:
                cell += first_cell[sample]
                if cells[cell] < 2:
                    cells[cell] += 1


@called
def _any_within(x, y, z, width, height, depth, count, first_cell, radius):
    """Whether a token other than the one at (x, y, z) lies at most `radius` away."""
    if count[first_cell + (z * height + y) * width + x] > 1:
        return True
    reach = min(radius, max(width, height, depth))
    for ring in range(1, reach + 1):
        for dz in range(max(-ring, -z), min(ring, depth - 1 - z) + 1):
            for dy in range(max(-ring, -y), min(ring, height - 1 - y) + 1):
                on_face = abs(dz) == ring or abs(dy) == ring
                first, last, step = -ring, ring, 2 * ring
                if on_face:
                    first, last, step = max(-ring, -x), min(ring, width - 1 - x), 1
                for dx in range(first, last + 1, step):
                    if 0 <= x + dx < width and dx * dx + dy * dy + dz * dz <= radius * radius:
                        cell = ((z + dz) * height + y + dy) * width + x + dx
                        if count[first_cell + cell]:
                            return True
    return False


@kernel
def _keys(
    scores, positions, offsets, extent, first_cell, count, dimensions, alpha, stride, prior,
    coarse, bits, out,
):  # fmt: skip
    """(sample, not reserved, falling selection score, row in the sample) in one integer."""
    tokens = scores.size
    for chunk in prange((tokens + _CHUNK - 1) // _CHUNK):
        start = chunk * _CHUNK
        sample = sample_of(offsets, start)
        starts, where, size, cells = (
            pointer(offsets),
            pointer(positions),
            pointer(extent),
            pointer(count),
        )
        for row in range(start, min(start + _CHUNK, tokens)):
            while row >= starts[sample + 1]:
                sample += 1
            x, y = np.int64(where[row * dimensions]), np.int64(where[row * dimensions + 1])
            z = np.int64(where[row * dimensions + 2]) if dimensions == 3 else 0
            together = x | y | z
            has_prior = False
            if prior == _GRID:
                has_prior = x % stride == 0 and y % stride == 0 and z % stride == 0
            elif prior == _ADAPTIVE:
                # The prior is 1 where all coordinates are multiples of 2t. With v the largest power
                # of two that divides them, that is t <= v/2: another token is at most v/2 away.
                lowest = together & -together
                width, height = size[sample * dimensions], size[sample * dimensions + 1]
                depth = size[sample * dimensions + 2] if dimensions == 3 else 1
                if together == 0:
                    has_prior = True
                elif lowest > 1 and 0 <= x < width and 0 <= y < height and 0 <= z < depth:
                    has_prior = _any_within(
                        x, y, z, width, height, depth, cells, first_cell[sample], lowest // 2
                    )
            apart = coarse[sample]
            place = 0
            if apart == 0 or x % apart != 0 or y % apart != 0 or z % apart != 0:
                ranking = f32(alpha * scores[row]) + (f32(1.0) if has_prior else f32(0.0))
                ascending = float_bits(ranking)
                if ascending < 0:
                    ascending ^= 0x7FFFFFFF
                place = (1 << 32) + (1 << 31) - 1 - ascending
            out[row] = (((sample << 33) | place) << bits) | (row - starts[sample])


@kernel
def _gather(keys, offsets, kept_offsets, bits, out):
    """Reserved tokens come first in the sorted keys: put them after the others."""
    for sample in prange(len(offsets) - 1):
        start, first = offsets[sample], kept_offsets[sample]
        kept = kept_offsets[sample + 1] - first
        reserved = 0
        while reserved < kept and ((keys[start + reserved] >> bits) & 0x1FFFFFFFF) == 0:
            reserved += 1
        for i in range(kept):
            key = keys[start + (i + reserved) % kept]
            out[first + i] = start + (key & ((1 << bits) - 1))


def select(scores, positions, offsets, extent, kept_offsets, kept, alpha, stride, prior, coarse):
    dimensions = positions.shape[1]
    scores, positions = scores.contiguous().numpy(), positions.contiguous().view(-1).numpy()
    offsets, extent, kept_offsets = offsets.numpy(), extent.numpy(), kept_offsets.numpy()
    first_cell = np.concatenate([[0], np.cumsum(np.prod(extent, axis=1))])
    count = np.zeros(first_cell[-1] if prior == "adaptive" else 0, np.int8)
    if prior == "adaptive":
        _occupancy(positions, offsets, extent.ravel(), first_cell, dimensions, count)
    bits = int(np.diff(offsets).max(initial=1)).bit_length()
    keys = np.empty(len(scores), np.int64)
    _keys(
        scores, positions, offsets, extent.ravel(), first_cell, count, dimensions, f32(alpha),
        stride, _PRIORS[prior], np.array(coarse, np.int64), bits, keys,
    )  # fmt: skip
    keys.sort()
    out = torch.empty(kept, dtype=torch.int64)
    _gather(keys, offsets, kept_offsets, bits, out.numpy())
    return out
