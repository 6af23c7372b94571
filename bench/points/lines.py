"""Results of the scripts here: a line each in results/points.jsonl."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results" / "points.jsonl"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all commands take."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"to {RESULTS.name}")


def prepare(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def report(bench: str, found: Iterable[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the findings and, if asked to, keep them."""
    machine = f"{platform.machine()} CPU, {options.threads} thread(s)"
    lines = [
        {"bench": bench, **line, "machine": machine, "torch": torch.__version__} for line in found
    ]
    for line in lines:
        print(json.dumps(line))
    if options.write:
        with RESULTS.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
