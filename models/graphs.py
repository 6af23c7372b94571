"""A model, or a whole training step, as one CUDA graph.

`torch.cuda.make_graphed_callables` takes and gives tensors only, no lists and no predictions, and
leaves out the loss and the optimizer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pointformer._checks import brief, check_count, describe


def capture(function: Callable[..., Any], *inputs: Any, warmup: int = 3) -> Callable[..., Any]:
    """Record what `function(*inputs)` does on a GPU, to do it again on other inputs by one launch.

    Small stages take the time of their launches; a CUDA graph starts them all at once. A model for
    inference:

        with torch.no_grad():
            run = capture(model.eval(), images)
        logits = run(other_images)

    Training, loss and optimizer included:

        def step(images, labels):
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            return loss

        step = capture(step, images, labels)

    What the host decides is decided while it is recorded and stays so: sizes of images, modes of
    the model, numbers that are no tensors. So Adam and its kin need `capturable=True`, and a tensor
    as learning rate where that changes. Random numbers are new ones each time.

    Args:
        function: whatever does not wait for the GPU, as `model(images)` and losses of its logits do
            not. Matching objects to queries, as for masks, does.
        inputs: its arguments: tensors on one GPU, in lists, tuples or dictionaries if need be, and
            other values, which stay the same. Without tensors it is the current GPU.
        warmup: how often to call it before, which compiles kernels and lets optimizers make their
            state. These calls count: a training step trains, on `inputs`.

    Returns:
        A function of inputs like these: tensors of the same shapes and dtypes, on any device. Their
        values are copied to where the graph reads them. It returns what `function` returned, in
        tensors that its next call overwrites; clone what is to be kept.

    Raises:
        TypeError, ValueError: `function` cannot be called, `inputs` are not on one GPU, or those of
            a later call are not like them.
    """
    if not callable(function):
        raise TypeError(f"function: expected a model or a function, got {describe(function)}")
    check_count("warmup", warmup)
    leaves, structure = pytree.tree_flatten(inputs)
    device = _gpu_of(leaves)
    held = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    arguments = pytree.tree_unflatten(held, structure)
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function(*arguments)
    output = pytree.tree_map_only(Tensor, Tensor.detach, output)

    def replay(*inputs: Any) -> Any:
        given, form = pytree.tree_flatten(inputs)
        if form != structure:
            raise ValueError(f"inputs: expected {_form(arguments)}, got {_form(inputs)}")
        for mine, other in zip(held, given, strict=True):
            _check_like(mine, other)
        with torch.no_grad(), torch.cuda.device(device):
            for mine, other in zip(held, given, strict=True):
                if isinstance(mine, Tensor):
                    mine.copy_(other)
            graph.replay()
        return output

    return replay


def _gpu_of(leaves: list[Any]) -> torch.device:
    devices = sorted({str(leaf.device) for leaf in leaves if isinstance(leaf, Tensor)})
    if not devices and torch.cuda.is_available():
        devices = [f"cuda:{torch.cuda.current_device()}"]
    if len(devices) != 1 or not devices[0].startswith("cuda"):
        found = " and ".join(devices) or "none"
        raise ValueError(f"inputs: expected tensors on one GPU, got {found}; use .cuda()")
    return torch.device(devices[0])


def _check_like(captured: Any, given: Any) -> None:
    """Raise if the graph cannot take one for the other."""
    if isinstance(captured, Tensor) and isinstance(given, Tensor):
        same = (captured.shape, captured.dtype) == (given.shape, given.dtype)
    else:
        alike = _same_arrays if isinstance(captured, np.ndarray) else operator.eq
        same = type(captured) is type(given) and bool(alike(captured, given))
    if not same:
        raise ValueError(f"inputs: expected {brief(captured)}, as captured, got {brief(given)}")


def _same_arrays(one: np.ndarray, other: np.ndarray) -> bool:
    nan = one.dtype.kind in "fc"
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=nan)


def _form(inputs: Any) -> str:
    return brief(pytree.tree_map_only(Tensor, lambda x: "tensor", inputs))
