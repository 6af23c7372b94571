"""All that needs a GPU, in one command: tests, figures beside their floors, rivals, sanitizers.

    python bench/gpu/run.py [--out DIR] [--only PART ...] [--limit SECONDS] [--resume FILE]

pointformer must be installed. Where there is no network, but torch, Triton and Numba are there:

    python -m pip install --no-index --no-build-isolation --no-deps -e .

Writes two files in the folder --out. report.jsonl has a line per case, written as soon as it is
known; log.txt has all that the parts print. Each part runs in a process of its own with a limit of
time. A case that ends its process, or is under way at the limit, is recorded as failed, and the
other cases of the part go on in a new process. Run again with the same folder, or with --resume
and the report of another: cases that are done on such a card do not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from report import Report

HERE = Path(__file__).resolve().parent
BROKEN = 3  # exit code of a process whose GPU can no longer be used


def run_cases(part: str, parts: ModuleType, report: Report) -> int:
    """All cases of a part that this process can run; `BROKEN` if there are others."""
    for case, function in parts.PARTS[part].cases():
        if case in report.status(part):
            continue
        print(f"== {part}: {case}", flush=True)
        report.settle(part, case, "running")
        start = time.perf_counter()
        try:
            result = function()
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            report.settle(part, case, "failed", error=what, traceback=traceback.format_exc())
            if not parts.usable():
                return BROKEN
        else:
            report.settle(part, case, "done", seconds=time.perf_counter() - start, result=result)
    return 0


def run_part(part: str, command: list[str], limit: float, report: Report, log: Path) -> None:
    """In processes of their own, as many as it takes, until the limit."""
    end = time.monotonic() + limit
    while True:
        with log.open("a") as output:
            child = subprocess.Popen(
                [*command, "--in-process", part],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                reason = f"ended with code {child.wait(max(0.0, end - time.monotonic()))}"
            except subprocess.TimeoutExpired:
                reason = f"stopped at the limit of {limit:g} s"
        if child.returncode is None or child.returncode:
            _kill(child)  # what it started, too
        if child.returncode == 0:
            return
        running = [case for case, status in report.status(part).items() if status == "running"]
        for case in running:
            report.settle(part, case, "failed", error=reason)
        stopped = "limit" in reason
        if stopped or not (running or child.returncode == BROKEN):
            report.settle(part, "(the whole part)", "failed", error=reason)
            return


def _kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def installed() -> bool:
    try:
        return find_spec("pointformer") is not None
    except ModuleNotFoundError:
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("OUT", HERE.parent / "results" / "gpu")
    parser.add_argument(
        "--out",
        type=Path,
        default=default,
        help=f"folder of all that is written; $OUT where that is set; now {default}",
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run, in this order")
    parser.add_argument("--limit", type=float, help="seconds for each part, instead of its own")
    parser.add_argument("--resume", type=Path, help="a report.jsonl to begin with")
    parser.add_argument("--pytest", default="", help="more arguments for pytest, in one string")
    parser.add_argument("--parts", default="parts", help=argparse.SUPPRESS)  # a module, for tests
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not installed():
        parser.exit(
            1,
            "run.py: error: pointformer is not installed: in the checkout, run "
            "python -m pip install --no-index --no-build-isolation --no-deps -e .\n",
        )
    parts = import_module(options.parts)
    if unknown := set(options.only or ()) - set(parts.PARTS):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; {', '.join(parts.PARTS)}")
    if not parts.usable():
        parser.exit(1, "run.py: error: torch sees no GPU here\n")
    out = options.out.resolve()
    report, log = Report(out / "report.jsonl"), out / "log.txt"
    os.environ.update(GPU_REPORT=str(report.path), GPU_PYTEST=options.pytest)
    if options.in_process:
        return run_cases(options.in_process, parts, report)

    out.mkdir(parents=True, exist_ok=True)
    if options.resume and not report.path.exists():
        shutil.copyfile(options.resume, report.path)
    machine = parts.machine()
    report.begin(machine["name"], command=shlex.join(sys.argv), machine=machine, goals=parts.GOALS)
    command = [sys.executable, __file__, "--out", str(out), "--parts", options.parts]
    command += [f"--pytest={options.pytest}"]
    failed = False
    for part in options.only or parts.PARTS:
        limit = options.limit or parts.PARTS[part].limit
        run_part(part, command, limit, report, log)
        found = list(report.status(part).values())
        counts = {status: found.count(status) for status in dict.fromkeys(found)}
        failed |= "failed" in counts
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"{part}: {summary or 'nothing to do'}", flush=True)
    print(f"results in {report.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
