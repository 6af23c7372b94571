"""Score a model on an annotated data set.

Formats, by which DATA is recognized: "folder" (SPLIT/images beside SPLIT/labels or
SPLIT/instances), "classes" (SPLIT/CLASS/pictures), "ade20k", "cityscapes", "coco" and
"coco-panoptic" (with --annotations for a JSON of any name, and DATA for its pictures), "shards"
(tar files of samples as webdataset writes them; DATA may be a pattern, "val-{0000..0063}.tar"),
"arrays" (NAME.npz with x_val and y_val, or images and labels); of points "scenes" (.las, .laz,
.ply, .xyz or .npz with a class per point, in SPLIT/ or all in one folder) and "objects" (one .npz).

Several processes share the pictures, and one says the scores of all. The same command again goes on
with what was interrupted, also with another number of processes:

    torchrun --nproc-per-node 4 -m pointformer.cli evaluate DATA --model MODEL --resume FOLDER
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointformer._files import make_folder
from pointformer.cli.common import (
    CLOUD_MODEL,
    DEFAULT_MODEL,
    FORMATS,
    add_model_arguments,
    add_picture_arguments,
    add_result_arguments,
    add_task_argument,
    joined_processes,
    model_from,
    printable,
    reading_from,
    say,
)
from pointformer.cli.results import Results, is_result, write_sealed

if TYPE_CHECKING:
    from pointformer.data import Dataset
    from pointformer.data.sources import Source
    from pointformer.data.transforms import CenterCrop, Resize
    from pointformer.models import Model
    from pointformer.processes import Processes
    from pointformer.tasks import Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="folder or file of the data set")
    parser.add_argument("--format", choices=FORMATS, help="default: what DATA looks like")
    parser.add_argument(
        "--split",
        help="default: val; where there are no splits, what the model's training kept to score on, "
        "or all",
    )
    add_task_argument(parser, "the model's")
    parser.add_argument("--annotations", type=Path, help="JSON file of COCO's formats")
    parser.add_argument(
        "--segments", type=Path, help="folder of the PNGs of coco-panoptic (default: beside JSON)"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out pictures and objects that are bad, and list them",
    )
    parser.add_argument("--limit", type=int, help="score only the first so many pictures")
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        help="classification, semantic: average copies of these sizes, relative to the picture",
    )
    parser.add_argument("--flip", action="store_true", help="the same tasks: and mirrored copies")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="work in windows of this side")
    parser.add_argument(
        "--resize",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="what the model sees of a picture has this shorter side, or this height and width; "
        "scores are of the picture's own pixels",
    )
    parser.add_argument(
        "--longest", type=int, metavar="PIXELS", help="and a longer side of at most so much"
    )
    parser.add_argument(
        "--center-crop", type=int, metavar="PIXELS", help="classification: and look at the middle"
    )
    parser.add_argument(
        "--json", type=Path, help="write the scores, and all that was skipped, to this file too"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="keep what is scored there, and go on with what is there already: of the same model, "
        "pictures and options",
    )
    add_result_arguments(parser)
    add_picture_arguments(parser)
    add_model_arguments(parser, by_inputs=True)


def run(options: argparse.Namespace) -> int:
    with joined_processes(options) as processes:
        return _run(options, processes)


def _run(options: argparse.Namespace, processes: Processes) -> int:
    from tqdm import tqdm

    from pointformer.data.statistics import left_out_lines
    from pointformer.evaluation import evaluate
    from pointformer.tasks import task_of

    model, dataset, seen, results = processes.alike(lambda: _opened(options, processes.main))
    result = evaluate(
        model,
        dataset,
        options.task,
        scales=options.scales,
        flip=options.flip,
        tile=options.tile,
        **seen,
        processes=processes,
        resume=options.resume,
        progress=partial(tqdm, unit="image", disable=not processes.main),
        **reading_from(options),
    )
    if not processes.main:
        return 0
    for name, value in result.scores.items():
        shown = "none annotated" if math.isnan(value) else f"{100 * value:6.2f}"
        say(f"{printable(name):40} {shown}")
    if dataset.skipped:
        say(f"{len(dataset.skipped)} skipped:", error=True)
        for line in left_out_lines(dataset.skipped.values()):
            say(f"  {printable(line)}", error=True)
    if options.json is not None:
        content = {
            "model": options.model,
            "task": task_of(model, options.task).name,
            "images": result.pictures,
            "scores": {k: None if math.isnan(v) else v for k, v in result.scores.items()},
            "skipped": dataset.skipped,
        }
        with results.write(options.json) as path:
            write_sealed(path, content)
    return 0


def _opened(
    options: argparse.Namespace, main: bool
) -> tuple[Model, Dataset, dict[str, Any], Results]:
    """Model and data for all processes, after all that can be known to be wrong before."""
    from pointformer.data import find_source, open_dataset
    from pointformer.data.annotations import are_named
    from pointformer.prediction import recipe_value
    from pointformer.segmentation.clouds import features_of
    from pointformer.tasks import task_of

    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit: expected at least 1, got {options.limit}")
    if options.model is None:
        likely = find_source(options.data, options.format, options.task, options.annotations)
        options.model = CLOUD_MODEL if likely.is_of_clouds else DEFAULT_MODEL
        if main:
            say(f"{options.model}, the model by default; --model names others")
    model = model_from(options)
    task = task_of(model, options.task)
    resize, crop = _seen(options, task)
    source = find_source(options.data, options.format, task.name, options.annotations)
    if options.format is None and main:
        say(printable(str(source)))
    classes = model.categories
    if source.lists_classes and not are_named(classes or ()):
        classes = None  # the data set's, in its order
    dataset = open_dataset(
        source,
        task=task.name,
        split=options.split,
        annotations=options.annotations,
        segments=options.segments,
        categories=classes,
        void=recipe_value(model, "data.void"),
        skip_bad=options.skip_bad,
        features=features_of(model) or (),
    )
    dataset, note = _held_back(model, source, dataset, options.split)
    if main and note:
        warnings.warn(note, stacklevel=2)
    results = Results(overwrite=options.overwrite)
    if options.json is not None:
        read = {path for entry in dataset.entries for path in entry.files}
        results.protect(path for path in (*read, options.annotations, options.model) if path)
        target, folder = os.path.realpath(options.json), os.path.realpath(options.data)
        if not is_result(options.json) and Path(target).is_relative_to(folder):
            results.protect([options.json])  # lists of classes and the like
        make_folder(options.json.parent)
        results.check(options.json)
    if options.limit is not None:
        dataset = dataset.subset(range(min(len(dataset), options.limit)))
    return model, dataset, {"resize": resize, "crop": crop}, results


def _held_back(
    model: Model, source: Source, dataset: Dataset, split: str | None
) -> tuple[Dataset, str | None]:
    """The pictures that training kept to score on, if it was on this data set and that has no
    splits, else all; and what is to be said of these."""
    from pointformer.prediction import recipe_value

    digest = (model.trained or {}).get("pictures")
    if digest is None or source.splits != ("",):
        return dataset, None
    if recipe_value(model, "data.path") != source.path.resolve().name:  # all that the file has
        return dataset, None
    where = f"{source.path}: the model was trained on"
    if dataset.digest == digest:
        return dataset, f"{where} these {dataset.noun}s"
    share = recipe_value(model, "data.val_share")
    if split is None and share and len(dataset) > 1:
        training, kept = dataset.divided(share, recipe_value(model, "seed"))
        if training.digest == digest:
            some = f"{len(kept)} of its {len(dataset)} {dataset.noun}s"
            return kept, f"{where} all but {some}, which are scored; --split '' scores all"
    return dataset, f"{where} a data set of this name, perhaps on some of these {dataset.noun}s"


def _seen(options: argparse.Namespace, task: Task) -> tuple[Resize | None, CenterCrop | None]:
    """Part of a picture that the model sees."""
    from pointformer.data.transforms import CenterCrop, Resize

    classes = task.counts == "pictures"
    if options.center_crop is not None and not classes:
        raise ValueError(f"--center-crop: is for classification, not for {task.name}")
    sides = options.resize or []
    given = (*sides, *(v for v in (options.longest, options.center_crop) if v is not None))
    if len(sides) > 2 or min(given, default=1) < 1 or (options.longest and len(sides) != 1):
        raise ValueError(
            "--resize, --longest, --center-crop: expected positive numbers, of --resize one or "
            f"two, and one beside --longest, got {' '.join(map(str, given))}"
        )
    crop = None if options.center_crop is None else CenterCrop(options.center_crop)
    if not sides:
        return None, crop
    size = sides[0] if len(sides) == 1 else (sides[0], sides[1])
    return Resize(size, options.longest, "bicubic" if classes else "bilinear"), crop
