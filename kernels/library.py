"""The `pointformer` namespace of registered ops, and how an op finds its implementation."""

from importlib import import_module

import torch

import pointformer.kernels.forks  # noqa: F401  (takes effect in processes forked from now on)

LIBRARY = torch.library.Library("pointformer", "DEF")


def implement(op: str, function: str) -> None:
    """Run `op` by `kernels.<impl>.<function>`, where `impl` is the op's last argument.

    Args:
        op: name in the `pointformer` namespace; its schema ends with `str impl`.
        function: "module.function" below `kernels.cpu` and `kernels.triton`; the module is imported
            at the first call, so that neither Numba nor Triton is loaded before it is needed.
    """
    module, name = function.split(".")

    def run(*arguments):
        *inputs, impl = arguments
        return getattr(import_module(f"pointformer.kernels.{impl}.{module}"), name)(*inputs)

    torch.library.impl(f"pointformer::{op}", ("cpu", "cuda"), run, lib=LIBRARY)
