"""`pointformer evaluate` and what it is made of, on small synthetic data sets."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from pointformer import cli
from pointformer.data import Category, read_folder
from pointformer.evaluation import evaluate
from pointformer.models import AFFConfig, Model, save_model
from pointformer.segmentation import segment

SMALL = AFFConfig(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)
CATEGORIES = (Category(0, "background", False), Category(1, "cell", True))


@pytest.fixture
def folder(tmp_path):
    """Two pictures with labels and instances."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels", "instances"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    for name in ("a", "b"):
        ids = np.zeros((40, 52), np.uint8)
        ids[4:14, 5:20], ids[20:33, 30:45] = 1, 2
        picture = rng.integers(0, 255, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"val/images/{name}.png")
        Image.fromarray((ids > 0).astype(np.uint8)).save(tmp_path / f"val/labels/{name}.png")
        Image.fromarray(ids).save(tmp_path / f"val/instances/{name}.png")
    return tmp_path


def mask_model(task, classes=2):
    torch.manual_seed(0)
    categories = CATEGORIES if classes == 2 else [Category(n, str(n)) for n in range(classes)]
    options = {"queries": 3, "dim": 32, "hidden": 32, "decoder_layers": 1}
    return Model(
        "small", SMALL, "hcformer", classes, task=task, categories=categories, **options
    ).eval()


def test_a_perfect_model_scores_100(folder, monkeypatch):
    """The truth in the place of the model's class scores."""
    dataset = read_folder(folder, "val", "semantic", categories=CATEGORIES)
    truths = iter([annotation.classes() for annotation in dataset])

    def perfect(model, image, **options):
        truth = next(truths)
        return torch.from_numpy(np.stack([truth == k for k in range(2)])).float()

    monkeypatch.setattr("pointformer.models.inference.predict_semantic", perfect)
    scores = evaluate(mask_model("semantic"), dataset, "semantic")
    assert scores == {"mIoU": 1.0, "mean accuracy": 1.0, "pixel accuracy": 1.0}


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_command_line(folder, tmp_path, capsys, task):
    path = tmp_path / "model.safetensors"
    save_model(mask_model(task, 2 if task == "semantic" else 1), path)
    out = tmp_path / "scores.json"
    arguments = ["evaluate", folder, "--model", path, "--json", out, "--threads", 1]
    assert cli.main([str(a) for a in arguments]) == 0
    content = json.loads(out.read_text())
    assert content["task"] == task
    assert content["images"] == 2
    text = capsys.readouterr().out
    for name, value in content["scores"].items():
        assert name in text
        assert np.isnan(value) or 0 <= value <= 1


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_windows(folder, task, monkeypatch):
    """In windows as a whole, here of the whole picture, they are what `segment` finds."""
    monkeypatch.setattr("pointformer.evaluation.segment", partial(segment, overlap=16))
    kinds = 2 if task == "panoptic" else 1
    dataset = read_folder(folder, "val", "instance", categories=CATEGORIES[-kinds:])
    model = mask_model(task, kinds)
    whole = evaluate(model, dataset, task, tile=64)
    for name, value in evaluate(model, dataset, task, tile=32).items():
        assert np.isnan(value) or 0 <= value <= 1, name
        assert name in whole
    with pytest.raises(ValueError, match="scales, flip: only for the task 'semantic'"):
        evaluate(model, dataset, task, flip=True)


def test_bad_data_is_one_line(folder, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_model(mask_model("semantic"), path)
    Image.fromarray(np.full((40, 52), 7, np.uint8)).save(folder / "val/labels/b.png")
    arguments = ["evaluate", str(folder), "--model", str(path), "--threads", "1"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "b.png" in error
    assert "7" in error
    assert cli.main([*arguments, "--skip-bad"]) == 0
    error = capsys.readouterr().err
    assert "1 skipped:" in error


def test_classes_and_tasks_must_fit(folder):
    dataset = read_folder(folder, "val", "semantic", categories=CATEGORIES)
    with pytest.raises(ValueError, match="made for 'panoptic', not for 'semantic'"):
        evaluate(mask_model("panoptic"), dataset, "semantic")
    with pytest.raises(ValueError, match="has 3 classes, the data set 2"):
        evaluate(mask_model("semantic", 3), dataset, "semantic")
