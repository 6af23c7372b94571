"""CPU inverse-distance interpolation: gathers forward, inverse lists backward.

The backward pass keeps one weight per query and neighbor, as large as the list of neighbors. A
token sums the queries that use it in ascending order and the power's gradient is a partial sum per
chunk of queries, so no bit depends on the number of threads.
"""

import numpy as np
import torch
from numba import prange

from pointformer.kernels.cpu.gather import dot, flat, sum_rows, token_gradients
from pointformer.kernels.cpu.inverse import inverse_lists
from pointformer.kernels.cpu.runtime import inlined, kernel
from pointformer.kernels.cpu.simd import (
    LANES,
    advance,
    allocate,
    as_int64,
    f32,
    fma,
    free,
    load,
    pointer,
    splat,
    store,
)
from pointformer.kernels.cpu.special import log2, power

_CHUNK = 128  # queries or tokens per unit of parallel work
_HALF_LOG_2 = f32(0.34657359)
TINY = f32(2.0**-126)  # squares below count as this: powers take normal numbers


@inlined
def _ratios_of_squares(positions, queries, dimensions, index, k, begin, end, squared, weights):
    """For the neighbors of queries begin to end, relative to the nearest one's of each query: that
    over each. Weights are 1, or 0 where there is no neighbor."""
    for entry in range(begin * k, end * k):
        row = np.int64(index[entry])
        total = f32(0.0)
        if row >= 0:
            query = entry // k
            for axis in range(dimensions):
                delta = positions[row * dimensions + axis] - queries[query * dimensions + axis]
                total += delta * delta
        squared[entry - begin * k] = total
        weights[entry - begin * k] = f32(1.0) if row >= 0 else f32(0.0)
    for query in range(end - begin):
        relative_to_nearest(squared, weights, query * k, k)


@inlined
def relative_to_nearest(squared, known, begin, k):
    """Replace the squares of k neighbors, where `known` is not 0, by the least one over each.

    If that is 0, by 1 where it is and by 0 elsewhere. Returns the least one, 1 where there is none.
    Where one is NaN, `known` becomes NaN, for weights are multiplied with it.
    """
    nearest = f32(np.inf)
    numbers = True
    for j in range(begin, begin + k):
        own = squared[j]
        squared[j] = max(own, TINY)
        if known[j] > f32(0.0):
            nearest = min(nearest, squared[j])
            numbers &= own == own
    if not numbers:  # which powers and maxima would lose
        for j in range(begin, begin + k):
            known[j] = f32(np.nan)
    for j in range(begin, begin + k):
        ratio = max(nearest / squared[j], TINY) if known[j] > f32(0.0) else f32(1.0)
        squared[j] = f32(0.0) if nearest == TINY and ratio < f32(1.0) else ratio
    return nearest if nearest < np.inf else f32(1.0)


@inlined
def _inverse_distances(ratios, weights, count, exponent, eps):
    """Multiply the weights by 1 / (ratio ** -exponent + eps)."""
    for p in range(0, count, LANES):
        closeness = power(load(ratios, p), splat(exponent))
        store(
            weights, p, load(weights, p) * closeness / fma(closeness, splat(eps), splat(f32(1.0)))
        )


@inlined
def _log_slopes(ratios, slopes, count, exponent, eps):
    """The factor f of d weight / d power = -f * weight, before normalization."""
    for p in range(0, count, LANES):
        ratio = load(ratios, p)
        softening = fma(power(ratio, splat(exponent)), splat(eps), splat(f32(1.0)))
        store(slopes, p, log2(ratio) * splat(-_HALF_LOG_2) / softening)


@inlined
def _normalize(weights, k, count):
    for n in range(count):
        total = f32(0.0)
        for j in range(n * k, n * k + k):
            total += weights[j]
        scale = f32(1.0) / total if total > f32(0.0) else f32(0.0)
        for j in range(n * k, n * k + k):
            weights[j] *= scale


@kernel
def _forward(features, positions, queries, index, exponent, eps, sizes, out):
    number, k, channels, dimensions = sizes
    for chunk in prange((number + _CHUNK - 1) // _CHUNK):
        squared = allocate(2 * (_CHUNK * k + LANES) + 4 + 2 * 4)
        weights = advance(squared, _CHUNK * k + LANES)
        factors = advance(weights, _CHUNK * k + LANES)
        rows = as_int64(advance(factors, 4))
        begin = np.int64(chunk) * _CHUNK
        end = min(begin + _CHUNK, number)
        _ratios_of_squares(
            pointer(positions), pointer(queries), dimensions, pointer(index), k, begin, end,
            squared, weights,
        )  # fmt: skip
        _inverse_distances(squared, weights, (end - begin) * k, exponent, eps)
        _normalize(weights, k, end - begin)
        for q in range(begin, end):
            first = (q - begin) * k
            sum_rows(
                pointer(features), pointer(index), weights, q * k, first, k, channels,
                rows, factors, pointer(out), q,
            )  # fmt: skip
        free(squared)


@kernel
def _query_gradients(
    grad, features, positions, queries, index, exponent, eps, sizes, all_weights, learn, partial
):
    """The normalized weights, and the gradient of the power per chunk if it is to be learned."""
    number, k, channels, dimensions = sizes
    for chunk in prange((number + _CHUNK - 1) // _CHUNK):
        squared = allocate(3 * (_CHUNK * k + LANES) + k)
        weights = advance(squared, _CHUNK * k + LANES)
        slopes = advance(weights, _CHUNK * k + LANES)
        dots = advance(slopes, _CHUNK * k + LANES)
        begin = np.int64(chunk) * _CHUNK
        end = min(begin + _CHUNK, number)
        count = (end - begin) * k
        _ratios_of_squares(
            pointer(positions), pointer(queries), dimensions, pointer(index), k, begin, end,
            squared, weights,
        )  # fmt: skip
        _inverse_distances(squared, weights, count, exponent, eps)
        _normalize(weights, k, end - begin)
        for n in range(count):
            all_weights[begin * k + n] = weights[n]
        if not learn:
            free(squared)
            continue
        _log_slopes(squared, slopes, count, exponent, eps)
        total = 0.0
        for q in range(begin, end):
            mean = f32(0.0)
            for j in range(k):
                row = np.int64(index[q * k + j])
                if row >= 0:
                    dots[j] = dot(
                        pointer(grad), q * channels, pointer(features), row * channels, channels
                    )
                    mean += weights[(q - begin) * k + j] * dots[j]
            for j in range(k):
                p = (q - begin) * k + j
                if index[q * k + j] >= 0:
                    total -= weights[p] * slopes[p] * (dots[j] - mean)
        partial[chunk] = total
        free(squared)


def _arrays(features, positions, query_positions, neighbor_index, power):
    tokens = positions.shape[0]
    if neighbor_index.numel() and int(neighbor_index.max()) >= tokens:
        raise IndexError(f"neighbor_index: row {int(neighbor_index.max())} of {tokens} tokens")
    tensors = (features, positions, query_positions, neighbor_index)
    return *(flat(x) for x in tensors), f32(power.item()) / f32(2)


def forward(features, positions, query_positions, neighbor_index, power, eps):
    """(Q, C), see `interpolate`; all tensors float32, the list int32."""
    arrays = _arrays(features, positions, query_positions, neighbor_index, power)
    out = features.new_empty(query_positions.shape[0], features.shape[1])
    sizes = (*neighbor_index.shape, features.shape[1], positions.shape[1])
    _forward(*arrays, f32(eps), sizes, out.view(-1).numpy())
    return out


def backward(grad, features, positions, query_positions, neighbor_index, power, eps, learn_power):
    """Gradients of features and power, the latter zero unless `learn_power`."""
    arrays = _arrays(features, positions, query_positions, neighbor_index, power)
    (queries, k), channels = neighbor_index.shape, features.shape[1]
    grad = flat(grad)
    weights = np.empty(queries * k, np.float32)
    partial = np.zeros(-(-queries // _CHUNK))
    sizes = (queries, k, channels, positions.shape[1])
    _query_gradients(grad, *arrays, f32(eps), sizes, weights, learn_power, partial)
    d_features = torch.empty(features.shape, dtype=torch.float32)
    lists, entries = inverse_lists(flat(neighbor_index), features.shape[0])
    sizes = (features.shape[0], k, channels)
    token_gradients(grad, weights, lists, entries, sizes, d_features.view(-1).numpy())
    return d_features, power.new_full(power.shape, partial.sum())
