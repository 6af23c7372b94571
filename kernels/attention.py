"""Neighborhood attention as registered ops: schemas, shapes, gradient.

`inverse_offsets` and `inverse_queries` list for each cluster the queries that attend to it: only
the backward op reads them, and it makes its own where they are missing. `normal` (T, H, 2)
holds the largest logit in units of log2 and the inverse of the softmax's sum. Weights and blank
tokens are float32. The backward op may use `output` (T, H, d) for the mean gradient of a row's
logits; the CPU does not, because in half precision it is rounded.
"""

import torch

from pointformer.kernels.library import LIBRARY, implement

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor positions, Tensor cluster_index, "
    "Tensor cluster_offsets, int cluster_size, Tensor? inverse_offsets, Tensor? inverse_queries, "
    "Tensor? position_weight, Tensor? position_bias, Tensor? blank_key, Tensor? blank_value, "
    "float scale, str impl"
)
LIBRARY.define(f"neighborhood_attention({_ARGUMENTS}) -> (Tensor output, Tensor normal)")
LIBRARY.define(
    f"neighborhood_attention_backward(Tensor grad, Tensor output, Tensor normal, {_ARGUMENTS}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_position_weight, "
    "Tensor grad_position_bias, Tensor grad_blank_key, Tensor grad_blank_value)"
)


@torch.library.register_fake("pointformer::neighborhood_attention", lib=LIBRARY)
def _forward_fake(query, *arguments):
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        (*query.shape[:2], 2), dtype=torch.float32
    )


@torch.library.register_fake("pointformer::neighborhood_attention_backward", lib=LIBRARY)
def _backward_fake(grad, output, normal, query, key, value, *arguments):
    rows = [x.new_empty(x.shape) for x in (query, key, value)]
    learned = [normal.new_empty(0) if x is None else torch.empty_like(x) for x in arguments[-6:-2]]
    return (*rows, *learned)


implement("neighborhood_attention", "attention.forward")
implement("neighborhood_attention_backward", "attention.backward")


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.impl = inputs
    ctx.cluster_size = tensors.pop(6)
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, grad, _):
    output, normal, *tensors = ctx.saved_tensors
    tensors.insert(6, ctx.cluster_size)
    *rows, weight, bias, blank_key, blank_value = (
        torch.ops.pointformer.neighborhood_attention_backward(
            grad, output, normal, *tensors, ctx.scale, ctx.impl
        )
    )
    learned = [
        gradient if tensor is not None else None
        for tensor, gradient in zip(
            tensors[-4:], (weight, bias, blank_key, blank_value), strict=True
        )
    ]
    return *rows, None, None, None, None, None, None, *learned, None, None


torch.library.register_autograd(
    "pointformer::neighborhood_attention", _differentiate, setup_context=_save, lib=LIBRARY
)


def _differentiate_twice(ctx, *grads):
    raise NotImplementedError(
        "neighborhood_attention: the fused op is differentiable once; use impl='reference'"
    )


torch.library.register_autograd(
    "pointformer::neighborhood_attention_backward", _differentiate_twice, lib=LIBRARY
)
