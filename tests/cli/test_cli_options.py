"""Every option of the command line reaches the function that it is for."""

import argparse
import json
from operator import attrgetter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import pointformer.data
import pointformer.evaluation
import pointformer.models
import pointformer.models.complexity
import pointformer.profiling
import pointformer.segmentation.segment
import pointformer.tasks
import pointformer.train.pictures
import pointformer.train.report
import pointformer.train.run
from pointformer import cli
from pointformer.data.transforms import CenterCrop, Resize
from pointformer.profiling import Limits
from pointformer.train.recipe import Recipe, write_recipe

COUNTS = {task.name: task.counts for task in pointformer.tasks.TASKS}


class Reached(Exception):
    """Ends a run where what the test is about has been seen."""


class FakeModel:
    """Tells a record of calls what is done with it."""

    name, head_name, task, categories, num_classes, backbone = "fake", "dense", None, None, 3, None
    of_points, trained = False, None
    config = image_config = SimpleNamespace(image_size=64, in_channels=3, patch_stride=4)

    def __init__(self, seen):
        self.seen = seen

    def eval(self):
        return self

    def state_dict(self):
        return {}

    def train(self, mode):
        self.seen["train"] = mode
        return self

    def to(self, *where):
        self.seen["to"] = [str(w) for w in where]
        return self

    def preprocess(self, image):
        self.seen["height"] = image.shape[-2]
        raise Reached


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """What the functions behind the commands were called with, by the function's name."""
    monkeypatch.chdir(tmp_path)
    for name, height in (("a.png", 8), ("b.png", 16)):
        Image.fromarray(np.zeros((height, 8, 3), np.uint8)).save(name)
    seen = {}

    def spy(owner, name, result=None):
        def called(*arguments, **options):
            seen[name] = (arguments, options)
            return result(*arguments, **options) if callable(result) else result

        monkeypatch.setattr(owner, name, called)

    def stop(*arguments, **options):
        raise Reached

    def draw(model, dataset, task, *, progress, **options):
        seen["drawn"] = len(list(progress(range(len(dataset)))))
        return SimpleNamespace(scores={"AP": 0.5}, pictures=1)

    spy(pointformer.models, "create_model", lambda *a, **k: FakeModel(seen))
    spy(torch, "set_num_threads")
    spy(pointformer.segmentation.segment, "segment", stop)
    spy(pointformer.segmentation.segment, "check_options")
    spy(pointformer.rates, "TimeBudget", "allowed")
    spy(pointformer.evaluation, "evaluate", draw)
    spy(
        pointformer.tasks,
        "task_of",
        lambda _, name, categories=None: SimpleNamespace(
            name=name or "instance", output=None, counts=COUNTS.get(name, "objects")
        ),
    )

    class Data(list):
        entries, skipped = (), {}

        def subset(self, indices):
            return Data([self[n] for n in indices])

    dataset = Data(["first", "second"])
    spy(pointformer.data, "open_dataset", dataset)
    spy(pointformer.data, "find_source", SimpleNamespace(lists_classes=True, is_of_clouds=False))
    for run in ("run", "other"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "recipe.yaml").write_text(write_recipe(Recipe()))
        (tmp_path / run / "model.safetensors").touch()
    spy(pointformer.models, "load_model", lambda *a, **k: FakeModel(seen))
    spy(pointformer.train.run, "train")
    spy(pointformer.train.pictures, "open_data", (None, SimpleNamespace(categories=())))
    spy(pointformer.train.report, "write_report")
    spy(cli.segment, "_is_done", False)
    spy(cli.warmup, "compile_for")
    spy(pointformer.profiling, "measure_limits", Limits(1e9, 1e12))
    spy(pointformer.profiling, "profile", [SimpleNamespace(as_dict=dict)])
    spy(pointformer.profiling, "table", "")
    spy(pointformer.data.images, "open_picture", pointformer.data.images.open_picture)
    spy(pointformer.data, "read_image", pointformer.data.read_image)
    spy(pointformer.models, "complexity_of", stop)
    spy(cli.common.traceback, "print_exception")
    results = cli.segment.Results

    def results_of(**options):
        seen["Results"] = ((), options)
        return results(**options)

    for module in (cli.segment, cli.focus, cli.evaluate, cli.report):
        monkeypatch.setattr(module, "Results", results_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape, device: real(shape))
    return seen


def option(function, name, kind=lambda value: value):
    """What `function` got for its keyword argument `name`."""
    return lambda seen: kind(seen[function][1].get(name))


def argument(function, position):
    """What `function` got in a position, paths as text."""
    return lambda seen: (lambda a: a if a is None else str(a))(seen[function][0][position])


def field(name, function="train"):
    """What is in a field of the recipe that `function` got."""
    return lambda seen: attrgetter(name)(seen[function][0][0])


def printed(key):
    return lambda seen: json.loads(seen["output"]).get(key)


BASE = {
    "segment": ["--out", "o", "a.png"],
    "focus": ["a.png", "--out", "o.png"],
    "evaluate": ["data"],
    "profile": ["aff_nano", "--device", "cpu"],
    "train": ["data", "--out", "r"],
    "report": ["run", "--out", "p.html"],
    "models": ["aff_nano"],
    "warmup": [],
}
MODEL = [
    (["--model", "aff_tiny.tag"], argument("create_model", 0), "aff_tiny.tag"),
    (["--model", "m.safetensors"], argument("create_model", 0), "m.safetensors"),
    (["--rate", "0.5"], option("create_model", "rate"), 0.5),
    (["--rate", "0.5,0.25,1"], option("create_model", "rate"), (0.5, 0.25, 1.0)),
    (["--alpha", "0"], option("create_model", "alpha"), 0.0),
    (["--device", "cuda:1"], lambda seen: seen["to"], ["cuda:1"]),
    (["--threads", "3"], lambda seen: seen.get("set_num_threads"), ((3,), {})),
    (["--debug"], lambda seen: "print_exception" in seen, True),
    (["--overwrite"], option("Results", "overwrite"), True),
]


def reading(function):
    """What is read of a picture."""
    return [
        (["--channel", "0,1,2"], option(function, "channel"), "0,1,2"),
        (["--plane", "z=3"], option(function, "plane"), "z=3"),
        (["--project", "max"], option(function, "project"), "max"),
        (["--intensities", "full"], option(function, "intensities"), "full"),
        (["--max-pixels", "9"], option(function, "max_pixels"), 9),
    ]


TABLE = {
    "segment": [
        *MODEL,
        *reading("open_picture"),
        (["--diameter", "9"], option("segment", "diameter"), 9.0),
        (["--scale", "0.5"], option("segment", "scale"), 0.5),
        (["b.png"], lambda seen: seen["output"].count(" of 2 pictures"), 1),
        (["--out", "p"], lambda seen: seen["exists"]("p"), True),
        (["--tile", "256"], option("segment", "tile"), 256),
        (["--budget", "50ms"], lambda seen: seen.get("TimeBudget", ((0, 0),))[0][1], 0.05),
        (["--budget", "2s"], option("segment", "budget"), "allowed"),
        (["--tile", "256", "--overlap", "32"], option("segment", "overlap"), 32),
        (["--resume"], lambda seen: "_is_done" in seen, True),
        (["--min-score", "0"], option("segment", "min_score"), 0.0),
        (
            ["--features", "a"],
            lambda seen: "--features: is for models of point clouds" in seen["errors"],
            True,
        ),
    ],
    "focus": [
        *MODEL,
        *reading("read_image"),
        (
            ["--features", "a"],
            lambda seen: "--features: is for models of point clouds" in seen["errors"],
            True,
        ),
        (["b.png"], lambda seen: seen["height"], 16),
        (["--out", "no/p.png"], lambda seen: "no: there is no such folder" in seen["errors"], True),
    ],
    "evaluate": [
        *[row for row in MODEL if row[0] != ["--debug"]],
        (["--debug", "--json", "a.png"], lambda seen: "print_exception" in seen, True),
        *reading("evaluate"),
        (["other"], argument("find_source", 0), "other"),
        (["--format", "coco"], argument("find_source", 1), "coco"),
        (["--annotations", "x.json"], argument("find_source", 3), "x.json"),
        (["--annotations", "x.json"], option("open_dataset", "annotations", str), "x.json"),
        (["--segments", "maps"], option("open_dataset", "segments", str), "maps"),
        (["--split", "test"], option("open_dataset", "split"), "test"),
        (["--task", "semantic"], option("open_dataset", "task"), "semantic"),
        (["--task", "semantic"], argument("evaluate", 2), "semantic"),
        (["--skip-bad"], option("open_dataset", "skip_bad"), True),
        (["--resume", "kept"], option("evaluate", "resume", str), "kept"),
        (["--limit", "1"], lambda seen: seen["drawn"], 1),
        (["--scales", "0.5", "1"], option("evaluate", "scales"), [0.5, 1.0]),
        (["--flip"], option("evaluate", "flip"), True),
        (["--tile", "256"], option("evaluate", "tile"), 256),
        (
            ["--task", "classification", "--resize", "30", "40"],
            option("evaluate", "resize"),
            Resize((30, 40)),
        ),
        (
            ["--task", "classification", "--resize", "40", "--center-crop", "24"],
            option("evaluate", "crop"),
            CenterCrop(24),
        ),
        (
            ["--resize", "40", "--longest", "60"],
            option("evaluate", "resize"),
            Resize(40, 60, "bilinear"),
        ),
        (
            ["--center-crop", "24"],
            lambda seen: "--center-crop: is for classification" in seen["errors"],
            True,
        ),
        (
            ["--longest", "24"],
            lambda seen: "one beside --longest, got 24" in seen["errors"],
            True,
        ),
        (["--json", "s.json"], lambda seen: seen["exists"]("s.json"), True),
    ],
    "profile": [
        (["aff_tiny"], argument("create_model", 0), "aff_tiny"),
        (["neighborhood_attention"], option("profile", "only"), "neighborhood_attention"),
        (
            ["scored_merge", "--model", "aff_mini"],
            argument("create_model", 0),
            "aff_mini",
        ),
        (["--head", "dense"], option("create_model", "head"), "dense"),
        (["--impl", "reference"], option("create_model", "impl"), "reference"),
        (["--size", "32x40"], lambda seen: seen["profile"][0][1].shape[2:], (32, 40)),
        (["--batch", "2"], lambda seen: seen["profile"][0][1].shape[0], 2),
        (["--dtype", "bf16"], lambda seen: seen["profile"][0][1].dtype, torch.bfloat16),
        (["--dtype", "bf16"], lambda seen: seen["to"], ["cpu", "torch.bfloat16"]),
        (["--dtype", "bf16"], argument("measure_limits", 1), "torch.bfloat16"),
        (["--device", "cuda"], lambda seen: seen["to"], ["cuda", "torch.float32"]),
        (["--backward"], option("profile", "backward"), True),
        (["--backward"], lambda seen: seen["train"], True),
        (["--repeats", "7"], option("profile", "repeats"), 7),
        (["--predict"], option("profile", "repeats"), 0),
        (["--threads", "3"], lambda seen: seen.get("set_num_threads"), ((3,), {})),
        (["--device", "cuda", "--warm"], option("profile", "warm"), True),
        (["--device", "cuda", "--graph"], option("profile", "graph"), True),
        (["--bandwidth", "5"], lambda seen: seen["profile"][0][2].bandwidth, 5e9),
        (["--rate", "7"], lambda seen: seen["profile"][0][2].rate, 7e12),
        (["--json"], lambda seen: seen["output"].startswith("{"), True),
        (["--debug", "--size", "0"], lambda seen: "print_exception" in seen, True),
    ],
    "models": [
        (["aff_mini"], argument("create_model", 0), "aff_mini"),
        (["--head", "mask2former"], argument("create_model", 3), "mask2former"),
        (["--classes", "5"], argument("create_model", 2), "5"),
        (["--size", "96"], lambda seen: seen["complexity_of"][0][1:], (96, 96)),
        (["--debug"], lambda seen: "print_exception" in seen, True),
    ],
    "train": [
        (["other"], field("data.path"), "other"),
        (["--out", "p"], argument("train", 1), "p"),
        (["--fields"], lambda seen: "optimizer.learning_rate" in seen["output"], True),
        (["--print-recipe"], lambda seen: "learning_rate: 0.001" in seen["output"], True),
        (["--task", "panoptic"], field("task"), "panoptic"),
        (["--model", "aff_mini"], field("model"), "aff_mini"),
        (["--init", "aff_nano.nuclei"], field("init"), "aff_nano.nuclei"),
        (["--format", "coco"], field("data.format"), "coco"),
        (["--val-share", "0.3"], field("data.val_share"), 0.3),
        (["--skip-bad"], field("data.skip_bad"), True),
        (["--resume"], lambda seen: "--resume: r holds no run" in seen["errors"], True),
        (["--device", "cuda:1"], option("train", "device"), "cuda:1"),
        (["--threads", "3"], lambda seen: seen.get("set_num_threads"), ((3,), {})),
        (["--debug", "--threads", "0"], lambda seen: "print_exception" in seen, True),
    ],
    "report": [
        (["other"], argument("write_report", 0), "other"),
        (["--out", "q.html"], argument("write_report", 3), "q.html"),
        (["--data", "elsewhere"], field("data.path", "open_data"), "elsewhere"),
        (["--pictures", "7"], option("write_report", "pictures"), 7),
        (["--device", "cuda:1"], lambda seen: seen["to"], ["cuda:1"]),
        (["--threads", "3"], lambda seen: seen.get("set_num_threads"), ((3,), {})),
        (["--overwrite"], option("Results", "overwrite"), True),
        (["--debug", "--pictures", "-1"], lambda seen: "print_exception" in seen, True),
    ],
    "warmup": [
        *[row for row in MODEL if row[0][0] not in ("--debug", "--overwrite")],
        (
            ["--model", "aff_nano", "--head", "mask2former"],
            option("create_model", "head"),
            "mask2former",
        ),
        (["--training"], argument("compile_for", 1), "True"),
        (["--debug", "--threads", "0"], lambda seen: "print_exception" in seen, True),
    ],
}


def parser_of(command):
    parser = cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command]


@pytest.mark.parametrize(
    ("command", "given", "reached", "expected"),
    [(command, *row) for command, rows in TABLE.items() for row in rows],
    ids=[f"{command} {' '.join(row[0])}" for command, rows in TABLE.items() for row in rows],
)
def test_every_option_reaches_its_function(
    seen, tmp_path, capsys, command, given, reached, expected
):
    def outcome(arguments):
        seen.clear()
        cli.main([command, *arguments])
        seen["output"], seen["errors"] = capsys.readouterr()
        seen["exists"] = lambda name: (tmp_path / name).exists()
        return reached(seen)

    base = BASE[command]
    if not given[0].startswith("-") and command != "segment":
        base = base[1:]  # another in the place of the positional argument
    before = None if base is not BASE[command] else outcome(base)
    assert outcome([*base, *given]) == expected
    assert before != expected


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_the_table_has_every_option(command):
    known = {name for given, *_ in TABLE[command] for name in given}
    for action in parser_of(command)._actions:
        if action.option_strings and "--help" not in action.option_strings:
            assert known & set(action.option_strings), action.option_strings


@pytest.mark.parametrize(
    ("sides", "threads"), [([(2048, 2048)], 1), ([(2048, 2049)], None), ([(9, 9), (9, 9)], None)]
)
def test_one_small_picture_takes_one_thread(seen, tmp_path, monkeypatch, sides, threads):
    """Compiling kernels for several would take longer than they save; large pictures take all."""
    paths = [tmp_path / f"{n}.png" for n in range(len(sides))]
    for path, size in zip(paths, sides, strict=True):
        Image.new("1", size).save(path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)  # too many for a picture each
    cli.main(["segment", *map(str, paths), "--out", "o"])
    assert seen.get("set_num_threads") == (threads and ((threads,), {}))
