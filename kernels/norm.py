"""Residual sums and their LayerNorm: the registered op and its gradient, which is torch's own.

`mean` and `inverse` (T, 1) float32 are those of the LayerNorm: the mean, and the inverse of the
standard deviation.
"""

import torch
from torch.autograd.function import once_differentiable

from pointformer.kernels.library import LIBRARY, differentiate, implement

LIBRARY.define(
    "add_norm(Tensor x, Tensor branch, Tensor? scale, Tensor weight, Tensor bias, float eps, "
    "str impl) -> (Tensor total, Tensor normed, Tensor mean, Tensor inverse)"
)
fused_add_norm = torch.ops.pointformer.add_norm.default


@torch.library.register_fake("pointformer::add_norm", lib=LIBRARY)
def _fake(x, branch, scale, weight, bias, eps, impl):
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    mean, inverse = (x.new_empty((x.shape[0], 1), dtype=torch.float32) for _ in range(2))
    return total, torch.empty_like(total), mean, inverse


implement("add_norm", "norm.forward")


def _save(ctx, inputs, output):
    x, branch, scale, weight, bias, _, _ = inputs
    total, _, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.set_materialize_grads(False)  # each would be a launch
    ctx.dtypes = x.dtype, branch.dtype
    ctx.save_for_backward(
        total, mean, inverse, weight, bias, scale, None if scale is None else branch
    )


@once_differentiable
def _differentiate(ctx, grad, grad_normed, *_):
    total, mean, inverse, weight, bias, scale, branch = ctx.saved_tensors
    learned = [None, None]
    wide = torch.promote_types(total.dtype, torch.float32)
    if grad_normed is not None:
        # As forward: parameters of float32 stay that.
        dtype = total.dtype if weight.dtype == bias.dtype == total.dtype else wide
        rows, added, *vectors = (x.to(dtype) for x in (grad_normed, total, weight, bias))
        through, *learned = torch.ops.aten.native_layer_norm_backward(
            rows, added, total.shape[1:], mean, inverse, *vectors, [True] * 3
        )
        grad = through if grad is None else grad + through
    x_dtype, branch_dtype = ctx.dtypes
    grad_branch, grad_scale = grad, None
    if scale is not None:
        grad_branch = grad * scale
        grad_scale = (grad.to(wide) * branch).sum(0).to(scale.dtype)
    return grad.to(x_dtype), grad_branch.to(branch_dtype), grad_scale, *learned, None, None


differentiate("add_norm", _differentiate, _save)
