"""Inversion of index lists, for backward passes that sum without atomics."""

import numpy as np

from pointformer.kernels.cpu.runtime import serial_kernel
from pointformer.kernels.cpu.simd import pointer


@serial_kernel
def _count_and_place(index, count, offsets, entries):
    numbers, ends, places = pointer(index), pointer(offsets), pointer(entries)
    for entry in range(index.size):
        if 0 <= numbers[entry] < count:
            ends[numbers[entry] + 2] += 1
    for i in range(2, count + 2):
        ends[i] += ends[i - 1]
    for entry in range(index.size):
        if 0 <= numbers[entry] < count:
            places[ends[numbers[entry] + 1]] = entry
            ends[numbers[entry] + 1] += 1


def inverse_lists(index, count):
    """Where each number occurs in a flat list: a counting sort, stable.

    Returns:
        (count + 1,) int64 offsets and (E,) int64 entries: number i occurs at
        `entries[offsets[i]:offsets[i + 1]]`, ascending. Others are left out.
    """
    offsets = np.zeros(count + 2, np.int64)
    entries = np.empty(index.size, np.int64)
    _count_and_place(index, count, offsets, entries)
    return offsets[:-1], entries[: offsets[count]]
