"""Reductions over segments of rows by torch-scatter."""

import torch
import torch_scatter


def _rows(table, offsets):
    return torch_scatter.gather_csr(table, offsets)


def order(index, count):
    """See `pointformer.kernels.segment`: torch's own, torch-scatter has none."""
    index, rows = torch.sort(index, stable=True)
    return torch.searchsorted(index, torch.arange(count + 1, device=index.device)), rows


def fold(values, offsets, other, mode):
    """See `pointformer.kernels.segment`."""
    values = values.float().contiguous()
    nothing = torch.empty(0, dtype=torch.int64, device=values.device)
    if mode in ("min", "max", "largest"):
        by = torch_scatter.segment_min_csr if mode == "min" else torch_scatter.segment_max_csr
        found, first = by(values, offsets)
        empty = (offsets.diff() == 0)[:, None]
        found = found.masked_fill(empty, torch.inf if mode == "min" else -torch.inf)
        return found, nothing if mode == "largest" else first.masked_fill(empty, len(values))
    if mode == "squares":
        values = (values - _rows(other, offsets)).square()
    elif mode == "exps":
        values = (values - _rows(other, offsets)).exp()
    elif mode == "products":
        values = values * other.float()
    return torch_scatter.segment_sum_csr(values, offsets), nothing


def spread(table, offsets, values, other, rows, dtype, mode):
    """See `pointformer.kernels.segment`."""
    found = _rows(table.float(), offsets)
    if mode == "products":
        found = values.float() * (other.float() - found)
    elif mode != "copy":
        difference = values.float() - _rows(other, offsets)
        found = found * (difference.exp() if mode == "exps" else difference)
    return found.to(dtype)
