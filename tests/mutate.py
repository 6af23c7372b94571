"""Which changes to a module does no test notice? Mutations by cosmic-ray, in a copy of the tree.

    python tests/mutate.py pointformer/tokens.py tests/core/test_tokens.py --number 40

Prints every mutation with which the given tests still pass. The checkout itself is not touched.
Needs the extra `dev`.
"""

import argparse
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Left out: what any run notices at once, or what changes annotations only.
EXCLUDED = (
    "core/RemoveDecorator",
    "core/ExceptionReplacer",
    "core/.*_(Is|IsNot)",
    "core/ReplaceBinaryOperator_.*_(RShift|LShift|BitXor|Pow)",
    "core/ReplaceBinaryOperator_BitOr_.*",
    "core/ReplaceUnaryOperator_.*_(UAdd|Invert)",
)


def copy_checkout(folder: Path) -> None:
    """The files that git knows, laid out as the installed package is."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    for part in ("kernels", "models"):
        (folder / "pointformer" / part).symlink_to(folder / part, target_is_directory=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", help="file to change, for example pointformer/tokens.py")
    parser.add_argument("tests", nargs="+", help="test files, or any other arguments of pytest")
    parser.add_argument("--number", type=int, default=40, help="mutations to try (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="which of all mutations are tried")
    parser.add_argument("--lines", help="only in these lines, for example 40-90")
    options = parser.parse_args()

    from cosmic_ray.commands import init
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import TestOutcome

    first, last = (int(n) for n in (options.lines or "1-1000000").split("-"))
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        copy_checkout(folder)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a changed file may keep its time and size
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += options.tests
        start = time.perf_counter()
        before = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if before.returncode:
            print(before.stdout[-3000:] + before.stderr[-1000:])
            print("the tests fail without any mutation")
            return 2
        with use_db("session.sqlite", WorkDB.Mode.create) as database:
            init([Path(options.module)], database, {})
            items = [
                item
                for item in database.work_items
                if first <= item.mutations[0].start_pos[0] <= last and not excluded(item)
            ]
        random.Random(options.seed).shuffle(items)
        items = items[: options.number]
        survivors = 0
        for done, item in enumerate(items, 1):
            result = mutate_and_test(item.mutations, shlex.join(command), 3 * seconds + 30)
            if result.test_outcome == TestOutcome.SURVIVED:
                survivors += 1
                print("\n".join(result.diff.splitlines()[2:]), "\n", flush=True)
            if sys.stderr.isatty():
                print(f"{done} of {len(items)}, {survivors} unnoticed", end="\r", file=sys.stderr)
    print(f"{options.module}: {survivors} of {len(items)} mutations unnoticed")
    return 0


def excluded(item) -> bool:
    name = item.mutations[0].operator_name
    return any(re.fullmatch(pattern, name) for pattern in EXCLUDED)


if __name__ == "__main__":
    sys.exit(main())
