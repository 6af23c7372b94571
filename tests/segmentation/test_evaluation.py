"""`pointformer evaluate` and what it is made of, on small synthetic data sets."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pointformer import cli, segment
from pointformer.annotations import Objects, SegmentMap
from pointformer.data import Annotation, Category, Dataset, Segment, read_folder
from pointformer.data.annotations import Entry
from pointformer.evaluation import evaluate
from pointformer.metrics import CocoAP
from pointformer.models import AFFConfig, Model, load_model, save_model
from pointformer.segmentation.tiling import windows_of
from pointformer.tasks.instance import InstanceMasks
from pointformer.tasks.panoptic import Panoptic

SMALL = AFFConfig(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)
CATEGORIES = (Category(0, "background", False), Category(1, "cell", True))


@pytest.fixture
def folder(tmp_path):
    """Two pictures with labels and instances."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels", "instances"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    for name in ("a", "b"):
        ids = np.zeros((40, 52), np.uint8)
        ids[4:14, 5:20], ids[20:33, 30:45] = 1, 2
        picture = rng.integers(0, 255, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"val/images/{name}.png")
        Image.fromarray((ids > 0).astype(np.uint8)).save(tmp_path / f"val/labels/{name}.png")
        Image.fromarray(ids).save(tmp_path / f"val/instances/{name}.png")
    return tmp_path


def mask_model(task, classes=2):
    torch.manual_seed(0)
    categories = CATEGORIES if classes == 2 else [Category(n, str(n)) for n in range(classes)]
    options = {"queries": 3, "dim": 32, "hidden": 32, "decoder_layers": 1}
    return Model(
        "small", SMALL, "hcformer", classes, task=task, categories=categories, **options
    ).eval()


def test_a_perfect_model_scores_100(folder, monkeypatch):
    """The truth in the place of the model's class scores."""
    dataset = read_folder(folder, "val", "semantic", categories=CATEGORIES)
    truths = iter([annotation.classes() for annotation in dataset])

    def perfect(task, output, sizes, output_sizes=None, **options):
        truth = next(truths)
        return [torch.from_numpy(np.stack([truth == k for k in range(2)])).float()]

    monkeypatch.setattr("pointformer.tasks.semantic.SemanticMasks.decode", perfect)
    result = evaluate(mask_model("semantic"), dataset, "semantic")
    assert result.pictures == 2
    assert result.scores == {"mIoU": 1.0, "mean accuracy": 1.0, "pixel accuracy": 1.0}


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_command_line(folder, tmp_path, capsys, task):
    path = tmp_path / "model.safetensors"
    save_model(mask_model(task, 2 if task == "semantic" else 1), path)
    out = tmp_path / "scores.json"
    arguments = ["evaluate", folder, "--model", path, "--json", out, "--threads", 1]
    assert cli.main([str(a) for a in arguments]) == 0
    content = json.loads(out.read_text())
    assert content["task"] == task
    assert content["images"] == 2
    text = capsys.readouterr().out
    model = load_model(path)
    categories = {"categories": CATEGORIES} if task == "semantic" else {}
    expected = evaluate(model, read_folder(folder, "val", task, **categories), task).scores
    assert content["scores"].keys() == expected.keys()
    for name, value in content["scores"].items():
        assert name in text
        assert value == pytest.approx(expected[name], abs=1e-4) or np.isnan(expected[name])


SCORES = {1: 0.9, 2: 0.3, 3: 0.05, 4: 0.6, 5: 0.45, 6: 0.2}


@pytest.fixture
def seen_ids(tmp_path, monkeypatch):
    """A data set whose pictures show the ids of their six objects, and models that read them off:
    in each window what is in it, with the scores of `SCORES`."""
    ids = np.zeros((60, 90), np.int32)
    ids[3:20, 4:30], ids[25:50, 2:20], ids[5:30, 35:60] = 1, 2, 3
    ids[35:58, 25:55], ids[2:28, 64:88], ids[32:57, 60:87] = 4, 5, 6
    (tmp_path / "images").mkdir()
    (tmp_path / "instances").mkdir()
    Image.fromarray(np.repeat(ids[..., None], 3, 2).astype(np.uint8)).save(
        tmp_path / "images/a.png"
    )
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "instances/a.png")

    def forward(model, images, with_stages):
        return images * model.preprocess.std[0] + model.preprocess.mean[0], []

    def decode(task, output, sizes, output_sizes=None, **options):
        window = np.rint(output[0, 0].numpy() * 255).astype(np.int32)
        shown = [int(n) for n in np.unique(window) if n]
        scores = [SCORES[n] for n in shown]
        if task.name == "instance":
            return [Objects([window == n for n in shown], [0] * len(shown), scores, window.shape)]
        number = np.searchsorted(shown, window).astype(np.int32) + 1
        segments = [Segment(n, 0, 1, score=s) for n, s in enumerate(scores, 1)]
        return [SegmentMap(np.where(window, number, 0).astype(np.int32), tuple(segments))]

    monkeypatch.setattr(Model, "forward", forward)
    for task in (InstanceMasks, Panoptic):
        monkeypatch.setattr(task, "decode", decode)
    return read_folder(tmp_path, task="instance"), ids


@pytest.mark.parametrize("tile", [None, 48, 40, 33])
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_windows_keep_every_object_with_its_score(seen_ids, task, tile):
    """Objects of low scores, cut by windows, count as those of the whole picture do."""
    dataset, ids = seen_ids
    model = mask_model(task, 1)
    scores = evaluate(model, dataset, task, tile=tile).scores
    assert scores["COCO AP" if task == "instance" else "PQ"] == 1
    if task == "instance":  # what `segment` shows has a score of at least 0.5
        assert scores["AP at IoU 0.5 (TP / (TP + FP + FN))"] == 2 / 6
        shown = segment(model, dataset[0].image, tile=tile)
        assert shown.scores == pytest.approx((0.9, 0.6))
        np.testing.assert_array_equal(shown.labels > 0, (ids == 1) | (ids == 4))
        low = segment(model, dataset[0].image, tile=tile, min_score=0.04)
        assert sorted(low.scores) == pytest.approx(sorted(SCORES.values()))
        np.testing.assert_array_equal(low.labels > 0, ids > 0)
    with pytest.raises(ValueError, match=r"scales, flip: only for the tasks .*semantic"):
        evaluate(model, dataset, task, flip=True)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_the_score_of_a_joined_object_is_the_highest(seen_ids, monkeypatch, task):
    """Here each window is as sure of an object as it sees of it."""
    dataset, ids = seen_ids
    areas = np.bincount(ids.ravel())
    kind = InstanceMasks if task == "instance" else Panoptic
    plain = kind.decode

    def decode(self, *arguments, **options):
        (found,) = plain(self, *arguments, **options)
        objects = found if task == "instance" else found.objects()
        numbers = [list(SCORES.values()).index(round(s, 4)) + 1 for s in objects.scores.tolist()]
        scores = [mask.area / areas[n] for mask, n in zip(objects.masks, numbers, strict=True)]
        objects = Objects(objects.masks, objects.classes, scores, objects.size)
        if task == "instance":
            return [objects]
        segments = (
            replace(s, score=score) for s, score in zip(found.segments, scores, strict=True)
        )
        return [SegmentMap(found.ids, tuple(segments))]

    monkeypatch.setattr(kind, "decode", decode)
    grid = windows_of(*ids.shape, 40, 16)
    result = segment(mask_model(task, 1), dataset[0].image, tile=40, overlap=16, min_score=0.0)
    assert result.num_objects == 6
    for number in range(1, 7):
        shares = [(ids[window.window] == number).sum() / areas[number] for window in grid]
        (mine,) = np.unique(result.labels[ids == number])
        assert result.scores[mine - 1] == pytest.approx(max(shares))


def test_memory_is_that_of_the_objects(tmp_path, monkeypatch):
    """100 objects of a picture of 1000 x 1000: a mask of the picture for each were 100 MB."""
    side = 1000
    ids = np.zeros((side, side), np.int32)
    for n in range(100):
        ids[n // 10 * 100 : n // 10 * 100 + 40, n % 10 * 100 : n % 10 * 100 + 30] = n + 1
    Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / "a.png")
    segments = tuple(Segment(n, 0, 1200) for n in range(1, 101))
    annotation = Annotation("a", tmp_path / "a.png", ids.shape, 1, None, ids, segments)
    dataset = Dataset(
        tmp_path, CATEGORIES[1:], [Entry("a", annotation.image, None, lambda: annotation)]
    )
    found = SegmentMap(ids, segments)
    monkeypatch.setattr("pointformer.evaluation.predict", lambda *args, **options: (found, ()))
    torch.manual_seed(0)
    model = Model("small", SMALL, "dense", 3)
    peak = 0
    compute = CocoAP.compute

    def untraced(self):
        nonlocal peak
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()  # it takes no memory, and would take long
        return compute(self)

    monkeypatch.setattr(CocoAP, "compute", untraced)
    tracemalloc.start()
    assert evaluate(model, dataset, "instance").scores["COCO AP"] == 1
    assert peak > side**2
    assert peak < 64 * side**2  # bytes; a few maps are in memory, of 4 and 8 bytes a pixel


@pytest.mark.parametrize("head", ["dense", "hcformer"])
def test_a_model_in_training_is_left_as_it_was(folder, head):
    """It is run in eval mode: statistics, modes, hooks and random numbers stay."""
    torch.manual_seed(0)
    options = (
        {"queries": 3, "dim": 32, "hidden": 32, "decoder_layers": 1} if head != "dense" else {}
    )
    config = SMALL.override(drop_path=0.5)
    model = Model("small", config, head, 2, task="semantic", categories=CATEGORIES, **options)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    dataset = read_folder(folder, "val", "semantic", categories=CATEGORIES)
    expected = evaluate(model.eval(), dataset, "semantic").scores
    labels = segment(model, dataset[0].image, tile=32).labels
    model.train()
    model.backbone.stages[0].eval()  # a frozen part
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert evaluate(model, dataset, "semantic", tile=32, flip=True).pictures == 2
    assert evaluate(model, dataset, "semantic").scores == expected
    np.testing.assert_array_equal(segment(model, dataset[0].image, tile=32).labels, labels)
    with pytest.raises(ValueError, match="overlap"):
        segment(model, dataset[0].image, tile=8, overlap=8)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not model.backbone._forward_hooks


def test_objects_of_a_dense_model_have_the_name_of_their_kind(folder, tmp_path):
    """Its three classes are no kinds of objects."""
    kind = Category(7, "nucleus", True, (9, 8, 7))
    torch.manual_seed(0)
    model = Model("small", SMALL, "dense", 3, categories=[kind])
    save_model(model, tmp_path / "model.safetensors")
    model = load_model(tmp_path / "model.safetensors")
    with torch.no_grad():
        model.head.classify[1].weight.zero_()
        model.head.classify[1].bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    result = segment(model, folder / "val/images/a.png")
    assert result.num_objects == 1
    assert result.class_name(1) == "nucleus"
    scores = evaluate(model, read_folder(folder, "val", "instance"), "instance").scores
    assert scores["COCO AP"] == 0
    with pytest.raises(ValueError, match="categories: expected one, of the objects"):
        Model("small", SMALL, "dense", 3, categories=[Category(n, str(n)) for n in range(3)])
    names = [Category(n, str(n)) for n in range(3)]
    semantic = Model("small", SMALL, "dense", 3, task="semantic", categories=names)
    assert segment(semantic, folder / "val/images/a.png").class_name(1) in "012"


def test_a_failure_leaves_the_model_as_it_was(folder, monkeypatch):
    model = mask_model("instance", 1).train()

    def fail(*args, **options):
        raise RuntimeError("no")

    monkeypatch.setattr("pointformer.tasks.instance.instances", fail)
    picture = read_folder(folder, "val", "instance")[0].image
    with pytest.raises(RuntimeError, match="no"):
        segment(model, picture)
    assert all(module.training for module in model.modules())
    assert not model.backbone._forward_hooks


def test_bad_data_is_one_line(folder, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_model(mask_model("semantic"), path)
    Image.fromarray(np.full((40, 52), 7, np.uint8)).save(folder / "val/labels/b.png")
    arguments = ["evaluate", str(folder), "--model", str(path), "--threads", "1"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "b.png" in error
    assert "7" in error
    assert cli.main([*arguments, "--skip-bad"]) == 0
    error = capsys.readouterr().err
    assert "1 skipped:" in error


def test_classes_and_tasks_must_fit(folder):
    dataset = read_folder(folder, "val", "semantic", categories=CATEGORIES)
    with pytest.raises(ValueError, match="made for 'panoptic', not for 'semantic'"):
        evaluate(mask_model("panoptic"), dataset, "semantic")
    with pytest.raises(ValueError, match="has 3 classes, the data set 2"):
        evaluate(mask_model("semantic", 3), dataset, "semantic")


def test_only_objects_that_can_be_told_apart_count(tmp_path, monkeypatch):
    """The truth as prediction is perfect, with stuff, a crowd and what is found on it."""
    ids = np.zeros((30, 40), np.int32)
    ids[2:10, 2:10], ids[12:20, 5:15], ids[:, 20:30], ids[:, 32:] = 1, 2, 3, 4
    segments = (
        Segment(1, 1, 64),
        Segment(2, 1, 80),
        Segment(3, 0, 300),
        Segment(4, 1, 240, crowd=True),
    )
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "a.png")
    annotation = Annotation("a", tmp_path / "a.png", (30, 40), 1, None, ids, segments)
    entry = Entry("a", annotation.image, None, lambda: annotation)
    dataset = Dataset(tmp_path, CATEGORIES, [entry])
    found = Objects([ids == n for n in (1, 2, 4)], [1, 1, 1], [1, 1, 1], ids.shape)
    monkeypatch.setattr(InstanceMasks, "decode", lambda *args, **options: [found])
    scores = evaluate(mask_model("instance"), dataset, "instance").scores
    assert scores["AP at IoU 0.5 (TP / (TP + FP + FN))"] == 1
    assert scores["COCO AP"] == 1


def test_unreadable_pictures_are_skipped_and_not_counted(folder, tmp_path, capsys):
    path, out = tmp_path / "model.safetensors", tmp_path / "scores.json"
    save_model(mask_model("semantic"), path)
    noise = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
    picture = folder / "val/images/a.jpg"
    Image.fromarray(noise).save(picture)
    picture.write_bytes(picture.read_bytes()[:-800])
    (folder / "val/images/a.png").unlink()
    arguments = ["evaluate", str(folder), "--model", str(path), "--threads", "1"]
    assert cli.main(arguments) == 1
    assert "a.jpg: expected a picture" in capsys.readouterr().err
    assert cli.main([*arguments, "--skip-bad", "--json", str(out)]) == 0
    content = json.loads(out.read_text(), parse_constant=pytest.fail)  # no NaN
    assert content["images"] == 1
    assert list(content["skipped"]) == ["a"]
    capsys.readouterr()
    other = folder / "val/images/b.png"
    other.write_bytes(other.read_bytes()[:-80])
    assert cli.main([*arguments, "--skip-bad"]) == 1
    assert "0 pictures to score (2 skipped)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scales", "-1"], "scales: expected positive numbers"),
        (["--scales", "nan"], "scales: expected positive numbers"),
        (["--limit", "-2"], "--limit: expected at least 1, got -2"),
        (["--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--tile", "0"], "tile: expected a positive integer, got 0"),
        (["--device", "nowhere"], "--device: nowhere cannot be used"),
    ],
)
def test_bad_options_are_one_line(folder, tmp_path, capsys, options, message):
    save_model(mask_model("semantic"), tmp_path / "model.safetensors")
    arguments = ["evaluate", str(folder), "--model", str(tmp_path / "model.safetensors")]
    assert cli.main([*arguments, "--threads", "1", *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 or "image" in error  # beside the progress bar


def test_models_that_cannot_do_a_task_are_told(folder):
    dataset = read_folder(folder, "val", "semantic", categories=CATEGORIES)
    options = {"task": None, "impl": None}
    for head, classes, task in (
        ("classification", 2, "semantic"),
        ("features", 2, "semantic"),
        ("dense", 3, "semantic"),
        ("dense", 2, "instance"),
        ("dense", 3, "panoptic"),
        ("mask2former", 2, "instance"),
    ):
        model = Model("small", SMALL, head, classes, **options)
        with pytest.raises(ValueError, match="model: "):
            evaluate(model, dataset, task)
    model = Model("small", SMALL, "dense", 2, task="semantic").eval()
    assert 0 <= evaluate(model, dataset, "semantic").scores["mIoU"] <= 1
    for head, task in (
        ("dense", "panoptic"),
        ("dense", "instance"),
        ("classification", "instance"),
    ):
        with pytest.raises(ValueError, match=f"task: head '{head}' with 2 classes"):
            Model("small", SMALL, head, 2, task=task)


def test_skip_bad_lists_single_objects_too(tmp_path, capsys):
    """A COCO file with two bad objects, a picture that is ambiguous and a heading of categories."""
    square = [[4, 4, 20, 4, 20, 20, 4, 20]]
    row = {"image_id": 1, "category_id": 1, "segmentation": square}
    content = {
        "categories": [
            {"id": 0, "name": "cells", "supercategory": "none"},
            {"id": 1, "name": "cell", "supercategory": "cells"},
        ],
        "images": [
            {"id": n, "file_name": name} for n, name in ((1, "a.png"), (2, "b.png"), (2, "c.png"))
        ],
        "annotations": [
            {**row, "id": 1},
            {**row, "id": 2, "segmentation": []},
            {**row, "id": 3, "category_id": 9},
            {**row, "id": 4, "image_id": 2},
        ],
    }
    path, out = tmp_path / "instances.json", tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    for name in "abc":
        noise = np.random.default_rng(0).integers(0, 255, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    model = tmp_path / "model.safetensors"
    save_model(mask_model("instance", 1), model)
    arguments = [
        "evaluate", tmp_path, "--format", "coco", "--annotations", path, "--model", model,
        "--threads", 1, "--json", out,
    ]  # fmt: skip
    arguments = [str(a) for a in arguments]
    assert cli.main(arguments) == 1
    assert "skip_bad (--skip-bad) leaves out what is bad" in capsys.readouterr().err
    assert cli.main([*arguments, "--skip-bad"]) == 0
    error = capsys.readouterr().err
    assert "5 skipped" in error
    report = json.loads(out.read_text())
    assert report["images"] == 1
    assert sorted(report["skipped"]) == ["annotation 2", "annotation 3", "b", "c", "category 0"]
    for problem in report["skipped"].values():
        assert problem in error


def test_the_default_split_of_ade20k_is_validation(folder, tmp_path, capsys):
    for kind, old in (("images", "images"), ("annotations", "labels")):
        (tmp_path / "ade" / kind).mkdir(parents=True)
        (folder / "val" / old).rename(tmp_path / "ade" / kind / "validation")
    path = tmp_path / "model.safetensors"
    save_model(mask_model("semantic", 150), path)
    arguments = [
        "evaluate",
        tmp_path / "ade",
        "--format",
        "ade20k",
        "--model",
        path,
        "--threads",
        1,
    ]
    assert cli.main([str(a) for a in arguments]) == 0
    assert "mIoU" in capsys.readouterr().out
