"""Recipes: files, changes, what is wrong with them, and what may change within a run."""

from dataclasses import asdict, replace

import pytest

from pointformer.data.transforms import RandomCrop, RandomTurn
from pointformer.train.optimization import Budget
from pointformer.train.recipe import (
    RECIPES,
    Recipe,
    describe_fields,
    read_recipe,
    write_recipe,
)


def test_a_file_and_changes_of_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "task: instance\nmodel: aff_nano\noptions: {alpha: 2, queries: 20}\n"
        "augmentation:\n  crop: {size: 100, beyond: mirror}\n  turn: {}\nbudget: {epochs: 3}\n"
    )
    recipe = read_recipe(
        path,
        ["augmentation.crop.size=[64,32]", "options.alpha=4", "budget={minutes: 2}",
         "optimizer.betas=[0.9,0.98]", "model=aff_mini", "augmentation.turn=null"],
        model="aff_tiny", task=None,
    )  # fmt: skip
    assert recipe.augmentation.crop == RandomCrop((64, 32), beyond="mirror")
    assert recipe.augmentation.turn is None
    assert read_recipe(path).augmentation.turn == RandomTurn()
    assert recipe.options == {"alpha": 4, "queries": 20}
    assert (recipe.task, recipe.model) == ("instance", "aff_mini")
    assert recipe.optimizer.betas == (0.9, 0.98)
    assert recipe.budget.minutes == 2
    assert read_recipe(path, model="aff_tiny").model == "aff_tiny"


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_what_is_written_is_read_again(tmp_path, name):
    recipe = read_recipe(name)
    (tmp_path / "recipe.yaml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_task_has_a_recipe_to_start_from():
    for task in ("semantic", "instance", "panoptic", "classification"):
        assert read_recipe(task=task) == read_recipe(f"{task}.yaml")
    assert read_recipe() == read_recipe("semantic.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2]", "Unexpected config"), ("", "Unexpected config"), ("a: [1, 2", "Problems parsing"),
     ("tsk: 1", "'tsk'"), ("optimizer: {lr: 3}", "'lr'"),
     ("optimizer: 3", "optimizer: expected its fields, got 3"),
     ("augmentation: {crop: {sice: 3}}", "'sice'"), ("batch: many", '"batch"')],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.yaml: ") as error:
        read_recipe(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [("batch=0", "batch: expected at least 1, got 0"),
     ("average=1", r"average: expected a decay in \[0, 1\), got 1"),
     ("seed=-1", "seed: expected a number from 0 to"),
     ("optimizer.learning_rate=.nan", r"optimizer\.learning_rate: expected a number of at least 0"),
     ("optimizer.clip=0", r"optimizer\.clip: expected a positive number or null, got 0"),
     ("schedule.warmup=1", r"schedule\.warmup: expected a share in \[0, 1\), got 1"),
     ("schedule.milestones=[2]", r"schedule\.milestones: expected shares from 0 to 1, got \[2"),
     ("budget.steps=-1", r"budget\.steps: expected a positive number, got -1"),
     ("checkpoints.keep=0", r"checkpoints\.keep: expected at least 1, got 0"),
     ("steps", "steps: expected field=value, of the fields task, model"),
     ("file=x", "file=x: expected field=value"), ("print_config=1", "print_config=1: expected")],
)  # fmt: skip
def test_what_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("semantic.yaml", [change])


def test_what_may_change_within_a_run():
    recipe = read_recipe("nuclei.yaml", ["data.path=here"])
    other = replace(
        recipe, budget=Budget(epochs=3), workers=4, log_every=1,
        data=replace(recipe.data, path="there"),
    )  # fmt: skip
    assert recipe.differences(asdict(other)) == []
    changed = replace(other, seed=1, optimizer=replace(other.optimizer, betas=(0.9, 0.99)))
    assert recipe.differences(asdict(changed)) == [
        "optimizer.betas (0.9, 0.99), now (0.9, 0.98)",
        "seed 1, now 0",
    ]
    older = asdict(recipe)
    del older["seed"]  # of a version that had no such field
    assert recipe.differences(older) == ["seed None, now 0"]


def test_all_fields_are_described():
    text = describe_fields()
    for name in ("task", "optimizer.learning_rate", "augmentation.crop", "budget.minutes"):
        assert f"    {name} " in text
    assert "--" not in text
    assert "the highest, of the head" in text
    assert Recipe().budget == Budget()
