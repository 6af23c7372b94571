"""Tiles cover pictures; objects cut by them are whole again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.measure import label

from pointformer.models import create_model
from pointformer.models.inference import predict_semantic
from pointformer.models.postprocess import semantic_scores
from pointformer.tiling import stitch, tiles


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


def test_overlap_must_be_less_than_the_size():
    with pytest.raises(ValueError, match="overlap: expected 0 to 7 pixels for tiles of 8: 8"):
        tiles(20, 20, 8, 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = {"queries": 4, "dim": 32, "hidden": 32, "decoder_layers": 2}
    return create_model("aff_nano", head="hcformer", num_classes=3, **options).eval()


def test_semantic_scores_over_copies_and_tiles(model):
    image = torch.randn(3, 60, 76, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (plain,) = semantic_scores(model(image[None]), [(60, 76)])
        (mirrored,) = semantic_scores(model(image[None].flip(3)), [(60, 76)])
    torch.testing.assert_close(predict_semantic(model, image), plain)
    both = predict_semantic(model, image, flip=True)
    torch.testing.assert_close(both, (plain + mirrored.flip(2)) / 2)
    scaled = predict_semantic(model, image, scales=(0.5, 1.0), tile=48, overlap=16)
    assert scaled.shape == plain.shape
    assert scaled.isfinite().all()


def test_tiles_leave_no_seams():
    """Of a model that looks at single pixels, tiles see what the whole picture shows."""

    def model(images):
        return torch.stack([images[:, 0], images[:, 1] * 2], 1)

    image = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(1))
    whole = predict_semantic(model, image)
    torch.testing.assert_close(predict_semantic(model, image, tile=24, overlap=8), whole)
