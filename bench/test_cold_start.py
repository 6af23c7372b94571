"""What a user waits for at first: compiling for the first picture, and starting the command.

CPU time of whole processes, one thread each, because wall time follows what else the machine does.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

PICTURE = Path(__file__).parent.parent / "docs" / "nuclei.png"


def processor_seconds(arguments, cache):
    """User and system time of a Python process, with compiled kernels kept in `cache`."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_cold_start(benchmark, tmp_path, capsys):
    """Goals: compiling takes at most 12 s; the warm command 1.5 s more than `import torch`.

    The benchmark's own figure is the wall time of the warm command.
    """
    segment = ["-m", "pointformer.cli", "segment", PICTURE, "--out", tmp_path / "out"]
    cold = [processor_seconds(segment, tmp_path / f"cache{n}") for n in range(3)]
    torch_alone, warm = [], []

    def pair():
        torch_alone.append(processor_seconds(["-c", "import torch"], tmp_path / "cache0"))
        warm.append(processor_seconds(segment, tmp_path / "cache0"))

    benchmark.pedantic(
        lambda: processor_seconds(segment, tmp_path / "cache0"), setup=pair, rounds=5
    )
    figures = {
        "compiling_s": median(cold) - median(warm),
        "over_import_torch_s": median(w - t for w, t in zip(warm, torch_alone, strict=True)),
        "cold_over_warm": median(cold) / median(warm),
        "warm_over_import_torch": median(warm) / median(torch_alone),
    }
    benchmark.extra_info.update(figures)
    with capsys.disabled():
        print("\n" + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
