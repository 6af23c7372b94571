"""Groups of parameters, schedules, budgets, averages, and a step by hand."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from helpers.training import dataset_of, recipe_of, trainer_of
from pointformer.models import create_model
from pointformer.train.loading import Batches
from pointformer.train.optimization import (
    Budget,
    Optimizer,
    Schedule,
    clip_gradients,
    parameter_groups,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)
        self.norms = nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4))
        self.queries = nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)


@pytest.mark.parametrize(
    ("decay", "decaying"),
    [("matrices", {"backbone.0.weight", "head.weight", "queries.weight"}),
     ("all", {"backbone.0.weight", "backbone.0.bias", "head.weight", "head.bias", "scale"})],
)  # fmt: skip
def test_what_decays_and_what_is_slower(decay, decaying):
    model = Model()
    optimizer = Optimizer(decay=decay, weight_decay=0.1, backbone_rate=0.25)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, optimizer):
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = group["weight_decay"], group["factor"]
    assert found == {
        name: (0.1 if name in decaying else 0, 0.25 if name.startswith("backbone.") else 1)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def test_of_a_real_model_no_norm_decays():
    """Of all that decays as published for segmentation, biases of linear layers do."""
    model = create_model("aff_nano", head="mask2former", num_classes=2, dims=(16, 16, 16, 16),
                         depths=1, heads=2, dim=32, hidden=32, decoder_layers=1)  # fmt: skip
    groups = parameter_groups(model, Optimizer(decay="all"))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            found.setdefault(f"{type(module).__name__}.{name}", set()).add(decay[id(p)])
    norms = {name: values for name, values in found.items() if "Norm" in name}
    assert {"LayerNorm.weight", "LayerNorm.bias", "BatchNorm2d.weight"} <= norms.keys()
    assert set.union(*norms.values()) == {0}
    assert found["Linear.weight"] == found["Linear.bias"] == {0.05}


def test_defaults():
    """What recipes that say nothing else are trained with."""
    assert asdict(Optimizer()) == {
        "learning_rate": 1e-3, "reference_batch": None, "backbone_rate": 1.0,
        "weight_decay": 0.05, "decay": "matrices", "betas": (0.9, 0.999), "eps": 1e-8, "clip": 1.0,
    }  # fmt: skip
    assert asdict(Schedule()) == {
        "kind": "cosine", "warmup": 0.05, "start": 0.0, "end": 0.0, "power": 0.9, "milestones": (),
    }  # fmt: skip
    assert asdict(Budget()) == {"steps": None, "epochs": None, "minutes": None}


@pytest.mark.parametrize(("most", "after"), [(None, 5.0), (1.0, 1.0), (10.0, 5.0)])
def test_gradients_are_clipped_to_what_is_asked_for(most, after):
    """All together; without a limit they stay."""
    model = nn.Linear(1, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([-4.0])
    assert clip_gradients(model, most).item() == 5
    assert model.weight.grad.item() == pytest.approx(0.6 * after, rel=1e-4)
    assert model.bias.grad.item() == pytest.approx(-0.8 * after, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(warmup=1.0), r"schedule\.warmup: expected a share in \[0, 1\), got 1.0"),
        (lambda: Schedule(milestones=(0.5, 1.1)), r"schedule\.milestones: .* got \[0.5, 1.1\]"),
        (lambda: Optimizer(backbone_rate=-0.1), r"optimizer\.backbone_rate: expected a number"),
        (lambda: Optimizer(weight_decay=math.inf), r"optimizer\.weight_decay: expected a number"),
        (lambda: Optimizer(betas=(0.9, 1.0)), r"optimizer\.betas: .* got \[0.9, 1.0\]"),
        (lambda: Optimizer(eps=-1e-8), r"optimizer\.eps: expected a number of at least 0"),
        (lambda: Optimizer(clip=0.0), r"optimizer\.clip: expected a positive number or null"),
        (lambda: Budget(minutes=0), r"budget\.minutes: expected a positive number, got 0"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_adam_has_its_numbers():
    optimizer = Optimizer(betas=(0.5, 0.6), eps=1e-3).make(Model(), 8)
    found = [(group["betas"], group["eps"]) for group in optimizer.param_groups]
    assert set(found) == {((0.5, 0.6), 1e-3)}


def test_learning_rate_in_proportion_to_the_batch():
    optimizer = Optimizer(learning_rate=1e-3, reference_batch=512, backbone_rate=0.1)
    rates = {group["rate"] for group in optimizer.make(Model(), 128).param_groups}
    assert sorted(rates) == pytest.approx([2.5e-5, 2.5e-4])


def test_schedules():
    cosine = Schedule(warmup=0.1)
    for used, factor in ((0, 0), (0.05, 0.5), (0.1, 1), (0.55, 0.5), (1, 0)):
        assert cosine.factor(used) == pytest.approx(factor)
    started = Schedule(warmup=0.2, start=0.1, end=0.01)
    for used, factor in ((0, 0.1), (0.1, 0.55), (0.2, 1), (0.6, 0.505), (1, 0.01)):
        assert started.factor(used) == pytest.approx(factor)
    poly = Schedule("poly", warmup=0, power=0.9)
    for used, factor in ((0, 1), (0.5, 0.5**0.9), (1, 0)):
        assert poly.factor(used) == pytest.approx(factor)
    ended = Schedule("poly", warmup=0.2, end=0.1, power=2)
    for used, factor in ((0.2, 1), (0.6, 0.325), (1, 0.1)):
        assert ended.factor(used) == pytest.approx(factor)
    steps = Schedule("steps", warmup=0.1, milestones=(0.5, 0.75))
    for used, factor in ((0.05, 0.5), (0.1, 1), (0.49, 1), (0.5, 0.1), (0.75, 0.01), (1, 0.01)):
        assert steps.factor(used) == pytest.approx(factor)
    assert Schedule("constant", warmup=0).factor(0.99) == 1


def test_budgets_end_with_what_is_used_up_first():
    assert Budget(steps=10, minutes=1).used(5, 45, 100) == 0.75
    assert Budget(minutes=1).used(10**6, 90, 100) == 1
    assert Budget(epochs=2).used(3, 0, 2.5) == pytest.approx(0.6)
    assert Budget(epochs=1).used(2, 0, 2.5) == pytest.approx(2 / 3)
    assert Budget(epochs=1).used(3, 0, 2.5) == 1  # the last step goes beyond the pass
    assert Budget(epochs=50).used(55, 0, 11 / 10) == 1  # 55.00000000000001
    with pytest.raises(ValueError, match=r"budget\.epochs: expected a positive number, got 0"):
        Budget(epochs=0)


def test_a_step_by_hand(tmp_path):
    """AdamW on clipped gradients, the backbone slower; then the moving average, whose memory is
    shorter at first, and the latest statistics."""
    dataset = dataset_of(tmp_path, "instance", 4, 32)
    recipe = recipe_of(
        "x", "optimizer.learning_rate=1e-2", "optimizer.backbone_rate=0.25", "average=0.3",
        "optimizer.clip=0.01", "schedule.warmup=0.5", "budget.steps=4",
    )  # fmt: skip
    run = trainer_of(dataset, recipe)
    model, averaged = run.model, run.averaged
    average = {name: p.clone() for name, p in averaged.named_parameters()}
    batches = Batches(dataset, None, batch=2, seed=0).steps()
    for step in range(3):
        before = {name: p.clone() for name, p in model.named_parameters()}
        run.step(next(batches))
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert grads.norm().item() == pytest.approx(0.01, rel=1e-3)
        rate = 1e-2 * recipe.schedule.factor(step / 4)
        for name, parameter in model.named_parameters():
            slower = 0.25 if name.startswith("backbone.") else 1.0
            moved = (parameter - before[name]).abs().max().item()
            # AdamW moves a number by about the learning rate, and decays what decays by little.
            assert moved <= 1.7 * rate * slower + 0.06 * rate * before[name].abs().max().item()
        decay = min(0.3, (2 + step) / (11 + step))
        for name, parameter in model.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
            torch.testing.assert_close(averaged.get_parameter(name), average[name])
        for found, latest in zip(averaged.buffers(), model.buffers(), strict=True):
            assert torch.equal(found, latest)
    assert not averaged.training
    run.check()
    assert [row["gradient"] > 0.01 for row in run.recent] == [True] * 3


def test_biases_of_any_shape_do_not_decay():
    model = nn.Module()
    model.bias = nn.Parameter(torch.ones(2, 3))
    (group,) = parameter_groups(model, Optimizer())
    assert group["weight_decay"] == 0


def test_a_budget_of_less_than_a_step_is_one():
    assert Budget(epochs=1e-10).used(0, 0, 4) == 0
    assert Budget(epochs=1e-10).used(1, 0, 4) == 1
