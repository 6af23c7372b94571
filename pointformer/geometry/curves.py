"""Space-filling curves over grids of cells, in two and three dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from pointformer._checks import check_tensor, describe

CURVES = ("hilbert", "morton", "peano", "snake", "kd")

_SPREAD = {
    2: (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ),
    3: (
        (32, 0x001F00000000FFFF),
        (16, 0x001F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ),
}


def _interleave(axes: list[Tensor]) -> Tensor:
    """Merge the bits of D integers below 2**21; the first axis gets the lowest bit of each D."""
    code = torch.zeros_like(axes[0])
    for place, value in enumerate(axes):
        for shift, mask in _SPREAD[len(axes)]:
            value = (value | (value << shift)) & mask
        code |= value << place
    return code


def _split(cells: Tensor) -> list[Tensor]:
    check_tensor("cells", cells)
    if cells.shape[-1:] not in ((2,), (3,)) or cells.dtype != torch.int64:
        raise ValueError(f"cells: expected int64 of shape (..., 2 or 3), got {describe(cells)}")
    return list(cells.unbind(-1))


def morton_code(cells: Tensor) -> Tensor:
    """Number of each cell along the Morton (Z-order) curve, axis 0 fastest.

    Args:
        cells: (..., D) int64 cell coordinates from 0 to 2**21 - 1, D = 2 or 3.

    Returns:
        (...,) int64.
    """
    return _interleave(_split(cells))


def hilbert_code(cells: Tensor, bits: int = 21) -> Tensor:
    """Number of each cell along the Hilbert curve that starts at the origin.

    Skilling's transform (AIP Conf. Proc. 707, 2004). A leading zero bit in every coordinate rotates
    the axes by one, so with a number of bits that is a multiple of D the code of a cell does not
    depend on it: one infinite curve serves grids of all sizes.

    Args:
        cells: (..., D) int64 cell coordinates from 0 to 2**21 - 1, D = 2 or 3.
        bits: how many bits the coordinates have; fewer are faster. Rounded up to a multiple of D.

    Returns:
        (...,) int64; cells with consecutive numbers are neighbors.
    """
    axes = _split(cells)
    dimensions = len(axes)
    bits += -bits % dimensions
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i, axis in enumerate(axes):
            is_set = -((axis >> bit) & 1)
            first = axes[0] ^ (is_set & low)
            if i == 0:
                axes[0] = first
                continue
            swap = (first ^ axis) & ~is_set & low
            axes[0], axes[i] = first ^ swap, axis ^ swap
    for i in range(1, dimensions):
        axes[i] = axes[i] ^ axes[i - 1]
    parity = axes[-1] >> 1  # of the bits above each bit
    for shift in (1, 2, 4, 8, 16):
        parity = parity ^ (parity >> shift)
    return _interleave([axis ^ parity for axis in reversed(axes)])


def peano_code(cells: Tensor, bits: int = 21) -> Tensor:
    """Number of each cell along Peano's curve that starts at the origin, axis 0 fastest.

    In base 3, a coordinate's digit counts backwards where the digits of the other axes that come
    before it in the number have an odd sum. An integer is odd where the sum of its base-3 digits
    is. The number of a cell does not depend on how many digits there are.

    Args:
        cells: (..., D) int64 cell coordinates from 0 to 3**19 - 1 in 2-D, 3**13 - 1 in 3-D.
        bits: how many bits the coordinates have; fewer are faster.

    Returns:
        (...,) int64; cells with consecutive numbers are neighbors.
    """
    axes = _split(cells)
    code, weight = torch.zeros_like(axes[0]), 1
    for _ in range(min(2 * bits // 3 + 1, 39 // len(axes))):  # 3**39 fits 63 bits
        above = [axis // 3 for axis in axes]
        for i, axis in enumerate(axes):
            digit, others = axis - 3 * above[i], torch.zeros_like(axis)
            for other in (*above[:i], *axes[i + 1 :]):
                others = others ^ other
            code = code + weight * torch.where(others % 2 == 1, 2 - digit, digit)
            weight *= 3
        axes = above
    return code


def snake_code(cells: Tensor, shape: Tensor) -> Tensor:
    """Number of each cell along the boustrophedon: every row and plane runs back the other way.

    Args:
        cells: (..., D) int64 cell coordinates, D = 2 or 3.
        shape: (..., D) int64 cells of the grid per axis, broadcast against `cells`.

    Returns:
        (...,) int64 from 0 to the number of cells of the grid minus one.
    """
    axes = _split(cells)
    check_tensor("shape", shape)
    code = axes.pop()
    while axes:
        axis, length = axes.pop(), shape[..., len(axes)]
        code = code * length + torch.where(code % 2 == 0, axis, length - 1 - axis)
    return code


def curve_code(curve: str, cells: Tensor, shape: Tensor, bits: int) -> Tensor:
    """Sort key of each cell along `curve`; see the functions of the curves for the arguments."""
    if curve == "hilbert":
        return hilbert_code(cells, bits)
    if curve == "morton":
        return morton_code(cells)
    if curve == "peano":
        return peano_code(cells, bits)
    return snake_code(cells, shape)
