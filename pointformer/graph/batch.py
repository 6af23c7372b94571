"""Between sizes, the tokens per sample, and batch vectors, the sample of each token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pointformer._checks import (
    brief,
    check_batch,
    check_count,
    check_device,
    check_integers,
    check_sizes,
)
from pointformer.clusters import sample_of_rows


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
    if batch_size is not None:
        check_count("batch_size", batch_size, least=0)
    return check_batch("batch", batch, batch_size)


def sizes_from_ptr(ptr: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Tokens per sample, from the row where each sample starts and the end, as `ptr` of graph
    libraries and `batch_offsets` of token sets.

    Args:
        ptr: (B + 1,) integers from 0 on that do not descend.

    Returns:
        B host integers, which waits for the device.

    Raises:
        TypeError, ValueError: `ptr` are no such integers.
    """
    if isinstance(ptr, Tensor) and torch.compiler.is_compiling():
        return ptr.diff().cpu()  # type: ignore[return-value]  # unread, see `PerSample`
    starts = check_integers("ptr", ptr, "the row where each sample starts, and the end")
    if not starts or starts[0] != 0:
        raise ValueError(f"ptr: expected the rows where samples start, from 0 on, got {brief(ptr)}")
    sizes = tuple(end - start for start, end in pairwise(starts))
    if any(size < 0 for size in sizes):
        raise ValueError(f"ptr: expected rows that do not descend, got {brief(starts)}")
    return sizes


def batch_from_sizes(sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The sample of each token, (T,) int64, from the tokens per sample, B host integers.

    Raises:
        TypeError, ValueError: `sizes` are no such integers, or `device` is none.
    """
    sizes, device = check_sizes("sizes", sizes, None), check_device(device)
    return sample_of_rows(sizes, device)
