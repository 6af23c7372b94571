"""The recipes of the package: each makes its model, and trains."""

import re
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch

from helpers.clouds import write_objects, write_scenes
from helpers.training import dataset_of, trainer_of
from pointformer import cli
from pointformer.annotations import Category
from pointformer.data import ADE20K, CITYSCAPES, CITYSCAPES_THINGS, COCO
from pointformer.data.transforms import (
    CenterCrop,
    Mix,
    RandAugment,
    RandomCrop,
    RandomFlip,
    RandomResizedCrop,
    Resize,
)
from pointformer.models import load_model
from pointformer.rates import Rates
from pointformer.train.initial import make_model
from pointformer.train.loading import Batches
from pointformer.train.logs import read_table
from pointformer.train.recipe import RECIPES, read_recipe, write_recipe
from pointformer.train.run import train

NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))
SMALL = [
    "options.dims=[16,16,16,16]", "options.depths=[1,1,1,1]", "options.heads=[2,2,2,2]",
    "batch=4", "workers=0",
]  # fmt: skip
SMALL_HEAD = [
    "options.queries=8", "options.dim=32", "options.hidden=32", "options.pixel_hidden=32",
    "options.pixel_layers=1", "options.decoder_layers=2", "loss.points=128",
]  # fmt: skip
NUCLEUS = [Category(1, "nucleus")]
OF_POINTS = [name for name in NAMES if read_recipe(name).task.startswith("point_")]
OF_PICTURES = [name for name in NAMES if name not in OF_POINTS]
PUBLISHED = {  # classes, and millions of parameters, of which the published parts are made
    "imagenet_mini.yaml": (1000, {"aff_mini": 6.75, "aff_mini_1_5th": 6.75}),
    "imagenet_tiny.yaml": (1000, {"aff_tiny": 27.0, "aff_tiny_1_5th": 27.0}),
    "imagenet_small.yaml": (1000, {"aff_small": 42.6, "aff_small_1_5th": 42.6}),
    "imagenet22k_base.yaml": (1000, {"aff_base": 75.34}),
    "imagenet_base_384.yaml": (1000, {"aff_base_384": 75.34}),
    "ade20k.yaml": (ADE20K, {"aff_tiny": 46.0, "aff_tiny_1_5th": 46.0, "aff_small": 61.5}),
    "cityscapes_instance.yaml": (CITYSCAPES_THINGS, {"aff_tiny": 45.9, "aff_base_384": 94.6}),
    "cityscapes_panoptic.yaml": (CITYSCAPES, {"aff_tiny": 45.9, "aff_base_384": 94.6}),
    "coco.yaml": (COCO, {"aff_tiny": 46.0, "aff_mini": 26.0}),
}


@pytest.mark.parametrize("name", NAMES)
def test_recipes_make_their_models(name):
    """Of full size, without memory; parameters are those of the published models."""
    classes, sizes = PUBLISHED.get(name, (NUCLEUS, {None: None}))
    if isinstance(classes, int):
        classes = [Category(n, str(n)) for n in range(classes)]
    for model_name, millions in sizes.items():
        recipe = read_recipe(name, model=model_name)
        with torch.device("meta"):
            model = make_model(recipe, classes)
        assert model.task == recipe.task
        if millions is not None:
            count = sum(p.numel() for p in model.parameters()) / 1e6
            assert count == pytest.approx(millions, rel=0.02), model_name
        groups = recipe.optimizer.make(model, recipe.batch).param_groups
        assert max(group["rate"] for group in groups) == pytest.approx(
            4e-3 if name.startswith(("imagenet_", "imagenet22k")) and "384" not in name
            else 1.6e-4 if "384" in name else recipe.optimizer.learning_rate
        )  # fmt: skip


CLASSIFIERS = {  # highest rate, decay, epochs, of these warm-up, least rates, drop path, pixels
    "imagenet_mini.yaml": (4e-3, 0.05, 300, 20, (4e-6, 4e-5), 0.0, 224),
    "imagenet_tiny.yaml": (4e-3, 0.05, 300, 20, (4e-6, 4e-5), 0.2, 224),
    "imagenet_small.yaml": (4e-3, 0.05, 300, 20, (4e-6, 4e-5), 0.3, 224),
    "imagenet22k_base.yaml": (4e-3, 0.05, 90, 5, (1e-6, 1e-5), 0.2, 224),
    "imagenet_base_384.yaml": (1.6e-4, 1e-8, 30, 5, (1.6e-7, 1.6e-6), 0.2, 384),
}
MASKS = {  # alpha, power, learned; batch, steps; crop, scales of a shorter side, at most; tested in
    "ade20k.yaml": (4, 6, True, 32, 80_000, (512, 512), 512, 2048, (512, 2048)),
    "cityscapes_instance.yaml": (8, 6, True, 32, 45_000, (512, 1024), 1024, 4096, (1024, 2048)),
    "cityscapes_panoptic.yaml": (8, 6, True, 32, 45_000, (512, 1024), 1024, 4096, (1024, 2048)),
    "coco.yaml": (4, 4, False, 64, 92_188, (1024, 1024), None, None, (800, 1333)),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_published_values_of_classifiers(name):
    rate, decay, epochs, warmup, (first, last), drop_path, pixels = CLASSIFIERS[name]
    recipe = read_recipe(name)
    with torch.device("meta"):
        model = make_model(recipe, [Category(n, str(n)) for n in range(9)])
    groups = recipe.optimizer.make(model, recipe.batch).param_groups
    schedule = recipe.schedule
    assert (recipe.batch, recipe.budget.epochs, schedule.kind) == (4096, epochs, "cosine")
    assert {group["weight_decay"] for group in groups} == {0, decay}
    assert (recipe.optimizer.betas, recipe.optimizer.eps) == ((0.9, 0.999), 1e-8)
    assert recipe.optimizer.clip == 5
    assert [group["rate"] for group in groups] == pytest.approx([rate] * len(groups))
    assert schedule.warmup * epochs == pytest.approx(warmup, abs=0.02)
    assert [rate * schedule.factor(used) for used in (0, 1)] == pytest.approx([first, last])
    assert (model.config.drop_path, recipe.loss["smoothing"]) == (drop_path, 0.1)
    augmentation = recipe.augmentation
    assert augmentation.resized_crop == RandomResizedCrop(pixels)
    assert augmentation.rand_augment == RandAugment(2, 9, 0.5)
    assert augmentation.erase.probability == 0.25
    assert augmentation.mix == (None if "mini" in name else Mix(0.8, 1.0))
    direct = pixels == 384
    assert recipe.validation.resize == Resize((384, 384) if direct else 256)
    assert recipe.validation.crop == (None if direct else CenterCrop(224))


@pytest.mark.parametrize("name", MASKS)
def test_published_values_of_segmentation(name):
    alpha, power, learned, batch, steps, crop, short, longest, tested = MASKS[name]
    recipe = read_recipe(name)
    with torch.device("meta"):
        model = make_model(recipe, [Category(n, str(n)) for n in range(9)])
    config, layer = model.config, model.head.pixel_decoder.layers[0].attn
    assert (config.alpha, config.drop_path, set(config.neighborhood_size)) == (alpha, 0.3, {48})
    assert model.head_options.get("power", 6) == power
    assert isinstance(layer.power, torch.nn.Parameter) == learned
    assert model.head_options.get("queries", 100) == 100
    assert (recipe.batch, recipe.budget.steps, recipe.precision) == (batch, steps, "float32")
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert (optimizer.learning_rate, optimizer.backbone_rate) == (2e-4, 0.1)
    assert (optimizer.weight_decay, optimizer.decay, optimizer.clip) == (0.05, "all", 0.01)
    if short is None:  # after 81,945 and 88,773 steps a tenth each; large-scale jitter
        factors = [schedule.factor(step / steps) for step in (2, 3, 81_944, 81_945, 88_772, 88_773)]
        assert factors == pytest.approx([2 / 3, 1, 1, 0.1, 0.1, 0.01], rel=2e-3)
        expected = RandomCrop(crop[0], (0.1, 2.0), "fit")
    else:
        assert schedule.factor(0.25) == pytest.approx(0.75**0.9)
        size = crop[0] if crop[0] == crop[1] else crop
        expected = RandomCrop(size, (0.5, 2.0), "short", short, longest, choices=16)
        assert recipe.augmentation.jitter is not None
    assert recipe.augmentation.crop == expected
    assert recipe.augmentation.flip == RandomFlip(0.5)
    size = recipe.validation.resize
    assert (size.size, size.longest, size.interpolation) == (*tested, "bilinear")


def one_step(name, folder, *changes, count=4):
    """Losses before and after a step of a recipe, on a stand-in for its data."""
    recipe = read_recipe(name, changes)
    dataset = dataset_of(folder, recipe.task, count)
    trainer = trainer_of(dataset, recipe)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    steps = Batches(
        dataset, recipe.augmentation.transform(), batch=recipe.batch, seed=recipe.seed
    ).steps()
    for _ in range(2):  # where the rate warms up, the first step moves nothing
        trainer.step(next(steps))
    trainer.check()
    assert all(np.isfinite(list(values.values())).all() for values in trainer.recent)
    pairs = zip(before, trainer.model.parameters(), strict=True)
    moved = [not torch.equal(old, new) for old, new in pairs]
    assert np.mean(moved) > 0.7
    return recipe


@pytest.mark.parametrize("name", OF_PICTURES)
def test_recipes_train(name, tmp_path):
    """A step of a narrow model on small pictures."""
    recipe = read_recipe(name)
    crop = "crop" if recipe.augmentation.crop else "resized_crop"
    changes = [*SMALL, f"augmentation.{crop}.size=32", "budget.steps=8"]
    if recipe.head == "mask2former" or recipe.task == "panoptic":
        changes += SMALL_HEAD
    one_step(name, tmp_path, *changes)


@pytest.mark.parametrize("name", OF_POINTS)
def test_recipes_of_points_train(name, tmp_path):
    """From a folder of archives to scores and a file, and on from there."""
    objects = read_recipe(name).task == "point_classification"
    if objects:
        write_objects(tmp_path / "objects.npz")
        own = []
    else:
        write_scenes(tmp_path)
        own = ["data.features=[intensity]", "augmentation.points.region.points=80"]
    out = tmp_path / "run"
    rates = Rates(0.1, 0.9, "apart")
    small = [*SMALL, *own, "budget.epochs=null", "validation.times=1", f"rates={asdict(rates)}"]
    recipe = read_recipe(name, [*small, f"data.path={tmp_path}", "budget.steps=2"])
    lines = []
    with warnings.catch_warnings():  # splits within a file share no points
        warnings.filterwarnings("error", "(?s).*is in both")
        first = train(recipe, out, say=lines.append)
    assert set(first) == {
        *(("top-1 accuracy", "top-5 accuracy") if objects else ("mIoU", "mean accuracy")),
        *(() if objects else ("pixel accuracy",)),
    }
    model = load_model(out / "model.safetensors")
    assert model.task == recipe.task
    assert Rates.of(model) == rates
    assert [c.name for c in model.categories] == (
        ["long", "flat"] if objects else ["ground", "box"]
    )
    recipe = read_recipe(name, [*small, f"data.path={tmp_path}", "budget.steps=4"])
    train(recipe, out, say=lines.append)
    assert any("goes on from" in line for line in lines)
    assert cli.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text("utf-8")
    assert "<h2>What is found, by class</h2>" in page
    assert "<h2>Worst point sets</h2>" in page
    assert "<th>all</th>" in page
    assert ("<th>IoU</th>" in page) != objects
    shares = re.findall(r"<td>[01]\.\d\d <small>\((\d+)\)</small></td>", page)
    # All of the split, but void points; of objects some splits have a share of those for training.
    count = int(read_table(out / "scores.csv")["pictures"][-1])
    assert sum(map(int, shares)) == (count if objects else 120)
    assert page.count("data:image/jpeg") == count


@pytest.mark.long
@pytest.mark.parametrize("name", OF_PICTURES)
def test_recipes_train_at_full_width(name, tmp_path):
    recipe = read_recipe(name)
    crop = "crop" if recipe.augmentation.crop else "resized_crop"
    one_step(name, tmp_path, f"augmentation.{crop}.size=64", "batch=2", "budget.steps=8", count=2)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_written_as_they_are_read(name, tmp_path):
    recipe = read_recipe(name)
    (tmp_path / "written.yaml").write_text(write_recipe(recipe), "utf-8")
    assert read_recipe(tmp_path / "written.yaml") == recipe
