"""Selection of merging centers on GPUs: one kernel makes sort keys, one picks from the sorted rows.

A key is (sample, falling selection score), with the reserved tokens of a sample before all others.
Scores are rounded after every operation, as on the CPU: ties decide the order.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.tables import from_host, starts_of
from pointformer.kernels.triton.clustering import halvings, of_sample, sample_of
from pointformer.kernels.triton.runtime import Variant

NONE, GRID, ADAPTIVE = (tl.constexpr(prior) for prior in range(3))
_BLOCK = 256
_LARGEST = (1 << 31) - 1  # no coordinate is, so that larger strides have the same multiples
_PLACE_BITS = tl.constexpr(34)  # of a key: where a token stands among those of its sample
_FARTHEST = tl.constexpr(1 << 24)  # as far as float32 counts; a lone token's nearest is there


@triton.jit(do_not_specialize=("starts", "tokens", "samples", "stride", "coarse"))
def selection_keys_fwd_kernel(
    scores, positions, nearest, keys, starts, tokens, samples, alpha, stride, coarse,
    D: tl.constexpr, PRIOR: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens on multiples of their sample's `coarse` are reserved; none are if it is 0."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    stored = row < tokens
    row = tl.minimum(row, tokens - 1)
    sample = sample_of(row, starts, samples, RAGGED).to(tl.int64)
    base = positions + row.to(tl.int64) * D
    x = tl.load(base).to(tl.int32)
    y = tl.load(base + 1).to(tl.int32)
    z = tl.load(base + 2).to(tl.int32) if D == 3 else tl.zeros_like(x)
    has_prior = tl.zeros_like(stored)
    if PRIOR == GRID:
        has_prior = (x % stride == 0) & (y % stride == 0) & (z % stride == 0)
    if PRIOR == ADAPTIVE:
        # The prior is 1 where all coordinates are multiples of 2t. With v the largest power of two
        # that divides them, that is t <= v/2: another token is at most v/2 away.
        pair = nearest + row.to(tl.int64) * 2
        other = tl.load(pair)
        other = tl.where(other == row, tl.load(pair + 1), other)
        there = positions + tl.maximum(other, 0).to(tl.int64) * D
        x_gap = tl.load(there).to(tl.int64) - x.to(tl.int64)
        y_gap = tl.load(there + 1).to(tl.int64) - y.to(tl.int64)
        farthest = tl.full(x_gap.shape, _FARTHEST, tl.int64)
        x_gap = tl.minimum(tl.abs(x_gap), farthest)
        y_gap = tl.minimum(tl.abs(y_gap), farthest)
        square = x_gap * x_gap + y_gap * y_gap
        if D == 3:
            z_gap = tl.load(there + 2).to(tl.int64) - z.to(tl.int64)
            z_gap = tl.minimum(tl.abs(z_gap), farthest)
            square += z_gap * z_gap
        square = tl.where(other < 0, farthest * farthest, square)
        square = tl.minimum(square, farthest * farthest)
        together = x | y | z
        half = tl.minimum(((together & -together) >> 1).to(tl.int64), farthest)
        has_prior = (together == 0) | ((half > 0) & (square <= half * half))
    ranking = tl.load(scores + row) * alpha + has_prior.to(tl.float32)
    ascending = ranking.to(tl.int32, bitcast=True)
    ascending = tl.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).to(tl.int64)
    place = tl.full(ascending.shape, (3 << 31) - 1, tl.int64) - ascending
    apart = of_sample(coarse, sample, RAGGED)
    side = tl.maximum(apart, 1)
    reserved = (apart > 0) & (x % side == 0) & (y % side == 0) & (z % side == 0)
    place = tl.where(reserved, 0, place)
    tl.store(keys + row, (sample << _PLACE_BITS) | place, mask=stored)


@triton.jit(do_not_specialize=("starts", "kept_starts", "kept", "samples", "longest"))
def selected_rows_fwd_kernel(
    keys, order, out, starts, kept_starts, kept, samples, longest,
    RAGGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reserved tokens come first in the sorted keys: put those kept after the others.

    `kept` rows in all, at most `longest` of a sample.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    stored = row < kept
    row = tl.minimum(row, kept - 1)
    sample = sample_of(row, kept_starts, samples, RAGGED)
    if RAGGED:
        start = tl.load(starts + sample)
        first = tl.load(kept_starts + sample)
        count = tl.load(kept_starts + sample + 1) - first
    else:
        start = sample * starts
        first = sample * kept_starts
        count = tl.zeros_like(row) + kept_starts
    reserved = tl.zeros_like(row)  # of those kept, by bisection
    span = longest + 1
    while span > 1:
        span = (span + 1) // 2
        probe = reserved + span
        here = stored & (probe <= count)
        key = tl.load(keys + start + probe - 1, mask=here, other=1)
        place = key & ((tl.full(key.shape, 1, tl.int64) << _PLACE_BITS) - 1)
        reserved = tl.where(here & (place == 0), probe, reserved)
    chosen = tl.load(order + start + (row - first + reserved) % count, mask=stored)
    tl.store(out + row, chosen, mask=stored)


@cache
def _keys_variant(dimensions, prior, ragged):
    nearest = torch.int32 if prior == ADAPTIVE.value else torch.float32  # then not read
    return Variant(
        selection_keys_fwd_kernel,
        (
            *(torch.float32, torch.float32, nearest, torch.int64),
            *(torch.int32 if ragged else "i32", "i32", "i32", "fp32", "i32"),
            torch.int32 if ragged else "i32",
        ),
        {"D": dimensions, "PRIOR": prior, "RAGGED": ragged, "BLOCK": _BLOCK},
        writes=("keys",),
        tiles={"BLOCK": (128, 512)},
        fp_fusion=False,
        rounds=lambda a: {"span": halvings(a["samples"])},
    )


@cache
def _rows_variant(ragged):
    table = torch.int32 if ragged else "i32"
    return Variant(
        selected_rows_fwd_kernel,
        (*(torch.int64,) * 3, table, table, *("i32",) * 3),
        {"RAGGED": ragged, "BLOCK": _BLOCK},
        writes=("out",),
        tiles={"BLOCK": (128, 512)},
        rounds=lambda a: {"span": halvings(a["longest"] + 1)},
    )


def variants():
    for ragged in (False, True):
        for dimensions in (2, 3):
            for prior in (NONE, GRID, ADAPTIVE):
                yield _keys_variant(dimensions, prior.value, ragged)
        yield _rows_variant(ragged)


def select_from_nearest(scores, positions, nearest, sizes, kept, alpha, stride, grid, coarse):
    """See `pointformer.kernels.selection`."""
    tokens, dimensions = positions.shape
    out = torch.empty(sum(kept), dtype=torch.int64, device=positions.device)
    if len(out) == 0:
        return out
    positions = positions.contiguous()
    keys = torch.empty(tokens, dtype=torch.int64, device=positions.device)
    ragged = len(set(zip(sizes, kept, coarse, strict=True))) > 1
    coarse = [min(apart, _LARGEST) for apart in coarse]
    tables = (sizes[0], kept[0], coarse[0])
    if ragged:
        columns = [starts_of(sizes), starts_of(kept), [*coarse, 0]]
        tables = from_host(columns, torch.int32, positions.device)
    prior = GRID if grid else NONE
    if nearest is None:
        nearest = positions
    else:
        prior, nearest = ADAPTIVE, nearest.contiguous()
    variant = _keys_variant(dimensions, prior.value, ragged)
    variant.launch(
        lambda constants: (triton.cdiv(tokens, constants["BLOCK"]),),
        scores.contiguous(), positions, nearest, keys, tables[0], tokens, len(sizes), alpha,
        min(stride, _LARGEST), tables[2],
    )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    variant = _rows_variant(ragged)
    variant.launch(
        lambda constants: (triton.cdiv(len(out), constants["BLOCK"]),),
        *(keys, order, out, *tables[:2], len(out), len(sizes), max(kept)),
    )
    return out
