"""Small tables of host numbers on the device, such as where the samples of a batch start."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Where each sample starts in a packed batch, and the end."""
    return [0, *itertools.accumulate(sizes)]


def from_host(
    values: Sequence | np.ndarray, dtype: torch.dtype, device: torch.device | None
) -> torch.Tensor:
    """A tensor of host numbers. A GPU is not waited for: the copy is from pinned memory.

    While a CUDA graph is captured nothing is copied: see `from_arguments`.
    """
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    array = np.array(values)  # faster than torch.tensor of a list
    if device is None or device.type != "cuda":
        return torch.from_numpy(array).to(device, dtype)
    if not torch.cuda.is_current_stream_capturing():
        return torch.from_numpy(array).to(dtype).pin_memory().to(device, non_blocking=True)
    return from_arguments(array, dtype, device)


def from_arguments(array: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The same numbers as arguments of launches, which a CUDA graph keeps; a copy it would repeat
    from memory that is gone by then. A launch takes about a hundred of them.
    """
    table = torch.zeros(array.shape, dtype=dtype, device=device)
    if array.size:
        torch._foreach_add_(table.view(-1).unbind(), array.ravel().tolist())
    return table


def shifted_copies(index: torch.Tensor, copies: int, rows: int) -> torch.Tensor:
    """Lists of rows, -1 for none, of several samples of `rows` rows each that have those of one."""
    if copies == 1:
        return index
    starts = torch.arange(copies, dtype=index.dtype, device=index.device) * rows
    starts = starts.view(-1, *[1] * index.dim())
    return torch.where(index < 0, index, index + starts).flatten(0, 1)


def plain_levels(curve: str, dimensions: int, samples: int) -> int:
    """Cells per axis of a curve's fine lattice: a cell's number and the sample fill 63 bits."""
    many = samples > 1 << 18
    if curve == "peano":
        return 3 ** (10 if dimensions == 2 else 7 if many else 9)
    # Multiples of D, or the Hilbert curve is turned.
    return 1 << (16 if dimensions == 2 else 12 if many else 15)
