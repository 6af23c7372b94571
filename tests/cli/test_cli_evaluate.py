"""`evaluate`: what a data set holds is read as it was in the training of the model."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers.models import SMALL
from helpers.training import KINDS, write_folder
from pointformer import cli, evaluation
from pointformer.annotations import VOID, Category
from pointformer.data import open_dataset
from pointformer.models import Model, save_model


@pytest.fixture
def scored(monkeypatch):
    """The data sets that would be scored."""
    seen = []

    def evaluate(model, dataset, task, **options):
        seen.append(dataset)
        return evaluation.Evaluation({}, len(dataset))

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    return seen


def run(*arguments):
    assert cli.main(["evaluate", *map(str, arguments)]) == 0


def test_void_is_what_it_was_in_training(tmp_path, scored):
    write_folder(tmp_path / "data", train=0, val=1)
    labels = tmp_path / "data/val/labels/0.png"
    classes = np.array(Image.open(labels)) + 1  # as the classes of KINDS are numbered
    classes[:9] = 77
    Image.fromarray(classes).save(labels)
    model = Model("small", SMALL, "dense", len(KINDS), categories=KINDS, task="semantic")
    recipe = {"data": {"void": [77]}}
    save_model(model, tmp_path / "model.safetensors", trained={"recipe": recipe})
    run(tmp_path / "data", "--model", tmp_path / "model.safetensors")
    found = scored[0][0].classes()
    assert (found[:9] == VOID).all()
    assert (found[9:] != VOID).all()


def test_the_model_by_default_is_named(tmp_path, scored, capsys):
    write_folder(tmp_path / "data", train=0, val=1)
    run(tmp_path / "data")
    assert "aff_nano.nuclei, the model by default" in capsys.readouterr().out


def test_scores_of_nothing_say_so(tmp_path, capsys):
    write_folder(tmp_path / "data", train=0, val=1)
    labels = tmp_path / "data/val/instances/0.png"
    Image.fromarray(np.zeros_like(np.array(Image.open(labels)))).save(labels)
    model = Model("small", SMALL, "stars", 1, categories=KINDS[:1], task="instance")
    save_model(model, tmp_path / "model.safetensors")
    run(tmp_path / "data", "--model", tmp_path / "model.safetensors")
    lines = capsys.readouterr().out
    assert "none annotated" in lines
    assert "nan" not in lines


def test_classes_of_coco_are_those_of_the_model_by_name(tmp_path, scored, capsys):
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "a.png")
    row = {"id": 1, "image_id": 1, "category_id": 2, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [row],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    for names in (("cat", "dog"), ("car", "boat"), ("0", "1")):
        classes = [Category(n, name) for n, name in enumerate(names)]
        model = Model("small", SMALL, "stars", 2, categories=classes, task="instance")
        save_model(model, tmp_path / f"{names[0]}.safetensors")
    run(tmp_path, "--model", tmp_path / "cat.safetensors")
    assert [segment.category for segment in scored[0][0].segments] == [0]
    run(tmp_path, "--model", tmp_path / "0.safetensors")
    assert [segment.category for segment in scored[1][0].segments] == [1]
    assert cli.main(["evaluate", str(tmp_path), "--model", str(tmp_path / "car.safetensors")]) == 1
    assert "lists the classes ['dog', 'cat']" in capsys.readouterr().err


def test_the_share_that_training_kept_is_scored(tmp_path, scored, capsys):
    def evaluate(data, *arguments):
        run(data, "--model", tmp_path / "model.safetensors", *arguments)
        return [e.name for e in scored.pop().entries], capsys.readouterr().err

    data = write_folder(tmp_path / "mine", train=9, val=1) / "train"
    whole = open_dataset(data)
    training, kept = whole.divided(0.3, seed=5)
    everything, held_back = ([e.name for e in part.entries] for part in (whole, kept))
    recipe = {"data": {"path": "train", "val_share": 0.3}, "seed": 5}
    model = Model("small", SMALL, "dense", 2, task="semantic", categories=whole.categories)
    trained = {"recipe": recipe, "pictures": training.digest}
    save_model(model, tmp_path / "model.safetensors", trained=trained)
    names, error = evaluate(data)
    assert names == held_back
    assert "trained on all but 3 of its 9 pictures, which are scored" in error
    names, error = evaluate(data, "--split", "")
    assert names == everything
    assert "perhaps on some of these pictures" in error
    assert evaluate(tmp_path / "mine") == (["0"], "")  # has splits
    data.rename(tmp_path / "other")
    assert evaluate(tmp_path / "other") == (everything, "")
    (tmp_path / "other").rename(data)
    (data / "images/0.png").rename(data / "images/new.png")
    (data / "labels/0.png").rename(data / "labels/new.png")
    names, error = evaluate(data)
    assert len(names) == 9
    assert "perhaps on some of these pictures" in error
    trained = {"recipe": recipe, "pictures": open_dataset(data).digest}
    save_model(model, tmp_path / "model.safetensors", trained=trained)
    names, error = evaluate(data)
    assert len(names) == 9
    assert "trained on these pictures" in error


def test_long_lists_of_what_was_skipped_are_short(tmp_path, capsys):
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "a.png")
    row = {"image_id": 1, "category_id": 1}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [
            {"id": 0, **row, "segmentation": [[1, 1, 9, 1, 9, 9]]},
            *({"id": n, **row, "segmentation": []} for n in range(1, 100)),
        ],
        "categories": [{"id": 1, "name": "nucleus"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    model = Model("small", SMALL, "stars", 1, categories=KINDS[:1], task="instance")
    save_model(model, tmp_path / "model.safetensors")
    arguments = ("--model", tmp_path / "model.safetensors", "--json", tmp_path / "scores.json")
    run(tmp_path, *arguments, "--skip-bad")
    lines = capsys.readouterr().err.splitlines()
    start = lines.index("99 skipped:")
    assert len(lines) == start + 7
    assert "a box alone is none" in lines[start + 5]
    assert lines[-1] == "  and 94 more"
    assert len(json.loads((tmp_path / "scores.json").read_text())["skipped"]) == 99
