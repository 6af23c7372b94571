"""Which ops a model calls, and with what."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor, nn

from pointformer.models import Model
from pointformer.models.inference import unmoved
from pointformer.profiling.ops import FORWARD, LAYERS, OPS, Call


def record(
    model: Model,
    images: Tensor,
    *,
    backward: bool = False,
    keep: bool = True,
    instructions: Collection[str] = (),
) -> list[Call]:
    """The calls of the public ops and of Linear and convolution layers in one forward pass.

    Nothing is replaced: Python's profiling hook sees the calls of the public functions, forward
    hooks see the layers. A call inside of another one belongs to it. Calls of a stage that have the
    same shapes are listed once, in the order of the first, and only its arguments are kept, so that
    memory is bounded by a stage's block, not by the depth. No graph of gradients is made; a model
    in training keeps its statistics.

    Args:
        model: on the device and in the dtype of `images`.
        images: (B, C, H, W), normalized.
        backward: also count the backward passes, and make what they need (the plan).
        keep: keep arguments, to run the calls again.
        instructions: names of ops whose Triton kernels' instructions are counted, on a CPU; see
            `pointformer.profiling.launches`. Compiling them takes a minute the first time.
    """
    if instructions:
        from pointformer.profiling.launches import issue_times
    calls: dict[tuple, Call] = {}
    stages = getattr(model.backbone, "stages", ())  # a foreign backbone tells none
    stage = "embedding" if stages else "backbone"

    def add(name: str, arguments: dict[str, object], output: object) -> None:
        key = (name, stage, *(_signature(value) for value in arguments.values()))
        call = calls.get(key)
        if call is not None:
            calls[key] = replace(call, count=call.count + 1)
            return
        op = OPS.get(name) or LAYERS[name]
        with torch.no_grad():
            passes = [p for p in op.work if backward or p == FORWARD]
            work = {p: op.work[p](arguments, output) for p in passes}
            traffic = {p: op.traffic[p](arguments, output) for p in passes if p in op.traffic}
        issue = issue_times(name, arguments, passes) if name in instructions else {}
        calls[key] = Call(name, stage, work, traffic, arguments if keep else {}, issue=issue)

    def layer(module: nn.Module, args: tuple, named: dict[str, Tensor], output: Tensor) -> None:
        name = "linear" if isinstance(module, nn.Linear) else "convolution"
        source = args[0] if args else named["input"]
        # Everything but the images depends on parameters, and takes a gradient.
        given = source.detach().requires_grad_(source is not images)
        add(name, {"self": module, "input": given}, output)

    def enter(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            nonlocal stage
            stage = name

        return hook

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                hooks.callback(module.register_forward_hook(layer, with_kwargs=True).remove)
        for index, module in enumerate(stages, 1):
            hooks.callback(module.register_forward_pre_hook(enter(str(index))).remove)
        hooks.callback(model.head.register_forward_pre_hook(enter("head")).remove)
        for parameter in model.parameters():
            hooks.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        hooks.enter_context(unmoved(model))
        hooks.enter_context(torch.set_grad_enabled(backward))  # models make a plan only then
        hooks.enter_context(_watching(add))
        model(images)
    return list(calls.values())


@contextmanager
def _watching(add: Callable[[str, dict[str, object], object], None]):
    """Tell `add` name, arguments and output of every outermost call of a function in `OPS`."""
    names = {op.function.__code__: name for name, op in OPS.items()}
    inside = None
    arguments: dict[str, object] = {}

    def on_event(frame, event: str, result: object) -> None:
        nonlocal inside, arguments
        if event == "call" and inside is None and frame.f_code in names:
            # When a call begins the only local variables are its arguments.
            inside, arguments = frame, dict(frame.f_locals)
        elif event == "return" and inside is not None and frame is inside:
            if result is not None:  # else it raised an error
                add(names[frame.f_code], arguments, result)
            inside = None

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        yield
    finally:
        sys.setprofile(before)


def _signature(value: object) -> object:
    """Equal for arguments that cost the same."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    if isinstance(value, nn.Module):
        weights = tuple((name, tuple(x.shape)) for name, x in value.named_parameters())
        return type(value), weights
    if is_dataclass(value):
        return tuple(_signature(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, Mapping):
        return tuple((name, _signature(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    return value
