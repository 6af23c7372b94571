"""Reductions over segments of rows: two registered passes, what is made of them, its gradients.

`offsets` (S + 1,) int64 ascend from 0 to T: segment s is rows offsets[s] to offsets[s + 1] of
values (T, C). Nothing is added by atomics, so that results are the same bits at every run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pointformer.kernels.library import LIBRARY, differentiate, implement

# Where the segments 0 to count - 1 start when rows are put in their order, (count + 1,), and that
# order, (T,), both int64, from the segment of each row; the order is stable.
LIBRARY.define("segment_order(Tensor index, SymInt count, str impl) -> (Tensor, Tensor)")
# One row for each segment, (S, C) float32, by `mode`: "sum"; "max", "min" and "largest" (the
# maximum alone), infinite for empty segments; the sums of "squares" (values - other[s])**2 and of
# "exps" exp(values - other[s]), other (S, C) float32; the sums of "products" values * other, other
# (T, C). Besides, the first rows (S, C) int64 that have the "max" or "min": T for empty segments,
# nothing for other modes.
LIBRARY.define(
    "segment_fold(Tensor values, Tensor offsets, Tensor? other, str mode, str impl) -> "
    "(Tensor, Tensor)"
)
# One row for each row of a segment, (rows, C) in `dtype`, by `mode`: "copy" table[s];
# "differences" (values - other[s]) * table[s]; "exps" exp(values - other[s]) * table[s];
# "products" values * (other - table[s]), other (rows, C). table (S, C) float32.
LIBRARY.define(
    "segment_spread(Tensor table, Tensor offsets, Tensor? values, Tensor? other, SymInt rows, "
    "ScalarType dtype, str mode, str impl) -> Tensor"
)
segment_order = torch.ops.pointformer.segment_order.default
_fold = torch.ops.pointformer.segment_fold.default
_spread = torch.ops.pointformer.segment_spread.default


@torch.library.register_fake("pointformer::segment_order", lib=LIBRARY)
def _fake_order(index, count, impl):
    return (
        index.new_empty(count + 1, dtype=torch.int64),
        index.new_empty(index.shape, dtype=torch.int64),
    )


@torch.library.register_fake("pointformer::segment_fold", lib=LIBRARY)
def _fake_fold(values, offsets, other, mode, impl):
    shape = (offsets.shape[0] - 1, values.shape[1])
    first = shape if mode in ("min", "max") else (0,)
    return (
        values.new_empty(shape, dtype=torch.float32),
        values.new_empty(first, dtype=torch.int64),
    )


@torch.library.register_fake("pointformer::segment_spread", lib=LIBRARY)
def _fake_spread(table, offsets, values, other, rows, dtype, mode, impl):
    return table.new_empty((rows, table.shape[1]), dtype=dtype)


implement("segment_order", "segment.order")
implement("segment_fold", "segment.fold")
implement("segment_spread", "segment.spread")


# `reduce` is one of sum, mean, min, max, std, logsumexp. Besides (S, C), in the dtype of values,
# what the gradient needs: first rows for min and max, else a shift (S, C) float32, or nothing.
LIBRARY.define(
    "segment_reduce(Tensor values, Tensor offsets, str reduce, int correction, str impl) -> "
    "(Tensor, Tensor)"
)
LIBRARY.define("segment_softmax(Tensor values, Tensor offsets, str impl) -> Tensor")
fused_segment_reduce = torch.ops.pointformer.segment_reduce.default
fused_segment_softmax = torch.ops.pointformer.segment_softmax.default


@torch.library.register_fake("pointformer::segment_reduce", lib=LIBRARY)
def _fake_reduce(values, offsets, reduce, correction, impl):
    shape = (offsets.shape[0] - 1, values.shape[1])
    kept = torch.int64 if reduce in ("min", "max") else torch.float32
    rest = (0,) if reduce in ("sum", "mean") else shape
    return values.new_empty(shape), values.new_empty(rest, dtype=kept)


@torch.library.register_fake("pointformer::segment_softmax", lib=LIBRARY)
def _fake_softmax(values, offsets, impl):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _lengths(offsets: Tensor) -> Tensor:
    return offsets.diff()[:, None]


def _log_sum(values: Tensor, offsets: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    largest, _ = _fold(values, offsets, None, "largest", impl)
    total, _ = _fold(values, offsets, largest, "exps", impl)
    return largest, total


def _reduce(
    values: Tensor, offsets: Tensor, reduce: str, correction: int, impl: str
) -> tuple[Tensor, Tensor]:
    kept = torch.empty(0, device=values.device, dtype=torch.float32)
    if reduce in ("min", "max"):
        found, kept = _fold(values, offsets, None, reduce, impl)
        found = found.masked_fill(_lengths(offsets) == 0, 0.0)
    elif reduce == "logsumexp":
        largest, total = _log_sum(values, offsets, impl)
        found = torch.where(largest.isinf(), largest, largest + total.log())
        kept = found.clone()
    else:
        found, _ = _fold(values, offsets, None, "sum", impl)
        if reduce != "sum":
            found = found / _lengths(offsets).clamp(min=1)
        if reduce == "std":
            kept = found
            found, _ = _fold(values, offsets, kept, "squares", impl)
            spare = _lengths(offsets) - correction
            found = (found / spare.clamp(min=1)).masked_fill(spare <= 0, 0.0).sqrt()
    return found.to(values.dtype), kept


def _softmax(values: Tensor, offsets: Tensor, impl: str) -> Tensor:
    largest, total = _log_sum(values, offsets, impl)
    options = (len(values), values.dtype, "exps", impl)
    return _spread(1 / total, offsets, values, largest, *options)


torch.library.impl("pointformer::segment_reduce", ("cpu", "cuda"), _reduce, lib=LIBRARY)
torch.library.impl("pointformer::segment_softmax", ("cpu", "cuda"), _softmax, lib=LIBRARY)


def _save_reduce(ctx, inputs, output):
    values, offsets, ctx.reduce, ctx.correction, ctx.impl = inputs
    found, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.rows = values.shape[0]
    needs_values = ctx.reduce in ("std", "logsumexp")
    deviation = found if ctx.reduce == "std" else None
    ctx.save_for_backward(offsets, kept, values if needs_values else None, deviation)


@once_differentiable
def _differentiate_reduce(ctx, grad, _):
    if grad is None:
        return (None,) * 5
    offsets, kept, values, deviation = ctx.saved_tensors
    if ctx.reduce in ("min", "max"):
        below = grad.new_zeros(ctx.rows + 1, grad.shape[1])  # a row for those of empty segments
        return below.scatter_(0, kept, grad)[:-1], *(None,) * 4
    table, mode = grad.float(), "copy"
    if ctx.reduce == "mean":
        table = table / _lengths(offsets).clamp(min=1)
    elif ctx.reduce == "std":
        mode = "differences"
        share = deviation.float() * (_lengths(offsets) - ctx.correction)
        table = torch.where(share > 0, table / share, 0.0)
    elif ctx.reduce == "logsumexp":
        mode = "exps"
        kept = kept.masked_fill(kept.isneginf(), 0.0)  # no NaN where all are -inf
    shift = kept if mode != "copy" else None
    rows, impl = ctx.rows, ctx.impl
    dtype = grad.dtype if ctx.reduce != "std" else torch.float32
    d_values = _spread(table.contiguous(), offsets, values, shift, rows, dtype, mode, impl)
    if ctx.reduce == "std":
        # Zero in exact sum; what is left is the mean's rounding, much where rows are almost equal.
        left = _fold(d_values, offsets, None, "sum", impl)[0] / _lengths(offsets).clamp(min=1)
        d_values = d_values - _spread(left, offsets, None, None, rows, dtype, "copy", impl)
    return d_values.to(grad.dtype), *(None,) * 4


def _save_softmax(ctx, inputs, output):
    _, offsets, ctx.impl = inputs
    ctx.save_for_backward(output, offsets)


@once_differentiable
def _differentiate_softmax(ctx, grad):
    shares, offsets = ctx.saved_tensors
    mean, _ = _fold(shares, offsets, grad, "products", ctx.impl)
    options = (len(shares), shares.dtype, "products", ctx.impl)
    return _spread(mean, offsets, shares, grad, *options), None, None


differentiate("segment_reduce", _differentiate_reduce, _save_reduce)
differentiate("segment_softmax", _differentiate_softmax, _save_softmax)
