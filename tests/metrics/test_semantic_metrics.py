"""Mean IoU against a literal count and against Cityscapes' own evaluation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers import scenes
from helpers.metrics import scored
from pointformer import data
from pointformer.data import VOID
from pointformer.metrics import SemanticIoU

MAPS = hnp.arrays(np.int32, (4, 5), elements=st.integers(VOID, 3))


def truth(classes):
    return data.Annotation("truth", None, classes.shape, "truth", semantic=classes)


def score(pairs, classes):
    return scored(lambda: SemanticIoU(classes), [(p, truth(a)) for p, a in pairs]).scores()


def test_by_hand():
    annotated = np.array([[0, 0, 0, 1], [1, VOID, VOID, VOID]])
    predicted = np.array([[0, 0, 1, 1], [VOID, 2, 0, 1]])
    # Class 0: 2 of 3 found, none spurious. Class 1: 1 of 2 found, 1 spurious. Class 2 is predicted
    # on void only, class 3 nowhere.
    scores = score([(predicted, annotated)], 4)
    np.testing.assert_array_equal(scores.iou, [2 / 3, 1 / 3, np.nan, np.nan])
    np.testing.assert_array_equal(scores.accuracy, [2 / 3, 1 / 2, np.nan, np.nan])
    assert scores.mean_iou == pytest.approx(1 / 2)
    assert scores.mean_accuracy == pytest.approx(7 / 12)
    assert scores.pixel_accuracy == pytest.approx(3 / 5)


def test_a_class_that_is_only_predicted_counts_as_zero():
    scores = score([(np.array([[0, 2]]), np.array([[0, 0]]))], 3)
    np.testing.assert_array_equal(scores.iou, [1 / 2, np.nan, 0])
    assert scores.mean_iou == 0.25


def test_one_matrix_for_all_pictures_is_not_a_mean_over_pictures():
    first = np.array([[0, 0, 0, 0]]), np.array([[0, 0, 0, 0]])
    second = np.array([[1, 1]]), np.array([[0, 1]])
    assert score([first, second], 2).mean_iou == pytest.approx((4 / 5 + 1 / 2) / 2)
    parts = SemanticIoU(2), SemanticIoU(2)
    for part, (predicted, annotated) in zip(parts, (first, second), strict=True):
        part.update(predicted, truth(annotated))
    parts[0].merge(parts[1])
    assert parts[0].scores().mean_iou == score([first, second], 2).mean_iou


@given(st.lists(st.tuples(MAPS, MAPS), min_size=1, max_size=3))
def test_against_a_literal_count(pairs):
    scores = score(pairs, 4)
    predicted = np.concatenate([pair[0].ravel() for pair in pairs])
    annotated = np.concatenate([pair[1].ravel() for pair in pairs])
    predicted, annotated = predicted[annotated != VOID], annotated[annotated != VOID]
    for c in range(4):
        union = ((predicted == c) | (annotated == c)).sum()
        both = ((predicted == c) & (annotated == c)).sum()
        expected = both / union if union else np.nan
        np.testing.assert_equal(scores.iou[c], expected)


@given(MAPS)
def test_a_perfect_prediction_scores_one(classes):
    scores = score([(classes, classes)], 4)
    if (classes == VOID).all():
        assert np.isnan(scores.mean_iou)
        assert np.isnan(scores.pixel_accuracy)
    else:
        assert (scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy) == (1, 1, 1)


def test_cityscapes_files_score_as_the_package_scores_them(tmp_path):
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as package

    dataset = data.read_cityscapes(scenes.cityscapes(tmp_path))
    args = package.args
    args.evalInstLevelScore = False
    theirs = package.generateMatrix(args)
    ours = SemanticIoU(19)
    for seed, annotation in enumerate(dataset):
        random = scenes.rng(seed)
        predicted = np.roll(annotation.semantic, random.integers(-9, 9, 2), (0, 1))
        predicted[random.random(predicted.shape) < 0.1] = random.integers(19)
        path = tmp_path / "out" / f"{annotation.name}_pred_labelIds.png"
        data.write_labels(path, predicted, data.CITYSCAPES, void=0)
        truth = str(dataset.entries[seed].labels)
        package.evaluatePair(str(path), truth, theirs, None, {}, args)
        ours.update(predicted, annotation)
    scores = ours.scores()
    expected = [package.getIouScoreForLabel(c.id, theirs, args) for c in data.CITYSCAPES]
    np.testing.assert_allclose(scores.iou, expected, rtol=1e-12)
    assert np.isfinite(expected).sum() > 4
    assert 0.2 < scores.mean_iou < 0.9
    by_name = {c.name: x for c, x in zip(data.CITYSCAPES, expected, strict=True)}
    assert scores.mean_iou == pytest.approx(package.getScoreAverage(by_name, args))


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes", "folder", "panoptic"])
def test_annotations_written_as_predictions_score_one(tmp_path, kind):
    root, out = tmp_path / "data", tmp_path / "out"
    if kind == "ade20k":
        for n in range(2):
            labels = scenes.rng(n).integers(0, 151, scenes.SIZE, dtype=np.uint8)
            scenes.picture(root / f"images/validation/{n}.jpg")
            scenes.save(root / f"annotations/validation/{n}.png", labels)
        dataset, void = data.read_ade20k(root), 0
    elif kind == "folder":
        labels = scenes.rng().integers(0, 12, scenes.SIZE, dtype=np.uint8)
        scenes.picture(root / "images/a.jpg")
        scenes.save(root / "labels/a.png", labels)
        dataset, void = data.read_folder(root, categories=list("abcdefghijk"), void=(11,)), 11
    else:
        task = "semantic" if kind == "cityscapes" else "panoptic"
        dataset, void = data.read_cityscapes(scenes.cityscapes(root), task=task), 0
    metric = SemanticIoU(len(dataset.categories))
    for annotation in dataset:
        path = out / "labels" / f"{annotation.name}.png"
        data.write_labels(path, annotation.classes(), dataset.categories, void=void)
        scenes.picture(out / "images" / f"{annotation.name}.jpg", annotation.size)
    predictions = data.read_folder(out, categories=dataset.categories, void=(void,))
    for predicted, annotation in zip(predictions, dataset, strict=True):
        metric.update(predicted.semantic, annotation)
    scores = metric.scores()
    assert (100 * scores.mean_iou, 100 * scores.pixel_accuracy) == (100, 100)


@pytest.mark.parametrize(
    ("predicted", "annotated", "message"),
    [
        (
            np.zeros((2, 3), int),
            np.zeros((3, 2), int),
            r"truth to be of shape \(3, 2\), got \(2, 3\)",
        ),
        (np.full((1, 2), 4), np.zeros((1, 2), int), "predicted: expected .* -1 to 3, got 4 to 4"),
        (np.zeros((1, 2), int), np.full((1, 2), -2), "truth: expected .* -1 to 3, got -2"),
    ],
)
def test_bad_maps(predicted, annotated, message):
    with pytest.raises(ValueError, match=message):
        SemanticIoU(4).update(predicted, truth(annotated))


def test_scores_are_no_classes():
    with pytest.raises(TypeError, match="map of truth to be of integers, got float64"):
        SemanticIoU(4).update(np.full((1, 2), 0.9), truth(np.zeros((1, 2), int)))
