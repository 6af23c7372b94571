"""The released checkpoints: containers, names, fine-tuning, files that are none."""

import pickle
import random

import numpy as np
import pytest
import torch

from pointformer.models import (
    AFFConfig,
    CheckpointError,
    create_model,
    load_model,
    load_released,
)
from pointformer.models.config import CONFIGS
from pointformer.models.released import from_released, to_released

SMALL = AFFConfig(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)


@pytest.fixture
def listed(monkeypatch):
    """Lets `create_model` know a small model."""
    monkeypatch.setitem(CONFIGS, "small", SMALL)


def made_up(state):
    return {key: torch.randn_like(value.float()).to(value.dtype) for key, value in state.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A made-up checkpoint in the training container of the released code, and its weights; of a
    model that is smaller than its name says."""
    monkeypatch.setitem(CONFIGS, "aff_mini", SMALL)
    monkeypatch.setitem(CONFIGS, "aff_tiny", SMALL.override(depths=(1, 2, 1, 1)))
    torch.manual_seed(0)
    model = create_model("aff_mini", num_classes=10)
    state = made_up(to_released(model.state_dict(), model.config))
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
    assert_same(to_released(model.state_dict(), model.config), state)


def test_released_projections_are_joined_and_parted(listed):
    """Theirs: one of the query, one of key and value side by side in each head."""
    model = create_model("small", num_classes=3)
    theirs = to_released(model.state_dict(), model.config)
    name, heads = "layers.1.blocks.0.attn", model.config.heads[1]
    for kind in ("weight", "bias"):
        joined = getattr(model.backbone.stages[1].blocks[0].attn.qkv, kind)
        assert torch.equal(theirs[f"{name}.q.{kind}"], joined[: len(joined) // 3])
        pairs = theirs[f"{name}.kv.{kind}"].unflatten(0, (heads, 2, -1))
        split = joined[len(joined) // 3 :].unflatten(0, (2, heads, -1))
        assert torch.equal(pairs.transpose(0, 1), split)
    assert_same(from_released(theirs, model), model.state_dict())


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


@pytest.mark.parametrize("options", [{"head": "mask2former"}, {"num_classes": 3}], ids=str)
def test_fine_tuning_from_a_released_backbone(released, options):
    path, state = released
    with pytest.warns(UserWarning, match=r"kept: .*; fresh in aff_mini: \d+ \(head\."):
        model = load_released(path, "aff_mini", **options)
    assert model.num_classes == options.get("num_classes", 1000)
    own = {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}
    own = to_released(own, model.config)
    assert_same(own, {key: state[key] for key in own})
    if "num_classes" in options:  # what fits is taken
        assert torch.equal(model.head.norm.weight, state["norm.weight"])


def test_fine_tuning_from_a_released_segmentation_model(tmp_path, listed):
    """The backbone of Cityscapes wants its alpha; its stages' norms belong to the head with us."""
    torch.manual_seed(0)
    options = {"dim": 16, "hidden": 16, "pixel_hidden": 16}
    model = create_model("small", head="mask2former", num_classes=19, queries=7, **options)
    state = made_up(to_released(model.state_dict(), model.config, "mask2former"))
    path = tmp_path / "s.pth"
    torch.save({"model": {**state, "criterion.empty_weight": torch.ones(20)}}, path)
    whole = load_released(path, "small", task="instance", **options)
    assert (whole.head_name, whole.num_classes, whole.config.alpha) == ("mask2former", 19, 8.0)
    assert whole.head_options == {**options, "queries": 7, "position_norm": "batch"}
    with pytest.warns(
        UserWarning,
        match=r"kept: the backbone and 312 of .*; fresh in small: 2 .*; left out of the file: 2 ",
    ):
        fewer = load_released(path, "small", num_classes=4, **options)
    assert (fewer.num_classes, fewer.config.alpha) == (4, 8.0)
    assert torch.equal(fewer.head.decoder.query, state["sem_seg_head.predictor.query_feat.weight"])
    with pytest.warns(UserWarning, match="kept: the backbone and 0 of"):
        dense = load_released(path, "small", head="dense", num_classes=4)
    own = {f"backbone.{key}": value for key, value in dense.backbone.state_dict().items()}
    own = to_released(own, dense.config, "mask2former")
    assert_same(own, {key: state[key] for key in own})


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
        (pickle.dumps({"model": Harmful()}), "not a checkpoint that can be read safely"),
    ],
    ids=["empty", "text", "code", "newer"],
)
def test_files_that_are_no_checkpoint(tmp_path, capsys, content, message):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_released(path, "aff_mini")
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # no advice to run what is in the file
    assert "must not run" not in capsys.readouterr().out


def test_a_folder_is_no_checkpoint(tmp_path):
    for load in (load_model, load_released):
        with pytest.raises(CheckpointError, match="expected a file, this is a folder"):
            load(tmp_path, "aff_mini")


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


def test_released_files_are_not_our_own(released, tmp_path):
    with pytest.raises(CheckpointError, match="use load_released"):
        load_model(released[0], "aff_mini")
    for model in (create_model("aff_mini"), create_model("aff_mini").backbone):
        torch.save(model.state_dict(), tmp_path / "m.pt")
        with pytest.raises(CheckpointError, match="use load_model"):
            load_released(tmp_path / "m.pt", "aff_mini")


@pytest.mark.parametrize(("classes", "alpha"), [(19, 8.0), (8, 8.0), (150, None)])
def test_cityscapes_checkpoints_get_their_alpha(tmp_path, monkeypatch, classes, alpha):
    """It decides which tokens are kept, and no weight tells it."""
    path = tmp_path / "seg.pth"
    torch.save(
        {"model": {"sem_seg_head.predictor.class_embed.bias": torch.zeros(classes + 1)}}, path
    )
    seen = {}

    def create(name, head, **overrides):
        seen.update(overrides)
        raise ValueError("seen")

    monkeypatch.setattr("pointformer.models.released.new_model", create)
    with pytest.raises(ValueError, match="seen"):
        load_released(path, "aff_mini", head="mask2former")
    assert seen["num_classes"] == classes
    assert seen.get("alpha") == alpha
