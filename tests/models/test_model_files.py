"""Models in and out of files: ours, those of training code, broken ones."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pointformer.models
from pointformer.annotations import Category
from pointformer.models import (
    AFFConfig,
    CheckpointError,
    Model,
    Preprocess,
    create_model,
    list_models,
    load_model,
    load_state,
    save_model,
)
from pointformer.models.config import CONFIGS, PointConfig
from pointformer.models.heads import HEADS, tasks_of
from pointformer.models.points import PointPreprocess
from pointformer.models.state import weights_digest

SMALL = AFFConfig(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)
SMALL_OF_POINTS = PointConfig(
    dims=(16, 16), depths=(1, 1), heads=(2, 2), neighborhood_size=48, unit=0.25
)


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
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not one that save_model wrote"):
        load_model(path)


# Files of other code, and wrapped models ------------------------------------------------------


def small(head="dense", classes=3, seed=0, **options):
    torch.manual_seed(seed)
    config = SMALL_OF_POINTS if HEADS[head].of_points else SMALL
    return Model("small", config, head, classes, **options).eval()


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
    "parallel": lambda model: torch.nn.DataParallel(model),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "nested": lambda model: torch.nn.DataParallel(torch.compile(model)),  # type: ignore[type-var]
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


@pytest.mark.parametrize(
    ("head", "task"), [(h, t) for h in HEADS for t in dict.fromkeys((*tasks_of(h, 3), None))]
)
def test_a_file_says_all_of_its_model(tmp_path, head, task):
    """Task, categories, normalization and training, also where nobody said what goes without
    saying, and out of wrappers."""
    options = {"dim": 16, "hidden": 16} if "former" in head else {}
    kinds = 1 if (head, task) in (("dense", "instance"), ("dense", None)) else 3
    table = [Category(n, str(n), n > 0, (n, 7, 9)) for n in range(kinds)]
    model = small(head, 3, task=task, categories=table, **options)
    if isinstance(model.preprocess, Preprocess):
        model.preprocess = Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model.trained, model.object_diameter, model.min_score = {"steps": 3}, 4.5, 0.7
    save_model(torch.optim.swa_utils.AveragedModel(model), tmp_path / "m.safetensors")
    loaded = create_model(tmp_path / "m.safetensors")
    known = {h: h for h in HEADS if tasks_of(h, 3) == [h]}
    known |= {"dense": "instance", "stars": "instance"}
    assert loaded.task == model.task == (task or known.get(head))
    assert loaded.categories == tuple(table)
    assert repr(loaded.preprocess) == repr(model.preprocess)
    assert (loaded.trained, loaded.object_diameter, loaded.min_score) == ({"steps": 3}, 4.5, 0.7)
    assert (loaded.output, loaded.training) == (model.output, False)


def test_a_file_for_other_classes():
    """The backbone is kept, the head becomes one of so many classes."""
    name = "aff_nano.nuclei"
    path = Path(pointformer.models.__file__).parent / f"weights/{name}.safetensors"
    trained = create_model(name)
    with pytest.warns(UserWarning, match="kept: the backbone and 32 of 34 weights of the head"):
        changed = create_model(path, num_classes=10)
    assert (changed.num_classes, changed.task, changed.categories) == (10, "instance", None)
    assert changed.trained is None
    assert changed.preprocess.mean == trained.preprocess.mean
    own = trained.backbone.state_dict()
    assert all(torch.equal(own[k], v) for k, v in changed.backbone.state_dict().items())


def test_who_may_read_other_files_may_read_a_model(tmp_path):
    (tmp_path / "other").write_text("")
    save_model(small(), tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


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


def with_parameter(model, value):
    model.head.extra = torch.nn.Parameter(value)
    return model


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda m: torch.nn.Linear(2, 2), TypeError, "model: expected a Model.*got Linear"),
        (lambda m: m.to("meta"), ValueError, r"small: \d+ weights are no .*first: backbone\."),
        (
            lambda m: with_parameter(m, torch.eye(2).to_sparse()),
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


@pytest.mark.parametrize(
    "head", ["classification", "dense", "features", "mask2former", "hcformer", "stars"]
)
def test_the_head_is_read_off_the_weights(tmp_path, listed, head):
    options = {"dim": 16, "hidden": 16} if "former" in head else {}
    torch.save(small(head, 7, **options).state_dict(), tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", "small", **options)
    assert loaded.head_name == head
    assert loaded.num_classes == (7 if head != "features" else 1000)
    assert not loaded.training
    with pytest.raises(CheckpointError, match="a pickle, but not one that save_model wrote"):
        load_model(tmp_path / "m.pt")


@pytest.fixture
def fine_tuned(tmp_path):
    """What is made of the file of a model with changes: it, and the one line that is said."""

    def make(model, **changes):
        path = tmp_path / "m.safetensors"
        save_model(model, path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            changed = load_model(path, **changes)
        own = model.backbone.state_dict()
        assert all(torch.equal(own[k], v) for k, v in changed.backbone.state_dict().items())
        messages = [str(warning.message) for warning in caught]
        assert all(warning.filename == __file__ for warning in caught)
        assert len(messages) <= 1
        assert not any("\n" in message for message in messages)
        return changed, "".join(messages)

    return make


def test_fine_tuning(fine_tuned):
    """What fits is kept, but for what told other classes; the file says nothing of the rest."""
    model = small(task="instance", channels=24, categories=[Category(1, "cell")])
    model.object_diameter, model.min_score, model.trained = 7.0, 0.6, {"steps": 3}
    changed, said = fine_tuned(model, num_classes=5)
    assert said.split(": ", 1)[1] == (
        "kept: the backbone and 22 of 24 weights of the head; fresh in small: 2 "
        "(head.classify.1.bias, head.classify.1.weight); left out of the file: 2 "
        "(head.classify.1.bias, head.classify.1.weight)"
    )
    assert (changed.num_classes, changed.task, changed.categories) == (5, "semantic", None)
    assert changed.head_options == {"channels": 24}
    assert (changed.object_diameter, changed.min_score, changed.trained) == (None, None, None)
    for name, value in changed.head.state_dict().items():
        if not name.startswith("classify.1"):
            assert torch.equal(value, model.head.state_dict()[name]), name
    changed, said = fine_tuned(model, head="classification", num_classes=3)
    assert "and 0 of 4 weights of the head; fresh in small: 4 (" in said
    assert "left out of the file: 24 (head" in said
    assert (changed.head_name, changed.num_classes) == ("classification", 3)
    assert changed.task == "classification"
    changed, said = fine_tuned(model, channels=32)
    assert changed.head_options == {"channels": 32}
    assert "kept: the backbone and" in said
    changed, said = fine_tuned(model, num_classes=3, head="dense", channels=24, rate=0.5)
    assert (changed.task, changed.trained, changed.object_diameter, said) == (
        "instance", {"steps": 3}, 7.0, "",
    )  # fmt: skip


def test_a_head_of_another_kind_keeps_nothing_of_the_same_name(fine_tuned):
    """Both have a `norm` of the last stage, over different tokens."""
    model = small("classification", 4)
    torch.nn.init.normal_(model.head.norm.weight)
    changed, said = fine_tuned(model, head="hcformer", task="panoptic", dim=16, hidden=16)
    assert torch.equal(changed.head.norm.weight, torch.ones(16))
    assert " and 0 of " in said
    assert (changed.num_classes, changed.task) == (4, "panoptic")


@pytest.mark.parametrize(
    ("categories", "changes", "fresh"),
    [
        ("abc", {"categories": "abc"}, False),
        ("abc", {"categories": "acb"}, True),
        ("abc", {"categories": "abd"}, True),
        ("abc", {"categories": "abcd"}, True),
        ("", {"categories": "abc"}, False),
        ("abc", {}, False),
        ("abc", {"num_classes": 3}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("head", ["classification", "dense", "mask2former", "hcformer", "stars"])
def test_other_classes_have_fresh_scores(fine_tuned, head, categories, changes, fresh):
    """Also where they are as many: rows of a classifier mean what they were trained for."""
    options = {"dim": 16, "hidden": 16} if "former" in head else {}
    task = {"classification": head, "stars": "instance"}.get(head, "semantic")

    def table(names):
        return [Category(n, name, False, (n, 0, 9)) for n, name in enumerate(names)]

    own = {"categories": table(categories)} if categories else {}
    if "categories" in changes:
        changes = {"categories": table(changes["categories"])}
    model = small(head, 3, task=task, **own, **options)
    model.trained = {"steps": 3}
    torch.manual_seed(1)
    changed, said = fine_tuned(model, **changes)
    assert changed.task == task
    expected = changes.get("categories", own.get("categories"))
    assert changed.categories == (expected and tuple(expected))
    assert changed.num_classes == len(expected or "abc")
    assert (changed.trained, bool(said)) == (None if fresh else {"steps": 3}, fresh)
    classifier = {
        "classification": "linear.", "dense": "classify.1.", "stars": "classify.",
    }.get(head, "decoder.classify.")  # fmt: skip
    for name, value in changed.head.state_dict().items():
        same = torch.equal(value, model.head.state_dict()[name]) if value.numel() else True
        if name.startswith(classifier) and name.endswith("weight"):
            assert same == (not fresh), name
        elif not name.startswith(classifier):
            assert same, name


@pytest.mark.parametrize(
    ("own", "given", "fresh"),
    [("nucleus", "object", False), ("object", "nucleus", False), ("nucleus", "car", True)],
)
def test_objects_that_nobody_has_named_are_of_the_class_at_hand(fine_tuned, own, given, fresh):
    """As where training on one's own masks goes on from the weights of the package."""
    changed, said = fine_tuned(
        small("stars", 1, task="instance", categories=[Category(1, own)]),
        categories=[Category(1, given)],
    )
    assert [category.name for category in changed.categories] == [given]
    assert bool(said) == fresh


def test_a_dense_map_of_three_classes_is_no_map_of_borders(fine_tuned):
    changed, said = fine_tuned(small(), task="semantic")
    assert "fresh in small: 2 (head.classify.1.bias" in said
    assert changed.task == "semantic"
    changed, said = fine_tuned(small("dense", 19), num_classes=3)  # and stays one of classes
    assert changed.task == "semantic"
    assert said
    cells = small(task="instance", categories=[Category(1, "cell")])
    changed, _ = fine_tuned(cells, head="mask2former", dim=16, hidden=16)
    assert (changed.num_classes, changed.task) == (1, "instance")
    assert changed.categories == (Category(1, "cell"),)


def test_what_cannot_be_fine_tuned(tmp_path, listed):
    path, backbone = tmp_path / "m.safetensors", tmp_path / "backbone.pth"
    model = small(task="instance")
    save_model(model, path)
    torch.save(model.backbone.state_dict(), backbone)
    with pytest.warns(UserWarning, match=r"backbone\.pth: kept: .* 0 of 4 .*file: none"):
        load_model(backbone, "small", num_classes=2)
    with pytest.raises(CheckpointError, match=r"1 have another shape \(first: backbone"):
        load_model(path, num_classes=5, in_channels=1)
    with pytest.raises(CheckpointError, match="holds small, not aff_nano"):
        load_model(path, "aff_nano")
    with pytest.raises(TypeError, match=r"unknown option queries .*; known options: of small: "):
        load_model(path, queries=3)
    with pytest.raises(CheckpointError, match=r"categories: expected one for each of 5 classes"):
        load_model(path, num_classes=5, categories=[Category(1, "cell")])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(tmp_path, value):
    """What a training that went wrong leaves finds nothing, without a word."""
    model = small()
    with torch.no_grad():
        model.backbone.patch_embed.conv1.weight[0, 0, 0, 0] = value
    save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"in 1 of its weights \(first: backbone.patch_embed"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_weights_of_fewer_bits_are_taken(dtype):
    state = {name: value.to(dtype) for name, value in small().state_dict().items()}
    model = small(seed=1)
    load_state(model, state, "few")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name


# What a file says of its model ----------------------------------------------------------------


def description_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pointformer"])


def rewrite(path, description):
    """The weights of a file, under another description."""
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = description if isinstance(description, str) else json.dumps(description)
    save_file(weights, path, metadata={"pointformer": text})


def test_a_file_knows_its_model(tmp_path):
    path = tmp_path / "m.safetensors"
    categories = [Category(7, "cell", True, (1, 2, 3)), Category(9, "glass", False)]
    model = small("mask2former", 2, task="panoptic", categories=categories, queries=5, dim=16)
    model.preprocess = Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model.object_diameter = 12.5
    trained = {
        "recipe": {"steps": 20, "rates": np.float32([0.5, 0.25]), "decay": None},
        "scores": {0.5: torch.tensor(0.75), "per class": [0.5, float("inf")]},
    }
    save_model(model, path, trained=trained)
    assert model.trained is None
    loaded = load_model(path)
    assert (loaded.task, loaded.object_diameter) == ("panoptic", 12.5)
    assert (loaded.preprocess.mean, loaded.preprocess.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert loaded.categories == tuple(categories)
    assert loaded.head_options == {"queries": 5, "dim": 16}
    assert loaded.trained == {
        "recipe": {"steps": 20, "rates": [0.5, 0.25], "decay": None},
        "scores": {"0.5": 0.75, "per class": [0.5, float("inf")]},
    }
    again = tmp_path / "again.safetensors"
    save_model(loaded, again)  # with what it knows
    assert again.read_bytes() == path.read_bytes()
    for wrong, message in (
        ([1], "trained: expected a dict, got list"),
        ({"path": Path("x")}, r"trained: cannot be written as JSON: it holds a \w*Path"),
        ({(1, 2): 3}, "trained: cannot be written as JSON: keys must be"),
    ):
        with pytest.raises(TypeError, match=message):
            save_model(model, again, trained=wrong)
    assert again.read_bytes() == path.read_bytes()


def test_files_of_the_first_format_and_of_newer_ones(tmp_path):
    """What was written before there was a number has fewer entries."""
    path = tmp_path / "m.safetensors"
    model = small(task="instance")
    save_model(model, path)
    description = description_of(path)
    assert description["format"] == 1
    needed = ("name", "head", "num_classes", "config")
    rewrite(path, {name: description[name] for name in needed})
    loaded = load_model(path)
    assert (loaded.task, loaded.categories, loaded.trained) == ("instance", None, None)
    assert torch.equal(loaded.head.detail.weight, model.head.detail.weight)
    rewrite(path, description | {"format": 2, "head": "new", "config": None})
    with pytest.raises(CheckpointError, match=r"m\.safetensors: was saved in format 2, .* upgrade"):
        load_model(path)
    for name in needed:
        rewrite(path, {key: value for key, value in description.items() if key != name})
        with pytest.raises(CheckpointError, match=rf"m\.safetensors: .* lacks '{name}'"):
            load_model(path)


def test_a_description_that_cannot_be_read(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(small(), path)
    good = description_of(path)
    wrong = {
        "format": ("2", 1.5, 0, None), "name": (3, None), "head": ("boxes", 3, ["dense"]),
        "num_classes": (0, "3"), "config": (5, {}, good["config"] | {"dims": 3}),
        "head_options": ([], None, {"queries": 3}), "task": ("boxes", 3),
        "categories": (3, [3], [{"id": 1}], [{"id": 1, "name": "a", "color": 3}]),
        "preprocess": (3, {"mean": [1]}, {"mean": [0.5], "std": [0]}),
        "object_diameter": ("a", -1, True), "min_score": ("a", -1, 1.5), "trained": (3, [1]),
    }  # fmt: skip
    row = {"id": 1, "name": "a", "is_thing": True, "color": [1, 2, 3]}
    rows = {"id": ("a", 1.5), "name": (3, None), "is_thing": (1,), "color": ([1, 2], [1, 2, 256])}
    wrong["categories"] += tuple(
        [row | {name: value}] for name, values in rows.items() for value in values
    )
    wrong["categories"] += ([row, row],)  # of a model of one kind
    texts = ["{", "[]", "3", "[" * 100_000]
    texts += [good | {name: value} for name, values in wrong.items() for value in values]
    for text in texts:
        rewrite(path, text)
        with pytest.raises(CheckpointError, match=r"m\.safetensors: ") as error:
            load_model(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list_models(pretrained=True))
def test_the_weights_of_the_package(tmp_path, name):
    """Their file is what `save_model` makes of the model, to the last byte, and says how the model
    was trained; the card beside it is of each."""
    folder = Path(pointformer.models.__file__).parent / "weights"
    path, model = folder / f"{name}.safetensors", create_model(name)
    save_model(model, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == path.read_bytes()
    assert path.stat().st_size <= 10 * 2**20
    assert not model.training
    assert None not in (model.task, model.categories)
    assert model.trained["recipe"]
    assert f"# Model card: {name}\n" in (folder / "README.md").read_text("utf-8")


def test_classes_of_the_weights_of_the_package():
    nuclei, air = create_model("aff_nano.nuclei"), create_model("aff_nano.uav")
    assert [category.name for category in nuclei.categories] == ["nucleus"]
    assert [category.name for category in air.categories] == ["person", "car", "bicycle", "other"]
    assert (nuclei.task, air.task) == ("instance", "instance")


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

    monkeypatch.setattr("pointformer.models.files.serialized", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(Model("small", SMALL, "dense", 3), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["model_SWA", "swa", "Teacher", "EMA", "modelEmaState", "studentEMAWeights", "a.ema"]
)
def test_averages_are_known_by_any_of_their_names(name):
    raw, average = small(seed=0).state_dict(), small(seed=1).state_dict()
    model = small(seed=2)
    with pytest.warns(UserWarning, match="took 'model' of the weights in it"):
        load_state(model, {name: average, "model": raw}, "m.pth")
    assert all(torch.equal(value, raw[key]) for key, value in model.state_dict().items())


def test_random_weights_have_the_normalization_that_fits(tmp_path):
    path, model = tmp_path / "m.safetensors", small()
    model.preprocess = Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    save_model(model, path)
    assert create_model(path, False).preprocess.mean == (0.1, 0.2, 0.3)
    assert create_model(path, False, in_channels=1).preprocess.mean == pytest.approx((0.449,))


@pytest.mark.parametrize("head", ["point_classification", "point_segmentation"])
def test_the_head_of_points_is_read_off_the_weights(tmp_path, head):
    options = {"dims": (16, 16), "depths": 1, "heads": 2, "neighborhood_size": 16}
    made = create_model("point_nano", head=head, num_classes=7, **options)
    torch.save(made.state_dict(), tmp_path / "m.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model(tmp_path / "m.pt", "point_nano", **options)
    assert (loaded.head_name, loaded.num_classes) == (head, 7)
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_units_of_points_belong_to_the_file(tmp_path):
    model = Model("small", SMALL_OF_POINTS, "point_classification", 3)
    for unit in (0.25, None):
        model.preprocess = PointPreprocess(unit)
        save_model(model, tmp_path / "m.safetensors")
        loaded = load_model(tmp_path / "m.safetensors")
        assert loaded.preprocess.unit == loaded.config.unit == unit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"preprocess": torch.nn.Identity()}, "small: preprocess: a foreign Identity is not saved"),
        ({"preprocess": PointPreprocess()}, "a foreign PointPreprocess is not saved"),
        ({"min_score": 1.5}, "min_score: expected a number in"),
        ({"categories": [Category(n, str(n)) for n in range(5)]}, "5 categories for"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, spoil, message):
    model = small()
    for name, value in spoil.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=message):
        save_model(model, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_preprocessing_may_be_wrapped(tmp_path):
    model = small()
    model.preprocess = torch.compile(Preprocess((0.1, 0.2, 0.3)))
    save_model(model, tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors").preprocess.mean == (0.1, 0.2, 0.3)


def test_containers_of_models_of_points(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "small_of_points", SMALL_OF_POINTS)
    state = Model("small_of_points", SMALL_OF_POINTS, "point_classification", 3).state_dict()
    path = tmp_path / "m.pth"
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, path)
    loaded = load_model(path, "small_of_points")
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_weights_of_a_backbone_alone():
    """Of pictures and of points, into a model with a fresh head."""
    for config, head in ((SMALL, "dense"), (SMALL_OF_POINTS, "point_classification")):
        source, model = (Model("small", config, head, 3) for _ in range(2))
        state = source.backbone.state_dict()
        with pytest.warns(UserWarning, match="kept: the backbone and 0 of"):
            load_state(model, state, "b.pth", new_head=True)
        assert all(torch.equal(v, state[k]) for k, v in model.backbone.state_dict().items())


def test_words_in_which_an_average_is_spelled_by_chance():
    raw, average = small(seed=0).state_dict(), small(seed=1).state_dict()
    model = small(seed=2)
    for name in ("semantic", "schema", "cinema"):
        with pytest.warns(UserWarning, match=f"took '{name}' of the weights in it"):
            load_state(model, {name: raw, "other": average}, "m.pth")
    assert all(torch.equal(value, raw[key]) for key, value in model.state_dict().items())


def test_an_option_that_is_the_default_changes_nothing(tmp_path):
    model = small("hcformer", queries=4, dim=16, hidden=16)
    model.trained, model.min_score = {"steps": 3}, 0.3
    save_model(model, tmp_path / "m.safetensors")
    same = load_model(tmp_path / "m.safetensors", neighbors=9)
    assert (same.trained, same.min_score) == ({"steps": 3}, 0.3)
    other = load_model(tmp_path / "m.safetensors", neighbors=5)
    assert (other.trained, other.min_score) == (None, None)


def test_an_unknown_head_for_random_weights_is_named(tmp_path):
    save_model(small(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"head: expected one of classification, .*, got 'foo'"):
        create_model(tmp_path / "m.safetensors", pretrained=False, head="foo")


def test_a_digest_is_of_buffers_too():
    model = small()
    before = weights_digest(model)
    next(b for n, b in model.named_buffers() if n.endswith("running_mean")).add_(1)
    assert weights_digest(model) != before


def test_complex_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 weights are no dense tensors with values"):
        save_model(with_parameter(small(), torch.zeros(2, dtype=torch.complex64)), tmp_path / "m")
