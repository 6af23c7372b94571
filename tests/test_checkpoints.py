"""Weights in and out: safetensors, released containers, broken files."""

import pickle
import random

import numpy as np
import pytest
import torch

from pointformer.models import (
    AFFConfig,
    CheckpointError,
    Model,
    create_model,
    load_model,
    load_released,
    save_model,
)
from pointformer.models.checkpoints import released_name

SMALL = AFFConfig(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)


@pytest.fixture
def released(tmp_path):
    """A made-up checkpoint in the training container of the released code, and its weights."""
    torch.manual_seed(0)
    model = create_model("aff_mini", num_classes=10)
    state = {
        released_name(k): torch.randn_like(v.float()).to(v.dtype)
        for k, v in model.state_dict().items()
    }
    container = {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"base_values": [1e-3]},
        "loss_scaler": {"scale": 1.0},
        "max_accuracy": 78.2,
        "epoch": 299,
        "rng": torch.get_rng_state(),
        "random": random.getstate(),
        "np_rng": np.random.get_state(),  # noqa: NPY002
        "prng": np.random.RandomState(3),
    }
    path = tmp_path / "aff_mini.pth"
    torch.save(container, path)
    return path, state


def test_released_container_loads(released):
    path, state = released
    model = load_released(path, "aff_mini", rate=0.2)
    assert not model.training
    assert model.config.rate == 0.2
    assert model.num_classes == 10
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[released_name(key)])


def test_bare_state_dict_loads(released, tmp_path):
    _, state = released
    torch.save(state, tmp_path / "bare.pth")
    model = load_released(tmp_path / "bare.pth", "aff_mini")
    assert torch.equal(model.head.linear.bias, state["head.bias"])


def test_another_models_checkpoint_is_refused(released):
    path, _ = released
    with pytest.raises(
        CheckpointError, match=r"aff_mini.pth: not a checkpoint of aff_tiny: \d+ entr"
    ):
        load_released(path, "aff_tiny")


def test_head_that_was_not_released(released):
    with pytest.raises(CheckpointError, match="head 'dense' was not released"):
        load_released(released[0], "aff_mini", head="dense")


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint that can be read safely"),
        (b"no pickle at all", "not a checkpoint that can be read safely"),
        (
            pickle.dumps({"model": Harmful()}, protocol=2),
            "not a checkpoint that can be read safely",
        ),
    ],
    ids=["empty", "text", "code"],
)
def test_files_that_are_no_checkpoint(tmp_path, capsys, content, message):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_released(path, "aff_mini")
    assert "\n" not in str(error.value)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [[1, 2], {"model": 3}, {"weights": {"a": 1}}], ids=str)
def test_pickles_of_something_else(tmp_path, value):
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: "):
        load_released(tmp_path / "x.pth", "aff_mini")


def test_truncated_checkpoint(released):
    path, _ = released
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="read safely"):
        load_released(path, "aff_mini")


def test_safetensors_round_trip(tmp_path):
    model = Model("small", SMALL.override(alpha=8.0), "dense", 3).eval()
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors", rate=0.5)
    assert (again.head_name, again.num_classes, again.name) == ("dense", 3, "small")
    assert (again.config.alpha, again.config.rate) == (8.0, 0.5)
    again.reconfigure(rate=0.25)
    image = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(model(image), again(image))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_broken_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(path)
    save_model(Model("small", SMALL, "dense", 3), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not one that save_model wrote"):
        load_model(path)


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("pointformer.models.checkpoints.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(Model("small", SMALL, "dense", 3), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("classes", "alpha"), [(19, 8.0), (8, 8.0), (150, None)])
def test_cityscapes_checkpoints_get_their_alpha(tmp_path, monkeypatch, classes, alpha):
    """It decides which tokens are kept, and no weight tells it."""
    path = tmp_path / "seg.pth"
    torch.save(
        {"model": {"sem_seg_head.predictor.class_embed.bias": torch.zeros(classes + 1)}}, path
    )
    seen = {}

    def create(name, **overrides):
        seen.update(overrides)
        raise ValueError("seen")

    monkeypatch.setattr("pointformer.models.registry.create_model", create)
    with pytest.raises(ValueError, match="seen"):
        load_released(path, "aff_mini", head="mask2former")
    assert seen["num_classes"] == classes
    assert seen.get("alpha") == alpha
