"""Show what came of a training run, as one page.

The page is HTML that opens without a network: curves, scores by class and size, token maps of
sample pictures through training, and the pictures that the model does worst on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pointformer.cli.common import add_result_arguments, placed, say, use_threads
from pointformer.cli.results import Results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of train")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    parser.add_argument(
        "--data", type=Path, help="the data set, if it is not where the run found it"
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=200,
        help="validation pictures to look at for the worst ones and for classes and sizes, drawn "
        "at random; 0: none (default: 200)",
    )
    parser.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    add_result_arguments(parser)


def run(options: argparse.Namespace) -> int:
    from pointformer.models import load_model
    from pointformer.tasks import task_of
    from pointformer.train.pictures import open_data
    from pointformer.train.recipe import read_recipe
    from pointformer.train.report import write_report
    from pointformer.train.run import RECIPE, WEIGHTS, validation_region, validation_tile

    if options.pictures < 0:
        raise ValueError(f"--pictures: expected at least 0, got {options.pictures}")
    use_threads(options.threads)
    for name in (RECIPE, WEIGHTS):
        if not (options.run / name).is_file():
            raise ValueError(f"{options.run / name}: no such file: expected the folder of a run")
    own = options.run / "report.html"
    out = options.out or own
    results = Results(overwrite=options.overwrite or options.out is None)
    results.protect(path for path in options.run.rglob("*") if path != own)
    results.check(out)
    changes = [] if options.data is None else [f"data.path={options.data}"]
    recipe = read_recipe(options.run / RECIPE, changes)
    model = placed(load_model(options.run / WEIGHTS), options.device)
    dataset = open_data(recipe)[1] if options.pictures else None
    categories = None if dataset is None else dataset.categories
    task = task_of(model, recipe.task, categories)
    write_report(
        options.run,
        model,
        dataset,
        out,
        task=task,
        pictures=options.pictures,
        tile=validation_tile(recipe, task),
        resize=recipe.validation.resize,
        crop=recipe.validation.crop,
        region=validation_region(recipe, task),
        say=say,
    )
    say(f"the report is in {out}")
    return 0
