"""Attention of every token to the tokens of its nearest clusters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

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
    query_positions: Tensor | None = None,
    position_weight: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_value: Tensor | None = None,
    blank_key: Tensor | None = None,
    blank_value: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Local attention with a relative position bias (AutoFocusFormer, section 3.3).

    The logit of query i and its neighbor j is ``scale * query_i . key_j + position_weight .
    phi(positions_j - query_positions_i) + position_bias``. The softmax also runs over a learned
    blank token, if there is one: its logit is ``scale * query_i . blank_key``, without bias. It
    lets a query attend to nothing near it. A query whose neighborhood is empty gets zeros, or
    `blank_value`.

    With `position_value` a neighbor's value also says where it lies: value_j + position_value @
    phi(positions_j - query_positions_i), as in a PointTransformer.

    Args:
        query: (Q, H, d) float32, bfloat16, float16 or float64: of the T tokens themselves, in
            cluster order, or with `query_positions` of any others (cross attention).
        key, value: (T, H, d), rows in cluster order. Strided views (of one key-value projection)
            are read without a copy where their last stride is 1.
        positions: (T, D) float32, D = 2 or 3, rows in cluster order; only the reference
            gives them gradients.
        neighborhoods: the clusters that each query attends to, none twice; lists of neighbors by
            `Neighborhoods.from_lists`. `neighborhoods.with_plan()` saves every call the work of
            preparing them.
        query_positions: (Q, D) float32; `None` where the queries are the tokens. Only the reference
            gives them gradients.
        position_weight: (H, F) weights of the relative position features. F = 5 in 2-D: dx, dy,
            distance, sine, cosine. F = 7 in 3-D: dx, dy, dz, distance, unit vector. F = D: only
            the differences. In the units of `positions`; `None` means no such term. Below 1.1e-19,
            where squares vanish (on GPUs below 1e-15), distance and direction are inexact.
        position_bias: (H,) or `None`.
        position_value: (H, d, F), F as above, or `None`: no such term. On GPUs float32 then has at
            most 64 channels per head.
        blank_key, blank_value: (H, d), both or neither.
        scale: factor of the products of query and key, d ** -0.5 if `None`.
        impl: "reference" (any of the dtypes, differentiable twice), "cpu" or "triton" (float32
            arithmetic, d a multiple of 8 up to 128), or `None` for the device's own.

    Returns:
        (Q, H, d) in the dtype of `query`. Sums are accumulated in float32, for float64 in float64.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or `impl`
            cannot run the arguments; the message names the argument.
    """
    query = check_tensor("query", query, ("Q", "H", "d"), FLOATS)
    queries, heads, channels = query.shape
    device = query.device
    positions = check_positions("positions", positions)
    tokens, dimensions = positions.shape
    if query_positions is None:
        check_tensor("positions", positions, (queries, dimensions), None, device)
        query_positions = positions
    else:
        check_tensor("positions", positions, (tokens, dimensions), None, device)
        query_positions = check_positions("query_positions", query_positions, dimensions)
        check_tensor("query_positions", query_positions, (queries, dimensions), None, device)
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, (tokens, heads, channels), (query.dtype,), device)
    check_neighborhoods(neighborhoods, queries, tokens, device)
    check_order("positions", positions, neighborhoods.clusters)
    for name, factors, shape in (
        ("position_weight", position_weight, (heads,)),
        ("position_value", position_value, (heads, channels)),
    ):
        if factors is not None:
            check_tensor(name, factors, (*shape, "F"), FLOATS, device)
            features = (dimensions, 2 * dimensions + 1)
            if factors.shape[-1] not in features:
                either = " or ".join(str((*shape, count)) for count in features)
                raise ValueError(
                    f"{name}: expected shape {either} for {dimensions}-D positions, "
                    f"got {describe(factors)}"
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
        scale = check_number("scale", scale)

    lacks = {
        "cpu": lambda: _fused_lacks(query, positions, query_positions),
        "triton": lambda: (
            _fused_lacks(query, positions, query_positions)
            or _triton_lacks(query, position_value)
            or neighborhoods.triton_lacks()
        ),
    }
    chosen = choose("neighborhood_attention", impl, lacks, device, differentiable=True)
    if chosen != "reference":
        clusters = neighborhoods.clusters
        if position_value is not None:
            position_weight, position_value = _of_equal_features(position_weight, position_value)
        output, _ = torch.ops.pointformer.neighborhood_attention(
            query,
            key,
            value,
            query_positions,
            positions,
            neighborhoods.cluster_index,
            clusters.offsets,
            clusters.cluster_size,
            list(neighborhoods.plan) if neighborhoods.plan_impl == chosen else [],
            position_weight,
            position_bias,
            position_value,
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
        query_positions=query_positions,
        position_weight=position_weight,
        position_bias=position_bias,
        position_value=position_value,
        blank_key=blank_key,
        blank_value=blank_value,
        scale=scale,
    )


def _of_equal_features(
    position_weight: Tensor | None, position_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Both with the features of both, with zeros where one has none of its own."""
    if position_weight is None:
        position_weight = position_value.new_zeros(position_value.shape[0], 0)
    features = max(position_weight.shape[-1], position_value.shape[-1])
    weight, value = (
        x if x.shape[-1] == features else pad(x, (0, features - x.shape[-1]))
        for x in (position_weight, position_value)
    )
    return weight, value


def _triton_lacks(query: Tensor, position_value: Tensor | None) -> str | None:
    """The same of the Triton kernels alone, which run out of registers."""
    channels = query.shape[2]
    if position_value is None or query.dtype != torch.float32 or channels <= 64:
        return None
    return f"position_value is given and query has {channels} float32 channels per head, over 64"


def _fused_lacks(query: Tensor, positions: Tensor, query_positions: Tensor) -> str | None:
    """Why neither the CPU nor the Triton kernels can run, in words, or `None`."""
    if query.dtype == torch.float64:
        return "query is float64 and the kernels compute in float32"
    channels = query.shape[2]
    if channels % 8 or not 8 <= channels <= 128:
        return f"query has {channels} channels per head, not a multiple of 8 in 8..128"
    return lacks_gradient_of(positions=positions, query_positions=query_positions)
