"""Reductions over segments of rows on CPU, for any number of channels by whole vectors.

The rows of a segment are one run of numbers, of which number n belongs to channel n modulo the
channels. So vectors that stand a period, the least common multiple of lanes and channels, apart are
of the same channels and can be added; their lanes are put together at the end. A long segment is
cut into pieces, which are reduced again: no bit depends on the number of threads.
"""

import math

import numpy as np
import torch
from numba import prange

from pointformer.kernels.cpu.clustering import sample_of
from pointformer.kernels.cpu.gather import flat
from pointformer.kernels.cpu.inverse import inverse_lists
from pointformer.kernels.cpu.runtime import called, inlined, kernel
from pointformer.kernels.cpu.simd import (
    LANES,
    advance,
    allocate,
    bits_less,
    exp,
    f32,
    fma,
    free,
    load,
    load_first,
    maximum_or_nan,
    pointer,
    splat,
    store,
    store_first,
    zero,
)

_PIECE = 1 << 13  # numbers
_SHORTEST_PIECE = 64  # rows
_CHUNK = 1 << 15  # numbers per unit of parallel work
_SUM, _EXTREME, _SQUARES, _EXPS, _PRODUCTS = range(5)
_MODES = {
    "sum": _SUM,
    "largest": _EXTREME, "max": _EXTREME, "min": _EXTREME, "squares": _SQUARES, "exps": _EXPS,
    "products": _PRODUCTS,
}  # fmt: skip
_COPY, _DIFFERENCES, _SPREAD_EXPS, _SPREAD_PRODUCTS = range(4)
_SPREAD_MODES = {
    "copy": _COPY, "differences": _DIFFERENCES, "exps": _SPREAD_EXPS,
    "products": _SPREAD_PRODUCTS,
}  # fmt: skip


@inlined
def _add(total, value, beside, center, mode):
    if mode == _SUM:
        return total + value
    if mode == _EXTREME:
        return maximum_or_nan(total, value * beside)
    if mode == _SQUARES:
        return fma(value - center, value - center, total)
    if mode == _EXPS:
        return total + exp(value - center)
    return fma(value, beside, total)


@inlined
def _total(values, other, center, first, length, period, sign, mode):
    """Of the vectors at `first`, `first + period`, ... of so many numbers, lane by lane."""
    empty = splat(f32(-np.inf)) if mode == _EXTREME else zero()
    # What fills up the last vector changes no total.
    rest = zero()
    if mode == _EXTREME:
        rest = splat(sign * f32(-np.inf))
    elif mode == _SQUARES:
        rest = center
    elif mode == _EXPS:
        rest = splat(f32(-np.inf))
    signs = splat(sign)
    even, odd = empty, empty  # neither waits for the other
    i = first
    while i + period + LANES <= length:
        beside = load(other, i) if mode == _PRODUCTS else signs
        even = _add(even, load(values, i), beside, center, mode)
        i += period
        beside = load(other, i) if mode == _PRODUCTS else signs
        odd = _add(odd, load(values, i), beside, center, mode)
        i += period
    while i < length:
        left = min(length - i, LANES)
        beside = load_first(other, i, left, rest) if mode == _PRODUCTS else signs
        even = _add(even, load_first(values, i, left, rest), beside, center, mode)
        i += period
    return maximum_or_nan(even, odd) if mode == _EXTREME else even + odd


@called
def _fold_piece(values, other, row, length, channels, period, sign, mode, totals, out):
    """Of `length` numbers: see `pointformer.kernels.segment`. `row` is the other row."""
    if mode in (_SQUARES, _EXPS):
        _repeat(row, channels, period, totals)
    for at in range(0, period, LANES):
        center = load(totals, at)
        if mode == _SUM:
            total = _total(values, other, center, at, length, period, sign, _SUM)
        elif mode == _EXTREME:
            total = _total(values, other, center, at, length, period, sign, _EXTREME)
        elif mode == _SQUARES:
            total = _total(values, other, center, at, length, period, sign, _SQUARES)
        elif mode == _EXPS:
            total = _total(values, other, center, at, length, period, sign, _EXPS)
        else:
            total = _total(values, other, center, at, length, period, sign, _PRODUCTS)
        store(totals, at, total)
    for channel in range(channels):
        joined = totals[channel]
        for i in range(channel + channels, period, channels):
            value = totals[i]
            if mode != _EXTREME:
                joined += value
            elif value > joined or value != value:
                joined = value
        totals[channel] = joined
        out[channel] = joined * sign if mode == _EXTREME else joined


@called
def _repeat(row, channels, period, pattern):
    """A row of channels again and again."""
    for i in range(channels):
        pattern[i] = row[i]
    for i in range(channels, period):
        pattern[i] = pattern[i - channels]


@inlined
def _is_maximum(value, largest):
    return value >= largest or value != value


@called
def _find(values, length, channels, period, sign, pattern, first, places):
    """The first rows that have the maxima, NaN being the largest."""
    _repeat(pattern, channels, period, pattern)
    for channel in range(channels):
        places[channel] = -1
    missing, at = channels, 0
    for i in range(0, length, LANES):
        left = min(length - i, LANES)
        value = load_first(values, i, left, zero()) * splat(sign)
        # What is not less than a number is that number, for a NaN beside it were the maximum.
        if bits_less(value, load(pattern, at)) != (1 << LANES) - 1:
            for lane in range(left):
                channel = (i + lane) % channels
                if places[channel] < 0 and _is_maximum(values[i + lane] * sign, pattern[channel]):
                    places[channel] = first + (i + lane) // channels
                    missing -= 1
            if missing == 0:
                break
        at += LANES
        if at == period:
            at = 0
    for channel in range(channels):
        if places[channel] < 0:
            places[channel] = first


@kernel
def _fold(values, other, pieces, segments, chunks, channels, period, sign, mode, out, places):
    find = len(places) > 0
    for chunk in prange(len(chunks) - 1):
        totals = allocate(period)
        bounds = pointer(pieces)
        for piece in range(chunks[chunk], chunks[chunk + 1]):
            first = bounds[piece]
            length = (bounds[piece + 1] - first) * channels
            numbers = advance(pointer(values), first * channels)
            beside, row = pointer(other), pointer(other)
            if mode in (_SQUARES, _EXPS):
                row = advance(row, segments[piece] * channels)
            elif mode == _PRODUCTS:
                beside = advance(beside, first * channels)
            target = advance(pointer(out), piece * channels)
            _fold_piece(numbers, beside, row, length, channels, period, sign, mode, totals, target)
            if find:
                where = advance(pointer(places), piece * channels)
                _find(numbers, length, channels, period, sign, totals, first, where)
        free(totals)


@inlined
def _put(target, values, other, factors, pattern, length, period, mode):
    at = 0
    for i in range(0, length, LANES):
        left = min(length - i, LANES)
        result = load(factors, at)
        if mode != _COPY:
            value = load_first(values, i, left, zero())
            if mode == _DIFFERENCES:
                result = (value - load(pattern, at)) * result
            elif mode == _SPREAD_EXPS:
                result = exp(value - load(pattern, at)) * result
            else:
                result = value * (load_first(other, i, left, zero()) - result)
        if left == LANES:
            store(target, i, result)
        else:
            store_first(target, i, result, left)
        at += LANES
        if at == period:
            at = 0


@called
def _put_by_mode(target, values, other, factors, pattern, length, period, mode):
    if mode == _COPY:
        _put(target, values, other, factors, pattern, length, period, _COPY)
    elif mode == _DIFFERENCES:
        _put(target, values, other, factors, pattern, length, period, _DIFFERENCES)
    elif mode == _SPREAD_EXPS:
        _put(target, values, other, factors, pattern, length, period, _SPREAD_EXPS)
    else:
        _put(target, values, other, factors, pattern, length, period, _SPREAD_PRODUCTS)


@kernel
def _spread(table, values, other, offsets, channels, period, rows, per_chunk, mode, out):
    for chunk in prange((rows + per_chunk - 1) // per_chunk):
        factors = allocate(2 * period)
        pattern = advance(factors, period)
        bounds = pointer(offsets)
        row = chunk * per_chunk
        stop = min(rows, row + per_chunk)
        segment = sample_of(offsets, row)
        while row < stop:
            while bounds[segment + 1] <= row:
                segment += 1
            end = min(stop, bounds[segment + 1])
            base = row * channels
            _repeat(advance(pointer(table), segment * channels), channels, period, factors)
            numbers, beside = pointer(values), pointer(other)
            if mode != _COPY:
                numbers = advance(numbers, base)
            if mode == _SPREAD_PRODUCTS:
                beside = advance(beside, base)
            elif mode != _COPY:
                _repeat(advance(beside, segment * channels), channels, period, pattern)
            _put_by_mode(
                advance(pointer(out), base), numbers, beside, factors, pattern,
                (end - row) * channels, period, mode,
            )  # fmt: skip
            row = end
        free(factors)


def _offsets(tensor, rows):
    """As numpy, after a look whether a kernel would leave its arrays."""
    offsets = tensor.numpy()
    if offsets[0] != 0 or offsets[-1] != rows or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"offsets: expected to ascend from 0 to {rows}, the rows of values")
    return np.ascontiguousarray(offsets)


def order(index, count):
    """See `pointformer.kernels.segment`."""
    numbers = index.contiguous().numpy()
    least, most = (int(x) for x in index.aminmax()) if numbers.size else (0, -1)
    if least < 0 or most >= count:
        raise IndexError(f"index: expected segments from 0 to {count - 1}")
    return tuple(torch.from_numpy(x) for x in inverse_lists(numbers, count))


def fold(values, offsets, other, mode):
    """See `pointformer.kernels.segment`."""
    (rows, channels), count = values.shape, len(offsets) - 1
    offsets = _offsets(offsets, rows)
    find = mode in ("min", "max")
    sign = f32(-1.0) if mode == "min" else f32(1.0)
    lengths = np.diff(offsets)
    pieces, segments, cut = offsets, np.arange(count if mode in ("squares", "exps") else 0), False
    longest = max(_SHORTEST_PIECE, _PIECE // max(channels, 1))
    if lengths.max(initial=0) > longest:
        cut = True
        parts = np.maximum(-(-lengths // longest), 1)
        first_piece = np.concatenate([[0], np.cumsum(parts)])
        segments = np.repeat(np.arange(count), parts)
        nth = np.arange(len(segments)) - first_piece[segments]
        pieces = np.append(offsets[segments] + nth * longest, rows)
    number = len(pieces) - 1
    out = torch.empty(number, channels, dtype=torch.float32)
    places = torch.empty(number if find else 0, channels, dtype=torch.int64)
    beside = out.view(-1)[:0].numpy() if other is None else flat(other.float())
    if channels and number:
        steps = np.arange(0, rows, max(1, _CHUNK // channels))
        chunks = np.unique(np.append(np.searchsorted(pieces[:-1], steps), number))
        chunks = np.append(0, chunks) if chunks[0] else chunks
        _fold(
            flat(values.float()), beside, pieces, segments, chunks, channels,
            math.lcm(LANES, channels), sign, _MODES[mode], out.view(-1).numpy(),
            places.view(-1).numpy(),
        )  # fmt: skip
    if cut:
        again = mode if _MODES[mode] == _EXTREME else "sum"
        out, piece = fold(out, torch.from_numpy(first_piece), None, again)
        if find:
            places = torch.cat([places, places[:1]]).gather(0, piece)
    if find:
        places[torch.from_numpy(lengths == 0)] = rows
    return out, places if find else places.view(-1)


def spread(table, offsets, values, other, rows, dtype, mode):
    """See `pointformer.kernels.segment`."""
    channels = table.shape[1]
    out = torch.empty(rows, channels, dtype=torch.float32)
    if out.numel():
        nothing = out.view(-1)[:0].numpy()
        _spread(
            flat(table.float()),
            nothing if values is None else flat(values.float()),
            nothing if other is None else flat(other.float()),
            _offsets(offsets, rows), channels, math.lcm(LANES, channels), rows,
            max(1, _CHUNK // channels), _SPREAD_MODES[mode], out.view(-1).numpy(),
        )  # fmt: skip
    return out.to(dtype)
