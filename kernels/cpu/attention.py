"""Neighborhood attention on the CPU: fused loops over clusters, eight keys per vector.

Keys are taken in *blocks*: up to eight consecutive tokens of one cluster, of which it has
`ceil(cluster_size / 8)`. A block is first packed so that no vector is loaded twice and few numbers
are spread over one: as *columns* (head, block, d / 2, 8 tokens, 2 channels) for products with a
query, as *rows* (head, block, 2, d, 4 tokens) for sums over tokens, with zeros for missing ones.
Positions are packed as (block, D + 1, 8), where the last row is a mask: 0 for a token, a very low
logit for a missing one. What one head reads for consecutive tokens then lies together and stays in
the fastest cache.

What belongs to a token and its neighborhood lives in scratch memory of a few tokens and is never
written out. Those tokens take every step of the softmax together, because the steps of a single one
would wait for each other. Two blocks share a vector of 16.

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
    add_neighbors,
    exp2,
    f32,
    fma,
    hmax,
    hsum,
    interleave_pairs,
    interleave_quads,
    keep,
    load,
    load16,
    load_pair16,
    load_quad16,
    low8,
    maximum,
    pointer,
    prefetch,
    splat,
    splat16,
    sqrt,
    store,
    where_less,
    where_positive,
    zero,
)

BATCH = 64  # queries of a cluster that the backward pass takes at a time
SPARE = 5  # blocks that scratch memory of logits has beyond those of a neighborhood
CHUNK = 16  # tokens per unit of work; small, so that one small image still fills the threads
GROUP = 8  # tokens that the forward pass takes together
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

    data: np.ndarray  # or a pointer
    token_stride: int
    head_stride: int


class Bias(NamedTuple):
    """What the logits and outputs have besides queries, keys and values; zeros where absent.

    Arrays, or pointers to their elements.
    """

    position_weight: np.ndarray  # (H * F)
    position_bias: np.ndarray  # (H)
    blank_key: np.ndarray  # (H * d)
    blank_value: np.ndarray  # (H * d)
    has_blank: bool


@njit(forceinline=True)
def rows_of(tensor):
    return Rows(pointer(tensor.data), tensor.token_stride, tensor.head_stride)


@njit(forceinline=True)
def bias_of(bias):
    return Bias(
        pointer(bias.position_weight),
        pointer(bias.position_bias),
        pointer(bias.blank_key),
        pointer(bias.blank_value),
        bias.has_blank,
    )


@njit(forceinline=True)
def packed_at(head, block, shape):
    """Where a block starts in a packed tensor."""
    return (head * shape.clusters * shape.cluster_blocks + block) * shape.channels * 8


@njit(forceinline=True)
def pack_columns(tensor, cluster, offsets, shape, packed):
    """Pack the tokens of a cluster; a block without any stays unwritten."""
    for part in range(shape.cluster_blocks):
        first = offsets[cluster] + 8 * part
        count = offsets[cluster + 1] - first
        if count > 0:
            for head in range(shape.heads):
                to = packed_at(head, cluster * shape.cluster_blocks + part, shape)
                at = first * tensor.token_stride + head * tensor.head_stride
                for channel in range(0, shape.channels, 8):
                    interleave_pairs(
                        tensor.data, at + channel, tensor.token_stride, count,
                        packed, to + channel * 8,
                    )  # fmt: skip


@njit(forceinline=True)
def pack_rows(tensor, cluster, offsets, shape, packed):
    """Pack the tokens of a cluster; a block without any stays unwritten."""
    for part in range(shape.cluster_blocks):
        first = offsets[cluster] + 8 * part
        count = offsets[cluster + 1] - first
        if count > 0:
            for head in range(shape.heads):
                to = packed_at(head, cluster * shape.cluster_blocks + part, shape)
                at = first * tensor.token_stride + head * tensor.head_stride
                for half in range(2):
                    rows = max(count - 4 * half, 0)
                    if rows > 0:
                        at += 4 * half * tensor.token_stride
                    for channel in range(0, shape.channels, 8):
                        interleave_quads(
                            tensor.data, at + channel, tensor.token_stride, rows,
                            packed, to + channel * 4,
                        )  # fmt: skip
                    to += 4 * shape.channels


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
def list_blocks(cluster_index, token, offsets, shape, blocks, at):
    """Write the blocks of a token's neighborhood from place `at` of a list; how many."""
    found = at
    for slot in range(token * shape.radius, (token + 1) * shape.radius):
        cluster = cluster_index[slot]
        if cluster >= 0:
            tokens = offsets[cluster + 1] - offsets[cluster]
            for part in range(shape.cluster_blocks):
                if 8 * part < tokens:
                    blocks[found] = cluster * shape.cluster_blocks + part
                    found += 1
    return found - at


@njit(forceinline=True)
def phi_size(count, shape):
    """Scratch memory for the relative positions of `count` blocks: (pair, 1 + F, 2 blocks, 8)."""
    return (count + 1) // 2 * (1 + shape.features) * 16


@njit(forceinline=True)
def phi_at(block, shape):
    """Where the relative positions of a neighborhood's block start; 16 from one to the next."""
    return block // 2 * (1 + shape.features) * 16 + block % 2 * 8


@njit(forceinline=True)
def relate(positions, token, points, block, shape, phi, at):
    """Write the mask and the relative position features of a block: `1 + F` vectors."""
    source = block * (shape.dimensions + 1) * 8
    here = token * shape.dimensions
    x = load(points, source) - splat(positions[here])
    y = load(points, source + 8) - splat(positions[here + 1])
    store(phi, at, load(points, source + shape.dimensions * 8))
    if shape.features == 0:
        return
    store(phi, at + 16, x)
    store(phi, at + 32, y)
    squared = fma(y, y, x * x)
    z = zero()
    if shape.dimensions == 3:
        z = load(points, source + 16) - splat(positions[here + 2])
        store(phi, at + 48, z)
        squared = fma(z, z, squared)
    if shape.features > shape.dimensions:
        distance = sqrt(squared)
        inverse = where_positive(squared, splat(f32(1.0)) / distance, zero())
        if shape.dimensions == 3:
            store(phi, at + 64, distance)
            store(phi, at + 80, x * inverse)
            store(phi, at + 96, y * inverse)
            store(phi, at + 112, z * inverse)
        else:
            store(phi, at + 48, distance)
            store(phi, at + 64, y * inverse)  # the sine comes first
            store(phi, at + 80, x * inverse)


@njit(forceinline=True)
def relate_all(positions, token, points, blocks, first, count, shape, phi, at):
    """`relate` the blocks of a neighborhood; the missing half of its last pair is masked."""
    for block in range(count):
        to = at + phi_at(block, shape)
        relate(positions, token, points, blocks[first + block], shape, phi, to)
    if count % 2:
        to = at + phi_at(count, shape)
        store(phi, to, splat(MISSING))
        for feature in range(shape.features):
            store(phi, to + (1 + feature) * 16, zero())


@njit(forceinline=True)
def dot_blocks(vector, at, packed, head, blocks, first, count, shape, target, to):
    """Products of one head's `vector[at:]` with packed columns: (count, 8) into `target[to:]`.

    Every product has the same order of sums here and in `dot_queries`: the backward pass then finds
    the very logits of the forward pass. Several run at a time to hide their latency; the last ones
    may repeat the last block, so `target` has room for `count + SPARE` blocks.
    """
    last = first + count - 1
    for done in range(0, count, 6):
        b = first + done
        k0 = packed_at(head, blocks[b], shape)
        k1 = packed_at(head, blocks[min(b + 1, last)], shape)
        s0 = s1 = splat16(f32(0.0))
        place = to + done * 8
        if count - done > 2:
            k2 = packed_at(head, blocks[b + 2], shape)
            k3 = packed_at(head, blocks[min(b + 3, last)], shape)
            k4 = packed_at(head, blocks[min(b + 4, last)], shape)
            k5 = packed_at(head, blocks[min(b + 5, last)], shape)
            s2 = s3 = s4 = s5 = splat16(f32(0.0))
            for eight in range(0, shape.channels, 8):
                for channel in range(eight, eight + 8, 2):
                    x = load_pair16(vector, at + channel)
                    e = channel * 8
                    s0 = fma(load16(packed, k0 + e), x, s0)
                    s1 = fma(load16(packed, k1 + e), x, s1)
                    s2 = fma(load16(packed, k2 + e), x, s2)
                    s3 = fma(load16(packed, k3 + e), x, s3)
                    s4 = fma(load16(packed, k4 + e), x, s4)
                    s5 = fma(load16(packed, k5 + e), x, s5)
            store(target, place + 16, add_neighbors(s2, s3))
            store(target, place + 32, add_neighbors(s4, s5))
        else:
            for channel in range(0, shape.channels, 2):
                x = load_pair16(vector, at + channel)
                e = channel * 8
                s0 = fma(load16(packed, k0 + e), x, s0)
                s1 = fma(load16(packed, k1 + e), x, s1)
        store(target, place, add_neighbors(s0, s1))


@njit(forceinline=True)
def sum_rows(
    weights, first_weight, packed, blocks, first, count, head, extra, extra_weight, factor, shape,
    to, at,
):  # fmt: skip
    """`to[at:] = factor * (extra_weight * extra of the head + sum of weights * packed rows)`."""
    extra_at = head * shape.channels
    size = 4 * shape.channels
    for channel in range(0, shape.channels - 15, 16):
        s0 = s1 = s2 = s3 = splat16(f32(0.0))
        for block in range(count):
            row = packed_at(head, blocks[first + block], shape) + channel * 4
            w = load_quad16(weights, first_weight + block * 8)
            s0 = fma(load16(packed, row), w, s0)
            s1 = fma(load16(packed, row + 16), w, s1)
            s2 = fma(load16(packed, row + 32), w, s2)
            s3 = fma(load16(packed, row + 48), w, s3)
            w = load_quad16(weights, first_weight + block * 8 + 4)
            s0 = fma(load16(packed, row + size), w, s0)
            s1 = fma(load16(packed, row + size + 16), w, s1)
            s2 = fma(load16(packed, row + size + 32), w, s2)
            s3 = fma(load16(packed, row + size + 48), w, s3)
        total = add_neighbors(add_neighbors(s0, s1), add_neighbors(s2, s3))
        total = fma(splat16(extra_weight), load16(extra, extra_at + channel), total)
        store(to, at + channel, total * splat16(factor))
    if shape.channels % 16:
        channel = shape.channels - 8
        s0 = s1 = splat16(f32(0.0))
        for block in range(count):
            row = packed_at(head, blocks[first + block], shape) + channel * 4
            w = load_quad16(weights, first_weight + block * 8)
            s0 = fma(load16(packed, row), w, s0)
            s1 = fma(load16(packed, row + 16), w, s1)
            w = load_quad16(weights, first_weight + block * 8 + 4)
            s0 = fma(load16(packed, row + size), w, s0)
            s1 = fma(load16(packed, row + size + 16), w, s1)
        pairs = add_neighbors(s0, s1)
        total = low8(add_neighbors(pairs, pairs))
        total = fma(splat(extra_weight), load(extra, extra_at + channel), total)
        store(to, at + channel, total * splat(factor))


@njit(forceinline=True)
def dot_rows(a, a_at, b, b_at, channels):
    total = zero()
    for channel in range(0, channels, 8):
        total = fma(load(a, a_at + channel), load(b, b_at + channel), total)
    return hsum(total)


@njit(forceinline=True)
def add_bias(logits, at, count, phi, phi_first, head, scale, bias, shape):
    """Turn the products of `count` blocks into logits, in place; the largest of them."""
    largest = splat16(MISSING)
    for pair in range((count + 1) // 2):
        features = phi_first + pair * (1 + shape.features) * 16
        offset = load16(phi, features) + splat16(bias.position_bias[head])
        logit = fma(load16(logits, at + pair * 16), splat16(scale), offset)
        for feature in range(shape.features):
            weight = splat16(bias.position_weight[head * shape.features + feature])
            logit = fma(load16(phi, features + (1 + feature) * 16), weight, logit)
        store(logits, at + pair * 16, logit)
        largest = maximum(largest, logit)
    return hmax(largest)


@njit(forceinline=True)
def power(x, low, nothing):
    """2**x, exactly 0 where it underflows: products with tiny numbers are slow."""
    return where_less(x, low, nothing, exp2(x))


@njit(forceinline=True)
def power16(x):
    return power(x, splat16(f32(-126.0)), splat16(f32(0.0)))


@njit(forceinline=True)
def power8(x):
    return power(x, splat(f32(-126.0)), zero())


@njit(inline="always")
def attend_chunk(
    chunk, query, positions, cluster_index, offsets, bias, scale, shape,
    packed_key, packed_value, points, output, normal,
):  # fmt: skip
    width = shape.radius * shape.cluster_blocks
    length = (width + SPARE) * 8
    lists = np.empty(GROUP * (width + 1), np.int64)
    vectors = np.zeros(GROUP * (phi_size(width, shape) + length + 3), np.float32)
    blocks = pointer(lists)
    counts = pointer(lists[GROUP * width :])
    phi = pointer(vectors)
    logits = pointer(vectors[GROUP * phi_size(width, shape) :])
    # Of each token of the group:
    largest = pointer(vectors[-3 * GROUP :])
    blank = pointer(vectors[-2 * GROUP :])  # its logit, then weight
    mass = pointer(vectors[-GROUP:])  # sum of the weights, then its inverse
    end = min((chunk + 1) * CHUNK, shape.tokens)
    for first in range(chunk * CHUNK, end, GROUP):
        tokens = min(GROUP, end - first)
        for i in range(tokens):
            counts[i] = list_blocks(cluster_index, first + i, offsets, shape, blocks, i * width)
            at = i * phi_size(width, shape)
            relate_all(positions, first + i, points, blocks, i * width, counts[i], shape, phi, at)
        for head in range(shape.heads):
            own = head * shape.channels
            for i in range(tokens):
                at = ((first + i) * shape.heads + head) * shape.channels
                # Queries are far apart: without this, every first use waits for memory.
                soon = at + shape.channels
                if head == shape.heads - 1:
                    soon = (first + i + GROUP) * shape.heads * shape.channels
                for channel in range(0, shape.channels, 16):
                    prefetch(query, soon + channel)
                dot_blocks(
                    query, at, packed_key, head, blocks, i * width, counts[i], shape,
                    logits, i * length,
                )  # fmt: skip
            for i in range(tokens):
                at = i * phi_size(width, shape)
                highest = add_bias(logits, i * length, counts[i], phi, at, head, scale, bias, shape)
                if bias.has_blank:
                    at = ((first + i) * shape.heads + head) * shape.channels
                    logit = scale * dot_rows(query, at, bias.blank_key, own, shape.channels)
                    highest = max(highest, logit)
                    blank[i] = logit
                largest[i] = highest
            if bias.has_blank:
                store(blank, 0, power8(load(blank, 0) - load(largest, 0)))
            for i in range(tokens):
                shift = splat16(largest[i])
                total = splat16(f32(0.0))
                for pair in range((counts[i] + 1) // 2):
                    at = i * length + pair * 16
                    weight = power16(load16(logits, at) - shift)
                    store(logits, at, weight)
                    total = total + weight
                mass[i] = hsum(total) + blank[i]
            total = load(mass, 0)
            store(mass, 0, where_positive(total, splat(f32(1.0)) / total, zero()))
            for i in range(tokens):
                row = (first + i) * shape.heads + head
                sum_rows(
                    logits, i * length, packed_value, blocks, i * width, counts[i], head,
                    bias.blank_value, blank[i], mass[i], shape,
                    output, row * shape.channels,
                )  # fmt: skip
                normal[2 * row] = largest[i]
                normal[2 * row + 1] = mass[i]
    keep(lists)
    keep(vectors)


@kernel
def attend(
    query, key, value, positions, cluster_index, offsets, bias, scale, shape,
    packed_key, packed_value, points, output, normal,
):  # fmt: skip
    for cluster in prange(shape.clusters):
        ends = pointer(offsets)
        pack_columns(rows_of(key), cluster, ends, shape, pointer(packed_key))
        pack_rows(rows_of(value), cluster, ends, shape, pointer(packed_value))
        pack_positions(pointer(positions), cluster, ends, shape, pointer(points))
    for chunk in prange((shape.tokens + CHUNK - 1) // CHUNK):
        attend_chunk(
            chunk, pointer(query), pointer(positions), pointer(cluster_index), pointer(offsets),
            bias_of(bias), scale, shape, pointer(packed_key), pointer(packed_value),
            pointer(points), pointer(output), pointer(normal),
        )  # fmt: skip


@njit(forceinline=True)
def add_scaled(weight, source, source_at, target, target_at, channels):
    for channel in range(0, channels, 8):
        total = fma(load(source, source_at + channel), weight, load(target, target_at + channel))
        store(target, target_at + channel, total)


@njit(inline="always")
def query_gradients(
    chunk, grad, query, positions, cluster_index, offsets, bias, scale, log2_scale, shape,
    packed_key, key_rows, packed_value, points, normal, delta, grad_query, partial,
):  # fmt: skip
    """Gradients of a chunk's queries, and its share of those of weight, bias and blank token."""
    width = shape.radius * shape.cluster_blocks
    length = (width + SPARE) * 8
    sums = shape.heads * shape.features * 16
    lists = np.empty(width, np.int64)
    vectors = np.zeros(sums + 2 * length + phi_size(width, shape), np.float32)
    blocks = pointer(lists)
    weight_sums = pointer(vectors)
    logits = pointer(vectors[sums:])
    grad_logits = pointer(vectors[sums + length :])
    phi = pointer(vectors[sums + 2 * length :])
    # This chunk's sums: position_weight (H * F), position_bias (H), blank_key, blank_value (H * d).
    bias_at = chunk * partial_size(shape) + shape.heads * shape.features
    key_at = bias_at + shape.heads
    value_at = key_at + shape.heads * shape.channels
    for n in range(chunk * partial_size(shape), (chunk + 1) * partial_size(shape)):
        partial[n] = f32(0.0)
    for token in range(chunk * CHUNK, min((chunk + 1) * CHUNK, shape.tokens)):
        count = list_blocks(cluster_index, token, offsets, shape, blocks, 0)
        relate_all(positions, token, points, blocks, 0, count, shape, phi, 0)
        for head in range(shape.heads):
            at = (token * shape.heads + head) * shape.channels
            own = head * shape.channels
            dot_blocks(query, at, packed_key, head, blocks, 0, count, shape, logits, 0)
            dot_blocks(grad, at, packed_value, head, blocks, 0, count, shape, grad_logits, 0)
            add_bias(logits, 0, count, phi, 0, head, log2_scale, bias, shape)
            shift = normal[2 * (token * shape.heads + head)]
            factor = normal[2 * (token * shape.heads + head) + 1]
            blank = blank_grad = f32(0.0)
            if bias.has_blank:
                logit = dot_rows(query, at, bias.blank_key, own, shape.channels) * log2_scale
                blank = hmax(power8(splat(logit) - splat(shift))) * factor
                blank_grad = dot_rows(grad, at, bias.blank_value, own, shape.channels)
            total = splat16(f32(0.0))
            for pair in range((count + 1) // 2):
                weight = power16(load16(logits, pair * 16) - splat16(shift)) * splat16(factor)
                store(logits, pair * 16, weight)
                total = fma(weight, load16(grad_logits, pair * 16), total)
            mean = hsum(total) + blank * blank_grad
            delta[token * shape.heads + head] = mean
            for pair in range((count + 1) // 2):
                change = load16(grad_logits, pair * 16) - splat16(mean)
                store(grad_logits, pair * 16, load16(logits, pair * 16) * change)
            for feature in range(shape.features):
                to = (head * shape.features + feature) * 16
                total = load16(weight_sums, to)
                for pair in range((count + 1) // 2):
                    x = load16(phi, (pair * (1 + shape.features) + 1 + feature) * 16)
                    total = fma(load16(grad_logits, pair * 16), x, total)
                store(weight_sums, to, total)
            blank_change = blank * (blank_grad - mean)
            if bias.has_blank:
                # The gradients of a row's logits add up to 0: less rounding than their sum.
                partial[bias_at + head] -= blank_change
                scaled = splat(blank_change * scale)
                add_scaled(scaled, query, at, partial, key_at + own, shape.channels)
                add_scaled(splat(blank), grad, at, partial, value_at + own, shape.channels)
            sum_rows(
                grad_logits, 0, key_rows, blocks, 0, count, head,
                bias.blank_key, blank_change, scale, shape, grad_query, at,
            )  # fmt: skip
    for n in range(shape.heads * shape.features):
        partial[chunk * partial_size(shape) + n] = hsum(load16(weight_sums, n * 16))
    keep(lists)
    keep(vectors)


@njit(forceinline=True)
def partial_size(shape):
    return shape.heads * (shape.features + 1 + 2 * shape.channels)


@njit(forceinline=True)
def dot_queries(query, grad, first, count, queries, head, packed_key, packed_value, block, shape,
                logits, grad_logits):  # fmt: skip
    """Products of queries with a block's keys, of output gradients with its values: (count, 8)."""
    size = shape.heads * shape.channels
    base = packed_at(head, block, shape)
    own = head * shape.channels
    for done in range(0, count, 4):
        i0 = queries[first + done] * size + own
        i1 = queries[first + min(done + 1, count - 1)] * size + own
        i2 = queries[first + min(done + 2, count - 1)] * size + own
        i3 = queries[first + min(done + 3, count - 1)] * size + own
        s0 = s1 = s2 = s3 = g0 = g1 = g2 = g3 = splat16(f32(0.0))
        for channel in range(0, shape.channels, 2):
            k = load16(packed_key, base + channel * 8)
            s0 = fma(k, load_pair16(query, i0 + channel), s0)
            s1 = fma(k, load_pair16(query, i1 + channel), s1)
            s2 = fma(k, load_pair16(query, i2 + channel), s2)
            s3 = fma(k, load_pair16(query, i3 + channel), s3)
            v = load16(packed_value, base + channel * 8)
            g0 = fma(v, load_pair16(grad, i0 + channel), g0)
            g1 = fma(v, load_pair16(grad, i1 + channel), g1)
            g2 = fma(v, load_pair16(grad, i2 + channel), g2)
            g3 = fma(v, load_pair16(grad, i3 + channel), g3)
        to = done * 8
        store(logits, to, add_neighbors(s0, s1))
        store(logits, to + 16, add_neighbors(s2, s3))
        store(grad_logits, to, add_neighbors(g0, g1))
        store(grad_logits, to + 16, add_neighbors(g2, g3))


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
    vectors = np.zeros(16 * size + 16 * BATCH + phi_size(BATCH, shape), np.float32)
    key_sums = pointer(vectors)
    value_sums = pointer(vectors[8 * size :])
    logits = pointer(vectors[16 * size :])
    grad_logits = pointer(vectors[16 * size + 8 * BATCH :])
    phi = pointer(vectors[16 * size + 16 * BATCH :])
    begin, end = inverse_offsets[cluster], inverse_offsets[cluster + 1]
    for part in range(shape.cluster_blocks):
        row = offsets[cluster] + 8 * part
        tokens = min(offsets[cluster + 1] - row, 8)
        if tokens <= 0:
            break
        block = cluster * shape.cluster_blocks + part
        for n in range(0, 8 * size, 8):
            store(key_sums, n, zero())
            store(value_sums, n, zero())
        for first in range(begin, end, BATCH):
            count = min(end - first, BATCH)
            for i in range(count):
                at = phi_at(i, shape)
                relate(positions, inverse_queries[first + i], points, block, shape, phi, at)
            for head in range(shape.heads):
                dot_queries(
                    query, grad, first, count, inverse_queries, head,
                    packed_key, packed_value, block, shape, logits, grad_logits,
                )  # fmt: skip
                add_bias(logits, 0, count, phi, 0, head, log2_scale, bias, shape)
                for i in range(count):
                    at = inverse_queries[first + i] * shape.heads + head
                    weight = power8(load(logits, i * 8) - splat(normal[2 * at]))
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
    keep(vectors)


@kernel
def attend_backward(
    grad, query, key, value, positions, cluster_index, offsets, inverse_offsets, inverse_queries,
    bias, scale, log2_scale, shape, packed_key, key_rows, packed_value, points, normal, delta,
    grad_query, grad_key, grad_value, partial,
):  # fmt: skip
    for cluster in prange(shape.clusters):
        ends = pointer(offsets)
        pack_columns(rows_of(key), cluster, ends, shape, pointer(packed_key))
        pack_rows(rows_of(key), cluster, ends, shape, pointer(key_rows))
        pack_columns(rows_of(value), cluster, ends, shape, pointer(packed_value))
        pack_positions(pointer(positions), cluster, ends, shape, pointer(points))
    for chunk in prange((shape.tokens + CHUNK - 1) // CHUNK):
        query_gradients(
            chunk, pointer(grad), pointer(query), pointer(positions), pointer(cluster_index),
            pointer(offsets), bias_of(bias), scale, log2_scale, shape, pointer(packed_key),
            pointer(key_rows), pointer(packed_value), pointer(points), pointer(normal),
            pointer(delta), pointer(grad_query), pointer(partial),
        )  # fmt: skip
    for cluster in prange(shape.clusters):
        key_gradients(
            cluster, pointer(grad), pointer(query), pointer(positions), pointer(offsets),
            pointer(inverse_offsets), pointer(inverse_queries), bias_of(bias), scale, log2_scale,
            shape, pointer(packed_key), pointer(packed_value), pointer(points), pointer(normal),
            pointer(delta), pointer(grad_key), pointer(grad_value),
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
