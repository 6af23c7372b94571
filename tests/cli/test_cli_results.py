"""What the command line writes: nothing is lost, neither of the user's nor of its own."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from helpers.models import SMALL
from pointformer import cli
from pointformer._files import TEMPORARY_PREFIX
from pointformer.cli import pictures
from pointformer.cli import results as results_of_runs
from pointformer.cli import segment as command
from pointformer.cli.common import printable, reason, result_names
from pointformer.cli.inputs import Pictures
from pointformer.cli.results import Results, is_result, save_sealed, write_sealed
from pointformer.data.images import open_picture
from pointformer.models import Model, save_model
from pointformer.segmentation.segment import Segmentation

SEGMENT = "pointformer.segmentation.segment.segment"
KINDS = ("labels.png", "objects.csv", "overlay.png", "summary.json")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def picture(path, seed=0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_another_picture_or_model_of_the_same_name_is_not_done(capsys, model):
    shutil.copy(model, "m.safetensors")
    picture("a.png")
    arguments = ("segment", "a.png", "--out", "out", "--model", "m.safetensors", "--resume")

    def segmented():
        code, text, error = run(capsys, *arguments)
        assert (code, error) == (0, "")
        return "done already" not in text

    assert [segmented(), segmented()] == [True, False]
    picture("a.png", seed=1)
    assert [segmented(), segmented()] == [True, False]
    torch.manual_seed(1)
    save_model(Model("small", SMALL, "dense", 3), "m.safetensors")
    assert [segmented(), segmented()] == [True, False]


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def content(folder):
    """The files in a folder and below, with what is in them."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def found(labels):
    """What `segment` gives for a map of ids."""
    count = int(labels.max(initial=0))
    image = np.zeros((*labels.shape, 3), np.uint8)
    return Segmentation(open_picture(image), labels, (1,), 0.1, (0,) * count, (1.0,) * count)


@pytest.fixture
def quick(monkeypatch):
    """A stand-in for the network: one object in each picture."""

    def segment(model, path, **options):
        labels = np.zeros((4, 6), np.int32)
        labels[1:3, 1:4] = 1
        return found(labels)

    monkeypatch.setattr(SEGMENT, segment)


# Inputs and files of others


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("out", ["b", "./b", "b/../b", "{}/b", "link", "b/."])
def test_no_result_replaces_an_input(capsys, tmp_path, model, quick, out, options):
    picture("b/c.png")
    picture("b/c_labels.png", 1)
    (tmp_path / "link").symlink_to("b")
    before = content("b")
    out = out.format(tmp_path)
    code, text, error = run(capsys, "segment", "b", "--out", out, "--model", model, *options)
    assert code == 1
    assert "1 of 2 pictures done" in text
    assert error.count("\n") == 1
    assert "c_labels.png: is an input" in error
    after = content("b")
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == [f"c_labels_{kind}" for kind in KINDS]


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_links_to_inputs_are_inputs(capsys, model, quick, link):
    picture("b/c.png")
    Path("out").mkdir()
    if link == "hard":
        os.link("b/c.png", "out/c_overlay.png")
    else:
        Path("out/c_overlay.png").symlink_to(Path("b/c.png").absolute())
    before = content("b")
    code, _, error = run(capsys, "segment", "b", "--out", "out", "--model", model, "--overwrite")
    assert code == 1
    assert "c_overlay.png: is an input" in error
    assert content("b") == before
    assert os.path.samefile("out/c_overlay.png", "b/c.png")
    assert os.listdir("out") == ["c_overlay.png"]


def test_files_of_others_are_replaced_only_if_asked_for(capsys, model, quick):
    picture("b/c.png")
    picture("b/d.png")
    Path("out").mkdir()
    own = {f"c_{kind}": f"mine, {kind}".encode() for kind in KINDS}
    for name, text in own.items():
        for other in own:
            Path("out", other).unlink(missing_ok=True)
        Path("out", name).write_bytes(text)
        code, text, error = run(capsys, "segment", "b", "--out", "out", "--model", model)
        assert code == 1
        assert "1 of 2 pictures done" in text
        assert f"out/{name}: is there" in error
        assert "--overwrite" in error
        assert error.count("\n") == 1
        assert {f for f in os.listdir("out") if f.startswith("c")} == {name}
        assert Path("out", name).read_bytes() == own[name]
    code, _, _ = run(capsys, "segment", "b", "--out", "out", "--model", model, "--overwrite")
    assert code == 0
    assert json.loads(Path("out/c_summary.json").read_text())["count"] == 1


def test_nothing_is_computed_for_a_picture_that_cannot_be_written(capsys, model, monkeypatch):
    picture("c.png")
    Path("out").mkdir()
    Path("out/c_objects.csv").write_text("mine")
    monkeypatch.setattr(SEGMENT, lambda *a, **k: pytest.fail("computed"))
    code, _, error = run(capsys, "segment", "c.png", "--out", "out", "--model", model)
    assert code == 1
    assert "c_objects.csv" in error


def test_a_file_that_comes_while_computing_stays(capsys, model, monkeypatch):
    picture("c.png")

    def segment(model, path, **options):
        Path("out/c_overlay.png").write_text("mine")
        return found(np.ones((4, 6), np.int32))

    monkeypatch.setattr(SEGMENT, segment)
    code, _, error = run(capsys, "segment", "c.png", "--out", "out", "--model", model)
    assert code == 1
    assert "c_overlay.png" in error
    assert Path("out/c_overlay.png").read_text() == "mine"
    assert sorted(os.listdir("out")) == [f"c_{kind}" for kind in KINDS]


def test_a_file_that_comes_after_the_last_check_stays():
    class Late(Results):
        def check(self, path):
            there = super().check(path)
            path.write_text("mine")
            return there

    with pytest.raises(FileExistsError, match=r"a\.txt"), Late().write(Path("a.txt")) as path:
        path.write_text("new")
    assert Path("a.txt").read_text() == "mine"
    assert os.listdir() == ["a.txt"]


def test_earlier_results_are_replaced_and_no_pictures(capsys, model, quick):
    picture("a/c.png")
    picture("a/d.png")
    arguments = ("segment", "a", "--out", "a", "--model", model)
    assert run(capsys, *arguments)[0] == 0
    names = sorted(os.listdir("a"))
    assert len(names) == 2 + 2 * 4
    for images in (["a"], ["a/*.png"], sorted(map(str, Path("a").glob("*.png")))):
        code, text, error = run(capsys, "segment", *images, *arguments[2:])
        assert (code, error) == (0, "")
        assert "2 of 2 pictures done, 4 results of earlier runs left out" in text
        assert sorted(os.listdir("a")) == names
    # A picture of the user's own with such a name is a picture, and a corrected result is kept.
    picture("a/d_overlay.png")
    picture("a/x_overlay.png")
    picture("a/c_labels.png", 5)
    corrected = Path("a/c_labels.png").read_bytes()
    code, text, error = run(capsys, *arguments)
    assert code == 1
    assert Path("a/x_overlay_summary.json").is_file()
    assert "c_labels.png: is an input" in error
    assert "d_overlay.png: is an input" in error
    assert Path("a/c_labels.png").read_bytes() == corrected
    # Not even read again, it is not replaced.
    code, _, error = run(capsys, "segment", "a/c.png", "--out", "a", "--model", model)
    assert code == 1
    assert "c_labels.png: is there, and not as this program wrote it" in error
    assert Path("a/c_labels.png").read_bytes() == corrected
    code, _, error = run(
        capsys, "segment", "a/c.png", "--out", "a", "--model", model, "--overwrite"
    )
    assert (code, error) == (0, "")


def test_only_results_is_no_picture(capsys, model, quick):
    picture("a/c.png")
    run(capsys, "segment", "a", "--out", "out", "--model", model)
    code, _, error = run(capsys, "segment", "out", "--out", "other", "--model", model)
    assert code == 1
    assert "out: no picture found" in error


@pytest.mark.parametrize("change", ["value", "key", "no seal", "no JSON"])
def test_a_changed_summary_is_not_a_result(change):
    path = Path("c_summary.json")
    write_sealed(path, {"count": 3, "scale": 0.1, "name": "\udcff", "files": {}})
    assert is_result(path)
    text = path.read_text()
    path.write_text(
        {
            "value": text.replace("3", "4", 1),
            "key": text.replace('"count"', '"note": "mine", "count"'),
            "no seal": json.dumps({"count": 3}),
            "no JSON": text[:-3],
        }[change]
    )
    assert not is_result(path)


def test_a_picture_that_is_like_a_result_is_none(tmp_path):
    drawn = Image.open(picture("a.png"))
    save_sealed(Path("focus.png"), drawn)
    assert is_result(Path("focus.png"))
    assert not is_result(Path("a.png"))
    with Image.open("focus.png") as known:
        changed = known.copy()
        changed.info = known.info
    changed.putpixel((0, 0), (1, 2, 3))
    from PIL.PngImagePlugin import PngInfo

    seal = PngInfo()
    seal.add_text("seal", changed.info["seal"])
    changed.save("changed.png", pnginfo=seal)
    assert not is_result(Path("changed.png"))
    Path("list_summary.json").write_text("[1]")
    write_sealed(Path("odd_summary.json"), {"files": [1]})
    for name in ("list_a.png", "odd_a.png"):
        shutil.copy("a.png", name)
        assert not is_result(Path(name))
    assert not is_result(Path("n" * 300 + ".png"))
    Path("link.png").symlink_to("focus.png")
    assert not is_result(Path("link.png"))


def test_the_same_name_in_another_case_is_not_replaced(monkeypatch):
    """Where names do not differ by case, C_labels.png is the c_labels.png that was just written."""
    results = Results(overwrite=True)
    with results.write(Path("c_labels.png")) as path:
        path.write_text("c")
    os.link("c_labels.png", "C_labels.png")
    with pytest.raises(FileExistsError, match="of this run already"):
        results.check(Path("C_labels.png"))


def test_other_commands_do_not_replace_their_inputs(capsys, tmp_path, model):
    picture("x.png")
    before = Path("x.png").read_bytes()
    os.link("x.png", "hard.png")
    Path("soft.png").symlink_to("x.png")
    for out in ("x.png", "./x.png", tmp_path / "x.png", "hard.png", "soft.png"):
        code, _, error = run(
            capsys, "focus", "x.png", "--out", out, "--model", model, "--overwrite"
        )
        assert code == 1
        assert "is an input" in error
        assert Path("x.png").read_bytes() == before
        assert Path("soft.png").is_symlink()
    Path("mine.png").write_text("mine")
    arguments = ("focus", "x.png", "--model", model, "--out")
    code, _, error = run(capsys, *arguments, "mine.png")
    assert code == 1
    assert "--overwrite" in error
    assert Path("mine.png").read_text() == "mine"
    for _ in range(2):
        assert run(capsys, *arguments, "focus.png")[0] == 0
    assert is_result(Path("focus.png"))


def test_evaluate_does_not_replace_what_it_reads(capsys, tmp_path, model, monkeypatch):
    from pointformer import evaluation

    image = picture("d/val/images/a.png")
    maps = Path("d/val/instances")
    maps.mkdir()
    Image.fromarray(np.ones((32, 48), np.uint8)).save(maps / "a.png")
    weights, classes = tmp_path / "m.safetensors", Path("d/val/segments.json")
    shutil.copy(model, weights)
    listed = {"a": {"segments": [{"id": 1, "class": 1}]}}
    classes.write_text(json.dumps({"classes": {"1": "cell"}, "images": listed}))
    before = content(".")
    arguments = ("evaluate", "d", "--model", weights, "--json")
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: pytest.fail("computed"))
    for path in (image, maps / "a.png", weights, classes):
        code, _, error = run(capsys, *arguments, path, "--overwrite")
        assert code == 1
        assert "is an input" in error
    Path("mine.json").write_text("{}")
    code, _, error = run(capsys, *arguments, "mine.json")
    assert code == 1
    assert "--overwrite" in error
    assert content(".") == before | {"mine.json": b"{}"}
    result = evaluation.Evaluation({"AP": 0.5, "none": float("nan")}, 1)
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: result)
    for _ in range(2):
        assert run(capsys, *arguments, "scores.json")[0] == 0
    assert json.loads(Path("scores.json").read_text())["scores"] == {"AP": 0.5, "none": None}


# Names


@pytest.mark.parametrize(
    ("pictures", "names"),
    [
        (["a/c.png", "a/d.png"], ["c", "d"]),
        (["c.ome.tif", "scan.1", "scan.2"], ["c.ome", "scan.1", "scan.2"]),
        (["a/c.png", "b/c.png", "a/d.png"], ["a/c", "b/c", "a/d"]),
        (["a/c.png", "a/b/c.png"], ["c", "b/c"]),
        (["x/a/i/c.png", "x/b/i/c.png"], ["a/i/c", "b/i/c"]),
        (["a/c.png", "a/c.jpg", "a/d.png"], ["c.png", "c.jpg", "d"]),
        (["a/c.png", "a/c.jpg", "a/c.png.tif"], ["c.png", "c.jpg", "c.png.tif"]),
        (["a/c.png", "a/c.jpg", "b/c.png"], ["a/c.png", "a/c.jpg", "b/c"]),
        (["a/c.png", "b/C.png"], ["a/c", "b/C"]),
        (["a/c.png", "a/C.jpg"], ["c.png", "C.jpg"]),
        (["a/c.png", "a/C.png"], ["c.png", "C.png"]),
        (["a/\u00e9.png", "b/e\u0301.png"], ["a/\u00e9", "b/e\u0301"]),
    ],
)
def test_names_of_results(pictures, names):
    assert result_names([Path(p) for p in pictures]) == names
    assert len(set(names)) == len(pictures)


def test_pictures_of_one_name_do_not_collide(capsys, model, quick):
    for name in ("a/c.png", "b/c.png", "a/c.jpg", "C/c.png", "a/C.png"):
        picture(name)
    folders = ("a", "./b", "C", "b/../a/c.png")
    code, text, error = run(capsys, "segment", *folders, "--out", "o", "--model", model)
    assert (code, error) == (0, "")
    assert "5 of 5 pictures done" in text
    expected = ["C/c", "a/C.png", "a/c.jpg", "a/c.png", "b/c"]
    assert sorted(content("o")) == [f"{name}_{kind}" for name in expected for kind in KINDS]


def test_nothing_leaves_the_output_folder_through_a_link(capsys, model, quick):
    for name in ("a/c.png", "b/c.png", "private/a"):
        picture(f"{name}.png")
    before = content("private")
    Path("o").mkdir()
    Path("o/a").symlink_to(Path("private").absolute())
    code, text, error = run(capsys, "segment", "a", "b", "--out", "o", "--model", model)
    assert code == 1
    assert "1 of 2 pictures done" in text
    assert "through a link" in error
    assert content("private") == before


@pytest.mark.parametrize(
    "name",
    [
        b"new\nline.png",
        b"\xff\xfe.png",
        "漢 \x1b[31m.png".encode(),
        b"n" * 238 + b".png",
        b"-.png",
        b"C:x\\y.png",
    ],
)
def test_odd_names(capsys, model, quick, name):
    name = os.fsdecode(name)
    picture(f"a/{name}")
    code, text, error = run(capsys, "segment", "a", "--out", "o", "--model", model)
    assert (code, error) == (0, "")
    assert text.startswith(printable(name))
    assert text.count("\n") == 1
    assert sorted(os.listdir("o")) == sorted(f"{name[:-4]}_{kind}" for kind in KINDS)


def test_a_name_too_long_for_its_results_is_named(capsys, model, quick):
    name = "n" * 250 + ".png"
    picture(f"a/{name}")
    picture("a/c.png")
    code, text, error = run(capsys, "segment", "a", "--out", "o", "--model", model)
    assert code == 1
    assert "1 of 2 pictures done" in text
    assert name in error
    assert "too long" in error
    assert len(os.listdir("o")) == 4


# Everything that was computed is written


def test_more_objects_than_16_bits_hold(capsys, model, monkeypatch):
    picture("c.png")
    many = np.arange(257 * 256, dtype=np.int32).reshape(257, 256)
    for count, kept in ((65536, "tif"), (65535, "png"), (65536, "tif")):
        labels = np.minimum(many, count)
        monkeypatch.setattr(SEGMENT, lambda *a, _=labels, **k: found(_))
        code, text, error = run(capsys, "segment", "c.png", "--out", "o", "--model", model)
        assert (code, error) == (0, "")
        assert f"{count} objects" in text
        # The map of another kind that the run before left does not stay beside the new one.
        assert sorted(os.listdir("o")) == sorted(
            [f"c_labels.{kept}", *(f"c_{k}" for k in KINDS[1:])]
        )
        path = f"o/c_labels.{kept}"
        read = tifffile.imread(path) if kept == "tif" else np.asarray(Image.open(path))
        assert read.dtype == (np.uint32 if kept == "tif" else np.uint16)
        assert np.array_equal(read, labels)
    with Path("o/c_objects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["id"]) for row in rows] == list(range(1, 65537))
    Path("o/c_labels.png").write_text("mine")  # beside a TIFF: an error, and nothing is removed
    code, _, error = run(capsys, "segment", "c.png", "--out", "o", "--model", model)
    assert code == 1
    assert "c_labels.png" in error
    assert Path("o/c_labels.png").read_text() == "mine"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("error", "again"),
    [(MemoryError(), False), (OSError(errno.ENOSPC, "No space left on device"), True)],
    ids=["no memory", "disk full, where earlier results are"],
)
def test_a_file_that_cannot_be_written_keeps_back_no_other(
    capsys, model, quick, kind, error, again, monkeypatch
):
    def fail(*arguments):
        raise error

    picture("c.png")
    arguments = ("segment", "c.png", "--out", "o", "--model", model)
    if again:
        run(capsys, *arguments)
    if kind == "summary.json":
        monkeypatch.setattr(command, "write_sealed", fail)
    else:
        monkeypatch.setitem(pictures._WRITERS, kind, fail)
    code, _, text = run(capsys, *arguments)
    assert code == 1
    assert text.count("\n") == 1
    assert f"c.png: not written: o/c_{kind}: " in text
    assert "out of memory" in text or "No space left" in text
    assert sorted(os.listdir("o")) == [f"c_{k}" for k in KINDS if k != kind]


def test_class_names_of_any_alphabet_in_the_table(monkeypatch):
    from dataclasses import replace

    from pointformer.data import Category

    names = (Category(0, "Zelle, ä 漢", True, (1, 2, 3)),)
    result = replace(found(np.ones((2, 2), np.int32)), categories=names)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    pictures._write_objects(Path("o.csv"), result)
    rows = list(csv.reader(Path("o.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[1][1] == "Zelle, ä 漢"


# One bad item


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
                      "allocate memory: you tried to allocate 9 bytes.\n\nmore"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
        (RecursionError("maximum recursion depth exceeded"), "unexpected RecursionError: maximum"),
        (KeyError("scale"), "unexpected KeyError: 'scale' (see --debug)"),
        (RuntimeError("shapes\ndiffer"), "unexpected RuntimeError: shapes (see --debug)"),
        (ValueError("bad\n  picture"), "bad picture"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (SyntaxError("not a TIFF"), "not a TIFF"),
    ],
)  # fmt: skip
def test_one_bad_picture_does_not_end_the_batch(capsys, model, monkeypatch, error, words):
    def segment(model, path, **options):
        if Path(path.name).name == "b.png":
            raise error
        return found(np.ones((4, 6), np.int32))

    monkeypatch.setattr(SEGMENT, segment)
    for name in "abc":
        picture(f"in/{name}.png")
    code, text, message = run(capsys, "segment", "in", "--out", "o", "--model", model)
    assert code == 1
    assert "2 of 3 pictures done" in text
    assert message.startswith("pointformer: error: in/b.png: ")
    assert words in message
    assert message.count("\n") == 1
    assert len(os.listdir("o")) == 8
    _, _, message = run(capsys, "segment", "in", "--out", "o", "--model", model, "--debug")
    assert "Traceback" in message


def test_errors_outside_of_the_batch_are_one_line_too(capsys, model, monkeypatch):
    picture("a.png")
    for error in (MemoryError(), RuntimeError("bug"), KeyError("x"), RecursionError("deep")):

        def fail(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr("pointformer.cli.inputs.model_from", fail)
        code, _, message = run(capsys, "focus", "a.png", "--out", "f.png")
        assert code == 1
        assert message.count("\n") == 1
        assert message.startswith("pointformer: error: ")


def test_arguments_that_are_no_pictures(capsys, model, quick, tmp_path):
    picture("a.png")
    for folder in ("empty", "stacks", "a.zarr"):
        Path(folder).mkdir()
    Path("stacks/a.czi").write_bytes(b"ZISRAWFILE")
    Path("broken.png").symlink_to("nowhere")
    Path("zero.png").write_bytes(b"")
    os.mkfifo("pipe.png")
    Path("loop.png").symlink_to("loop.png")
    bad = {
        "nosuch.png": "no picture found",
        "stacks": "no picture found (.czi files are not read, write it as TIFF)",
        "stacks/a.czi": "cannot be decoded: .czi files are not read, write it as TIFF",
        "a.zarr": "no picture found (.zarr files are not read, write it as TIFF)",
        "no*.png": "no picture found",
        "empty": "no picture found",
        "": "no picture found",
        "broken.png": "leads nowhere",
        "loop.png": "leads nowhere",
        "zero.png": "cannot identify",
        "pipe.png": "pipe",
        "/dev/zero": "pipe or a device",
        "n" * 300: "too long",
        "a.png/b.png": "no picture found",
    }
    code, text, error = run(capsys, "segment", "a.png", *bad, "--out", "o", "--model", model)
    assert code == 1
    assert f"1 of {1 + len(bad)} pictures done" in text
    lines = error.splitlines()
    assert len(lines) == len(bad)
    for name, words in bad.items():
        assert any((name or "''") in line and words in line for line in lines), (name, error)
    assert len(os.listdir("o")) == 4
    code, _, error = run(capsys, "focus", "pipe.png", "--out", "f.png", "--model", model)
    assert code == 1
    assert "pipe" in error


def test_a_folder_that_cannot_be_listed(capsys, model, quick, monkeypatch):
    picture("good/a.png")
    picture("secret/b.png")
    listing = Path.iterdir

    def iterdir(path):  # permissions do not hold for root, who may run this
        if path.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for chosen in (["--model", model], []):
        code, text, error = run(capsys, "segment", "secret", "good", "--out", "o", *chosen)
        assert code == 1
        assert error == "pointformer: error: secret: Permission denied\n"
        assert "1 of 2 pictures done" in text
    code, text, error = run(capsys, "segment", "n" * 300, "good", "--out", "o")
    assert code == 1
    assert error.count("\n") == 1
    assert "File name too long" in error


def test_a_folder_that_cannot_be_written_is_told_before_computing(capsys, model, monkeypatch):
    picture("a.png")
    Path("o").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # also as root
    monkeypatch.setattr(SEGMENT, lambda *a, **k: pytest.fail("computed"))
    code, _, error = run(capsys, "segment", "a.png", "--out", "o", "--model", model)
    assert code == 1
    assert "o: no permission to write" in error


# The end of a run


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_ended_run_leaves_nothing_half_done(capsys, model, monkeypatch, request, signal):
    import signal as signals

    number = getattr(signals, signal)
    handler = signals.default_int_handler if signal == "SIGINT" else signals.SIG_DFL
    before = signals.signal(number, handler)  # ignored where pytest runs in the background
    request.addfinalizer(lambda: signals.signal(number, before))

    def end(path, *arguments):
        path.write_text("half")
        os.kill(os.getpid(), number)

    picture("a.png")
    monkeypatch.setattr(SEGMENT, lambda *a, **k: found(np.ones((4, 6), np.int32)))
    monkeypatch.setitem(pictures._WRITERS, "overlay.png", end)
    arguments = ["segment", "a.png", "--out", "o", "--model", model]
    if signal == "SIGINT":
        assert run(capsys, *arguments)[0] == 130
    else:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 128 + number
    assert os.listdir("o") == []
    assert signals.getsignal(number) is handler


def test_a_batch_that_is_ended_has_whole_results_only(capsys, model, monkeypatch):
    """The results that are being written become complete; later pictures have none."""
    for name in "abcdefg":
        picture(f"in/{name}.png")
    seen = []

    def segment(model, path, **options):
        seen.append(Path(path.name).stem)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return found(np.ones((4, 6), np.int32))

    monkeypatch.setattr(SEGMENT, segment)
    assert run(capsys, "segment", "in", "--out", "o", "--model", model)[0] == 130
    assert set("abc") <= set(seen) < set("abcdefg")  # some may be looked at side by side
    done = sorted({name[0] for name in os.listdir("o")})
    assert set(done) < set(seen)
    assert sorted(os.listdir("o")) == sorted(f"{name}_{kind}" for name in done for kind in KINDS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tile", "0"], "tile: expected a positive integer"),
        (["--tile", "32", "--overlap", "32"], "overlap: expected 0 to 31"),
        (["--overlap", "-1"], "overlap: expected"),
        (["--overlap", "32"], "--overlap: is of windows; say their side as well, with --tile"),
        (["--min-score", "2"], "min_score: expected a number in [0, 1]"),
        (["--scale", "nan"], "scale: expected a positive number"),
        (["--scale", "1", "--diameter", "3"], "scale, diameter: only one"),
        (["--diameter", "3"], "does not know the size"),
        (["--out", "in/a.png"], "in/a.png: expected a folder, this is none"),
        (["--model", "classes.safetensors"], "made for 'classification' and finds no regions"),
    ],
)
def test_what_is_wrong_for_all_pictures_is_said_once(capsys, model, options, words):
    for name in "abc":
        picture(f"in/{name}.png")
    save_model(Model("small", SMALL, "classification", 2), "classes.safetensors")
    _, _, error = run(capsys, "segment", "in", "--out", "o", "--model", model, *options)
    (line,) = error.splitlines()
    assert words in line
    assert not Path("o").exists()


def test_pictures_side_by_side_are_those_of_one_thread(capsys, model, monkeypatch):
    """The same bits, whatever is ready first, and where large ones wait for each other."""
    monkeypatch.setattr(Pictures, "small", 35**2)
    rng = np.random.default_rng(0)
    Path("in").mkdir()
    for number in range(7):
        side = 30 + 3 * number
        noise = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"in/{number}.png")
    Path("in/4.png").write_text("no picture")
    for threads in ("1", "2", "3"):
        code, _, error = run(
            capsys, "segment", "in", "--out", threads, "--model", model, "--threads", threads
        )
        assert code == 1
        assert error.startswith("pointformer: error: in/4.png: ")
        assert torch.get_num_threads() == int(threads)
    for path in Path("1").iterdir():
        for threads in ("2", "3"):
            if not path.name.endswith("summary.json"):  # which has times
                assert (Path(threads) / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(os.listdir("1")) == len(os.listdir("3")) == 24


def test_errors_of_reading_network_and_writing_come_in_order(capsys, model, monkeypatch):
    for name in "abcde":
        picture(f"in/{name}.png")
    Path("in/b.png").write_text("no picture")

    def segment(model, path, **options):
        if Path(path.name).name == "c.png":
            raise ValueError("no idea")
        if Path(path.name).name == "d.png":
            Path("o/d_objects.csv").write_text("mine")
        return found(np.ones((4, 6), np.int32))

    monkeypatch.setattr(SEGMENT, segment)
    code, text, error = run(capsys, "segment", "in", "--out", "o", "--model", model)
    assert code == 1
    assert "2 of 5 pictures done" in text
    lines = [line for line in error.splitlines() if line.startswith("pointformer: error")]
    assert [("b.png", "c.png", "d_objects.csv")[n] in line for n, line in enumerate(lines)] == [
        True, True, True,
    ]  # fmt: skip


def test_what_an_ended_run_published_is_known_to_the_next(capsys, model, quick, monkeypatch):
    picture("a.png")
    published = results_of_runs.publish
    count = 0

    def publish(*arguments, **options):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        published(*arguments, **options)

    monkeypatch.setattr(results_of_runs, "publish", publish)
    arguments = ("segment", "a.png", "--out", "o", "--model", model)
    assert run(capsys, *arguments)[0] == 130
    assert len(os.listdir("o")) == 2
    assert run(capsys, *arguments)[0] == 0
    assert sorted(os.listdir("o")) == [f"a_{kind}" for kind in KINDS]


def test_a_reader_that_has_read_enough_ends_nothing(model, quick, monkeypatch):
    for name in "abc":
        picture(f"in/{name}.png")
    Path("in/bad.png").write_text("")
    streams = []
    for name in ("stdout", "stderr"):
        reading, writing = os.pipe()
        os.close(reading)
        streams.append(os.fdopen(writing, "w"))
        monkeypatch.setattr(sys, name, streams[-1])
    code = cli.main(["segment", "in", "nosuch", "--out", "o", "--model", model])
    monkeypatch.setattr(cli.models, "run", lambda options: print("a table\n" * 10_000))
    assert not cli.main(["models"])
    for stream in streams:
        stream.close()
    assert code == 1  # of bad.png and nosuch
    assert len(os.listdir("o")) == 12


def test_errors_name_the_file_once_and_in_one_line():
    assert reason(ValueError("a\nb.png: bad"), "a\nb.png") == r"a\nb.png: bad"
    assert reason(ValueError("bad"), "a.png") == "a.png: bad"
    assert reason(OSError(errno.EIO, "broken", "a.png"), "a.png") == "a.png: broken"
    assert reason(ValueError(), "a.png") == "a.png: ValueError"
    assert reason(ValueError("bad")) == "bad"


def test_a_folder_of_everything(capsys, model):
    """The whole command over good, odd and bad files; the second time as another process."""
    cases = Path(__file__).parents[1] / "cases"
    pattern = shutil.ignore_patterns("*.json")
    for folder in ("pictures", "coco"):
        shutil.copytree(cases / folder, "in", ignore=pattern, dirs_exist_ok=True)
    # Those that hold more than one picture need a choice.
    choice = ["cyx_2_channels.tif", "three_contiguous_channels_u16.tif", "zyx_5_planes.tif"]
    common = {path.name for path in Path("in").iterdir()}
    good = sorted(common - set(choice))
    odd = [b"new\nline.png", b"\xff\xfe.png", "漢.png".encode(), b"n" * 238 + b".png", b"Q.JPG"]
    for number, name in enumerate(map(os.fsdecode, odd)):
        picture(f"in/{name}", number)
        good.append(name)
    for name in ("._a.png", "Thumbs.db", "notes.txt"):
        Path("in", name).write_bytes(b"\0\5\x16\7")
    Path("in/folder.png").mkdir()
    Path("in/empty.png").write_bytes(b"")
    Path("in/cut.png").write_bytes(Path("in/漢.png").read_bytes()[:200])
    Path("in/text.tif").write_text("no picture")
    Path("in/cut.tif").write_bytes(Path("in", choice[0]).read_bytes()[:100])
    Path("in/broken.png").symlink_to("nowhere")
    os.mkfifo("in/pipe.png")
    long = "n" * 250 + ".png"
    picture(f"in/{long}")
    bad = ["empty.png", "cut.png", "text.tif", "cut.tif", "broken.png", "pipe.png", long, *choice]
    arguments = ["segment", "in", "nosuch.png", "--out", "o", "--model", model, "--threads", "1"]

    def check(code, text, error, good, bad):
        assert code == 1, error
        lines = error.splitlines()
        for name in [*bad, "nosuch.png"]:
            assert any(name in line for line in lines), name
        assert len(lines) == len(bad) + 1, error
        assert all(line.startswith("pointformer: error: ") for line in lines), error
        assert f"{len(good)} of {len(good) + len(bad) + 1} pictures done" in text
        names = [name.rpartition(".")[0] for name in good]
        assert sorted(os.listdir("o")) == sorted(f"{n}_{kind}" for n in names for kind in KINDS)
        assert not [p for p in Path().rglob("*") if p.name.startswith(TEMPORARY_PREFIX)]

    before = content("in")
    check(*run(capsys, *arguments), good, bad)
    assert content("in") == before
    for name, *options in zip(
        choice, ("--channel", "--channel", "--plane"), ("1", "0,1,2", "3"), strict=True
    ):
        code, _, error = run(
            capsys, "segment", f"in/{name}", "--out", "chosen", "--model", model, *options
        )
        assert (code, error) == (0, "")
    for name in common:  # that would take too long twice
        Path("in", name).unlink()
    good, bad = [n for n in good if n not in common], [n for n in bad if n not in common]
    shutil.rmtree("o")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    again = subprocess.run(
        [sys.executable, "-m", "pointformer.cli", *arguments],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    check(again.returncode, again.stdout, again.stderr, good, bad)


def test_the_table_and_the_summary_say_what_is_where(capsys, model, monkeypatch):
    """x before y, left before top, ends exclusive; scores with three digits, middles with two."""
    from dataclasses import replace

    labels = np.zeros((6, 20), np.int32)
    labels[1:3, 4:9], labels[4, 15] = 1, 2
    result = replace(found(labels), classes=(0, 3), scores=(0.87654, 0.5), categories=None)
    monkeypatch.setattr(SEGMENT, lambda *a, **k: result)
    picture("c.png")
    assert run(capsys, "segment", "c.png", "--out", "o", "--model", model)[0] == 0
    assert Path("o/c_objects.csv").read_text().splitlines() == [
        "id,class,score,area,x,y,left,top,right,bottom",
        "1,0,0.877,10,6.00,1.50,4,1,9,3",
        "2,3,0.500,1,15.00,4.00,15,4,16,5",
    ]
    summary = json.loads(Path("o/c_summary.json").read_text())
    assert (summary["width"], summary["height"], summary["count"]) == (20, 6, 2)
