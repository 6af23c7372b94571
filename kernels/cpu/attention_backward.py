"""Neighborhood attention on the CPU, the backward pass, in two loops without races.

Over the queries: their gradients, and a share of the gradients of what is learned. Over the
clusters: the gradients of their keys and values, from the queries that attend to them. Both take a
tile of queries at a time, so that the softmax's weights and the gradients of the logits, which the
first loop leaves to the second, stay in a cache.
"""

import numpy as np
import torch
from numba import njit, prange

from pointformer.kernels.cpu.attention_blocks import (
    CHUNK,
    FEW,
    GROUP,
    LOG2_E,
    SPARE,
    as_bias,
    as_rows,
    bias_of,
    dot_blocks,
    empty_packed,
    empty_packed_values,
    empty_points,
    feature_block,
    flat,
    list_blocks,
    list_size,
    listed_values,
    pack,
    pack_positions,
    phi_size,
    prefetch_next,
    relate_all,
    rows_of,
    shape_of,
    sum_rows,
)
from pointformer.kernels.cpu.attention_gradients import (
    BATCH,
    add_weight_sums,
    clear_partial,
    clear_rows,
    list_active,
    partial_size,
    row_gradients,
    shared_at,
    shared_size,
)
from pointformer.kernels.cpu.attention_lists import attend_lists_backward
from pointformer.kernels.cpu.inverse import inverse_lists
from pointformer.kernels.cpu.runtime import inlined, kernel
from pointformer.kernels.cpu.simd import (
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
    zero,
)

TILE_FLOATS = 1 << 17  # at most how many weights and gradients of logits there are at a time


@njit(inline="always")
def query_gradients(
    chunk, grad, query, query_positions, cluster_index, offsets, bias, scale, log2_scale, shape,
    packed_key, key_rows, packed_value, points, normal, grad_query, partial, tile_first, shared,
):  # fmt: skip
    """Gradients of a chunk's queries, and its share of those of what is learned."""
    width = list_size(shape)
    length = (width + SPARE) * 8
    sums = shape.heads * shape.features * 16
    lists = allocate(2 * GROUP * (width + 1))
    blocks = as_int64(lists)
    counts = advance(blocks, GROUP * width)
    weight_sums = allocate(sums + 2 * length + GROUP * phi_size(width, shape) + 8)
    logits = advance(weight_sums, sums)
    grad_logits = advance(logits, length)
    phi = advance(grad_logits, length)
    moments = advance(phi, GROUP * phi_size(width, shape))
    clear_partial(chunk, shape, partial)
    end = min((chunk + 1) * CHUNK, shape.tokens)
    for group in range(chunk * CHUNK, end, GROUP):
        tokens = min(GROUP, end - group)
        for i in range(tokens):
            first = i * width
            counts[i] = list_blocks(cluster_index, group + i, offsets, shape, blocks, first)
            at = i * phi_size(width, shape)
            relate_all(query_positions, group + i, points, blocks, first, counts[i], shape, phi, at)
        # One head after the other: what it reads of keys and values stays in the fastest cache.
        for row in range(shape.heads * tokens):
            head, i = row // tokens, row % tokens
            token, count, first = group + i, counts[i], i * width
            at = token * grad.token_stride + head * grad.head_stride
            query_at = token * query.token_stride + head * query.head_stride
            features = i * phi_size(width, shape)
            weights = shared_at(token, tile_first, shape) + head * shared_size(shape)
            changes = weights + shared_size(shape) // 2
            prefetch_next(query, token, head, shape)
            prefetch_next(grad, token, head, shape)
            dot_blocks(
                query.data, query_at, packed_key, head, blocks, first, count, shape, logits, 0
            )
            if shape.feature_blocks:
                blocks[first + count] = feature_block(head, shape)
            dot_blocks(
                grad.data, at, packed_value, head, blocks, first, count + shape.feature_blocks,
                shape, grad_logits, 0,
            )  # fmt: skip
            blank_change = row_gradients(
                chunk, token, head, grad, query, bias, scale, log2_scale, shape, normal, count,
                logits, grad_logits, grad_logits, count * 8, phi, features,
                shared, weights, weight_sums, moments, partial,
            )  # fmt: skip
            sum_rows(
                shared, changes, key_rows, blocks, first, count, head,
                bias.blank_key, blank_change, scale, shape,
                grad_query, (token * shape.heads + head) * shape.channels,
            )  # fmt: skip
    add_weight_sums(chunk, shape, weight_sums, partial)
    free(lists)
    free(weight_sums)


@inlined
def first_block(cluster_index, entry, offsets, shape):
    """Place of the first block of a listed cluster in what `list_blocks` makes of the list."""
    place = 0
    for slot in range(entry - entry % shape.per_query, entry):
        other = cluster_index[slot]
        if 0 <= other < shape.clusters:
            place += (offsets[other + 1] - offsets[other] + 7) // 8
    return place


@inlined
def add_outer(
    weights, weights_at, ahead, source, stride, source_at, queries, count, channels,
    target, target_at,
):  # fmt: skip
    """Add to eight rows of `target` the sum over queries of their eight weights times their row of
    `source`. The weights of query i start at `weights_at[i] + ahead`."""
    for channel in range(0, channels, 8):
        at = source_at + channel
        to = target_at + channel
        a0 = load(target, to)
        a1 = load(target, to + channels)
        a2 = load(target, to + 2 * channels)
        a3 = load(target, to + 3 * channels)
        a4 = load(target, to + 4 * channels)
        a5 = load(target, to + 5 * channels)
        a6 = load(target, to + 6 * channels)
        a7 = load(target, to + 7 * channels)
        for i in range(count):
            x = load(source, queries[i] * stride + at)
            w = weights_at[i] + ahead
            a0 = fma(splat(weights[w]), x, a0)
            a1 = fma(splat(weights[w + 1]), x, a1)
            a2 = fma(splat(weights[w + 2]), x, a2)
            a3 = fma(splat(weights[w + 3]), x, a3)
            a4 = fma(splat(weights[w + 4]), x, a4)
            a5 = fma(splat(weights[w + 5]), x, a5)
            a6 = fma(splat(weights[w + 6]), x, a6)
            a7 = fma(splat(weights[w + 7]), x, a7)
        store(target, to, a0)
        store(target, to + channels, a1)
        store(target, to + 2 * channels, a2)
        store(target, to + 3 * channels, a3)
        store(target, to + 4 * channels, a4)
        store(target, to + 5 * channels, a5)
        store(target, to + 6 * channels, a6)
        store(target, to + 7 * channels, a7)


@njit(inline="always")
def key_gradients(
    cluster, grad, query, cluster_index, offsets, begin, end, entries, scale, shape,
    tile_first, shared, anew, grad_key, grad_value,
):  # fmt: skip
    """Gradients of a cluster's keys and values from a tile's queries, written `anew` or added to
    those of tiles before."""
    size = shape.heads * shape.channels
    key_sums = allocate(16 * size + 4 * BATCH)
    value_sums = advance(key_sums, 8 * size)
    queries = as_int64(advance(value_sums, 8 * size))
    places = advance(queries, BATCH)
    for part in range(shape.cluster_blocks):
        row = offsets[cluster] + 8 * part
        tokens = min(offsets[cluster + 1] - row, 8)
        if tokens <= 0:
            break
        for n in range(0, 8 * size, 8):
            store(key_sums, n, zero())
            store(value_sums, n, zero())
        for first in range(begin, end, BATCH):
            count = min(end - first, BATCH)
            for i in range(count):
                entry = entries[first + i]
                block = first_block(cluster_index, entry, offsets, shape) + part
                queries[i] = entry // shape.per_query
                places[i] = shared_at(queries[i], tile_first, shape) + block * 8
            for head in range(shape.heads):
                own = head * shape.channels
                weights = head * shared_size(shape)
                add_outer(
                    shared, places, weights + shared_size(shape) // 2,
                    query.data, query.token_stride, head * query.head_stride,
                    queries, count, shape.channels, key_sums, 8 * own,
                )  # fmt: skip
                add_outer(
                    shared, places, weights,
                    grad.data, grad.token_stride, head * grad.head_stride,
                    queries, count, shape.channels, value_sums, 8 * own,
                )  # fmt: skip
        for head in range(shape.heads):
            for token in range(tokens):
                to = ((row + token) * shape.heads + head) * shape.channels
                at = (head * 8 + token) * shape.channels
                for channel in range(0, shape.channels, 8):
                    key_sum = load(key_sums, at + channel) * splat(scale)
                    value_sum = load(value_sums, at + channel)
                    if not anew:
                        key_sum = key_sum + load(grad_key, to + channel)
                        value_sum = value_sum + load(grad_value, to + channel)
                    store(grad_key, to + channel, key_sum)
                    store(grad_value, to + channel, value_sum)
    free(key_sums)


@kernel
def attend_backward(
    grad, query, key, value, query_positions, positions, cluster_index, offsets,
    inverse_offsets, entries,
    bias, scale, log2_scale, shape, packed_key, key_rows, packed_value, points, normal,
    grad_query, grad_key, grad_value, partial, tile_chunks, shared, begins, ends, active,
):  # fmt: skip
    for cluster in prange(shape.clusters):
        rows = pointer(offsets)
        pack(rows_of(key), cluster, rows, shape, pointer(packed_key), True)
        pack(rows_of(key), cluster, rows, shape, pointer(key_rows), False)
        pack(rows_of(value), cluster, rows, shape, pointer(packed_value), True)
        pack_positions(pointer(positions), cluster, rows, shape, pointer(points))
        begins[cluster] = ends[cluster] = inverse_offsets[cluster]
        if inverse_offsets[cluster] == inverse_offsets[cluster + 1]:
            clear_rows(
                rows[cluster], rows[cluster + 1], shape.heads * shape.channels,
                pointer(grad_key), pointer(grad_value),
            )  # fmt: skip
    chunks = (shape.tokens + CHUNK - 1) // CHUNK
    for first_chunk in range(0, chunks, tile_chunks):
        for chunk in prange(first_chunk, min(first_chunk + tile_chunks, chunks)):
            query_gradients(
                chunk, rows_of(grad), rows_of(query), pointer(query_positions),
                pointer(cluster_index), pointer(offsets), bias_of(bias), scale, log2_scale, shape,
                pointer(packed_key), pointer(key_rows), pointer(packed_value), pointer(points),
                pointer(normal), pointer(grad_query), pointer(partial), first_chunk * CHUNK,
                pointer(shared),
            )  # fmt: skip
        # A tile's queries are near each other, and so are their clusters: threads that each took
        # a range of all clusters would wait for the one that has these.
        first = first_chunk * CHUNK * shape.per_query
        last = min((first_chunk + tile_chunks) * CHUNK, shape.tokens) * shape.per_query
        count = list_active(
            pointer(cluster_index), first, last, shape, pointer(begins), pointer(ends),
            pointer(active),
        )  # fmt: skip
        for n in prange(count):
            cluster = active[n]
            begin = begins[cluster]
            key_gradients(
                cluster, rows_of(grad), rows_of(query), pointer(cluster_index),
                pointer(offsets), begin, ends[cluster], pointer(entries), scale, shape,
                first_chunk * CHUNK, pointer(shared), begin == inverse_offsets[cluster],
                pointer(grad_key), pointer(grad_value),
            )  # fmt: skip
            begins[cluster] = ends[cluster]


def make_plan(cluster_index, cluster_offsets, cluster_size, training, copies=1):
    """See `pointformer.kernels.attention`; entries beyond the last list are 0."""
    if not training:
        return []
    index = cluster_index.contiguous().view(-1).numpy()
    if index.size > np.iinfo(np.int32).max:
        raise ValueError(
            f"neighborhoods: {index.size} listed clusters, more than 32 bits can count"
        )
    clusters, own = (cluster_offsets.shape[0] - 1) // copies, index.size // copies
    offsets, entries = inverse_lists(index[:own], clusters)
    offsets, entries = offsets.astype(np.int32), entries.astype(np.int32)
    ahead = np.arange(copies, dtype=np.int32)[:, None]
    begins = np.empty(copies * clusters + 1, np.int32)
    begins[:-1] = (ahead * len(entries) + offsets[:-1]).ravel()
    begins[-1] = copies * len(entries)
    listed = np.zeros(index.size, np.int32)
    listed[: copies * len(entries)] = (ahead * own + entries).ravel()
    return [torch.from_numpy(begins), torch.from_numpy(listed)]


def backward(
    grad, output, normal,
    query, key, value, query_positions, positions, cluster_index, cluster_offsets, cluster_size,
    plan, position_weight, position_bias, position_value, blank_key, blank_value, scale,
):  # fmt: skip
    """Gradients of query, key, value and what is learned; empty ones for what is `None`.

    The softmax does not see a constant added to all logits: without a blank token the gradient of
    `position_bias` is 0.
    """
    shape = shape_of(
        query, positions, cluster_index, cluster_offsets, cluster_size,
        position_weight, position_value,
    )  # fmt: skip
    inverse = plan or make_plan(cluster_index, cluster_offsets, cluster_size, True)
    rows = [torch.empty(x.shape, dtype=torch.float32) for x in (query, key, value)]
    chunks = -(-shape.tokens // CHUNK)
    partial = np.empty((chunks, partial_size(shape)), np.float32)
    per_chunk = CHUNK * shape.heads * shared_size(shape)
    # A power of two, for threads that share them evenly.
    tile_chunks = 1 << max(TILE_FLOATS // max(per_chunk, 1), 1).bit_length() - 1
    per_tile = min(shape.clusters, tile_chunks * CHUNK * shape.per_query)
    arrays = (
        as_rows(grad),
        as_rows(query),
        as_rows(key),
        as_rows(value),
        flat(query_positions),
        flat(positions),
        cluster_index.contiguous().view(-1).numpy(),
        cluster_offsets.contiguous().numpy(),
        *(lists.numpy() for lists in inverse),
        as_bias(position_weight, position_bias, blank_key, blank_value, *query.shape[1:]),
        f32(scale),
        f32(scale * LOG2_E),
        shape,
    )
    results = (
        normal.view(-1).numpy(),
        *(row.view(-1).numpy() for row in rows),
        partial.reshape(-1),
        tile_chunks,
        torch.empty(min(tile_chunks, chunks) * per_chunk, dtype=torch.float32).numpy(),
        np.empty(shape.clusters, np.int64),
        np.empty(shape.clusters, np.int64),
        np.empty(per_tile, np.int64),
    )
    if cluster_size <= FEW:
        attend_lists_backward(*arrays, listed_values(shape, position_value), *results)
    else:
        attend_backward(
            *arrays,
            empty_packed(shape),
            empty_packed(shape),
            empty_packed_values(shape, position_value, columns=True),
            empty_points(shape),
            *results,
        )
    sums = torch.from_numpy(partial.sum(0, dtype=np.float64).astype(np.float32))
    moments = shape.feature_blocks * shape.features
    per_head = (shape.features, 1, shape.channels, shape.channels, moments * shape.channels)
    weight, bias, *blanks, values = sums.split([shape.heads * n for n in per_head])
    values = values.view(shape.heads, moments, shape.channels).transpose(1, 2)
    given = (position_weight, position_bias, position_value, blank_key, blank_value)
    learned = [
        torch.empty(0)
        if like is None
        else torch.empty(like.shape, dtype=like.dtype).copy_(part.reshape(like.shape))
        for part, like in zip((weight, bias, values, *blanks), given, strict=True)
    ]
    return *(row.to(query.dtype) for row in rows), *learned
