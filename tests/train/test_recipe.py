"""Recipes: files, changes, what is wrong with them, and what may change within a run."""

from dataclasses import asdict, replace

import pytest

from pointformer.data.transforms import RandomCrop, RandomTurn
from pointformer.train.optimization import Budget
from pointformer.train.recipe import (
    RECIPES,
    Checkpoints,
    Recipe,
    Validation,
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
    [("[1, 2]", "expected the fields of a recipe, got [1, 2]"),
     ("", "expected the fields of a recipe, got None"),
     ("b: 1\na: [1, 2", "expected YAML, but in line 2 expected ',' or ']'"),
     ("batch: 2\nloss: {}\nbatch: 3", "expected YAML, but in line 3 'batch' is there twice"),
     ("loss: {points: 1, points: 2}", "expected YAML, but in line 1 'points' is there twice"),
     ("tsk: 1", "tsk: no such field; did you mean task?"),
     ("optimizer: {lr: 3}", "optimizer.lr: no such field; there are learning_rate, reference_"),
     ("optimizer: 3", "optimizer: expected its fields, learning_rate, reference_batch,"),
     ("augmentation: {crop: {sice: 3}}", "crop.sice: no such field; did you mean size?"),
     ("augmentation: {crop: {size: [1, b]}}",
      "crop.size: expected a whole number or a list of 2 whole numbers, got [1, 'b']"),
     ("augmentation: {crop: {scales: [1, 2]}}", "augmentation.crop.size: expected a whole number"),
     ("batch: many", "batch: expected a whole number, got 'many'")],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.yaml: ") as error:
        read_recipe(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200 + len(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [("batch=0", "batch: expected at least 1, got 0"),
     ("score_weight=-1", "score_weight: expected a number of at least 0, got -1"),
     ("score_weight=.nan", "score_weight: expected a number of at least 0, got nan"),
     ("average=1", r"average: expected a decay in \[0, 1\), got 1"),
     ("init_stages=9", "init_stages: expected none without init, whose stages these are, got 9"),
     ("seed=-1", "seed: expected a number from 0 to"),
     ("optimizer.learning_rate=.nan", r"optimizer\.learning_rate: expected a number of at least 0"),
     ("optimizer.clip=0", r"optimizer\.clip: expected a positive number or null, got 0"),
     ("schedule.warmup=1", r"schedule\.warmup: expected a share in \[0, 1\), got 1"),
     ("schedule.milestones=[2]", r"schedule\.milestones: expected shares from 0 to 1, got \[2"),
     ("budget.steps=-1", r"budget\.steps: expected a positive number, got -1"),
     ("checkpoints.keep=0", r"checkpoints\.keep: expected at least 1, got 0"),
     ("steps", "'steps': expected field=value, as optimizer"),
     ("file=x", "file: no such field"), ("print_config=1", "print_config: no such field"),
     ("budget.minute=3", r"budget\.minute: no such field; did you mean minutes\?"),
     ("budget.minutes=soon", r"budget\.minutes: expected a number or null, got 'soon'"),
     ("batch=", "batch: expected a whole number, got None"),
     ("batch=[1", r"batch: expected YAML, but in line 1 "),
     ("seed=1.5", "seed: expected a whole number, got 1.5"),
     ("task=boxes", "task: expected one of classification, semantic, instance, .*, got 'boxes'"),
     ("optimizer.betas=[1]", r"optimizer\.betas: expected a list of 2 numbers, got \[1\]"),
     ("optimizer=null", r"optimizer: expected its fields, .*, got None"),
     ("options=3", "options: expected names and their values, got 3"),
     ("data.void=[a]", r"data\.void: expected a list of whole numbers or null, got \['a'\]"),
     ("augmentation.crop=3", r"augmentation\.crop: expected its fields, size, scales, .*, got 3"),
     ("augmentation.crop.beyond=sky", r"crop\.beyond: expected one of void, mirror, got 'sky'"),
     ("augmentation.crop.scales=[2,1]", r"crop\.scales: expected two positive numbers that rise"),
     ("augmentation.flip.horizontal=2", r"^augmentation\.flip\.horizontal: expected a number in"),
     ("augmentation.mix.mixup=x", r"augmentation\.mix\.mixup: expected a number, got 'x'"),
     ("model=[1]", r"^model: expected text or null, got \[1\]"),
     ("model=[1", "^model: expected YAML, but in line 1 "),
     ("data.format=", "^data.format: expected text or null, got ''"),
     (f"batch={10**20}", f"batch: expected at most .* pictures, got {10**20}"),
     ("optimizer.betas=[0.9, 1]", r"optimizer\.betas: expected two in \[0, 1\), got \[0\.9, 1"),
     ("checkpoints.steps=0", r"checkpoints\.steps: expected at least 1, got 0"),
     ("checkpoints.minutes=-1", r"checkpoints\.minutes: expected more than 0, got -1"),
     ("validation.tile=0", r"validation\.tile: expected at least 1, got 0"),
     ("validation.times=-1", r"validation\.times: expected at least 0, got -1"),
     ("data.categories=" + "x" * 999, r"categories: expected a list of texts or null, got 'xx")],
)  # fmt: skip
def test_what_cannot_be_is_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        read_recipe("semantic.yaml", [change])
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def test_names_of_files_may_look_like_lists():
    assert read_recipe("semantic.yaml", ["data.path=[old] data"]).data.path == "[old] data"


def test_values_are_taken_as_their_fields_have_them():
    """Text as it stands, numbers also as 1e-3, what is in options as YAML."""
    recipe = read_recipe(
        "semantic.yaml",
        ["data.path=2024: [a", "data.train=null", "optimizer.learning_rate=1e-3", "options.rate=.5",
         "options.curve=snake", "optimizer.clip=2", "options={}", "options.scope=tile",
         "validation.resize={size: [4, 6]}"],
    )  # fmt: skip
    assert (recipe.data.path, recipe.data.train) == ("2024: [a", None)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.clip) == (1e-3, 2.0)
    assert recipe.options == {"scope": "tile"}
    assert recipe.validation.resize.size == (4, 6)


def test_how_pictures_are_read():
    """Numbers and names as the command line takes them."""
    for changes, expected in (
        ([], (None, None, None)),
        (["data.channel=1", "data.plane=0"], (1, 0, None)),
        (["data.channel=0,2,1", "data.plane=z=3", "data.project=mean"], ("0,2,1", "z=3", "mean")),
    ):
        reading = read_recipe("semantic.yaml", changes).data.reading
        assert reading == dict(zip(("channel", "plane", "project"), expected, strict=True))
    with pytest.raises(ValueError, match=r"data.project: expected one of max, mean"):
        read_recipe("semantic.yaml", ["data.project=sum"])
    with pytest.raises(ValueError, match=r"data.channel: is for pictures"):
        read_recipe("point_segmentation.yaml", ["data.channel=1"])


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
    chosen = asdict(replace(recipe, options={**recipe.options, "prior": None}))
    assert recipe.differences(chosen) == ["options.prior None, now not given"]


def test_all_fields_are_described():
    text = describe_fields()
    for name in ("task", "optimizer.learning_rate", "augmentation.crop", "budget.minutes"):
        assert f"    {name} " in text
    assert "--" not in text
    for line in text.splitlines():  # of the parser's own help no ends are left
        assert line.strip() not in ("exit.", "and exit.", "Path to a configuration file.")
    assert "the highest, of the head" in text
    words = " ".join(text.split())
    for part in ("augmentation.crop: size, scales=", "rates: least", "validation.resize: size,",
                 "of aff_*: dims", "reserve_share=", "of the head stars: channels=64"):  # fmt: skip
        assert part in words
    assert Recipe().budget == Budget()


@pytest.mark.parametrize("task", ["classification", "point_segmentation"])
def test_scores_learn_from_outlines_only(task):
    with pytest.raises(ValueError, match=f"score_weight: no outlines are annotated for '{task}'"):
        read_recipe(None, ["score_weight=1"], task=task)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [("semantic.yaml", "seed=4294967296", "seed: expected a number from 0 to"),
     ("semantic.yaml", "score_weight=.inf", "score_weight: expected a number of at least 0"),
     ("semantic.yaml", "checkpoints.minutes=0", r"checkpoints\.minutes: expected more than 0, got"),
     ("semantic.yaml", "validation.pictures=0", r"validation\.pictures: expected at least 1, got"),
     ("semantic.yaml", "schedule.warmup=-0.1", r"schedule\.warmup: expected a share"),
     ("semantic.yaml", "schedule.start=.nan", r"schedule\.start: expected a number from 0 to 1"),
     ("semantic.yaml", "schedule.end=-1", r"schedule\.end: expected a number from 0 to 1, got -1"),
     ("semantic.yaml", "schedule.power=-1", r"schedule\.power: expected a number of at least 0"),
     ("semantic.yaml", "schedule.power=.inf", r"schedule\.power: expected a number of at least 0"),
     ("semantic.yaml", "optimizer.eps=.inf", r"optimizer\.eps: expected a number of at least 0"),
     ("semantic.yaml", "optimizer.reference_batch=0", "expected at least 1 or null, got 0"),
     ("semantic.yaml", "optimizer={x", r"optimizer: .*line 1"),
     ("semantic.yaml", "budget.epochs=.inf", r"budget\.epochs: expected a positive number"),
     ("semantic.yaml", "budget.minutes=.inf", r"budget\.minutes: expected a positive number"),
     ("point_segmentation.yaml", "validation.tile=64", r"validation\.tile: is for pictures"),
     ("point_segmentation.yaml", "validation.crop.size=64", r"validation\.crop: is for pictures"),
     ("elsewhere/semantic.yaml", "batch=1", "elsewhere/semantic.yaml: no such file")],
)  # fmt: skip
def test_recipes_that_cannot_be(name, change, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(name, [change, "optimizer.clip=1"])


def test_options_and_bad_pictures_in_other_runs():
    """Options where there were none are said one by one; what is left out is in the digest."""
    recipe = read_recipe("semantic.yaml", ["options={}"])
    some = replace(recipe, options={"alpha": 2.0}, data=replace(recipe.data, skip_bad=True))
    assert recipe.differences(asdict(some)) == ["options.alpha 2.0, now not given"]
    assert some.differences(asdict(recipe)) == ["options.alpha not given, now 2.0"]


def test_defaults():
    assert asdict(Checkpoints()) == {"minutes": 5.0, "steps": None, "keep": 3}
    assert asdict(Validation()) == {
        "times": 4, "pictures": 16, "token_maps": 2, "resize": None, "crop": None, "tile": None,
    }  # fmt: skip


@pytest.mark.parametrize("change", ["accumulate=2", "data.val_share=0.2"])
def test_what_decides_the_result_may_not_change_within_a_run(change):
    recipe = read_recipe("instance.yaml", ["batch=8"])
    other = read_recipe("instance.yaml", ["batch=8", change])
    (difference,) = other.differences(asdict(recipe))
    assert difference.startswith(change.partition("=")[0])


def test_pictures_are_changed_in_this_order():
    names = ("resized_crop", "crop", "flip", "turn", "jitter", "curves", "rand_augment", "erase")
    changes = [f"augmentation.{n}={{}}" for n in names if "crop" not in n]
    changes += [f"augmentation.{n}.size=8" for n in names if "crop" in n]
    chain = read_recipe("classification.yaml", ["augmentation={}", *changes]).augmentation
    assert list(chain.transform().transforms) == [getattr(chain, name) for name in names]
