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
def load_rows(data, row, exists, head, token_stride, head_stride, octets, WIDTH: tl.constexpr):
    """One head's channels of some rows (N,): (N, WIDTH), zeros where there are none."""
    lane = tl.arange(0, WIDTH)
    data += head.to(tl.int64) * (head_stride * 8)
    offset = row.to(tl.int64)[:, None] * (token_stride * 8) + lane[None, :]
    return tl.load(data + offset, mask=exists[:, None] & (lane < octets * 8)[None, :], other=0.0)


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
    return tl.load(blank + head * octets * 8 + lane, mask=lane < known, other=0.0)


@triton.jit
def load_points(positions, row, exists, AXES: tl.constexpr):
    """Coordinates of rows (N,): x, y and z, which in 2-D no one reads."""
    base = positions + row.to(tl.int64) * AXES
    x = tl.load(base, mask=exists, other=0.0)
    y = tl.load(base + 1, mask=exists, other=0.0)
    z = tl.load(base + 2, mask=exists, other=0.0) if AXES == 3 else x
    return x, y, z


@triton.jit
def load_bias(position_weight, position_bias, head, features, has_bias, AXES: tl.constexpr):
    """Weights of dx, dy, [dz], distance and direction, and the bias, in units of log2."""
    weights = ()
    for f in tl.static_range(2 * AXES + 1):
        weight = tl.load(position_weight + head * features + f, mask=f < features, other=0.0)
        weights += (weight * LOG2_E,)
    return weights, tl.load(position_bias + head, mask=has_bias != 0, other=0.0) * LOG2_E


@triton.jit
def relate(query_point, key_point, AXES: tl.constexpr):
    """Differences, distance and its inverse of pairs, from points that broadcast to pairs.

    At distance 0 the inverse is finite, and all products with a difference are 0.
    """
    dx = key_point[0] - query_point[0]
    dy = key_point[1] - query_point[1]
    dz = key_point[2] - query_point[2] if AXES == 3 else dx
    squared = dx * dx + dy * dy
    if AXES == 3:
        squared += dz * dz
    inverse = tl.rsqrt(tl.maximum(squared, 1e-36))
    return dx, dy, dz, squared * inverse, inverse


@triton.jit
def position_logits(weights, bias, relation, AXES: tl.constexpr):
    """weights . phi + bias, with the direction's terms folded into those of the differences."""
    dx, dy, dz, distance, inverse = relation
    if AXES == 2:  # the sine (y) comes first
        logits = weights[2] * distance + bias
        logits += (weights[1] + weights[3] * inverse) * dy
        logits += (weights[0] + weights[4] * inverse) * dx
    else:
        logits = weights[3] * distance + bias
        logits += (weights[2] + weights[6] * inverse) * dz
        logits += (weights[1] + weights[5] * inverse) * dy
        logits += (weights[0] + weights[4] * inverse) * dx
    return logits


@triton.jit
def pair_logits(
    a, b, query_point, key_point, weights, bias, log2_scale,
    AXES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Relations and logits of pairs of rows a (N, WIDTH) and b (M, WIDTH), as (N, M).

    One of the two are queries; the points are arranged as `relate` takes them.
    """
    relation = relate(query_point, key_point, AXES)
    logits = dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32), PRECISION)
    return relation, logits * log2_scale + position_logits(weights, bias, relation, AXES)


@triton.jit
def add_features(sums, values, relation, AXES: tl.constexpr):
    """Add values (N, K) times each feature of phi, summed over K, to the sums (N,) of features."""
    dx, dy, dz, distance, inverse = relation
    x, y, z = values * dx, values * dy, values * dz
    if AXES == 2:
        terms = (x, y, values * distance, y * inverse, x * inverse)
    else:
        terms = (x, y, z, values * distance, x * inverse, y * inverse, z * inverse)
    added = ()
    for f in tl.static_range(2 * AXES + 1):
        added += (sums[f] + tl.sum(terms[f], 1),)
    return added


@triton.jit
def list_keys(slot, slots, rows, lengths, members, first, cluster_size, reciprocal, shift):
    """Rows of a tile's keys, which are counted as if each cluster had `cluster_size` of them.

    Returns:
        row, whether there is one, and the word of the queries that attend to it.
    """
    entry = ((slot.to(tl.int64) * reciprocal) >> shift).to(tl.int32)  # slot // cluster_size
    within = slot - entry * cluster_size
    listed = slot < slots
    row = tl.load(rows + first + entry, mask=listed, other=0) + within
    exists = listed & (within < tl.load(lengths + first + entry, mask=listed, other=0))
    return row, exists, tl.load(members + first + entry, mask=exists, other=0)


@triton.jit
def load_keys(
    start, slots, rows, lengths, members, first, cluster_size, reciprocal, shift,
    key, value, positions, head, key_token, key_head, value_token, value_head, octets,
    AXES: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """KEYS of a tile's keys from place `start`: keys, values, points, and who attends to them."""
    slot = start + tl.arange(0, KEYS)
    row, exists, attending = list_keys(
        slot, slots, rows, lengths, members, first, cluster_size, reciprocal, shift
    )
    k = load_rows(key, row, exists, head, key_token, key_head, octets, WIDTH)
    v = load_rows(value, row, exists, head, value_token, value_head, octets, WIDTH)
    x, y, z = load_points(positions, row, exists, AXES)
    return k, v, (x[None, :], y[None, :], z[None, :]), attending[None, :]


def division(divisor):
    """(reciprocal, shift): i // divisor is i * reciprocal >> shift for i below 2**29."""
    shift = 29 + divisor.bit_length()
    return -(-(1 << shift) // divisor), shift


def width_of(channels):
    return max(WIDTHS[0], triton.next_power_of_2(channels))


def readable(rows):
    """A (T, H, d) tensor as `load_rows` can read it, and its strides in units of eight."""
    if rows.stride(2) != 1 or rows.stride(0) % 8 or rows.stride(1) % 8:
        rows = rows.contiguous()
    return rows, (rows.stride(0) // 8, rows.stride(1) // 8)


def learned_tensors(position_weight, position_bias, blank_key, blank_value, absent):
    """The four as kernels take them, and `features`, `has_bias`, `has_blank`."""
    given = (position_weight, position_bias, blank_key, blank_value)
    features = 0 if position_weight is None else position_weight.shape[1]
    flags = (features, int(position_bias is not None), int(blank_key is not None))
    return [absent if x is None else x.contiguous() for x in given], flags
