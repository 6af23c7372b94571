"""Kernels compiled for GPUs that are not there: no register spills, shared memory that fits.

The quick run compiles for one target, a subset of what the launchers can choose in which every
trait of a kernel (constants, types, warps) occurs, and every pair of traits of kernels that spilled
before; `--long` takes all pairs and all targets, which then are traits too; `--slow` compiles
everything.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from aot import SHARED_MEMORY, modules

SCRIPT = Path(__file__).parents[1] / "aot.py"
PROCESSES = 1 if "PYTEST_XDIST_WORKER" in os.environ else max(1, min(4, os.cpu_count() or 1))


def compile_all(*options):
    """Rows of `aot.py`, its work dealt out to a few processes."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *options, "--part", f"{part}/{PROCESSES}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(PROCESSES)
    ]
    rows = []
    for run in runs:
        output, errors = run.communicate()
        assert run.returncode == 0, errors[-2000:]
        rows += [json.loads(line) for line in output.splitlines()]
    return rows


def check(rows, targets):
    assert {row["target"] for row in rows} == set(targets)
    # Before 3.9 a few specializations of attention spill up to four registers, see
    # bench/results/README.md: to spare them would cost a quarter of the warps.
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    most = 0 if version >= (3, 9) else 16
    bad = [
        row for row in rows if row["spilled"] > most or row["shared"] > SHARED_MEMORY[row["target"]]
    ]
    assert not bad, "\n".join(json.dumps(row) for row in bad)


def test_aot_of_one_target():
    check(compile_all(*modules(), "--covering", "1", "--targets", "cuda:90"), ["cuda:90"])


@pytest.mark.long
@pytest.mark.parametrize("module", modules())
def test_aot_pairwise(module):
    check(compile_all(module, "--covering", "2"), SHARED_MEMORY)


@pytest.mark.slow
@pytest.mark.parametrize("module", modules())
def test_aot_all(module):
    check(compile_all(module), SHARED_MEMORY)
