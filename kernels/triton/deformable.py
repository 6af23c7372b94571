"""Triton deformable attention over points: places are found and weighed where values are gathered.

A program takes a head of `_QUERIES` queries, `_POINTS` of their places at a time: a thread of its
one warp finds the tokens near one place and their weights, in registers; then four threads at a
time read the rows of these tokens. Forward writes nothing but the output. Bytes to and from memory:

    places * (2 offset + weight) + cells * levels * k * 4 + 2 * tokens * heads * channels * value

Backward does the same with products in place of sums. It leaves behind k factors and the number of
the nearest cell for each place. Places, which are k times fewer than pairs of a place and a token,
are then sorted by head and cell, and a program that owns a token and a head walks the cells that
list the token, each with its places, in ascending order: no atomics. Besides the above, with its
gradients:

    places * (8 k + 8 + sort) + heads * cells * levels * 8 + tokens * heads * channels * value

where the sort of 4-byte keys with 8-byte numbers moves 24 bytes in each of four passes.

A value that is not finite can reach places whose list of tokens begins with a missing one.
"""

import itertools
from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.triton.attention_pairs import division
from pointformer.kernels.triton.interpolate import TINY
from pointformer.kernels.triton.inverse import inverse_lists, sorted_lists
from pointformer.kernels.triton.runtime import Variant

_QUERIES, _POINTS = 8, 4  # of a program; the places of a query at a time
_TOKENS = (1, 4, 8, 16)  # near a place; lists of other lengths are filled up
_ROWS = 32  # cells of a token, and places of these, at a time
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COARSEST = tl.constexpr(1e20)  # `eps` in units of the nearest distance ** power: more is the same
_FARTHEST = tl.constexpr(2.0**126)  # squares above count as this: their inverses are normal


@triton.jit
def _log2(x):
    """Of normal x, to 1.8e-7 near 1. The library's takes twice as many instructions."""
    bits = x.to(tl.int32, bitcast=True)
    t = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    y = t * -0.009309140034019947 + 0.052058909088373184
    y = y * t - 0.13752120733261108
    y = y * t + 0.2418646514415741
    y = y * t - 0.34730103611946106
    y = y * t + 0.4786836802959442
    y = y * t - 0.7211657762527466
    y = y * t + 1.4426898956298828
    return y * t + ((bits >> 23).to(tl.float32) - 127.0)


@triton.jit
def _pair(data, number):
    """Two adjacent elements, loaded as one."""
    both = tl.load(data + number.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :])
    return tl.split(both)


@triton.jit
def _columns(table, K: tl.constexpr):
    """The columns of (N, K), in order, where K is a power of two."""
    columns = (table,)
    for level in tl.static_range(5):
        if (2 << level) <= K:
            parts = ()
            for column in tl.static_range(1 << level):
                wide = tl.reshape(columns[column], (table.shape[0], 2, K >> (level + 1)))
                first, second = tl.split(tl.permute(wide, (0, 2, 1)))
                parts += (first, second)
            columns = parts
    flat = ()
    for column in tl.static_range(K):
        flat += (tl.reshape(columns[column], (table.shape[0],)),)
    return flat


@triton.jit
def _to_cell(x, side):
    """The nearest integer, half to even, within 0 to side - 1."""
    last = side - 1
    # Within the canvas before the conversion: beyond it a number may be too large for any integer.
    x = tl.minimum(tl.maximum(x, 0.0), last.to(tl.float32))
    cell = (x + 0.5).to(tl.int32)
    tie = cell.to(tl.float32) - x == 0.5
    return tl.minimum(cell - (tie & ((cell & 1) != 0)).to(tl.int32), last)


@triton.jit
def _lanes(first_query, queries, QUERIES: tl.constexpr, POINTS: tl.constexpr):
    """Query, clamped, and point of each thread: those of one query are QUERIES threads apart."""
    lane = tl.arange(0, QUERIES * POINTS)
    return tl.minimum(first_query + lane % QUERIES, queries - 1), lane // QUERIES


@triton.jit
def _canvas(canvas, query_positions, query):
    """x and y of queries, and the first cell, width and height of their canvas."""
    x, y = _pair(query_positions, query)
    base = canvas + query.to(tl.int64) * 3
    return x, y, tl.load(base).to(tl.int64), tl.load(base + 1), tl.load(base + 2)


@triton.jit
def _find(
    offsets, positions, lookup, own, number, place, tokens, levels, reciprocal, shift,
    K: tl.constexpr,
):  # fmt: skip
    """What is near some places, as tuples of K: rows, all of which exist, place - token, and the
    square of that, infinite for a token that does not exist. Also the nearest one's cell."""
    dx, dy = _pair(offsets, number)
    x = own[0] + dx.to(tl.float32)
    y = own[1] + dy.to(tl.float32)
    column = _to_cell(x, own[3])
    cell = own[2] + (_to_cell(y, own[4]).to(tl.int64) * own[3] + column)
    level = ((place.to(tl.int64) * reciprocal) >> shift).to(tl.int32)
    at = cell * levels + level
    listed = _columns(tl.load(lookup + at[:, None] * K + tl.arange(0, K)[None, :]), K)
    rows, xs, ys, squares = (), (), (), ()
    for j in tl.static_range(K):
        unsigned = listed[j].to(tl.uint32, bitcast=True)
        known = unsigned < tokens.to(tl.uint32)
        # Most lists end with what is missing. Some row has to be read.
        row = tl.where(known, listed[j], rows[0] if j else tokens - 1)
        token_x, token_y = _pair(positions, row)
        delta_x = x - token_x
        delta_y = y - token_y
        square = tl.maximum(delta_x * delta_x + delta_y * delta_y, TINY)
        rows += (row,)
        xs += (delta_x,)
        ys += (delta_y,)
        squares += (tl.where(known, tl.minimum(square, _FARTHEST), float("inf")),)
    return rows, xs, ys, squares, at


@triton.jit
def _weigh(squares, h, eps, K: tl.constexpr):
    """1 / (ratio ** h + eps) of each square's ratio to the least one, 0 for infinite ones.

    Returns:
        the weights, and the inverse of their sum, 0 if that is; log2 of the ratios; the least
        square, its log2, and `eps` in units of least ** h.
    """
    nearest = squares[0]
    for j in tl.static_range(1, K):
        nearest = tl.minimum(nearest, squares[j])
    nearest = tl.minimum(nearest, _FARTHEST)
    logarithm = _log2(nearest)
    eps = tl.minimum(eps * tl.exp2(-h * logarithm), _COARSEST)
    inverse = 1.0 / nearest
    most = tl.where(nearest > TINY, _FARTHEST, TINY)  # others do not count beside a distance 0
    total = tl.zeros_like(nearest)
    weights, ratios = (), ()
    for j in tl.static_range(K):
        ratio = _log2(squares[j] * inverse)
        weight = 1.0 / (tl.exp2(h * ratio) + eps)
        weight = tl.where(squares[j] > most, 0.0, weight)
        total += weight
        weights += (weight,)
        ratios += (ratio,)
    normal = tl.where(total > 0, 1.0 / total, 0.0)
    return weights, normal, ratios, nearest, logarithm, eps


@triton.jit
def _log_gradient(squared):
    """2 / squared, 0 where it is as small as a square can be."""
    return tl.where(squared > TINY, 2.0 / squared, 0.0)


_INTEGERS = ("queries", "tokens", "heads", "levels", "places", "units", "reciprocal", "shift")
_BACKWARD_INTEGERS = (*_INTEGERS, "buckets")
_TOKEN_INTEGERS = ("heads", "places", "units", "buckets")


@triton.jit(do_not_specialize=_INTEGERS)
def deformable_fwd_kernel(
    value, positions, offsets, weights, query_positions, canvas, lookup, power, output,
    queries, tokens, heads, levels, places, units, reciprocal, shift, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    QUERIES: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    first_query = tl.program_id(0) // heads * QUERIES
    channels = units * UNIT
    query, point = _lanes(first_query, queries, QUERIES, POINTS)
    own = _canvas(canvas, query_positions, query)
    first = (query.to(tl.int64) * heads + head) * places
    h = tl.load(power).to(tl.float32) * 0.5
    # Two numbers of bfloat16 are taken as a word: to separate them costs least.
    WORDS: tl.constexpr = value.dtype.element_ty == tl.bfloat16 and UNIT % 2 == 0
    SIZE: tl.constexpr = 2 if WORDS else 1
    data = value.to(tl.pointer_type(tl.int32), bitcast=True) if WORDS else value
    column = tl.program_id(1) * (WIDTH // SIZE) + tl.arange(0, WIDTH // SIZE)
    inside = (column < channels // SIZE)[None, :]
    source = data + head.to(tl.int64) * (channels // SIZE) + column[None, :]
    sums = tl.zeros((QUERIES * POINTS, WIDTH // SIZE), tl.float32)
    odd = sums
    for start in range(0, places, POINTS):
        place = tl.minimum(start + point, places - 1)
        number = first + place
        rows, _x, _y, squares, _at = _find(
            offsets, positions, lookup, own, number, place, tokens, levels, reciprocal, shift, K
        )
        near, normal, _l, _n, _g, _e = _weigh(squares, h, eps, K)
        factor = tl.load(weights + number).to(tl.float32) * normal
        factor = tl.where(start + point < places, factor, 0.0)
        for j in tl.static_range(K):
            at = (rows[j] * (heads * units))[:, None].to(tl.int64) * (UNIT // SIZE)
            if UNIT == WIDTH:
                loaded = tl.load(source + at)
            else:
                loaded = tl.load(source + at, mask=inside)
            share = (near[j] * factor)[:, None]
            if WORDS:
                sums += share * (loaded << 16).to(tl.float32, bitcast=True)
                odd += share * (loaded & -65536).to(tl.float32, bitcast=True)
            else:
                sums += share * loaded.to(tl.float32)
    total = tl.sum(tl.reshape(sums, (POINTS, QUERIES, WIDTH // SIZE)), 0)
    if WORDS:
        second = tl.sum(tl.reshape(odd, (POINTS, QUERIES, WIDTH // SIZE)), 0)
        total = tl.reshape(tl.join(total, second), (QUERIES, WIDTH))
    row = first_query + tl.arange(0, QUERIES)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    target = output + (row.to(tl.int64) * heads + head)[:, None] * channels + channel[None, :]
    tl.store(target, total, mask=(row < queries)[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def deformable_bwd_place_kernel(
    grad, value, positions, offsets, weights, query_positions, canvas, lookup, power,
    d_offsets, d_weights, d_power, factors, cells,
    queries, tokens, heads, levels, places, units, reciprocal, shift, buckets, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    QUERIES: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """The gradients of offsets, weights and (a program's part) of the power; factors and cells.

    A factor is weight * w / sum(w), where w depends on the ratio of the nearest square to the own
    one; the factors' gradients, averaged under the shares w / sum(w), are the weight's gradient.
    """
    head = tl.program_id(0) % heads
    first_query = tl.program_id(0) // heads * QUERIES
    channels = units * UNIT
    query, point = _lanes(first_query, queries, QUERIES, POINTS)
    exists = first_query + tl.arange(0, QUERIES * POINTS) % QUERIES < queries
    row = tl.minimum(first_query + tl.arange(0, QUERIES), queries - 1)
    own = _canvas(canvas, query_positions, query)
    first = (query.to(tl.int64) * heads + head) * places
    h = tl.load(power).to(tl.float32) * 0.5
    source = value + head.to(tl.int64) * channels
    target = grad + (row.to(tl.int64) * heads + head)[:, None] * channels
    learned = tl.zeros((QUERIES * POINTS,), tl.float32)
    for start in range(0, places, POINTS):
        place = tl.minimum(start + point, places - 1)
        number = first + place
        stored = exists & (start + point < places)
        rows, xs, ys, squares, cell = _find(
            offsets, positions, lookup, own, number, place, tokens, levels, reciprocal, shift, K
        )
        near, normal, ratios, nearest, logarithm, unit_eps = _weigh(squares, h, eps, K)
        products = ()
        for _ in tl.static_range(K):
            products += (tl.zeros_like(normal),)
        for block in range(0, channels, WIDTH):
            channel = block + tl.arange(0, WIDTH)
            inside = (channel < channels)[None, :]
            slope = tl.load(target + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            slope = tl.broadcast_to(slope[None, :, :], (POINTS, QUERIES, WIDTH))
            slope = tl.reshape(slope, (QUERIES * POINTS, WIDTH))
            new = ()
            for j in tl.static_range(K):
                at = (rows[j] * (heads * units))[:, None].to(tl.int64) * UNIT + channel[None, :]
                if UNIT == WIDTH:
                    loaded = tl.load(source + at)
                else:
                    loaded = tl.load(source + at, mask=inside, other=0.0)
                new += (products[j] + tl.sum(loaded.to(tl.float32) * slope, 1),)
            products = new
        weight = tl.load(weights + number).to(tl.float32)
        mean = tl.zeros_like(normal)
        near_x, near_y = tl.zeros_like(normal), tl.zeros_like(normal)
        for j in tl.static_range(K):
            mean += near[j] * normal * products[j]
            tl.store(factors + number * K + j, near[j] * normal * weight, mask=stored)
        for back in tl.static_range(K):  # the first of the nearest ones
            closest = squares[K - 1 - back] == nearest
            near_x = tl.where(closest, xs[K - 1 - back], near_x)
            near_y = tl.where(closest, ys[K - 1 - back], near_y)
        tl.store(d_weights + number, mean, mask=stored)
        tl.store(cells + number, head.to(tl.int64) * buckets + cell, mask=stored)
        near_soft = 1.0 / (1.0 + unit_eps)  # d log(w) / d log(ratio ** h) of the nearest one
        scale = _log_gradient(nearest)
        near_log = logarithm * 0.6931471805599453
        d_x, d_y = tl.zeros_like(normal), tl.zeros_like(normal)
        for j in tl.static_range(K):
            soft = 1.0 - unit_eps * near[j]
            down = weight * (products[j] - mean) * (near[j] * normal)
            # d log(w) = -soft d(h log(square)), up to what is the same for all j: the sum of `down`
            # is 0. Relative to the nearest one no digits are lost close to a token.
            own_scale = soft * _log_gradient(squares[j])
            d_x += h * down * (near_soft * scale * near_x - own_scale * xs[j])
            d_y += h * down * (near_soft * scale * near_y - own_scale * ys[j])
            slope_log = tl.where(near[j] > 0, soft * ratios[j], 0.0) * 0.34657359027997264
            learned += tl.where(
                stored, down * (0.5 * (near_soft - soft) * near_log - slope_log), 0.0
            )
        tl.store(d_offsets + number * 2, d_x, mask=stored)
        tl.store(d_offsets + number * 2 + 1, d_y, mask=stored)
    tl.store(d_power + tl.program_id(0), tl.sum(learned, 0))


@triton.jit(do_not_specialize=_TOKEN_INTEGERS)
def deformable_bwd_token_kernel(
    grad, factors, lists, entries, begins, numbers, d_value, heads, places, units, buckets,
    K: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A token and a head: the places in the cells that list the token, ROWS at a time."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    token = (tl.program_id(0) // heads).to(tl.int64)
    channels = units * UNIT
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (channel < channels)[None, :]
    lane = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    end = tl.load(lists + token + 1)
    for listed in range(tl.load(lists + token), end, ROWS):
        entry = tl.load(entries + tl.minimum(listed + lane, end - 1))
        bucket = begins + head * buckets + entry // K
        begin = tl.load(bucket)
        count = tl.where(listed + lane < end, tl.load(bucket + 1) - begin, 0)
        after = tl.cumsum(count, 0)
        shift = begin - (after - count)  # from a number among these places to that among all
        # The sum stays below 2**31 where places do: where they do not, it is an int64.
        for start in range(0, tl.sum(count, 0), ROWS):
            wanted = start + lane
            cell = tl.zeros_like(lane)  # the first one that ends after it
            for step in tl.static_range(5):
                probe = cell + (ROWS >> (step + 1))
                cell = tl.where(tl.gather(after, probe - 1, 0) <= wanted, probe, cell)
            exists = wanted < tl.sum(count, 0)
            at = tl.where(exists, wanted + tl.gather(shift, cell, 0), tl.min(begin, 0))
            number = tl.load(numbers + at, mask=exists, other=0)
            near = tl.gather((entry % K).to(tl.int32), cell, 0)
            factor = tl.load(factors + number * K + near, mask=exists, other=0.0)
            row = number // (heads * places) * heads + head
            source = grad + row[:, None] * channels + channel[None, :]
            slope = tl.load(source, mask=exists[:, None] & inside, other=0.0).to(tl.float32)
            total += factor[:, None] * slope
    target = d_value + (token * heads + head) * channels + channel
    tl.store(target, tl.sum(total, 0), mask=channel < channels)


def _place_rounds(a):
    start = triton.cdiv(a["places"], a["POINTS"])
    return {"start": start, "block": start * triton.cdiv(a["units"] * a["UNIT"], a["WIDTH"])}


def _token_rounds(a):
    """As if every token's places were as many as the mean."""
    lengths = a["lists"].diff()
    listed = (-(-lengths // a["ROWS"])).double().mean().item()
    mean = a["factors"].numel() / max(len(lengths) * a["heads"], 1)
    return {"listed": listed, "listed.start": max(listed, mean / a["ROWS"])}


def _constants(near, width, unit):
    sizes = {"K": near, "WIDTH": width, "UNIT": unit}
    return sizes | {"QUERIES": _QUERIES, "POINTS": _POINTS}


def _warps(near, width, unit, most):
    """Long lists fill the registers of one, those beyond `most` where channels are masked."""
    return 4 if near > 8 or (near > most and unit < width) else 1


@cache
def _forward_variant(dtypes, near, width, unit):
    value, offsets, weights, power = dtypes
    f32, i32 = torch.float32, torch.int32
    return Variant(
        deformable_fwd_kernel,
        (value, f32, offsets, weights, f32, i32, i32, power, value)
        + ("i32",) * len(_INTEGERS)
        + ("fp32",),
        _constants(near, width, unit),
        writes=("output",),
        tiles={"QUERIES": (4, 16), "POINTS": (2, 8)},
        num_warps=_warps(near, width, unit, 4),
        num_stages=1,
        max_registers=255,
        rounds=_place_rounds,
    )


@cache
def _place_variant(dtypes, index, near, width, unit):
    value, offsets, weights, power = dtypes
    f32, i32 = torch.float32, torch.int32
    return Variant(
        deformable_bwd_place_kernel,
        (value, value, f32, offsets, weights, f32, i32, i32, power)
        + (offsets, weights, f32, f32, index)
        + ("i32",) * len(_BACKWARD_INTEGERS)
        + ("fp32",),
        _constants(near, width, unit),
        writes=("d_offsets", "d_weights", "d_power", "factors", "cells"),
        tiles={"POINTS": (2, 8)},
        num_warps=_warps(near, width, unit, 1),
        num_stages=1,
        max_registers=255,
        rounds=_place_rounds,
    )


@cache
def _token_variant(dtype, listed, index, near, width, unit):
    return Variant(
        deformable_bwd_token_kernel,
        (dtype, torch.float32, listed, torch.int64, index, torch.int64, dtype)
        + ("i32",) * len(_TOKEN_INTEGERS),
        {"K": near, "WIDTH": width, "UNIT": unit, "ROWS": _ROWS},
        writes=("d_value",),
        num_warps=1,
        num_stages=1,
        max_registers=255,
        rounds=_token_rounds,
    )


def _channels(channels, near):
    """(width, unit): channels that a program takes at a time, and a number that divides them all.

    If that is the width, no channel has to be masked. What is known of long lists fills registers.
    """
    if channels % 8 or near > 4 or channels <= 16:
        width = 16
    else:
        width = 32
    return width, next(unit for unit in (width, 8, 1) if channels % unit == 0)


def _prepare(value, positions, offsets, weights, query_positions, canvas, lookup, power):
    """Contiguous tensors, the lookup's lists of a length that kernels know; sizes as kernels take
    them; and what chooses a variant: dtypes and sizes."""
    tokens, heads, channels = value.shape
    queries, _, levels, points, _ = offsets.shape
    near = next(n for n in _TOKENS if n >= lookup.shape[2])
    if near > lookup.shape[2]:
        lookup = torch.nn.functional.pad(lookup, (0, near - lookup.shape[2]), value=-1)
    tensors = (value, positions, offsets, weights, query_positions, canvas, lookup, power)
    tensors = [x.contiguous() for x in tensors]
    if value.dtype == torch.bfloat16 and tensors[0].data_ptr() % 4:  # pairs are read as one word
        tensors[0] = tensors[0].clone()
    width, unit = _channels(channels, near)
    sizes = (queries, tokens, heads, levels, levels * points, channels // unit, *division(points))
    dtypes = (value.dtype, offsets.dtype, weights.dtype, power.dtype)
    return tensors, sizes, dtypes, (near, width, unit)


def forward(value, positions, offsets, weights, query_positions, canvas, lookup, power, eps):
    """(Q, H, d) in the dtype of `value`, see `deformable_attention`."""
    given = (value, positions, offsets, weights, query_positions, canvas, lookup, power)
    queries, (tokens, heads, channels) = offsets.shape[0], value.shape
    output = torch.empty((queries, heads, channels), dtype=value.dtype, device=value.device)
    if tokens * weights.numel() * lookup.numel() == 0:
        return output.zero_()
    tensors, sizes, dtypes, constants = _prepare(*given)
    _forward_variant(dtypes, *constants).launch(
        lambda c: (triton.cdiv(queries, c["QUERIES"]) * heads, triton.cdiv(channels, c["WIDTH"])),
        *(*tensors, output, *sizes, eps),
    )
    return output


def backward(grad, value, positions, offsets, weights, query_positions, canvas, lookup, power, eps):
    """Gradients of value, offsets, weights and power."""
    given = (value, positions, offsets, weights, query_positions, canvas, lookup, power)
    queries, (tokens, heads, channels) = offsets.shape[0], value.shape
    if value.numel() * weights.numel() * lookup.numel() == 0:
        return [x.new_zeros(x.shape) for x in (value, offsets, weights, power)]

    def empty(shape, dtype):
        return torch.empty(shape, dtype=dtype, device=value.device)

    tensors, sizes, dtypes, constants = _prepare(*given)
    lookup, grad = tensors[6], grad.contiguous()
    buckets, near = lookup.shape[0] * lookup.shape[1], constants[0]
    index = _index_dtype(heads * buckets)
    programs = triton.cdiv(queries, _QUERIES) * heads
    d_offsets, d_weights = empty(offsets.shape, dtypes[1]), empty(weights.shape, dtypes[2])
    d_power = empty(programs, torch.float32)
    factors = empty((weights.numel(), near), torch.float32)
    cells = empty(weights.numel(), index)
    _place_variant(dtypes, index, *constants).launch(
        (programs,), grad, *tensors, d_offsets, d_weights, d_power, factors, cells, *sizes,
        buckets, eps,
    )  # fmt: skip
    begins, numbers = sorted_lists(cells, heads * buckets)
    lists, entries = inverse_lists(lookup, tokens)
    d_value = empty(value.shape, value.dtype)
    _token_variant(value.dtype, lists.dtype, begins.dtype, *constants).launch(
        (tokens * heads, triton.cdiv(channels, constants[1])),
        *(grad, factors, lists, entries, begins, numbers, d_value),
        *(heads, sizes[4], sizes[5], buckets),
    )
    d_power = d_power.sum().to(power.dtype).expand(power.shape).clone()
    return d_value, d_offsets, d_weights, d_power


def _index_dtype(count):
    return torch.int32 if count < 2**31 else torch.int64


def variants():
    """Every specialization that the functions above can launch."""
    integers = (torch.int32, torch.int64)
    for dtype in _DTYPES:
        own = dict.fromkeys((dtype, torch.float32))
        every = itertools.product((1, 8, 16, 24, 32), _TOKENS)
        sizes = dict.fromkeys((near, *_channels(channels, near)) for channels, near in every)
        for constants in sizes:
            for offsets, weights, power in itertools.product(own, own, own):
                dtypes = (dtype, offsets, weights, power)
                yield _forward_variant(dtypes, *constants)
                for index in integers:
                    yield _place_variant(dtypes, index, *constants)
            for listed, index in itertools.product(integers, integers):
                yield _token_variant(dtype, listed, index, *constants)
