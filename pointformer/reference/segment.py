"""Reductions over segments of rows in plain torch: any dtype, differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_order(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Starts of segments when rows are put in their order, and that order, both int64."""
    index, order = torch.sort(index, stable=True)
    return torch.searchsorted(index, torch.arange(count + 1, device=index.device)), order


def _segment_of_rows(offsets: Tensor, rows: int) -> Tensor:
    segment = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(segment, offsets.diff(), output_size=rows)


def _sum(values: Tensor, segment: Tensor, count: int) -> Tensor:
    return values.new_zeros(count, values.shape[1]).index_add(0, segment, values)


def _first_largest(values: Tensor, segment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(count, C) largest values, -inf for none, and the first rows that have them; NaN is largest.

    The values have no gradient.
    """
    values, rows = values.detach(), len(values)
    wide = segment[:, None].expand_as(values)
    largest = values.new_full((count, values.shape[1]), -torch.inf)
    largest = largest.scatter_reduce(0, wide, values, "amax")
    reached = (values == largest[segment]) | values.isnan()
    row = torch.arange(rows, device=values.device)[:, None].where(reached, rows)
    first = row.new_full(largest.shape, rows).scatter_reduce(0, wide, row, "amin")
    return largest, first


def segment_reduce(values: Tensor, offsets: Tensor, reduce: str, correction: int) -> Tensor:
    """(S, C) from `values` (T, C), segment s being rows `offsets[s]` to `offsets[s + 1]`."""
    count, rows = len(offsets) - 1, len(values)
    segment = _segment_of_rows(offsets, rows)
    x = values.to(torch.promote_types(values.dtype, torch.float32))
    length = offsets.diff()[:, None]
    if reduce in ("min", "max"):
        sign = 1 if reduce == "max" else -1
        first = _first_largest(sign * x, segment, count)[1].where(length > 0, rows)
        found = torch.cat([x, x.new_zeros(1, x.shape[1])]).gather(0, first)
    elif reduce == "logsumexp":
        largest, _ = _first_largest(x, segment, count)
        shift = largest.masked_fill(largest.isinf(), 0.0)
        total = _sum((x - shift[segment]).exp(), segment, count)
        some = total != 0  # where all are -inf, so is the result, and no gradient is NaN
        found = total.where(some, 1.0).log().where(some, -torch.inf) + shift
    else:
        found = _sum(x, segment, count)
        if reduce != "sum":
            found = found / length.clamp(min=1)
        if reduce == "std":
            square = _sum((x - found[segment]).square(), segment, count)
            variance = square / (length - correction).clamp(min=1)
            some = (variance > 0) & (length > correction)
            found = variance.where(some, 1.0).sqrt().where(some, variance.detach() * some)
    return found.to(values.dtype)


def segment_softmax(values: Tensor, offsets: Tensor) -> Tensor:
    """(T, C), see `segment_reduce`."""
    count = len(offsets) - 1
    segment = _segment_of_rows(offsets, len(values))
    x = values.to(torch.promote_types(values.dtype, torch.float32))
    largest, _ = _first_largest(x, segment, count)
    exponential = (x - largest[segment]).exp()
    return (exponential / _sum(exponential, segment, count)[segment]).to(values.dtype)
