"""Fused weighted sums of listed rows: the registered op and its gradients."""

import torch
from torch.autograd.function import once_differentiable

from pointformer.kernels.library import LIBRARY, differentiate, implement

_INPUTS = "Tensor features, Tensor index, Tensor weights, str impl"
LIBRARY.define(f"weighted_gather({_INPUTS}) -> Tensor")
LIBRARY.define(f"weighted_gather_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor)")
fused_gather = torch.ops.pointformer.weighted_gather.default
_backward = torch.ops.pointformer.weighted_gather_backward.default


@torch.library.register_fake("pointformer::weighted_gather", lib=LIBRARY)
def _fake(features, index, weights, impl):
    return features.new_empty(index.shape[0], features.shape[1])


@torch.library.register_fake("pointformer::weighted_gather_backward", lib=LIBRARY)
def _fake_backward(grad, features, index, weights, impl):
    return features.new_empty(features.shape), weights.new_empty(weights.shape)


implement("weighted_gather", "gather.forward")
implement("weighted_gather_backward", "gather.backward")


def _save(ctx, inputs, output):
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _differentiate(ctx, grad):
    features, weights = _backward(grad, *ctx.saved_tensors, ctx.impl)
    return features, None, weights, None


differentiate("weighted_gather", _differentiate, _save)
