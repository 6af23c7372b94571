"""Inverse-distance interpolation between token sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer._checks import (
    FLOATS,
    INTEGERS,
    as_int32,
    check_count,
    check_finite,
    check_flags,
    check_listed_rows,
    check_number,
    check_positions,
    check_power,
    check_query_sizes,
    check_same_positions,
    check_tensor,
    lacks_gradient_of,
    too_many,
)
from pointformer._dispatch import choose
from pointformer.geometry.neighbors import knn
from pointformer.kernels.interpolate import fused_interpolate
from pointformer.reference.interpolate import interpolate as reference_interpolate


def interpolate(
    features: Tensor,
    positions: Tensor,
    query_positions: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    query_sizes: Sequence[int] | None = None,
    query_batch: Tensor | None = None,
    neighbor_index: Tensor | None = None,
    k: int = 4,
    power: Tensor | float = 6.0,
    eps: float = 1e-11,
    same_positions: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Features at other positions: mean of the nearest tokens, weighted by inverse distance.

    Shepard's interpolation, as AutoFocusFormer uses it in place of the bilinear one:

        w_j = 1 / ((distance_j / distance of the nearest) ** power + eps),

    normalized to sum 1 over the neighbors; a query at the place of tokens gets the mean of those.
    Other units of the positions give the same result where distances stay above 1.1e-19, the root
    of the smallest normal number: shorter ones count as 0, there their squares vanish.

    Args:
        features: (T, C) floating.
        positions: (T, D) float32, D = 2 or 3.
        query_positions: (Q, D) float32.
        sizes: tokens per sample, which must add up to T; None: one sample.
        batch: in place of `sizes` the sample of each token, see `sizes_from_batch`.
        query_sizes, query_batch: the same of the Q queries.
        neighbor_index: (Q, k) int32 or int64, rows of the neighbors, -1 where there are fewer;
            None: the `k` nearest tokens of the query's sample. Give it where several feature sets
            share positions: the search costs more than the interpolation.
        k: neighbors to search for.
        power: of the distance, a positive number, or a tensor of one element to learn it.
        eps: positive. Larger ones flatten the weights; the default changes no digit.
        same_positions: promises that all samples have the same positions and query positions, row
            by row: only the first one is searched.
        check_values: whether to look for positions that are not finite, or not the same where that
            is promised, which waits for the device.
        impl: "reference", "cpu", "triton" or None (the device's own). "cpu" and "triton" do not
            take float64, give no gradient for positions, and are differentiable once; the reference
            does all of these.

    Returns:
        (Q, C) in the dtype of `features`; a query without neighbors gets zeros.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype, device or value does not fit.
        IndexError: a row of `neighbor_index` does not exist; on GPUs it is left out.
    """
    check_tensor("features", features, ("T", "C"), FLOATS)
    tokens, device = features.shape[0], features.device
    check_positions("positions", positions)
    check_tensor("positions", positions, (tokens, "D"), device=device)
    check_positions("query_positions", query_positions, positions.shape[1])
    check_tensor("query_positions", query_positions, device=device)
    queries = query_positions.shape[0]
    sizes, query_sizes = check_query_sizes(sizes, batch, tokens, query_sizes, query_batch, queries)
    check_flags(same_positions=same_positions, check_values=check_values)
    if check_values:
        check_finite("positions", positions, sizes)
        check_finite("query_positions", query_positions, query_sizes)
    if same_positions:
        check_same_positions("positions", positions, sizes, check_values)
        check_same_positions("query_positions", query_positions, query_sizes, check_values)
    power = check_power(power, device)
    eps = check_number("eps", eps, above=0)
    check_count("k", k)
    if neighbor_index is None:
        neighbor_index = knn(
            positions.detach(),
            k,
            query_positions=query_positions.detach(),
            sizes=sizes,
            query_sizes=query_sizes,
            same_positions=same_positions,
            check_values=False,
            impl=impl,
        )
    else:
        check_tensor("neighbor_index", neighbor_index, (queries, "k"), INTEGERS, device)

    def lacks() -> str | None:
        if features.dtype == torch.float64:
            return "features are float64"
        if too_many(neighbor_index.numel(), tokens):
            return f"there are {tokens} tokens and {neighbor_index.numel()} entries of lists"
        return lacks_gradient_of(positions=positions, query_positions=query_positions)

    chosen = choose(
        "interpolate", impl, {"cpu": lacks, "triton": lacks}, device, differentiable=True
    )
    check_listed_rows("neighbor_index", neighbor_index, tokens, chosen)
    if chosen == "reference":
        return reference_interpolate(
            features, positions, query_positions, neighbor_index, power, eps
        )
    power = (
        power
        if isinstance(power, Tensor)
        else torch.full((), power, dtype=torch.float32, device=device)
    )
    inputs = (
        features if chosen == "triton" else features.float(),
        positions,
        query_positions,
        as_int32(neighbor_index),
        power,
        eps,
        chosen,
    )
    return fused_interpolate(*inputs).to(features.dtype)
