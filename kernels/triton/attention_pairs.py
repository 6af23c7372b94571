"""What the attention kernels share: how they read rows and lists, and the logits of pairs.

Logits are in units of log2, because exp2 is the cheaper function. Learned tensors that are absent
are read as zeros, and without weights for distance and direction those of the differences alone are
not zero, so that one specialization serves all of them. Rows of `channels` elements are computed
with as many lanes as the next power of two; strides and channels come in units of eight elements,
so that the compiler knows what it may load at once.
"""

import torch
import triton
import triton.language as tl

from pointformer.kernels.triton.runtime import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (16, 32, 64, 128)  # lanes for the channels of a head
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3e38)  # a logit that cannot be; finite, so that no difference is NaN
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc, the products of float32 by `PRECISION`."""
    if _INTERPRETED:  # it multiplies the bits of bfloat16
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_rows(data, row, head, token_stride, head_stride, octets, WIDTH: tl.constexpr):
    """One head's channels of some rows (N,), all of which exist: (N, WIDTH)."""
    lane = tl.arange(0, WIDTH)
    # Strides in elements may not fit into 32 bits.
    data += head.to(tl.int64) * head_stride * 8
    offset = row.to(tl.int64)[:, None] * token_stride * 8 + lane[None, :]
    return tl.load(data + offset, mask=(lane < octets * 8)[None, :], other=0.0)


@triton.jit
def store_rows(data, values, row, exists, head, heads, octets, WIDTH: tl.constexpr):
    """Write one head's channels (N, WIDTH) into rows (N,) of a contiguous tensor."""
    lane = tl.arange(0, WIDTH)
    offset = (row.to(tl.int64) * heads + head)[:, None] * (octets * 8) + lane[None, :]
    mask = exists[:, None] & (lane < octets * 8)[None, :]
    tl.store(data + offset, values.to(data.dtype.element_ty), mask=mask)


@triton.jit
def load_blank(blank, head, octets, has_blank, WIDTH: tl.constexpr):
    """The blank token's key or value (WIDTH,), zeros if there is none."""
    lane = tl.arange(0, WIDTH)
    known = octets * 8 * has_blank
    return tl.load(blank + head * octets * 8 + lane, mask=lane < known, other=0.0).to(tl.float32)


@triton.jit
def load_feature_values(position_value, head, octets, feature, features, WIDTH: tl.constexpr):
    """What one position feature adds to a value (WIDTH,), zeros if it has no weights."""
    lane = tl.arange(0, WIDTH)
    known = tl.where(feature < features, octets * 8, 0)
    offset = (head * octets * 8 + lane) * features + feature
    return tl.load(position_value + offset, mask=lane < known, other=0.0).to(tl.float32)


@triton.jit
def load_points(positions, row, AXES: tl.constexpr):
    """Coordinates of rows (N,): x, y and z, which in 2-D no one reads."""
    base = positions + row.to(tl.int64) * AXES
    x, y = tl.load(base), tl.load(base + 1)
    return x, y, tl.load(base + 2) if AXES == 3 else x


@triton.jit
def load_bias(position_weight, position_bias, head, features, has_bias, AXES: tl.constexpr):
    """Weights of dx, dy, [dz], distance and direction, and the bias, in units of log2."""
    weights = ()
    for f in tl.static_range(2 * AXES + 1):
        weight = tl.load(position_weight + head * features + f, mask=f < features, other=0.0)
        weights += (weight.to(tl.float32) * LOG2_E,)
    bias = tl.load(position_bias + head, mask=has_bias != 0, other=0.0)
    return weights, bias.to(tl.float32) * LOG2_E


@triton.jit
def relate(query_point, key_point, AXES: tl.constexpr):
    """Differences, distance and its inverse of pairs, from points that broadcast to pairs.

    At distance 0 the inverse is finite, and all products with a difference are 0.
    """
    dx = key_point[0] - query_point[0]
    dy = key_point[1] - query_point[1]
    dz = key_point[2] - query_point[2] if AXES == 3 else dx
    squared = dx * dx + (dy * dy + 1e-36)
    if AXES == 3:
        squared += dz * dz
    inverse = tl.rsqrt(squared)
    return dx, dy, dz, squared * inverse, inverse


@triton.jit
def position_features(relation, AXES: tl.constexpr):
    """phi: differences, distance, direction (in 2-D sine and cosine)."""
    dx, dy, dz, distance, inverse = relation
    if AXES == 2:
        phi = (dx, dy, distance, dy * inverse, dx * inverse)
    else:
        phi = (dx, dy, dz, distance, dx * inverse, dy * inverse, dz * inverse)
    return phi


@triton.jit
def pair_logits(
    a, b, relation, weights, bias, log2_scale, AXES: tl.constexpr, PRECISION: tl.constexpr
):
    """Logits of pairs of rows a (N, WIDTH) and b (M, WIDTH), one of them queries, as (N, M)."""
    logits = dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32), PRECISION)
    return add_features(logits * log2_scale + bias, relation, weights, AXES)


@triton.jit
def add_features(pairs, relation, weights, AXES: tl.constexpr):
    """Add the position features of pairs (N, M), times weights that broadcast to pairs.

    The terms of the direction are folded into those of the differences.
    """
    dx, dy, dz, distance, inverse = relation
    if AXES == 2:  # the sine (y) comes first
        pairs += weights[2] * distance
        pairs += (weights[1] + weights[3] * inverse) * dy
        pairs += (weights[0] + weights[4] * inverse) * dx
    else:
        pairs += weights[3] * distance
        pairs += (weights[2] + weights[6] * inverse) * dz
        pairs += (weights[1] + weights[5] * inverse) * dy
        pairs += (weights[0] + weights[4] * inverse) * dx
    return pairs


@triton.jit
def fold_keys(pairs):
    """Partial sums over the keys of pairs (N, M): (N, 4).

    A thread holds elements 2 i and 2 i + 1 of every eighth column of a matrix product's result, and
    of every eighth row: these sums, and those of `fold`, need no other thread's.
    """
    parts = tl.reshape(pairs, (pairs.shape[0], pairs.shape[1] // 8, 4, 2))
    parts = tl.permute(parts, (0, 2, 1, 3))
    return tl.sum(tl.reshape(parts, (pairs.shape[0], 4, pairs.shape[1] // 4)), 2)


@triton.jit
def fold(pairs):
    """Partial sums over all of (N, 4) sums over keys: (8, 4)."""
    return tl.sum(tl.reshape(pairs, (pairs.shape[0] // 8, 8, 4)), 0)


@triton.jit
def load_keys(
    start, count, rows, lengths, members, cluster_size, reciprocal, shift, positions, last_row,
    AXES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """KEYS of a tile's keys from place `start`, counted as if each of the `count` listed clusters
    had `cluster_size` of them.

    Returns:
        rows (KEYS,), points, and the words (1, KEYS) of the queries that attend to them. A place
        without a key has some listed row, and no query attends to it: nothing has to be masked.
    """
    slot = start + tl.arange(0, KEYS)
    entry = ((slot.to(tl.int64) * reciprocal) >> shift).to(tl.int32)  # slot // cluster_size
    entry = tl.minimum(entry, count - 1)
    within = slot - entry * cluster_size
    exists = within < tl.load(lengths + entry)
    row = tl.minimum(tl.load(rows + entry) + tl.where(exists, within, 0), last_row)
    attending = tl.where(exists, tl.load(members + entry), 0)
    x, y, z = load_points(positions, row, AXES)
    return row, (x[None, :], y[None, :], z[None, :]), attending[None, :]


def division(divisor, bits=29):
    """(reciprocal, shift): i // divisor is i * reciprocal >> shift for i below 2**bits."""
    shift = bits + divisor.bit_length()
    return -(-(1 << shift) // divisor), shift


def width_of(channels):
    return max(WIDTHS[0], triton.next_power_of_2(channels))


def with_moments(dtype, width):
    """Whether values may have a term of the position features: both, but for what spills on AMD."""
    return (False,) if dtype == torch.float32 and width == WIDTHS[-1] else (False, True)


def heads_together(dtype, width, moments):
    """How many heads a program may compute, which then share all that depends on positions.

    Two of them and the moments of the position features need more registers than there are.
    """
    return (1, 2) if dtype != torch.float32 and width <= 32 and not moments else (1,)


def readable(rows):
    """A (T, H, d) tensor as `load_rows` can read it, and its strides in units of eight."""
    if rows.stride(2) != 1 or rows.stride(0) % 8 or rows.stride(1) % 8:
        rows = rows.contiguous()
    return rows, (rows.stride(0) // 8, rows.stride(1) // 8)


def learned_dtypes(dtype):
    """What learned tensors can have: the model's dtype, or float32 under autocast."""
    return dict.fromkeys((torch.float32, dtype))


def learned_tensors(position_weight, position_bias, position_value, blank_key, blank_value, query):
    """The five as kernels take them, of one dtype, and `features`, `has_bias`, `has_blank`."""
    given = (position_weight, position_bias, position_value, blank_key, blank_value)
    features = 0 if position_weight is None else position_weight.shape[1]
    flags = (features, int(position_bias is not None), int(blank_key is not None))
    dtypes = {x.dtype for x in given if x is not None} or {query.dtype}
    dtype = query.dtype if dtypes == {query.dtype} else torch.float32
    absent = query.new_empty(0, dtype=dtype)
    return [absent if x is None else x.to(dtype).contiguous() for x in given], flags
