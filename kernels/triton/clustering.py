"""Balanced clustering on GPUs: one kernel from positions to sort keys, one for the centers.

No table of anchors is built. A Hilbert or Morton walk over a grid halves the canvas along each axis
again and again, Peano's takes thirds along one axis after the other; the cells that come before a
given one are those of the parts passed on the way down to it, and each part's share of the grid is
a product of lengths. So a cell's place in the walk is a sum over the levels, and the cell at a
given place is found on the same way down: exact integers, whatever the shape of the grid.

Every float operation is rounded by itself, as on the CPU: ties decide the order.
"""

import math
from functools import cache, partial

import torch
import triton
import triton.language as tl

from pointformer.kernels.tables import from_host, plain_levels, starts_of
from pointformer.kernels.triton.runtime import Variant

HILBERT, MORTON, PEANO, SNAKE = (tl.constexpr(curve) for curve in range(4))
_CURVES = {
    "hilbert": HILBERT.value, "morton": MORTON.value, "peano": PEANO.value, "snake": SNAKE.value
}  # fmt: skip
_BLOCK = 128
_PART_BLOCK = 256  # rows of a part that is cut, at a time


@triton.jit
def sample_of(row, starts, samples, RAGGED: tl.constexpr):
    """Sample of each row. `starts` holds the samples' first rows, or is the size of all samples."""
    if RAGGED:
        sample = tl.zeros_like(row)
        span = samples  # the sample is one of so many
        while span > 1:
            span = (span + 1) // 2
            probe = sample + span
            below = tl.load(starts + probe, mask=probe < samples, other=0)
            sample = tl.where((probe < samples) & (below <= row), probe, sample)
    else:
        sample = row // starts
    return sample


@triton.jit
def of_sample(value, sample, RAGGED: tl.constexpr):
    """The entry of `sample` in a table, or the number that all samples have."""
    return tl.load(value + sample) if RAGGED else value


@triton.jit
def _turn(state, part, D: tl.constexpr):
    """Orientation of the Hilbert curve in one of the 2**D parts, counted along the curve.

    Nibble i holds, for the i-th axis as the curve sees it, the canvas' axis (times two) and whether
    it runs backwards. This is Skilling's transform (AIP Conf. Proc. 707, 2004) from the top down.
    """
    gray = part ^ (part >> 1)
    state ^= part >> (D - 1)
    for i in tl.static_range(1, D):
        inverted = (gray >> (D - 1 - i)) & 1
        swap = (state ^ (state >> (4 * i))) & 15 & (inverted - 1)
        state ^= swap | (swap << (4 * i)) | inverted
    return state ^ (part & 1)


@triton.jit
def _corner_of(part, state, D: tl.constexpr, CURVE: tl.constexpr):
    """Which half of each axis, one bit per axis, the part with this number along the curve is."""
    if CURVE == HILBERT:
        gray = part ^ (part >> 1)
        corner = tl.zeros_like(state)
        for i in tl.static_range(D):
            axis = state >> (4 * i)
            corner |= (((gray >> (D - 1 - i)) ^ axis) & 1) << ((axis >> 1) & 7)
    else:
        corner = tl.zeros_like(state) + part
    return corner


@triton.jit
def _part_at(corner, state, D: tl.constexpr, CURVE: tl.constexpr):
    """The inverse of `_corner_of`."""
    part = corner
    if CURVE == HILBERT:
        gray = tl.zeros_like(state)
        for i in tl.static_range(D):
            axis = state >> (4 * i)
            gray |= (((corner >> ((axis >> 1) & 7)) ^ axis) & 1) << (D - 1 - i)
        part = gray ^ (gray >> 1)
        if D == 3:
            part ^= gray >> 2
    return part


@triton.jit
def _corner_at(x, y, z, level):
    """Which half of each axis a cell is in."""
    return ((x >> level) & 1) | (((y >> level) & 1) << 1) | (((z >> level) & 1) << 2)


@triton.jit
def curve_code(x, y, z, bits, D: tl.constexpr, CURVE: tl.constexpr):
    """Number of a cell along the Hilbert or Morton curve through a cube of 2**bits: int64."""
    state = tl.full(x.shape, 0x420, tl.int32)
    code = tl.zeros(x.shape, tl.int64)
    for step in range(bits):
        part = _part_at(_corner_at(x, y, z, bits - 1 - step), state, D, CURVE)
        code = (code << D) | part
        state = _turn(state, part, D)
    return code


@triton.jit
def peano_code(x, y, z, digits, D: tl.constexpr):
    """Number of a cell along Peano's curve, from the lowest digits up: int64."""
    code = tl.zeros(x.shape, tl.int64)
    weight = tl.full(x.shape, 1, tl.int64)
    for _step in range(digits):
        above_x, above_y, above_z = x // 3, y // 3, z // 3
        digit = _turned(x - 3 * above_x, y ^ z)
        code += weight * digit
        weight *= 3
        digit = _turned(y - 3 * above_y, above_x ^ z)
        code += weight * digit
        weight *= 3
        if D == 3:
            digit = _turned(z - 3 * above_z, above_x ^ above_y)
            code += weight * digit
            weight *= 3
        x, y, z = above_x, above_y, above_z
    return code


@triton.jit
def _turned(digit, others):
    """A digit of Peano's curve, which runs backwards where the `others` are odd together."""
    return tl.where(others & 1 != 0, 2 - digit, digit)


@triton.jit
def _third_of(cell, low, length, side, others):
    """The third of an axis that a cell is in: the first cell of it, its cells, those passed."""
    digit = (cell - low) // side
    total = tl.minimum(length - low, 3 * side)
    own = tl.minimum(total - digit * side, side)
    before = digit * side
    passed = tl.where(others & 1 != 0, total - before - own, before)
    return low + before, own, passed


@triton.jit
def _third_at(place, low, length, side, others):
    """The third of an axis that the cell after `place` others along it is in, as `_third_of`."""
    total = tl.minimum(length - low, 3 * side)
    cell = low + tl.where(others & 1 != 0, total - 1 - place, place)
    return _third_of(cell, low, length, side, others)


@triton.jit
def _power(exponent):
    """3**exponent"""
    power = 1
    for _step in range(exponent):
        power *= 3
    return power


@triton.jit
def _peano_place(x, y, z, nx, ny, nz, digits, D: tl.constexpr):
    place = tl.zeros_like(x)
    ax, ay, az = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)  # corner of the part
    bx, by, bz = ax + nx, ay + ny, az + 1  # its cells along each axis
    if D == 3:
        bz = az + nz
    side = _power(digits)
    for _step in range(digits):
        side = side // 3
        # The sum of the base-3 digits so far of a coordinate is odd where `a // side` is.
        px, py, pz = ax // (3 * side), ay // (3 * side), az // (3 * side)
        if D == 3:
            az, bz, passed = _third_of(z, az, nz, side, px ^ py)
            place += passed * bx * by
            pz = az // side
        ay, by, passed = _third_of(y, ay, ny, side, px ^ pz)
        place += passed * bx * bz
        py = ay // side
        ax, bx, passed = _third_of(x, ax, nx, side, py ^ pz)
        place += passed * by * bz
    return place


@triton.jit
def _peano_cell(place, nx, ny, nz, digits, D: tl.constexpr):
    ax, ay, az = tl.zeros_like(place), tl.zeros_like(place), tl.zeros_like(place)
    bx, by, bz = ax + nx, ay + ny, az + 1
    if D == 3:
        bz = az + nz
    side = _power(digits)
    for _step in range(digits):
        side = side // 3
        px, py, pz = ax // (3 * side), ay // (3 * side), az // (3 * side)
        if D == 3:
            az, bz, passed = _third_at(place // (bx * by), az, nz, side, px ^ py)
            place -= passed * bx * by
            pz = az // side
        ay, by, passed = _third_at(place // (bx * bz), ay, ny, side, px ^ pz)
        place -= passed * bx * bz
        py = ay // side
        ax, bx, passed = _third_at(place // (by * bz), ax, nx, side, py ^ pz)
        place -= passed * by * bz
    return ax, ay, az


@triton.jit
def _halves(length, low, side):
    """How many of an axis' `length` cells lie in the `side` cells from `low`, and the next ones."""
    inside = tl.maximum(length - low, 0)
    return tl.minimum(inside, side), tl.minimum(tl.maximum(inside - side, 0), side)


@triton.jit
def _cells_in(corner, x0, x1, y0, y1, z0, z1, D: tl.constexpr):
    """Cells of the grid in the part at `corner`, from those in the halves of every axis."""
    count = tl.where((corner & 1) != 0, x1, x0) * tl.where((corner & 2) != 0, y1, y0)
    if D == 3:
        count *= tl.where((corner & 4) != 0, z1, z0)
    return count


@triton.jit
def _place_of(x, y, z, nx, ny, nz, bits, D: tl.constexpr, CURVE: tl.constexpr):
    """How many cells of the grid the walk visits before this one."""
    if CURVE == SNAKE:
        place = y
        if D == 3:
            place = z * ny + tl.where(z % 2 == 0, y, ny - 1 - y)
        place = place * nx + tl.where(place % 2 == 0, x, nx - 1 - x)
    elif CURVE == PEANO:
        place = _peano_place(x, y, z, nx, ny, nz, bits, D)
    else:
        place = tl.zeros_like(x)
        state = tl.full(x.shape, 0x420, tl.int32)
        for step in range(bits):
            level = bits - 1 - step
            inside = -(2 << level)  # clears the bits of this level and those below
            x0, x1 = _halves(nx, x & inside, 1 << level)
            y0, y1 = _halves(ny, y & inside, 1 << level)
            z0, z1 = _halves(nz, z & inside, 1 << level)
            part = _part_at(_corner_at(x, y, z, level), state, D, CURVE)
            for other in tl.static_range((1 << D) - 1):
                corner = _corner_of(other, state, D, CURVE)
                count = _cells_in(corner, x0, x1, y0, y1, z0, z1, D)
                place += tl.where(other < part, count, 0)
            state = _turn(state, part, D)
    return place


@triton.jit
def _cell_at(place, nx, ny, nz, bits, D: tl.constexpr, CURVE: tl.constexpr):
    """The cell that the walk visits after `place` others."""
    if CURVE == SNAKE:
        row = place // nx
        x = place % nx
        x = tl.where(row % 2 == 0, x, nx - 1 - x)
        y = row
        z = tl.zeros_like(x)
        if D == 3:
            z = row // ny
            y = row % ny
            y = tl.where(z % 2 == 0, y, ny - 1 - y)
    elif CURVE == PEANO:
        x, y, z = _peano_cell(place, nx, ny, nz, bits, D)
    else:
        x = tl.zeros_like(place)
        y = tl.zeros_like(place)
        z = tl.zeros_like(place)
        state = tl.full(place.shape, 0x420, tl.int32)
        for step in range(bits):
            side = 1 << (bits - 1 - step)
            x0, x1 = _halves(nx, x, side)
            y0, y1 = _halves(ny, y, side)
            z0, z1 = _halves(nz, z, side)
            part = tl.zeros_like(place)
            corner = tl.zeros_like(place)
            passed = tl.zeros_like(place)  # cells before the part
            before = tl.zeros_like(place)  # cells before the next candidate
            for other in tl.static_range(1 << D):
                here = _corner_of(other, state, D, CURVE)
                reached = before <= place  # the last one reached is not empty
                part = tl.where(reached, other, part)
                corner = tl.where(reached, here, corner)
                passed = tl.where(reached, before, passed)
                before += _cells_in(here, x0, x1, y0, y1, z0, z1, D)
            place -= passed
            x += (corner & 1) * side
            y += ((corner >> 1) & 1) * side
            z += (corner >> 2) * side
            state = _turn(state, part, D)
    return x, y, z


@triton.jit
def _cell_of(relative, cell, length):
    """Cell of a coordinate along one axis, and the coordinate in cells."""
    scaled = tl.div_rn(relative, cell)
    floor = tl.floor(scaled)
    last = (length - 1).to(tl.float32)
    # False for NaN, which traced graphs do not check for.
    return tl.where(floor > 0, tl.minimum(floor, last), 0.0).to(tl.int32), scaled


@triton.jit
def _anchor(index, cell, CURVE: tl.constexpr):
    """Coordinate of a cell's anchor along one axis."""
    index = index.to(tl.float32)
    return index * cell + cell * 0.5 - 0.5 if CURVE == SNAKE else index + 0.5


@triton.jit
def _squared_gaps(
    index, before, after, is_first, is_last, point, relative, cell, is_longest, CURVE: tl.constexpr
):
    """Squared distances along one axis to the anchors before and after in the walk."""
    step = 1.0
    if CURVE == SNAKE:  # positions as they are; those of a sample that keeps its order all tie
        endless = cell == float("inf")
        cell = tl.where(endless, 1.0, cell)
        point = tl.where(endless, 0.0, relative)
        step = cell
    step = tl.where(is_longest, step, 0.0)
    own = _anchor(index, cell, CURVE)
    previous = _anchor(before, cell, CURVE)
    following = _anchor(after, cell, CURVE)
    second = tl.where(is_last, own + step, following)
    second_last = tl.where(is_first, own - step, previous)
    previous = tl.where(is_first, own - (second - own), previous)
    following = tl.where(is_last, own + (own - second_last), following)
    return (point - previous) * (point - previous), (point - following) * (point - following)


_KEY_INTEGERS = (
    "starts", "first_cell", "longest", "shape_x", "shape_y", "shape_z", "tokens", "samples", "bits",
    "shift",
)  # fmt: skip


@triton.jit(do_not_specialize=_KEY_INTEGERS)
def curve_keys_fwd_kernel(
    positions, keys, starts, first_cell, longest, shape_x, shape_y, shape_z,
    origin_x, origin_y, origin_z, cell_x, cell_y, cell_z, tokens, samples, bits, shift,
    D: tl.constexpr, CURVE: tl.constexpr, ANCHORS: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    stored = row < tokens
    row = tl.minimum(row, tokens - 1)
    sample = sample_of(row, starts, samples, RAGGED)
    nx = of_sample(shape_x, sample, RAGGED)
    ny = of_sample(shape_y, sample, RAGGED)
    nz = of_sample(shape_z, sample, RAGGED)
    side_x = of_sample(cell_x, sample, RAGGED)
    side_y = of_sample(cell_y, sample, RAGGED)
    side_z = of_sample(cell_z, sample, RAGGED)
    base = positions + row.to(tl.int64) * D
    relative_x = tl.load(base) - of_sample(origin_x, sample, RAGGED)
    relative_y = tl.load(base + 1) - of_sample(origin_y, sample, RAGGED)
    x, point_x = _cell_of(relative_x, side_x, nx)
    y, point_y = _cell_of(relative_y, side_y, ny)
    z = tl.zeros_like(x)
    if D == 3:
        relative_z = tl.load(base + 2) - of_sample(origin_z, sample, RAGGED)
        z, point_z = _cell_of(relative_z, side_z, nz)
    if ANCHORS:
        place = _place_of(x, y, z, nx, ny, nz, bits, D, CURVE)
        last = nx * ny * nz - 1 if D == 3 else nx * ny - 1
        is_first = place == 0
        is_last = place == last
        ax, ay, az = _cell_at(tl.maximum(place - 1, 0), nx, ny, nz, bits, D, CURVE)
        bx, by, bz = _cell_at(tl.minimum(place + 1, last), nx, ny, nz, bits, D, CURVE)
        axis = of_sample(longest, sample, RAGGED)
        before, after = _squared_gaps(
            x, ax, bx, is_first, is_last, point_x, relative_x, side_x, axis == 0, CURVE
        )
        gap, gap_after = _squared_gaps(
            y, ay, by, is_first, is_last, point_y, relative_y, side_y, axis == 1, CURVE
        )
        before += gap
        after += gap_after
        if D == 3:
            gap, gap_after = _squared_gaps(
                z, az, bz, is_first, is_last, point_z, relative_z, side_z, axis == 2, CURVE
            )
            before += gap
            after += gap_after
        ratio = tl.div_rn(before, after + 1e-5)
        wide_sample = sample.to(tl.int64)
        first = tl.load(first_cell + sample) if RAGGED else first_cell * wide_sample
        anchor = first + place + 2 * wide_sample + 1
        key = (anchor << 31) | (ratio.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    else:
        if CURVE == SNAKE:
            wide_z = z.to(tl.int64)
            code = _place_of(x.to(tl.int64), y.to(tl.int64), wide_z, nx, ny, nz, bits, D, CURVE)
        elif CURVE == PEANO:
            code = peano_code(x, y, z, bits, D)
        else:
            code = curve_code(x, y, z, bits, D, CURVE)
        key = (sample.to(tl.int64) << shift) | code
    tl.store(keys + row, key, mask=stored)


@triton.jit
def kd_keys_fwd_kernel(
    positions, order, offsets, first, last, back, keys, axes, D: tl.constexpr, BLOCK: tl.constexpr
):
    """A program per cluster; that of a part's first one makes the keys of all of the part."""
    cluster = tl.program_id(0)
    axis = 0
    is_first = tl.load(first + cluster) == cluster
    end_cluster = tl.load(last + cluster)
    start = tl.load(offsets + cluster)
    end = tl.where(is_first, tl.load(offsets + end_cluster), start)
    low_x = tl.full((BLOCK,), float("inf"), tl.float32)
    low_y = low_x
    low_z = low_x
    high_x = -low_x
    high_y = -low_x
    high_z = -low_x
    lanes = tl.arange(0, BLOCK)
    for block in range(start, end, BLOCK):
        here = block + lanes < end
        base = positions + tl.load(order + block + lanes, mask=here, other=0) * D
        x = tl.load(base, mask=here, other=0.0)
        y = tl.load(base + 1, mask=here, other=0.0)
        low_x = tl.where(here, tl.minimum(low_x, x), low_x)
        low_y = tl.where(here, tl.minimum(low_y, y), low_y)
        high_x = tl.where(here, tl.maximum(high_x, x), high_x)
        high_y = tl.where(here, tl.maximum(high_y, y), high_y)
        if D == 3:
            z = tl.load(base + 2, mask=here, other=0.0)
            low_z = tl.where(here, tl.minimum(low_z, z), low_z)
            high_z = tl.where(here, tl.maximum(high_z, z), high_z)
    longest = tl.max(high_x, 0) - tl.min(low_x, 0)
    side = tl.max(high_y, 0) - tl.min(low_y, 0)
    axis = (side > longest).to(tl.int32)
    if D == 3:
        longest = tl.maximum(longest, side)
        axis = tl.where(tl.max(high_z, 0) - tl.min(low_z, 0) > longest, 2, axis)
    axis = tl.where(is_first, axis, 0)
    tl.store(axes + cluster, axis.to(tl.int64))
    turned = (tl.load(back + cluster) >> axis) & 1
    is_cut = end_cluster - cluster > 1
    for block in range(start, end, BLOCK):
        here = block + lanes < end
        base = positions + tl.load(order + block + lanes, mask=here, other=0) * D
        value = tl.load(base + axis, mask=here, other=0.0) + 0.0  # -0 is 0
        ascending = value.to(tl.int32, bitcast=True)
        ascending = tl.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).to(tl.int64)
        ascending = tl.where(is_cut, ascending ^ -turned, 0)
        key = (cluster.to(tl.int64) << 32) + (ascending + (1 << 31))
        tl.store(keys + block + lanes, key, mask=here)


@triton.jit(do_not_specialize=("clusters", "size", "per_sample", "length", "longer"))
def cluster_centers_fwd_kernel(
    positions, order, offsets, centers, clusters, size, per_sample, length, longer,
    D: tl.constexpr, UNIFORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ranges of rows are read, or computed and written where samples are alike."""
    cluster = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    stored = cluster < clusters
    if UNIFORM:
        sample = cluster // per_sample
        place = cluster - sample * per_sample
        start = sample * size + place * length + tl.minimum(place, longer)
        end = tl.minimum(start + length + (place < longer).to(tl.int32), (sample + 1) * size)
        start = tl.where(stored, start, 0)
        end = tl.where(stored, end, 0)
        tl.store(offsets + cluster, start, mask=stored)
        tl.store(offsets + cluster + 1, end, mask=cluster == clusters - 1)
    else:
        start = tl.load(offsets + cluster, mask=stored, other=0)
        end = tl.load(offsets + cluster + 1, mask=stored, other=0)
    x = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK,), tl.float32)
    z = tl.zeros((BLOCK,), tl.float32)
    for member in range(tl.max(end - start, 0)):
        here = start + member < end
        base = positions + tl.load(order + start + member, mask=here, other=0) * D
        x += tl.load(base, mask=here, other=0.0)
        y += tl.load(base + 1, mask=here, other=0.0)
        if D == 3:
            z += tl.load(base + 2, mask=here, other=0.0)
    count = tl.maximum(end - start, 1).to(tl.float32)
    centers += cluster.to(tl.int64) * D
    tl.store(centers, tl.div_rn(x, count), mask=stored)
    tl.store(centers + 1, tl.div_rn(y, count), mask=stored)
    if D == 3:
        tl.store(centers + 2, tl.div_rn(z, count), mask=stored)


def halvings(span):
    """Rounds of a bisection of so many, as in `sample_of`."""
    return max(span - 1, 0).bit_length()


@cache
def _keys_variant(dimensions, curve, anchors, ragged):
    integers = (torch.int32,) * 3 if ragged else ("i32",) * 3
    floats = (torch.float32,) * 6 if ragged else ("fp32",) * 6
    starts = (torch.int64, torch.int64, torch.int32) if ragged else ("i32",) * 3
    return Variant(
        curve_keys_fwd_kernel,
        (torch.float32, torch.int64, *starts, *integers, *floats, *("i32",) * 4),
        {
            "D": dimensions,
            "CURVE": _CURVES[curve],
            "ANCHORS": anchors,
            "RAGGED": ragged,
            "BLOCK": _BLOCK,
        },
        writes=("keys",),
        tiles={"BLOCK": (64, 256)},
        fp_fusion=False,
        rounds=lambda a: {
            "step": a["bits"],
            "_step": a["bits"],
            "span": halvings(a["samples"]),
        },
    )


@cache
def _kd_keys_variant(dimensions):
    return Variant(
        kd_keys_fwd_kernel,
        (torch.float32, torch.int64, torch.int32, *(torch.int64,) * 5),
        {"D": dimensions, "BLOCK": _PART_BLOCK},
        writes=("keys", "axes"),
        tiles={"BLOCK": (128, 512)},
        fp_fusion=False,
    )


def _centers_rounds(a):
    if a["UNIFORM"]:
        cluster = torch.arange(a["clusters"] + 1)
        sample, place = cluster // a["per_sample"], cluster % a["per_sample"]
        start = sample * a["size"] + place * a["length"]
        a["offsets"].copy_(start + place.clamp(max=a["longer"]))
    return {"member": a["offsets"].diff().max().item()}


@cache
def _centers_variant(dimensions, uniform):
    return Variant(
        cluster_centers_fwd_kernel,
        (torch.float32, torch.int64, torch.int32, torch.float32, *("i32",) * 5),
        {"D": dimensions, "UNIFORM": uniform, "BLOCK": 64},
        writes=("offsets", "centers") if uniform else ("centers",),
        tiles={"BLOCK": (32, 128)},
        num_warps=2,
        fp_fusion=False,
        rounds=_centers_rounds,
    )


def variants():
    for dimensions in (2, 3):
        for curve in _CURVES:
            for anchors in (True, False):
                for ragged in (False, True):
                    yield _keys_variant(dimensions, curve, anchors, ragged)
        yield _kd_keys_variant(dimensions)
        for uniform in (False, True):
            yield _centers_variant(dimensions, uniform)


def _split(values, dimensions):
    """One row per sample."""
    return [tuple(values[i : i + dimensions]) for i in range(0, len(values), dimensions)]


def _columns(table):
    """One row per axis; for two axes the second once more, which no kernel reads."""
    rows = table.T.contiguous()
    return rows[0], rows[1], rows[-1]


def curve_keys(positions, sizes, origin, cell_size, shape, longest, curve, anchors):
    tokens, dimensions = positions.shape
    keys = torch.empty(tokens, dtype=torch.int64, device=positions.device)
    if tokens == 0:
        return keys
    levels = plain_levels(curve, dimensions, len(sizes))
    shift = (levels**dimensions - 1).bit_length()
    bits = (max(shape) if anchors else levels - 1).bit_length()
    if curve == "peano":  # digits of base 3
        bits = 2 * bits // 3 + 1
    else:
        bits += -bits % dimensions  # a leading zero turns the curve
    grids = [_split(values, dimensions) for values in (shape, origin, cell_size)]
    cells = [math.prod(row) for row in grids[0]]
    samples = list(zip(sizes, cells, longest, *grids, strict=True))
    ragged = len(set(samples)) > 1
    if ragged:
        table = partial(from_host, device=positions.device)
        tables = [
            *table([starts_of(sizes), starts_of(cells)], torch.int64),
            table(longest, torch.int32),
            *_columns(table(grids[0], torch.int32)),
            *_columns(table(grids[1], torch.float32)),
            *_columns(table(grids[2], torch.float32)),
        ]
    else:
        tables = [sizes[0], cells[0], longest[0]]
        for rows in grids:
            tables += [*rows[0], rows[0][-1]][:3]
    variant = _keys_variant(dimensions, curve, anchors, ragged)
    variant.launch(
        lambda constants: (triton.cdiv(tokens, constants["BLOCK"]),),
        *(positions.contiguous(), keys, *tables, tokens, len(sizes), bits, shift),
    )
    return keys


def kd_keys(positions, order, offsets, first, last, back):
    """Keys (T,) and axes (K,), int64, see `pointformer.reference.clustering.kd_keys`."""
    keys, axes = torch.empty_like(order), torch.empty_like(first)
    if len(first):
        _kd_keys_variant(positions.shape[1]).launch(
            lambda constants: (len(first),),
            *(positions.contiguous(), order, offsets, first, last, back, keys, axes),
        )
    return keys, axes


def centers(positions, order, offsets):
    """(K, D) float32, see `pointformer.kernels.clustering`."""
    return _centers(positions, order, offsets, (0, 1, 0, 0), False)


def ranges(positions, order, samples, size, count, length, longer):
    """Offsets (K + 1,) int32 and centers (K, D), see `pointformer.kernels.clustering`."""
    offsets = torch.empty(samples * count + 1, dtype=torch.int32, device=positions.device)
    return offsets, _centers(positions, order, offsets, (size, count, length, longer), True)


def _centers(positions, order, offsets, sizes, uniform):
    clusters, dimensions = offsets.shape[0] - 1, positions.shape[1]
    out = torch.empty(clusters, dimensions, device=positions.device, dtype=torch.float32)
    variant = _centers_variant(dimensions, uniform)
    variant.launch(
        lambda constants: (triton.cdiv(clusters, constants["BLOCK"]),),
        *(positions.contiguous(), order, offsets, out, clusters, *sizes),
    )
    return out
