"""Neighborhood attention on the CPU, the forward pass: fused loops over the blocks of clusters.

A few tokens take every step of the softmax together, because the steps of a single one would wait
for each other. Of the softmax only the largest logit and the inverse of the sum are kept: two
numbers, because one (the log-sum-exp) would lose the digits that large logits have before the
point. Every sum has a fixed order, whatever the number of threads.
"""

import torch
from numba import njit, prange

from pointformer.kernels.cpu.attention_backward import backward, make_plan
from pointformer.kernels.cpu.attention_blocks import (
    CHUNK,
    FEW,
    GROUP,
    LOG2_E,
    SPARE,
    add_bias,
    as_bias,
    as_rows,
    bias_of,
    dot_blocks,
    dot_rows,
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
    power8,
    prefetch_next,
    relate_all,
    rows_of,
    shape_of,
    sum_features,
    sum_rows,
    weigh,
)
from pointformer.kernels.cpu.attention_lists import attend_lists
from pointformer.kernels.cpu.runtime import kernel
from pointformer.kernels.cpu.simd import (
    advance,
    allocate,
    as_int64,
    f32,
    free,
    load,
    pointer,
    splat,
    store,
    where_positive,
    zero,
)

__all__ = ["backward", "forward", "make_plan"]


@njit(inline="always")
def attend_chunk(
    chunk, query, query_positions, cluster_index, offsets, bias, scale, shape,
    packed_key, packed_value, points, output, normal,
):  # fmt: skip
    width = list_size(shape)
    length = (width + SPARE) * 8
    lists = allocate(2 * GROUP * (width + 1))
    blocks = as_int64(lists)
    counts = advance(blocks, GROUP * width)
    phi = allocate(GROUP * (phi_size(width, shape) + length + 3))
    logits = advance(phi, GROUP * phi_size(width, shape))
    # Of each token of the group:
    largest = advance(logits, GROUP * length)
    blank = advance(largest, GROUP)  # its logit, then weight
    mass = advance(blank, GROUP)  # sum of the weights, then its inverse
    end = min((chunk + 1) * CHUNK, shape.tokens)
    for first in range(chunk * CHUNK, end, GROUP):
        tokens = min(GROUP, end - first)
        for i in range(tokens):
            counts[i] = list_blocks(cluster_index, first + i, offsets, shape, blocks, i * width)
            at = i * phi_size(width, shape)
            relate_all(
                query_positions, first + i, points, blocks, i * width, counts[i], shape, phi, at
            )
        for head in range(shape.heads):
            own = head * shape.channels
            for i in range(tokens):
                at = (first + i) * query.token_stride + head * query.head_stride
                prefetch_next(query, first + i, head, shape)
                dot_blocks(
                    query.data, at, packed_key, head, blocks, i * width, counts[i], shape,
                    logits, i * length,
                )  # fmt: skip
            for i in range(tokens):
                at = i * phi_size(width, shape)
                highest = add_bias(logits, i * length, counts[i], phi, at, head, scale, bias, shape)
                if bias.has_blank:
                    at = (first + i) * query.token_stride + head * query.head_stride
                    logit = scale * dot_rows(query.data, at, bias.blank_key, own, shape.channels)
                    highest = max(highest, logit)
                    blank[i] = logit
                largest[i] = highest
            if bias.has_blank:
                store(blank, 0, power8(load(blank, 0) - load(largest, 0)))
            for i in range(tokens):
                mass[i] = weigh(logits, i * length, counts[i], largest[i]) + blank[i]
                if shape.feature_blocks:
                    blocks[i * width + counts[i]] = feature_block(head, shape)
                    sum_features(
                        logits, i * length, counts[i], phi, i * phi_size(width, shape), shape,
                        logits, i * length + counts[i] * 8,
                    )  # fmt: skip
            total = load(mass, 0)
            store(mass, 0, where_positive(total, splat(f32(1.0)) / total, zero()))
            for i in range(tokens):
                row = (first + i) * shape.heads + head
                sum_rows(
                    logits, i * length, packed_value, blocks, i * width,
                    counts[i] + shape.feature_blocks, head,
                    bias.blank_value, blank[i], mass[i], shape,
                    output, row * shape.channels,
                )  # fmt: skip
                normal[2 * row] = largest[i]
                normal[2 * row + 1] = mass[i]
    free(lists)
    free(phi)


@kernel
def attend(
    query, key, value, query_positions, positions, cluster_index, offsets, bias, scale, shape,
    packed_key, packed_value, points, output, normal,
):  # fmt: skip
    for cluster in prange(shape.clusters):
        ends = pointer(offsets)
        pack(rows_of(key), cluster, ends, shape, pointer(packed_key), True)
        pack(rows_of(value), cluster, ends, shape, pointer(packed_value), False)
        pack_positions(pointer(positions), cluster, ends, shape, pointer(points))
    for chunk in prange((shape.tokens + CHUNK - 1) // CHUNK):
        attend_chunk(
            chunk, rows_of(query), pointer(query_positions), pointer(cluster_index),
            pointer(offsets), bias_of(bias), scale, shape, pointer(packed_key),
            pointer(packed_value), pointer(points), pointer(output), pointer(normal),
        )  # fmt: skip


def forward(
    query, key, value, query_positions, positions, cluster_index, cluster_offsets, cluster_size,
    plan, position_weight, position_bias, position_value, blank_key, blank_value, scale,
):  # fmt: skip
    """Output (Q, H, d) and the softmax's normalization (Q, H, 2)."""
    clusters = cluster_offsets.shape[0] - 1
    if cluster_index.numel() and int(cluster_index.max()) >= clusters:
        raise IndexError(
            f"neighborhoods: cluster {int(cluster_index.max())} of {clusters} clusters"
        )
    shape = shape_of(
        query, positions, cluster_index, cluster_offsets, cluster_size,
        position_weight, position_value,
    )  # fmt: skip
    output = torch.empty(query.shape, dtype=torch.float32)
    normal = torch.empty((*query.shape[:2], 2), dtype=torch.float32)
    arrays = (
        as_rows(query),
        as_rows(key),
        as_rows(value),
        flat(query_positions),
        flat(positions),
        cluster_index.contiguous().view(-1).numpy(),
        cluster_offsets.contiguous().numpy(),
        as_bias(position_weight, position_bias, blank_key, blank_value, *query.shape[1:]),
        f32(scale * LOG2_E),
        shape,
    )
    results = output.view(-1).numpy(), normal.view(-1).numpy()
    if cluster_size <= FEW:
        attend_lists(*arrays, listed_values(shape, position_value), *results)
    else:
        attend(
            *arrays,
            empty_packed(shape),
            empty_packed_values(shape, position_value, columns=False),
            empty_points(shape),
            *results,
        )
    return output.to(query.dtype), normal
