"""CPU deformable attention: places, their neighbors and weights are made and used on the spot.

Forward runs in parallel over queries. Backward runs in parallel over heads, each of which alone
writes its channels of the value's gradient, query after query: no bit depends on the number of
threads, and nothing is sorted.
"""

import numpy as np
import torch
from numba import prange

from pointformer.kernels.cpu.interpolate import TINY, relative_to_nearest
from pointformer.kernels.cpu.runtime import inlined, kernel
from pointformer.kernels.cpu.simd import LANES, f32, fma, load, maximum, splat, store
from pointformer.kernels.cpu.special import log2, power

_CHUNK = 32  # queries per unit of parallel work
_LOG_2 = f32(0.69314718)
_FINEST = f32(1e-20)  # of the nearest distance ** power, in units of eps: less makes no difference


@inlined
def _locate(
    positions, offsets, queries, canvas, lookup, query, head, sizes, rows, there, deltas, squared
):
    """For each place of a head and each of its k tokens: row (-1: none), 1 if there is one, place -
    token, square.
    """
    _, heads, levels, points, k, _ = sizes
    first, width, height = canvas[3 * query], canvas[3 * query + 1], canvas[3 * query + 2]
    for level in range(levels):
        for point in range(points):
            place = (query * heads + head) * levels * points + level * points + point
            x = queries[2 * query] + offsets[2 * place]
            y = queries[2 * query + 1] + offsets[2 * place + 1]
            column = np.int64(min(max(np.rint(x), f32(0.0)), f32(width - 1)))
            line = np.int64(min(max(np.rint(y), f32(0.0)), f32(height - 1)))
            cell = np.int64(first) + line * width + column
            for j in range(k):
                entry = (level * points + point) * k + j
                row = lookup[(cell * levels + level) * k + j]
                rows[entry] = row
                there[entry] = f32(1.0) if row >= 0 else f32(0.0)
                dx = x - positions[2 * row] if row >= 0 else f32(0.0)
                dy = y - positions[2 * row + 1] if row >= 0 else f32(0.0)
                deltas[2 * entry] = dx
                deltas[2 * entry + 1] = dy
                squared[entry] = dx * dx + dy * dy


@inlined
def _share(squared, there, nearest, softness, shares, places, k, exponent, eps):
    """Inverse distances of each place's tokens, normalized.

    Also their softness, d log(weight) / d log(closeness), and the places' nearest squares;
    `squared` becomes the ratio of that to each.
    """
    for place in range(places):
        nearest[place] = relative_to_nearest(squared, there, place * k, k)
    for place in range(0, places, LANES):
        unit = maximum(power(load(nearest, place), splat(exponent)), splat(eps * _FINEST))
        store(softness, place, splat(eps) / unit)
    for back in range(places):  # from places to their tokens, the last first
        place = places - 1 - back
        relative_eps = softness[place]
        for e in range(place * k, place * k + k):
            softness[e] = relative_eps
    one = splat(f32(1.0))
    for e in range(0, places * k, LANES):
        closeness = power(load(squared, e), splat(exponent))
        soft = one / fma(closeness, load(softness, e), one)
        store(softness, e, soft)
        store(shares, e, load(there, e) * closeness * soft)
    for place in range(places):
        total = f32(0.0)
        for e in range(place * k, place * k + k):
            total += shares[e]
        scale = f32(1.0) / total if total > f32(0.0) else f32(0.0)
        for e in range(place * k, place * k + k):
            shares[e] *= scale


@inlined
def _log_gradient(dx, dy):
    """Of the logarithm of dx * dx + dy * dy."""
    square = dx * dx + dy * dy
    scale = f32(2.0) / square if square > TINY else f32(0.0)
    return scale * dx, scale * dy


@kernel
def _forward(
    value, positions, offsets, weights, queries, canvas, lookup, exponent, eps, sizes, out
):
    number, heads, levels, points, k, channels = sizes
    places = levels * points
    for chunk in prange((number + _CHUNK - 1) // _CHUNK):
        rows = np.zeros(places * k + LANES, np.int64)
        there = np.zeros(places * k + LANES, np.float32)
        deltas = np.zeros(2 * places * k, np.float32)
        squared = np.zeros(places * k + LANES, np.float32)
        nearest = np.zeros(places + LANES, np.float32)
        softness = np.zeros(places * max(k, 1) + LANES, np.float32)
        shares = np.zeros(places * k + LANES, np.float32)
        begin = np.int64(chunk) * _CHUNK
        for query in range(begin, min(begin + _CHUNK, number)):
            for head in range(heads):
                _locate(
                    positions, offsets, queries, canvas, lookup, query, head, sizes,
                    rows, there, deltas, squared,
                )  # fmt: skip
                _share(squared, there, nearest, softness, shares, places, k, exponent, eps)
                total = np.zeros(channels, np.float32)
                for entry in range(places * k):
                    if rows[entry] < 0:
                        continue
                    factor = shares[entry]
                    factor *= weights[(query * heads + head) * places + entry // k]
                    at = (rows[entry] * heads + head) * channels
                    for c in range(channels):
                        total[c] += factor * value[at + c]
                at = (query * heads + head) * channels
                out[at : at + channels] = total


@kernel
def _backward(
    grad, value, positions, offsets, weights, queries, canvas, lookup, exponent, eps, sizes,
    d_value, d_offsets, d_weights, d_exponent,
):  # fmt: skip
    number, heads, levels, points, k, channels = sizes
    places = levels * points
    for head in prange(heads):
        rows = np.zeros(places * k + LANES, np.int64)
        there = np.zeros(places * k + LANES, np.float32)
        deltas = np.zeros(2 * places * k, np.float32)
        squared = np.zeros(places * k + LANES, np.float32)
        nearest = np.zeros(places + LANES, np.float32)
        softness = np.zeros(places * max(k, 1) + LANES, np.float32)
        shares = np.zeros(places * k + LANES, np.float32)
        logs = np.zeros(places * k + LANES, np.float32)  # of the ratios
        near_logs = np.zeros(places + LANES, np.float32)
        products = np.zeros(places * k, np.float32)
        learned = 0.0
        for query in range(number):
            _locate(
                positions, offsets, queries, canvas, lookup, query, head, sizes,
                rows, there, deltas, squared,
            )  # fmt: skip
            _share(squared, there, nearest, softness, shares, places, k, exponent, eps)
            for e in range(0, places * k, LANES):
                store(logs, e, log2(load(squared, e)) * splat(_LOG_2))
            for e in range(0, places, LANES):
                store(near_logs, e, log2(load(nearest, e)) * splat(_LOG_2))
            target = (query * heads + head) * channels
            for place in range(places):
                at = (query * heads + head) * places + place
                mean = f32(0.0)
                for e in range(place * k, place * k + k):
                    if rows[e] < 0:
                        continue
                    source = (rows[e] * heads + head) * channels
                    product = f32(0.0)
                    factor = shares[e] * weights[at]
                    for c in range(channels):
                        product += grad[target + c] * value[source + c]
                        d_value[source + c] += factor * grad[target + c]
                    products[e] = product
                    mean += shares[e] * product
                d_weights[at] = mean
                # d log(weight) = -softness d(exponent log(square)), up to what is the same for all
                # tokens of the place, whose slopes have the sum 0. Relative to the nearest one no
                # digits are lost close to a token.
                near_x, near_y, near_soft, near = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                for e in range(place * k, place * k + k):
                    if rows[e] >= 0 and squared[e] > near:
                        near, near_soft = squared[e], softness[e]
                        near_x, near_y = _log_gradient(deltas[2 * e], deltas[2 * e + 1])
                dx = f32(0.0)
                dy = f32(0.0)
                for e in range(place * k, place * k + k):
                    if rows[e] < 0:
                        continue
                    slope = weights[at] * (products[e] - mean) * shares[e]
                    soft = softness[e]
                    x, y = _log_gradient(deltas[2 * e], deltas[2 * e + 1])
                    dx += slope * exponent * (near_soft * near_x - soft * x)
                    dy += slope * exponent * (near_soft * near_y - soft * y)
                    learned += slope * (soft * logs[e] + (near_soft - soft) * near_logs[place])
                d_offsets[2 * at] = dx
                d_offsets[2 * at + 1] = dy
        d_exponent[head] = learned


def _flat(tensor):
    return tensor.detach().contiguous().view(-1).numpy()


def _arrays(value, positions, offsets, weights, *tensors):
    tensors = (positions, offsets.float(), weights.float(), *tensors)
    *tensors, lookup, exponent = tensors
    if lookup.numel() and int(lookup.max()) >= value.shape[0]:
        raise IndexError(f"lookup: row {int(lookup.max())} of {value.shape[0]} tokens")
    arrays = (_flat(x) for x in (value.float(), *tensors, lookup))
    return *arrays, f32(exponent.item()) / f32(2)


def _sizes(value, offsets, lookup):
    queries, heads, levels, points, _ = offsets.shape
    return queries, heads, levels, points, lookup.shape[2], value.shape[2]


def forward(value, positions, offsets, weights, query_positions, canvas, lookup, power, eps):
    """(Q, H, d) in the dtype of `value`, see `deformable_attention`."""
    tensors = (value, positions, offsets, weights, query_positions, canvas, lookup, power)
    out = torch.empty(offsets.shape[0], *value.shape[1:], dtype=torch.float32)
    sizes = _sizes(value, offsets, lookup)
    _forward(*_arrays(*tensors), f32(eps), sizes, out.view(-1).numpy())
    return out.to(value.dtype)


def backward(grad, value, positions, offsets, weights, query_positions, canvas, lookup, power, eps):
    """Gradients of value, offsets, weights and power."""
    tensors = (value, positions, offsets, weights, query_positions, canvas, lookup, power)
    d_value = torch.zeros(value.shape, dtype=torch.float32)
    d_offsets, d_weights = (
        torch.empty(offsets.shape, dtype=torch.float32),
        torch.empty(weights.shape, dtype=torch.float32),
    )
    d_exponent = np.zeros(value.shape[1])
    _backward(
        _flat(grad.float()), *_arrays(*tensors), f32(eps), _sizes(value, offsets, lookup),
        *(_flat(x) for x in (d_value, d_offsets, d_weights)), d_exponent,
    )  # fmt: skip
    d_power = power.new_full(power.shape, d_exponent.sum() / 2)
    learned = d_offsets.to(offsets.dtype), d_weights.to(weights.dtype), d_power
    return d_value.to(value.dtype), *learned
