"""`pointformer segment` on a folder: pictures in turn, and side by side.

The time and the cores that are busy depend on what else the machine does; how many threads are
running or waiting for a core, on the mean, does not: as many as there are cores keep all busy.
POINTFORMER_PICTURES sets how many pictures there are; 1,000 take some minutes.
"""

import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pointformer import cli
from pointformer.cli import segment

PICTURES = int(os.environ.get("POINTFORMER_PICTURES", "12"))
THREADS = 2

# Prints how many threads of a process are running or could, on the mean, once its input ends.
SAMPLER = """
import glob, select, sys
counts = []
while not select.select([sys.stdin], [], [], 0.02)[0]:
    states = []
    for path in glob.glob(f"/proc/{sys.argv[1]}/task/*/stat"):
        try:
            states.append(open(path).read().rpartition(")")[2].split()[0])
        except OSError:
            pass
    counts.append(states.count("R"))
print(sum(counts) / len(counts))
"""


@pytest.fixture
def folder(tmp_path):
    """Pictures with much detail, of 480 x 360 pixels."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for n in range(PICTURES):
        coarse = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((480, 360), Image.Resampling.BICUBIC)
        picture.save(tmp_path / f"in/{n:04}.png")
    return tmp_path


def test_overlap(folder, benchmark, monkeypatch, capsys):
    def run(executor, out):
        monkeypatch.setattr(segment, "ThreadPoolExecutor", executor)
        arguments = ["segment", folder / "in", "--out", folder / out, "--threads", THREADS]
        sampler = subprocess.Popen(
            [sys.executable, "-c", SAMPLER, str(os.getpid())], stdin=-1, stdout=-1, text=True
        )
        start, used = time.perf_counter(), time.process_time()
        assert cli.main([str(argument) for argument in arguments]) == 0
        wall, used = time.perf_counter() - start, time.process_time() - used
        return wall, used, float(sampler.communicate()[0])

    def alone(*workers, **options):
        return segment._InThisThread()

    run(alone, "alone")  # compiles
    run(ThreadPoolExecutor, "together")
    for path in (folder / "alone").iterdir():
        if not path.name.endswith("summary.json"):  # which has times
            assert path.read_bytes() == (folder / "together" / path.name).read_bytes(), path.name
    rounds = [(run(alone, "alone"), run(ThreadPoolExecutor, "together")) for _ in range(2)]
    benchmark.pedantic(lambda: run(ThreadPoolExecutor, "together"), rounds=1)
    ratio = statistics.median(one[0] / other[0] for one, other in rounds)
    work, busy = (
        [statistics.median(pair[n][of] for pair in rounds) for n in (0, 1)] for of in (1, 2)
    )
    benchmark.extra_info.update(ratio=ratio, cpu_seconds=work, threads_that_can_run=busy)
    with capsys.disabled():
        print(
            f"\n{PICTURES} pictures, {THREADS} threads: side by side {ratio:.2f}x the rate of one "
            f"after the other; CPU {work[0]:.1f} s and {work[1]:.1f} s; threads that can run, on "
            f"the mean, {busy[0]:.2f} one after the other, {busy[1]:.2f} side by side"
        )
