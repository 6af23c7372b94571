"""Residual sums and their LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from pointformer._checks import FLOATS, check_number, check_tensor
from pointformer._dispatch import choose, lacks_nothing
from pointformer.kernels.norm import fused_add_norm
from pointformer.reference.norm import add_norm as reference

_MOST_CHANNELS = 4096


def add_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = x + scale * branch`` and ``LayerNorm(total)``, on GPUs in one pass.

    What follows each branch of a pre-norm transformer block.

    Args:
        x, branch: (T, C) floating, of one dtype or promoted to one.
        weight, bias: (C,) floating, of the LayerNorm.
        scale: (C,) floating, of the branch (LayerScale), or `None` for 1.
        eps: of the LayerNorm.
        impl: "reference" (any of the dtypes, differentiable twice), "cpu" (the same) or "triton"
            (float32 arithmetic, C of at most 4096), or `None` for the device's own.

    Returns:
        total and its LayerNorm, (T, C) each, in the promoted dtype of `x` and `branch`.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device does not fit, or `impl`
            cannot run the arguments.
    """
    rows, channels = check_tensor("x", x, ("T", "C"), FLOATS).shape
    check_tensor("branch", branch, (rows, channels), FLOATS, x.device)
    for name, vector in (("weight", weight), ("bias", bias), ("scale", scale)):
        if vector is not None or name != "scale":
            check_tensor(name, vector, (channels,), FLOATS, x.device)
    check_number("eps", eps, least=0)

    def lacks() -> str | None:
        if x.dtype == torch.float64 or branch.dtype == torch.float64:
            return "x or branch are float64"
        if not 0 < channels <= _MOST_CHANNELS:
            return f"x has {channels} channels, not 1 to {_MOST_CHANNELS}"
        return None

    chosen = choose(
        "add_norm", impl, {"cpu": lacks_nothing, "triton": lacks}, x.device, differentiable=True
    )
    if chosen != "triton":
        return reference(x, branch, scale, weight, bias, eps)
    total, normed, _, _ = fused_add_norm(x, branch, scale, weight, bias, eps, chosen)
    return total, normed
