"""Average precision of instance maps, against hand-computed cases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from pointformer.annotations import Objects, Segment, SegmentMap
from pointformer.data import Annotation
from pointformer.metrics import IOU_THRESHOLDS, InstanceAP, average_precision, match_instances

MAPS = hnp.arrays(np.int32, (6, 6), elements=st.integers(0, 4))


def row(*runs):
    """A map of one row from (id, length) runs."""
    return np.concatenate([np.full(length, value) for value, length in runs])[None]


def test_counts_by_hand():
    annotated = row((0, 2), (1, 10), (0, 2), (2, 10), (3, 4))
    # Id 7 covers 8 of the 10 pixels of id 1 (IoU 0.8); id 9 covers 6 of id 2 and 2 beyond it
    # (IoU 6 / 12 = 0.5); id 3 is missed; id 4 is spurious.
    predicted = row((4, 2), (7, 8), (0, 4), (0, 4), (9, 8), (0, 2))
    counts = match_instances(predicted, annotated, (0.5, 0.55, 0.8, 0.85))
    np.testing.assert_array_equal(counts, [[2, 1, 1], [1, 2, 2], [1, 2, 2], [0, 3, 3]])
    result = average_precision([(predicted, annotated)])
    assert result.thresholds == IOU_THRESHOLDS
    assert result.at(0.5) == pytest.approx(2 / 4)
    assert result.mean == pytest.approx((2 / 4 + 6 * (1 / 5)) / 10)


def test_an_iou_of_just_the_threshold_matches_and_a_little_less_does_not():
    """Also of thresholds that were rounded up."""
    annotated = row((1, 1000))
    for covered, threshold in ((300, 3 * 0.1), (600, np.arange(0.5, 1, 0.05)[2])):
        assert threshold > covered / 1000
        predicted = row((1, covered), (0, 1000 - covered))
        assert match_instances(predicted, annotated, (threshold,)).tolist() == [[1, 0, 0]]
        predicted[0, 0] = 0
        assert match_instances(predicted, annotated, (threshold,)).tolist() == [[0, 1, 1]]


def test_ids_may_be_negative():
    predicted, annotated = row((-3, 4), (0, 2), (5, 2)), row((1, 4), (0, 2), (-1, 2))
    assert match_instances(predicted, annotated, (1.0,)).tolist() == [[2, 0, 0]]


def test_matching_is_one_to_one_and_largest():
    # Predicted a overlaps both annotated instances, b only the first: greedy by IoU would give a
    # the first and leave b without partner.
    annotated = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2]])
    predicted = np.array([[8, 8, 5, 5, 5, 5, 5, 0, 0]])
    # IoU: a-1 = 4/7, a-2 = 1/7, b-1 = 2/6, b-2 = 0
    counts = match_instances(predicted, annotated, (0.1, 0.3, 0.5))
    np.testing.assert_array_equal(counts, [[2, 0, 0], [1, 1, 1], [1, 1, 1]])


def dense_counts(predicted, annotated, thresholds):
    """By a table of all pairs and an assignment, as `match_instances` is defined."""
    found, known = ([ids == n for n in np.unique(ids) if n] for ids in (predicted, annotated))
    table = [[(a & b).sum() / (a | b).sum() for b in known] for a in found]
    table = np.reshape(table, (len(found), len(known)))
    counts = []
    for threshold in thresholds:
        candidates = (table >= threshold - 1e-9) & (table > 0)
        matched = candidates[linear_sum_assignment(candidates, maximize=True)].sum()
        counts.append([matched, len(found) - matched, len(known) - matched])
    return counts


@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 8)),
    most=st.integers(1, 12),
    kinds=st.tuples(*[st.sampled_from([np.int64, np.uint64, np.uint8, np.int32])] * 2),
    seed=st.integers(0, 2**20),
)
def test_counts_are_those_of_all_pairs(shape, most, kinds, seed):
    random = np.random.default_rng(seed)
    thresholds = (1e-12, 0.05, 0.1, 0.2, 1 / 3, *IOU_THRESHOLDS, 1)
    annotated = random.integers(0, most, shape)
    moved = np.where(random.random(shape) < 0.3, random.integers(0, most, shape), annotated)
    for found in (moved, np.roll(annotated, 1), random.integers(0, most, shape)):
        predicted = (7 * found).astype(kinds[0])
        counts = match_instances(predicted, annotated.astype(kinds[1]), thresholds)
        np.testing.assert_array_equal(counts, dense_counts(predicted, annotated, thresholds))


def test_memory_of_many_objects_is_that_of_pairs_that_overlap():
    ids = np.arange(1, 200 * 200 + 1).reshape(200, 200).repeat(2, 0)  # all pairs: 12 GiB
    counts = match_instances(np.roll(ids, 1, 0), ids, (0.3, 0.5))
    np.testing.assert_array_equal(counts, [[40000, 0, 0], [0, 40000, 40000]])


def test_pooled_and_per_image_scores_differ():
    empty = np.zeros((1, 4), int)
    found = row((1, 2), (2, 2))
    result = average_precision([(found, found), (found, empty), (empty, empty)], (0.5,))
    assert (result.true_positives, result.false_positives, result.false_negatives) == (
        (2,),
        (2,),
        (0,),
    )
    assert result.pooled == (0.5,)
    assert result.per_image == (pytest.approx((1 + 0 + 1) / 3),)
    assert result.mean == 0.5


def test_names_of_scores():
    """By hand: of one of two objects four of five pixels are found, and then one."""
    truth = row((1, 5), (2, 1))
    annotation = Annotation(
        "a", None, (1, 6), "a", ids=truth, segments=(Segment(1, 0, 5), Segment(2, 0, 1))
    )
    metric = InstanceAP((0.5, 0.7, 0.9))
    metric.update(SegmentMap.of(row((1, 4), (0, 1), (2, 1)), [0] * 2, [1.0] * 2), annotation)
    metric.update(SegmentMap.of(row((0, 4), (1, 1), (2, 1)), [0] * 2, [1.0] * 2), annotation)
    assert metric.compute() == {
        "AP at IoU 0.5 (TP / (TP + FP + FN))": pytest.approx(3 / 5),
        "mean AP (TP / (TP + FP + FN))": pytest.approx((3 / 5 + 3 / 5 + 2 / 6) / 3),
    }


def test_objects_are_shown_from_a_score_of_a_half():
    truth = row((1, 2), (2, 2))
    segments = Segment(1, 0, 2), Segment(2, 0, 2)
    annotation = Annotation("a", None, (1, 4), "a", ids=truth, segments=segments)
    metric = InstanceAP()
    metric.update(Objects([truth == 1, truth == 2], [0, 0], [0.5, 0.49], (1, 4)), annotation)
    assert metric.scores().at(0.5) == 1 / 2


def test_nothing_to_find():
    empty = np.zeros((3, 4), int)
    assert average_precision([]).mean == 1
    assert average_precision([(empty, empty)]).mean == 1
    full = np.ones((3, 4), int)
    assert average_precision([(empty, full)]).mean == 0
    assert average_precision([(full, empty)]).mean == 0


@given(
    pictures=st.lists(
        st.tuples(MAPS, st.lists(st.floats(0, 1), min_size=4, max_size=4)), max_size=3
    ),
    min_scores=st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True),
)
def test_the_best_score_to_show_objects_from(pictures, min_scores):
    """All that several give is what the best of them alone gives; that one has no better."""
    truth = row((1, 9), (2, 9), (0, 9), (3, 9)).reshape(6, 6)
    segments = tuple(Segment(n, 0, 9) for n in (1, 2, 3))
    several = InstanceAP(min_scores=min_scores)
    alone = {least: InstanceAP(min_scores=(least,)) for least in min_scores}
    for ids, scores in pictures:
        masks = [ids == n for n in range(1, 5)]
        found = Objects(masks, np.zeros(4, int), np.array(scores), (6, 6))
        for metric in (several, *alone.values()):
            metric.update(found, Annotation("a", None, (6, 6), "a", ids=truth, segments=segments))
    best = several.best_min_score()
    assert several.scores() == alone[best].scores()
    first = {least: metric.scores().pooled[0] for least, metric in alone.items()}
    equal = [least for least in min_scores if first[least] == max(first.values())]
    assert abs(best - 0.5) == min(abs(least - 0.5) for least in equal)


def test_what_is_found_on_crowds_does_not_count():
    truth = row((1, 4), (2, 4), (0, 4)).reshape(3, 4)
    segments = Segment(1, 0, 4), Segment(2, 0, 4, crowd=True)
    annotation = Annotation("a", None, (3, 4), "a", ids=truth, segments=segments)
    found = row((1, 4), (2, 2), (3, 2), (4, 4)).reshape(3, 4)
    metric = InstanceAP()
    metric.update(SegmentMap.of(found, [0] * 4, [1.0] * 4), annotation)
    scores = metric.scores()
    assert (scores.true_positives[0], scores.false_positives[0], scores.false_negatives[0]) == (
        1, 1, 0
    )  # fmt: skip


def test_parts_of_a_data_set_add_up():
    found, truth = row((1, 2), (2, 2)), row((1, 2), (0, 2))
    annotation = Annotation("a", None, (1, 4), "a", ids=truth, segments=(Segment(1, 0, 2),))
    whole, one, other = (InstanceAP(min_scores=(0.2, 0.6)) for _ in range(3))
    for metric, score in ((one, 0.3), (other, 0.7), (other, 0.1)):
        shown = Objects([found == 1, found == 2], [0, 0], [score, 0.65], (1, 4))
        metric.update(shown, annotation)
        whole.update(shown, annotation)
    again = InstanceAP(min_scores=(0.2, 0.6))
    again.load(one.state())
    again.merge(other)
    assert again.scores() == whole.scores()
    np.testing.assert_array_equal(again.state()["counts"], whole.state()["counts"])
    empty = InstanceAP()
    empty.load(InstanceAP().state())
    assert empty.scores() == InstanceAP().scores()


@given(MAPS)
def test_a_perfect_prediction_scores_one_whatever_its_ids(instances):
    renamed = np.where(instances > 0, 10 - 2 * instances, 0)
    result = average_precision([(renamed, instances)])
    assert set(result.pooled) == {1.0}
    assert result.true_positives[0] == len(np.unique(instances[instances > 0]))


@given(MAPS, MAPS)
def test_counts_add_up_fall_with_the_threshold_and_mirror(predicted, annotated):
    counts = match_instances(predicted, annotated)
    assert (counts.sum(1) == counts[:, 0] + counts[:, 1] + counts[:, 2]).all()
    assert (counts[:, 0] + counts[:, 1] == len(np.unique(predicted[predicted > 0]))).all()
    assert (counts[:, 0] + counts[:, 2] == len(np.unique(annotated[annotated > 0]))).all()
    assert (np.diff(counts[:, 0]) <= 0).all()
    np.testing.assert_array_equal(match_instances(annotated, predicted), counts[:, [0, 2, 1]])


@pytest.mark.parametrize(
    ("predicted", "thresholds", "message"),
    [
        (np.zeros((2, 3), int), (0.5,), r"one shape .*\(2, 3\) and \(3, 2\)"),
        (np.zeros((3, 3), int), (0.5,), r"one shape .*\(3, 3\) and \(3, 2\)"),
        (np.zeros((3, 2), int), (0.0,), r"thresholds: expected values in \(0, 1\]"),
        (np.zeros((3, 2), int), (0.5, 1.01), r"thresholds: expected values in \(0, 1\]"),
        (np.zeros((3, 2), int), (), r"thresholds: expected values in \(0, 1\], got \(\)"),
    ],
)
def test_bad_arguments(predicted, thresholds, message):
    with pytest.raises(ValueError, match=message):
        match_instances(predicted, np.zeros((3, 2), int), thresholds)


def test_two_lists_of_ids_are_no_maps():
    with pytest.raises(ValueError, match=r"two maps of one shape \(H, W\), got \(4,\)"):
        match_instances(np.ones(4, int), np.ones(4, int))


def test_only_identical_masks_match_at_threshold_one():
    annotated = np.array([[1, 1, 2, 2, 2]])
    predicted = np.array([[5, 5, 7, 7, 0]])
    np.testing.assert_array_equal(match_instances(predicted, annotated, (1.0,)), [[1, 1, 1]])
