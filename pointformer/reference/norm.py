"""Residual sums and their LayerNorm in plain torch."""

import torch


def add_norm(x, branch, scale, weight, bias, eps):
    """See `pointformer.ops.add_norm`."""
    total = x + (branch if scale is None else branch * scale)
    return total, torch.nn.functional.layer_norm(total, total.shape[1:], weight, bias, eps)
