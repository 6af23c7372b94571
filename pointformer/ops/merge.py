"""Merging of token neighborhoods: the downsampling of AutoFocusFormer, and PointConv."""

from __future__ import annotations

import torch
from torch import Tensor

from pointformer._checks import (
    FLOATS,
    INTEGERS,
    as_int32,
    check_finite,
    check_flags,
    check_listed_rows,
    check_number,
    check_positions,
    check_rows,
    check_tensor,
    describe,
    lacks_gradient_of,
    too_many,
)
from pointformer._dispatch import choose
from pointformer.clusters import Neighborhoods, check_neighborhoods, check_order
from pointformer.kernels.merge import MOST_GPU_WEIGHTS, fused_merge
from pointformer.reference.merge import merge as reference_merge


def scored_merge(
    features: Tensor,
    scores: Tensor,
    positions: Tensor,
    center_index: Tensor,
    neighborhoods: Neighborhoods,
    *,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    impl: str | None = None,
) -> Tensor:
    """Merge the neighborhoods of chosen centers (AutoFocusFormer, Eq. 4).

    For a center at p and the tokens j of its neighborhood,

        w_j = GELU(LayerNorm(weight @ phi(p_j - p) + bias))        (M,)
        out[m * C + c] = sum over j of w_j[m] * scores[j] * features[j, c]

    without normalization over j. phi is the relative position (dx, dy, distance, dy/distance,
    dx/distance) in 2-D, (dx, dy, dz, distance, unit vector) in 3-D, zeros at distance 0. (Below
    1.1e-19, where squares vanish, distance and direction lose digits or are zero.) The
    LayerNorm(M * C) and Linear(M * C, C') that follow in the paper's downsampling are the model's.

    Args:
        features: (T, C) floating, rows in cluster order.
        scores: (T,) floating, the importance of the tokens.
        positions: (T, D) float32, D = 2 or 3; only the reference gives them gradients.
        center_index: (T',) int32 or int64, rows of the tokens to merge around.
        neighborhoods: of all T tokens. The -1 entries of `cluster_index` and the missing tokens of
            short clusters contribute nothing.
        weight: (M, F), M = 4 in the paper and any other number, on GPUs at most 32 (multiples of 4
            leave nothing idle); F = 5 (2-D) or 7 (3-D) for all of phi, F = D to use only the
            differences.
        bias, norm_weight, norm_bias: (M,).
        eps: of the LayerNorm over M.
        impl: "reference", "cpu", "triton" or None (the device's own). "cpu" and "triton" do not
            take float64, and are differentiable once.

    Returns:
        (T', M * C) in the dtype of `features`; sums are in float32, for float64 in float64.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit.
        IndexError: a row of `center_index`, of which none is negative, or of `cluster_index` does
            not exist. On GPUs, which do not wait to find out, such entries of `cluster_index` are
            left out.
    """
    check_tensor("features", features, ("T", "C"), FLOATS)
    tokens, device = features.shape[0], features.device
    check_tensor("scores", scores, (tokens,), FLOATS, device)
    positions = _check_positions("positions", positions, tokens, None, device)
    check_tensor("center_index", center_index, ("T'",), INTEGERS, device)
    check_neighborhoods(neighborhoods, tokens, tokens, device)
    check_rows("center_index", center_index, tokens, wait=False)
    check_order("positions", positions, neighborhoods.clusters)
    _check_weight_net(weight, bias, norm_weight, norm_bias, eps, positions.shape[1], device)

    centered = neighborhoods._of_rows(center_index)

    def lacks() -> str | None:
        return _fused_lacks(features, centered.cluster_index, positions=positions)

    center_positions = positions[center_index]
    net = (weight, bias, norm_weight, norm_bias)
    fast = {"cpu": lacks, "triton": lambda: lacks() or _too_many(weight)}
    chosen = choose("scored_merge", impl, fast, device, differentiable=True)
    if chosen == "reference":
        rows, mask = centered.members()
        inputs = (features, scores, positions, center_positions, rows, mask)
        return reference_merge(*inputs, *net, eps)
    clusters = centered.clusters
    lists = (clusters.offsets, centered.cluster_index, clusters.cluster_size)
    return _fused(features, scores, positions, center_positions, *lists, net, eps, chosen)


def point_conv(
    features: Tensor,
    positions: Tensor,
    neighbor_index: Tensor,
    *,
    center_positions: Tensor | None = None,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Sum listed neighbors under weights learned from their relative positions (PointConv).

    `scored_merge` with explicit neighbors and without scores, see there for the weights. The
    decoder of AutoFocusFormer subtracts the other way round, neighbor from center: flip the signs
    of the `weight` columns of differences and directions to load its checkpoints.

    Args:
        features: (T, C) floating.
        positions: (T, D) float32, D = 2 or 3; only the reference gives them gradients.
        neighbor_index: (Q, k) int32 or int64, rows of the neighbors, -1 where there are fewer.
        center_positions: (Q, D) float32; None if the centers are the T tokens themselves.
        weight, bias, norm_weight, norm_bias, eps: the weight net.
        impl: as for `scored_merge`.

    Returns:
        (Q, M * C) in the dtype of `features`, channel m * C + c.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit, or a
            position is NaN or infinite.
        IndexError: a row of `neighbor_index` does not exist; on GPUs it is left out.
    """
    check_tensor("features", features, ("T", "C"), FLOATS)
    tokens, device = features.shape[0], features.device
    positions = _check_positions("positions", positions, tokens, None, device)
    check_tensor("neighbor_index", neighbor_index, ("Q", "k"), INTEGERS, device)
    queries, dimensions = neighbor_index.shape[0], positions.shape[1]
    check_flags(check_values=check_values)
    if center_positions is None:
        if queries != tokens:
            raise ValueError(
                f"neighbor_index: expected one row for each of the {tokens} tokens where "
                f"center_positions is None, got {describe(neighbor_index)}"
            )
        center_positions = positions
    else:
        center_positions = _check_positions(
            "center_positions", center_positions, queries, dimensions, device
        )
        if check_values:
            check_finite("center_positions", center_positions, (queries,))
    if check_values:
        check_finite("positions", positions, (tokens,))
    _check_weight_net(weight, bias, norm_weight, norm_bias, eps, dimensions, device)

    def lacks() -> str | None:
        places = {"positions": positions, "center_positions": center_positions}
        return _fused_lacks(features, neighbor_index, **places)

    net = (weight, bias, norm_weight, norm_bias)
    fast = {"cpu": lacks, "triton": lambda: lacks() or _too_many(weight)}
    chosen = choose("point_conv", impl, fast, device, differentiable=True)
    check_listed_rows("neighbor_index", neighbor_index, tokens, chosen)
    if chosen == "reference":
        scores = features.new_ones(tokens)
        index = neighbor_index.long()
        inputs = (features, scores, positions, center_positions, index, index >= 0)
        return reference_merge(*inputs, *net, eps)
    # Every token is a cluster of its own.
    offsets = torch.arange(tokens + 1, dtype=torch.int32, device=device)
    lists = (offsets, as_int32(neighbor_index), 1)
    scores = torch.ones(tokens, dtype=torch.float32, device=device)
    return _fused(features, scores, positions, center_positions, *lists, net, eps, chosen)


def _fused(
    features: Tensor,
    scores: Tensor,
    positions: Tensor,
    center_positions: Tensor,
    offsets: Tensor,
    cluster_index: Tensor,
    cluster_size: int,
    net: tuple[Tensor, ...],
    eps: float,
    impl: str,
) -> Tensor:
    lists = (positions, center_positions, offsets, cluster_index)
    rows = features if impl == "triton" else features.float()
    merged = fused_merge(rows, scores.float(), *lists, *net, cluster_size, eps, impl)
    return merged.to(features.dtype)


def _check_positions(
    name: str, positions: Tensor, rows: int, dimensions: int | None, device: torch.device
) -> Tensor:
    positions = check_positions(name, positions, dimensions)
    return check_tensor(name, positions, (rows, "D"), device=device)


def _check_weight_net(
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dimensions: int,
    device: torch.device,
) -> None:
    check_tensor("weight", weight, ("M", "F"), FLOATS, device)
    if weight.shape[1] != dimensions and weight.shape[1] != 2 * dimensions + 1:
        raise ValueError(
            f"weight: expected shape (M, {2 * dimensions + 1}), or (M, {dimensions}) to use only "
            f"the differences of {dimensions}-D positions, got {describe(weight)}"
        )
    if len(weight) == 0:
        raise ValueError(f"weight: expected at least one row, got {describe(weight)}")
    for name, value in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_tensor(name, value, (weight.shape[0],), FLOATS, device)
    check_number("eps", eps, least=0)


def _fused_lacks(features: Tensor, lists: Tensor, **positions: Tensor) -> str | None:
    if too_many(lists.numel(), features.shape[0]):
        return f"there are {features.shape[0]} tokens and {lists.numel()} entries of lists"
    if features.dtype == torch.float64:
        return "features are float64"
    return lacks_gradient_of(**positions)


def _too_many(weight: Tensor) -> str | None:
    if len(weight) > MOST_GPU_WEIGHTS:
        return f"weight has M = {len(weight)} rows, more than {MOST_GPU_WEIGHTS}"
    return None
