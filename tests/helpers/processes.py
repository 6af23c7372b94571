"""Processes of a command, as `torchrun` starts them."""

import os
import re
import socket
import subprocess
import sys

from helpers.training import ROOT


def started(world, *arguments, before=""):
    """The processes of a command, as `torchrun` starts them, but apart.

    Args:
        before: what each of them runs first, in Python.
    """
    code = f"import sys\n{before}\nfrom pointformer.cli import main\nsys.exit(main())"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in range(world)
    ]  # fmt: skip


def finished(processes):
    found = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    return [(out, re.sub(r"[^\n]*\r", "", err), code) for out, err, code in found]
