"""Neighborhood attention on the CPU: fused loops over clusters, eight keys per vector.

Keys are taken in *blocks*: up to eight consecutive tokens of one cluster, of which it has
`ceil(cluster_size / 8)`. Keys (and values, backward) are first packed as (block, head, channel, 8),
so that one vector holds one channel of a block, positions as (block, D + 1, 8), where the last row
is a mask: 0 for a token, a very low logit for a missing one. What belongs to a token and its
neighborhood lives in scratch memory of one chunk of tokens and is never written out.

Logits are in units of log2, because exp2 is the cheaper function. Of the softmax only the largest
logit and the inverse of the sum are kept: two numbers, because one (the log-sum-exp) would lose the
digits that large logits have before the point. Every sum has a fixed order, whatever the number of
threads.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange

from pointformer.kernels.cpu.inverse import inverse_lists
from pointformer.kernels.cpu.runtime import kernel
from pointformer.kernels.cpu.simd import (
    exp2,
    f32,
    fma,
    hmax,
    hsum,
    load,
    load_transposed,
    maximum,
    splat,
    sqrt,
    store,
    where_positive,
    zero,
)

BATCH = 64  # queries of a cluster that the backward pass takes at a time
SPARE = 5  # blocks that scratch memory of logits has beyond those of a neighborhood
CHUNK = 16  # tokens per unit of work; small, so that one small image still fills the threads
LOG2_E = f32(1.4426950408889634)
MISSING = f32(-1e30)


class Shape(NamedTuple):
    """The sizes that all loops run over."""

    tokens: int
    heads: int
    channels: int
    dimensions: int
    features: int
    radius: int
    clusters: int
    cluster_blocks: int


class Rows(NamedTuple):
    """A (T, H, d) tensor as flat memory; channels are contiguous."""

    data: np.ndarray
    token_stride: int
    head_stride: int


class Bias(NamedTuple):
    """What the logits and outputs have besides queries, keys and values; zeros where absent."""

    position_weight: np.ndarray  # (H * F)
    position_bias: np.ndarray  # (H)
    blank_key: np.ndarray  # (H * d)
    blank_value: np.ndarray  # (H * d)
    has_blank: bool


@njit(forceinline=True)
def pack_rows(rows, cluster, offsets, shape, packed):
    """Transpose the tokens of a cluster into blocks; a block without tokens stays unwritten."""
    for part in range(shape.cluster_blocks):
        first = offsets[cluster] + 8 * part
        last = min(offsets[cluster + 1] - first, 8) - 1
        at = (cluster * shape.cluster_blocks + part) * shape.heads * shape.channels * 8
        if last >= 0:
            for head in range(shape.heads):
                source = first * rows.token_stride + head * rows.head_stride
                for channel in range(0, shape.channels, 8):
                    load_transposed(
                        rows.data, source + channel, rows.token_stride, last, packed, at
                    )
                    at += 64


@njit(forceinline=True)
def pack_positions(positions, cluster, offsets, shape, points):
    for part in range(shape.cluster_blocks):
        first = offsets[cluster] + 8 * part
        last = min(offsets[cluster + 1] - first, 8) - 1
        at = (cluster * shape.cluster_blocks + part) * (shape.dimensions + 1) * 8
        if last >= 0:
            for lane in range(8):
                row = (first + min(lane, last)) * shape.dimensions
                for axis in range(shape.dimensions):
                    points[at + axis * 8 + lane] = positions[row + axis]
                missing = lane > last
                points[at + shape.dimensions * 8 + lane] = MISSING if missing else f32(0.0)


@njit(forceinline=True)
def list_blocks(cluster_index, token, offsets, shape, blocks, rows, counts):
    """The blocks of a token's neighborhood: number, first row and tokens of each; how many."""
    found = 0
    for slot in range(token * shape.radius, (token + 1) * shape.radius):
        cluster = cluster_index[slot]
        if cluster >= 0:
            end = offsets[cluster + 1]
            for part in range(shape.cluster_blocks):
                row = offsets[cluster] + 8 * part
                if row < end:
                    blocks[found] = cluster * shape.cluster_blocks + part
                    rows[found] = row
                    counts[found] = min(end - row, 8)
                    found += 1
    return found


@njit(forceinline=True)
def relate(positions, token, points, block, shape, phi, at):
    """Write the mask and the relative position features of a block: `1 + F` vectors."""
    source = block * (shape.dimensions + 1) * 8
    store(phi, at, load(points, source + shape.dimensions * 8))
    if shape.features == 0:
        return
    squared = zero()
    for axis in range(shape.dimensions):
        here = splat(positions[token * shape.dimensions + axis])
        delta = load(points, source + axis * 8) - here
        store(phi, at + 8 + axis * 8, delta)
        squared = fma(delta, delta, squared)
    if shape.features > shape.dimensions:
        distance = sqrt(squared)
        inverse = where_positive(squared, splat(f32(1.0)) / distance, zero())
        direction = at + 16 + shape.dimensions * 8
        store(phi, direction - 8, distance)
        for axis in range(shape.dimensions):
            # In 2-D the sine (y) comes first.
            column = 1 - axis if shape.dimensions == 2 else axis
            delta = load(phi, at + 8 + axis * 8)
            store(phi, direction + column * 8, delta * inverse)


@njit(forceinline=True)
def dot_blocks(vector, at, packed, head, blocks, count, shape, target):
    """Products of one head's `vector[at:]` with the keys of blocks: (count, 8) into `target`.

    Every product is one chain over the channels, here and in `dot_queries`: the backward pass then
    finds the very logits of the forward pass. Several chains run at a time to hide their latency;
    the last ones may repeat the last block, so `target` has room for `count + SPARE` blocks.
    """
    size = shape.channels * 8
    stride = shape.heads * size
    base = head * size
    last = count - 1
    done = 0
    while done < count:
        to = done * 8
        k0 = base + blocks[done] * stride
        k1 = base + blocks[min(done + 1, last)] * stride
        k2 = base + blocks[min(done + 2, last)] * stride
        s0 = s1 = s2 = zero()
        if count - done > 3:
            k3 = base + blocks[done + 3] * stride
            k4 = base + blocks[min(done + 4, last)] * stride
            k5 = base + blocks[min(done + 5, last)] * stride
            s3 = s4 = s5 = zero()
            for channel in range(shape.channels):
                x = splat(vector[at + channel])
                e = channel * 8
                s0 = fma(load(packed, k0 + e), x, s0)
                s1 = fma(load(packed, k1 + e), x, s1)
                s2 = fma(load(packed, k2 + e), x, s2)
                s3 = fma(load(packed, k3 + e), x, s3)
                s4 = fma(load(packed, k4 + e), x, s4)
                s5 = fma(load(packed, k5 + e), x, s5)
            store(target, to + 24, s3)
            store(target, to + 32, s4)
            store(target, to + 40, s5)
        else:
            for channel in range(shape.channels):
                x = splat(vector[at + channel])
                e = channel * 8
                s0 = fma(load(packed, k0 + e), x, s0)
                s1 = fma(load(packed, k1 + e), x, s1)
                s2 = fma(load(packed, k2 + e), x, s2)
        store(target, to, s0)
        store(target, to + 8, s1)
        store(target, to + 16, s2)
        done += 6


@njit(forceinline=True)
def sum_rows(
    weights, rows, counts, count, source, head, extra, extra_weight, factor, shape, to, at
):
    """`to[at:] = factor * (extra_weight * extra of the head + sum of weights * source rows)`."""
    extra_at = head * shape.channels
    channel = 0
    while channel < shape.channels:
        base = head * source.head_stride + channel
        left = shape.channels - channel
        if left >= 32:
            w = extra_weight
            a0 = w * load(extra, extra_at + channel)
            a1 = w * load(extra, extra_at + channel + 8)
            a2 = w * load(extra, extra_at + channel + 16)
            a3 = w * load(extra, extra_at + channel + 24)
            b0 = b1 = b2 = b3 = zero()
            for block in range(count):
                row = base + rows[block] * source.token_stride
                for pair in range(counts[block] // 2):
                    u = splat(weights[block * 8 + 2 * pair])
                    a0 = fma(load(source.data, row), u, a0)
                    a1 = fma(load(source.data, row + 8), u, a1)
                    a2 = fma(load(source.data, row + 16), u, a2)
                    a3 = fma(load(source.data, row + 24), u, a3)
                    row += source.token_stride
                    v = splat(weights[block * 8 + 2 * pair + 1])
                    b0 = fma(load(source.data, row), v, b0)
                    b1 = fma(load(source.data, row + 8), v, b1)
                    b2 = fma(load(source.data, row + 16), v, b2)
                    b3 = fma(load(source.data, row + 24), v, b3)
                    row += source.token_stride
                if counts[block] % 2:
                    u = splat(weights[block * 8 + counts[block] - 1])
                    a0 = fma(load(source.data, row), u, a0)
                    a1 = fma(load(source.data, row + 8), u, a1)
                    a2 = fma(load(source.data, row + 16), u, a2)
                    a3 = fma(load(source.data, row + 24), u, a3)
            f = splat(factor)
            store(to, at + channel, (a0 + b0) * f)
            store(to, at + channel + 8, (a1 + b1) * f)
            store(to, at + channel + 16, (a2 + b2) * f)
            store(to, at + channel + 24, (a3 + b3) * f)
            channel += 32
        elif left >= 16:
            w = extra_weight
            a0 = w * load(extra, extra_at + channel)
            a1 = w * load(extra, extra_at + channel + 8)
            b0 = b1 = zero()
            for block in range(count):
                row = base + rows[block] * source.token_stride
                for pair in range(counts[block] // 2):
                    u = splat(weights[block * 8 + 2 * pair])
                    a0 = fma(load(source.data, row), u, a0)
                    a1 = fma(load(source.data, row + 8), u, a1)
                    row += source.token_stride
                    v = splat(weights[block * 8 + 2 * pair + 1])
                    b0 = fma(load(source.data, row), v, b0)
                    b1 = fma(load(source.data, row + 8), v, b1)
                    row += source.token_stride
                if counts[block] % 2:
                    u = splat(weights[block * 8 + counts[block] - 1])
                    a0 = fma(load(source.data, row), u, a0)
                    a1 = fma(load(source.data, row + 8), u, a1)
            f = splat(factor)
            store(to, at + channel, (a0 + b0) * f)
            store(to, at + channel + 8, (a1 + b1) * f)
            channel += 16
        else:
            a0 = extra_weight * load(extra, extra_at + channel)
            b0 = zero()
            for block in range(count):
                row = base + rows[block] * source.token_stride
                for pair in range(counts[block] // 2):
                    a0 = fma(load(source.data, row), splat(weights[block * 8 + 2 * pair]), a0)
                    row += source.token_stride
                    b0 = fma(load(source.data, row), splat(weights[block * 8 + 2 * pair + 1]), b0)
                    row += source.token_stride
                if counts[block] % 2:
                    u = splat(weights[block * 8 + counts[block] - 1])
                    a0 = fma(load(source.data, row), u, a0)
            store(to, at + channel, (a0 + b0) * splat(factor))
            channel += 8


@njit(forceinline=True)
def dot_rows(a, a_at, b, b_at, channels):
    total = zero()
    for channel in range(0, channels, 8):
        total = fma(load(a, a_at + channel), load(b, b_at + channel), total)
    return hsum(total)


@njit(forceinline=True)
def add_bias(logits, count, phi, head, scale, bias, shape):
    """Turn products into logits, in place; the largest of them."""
    largest = splat(MISSING)
    for block in range(count):
        at = block * (1 + shape.features) * 8
        offset = load(phi, at) + splat(bias.position_bias[head])
        logit = fma(load(logits, block * 8), splat(scale), offset)
        for feature in range(shape.features):
            weight = splat(bias.position_weight[head * shape.features + feature])
            logit = fma(load(phi, at + 8 + feature * 8), weight, logit)
        store(logits, block * 8, logit)
        largest = maximum(largest, logit)
    return largest


@njit(forceinline=True)
def power(x):
    """2**x, exactly 0 where it underflows: products with tiny numbers are slow."""
    return where_positive(splat(f32(-126.0)) - x, zero(), exp2(x))


@njit(inline="always")
def attend_chunk(
    chunk, query, value, positions, cluster_index, offsets, bias, scale, shape,
    packed_key, points, output, normal,
):  # fmt: skip
    width = shape.radius * shape.cluster_blocks
    blocks = np.empty(width, np.int64)
    rows = np.empty(width, np.int64)
    counts = np.empty(width, np.int64)
    phi = np.empty(width * (1 + shape.features) * 8, np.float32)
    logits = np.empty((width + SPARE) * 8, np.float32)
    for token in range(chunk * CHUNK, min((chunk + 1) * CHUNK, shape.tokens)):
        count = list_blocks(cluster_index, token, offsets, shape, blocks, rows, counts)
        for block in range(count):
            at = block * (1 + shape.features) * 8
            relate(positions, token, points, blocks[block], shape, phi, at)
        for head in range(shape.heads):
            at = (token * shape.heads + head) * shape.channels
            dot_blocks(query, at, packed_key, head, blocks, count, shape, logits)
            largest = hmax(add_bias(logits, count, phi, head, scale, bias, shape))
            blank_weight = zero()
            if bias.has_blank:
                own = head * shape.channels
                blank = scale * dot_rows(query, at, bias.blank_key, own, shape.channels)
                largest = max(largest, blank)
                blank_weight = power(splat(blank) - splat(largest))
            shift = splat(largest)
            total = blank_weight * splat(f32(0.125))
            for block in range(count):
                weight = power(load(logits, block * 8) - shift)
                store(logits, block * 8, weight)
                total = total + weight
            mass = hsum(total)
            factor = f32(1.0) / mass if mass > 0 else f32(0.0)
            sum_rows(
                logits, rows, counts, count, value, head,
                bias.blank_value, blank_weight, factor, shape, output, at,
            )  # fmt: skip
            normal[2 * (token * shape.heads + head)] = largest
            normal[2 * (token * shape.heads + head) + 1] = factor


@kernel
def attend(
    query, key, value, positions, cluster_index, offsets, bias, scale, shape,
    packed_key, points, output, normal,
):  # fmt: skip
    for cluster in prange(shape.clusters):
        pack_rows(key, cluster, offsets, shape, packed_key)
        pack_positions(positions, cluster, offsets, shape, points)
    for chunk in prange((shape.tokens + CHUNK - 1) // CHUNK):
        attend_chunk(
            chunk, query, value, positions, cluster_index, offsets, bias, scale, shape,
            packed_key, points, output, normal,
        )  # fmt: skip


@njit(forceinline=True)
def add_scaled(weight, source, source_at, target, target_at, channels):
    for channel in range(0, channels, 8):
        total = fma(load(source, source_at + channel), weight, load(target, target_at + channel))
        store(target, target_at + channel, total)


@njit(inline="always")
def query_gradients(
    chunk, grad, query, key, positions, cluster_index, offsets, bias, scale, log2_scale, shape,
    packed_key, packed_value, points, normal, delta, grad_query, partial,
):  # fmt: skip
    """Gradients of a chunk's queries, and its share of those of weight, bias and blank token."""
    width = shape.radius * shape.cluster_blocks
    blocks = np.empty(width, np.int64)
    rows = np.empty(width, np.int64)
    counts = np.empty(width, np.int64)
    phi = np.empty(width * (1 + shape.features) * 8, np.float32)
    logits = np.empty((width + SPARE) * 8, np.float32)
    grad_logits = np.empty((width + SPARE) * 8, np.float32)
    weight_sums = np.zeros(shape.heads * shape.features * 8, np.float32)
    # This chunk's sums: position_weight (H * F), position_bias (H), blank_key, blank_value (H * d).
    bias_at = chunk * partial_size(shape) + shape.heads * shape.features
    key_at = bias_at + shape.heads
    value_at = key_at + shape.heads * shape.channels
    partial[chunk * partial_size(shape) : (chunk + 1) * partial_size(shape)] = f32(0.0)
    for token in range(chunk * CHUNK, min((chunk + 1) * CHUNK, shape.tokens)):
        count = list_blocks(cluster_index, token, offsets, shape, blocks, rows, counts)
        for block in range(count):
            at = block * (1 + shape.features) * 8
            relate(positions, token, points, blocks[block], shape, phi, at)
        for head in range(shape.heads):
            at = (token * shape.heads + head) * shape.channels
            own = head * shape.channels
            dot_blocks(query, at, packed_key, head, blocks, count, shape, logits)
            dot_blocks(grad, at, packed_value, head, blocks, count, shape, grad_logits)
            add_bias(logits, count, phi, head, log2_scale, bias, shape)
            shift = splat(normal[2 * (token * shape.heads + head)])
            factor = splat(normal[2 * (token * shape.heads + head) + 1])
            total = blank = blank_grad = zero()
            if bias.has_blank:
                logit = dot_rows(query, at, bias.blank_key, own, shape.channels) * log2_scale
                blank = power(splat(logit) - shift) * factor
                blank_grad = splat(dot_rows(grad, at, bias.blank_value, own, shape.channels))
                total = blank * blank_grad * splat(f32(0.125))
            for block in range(count):
                weight = power(load(logits, block * 8) - shift) * factor
                store(logits, block * 8, weight)
                total = fma(weight, load(grad_logits, block * 8), total)
            mean = hsum(total)
            delta[token * shape.heads + head] = mean
            for block in range(count):
                change = load(grad_logits, block * 8) - splat(mean)
                store(grad_logits, block * 8, load(logits, block * 8) * change)
            for feature in range(shape.features):
                to = (head * shape.features + feature) * 8
                total = load(weight_sums, to)
                for block in range(count):
                    x = load(phi, (block * (1 + shape.features) + 1 + feature) * 8)
                    total = fma(load(grad_logits, block * 8), x, total)
                store(weight_sums, to, total)
            blank_change = blank * (blank_grad - splat(mean))
            if bias.has_blank:
                # The gradients of a row's logits add up to 0: less rounding than their sum.
                partial[bias_at + head] -= hsum(blank_change) * f32(0.125)
                scaled = blank_change * splat(scale)
                add_scaled(scaled, query, at, partial, key_at + own, shape.channels)
                add_scaled(blank, grad, at, partial, value_at + own, shape.channels)
            sum_rows(
                grad_logits, rows, counts, count, key, head,
                bias.blank_key, blank_change, scale, shape, grad_query, at,
            )  # fmt: skip
    for n in range(shape.heads * shape.features):
        partial[chunk * partial_size(shape) + n] = hsum(load(weight_sums, n * 8))


@njit(forceinline=True)
def partial_size(shape):
    return shape.heads * (shape.features + 1 + 2 * shape.channels)


@njit(forceinline=True)
def dot_queries(query, grad, first, count, queries, head, packed_key, packed_value, block, shape,
                logits, grad_logits):  # fmt: skip
    """Products of queries with a block's keys, of output gradients with its values: (count, 8)."""
    size = shape.heads * shape.channels
    base = (block * shape.heads + head) * shape.channels * 8
    own = head * shape.channels
    for done in range(0, count, 4):
        i0 = queries[first + done] * size + own
        i1 = queries[first + min(done + 1, count - 1)] * size + own
        i2 = queries[first + min(done + 2, count - 1)] * size + own
        i3 = queries[first + min(done + 3, count - 1)] * size + own
        s0 = s1 = s2 = s3 = g0 = g1 = g2 = g3 = zero()
        for channel in range(shape.channels):
            k = load(packed_key, base + channel * 8)
            s0 = fma(k, splat(query[i0 + channel]), s0)
            s1 = fma(k, splat(query[i1 + channel]), s1)
            s2 = fma(k, splat(query[i2 + channel]), s2)
            s3 = fma(k, splat(query[i3 + channel]), s3)
            v = load(packed_value, base + channel * 8)
            g0 = fma(v, splat(grad[i0 + channel]), g0)
            g1 = fma(v, splat(grad[i1 + channel]), g1)
            g2 = fma(v, splat(grad[i2 + channel]), g2)
            g3 = fma(v, splat(grad[i3 + channel]), g3)
        to = done * 8
        store(logits, to, s0)
        store(logits, to + 8, s1)
        store(logits, to + 16, s2)
        store(logits, to + 24, s3)
        store(grad_logits, to, g0)
        store(grad_logits, to + 8, g1)
        store(grad_logits, to + 16, g2)
        store(grad_logits, to + 24, g3)


@njit(forceinline=True)
def add_outer(weights, source, first, count, queries, head, shape, target):
    """`target[head, j]` += the sum over queries of `weights[query, j] * source[query, head]`."""
    size = shape.heads * shape.channels
    for channel in range(0, shape.channels, 8):
        at = head * shape.channels + channel
        to = head * 8 * shape.channels + channel
        a0 = load(target, to)
        a1 = load(target, to + shape.channels)
        a2 = load(target, to + 2 * shape.channels)
        a3 = load(target, to + 3 * shape.channels)
        a4 = load(target, to + 4 * shape.channels)
        a5 = load(target, to + 5 * shape.channels)
        a6 = load(target, to + 6 * shape.channels)
        a7 = load(target, to + 7 * shape.channels)
        for i in range(count):
            x = load(source, queries[first + i] * size + at)
            a0 = fma(splat(weights[i * 8]), x, a0)
            a1 = fma(splat(weights[i * 8 + 1]), x, a1)
            a2 = fma(splat(weights[i * 8 + 2]), x, a2)
            a3 = fma(splat(weights[i * 8 + 3]), x, a3)
            a4 = fma(splat(weights[i * 8 + 4]), x, a4)
            a5 = fma(splat(weights[i * 8 + 5]), x, a5)
            a6 = fma(splat(weights[i * 8 + 6]), x, a6)
            a7 = fma(splat(weights[i * 8 + 7]), x, a7)
        store(target, to, a0)
        store(target, to + shape.channels, a1)
        store(target, to + 2 * shape.channels, a2)
        store(target, to + 3 * shape.channels, a3)
        store(target, to + 4 * shape.channels, a4)
        store(target, to + 5 * shape.channels, a5)
        store(target, to + 6 * shape.channels, a6)
        store(target, to + 7 * shape.channels, a7)


@njit(inline="always")
def key_gradients(
    cluster, grad, query, positions, offsets, inverse_offsets, inverse_queries,
    bias, scale, log2_scale, shape,
    packed_key, packed_value, points, normal, delta, grad_key, grad_value,
):  # fmt: skip
    """Gradients of a cluster's keys and values, from the queries that attend to it."""
    size = shape.heads * shape.channels
    key_sums = np.empty(size * 8, np.float32)
    value_sums = np.empty(size * 8, np.float32)
    phi = np.empty(BATCH * (1 + shape.features) * 8, np.float32)
    logits = np.empty(BATCH * 8, np.float32)
    grad_logits = np.empty(BATCH * 8, np.float32)
    begin, end = inverse_offsets[cluster], inverse_offsets[cluster + 1]
    for part in range(shape.cluster_blocks):
        row = offsets[cluster] + 8 * part
        tokens = min(offsets[cluster + 1] - row, 8)
        if tokens <= 0:
            break
        block = cluster * shape.cluster_blocks + part
        key_sums[:] = f32(0.0)
        value_sums[:] = f32(0.0)
        for first in range(begin, end, BATCH):
            count = min(end - first, BATCH)
            for i in range(count):
                at = i * (1 + shape.features) * 8
                relate(positions, inverse_queries[first + i], points, block, shape, phi, at)
            for head in range(shape.heads):
                dot_queries(
                    query, grad, first, count, inverse_queries, head,
                    packed_key, packed_value, block, shape, logits, grad_logits,
                )  # fmt: skip
                add_bias(logits, count, phi, head, log2_scale, bias, shape)
                for i in range(count):
                    at = inverse_queries[first + i] * shape.heads + head
                    weight = power(load(logits, i * 8) - splat(normal[2 * at]))
                    weight = weight * splat(normal[2 * at + 1])
                    change = load(grad_logits, i * 8) - splat(delta[at])
                    store(logits, i * 8, weight)
                    store(grad_logits, i * 8, weight * change)
                add_outer(grad_logits, query, first, count, inverse_queries, head, shape, key_sums)
                add_outer(logits, grad, first, count, inverse_queries, head, shape, value_sums)
        for head in range(shape.heads):
            for token in range(tokens):
                to = ((row + token) * shape.heads + head) * shape.channels
                at = (head * 8 + token) * shape.channels
                for channel in range(0, shape.channels, 8):
                    store(grad_key, to + channel, load(key_sums, at + channel) * splat(scale))
                    store(grad_value, to + channel, load(value_sums, at + channel))


@kernel
def attend_backward(
    grad, query, key, value, positions, cluster_index, offsets, inverse_offsets, inverse_queries,
    bias, scale, log2_scale, shape, packed_key, packed_value, points, normal, delta,
    grad_query, grad_key, grad_value, partial,
):  # fmt: skip
    for cluster in prange(shape.clusters):
        pack_rows(key, cluster, offsets, shape, packed_key)
        pack_rows(value, cluster, offsets, shape, packed_value)
        pack_positions(positions, cluster, offsets, shape, points)
    for chunk in prange((shape.tokens + CHUNK - 1) // CHUNK):
        query_gradients(
            chunk, grad, query, key, positions, cluster_index, offsets, bias, scale, log2_scale,
            shape, packed_key, packed_value, points, normal, delta, grad_query, partial,
        )  # fmt: skip
    for cluster in prange(shape.clusters):
        key_gradients(
            cluster, grad, query, positions, offsets, inverse_offsets, inverse_queries,
            bias, scale, log2_scale, shape,
            packed_key, packed_value, points, normal, delta, grad_key, grad_value,
        )  # fmt: skip


def _flat(tensor):
    return tensor.detach().float().contiguous().view(-1).numpy()


def _rows(tensor):
    tensor = tensor.detach().float()
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    data = tensor.as_strided((span if tensor.numel() else 0,), (1,)).numpy()
    return Rows(data, tensor.stride(0), tensor.stride(1))


def _bias(position_weight, position_bias, blank_key, blank_value, heads, channels):
    def flat(tensor, size):
        return np.zeros(size, np.float32) if tensor is None else _flat(tensor)

    return Bias(
        flat(position_weight, 0) * LOG2_E,
        flat(position_bias, heads) * LOG2_E,
        flat(blank_key, heads * channels),
        flat(blank_value, heads * channels),
        blank_key is not None,
    )


def _shape(query, positions, cluster_index, cluster_offsets, cluster_size, position_weight):
    return Shape(
        *query.shape,
        dimensions=positions.shape[1],
        features=0 if position_weight is None else position_weight.shape[1],
        radius=cluster_index.shape[1],
        clusters=cluster_offsets.shape[0] - 1,
        cluster_blocks=-(-cluster_size // 8),
    )


def _packed(shape):
    """Memory for a packed (T, H, d) tensor."""
    return np.empty(shape.clusters * shape.cluster_blocks * shape.heads * shape.channels * 8, f32)


def _points(shape):
    return np.empty(shape.clusters * shape.cluster_blocks * (shape.dimensions + 1) * 8, f32)


def make_plan(cluster_index, cluster_offsets, cluster_size, training):
    """See `pointformer.kernels.attention`; entries beyond the last list are 0."""
    if not training:
        return []
    radius = max(cluster_index.shape[1], 1)
    index = cluster_index.contiguous().view(-1).numpy()
    offsets, entries = inverse_lists(index, cluster_offsets.shape[0] - 1)
    queries = np.zeros(len(index), np.int32)
    queries[: len(entries)] = entries // radius
    return [torch.from_numpy(offsets.astype(np.int32)), torch.from_numpy(queries)]


def forward(
    query, key, value, positions, cluster_index, cluster_offsets, cluster_size, plan,
    position_weight, position_bias, blank_key, blank_value, scale,
):  # fmt: skip
    """Output (T, H, d) and the softmax's normalization (T, H, 2)."""
    shape = _shape(query, positions, cluster_index, cluster_offsets, cluster_size, position_weight)
    output = torch.empty(query.shape, dtype=torch.float32)
    normal = torch.empty((*query.shape[:2], 2), dtype=torch.float32)
    attend(
        _flat(query),
        _rows(key),
        _rows(value),
        _flat(positions),
        cluster_index.contiguous().view(-1).numpy(),
        cluster_offsets.numpy(),
        _bias(position_weight, position_bias, blank_key, blank_value, *query.shape[1:]),
        f32(scale * LOG2_E),
        shape,
        _packed(shape),
        _points(shape),
        output.view(-1).numpy(),
        normal.view(-1).numpy(),
    )
    return output.to(query.dtype), normal


def backward(
    grad, output, normal,
    query, key, value, positions, cluster_index, cluster_offsets, cluster_size, plan,
    position_weight, position_bias, blank_key, blank_value, scale,
):  # fmt: skip
    """Gradients of query, key, value, weight, bias and blank tokens; empty ones for what is `None`.

    The softmax does not see a constant added to all logits: without a blank token the gradient of
    `position_bias` is 0.
    """
    shape = _shape(query, positions, cluster_index, cluster_offsets, cluster_size, position_weight)
    inverse = plan or make_plan(cluster_index, cluster_offsets, cluster_size, True)
    rows = [torch.empty(query.shape, dtype=torch.float32) for _ in range(3)]
    chunks = -(-shape.tokens // CHUNK)
    partial = np.empty((chunks, partial_size(shape)), np.float32)
    attend_backward(
        _flat(grad),
        _flat(query),
        _rows(key),
        _rows(value),
        _flat(positions),
        cluster_index.contiguous().view(-1).numpy(),
        cluster_offsets.numpy(),
        *(lists.numpy() for lists in inverse),
        _bias(position_weight, position_bias, blank_key, blank_value, *query.shape[1:]),
        f32(scale),
        f32(scale * LOG2_E),
        shape,
        _packed(shape),
        _packed(shape),
        _points(shape),
        normal.view(-1).numpy(),
        np.empty(shape.tokens * shape.heads, np.float32),
        *(row.view(-1).numpy() for row in rows),
        partial.reshape(-1),
    )
    sums = torch.from_numpy(partial.sum(0, dtype=np.float64).astype(np.float32))
    per_head = (shape.features, 1, shape.channels, shape.channels)
    parts = sums.split([shape.heads * n for n in per_head])
    learned = [
        torch.empty(0) if like is None else part.clone().view(like.shape)
        for part, like in zip(
            parts, (position_weight, position_bias, blank_key, blank_value), strict=True
        )
    ]
    return *(row.to(query.dtype) for row in rows), *learned
