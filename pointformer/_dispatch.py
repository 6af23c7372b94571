"""Which implementation of an op runs: `reference`, `cpu` or `triton`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

IMPLEMENTATIONS = ("reference", "cpu", "triton")


def choose(
    op: str,
    impl: str | None,
    unsupported: Mapping[str, Callable[[], str | None]],
    device: torch.device,
) -> str:
    """The implementation to run.

    Args:
        op: name of the public op, for messages.
        impl: what the user asked for, or `None` for the device's default: the fast path of the
            device where it supports the arguments, else the reference.
        unsupported: for each fast implementation of the op, a function that says in words why it
            cannot run these arguments, or returns `None` if it can.
        device: where the arguments live.

    Raises:
        ValueError: `impl` is unknown, does not exist for the op, or cannot run the arguments.
    """
    if impl is None:
        native = "cpu" if device.type == "cpu" else "triton"
        runs = native in unsupported and unsupported[native]() is None
        return native if runs else "reference"
    if impl not in ("reference", *unsupported):
        known = ", ".join(repr(name) for name in ("reference", *unsupported))
        raise ValueError(
            f"{op}: impl={impl!r} is not available here, expected one of {known} or None"
        )
    if impl != "reference":
        reason = unsupported[impl]()
        if reason is not None:
            raise ValueError(f"{op}: impl={impl!r} cannot run this: {reason}; use impl='reference'")
    return impl
