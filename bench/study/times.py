"""CPU time of models on the same pictures, taken in turns: other work takes as much from each.

    python bench/study/times.py DATA MODEL [MODEL ...]
    python bench/study/times.py                     (the table only)

A line for each call is added to the results, and times.md is made of the last one of each data set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, read_lines
from tables import page_of
from trained import TIMED, add_line, cpu_seconds, made_on, name_of

from pointformer.data import open_dataset
from pointformer.models import create_model
from pointformer.prediction import to_tensor

TIMES = RESULTS.with_name("times.jsonl")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", help="data set of pictures, as of `evaluate`")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="NAME.TAG or file")
    parser.add_argument("--results", type=Path, default=TIMES, help="file of the lines")
    options = parser.parse_args(arguments)
    if options.data is not None:
        torch.set_num_threads(1)
        add_line(options.results, measure(Path(options.data), options.models))
    lines = read_lines(options.results)
    options.results.with_suffix(".md").write_text(page(lines), "utf-8")


def measure(data: Path, names: Sequence[str]) -> dict[str, Any]:
    """A line."""
    pictures = open_dataset(data, task="instance")
    some = range(0, len(pictures), max(1, len(pictures) // TIMED))
    models = [create_model(name, pretrained=True).eval() for name in names]
    return {
        "data": data.resolve().name,
        "pictures": len(some),
        "models": [name_of(name) for name in names],
        "cpu_seconds": cpu_seconds(models, [to_tensor(pictures[n].read_image()) for n in some]),
        **made_on(),
    }


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown: each model beside the first one of its call."""
    rows = []
    for line in {line["data"]: line for line in lines}.values():
        first = line["cpu_seconds"][0]
        for name, seconds in zip(line["models"], line["cpu_seconds"], strict=True):
            rows.append(
                [name, f"{line['data']} ({line['pictures']})", f"{1e3 * seconds:.0f}",
                 f"{seconds / first:.2f}"]
            )  # fmt: skip
    names = ("model", "data (pictures)", "CPU ms", "times the first")
    more = " One thread, medians of pictures."
    return page_of("CPU time of models", "times.py", names, rows, more)


if __name__ == "__main__":
    main()
