"""CPU neighborhood merging: one center at a time forward, one cluster at a time backward.

A *pair* is a center and a token of its neighborhood. Eight pairs share a vector while the weights
are computed, eight channels while features are summed, for four weights at a time, whose sums fill
the registers. What fills up the last four is zero. Weights are never stored: the backward pass
computes them again, cluster by cluster, for the centers that use the cluster. It owns the rows of
its cluster, and parameter gradients are partial sums per chunk of clusters, so no bit depends on
the number of threads.
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
    sqrt,
    store,
    where_positive,
    zero,
)
from pointformer.kernels.cpu.special import normal_density, normal_distribution

_CHUNK = 32  # centers or clusters per unit of parallel work
_PAIRS = 64  # pairs per block of the backward pass, more only if a cluster is larger

# The weight net, a row of weights after the other: 7 columns (dx, dy, dz, distance, unit vector) of
# which those that a weight matrix lacks are zero; bias, norm_weight, norm_bias; 1 for each weight.
_BIAS, _SCALE, _SHIFT, _EXISTS, _NET_ROWS = 7, 8, 9, 10, 11
_COLUMNS = {
    (2, 2): (0, 1),
    (2, 5): (0, 1, 3, 5, 4),  # sine before cosine
    (3, 3): (0, 1, 2),
    (3, 7): (0, 1, 2, 3, 4, 5, 6),
}


@inlined
def _logit(net, mid, m, dx, dy, dz, distance, ux, uy, uz):
    value = fma(splat(net[m]), dx, splat(net[_BIAS * mid + m]))
    value = fma(splat(net[mid + m]), dy, value)
    value = fma(splat(net[2 * mid + m]), dz, value)
    value = fma(splat(net[3 * mid + m]), distance, value)
    value = fma(splat(net[4 * mid + m]), ux, value)
    value = fma(splat(net[5 * mid + m]), uy, value)
    return fma(splat(net[6 * mid + m]), uz, value)


@inlined
def _direction(dx, dy, dz):
    """Distance and unit vector, zeros at distance 0."""
    squared = fma(dx, dx, fma(dy, dy, dz * dz))
    distance = sqrt(squared)
    inverse = where_positive(squared, splat(f32(1.0)) / distance, zero())
    return distance, dx * inverse, dy * inverse, dz * inverse


@inlined
def _logits(net, mid, m, dx, dy, dz, distance, ux, uy, uz):
    a = _logit(net, mid, m, dx, dy, dz, distance, ux, uy, uz)
    b = _logit(net, mid, m + 1, dx, dy, dz, distance, ux, uy, uz)
    c = _logit(net, mid, m + 2, dx, dy, dz, distance, ux, uy, uz)
    d = _logit(net, mid, m + 3, dx, dy, dz, distance, ux, uy, uz)
    return a, b, c, d, a + b + (c + d)


@inlined
def _centered(net, mid, m, mean, a, b, c, d):
    """Logits without the mean, zero where there is no such weight, and the sum of their squares."""
    exists = _EXISTS * mid + m
    a = a - mean * splat(net[exists])
    b = b - mean * splat(net[exists + 1])
    c = c - mean * splat(net[exists + 2])
    d = d - mean * splat(net[exists + 3])
    return a, b, c, d, fma(a, a, b * b) + fma(c, c, d * d)


@inlined
def _store_four(array, at, width, a, b, c, d):
    store(array, at, a)
    store(array, at + width, b)
    store(array, at + 2 * width, c)
    store(array, at + 3 * width, d)


@inlined
def _normalized(net, mid, share, eps, dx, dy, dz, distance, ux, uy, uz, pairs, at, width):
    """LayerNorm before scale and shift of the first four logits, and 1 / standard deviation.

    The others' logits without their mean go to `pairs[at]` on, `width` apart: registers hold four.
    """
    a, b, c, d, total = _logits(net, mid, 0, dx, dy, dz, distance, ux, uy, uz)
    for m in range(4, mid, 4):
        e, f, g, h, more = _logits(net, mid, m, dx, dy, dz, distance, ux, uy, uz)
        _store_four(pairs, at + m * width, width, e, f, g, h)
        total = total + more
    mean = total * splat(share)
    a, b, c, d, variance = _centered(net, mid, 0, mean, a, b, c, d)
    for m in range(4, mid, 4):
        here = at + m * width
        e, f = load(pairs, here), load(pairs, here + width)
        g, h = load(pairs, here + 2 * width), load(pairs, here + 3 * width)
        e, f, g, h, more = _centered(net, mid, m, mean, e, f, g, h)
        _store_four(pairs, here, width, e, f, g, h)
        variance = variance + more
    inverse = splat(f32(1.0)) / sqrt(fma(variance, splat(share), splat(eps)))
    return a * inverse, b * inverse, c * inverse, d * inverse, inverse


@inlined
def _affine(net, mid, m, normalized):
    return fma(normalized, splat(net[_SCALE * mid + m]), splat(net[_SHIFT * mid + m]))


@inlined
def _gather(tokens, stride, first, count, center, q, pairs, width, at):
    """Differences to center q and scores of `count` tokens, from row `first`, to `pairs[:, at:]`.

    Writes up to seven columns more than it should.
    """
    for i in range(0, count, LANES):
        for axis in range(3):
            delta = load(tokens, axis * stride + first + i) - splat(center[q * 3 + axis])
            store(pairs, axis * width + at + i, delta)
        store(pairs, 3 * width + at + i, load(tokens, 3 * stride + first + i))


@inlined
def _scored(net, mid, m, normalized, score):
    x = _affine(net, mid, m, normalized)
    return x * normal_distribution(x) * score


@kernel
def _forward(features, tokens, centers, offsets, index, order, net, share, eps, sizes, out):
    per_query, channels, stride, width, weights, mid = sizes
    for chunk in prange((order.size + _CHUNK - 1) // _CHUNK):
        pairs = allocate((4 + mid) * width)  # 3 differences, score, weights
        numbers = allocate(2 * width)
        rows = as_int64(numbers)
        lists, ends, parameters = pointer(index), pointer(offsets), pointer(net)
        begin = np.int64(chunk) * _CHUNK
        for n in range(begin, min(begin + _CHUNK, order.size)):
            q = order[n]
            count = 0
            for r in range(per_query):
                cluster = lists[q * per_query + r]
                if cluster < 0:
                    continue
                first = np.int64(ends[cluster])
                length = np.int64(ends[cluster + 1]) - first
                _gather(
                    pointer(tokens), stride, first, length, pointer(centers), q, pairs, width, count
                )
                for i in range(length):
                    rows[count + i] = (first + i) * channels
                count += length
            for p in range(0, count, LANES):
                dx, dy, dz = load(pairs, p), load(pairs, width + p), load(pairs, 2 * width + p)
                score = load(pairs, 3 * width + p)
                distance, ux, uy, uz = _direction(dx, dy, dz)
                at = 4 * width + p
                a, b, c, d, inverse = _normalized(
                    parameters, mid, share, eps, dx, dy, dz, distance, ux, uy, uz, pairs, at, width
                )
                store(pairs, at, _scored(parameters, mid, 0, a, score))
                store(pairs, at + width, _scored(parameters, mid, 1, b, score))
                store(pairs, at + 2 * width, _scored(parameters, mid, 2, c, score))
                store(pairs, at + 3 * width, _scored(parameters, mid, 3, d, score))
                for m in range(4, mid):
                    at = (4 + m) * width + p
                    normalized = load(pairs, at) * inverse
                    store(pairs, at, _scored(parameters, mid, m, normalized, score))
            for m in range(0, weights, 4):
                _sum_features(
                    pointer(features), channels, rows, pairs, (4 + m) * width, width, count,
                    pointer(out), (q * weights + m) * channels, weights - m,
                )  # fmt: skip
        free(pairs)
        free(numbers)


@inlined
def _lines(at, channels, left):
    """Where the lines after the first of four are; those that do not exist share the last one's."""
    return (
        at + min(1, left - 1) * channels,
        at + min(2, left - 1) * channels,
        at + min(3, left - 1) * channels,
    )


@inlined
def _sum_features(features, channels, rows, pairs, weights, width, count, out, at, left):
    """Four lines of the output from their weights, `pairs[weights]` on.

    Of lines in one place the first is written last.
    """
    u0, u1, u2, u3 = weights, weights + width, weights + 2 * width, weights + 3 * width
    at1, at2, at3 = _lines(at, channels, left)
    c = 0
    while c + 2 * LANES <= channels:  # two vectors of channels keep the multipliers busy
        a0, a1, a2, a3 = zero(), zero(), zero(), zero()
        b0, b1, b2, b3 = zero(), zero(), zero(), zero()
        for j in range(count):
            x = load(features, rows[j] + c)
            y = load(features, rows[j] + c + LANES)
            w0, w1 = splat(pairs[u0 + j]), splat(pairs[u1 + j])
            w2, w3 = splat(pairs[u2 + j]), splat(pairs[u3 + j])
            a0, a1, a2, a3 = fma(w0, x, a0), fma(w1, x, a1), fma(w2, x, a2), fma(w3, x, a3)
            b0, b1, b2, b3 = fma(w0, y, b0), fma(w1, y, b1), fma(w2, y, b2), fma(w3, y, b3)
        _store_lines(out, at + c, at1 + c, at2 + c, at3 + c, a0, a1, a2, a3)
        c += LANES
        _store_lines(out, at + c, at1 + c, at2 + c, at3 + c, b0, b1, b2, b3)
        c += LANES
    while c + LANES <= channels:
        a0, a1, a2, a3 = zero(), zero(), zero(), zero()
        for j in range(count):
            x = load(features, rows[j] + c)
            a0 = fma(splat(pairs[u0 + j]), x, a0)
            a1 = fma(splat(pairs[u1 + j]), x, a1)
            a2 = fma(splat(pairs[u2 + j]), x, a2)
            a3 = fma(splat(pairs[u3 + j]), x, a3)
        _store_lines(out, at + c, at1 + c, at2 + c, at3 + c, a0, a1, a2, a3)
        c += LANES
    for tail in range(c, channels):
        for m in range(min(4, left)):
            total = f32(0.0)
            for j in range(count):
                total += pairs[weights + m * width + j] * features[rows[j] + tail]
            out[at + m * channels + tail] = total


@inlined
def _store_lines(out, at0, at1, at2, at3, a, b, c, d):
    store(out, at3, d)
    store(out, at2, c)
    store(out, at1, b)
    store(out, at0, a)


# Rows of the backward pass's scratch, after the differences and the score: the distance and unit
# vector, 1 / standard deviation, then as many rows as there are weights of each of these.
_DISTANCE, _INVERSE, _WEIGHTS = 4, 8, 9
_NORMALIZED, _SLOPE, _WEIGHT, _SCALED, _DOT, _KINDS = range(6)


@inlined
def _row(kind, mid, m):
    return _WEIGHTS + kind * mid + m


@inlined
def _pair_weights(pairs, width, count, net, mid, share, eps):
    """Weights of a block of pairs, and what their derivatives need."""
    for p in range(0, count, LANES):
        dx, dy, dz = load(pairs, p), load(pairs, width + p), load(pairs, 2 * width + p)
        score = load(pairs, 3 * width + p)
        distance, ux, uy, uz = _direction(dx, dy, dz)
        store(pairs, _DISTANCE * width + p, distance)
        store(pairs, (_DISTANCE + 1) * width + p, ux)
        store(pairs, (_DISTANCE + 2) * width + p, uy)
        store(pairs, (_DISTANCE + 3) * width + p, uz)
        at = _row(_NORMALIZED, mid, 0) * width + p
        a, b, c, d, inverse = _normalized(
            net, mid, share, eps, dx, dy, dz, distance, ux, uy, uz, pairs, at, width
        )
        _store_four(pairs, at, width, a, b, c, d)
        for m in range(4, mid):
            store(pairs, at + m * width, load(pairs, at + m * width) * inverse)
        store(pairs, _INVERSE * width + p, inverse)
        for four in range(0, mid, 4):
            for m in range(four, four + 4):
                x = _affine(net, mid, m, load(pairs, at + m * width))
                below = normal_distribution(x)
                weight = x * below
                slope = fma(x, normal_density(x), below)
                store(pairs, _row(_SLOPE, mid, m) * width + p, slope)
                store(pairs, _row(_WEIGHT, mid, m) * width + p, weight)
                store(pairs, _row(_SCALED, mid, m) * width + p, weight * score)


@inlined
def _pair_features(grad, g, left, features, d_features, x, channels, pairs, scaled, dots, width):
    """For a pair: dot products of the token's features with four lines of the gradient, `left` of
    which exist, and its share of the gradient of the features."""
    w0, w1 = pairs[scaled], pairs[scaled + width]
    w2, w3 = pairs[scaled + 2 * width], pairs[scaled + 3 * width]
    v0, v1, v2, v3 = splat(w0), splat(w1), splat(w2), splat(w3)
    h1, h2, h3 = _lines(g, channels, left)
    a0, a1, a2, a3 = zero(), zero(), zero(), zero()
    c = 0
    while c + LANES <= channels:
        g0, g1 = load(grad, g + c), load(grad, h1 + c)
        g2, g3 = load(grad, h2 + c), load(grad, h3 + c)
        value = load(features, x + c)
        a0, a1, a2, a3 = (
            fma(g0, value, a0),
            fma(g1, value, a1),
            fma(g2, value, a2),
            fma(g3, value, a3),
        )
        share = fma(v1, g1, fma(v0, g0, load(d_features, x + c)))
        store(d_features, x + c, fma(v3, g3, fma(v2, g2, share)))
        c += LANES
    s0, s1, s2, s3 = hsum(a0), hsum(a1), hsum(a2), hsum(a3)
    for tail in range(c, channels):
        value = features[x + tail]
        g0, g1, g2, g3 = grad[g + tail], grad[h1 + tail], grad[h2 + tail], grad[h3 + tail]
        s0, s1, s2, s3 = s0 + g0 * value, s1 + g1 * value, s2 + g2 * value, s3 + g3 * value
        d_features[x + tail] += (w0 * g0 + w1 * g1) + (w2 * g2 + w3 * g3)
    pairs[dots] = s0
    pairs[dots + width] = s1
    pairs[dots + 2 * width] = s2
    pairs[dots + 3 * width] = s3


@inlined
def _add(array, at, value):
    store(array, at, load(array, at) + value)


@inlined
def _net_gradients(pairs, width, count, net, mid, share, sums):
    """Add the gradients of the weight net; leave each pair's score gradient in the score's row."""
    for m in range(mid):
        for p in range(count, (count + LANES - 1) // LANES * LANES):
            pairs[_row(_DOT, mid, m) * width + p] = f32(0.0)
    for p in range(0, count, LANES):
        score = load(pairs, 3 * width + p)
        d_score, mean, product = zero(), zero(), zero()
        for four in range(0, mid, 4):
            for m in range(four, four + 4):
                dot = load(pairs, _row(_DOT, mid, m) * width + p)
                d_score = fma(dot, load(pairs, _row(_WEIGHT, mid, m) * width + p), d_score)
                normalized = load(pairs, _row(_NORMALIZED, mid, m) * width + p)
                d_affine = dot * score * load(pairs, _row(_SLOPE, mid, m) * width + p)
                _add(sums, (_SCALE * mid + m) * LANES, d_affine * normalized)
                _add(sums, (_SHIFT * mid + m) * LANES, d_affine)
                d_normalized = d_affine * splat(net[_SCALE * mid + m])
                store(pairs, _row(_DOT, mid, m) * width + p, d_normalized)
                mean = mean + d_normalized
                product = fma(d_normalized, normalized, product)
        store(pairs, 3 * width + p, d_score)
        mean, product = mean * splat(share), product * splat(share)
        inverse = load(pairs, _INVERSE * width + p)
        for four in range(0, mid, 4):
            for m in range(four, four + 4):
                normalized = load(pairs, _row(_NORMALIZED, mid, m) * width + p)
                d_normalized = load(pairs, _row(_DOT, mid, m) * width + p)
                d_logit = (d_normalized - mean - normalized * product) * inverse
                _add(sums, (_BIAS * mid + m) * LANES, d_logit)
                for axis in range(3):
                    delta = load(pairs, axis * width + p)
                    _add(sums, (axis * mid + m) * LANES, d_logit * delta)
                for f in range(4):
                    feature = load(pairs, (_DISTANCE + f) * width + p)
                    _add(sums, ((3 + f) * mid + m) * LANES, d_logit * feature)


@kernel
def _backward(
    grad, features, tokens, centers, offsets, net, share, eps, lists, entries, sizes,
    d_features, d_scores, partial,
):  # fmt: skip
    clusters, per_query, channels, stride, width, weights, mid = sizes
    for chunk in prange((clusters + _CHUNK - 1) // _CHUNK):
        pairs = allocate((_WEIGHTS + _KINDS * mid) * width)
        at = np.int64(chunk) * _EXISTS * mid * LANES
        begin = np.int64(chunk) * _CHUNK
        for cluster in range(begin, min(begin + _CHUNK, clusters)):
            first = np.int64(offsets[cluster])
            length = np.int64(offsets[cluster + 1]) - first
            if length == 0:
                continue
            block = (width - LANES) // length  # centers whose pairs fit the scratch
            for start in range(lists[cluster], lists[cluster + 1], block):
                stop = min(start + block, lists[cluster + 1])
                count = (stop - start) * length
                for n in range(stop - start):
                    q = entries[start + n] // per_query
                    _gather(
                        pointer(tokens), stride, first, length, pointer(centers), q, pairs, width,
                        n * length,
                    )  # fmt: skip
                _pair_weights(pairs, width, count, pointer(net), mid, share, eps)
                for n in range(stop - start):
                    q = entries[start + n] // per_query
                    for m in range(0, weights, 4):
                        scaled = _row(_SCALED, mid, m) * width + n * length
                        dots = _row(_DOT, mid, m) * width + n * length
                        for i in range(length):
                            x = (first + i) * channels
                            _pair_features(
                                pointer(grad), (q * weights + m) * channels, weights - m,
                                pointer(features), pointer(d_features), x, channels,
                                pairs, scaled + i, dots + i, width,
                            )  # fmt: skip
                sums = advance(pointer(partial), at)
                _net_gradients(pairs, width, count, pointer(net), mid, share, sums)
                for n in range(stop - start):
                    for i in range(length):
                        d_scores[first + i] += pairs[3 * width + n * length + i]
        free(pairs)


def _flat(tensor):
    if tensor.dtype != torch.float32:
        raise TypeError(f"expected float32, got {tensor.dtype}")
    return tensor.detach().contiguous().view(-1).numpy()


def _prepare(features, scores, positions, center_positions, offsets, index, weight, *vectors):
    """Arrays that both passes read."""
    tokens, dimensions = positions.shape
    clusters = offsets.shape[0] - 1
    if index.numel() and int(index.max()) >= clusters:
        raise IndexError(f"entry {int(index.max())} of an index into {clusters} rows or clusters")
    stride = tokens + LANES  # vectors may read beyond the last token
    planar = positions.new_zeros(4, stride)
    planar[:dimensions, :tokens] = positions.T
    planar[3, :tokens] = scores
    centers = center_positions.new_zeros(center_positions.shape[0], 3)
    centers[:, :dimensions] = center_positions
    weights = weight.shape[0]
    columns = list(_COLUMNS[dimensions, weight.shape[1]])
    net = torch.zeros(_NET_ROWS, -(-weights // 4) * 4, dtype=torch.float32)
    net[columns, :weights] = weight.float().T
    for row, vector in zip((_BIAS, _SCALE, _SHIFT), vectors, strict=True):
        net[row, :weights] = vector
    net[_EXISTS, :weights] = 1
    offsets = offsets.contiguous().numpy()
    largest = int(np.diff(offsets).max(initial=0))
    arrays = (_flat(features), _flat(planar), _flat(centers), offsets)
    return arrays, _flat(net), columns, stride, largest


def forward(
    features, scores, positions, center_positions, offsets, index,
    weight, bias, norm_weight, norm_bias, cluster_size, eps,
):  # fmt: skip
    """(Q, M * C), see `scored_merge`; the weight net of any dtypes, the rest float32, lists int32.

    How large clusters are at most is counted here: `cluster_size` is what GPUs cannot wait for.
    """
    arrays, net, _, stride, largest = _prepare(
        features, scores, positions, center_positions, offsets, index,
        weight, bias, norm_weight, norm_bias,
    )  # fmt: skip
    (queries, per_query), channels, weights = index.shape, features.shape[1], weight.shape[0]
    if index.numel() == 0 or offsets.shape[0] == 1:
        return features.new_zeros(queries, weights * channels)
    # Centers come in any order; those that share clusters follow each other for the cache's sake.
    _, order = inverse_lists(index.amax(1).clamp(min=0).numpy(), offsets.shape[0] - 1)
    out = features.new_empty(queries, weights * channels)
    mid = net.size // _NET_ROWS
    sizes = (per_query, channels, stride, per_query * largest + LANES, weights, mid)
    index = index.contiguous().view(-1).numpy()
    share = f32(1 / weights)
    _forward(*arrays, index, order, net, share, f32(eps), sizes, out.view(-1).numpy())
    return out


def backward(
    grad, features, scores, positions, center_positions, offsets, index,
    weight, bias, norm_weight, norm_bias, cluster_size, eps,
):  # fmt: skip
    """Gradients of features, scores, weight, bias, norm_weight and norm_bias."""
    arrays, net, columns, stride, largest = _prepare(
        features, scores, positions, center_positions, offsets, index,
        weight, bias, norm_weight, norm_bias,
    )  # fmt: skip
    clusters, channels, weights = offsets.shape[0] - 1, features.shape[1], weight.shape[0]
    lists, entries = inverse_lists(index.contiguous().view(-1).numpy(), clusters)
    d_features = features.new_zeros(features.shape)
    d_scores = scores.new_zeros(scores.shape)
    chunks, mid = -(-clusters // _CHUNK), net.size // _NET_ROWS
    partial = np.zeros((chunks, _EXISTS, mid, LANES), np.float32)
    width = max(_PAIRS, largest) + LANES
    sizes = (clusters, index.shape[1], channels, stride, width, weights, mid)
    _backward(
        _flat(grad), *arrays, net, f32(1 / weights), f32(eps), lists, entries, sizes,
        d_features.view(-1).numpy(), d_scores.numpy(), partial.reshape(-1),
    )  # fmt: skip
    # NumPy adds in a fixed order; float64, for the chunks' sums may cancel.
    total = torch.from_numpy(partial.sum(axis=(0, 3), dtype=np.float64))[:, :weights]
    d_net = [total[columns].T.contiguous(), *total[_BIAS:]]
    learned = (weight, bias, norm_weight, norm_bias)
    d_net = [d.to(x.dtype, copy=True) for d, x in zip(d_net, learned, strict=True)]
    return d_features, d_scores, *d_net
