"""Panoptic quality against hand-computed cases and against Cityscapes' copy of COCO's code."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers import scenes
from helpers.metrics import scored
from pointformer import data
from pointformer.annotations import SegmentMap
from pointformer.data import VOID, Annotation, Category, Segment
from pointformer.metrics import PanopticQuality

TABLE = (Category(1, "person"), Category(2, "car"), Category(9, "road", is_thing=False))


def segments_of(ids, classes, crowds=()):
    return tuple(
        Segment(value, category, int((ids == value).sum()), value in crowds)
        for value, category in classes.items()
    )


def row(*runs):
    """A map of one row from (id, length) runs."""
    return np.concatenate([np.full(length, value) for value, length in runs])[None]


def annotation(ids, classes, crowds=()):
    return Annotation("a", None, ids.shape, "a", None, ids, segments_of(ids, classes, crowds))


def score(*pairs, table=TABLE):
    return scored(lambda: PanopticQuality(table), pairs).scores()


def counts(scores):
    three = scores.true_positives, scores.false_positives, scores.false_negatives
    return [tuple(int(n) for n in column) for column in zip(*three, strict=True)]


def test_by_hand():
    # Person 1: IoU 8 / 10. Person 2: IoU 6 / 12, which is not above a half. Car 4 is missed and a
    # car is predicted elsewhere. The road is matched with IoU 8 / 10.
    truth = annotation(row((1, 10), (2, 9), (3, 8), (4, 5), (5, 2)), {1: 0, 2: 0, 3: 2, 4: 1, 5: 2})
    # Stuff has one segment per class in practice, but the definition does not need that.
    found = annotation(
        row((7, 8), (0, 2), (8, 6), (9, 3), (6, 8), (5, 5), (3, 2)),
        {7: 0, 8: 0, 9: 0, 6: 2, 5: 0, 3: 1},
    )
    scores = score((found, truth))
    # Person: 1 with 8 / 10, 2 with 6 / 9; the other two are spurious. Road: 1 of 2 exactly.
    assert counts(scores) == [(2, 2, 0), (0, 1, 1), (1, 0, 1)]
    np.testing.assert_allclose(scores.pq, [(0.8 + 6 / 9) / 3, 0, 1 / 1.5])
    np.testing.assert_allclose(scores.sq, [(0.8 + 6 / 9) / 2, 0, 1])
    np.testing.assert_allclose(scores.rq, [2 / 3, 0, 1 / 1.5])
    np.testing.assert_allclose(scores.all.pq, np.mean([(0.8 + 6 / 9) / 3, 0, 1 / 1.5]))
    np.testing.assert_allclose(scores.things.sq, (0.8 + 6 / 9) / 4)
    assert (scores.stuff.pq, scores.stuff.classes) == (pytest.approx(1 / 1.5), 1)


def test_an_iou_of_a_half_does_not_match():
    truth = annotation(row((1, 8), (0, 4)), {1: 0})
    # The annotation's zeros are void, so the prediction's overhang of 4 pixels costs nothing.
    assert counts(score((annotation(row((1, 12)), {1: 0}), truth)))[0] == (1, 0, 0)
    assert counts(score((annotation(row((1, 4), (0, 8)), {1: 0}), truth)))[0] == (0, 1, 1)
    assert counts(score((annotation(row((1, 5), (0, 7)), {1: 0}), truth)))[0] == (1, 0, 0)


def test_void_is_left_out_of_the_union_and_excuses_what_lies_mostly_on_it():
    truth = annotation(row((1, 6), (0, 10), (2, 6)), {1: 0, 2: 2})
    found = annotation(row((0, 3), (1, 7), (2, 6), (3, 6)), {1: 0, 2: 0, 3: 1})
    scores = score((found, truth))
    # Person: 3 pixels of overlap, union 6 + 7 - 3 - 4 on void = 6: IoU 1/2, no match; the first
    # prediction has 4 of 7 pixels on void and is excused, the second lies on void altogether.
    assert counts(scores) == [(0, 0, 1), (0, 1, 0), (0, 0, 1)]
    half = annotation(row((0, 3), (1, 6), (0, 13)), {1: 0})  # 3 of 6 on void: not more than half
    assert counts(score((half, truth)))[0] == (0, 1, 1)


def test_crowds_are_neither_missed_nor_matched_and_excuse_their_class():
    ids = row((1, 10), (2, 10))
    truth = annotation(ids, {1: 0, 2: 2}, crowds=(1,))
    nothing = annotation(np.zeros_like(ids), {})
    assert counts(score((nothing, truth))) == [(0, 0, 0), (0, 0, 0), (0, 0, 1)]
    person = annotation(row((5, 12), (0, 8)), {5: 0})  # 10 of 12 pixels in the crowd
    assert counts(score((person, truth)))[0] == (0, 0, 0)
    car = annotation(row((5, 10), (0, 10)), {5: 1})  # the crowd is of another class
    assert counts(score((car, truth)))[1] == (0, 1, 0)
    beside = annotation(row((0, 5), (5, 10), (0, 5)), {5: 0})  # half of it is not enough
    assert counts(score((beside, truth)))[0] == (0, 1, 0)


def test_crowd_of_any_class_is_void():
    ids = row((1, 10), (2, 10))
    truth = Annotation(
        "a", None, ids.shape, 1, None, ids, (Segment(1, VOID, 10, True), Segment(2, 0, 10))
    )
    found = annotation(row((3, 10), (4, 10)), {3: 1, 4: 0})
    assert counts(score((found, truth))) == [(1, 0, 0), (0, 0, 0), (0, 0, 0)]


def test_nothing_at_all():
    empty = annotation(np.zeros((2, 2), int), {})
    scores = score((empty, empty))
    assert scores.all.classes == 0
    assert np.isnan(scores.all.pq)
    assert np.isnan(scores.pq).all()


@given(hnp.arrays(np.int32, (6, 6), elements=st.integers(0, 5)), st.data())
def test_a_perfect_prediction_scores_one_and_counts_add_up(ids, draw):
    present = [int(n) for n in np.unique(ids) if n]
    classes = {n: draw.draw(st.integers(0, 2)) for n in present}
    crowds = [n for n in present if draw.draw(st.booleans())]
    truth = annotation(ids, classes, crowds)
    scores = score((truth, truth))
    things = [n for n in present if n not in crowds]
    assert scores.true_positives.sum() == len(things)
    assert scores.false_positives.sum() == scores.false_negatives.sum() == 0
    if things:
        assert (scores.all.pq, scores.all.sq, scores.all.rq) == (1, 1, 1)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), min_size=2, max_size=6), st.data())
def test_parts_in_any_order_give_the_same_bits(sizes, draw):
    """Sums of rounded quotients would depend on it."""
    parts = []
    for found, annotated in sizes:
        part = PanopticQuality(TABLE)
        truth = annotation(row((1, annotated), (2, 9 - annotated)), {1: 0, 2: 2})
        part.update(annotation(row((1, found), (0, 9 - found)), {1: 0}), truth)
        parts.append(part)
    one, other = PanopticQuality(TABLE), PanopticQuality(TABLE)
    for part, swapped in zip(parts, draw.draw(st.permutations(parts)), strict=True):
        one.merge(part)
        other.merge(swapped)
    assert (one.iou == other.iou).all()
    expected = sum(min(pair) / max(pair) for pair in sizes if 2 * min(pair) > max(pair))
    assert one.iou[0] == pytest.approx(expected, rel=1e-14)


@given(st.integers(0, 2**20))
def test_scores_are_those_of_all_pairs(seed):
    """By the definition, a pair of masks after the other."""
    random = scenes.rng(seed)
    ids = random.integers(0, 6, (4, 8))
    moved = np.where(random.random(ids.shape) < 0.3, random.integers(0, 6, ids.shape), ids)
    classes = {n: int(random.integers(0, 2)) for n in range(1, 6)}
    found = annotation(moved, {n: c for n, c in classes.items() if (moved == n).any()})
    kept = {n: c for n, c in classes.items() if n != 4 and (ids == n).any()}  # 4 is void
    truth = annotation(ids, kept, crowds=(5,))
    void, crowd = ~np.isin(ids, list(kept)), ids == 5
    hits, spurious, missed = np.zeros((3, len(TABLE)), int)
    iou, matched = np.zeros(len(TABLE)), set()
    for n, category in kept.items():
        overlaps = {}
        for m, other in classes.items():
            either = ((ids == n) | (moved == m) & ~void).sum()
            if n != 5 and other == category and either:
                overlaps[m] = ((ids == n) & (moved == m)).sum() / either
        best = max(overlaps, key=overlaps.get, default=None)
        if best is not None and overlaps[best] > 0.5:
            hits[category] += 1
            iou[category] += overlaps[best]
            matched.add(best)
        elif n != 5:
            missed[category] += 1
    for segment in found.segments:
        here = moved == segment.id
        excused = here & (void | crowd & (kept.get(5) == segment.category))
        if segment.id not in matched and 2 * excused.sum() <= here.sum():
            spurious[segment.category] += 1
    scores = score((found, truth))
    assert counts(scores) == [*zip(hits, spurious, missed, strict=True)]
    np.testing.assert_allclose(scores.sq * hits, np.where(scores.sq >= 0, iou, np.nan), atol=1e-12)


def predicted_from(truth, seed):
    """Segments that are moved, lost, merged or given another class."""
    random = scenes.rng(seed)
    ids = np.zeros(truth.size, np.int32)
    segments = []
    for n, segment in enumerate(sorted(truth.segments, key=lambda s: -s.area)):
        if random.random() < 0.1:
            continue
        shift = random.integers(-7, 8, 2) if random.random() < 0.6 else (0, 0)
        ids[np.roll(truth.ids == segment.id, shift, (0, 1))] = n + 1
        category = segment.category if random.random() < 0.8 else int(random.integers(19))
        segments.append((n + 1, category))
    ids[random.random(ids.shape) < 0.05] = 0
    present = set(np.unique(ids).tolist())
    classes = {value: category for value, category in segments if value in present}
    return Annotation(truth.name, None, truth.size, truth.id, None, ids, segments_of(ids, classes))


def test_cityscapes_files_score_as_the_package_scores_them(tmp_path, capsys):
    from cityscapesscripts.evaluation import evalPanopticSemanticLabeling as package

    dataset = data.read_cityscapes(scenes.cityscapes(tmp_path, frames=8), task="panoptic")
    pairs = [(a, predicted_from(a, seed)) for seed, a in enumerate(dataset)]
    files = {}
    for side, number in (("truth", 0), ("found", 1)):
        path = tmp_path / f"{side}.json"
        chosen = [(pair[0], pair[number]) for pair in pairs]
        data.write_coco_panoptic(path, tmp_path / side, chosen, dataset.categories)
        files[side] = json.loads(path.read_text())
    rows = list(zip(files["truth"]["annotations"], files["found"]["annotations"], strict=True))
    table = {c["id"]: c for c in files["truth"]["categories"]}
    stat = package.pq_compute_single_core(
        0, rows, str(tmp_path / "truth"), str(tmp_path / "found"), table
    )
    expected = package.average_pq(stat, table)
    capsys.readouterr()
    scores = score(*((found, truth) for truth, found in pairs), table=dataset.categories)
    for name, ours in (("All", scores.all), ("Things", scores.things), ("Stuff", scores.stuff)):
        theirs = expected[name]
        np.testing.assert_allclose(
            [ours.pq, ours.sq, ours.rq, ours.classes],
            [theirs[key] for key in ("pq", "sq", "rq", "n")],
            rtol=1e-12,
        )
    for n, category in enumerate(dataset.categories):
        row = stat[category.id]
        assert counts(scores)[n] == (row.tp, row.fp, row.fn)
    assert min(np.sum(counts(scores), 0)) > 5  # the comparison saw all kinds
    assert any(s.crowd for truth, _ in pairs for s in truth.segments)


def test_files_written_from_annotations_score_one(tmp_path):
    dataset = data.read_cityscapes(scenes.cityscapes(tmp_path), task="panoptic")
    path, folder = tmp_path / "p.json", tmp_path / "p"
    data.write_coco_panoptic(path, folder, [(a, a) for a in dataset], dataset.categories)
    predictions = data.read_coco_panoptic(path, folder, categories=dataset.categories)
    scores = score(*zip(predictions, dataset, strict=True), table=dataset.categories)
    assert 100 * scores.all.pq == 100 * scores.things.pq == 100 * scores.stuff.pq == 100
    assert scores.all.classes == 6


def test_results_of_models_are_taken_as_they_are(tmp_path):
    truth = annotation(row((1, 6), (2, 6)), {1: 0, 2: 2})
    found = SegmentMap(truth.ids, (Segment(1, 0, 6, score=0.9), Segment(2, 2, 6, score=0.8)))
    assert score((found, truth)).all.pq == 1
    data.write_coco_panoptic(tmp_path / "a.json", tmp_path, [(truth, found)], TABLE)
    read = data.read_coco_panoptic(tmp_path / "a.json", tmp_path)[0]
    np.testing.assert_array_equal(read.ids, truth.ids)
    assert [s.score for s in read.segments] == [0.9, 0.8]


@pytest.mark.parametrize(
    ("ids", "classes", "message"),
    [
        (row((1, 4)), {1: 0}, r"map of a to be of shape \(1, 6\), got \(1, 4\)"),
        (row((1, 3), (2, 3)), {1: 0}, "one segment for each id in the map of a"),
        (row((1, 6)), {1: 0, 2: 0}, "one segment for each id in the map of a"),
        (row((0, 6)), {0: 0}, "one segment for each id in the map of a"),
        (row((1, 6)), {1: 3}, "unknown category in the segments of a"),
    ],
)
def test_bad_predictions(ids, classes, message):
    truth = annotation(row((1, 6)), {1: 0})
    with pytest.raises(ValueError, match=message):
        score((annotation(ids, classes), truth))


def test_ids_are_integers():
    truth = annotation(row((1, 6)), {1: 0})
    with pytest.raises(TypeError, match="map of a to be of integers, got float64"):
        score((SegmentMap(truth.ids * 1.0, truth.segments), truth))


def test_annotation_without_a_map():
    truth = Annotation("a", None, (1, 2), 1, semantic=np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match="a has no map of ids"):
        score((annotation(row((1, 2)), {1: 0}), truth))


def test_two_segments_of_one_id_are_an_error():
    truth = annotation(row((1, 3), (2, 3)), {1: 0, 2: 1})
    twice = SegmentMap(truth.ids, (Segment(1, 0, 3), Segment(2, 1, 3), Segment(2, 0, 3)))
    with pytest.raises(ValueError, match="one segment for each id in the map of a, got 3 segments"):
        score((twice, truth))
