"""The disk cache of compiled kernels, for what Numba's own does not provide.

A file holds one build of one kernel, under a name that says all it depends on: the kernel's source
file and those that it imports from here (Numba looks at the first alone), the types of the
arguments, the CPU and the versions of Python and Numba. So an old build is never taken for a new
one, and processes that compile at once cannot mix up theirs. A checksum tells a damaged file; its
kernel is compiled again. Builds are read from every place, writable or not, so that an image of a
container can bring them.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import re
import sys
import uuid
import warnings
from pathlib import Path

import numba
from numba.core import caching
from numba.core.compiler import CompileResult

SUFFIX = ".kernel"
_HERE = Path(__file__).parent
_IMPORTED = re.compile(r"pointformer\.kernels\.cpu\.(\w+)")
_DIGEST = 32  # bytes of a checksum


def places():
    """Folders for compiled kernels, in the order in which they are searched and tried for writing.

    As Numba's: `NUMBA_CACHE_DIR` and nothing else, or without it `__pycache__` beside the kernels
    and the user's cache folder.
    """
    below = caching._CacheLocator.get_suitable_cache_subpath(__file__)
    if numba.config.CACHE_DIR:
        return [Path(numba.config.CACHE_DIR, below)]
    user = caching.AppDirs(appname="numba", appauthor=False).user_cache_dir
    return [_HERE / "__pycache__", Path(user, below)]


@functools.cache
def sources_digest(module):
    """A digest of a file here, "attention" for example, and of all that it imports from here."""
    sources, waiting = {}, {module}
    while waiting:
        name = waiting.pop()
        path = _HERE / f"{name}.py"
        sources[name] = path.read_text(encoding="utf-8") if path.exists() else ""
        waiting |= {*_IMPORTED.findall(sources[name])} - sources.keys()
    return hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:16]


def builds():
    """Files of the compiled kernels that the present sources can have."""
    return [
        path
        for place in places()
        for path in sorted(place.glob(f"*{SUFFIX}"))
        if path.name.split("-")[1] == sources_digest(path.name.split(".")[0])
    ]


class KernelCache(caching._Cache):
    """Takes the place of Numba's cache of a function, `dispatcher._cache`."""

    def __init__(self, function):
        module = function.__module__.rsplit(".", 1)[-1]
        self._code = function.__code__.co_code
        self._kernel = f"{module}.{function.__qualname__}-".replace("<", "").replace(">", "")
        # Now, when it is imported: the files may change before it is compiled.
        self._digest = sources_digest(module)

    @property
    def cache_path(self):
        return str(places()[0])

    def enable(self):
        pass

    disable = flush = enable

    def _name(self, signature, codegen):
        versions = (sys.version_info[:2], numba.__version__)
        key = (self._code, signature, codegen.magic_tuple(), versions)
        key = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return f"{self._kernel}{self._digest}-{key}{SUFFIX}"

    def load_overload(self, signature, target_context):
        target_context.refresh()
        name = self._name(signature, target_context.codegen())
        for place in places():
            with contextlib.suppress(OSError):
                content = (place / name).read_bytes()
                if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
                    return CompileResult._rebuild(target_context, *pickle.loads(content[_DIGEST:]))
        return None

    def save_overload(self, signature, result):
        if result.library.has_dynamic_globals:  # addresses of this process
            return
        name = self._name(signature, result.codegen)
        content = caching.dumps(result._reduce())
        for place in places():
            with contextlib.suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
                _write(place / name, hashlib.sha256(content).digest() + content)
                for path in place.glob(f"{self._kernel}*{SUFFIX}"):
                    if not path.name.startswith(self._kernel + self._digest):
                        path.unlink(missing_ok=True)  # of older sources
                return
        _warn_once()


def _write(path, content):
    """Whole or not at all: another process may read it at any time."""
    unfinished = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@functools.cache
def _warn_once():
    warnings.warn_explicit(
        "compiled CPU kernels cannot be kept, so that every process compiles them again: no place "
        f"is writable ({', '.join(map(str, places()))}); set NUMBA_CACHE_DIR to a folder that is",
        RuntimeWarning,
        "pointformer",  # no file: a warning in one line
        1,
    )
