"""Attention of every token to the tokens of its nearest clusters."""

from __future__ import annotations

import torch
from torch import Tensor

import pointformer.kernels.attention  # noqa: F401  (registers the fused op)
from pointformer._checks import (
    FLOATS,
    check_number,
    check_positions,
    check_tensor,
    describe,
    lacks_gradient_of,
)
from pointformer._dispatch import choose
from pointformer.clusters import Neighborhoods, check_neighborhoods, check_order
from pointformer.reference import attention as reference


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    neighborhoods: Neighborhoods,
    *,
    position_weight: Tensor | None = None,
    position_bias: Tensor | None = None,
    blank_key: Tensor | None = None,
    blank_value: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Local attention with a relative position bias (AutoFocusFormer, section 3.3).

    The logit of token i and its neighbor j is ``scale * query_i . key_j + position_weight .
    phi(positions_j - positions_i) + position_bias``. The softmax also runs over a learned blank
    token, if there is one: its logit is ``scale * query_i . blank_key``, without bias. It lets a
    token attend to nothing near it. A token whose neighborhood is empty gets zeros, or
    `blank_value`.

    Args:
        query, key, value: (T, H, d) float32, bfloat16, float16 or float64, rows in cluster order.
            Strided views (of one key-value projection) are read without a copy where their last
            stride is 1.
        positions: (T, D) float32, D = 2 or 3, rows in cluster order; only the reference
            gives them gradients.
        neighborhoods: the clusters that each of the T tokens attends to, none twice.
            `neighborhoods.with_plan()` saves every call the work of preparing them.
        position_weight: (H, F) weights of the relative position features. F = 5 in 2-D: dx, dy,
            distance, sine, cosine. F = 7 in 3-D: dx, dy, dz, distance, unit vector. F = D: only
            the differences. In the units of `positions`; `None` means no such term. Below 1.1e-19,
            where squares vanish (on GPUs below 1e-15), distance and direction are inexact.
        position_bias: (H,) or `None`.
        blank_key, blank_value: (H, d), both or neither.
        scale: factor of the products of query and key, d ** -0.5 if `None`.
        impl: "reference" (any of the dtypes, differentiable twice), "cpu" or "triton" (float32
            arithmetic, d a multiple of 8 up to 128), or `None` for the device's own.

    Returns:
        (T, H, d) in the dtype of `query`. Sums are accumulated in float32, for float64 in float64.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or `impl`
            cannot run the arguments; the message names the argument.
    """
    query = check_tensor("query", query, ("T", "H", "d"), FLOATS)
    tokens, heads, channels = query.shape
    device = query.device
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, (tokens, heads, channels), (query.dtype,), device)
    positions = check_positions("positions", positions)
    dimensions = positions.shape[1]
    check_tensor("positions", positions, (tokens, dimensions), None, device)
    check_neighborhoods(neighborhoods, tokens, device)
    check_order("positions", positions, neighborhoods.clusters)
    if position_weight is not None:
        features = (dimensions, 5 if dimensions == 2 else 7)
        check_tensor("position_weight", position_weight, (heads, "F"), FLOATS, device)
        if position_weight.shape[1] not in features:
            raise ValueError(
                f"position_weight: expected shape ({heads}, {features[0]}) or "
                f"({heads}, {features[1]}) for {dimensions}-D positions, "
                f"got {describe(position_weight)}"
            )
    if position_bias is not None:
        check_tensor("position_bias", position_bias, (heads,), FLOATS, device)
    if (blank_key is None) != (blank_value is None):
        missing = "blank_key" if blank_key is None else "blank_value"
        raise ValueError(f"{missing}: expected a tensor, because the other blank one is given")
    for name, blank in (("blank_key", blank_key), ("blank_value", blank_value)):
        if blank is not None:
            check_tensor(name, blank, (heads, channels), FLOATS, device)
    if scale is None:
        scale = channels**-0.5 if channels else 1.0
    else:
        check_number("scale", scale)

    lacks = {
        "cpu": lambda: _fused_lacks(query, positions),
        "triton": lambda: _fused_lacks(query, positions) or neighborhoods.triton_lacks(),
    }
    chosen = choose("neighborhood_attention", impl, lacks, device)
    if chosen != "reference":
        clusters = neighborhoods.clusters
        output, _ = torch.ops.pointformer.neighborhood_attention(
            query,
            key,
            value,
            positions,
            neighborhoods.cluster_index,
            clusters.offsets,
            clusters.cluster_size,
            list(neighborhoods.plan) if neighborhoods.plan_impl == chosen else [],
            position_weight,
            position_bias,
            blank_key,
            blank_value,
            scale,
            chosen,
        )
        return output
    return reference.neighborhood_attention(
        query,
        key,
        value,
        positions,
        neighborhoods,
        position_weight=position_weight,
        position_bias=position_bias,
        blank_key=blank_key,
        blank_value=blank_value,
        scale=scale,
    )


def _fused_lacks(query: Tensor, positions: Tensor) -> str | None:
    """Why neither the CPU nor the Triton kernels can run, in words, or `None`."""
    if query.dtype == torch.float64:
        return "query is float64 and the kernels compute in float32"
    channels = query.shape[2]
    if channels % 8 or not 8 <= channels <= 128:
        return f"query has {channels} channels per head, not a multiple of 8 in 8..128"
    return lacks_gradient_of(positions=positions)
