"""Train a model on your own pictures.

    pointformer train DATA --task instance --model aff_tiny --out RUN budget.epochs=50
    pointformer train RECIPE.yaml [DATA] --out RUN [field=value ...]

Several processes, each with its part of every batch, give the curve of one:

    torchrun --nproc-per-node 2 -m pointformer.cli train DATA --out RUN --device cuda

The same command again, also with another number of processes, goes on with a run that was
interrupted. What can be changed as field=value is shown by --fields.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pointformer.cli.common import (
    FORMATS,
    add_task_argument,
    is_out_of_memory,
    printable,
    say,
    use_threads,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="DATA | RECIPE.yaml | field=value",
        help="folder or file of a data set, as evaluate reads them; a recipe, of the package by "
        "its name; changes of the recipe, as optimizer.learning_rate=1e-3",
    )
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--fields", action="store_true", help="show the fields of recipes")
    parser.add_argument(
        "--print-recipe", action="store_true", help="show the recipe that would be trained by"
    )
    add_task_argument(parser, "that of the recipe, or semantic")
    parser.add_argument("--model", help="name, see the command models")
    parser.add_argument(
        "--init", help="NAME.TAG, a .safetensors file or a released checkpoint to start from"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: what DATA looks like")
    parser.add_argument(
        "--val-share",
        type=float,
        help="of the pictures that are kept to be scored on, where no split is (default: 0.1)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out pictures and objects that are bad, and list them",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out by its own recipe, changed by field=value",
    )
    parser.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def run(options: argparse.Namespace) -> int:
    from pointformer.train.recipe import describe_fields, read_recipe, write_recipe
    from pointformer.train.run import RECIPE, train

    if options.fields:
        say(describe_fields())
        return 0
    if options.out in (None, Path()) and not options.print_recipe:
        raise ValueError("--out: expected the folder of the run")
    recipe, data, changes = _sorted(options.sources)
    if options.resume:
        if options.out is None:
            raise ValueError("--out: expected the folder of the run")
        if recipe is not None:
            raise ValueError(f"--resume: goes on by the recipe of the run, not by {recipe}")
        recipe = options.out / RECIPE
        if not recipe.is_file():
            raise ValueError(f"--resume: {options.out} holds no run: there is no {RECIPE}")
    given = {
        "data.path": data,
        "data.format": options.format,
        "data.val_share": options.val_share,
        "data.skip_bad": "true" if options.skip_bad else None,
    }
    changes = [f"{name}={value}" for name, value in given.items() if value is not None] + changes
    use_threads(options.threads)
    made = read_recipe(recipe, changes, task=options.task, model=options.model, init=options.init)
    if options.print_recipe:
        say(write_recipe(made).rstrip())
        return 0
    try:
        train(made, options.out, device=options.device, say=lambda line: say(printable(line)))
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise ValueError(
                "out of memory: use a smaller batch or crop, accumulate=2 or more, "
                "gradient_checkpointing=true, or precision=bfloat16"
            ) from error
        raise
    return 0


def _sorted(sources: list[str]) -> tuple[str | None, str | None, list[str]]:
    """Recipe, data and changes."""
    recipe = data = None
    changes = []
    for source in sources:
        if "=" in source and not os.path.exists(source):
            changes.append(source)
        elif source.endswith((".yaml", ".yml")) and recipe is None:
            recipe = source
        elif data is None:
            data = source
        else:
            raise ValueError(f"{source}: expected one data set and field=value, got {data} before")
    return recipe, data, changes
