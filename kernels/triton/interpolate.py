"""Inverse-distance interpolation for GPUs: weights are computed where they are used, never stored.

The floor is one read of the features and one write of the output. A query reads the rows of its k
neighbors; queries that follow each other share most of them in a cache. Backward, a program owns a
token and reads the gradient's rows of the queries that list it; it needs each query's nearest
distance and sum of weights, which a first kernel leaves behind: two numbers per query.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.triton.attention_pairs import DTYPES, learned_dtypes
from pointformer.kernels.triton.inverse import inverse_lists
from pointformer.kernels.triton.runtime import Variant

_QUERIES = 32  # of a program, one per thread
_ENTRIES = 32  # of a token's list at a time
TINY = tl.constexpr(2.0**-126)  # squares below count as this: powers take normal numbers


@triton.jit
def power(x, h):
    """x**h of normal x > 0, to a relative error of about (1 + h) * 1e-7, and log2(x).

    Integer and fraction of log2(x) are kept apart: the product's rounding error would grow with it.
    """
    bits = x.to(tl.int32, bitcast=True)
    integer = (bits - 0x3F3504F3) >> 23  # of x = mantissa * 2**integer, mantissa about 1
    mantissa = (bits - (integer << 23)).to(tl.float32, bitcast=True)
    integer = integer.to(tl.float32)
    fraction = tl.log2(mantissa)
    whole = h * integer
    part = h * fraction
    y = whole + part
    rest = (whole - y) + part + tl.fma(h, integer, -whole)
    value = tl.exp2(tl.minimum(tl.maximum(y, -126.0), 127.0))
    return value + value * (rest * 0.6931471805599453), integer + fraction


@triton.jit
def inverse_distance(squared, nearest, known, h, eps):
    """1 / ((squared / nearest) ** h + eps), 0 where it is not known, and the factor f of
    d weight / d (2 h) = -f * weight. Both squares are at least TINY."""
    # Rounded like a division, or the nearest one's ratio may not be 1.
    ratio = tl.maximum(tl.math.div_rn(nearest, tl.where(known, squared, nearest)), TINY)
    closeness, logarithm = power(ratio, h + tl.zeros_like(ratio))
    closeness = tl.where((nearest == TINY) & (ratio < 1.0), 0.0, closeness)
    softness = 1.0 / (1.0 + eps * closeness)
    return tl.where(known, closeness * softness, 0.0), logarithm * softness * -0.34657359027997264


@triton.jit
def _square(positions, row, known, own, D: tl.constexpr):
    """Squared distance of each position in `row` from `own`, a tuple of D, at least TINY."""
    squared = tl.zeros(row.shape, tl.float32)
    for axis in tl.static_range(D):
        delta = tl.load(positions + row * D + axis, mask=known, other=0.0) - own[axis]
        squared += delta * delta
    return tl.maximum(squared, TINY)


@triton.jit
def _neighbor(index, query, stored, j, k, tokens):
    row = tl.load(index + query * k + j, mask=stored, other=-1)
    return row.to(tl.int64), (row >= 0) & (row < tokens)


@triton.jit
def _normal(positions, index, query, stored, own, h, eps, k, tokens, D: tl.constexpr):
    """Square of the nearest distance, 1 / sum of the weights, 0 without neighbors, and the weighted
    mean of their slopes."""
    nearest = tl.full(query.shape, float("inf"), tl.float32)
    for j in range(k):
        row, known = _neighbor(index, query, stored, j, k, tokens)
        squared = _square(positions, row, known, own, D)
        nearest = tl.where(known, tl.minimum(nearest, squared), nearest)
    nearest = tl.where(nearest < float("inf"), nearest, 1.0)
    total = tl.zeros(query.shape, tl.float32)
    slopes = tl.zeros(query.shape, tl.float32)
    for j in range(k):
        row, known = _neighbor(index, query, stored, j, k, tokens)
        squared = _square(positions, row, known, own, D)
        weight, slope = inverse_distance(squared, nearest, known, h, eps)
        total += weight
        slopes += weight * slope
    normal = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    return nearest, normal, slopes * normal


@triton.jit(do_not_specialize=("queries", "k", "tokens", "units"))
def interpolate_fwd_kernel(
    features, positions, query_positions, index, power, out, queries, k, tokens, units, eps,
    D: tl.constexpr, QUERIES: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: QUERIES queries, BLOCK_C channels."""
    channels = units * UNIT
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)  # (QUERIES,)
    stored = query < queries
    h = tl.load(power).to(tl.float32) * 0.5
    own = ()
    for axis in tl.static_range(D):
        own += (tl.load(query_positions + query * D + axis, mask=stored, other=0.0),)
    nearest, normal, _ = _normal(positions, index, query, stored, own, h, eps, k, tokens, D)
    acc = tl.zeros((QUERIES, BLOCK_C), tl.float32)
    for j in range(k):
        row, known = _neighbor(index, query, stored, j, k, tokens)
        squared = _square(positions, row, known, own, D)
        weight = inverse_distance(squared, nearest, known, h, eps)[0]
        at = row[:, None] * channels + channel[None, :]
        mask = known[:, None] & (channel < channels)[None, :]
        value = tl.load(features + at, mask=mask, other=0.0)
        acc += (weight * normal)[:, None] * value.to(tl.float32)
    at = query[:, None] * channels + channel[None, :]
    tl.store(out + at, acc, mask=stored[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=("queries", "k", "tokens", "units"))
def interpolate_bwd_query_kernel(
    grad, features, positions, query_positions, index, power, normals, nearests, partial,
    queries, k, tokens, units, eps,
    D: tl.constexpr, LEARN: tl.constexpr, QUERIES: tl.constexpr, BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One program: nearest squares and 1 / sum of the weights of QUERIES queries, and with LEARN
    the part of the power's gradient that comes from BLOCK_C channels:

        d out / d power = sum over j of weight_j * (mean slope - slope_j) * features_j.
    """
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)  # (QUERIES,)
    stored = query < queries
    h = tl.load(power).to(tl.float32) * 0.5
    own = ()
    for axis in tl.static_range(D):
        own += (tl.load(query_positions + query * D + axis, mask=stored, other=0.0),)
    nearest, normal, mean = _normal(positions, index, query, stored, own, h, eps, k, tokens, D)
    if tl.program_id(1) == 0:
        tl.store(normals + query, normal, mask=stored)
        tl.store(nearests + query, nearest, mask=stored)
    if LEARN:
        channels = units * UNIT
        channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
        acc = tl.zeros((QUERIES, BLOCK_C), tl.float32)
        for j in range(k):
            row, known = _neighbor(index, query, stored, j, k, tokens)
            squared = _square(positions, row, known, own, D)
            weight, slope = inverse_distance(squared, nearest, known, h, eps)
            at = row[:, None] * channels + channel[None, :]
            mask = known[:, None] & (channel < channels)[None, :]
            value = tl.load(features + at, mask=mask, other=0.0)
            acc += (weight * normal * (mean - slope))[:, None] * value.to(tl.float32)
        at = query[:, None] * channels + channel[None, :]
        mask = stored[:, None] & (channel < channels)[None, :]
        acc *= tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial + program, tl.sum(tl.sum(acc, 1), 0))


@triton.jit(do_not_specialize=("k", "units"))
def interpolate_bwd_token_kernel(
    grad, positions, query_positions, power, normals, nearests, lists, entries, d_features,
    k, units, eps,
    D: tl.constexpr, ENTRIES: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_C channels of a token, ENTRIES of its list at a time."""
    channels = units * UNIT
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    token = tl.program_id(0).to(tl.int64)
    end = tl.load(lists + token + 1)
    h = tl.load(power).to(tl.float32) * 0.5
    own = ()
    for axis in tl.static_range(D):
        own += (tl.load(positions + token * D + axis),)
    acc = tl.zeros((ENTRIES, BLOCK_C), tl.float32)
    for e0 in range(tl.load(lists + token), end, ENTRIES):
        e = e0 + tl.arange(0, ENTRIES)  # (ENTRIES,)
        entry = tl.load(entries + e, mask=e < end, other=0).to(tl.int32)
        query = (entry // k).to(tl.int64)
        squared = _square(query_positions, query, e < end, own, D)
        nearest = tl.load(nearests + query, mask=e < end, other=1.0)
        weight = inverse_distance(squared, nearest, e < end, h, eps)[0]
        weight *= tl.load(normals + query, mask=e < end, other=0.0)
        at = query[:, None] * channels + channel[None, :]
        mask = (e < end)[:, None] & (channel < channels)[None, :]
        acc += weight[:, None] * tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    out = d_features + token * channels + channel
    tl.store(out, tl.sum(acc, 0), mask=channel < channels)


def _rounds(a):
    if "lists" in a:
        return {"e0": (-(-a["lists"].diff() // a["ENTRIES"])).double().mean().item()}
    return {"j": a["k"]}


def _constants(dtype, dimensions, channels):
    unit = 16 if channels % 16 == 0 else 1  # divides the channels: 16-byte loads need it
    widest = 32 if dtype == torch.float32 else 64
    # Other numbers of channels are the slow path: one width for all.
    block = widest if unit == 1 else min(max(triton.next_power_of_2(channels), 16), widest)
    return {"D": dimensions, "BLOCK_C": block, "UNIT": unit}


@cache
def _forward_variant(dtype, learned, dimensions, channels):
    constants = _constants(dtype, dimensions, channels)
    f32, i32 = torch.float32, torch.int32
    return Variant(
        interpolate_fwd_kernel,
        (dtype, f32, f32, i32, learned, dtype, "i32", "i32", "i32", "i32", "fp32"),
        {**constants, "QUERIES": _QUERIES},
        writes=("out",),
        tiles={"QUERIES": (16, 64), "BLOCK_C": (max(16, constants["BLOCK_C"] // 2),)},
        num_warps=1,
        num_stages=1,
        max_registers=255,
        rounds=_rounds,
    )


@cache
def _query_variant(dtype, learned, dimensions, channels, learn):
    constants = _constants(dtype, dimensions, channels if learn else 16)  # none are read otherwise
    f32, i32 = torch.float32, torch.int32
    return Variant(
        interpolate_bwd_query_kernel,
        (dtype, dtype, f32, f32, i32, learned, f32, f32, f32, *("i32",) * 4, "fp32"),
        {**constants, "LEARN": learn, "QUERIES": _QUERIES},
        writes=("normals", "nearests", "partial") if learn else ("normals", "nearests"),
        num_warps=1,
        num_stages=1,
        max_registers=255,
        rounds=_rounds,
    )


@cache
def _token_variant(dtype, learned, dimensions, channels):
    constants = _constants(dtype, dimensions, channels)
    f32 = torch.float32
    return Variant(
        interpolate_bwd_token_kernel,
        (
            *(dtype, f32, f32, learned, f32, f32, torch.int32, torch.int64, dtype),
            *("i32", "i32", "fp32"),
        ),
        {**constants, "ENTRIES": _ENTRIES},
        writes=("d_features",),
        tiles={"ENTRIES": (16, 64), "BLOCK_C": (max(16, constants["BLOCK_C"] // 2),)},
        num_warps=1,
        num_stages=1,
        max_registers=255,
        rounds=_rounds,
    )


def variants():
    """Every specialization that the launchers below can choose."""
    for dtype in DTYPES:
        for learned in learned_dtypes(dtype):
            for dimensions in (2, 3):
                kind = (dtype, learned, dimensions)
                yield _query_variant(*kind, 16, False)
                for channels in (1, 16, 32, 64):
                    yield _forward_variant(*kind, channels)
                    yield _query_variant(*kind, channels, True)
                    yield _token_variant(*kind, channels)


def forward(features, positions, query_positions, neighbor_index, power, eps):
    """(Q, C) in the features' dtype, see `interpolate`; entries out of range are left out."""
    (tokens, channels), (queries, k) = features.shape, neighbor_index.shape
    power = _readable(power, features)
    variant = _forward_variant(features.dtype, power.dtype, positions.shape[1], channels)
    out = torch.empty(queries, channels, dtype=features.dtype, device=features.device)
    variant.launch(
        lambda constants: (
            triton.cdiv(queries, constants["QUERIES"]),
            triton.cdiv(channels, constants["BLOCK_C"]),
        ),
        *_contiguous(features, positions, query_positions, neighbor_index, power),
        *(out, queries, k, tokens, channels // variant.constants["UNIT"], eps),
    )
    return out


def backward(grad, features, positions, query_positions, neighbor_index, power, eps, learn_power):
    """Gradients of features and power, the latter zero unless `learn_power`."""
    (tokens, channels), (queries, k) = features.shape, neighbor_index.shape
    like, power = power, _readable(power, features)
    kind = (features.dtype, power.dtype, positions.shape[1])
    if neighbor_index.numel() == 0 or features.numel() == 0:
        return features.new_zeros(features.shape), like.new_zeros(like.shape)
    grad, features, positions, query_positions, neighbor_index, power = _contiguous(
        grad, features, positions, query_positions, neighbor_index, power
    )
    variant = _query_variant(*kind, channels, learn_power)
    constants = variant.constants
    blocks = triton.cdiv(channels, constants["BLOCK_C"]) if learn_power else 1
    grid = triton.cdiv(queries, constants["QUERIES"]), blocks
    normals, nearests = (
        torch.empty(queries, device=features.device, dtype=torch.float32) for _ in range(2)
    )
    partial = torch.empty(grid, device=features.device, dtype=torch.float32)
    variant.launch(
        grid,
        *(grad, features, positions, query_positions, neighbor_index, power),
        *(normals, nearests, partial),
        *(queries, k, tokens, channels // constants["UNIT"], eps),
    )
    variant = _token_variant(*kind, channels)
    d_features = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    variant.launch(
        lambda constants: (tokens, triton.cdiv(channels, constants["BLOCK_C"])),
        *(grad, positions, query_positions, power, normals, nearests),
        *inverse_lists(neighbor_index, tokens),
        *(d_features, k, channels // variant.constants["UNIT"], eps),
    )
    if not learn_power:
        return d_features, torch.zeros_like(like)
    total = partial.sum(dtype=torch.float64)  # similar terms, which may cancel
    return d_features, total.to(like.dtype).reshape(like.shape)


def _readable(power, features):
    """As kernels take it: of the features' dtype or float32."""
    return power if power.dtype == features.dtype else power.to(torch.float32)


def _contiguous(*tensors):
    return [x.contiguous() for x in tensors]
