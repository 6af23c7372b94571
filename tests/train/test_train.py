"""The training loop on made-up pictures, with a tiny model."""

import atexit
import copy
import functools
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pointformer.annotations import Category
from pointformer.data import Annotation, Dataset
from pointformer.data.annotations import Entry
from pointformer.metrics import average_precision
from pointformer.models import create_model
from pointformer.tasks.borders import dense_loss, instance_target
from pointformer.tasks.instance import InstanceBorders
from pointformer.tasks.masks import targets_of
from pointformer.train.nuclei import (
    Budget,
    Recipe,
    Trainer,
    learning_rate_factor,
    main,
    parameter_groups,
    score,
    train,
)

NUCLEI = InstanceBorders([Category(1, "nucleus")])
RECIPE = Recipe(batch=2, crop=32, learning_rate=1e-2)


class TinyModel(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 3, 1)
        )
        self.dropout = nn.Dropout(dropout)

    def preprocess(self, image):
        return image.float() / 127.5 - 1

    def forward(self, images, with_stages=False):
        output = self.layers(self.dropout(images))
        return (output, []) if with_stages else output


class WithBackbone(TinyModel):
    def __init__(self):
        super().__init__()
        self.backbone, self.layers = self.layers[0], self.layers[1:]

    def forward(self, images, with_stages=False):
        return self.layers(self.backbone(images))


@functools.cache
def folder():
    path = tempfile.TemporaryDirectory()
    atexit.register(path.cleanup)
    return Path(path.name)


def blobs(count, seed=0):
    """A data set of pictures with three disks each."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((48, 40))
    entries = []
    for index in range(count):
        instances = np.zeros((48, 40), np.int32)
        for blob in range(1, 4):
            cy, cx = rng.uniform(6, 34, 2)
            instances[(y - cy) ** 2 + (x - cx) ** 2 < 30] = blob
        gray = 40 + 150 * (instances > 0) + rng.integers(0, 20, instances.shape)
        image = np.repeat(gray[..., None], 3, 2).astype(np.uint8)
        file = folder() / f"{seed}_{index}.png"
        Image.fromarray(image).save(file)
        annotation = Annotation.of_objects(instances, str(index), file)
        entries.append(Entry(str(index), file, None, lambda annotation=annotation: annotation))
    return Dataset(folder(), NUCLEI.categories, entries)


def trainer(budget, recipe=RECIPE, dropout=0.0):
    torch.manual_seed(0)
    return Trainer(TinyModel(dropout), NUCLEI, blobs(4), recipe, budget)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    """With something random in the model too."""
    whole = trainer(Budget(steps=8), dropout=0.5)
    losses = [whole.step() for _ in range(8)]
    assert whole.used == 1
    first = trainer(Budget(steps=8), dropout=0.5)
    assert [first.step() for _ in range(5)] == losses[:5]
    first.save(tmp_path / "checkpoint.pt")
    second = trainer(Budget(steps=8), dropout=0.5)
    second.load(tmp_path / "checkpoint.pt")
    assert second.steps == 5
    assert [second.step() for _ in range(3)] == losses[5:]
    assert same(second.model.state_dict(), whole.model.state_dict())
    assert same(second.averaged.state_dict(), whole.averaged.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    third = trainer(Budget(steps=8), Recipe(batch=3, crop=32, learning_rate=1e-2))
    with pytest.raises(ValueError, match="another recipe: batch 2, now 3"):
        third.load(tmp_path / "checkpoint.pt")
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.pt: expected a checkpoint"):
            third.load(tmp_path / "broken.pt")


def test_a_step_by_hand():
    """AdamW on clipped gradients, the backbone slower; then the moving average, whose memory is
    shorter at first, and the latest statistics."""
    recipe = Recipe(
        batch=2, crop=32, learning_rate=1e-2, backbone_rate=0.25, average=0.3, warmup=0.5
    )
    torch.manual_seed(0)
    model = WithBackbone()
    run = Trainer(model, copy.copy(NUCLEI), blobs(4), recipe, Budget(steps=4))
    plain = run.task.loss
    run.task.loss = lambda *args: {name: 1e4 * term for name, term in plain(*args).items()}
    average = {name: p.clone() for name, p in run.averaged.named_parameters()}
    for step in range(3):
        run.step()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert grads.norm().item() == pytest.approx(1, rel=1e-3)
        factor = learning_rate_factor(step / 4, 0.5)
        rates = {
            id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]
        }
        for name, parameter in model.named_parameters():
            slower = 0.25 if name.startswith("backbone") else 1.0
            assert rates[id(parameter)] == pytest.approx(1e-2 * factor * slower)
        decay = min(0.3, (2 + step) / (11 + step))
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
            found = run.averaged.get_parameter(name)
            torch.testing.assert_close(found, average[name])
        for found, latest in zip(run.averaged.buffers(), model.buffers(), strict=True):
            assert torch.equal(found, latest)
    assert not run.averaged.training


def test_the_recipes_class_weights_are_used():
    logits = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = np.zeros((8, 8), np.int32)
    ids[2:5, 1:7], ids[5:7, 2:6] = 1, 2
    target = torch.from_numpy(instance_target(ids)).long()[None]
    assert target.unique().tolist() == [0, 1, 2]
    model = Recipe().create()
    for inside, border in ((1.0, 3.0), (2.5, 6.0)):
        task = Recipe(inside_weight=inside, border_weight=border).task(model)
        expected = dense_loss(logits, target, torch.tensor([1.0, inside, border]))
        torch.testing.assert_close(task.loss(logits, [Annotation.of_objects(ids)]), expected)


def test_the_average_is_scored_and_saved(tmp_path, monkeypatch):
    seen = {}

    def evaluate(model, *args, **options):
        seen["scored"] = model
        raise StopIteration

    run = trainer(Budget(steps=1))
    monkeypatch.setattr("pointformer.train.nuclei.evaluate", evaluate)
    with pytest.raises(StopIteration):
        train(run, blobs(1), tmp_path)
    assert seen["scored"] is run.averaged
    monkeypatch.setattr("pointformer.train.nuclei.read_folder", lambda *_: blobs(1))
    monkeypatch.setattr(
        "pointformer.train.nuclei.train",
        lambda trainer, *_, **__: seen.update(trainer=trainer) or average_precision([]),
    )
    monkeypatch.setattr(
        "pointformer.train.nuclei.save_model",
        lambda model, path, trained: seen.update(saved=model, trained=trained),
    )
    assert main(["--data", "x", "--out", str(tmp_path / "out"), "--steps", "1"]) == 0
    assert seen["saved"] is seen["trainer"].averaged
    assert seen["trained"]["recipe"] == asdict(Recipe())
    assert (seen["trained"]["data"], seen["trained"]["steps"]) == ("x", 0)


def test_training_learns_logs_and_scores(tmp_path):
    run = trainer(Budget(steps=200))
    pictures = blobs(3, seed=1)
    before = score(run, pictures, pictures).at(0.5)
    result = train(run, pictures, tmp_path, checkpoint_minutes=0.0)
    assert result.at(0.5) > max(before, 0.3)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert log[-1]["validation"]["AP50"] == result.at(0.5)
    assert (tmp_path / "checkpoint.pt").exists()


def test_loss_is_least_for_the_truth_and_counts_the_classes():
    target = torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 2.0, 6.0])
    truth = 20 * nn.functional.one_hot(target, 3).movedim(-1, 1).float()
    uniform = torch.zeros(2, 3, 16, 16)
    assert sum(dense_loss(truth, target, weights).values()) < 1e-3
    # All classes equally likely: log 3, and per class Dice (2 n/3 + 100) / (n + N/3 + 100).
    pixels = target.numel()
    dice = [
        (2 * n / 3 + 100) / (n + pixels / 3 + 100) for n in target.unique(return_counts=True)[1]
    ]
    expected = math.log(3) + 1 - float(sum(dice[1:])) / 2
    assert sum(dense_loss(uniform, target, weights).values()).item() == pytest.approx(
        expected, rel=1e-5
    )
    absent = torch.zeros_like(target)
    assert torch.isfinite(sum(dense_loss(uniform, absent, weights).values()))


def test_schedule_and_budget():
    assert learning_rate_factor(0.0, 0.1) == 0
    assert learning_rate_factor(0.05, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(0.1, 0.1) == pytest.approx(1)
    assert learning_rate_factor(0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 0.1) == pytest.approx(0)
    assert Budget(steps=10, minutes=1).used(5, 45) == 0.75
    assert Budget(minutes=1).used(10**6, 90) == 1


def test_only_matrices_decay():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 3), "head": TinyModel()})
    groups = parameter_groups(model, 0.1, backbone_rate=0.25)
    assert [group["weight_decay"] for group in groups] == [0.1, 0, 0.1, 0]
    assert [group["factor"] for group in groups] == [1, 1, 0.25, 0.25]
    assert [len(group["params"]) for group in groups] == [2, 4, 1, 1]
    assert all(p.dim() > 1 for group in groups[::2] for p in group["params"])
    assert all(p.dim() <= 1 for group in groups[1::2] for p in group["params"])
    assert [len(group["params"]) for group in parameter_groups(TinyModel(), 0.1)] == [2, 4, 0, 0]


def test_instances_as_masks():
    ids = np.zeros((5, 6), np.int32)
    ids[:2, :4] = 7
    ids[4, 5] = 3
    targets = targets_of(Annotation.of_objects(ids).objects(), 2)
    assert targets.classes.tolist() == [0, 0]
    np.testing.assert_array_equal(targets.masks[0], [[0, 0, 0], [0, 0, 0], [0, 0, 0.25]])
    np.testing.assert_array_equal(targets.masks[1], [[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    empty = Annotation.of_objects(np.zeros((5, 6), np.int32)).objects()
    assert targets_of(empty, 2).masks.shape == (0, 3, 3)


@pytest.mark.parametrize("head", ["mask2former", "hcformer"])
def test_mask_heads_train_and_are_scored(head):
    recipe = Recipe(head=head, batch=1, crop=96, points=64)
    model = recipe.create()
    run = Trainer(model, recipe.task(model), blobs(2), recipe, Budget(steps=3))
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    losses = [run.step() for _ in range(3)]  # the first has a learning rate of 0
    assert all(math.isfinite(loss) for loss in losses)
    moved = [name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])]
    assert {name.split(".")[0] for name in moved} == {"backbone", "head"}
    assert 0 <= score(run, blobs(1), blobs(1)).at(0.5) <= 1


def test_backbone_starts_from_weights():
    started = Recipe(pretrained="nuclei", pretrained_stages=2).create().backbone
    trained = create_model("aff_nano.nuclei").backbone
    random = Recipe().create().backbone
    assert same(started.patch_embed.state_dict(), trained.patch_embed.state_dict())
    for stage in range(4):
        source = trained if stage < 2 else random
        expected = source.stages[stage].state_dict()
        assert same(started.stages[stage].state_dict(), expected)
    with pytest.raises(ValueError, match="head: expected one of dense, mask2former, hcformer"):
        Recipe(head="classification").create()


def test_bad_input_is_one_line(tmp_path, capsys):
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "found none" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors", "log.jsonl"])
def test_a_new_run_replaces_nothing(tmp_path, capsys, name):
    (tmp_path / name).write_text("mine")
    assert main(["--data", str(tmp_path), "--out", str(tmp_path), "--steps", "1"]) == 1
    assert f"{name} exists" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
