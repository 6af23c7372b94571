"""CPU sums of listed rows under given weights, and what interpolation shares with them.

A token's gradient sums the queries that use it in ascending order, found by inverse lists: no bit
depends on the number of threads.
"""

import numpy as np
import torch
from numba import prange

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
    hsum,
    load,
    pointer,
    splat,
    store,
    zero,
)

_CHUNK = 128  # queries or tokens per unit of parallel work


@inlined
def add_rows(source, channels, rows, factors, count, target, at, first):
    """Add up to four scaled rows of `source` to a row of `target`, or write it if `first`."""
    for n in range(count, 4):
        rows[n] = rows[count - 1]
        factors[n] = f32(0.0)
    r0, r1, r2, r3 = rows[0], rows[1], rows[2], rows[3]
    w0, w1, w2, w3 = splat(factors[0]), splat(factors[1]), splat(factors[2]), splat(factors[3])
    c = 0
    while c + LANES <= channels:
        total = zero() if first else load(target, at + c)
        total = fma(w1, load(source, r1 + c), fma(w0, load(source, r0 + c), total))
        total = fma(w3, load(source, r3 + c), fma(w2, load(source, r2 + c), total))
        store(target, at + c, total)
        c += LANES
    for tail in range(c, channels):
        value = f32(0.0) if first else target[at + tail]
        for n in range(count):
            value += factors[n] * source[rows[n] + tail]
        target[at + tail] = value


@inlined
def dot(a, i, b, j, channels):
    total = zero()
    c = 0
    while c + LANES <= channels:
        total = fma(load(a, i + c), load(b, j + c), total)
        c += LANES
    value = hsum(total)
    for tail in range(c, channels):
        value += a[i + tail] * b[j + tail]
    return value


@inlined
def sum_rows(features, index, weights, at, first, k, channels, rows, factors, out, query):
    """Row `query` of `out`: the k rows listed from `at` on, under the weights from `first` on."""
    filled, empty = 0, True
    target = query * channels
    for j in range(k):
        row = np.int64(index[at + j])
        if row >= 0:
            rows[filled] = row * channels
            factors[filled] = weights[first + j]
            filled += 1
        if filled == 4 or (filled > 0 and j + 1 == k):
            add_rows(features, channels, rows, factors, filled, out, target, empty)
            filled, empty = 0, False
    if empty:
        for c in range(target, target + channels):
            out[c] = f32(0.0)


@kernel
def _forward(features, index, weights, sizes, out):
    number, k, channels = sizes
    for chunk in prange((number + _CHUNK - 1) // _CHUNK):
        factors = allocate(4 + 2 * 4)
        rows = as_int64(advance(factors, 4))
        begin = np.int64(chunk) * _CHUNK
        for q in range(begin, min(begin + _CHUNK, number)):
            sum_rows(
                pointer(features), pointer(index), pointer(weights), q * k, q * k, k, channels,
                rows, factors, pointer(out), q,
            )  # fmt: skip
        free(factors)


@kernel
def _weight_gradients(grad, features, index, sizes, d_weights):
    number, k, channels = sizes
    for chunk in prange((number + _CHUNK - 1) // _CHUNK):
        begin = np.int64(chunk) * _CHUNK
        for entry in range(begin * k, min(begin + _CHUNK, number) * k):
            row = np.int64(index[entry])
            value = f32(0.0)
            if row >= 0:
                at = entry // k * channels
                value = dot(pointer(grad), at, pointer(features), row * channels, channels)
            d_weights[entry] = value


@kernel
def token_gradients(grad, weights, lists, entries, sizes, d_features):
    tokens, k, channels = sizes
    for chunk in prange((tokens + _CHUNK - 1) // _CHUNK):
        factors = allocate(4 + 2 * 4)
        rows = as_int64(advance(factors, 4))
        begin = np.int64(chunk) * _CHUNK
        for token in range(begin, min(begin + _CHUNK, tokens)):
            at = token * channels
            if lists[token] == lists[token + 1]:
                for c in range(channels):
                    d_features[at + c] = f32(0.0)
            for start in range(lists[token], lists[token + 1], 4):
                count = min(4, lists[token + 1] - start)
                for n in range(count):
                    rows[n] = entries[start + n] // k * channels
                    factors[n] = weights[entries[start + n]]
                first = start == lists[token]
                add_rows(
                    pointer(grad), channels, rows, factors, count, pointer(d_features), at, first
                )
        free(factors)


def flat(tensor):
    return tensor.detach().contiguous().view(-1).numpy()


def _arrays(features, index, weights):
    if index.numel() and int(index.max()) >= features.shape[0]:
        raise IndexError(f"index: row {int(index.max())} of {features.shape[0]} tokens")
    return flat(features.float()), flat(index), flat(weights)


def forward(features, index, weights):
    """(Q, C) in the dtype of `features`, see `weighted_gather`."""
    out = torch.empty(index.shape[0], features.shape[1], dtype=torch.float32)
    sizes = (*index.shape, features.shape[1])
    _forward(*_arrays(features, index, weights), sizes, out.view(-1).numpy())
    return out.to(features.dtype)


def backward(grad, features, index, weights):
    """Gradients of features and weights."""
    rows, lists, factors = _arrays(features, index, weights)
    d_features, d_weights = (
        torch.empty(features.shape, dtype=torch.float32),
        torch.empty(weights.shape, dtype=torch.float32),
    )
    grad = flat(grad.float())
    k, channels = index.shape[1], features.shape[1]
    _weight_gradients(grad, rows, lists, (*index.shape, channels), d_weights.view(-1).numpy())
    offsets, entries = inverse_lists(lists, features.shape[0])
    sizes = (features.shape[0], k, channels)
    token_gradients(grad, factors, offsets, entries, sizes, d_features.view(-1).numpy())
    return d_features.to(features.dtype), d_weights
