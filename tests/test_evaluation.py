"""`pointformer evaluate` and what it is made of, on small synthetic data sets."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from pointformer import cli
from pointformer.data import Annotation, Category, Dataset, Segment, read_folder
from pointformer.data.annotations import Entry
from pointformer.evaluation import evaluate
from pointformer.models import AFFConfig, Model, save_model
from pointformer.models.postprocess import Instances
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
    result = evaluate(mask_model("semantic"), dataset, "semantic")
    assert result.pictures == 2
    assert result.scores == {"mIoU": 1.0, "mean accuracy": 1.0, "pixel accuracy": 1.0}


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
        assert value is None or 0 <= value <= 1


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_windows(folder, task, monkeypatch):
    """In windows as a whole, here of the whole picture, they are what `segment` finds."""
    monkeypatch.setattr("pointformer.evaluation.segment", partial(segment, overlap=16))
    kinds = 2 if task == "panoptic" else 1
    dataset = read_folder(folder, "val", "instance", categories=CATEGORIES[-kinds:])
    model = mask_model(task, kinds)
    whole = evaluate(model, dataset, task, tile=64).scores
    for name, value in evaluate(model, dataset, task, tile=32).scores.items():
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


def test_only_objects_that_can_be_told_apart_count(tmp_path, monkeypatch):
    """The truth as prediction is perfect, with stuff, a crowd and what is found on it."""
    ids = np.zeros((30, 40), np.int32)
    ids[2:10, 2:10], ids[12:20, 5:15], ids[:, 20:30], ids[:, 32:] = 1, 2, 3, 4
    segments = (
        Segment(1, 1, 64),
        Segment(2, 1, 80),
        Segment(3, 0, 300),
        Segment(4, 1, 240, crowd=True),
    )
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    annotation = Annotation("a", tmp_path / "a.png", (30, 40), 1, None, ids, segments)
    entry = Entry("a", annotation.image, None, lambda: annotation)
    dataset = Dataset(tmp_path, CATEGORIES, [entry])
    masks = torch.stack([torch.from_numpy(ids == n) for n in (1, 2, 4)])
    found = Instances(masks, torch.tensor([1, 1, 1]), torch.ones(3))
    monkeypatch.setattr("pointformer.models.inference.predict", lambda *args: found)
    scores = evaluate(mask_model("instance"), dataset, "instance").scores
    assert scores["AP at IoU 0.5 (TP / (TP + FP + FN))"] == 1
    assert scores["COCO AP"] == 1


def test_unreadable_pictures_are_skipped_and_not_counted(folder, tmp_path, capsys):
    path, out = tmp_path / "model.safetensors", tmp_path / "scores.json"
    save_model(mask_model("semantic"), path)
    noise = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    picture = folder / "val/images/a.jpg"
    Image.fromarray(noise).save(picture)
    picture.write_bytes(picture.read_bytes()[:-800])
    (folder / "val/images/a.png").unlink()
    arguments = ["evaluate", str(folder), "--model", str(path), "--threads", "1"]
    assert cli.main(arguments) == 1
    assert "a.jpg: expected a picture" in capsys.readouterr().err
    assert cli.main([*arguments, "--skip-bad", "--json", str(out)]) == 0
    content = json.loads(out.read_text(), parse_constant=pytest.fail)  # no NaN
    assert content["images"] == 1
    assert list(content["skipped"]) == ["a"]
    capsys.readouterr()
    assert cli.main([*arguments, "--limit", "0"]) == 1
    assert "no picture to score" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scales", "-1"], "scales: expected positive numbers"),
        (["--tile", "0"], "tile: expected at least 1 pixel, got 0"),
        (["--device", "nowhere"], "--device: nowhere cannot be used"),
    ],
)
def test_bad_options_are_one_line(folder, tmp_path, capsys, options, message):
    save_model(mask_model("semantic"), tmp_path / "model.safetensors")
    arguments = ["evaluate", str(folder), "--model", str(tmp_path / "model.safetensors")]
    assert cli.main([*arguments, "--threads", "1", *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 or "image" in error  # beside the progress bar


def test_models_that_cannot_do_a_task_are_told(folder):
    dataset = read_folder(folder, "val", "semantic", categories=CATEGORIES)
    options = {"task": None, "impl": None}
    for head, classes, task in (
        ("classification", 2, "semantic"),
        ("features", 2, "semantic"),
        ("dense", 3, "semantic"),
        ("dense", 2, "instance"),
        ("dense", 3, "panoptic"),
        ("mask2former", 2, "instance"),
    ):
        model = Model("small", SMALL, head, classes, **options)
        with pytest.raises(ValueError, match="model: "):
            evaluate(model, dataset, task)
    model = Model("small", SMALL, "dense", 2, task="semantic").eval()
    assert 0 <= evaluate(model, dataset, "semantic").scores["mIoU"] <= 1
    for head, task in (
        ("dense", "panoptic"),
        ("dense", "instance"),
        ("classification", "instance"),
    ):
        with pytest.raises(ValueError, match=f"task: head '{head}' with 2 classes"):
            Model("small", SMALL, head, 2, task=task)


def test_skip_bad_lists_single_objects_too(tmp_path, capsys):
    """A COCO file with two bad objects, a picture that is ambiguous and a heading of categories."""
    square = [[4, 4, 20, 4, 20, 20, 4, 20]]
    row = {"image_id": 1, "category_id": 1, "segmentation": square}
    content = {
        "categories": [
            {"id": 0, "name": "cells", "supercategory": "none"},
            {"id": 1, "name": "cell", "supercategory": "cells"},
        ],
        "images": [
            {"id": n, "file_name": name} for n, name in ((1, "a.png"), (2, "b.png"), (2, "c.png"))
        ],
        "annotations": [
            {**row, "id": 1},
            {**row, "id": 2, "segmentation": []},
            {**row, "id": 3, "category_id": 9},
            {**row, "id": 4, "image_id": 2},
        ],
    }
    path, out = tmp_path / "instances.json", tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    for name in "abc":
        noise = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    model = tmp_path / "model.safetensors"
    save_model(mask_model("instance", 1), model)
    arguments = [
        "evaluate", tmp_path, "--format", "coco", "--annotations", path, "--model", model,
        "--threads", 1, "--json", out,
    ]  # fmt: skip
    arguments = [str(a) for a in arguments]
    assert cli.main(arguments) == 1
    assert "skip_bad (--skip-bad) leaves out what is bad" in capsys.readouterr().err
    assert cli.main([*arguments, "--skip-bad"]) == 0
    error = capsys.readouterr().err
    assert "5 skipped" in error
    report = json.loads(out.read_text())
    assert report["images"] == 1
    assert sorted(report["skipped"]) == ["annotation 2", "annotation 3", "b", "c", "category 0"]
    for problem in report["skipped"].values():
        assert problem in error


def test_the_default_split_of_ade20k_is_validation(folder, tmp_path, capsys):
    for kind, old in (("images", "images"), ("annotations", "labels")):
        (tmp_path / "ade" / kind).mkdir(parents=True)
        (folder / "val" / old).rename(tmp_path / "ade" / kind / "validation")
    path = tmp_path / "model.safetensors"
    save_model(mask_model("semantic", 150), path)
    arguments = [
        "evaluate",
        tmp_path / "ade",
        "--format",
        "ade20k",
        "--model",
        path,
        "--threads",
        1,
    ]
    assert cli.main([str(a) for a in arguments]) == 0
    assert "mIoU" in capsys.readouterr().out
