"""Deformable attention whose values sit on tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer._checks import (
    FLOATS,
    INTEGERS,
    as_int32,
    brief,
    check_listed_rows,
    check_number,
    check_per_sample,
    check_positions,
    check_power,
    check_rows,
    check_tensor,
    describe,
    lacks_gradient_of,
)
from pointformer._dispatch import choose
from pointformer.clusters import offsets_of
from pointformer.kernels.deformable import fused_deformable
from pointformer.kernels.tables import from_host
from pointformer.reference.deformable import deformable_attention as reference

_MOST = 2**31 - 1  # groups of eight channels have int32 numbers on GPUs
_MOST_NEAR = 16  # tokens near a place that GPU kernels hold


def deformable_attention(
    value: Tensor,
    positions: Tensor,
    offsets: Tensor,
    weights: Tensor,
    query_positions: Tensor,
    query_sample: Tensor,
    lookup: Tensor,
    extent: Sequence,
    *,
    power: Tensor | float = 6.0,
    eps: float = 1e-11,
    impl: str | None = None,
) -> Tensor:
    """Multi-scale deformable attention over points (AutoFocusFormer, section 4.1).

    Each head of a query looks at P places per level, `query_positions + offsets`. A value there is
    interpolated from the level's tokens that `lookup` lists for the nearest cell of the canvas,
    under the weights `1 / (distance ** power + eps)`, normalized to sum 1, with distances from the
    place itself, however large; those up to 1.1e-19, the root of the smallest normal number, count
    as 0. Places outside the canvas use its border cells.

    Args:
        value: (T, H, d) floating: the tokens of all levels.
        positions: (T, 2) float32, in units of cells; they get no gradient.
        offsets: (Q, H, L, P, 2) floating, in units of cells on every level.
        weights: (Q, H, L, P) floating, the attention weights; usually a softmax over L and P.
        query_positions: (Q, 2) float32.
        query_sample: (Q,) int64, the sample of each query.
        lookup: (cells, L, k) int32 or int64: for each cell of each sample's canvas, row by row, the
            rows of `value` that lie nearest to it on each level, -1 where there are fewer.
        extent: columns and rows of the canvas, at least 1: one pair for all samples, or each its
            own.
        power: of the distance, a positive number, or a tensor of one element to learn it.
        eps: positive, in units of distance ** power.
        impl: "reference" (differentiable twice), "cpu" or "triton" (float32 arithmetic; k of at
            most 16), or `None` for the device's own.

    Returns:
        (Q, H, d) in the dtype of `value`. Gradients reach the value, offsets, weights and power;
        those for positions come from the reference only.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value does not fit.
        IndexError: a row of `lookup` does not exist; on GPUs it is left out. Or a sample does not,
            which GPUs do not wait to find out.
    """
    tokens, heads, _ = check_tensor("value", value, ("T", "H", "d"), FLOATS).shape
    device = value.device
    positions = check_positions("positions", positions, 2)
    check_tensor("positions", positions, (tokens, 2), device=device)
    check_tensor("offsets", offsets, ("Q", heads, "L", "P", 2), FLOATS, device)
    queries, _, levels, points, _ = offsets.shape
    check_tensor("weights", weights, (queries, heads, levels, points), FLOATS, device)
    query_positions = check_positions("query_positions", query_positions, 2)
    check_tensor("query_positions", query_positions, (queries, 2), device=device)
    check_tensor("query_sample", query_sample, (queries,), (torch.int64,), device)
    check_tensor("lookup", lookup, ("cells", levels, "k"), INTEGERS, device)
    canvas = _canvas(extent, lookup, device)
    check_rows("query_sample", query_sample, len(canvas), "samples", wait=False)
    power = check_power(power, device)
    eps = check_number("eps", eps, above=0)

    def lacks() -> str | None:
        if value.dtype == torch.float64:
            return "value is float64"
        return lacks_gradient_of(positions=positions, query_positions=query_positions)

    def triton_lacks() -> str | None:
        if lookup.shape[2] > _MOST_NEAR:
            return f"lookup lists {lookup.shape[2]} tokens, more than {_MOST_NEAR}"
        if value.numel() // (1 if value.shape[2] % 8 else 8) > _MOST:
            return f"value has {value.numel()} elements"
        return lacks()

    fast = {"cpu": lacks, "triton": triton_lacks}
    chosen = choose("deformable_attention", impl, fast, device, differentiable=True)
    check_listed_rows("lookup", lookup, tokens, chosen)
    canvas = canvas[query_sample]
    if not isinstance(power, Tensor):
        power = torch.full((), power, dtype=torch.float32, device=device)
    if chosen == "reference":
        return reference(
            value, positions, offsets, weights, query_positions, canvas, lookup, power, eps
        )
    inputs = (value, positions, _learned(offsets, value), _learned(weights, value), query_positions)
    lists = (canvas.int(), as_int32(lookup))
    return fused_deformable(*inputs, *lists, _learned(power, value), eps, chosen)


def _learned(tensor: Tensor, value: Tensor) -> Tensor:
    """A tensor as kernels read it: in the dtype of the value, or float32."""
    return tensor if tensor.dtype == value.dtype else tensor.float()


def _canvas(extent: Sequence, lookup: Tensor, device: torch.device) -> Tensor:
    """(B, 3) int64: first cell, width and height of each sample's canvas."""
    sides = check_per_sample("extent", extent, None, 2, 1)
    shapes = [(int(width), int(height)) for width, height in sides]
    if any(shape != side for shape, side in zip(shapes, sides, strict=True)):
        raise ValueError(f"extent: expected whole columns and rows, got {brief(sides)}")
    if len(shapes) == 1:  # maybe one pair for all samples
        shapes *= lookup.shape[0] // max(math.prod(shapes[0]), 1)
    cells = [width * height for width, height in shapes]
    if sum(cells) != lookup.shape[0]:
        raise ValueError(
            f"lookup: expected {sum(cells)} cells for extent {brief(shapes)}, "
            f"got {describe(lookup)}"
        )
    first = offsets_of(cells, device)[:-1, None]
    if len(set(shapes)) == 1:  # no copy from the host
        columns, rows = (torch.full_like(first, side) for side in shapes[0])
        return torch.cat([first, columns, rows], 1)
    return torch.cat([first, from_host(shapes, torch.int64, device).view(-1, 2)], 1)
