"""How CPU kernels are compiled and started: threads, forked workers, the disk cache."""

import contextlib
import functools
import threading
import types

import numba
import torch

from pointformer.kernels.forks import in_forked_process

_lock = threading.Lock()


class Kernel:
    """A Numba function with a parallel and a serial build, chosen at every call.

    The parallel build uses as many threads as `torch.get_num_threads()`. In a forked process (a
    `DataLoader` worker), and where torch runs one thread, the serial build runs instead. Both give
    the same bits.
    """

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    @functools.cached_property
    def parallel(self):
        return numba.njit(self.function, parallel=True, cache=True, nogil=True, error_model="numpy")

    @functools.cached_property
    def serial(self):
        # Numba's disk cache knows a function by its qualified name, not by how it was compiled.
        twin = types.FunctionType(self.function.__code__, self.function.__globals__)
        twin.__name__ = self.function.__name__ + "_serial"
        twin.__qualname__ = self.function.__qualname__ + "_serial"
        twin.__module__ = self.function.__module__
        return numba.njit(twin, cache=True, nogil=True, error_model="numpy")

    def __call__(self, *args):
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if threads == 1 or in_forked_process():
            with _compiled_fast():
                return self.serial(*args)
        with _lock, _compiled_fast():  # the fallback threading layer is not safe to enter twice
            numba.set_num_threads(threads)
            return self.parallel(*args)


@contextlib.contextmanager
def _compiled_fast():
    """LLVM's level 2: Numba's default of 3 compiles an eighth longer for kernels no faster."""
    before = numba.config.OPT
    numba.config.OPT = min(before, type(before)(2))
    try:
        yield
    finally:
        numba.config.OPT = before


def kernel(function):
    """Decorator: compile `function` (Numba, `prange` over independent work) at first use."""
    return Kernel(function)
