"""Made-up segments."""

import torch


def make_case(lengths=(5, 0, 17, 1, 2), channels=(3,), seed=0, ties=False):
    """Values (T, *channels), the segment of each row in order, offsets."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), *channels, generator=g) * 3
    lengths = torch.tensor(lengths, dtype=torch.int64)
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return values.round() if ties else values, index, offsets


def with_gradients(op, values, dtype=torch.float32, **arguments):
    values = values.detach().to(dtype).requires_grad_()
    out = op(values, **arguments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (grad,) = torch.autograd.grad(out, values, cotangent)
    return {"out": out.detach(), "grad": grad}
