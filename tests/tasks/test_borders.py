"""Targets from instances, their loss, and instances from logits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import label
from torch.nn import functional as F

from pointformer.annotations import VOID, Category
from pointformer.data import Annotation
from pointformer.metrics import average_precision
from pointformer.tasks.borders import (
    BORDER,
    INSIDE,
    dense_loss,
    instance_target,
    instances_from_logits,
)
from pointformer.tasks.instance import InstanceBorders


def disks(shape, circles):
    y, x = np.indices(shape)
    instances = np.zeros(shape, np.int32)
    for index, (cy, cx, radius) in enumerate(circles, 1):
        instances[(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = index
    return instances


def confident_logits(target):
    return np.where(np.arange(3)[:, None, None] == target, 8.0, 0.0).astype(np.float32)


@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)),
                  elements=st.integers(0, 3)), st.integers(0, 3))  # fmt: skip
def test_target_equals_its_definition(instances, border_width):
    expected = (instances > 0).astype(np.uint8)
    for y, x in np.argwhere(instances > 0):
        for v, u in np.argwhere((instances > 0) & (instances != instances[y, x])):
            if (v - y) ** 2 + (u - x) ** 2 <= border_width**2:
                expected[y, x] = BORDER
    np.testing.assert_array_equal(instance_target(instances, border_width), expected)


def test_borders_are_two_pixels_wide():
    assert instance_target(np.array([[7] * 4 + [2] * 5])).tolist() == [[1, 1, 2, 2, 2, 2, 1, 1, 1]]


def test_an_edge_to_the_background_is_no_border():
    target = instance_target(disks((20, 20), [(10, 10, 6)]))
    assert set(np.unique(target)) == {0, INSIDE}


@pytest.mark.parametrize("factor", [1, 3])
def test_separate_and_touching_disks_come_back(factor):
    circles = [(14, 14, 8), (14, 30, 8), (40, 12, 3), (42, 34, 10), (30, 50, 5)]
    instances = disks((64, 64), circles).repeat(factor, 0).repeat(factor, 1)
    found = instances_from_logits(confident_logits(instance_target(instances)))
    assert found.max() == len(circles)
    result = average_precision([(found, instances)])
    assert result.at(0.9) == 1


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 30), st.integers(1, 12))
def test_result_is_a_labeling_of_the_foreground(seed, height, width, min_size):
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 3, (3, (height + 3) // 4, (width + 3) // 4))
    logits = coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width]
    found = instances_from_logits(logits, min_size=min_size, confidence=0.0)
    assert found.dtype == np.int32
    areas = np.bincount(found.ravel())
    assert (areas[1:] >= min_size).all()  # so the ids are 1..n without gaps
    for index in range(1, len(areas)):
        assert label(found == index, connectivity=1).max() == 1
    background, inside, _ = np.exp(logits) / np.exp(logits).sum(0)
    foreground = 1 - background > 0.5
    assert not (found > 0)[~foreground].any()
    if min_size == 1:
        # Exactly the connected foreground that holds a marker.
        unsmoothed = instances_from_logits(
            logits, min_size=1, confidence=0.0, smoothing=0.0, marker_threshold=0.7
        )
        regions = label(foreground, connectivity=1)
        marked = np.unique(regions[foreground & (inside > 0.7)])
        np.testing.assert_array_equal(unsmoothed > 0, np.isin(regions, marked) & foreground)


def test_thresholds_and_smallest_size():
    instances = disks((40, 40), [(10, 10, 3), (25, 25, 7)])
    logits = confident_logits(instance_target(instances))
    assert instances_from_logits(logits).max() == 2
    assert instances_from_logits(logits, min_size=50).max() == 1
    assert instances_from_logits(logits, min_size=500).max() == 0
    assert instances_from_logits(logits, foreground_threshold=0.9999).max() == 0
    logits[0, :20] += 7  # the small disk is foreground with probability 0.73
    options = {"marker_threshold": 0.5}
    assert instances_from_logits(logits, confidence=0.7, **options).max() == 2
    assert instances_from_logits(logits, confidence=0.8, **options).max() == 1


def logits_of(background, inside):
    """Of probabilities (H, W) or for all pixels of 20 x 20; the rest is border."""
    background, inside = (np.broadcast_to(p, (20, 20)) for p in (background, inside))
    return np.log(np.clip([background, inside, 1 - background - inside], 1e-6, 1))


def test_defaults_by_hand():
    """Just above and below: of the confidence 0.825, of markers 0.8, of a foreground 0.5; 16 pixels
    in size; and of a blur by one pixel, after which a line of 3 keeps 0.87, one of 2 0.62."""

    def found(background, inside, **options):
        return instances_from_logits(logits_of(background, inside), **options).max()

    assert (found(0.18, 0.815), found(0.17, 0.815)) == (0, 1)
    assert (found(0.0, 0.79), found(0.0, 0.81)) == (0, 1)
    loose = {"confidence": 0.0, "marker_threshold": 0.1}
    assert (found(0.51, 0.48, **loose), found(0.49, 0.48, **loose)) == (0, 1)
    even = np.zeros((3, 20, 20))
    even[2] = -200.0
    assert instances_from_logits(even, **loose).max() == 0  # what is just 0.5 is none
    for side, count in ((15, 0), (16, 1)):
        inside = (np.arange(400) < side).reshape(20, 20).astype(float)
        assert found(1 - inside, inside, smoothing=0) == count
    for side, count in ((2, 0), (3, 1)):
        line = np.zeros((20, 20))
        line[:, 8 : 8 + side] = 1
        assert found(0.0, line) == count


def test_objects_that_touch_at_a_corner_are_two():
    inside = np.kron([[1.0, 0.0], [0.0, 1.0]], np.ones((10, 10)))
    found = instances_from_logits(logits_of(1 - inside, inside), smoothing=0)
    np.testing.assert_array_equal(found, np.kron([[1, 0], [0, 2]], np.ones((10, 10), int)))


def test_objects_grow_over_the_most_probable_pixels_first():
    """They meet where the inside is least sure."""
    row = [0.9, 0.7, 0.62, 0.1, 0.6, 0.65, 0.7, 0.7, 0.75, 0.75, 0.8, 0.9]
    inside = np.tile(row, (3, 1))
    logits = np.log([np.full_like(inside, 0.05), inside, 0.95 - inside])
    found = instances_from_logits(logits, smoothing=0, marker_threshold=0.85, min_size=1)
    assert found.tolist() == [[1] * 4 + [2] * 8] * 3


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"logits: expected shape \(3, H, W\), got \(4, 5\)"):
        instances_from_logits(np.zeros((4, 5)))


def test_loss_is_least_for_the_truth_and_counts_the_classes():
    target = torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 2.0, 6.0])
    truth = 20 * F.one_hot(target, 3).movedim(-1, 1).float()
    uniform = torch.zeros(2, 3, 16, 16)
    assert sum(dense_loss(truth, target, weights).values()) < 1e-3
    # All classes equally likely: log 3, and per class Dice (2 n/3 + 100) / (n + N/3 + 100).
    pixels = target.numel()
    dice = [
        (2 * n / 3 + 100) / (n + pixels / 3 + 100) for n in target.unique(return_counts=True)[1]
    ]
    expected = math.log(3) + 1 - float(sum(dice[1:])) / 2
    assert sum(dense_loss(uniform, target, weights).values()).item() == pytest.approx(
        expected, rel=1e-5
    )
    absent = torch.zeros_like(target)
    assert torch.isfinite(sum(dense_loss(uniform, absent, weights).values()))


def test_loss_is_that_of_the_known_pixels():
    g = torch.Generator().manual_seed(0)
    logits, target = (
        torch.randn(2, 3, 7, 9, generator=g),
        torch.randint(VOID, 3, (2, 7, 9), generator=g),
    )
    known = target != VOID
    assert 0 < known.sum() < known.numel()
    weights = torch.tensor([1.0, 2.0, 6.0])
    alone = logits.movedim(1, -1)[known].T[None, :, None]
    expected = dense_loss(alone, target[known][None, None], weights)
    torch.testing.assert_close(dense_loss(logits, target, weights), expected)


def test_the_tasks_class_weights_are_used():
    logits = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = np.zeros((8, 8), np.int32)
    ids[2:5, 1:7], ids[5:7, 2:6] = 1, 2
    target = torch.from_numpy(instance_target(ids)).long()[None]
    assert target.unique().tolist() == [0, 1, 2]
    for inside, border in ((1.0, 3.0), (2.5, 6.0)):
        task = InstanceBorders([Category(1, "nucleus")], inside, border)
        expected = dense_loss(logits, target, torch.tensor([1.0, inside, border]))
        torch.testing.assert_close(task.loss(logits, [Annotation.of_objects(ids)]), expected)
