"""What the attention kernels share: blocks of eight tokens, their products, and the logits.

Keys are taken in *blocks*: up to eight consecutive tokens of one cluster, of which it has
`ceil(cluster_size / 8)`. A block is first packed so that no vector is loaded twice and few numbers
are spread over one: as *columns* (head, block, d / 2, 8 tokens, 2 channels) for products with a
query, as *rows* (head, block, 2, d, 4 tokens) for sums over tokens, with zeros for missing ones.
Positions are packed as (block, D + 1, 8), where the last row is a mask: 0 for a token, a very low
logit for a missing one. What one head reads for consecutive tokens then lies together and stays in
the fastest cache.

A term of the values in relative positions, `position_value` times the features, is one more block
of every neighborhood, the last one: its eight "tokens" are the features, their values the weights
of `position_value`, and what they weigh are the moments, the features' means over the neighborhood.

What belongs to a token and its neighborhood lives in scratch memory and is never written out. Two
blocks share a vector of 16. Logits are in units of log2, because exp2 is the cheaper function.
"""

from typing import NamedTuple

import numpy as np
import torch

from pointformer.kernels.cpu.runtime import inlined
from pointformer.kernels.cpu.simd import (
    add_neighbors,
    exp2,
    f32,
    fma,
    hmax,
    hsum,
    interleave_pairs,
    interleave_quads,
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

SPARE = 5  # blocks that scratch memory of logits has beyond those of a neighborhood
CHUNK = 16  # tokens per unit of work; small, so that one small image still fills the threads
GROUP = 8  # tokens taken together, one head after the other
LOG2_E = f32(1.4426950408889634)
MISSING = f32(-1e30)
FEW = 4  # clusters of so few tokens are taken apart, see `attention_lists`


class Shape(NamedTuple):
    """The sizes that all loops run over."""

    tokens: int
    heads: int
    channels: int
    dimensions: int
    features: int
    per_query: int  # clusters that one attends to
    clusters: int
    cluster_size: int  # the most tokens of one
    cluster_blocks: int
    blocks: int  # the most of a neighborhood
    feature_blocks: int  # of values: 1 if they have a term of the features, else 0


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


@inlined
def rows_of(tensor):
    return Rows(pointer(tensor.data), tensor.token_stride, tensor.head_stride)


@inlined
def bias_of(bias):
    return Bias(
        pointer(bias.position_weight),
        pointer(bias.position_bias),
        pointer(bias.blank_key),
        pointer(bias.blank_value),
        bias.has_blank,
    )


@inlined
def packed_at(head, block, shape):
    """Where a block starts in a packed tensor."""
    return (head * shape.clusters * shape.cluster_blocks + block) * shape.channels * 8


@inlined
def feature_block(head, shape):
    """The number by which `packed_at` finds a head's block of features, behind those of tokens."""
    return (shape.heads - head) * shape.clusters * shape.cluster_blocks + head


@inlined
def list_size(shape):
    """The most blocks of a neighborhood, that of the features included."""
    return shape.blocks + shape.feature_blocks


@inlined
def pack(tensor, cluster, offsets, shape, packed, columns):
    """Pack the tokens of a cluster as columns or as rows; a block without any stays unwritten."""
    stride = tensor.token_stride
    for part in range(shape.cluster_blocks):
        first = offsets[cluster] + 8 * part
        count = offsets[cluster + 1] - first
        if count > 0:
            for head in range(shape.heads):
                to = packed_at(head, cluster * shape.cluster_blocks + part, shape)
                at = first * stride + head * tensor.head_stride
                for channel in range(0, shape.channels, 8):
                    source = at + channel
                    if columns:
                        target = to + channel * 8
                        interleave_pairs(tensor.data, source, stride, count, packed, target)
                    else:
                        target = to + channel * 4
                        interleave_quads(tensor.data, source, stride, count, packed, target)
                        rest = max(count - 4, 0)
                        if rest > 0:
                            source += 4 * stride
                        target += 4 * shape.channels
                        interleave_quads(tensor.data, source, stride, rest, packed, target)


@inlined
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


@inlined
def list_blocks(cluster_index, token, offsets, shape, blocks, at):
    """Write the blocks of a token's neighborhood from place `at` of a list; how many."""
    found = at
    for slot in range(token * shape.per_query, (token + 1) * shape.per_query):
        cluster = cluster_index[slot]
        if 0 <= cluster < shape.clusters:  # others would be read from foreign memory
            tokens = offsets[cluster + 1] - offsets[cluster]
            for part in range(shape.cluster_blocks):
                if 8 * part < tokens:
                    blocks[found] = cluster * shape.cluster_blocks + part
                    found += 1
    return found - at


@inlined
def phi_size(count, shape):
    """Scratch memory for the relative positions of `count` blocks: (pair, 1 + F, 2 blocks, 8)."""
    return (count + 1) // 2 * (1 + shape.features) * 16


@inlined
def phi_at(block, shape):
    """Where the relative positions of a neighborhood's block start; 16 from one to the next."""
    return block // 2 * (1 + shape.features) * 16 + block % 2 * 8


@inlined
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


@inlined
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


@inlined
def dot_blocks(vector, at, packed, head, blocks, first, count, shape, target, to):
    """Products of one head's `vector[at:]` with packed columns: (count, 8) into `target[to:]`.

    Several run at a time to hide their latency; the last ones may repeat the last block, so
    `target` has room for `count + SPARE` blocks.
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


@inlined
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


@inlined
def prefetch_next(rows, token, head, shape):
    """Ask for what is read of `rows` after a token's head when `GROUP` tokens are taken together:
    rows are far apart, every first use would wait for memory."""
    at = token * rows.token_stride + (head + 1) * rows.head_stride
    if head == shape.heads - 1:
        at = (token + GROUP) * rows.token_stride
    for channel in range(0, shape.channels, 16):
        prefetch(rows.data, at + channel)


@inlined
def dot_rows(a, a_at, b, b_at, channels):
    total = zero()
    for channel in range(0, channels, 8):
        total = fma(load(a, a_at + channel), load(b, b_at + channel), total)
    return hsum(total)


@inlined
def add_features(start, phi, at, weights, weights_at, shape):
    """`start` and the weighted features of two blocks, whose relative positions start at `at`."""
    total = start
    for feature in range(shape.features):
        weight = splat16(weights[weights_at + feature])
        total = fma(load16(phi, at + (1 + feature) * 16), weight, total)
    return total


@inlined
def sum_features(weights, first_weight, count, phi, phi_first, shape, to, at):
    """Moments: `to[at:]` becomes the sum of each feature times the weights of `count` blocks, and
    zeros up to eight."""
    store(to, at, zero())
    for feature in range(shape.features):
        total = splat16(f32(0.0))
        for pair in range((count + 1) // 2):
            x = load16(phi, phi_first + (pair * (1 + shape.features) + 1 + feature) * 16)
            total = fma(load16(weights, first_weight + pair * 16), x, total)
        to[at + feature] = hsum(total)


@inlined
def add_bias(logits, at, count, phi, phi_first, head, scale, bias, shape):
    """Turn the products of `count` blocks into logits, in place; the largest of them."""
    largest = splat16(MISSING)
    for pair in range((count + 1) // 2):
        features = phi_first + pair * (1 + shape.features) * 16
        offset = load16(phi, features) + splat16(bias.position_bias[head])
        logit = fma(load16(logits, at + pair * 16), splat16(scale), offset)
        own = head * shape.features
        logit = add_features(logit, phi, features, bias.position_weight, own, shape)
        store(logits, at + pair * 16, logit)
        largest = maximum(largest, logit)
    return hmax(largest)


@inlined
def weigh(logits, at, count, largest):
    """Turn the logits of `count` blocks into weights, in place, 1 for the largest; their sum."""
    total = splat16(f32(0.0))
    for pair in range((count + 1) // 2):
        weight = power16(load16(logits, at + pair * 16) - splat16(largest))
        store(logits, at + pair * 16, weight)
        total = total + weight
    return hsum(total)


@inlined
def add_scaled(weight, source, source_at, target, target_at, channels):
    for channel in range(0, channels, 8):
        total = fma(load(source, source_at + channel), weight, load(target, target_at + channel))
        store(target, target_at + channel, total)


@inlined
def power(x, low, nothing):
    """2**x, exactly 0 where it underflows: products with tiny numbers are slow."""
    return where_less(x, low, nothing, exp2(x))


@inlined
def power16(x):
    return power(x, splat16(f32(-126.0)), splat16(f32(0.0)))


@inlined
def power8(x):
    return power(x, splat(f32(-126.0)), zero())


def flat(tensor):
    return tensor.detach().float().contiguous().view(-1).numpy()


def as_rows(tensor):
    tensor = tensor.detach().float()
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    data = tensor.as_strided((span if tensor.numel() else 0,), (1,)).numpy()
    return Rows(data, tensor.stride(0), tensor.stride(1))


def as_bias(position_weight, position_bias, blank_key, blank_value, heads, channels):
    def given(tensor, size):
        return np.zeros(size, np.float32) if tensor is None else flat(tensor)

    return Bias(
        given(position_weight, 0) * LOG2_E,
        given(position_bias, heads) * LOG2_E,
        given(blank_key, heads * channels),
        given(blank_value, heads * channels),
        blank_key is not None,
    )


def shape_of(
    query, positions, cluster_index, cluster_offsets, cluster_size, position_weight, position_value
):  # fmt: skip
    per_query, cluster_blocks = cluster_index.shape[1], -(-cluster_size // 8)
    listed = cluster_size <= FEW
    return Shape(
        *query.shape,
        dimensions=positions.shape[1],
        features=0 if position_weight is None else position_weight.shape[1],
        per_query=per_query,
        clusters=cluster_offsets.shape[0] - 1,
        cluster_size=cluster_size,
        cluster_blocks=cluster_blocks,
        blocks=-(-per_query * cluster_size // 8) if listed else per_query * cluster_blocks,
        feature_blocks=int(position_value is not None),
    )


def empty_packed(shape):
    """Memory for a packed (T, H, d) tensor, from a cache line on, as torch gives it."""
    numbers = shape.clusters * shape.cluster_blocks * shape.heads * shape.channels * 8
    return torch.empty(numbers, dtype=torch.float32).numpy()


def empty_packed_values(shape, position_value, columns):
    """As `empty_packed`, with the blocks of features at the end, packed as columns or as rows."""
    if position_value is None:
        return empty_packed(shape)
    tokens = shape.clusters * shape.cluster_blocks * 8
    packed = torch.empty((tokens + 8) * shape.heads * shape.channels, dtype=torch.float32)
    weights = torch.nn.functional.pad(position_value.detach().float(), (0, 8 - shape.features))
    if columns:
        weights = weights.view(shape.heads, -1, 2, 8).transpose(2, 3)
    else:
        weights = weights.view(shape.heads, -1, 2, 4).transpose(1, 2)
    packed[tokens * shape.heads * shape.channels :] = weights.flatten()
    return packed.numpy()


def listed_values(shape, position_value):
    """Weights of values in positions, a row of channels for each feature of each head."""
    if position_value is None:
        return np.zeros(0, np.float32)
    return flat(position_value.transpose(1, 2))


def empty_points(shape):
    numbers = shape.clusters * shape.cluster_blocks * (shape.dimensions + 1) * 8
    return torch.empty(numbers, dtype=torch.float32).numpy()
