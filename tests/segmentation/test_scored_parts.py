"""Scoring that goes on where it was interrupted, from a folder of parts."""

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.models import SMALL
from helpers.training import ROOT, write_folder
from pointformer import cli
from pointformer._files import TEMPORARY_PREFIX
from pointformer.data import open_dataset
from pointformer.evaluation import evaluate
from pointformer.models import Model, save_model
from pointformer.scored_parts import PartsFolder, ScoredPart, joined

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
@pytest.mark.usefixtures("often")
def test_what_has_changed_is_scored_again(dataset, tmp_path, monkeypatch):
    model, kept = model_of(), tmp_path / "kept"
    evaluate(model, dataset, resume=kept)
    read, looked = type(dataset[0]).read_image, []
    monkeypatch.setattr(
        type(dataset[0]), "read_image", lambda self, **r: looked.append(self.name) or read(self)
    )
    for number, kind in ((1, "image"), (4, "labels")):
        path = getattr(dataset.entries[number], kind)
        values = np.roll(np.asarray(Image.open(path)), 20, 0)
        Image.fromarray(values).save(path)
        looked.clear()
        again = evaluate(model, dataset, resume=kept)
        assert looked == [str(number)]
        np.testing.assert_equal(again.scores, evaluate(model, dataset).scores)
    looked.clear()
    evaluate(model, dataset, resume=kept)
    assert looked == []


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
    known = json.loads((kept / "evaluation.json").read_text())
    fewer = {name: known[name] for name in [*known][1:]}
    for other in ([], fewer, {**known, "more": 1}):
        (kept / "evaluation.json").write_text(json.dumps(other))
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


class Seen:
    """A metric: the pictures that it has seen."""

    def __init__(self, numbers):
        self.numbers = [*numbers]

    def merge(self, other):
        self.numbers += other.numbers


@given(st.lists(st.tuples(st.integers(0, 14), st.integers(1, 6)), max_size=9))
def test_neighboring_parts_are_one_and_no_picture_counts_twice(spans):
    """From the first picture on the longest part that begins at one that no part has yet."""
    parts = [
        ScoredPart([Seen(range(first, first + n))], first, first + n, n, {f"{first} {n}": "bad"})
        for first, n in spans
    ]
    covered, skipped, free = [], {}, 0
    for place in range(20):
        longest = max((n for first, n in spans if first == place), default=0)
        if longest and place >= free:
            covered += range(place, place + longest)
            skipped[f"{place} {longest}"] = "bad"
            free = place + longest
    found = joined(parts)
    assert [n for part in found for n in range(part.start, part.stop)] == covered
    assert [n for part in found for n in part.metrics[0].numbers] == covered
    assert all(part.pictures == part.stop - part.start for part in found)
    assert {name: why for part in found for name, why in part.skipped.items()} == skipped
    assert all(b.start > a.stop for a, b in itertools.pairwise(found))


def test_what_a_killed_start_left_is_no_other_file(tmp_path):
    (tmp_path / f"{TEMPORARY_PREFIX}a").write_bytes(b"{")
    assert PartsFolder(tmp_path, list, []).open({"model": "a"}) == []
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"model": "a"}


def test_a_part_is_due_half_a_minute_after_the_last(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("pointformer.scored_parts.time", SimpleNamespace(monotonic=lambda: now))
    folder = PartsFolder(tmp_path / "kept", list, [])
    folder.open({})
    for number in range(2):
        assert not folder.due
        now += 29.5
        assert not folder.due
        now += 0.5
        assert folder.due
        folder.save(ScoredPart([], number, number + 1, 1))
    (whole,) = folder.open({})
    assert (whole.start, whole.stop, whole.pictures) == (0, 2, 2)


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
