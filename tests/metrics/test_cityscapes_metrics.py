"""Cityscapes' AP of objects against the package's own run over files."""

import copy
import pickle
import sys

import numpy as np
import pytest

from helpers import scenes
from helpers.metrics import scored
from pointformer import data
from pointformer.data import Annotation, Objects
from pointformer.metrics import CityscapesAP


@pytest.fixture
def dataset(tmp_path):
    return data.read_cityscapes(scenes.cityscapes(tmp_path / "data", frames=6), task="instance")


def poor(annotation, seed):
    """Moved, lost, doubled and mistaken objects; some lie on groups and on void."""
    random = scenes.rng(seed)
    objects = annotation.objects()
    dense, kept = objects.dense(), random.random(len(objects)) < 0.85
    groups = [annotation.ids == s.id for s in annotation.segments if s.crowd]
    void = annotation.ids == 4
    masks = np.concatenate([scenes.moved(dense[kept], seed), dense[:3], np.stack([*groups, void])])
    classes = np.concatenate([objects.classes[kept], objects.classes[:3], [0, 2, 5]])
    classes = np.where(random.random(len(classes)) < 0.1, random.integers(0, 8), classes)
    return Objects(masks, classes, random.random(len(masks), np.float32))


def score(pairs, categories):
    return scored(lambda: CityscapesAP(categories), pairs).scores()


def test_the_packages_own_run_gives_the_same(dataset, tmp_path, monkeypatch):
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as package

    # With NumPy 2.4, the package calls what is no more, and cannot write its matches as JSON.
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    monkeypatch.setattr(package, "writeDict2JSON", lambda content, path: None)
    out = tmp_path / "out"
    predictions = [poor(annotation, seed) for seed, annotation in enumerate(dataset)]
    for predicted, annotation in zip(predictions, dataset, strict=True):
        data.write_cityscapes_objects(out, annotation.name, predicted, dataset.categories)
    args = copy.copy(package.args)
    args.quiet, args.JSONOutput = True, False
    args.predictionPath, args.predictionWalk = str(out), None
    args.gtInstancesFile = str(tmp_path / "instances.json")
    truth = [str(entry.labels) for entry in dataset.entries]
    expected = package.evaluateImgLists(
        [package.getPrediction(path, args) for path in truth], truth, args
    )["averages"]

    read = [data.read_cityscapes_objects(out, a, dataset.categories) for a in dataset]
    for found in (predictions, read):
        scores = score(zip(found, dataset, strict=True), dataset.categories)
        assert scores.ap == pytest.approx(expected["allAp"], rel=1e-9)
        assert scores.ap50 == pytest.approx(expected["allAp50%"], rel=1e-9)
        assert 0.1 < scores.ap < scores.ap50 < 0.95
        theirs = [expected["classes"][c.name]["ap"] for c in dataset.categories]
        np.testing.assert_allclose(scores.per_class, theirs, rtol=1e-9)
    assert np.isnan(scores.per_class).sum() == 5  # classes without an object


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_annotations_as_predictions_score_one(tmp_path, task):
    dataset = data.read_cityscapes(scenes.cityscapes(tmp_path), task=task)
    things = {n for n, category in enumerate(dataset.categories) if category.is_thing}
    pairs = []
    for annotation in dataset:
        objects = annotation.objects()
        kept = [n for n, category in enumerate(objects.classes) if category in things]
        found = objects.chosen(kept)
        data.write_cityscapes_objects(tmp_path / "out", annotation.name, found, dataset.categories)
        read = data.read_cityscapes_objects(tmp_path / "out", annotation, dataset.categories)
        pairs.append((read, annotation))
    scores = score(pairs, dataset.categories)
    assert (100 * scores.ap, 100 * scores.ap50) == (100, 100)
    assert len(scores.per_class) == len(dataset.categories)


def test_nothing_predicted_scores_zero(dataset):
    nothing = Objects(np.zeros((0, *scenes.SIZE), bool), np.zeros(0, int), np.zeros(0))
    assert score([(nothing, annotation) for annotation in dataset], dataset.categories).ap == 0


def test_parts_from_other_processes(dataset):
    annotations = list(dataset)
    whole, *parts = (CityscapesAP(dataset.categories) for _ in range(3))
    for number, annotation in enumerate(annotations):
        for metric in (whole, parts[number % 2]):
            metric.update(poor(annotation, number), annotation)
    first, second = pickle.loads(pickle.dumps(parts))
    first.merge(second)
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_bad_arguments(dataset, monkeypatch):
    metric = CityscapesAP(dataset.categories)
    annotation, objects = dataset[0], dataset[0].objects()
    with pytest.raises(
        ValueError, match=r"expected masks of height and width \(96, 128\), got \(5, 128\)"
    ):
        metric.update(Objects(objects.dense()[:, :5], objects.classes, objects.scores), annotation)
    wrong = Objects(objects.masks, objects.classes + 8, objects.scores, scenes.SIZE)
    with pytest.raises(ValueError, match="unknown class in the objects of town_000000"):
        metric.update(wrong, annotation)
    with pytest.raises(ValueError, match="x has no map of ids"):
        metric.update(objects, Annotation("x", None, scenes.SIZE, "x"))
    monkeypatch.setitem(sys.modules, "cityscapesscripts.evaluation", None)
    with pytest.raises(ImportError, match=r"pip install pointformer\[eval\]"):
        CityscapesAP(dataset.categories)
