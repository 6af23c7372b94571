"""Weights in and out: safetensors, released containers, broken files."""

import pickle
import random
import warnings

import numpy as np
import pytest
import torch

from pointformer.models import (
    AFFConfig,
    CheckpointError,
    Model,
    Preprocess,
    create_model,
    load_model,
    load_released,
    load_state,
    save_model,
)
from pointformer.models.checkpoints import from_released, to_released
from pointformer.models.config import CONFIGS

SMALL = AFFConfig(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)


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
    with pytest.warns(UserWarning, match=r"the head of aff_mini is new: \d+ \(head\."):
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
    with pytest.warns(UserWarning, match="the head of small is new: 2 .*, 2 "):
        fewer = load_released(path, "small", num_classes=4, **options)
    assert (fewer.num_classes, fewer.config.alpha) == (4, 8.0)
    assert torch.equal(fewer.head.decoder.query, state["sem_seg_head.predictor.query_feat.weight"])
    with pytest.warns(UserWarning, match="the head of small is new"):
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


# Files of other code, and wrapped models ------------------------------------------------------


def small(head="dense", classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return Model("small", SMALL, head, classes, **options).eval()


class Wrapper(torch.nn.Module):
    """What sharding and activation checkpointing look like: a module under a name of theirs."""

    def __init__(self, name, module):
        super().__init__()
        self.add_module(name, module)


def sharded(model):
    for i, block in enumerate(model.backbone.stages):
        model.backbone.stages[i] = Wrapper("_checkpoint_wrapped_module", block)
    model.backbone = Wrapper("_fsdp_wrapped_module", model.backbone)
    return Wrapper("_fsdp_wrapped_module", model)


def partly_compiled(model):
    model.backbone = torch.compile(model.backbone)
    model.head = torch.compile(model.head)
    return model


WRAPPED = {
    "compiled": torch.compile,
    "parallel": torch.nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "nested": lambda model: torch.nn.DataParallel(torch.compile(model)),
    "sharded": sharded,
    "parts": partly_compiled,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models(tmp_path, wrap):
    """The file is as if nothing were wrapped; state dicts of wrapped models load by their name."""
    model = small()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    wrapped = wrap(model)
    path, pickle_path = tmp_path / "m.safetensors", tmp_path / "m.pth"
    save_model(wrapped, path)
    loaded = load_model(path)
    torch.save(wrapped.state_dict(), pickle_path)
    again = small(seed=1)
    load_state(again, torch.load(pickle_path), "m.pth")
    target = wrap(small(seed=1))  # and into a wrapped one
    load_state(target if isinstance(target, Model) else again, expected, "m")
    for other in (loaded, again, *([target] if isinstance(target, Model) else [])):
        values = list(other.state_dict().values())
        assert all(torch.equal(a, b) for a, b in zip(expected.values(), values, strict=True))
    assert list(loaded.state_dict()) == list(expected)


def test_what_save_model_takes(tmp_path):
    """Half precision, views, shared and transposed weights, numbers of NumPy; in training too."""
    path = tmp_path / "m.safetensors"
    model = small(classes=np.int64(4), channels=np.int64(16)).bfloat16().train()
    model.backbone.stages[1].merge.linear.weight.data = torch.randn(64, 16).bfloat16().T
    shared = model.backbone.stages[0].blocks[0].norm1.weight
    model.backbone.stages[0].blocks[0].norm2.weight = shared
    save_model(model, path)
    loaded = load_model(path)
    assert loaded.num_classes == 4
    for (name, value), other in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert other.dtype == (torch.int64 if "tracked" in name else torch.float32)
        assert torch.equal(value.to(other.dtype), other), name


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda m: torch.nn.Linear(2, 2), TypeError, "model: expected a Model.*got Linear"),
        (lambda m: m.to("meta"), ValueError, r"small: \d+ weights are no .*first: backbone\."),
        (
            lambda m: setattr(m.head, "extra", torch.nn.Parameter(torch.eye(2).to_sparse())) or m,
            ValueError,
            r"small: 1 weights are .*first: head\.extra\)",
        ),
    ],
    ids=["no model", "meta", "sparse"],
)
def test_what_save_model_refuses(tmp_path, spoil, error, message):
    with pytest.raises(error, match=message) as raised:
        save_model(spoil(small()), tmp_path / "m.safetensors")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def listed(monkeypatch):
    """Lets `create_model` know a small model."""
    monkeypatch.setitem(CONFIGS, "small", SMALL)


def test_containers_of_training_code(tmp_path, listed):
    """A state dict in any of the usual places, behind any names; with a choice, the first that is
    no average, and that is said."""
    raw, average = small(seed=0).state_dict(), small(seed=1).state_dict()

    def prefixed(prefix, state):
        return {f"{prefix}.{key}": value for key, value in state.items()}

    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    rng = torch.get_rng_state()
    cases = [
        (raw, None, raw, False),
        ({"state_dict": raw, "epoch": 3, "rng": rng, "optimizer": optimizer}, None, raw, False),
        ({"model_ema": prefixed("module", average), "model": raw}, None, raw, True),
        ({"model": raw, "model_ema": prefixed("module", average)}, "model_ema", average, False),
        ({"state_dict": raw, "state_dict_ema": average}, "state_dict_ema", average, False),
        ({"model": raw, "averaged": average, "recipe": {"seed": 1}}, "averaged", average, False),
        ({"teacher": prefixed("module._orig_mod", average)}, None, average, False),
        ({"ema": {"module": average, "decay": torch.tensor(0.9)}}, None, average, False),
        ({"state_dict": prefixed("model", raw) | {"loss.weight": rng}}, None, raw, False),
        (
            {"state_dict": prefixed("teacher", average) | prefixed("student._orig_mod", raw)},
            "teacher", average, False,
        ),
        (prefixed("student", raw) | prefixed("teacher.module", average), None, raw, True),
        ({"n_averaged": torch.tensor(3)} | prefixed("module", average), None, average, False),
    ]  # fmt: skip
    path = tmp_path / "m.pth"
    for container, key, expected, said in cases:
        torch.save(container, path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = load_model(path, "small", key=key)
        assert (model.head_name, model.num_classes) == ("dense", 3)
        values = model.state_dict().values()
        assert all(torch.equal(a, b) for a, b in zip(expected.values(), values, strict=True))
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == said
        assert all("m.pth: took" in message and "key" in message for message in messages)
    torch.save({"model": raw, "model_ema": average}, path)
    with pytest.raises(CheckpointError, match=r"m\.pth: key 'ema_model' fits 0 of .*'model_ema'"):
        load_model(path, "small", key="ema_model")
    torch.save(raw | prefixed("module", raw), path)
    with pytest.raises(CheckpointError, match="two entries are backbone"):
        load_model(path, "small")


@pytest.mark.parametrize("head", ["classification", "dense", "features", "mask2former", "hcformer"])
def test_the_head_is_read_off_the_weights(tmp_path, listed, head):
    options = {"dim": 16, "hidden": 16} if "former" in head else {}
    torch.save(small(head, 7, **options).state_dict(), tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", "small", **options)
    assert loaded.head_name == head
    assert loaded.num_classes == (7 if head != "features" else 1000)
    assert not loaded.training
    with pytest.raises(CheckpointError, match="a pickle, but not one that save_model wrote"):
        load_model(tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="use load_model"):
        load_released(tmp_path / "m.pt", "small")


def test_released_files_are_not_our_own(released):
    with pytest.raises(CheckpointError, match="use load_released"):
        load_model(released[0], "aff_mini")


def test_fine_tuning(tmp_path, listed):
    """What fits is loaded, the rest is said in one line; the backbone must fit."""
    path = tmp_path / "m.safetensors"
    model = small(task="instance", channels=24)
    save_model(model, path)

    def loaded(message, **changes):
        with pytest.warns(UserWarning, match=message) as caught:
            changed = load_model(path, **changes)
        (warning,) = caught
        assert "\n" not in str(warning.message)
        own = model.backbone.state_dict()
        assert all(torch.equal(own[k], v) for k, v in changed.backbone.state_dict().items())
        return changed

    message = (
        r"m\.safetensors: the head of small is new: 2 \(head\.classify\.1\.weight, "
        r"head\.classify\.1\.bias\) of its weights keep .*, 2 \(head.* of the file's are left out"
    )
    more = loaded(message, num_classes=5, task="semantic")
    assert more.num_classes == 5
    assert more.head_options == {"channels": 24}
    assert torch.equal(more.head.detail.weight, model.head.detail.weight)
    other = loaded(r"is new: 4 \(.*, 24 \(head.*, \.\.\.\) of", head="classification")
    assert (other.head_name, other.num_classes, other.task) == ("classification", 3, None)
    wider = loaded("is new", channels=32)
    assert wider.head_options == {"channels": 32}
    backbone = tmp_path / "backbone.pth"
    torch.save(model.backbone.state_dict(), backbone)
    with pytest.warns(UserWarning, match=r"backbone\.pth: the head of small is new: 4 .*, none"):
        load_model(backbone, "small", num_classes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(path, num_classes=3, head="dense", channels=24).task == "instance"
    with pytest.raises(CheckpointError, match=r"1 have another shape \(first: backbone"):
        load_model(path, num_classes=5, task="semantic", in_channels=1)
    with pytest.raises(CheckpointError, match="holds small, not aff_nano"):
        load_model(path, "aff_nano")
    with pytest.raises(TypeError, match=r"unknown option queries .*; known options: of small: "):
        load_model(path, queries=3)


def test_a_description_that_cannot_be_read(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    for text in ("{", "[]", '{"name": "a", "head": "dense", "num_classes": 3, "config": 5}'):
        save_file(small().state_dict(), path, metadata={"pointformer": text})
        with pytest.raises(CheckpointError, match=r"m\.safetensors: "):
            load_model(path)


def test_normalization_belongs_to_the_file(tmp_path):
    model = small()
    model.preprocess = Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_model(model.bfloat16(), tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors").preprocess
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    expected = torch.stack([(image[c] / 255 - m) / s for c, (m, s) in
                            enumerate(zip(loaded.mean, loaded.std, strict=True))])  # fmt: skip
    torch.testing.assert_close(loaded(image), expected)


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
