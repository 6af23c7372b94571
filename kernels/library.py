"""The `pointformer` namespace of registered ops, and how an op finds its implementation."""

from collections.abc import Callable
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


def differentiate(op: str, backward: Callable, save: Callable) -> None:
    """Register an op's gradient.

    `torch.library.register_autograd` does the same at several times the cost on the host: it fills
    in defaults, which these ops lack, in quadratic time, and looks for gradients of lists.

    Args:
        op: name in the `pointformer` namespace; its schema has no defaults.
        backward: called with the context and the outputs' gradients, gives one for each input, or
            `None`; lists of tensors have none.
        save: called with the context, inputs and output after each forward pass.
    """
    overload = getattr(torch.ops.pointformer, op).default

    def run_below(keyset, inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            *inputs, keyset = arguments
            output = run_below(keyset, inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

    def run(keyset, *inputs):
        learning = torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
        )
        return Differentiated.apply(*inputs, keyset) if learning else run_below(keyset, inputs)

    LIBRARY.impl(op, run, "Autograd", with_keyset=True)
