"""Weighted sums of listed tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pointformer._checks import (
    FLOATS,
    INTEGERS,
    as_int32,
    check_listed_rows,
    check_tensor,
    too_many,
)
from pointformer._dispatch import choose
from pointformer.kernels.gather import fused_gather
from pointformer.reference.gather import weighted_gather as reference


def weighted_gather(
    features: Tensor, index: Tensor, weights: Tensor, *, impl: str | None = None
) -> Tensor:
    """Sums of listed tokens: ``out[q] = sum_j weights[q, j] * features[index[q, j]]``.

    A sparse matrix times features; with an assignment of fine tokens to coarse ones as `weights`,
    it carries the coarse tokens' features to the fine ones (HCFormer's decoding).

    Args:
        features: (T, C) floating.
        index: (Q, k) int32 or int64, rows of `features`, -1 where there are fewer.
        weights: (Q, k) floating.
        impl: "reference" (differentiable twice), "cpu" or "triton" (float32 arithmetic), or `None`
            for the device's own.

    Returns:
        (Q, C) in the dtype of `features`. Gradients reach the features and the weights.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit.
        IndexError: a row of `index` does not exist; on GPUs it is left out.
    """
    check_tensor("features", features, ("T", "C"), FLOATS)
    device = features.device
    check_tensor("index", index, ("Q", "k"), INTEGERS, device)
    check_tensor("weights", weights, tuple(index.shape), FLOATS, device)

    def lacks() -> str | None:
        if too_many(index.numel(), len(features)):
            return f"there are {len(features)} tokens and {index.numel()} entries of lists"
        return "features are float64" if features.dtype == torch.float64 else None

    chosen = choose(
        "weighted_gather", impl, {"cpu": lacks, "triton": lacks}, device, differentiable=True
    )
    check_listed_rows("index", index, len(features), chosen)
    if chosen == "reference":
        return reference(features, index, weights)
    return fused_gather(features, as_int32(index), weights.float(), chosen)
