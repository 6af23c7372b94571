"""COCO's AP and boundary AP against the packages, boundary IoU against a literal count."""

import io
import itertools
import json
import math
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers import scenes
from helpers.metrics import scored
from pointformer import data
from pointformer.annotations import VOID, Mask, Objects, Segment
from pointformer.data import Annotation
from pointformer.data.coco import decode_mask, encode_mask
from pointformer.metrics import CocoAP, boundary_iou, mask_boundary

MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """The JSON file, the data set and a poor prediction for each picture."""
    root = tmp_path_factory.mktemp("coco")
    path = scenes.coco_instances(root)
    dataset = data.read_coco_instances(path, root / "val2017")
    predictions = []
    for seed, annotation in enumerate(dataset):
        random = scenes.rng(seed)
        objects = annotation.objects()
        kept = random.random(len(objects)) < 0.8
        dense = objects.dense()
        masks = np.concatenate([scenes.moved(dense[kept], seed), dense[:2]])
        classes = np.concatenate([objects.classes[kept], random.integers(0, 3, 2)[: len(masks)]])
        classes = classes[: len(masks)]
        scores = random.random(len(masks), np.float32)
        predictions.append(Objects(masks, classes, scores))
    return path, dataset, predictions


def score(pairs, categories, **options):
    return scored(lambda: CocoAP(categories, **options), pairs).scores()


def results_file(coco, folder):
    _, dataset, predictions = coco
    pairs = zip((a.id for a in dataset), predictions, strict=True)
    data.write_coco_results(folder / "results.json", pairs, dataset.categories)
    return str(folder / "results.json")


def test_objects_of_coco_files_score_as_pycocotools_scores_them(coco, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path, dataset, predictions = coco
    with redirect_stdout(io.StringIO()):
        truth = COCO(path)
        package = COCOeval(truth, truth.loadRes(results_file(coco, tmp_path)), "segm")
        package.evaluate()
        package.accumulate()
        package.summarize()
    scores = score(zip(predictions, dataset, strict=True), dataset.categories)
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    ours = [*(getattr(scores, name) for name in names), scores.recall]
    np.testing.assert_allclose(ours, package.stats[[0, 1, 2, 3, 4, 5, 8]], rtol=1e-12)
    assert all(0.05 < value < 0.95 for value in ours)
    np.testing.assert_allclose(scores.per_class.mean(), scores.ap)


def test_boundary_ap_is_that_of_faster_coco_eval(coco, tmp_path):
    from faster_coco_eval import COCO, COCOeval_faster

    path, dataset, predictions = coco
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        package = COCOeval_faster(truth, truth.loadRes(results_file(coco, tmp_path)), "boundary")
        package.evaluate()
        package.accumulate()
        package.summarize()
    pairs = list(zip(predictions, dataset, strict=True))
    scores = score(pairs, dataset.categories, boundary=True)
    ours = [scores.ap, scores.ap50, scores.ap75, scores.ap_small, scores.ap_large]
    np.testing.assert_allclose(ours, np.array(package.stats)[[0, 1, 2, 3, 5]], rtol=1e-9)
    assert scores.ap < score(pairs, dataset.categories).ap - 0.05


@pytest.mark.parametrize("boundary", [False, True])
@pytest.mark.parametrize("through_files", [False, True])
def test_annotations_as_predictions_score_one(coco, tmp_path, boundary, through_files):
    _, dataset, _ = coco
    predictions = [annotation.objects() for annotation in dataset]
    if through_files:
        pairs = zip((a.id for a in dataset), predictions, strict=True)
        data.write_coco_results(tmp_path / "r.json", pairs, dataset.categories)
        results = data.CocoResults(tmp_path / "r.json", dataset.categories)
        predictions = [results.objects(annotation) for annotation in dataset]
    pairs = zip(predictions, dataset, strict=True)
    scores = score(pairs, dataset.categories, boundary=boundary)
    for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "recall"):
        assert 100 * getattr(scores, name) == pytest.approx(100, abs=1e-9)


def test_plain_folders_score_one(tmp_path):
    ids = scenes.rectangles([1, 2, 300])
    scenes.picture(tmp_path / "a/images/x.png")
    scenes.save(tmp_path / "a/instances/x.png", ids.astype(np.uint16))
    dataset = data.read_folder(tmp_path / "a", task="instance")
    scenes.picture(tmp_path / "b/images/x.png")
    pairs = [(annotation.name, annotation.objects()) for annotation in dataset]
    data.write_folder_objects(tmp_path / "b", pairs, dataset.categories)
    written = data.read_folder(tmp_path / "b", task="instance")
    scores = score([(written[0].objects(), dataset[0])], dataset.categories)
    assert 100 * scores.ap == pytest.approx(100)


def test_number_of_detections_is_limited():
    masks = np.zeros((150, 20, 20), bool)
    for n in range(150):
        masks[n, n // 20 * 2 : n // 20 * 2 + 2, n % 20] = True
    scores = np.linspace(1, 0.5, 150, dtype=np.float32)
    objects = Objects(masks, np.zeros(150, np.int64), scores)
    segments = tuple(Segment(n + 1, 0, 2, mask=Mask.of(mask)) for n, mask in enumerate(masks))
    annotation = Annotation("a", None, (20, 20), 1, segments=segments)
    table = data.named_categories(["x"])
    assert score([(objects, annotation)], table).recall == pytest.approx(100 / 150)
    assert score([(objects, annotation)], table, max_detections=375).ap == pytest.approx(1)


def test_crowd_of_any_class_excuses_every_class():
    ids = np.zeros((20, 20), int)
    ids[:10], ids[12:, :8] = 255, 1
    segments = (Segment(1, 0, 64), Segment(255, VOID, 200, crowd=True))
    annotation = Annotation("a", None, ids.shape, 1, None, ids, segments)
    spurious = np.zeros((20, 20), bool)
    spurious[2:8, 3:9] = True
    objects = Objects(
        np.stack([ids == 1, spurious, spurious]), np.array([0, 0, 1]), np.float32([0.5, 0.9, 0.9])
    )
    table = data.named_categories(["x", "y"])
    scores = score([(objects, annotation)], table)
    assert scores.ap == pytest.approx(1)
    assert np.isnan(scores.per_class[1])  # no object of that class
    without = Annotation("a", None, ids.shape, 1, None, ids, segments[:1])
    assert score([(objects, without)], table).ap == pytest.approx(0.5)


def test_nothing_annotated_or_nothing_predicted():
    table = data.named_categories(["x"])
    empty = Annotation("a", None, (4, 4), 1)
    nothing = empty.objects()
    assert math.isnan(score([(nothing, empty)], table).ap)
    assert math.isnan(score([], table).ap)
    mask = np.ones((4, 4), bool)
    one = Annotation("b", None, (4, 4), 2, segments=(Segment(1, 0, 16, mask=Mask.of(mask)),))
    scores = score([(nothing, one)], table)
    assert (scores.ap, scores.recall, scores.ap_small) == (0, 0, 0)
    assert math.isnan(scores.ap_large)
    metric = CocoAP(table)
    metric.update(one.objects(), one)
    assert metric.scores().ap == metric.scores().ap == pytest.approx(1)


def test_bad_predictions(coco):
    _, dataset, _ = coco
    metric = CocoAP(dataset.categories)
    objects = dataset[0].objects()
    with pytest.raises(ValueError, match=r"expected masks .* \(200, 240\), got \(240, 200\)"):
        metric.update(
            Objects(objects.dense().transpose(0, 2, 1), objects.classes, objects.scores), dataset[0]
        )
    wrong = Objects(objects.masks, objects.classes + 1, objects.scores, objects.size)
    with pytest.raises(ValueError, match="unknown class in the objects of 000000001000"):
        metric.update(wrong, dataset[0])


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"pip install pointformer\[eval\]"):
        CocoAP(data.COCO)


def test_results_of_models_are_taken_as_they_are(tmp_path):
    import torch

    mask = np.zeros((30, 40), bool)
    mask[4:20, 5:30] = True
    annotation = Annotation(
        "a", None, (30, 40), 7, segments=(Segment(1, 1, 400, mask=Mask.of(mask)),)
    )
    found = Objects(torch.tensor(mask[None]), torch.tensor([1]), torch.tensor([0.75]))
    table = data.named_categories(["x", "y"])
    assert score([(found, annotation)], table).ap == pytest.approx(1)
    data.write_coco_results(tmp_path / "r.json", [(7, found)], table)
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert (row["image_id"], row["category_id"], row["score"]) == (7, 1, 0.75)


# Boundaries


def literal_boundary(mask, distance):
    """Pixels of the mask with one outside of it, or of the picture, at most so far away."""
    height, width = mask.shape
    near = np.zeros_like(mask)
    steps = range(-distance, distance + 1)
    for y, x in itertools.product(range(height), range(width)):
        for down, right in itertools.product(steps, steps):
            row, column = y + down, x + right
            inside = 0 <= row < height and 0 <= column < width and mask[row, column]
            near[y, x] |= mask[y, x] and not inside
    return near


@given(MASKS, st.sampled_from([0.02, 0.15, 0.3]))
def test_boundary_against_a_literal_count(mask, ratio):
    distance = max(1, round(ratio * math.hypot(*mask.shape)))
    np.testing.assert_array_equal(mask_boundary(mask, ratio), literal_boundary(mask, distance))


@pytest.mark.parametrize("size", [(60, 80), (200, 240), (33, 410)])
def test_boundary_is_that_of_faster_coco_eval(size):
    from faster_coco_eval.core.mask import rleToBoundary

    for seed in range(6):
        random = scenes.rng(seed)
        coarse = random.random((6, 8)) < 0.6
        rows, columns = (np.arange(n) * c // n for n, c in zip(size, coarse.shape, strict=True))
        mask = coarse[rows][:, columns]
        theirs = decode_mask(rleToBoundary(encode_mask(Mask.of(mask), size)), size, "").dense(size)
        np.testing.assert_array_equal(mask_boundary(mask), theirs)


def test_boundary_iou_by_hand():
    annotated = np.zeros((60, 80), bool)  # the diagonal is 100: two pixels
    annotated[10:30, 10:30] = True
    predicted = annotated.copy()
    predicted[14:26, 14:26] = False  # a hole beyond the boundary's reach
    # Rims: 20 x 20 - 16 x 16 = 144, and about the hole 16 x 16 - 12 x 12 = 112 more.
    assert boundary_iou(annotated, annotated) == 1
    assert boundary_iou(predicted, annotated) == pytest.approx(144 / (144 + 112))
    shifted = np.roll(annotated, 4, 1)
    # The upper and lower rims share 2 x 2 x 16 pixels; the left and right ones only their corners.
    both = mask_boundary(annotated) & mask_boundary(shifted)
    assert boundary_iou(shifted, annotated) == pytest.approx(both.sum() / (288 - both.sum()))
    assert both.sum() == 2 * 2 * 16
    empty = np.zeros((60, 80), bool)
    assert boundary_iou(empty, annotated) == 0
    assert boundary_iou(empty, empty) == 1
    with pytest.raises(ValueError, match=r"one shape, got \(60, 80\) and \(80, 60\)"):
        boundary_iou(annotated, annotated.T)
