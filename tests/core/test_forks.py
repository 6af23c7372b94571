"""Forked workers run the library whatever their parent ran before: no hang, no kill."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing, sys
import numba, numpy as np, torch

torch.set_num_threads(2)

def work(model=False):
    import pointformer
    positions, features = torch.rand(60000, 2), torch.rand(60000, 8, requires_grad=True)
    pointformer.knn(positions, 2)
    tokens = pointformer.TokenSet(positions, features).cluster(8)
    pointformer.interpolate(features, positions, positions[:999], k=3).sum().backward()
    if model:
        from pointformer.models import create_model
        create_model("aff_nano", num_classes=3)(torch.rand(1, 3, 64, 64))

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        work(model=True)
        return index

@numba.njit(parallel=True)
def foreign(values):
    total = 0.0
    for i in numba.prange(len(values)):
        total += values[i]
    return total

def check(method, after):
    child = multiprocessing.get_context(method).Process(target=work)
    child.start()
    child.join(100)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0, (method, after, child.exitcode)
    print(method, "after", after, flush=True)

if __name__ == "__main__":
    torch.sort(torch.rand(100000))
    torch.rand(500, 500) @ torch.rand(500, 500)
    check("fork", "torch")  # the child imports the library
    foreign(np.ones(1000))
    check("fork", "foreign Numba")
    import pointformer
    check("fork", "import")
    pointformer.knn(torch.rand(5000, 2), 3)
    check("fork", "own kernels")
    check("forkserver", "all")
    options = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": 100}
    assert len(list(torch.utils.data.DataLoader(Points(), **options))) == 2
    print("loaded", flush=True)
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forked processes here")
def test_workers_run_in_every_order(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, (done.stdout, done.stderr[-2000:])
    assert done.stdout.count("after") == 5
    assert done.stdout.endswith("loaded\n")
