"""`pointformer segment` on a folder: reading, network and writing in turn, and at a time.

Pictures with much detail, so that reading and writing them takes a good share of the time.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pointformer import cli
from pointformer.cli import segment

PICTURES = 6


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for n in range(PICTURES):
        coarse = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((480, 360), Image.Resampling.BICUBIC)
        picture.save(tmp_path / f"in/{n:02}.png")
    return tmp_path


def test_overlap(folder, benchmark, monkeypatch, capsys):
    def run(executor):
        monkeypatch.setattr(segment, "ThreadPoolExecutor", executor)
        start, used = time.perf_counter(), time.process_time()
        arguments = ["segment", str(folder / "in"), "--out", str(folder / "out"), "--threads", "1"]
        assert cli.main(arguments) == 0
        wall = time.perf_counter() - start
        return wall, (time.process_time() - used) / wall

    def alone(workers):
        return segment._InThisThread()

    run(alone)  # compiles
    rounds = [(run(alone), run(ThreadPoolExecutor)) for _ in range(2)]
    benchmark.pedantic(lambda: run(ThreadPoolExecutor), rounds=1)
    ratio = statistics.median(one[0] / other[0] for one, other in rounds)
    busy = [statistics.median(pair[n][1] for pair in rounds) for n in (0, 1)]
    benchmark.extra_info.update(ratio=ratio, busy_cores=busy)
    with capsys.disabled():
        print(
            f"\n{PICTURES} pictures, 1 thread of the network: overlapping {ratio:.2f}x the rate; "
            f"cores busy {busy[0]:.2f} one after the other, {busy[1]:.2f} overlapping"
        )
