"""The ops that a profile tells apart, and a recorded call of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pointformer import (
    Neighborhoods,
    TokenSet,
    deformable_attention,
    interpolate,
    knn,
    nearest_clusters,
    neighborhood_attention,
    point_conv,
    scored_merge,
    select_centers,
    weighted_gather,
)
from pointformer.profiling import traffic, work
from pointformer.profiling.traffic import Traffic
from pointformer.profiling.work import Arguments, Work

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Op:
    """A public op, or a kind of layer.

    Attributes:
        function: what runs it, called with the recorded arguments by name.
        work: least work of a pass ("forward", "backward"), from the arguments and the output. No
            "backward" where no gradient flows, or where it is not told apart.
        traffic: of a pass, where the kernels read rows several times.
        inputs: names of the arguments that take a gradient where they are tensors.
        search: whether its time counts as clustering and neighbor search.
    """

    function: Callable
    work: Mapping[str, Callable[[Arguments, Any], Work]]
    traffic: Mapping[str, Callable[[Arguments, Any], Traffic]] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    search: bool = False


def _run_layer(self: nn.Module, input: Tensor) -> Tensor:
    return self(input)


_NET = ("weight", "bias", "norm_weight", "norm_bias")

OPS: dict[str, Op] = {
    "clustering": Op(TokenSet.cluster, {FORWARD: work.clustering}, search=True),
    "nearest_clusters": Op(nearest_clusters, {FORWARD: work.nearest_clusters}, search=True),
    "plan": Op(Neighborhoods.with_plan, {FORWARD: work.plan}, search=True),
    "neighborhood_attention": Op(
        neighborhood_attention,
        {FORWARD: work.neighborhood_attention, BACKWARD: work.neighborhood_attention_backward},
        {
            FORWARD: traffic.neighborhood_attention,
            BACKWARD: traffic.neighborhood_attention_backward,
        },
        (
            *("query", "key", "value"),
            *("position_weight", "position_bias", "position_value", "blank_key", "blank_value"),
        ),
    ),
    "scored_merge": Op(
        scored_merge,
        {FORWARD: work.scored_merge, BACKWARD: work.scored_merge_backward},
        {FORWARD: traffic.scored_merge, BACKWARD: traffic.scored_merge_backward},
        ("features", "scores", *_NET),
    ),
    "select_centers": Op(select_centers, {FORWARD: work.select_centers}),
    "knn": Op(knn, {FORWARD: work.knn}, search=True),
    "point_conv": Op(
        point_conv,
        {FORWARD: work.point_conv, BACKWARD: work.point_conv_backward},
        {FORWARD: traffic.point_conv, BACKWARD: traffic.point_conv_backward},
        inputs=("features", *_NET),
    ),
    "interpolate": Op(
        interpolate,
        {FORWARD: work.interpolate, BACKWARD: work.interpolate_backward},
        {FORWARD: traffic.interpolate, BACKWARD: traffic.interpolate_backward},
        inputs=("features", "power"),
    ),
    "weighted_gather": Op(
        weighted_gather,
        {FORWARD: work.weighted_gather, BACKWARD: work.weighted_gather_backward},
        {FORWARD: traffic.weighted_gather, BACKWARD: traffic.weighted_gather_backward},
        inputs=("features", "weights"),
    ),
    "deformable_attention": Op(
        deformable_attention,
        {FORWARD: work.deformable_attention, BACKWARD: work.deformable_attention_backward},
        {FORWARD: traffic.deformable_attention, BACKWARD: traffic.deformable_attention_backward},
        inputs=("value", "offsets", "weights", "power"),
    ),
}
# A layer's recorded input says itself whether it takes a gradient.
_LAYER = Op(_run_layer, {FORWARD: work.layer, BACKWARD: work.layer_backward})
LAYERS: dict[str, Op] = {"linear": _LAYER, "convolution": _LAYER}


@dataclass(frozen=True)
class Call:
    """One call of an op or layer.

    Attributes:
        name: a key of `OPS` or `LAYERS`.
        stage: "1", "2", ... of the backbone, "embedding" or "head"; "backbone" for a foreign one.
        work, traffic: of each pass of one call.
        issue: least seconds to issue the instructions of a pass' Triton kernels, where counted.
        arguments: by name, to run it again; empty where they were not kept.
        count: how many calls of the same shapes the stage made; the arguments are the first's.
    """

    name: str
    stage: str
    work: Mapping[str, Work]
    traffic: Mapping[str, Traffic]
    arguments: Mapping[str, Any]
    count: int = 1
    issue: Mapping[str, float] = field(default_factory=dict)

    @property
    def op(self) -> Op:
        return OPS.get(self.name) or LAYERS[self.name]

    def run(self) -> object:
        """Run it without the check for finite values, which would wait for the device."""
        unchecked = {"check_values": False} if "check_values" in self.arguments else {}
        return self.op.function(**{**self.arguments, **unchecked})

    def differentiable(self) -> Call:
        """The same call with inputs that take gradients; strides are kept."""
        arguments = {
            name: value.detach().requires_grad_()
            if name in self.op.inputs and isinstance(value, Tensor)
            else value
            for name, value in self.arguments.items()
        }
        return replace(self, arguments=arguments)

    def backward(self) -> Callable[[], object]:
        """A function that runs the backward pass alone, as often as it is called.

        Call it on `differentiable()`. The output's gradient is random.
        """
        with torch.enable_grad():
            output = self.run()
        assert isinstance(output, Tensor)
        inputs = [x for x in self.arguments.values() if isinstance(x, Tensor) and x.requires_grad]
        module = self.arguments.get("self")
        if isinstance(module, nn.Module):
            inputs += list(module.parameters())
        grad = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)
