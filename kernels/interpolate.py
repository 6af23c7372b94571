"""Fused inverse-distance interpolation: the registered op and its gradients."""

import torch
from torch.autograd.function import once_differentiable

from pointformer.kernels.library import LIBRARY

_INPUTS = (
    "Tensor features, Tensor positions, Tensor query_positions, Tensor neighbor_index, "
    "Tensor power, float eps"
)
LIBRARY.define(f"interpolate({_INPUTS}) -> Tensor")
LIBRARY.define(
    f"interpolate_backward(Tensor grad, {_INPUTS}, bool learn_power) -> (Tensor, Tensor)"
)
fused_interpolate = torch.ops.pointformer.interpolate.default
_backward = torch.ops.pointformer.interpolate_backward.default


@torch.library.register_fake("pointformer::interpolate", lib=LIBRARY)
def _fake(features, positions, query_positions, neighbor_index, power, eps):
    return features.new_empty(query_positions.shape[0], features.shape[1])


@torch.library.register_fake("pointformer::interpolate_backward", lib=LIBRARY)
def _fake_backward(grad, features, positions, queries, neighbor_index, power, eps, learn_power):
    return features.new_empty(features.shape), power.new_empty(power.shape)


@torch.library.impl("pointformer::interpolate", "cpu", lib=LIBRARY)
def _forward_cpu(*inputs):
    from pointformer.kernels.cpu import interpolate

    return interpolate.forward(*inputs)


@torch.library.impl("pointformer::interpolate_backward", "cpu", lib=LIBRARY)
def _backward_cpu(grad, *inputs):
    from pointformer.kernels.cpu import interpolate

    return interpolate.backward(grad, *inputs)


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _differentiate(ctx, grad):
    features, power = _backward(grad, *ctx.saved_tensors, ctx.eps, ctx.needs_input_grad[4])
    return features, None, None, None, power, None


torch.library.register_autograd(
    "pointformer::interpolate", _differentiate, setup_context=_save, lib=LIBRARY
)
