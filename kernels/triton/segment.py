"""Reductions over segments of rows on GPUs: a program for each segment and some of the channels.

Where segments are few and long, several programs take equal parts of each, and what they find is
reduced again: how many depends on shapes alone, so that nothing waits for the device and no bit
depends on the launch.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.triton.inverse import inverse_lists
from pointformer.kernels.triton.runtime import Variant

_ROWS = 16  # at a time
_WIDTHS = (1, 4, 16, 64)  # channels at a time
_LONG = 512  # rows for each of several programs
_MOST_PARTS = 256
_NOWHERE = tl.constexpr((1 << 63) - 1)


@triton.jit(do_not_specialize=("parts", "blocks", "channels"))
def segment_fold_fwd_kernel(
    values, other, offsets, out, places, parts, blocks, channels,
    MODE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See `pointformer.kernels.segment`; out and places (S * parts, C)."""
    # Along one axis: others have no more than 65,535 programs.
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    segment = part // parts
    begin = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    share = (end - begin + parts - 1) // parts
    begin = tl.minimum(begin + (part % parts) * share, end)
    end = tl.minimum(begin + share, end)
    channel = block * WIDTH + tl.arange(0, WIDTH)  # (WIDTH,)
    known = channel < channels
    extreme: tl.constexpr = (MODE == "max") | (MODE == "min") | (MODE == "largest")
    centered: tl.constexpr = (MODE == "squares") | (MODE == "exps")
    sign: tl.constexpr = -1.0 if MODE == "min" else 1.0
    center = tl.zeros((WIDTH,), tl.float32)
    if centered:
        center = tl.load(other + segment.to(tl.int64) * channels + channel, mask=known, other=0.0)
    total = tl.full((ROWS, WIDTH), -float("inf") if extreme else 0.0, tl.float32)
    place = tl.full((ROWS, WIDTH), _NOWHERE, tl.int64)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & known[None, :]
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        if extreme:
            value = tl.where(inside, value * sign, -float("inf"))
            nan = (value != value) & (total == total)
            better = (value > total) | nan | (inside & (place == _NOWHERE))
            total = tl.where(better, value, total)
            place = tl.where(better, row[:, None], place)
        elif MODE == "squares":
            difference = tl.where(inside, value - center[None, :], 0.0)
            total += difference * difference
        elif MODE == "exps":
            total += tl.where(inside, tl.exp(value - center[None, :]), 0.0)
        elif MODE == "products":
            total += value * tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        else:
            total += value
    target = part.to(tl.int64) * channels + channel
    if extreme:
        nan = total != total
        found = tl.max(tl.where(nan, -float("inf"), total), 0)
        bad = tl.max(nan.to(tl.int32), 0) > 0
        if MODE != "largest":
            best = tl.where(bad[None, :], nan, total == found[None, :])
            tl.store(places + target, tl.min(tl.where(best, place, _NOWHERE), 0), mask=known)
        found = tl.where(bad, float("nan"), found * sign)
    else:
        found = tl.sum(total, 0)
    tl.store(out + target, found, mask=known)


@triton.jit(do_not_specialize=("rows", "blocks", "channels"))
def segment_spread_fwd_kernel(
    table, segment, values, other, out, rows, blocks, channels,
    MODE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See `pointformer.kernels.segment`; segment (rows,)."""
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = part.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = block * WIDTH + tl.arange(0, WIDTH)
    here = row < rows
    inside = here[:, None] & (channel < channels)[None, :]
    at = row[:, None] * channels + channel[None, :]
    of = tl.load(segment + row, mask=here, other=0)[:, None] * channels + channel[None, :]
    result = tl.load(table + of, mask=inside, other=0.0)
    if MODE != "copy":
        value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        if MODE == "products":
            near = tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
            result = value * (near - result)
        else:
            difference = value - tl.load(other + of, mask=inside, other=0.0)
            result = result * (tl.exp(difference) if MODE == "exps" else difference)
    tl.store(out + at, result, mask=inside)


_FLOAT, _INT = torch.float32, torch.int64
_FOLDS = ("sum", "max", "min", "largest", "squares", "exps", "products")
_SPREADS = ("copy", "differences", "exps", "products")


def _width(channels):
    return next((width for width in _WIDTHS if channels <= width), _WIDTHS[-1])


@cache
def _fold_variant(mode, dtype, width):
    beside = _FLOAT if mode in ("squares", "exps") else dtype
    finds = mode in ("max", "min")
    return Variant(
        segment_fold_fwd_kernel,
        (dtype, beside, _INT, _FLOAT, _INT, "i32", "i32", "i32"),
        {"MODE": mode, "ROWS": _ROWS, "WIDTH": width},
        writes=("out", "places") if finds else ("out",),
        num_warps=max(1, width // 16),
        rounds=lambda a: {
            "first": (-(-a["offsets"].diff() // (a["parts"] * a["ROWS"]))).double().mean().item()
        },
    )


@cache
def _spread_variant(mode, dtype, width):
    beside = dtype if mode == "products" else _FLOAT
    return Variant(
        segment_spread_fwd_kernel,
        (_FLOAT, _INT, _FLOAT if mode == "copy" else dtype, beside, dtype, "i32", "i32", "i32"),
        {"MODE": mode, "ROWS": _ROWS, "WIDTH": width},
        writes=("out",),
        tiles={"ROWS": (64,)},
        num_warps=max(1, width // 16),
    )


def variants():
    """Every specialization that the functions below can launch."""
    for width in _WIDTHS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for mode in _FOLDS:
                yield _fold_variant(mode, dtype, width)
            for mode in _SPREADS:
                yield _spread_variant(mode, dtype, width)


def order(index, count):
    """See `pointformer.kernels.segment`."""
    offsets, entries = inverse_lists(index, count)
    return offsets.long(), entries


def fold(values, offsets, other, mode):
    """See `pointformer.kernels.segment`."""
    (rows, channels), count, device = values.shape, len(offsets) - 1, values.device
    finds = mode in ("max", "min")
    # As many parts as long segments on average need.
    parts = min(_MOST_PARTS, max(1, rows // max(1, count * _LONG)))
    out = torch.empty(count * parts, channels, dtype=torch.float32, device=device)
    places = torch.empty(out.shape if finds else (0,), dtype=torch.int64, device=device)
    variant = _fold_variant(mode, values.dtype, _width(channels))
    if other is not None:
        other = other.to(values.dtype if mode == "products" else torch.float32).contiguous()
    values = values.contiguous()
    blocks = triton.cdiv(channels, variant.constants["WIDTH"])
    variant.launch(
        (count * parts * blocks,),
        *(values, values if other is None else other, offsets.contiguous(), out),
        *(places if finds else offsets.contiguous(), parts, blocks, channels),
    )
    if parts > 1:
        again = mode if finds or mode == "largest" else "sum"
        each = torch.arange(count + 1, device=device) * parts
        out, part = fold(out, each, None, again)
        if finds:
            places = places.gather(0, part)
    return out, places.masked_fill_((offsets.diff() == 0)[:, None], rows) if finds else places


def spread(table, offsets, values, other, rows, dtype, mode):
    """See `pointformer.kernels.segment`."""
    channels, device = table.shape[1], table.device
    out = torch.empty(rows, channels, dtype=dtype, device=device)
    numbers = torch.arange(len(offsets) - 1, device=device)
    segment = torch.repeat_interleave(numbers, offsets.diff(), output_size=rows)
    if other is not None:
        other = other.to(dtype if mode == "products" else torch.float32).contiguous()
    variant = _spread_variant(mode, dtype, _width(channels))
    blocks = triton.cdiv(channels, variant.constants["WIDTH"])
    table = table.float().contiguous()
    variant.launch(
        lambda constants: (triton.cdiv(rows, constants["ROWS"]) * blocks,),
        *(table, segment, table if values is None else values.to(dtype).contiguous()),
        *(table if other is None else other, out, rows, blocks, channels),
    )
    return out
