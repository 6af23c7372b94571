"""Made-up inputs of weighted sums of listed rows."""

import torch

from pointformer import weighted_gather


def make_case(tokens=20, queries=31, k=9, channels=11, drop=0.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, max(tokens, 1), (queries, k), generator=g, dtype=torch.int32)
    index[torch.rand(index.shape, generator=g) < drop] = -1
    if tokens == 0:
        index.fill_(-1)
    features = torch.randn(tokens, channels, generator=g)
    return features, index, torch.randn(queries, k, generator=g)


def with_gradients(features, index, weights, dtype, impl):
    features, weights = (x.to(dtype).requires_grad_() for x in (features, weights))
    out = weighted_gather(features, index, weights, impl=impl)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return out.detach(), *torch.autograd.grad(out, (features, weights), cotangent)
