"""Triton deformable attention over points: places to rows and factors, then a weighted sum of rows.

What a place takes from the tokens near it is the same for all channels: one kernel, a thread for
each place, writes their rows and factors, 8 bytes per head, place and token. The sums over them are
those of `weighted_gather`, whose rows are the heads of the tokens.
"""

import torch
import triton
import triton.language as tl

from pointformer.kernels.triton import gather
from pointformer.kernels.triton.interpolate import TINY, inverse_distance, power
from pointformer.kernels.triton.runtime import Variant

_PLACES = 128  # per program
_FINEST = tl.constexpr(1e-20)  # of the nearest distance ** power, in units of eps
_INTEGERS = ("places", "tokens", "heads", "levels", "points", "k")


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
def _neighbor(positions, lookup, at, x, y, tokens, here):
    """Row of a listed token, -1 for none, place - token, and its square, at least TINY."""
    row = tl.load(lookup + at, mask=here, other=-1)
    there = (row >= 0) & (row < tokens)
    row = tl.where(there, row, -1)
    token = tl.where(there, row, 0).to(tl.int64)
    dx = x - tl.load(positions + 2 * token, mask=there, other=0.0)
    dy = y - tl.load(positions + 2 * token + 1, mask=there, other=0.0)
    return row, dx, dy, tl.maximum(dx * dx + dy * dy, TINY)


@triton.jit
def _nearest(positions, lookup, start, x, y, half_power, eps, k, tokens, here):
    """Square of a place's nearest distance, 1 without tokens, its logarithm, the gradient of that,
    and `eps` relative to the nearest distance ** power."""
    nearest = tl.full(x.shape, float("inf"), tl.float32)
    near_x = tl.zeros(x.shape, tl.float32)
    near_y = tl.zeros(x.shape, tl.float32)
    for j in range(k):
        row, dx, dy, squared = _neighbor(positions, lookup, start + j, x, y, tokens, here)
        closer = (row >= 0) & (squared < nearest)
        nearest = tl.where(closer, squared, nearest)
        near_x = tl.where(closer, dx, near_x)
        near_y = tl.where(closer, dy, near_y)
    nearest = tl.where(nearest < float("inf"), nearest, 1.0)
    unit, logarithm = power(nearest, half_power + tl.zeros_like(nearest))
    scale = _log_gradient(nearest)
    log = logarithm * 0.6931471805599453
    return nearest, log, scale * near_x, scale * near_y, eps / tl.maximum(unit, eps * _FINEST)


@triton.jit
def _log_gradient(squared):
    """2 / squared, 0 where it is as small as a square can be."""
    return tl.where(squared > TINY, 2.0 / squared, 0.0)


@triton.jit(do_not_specialize=_INTEGERS)
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
    nearest, _log, _x, _y, eps = _nearest(
        positions, lookup, start, x, y, half_power, eps, k, tokens, here
    )
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        row, _x, _y, squared = _neighbor(positions, lookup, start + j, x, y, tokens, here)
        total += inverse_distance(squared, nearest, row >= 0, half_power, eps)[0]
    scale = tl.load(weights + place, mask=here, other=0.0) / tl.where(total > 0, total, 1.0)
    for j in range(k):
        row, _x, _y, squared = _neighbor(positions, lookup, start + j, x, y, tokens, here)
        weight = inverse_distance(squared, nearest, row >= 0, half_power, eps)[0]
        row = tl.where(row >= 0, row * heads + head, -1)
        tl.store(rows + place * k + j, row, mask=here)
        tl.store(factors + place * k + j, weight * scale, mask=here)


@triton.jit(do_not_specialize=_INTEGERS)
def deformable_bwd_kernel(
    d_factors, positions, offsets, weights, query_positions, canvas, lookup, power,
    d_offsets, d_weights, d_power,
    places, tokens, heads, levels, points, k, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradients of the factors to those of offsets, weights and (partial) power.

    A factor is weight * w / sum(w), where w depends on the ratio of the nearest square to the own
    one; the factors' gradients, averaged under the shares w / sum(w), are the weight's gradient.
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = number.to(tl.int64)
    here = number < places
    x, y, _, start = _locate(
        offsets, query_positions, canvas, number, heads, levels, points, k, here
    )
    half_power = tl.load(power) * 0.5
    factor = tl.load(weights + place, mask=here, other=0.0)
    nearest, near_log, near_x, near_y, eps = _nearest(
        positions, lookup, start, x, y, half_power, eps, k, tokens, here
    )
    near_soft = 1.0 / (1.0 + eps)
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        row, _x, _y, squared = _neighbor(positions, lookup, start + j, x, y, tokens, here)
        weight = inverse_distance(squared, nearest, row >= 0, half_power, eps)[0]
        total += weight
        mean += weight * tl.load(d_factors + place * k + j, mask=here, other=0.0)
    scale = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    mean *= scale
    tl.store(d_weights + place, mean, mask=here)
    d_x = tl.zeros((BLOCK,), tl.float32)
    d_y = tl.zeros((BLOCK,), tl.float32)
    learned = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        row, dx, dy, squared = _neighbor(positions, lookup, start + j, x, y, tokens, here)
        weight, slope = inverse_distance(squared, nearest, row >= 0, half_power, eps)
        soft = 1.0 - eps * weight  # d log(w) / d log(ratio ** half_power)
        product = tl.load(d_factors + place * k + j, mask=here, other=0.0)
        down = factor * (product - mean) * (weight * scale)
        # d log(w) = -soft d(half_power log(square)), up to what is the same for all j: the sum of
        # `down` is 0. Relative to the nearest one no digits are lost close to a token.
        own = soft * _log_gradient(squared)
        d_x += half_power * down * (near_soft * near_x - own * dx)
        d_y += half_power * down * (near_soft * near_y - own * dy)
        learned += down * (0.5 * (near_soft - soft) * near_log - slope)
    tl.store(d_offsets + 2 * place, d_x, mask=here)
    tl.store(d_offsets + 2 * place + 1, d_y, mask=here)
    learned = tl.where(here, learned, 0.0)
    tl.store(d_power + tl.program_id(0), tl.sum(learned, 0))


_INPUTS = (torch.float32,) * 4 + (torch.int32,) * 2 + (torch.float32,)
_SIZES = (*("i32",) * 6, "fp32")
_PLACES_VARIANT = Variant(
    deformable_places_kernel,
    (*_INPUTS, torch.int32, torch.float32, *_SIZES),
    {"BLOCK": _PLACES},
    rounds=lambda a: {"j": a["k"]},
)
_BACKWARD_VARIANT = Variant(
    deformable_bwd_kernel,
    (torch.float32, *_INPUTS, torch.float32, torch.float32, torch.float32, *_SIZES),
    {"BLOCK": _PLACES},
    rounds=lambda a: {"j": a["k"]},
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
