"""Residual sums and their LayerNorm on GPUs: every row is read once and written twice."""

from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.triton.runtime import Variant

_TOGETHER = 2048  # elements of a program
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=("rows", "units"))
def add_norm_fwd_kernel(
    x, branch, scale, weight, bias, total, normed, mean, inverse, rows, units, eps,
    SCALED: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    channels = units * UNIT
    channel = tl.arange(0, WIDTH)
    there = channel < channels
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    stored = row < rows
    place = tl.minimum(row, rows - 1).to(tl.int64)[:, None] * channels + channel[None, :]
    added = tl.load(branch + place, mask=there[None, :], other=0.0).to(tl.float32)
    if SCALED:
        factor = tl.load(scale + channel, mask=there, other=0.0).to(tl.float32)
        added *= factor[None, :]
    added += tl.load(x + place, mask=there[None, :], other=0.0).to(tl.float32)
    # What is normalized is the sum as it is stored.
    added = added.to(total.dtype.element_ty)
    written = stored[:, None] & there[None, :]
    tl.store(total + place, added, mask=written)
    value = added.to(tl.float32)  # (ROWS, WIDTH)
    average = tl.sum(value, 1) / channels
    value = tl.where(there[None, :], value - average[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(value * value, 1) / channels + eps)
    slope = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    value = value * factor[:, None] * slope[None, :] + shift[None, :]
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=written)
    tl.store(mean + row, average, mask=stored)
    tl.store(inverse + row, factor, mask=stored)


@cache
def _variant(x, branch, learned, scaled, channels):
    width = max(16, triton.next_power_of_2(channels))
    total, f32 = torch.promote_types(x, branch), torch.float32
    return Variant(
        add_norm_fwd_kernel,
        (x, branch, *(learned,) * 3, total, total, f32, f32, "i32", "i32", "fp32"),
        {
            "SCALED": scaled,
            "UNIT": 8 if channels % 8 == 0 else 1,
            "ROWS": max(1, _TOGETHER // width),
            "WIDTH": width,
        },
        writes=("total", "normed", "mean", "inverse"),
        tiles={"ROWS": tuple(max(1, _TOGETHER // width * n // 2) for n in (1, 4))},
        num_warps=4 if width <= _TOGETHER else 8,
        max_registers=128,  # of its own the assembler aims at more warps, and spills for it
    )


def variants():
    """Every specialization that `forward` can launch with the channels of the models."""
    for x in _DTYPES:
        for branch in dict.fromkeys((x, *(_DTYPES if x == torch.float32 else ()))):
            for learned in dict.fromkeys((x, torch.float32)):
                for scaled in (False, True):
                    for channels in (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
                        yield _variant(x, branch, learned, scaled, channels)


def forward(x, branch, scale, weight, bias, eps):
    """See `pointformer.kernels.norm`."""
    rows, channels = x.shape
    dtype = torch.promote_types(x.dtype, branch.dtype)
    total, normed = (torch.empty((rows, channels), dtype=dtype, device=x.device) for _ in range(2))
    mean, inverse = (torch.empty((rows, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    given = (weight if scale is None else scale, weight, bias)
    learned = x.dtype if {p.dtype for p in given} == {x.dtype} else torch.float32
    variant = _variant(x.dtype, branch.dtype, learned, scale is not None, channels)
    variant.launch(
        lambda constants: (triton.cdiv(rows, constants["ROWS"]),),
        *(x.contiguous(), branch.contiguous(), *(p.to(learned).contiguous() for p in given)),
        *(total, normed, mean, inverse, rows, channels // variant.constants["UNIT"], eps),
    )
    return total, normed, mean, inverse
