"""Farthest points on GPUs: a program for each sample looks at all its points for each pick."""

from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.tables import from_host, starts_of
from pointformer.kernels.triton.runtime import Variant

_NOWHERE = tl.constexpr(0x7FFFFFFF)
_BLOCKS = (256, 4096)  # points at a time: in samples of up to eight times as many, in larger ones


@triton.jit(do_not_specialize=("samples",))
def farthest_fwd_kernel(
    positions, distance, tables, out, samples, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """distance (T,) is memory to work in; tables (3, samples + 1): where samples start, where their
    picks do, the first picks."""
    sample = tl.program_id(0)
    begin = tl.load(tables + sample)
    end = tl.load(tables + sample + 1)
    first_pick = tl.load(tables + samples + 1 + sample)
    last_pick = tl.load(tables + samples + 2 + sample)
    row = begin + tl.load(tables + 2 * samples + 2 + sample)
    for pick in range(first_pick, last_pick):
        tl.store(out + pick, row.to(tl.int64))
        base = positions + row.to(tl.int64) * D
        x = tl.load(base)
        y = tl.load(base + 1)
        z = tl.load(base + 2) if D == 3 else 0.0
        known = tl.where(pick > first_pick, end, begin)  # rows before it have a distance
        farthest = tl.full((BLOCK,), -2.0, tl.float32)
        where = tl.full((BLOCK,), _NOWHERE, tl.int32)
        for first in range(begin, end, BLOCK):
            point = first + tl.arange(0, BLOCK)  # (BLOCK,)
            here = point < end
            at = positions + point.to(tl.int64) * D
            difference = tl.load(at, mask=here, other=0.0) - x
            square = difference * difference
            difference = tl.load(at + 1, mask=here, other=0.0) - y
            square += difference * difference
            if D == 3:
                difference = tl.load(at + 2, mask=here, other=0.0) - z
                square += difference * difference
            nearest = tl.load(distance + point, mask=point < known, other=float("inf"))
            nearest = tl.minimum(nearest, square)
            nearest = tl.where(point == row, -1.0, nearest)  # none is picked twice
            tl.store(distance + point, nearest, mask=here)
            farther = here & (nearest > farthest)
            farthest = tl.where(farther, nearest, farthest)
            where = tl.where(farther, point, where)
        most = tl.max(farthest, 0)
        row = tl.min(tl.where(farthest == most, where, _NOWHERE), 0)


@cache
def _variant(dimensions, block):
    return Variant(
        farthest_fwd_kernel,
        (torch.float32, torch.float32, torch.int32, torch.int64, "i32"),
        {"D": dimensions, "BLOCK": block},
        writes=("distance", "out"),
        num_warps=max(4, block // 256),
        fp_fusion=False,
    )


def variants():
    """Every specialization that the function below can launch."""
    for dimensions in (2, 3):
        for block in _BLOCKS:
            yield _variant(dimensions, block)


def farthest_points(positions, sizes, counts, start):
    """See `pointformer.kernels.sampling`."""
    positions, device = positions.detach().contiguous(), positions.device
    out = torch.empty(sum(counts), dtype=torch.int64, device=device)
    distance = torch.empty(len(positions), dtype=torch.float32, device=device)
    columns = [starts_of(sizes), starts_of(counts), [*start, 0]]
    tables = from_host(columns, torch.int32, device)
    block = _BLOCKS[max((0, *sizes)) > 8 * _BLOCKS[0]]
    variant = _variant(positions.shape[1], block)
    variant.launch((len(sizes),), positions, distance, tables, out, len(sizes))
    return out
