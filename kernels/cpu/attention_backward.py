"""Neighborhood attention on the CPU, the backward pass, in two loops without races.

Over the queries: their gradients, the mean gradient of each row's logits, and a share of the
gradients of what is learned. Over the clusters: the gradients of their keys and values, from the
queries that attend to them.
"""

import numpy as np
import torch
from numba import njit, prange

from pointformer.kernels.cpu.attention_blocks import (
    CHUNK,
    LOG2_E,
    SPARE,
    add_bias,
    as_bias,
    as_rows,
    bias_of,
    dot_blocks,
    dot_rows,
    empty_packed,
    empty_points,
    flat,
    list_blocks,
    pack,
    pack_positions,
    packed_at,
    phi_at,
    phi_size,
    power8,
    power16,
    relate,
    relate_all,
    rows_of,
    shape_of,
    sum_rows,
)
from pointformer.kernels.cpu.inverse import inverse_lists
from pointformer.kernels.cpu.runtime import inlined, kernel
from pointformer.kernels.cpu.simd import (
    add_neighbors,
    advance,
    allocate,
    as_int64,
    f32,
    fma,
    free,
    hmax,
    hsum,
    load,
    load16,
    load_pair16,
    pointer,
    splat,
    splat16,
    store,
    zero,
)

BATCH = 64  # queries of a cluster that the backward pass takes at a time


@inlined
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
    width = shape.per_query * shape.cluster_blocks
    length = (width + SPARE) * 8
    sums = shape.heads * shape.features * 16
    lists = allocate(2 * width)
    blocks = as_int64(lists)
    weight_sums = allocate(sums + 2 * length + phi_size(width, shape))
    logits = advance(weight_sums, sums)
    grad_logits = advance(logits, length)
    phi = advance(grad_logits, length)
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
    free(lists)
    free(weight_sums)


@inlined
def partial_size(shape):
    return shape.heads * (shape.features + 1 + 2 * shape.channels)


@inlined
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


@inlined
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
    key_sums = allocate(16 * size + 16 * BATCH + phi_size(BATCH, shape))
    value_sums = advance(key_sums, 8 * size)
    logits = advance(value_sums, 8 * size)
    grad_logits = advance(logits, 8 * BATCH)
    phi = advance(grad_logits, 8 * BATCH)
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
    free(key_sums)


@kernel
def attend_backward(
    grad, query, key, value, positions, cluster_index, offsets, inverse_offsets, inverse_queries,
    bias, scale, log2_scale, shape, packed_key, key_rows, packed_value, points, normal, delta,
    grad_query, grad_key, grad_value, partial,
):  # fmt: skip
    for cluster in prange(shape.clusters):
        ends = pointer(offsets)
        pack(rows_of(key), cluster, ends, shape, pointer(packed_key), True)
        pack(rows_of(key), cluster, ends, shape, pointer(key_rows), False)
        pack(rows_of(value), cluster, ends, shape, pointer(packed_value), True)
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


def make_plan(cluster_index, cluster_offsets, cluster_size, training, copies=1):
    """See `pointformer.kernels.attention`; entries beyond the last list are 0."""
    if not training:
        return []
    per_query = max(cluster_index.shape[1], 1)
    index = cluster_index.contiguous().view(-1).numpy()
    clusters, rows = (cluster_offsets.shape[0] - 1) // copies, len(cluster_index) // copies
    offsets, entries = inverse_lists(index[: len(index) // copies], clusters)
    ahead = np.arange(copies, dtype=np.int32)[:, None]
    begins = np.empty(copies * clusters + 1, np.int32)
    begins[:-1] = (ahead * len(entries) + offsets[:-1].astype(np.int32)).ravel()
    begins[-1] = copies * len(entries)
    queries = np.zeros(len(index), np.int32)
    listed = (entries // per_query).astype(np.int32)
    queries[: copies * len(entries)] = (ahead * np.int32(rows) + listed).ravel()
    return [torch.from_numpy(begins), torch.from_numpy(queries)]


def backward(
    grad, output, normal,
    query, key, value, positions, cluster_index, cluster_offsets, cluster_size, plan,
    position_weight, position_bias, blank_key, blank_value, scale,
):  # fmt: skip
    """Gradients of query, key, value, weight, bias and blank tokens; empty ones for what is `None`.

    The softmax does not see a constant added to all logits: without a blank token the gradient of
    `position_bias` is 0.
    """
    shape = shape_of(
        query, positions, cluster_index, cluster_offsets, cluster_size, position_weight
    )
    inverse = plan or make_plan(cluster_index, cluster_offsets, cluster_size, True)
    rows = [torch.empty(query.shape, dtype=torch.float32) for _ in range(3)]
    chunks = -(-shape.tokens // CHUNK)
    partial = np.empty((chunks, partial_size(shape)), np.float32)
    attend_backward(
        flat(grad),
        flat(query),
        as_rows(key),
        as_rows(value),
        flat(positions),
        cluster_index.contiguous().view(-1).numpy(),
        cluster_offsets.contiguous().numpy(),
        *(lists.numpy() for lists in inverse),
        as_bias(position_weight, position_bias, blank_key, blank_value, *query.shape[1:]),
        f32(scale),
        f32(scale * LOG2_E),
        shape,
        empty_packed(shape),
        empty_packed(shape),
        empty_packed(shape),
        empty_points(shape),
        normal.view(-1).numpy(),
        np.empty(shape.tokens * shape.heads, np.float32),
        *(row.view(-1).numpy() for row in rows),
        partial.reshape(-1),
    )
    sums = torch.from_numpy(partial.sum(0, dtype=np.float64).astype(np.float32))
    per_head = (shape.features, 1, shape.channels, shape.channels)
    parts = sums.split([shape.heads * n for n in per_head])
    learned = [
        torch.empty(0) if like is None else part.clone().view(like.shape).to(like.dtype)
        for part, like in zip(
            parts, (position_weight, position_bias, blank_key, blank_value), strict=True
        )
    ]
    return *(row.to(query.dtype) for row in rows), *learned
