"""Inversion of index lists, for backward passes that sum without atomics."""

import torch


def inverse_lists(index, count):
    """Where each number below `count` occurs in a list: a stable sort, no wait for the device.

    Args:
        index: integers of any shape, E in all. Those outside 0 to count - 1 are left out.
        count: C, a host integer.

    Returns:
        (C + 1,) int32 offsets, int64 if E passes 2**31, and (E,) int64 entries: number i occurs at
        `entries[offsets[i]:offsets[i + 1]]`, positions in the flattened list, ascending.
    """
    flat = index.reshape(-1)
    return sorted_lists(torch.where((flat >= 0) & (flat < count), flat, count), count)


def sorted_lists(key, count):
    """`inverse_lists` of (E,) numbers from 0 to count; those that are `count` are left out."""
    key, entries = torch.sort(key, stable=True)
    bounds = torch.arange(count + 1, dtype=key.dtype, device=key.device)
    return torch.searchsorted(key, bounds, out_int32=len(key) < 2**31), entries
