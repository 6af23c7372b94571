"""Where compiled CPU kernels are kept, and what may go wrong with their files."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numba
import numpy as np
import pytest

from pointformer.kernels.cpu import cache, runtime

ROOT = Path(__file__).parents[2]


def double(numbers):
    for i in numba.prange(len(numbers)):
        numbers[i] *= 2


def run(parallel=False):
    """Double numbers by a new kernel; its misses of the disk cache."""
    kernel = runtime.Kernel(double)
    build = kernel.parallel if parallel else kernel.serial
    numbers = np.arange(5, dtype=np.float32)
    build(numbers)
    assert numbers.tolist() == [0, 2, 4, 6, 8]
    return sum(build.stats.cache_misses.values())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The only place for compiled kernels."""
    monkeypatch.setattr(cache, "places", lambda: [tmp_path])
    cache._warn_once.cache_clear()
    return tmp_path


def test_compiled_once(folder):
    assert run() == 1
    assert run() == 0
    assert run(parallel=True) == 1  # another build of the same function
    assert run(parallel=True) == 0
    assert len(list(folder.iterdir())) == len(cache.builds()) == 2


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b[:-1] + b"\0"])
def test_damaged_file_is_compiled_again(folder, damage):
    run()
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert run() == 1
    assert run() == 0


def test_old_builds_are_not_taken_when_a_shared_source_changes(folder, monkeypatch):
    run()
    (old,) = folder.iterdir()
    monkeypatch.setattr(cache, "sources_digest", lambda module: "0" * 16)
    assert run() == 1
    (new,) = folder.iterdir()
    assert new.name != old.name


def test_digest_follows_imported_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_HERE", tmp_path)

    def digest():
        return cache.sources_digest.__wrapped__("merge")

    (tmp_path / "merge.py").write_text("from pointformer.kernels.cpu.special import log2")
    (tmp_path / "special.py").write_text("from pointformer.kernels.cpu.simd import load")
    (tmp_path / "simd.py").write_text("1")
    (tmp_path / "other.py").write_text("1")
    before = digest()
    (tmp_path / "other.py").write_text("2")
    assert digest() == before
    (tmp_path / "simd.py").write_text("2")
    assert digest() != before


def test_builds_are_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    image, user = tmp_path / "image", tmp_path / "user"
    monkeypatch.setattr(cache, "places", lambda: [image])
    run()
    monkeypatch.setattr(cache, "places", lambda: [user, image])
    write = cache._write

    def refused(path, content):
        if path.parent == image:
            raise PermissionError(13, "Permission denied")
        write(path, content)

    monkeypatch.setattr(cache, "_write", refused)
    assert run() == 0
    monkeypatch.setattr(cache, "places", lambda: [image, user])
    assert run(parallel=True) == 1  # kept in the next place
    assert [path.parent for path in cache.builds()] == [image, user]


def test_no_writable_place_is_said_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "places", lambda: [tmp_path / "file" / "below"])
    cache._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="set NUMBA_CACHE_DIR") as record:
        misses = run(), run()
    assert misses == (1, 1)
    (warning,) = record
    text = warnings.formatwarning(
        warning.message, warning.category, warning.filename, warning.lineno
    )
    assert text.count("\n") == 1


def test_places_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    (chosen,) = cache.places()
    assert chosen.parent == tmp_path
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    package, user = cache.places()
    assert package == Path(cache.__file__).parent / "__pycache__"
    assert user.name == chosen.name


def test_every_build_is_compiled_whichever_runs(folder):
    kernel = runtime.Kernel(double)
    with runtime.every_build():
        kernel(np.ones(3, np.float32))
    assert len(kernel.serial.signatures) == len(kernel.parallel.signatures) == 1


def test_values_of_arguments_do_not_count():
    @runtime.inlined
    def add(a, b):
        return a + b

    @numba.njit
    def sums(n):
        return add(n, 1) + add(n, 2) + add(0, n)

    assert sums(3) == 4 + 5 + 3
    assert len(add.overloads) == 1
    assert add(2, 5) == 7  # and Python can call it too


def test_two_processes_at_once(tmp_path):
    """They write the same files: each whole, none left over, both right."""
    code = (
        "import numpy as np\n"
        "from pointformer.kernels.cpu.inverse import inverse_lists\n"
        "print(*inverse_lists(np.array([1, 0, 1, 2], np.int32), 3)[1])\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in processes] == ["1 0 2 3\n"] * 2
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [cache.SUFFIX]


COUNT = """
import sys
from numba.core import event
from pointformer.cli import main

compiled = []

class Listener(event.Listener):
    def on_start(self, event):
        compiled.append(str(event.data["dispatcher"]))

    def on_end(self, event):
        pass

event.register("numba:compile", Listener())
code = main(sys.argv[1:])
print(len(compiled), "compiled:", *compiled)
sys.exit(code)
"""


@pytest.mark.slow
def test_nothing_is_compiled_after_warmup(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))

    def compiled(*arguments):
        output = subprocess.run(
            [sys.executable, "-c", COUNT, *map(str, arguments)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        return output.splitlines()

    first = compiled("warmup")
    assert str(tmp_path / "cache") in first[0]
    assert not first[-1].startswith("0 compiled")
    picture = ROOT / "docs" / "nuclei.png"
    for n, options in enumerate(((), ("--threads", 2), ("--tile", 128))):
        out = tmp_path / f"out{n}"
        assert compiled("segment", picture, "--out", out, *options)[-1] == "0 compiled:"
    assert compiled("warmup")[-1] == "0 compiled:"


def test_builds_of_other_cpus_and_versions_are_not_taken(monkeypatch):
    kept, codegen = cache.KernelCache(double), mock.Mock()
    names = []
    for cpu, version in (("znver4", "1.0"), ("core2", "1.0"), ("core2", "1.1")):
        codegen.magic_tuple.return_value = ("x86_64", cpu)
        monkeypatch.setattr(numba, "__version__", version)
        names.append(kept._name((), codegen))
    assert len(set(names)) == 3
