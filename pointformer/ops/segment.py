"""Reductions over segments of rows: the tokens of samples, the edges of nodes, pools."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer._checks import (
    FLOATS,
    INTEGERS,
    brief,
    can_read,
    check_count,
    check_flags,
    check_integers,
    check_option,
    check_tensor,
    describe,
    too_many,
)
from pointformer._dispatch import choose
from pointformer.clusters import offsets_of
from pointformer.kernels.segment import (
    fused_segment_reduce,
    fused_segment_softmax,
    segment_order,
)
from pointformer.reference import segment as reference

_REDUCTIONS = ("sum", "mean", "min", "max", "std")


def segment_reduce(
    values: Tensor,
    reduce: str = "sum",
    *,
    sizes: Sequence[int] | None = None,
    offsets: Tensor | None = None,
    index: Tensor | None = None,
    count: int | None = None,
    correction: int = 1,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Sum, mean, minimum, maximum or standard deviation of the rows of each segment.

    With the `sizes` of a batch this is a global pool over its samples. The same bits at every run,
    on any number of threads.

    Args:
        values: (T, ...) floating.
        reduce: "sum", "mean", "min", "max" or "std".
        sizes: rows per segment, S host integers: segments are consecutive.
        offsets: (S+1,) int32 or int64 on the device of `values`, in place of `sizes`: segment s is
            rows `offsets[s]` to `offsets[s + 1]`. They ascend from 0 to T.
        index: (T,) int32 or int64, in place of both: the segment of each row, in any order. Rows in
            order of segments are faster; on a GPU only `offsets` spare sorting.
        count: S, the number of segments of `index`; `None` for as many as `index` names, which
            waits for the device.
        correction: what the squares' sum of "std" is divided by: the rows less this.
        check_values: whether to look for `offsets` and an `index` that do not fit, which waits for
            the device. Never done under `torch.compile` and while a CUDA graph is captured.
        impl: "reference", "cpu" or "triton"; `None` chooses by device. "torch_scatter" for
            comparison where torch-scatter is installed: it leaves NaN out of "min" and "max". Only
            the reference takes float64 and is differentiable twice.

    Returns:
        (S, ...) in the dtype of `values`, computed in float32 at least. Segments without rows get
        0, and so does "std" of those with at most `correction` rows. NaN is both least and largest.
        The gradient of "min" and "max" goes to the first row in the order of `values` that has it,
        that of "std" is 0 where all rows are equal.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value does not fit.
        IndexError: `index` names a segment that does not exist.
    """
    check_option("reduce", reduce, _REDUCTIONS)
    check_count("correction", correction, least=0)
    given = (sizes, offsets, index, count)
    rows = _in_segments("segment_reduce", values, *given, check_values, impl)
    return _reduced(values, rows, reduce, correction)


def segment_logsumexp(
    values: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    offsets: Tensor | None = None,
    index: Tensor | None = None,
    count: int | None = None,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Logarithm of the sum of the exponentials of each segment's rows: (S, ...).

    -inf for segments without rows. Where all rows are -inf, so is the result, and their gradients
    are 0. Arguments and errors as for `segment_reduce`.
    """
    given = (sizes, offsets, index, count)
    rows = _in_segments("segment_logsumexp", values, *given, check_values, impl)
    return _reduced(values, rows, "logsumexp", 0)


def segment_softmax(
    values: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    offsets: Tensor | None = None,
    index: Tensor | None = None,
    count: int | None = None,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Softmax over the rows of each segment, channel by channel: (T, ...).

    For the logits of edges with the `index` of their targets, or of tokens with the `sizes` of
    samples. A segment whose rows all are -inf gets NaN, as from `torch.softmax`. Arguments and
    errors as for `segment_reduce`.
    """
    given = (sizes, offsets, index, count)
    rows = _in_segments("segment_softmax", values, *given, check_values, impl)
    offsets, order, chosen = rows
    table = _table(values, order)
    if chosen == "reference":
        shares = reference.segment_softmax(table, offsets)
    else:
        shares = fused_segment_softmax(table, offsets, chosen)
    if order is not None:
        shares = torch.empty_like(shares).index_copy(0, order, shares)
    return shares.view(values.shape)


def _reduced(
    values: Tensor, rows: tuple[Tensor, Tensor | None, str], reduce: str, correction: int
) -> Tensor:
    offsets, order, chosen = rows
    table = _table(values, order)
    if chosen == "reference":
        found = reference.segment_reduce(table, offsets, reduce, correction)
    else:
        found, _ = fused_segment_reduce(table, offsets, reduce, correction, chosen)
    return found.view(len(offsets) - 1, *values.shape[1:])


def _table(values: Tensor, order: Tensor | None) -> Tensor:
    """(T, C), rows in the order of segments."""
    channels = values.shape[1:].numel()
    table = values.reshape(len(values), channels)
    if order is None:
        return table
    if channels == 1:  # torch copies rows of one number each at several times the cost
        return table.view(-1).index_select(0, order)[:, None]
    return table.index_select(0, order)


def _in_segments(
    op: str,
    values: object,
    sizes: Sequence[int] | None,
    offsets: Tensor | None,
    index: Tensor | None,
    count: int | None,
    check_values: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor | None, str]:
    """Where segments start, (S+1,) int64; the rows in their order, or `None` if they are; and the
    implementation to run."""
    if not isinstance(values, Tensor) or values.dim() == 0 or values.dtype not in FLOATS:
        raise TypeError(f"values: expected a floating tensor (T, ...), got {describe(values)}")
    check_flags(check_values=check_values)
    given = [name for name, x in _named(sizes, offsets, index) if x is not None]
    if len(given) != 1:
        raise ValueError(
            f"sizes, offsets, index: expected one of them, got {' and '.join(given) or 'none'}"
        )
    if count is not None and index is None:
        raise ValueError(f"count: expected None without index, {given[0]} tells it")
    rows, device = len(values), values.device

    def lacks() -> str | None:
        if values.dtype == torch.float64:
            return "values are float64"
        return f"values has {rows} rows" if too_many(rows) else None

    chosen = choose(
        op,
        impl,
        dict.fromkeys(("cpu", "triton", "torch_scatter"), lacks),
        device,
        differentiable=True,
    )
    checked = check_values and can_read(values)
    if isinstance(sizes, Tensor) and torch.compiler.is_compiling():
        return offsets_of(sizes, device), None, chosen  # unread, see `PerSample`
    if sizes is not None:
        sizes = check_integers("sizes", sizes, "the number of rows of each segment")
        if any(size < 0 for size in sizes):
            raise ValueError(f"sizes: sizes must not be negative, got {brief(sizes)}")
        if sum(sizes) != rows:
            raise ValueError(
                f"values: expected {sum(sizes)} rows as sizes add up to, got {describe(values)}"
            )
        return offsets_of(sizes, device), None, chosen
    if offsets is not None:
        offsets = check_tensor("offsets", offsets, ("S+1",), INTEGERS, device).long()
        if len(offsets) == 0:
            raise ValueError("offsets: expected at least one, where the first segment starts")
        if checked:
            _check_offsets(offsets, rows)
        return offsets, None, chosen
    index = check_tensor("index", index, ("T",), INTEGERS, device).long()
    if len(index) != rows:
        raise ValueError(
            f"index: expected {rows} rows as in values, got {describe(index)} for "
            f"values {tuple(values.shape)}"
        )
    if count is not None:
        check_count("count", count, least=0)
    if count is None and torch.compiler.is_compiling():
        count = torch.nn.functional.pad(index + 1, (1, 0)).amax().item()  # type: ignore[assignment]
    if count is None or checked:
        least, most = (int(x) for x in index.aminmax()) if rows else (0, -1)
        count = most + 1 if count is None else count
        if least < 0 or most >= count:
            raise IndexError(
                f"index: segment {least if least < 0 else most} of {count} does not exist"
            )
    # Most of those that are in no order show it at once.
    if device.type == "cpu" and can_read(index) and _ascends(index[:1024]) and _ascends(index):
        return torch.searchsorted(index, torch.arange(count + 1)), None, chosen
    if chosen == "reference":
        return *reference.segment_order(index, count), chosen
    return *segment_order(index, count, chosen), chosen


def _ascends(index: Tensor) -> bool:
    return bool((index[1:] >= index[:-1]).all())


def _named(*given: object) -> zip:
    return zip(("sizes", "offsets", "index"), given, strict=True)


def _check_offsets(offsets: Tensor, rows: int) -> None:
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != rows or bool((offsets.diff() < 0).any()):
        falls = int((offsets.diff() < 0).sum())
        raise ValueError(
            f"offsets: expected to ascend from 0 to {rows}, the rows of values, got {first} to "
            f"{last}, {falls} times descending"
        )
