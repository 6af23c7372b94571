"""How CPU kernels are compiled and started: threads, forked workers, the disk cache."""

import contextlib
import functools
import gc
import threading
import types

import numba
import torch
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher

from pointformer.kernels.cpu.cache import KernelCache
from pointformer.kernels.forks import in_forked_process

_lock = threading.Lock()
_every_build = False


class Kernel:
    """A Numba function with a parallel and a serial build, chosen at every call.

    The parallel build uses as many threads as `torch.get_num_threads()`. In a forked process (a
    `DataLoader` worker), and where torch runs one thread, the serial build runs instead. Both give
    the same bits.
    """

    def __init__(self, function, parallel=True):
        functools.update_wrapper(self, function)
        # Symbols and files are named by a function's qualified name, not by how it was compiled.
        twin = types.FunctionType(function.__code__, function.__globals__)
        twin.__name__ = function.__name__ + "_serial"
        twin.__qualname__ = function.__qualname__ + "_serial"
        twin.__module__ = function.__module__
        self.serial = _Build(twin)
        self.parallel = _Build(function, parallel=True) if parallel else None

    def __call__(self, *args):
        if _every_build:
            for build in filter(None, (self.serial, self.parallel)):
                build.compile(tuple(map(numba.typeof, args)))
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if self.parallel is None or threads == 1 or in_forked_process():
            return self.serial(*args)
        with _lock:  # the fallback threading layer is not safe to enter twice
            numba.set_num_threads(threads)
            return self.parallel(*args)


@contextlib.contextmanager
def every_build():
    """Within it kernels are compiled, or loaded, in both builds, whichever runs."""
    global _every_build
    before, _every_build = _every_build, True
    try:
        yield
    finally:
        _every_build = before


@contextlib.contextmanager
def _quick_compilation():
    """LLVM's level 2: Numba's default of 3 compiles an eighth longer for kernels no faster. And no
    garbage collection, which takes a twelfth of the time: all of torch is searched."""
    before, collecting = numba.config.OPT, gc.isenabled()
    numba.config.OPT = min(before, type(before)(2))
    gc.disable()
    try:
        yield
    finally:
        numba.config.OPT = before
        if collecting:
            gc.enable()


class _Build(CPUDispatcher):
    """A Numba function, compiled when it is called with new types and kept on disk."""

    def __init__(self, function, **options):
        options |= {"nopython": True, "nogil": True, "error_model": "numpy"}
        super().__init__(function, targetoptions=options | {"no_cfunc_wrapper": True})
        self._cache = KernelCache(function)

    def compile(self, sig):
        with global_compiler_lock, _quick_compilation():
            return super().compile(sig)


class _Callee(CPUDispatcher):
    """A Numba function for other Numba functions: without what Python needs to call it, which would
    take as long to compile as a small function itself."""

    def __init__(self, function, **options):
        self.options = options | {"nopython": True, "error_model": "numpy"}
        no_wrappers = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        super().__init__(function, targetoptions=self.options | no_wrappers)

    def get_call_template(self, args, kws):
        # Only types count: for Numba `f(0)` and `f(n)` would be two functions.
        kws = {name: numba.types.unliteral(kind) for name, kind in kws.items()}
        return super().get_call_template(tuple(map(numba.types.unliteral, args)), kws)

    def add_overload(self, cres):
        self.overloads[tuple(cres.signature.args)] = cres  # but Python's calls do not find it

    @functools.cached_property
    def _for_python(self):
        return CPUDispatcher(self.py_func, targetoptions=self.options)

    def _compile_for_args(self, *args, **kws):
        return self._for_python  # tests call the parts of a kernel


def called(function):
    """Decorator: a function that kernels call, compiled once for all of its calls."""
    return _Callee(function)


def inlined(function):
    """Decorator: a function that LLVM copies into the kernels that call it."""
    return _Callee(function, forceinline=True)


def kernel(function):
    """Decorator: compile `function` (Numba, `prange` over independent work) at first use."""
    return Kernel(function)


def serial_kernel(function):
    """Decorator: like `kernel`, for a function without parallel loops."""
    return Kernel(function, parallel=False)
