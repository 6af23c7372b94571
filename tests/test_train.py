"""The training loop on made-up pictures, with a tiny model."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from pointformer.data import Sample
from pointformer.train.nuclei import (
    Budget,
    Recipe,
    Trainer,
    evaluate,
    learning_rate_factor,
    main,
    parameter_groups,
    train,
)
from pointformer.train.objectives import dense_loss

RECIPE = Recipe(batch=2, crop=32, learning_rate=1e-2)


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 3, 1)
        )

    def preprocess(self, image):
        return image.float() / 127.5 - 1

    def forward(self, images):
        return self.layers(images)


def blobs(count, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.indices((48, 40))
    samples = []
    for index in range(count):
        instances = np.zeros((48, 40), np.int32)
        for blob in range(1, 4):
            cy, cx = rng.uniform(6, 34, 2)
            instances[(y - cy) ** 2 + (x - cx) ** 2 < 30] = blob
        grey = 40 + 150 * (instances > 0) + rng.integers(0, 20, instances.shape)
        image = np.repeat(grey[..., None], 3, 2).astype(np.uint8)
        samples.append(Sample(str(index), image, instances))
    return samples


def trainer(budget, recipe=RECIPE):
    torch.manual_seed(0)
    return Trainer(TinyModel(), blobs(4), recipe, budget)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path):
    whole = trainer(Budget(steps=8))
    losses = [whole.step() for _ in range(8)]
    assert whole.used == 1
    first = trainer(Budget(steps=8))
    assert [first.step() for _ in range(5)] == losses[:5]
    first.save(tmp_path / "checkpoint.pt")
    second = trainer(Budget(steps=8))
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


def test_training_learns_logs_and_scores(tmp_path):
    run = trainer(Budget(steps=200))
    before = evaluate(run.averaged, blobs(3, seed=1), run.objective).at(0.5)
    result = train(run, blobs(3, seed=1), tmp_path, checkpoint_minutes=0.0)
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
    assert dense_loss(truth, target, weights) < 1e-3
    # All classes equally likely: log 3, and per class Dice (2 n/3 + 100) / (n + N/3 + 100).
    pixels = target.numel()
    dice = [
        (2 * n / 3 + 100) / (n + pixels / 3 + 100) for n in target.unique(return_counts=True)[1]
    ]
    expected = math.log(3) + 1 - float(sum(dice[1:])) / 2
    assert dense_loss(uniform, target, weights).item() == pytest.approx(expected, rel=1e-5)
    absent = torch.zeros_like(target)
    assert torch.isfinite(dense_loss(uniform, absent, weights))


def test_schedule_and_budget():
    assert learning_rate_factor(0.0, 0.1) == 0
    assert learning_rate_factor(0.05, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(0.1, 0.1) == pytest.approx(1)
    assert learning_rate_factor(0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 0.1) == pytest.approx(0)
    assert Budget(steps=10, minutes=1).used(5, 45) == 0.75
    assert Budget(minutes=1).used(10**6, 90) == 1


def test_only_matrices_decay():
    decayed, free = parameter_groups(TinyModel(), 0.1)
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() <= 1 for p in free["params"])
    assert len(decayed["params"]) == 2
    assert len(free["params"]) == 4


def test_bad_input_is_one_line(tmp_path, capsys):
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "found none" in error
    assert error.count("\n") == 1
