"""Which implementation of an op runs: `reference`, `cpu` or `triton`, for some a peer package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping

import torch
from torch.autograd import forward_ad

from pointformer._checks import brief


def choose(
    op: str,
    impl: str | None,
    lacks: Mapping[str, Callable[[], str | None]],
    device: torch.device,
    *,
    differentiable: bool = False,
) -> str:
    """The implementation to run. Nothing falls back silently.

    Args:
        op: name of the public op, for messages.
        impl: what the user asked for, or `None` for the device's own: "cpu" on CPUs, "triton" on
            GPUs, the reference on devices or for ops without a fast implementation.
        lacks: for each fast implementation of the op, a function that says in words which argument
            it cannot run, or returns `None` if it can. Devices and installations are checked here.
        device: where the arguments live.
        differentiable: the op has derivatives, not only indices.

    Raises:
        ValueError: `impl` is unknown, does not exist for the op, or cannot run the arguments; the
            message names the argument and the remedy.
    """
    chosen = impl
    if chosen is None:
        native = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "reference")
        chosen = native if native in lacks else "reference"
    if isinstance(chosen, str) and chosen == "reference":
        return chosen
    if not isinstance(chosen, str) or chosen not in lacks:
        known = ", ".join(repr(name) for name in ("reference", *lacks))
        raise ValueError(
            f"{op}: impl={brief(impl)} does not exist, expected one of {known} or None"
        )
    reason = _device_lacks(chosen, device) or lacks[chosen]()
    if reason is None and differentiable and _is_transformed():
        reason = "fast implementations have no forward derivatives, and none under torch.func"
    if reason is not None:
        raise ValueError(
            f"{op}: impl={impl!r} cannot run this on {device}: {reason}; use impl='reference'"
        )
    return chosen


def lacks_nothing() -> None:
    """For `choose`: an implementation that can run all arguments."""


def _is_transformed() -> bool:
    """Whether other derivatives than gradients may be wanted, which torch would take to be zero."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _device_lacks(impl: str, device: torch.device) -> str | None:
    if impl == "cpu":
        return None if device.type == "cpu" else f"it needs tensors on the CPU, not on {device}"
    if impl in ("torch_cluster", "torch_scatter"):
        if importlib.util.find_spec(impl) is None:
            name = impl.replace("_", "-")
            return f"{name} is not installed (pip install 'pointformer[pyg]')"
        return None
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return (
            "on a CPU Triton kernels run only in Triton's interpreter, for tests: start Python "
            "with TRITON_INTERPRET=1"
        )
    if device.type not in ("cpu", "cuda"):
        return f"it needs a CUDA or ROCm device, not {device}"
    return None
