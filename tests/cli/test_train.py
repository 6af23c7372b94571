"""The command `train`: recipes, data and changes in any order, and one line for what is wrong."""

import numpy as np
import pytest

from helpers import scenes
from helpers.training import TINY, write_folder
from pointformer import cli
from pointformer.models import create_model
from pointformer.train.recipe import read_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("nuclei"))


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_trains_goes_on_and_its_model_is_used(capsys, folder, tmp_path):
    out = tmp_path / "run"
    options = ["--task", "instance", "--out", out, "--threads", "1"]
    code, text, _ = run(capsys, "train", TINY, folder, *options, "budget.steps=2")
    assert code == 0
    assert f"the model is in {out / 'model.safetensors'}" in text
    assert create_model(out / "model.safetensors").trained["steps"] == 2
    recipe = read_recipe(out / "recipe.yaml")
    assert (recipe.task, recipe.model, recipe.batch) == ("instance", "aff_nano", 2)
    assert recipe.data.path == str(folder)

    code, text, _ = run(capsys, "train", "--resume", "--out", out, "budget.steps=3")
    assert code == 0
    assert "goes on from step-00000002-" in text
    assert create_model(out / "model.safetensors").trained["steps"] == 3
    picture = folder / "val/images/0.png"
    for arguments in (
        ["segment", picture, "--model", out / "model.safetensors", "--out", tmp_path / "found"],
        ["evaluate", folder, "--model", out / "model.safetensors"],
        ["focus", picture, "--model", out / "model.safetensors", "--out", tmp_path / "f.png"],
    ):
        assert run(capsys, *arguments)[0] == 0


def test_shards_are_learned_and_arrays_scored(capsys, tmp_path):
    images = np.stack([scenes.pixels(n, (32, 32)) for n in range(4)])
    files = {f"{n}.jpg": scenes.encoded(image, "jpg") for n, image in enumerate(images)}
    scenes.shard(tmp_path / "a.tar", files | {f"{n}.cls": n % 2 for n in range(4)})
    np.savez(tmp_path / "b.npz", images=images, labels=[0, 1, 0, 1])
    out = tmp_path / "run"
    changes = ["options.patch_stride=4", "augmentation.mix=null", "batch=2", "data.val_share=0.3"]
    changes += [f"options.{name}={n}" for name, n in read_recipe(TINY).options.items()]
    changes += ["budget.epochs=null", "budget.steps=2", "validation.times=0"]
    arguments = [tmp_path / "a.tar", *changes, "--out", out, "--threads", 1]
    code, text, _ = run(capsys, "train", "cifar10.yaml", *arguments)
    assert code == 0
    assert "a.tar: 2 pictures, width x height 32 x 32 (2); 2 classes, by pictures: 0 50%" in text
    for data in ("a.tar", "b.npz"):
        code, text, _ = run(
            capsys, "evaluate", tmp_path / data, "--model", out / "model.safetensors",
            "--json", tmp_path / f"{data}.json",
        )  # fmt: skip
        assert code == 0
        assert f"{data}: {'shards' if data == 'a.tar' else 'arrays'}, no splits" in text
        assert "accuracy" in (tmp_path / f"{data}.json").read_text()
    code, _, _ = run(capsys, "evaluate", tmp_path / "a.tar", "--json", tmp_path / "a.tar")
    assert code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["DATA"], "budget: expected steps, epochs or minutes"),
     (["DATA", "other", "budget.steps=1"], "other: expected one data set and field=value"),
     (["nope.yaml", "DATA"], "nope.yaml: no such file, nor a recipe of the package: "),
     (["budget.steps=1"], "data.path: expected a data set"),
     (["DATA", "lr=1"], "lr: no such field; there are task, model, init"),
     (["DATA", "file=x.yaml"], "file: no such field"),
     (["DATA", "help"], "help: expected one data set"),
     (["DATA", "batch=two"], "batch: expected a whole number, got 'two'"),
     (["DATA", "optimizer.lr=1"], "optimizer.lr: no such field"),
     (["DATA", "budget.steps=1", "--model", "aff_huge"], "name: unknown model 'aff_huge'"),
     (["DATA", "budget.steps=1", "options.alhpa=3"], "unknown option alhpa"),
     (["DATA", "budget.steps=1", "loss.point=3"],
      "unknown option point; known options of the task: inside_weight, border_weight"),
     (["DATA", "budget.steps=1", "head=dens"], "head: expected one of"),
     (["DATA", "budget.steps=1", "--init", "aff_nano.cells"], "there are no such weights"),
     (["DATA", "budget.steps=1", "accumulate=3", "batch=4"], "accumulate: expected a divisor"),
     (["DATA", "budget.steps=1", "--threads", "0"], "--threads: expected 1 to 1024, got 0"),
     (["DATA", "budget.steps=1", "--threads", "100000"], "expected 1 to 1024, got 100000"),
     (["DATA", "--resume"], "--resume: OUT holds no run: there is no recipe.yaml"),
     (["DATA", "budget.steps=1", "--device", "foo"], "device: foo cannot be used: "),
     (["DATA", "budget.steps=1", "--model", "aff_nano.nuclei"], "pass it as init (--init)"),
     (["DATA", "budget.steps=1", "--out", ""], "--out: expected the folder of the run"),
     (["nuclei.yaml", "--resume"], "--resume: goes on by the recipe of the run")],
)  # fmt: skip
def test_one_line_for_what_is_wrong(capsys, folder, tmp_path, arguments, message):
    arguments = [str(folder) if a == "DATA" else a for a in arguments]
    out = tmp_path / "out"
    code, _, error = run(capsys, "train", "--task", "instance", "--out", out, *arguments)
    assert code == 1
    assert error.count("\n") == 1
    assert message.replace("OUT", str(out)) in error
    assert not out.exists()


def test_a_warning_is_a_line(capsys, folder, tmp_path):
    """Here of what is kept of other weights, for another task."""
    code, _, error = run(
        capsys, "train", folder, "--task=semantic", "--init=aff_nano.nuclei", "budget.steps=1",
        "validation.times=0", "batch=1", "augmentation.crop.size=32", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0
    (line,) = [line for line in error.replace("\r", "\n").splitlines() if "warning" in line]
    assert line.startswith("pointformer: warning: ")
    assert "kept: the backbone and 0 of 24 weights of the head" in line


def test_unknown_options_are_refused(capsys, folder):
    for arguments in (["train", folder, "--out", "x", "--lr", "3"], ["evaluate", folder, "b=3"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        assert stop.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_the_share_that_was_kept_is_what_evaluate_scores(capsys, folder, tmp_path):
    out = tmp_path / "run"
    data = folder / "train"
    options = ["--task", "instance", "--out", out, "--threads", "1", "--val-share", "0.4"]
    code, text, _ = run(capsys, "train", TINY, data, *options, "budget.steps=1")
    assert code == 0
    assert "2 pictures to be scored on" in text
    code, _, error = run(capsys, "evaluate", data, "--model", out / "model.safetensors")
    assert code == 0
    assert "all but 2 of its 4 pictures, which are scored" in error
