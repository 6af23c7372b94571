"""`evaluate`: which classes a data set has is known by the model where its files do not tell."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.models import SMALL
from helpers.tiles import write_point_model
from helpers.training import KINDS, write_folder
from pointformer import TokenSet, cli, evaluation
from pointformer.annotations import VOID
from pointformer.data.points import write_points
from pointformer.models import Model, load_model, save_model


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


def test_scenes_without_some_classes_and_with_others(tmp_path, scored):
    """As many as the model has, so that their number tells nothing."""
    model = write_point_model(tmp_path / "model.safetensors")
    codes = torch.tensor([3, 9, 1, 12], dtype=torch.uint8).repeat(5)
    fields = {"classification": codes, "intensity": torch.arange(20, dtype=torch.int32)}
    points = TokenSet.from_world(torch.rand(20, 3, dtype=torch.float64), fields=fields)
    write_points(tmp_path / "tiles.las", points)
    run(tmp_path / "tiles.las", "--model", model)
    assert scored[0].categories == load_model(model).categories
    assert scored[0][0].labels.tolist() == [2, VOID, 0, VOID] * 5


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
