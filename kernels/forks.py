"""Forked processes: the threads of OpenMP and of Numba do not survive a fork, so a parallel region
in the child waits for them forever, or Numba ends the process.

In a child that multiprocessing or a `DataLoader` forked torch and the CPU kernels run one thread,
whatever ran in the parent. Processes started otherwise (spawn, forkserver) keep theirs.
"""

import multiprocessing
import os

import torch

_forked = False


def in_forked_process() -> bool:
    """Whether this process was forked from one that had loaded torch."""
    return _forked


def _after_fork() -> None:
    global _forked
    _forked = True
    torch.set_num_threads(1)  # as in the workers of a DataLoader


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
    # Imported in the child only: what the parent did with torch is not known.
    if isinstance(multiprocessing.current_process(), multiprocessing.context.ForkProcess):
        _after_fork()
