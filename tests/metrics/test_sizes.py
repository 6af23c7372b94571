"""Recall by class and size: small scenes whose answer is plain."""

import numpy as np
import pytest
import torch

from pointformer import TokenSet
from pointformer.annotations import VOID, Category, Mask, Objects, Segment, SegmentMap
from pointformer.data import Annotation
from pointformer.data.point_sets import PointAnnotation
from pointformer.metrics import RecallBySize, size_names

KINDS = (Category(1, "sky", False), Category(2, "car"))


def square(ids, value, top, left, side):
    ids[top : top + side, left : left + side] = value
    return ids


def scene():
    """A car of 4 pixels' side, one of 10, a crowd, and sky in the rest."""
    ids = np.full((40, 40), 9, np.int32)
    for value, top, left, side in ((1, 0, 0, 4), (2, 20, 20, 10), (3, 0, 30, 5)):
        square(ids, value, top, left, side)
    segments = (
        Segment(1, 1, 16),
        Segment(2, 1, 100),
        Segment(3, 1, 25, crowd=True),
        Segment(9, 0, int((ids == 9).sum())),
    )
    return Annotation("a", None, (40, 40), "a", ids=ids, segments=segments)


def test_what_is_annotated_finds_itself():
    annotation = scene()
    metric = RecallBySize(KINDS, (8, 32))
    metric.update(SegmentMap(annotation.ids, annotation.segments), annotation)
    assert metric.scores().annotated.tolist() == [[0, 0, 1], [1, 1, 0]]
    assert metric.scores().found.tolist() == metric.scores().annotated.tolist()
    assert set(metric.compute()) == {f"recall, {name}" for name in size_names((8, 32))}
    assert set(metric.compute().values()) == {1.0}


@pytest.mark.parametrize(
    ("side", "category", "found"), [(10, 1, 1), (8, 1, 1), (7, 1, 0), (10, 0, 0)]
)
def test_an_object_is_found_by_one_of_its_class_that_covers_it(side, category, found):
    """64 of 100 pixels are an IoU of 0.64, 49 are one of 0.49."""
    metric = RecallBySize(KINDS, (8, 32))
    mask = Mask.of(np.ones((side, side), bool), 20, 20)
    unsure = Mask.of(np.ones((4, 4), bool))
    metric.update(Objects([mask, unsure], [category, 1], [0.9, 0.4], (40, 40)), scene())
    assert metric.scores().found.tolist() == [[0, 0, 0], [0, found, 0]]


@pytest.mark.parametrize(
    ("area", "group"),
    [(63, 0), (64, 1), (255, 1), (256, 2), (1023, 2), (1024, 3), (9215, 3), (9216, 4)],
)
def test_groups_begin_with_their_sides(area, group):
    """8, 16, 32 and 96 pixels, if no others are asked for."""
    ids = (np.arange(10_000) < area).reshape(100, 100).astype(np.int32)
    annotation = Annotation("a", None, (100, 100), "a", ids=ids, segments=(Segment(1, 1, area),))
    metric = RecallBySize(KINDS)
    metric.update(SegmentMap(ids, annotation.segments), annotation)
    assert metric.scores().annotated[1].tolist() == np.eye(5)[group].tolist()


@pytest.mark.parametrize(
    ("rows", "score", "found"), [(5, 0.5, 1), (4, 0.5, 0), (5, 0.49, 0), (10, 1.0, 1)]
)
def test_an_object_that_is_shown_and_just_half_of_one_finds_it(rows, score, found):
    metric = RecallBySize(KINDS, ())
    mask = Mask.of(np.ones((rows, 10), bool), 20, 20)
    metric.update(Objects([mask], [1], [score], (40, 40)), scene())
    assert metric.scores().found.tolist() == [[0], [found]]
    assert metric.scores().annotated.tolist() == [[1], [2]]


def test_parts_that_touch_at_a_corner_are_two_and_half_finds_one():
    truth = np.kron(np.eye(2, dtype=np.int32), np.ones((4, 4), np.int32))
    found = np.zeros((8, 8), np.int32)
    found[:2, :4], found[4:6, 4:], found[5, 7] = 1, 1, 0  # 8 and 7 of 16 pixels
    metric = RecallBySize(KINDS, ())
    metric.update(found, Annotation("a", None, (8, 8), "a", semantic=truth))
    assert metric.scores().annotated.tolist() == [[2], [2]]
    assert metric.scores().found.tolist() == [[2], [1]]


@pytest.mark.parametrize(("areas", "found"), [((49,), 0), ((50,), 1), ((1, 49), 1)])
def test_half_of_stuff_is_enough(areas, found):
    """Of 100 pixels, in one segment or in several."""
    annotated = Annotation(
        "a", None, (10, 20), "a", ids=square(np.zeros((10, 20), np.int32), 1, 0, 0, 10),
        segments=(Segment(1, 0, 100),),
    )  # fmt: skip
    row = np.repeat(np.arange(1, len(areas) + 1), areas)
    ids = np.zeros((10, 20), np.int32)
    ids[:, :10] = np.pad(row, (0, 100 - len(row))).reshape(10, 10)
    metric = RecallBySize(KINDS, ())
    metric.update(SegmentMap.of(ids, [0] * len(areas), [1.0] * len(areas)), annotated)
    assert metric.scores().found.tolist() == [[found], [0]]
    assert metric.scores().annotated.tolist() == [[1], [0]]


def test_parts_of_a_map_of_classes_count_each():
    truth = np.full((20, 20), VOID, np.int32)
    square(square(truth, 1, 0, 0, 4), 1, 10, 10, 9)
    annotation = Annotation("a", None, (20, 20), "a", semantic=truth)
    found = np.zeros((20, 20), np.int32)
    square(found, 1, 0, 0, 20)[:, 14:] = 0  # of the larger part 4 of 9 columns
    metric = RecallBySize(KINDS, (8,))
    metric.update(found, annotation)
    assert metric.scores().annotated.tolist() == [[0, 0], [1, 1]]
    assert metric.scores().found.tolist() == [[0, 0], [1, 0]]


def test_pictures_have_a_size_too_and_parts_of_a_data_set_add_up():
    one, other = RecallBySize(KINDS, (8,)), RecallBySize(KINDS, (8,))
    one.update(np.array([0.2, 0.8]), Annotation("a", None, (4, 4), "a", label=1))
    other.update(np.array([0.2, 0.8]), Annotation("b", None, (9, 9), "b", label=0))
    other.update(np.array([0.2, 0.8]), Annotation("c", None, (9, 9), "c"))
    one.merge(other)
    assert one.compute() == {"recall, below 8 px": 1.0, "recall, from 8 px": 0.0}
    assert np.isnan(one.scores().recall).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("predicted", "error", "message"),
    [
        (np.zeros((5, 5), np.int32), ValueError, r"of shape \(40, 40\), got \(5, 5\)"),
        (np.full((40, 40), 0.9), TypeError, "map of a to be of integers, got float64"),
        (SegmentMap(np.zeros((40, 1), np.int32), ()), ValueError, r"got \(40, 1\)"),
        (np.array([0.1, np.nan]), ValueError, "scores of a have NaN"),
        (np.array([0.1]), ValueError, "a has class 1, the prediction 1 classes"),
    ],
)
def test_predictions_that_are_no_predictions(predicted, error, message):
    annotation = scene()
    if isinstance(predicted, np.ndarray) and predicted.ndim == 1:
        annotation = Annotation("a", None, (40, 40), "a", label=1)
    with pytest.raises(error, match=message):
        RecallBySize(KINDS, (8, 32)).update(predicted, annotation)


def test_recall_of_points_and_of_point_sets():
    """They have no size: all are in the first group."""
    points, labels = TokenSet(torch.rand(6, 3)), np.array([0, 0, 0, 1, VOID, 1], np.int32)
    recall = RecallBySize(KINDS[:2], (8,))
    recall.update(np.array([0, 1, 0, 1, 1, 0]), PointAnnotation("a", points, VOID, labels))
    assert recall.scores().found.tolist() == [[2, 0], [1, 0]]
    assert recall.scores().annotated.tolist() == [[3, 0], [2, 0]]
    for label, scores in ((1, [0.2, 0.8]), (1, [0.6, 0.4]), (VOID, [0.1, 0.9])):
        recall.update(np.array(scores), PointAnnotation("b", points, label))
    assert recall.scores().found.tolist() == [[2, 0], [2, 0]]
    assert recall.scores().annotated.tolist() == [[3, 0], [4, 0]]
    with pytest.raises(ValueError, match="the scores of b have NaN"):
        recall.update(np.full(2, np.nan), PointAnnotation("b", points, 1))


@pytest.mark.parametrize(("least", "found"), [(0.3, 1), (0.7, 0), (0.5, 1)])
def test_objects_are_shown_from_a_score_that_can_be_chosen(least, found):
    metric = RecallBySize(KINDS, (), min_score=least)
    mask = Mask.of(np.ones((10, 10), bool), 20, 20)
    metric.update(Objects([mask], [1], [0.4 if least == 0.3 else 0.6], (40, 40)), scene())
    assert metric.scores().found.tolist() == [[0], [found]]


def test_classes_of_points_are_as_many_as_the_points():
    annotation = PointAnnotation("a", TokenSet(torch.rand(6, 3)), VOID, np.zeros(6, np.int32))
    recall = RecallBySize(KINDS, ())
    for predicted in (np.array([1]), np.zeros(7, int)):
        with pytest.raises(ValueError, match="expected the map of a to be of shape"):
            recall.update(predicted, annotation)
    with pytest.raises(TypeError, match="expected the map of a to be of integers"):
        recall.update(np.zeros(6), annotation)
    with pytest.raises(ValueError, match="expected a score of each class of b, got shape"):
        recall.update(np.ones((2, 3)), PointAnnotation("b", annotation.tokens, 1))
