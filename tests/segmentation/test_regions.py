"""Point clouds in regions, as models of points see them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.strategies import KINDS, UNEVEN, cloud
from pointformer import TokenSet
from pointformer.annotations import Category
from pointformer.data.point_sets import PointAnnotation
from pointformer.data.point_transforms import RandomRegion
from pointformer.models import create_model
from pointformer.prediction import predict_points, region_of
from pointformer.segmentation.regions import Regions
from pointformer.tasks import task_of

CATEGORIES = [Category(n, str(n)) for n in range(3)]
SMALL = {"dims": (8, 16), "depths": (1, 1), "heads": (1, 2), "neighborhood_size": (16, 16)}


def tokens(positions):
    """Points with their row number as a feature."""
    rows = torch.arange(len(positions), dtype=torch.float32)
    return TokenSet.from_world(torch.as_tensor(positions, dtype=torch.float64), rows[:, None])


def model(**options):
    torch.manual_seed(0)
    found = create_model(
        "point_nano",
        num_classes=3,
        head="point_segmentation",
        categories=CATEGORIES,
        coordinates="xyz",
        unit=1.0,
        **SMALL,
        **options,
    )
    return found.eval()


@given(
    st.sampled_from(KINDS + UNEVEN),
    st.integers(0, 120),
    st.integers(1, 50),
    st.sampled_from((2, 3)),
    st.integers(0, 2**32 - 1),
)
def test_each_point_is_decided_once_among_its_nearest(kind, count, size, dimensions, seed):
    positions, _ = cloud(np.random.default_rng(seed), kind, count, dimensions)
    if not np.isfinite(positions.astype(np.float32)).all():
        return
    whole = tokens(positions)
    decided = np.zeros(count, int)
    for seen, rows, places in Regions(whole, size):
        index = seen.features[:, 0].long()
        decided[rows] += 1
        assert torch.equal(index[torch.from_numpy(places)], torch.from_numpy(rows))
        assert seen.num_tokens == count if count <= size else size <= seen.num_tokens
        assert seen.num_tokens <= size + max(1, size // 2)
        assert torch.equal(seen.features[:, 0], seen.features[:, 0].unique())
        ground = whole.positions[:, :2].double()
        middle = (ground[rows].amin(0) + ground[rows].amax(0)) / 2 if len(rows) else ground[:0]
        if len(rows) and count > size:
            distance = (ground - middle).square().sum(1)
            nearest = distance.sort().values[size - 1]
            inside = set(index.tolist())
            assert {i for i in range(count) if distance[i] < nearest * (1 - 1e-9)} <= inside
    assert (decided == 1).all()


def test_parts_of_an_even_cloud_lie_in_the_middle_of_their_regions():
    """No more points than asked for, and the ones that a region decides are not at its border."""
    rng = np.random.default_rng(0)
    regions = Regions(tokens(rng.random((20_000, 3)) * [200, 100, 5]), 1000)
    assert 40 <= len(regions) <= 50
    assert max(seen.num_tokens for seen, _, _ in regions) <= 1100


@pytest.mark.parametrize("points", [0, -1, 1.5, True, None])
def test_wrong_sizes(points):
    with pytest.raises((ValueError, TypeError), match="points"):
        Regions(tokens(np.zeros((3, 3))), points)


def test_a_region_is_seen_as_in_training():
    """`RandomRegion` around a point in the middle of a part takes the same points, in the same
    places."""
    rng = np.random.default_rng(0)
    corners = np.array([[x, y, 0] for x in (0.0, 40.0) for y in (0.0, 40.0)])
    positions = np.repeat(corners, 100, 0) + rng.random((400, 3)) + [5e5, 5e6, 300]
    whole = tokens(positions)
    annotation = PointAnnotation("a", whole, labels=np.zeros(400, np.int32))
    trained, _ = RandomRegion(100)(whole, annotation, np.random.default_rng(0))
    same = [s for s, _, _ in Regions(whole, 100) if torch.equal(s.features, trained.features)]
    assert same
    assert torch.equal(same[0].positions, trained.positions)


def test_a_place_on_the_map_is_no_matter():
    """Of what a model sees; positions here are exact in float32."""
    rng = np.random.default_rng(1)
    positions = np.round(rng.random((400, 3)) * [64, 64, 8] * 8) / 8
    trained = model(in_channels=0)
    trained.trained = {"recipe": {"augmentation": {"points": {"region": {"points": 100}}}}}
    task = task_of(trained)
    assert region_of(trained) == 100

    def found(places):
        cloud = TokenSet.from_world(torch.from_numpy(places), torch.zeros(len(places), 0))
        return predict_points(trained, task, cloud)

    alone = found(positions)
    assert len(np.unique(alone)) > 1
    assert (found(positions + np.array([4096, 8192, 512])) == alone).all()


def test_regions_give_what_the_model_says_of_each():
    rng = np.random.default_rng(2)
    whole = tokens(rng.random((300, 3)) * [32, 32, 4])
    made = model(in_channels=1)
    task = task_of(made)
    direct = np.full(300, -1)
    for seen, rows, places in Regions(whole, 90):
        direct[rows] = predict_points(made, task, seen)[places]
    assert (predict_points(made, task, whole, 90) == direct).all()
    assert (predict_points(made, task, whole, 300) == predict_points(made, task, whole)).all()


def test_whole_objects_have_no_regions():
    objects = create_model(
        "point_nano", num_classes=3, categories=[Category(n, str(n)) for n in range(3)]
    )
    with pytest.raises(ValueError, match="region"):
        predict_points(objects, task_of(objects), tokens(np.zeros((5, 3))), 2)
