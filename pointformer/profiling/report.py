"""One row per stage, op and pass: time beside the least time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pointformer.models import Model, capture
from pointformer.models.inference import unmoved
from pointformer.models.mask2former import MaskPredictions
from pointformer.profiling.machine import Limits
from pointformer.profiling.ops import BACKWARD, FORWARD, OPS, Call
from pointformer.profiling.record import record
from pointformer.profiling.timing import Times, time_call
from pointformer.profiling.work import Work

REST, TOTAL = "rest", "total"
# Of an H100's or H200's L2 cache, as published microbenchmarks measure it for reads.
L2_BANDWIDTH = 5.5e12


def h100_limits(dtype: torch.dtype) -> Limits:
    """Of an H100, for predictions: a plain copy, and plain products of bfloat16 or float32."""
    return Limits(bandwidth=3.0e12, rate=50e12 if dtype == torch.float32 else 790e12)


@dataclass(frozen=True)
class Row:
    """The calls of one op in one stage, one pass; or the rest, or the total of a pass.

    Attributes:
        stage: as in `Call`, "" for the rest and the total.
        op: a key of `OPS` or `LAYERS`, "rest" or "total". The total is a pass of the whole model in
            one go; the rest is what it takes longer than the sum of the calls one by one, with the
            layers and element-wise functions that are not told apart.
        direction: "forward" or "backward".
        calls: how many.
        work: least work of all calls.
        traffic: bytes that the Triton kernels read and write by prediction, or `None`.
        rows: rows that they read per token, or `None`.
        times: of all calls; the sums of the quantiles of each. `None` if not timed.
        floor: least seconds by the device's limits, of each call the longer of moving and
            computing. `None` without limits.
        issue: least seconds in which an H100 issues the instructions of the Triton kernels, or
            `None`.
    """

    stage: str
    op: str
    direction: str
    calls: int
    work: Work
    traffic: int | None = None
    rows: float | None = None
    times: Times | None = None
    floor: float | None = None
    issue: float | None = None

    @property
    def bound(self) -> float | None:
        """Of memory, arithmetic, L2 cache and issue the longest, as far as they are known."""
        cache = self.traffic and self.traffic / L2_BANDWIDTH
        known = [time for time in (self.floor, cache, self.issue) if time]
        return max(known, default=None)

    @property
    def ratio(self) -> float | None:
        """Median time over floor."""
        return self.times.q50 / self.floor if self.times and self.floor else None

    def __add__(self, other: Row) -> Row:
        """Both rows' calls. Rows per token have no sum."""
        return replace(
            self,
            calls=self.calls + other.calls,
            work=self.work + other.work,
            traffic=_sum(self.traffic, other.traffic),
            rows=None,
            times=_sum(self.times, other.times),
            floor=_sum(self.floor, other.floor),
            issue=_sum(self.issue, other.issue),
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON: times and floor in microseconds; what is not known is left out."""
        times, floor = self.times, self.floor
        values = {
            "stage": self.stage,
            "op": self.op,
            "pass": self.direction,
            "calls": self.calls,
            "bytes": self.work.bytes,
            "operations": self.work.operations,
            "predicted_l2_bytes": self.traffic,
            "predicted_rows_per_token": _rounded(self.rows),
            "time_us": None if times is None else [_rounded(1e6 * t) for t in times.quantiles],
            "floor_us": _rounded(floor and 1e6 * floor),
            "issue_us": _rounded(self.issue and 1e6 * self.issue),
            "bound_us": _rounded(self.bound and 1e6 * self.bound) if self.issue else None,
            "ratio": _rounded(self.ratio),
        }
        return {name: value for name, value in values.items() if value is not None}


def _sum(first, second):
    return None if first is None or second is None else first + second


def _rounded(value: float | None) -> float | None:
    """Four digits: more would be noise."""
    return None if value is None else float(f"{value:.4g}")


def profile(
    model: Model,
    images: Tensor,
    limits: Limits | None = None,
    *,
    backward: bool = False,
    repeats: int = 0,
    only: str | None = None,
    warm: bool = False,
    graph: bool = False,
    instructions: bool = False,
) -> list[Row]:
    """Count and time the calls of a forward pass, and of the backward pass.

    Args:
        model: on the device and in the dtype of `images`.
        images: (B, C, H, W), normalized.
        limits: of the device, for the floors; see `measure_limits`.
        backward: also the backward pass. The forward pass is then that of training.
        repeats: how often each call is timed; 0 counts only, which needs no time beyond one forward
            pass, and little memory.
        only: name of the only op to list, without rest and total.
        warm: time with the L2 cache as the call itself left it; see `time_call`.
        graph: time the whole forward pass as a CUDA graph.
        instructions: also count what the Triton kernels issue; see `record`.

    Returns:
        One `Row` per stage, op and pass in the order of the calls, then rest and total of each
        pass. Stages of an op have one row each even if their calls differ in shape.
    """
    rows: dict[tuple, Row] = {}
    with unmoved(model):
        keep = repeats > 0
        counted = [name for name in OPS if instructions and only in (None, name)]
        for call in record(model, images, backward=backward, keep=keep, instructions=counted):
            if only not in (None, call.name):
                continue
            for direction, work in call.work.items():
                times = None
                if repeats:
                    run = _runner(call, direction, backward)
                    with torch.set_grad_enabled(backward):
                        times = time_call(run, images.device, repeats, warm=warm) * call.count
                traffic = call.traffic.get(direction)
                row = Row(
                    call.stage,
                    call.name,
                    direction,
                    call.count,
                    work * call.count,
                    None if traffic is None else traffic.bytes * call.count,
                    None if traffic is None else traffic.rows,
                    times,
                    None if limits is None else limits.floor(work) * call.count,
                    call.issue[direction] * call.count if direction in call.issue else None,
                )
                key = (call.stage, call.name, direction)
                rows[key] = rows[key] + row if key in rows else row
        listed = list(rows.values())
        if only is None:
            for direction in (FORWARD, BACKWARD) if backward else (FORWARD,):
                listed += _whole(model, images, listed, direction, backward, repeats, warm, graph)
    return listed


def _runner(call: Call, direction: str, training: bool) -> Callable[[], object]:
    if training:
        call = call.differentiable()
    return call.run if direction == FORWARD else call.backward()


def _whole(
    model: Model,
    images: Tensor,
    rows: Sequence[Row],
    direction: str,
    training: bool,
    repeats: int,
    warm: bool,
    graph: bool,
) -> list[Row]:
    """Rest and total of a pass."""
    parts = [row for row in rows if row.direction == direction and row.op not in (REST, TOTAL)]
    if not parts:
        return []
    total = sum(parts[1:], parts[0])
    total = replace(total, stage="", op=TOTAL, calls=1, traffic=None, issue=None)
    if not repeats:
        return [total]
    with torch.set_grad_enabled(training):
        if direction == FORWARD:

            def run() -> object:
                return model(images)

            if graph:
                run = capture(run)
        else:
            run = _backward_of(model, images)
        times = time_call(run, images.device, repeats, warm=warm)
    assert total.times is not None
    rest = Row("", REST, direction, 1, Work(), times=times - total.times)
    return [rest, replace(total, times=times)]


def _backward_of(model: Model, images: Tensor) -> Callable[[], object]:
    outputs = [x for x in _tensors(model(images)) if x.requires_grad]
    grads = [torch.randn_like(x) for x in outputs]
    parameters = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(
        outputs, parameters, grads, retain_graph=True, allow_unused=True
    )


def _tensors(value: object) -> Iterator[Tensor]:
    """Those that a model computes: of `MaskPredictions` not the positions of their tokens."""
    for leaf in pytree.tree_leaves(value, is_leaf=lambda x: isinstance(x, MaskPredictions)):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, MaskPredictions):
            yield from (leaf.class_logits, leaf.mask_logits)
            yield from _tensors((leaf.auxiliary, leaf.temperatures))


def table(rows: Sequence[Row]) -> str:
    """The rows for people: columns of what is known of any row."""
    times = any(row.times for row in rows)
    floors = any(row.floor for row in rows)
    issue = any(row.issue for row in rows)
    # Title, whether to print, and how.
    columns: list[tuple[str, bool, Callable[[Row], str]]] = [
        ("stage", True, lambda row: row.stage),
        ("op", True, lambda row: row.op),
        ("pass", True, lambda row: row.direction),
        ("calls", True, lambda row: str(row.calls)),
        ("20% ms", times, lambda row: _number(1e3 * row.times.q20 if row.times else None)),
        ("50% ms", times, lambda row: _number(1e3 * row.times.q50 if row.times else None)),
        ("80% ms", times, lambda row: _number(1e3 * row.times.q80 if row.times else None)),
        ("MB", True, lambda row: _number(row.work.bytes / 1e6 or None)),
        ("GFLOP", True, lambda row: _number(row.work.operations / 1e9 or None)),
        ("floor ms", floors, lambda row: _number(row.floor and 1e3 * row.floor)),
        ("ratio", times and floors, lambda row: _number(row.ratio)),
        ("L2 MB", not times, lambda row: _number(row.traffic and row.traffic / 1e6)),
        ("issue ms", issue, lambda row: _number(row.issue and 1e3 * row.issue)),
        ("bound ms", issue, lambda row: _number(row.bound and 1e3 * row.bound)),
        ("rows/token", not times, lambda row: _number(row.rows)),
    ]
    shown = [(title, text) for title, condition, text in columns if condition]
    lines = [[title for title, _ in shown], *([text(row) for _, text in shown] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _number(value: float | None) -> str:
    """Three digits, with an exponent only where they are far behind the point."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = abs(value)
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    if size < 0.0095:
        return f"{value:.1e}"
    return f"{value:,.{decimals}f}"
