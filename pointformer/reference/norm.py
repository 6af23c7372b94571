"""Residual sums and their LayerNorm in plain torch."""

import torch


def add_norm(x, branch, scale, weight, bias, eps):
    """See `pointformer.ops.add_norm`."""
    dtype = torch.promote_types(x.dtype, branch.dtype)
    total = (x + (branch if scale is None else branch * scale)).to(dtype)
    learned = (weight.to(dtype), bias.to(dtype))
    return total, torch.nn.functional.layer_norm(total, total.shape[1:], *learned, eps)
