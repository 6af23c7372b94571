"""The command line, with good and bad input, in a folder of its own."""

import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.models import SMALL
from pointformer import cli
from pointformer.annotations import Category
from pointformer.models import Model, load_model, save_model
from pointformer.prediction import to_tensor


@pytest.fixture
def picture(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "cells.png"
    Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_segment_writes_four_files(capsys, tmp_path, picture, model):
    out = tmp_path / "out"
    code, text, _ = run(capsys, "segment", picture, "--out", out, "--model", model)
    assert code == 0
    assert "cells.png: " in text
    assert sorted(p.name for p in out.iterdir()) == [
        "cells_labels.png",
        "cells_objects.csv",
        "cells_overlay.png",
        "cells_summary.json",
    ]
    labels = np.asarray(Image.open(out / "cells_labels.png"))
    assert labels.dtype == np.uint16
    assert labels.shape == (50, 70)
    assert np.asarray(Image.open(out / "cells_overlay.png")).shape == (50, 70, 3)
    summary = json.loads((out / "cells_summary.json").read_text())
    assert summary["count"] == labels.max()
    assert summary["tokens"][0] == 13 * 18
    with (out / "cells_objects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["area"]) for row in rows] == np.bincount(labels.ravel())[1:].tolist()


def test_folders_patterns_and_options(capsys, tmp_path, picture, model):
    Image.open(picture).save(tmp_path / "more.png")
    out = tmp_path / "out"
    code, text, _ = run(
        capsys, "segment", tmp_path, tmp_path / "m*.png", "--out", out, "--model", model,
        "--rate", 0.5, "--alpha", 0, "--threads", torch.get_num_threads(),
    )  # fmt: skip
    assert code == 0
    assert "2 of 2 pictures done" in text
    tokens = json.loads((out / "more_summary.json").read_text())["tokens"]
    assert tokens[1] == 13 * 18 // 2


def test_one_bad_picture_among_good_ones(capsys, tmp_path, picture, model):
    (tmp_path / "bad.png").write_bytes(picture.read_bytes()[:100])
    out = tmp_path / "out"
    code, text, error = run(
        capsys, "segment", picture, tmp_path / "bad.png", "--out", out, "--model", model
    )
    assert code == 1
    assert "1 of 2 pictures done" in text
    assert "bad.png" in error
    assert not list(out.glob("bad*"))
    assert not list(out.glob(".*"))
    assert len(list(out.glob("cells_*"))) == 4


def test_focus_draws_every_stage(capsys, tmp_path, picture, model):
    out = tmp_path / "focus.png"
    code, text, _ = run(capsys, "focus", picture, "--out", out, "--model", model)
    assert code == 0
    assert "tokens 234 -> " in text
    sheet = np.asarray(Image.open(out)).astype(int)
    red = (sheet[..., 0] > 240) & (sheet[..., 1] < 80) & (sheet[..., 2] < 80)
    network, pixels = load_model(model), to_tensor(np.asarray(Image.open(picture)))
    with torch.no_grad():
        stages = network.backbone(network.preprocess(pixels)[None])
    pitch = 4 * 400 / 70  # of a cell; the panels are 400 pixels wide, behind gaps of 8
    cells = {tuple(place) for place in stages[0].tokens.positions.tolist()}
    for number, stage in enumerate(stages[1:], 1):
        panel = red[32 : 32 + 286, 8 + 408 * number :][:, :400]
        kept = {tuple(place) for place in stage.tokens.positions.tolist()}
        assert kept < cells
        for x, y in cells:
            row, column = int((y + 0.5) * pitch), int((x + 0.5) * pitch)
            if row < 284 and column < 398:  # the last cells reach beyond the picture
                assert panel[row, column] == ((x, y) in kept), (number, x, y)


@pytest.mark.parametrize("rates", ["abc", ",", "0.5,"])
def test_rates_that_are_no_numbers(capsys, rates):
    with pytest.raises(SystemExit):
        cli.main(["segment", "x.png", "--rate", rates])
    expected = f"--rate: expected numbers with commas between, got {rates!r}"
    assert expected in capsys.readouterr().err


def test_models_lists_counts(capsys):
    code, text, error = run(capsys, "models", "foo")
    assert (code, text) == (1, "")
    assert "unknown model 'foo'" in error
    code, text, _ = run(capsys, "models", "aff_mini")
    assert code == 0
    assert "6,754,451" in text
    assert " 1.067" in text


@pytest.mark.parametrize(
    ("head", "listed"),
    [
        (None, ["aff_nano", "point_nano", "swin_mini"]),
        ("mask2former", ["aff_nano", "swin_mini"]),
        ("point_segmentation", ["point_nano"]),
    ],
)
def test_models_lists_those_that_the_head_fits(capsys, monkeypatch, head, listed):
    names = ["aff_nano", "point_nano", "swin_mini"]
    monkeypatch.setattr("pointformer.models.list_models", lambda **_: names)
    options = ["--size", 64, "--classes", 3, *([] if head is None else ["--head", head])]
    code, text, error = run(capsys, "models", *options)
    assert (code, error) == (0, "")
    assert [line.split()[0] for line in text.splitlines()[1:-2]] == listed
    code, _, error = run(capsys, "models", "aff_nano", "point_nano", *options)
    assert ("head: " in error) == (code == 1) == (head is not None)


def test_models_shows_what_a_file_says(capsys, tmp_path):
    path = tmp_path / "a model of a long\nname.safetensors"
    categories = [Category(1, "cell"), Category(2, "glass", False)]
    model = Model("small", SMALL, "dense", 2, task="semantic", categories=categories, channels=8)
    model.object_diameter, model.min_score = 12.5, 0.7
    trained = {"steps": 7, "scores": {"AP": 0.5}, "data": "a\x1b[2Jb"}
    save_model(model, path, trained=trained)
    code, text, error = run(capsys, "models", path, "--size", 64)
    assert (code, error) == (0, "")
    heading, row, _, name, *lines = text.splitlines()
    assert row.startswith(name)
    assert name == str(path).replace("\n", "\\n")
    assert len(heading) == len(row)
    for line in (
        "  model: small", "    name: dense", "    classes: 2", "    channels: 8",
        "  task: semantic", '  categories: ["cell", "glass (uncountable)"]',
        "  mean of inputs: [0.485, 0.456, 0.406]", "  diameter of objects: 12.5 pixels",
        "  objects are shown from a score of: 0.7",
        "  trained:", "    steps: 7", "    scores:", "      AP: 0.5", "    data: a\\x1b[2Jb",
    ):  # fmt: skip
        assert line in lines, line
    code, text, error = run(capsys, "models", path, "--size", 64, "--head", "classification")
    assert (code, error) == (0, "")
    assert "  trained: not said" in text.splitlines()


def bad_inputs(tmp_path, picture, model):
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    other = tmp_path / "other.safetensors"
    save_model(Model("other", SMALL, "classification", 3), other)
    blocked = tmp_path / "file"
    blocked.write_text("")
    return {
        "missing": (["segment", tmp_path / "none.png", "--out", tmp_path / "o"], "none.png"),
        "no picture": (["segment", text, "--out", tmp_path / "o", "--model", model], "notes.txt"),
        "out is a file": (["segment", picture, "--out", blocked, "--model", model], "file"),
        "no weights": (
            ["segment", picture, "--out", tmp_path / "o", "--model", "aff_mini"],
            "aff_mini: has no weights in the package",
        ),
        "no such tag": (
            ["focus", picture, "--out", tmp_path / "o.png", "--model", "aff_nano.cells"],
            "aff_nano.cells: there are no such weights; those of aff_nano: aff_nano.nuclei",
        ),
        "head of the default": (["warmup", "--head", "dense"], "--head: needs --model NAME"),
        "rate": (
            ["segment", picture, "--out", tmp_path / "o", "--model", model, "--rate", 2],
            "rate: expected a number in (0, 1], got 2.0",
        ),
        "no model": (
            ["segment", picture, "--out", tmp_path / "o", "--model", "x.safetensors"],
            "x.safetensors: no such file",
        ),
        "not a model": (
            ["segment", picture, "--out", tmp_path / "o", "--model", f"./{text.name}"],
            "notes.txt",
        ),
        "unknown model": (
            ["segment", picture, "--out", tmp_path / "o", "--model", "aff_huge"],
            "unknown model 'aff_huge'",
        ),
        "another head": (
            ["segment", picture, "--out", tmp_path / "o", "--model", other],
            "finds no regions",
        ),
        "threads": (
            ["segment", picture, "--out", tmp_path / "o", "--model", model, "--threads", 0],
            "--threads",
        ),
        "focus suffix": (["focus", picture, "--out", tmp_path / "f.txt"], ".png"),
        "focus folder": (["focus", picture, "--out", tmp_path / "no/f.png"], "no such folder"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing", "no picture", "out is a file", "rate", "no model", "not a model",
        "unknown model", "another head", "threads", "focus suffix", "focus folder",
        "no weights", "no such tag", "head of the default",
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_a_failure(capsys, tmp_path, picture, model, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = bad_inputs(tmp_path, picture, model)[case]
    code, out, error = run(capsys, *arguments)
    assert code != 0
    assert out == ""
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.glob("o/*"))


def test_closed_streams(tmp_path, picture, model, monkeypatch):
    """Python has None in the place of a stream that was closed before the start (`>&-`)."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    options = ["--out", str(tmp_path / "out"), "--model", model]
    assert cli.main(["segment", str(picture), *options]) == 0
    assert cli.main(["models"]) == 0
    assert cli.main(["segment", str(tmp_path / "none.png"), *options]) == 1
    assert (sys.stdout, sys.stderr) == (None, None)


def test_unknown_command_exits_with_usage(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["dance"])
    assert exit_info.value.code == 2
