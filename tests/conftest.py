"""Options and profiles shared by all tests."""

import functools
import gc
import inspect
import os
import sys
import types
from pathlib import Path

# Before torch is imported. Workers share the cores: threads that wait must not spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton decides at import whether kernels are interpreted: without a GPU they are, in these tests.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_COMMON = {
    # A check of a change tries the same examples each time; who develops, others at every run.
    "derandomize": "CI" in os.environ,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("default", max_examples=100, **_COMMON)
settings.register_profile("thorough", max_examples=5000, **_COMMON)
# Kernels in Triton's interpreter are slow: the quick run samples them, --long takes all examples.
settings.register_profile("interpreted", max_examples=12, **_COMMON)
settings.load_profile("default")


LONGER = {"long": "takes tens of seconds", "slow": "takes minutes"}  # each mark has its option


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run tests marked long, as CI does")
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")
    parser.addoption(
        "--data",
        default=os.environ.get("POINTFORMER_DATA"),
        help="folder with the larger data sets (or the environment variable POINTFORMER_DATA)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Folders of tests run on all cores, at most four; files and tests that are named, and
    whatever else needs this process, run in it. `-n` decides otherwise."""
    option = config.option
    here = (
        not hasattr(option, "numprocesses")  # pytest-xdist is not installed
        or hasattr(config, "workerinput")
        or any(Path(argument.split("::")[0]).is_file() for argument in config.args)
        or option.usepdb
        or config.getoption("--benchmark-only", default=False)
    )
    if not here and option.numprocesses is None:
        option.numprocesses = min(4, torch.get_num_threads())
        option.dist = "worksteal"


def pytest_collectstart(collector):
    """Before a file is imported: its properties take the number of examples that is set then."""
    if (
        isinstance(collector, pytest.Module)
        and collector.config.getoption("--hypothesis-profile", default=None) is None
    ):
        interpreted = collector.path.stem.endswith("_interpret")
        sampled = interpreted and not collector.config.getoption("--long")
        settings.load_profile("interpreted" if sampled else "default")


def pytest_ignore_collect(collection_path, config):
    """With --benchmark-only there is nothing to find here: see bench/conftest.py."""
    return True if config.getoption("--benchmark-only", default=False) else None


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark, why in LONGER.items():
            if mark in item.keywords and not config.getoption(f"--{mark}"):
                item.add_marker(pytest.mark.skip(reason=f"{why}: run with --{mark}"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """What is found out about files is not kept in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("POINTFORMER_CACHE", str(folder))
        yield folder


def pytest_collection_finish():
    """What is loaded by now stays: the garbage collector need not look through it again."""
    if "triton.runtime.interpreter" in sys.modules:
        _list_members_once(sys.modules["triton.runtime.interpreter"])
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def _list_members_once(interpreter):
    """Triton's interpreter lists all members of its language at every call of a function, which
    takes as long as the rest. Their values change, but not which there are."""

    @functools.cache
    def names(owner):
        return [name for name, _ in inspect.getmembers(owner)]

    def getmembers(owner):
        return [(name, getattr(owner, name)) for name in names(owner)]

    interpreter.inspect = types.ModuleType("inspect")
    vars(interpreter.inspect).update(vars(inspect), getmembers=getmembers)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Calls the test from a frame that is large enough for a block of Python's stack of its own.

    Python 3.11 gets a block from the system and gives it back at every call that crosses the end of
    a block of 16 KiB, which in a loop can be every call. Here there is room for about 1,000 frames.
    """
    test = pyfuncitem.obj

    def call(**arguments):
        return test(**arguments)

    call.__code__ = call.__code__.replace(co_stacksize=1 << 14)
    pyfuncitem.obj = call
