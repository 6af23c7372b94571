"""The disk cache of compiled kernels, for what Numba's own does not provide.

A file holds one build of one kernel, under a name that says all it depends on: the sources of *all*
kernels (Numba looks at one file, but kernels share others), the types of the arguments, the CPU and
the versions of Python and Numba. So an old build is never taken for a new one, and processes that
compile at once cannot mix up theirs. A checksum tells a damaged file; its kernel is compiled again.
Builds are read from every place, writable or not, so that an image of a container can bring them.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import uuid
import warnings
from pathlib import Path

import numba
from numba.core import caching
from numba.core.compiler import CompileResult

SUFFIX = ".kernel"
_HERE = Path(__file__).parent
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
def sources_digest():
    """A digest of the sources of all CPU kernels."""
    digest = hashlib.sha256()
    for path in sorted(_HERE.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def builds():
    """Files of the compiled kernels that this version and its kernels' sources can have."""
    return [path for place in places() for path in place.glob(f"*-{sources_digest()}-*{SUFFIX}")]


class KernelCache(caching._Cache):
    """Takes the place of Numba's cache of a function, `dispatcher._cache`."""

    def __init__(self, function):
        module = function.__module__.rsplit(".", 1)[-1]
        self._kernel = f"{module}.{function.__qualname__}-"

    @property
    def cache_path(self):
        return str(places()[0])

    def enable(self):
        pass

    disable = flush = enable

    def _name(self, signature, codegen):
        key = (signature, codegen.magic_tuple(), sys.version_info[:2], numba.__version__)
        key = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        return f"{self._kernel}{sources_digest()}-{key}{SUFFIX}"

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
                    if not path.name.startswith(self._kernel + sources_digest()):
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
