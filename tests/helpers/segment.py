"""Made-up segments."""

import torch


def make_case(lengths=(5, 0, 17, 1, 2), channels=(3,), seed=0, ties=False, odd=0.0):
    """Values (T, *channels), the segment of each row in order, offsets; a share `odd` of the values
    is NaN or infinite."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), *channels, generator=g) * 3
    strange = torch.tensor([torch.nan, torch.inf, -torch.inf])
    strange = strange[torch.randint(0, 3, values.shape, generator=g)]
    values = values.where(torch.rand(values.shape, generator=g) >= odd, strange)
    lengths = torch.tensor(lengths, dtype=torch.int64)
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return values.round() if ties else values, index, offsets


def gradient_of_first(name, values, index, count):
    """That of `with_gradients` for "min" or "max" of values (T, C), one by one: all of it goes to
    the first row that has it, NaN being both least and largest."""
    cotangent = torch.randn(count, values.shape[1], generator=torch.Generator().manual_seed(1))
    expected = torch.zeros_like(values)
    for segment in index.unique():
        rows = (index == segment).nonzero()[:, 0]
        for channel in range(values.shape[1]):
            column = values[rows, channel].tolist()
            nan = [number != number for number in column]
            best = max(column) if name == "max" else min(column)
            row = rows[nan.index(True) if any(nan) else column.index(best)]
            expected[row, channel] = cotangent[segment, channel]
    return expected


def with_gradients(op, values, dtype=torch.float32, **arguments):
    values = values.detach().to(dtype).requires_grad_()
    out = op(values, **arguments)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (grad,) = torch.autograd.grad(out, values, cotangent)
    return {"out": out.detach(), "grad": grad}
