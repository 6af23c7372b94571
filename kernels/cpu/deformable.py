"""CPU deformable attention: places, their neighbors and weights are made and used on the spot.

Forward runs in parallel over queries. Backward runs in parallel over heads, each of which alone
writes its channels of the value's gradient, query after query: no bit depends on the number of
threads, and nothing is sorted.
"""

import numpy as np
import torch
from numba import njit, prange

from pointformer.kernels.cpu.runtime import kernel
from pointformer.kernels.cpu.simd import LANES, f32, load, splat, store, where_positive, zero
from pointformer.kernels.cpu.special import log2, power

_CHUNK = 32  # queries per unit of parallel work
_LOG_2 = f32(0.69314718)


@njit(forceinline=True)
def _locate(positions, offsets, queries, canvas, lookup, query, head, sizes, rows, deltas, squared):
    """For each place of a head and each of its k tokens: row (-1: none), place - token, square."""
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
                dx = x - positions[2 * row] if row >= 0 else f32(0.0)
                dy = y - positions[2 * row + 1] if row >= 0 else f32(0.0)
                deltas[2 * entry] = dx
                deltas[2 * entry + 1] = dy
                squared[entry] = dx * dx + dy * dy


@njit(forceinline=True)
def _share(rows, squared, shares, totals, places, k, exponent, eps):
    """Inverse distances of each place's tokens, normalized; `totals` are the sums before."""
    for e in range(0, places * k, LANES):
        distance = power(load(squared, e), splat(exponent))
        store(shares, e, splat(f32(1.0)) / (distance + splat(eps)))
    for place in range(places):
        total = f32(0.0)
        for e in range(place * k, place * k + k):
            if rows[e] < 0:
                shares[e] = f32(0.0)
            total += shares[e]
        scale = f32(1.0) / total if total > f32(0.0) else f32(0.0)
        totals[place] = total
        for e in range(place * k, place * k + k):
            shares[e] *= scale


@kernel
def _forward(
    value, positions, offsets, weights, queries, canvas, lookup, exponent, eps, sizes, out
):
    number, heads, levels, points, k, channels = sizes
    places = levels * points
    for chunk in prange((number + _CHUNK - 1) // _CHUNK):
        rows = np.zeros(places * k + LANES, np.int64)
        deltas = np.zeros(2 * places * k, np.float32)
        squared = np.zeros(places * k + LANES, np.float32)
        shares = np.zeros(places * k + LANES, np.float32)
        totals = np.zeros(places, np.float32)
        begin = np.int64(chunk) * _CHUNK
        for query in range(begin, min(begin + _CHUNK, number)):
            for head in range(heads):
                _locate(
                    positions, offsets, queries, canvas, lookup, query, head, sizes,
                    rows, deltas, squared,
                )  # fmt: skip
                _share(rows, squared, shares, totals, places, k, exponent, eps)
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
        deltas = np.zeros(2 * places * k, np.float32)
        squared = np.zeros(places * k + LANES, np.float32)
        shares = np.zeros(places * k + LANES, np.float32)
        slopes = np.zeros(places * k + LANES, np.float32)  # d distance / d square
        logs = np.zeros(places * k + LANES, np.float32)  # d distance / d exponent
        totals = np.zeros(places, np.float32)
        products = np.zeros(places * k, np.float32)
        learned = 0.0
        for query in range(number):
            _locate(
                positions, offsets, queries, canvas, lookup, query, head, sizes,
                rows, deltas, squared,
            )  # fmt: skip
            _share(rows, squared, shares, totals, places, k, exponent, eps)
            for e in range(0, places * k, LANES):
                square = load(squared, e)
                distance = power(square, splat(exponent))
                slope = splat(exponent) * distance / square
                store(slopes, e, where_positive(square, slope, zero()))
                log = log2(square) * splat(_LOG_2) * distance
                store(logs, e, where_positive(square, log, zero()))
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
                dx = f32(0.0)
                dy = f32(0.0)
                for e in range(place * k, place * k + k):
                    if rows[e] < 0:
                        continue
                    # share = w / total and w = 1 / (distance + eps): dw = -w * w ddistance
                    slope = -weights[at] * (products[e] - mean) * shares[e]
                    slope *= shares[e] * totals[place]
                    dx += slope * slopes[e] * f32(2.0) * deltas[2 * e]
                    dy += slope * slopes[e] * f32(2.0) * deltas[2 * e + 1]
                    learned += slope * logs[e]
                d_offsets[2 * at] = dx
                d_offsets[2 * at + 1] = dy
        d_exponent[head] = learned


def _flat(tensor):
    return tensor.detach().contiguous().view(-1).numpy()


def _arrays(value, *tensors):
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
    d_value = d_value.to(value.dtype)
    return d_value, d_offsets, d_weights, power.new_full(power.shape, d_exponent.sum() / 2)
