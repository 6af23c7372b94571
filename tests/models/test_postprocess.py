"""Maps, instances and panoptic segments from hand-made predictions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pointformer import TokenSet
from pointformer.annotations import Objects
from pointformer.models.mask2former import MaskPredictions
from pointformer.models.postprocess import image_masks, instances, panoptic, semantic_scores


def predictions_of(classes, maps, certainty=12.0):
    """Queries with given classes (-1: no object) of 3, and maps (Q, h, w) on the finest grid."""
    logits = torch.full((1, len(classes), 4), -certainty)
    for query, category in enumerate(classes):
        logits[0, query, category] = certainty
    grid = TokenSet.from_grid(torch.as_tensor(maps, dtype=torch.float32)[None])
    return MaskPredictions(logits, grid.features, grid)


def half(left):
    """A mask of the left or right half of 4 x 4 cells."""
    mask = torch.full((4, 4), -20.0)
    mask[:, slice(0, 2) if left else slice(2, 4)] = 20.0
    return mask


def test_masks_are_cropped_and_resized():
    out = predictions_of([0], half(True)[None])
    (maps,) = image_masks(out, [(14, 15)])
    assert maps.shape == (1, 14, 15)
    assert (maps[0, :, :6] > 0).all()
    assert (maps[0, :, 10:] < 0).all()
    (maps,) = image_masks(out, [(16, 16)], [(40, 20)])
    assert maps.shape == (1, 40, 20)
    with pytest.raises(ValueError, match="image 0 cannot be 12 x 16"):
        image_masks(out, [(12, 16)])


def test_semantic_scores():
    out = predictions_of([2, 0, -1], torch.stack([half(True), half(False), half(True)]))
    (scores,) = semantic_scores(out, [(16, 16)])
    label = scores.argmax(0)
    assert (label[:, :7] == 2).all()
    assert (label[:, 9:] == 0).all()
    assert scores.shape == (3, 16, 16)


def test_instances_overlap_and_are_ordered():
    maps = torch.stack([half(True), torch.full((4, 4), 2.0), torch.full((4, 4), -20.0)])
    (found,) = instances(predictions_of([1, 1, 1], maps), [(16, 16)], min_score=0.5)
    assert found.classes.tolist() == [1, 1]  # the empty mask is no object
    assert found.scores[0] > found.scores[1]
    assert found.scores[1].item() == pytest.approx(torch.tensor(2.0).sigmoid().item(), rel=1e-3)
    assert found.boxes.tolist() == [[0, 0, 8, 16], [0, 0, 16, 16]]
    (found,) = instances(predictions_of([1, 1, 1], maps), [(16, 16)], min_score=0.5, things=[0])
    assert len(found.scores) == 0
    assert found.boxes.shape == (0, 4)


def test_one_cell():
    """Of stride 4: bilinear weights of its pixels are 7/8 and 5/8 per axis, and their product has
    to exceed 1/2: all but the corners."""
    maps = torch.full((1, 4, 6), -20.0)
    maps[0, 1, 3] = 20.0
    (found,) = instances(predictions_of([2], maps), [(15, 23)], min_score=0.5)
    (mask,) = found.masks
    assert mask.box == (12, 4, 16, 8)
    assert mask.area == 12
    assert not mask.pixels[[0, 0, 3, 3], [0, 3, 0, 3]].any()
    assert found.size == (15, 23)
    assert found.classes.tolist() == [2]
    logits = torch.tensor([7 / 8 * 7 / 8, 7 / 8 * 5 / 8]) * 40 - 20
    expected = (4 * logits[0].sigmoid() + 8 * logits[1].sigmoid()) / 12
    assert found.scores[0] == pytest.approx(expected.item(), abs=1e-5)


def test_a_query_can_be_objects_of_two_classes():
    """The same mask with the probability of each, and as many pairs as are wanted."""
    logits = torch.tensor([[0.6, 0.3, 0.1, 1e-9], [0.2, 0.7, 0.1, 1e-9]]).log()[None]
    grid = TokenSet.from_grid(10 * torch.stack([half(True), half(False)])[None])
    out = MaskPredictions(logits, grid.features, grid)
    (found,) = instances(out, [(16, 16)], top=3)
    assert found.classes.tolist() == [1, 0, 1]
    np.testing.assert_allclose(found.scores, [0.7, 0.6, 0.3], atol=1e-4)
    assert [mask.box[0] for mask in found.masks] == [8, 0, 0]
    assert [len(instances(out, [(16, 16)], top=n)[0]) for n in (None, 100, 1)] == [6, 6, 1]
    (found,) = instances(out, [(16, 16)], [(32, 48)], things=[1], min_score=0.5)
    assert (found.size, found.masks[0].box) == ((32, 48), (24, 0, 48, 32))


def test_better_objects_are_on_top():
    masks = np.zeros((3, 6, 9), bool)
    masks[0, :4, :5], masks[1, 2:, 3:], masks[2, 3:5, 4:5] = True, True, True
    found = Objects(masks, [4, 5, 6], [0.6, 0.9, 0.7])
    result = found.segment_map()
    assert [(s.id, s.category, s.area) for s in result.segments] == [(1, 4, 16), (2, 5, 24)]
    assert [s.score for s in result.segments] == [np.float32(0.6), np.float32(0.9)]
    np.testing.assert_array_equal(result.ids == 2, masks[1])  # hides the third
    np.testing.assert_array_equal(result.ids == 1, masks[0] & ~masks[1])
    for score in (0.5, 1.0):  # of equals the first is on top
        result = Objects(masks, [4, 5, 6], [score] * 3).segment_map()
        assert [(s.category, s.area) for s in result.segments] == [(4, 20), (5, 20)]
    assert found.confident(0.65).classes.tolist() == [5, 6]
    assert found.confident(float(np.float32(0.7))).classes.tolist() == [5, 6]
    assert len(found.confident(0.91)) == 0


@pytest.mark.parametrize("cells", [3, 4])
def test_a_segment_needs_most_of_its_mask(cells):
    """The second query's mask has 5 columns of 4 pixels, a better one is sure of some of them."""
    maps = torch.full((2, 2, 5), -40.0)
    maps[1] = 40.0
    maps[0, :, : 5 - cells] = 60.0
    out = predictions_of([0, 1], maps)
    out.class_logits[0, 1, 1] = 3.0
    out.class_logits[0, 1, 3] = -3.0
    (result,) = panoptic(out, [(8, 20)], things=[0, 1], min_visible=0.0)
    share = (result.ids == 2).mean()  # its mask is the whole picture
    assert 0 < share < cells / 5 + 0.1
    for least, kinds in ((share, [0, 1]), (share + 1 / 160, [0])):
        (result,) = panoptic(out, [(8, 20)], things=[0, 1], min_visible=least)
        assert [s.category for s in result.segments] == kinds


def test_what_a_segment_owns_outside_of_its_mask_counts_as_published():
    """Half of the second mask is hidden, but three more columns are nobody else's."""
    maps = torch.full((2, 2, 5), -60.0)
    maps[0, :, 0] = 60.0
    maps[1] = -1.0
    maps[1, :, :2] = 1.0
    (result,) = panoptic(predictions_of([0, 1], maps), [(8, 20)], things=[0, 1])
    assert [s.category for s in result.segments] == [0, 1]
    owned = result.ids == 2
    assert owned[:, 5:7].all()
    assert not owned[:, 9:].any()  # where its mask is not
    assert result.segments[1].area == owned.sum() < 0.8 * 2 * 8 * 4


def test_panoptic_joins_stuff_and_drops_hidden_segments():
    maps = torch.stack([half(True), half(False), half(True) - 1])
    (result,) = panoptic(predictions_of([0, 0, 1], maps), [(16, 16)], things=[1])
    assert [s.category for s in result.segments] == [0]  # hidden: dropped
    assert result.segments[0].area == (result.ids == 1).sum()
    (result,) = panoptic(predictions_of([0, 0, -1], maps), [(16, 16)], things=[0])
    assert len(result.segments) == 2


def test_panoptic_of_nothing():
    (result,) = panoptic(predictions_of([-1, -1], torch.zeros(2, 4, 4)), [(16, 16)], things=[0])
    assert result.segments == ()
    assert (result.ids == 0).all()


@given(
    queries=st.integers(1, 8),
    certainty=st.floats(0, 6),
    sharpness=st.floats(0, 8),
    things=st.sets(st.integers(0, 2)),
    min_score=st.floats(0, 0.9),
    seed=st.integers(0, 2**16),
)
def test_every_pixel_is_in_at_most_one_segment(
    queries, certainty, sharpness, things, min_score, seed
):
    g = torch.Generator().manual_seed(seed)
    logits = certainty * torch.randn(1, queries, 4, generator=g)
    grid = TokenSet.from_grid(sharpness * torch.randn(1, queries, 3, 4, generator=g))
    out = MaskPredictions(logits, grid.features, grid)
    (result,) = panoptic(out, [(11, 14)], things=things, min_score=min_score)
    ids = [segment.id for segment in result.segments]
    assert ids == list(range(1, len(ids) + 1))
    assert set(np.unique(result.ids).tolist()) <= {0, *ids}
    assert result.ids.shape == (11, 14)
    for segment in result.segments:
        assert segment.area == (result.ids == segment.id).sum() > 0
        assert segment.score > min_score
    stuff = [s.category for s in result.segments if s.category not in things]
    assert len(stuff) == len(set(stuff))


@pytest.mark.parametrize("things", [[], [0]])
def test_a_picture_without_things_has_no_objects(things):
    """Where queries are sure of other classes, more of them than pairs that count."""
    predictions = predictions_of([1] * 40 + [2] * 70, torch.full((110, 4, 4), 20.0))
    (found,) = instances(predictions, [(16, 16)], things=things)
    assert len(found) == 0


def test_every_query_may_be_an_object():
    predictions = predictions_of([0] * 120, torch.full((120, 2, 2), 20.0))
    assert len(instances(predictions, [(8, 8)], min_score=0.5)[0]) == 100
    assert len(instances(predictions, [(8, 8)], top=None, min_score=0.5)[0]) == 120


def test_a_segment_is_surer_than_its_least_score():
    predictions = predictions_of([0], torch.full((1, 4, 4), 20.0), certainty=2.0)
    score = float(predictions.class_logits[0, 0].softmax(0)[0])
    (found,) = panoptic(predictions, [(16, 16)], things=[0], min_score=score)
    assert found.segments == ()
    (found,) = panoptic(predictions, [(16, 16)], things=[0], min_score=score - 1e-4)
    assert len(found.segments) == 1


@pytest.mark.parametrize("function", [image_masks, semantic_scores, instances])
def test_sizes_are_those_of_the_images(function):
    predictions = predictions_of([0], torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="image_sizes: expected one for each of 1 images, got 2"):
        function(predictions, [(16, 16)] * 2)
    with pytest.raises(ValueError, match="output_sizes: expected one for each of 1 images, got 0"):
        function(predictions, [(16, 16)], [])
