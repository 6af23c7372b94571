"""Tiles cover pictures; objects cut by them are whole again."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.measure import label

from pointformer.annotations import Objects, SegmentMap
from pointformer.segmentation.tiling import (
    blend,
    stitch,
    stitch_maps,
    stitch_objects,
    tiles,
    windows_of,
)


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(2, 40),
    overlap=st.integers(0, 39),
)
def test_cores_cover_every_pixel_once(height, width, size, overlap):
    overlap = min(overlap, size - 1)
    seen = np.zeros((height, width), int)
    for tile in tiles(height, width, size, overlap):
        top, left, bottom, right = tile.core
        seen[top:bottom, left:right] += 1
        assert 0 <= tile.top <= top < bottom <= tile.bottom <= height
        assert 0 <= tile.left <= left < right <= tile.right <= width
        assert tile.bottom - tile.top <= size
        assert tile.right - tile.left <= size
        # An object seen whole by a neighbor is seen by both as far as the overlap goes.
        for near, far, border in ((tile.top, top, 0), (tile.left, left, 0)):
            assert far == border or far - near >= overlap // 2
    assert (seen == 1).all()


def test_windows_overlap_by_64_pixels_or_half():
    """And all by next to the same, of any length."""
    for tile, overlap in ((200, 64), (128, 64), (100, 50), (7, 3), (1, 0)):
        for height in (300, 333):
            windows = windows_of(height, 1, tile, None)
            assert {window.overlap for window in windows} == {overlap}
            shared = [a.bottom - b.top for a, b in itertools.pairwise(windows)]
            assert overlap <= min(shared) >= max(shared) - 1
    (whole,) = windows_of(300, 400, None, None)
    assert whole.core == (0, 0, 300, 400)


def test_maps_are_joined_with_their_highest_scores_and_one_region_of_a_kind():
    """Of two windows: an object in both of them, and two patches of what cannot be counted."""
    first, second = tiles(4, 24, 16, 8)
    ids = np.repeat([[1] * 2 + [2] * 10 + [0] * 9 + [3] * 3], 4, 0)
    left, right = ids[:, :16], np.array([0, 0, 1, 2])[ids[:, 8:]]
    for scores in ((0.3, 0.8), (0.9, 0.2)):
        parts = [
            (first, SegmentMap.of(left, [5, 6], [0.1, scores[0]])),
            (second, SegmentMap.of(right, [6, 5], [scores[1], 0.4])),
        ]
        joined = stitch_maps((4, 24), parts, uncountable=[5])
        np.testing.assert_array_equal(joined.ids, np.array([0, 1, 2, 1])[ids])
        assert [(s.category, s.score) for s in joined.segments] == [(5, 0.4), (6, max(scores))]
        assert len(stitch_maps((4, 24), parts).segments) == 3


def blobs(seed, shape=(70, 90), count=25):
    """Disks that do not touch each other, by id."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    picture = np.zeros(shape, bool)
    for _ in range(count):
        cy, cx, r = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(2, 7)
        disk = (y - cy) ** 2 + (x - cx) ** 2 <= r**2
        near = (y - cy) ** 2 + (x - cx) ** 2 <= (r + 2) ** 2
        if not (picture & near).any():
            picture |= disk
    return label(picture, connectivity=1)


def test_what_cannot_be_counted_is_one_region():
    parts = [
        (tile, np.array([[1, 1, 2, 0, 3, 3]] * 4)[:, tile.left : tile.right], [5, 6, 5])
        for tile in tiles(4, 6, 6, 2)
    ]
    assert len(parts) == 1
    _, sources = stitch((4, 6), parts)
    assert len(sources) == 3
    joined, sources = stitch((4, 6), parts, uncountable=[5])
    np.testing.assert_array_equal(joined[0], [1, 1, 2, 0, 1, 1])
    assert sources == [[(0, 1), (0, 3)], [(0, 2)]]


@given(seed=st.integers(0, 2**16), size=st.integers(24, 60))
def test_objects_that_tiles_cut_are_joined(seed, size):
    """Each tile sees the truth in its window: stitched, it is the truth again."""
    truth = blobs(seed)
    parts = []
    for tile in tiles(*truth.shape, size, 16):  # no disk is wider
        window = truth[tile.window]
        old = np.unique(window[window > 0])
        ids = np.searchsorted(old, window) + 1
        ids[window == 0] = 0
        parts.append((tile, ids, [0] * len(old)))
    stitched, sources = stitch(truth.shape, parts)
    assert len(sources) == stitched.max(initial=0) == truth.max(initial=0)
    pairs = np.unique(np.stack([stitched.ravel(), truth.ravel()]), axis=1)
    assert pairs.shape[1] == len(np.unique(truth))  # one to one


def test_categories_keep_objects_apart():
    first, second = tiles(10, 16, 10, 4)
    ids = np.ones((10, 10), int)
    same, _ = stitch((10, 16), [(first, ids, [3]), (second, ids, [3])])
    apart, sources = stitch((10, 16), [(first, ids, [3]), (second, ids, [2])])
    assert same.max() == 1
    assert apart.max() == 2
    assert sources == [[(0, 1)], [(1, 1)]]


def in_tiles(objects, size, overlap):
    """What each tile sees of (mask (H, W), class, score per part or for all)."""
    parts = []
    for number, tile in enumerate(tiles(*objects[0][0].shape, size, overlap)):
        seen = [
            (mask[tile.window], kind, s) for mask, kind, s in objects if mask[tile.window].any()
        ]
        scores = [s[number] if isinstance(s, dict) else s for _, _, s in seen]
        shape = tile.bottom - tile.top, tile.right - tile.left
        parts.append(
            (tile, Objects([m for m, _, _ in seen], [k for _, k, _ in seen], scores, shape))
        )
    return parts


@given(seed=st.integers(0, 2**16), size=st.integers(28, 60))
def test_objects_that_overlap_are_joined_one_by_one(seed, size):
    """Pairs of an object and a smaller one inside of it, of other classes or scores."""
    truth = blobs(seed, (50, 66), 8)
    objects = []
    for n in range(1, truth.max(initial=0) + 1):
        outer = truth == n
        rows = np.flatnonzero(outer.any(1))
        inner = outer & (np.arange(len(truth)) < rows[0] + 1 + len(rows) // 3)[:, None]
        objects += [(outer, n % 2, n / 40), (inner, n % 3, n / 50)]
    if not objects:
        return
    found = stitch_objects(truth.shape, in_tiles(objects, size, 20))
    key = [(mask.tobytes(), kind, np.float32(score).item()) for mask, kind, score in objects]
    ours = zip(found.dense(), found.classes.tolist(), found.scores.tolist(), strict=True)
    assert sorted((mask.tobytes(), kind, score) for mask, kind, score in ours) == sorted(key)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_joined_object_has_the_highest_score_of_its_parts(axis):
    mask = np.zeros((12, 40), bool)
    mask[4:8, 3:36] = True
    mask = np.moveaxis(mask, 1, 1 - axis) if axis == 0 else mask.T
    for scores in ({0: 0.2, 1: 0.7, 2: 0.4}, {0: 0.9, 1: 0.1, 2: 0.4}, {0: 0.2, 1: 0.3, 2: 0.8}):
        parts = in_tiles([(mask, 5, scores)], 18, 7)
        assert len(parts) == 3
        found = stitch_objects(mask.shape, parts)
        assert found.classes.tolist() == [5]
        assert found.scores.tolist() == [np.float32(max(scores.values()))]
        np.testing.assert_array_equal(found.dense()[0], mask)


def test_duplicates_stay_duplicates():
    """Two queries for one object: each finds its continuation, the better its better one."""
    mask = np.zeros((10, 26), bool)
    mask[2:8, 4:22] = True
    worse = mask.copy()
    worse[2:4] = False
    parts = in_tiles([(mask, 1, 0.9), (worse, 1, 0.2)], 16, 6)
    found = stitch_objects(mask.shape, parts)
    assert sorted(found.scores.tolist()) == [np.float32(0.2), np.float32(0.9)]
    np.testing.assert_array_equal(found.dense()[found.scores.argmax()], mask)
    np.testing.assert_array_equal(found.dense()[found.scores.argmin()], worse)


def test_the_best_pairs_come_first():
    """Those that agree most; of objects with scores that and the scores together."""
    first, second = tiles(1, 24, 16, 8)
    at = np.arange(16)[None]
    mine = ((at >= 4) & (at < 16)).astype(int)
    other = np.where(at < 2, 1, np.where(at < 12, 2, 0))
    parts = [(first, mine, [0]), (second, other, [0, 0])]
    joined, sources = stitch((1, 24), parts, agreement=0.2)
    assert sources == [[(0, 1), (1, 2)]]
    assert np.flatnonzero(joined).tolist() == list(range(4, 20))
    # Of the 8 columns that both windows see, the sure one has 6, the other one all.
    near, far = (at < 6) | ((at >= 8) & (at < 10)), at < 12
    for score, expected in (
        (0.2, {0.9: (4, 18), 0.2: (12, 20)}),
        (0.8, {0.9: (4, 20), 0.85: (12, 18)}),
    ):
        parts = [
            (first, Objects([mine > 0], [0], [0.9], (1, 16))),
            (second, Objects([near, far], [0, 0], [0.85, score], (1, 16))),
        ]
        found = stitch_objects((1, 24), parts)
        scores = [round(score, 2) for score in found.scores.tolist()]
        assert dict(zip(scores, (m.box[::2] for m in found.masks), strict=True)) == expected


@pytest.mark.parametrize("side", ["top", "left", "bottom", "right"])
def test_what_a_neighbor_does_not_see_ends_at_the_core(side):
    """An object that only one of two tiles found keeps its pixels in that tile's core."""
    wide = side in ("left", "right")
    shape = (10, 24) if wide else (24, 10)
    first, second = tiles(*shape, 16, 8)
    tile = second if side in ("top", "left") else first
    other = first if tile is second else second
    full = np.ones((tile.bottom - tile.top, tile.right - tile.left), bool)
    empty = Objects([], [], [], (other.bottom - other.top, other.right - other.left))
    pairs = [(tile, Objects([full], [0], [0.5], full.shape)), (other, empty)]
    (mask,) = stitch_objects(
        shape, sorted(pairs, key=lambda pair: (pair[0].top, pair[0].left))
    ).masks
    top, left, bottom, right = tile.core
    assert mask.box == (left, top, right, bottom)
    assert mask.area == (bottom - top) * (right - left) == 120
    ids, _ = stitch(shape, [(tile, full.astype(int), [0]), (other, 0 * full.astype(int), [])])
    assert np.argwhere(ids).min(0).tolist() == [top, left]
    assert (np.argwhere(ids).max(0) + 1).tolist() == [bottom, right]


def test_agreement_is_over_the_overlap():
    """Of 8 columns that both tiles see, one object has 3, the other those and n more."""
    first, second = tiles(1, 24, 16, 8)
    for more, same in ((2, True), (3, True), (4, False)):
        mine, other = np.zeros((1, 16), int), np.zeros((1, 16), int)
        mine[0, 8:11], other[0, : 3 + more] = 1, 1
        mine[0, :8], other[0, 8:] = 1, 1  # beyond the overlap, which does not count
        _, sources = stitch((1, 24), [(first, mine, [0]), (second, other, [0])])
        assert len(sources) == (1 if same else 2), more
        parts = [(first, Objects([mine > 0], [0], [1.0], (1, 16)))]
        parts.append((second, Objects([other > 0], [0], [1.0], (1, 16))))
        assert len(stitch_objects((1, 24), parts)) == (1 if same else 2), more


def test_many_tiles():
    grid = tiles(1600, 1600, 50, 10)
    assert len(grid) == 1600
    ids = np.zeros((50, 50), np.int32)
    ids[25, 25] = 1
    stitched, sources = stitch((1600, 1600), [(tile, ids, [0]) for tile in grid])
    assert stitched.max() == len(sources) == 1600


def test_overlap_must_be_less_than_the_size():
    with pytest.raises(ValueError, match="overlap: expected 0 to 7 pixels for tiles of 8: 8"):
        tiles(20, 20, 8, 8)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(2, 24),
    overlap=st.integers(0, 23),
    seed=st.integers(0, 2**16),
)
def test_blended_scores_leave_no_seams(height, width, size, overlap, seed):
    """Windows that agree give what they agree on; windows that do not, a mean by their weights."""
    windows = tiles(height, width, size, min(overlap, size - 1))
    g = torch.Generator().manual_seed(seed)
    whole = torch.randn(3, height, width, generator=g)
    found, seen = torch.zeros_like(whole), torch.zeros(height, width)
    for place, scores in blend(windows, (whole[:, *w.window] for w in windows)):
        found[:, *place] = scores
        seen[place] += 1
    assert (seen == 1).all()
    torch.testing.assert_close(found, whole)
    parts = [torch.randn(2, *window.size, generator=g) for window in windows]
    total, weights = torch.zeros(2, height, width), torch.zeros(height, width)
    for window, part in zip(windows, parts, strict=True):
        y, x = (torch.arange(side) + 0.5 for side in window.size)
        ramps = [
            (torch.minimum(at, len(at) - at) / max(window.overlap, 1)).clamp(max=1) for at in (y, x)
        ]
        fade = ramps[0][:, None] * ramps[1]
        total[:, *window.window] += part * fade
        weights[window.window] += fade
    found = torch.empty_like(total)
    for place, scores in blend(windows, parts):
        found[:, *place] = scores
    torch.testing.assert_close(found, total / weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_are_averages(dtype):
    """Of windows whose sides are beyond what the type counts to."""
    windows = windows_of(300, 2100, 2060, None)
    scores = torch.tensor([0.25, 0.75], dtype=dtype)[:, None, None]
    for _, part in blend(windows, (scores.expand(2, *window.size) for window in windows)):
        torch.testing.assert_close(part.float(), scores.float().expand_as(part))


def test_uncountable_segments_of_one_tile_are_one():
    ids = np.array([[1, 1, 2, 3, 3]], np.int32)
    found = SegmentMap.of(ids, [5, 6, 5], [0.25, 0.5, 0.75])
    (tile,) = windows_of(1, 5, None, None)
    joined = stitch_maps((1, 5), [(tile, found)], uncountable=[5])
    assert [(s.category, s.score, s.area) for s in joined.segments] == [(5, 0.75, 4), (6, 0.5, 1)]
    assert stitch_maps((1, 5), [(tile, found)]) is found


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_windows_of_nothing_are_refused(size):
    with pytest.raises(ValueError, match=r"(height|width): expected a positive integer, got 0"):
        windows_of(*size, None, None)
