"""Fused neighborhood merging: the registered op and its gradients.

Tensors are float32, but the weight net is of any dtypes, and Triton takes features, and so the
output and their gradients, in bfloat16 and float16, too. No cluster has more than `cluster_size`
tokens.
"""

import torch
from torch.autograd.function import once_differentiable

from pointformer.kernels.library import LIBRARY, differentiate, implement

MOST_GPU_WEIGHTS = 32  # of each pair: registers hold no more

_INPUTS = (
    "Tensor features, Tensor scores, Tensor positions, Tensor center_positions, "
    "Tensor cluster_offsets, Tensor cluster_index, "
    "Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, "
    "int cluster_size, float eps, str impl"
)
_GRADIENTS = ", ".join(["Tensor"] * 6)  # features, scores and the four of the weight net
LIBRARY.define(f"scored_merge({_INPUTS}) -> Tensor")
LIBRARY.define(f"scored_merge_backward(Tensor grad, {_INPUTS}) -> ({_GRADIENTS})")
fused_merge = torch.ops.pointformer.scored_merge.default
_backward = torch.ops.pointformer.scored_merge_backward.default


@torch.library.register_fake("pointformer::scored_merge", lib=LIBRARY)
def _fake(features, scores, positions, center_positions, offsets, index, weight, *rest):
    return features.new_empty(index.shape[0], weight.shape[0] * features.shape[1])


@torch.library.register_fake("pointformer::scored_merge_backward", lib=LIBRARY)
def _fake_backward(grad, features, scores, positions, centers, offsets, index, *net_and_options):
    *net, _, _, _ = net_and_options
    return tuple(x.new_empty(x.shape) for x in (features, scores, *net))


implement("scored_merge", "merge.forward")
implement("scored_merge_backward", "merge.backward")


def _save(ctx, inputs, output):
    *tensors, ctx.cluster_size, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable
def _differentiate(ctx, grad):
    options = (ctx.cluster_size, ctx.eps, ctx.impl)
    features, scores, *net = _backward(grad, *ctx.saved_tensors, *options)
    return features, scores, None, None, None, None, *net, None, None, None


differentiate("scored_merge", _differentiate, _save)
