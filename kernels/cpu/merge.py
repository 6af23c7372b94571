"""CPU neighborhood merging: one center at a time forward, one cluster at a time backward.

A *pair* is a center and a token of its neighborhood. Eight pairs share a vector while the weights
are computed, eight channels while features are summed. Weights are never stored: the backward pass
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

# The weight net as 40 numbers: 7 columns of 4 weights (dx, dy, dz, distance, unit vector), then 4
# each of bias, norm_weight and norm_bias. Columns that a weight matrix lacks are zero.
_BIAS, _SCALE, _SHIFT, _PARAMETERS = 28, 32, 36, 40
_COLUMNS = {
    (2, 2): (0, 1),
    (2, 5): (0, 1, 3, 5, 4),  # sine before cosine
    (3, 3): (0, 1, 2),
    (3, 7): (0, 1, 2, 3, 4, 5, 6),
}


@inlined
def _logit(net, m, dx, dy, dz, distance, ux, uy, uz):
    value = fma(splat(net[m]), dx, splat(net[_BIAS + m]))
    value = fma(splat(net[4 + m]), dy, value)
    value = fma(splat(net[8 + m]), dz, value)
    value = fma(splat(net[12 + m]), distance, value)
    value = fma(splat(net[16 + m]), ux, value)
    value = fma(splat(net[20 + m]), uy, value)
    return fma(splat(net[24 + m]), uz, value)


@inlined
def _direction(dx, dy, dz):
    """Distance and unit vector, zeros at distance 0."""
    squared = fma(dx, dx, fma(dy, dy, dz * dz))
    distance = sqrt(squared)
    inverse = where_positive(squared, splat(f32(1.0)) / distance, zero())
    return distance, dx * inverse, dy * inverse, dz * inverse


@inlined
def _normalized(net, eps, dx, dy, dz, distance, ux, uy, uz):
    """LayerNorm of the four logits before scale and shift, and 1 / standard deviation."""
    a = _logit(net, 0, dx, dy, dz, distance, ux, uy, uz)
    b = _logit(net, 1, dx, dy, dz, distance, ux, uy, uz)
    c = _logit(net, 2, dx, dy, dz, distance, ux, uy, uz)
    d = _logit(net, 3, dx, dy, dz, distance, ux, uy, uz)
    quarter = splat(f32(0.25))
    mean = (a + b + (c + d)) * quarter
    a, b, c, d = a - mean, b - mean, c - mean, d - mean
    variance = fma(a, a, b * b) + fma(c, c, d * d)
    inverse = splat(f32(1.0)) / sqrt(fma(variance, quarter, splat(eps)))
    return a * inverse, b * inverse, c * inverse, d * inverse, inverse


@inlined
def _affine(net, m, normalized):
    return fma(normalized, splat(net[_SCALE + m]), splat(net[_SHIFT + m]))


@inlined
def _gelu(x):
    return x * normal_distribution(x)


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


@kernel
def _forward(features, tokens, centers, offsets, index, order, net, eps, sizes, out):
    per_query, channels, stride, width = sizes
    for chunk in prange((order.size + _CHUNK - 1) // _CHUNK):
        pairs = allocate(8 * width)  # 3 differences, score, 4 weights
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
                n0, n1, n2, n3, _ = _normalized(parameters, eps, dx, dy, dz, distance, ux, uy, uz)
                store(pairs, 4 * width + p, _gelu(_affine(parameters, 0, n0)) * score)
                store(pairs, 5 * width + p, _gelu(_affine(parameters, 1, n1)) * score)
                store(pairs, 6 * width + p, _gelu(_affine(parameters, 2, n2)) * score)
                store(pairs, 7 * width + p, _gelu(_affine(parameters, 3, n3)) * score)
            at = q * 4 * channels
            _sum_features(pointer(features), channels, rows, pairs, width, count, pointer(out), at)
        free(pairs)
        free(numbers)


@inlined
def _sum_features(features, channels, rows, pairs, width, count, out, at):
    u0, u1, u2, u3 = 4 * width, 5 * width, 6 * width, 7 * width
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
        store(out, at + c, a0)
        store(out, at + channels + c, a1)
        store(out, at + 2 * channels + c, a2)
        store(out, at + 3 * channels + c, a3)
        store(out, at + c + LANES, b0)
        store(out, at + channels + c + LANES, b1)
        store(out, at + 2 * channels + c + LANES, b2)
        store(out, at + 3 * channels + c + LANES, b3)
        c += 2 * LANES
    while c + LANES <= channels:
        a0, a1, a2, a3 = zero(), zero(), zero(), zero()
        for j in range(count):
            x = load(features, rows[j] + c)
            a0 = fma(splat(pairs[u0 + j]), x, a0)
            a1 = fma(splat(pairs[u1 + j]), x, a1)
            a2 = fma(splat(pairs[u2 + j]), x, a2)
            a3 = fma(splat(pairs[u3 + j]), x, a3)
        store(out, at + c, a0)
        store(out, at + channels + c, a1)
        store(out, at + 2 * channels + c, a2)
        store(out, at + 3 * channels + c, a3)
        c += LANES
    for tail in range(c, channels):
        for m in range(4):
            total = f32(0.0)
            for j in range(count):
                total += pairs[(4 + m) * width + j] * features[rows[j] + tail]
            out[at + m * channels + tail] = total


# Rows of the backward pass's scratch, after the differences and the score.
_DISTANCE, _INVERSE, _NORMALIZED, _SLOPE, _WEIGHT, _SCALED, _DOT, _ROWS = (
    4,
    8,
    9,
    13,
    17,
    21,
    25,
    29,
)


@inlined
def _pair_weights(pairs, width, count, net, eps):
    """Weights of a block of pairs, and what their derivatives need."""
    for p in range(0, count, LANES):
        dx, dy, dz = load(pairs, p), load(pairs, width + p), load(pairs, 2 * width + p)
        score = load(pairs, 3 * width + p)
        distance, ux, uy, uz = _direction(dx, dy, dz)
        store(pairs, _DISTANCE * width + p, distance)
        store(pairs, (_DISTANCE + 1) * width + p, ux)
        store(pairs, (_DISTANCE + 2) * width + p, uy)
        store(pairs, (_DISTANCE + 3) * width + p, uz)
        n0, n1, n2, n3, inverse = _normalized(net, eps, dx, dy, dz, distance, ux, uy, uz)
        store(pairs, _INVERSE * width + p, inverse)
        store(pairs, _NORMALIZED * width + p, n0)
        store(pairs, (_NORMALIZED + 1) * width + p, n1)
        store(pairs, (_NORMALIZED + 2) * width + p, n2)
        store(pairs, (_NORMALIZED + 3) * width + p, n3)
        for m in range(4):
            x = _affine(net, m, load(pairs, (_NORMALIZED + m) * width + p))
            below = normal_distribution(x)
            weight = x * below
            store(pairs, (_SLOPE + m) * width + p, fma(x, normal_density(x), below))
            store(pairs, (_WEIGHT + m) * width + p, weight)
            store(pairs, (_SCALED + m) * width + p, weight * score)


@inlined
def _pair_features(grad, g, features, d_features, x, channels, pairs, width, p):
    """For pair p: dot products of the token's features with the four gradient rows, and its share
    of the gradient of the features."""
    w0, w1 = pairs[_SCALED * width + p], pairs[(_SCALED + 1) * width + p]
    w2, w3 = pairs[(_SCALED + 2) * width + p], pairs[(_SCALED + 3) * width + p]
    v0, v1, v2, v3 = splat(w0), splat(w1), splat(w2), splat(w3)
    a0, a1, a2, a3 = zero(), zero(), zero(), zero()
    c = 0
    while c + LANES <= channels:
        g0, g1 = load(grad, g + c), load(grad, g + channels + c)
        g2, g3 = load(grad, g + 2 * channels + c), load(grad, g + 3 * channels + c)
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
        g0, g1 = grad[g + tail], grad[g + channels + tail]
        g2, g3 = grad[g + 2 * channels + tail], grad[g + 3 * channels + tail]
        s0, s1, s2, s3 = s0 + g0 * value, s1 + g1 * value, s2 + g2 * value, s3 + g3 * value
        d_features[x + tail] += (w0 * g0 + w1 * g1) + (w2 * g2 + w3 * g3)
    pairs[_DOT * width + p] = s0
    pairs[(_DOT + 1) * width + p] = s1
    pairs[(_DOT + 2) * width + p] = s2
    pairs[(_DOT + 3) * width + p] = s3


@inlined
def _add(array, at, value):
    store(array, at, load(array, at) + value)


@inlined
def _net_gradients(pairs, width, count, net, partial, at):
    """Add the gradients of the weight net; leave each pair's score gradient in the score's row."""
    for m in range(4):
        for p in range(count, (count + LANES - 1) // LANES * LANES):
            pairs[(_DOT + m) * width + p] = f32(0.0)
    for p in range(0, count, LANES):
        score = load(pairs, 3 * width + p)
        d_score, mean, product = zero(), zero(), zero()
        for m in range(4):
            dot = load(pairs, (_DOT + m) * width + p)
            d_score = fma(dot, load(pairs, (_WEIGHT + m) * width + p), d_score)
            normalized = load(pairs, (_NORMALIZED + m) * width + p)
            d_affine = dot * score * load(pairs, (_SLOPE + m) * width + p)
            _add(partial, at + (_SCALE + m) * LANES, d_affine * normalized)
            _add(partial, at + (_SHIFT + m) * LANES, d_affine)
            d_normalized = d_affine * splat(net[_SCALE + m])
            store(pairs, (_DOT + m) * width + p, d_normalized)
            mean = mean + d_normalized
            product = fma(d_normalized, normalized, product)
        store(pairs, 3 * width + p, d_score)
        mean, product = mean * splat(f32(0.25)), product * splat(f32(0.25))
        inverse = load(pairs, _INVERSE * width + p)
        for m in range(4):
            normalized = load(pairs, (_NORMALIZED + m) * width + p)
            centered = load(pairs, (_DOT + m) * width + p) - mean - normalized * product
            d_logit = centered * inverse
            _add(partial, at + (_BIAS + m) * LANES, d_logit)
            for axis in range(3):
                delta = load(pairs, axis * width + p)
                _add(partial, at + (axis * 4 + m) * LANES, d_logit * delta)
            for f in range(4):
                feature = load(pairs, (_DISTANCE + f) * width + p)
                _add(partial, at + ((3 + f) * 4 + m) * LANES, d_logit * feature)


@kernel
def _backward(
    grad, features, tokens, centers, offsets, net, eps, lists, entries, sizes,
    d_features, d_scores, partial,
):  # fmt: skip
    clusters, per_query, channels, stride, width = sizes
    for chunk in prange((clusters + _CHUNK - 1) // _CHUNK):
        pairs = allocate(_ROWS * width)
        at = np.int64(chunk) * _PARAMETERS * LANES
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
                _pair_weights(pairs, width, count, pointer(net), eps)
                for n in range(stop - start):
                    g = entries[start + n] // per_query * 4 * channels
                    for i in range(length):
                        x = (first + i) * channels
                        p = n * length + i
                        _pair_features(
                            pointer(grad), g, pointer(features), pointer(d_features), x, channels,
                            pairs, width, p,
                        )  # fmt: skip
                _net_gradients(pairs, width, count, pointer(net), pointer(partial), at)
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
    columns = list(_COLUMNS[dimensions, weight.shape[1]])
    net = torch.zeros(7, 4, dtype=torch.float32)
    net[columns] = weight.float().T
    net = torch.cat([net.flatten(), *(x.float() for x in vectors)])
    offsets = offsets.contiguous().numpy()
    largest = int(np.diff(offsets).max(initial=0))
    arrays = (_flat(features), _flat(planar), _flat(centers), offsets)
    return arrays, _flat(net), columns, stride, largest


def forward(
    features, scores, positions, center_positions, offsets, index,
    weight, bias, norm_weight, norm_bias, cluster_size, eps,
):  # fmt: skip
    """(Q, 4 * C), see `scored_merge`; the weight net of any dtypes, the rest float32, lists int32.

    How large clusters are at most is counted here: `cluster_size` is what GPUs cannot wait for.
    """
    arrays, net, _, stride, largest = _prepare(
        features, scores, positions, center_positions, offsets, index,
        weight, bias, norm_weight, norm_bias,
    )  # fmt: skip
    (queries, per_query), channels = index.shape, features.shape[1]
    if index.numel() == 0 or offsets.shape[0] == 1:
        return features.new_zeros(queries, 4 * channels)
    # Centers come in any order; those that share clusters follow each other for the cache's sake.
    _, order = inverse_lists(index.amax(1).clamp(min=0).numpy(), offsets.shape[0] - 1)
    out = features.new_empty(queries, 4 * channels)
    sizes = (per_query, channels, stride, per_query * largest + LANES)
    index = index.contiguous().view(-1).numpy()
    _forward(*arrays, index, order, net, f32(eps), sizes, out.view(-1).numpy())
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
    clusters, channels = offsets.shape[0] - 1, features.shape[1]
    lists, entries = inverse_lists(index.contiguous().view(-1).numpy(), clusters)
    d_features = features.new_zeros(features.shape)
    d_scores = scores.new_zeros(scores.shape)
    chunks = -(-clusters // _CHUNK)
    partial = np.zeros(chunks * _PARAMETERS * LANES, np.float32)
    sizes = (clusters, index.shape[1], channels, stride, max(_PAIRS, largest) + LANES)
    _backward(
        _flat(grad), *arrays, net, f32(eps), lists, entries, sizes,
        d_features.view(-1).numpy(), d_scores.numpy(), partial,
    )  # fmt: skip
    # NumPy adds in a fixed order; float64, for the chunks' sums may cancel.
    total = partial.reshape(chunks, _PARAMETERS, LANES).sum(axis=(0, 2), dtype=np.float64)
    total = torch.from_numpy(total)
    d_weight = total[:_BIAS].view(7, 4)[columns].T.contiguous().to(weight.dtype)
    vectors = zip((_BIAS, _SCALE, _SHIFT), (bias, norm_weight, norm_bias), strict=True)
    d_net = [total[i : i + 4].to(x.dtype, copy=True) for i, x in vectors]
    return d_features, d_scores, d_weight, *d_net
