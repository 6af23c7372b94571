"""Triton deformable attention over points: places to rows and factors, then a weighted sum of rows.

What a place takes from the tokens near it is the same for all channels: one kernel, a thread for
each place, writes their rows and factors, 8 bytes per head, place and token. The sums over them are
those of `weighted_gather`, whose rows are the heads of the tokens.
"""

import torch
import triton
import triton.language as tl

from pointformer.kernels.triton import gather
from pointformer.kernels.triton.runtime import Variant

_PLACES = 128  # per program


@triton.jit
def _round_to_cell(x, side):
    """The nearest integer, half to even, within 0 to side - 1."""
    below = tl.floor(x)
    rest = x - below
    odd = below - 2 * tl.floor(below * 0.5)
    up = (rest > 0.5) | ((rest == 0.5) & (odd == 1.0))
    cell = below + tl.where(up, 1.0, 0.0)
    # Within the canvas before the conversion: beyond it a number may be too large for any integer.
    return tl.minimum(tl.maximum(cell, 0.0), side.to(tl.float32) - 1.0).to(tl.int64)


@triton.jit
def _locate(offsets, query_positions, canvas, number, heads, levels, points, k, here):
    """A place's coordinates, its head, and where its list begins in the lookup table."""
    query = (number // (heads * levels * points)).to(tl.int64)
    head = number // (levels * points) % heads
    level = number // points % levels
    place = number.to(tl.int64)
    x = tl.load(query_positions + 2 * query, mask=here, other=0.0)
    y = tl.load(query_positions + 2 * query + 1, mask=here, other=0.0)
    x += tl.load(offsets + 2 * place, mask=here, other=0.0)
    y += tl.load(offsets + 2 * place + 1, mask=here, other=0.0)
    first = tl.load(canvas + 3 * query, mask=here, other=0).to(tl.int64)
    width = tl.load(canvas + 3 * query + 1, mask=here, other=1)
    height = tl.load(canvas + 3 * query + 2, mask=here, other=1)
    cell = first + _round_to_cell(y, height) * width + _round_to_cell(x, width)
    return x, y, head, (cell * levels + level) * k


@triton.jit
def _neighbor(positions, lookup, at, x, y, half_power, eps, tokens, here):
    """Row of a listed token, place - token, squared distance, its logarithm and power, weight."""
    row = tl.load(lookup + at, mask=here, other=-1)
    there = (row >= 0) & (row < tokens)
    row = tl.where(there, row, -1)
    token = tl.where(there, row, 0).to(tl.int64)
    dx = x - tl.load(positions + 2 * token, mask=there, other=0.0)
    dy = y - tl.load(positions + 2 * token + 1, mask=there, other=0.0)
    squared = tl.where(there, dx * dx + dy * dy, 0.0)
    apart = squared > 0
    log = tl.log2(tl.where(apart, squared, 1.0))
    distance = tl.where(apart, tl.exp2(half_power * log), 0.0)
    weight = tl.where(there, 1.0 / (distance + eps), 0.0)
    return row, dx, dy, squared, log, distance, weight


@triton.jit
def deformable_places_kernel(
    positions, offsets, weights, query_positions, canvas, lookup, power, rows, factors,
    places, tokens, heads, levels, points, k, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = number.to(tl.int64)
    here = number < places
    x, y, head, start = _locate(
        offsets, query_positions, canvas, number, heads, levels, points, k, here
    )
    half_power = tl.load(power) * 0.5
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        _row, _dx, _dy, _squared, _log, _distance, weight = _neighbor(
            positions, lookup, start + j, x, y, half_power, eps, tokens, here
        )
        total += weight
    scale = tl.load(weights + place, mask=here, other=0.0) / tl.where(total > 0, total, 1.0)
    for j in range(k):
        row, _dx, _dy, _squared, _log, _distance, weight = _neighbor(
            positions, lookup, start + j, x, y, half_power, eps, tokens, here
        )
        row = tl.where(row >= 0, row * heads + head, -1)
        tl.store(rows + place * k + j, row, mask=here)
        tl.store(factors + place * k + j, weight * scale, mask=here)


@triton.jit
def deformable_bwd_kernel(
    d_factors, positions, offsets, weights, query_positions, canvas, lookup, power,
    d_offsets, d_weights, d_power,
    places, tokens, heads, levels, points, k, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradients of the factors to those of offsets, weights and (partial) power.

    A factor is weight * w / sum(w) with w = 1 / (distance + eps), so d w = -w * w * d distance; the
    factors' gradients, averaged under the shares w / sum(w), are the weight's gradient.
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = number.to(tl.int64)
    here = number < places
    x, y, _, start = _locate(
        offsets, query_positions, canvas, number, heads, levels, points, k, here
    )
    half_power = tl.load(power) * 0.5
    factor = tl.load(weights + place, mask=here, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        _row, _dx, _dy, _squared, _log, _distance, weight = _neighbor(
            positions, lookup, start + j, x, y, half_power, eps, tokens, here
        )
        total += weight
        mean += weight * tl.load(d_factors + place * k + j, mask=here, other=0.0)
    scale = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    mean *= scale
    tl.store(d_weights + place, mean, mask=here)
    d_x = tl.zeros((BLOCK,), tl.float32)
    d_y = tl.zeros((BLOCK,), tl.float32)
    learned = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        _row, dx, dy, squared, log, distance, weight = _neighbor(
            positions, lookup, start + j, x, y, half_power, eps, tokens, here
        )
        slope = tl.load(d_factors + place * k + j, mask=here, other=0.0)
        down = -factor * (slope - mean) * (weight * scale) * weight
        along = 2.0 * half_power * distance / tl.where(squared > 0, squared, 1.0)
        d_x += down * along * dx
        d_y += down * along * dy
        learned += down * log * distance
    tl.store(d_offsets + 2 * place, d_x, mask=here)
    tl.store(d_offsets + 2 * place + 1, d_y, mask=here)
    learned = tl.where(here, learned, 0.0)
    tl.store(d_power + tl.program_id(0), 0.5 * 0.6931471805599453 * tl.sum(learned, 0))


_INPUTS = (torch.float32,) * 4 + (torch.int32,) * 2 + (torch.float32,)
_SIZES = (*("i32",) * 6, "fp32")
_PLACES_VARIANT = Variant(
    deformable_places_kernel,
    (*_INPUTS, torch.int32, torch.float32, *_SIZES),
    {"BLOCK": _PLACES},
)
_BACKWARD_VARIANT = Variant(
    deformable_bwd_kernel,
    (torch.float32, *_INPUTS, torch.float32, torch.float32, torch.float32, *_SIZES),
    {"BLOCK": _PLACES},
)


def _places(heads, tensors, eps):
    """Rows of heads and factors of all places, (Q * H, L * P * k), and what describes them."""
    positions, offsets, _, _, _, lookup, _ = tensors
    queries, _, levels, points, _ = offsets.shape
    k = lookup.shape[2]
    places = queries * heads * levels * points
    rows = lookup.new_empty(queries * heads, levels * points * k)
    factors = offsets.new_empty(rows.shape)
    sizes = (places, len(positions), heads, levels, points, k, eps)
    _PLACES_VARIANT.launch((-(-places // _PLACES),), *tensors, rows, factors, *sizes)
    return rows, factors, sizes


def forward(value, positions, offsets, weights, query_positions, canvas, lookup, power, eps):
    """(Q, H, d) in the dtype of `value`, see `deformable_attention`."""
    heads, channels = value.shape[1:]
    tensors = [positions, offsets, weights, query_positions, canvas, lookup, power]
    rows, factors, _ = _places(heads, [x.contiguous() for x in tensors], eps)
    output = gather.forward(value.reshape(-1, channels), rows, factors)
    return output.view(offsets.shape[0], heads, channels)


def backward(grad, value, positions, offsets, weights, query_positions, canvas, lookup, power, eps):
    """Gradients of value, offsets, weights and power."""
    heads, channels = value.shape[1:]
    tensors = [positions, offsets, weights, query_positions, canvas, lookup, power]
    tensors = [x.contiguous() for x in tensors]
    rows, factors, sizes = _places(heads, tensors, eps)
    d_value, d_factors = gather.backward(
        grad.reshape(-1, channels), value.reshape(-1, channels), rows, factors
    )
    blocks = -(-sizes[0] // _PLACES)
    d_offsets, d_weights = offsets.new_empty(offsets.shape), weights.new_empty(weights.shape)
    d_power = power.new_empty(blocks)
    _BACKWARD_VARIANT.launch((blocks,), d_factors, *tensors, d_offsets, d_weights, d_power, *sizes)
    d_power = d_power.sum().expand(power.shape).clone()
    return d_value.view(value.shape), d_offsets, d_weights, d_power


def variants():
    """Every specialization that the functions above can launch, but for those of `gather`."""
    yield _PLACES_VARIANT
    yield _BACKWARD_VARIANT
