"""Inversion of index lists, for backward passes that sum without atomics."""

import numpy as np

from pointformer.kernels.cpu.runtime import serial_kernel


@serial_kernel
def inverse_lists(index, count):
    """Where each number occurs in a flat list: a counting sort, stable.

    Returns:
        (count + 1,) int64 offsets and (E,) int64 entries: number i occurs at
        `entries[offsets[i]:offsets[i + 1]]`, ascending. Others are left out.
    """
    offsets = np.zeros(count + 2, np.int64)
    for entry in range(index.shape[0]):
        if 0 <= index[entry] < count:
            offsets[index[entry] + 2] += 1
    for i in range(2, count + 2):
        offsets[i] += offsets[i - 1]
    entries = np.empty(offsets[count + 1], np.int64)
    for entry in range(index.shape[0]):
        if 0 <= index[entry] < count:
            entries[offsets[index[entry] + 1]] = entry
            offsets[index[entry] + 1] += 1
    return offsets[: count + 1], entries
