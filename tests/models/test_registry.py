"""Models by name, tag and file."""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch

import pointformer.models
from pointformer.models import create_model, list_models, save_model

FILE = Path(pointformer.models.__file__).parent / "weights/aff_nano.nuclei.safetensors"


def same(one, other):
    """Whether modules have the same weights."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.fixture(scope="module")
def trained():
    return create_model("aff_nano.nuclei")


def test_a_tag_is_a_trained_model(trained, tmp_path, monkeypatch):
    """By its name, as the only one of its model, and as a file, wherever that is."""
    assert (trained.head_name, trained.num_classes, trained.task) == ("stars", 1, "instance")
    assert same(create_model("point_nano", True), create_model("point_nano.lidar"))
    assert not trained.training
    monkeypatch.chdir(tmp_path)
    save_model(trained, "m.safetensors")
    os.link("m.safetensors", "weights")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, pretrained in (
            ("aff_nano.nuclei", True), (FILE, None), (str(FILE), True),
            ("m.safetensors", None), ("weights", None), ("./weights", None),
        ):  # fmt: skip
            model = create_model(name, pretrained, rate=0.5, num_classes=1, head="stars")
            assert same(model, trained), name
            assert (model.trained, model.config.rate) == (trained.trained, 0.5)
        for name in ("aff_nano.nuclei", FILE):
            random = create_model(name, False)
            assert not same(random.backbone, trained.backbone)
            assert (random.head_name, random.task) == ("stars", "instance")
            assert (random.trained, random.object_diameter, random.training) == (None, None, True)
            assert random.min_score is None
        assert create_model("aff_nano").head_name == "classification"


def test_other_classes_keep_the_backbone(trained):
    with pytest.warns(UserWarning, match=r"aff_nano\.nuclei.*: kept: the backbone and 32 of 34 .*"
                      r"fresh in aff_nano: 2 \(head\.classify\.") as caught:  # fmt: skip
        model = create_model("aff_nano.nuclei", num_classes=10)
    (warning,) = caught
    assert warning.filename == __file__
    assert model.num_classes == 10
    assert same(model.backbone, trained.backbone)
    assert same(model.head.mix, trained.head.mix)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10 + 32, 16, 16)
    with pytest.warns(UserWarning, match="the backbone and 0 of "):
        other = create_model("aff_nano.nuclei", head="classification", num_classes=10)
    assert same(other.backbone, trained.backbone)
    assert (other.trained, other.task) == (None, "classification")


def test_names_that_stand_for_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, error, message in (
        (("aff_huge",), ValueError, "name: unknown model 'aff_huge'; known models: .*aff_mini"),
        (("aff_huge.nuclei",), ValueError, "name: unknown model 'aff_huge'; known"),
        (("",), ValueError, "name: unknown model ''; known"),
        (("aff_nano.cells",), ValueError,
         "aff_nano.cells: there are no such weights; those of aff_nano: aff_nano.nuclei, "
         "aff_nano.uav"),
        (("aff_nano.",), ValueError, "aff_nano.: there are no such weights"),
        (("aff_mini", True), ValueError,
         "aff_mini: has no weights in the package, which are of aff_nano.nuclei, aff_nano.uav, "
         "point_nano.lidar; .*load_released"),
        (("aff_mini.nuclei",), ValueError, "aff_mini: has no weights in the package"),
        (("aff_nano", "nuclei"), TypeError,
         "pretrained: expected .*; a tag is part of the name: aff_nano.nuclei"),
        (("m.safetensors",), ValueError, "m.safetensors: no such file"),
        (("./aff_nano.nuclei",), ValueError, "aff_nano.nuclei: no such file"),
    ):  # fmt: skip
        with pytest.raises(error, match=message) as raised:
            create_model(*arguments)
        assert "\n" not in str(raised.value)


def test_several_tags(tmp_path, monkeypatch, trained):
    for tag in ("nuclei", "cells.v2"):
        save_model(trained, tmp_path / f"aff_nano.{tag}.safetensors")
    monkeypatch.setattr("pointformer.models.registry._WEIGHTS", tmp_path)
    names = ["aff_nano.cells.v2", "aff_nano.nuclei"]
    assert list_models(pretrained=True) == names
    assert same(create_model("aff_nano.cells.v2"), trained)
    with pytest.raises(
        ValueError, match=re.escape(f"several weights; those of aff_nano: {', '.join(names)}")
    ):
        create_model("aff_nano", pretrained=True)


def test_models_are_listed_by_patterns():
    names = list_models()
    assert names == sorted(names)
    assert {"aff_nano", "swin_mini"} <= set(names)
    assert list_models(pretrained=True) == ["aff_nano.nuclei", "aff_nano.uav", "point_nano.lidar"]
    for pattern, pretrained, expected in (
        ("*nano*", False, ["aff_nano", "point_nano"]),
        (["swin_t*", "aff_nano"], False, ["aff_nano", "swin_tiny"]),
        ("aff_*", True, ["aff_nano.nuclei", "aff_nano.uav"]),
        ("aff_nano", True, ["aff_nano.nuclei", "aff_nano.uav"]),
        ("*.nuclei", True, ["aff_nano.nuclei"]),
        ("*.nuclei", False, []),
        ("point_*", True, ["point_nano.lidar"]),
        ("AFF_*", False, []),
        ("swin_*", True, []),
        ([], False, []),
    ):
        assert list_models(pattern, pretrained=pretrained) == expected, pattern
    assert list_models("aff_*") == [name for name in names if name.startswith("aff_")]
