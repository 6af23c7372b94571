"""Fused deformable attention over points: the registered op and its gradients."""

import torch
from torch.autograd.function import once_differentiable

from pointformer.kernels.library import LIBRARY, differentiate, implement

_INPUTS = (
    "Tensor value, Tensor positions, Tensor offsets, Tensor weights, Tensor query_positions, "
    "Tensor canvas, Tensor lookup, Tensor power, float eps, str impl"
)
LIBRARY.define(f"deformable_attention({_INPUTS}) -> Tensor")
LIBRARY.define(
    f"deformable_attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
fused_deformable = torch.ops.pointformer.deformable_attention.default
_backward = torch.ops.pointformer.deformable_attention_backward.default


@torch.library.register_fake("pointformer::deformable_attention", lib=LIBRARY)
def _fake(value, positions, offsets, *arguments):
    return value.new_empty(offsets.shape[0], *value.shape[1:])


@torch.library.register_fake("pointformer::deformable_attention_backward", lib=LIBRARY)
def _fake_backward(grad, value, positions, offsets, weights, *arguments):
    return tuple(x.new_empty(x.shape) for x in (value, offsets, weights, arguments[3]))


implement("deformable_attention", "deformable.forward")
implement("deformable_attention_backward", "deformable.backward")


def _save(ctx, inputs, output):
    *tensors, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _differentiate(ctx, grad):
    value, offsets, weights, power = _backward(grad, *ctx.saved_tensors, ctx.eps, ctx.impl)
    return value, None, offsets, weights, None, None, None, power, None, None


differentiate("deformable_attention", _differentiate, _save)
