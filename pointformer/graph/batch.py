"""Between sizes, the tokens per sample, and batch vectors, the sample of each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer._checks import check_count, check_device, check_sizes, check_tensor
from pointformer.clusters import offsets_of

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def sizes_from_batch(batch: Tensor, batch_size: int | None = None) -> tuple[int, ...]:
    """Tokens per sample, as all functions take them, from the batch vector of graph libraries.

    Args:
        batch: (T,) integers from 0 on that do not descend, the sample of each token.
        batch_size: number of samples; needed where the last ones are empty.

    Returns:
        B host integers, which waits for the device.

    Raises:
        TypeError, ValueError: `batch` is no such vector, or has samples from `batch_size` on.
    """
    batch = check_tensor("batch", batch, ("T",), _INTEGERS).long()
    if batch_size is not None:
        check_count("batch_size", batch_size, least=0)
    if len(batch):
        if bool((batch.diff() < 0).any()):
            raise ValueError(
                "batch: expected the tokens of a sample in consecutive rows, samples in order, got "
                "one that descends; put all rows in the order batch.argsort(stable=True) first"
            )
        first, last = int(batch[0]), int(batch[-1])
        if first < 0:
            raise ValueError(f"batch: expected samples from 0 on, got {first}")
        if batch_size is not None and last >= batch_size:
            raise ValueError(f"batch: expected samples below batch_size={batch_size}, got {last}")
    return tuple(batch.bincount(minlength=batch_size or 0).tolist())


def batch_from_sizes(sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The sample of each token, (T,) int64, from the tokens per sample, B host integers.

    Raises:
        TypeError, ValueError: `sizes` are no such integers, or `device` is none.
    """
    sizes, device = check_sizes("sizes", sizes, None), check_device(device)
    lengths = offsets_of(sizes, device).diff()
    samples = torch.arange(len(sizes), device=device)
    return torch.repeat_interleave(samples, lengths, output_size=sum(sizes))
