"""Fused inverse-distance interpolation: the registered op and its gradients.

Tensors are float32, but the power is of any dtype, and Triton takes features, and so the output and
their gradients, in bfloat16 and float16, too.
"""

import torch
from torch.autograd.function import once_differentiable

from pointformer.kernels.library import LIBRARY, differentiate, implement

_INPUTS = (
    "Tensor features, Tensor positions, Tensor query_positions, Tensor neighbor_index, "
    "Tensor power, float eps"
)
LIBRARY.define(f"interpolate({_INPUTS}, str impl) -> Tensor")
LIBRARY.define(
    f"interpolate_backward(Tensor grad, {_INPUTS}, bool learn_power, str impl) -> (Tensor, Tensor)"
)
fused_interpolate = torch.ops.pointformer.interpolate.default
_backward = torch.ops.pointformer.interpolate_backward.default


@torch.library.register_fake("pointformer::interpolate", lib=LIBRARY)
def _fake(features, positions, query_positions, neighbor_index, power, eps, impl):
    return features.new_empty(query_positions.shape[0], features.shape[1])


@torch.library.register_fake("pointformer::interpolate_backward", lib=LIBRARY)
def _fake_backward(grad, features, positions, queries, neighbor_index, power, *options):
    return features.new_empty(features.shape), power.new_empty(power.shape)


implement("interpolate", "interpolate.forward")
implement("interpolate_backward", "interpolate.backward")


def _save(ctx, inputs, output):
    *tensors, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _differentiate(ctx, grad):
    options = (ctx.eps, ctx.needs_input_grad[4], ctx.impl)
    features, power = _backward(grad, *ctx.saved_tensors, *options)
    return features, None, None, None, power, None, None


differentiate("interpolate", _differentiate, _save)
