"""Neighborhood attention on the CPU over lists of tokens, or clusters of a few.

Such clusters would leave most lanes of a block empty. Each query takes the listed tokens one by
one instead, in groups of sixteen: keys and values are read where they lie, nothing is packed. A
missing entry of a list counts as its last token again, without weight, so that what it reads is
what the query may see. A token's gradients come from the queries that list it, as those of a
cluster do in `attention_backward`.
"""

from numba import njit, prange

from pointformer.kernels.cpu.attention_blocks import (
    CHUNK,
    MISSING,
    add_bias,
    add_scaled,
    bias_of,
    dot_rows,
    phi_at,
    phi_size,
    power8,
    relate,
    rows_of,
    sum_features,
    weigh,
)
from pointformer.kernels.cpu.attention_gradients import (
    BATCH,
    add_weight_sums,
    clear_partial,
    clear_rows,
    list_active,
    row_gradients,
    shared_at,
    shared_size,
)
from pointformer.kernels.cpu.runtime import called, inlined, kernel
from pointformer.kernels.cpu.simd import (
    advance,
    allocate,
    as_int64,
    f32,
    fma,
    fold1,
    fold2,
    fold4,
    fold8,
    free,
    hmax,
    load,
    load16,
    load_low16,
    pointer,
    splat,
    splat16,
    store,
    zero,
)


@inlined
def lanes_of(shape):
    """Places for the tokens of a neighborhood: whole pairs of blocks."""
    return (shape.blocks + 1) // 2 * 16


@inlined
def list_rows(cluster_index, query, offsets, positions, shape, rows, points):
    """Write the rows of a neighborhood's tokens, in the order of its list, and their positions as
    `pack_positions` does, up to the last token; how many pairs of blocks they fill."""
    first = query * shape.per_query
    count = last = 0
    for slot in range(shape.per_query):
        cluster = cluster_index[first + slot]
        if 0 <= cluster < shape.clusters and offsets[cluster] < offsets[cluster + 1]:
            last = offsets[cluster + 1] - 1
            count = slot * shape.cluster_size + offsets[cluster + 1] - offsets[cluster]
    pairs = (count + 15) // 16
    for lane in range(pairs * 16):
        slot, part = lane, 0
        if shape.cluster_size > 1:
            slot, part = lane // shape.cluster_size, lane % shape.cluster_size
        row = last
        missing = MISSING
        if lane < count:
            cluster = cluster_index[first + slot]
            if 0 <= cluster < shape.clusters and offsets[cluster] + part < offsets[cluster + 1]:
                row = offsets[cluster] + part
                missing = f32(0.0)
        rows[lane] = row
        at = (lane >> 3) * (shape.dimensions + 1) * 8 + (lane & 7)
        for axis in range(shape.dimensions):
            points[at + axis * 8] = positions[row * shape.dimensions + axis]
        points[at + shape.dimensions * 8] = missing
    return pairs


@inlined
def relate_rows(
    cluster_index, query, offsets, query_positions, positions, shape, rows, points, phi
):  # fmt: skip
    """`list_rows`, and their masks and relative positions."""
    pairs = list_rows(cluster_index, query, offsets, positions, shape, rows, points)
    for block in range(2 * pairs):
        relate(query_positions, query, points, block, shape, phi, phi_at(block, shape))
    return pairs


@inlined
def dot_four(vector, at, source, stride, source_at, rows, first, channels):
    """Parts of the products of `vector[at:]` with rows `first`, 8, 4 and 12 further: four each."""
    r0 = rows[first] * stride + source_at
    r1 = rows[first + 8] * stride + source_at
    r2 = rows[first + 4] * stride + source_at
    r3 = rows[first + 12] * stride + source_at
    s0 = s1 = s2 = s3 = splat16(f32(0.0))
    for channel in range(0, channels - 15, 16):
        x = load16(vector, at + channel)
        s0 = fma(load16(source, r0 + channel), x, s0)
        s1 = fma(load16(source, r1 + channel), x, s1)
        s2 = fma(load16(source, r2 + channel), x, s2)
        s3 = fma(load16(source, r3 + channel), x, s3)
    if channels % 16:
        channel = channels - 8
        x = load_low16(vector, at + channel)
        s0 = fma(load_low16(source, r0 + channel), x, s0)
        s1 = fma(load_low16(source, r1 + channel), x, s1)
        s2 = fma(load_low16(source, r2 + channel), x, s2)
        s3 = fma(load_low16(source, r3 + channel), x, s3)
    return fold4(fold8(s0, s1), fold8(s2, s3))


@called
def dot_listed(vector, at, source, stride, source_at, rows, pairs, channels, target):
    """Products of `vector[at:]` with the listed rows of `source`, in the order of the list."""
    for first in range(0, pairs * 16, 16):
        a = dot_four(vector, at, source, stride, source_at, rows, first, channels)
        b = dot_four(vector, at, source, stride, source_at, rows, first + 2, channels)
        even = fold2(a, b)
        a = dot_four(vector, at, source, stride, source_at, rows, first + 1, channels)
        b = dot_four(vector, at, source, stride, source_at, rows, first + 3, channels)
        store(target, first, fold1(even, fold2(a, b)))


@called
def sum_listed(
    weights, weights_at, source, stride, source_at, rows, count, channels, start, start_at, factor,
    to, at,
):  # fmt: skip
    """`to[at:] = start[start_at:] + factor * sum of weights * listed rows`, of a multiple of four
    rows."""
    for channel in range(0, channels - 15, 16):
        here = source_at + channel
        s0 = s1 = s2 = s3 = splat16(f32(0.0))
        for n in range(0, count, 4):
            w = weights_at + n
            s0 = fma(load16(source, rows[n] * stride + here), splat16(weights[w]), s0)
            s1 = fma(load16(source, rows[n + 1] * stride + here), splat16(weights[w + 1]), s1)
            s2 = fma(load16(source, rows[n + 2] * stride + here), splat16(weights[w + 2]), s2)
            s3 = fma(load16(source, rows[n + 3] * stride + here), splat16(weights[w + 3]), s3)
        total = (s0 + s1) + (s2 + s3)
        store(to, at + channel, fma(total, splat16(factor), load16(start, start_at + channel)))
    if channels % 16:
        channel = channels - 8
        here = source_at + channel
        t0 = t1 = t2 = t3 = zero()
        for n in range(0, count, 4):
            w = weights_at + n
            t0 = fma(load(source, rows[n] * stride + here), splat(weights[w]), t0)
            t1 = fma(load(source, rows[n + 1] * stride + here), splat(weights[w + 1]), t1)
            t2 = fma(load(source, rows[n + 2] * stride + here), splat(weights[w + 2]), t2)
            t3 = fma(load(source, rows[n + 3] * stride + here), splat(weights[w + 3]), t3)
        rest = (t0 + t1) + (t2 + t3)
        store(to, at + channel, fma(rest, splat(factor), load(start, start_at + channel)))


@inlined
def clear(target, channels):
    for channel in range(0, channels, 8):
        store(target, channel, zero())


@njit(inline="always")
def attend_listed(
    chunk, query, key, value, query_positions, positions, cluster_index, offsets, bias, scale,
    shape, feature_values, output, normal,
):  # fmt: skip
    lanes = lanes_of(shape)
    numbers = allocate(2 * lanes)
    rows = as_int64(numbers)
    points = allocate(
        (lanes >> 3) * (shape.dimensions + 1) * 8
        + phi_size(lanes >> 3, shape) + lanes + shape.channels + 8
    )  # fmt: skip
    phi = advance(points, (lanes >> 3) * (shape.dimensions + 1) * 8)
    logits = advance(phi, phi_size(lanes >> 3, shape))
    start = advance(logits, lanes)  # of the output: what is not the sum of values
    moments = advance(start, shape.channels)
    for token in range(chunk * CHUNK, min((chunk + 1) * CHUNK, shape.tokens)):
        pairs = relate_rows(
            cluster_index, token, offsets, query_positions, positions, shape, rows, points, phi
        )
        for head in range(shape.heads):
            own = head * shape.channels
            at = token * query.token_stride + head * query.head_stride
            dot_listed(
                query.data, at, key.data, key.token_stride, head * key.head_stride,
                rows, pairs, shape.channels, logits,
            )  # fmt: skip
            largest = add_bias(logits, 0, 2 * pairs, phi, 0, head, scale, bias, shape)
            blank = f32(0.0)
            if bias.has_blank:
                logit = scale * dot_rows(query.data, at, bias.blank_key, own, shape.channels)
                largest = max(largest, logit)
                blank = hmax(power8(splat(logit) - splat(largest)))
            mass = weigh(logits, 0, 2 * pairs, largest) + blank
            mass = f32(1.0) / mass if mass > f32(0.0) else f32(0.0)
            clear(start, shape.channels)
            if bias.has_blank:
                add_scaled(splat(blank * mass), bias.blank_value, own, start, 0, shape.channels)
            if shape.feature_blocks:
                sum_features(logits, 0, 2 * pairs, phi, 0, shape, moments, 0)
                for feature in range(shape.features):
                    weight = splat(moments[feature] * mass)
                    source = (head * shape.features + feature) * shape.channels
                    add_scaled(weight, feature_values, source, start, 0, shape.channels)
            row = token * shape.heads + head
            sum_listed(
                logits, 0, value.data, value.token_stride, head * value.head_stride,
                rows, pairs * 16, shape.channels, start, 0, mass, output, row * shape.channels,
            )  # fmt: skip
            normal[2 * row] = largest
            normal[2 * row + 1] = mass
    free(numbers)
    free(points)


@kernel
def attend_lists(
    query, key, value, query_positions, positions, cluster_index, offsets, bias, scale, shape,
    feature_values, output, normal,
):  # fmt: skip
    for chunk in prange((shape.tokens + CHUNK - 1) // CHUNK):
        attend_listed(
            chunk, rows_of(query), rows_of(key), rows_of(value), pointer(query_positions),
            pointer(positions), pointer(cluster_index), pointer(offsets), bias_of(bias), scale,
            shape, pointer(feature_values), pointer(output), pointer(normal),
        )  # fmt: skip


@njit(inline="always")
def listed_query_gradients(
    chunk, grad, query, key, value, query_positions, positions, cluster_index, offsets, bias, scale,
    log2_scale, shape, feature_values, normal, grad_query, partial, tile_first, shared,
):  # fmt: skip
    """As `query_gradients`: of a chunk's queries, and its share of those of what is learned."""
    lanes = lanes_of(shape)
    sums = shape.heads * shape.features * 16
    numbers = allocate(2 * lanes)
    rows = as_int64(numbers)
    weight_sums = allocate(
        sums + (lanes >> 3) * (shape.dimensions + 1) * 8
        + phi_size(lanes >> 3, shape) + 2 * lanes + shape.channels + 16
    )  # fmt: skip
    points = advance(weight_sums, sums)
    phi = advance(points, (lanes >> 3) * (shape.dimensions + 1) * 8)
    logits = advance(phi, phi_size(lanes >> 3, shape))
    grad_logits = advance(logits, lanes)
    start = advance(grad_logits, lanes)
    moments = advance(start, shape.channels)
    feature_changes = advance(moments, 8)
    clear_partial(chunk, shape, partial)
    for token in range(chunk * CHUNK, min((chunk + 1) * CHUNK, shape.tokens)):
        pairs = relate_rows(
            cluster_index, token, offsets, query_positions, positions, shape, rows, points, phi
        )
        for head in range(shape.heads):
            at = token * grad.token_stride + head * grad.head_stride
            query_at = token * query.token_stride + head * query.head_stride
            weights = shared_at(token, tile_first, shape) + head * shared_size(shape)
            dot_listed(
                query.data, query_at, key.data, key.token_stride, head * key.head_stride,
                rows, pairs, shape.channels, logits,
            )  # fmt: skip
            dot_listed(
                grad.data, at, value.data, value.token_stride, head * value.head_stride,
                rows, pairs, shape.channels, grad_logits,
            )  # fmt: skip
            for feature in range(shape.feature_blocks * shape.features):
                source = (head * shape.features + feature) * shape.channels
                feature_changes[feature] = dot_rows(
                    grad.data, at, feature_values, source, shape.channels
                )
            blank_change = row_gradients(
                chunk, token, head, grad, query, bias, scale, log2_scale, shape, normal, 2 * pairs,
                logits, grad_logits, feature_changes, 0, phi, 0,
                shared, weights, weight_sums, moments, partial,
            )  # fmt: skip
            clear(start, shape.channels)
            if bias.has_blank:
                own = head * shape.channels
                factor = splat(blank_change * scale)
                add_scaled(factor, bias.blank_key, own, start, 0, shape.channels)
            sum_listed(
                shared, weights + shared_size(shape) // 2,
                key.data, key.token_stride, head * key.head_stride, rows, pairs * 16,
                shape.channels, start, 0, scale,
                grad_query, (token * shape.heads + head) * shape.channels,
            )  # fmt: skip
    add_weight_sums(chunk, shape, weight_sums, partial)
    free(numbers)
    free(weight_sums)


@njit(inline="always")
def listed_key_gradients(
    cluster, grad, query, offsets, begin, end, entries, scale, shape, tile_first, shared, anew,
    grad_key, grad_value,
):  # fmt: skip
    """As `key_gradients`: of a cluster's keys and values from a tile's queries."""
    size = shape.heads * shape.channels
    factors = allocate(5 * BATCH)
    queries = as_int64(advance(factors, BATCH))
    places = advance(queries, BATCH)
    if anew:
        clear_rows(offsets[cluster], offsets[cluster + 1], size, grad_key, grad_value)
    for first in range(begin, end, BATCH):
        count = min(end - first, BATCH)
        fours = (count + 3) // 4 * 4
        for i in range(fours):
            entry = entries[first + min(i, count - 1)]
            queries[i] = entry // shape.per_query
            slot = entry - queries[i] * shape.per_query
            places[i] = shared_at(queries[i], tile_first, shape) + slot * shape.cluster_size
        # Of the softmax's weights first, then of the gradients of logits.
        for part in range(offsets[cluster + 1] - offsets[cluster]):
            for head in range(shape.heads):
                to = (offsets[cluster] + part) * size + head * shape.channels
                weights = head * shared_size(shape) + part
                changes = weights + shared_size(shape) // 2
                for i in range(fours):
                    factors[i] = shared[places[i] + weights] if i < count else f32(0.0)
                sum_listed(
                    factors, 0, grad.data, grad.token_stride, head * grad.head_stride,
                    queries, fours, shape.channels, grad_value, to, f32(1.0), grad_value, to,
                )  # fmt: skip
                for i in range(fours):
                    factors[i] = shared[places[i] + changes] if i < count else f32(0.0)
                sum_listed(
                    factors, 0, query.data, query.token_stride, head * query.head_stride,
                    queries, fours, shape.channels, grad_key, to, scale, grad_key, to,
                )  # fmt: skip
    free(factors)


@kernel
def attend_lists_backward(
    grad, query, key, value, query_positions, positions, cluster_index, offsets,
    inverse_offsets, entries, bias, scale, log2_scale, shape, feature_values, normal,
    grad_query, grad_key, grad_value, partial, tile_chunks, shared, begins, ends, active,
):  # fmt: skip
    for cluster in prange(shape.clusters):
        begins[cluster] = ends[cluster] = inverse_offsets[cluster]
        if inverse_offsets[cluster] == inverse_offsets[cluster + 1]:
            clear_rows(
                offsets[cluster], offsets[cluster + 1], shape.heads * shape.channels,
                pointer(grad_key), pointer(grad_value),
            )  # fmt: skip
    chunks = (shape.tokens + CHUNK - 1) // CHUNK
    for first_chunk in range(0, chunks, tile_chunks):
        for chunk in prange(first_chunk, min(first_chunk + tile_chunks, chunks)):
            listed_query_gradients(
                chunk, rows_of(grad), rows_of(query), rows_of(key), rows_of(value),
                pointer(query_positions), pointer(positions), pointer(cluster_index),
                pointer(offsets), bias_of(bias), scale, log2_scale, shape, pointer(feature_values),
                pointer(normal), pointer(grad_query), pointer(partial), first_chunk * CHUNK,
                pointer(shared),
            )  # fmt: skip
        first = first_chunk * CHUNK * shape.per_query
        last = min((first_chunk + tile_chunks) * CHUNK, shape.tokens) * shape.per_query
        count = list_active(
            pointer(cluster_index), first, last, shape, pointer(begins), pointer(ends),
            pointer(active),
        )  # fmt: skip
        for n in prange(count):
            cluster = active[n]
            begin = begins[cluster]
            listed_key_gradients(
                cluster, rows_of(grad), rows_of(query), pointer(offsets), begin, ends[cluster],
                pointer(entries), scale, shape, first_chunk * CHUNK, pointer(shared),
                begin == inverse_offsets[cluster], pointer(grad_key), pointer(grad_value),
            )  # fmt: skip
            begins[cluster] = ends[cluster]
