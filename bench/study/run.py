"""Run the cells of the study that are not done yet, one after the other. See README.md.

    python bench/study/run.py DATA_ROOT --out DIR [--cells ablations] [--only PATTERN] [--minutes N]
                              [field=value ...]

A finished cell is a line in the results; the same command again skips it. A cell that was
interrupted goes on from its last checkpoint in DIR, which can go when all is done. Cells are run on
one thread, in the order of `--list`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fnmatch
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ablations import ABLATION_RESULTS, ABLATIONS
from cells import CELLS, RESULTS, TrainingRun, read_lines
from tables import IOU
from torch import nn
from trained import (
    SIDES,
    TIMED,
    add_line,
    cpu_seconds,
    kinds_of,
    made_on,
    recall_of,
    rounded,
    with_recall,
)

from pointformer.data import Dataset
from pointformer.evaluation import evaluate
from pointformer.metrics import SemanticIoU
from pointformer.models import Model, complexity_of, create_model
from pointformer.prediction import to_tensor
from pointformer.tasks import Task, task_of
from pointformer.train.pictures import open_data
from pointformer.train.recipe import Recipe
from pointformer.train.run import WEIGHTS, train, validation_tile

QUEUES: dict[str, tuple[Sequence[TrainingRun], Path]] = {
    "arms": (CELLS, RESULTS),
    "ablations": (ABLATIONS, ABLATION_RESULTS),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path, help="folder with the data sets, see cells.py")
    parser.add_argument("changes", nargs="*", metavar="field=value", help="of the recipes")
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--cells", choices=QUEUES, default="arms", help="default: %(default)s")
    parser.add_argument("--results", type=Path, help="file of the lines (default: the study's)")
    parser.add_argument(
        "--only", action="append", help="pattern of names of cells; can be repeated"
    )
    parser.add_argument("--minutes", type=float, help="end then; the same command goes on")
    parser.add_argument("--list", action="store_true", help="show what is to be done, in order")
    options = parser.parse_intermixed_args(arguments)
    cells, results = QUEUES[options.cells]
    results = options.results or results
    chosen = [c for c in cells if any(fnmatch.fnmatch(c.name, p) for p in options.only or ["*"])]
    if not chosen:
        parser.error(f"--only: no cell is called like {', '.join(options.only)}")
    before = read_lines(results)
    if options.list:
        due = [c for c in chosen if not c.is_done(options.root, options.changes, before)]
        print("\n".join(cell.name for cell in due))
        return 0
    if options.out is None:
        parser.error("--out: expected the folder of the runs")
    torch.set_num_threads(1)
    timer = None
    if options.minutes is not None:
        timer = threading.Timer(60 * options.minutes, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    failed = 0
    for cell in chosen:
        if cell.is_done(options.root, options.changes, before):
            continue
        print(f"{time.strftime('%H:%M:%S')} {cell.name}", flush=True)
        try:
            line = run(cell, cell.recipe(options.root, options.changes), options.out / cell.name)
        except (ValueError, OSError, FloatingPointError, MemoryError) as error:
            print(f"{cell.name}: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        add_line(results, line)
    if timer is not None:
        timer.cancel()
    return int(failed > 0)


def run(cell: TrainingRun, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Train, or go on, and score: a line of the results."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # bars
        train(recipe, out, say=lambda text: None)
    model = create_model(str(out / WEIGHTS)).eval()
    _, validation = open_data(recipe)
    assert validation is not None
    task = task_of(model, recipe.task, validation.categories)
    plain = asdict(recipe)
    plain["data"]["path"] = cell.data
    return {
        "cell": cell.as_dict(),
        "scores": scores_of(model, task, validation, recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        **costs_of(model, validation, recipe),
        "curve": curve_of(out),
        "recipe": plain,
        **made_on(),
    }


def scores_of(model: Model, task: Task, validation: Dataset, recipe: Recipe) -> dict[str, Any]:
    """Scores by name; found and annotated objects by class and size."""

    tile = validation_tile(recipe, task)
    metrics = with_recall(task, validation)
    result = evaluate(model, validation, task, metrics=metrics, tile=tile)
    kinds = kinds_of(validation.categories)
    small, found, annotated = recall_of(result.metrics)
    scores = dict(result.scores)
    for metric in result.metrics:
        if isinstance(metric, SemanticIoU):
            iou = metric.scores().iou
            scores |= {IOU + name: iou[n].item() for n, name in kinds.items()}
    return {
        **rounded(scores),
        "small": small,
        "kinds": [*kinds.values()],
        "sides": SIDES,
        "found": found.tolist(),
        "annotated": annotated.tolist(),
        "pictures": result.pictures,
    }


def costs_of(model: Model, validation: Dataset, recipe: Recipe) -> dict[str, Any]:
    """Multiply-adds of the most frequent size of pictures, and CPU seconds of some."""
    some = range(min(len(validation), TIMED))
    pictures = [to_tensor(validation[number].read_image()) for number in some]
    sizes = [tuple(picture.shape[1:]) for picture in pictures]
    height, width = max(set(sizes), key=sizes.count)
    first, *later = cast(nn.ModuleList, model.backbone.stages)
    return {
        "size": [height, width],
        "multiply_adds": complexity_of(model, height, width).total,
        "multiply_adds_after": complexity_of(
            model, height, width, parts=[cast(nn.Module, first.merge), *later]
        ).total,
        "cpu_seconds": cpu_seconds([model], pictures)[0],
    }


def curve_of(out: Path) -> dict[str, Any]:
    """The loss in tenths of the steps, and the scores on the way, to see whether it has ended."""
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = np.array_split([float(row["loss"]) for row in rows], 10)
    with (out / "scores.csv").open(newline="") as file:
        scored = [row for row in csv.DictReader(file) if row["final"] == "0"]
    name = (
        next(key for key in scored[0] if key not in ("step", "final", "pictures")) if scored else ""
    )
    return {
        "steps": int(rows[-1]["step"]),
        "minutes": round(float(rows[-1]["seconds"]) / 60, 1),
        "loss": [round(float(part.mean()), 4) for part in losses if len(part)],
        "score": name,
        "scores": [[int(row["step"]), round(float(row[name]), 4)] for row in scored],
    }


if __name__ == "__main__":
    raise SystemExit(main())
