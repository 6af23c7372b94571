"""Triton sums of listed rows under given weights, forward and backward."""

from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.triton.inverse import inverse_lists
from pointformer.kernels.triton.runtime import Variant

_ROWS = 16  # queries per program, or entries of a token's list at a time
_LEAST, _MOST = 16, 128  # channels at a time


@triton.jit(do_not_specialize=("queries", "tokens", "k", "units"))
def gather_fwd_kernel(
    features, index, weights, output, queries, tokens, k, units,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    channels = units * UNIT
    query = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = query < queries
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for j in range(k):
        row = tl.load(index + query * k + j, mask=here, other=-1)
        known = (row >= 0) & (row < tokens)
        weight = tl.load(weights + query * k + j, mask=known, other=0.0)
        source = features + row.to(tl.int64)[:, None] * channels + channel[None, :]
        inside = known[:, None] & (channel < channels)[None, :]
        total += weight[:, None] * tl.load(source, mask=inside, other=0.0).to(tl.float32)
    target = output + query[:, None] * channels + channel[None, :]
    tl.store(target, total, mask=here[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=("queries", "tokens", "k", "units"))
def gather_bwd_weights_kernel(
    grad, features, index, d_weights, queries, tokens, k, units,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    channels = units * UNIT
    query = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = query < queries
    for j in range(k):
        row = tl.load(index + query * k + j, mask=here, other=-1)
        known = (row >= 0) & (row < tokens)
        total = tl.zeros((ROWS,), tl.float32)
        for start in range(0, channels, WIDTH):
            channel = start + tl.arange(0, WIDTH)
            inside = known[:, None] & (channel < channels)[None, :]
            source = features + row.to(tl.int64)[:, None] * channels + channel[None, :]
            value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            target = grad + query[:, None] * channels + channel[None, :]
            total += tl.sum(value * tl.load(target, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(d_weights + query * k + j, total, mask=here)


@triton.jit(do_not_specialize=("k", "units"))
def gather_bwd_features_kernel(
    grad, weights, begins, entries, d_features, k, units,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One token: the queries that listed it, in ascending order."""
    channels = units * UNIT
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    begin = tl.load(begins + token)
    end = tl.load(begins + token + 1)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(begin, end, ROWS):
        at = start + tl.arange(0, ROWS)
        entry = tl.load(entries + at, mask=at < end, other=0)
        weight = tl.load(weights + entry, mask=at < end, other=0.0)
        query = (entry.to(tl.int32) // k).to(tl.int64)  # there are fewer than 2**31 entries
        source = grad + query[:, None] * channels + channel[None, :]
        inside = (at < end)[:, None] & (channel < channels)[None, :]
        slope = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * slope, 0)
    tl.store(d_features + token * channels + channel, total, mask=channel < channels)


_FLOAT, _INT = torch.float32, torch.int32


def _rounds(a):
    if "begins" in a:
        return {"start": (-(-a["begins"].diff() // a["ROWS"])).double().mean().item()}
    return {"j": a["k"], "start": a["k"] * triton.cdiv(a["units"] * a["UNIT"], a["WIDTH"])}


@cache
def _variant(kernel, dtype, channels):
    types = {
        gather_fwd_kernel: (dtype, _INT, _FLOAT, dtype, *("i32",) * 4),
        gather_bwd_weights_kernel: (dtype, dtype, _INT, _FLOAT, *("i32",) * 4),
        gather_bwd_features_kernel: (dtype, _FLOAT, _INT, torch.int64, dtype, "i32", "i32"),
    }
    unit = 8 if channels % 8 == 0 else 1  # divides the channels: 16-byte loads need it
    # Other numbers of channels are the slow path: one width for all.
    width = 32 if unit == 1 else min(max(_LEAST, triton.next_power_of_2(channels)), _MOST)
    return Variant(
        kernel,
        types[kernel],
        {"ROWS": _ROWS, "WIDTH": width, "UNIT": unit},
        writes={
            gather_fwd_kernel: ("output",),
            gather_bwd_weights_kernel: ("d_weights",),
            gather_bwd_features_kernel: ("d_features",),
        }[kernel],
        tiles={"ROWS": (8, 32), "WIDTH": (max(_LEAST, width // 2),)},
        num_warps=max(1, width // 32),
        rounds=_rounds,
    )


def forward(features, index, weights):
    """(Q, C) in the dtype of `features`, see `weighted_gather`."""
    (queries, k), channels = index.shape, features.shape[1]
    output = features.new_empty(queries, channels)
    variant = _variant(gather_fwd_kernel, features.dtype, channels)
    variant.launch(
        lambda constants: (
            -(-queries // constants["ROWS"]),
            -(-channels // constants["WIDTH"]),
        ),
        *(features.contiguous(), index.contiguous(), weights.contiguous(), output),
        *(queries, len(features), k, channels // variant.constants["UNIT"]),
    )
    return output


def backward(grad, features, index, weights):
    """Gradients of features and weights."""
    (queries, k), (tokens, channels) = index.shape, features.shape
    grad, index, weights = grad.contiguous(), index.contiguous(), weights.contiguous()
    d_features, d_weights = features.new_empty(features.shape), weights.new_empty(weights.shape)
    variant = _variant(gather_bwd_weights_kernel, features.dtype, channels)
    units = channels // variant.constants["UNIT"]
    variant.launch(
        lambda constants: (-(-queries // constants["ROWS"]),),
        *(grad, features.contiguous(), index, d_weights, queries, tokens, k, units),
    )
    begins, entries = inverse_lists(index, tokens)
    variant = _variant(gather_bwd_features_kernel, features.dtype, channels)
    variant.launch(
        lambda constants: (tokens, -(-channels // constants["WIDTH"])),
        *(grad, weights, begins, entries, d_features, k, units),
    )
    return d_features, d_weights


def variants():
    """Every specialization that the functions above can launch."""
    for kernel in (gather_fwd_kernel, gather_bwd_weights_kernel, gather_bwd_features_kernel):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for channels in (1, 16, 32, 64, 128):
                yield _variant(kernel, dtype, channels)
