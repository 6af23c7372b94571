"""How CPU kernels are compiled and started: threads, forked workers, the disk cache."""

import contextlib
import functools
import threading
import types

import numba
import torch
from numba.core.compiler_lock import global_compiler_lock

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
        self.function = function
        self.has_parallel = parallel

    @functools.cached_property
    def parallel(self):
        return _compiled(self.function, parallel=True)

    @functools.cached_property
    def serial(self):
        # Symbols and files are named by a function's qualified name, not by how it was compiled.
        twin = types.FunctionType(self.function.__code__, self.function.__globals__)
        twin.__name__ = self.function.__name__ + "_serial"
        twin.__qualname__ = self.function.__qualname__ + "_serial"
        twin.__module__ = self.function.__module__
        return _compiled(twin)

    def __call__(self, *args):
        if _every_build:
            for build in (self.serial, self.parallel) if self.has_parallel else (self.serial,):
                build.compile(tuple(map(numba.typeof, args)))
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if not self.has_parallel or threads == 1 or in_forked_process():
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


def _compiled(function, **options):
    """A Numba function, compiled when it is called with new types and kept on disk."""
    dispatcher = numba.njit(
        function, nogil=True, error_model="numpy", no_cfunc_wrapper=True, **options
    )
    compile_at_default = dispatcher.compile

    def compile(signature):
        # LLVM's level 2: Numba's default of 3 compiles an eighth longer for kernels no faster.
        with global_compiler_lock:
            before = numba.config.OPT
            numba.config.OPT = min(before, type(before)(2))
            try:
                return compile_at_default(signature)
            finally:
                numba.config.OPT = before

    dispatcher.compile = compile
    dispatcher._cache = KernelCache(function)
    return dispatcher


def _typed_once(dispatcher):
    """Let only the types of arguments count: for Numba `f(0)` and `f(n)` are two functions."""
    for_types = dispatcher.get_call_template

    def get_call_template(args, kws):
        kws = {name: numba.types.unliteral(kind) for name, kind in kws.items()}
        return for_types(tuple(map(numba.types.unliteral, args)), kws)

    dispatcher.get_call_template = get_call_template
    return dispatcher


def called(function, **options):
    """Decorator: a function that kernels call."""
    # What Python would need to call it takes as long to compile as a small function itself.
    return _typed_once(
        numba.njit(
            function,
            error_model="numpy",
            no_cpython_wrapper=True,
            no_cfunc_wrapper=True,
            **options,
        )
    )


def inlined(function):
    """Decorator: a function that LLVM copies into the kernels that call it."""
    return called(function, forceinline=True)


def kernel(function):
    """Decorator: compile `function` (Numba, `prange` over independent work) at first use."""
    return Kernel(function)


def serial_kernel(function):
    """Decorator: like `kernel`, for a function without parallel loops."""
    return Kernel(function, parallel=False)
