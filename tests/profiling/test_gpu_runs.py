"""bench/gpu/run.py without a GPU: nothing that is known is lost, whatever happens to a part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "gpu"))

from report import Report

FOLDER = Path(__file__).parents[2] / "bench" / "gpu"

PARTS = """
import os, time
from report import Part
GOALS = {}
BROKEN = []
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # one worker of pytest is enough here

def usable():
    return not BROKEN

def machine():
    return {"name": os.environ.get("CARD", "a card")}

def fails():
    raise ValueError("too wide\\n" + "x" * 5000)

def breaks():
    BROKEN.append(True)
    raise RuntimeError("illegal access")

def hangs():
    print("waiting", flush=True)
    os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "61.5")
    time.sleep(60)

def counts():
    with open(os.environ["COUNTS"], "a") as file:
        file.write("x")
    return {"value": 1}

def part(*functions):
    return lambda: ((f"{i} {f.__name__}", f) for i, f in enumerate(functions))

PARTS = {
    "mixed": Part(part(counts, fails, counts, breaks, counts, os.abort, counts), 100),
    "hanging": Part(part(counts, hangs, counts), 4),
    "last": Part(part(counts), 100),
    "tests": Part(lambda: __import__("parts").tests(), 100),
}
"""


@pytest.fixture
def run(tmp_path):
    """Calls run.py on the parts above: the finished process, and the report's lines."""
    (tmp_path / "made_up.py").write_text(PARTS)

    def run(*arguments, out="out", **environment):
        done = subprocess.run(
            [sys.executable, FOLDER / "run.py", "--parts", "made_up", *arguments],
            env=os.environ
            | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / out)}
            | {"COUNTS": str(tmp_path / "counts"), **environment},
            capture_output=True,
            text=True,
        )
        return done, Report(tmp_path / out / "report.jsonl").lines()

    return run


def statuses(lines, part):
    """The last status of each case."""
    return {line["case"]: line["status"] for line in lines if line.get("part") == part}


def test_failing_and_hanging_parts_end_alone_and_what_is_done_stays(run, tmp_path):
    counted = tmp_path / "counts"
    done, lines = run("--only", "mixed", "hanging", "last")
    assert done.returncode == 1, done.stderr
    assert statuses(lines, "mixed") == {
        "0 counts": "done",
        "1 fails": "failed",
        "2 counts": "done",
        "3 breaks": "failed",
        "4 counts": "done",
        "5 abort": "failed",
        "6 counts": "done",
    }
    errors = {line["case"]: line["error"] for line in lines if line.get("status") == "failed"}
    assert errors["1 fails"].startswith("ValueError: too wide")
    assert errors["5 abort"] == "ended with code -6"
    assert errors["1 hangs"] == "stopped at the limit of 4 s"
    assert statuses(lines, "hanging")["(the whole part)"] == "failed"
    assert statuses(lines, "last") == {"0 counts": "done"}
    assert len(counted.read_text()) == 6
    out = tmp_path / "out"
    log = (out / "log.txt").read_text()
    assert "waiting" in log
    assert "x" * 5000 in log
    assert "61.5" not in subprocess.run(["ps", "-ef"], capture_output=True, text=True).stdout
    assert sorted(file.name for file in out.iterdir()) == ["log.txt", "report.jsonl"]

    with (out / "report.jsonl").open("a") as file:
        file.write('{"part": "mixed", "case": "0 cou')  # cut off
    command = (sys.executable, FOLDER / "run.py")
    subprocess.run([*command, "--help"], check=True, capture_output=True)
    resumed = ("--resume", out / "report.jsonl", "--only", "mixed", "last")
    _, lines = run(*resumed, out="again")
    assert len(counted.read_text()) == 6  # what is done is not done again
    assert sum(line.get("case") == "1 fails" for line in lines[-12:]) == 2  # what failed is
    run(*resumed, out="other", CARD="another")
    assert len(counted.read_text()) == 6 + 5


def test_tests_are_recorded_one_by_one(run, tmp_path):
    """On GPU tests that need none: here they are skipped, and each says so in the report."""
    done, lines = run("--only", "tests", "--pytest", "-k 'test_tuned_results_are_right and gather'")
    status = statuses(lines, "tests")
    test = "tests/kernels/test_tuning.py::test_tuned_results_are_right[gather]"
    assert status[test] in ("skipped", "done"), done.stdout
    assert status["pytest"] == "done"
    assert test in (tmp_path / "out" / "log.txt").read_text()


def test_help_and_remedy_without_the_package(tmp_path):
    def isolated(*arguments):
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "class Missing:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name.split('.')[0] in ('pointformer', 'torch'):\n"
            "            raise ModuleNotFoundError(name)\n"
            "sys.meta_path.insert(0, Missing())\n"
        )
        return subprocess.run(
            [sys.executable, FOLDER / "run.py", *arguments],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    install = "python -m pip install --no-index --no-build-isolation --no-deps -e ."
    assert install in isolated("--help").stdout
    done = isolated()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert install in done.stderr
