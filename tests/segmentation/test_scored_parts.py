"""Scoring that goes on where it was interrupted, from a folder of parts."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.models import SMALL
from helpers.training import ROOT, write_folder
from pointformer import cli
from pointformer.data import open_dataset
from pointformer.evaluation import evaluate
from pointformer.models import Model, save_model
from pointformer.scored_parts import PartsFolder

PICTURES = 6


def model_of(seed=0):
    torch.manual_seed(seed)
    return Model("small", SMALL, "dense", 3).eval()


@pytest.fixture
def dataset(tmp_path):
    return open_dataset(write_folder(tmp_path / "data", train=1, val=PICTURES), task="instance")


@pytest.fixture
def often(monkeypatch):
    """Each picture is a part."""
    monkeypatch.setattr(PartsFolder, "due", True)


def interrupted(after):
    """A way to go through numbers that ends early, as Ctrl-C does."""

    def progress(numbers):
        for count, number in enumerate(numbers):
            if count == after:
                raise KeyboardInterrupt
            yield number

    return progress


@pytest.mark.usefixtures("often")
def test_what_is_done_is_not_done_again(dataset, tmp_path, monkeypatch):
    model, kept = model_of(), tmp_path / "kept"
    dataset.skip_bad = True
    dataset.entries[1].image.write_bytes(b"nothing")
    whole = evaluate(model, dataset.subset(range(PICTURES)))
    looked = []
    read = type(dataset[0]).read_image
    monkeypatch.setattr(
        type(dataset[0]), "read_image", lambda self, **r: looked.append(self.name) or read(self)
    )
    for after in (0, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, dataset, resume=kept, progress=interrupted(after))
    again = dataset.subset(range(PICTURES))
    result = evaluate(model, again, resume=kept)
    assert looked == ["0", "2", "2", "3", "3", "4", "5"]  # each time the last was not written yet
    assert result.pictures == PICTURES - 1
    assert list(again.skipped) == ["1"]
    np.testing.assert_equal(result.scores, whole.scores)
    np.testing.assert_equal(evaluate(model, dataset, resume=kept).scores, whole.scores)
    assert len(looked) == 7


@pytest.mark.usefixtures("often")
def test_parts_of_something_else_are_refused(dataset, tmp_path):
    kept = tmp_path / "kept"
    evaluate(model_of(), dataset, resume=kept)
    for arguments, options, what in (
        ((model_of(1), dataset), {}, "another model;"),
        ((Model("small", SMALL.override(rate=0.5), "dense", 3), dataset), {}, "another model;"),
        ((model_of(), dataset.subset(range(3))), {}, "another data set;"),
        ((model_of(), dataset), {"tile": 32}, "another tile: None, not 32;"),
    ):
        with pytest.raises(ValueError, match=f"kept: holds scores made with {what}"):
            evaluate(*arguments, resume=kept, **options)
    part = next(kept.glob("part-*"))
    content = part.read_bytes()
    for damaged in (content[:-5], content[:-1] + b"\1", b""):
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{part.name}: is damaged"):
            evaluate(model_of(), dataset, resume=kept)
    (kept / "evaluation.json").write_text("[]")
    with pytest.raises(ValueError, match=r"evaluation\.json: is not of this version's"):
        evaluate(model_of(), dataset, resume=kept)
    before = sorted(path.name for path in Path(dataset.source).iterdir())
    with pytest.raises(ValueError, match="expected a new folder, or one of an earlier evaluation"):
        evaluate(model_of(), dataset, resume=dataset.source)
    assert sorted(path.name for path in Path(dataset.source).iterdir()) == before


def test_a_full_disk_is_one_line_and_what_was_kept_stays(dataset, tmp_path, monkeypatch, capsys):
    save_model(model_of(), tmp_path / "model.safetensors")
    arguments = ["evaluate", str(tmp_path / "data"), "--model", str(tmp_path / "model.safetensors"),
                 "--threads", "1", "--resume", str(tmp_path / "kept")]  # fmt: skip
    write = Path.write_bytes

    def full(path, content):
        if path.suffix == ".safetensors":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"pointformer: error: {tmp_path / 'kept'}/part-00000000-")
    assert said[-1].endswith(": No space left on device")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["evaluation.json"]
    monkeypatch.undo()
    assert cli.main(arguments) == 0
    assert "mean AP" in capsys.readouterr().out


KILLED = """
import sys
from pointformer import cli, scored_parts
scored_parts.PartsFolder.due = True
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_killed_at_random_moments_equals_not_killed(tmp_path):
    write_folder(tmp_path / "data", train=1, val=48)
    save_model(model_of(), tmp_path / "model.safetensors")
    common = ["evaluate", tmp_path / "data", "--model", tmp_path / "model.safetensors",
              "--threads", "1", "--json"]  # fmt: skip
    assert cli.main([*map(str, common), str(tmp_path / "whole.json")]) == 0
    chosen = random.Random(0)
    kept = tmp_path / "kept"
    resumed = [*common, tmp_path / "resumed.json", "--resume", kept]
    counts = [0]
    while counts[-1] < 18:
        command = [sys.executable, "-c", KILLED, *map(str, resumed)]
        running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        wanted = counts[-1] + chosen.randint(1, 6)
        while running.poll() is None and len(list(kept.glob("part-*"))) < wanted:
            time.sleep(0.02)
        time.sleep(chosen.random() * 0.05)
        running.kill()
        running.wait()
        counts.append(len(list(kept.glob("part-*"))))
    assert counts == sorted(counts)
    assert len(counts) > 2
    assert counts[-1] < 48
    assert cli.main(list(map(str, resumed))) == 0
    one, other = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "resumed")
    )
    assert one == other
