"""Small tables of host numbers on the device, such as where the samples of a batch start."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Where each sample starts in a packed batch, and the end."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts


def from_host(values: Sequence, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    """A tensor of host numbers. A GPU is not waited for: the copy is from pinned memory.

    A CUDA graph cannot capture that copy: batches whose samples are alike do without.
    """
    if device is None or device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)
