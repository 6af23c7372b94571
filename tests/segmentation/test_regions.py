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
from pointformer.segmentation.regions import Region, Regions, blend_regions, range_of
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
    owners = np.zeros(count, int)
    for region in Regions(whole, size):
        seen, rows, own = region.tokens, region.rows, region.own
        owners[rows[own]] += 1
        assert torch.equal(seen.features[:, 0].long(), torch.from_numpy(rows))
        assert (np.diff(rows) > 0).all()
        assert seen.num_tokens == count if count <= size else size <= seen.num_tokens
        assert seen.num_tokens <= size + max(1, size // 2)
        ground = whole.positions[:, :2].double()
        if len(rows) and count > size:
            middle = torch.from_numpy(np.median(ground[rows[own]], 0))
            distance = (ground - middle).square().sum(1)
            nearest = distance.sort().values[size - 1]
            assert {i for i in range(count) if distance[i] < nearest * (1 - 1e-9)} <= {*rows}
            order = distance[rows].argsort(stable=True).numpy()
            assert (np.diff(region.weights[order]) <= 0).all()
            share = distance[rows].sqrt().numpy() / max(nearest.item(), 5e-324) ** 0.5
            expected = (1 - share).clip(1e-3)
            np.testing.assert_allclose(region.weights, expected, rtol=1e-4, atol=1e-6)
        assert ((region.weights > 0) & (region.weights <= 1)).all()
    assert (owners == 1).all()


def test_parts_of_an_even_cloud_lie_in_the_middle_of_their_regions():
    """No more points than asked for, and the ones that a region decides are not at its border."""
    rng = np.random.default_rng(0)
    regions = Regions(tokens(rng.random((20_000, 3)) * [200, 100, 5]), 1000)
    assert 40 <= len(regions) <= 50
    assert max(region.tokens.num_tokens for region in regions) <= 1100
    for region in regions:
        assert region.weights[region.own].mean() > 2 * region.weights[~region.own].mean()


@pytest.mark.parametrize("away", [1e6, -1e6])
def test_points_far_away_change_nothing_for_the_others(away):
    """Neither what the others are seen with, nor the height at which they are."""
    rng = np.random.default_rng(0)
    positions = rng.random((4000, 3)) * [100, 100, 5]
    positions[[0, 1]] = [[away, 50, -80], [0, 0, -4000]]
    for region in Regions(tokens(positions), 1000):
        far = np.isin(region.rows[region.own], [0, 1])
        assert region.weights[region.own][~far].mean() > 2 * region.weights[~region.own].mean()
        seen = create_model("point_nano", unit=1.0).preprocess(region.tokens)
        heights = seen.positions[~np.isin(region.rows, [0, 1]), 2]
        assert float(heights.min()) > -0.1
        assert float(heights.max()) < 5.1


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, 10, (0, 10)), (-7, 17, (-7, 17)), (-7.5, 17, (1, 17)), (-7, 17.5, (-7, 9)),
     (-1e9, 1e9, (1, 9))],
)  # fmt: skip
def test_a_value_as_far_from_the_others_as_they_are_wide_is_theirs(first, last, expected):
    values = np.array([last, *range(1, 10), first], float)
    assert range_of(values) == expected
    assert range_of(np.delete(values, 5)) == (first, last)  # of ten none is a stray
    assert range_of(np.array([first, *[3.0] * 20, last])) == (first, last)


@pytest.mark.parametrize(("count", "strays"), [(2000, 1), (2001, 2), (4000, 2), (4001, 3)])
def test_so_many_values_can_be_strays(count, strays):
    """At each end 0.05%, rounded up; of one more no one knows."""
    values = np.linspace(0, 1, count)
    for sign in (1, -1):
        few, more = values.copy(), values.copy()
        few[:strays], more[: strays + 1] = 1e6, 1e6
        low, high = sorted(sign * end for end in range_of(sign * few))
        assert 0 <= low < 0.002
        assert high == 1
        assert sorted(sign * end for end in range_of(sign * more))[1] == 1e6


@pytest.mark.parametrize(("count", "number"), [(40, 1), (41, 3)])
def test_as_many_points_as_asked_for_are_one_region(count, number):
    regions = [*Regions(tokens(np.random.default_rng(0).random((count, 3))), 40)]
    assert len(regions) == number
    assert all((region.weights == 1).all() == (number == 1) for region in regions)


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
    seen = [region.tokens for region in Regions(whole, 100)]
    same = [tokens for tokens in seen if torch.equal(tokens.features, trained.features)]
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


def test_scores_of_several_regions_are_averaged_with_their_weights():
    """Against a plain loop over points."""
    rng = np.random.default_rng(2)
    whole = tokens(rng.random((300, 3)) * [32, 32, 4])
    made = model(in_channels=1)
    task = task_of(made)
    sums, total = np.zeros((300, 3)), np.zeros(300)
    with torch.inference_mode():
        for region in Regions(whole, 90):
            scores = made(made.preprocess(region.tokens)).numpy().astype(np.float64)
            for row, weight, score in zip(region.rows, region.weights, scores, strict=True):
                sums[row] += weight * score
                total[row] += weight
    assert ((total > 0) & (total < 4)).all()
    found = predict_points(made, task, whole, 90)
    assert (found == sums.argmax(1)).all()
    assert (found == predict_points(made, task, whole, 90)).all()
    assert (predict_points(made, task, whole, 300) == predict_points(made, task, whole)).all()


def test_rows_of_what_is_found_are_those_of_the_input():
    """Also of points in cluster order."""
    whole = tokens(np.random.default_rng(3).random((200, 3)) * 20)
    made = model(in_channels=1)
    task = task_of(made)
    for size in (None, 60):
        plain = predict_points(made, task, whole, size)
        assert (predict_points(made, task, whole.cluster(8), size) == plain).all()


def test_blended_scores_are_means_by_weight():
    """Of half precision too, in float32."""
    rng = np.random.default_rng(0)
    regions = list(Regions(tokens(rng.random((80, 3)) * 9), 24))
    parts = [torch.from_numpy(rng.normal(size=(len(r.rows), 2))).half() for r in regions]
    sums, total = np.zeros((80, 2)), np.zeros((80, 1))
    for region, scores in zip(regions, parts, strict=True):
        for row, weight, score in zip(region.rows, region.weights, scores.numpy(), strict=True):
            sums[row] += weight * score.astype(float)
            total[row] += weight
    found = blend_regions(80, zip(regions, parts, strict=True))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, sums / total, rtol=1e-4, atol=1e-5)


def test_scores_of_equal_regions_stay_as_they_are():
    whole = tokens(np.zeros((7, 3)))
    scores = torch.arange(21.0).reshape(7, 3)
    regions: list[Region] = list(Regions(whole, 3))
    assert len(regions) > 1
    joined = blend_regions(7, ((region, scores[region.rows]) for region in regions))
    torch.testing.assert_close(joined, scores)


def test_whole_objects_have_no_regions():
    objects = create_model(
        "point_nano", num_classes=3, categories=[Category(n, str(n)) for n in range(3)]
    )
    with pytest.raises(ValueError, match="region"):
        predict_points(objects, task_of(objects), tokens(np.zeros((5, 3))), 2)


def test_objects_in_training_may_be_regions():
    """The whole is what is asked for."""
    objects = create_model("point_nano", num_classes=3, categories=CATEGORIES, coordinates="xyz")
    task = task_of(objects)
    cloud = TokenSet.from_world(torch.rand(50, 3, dtype=torch.float64), torch.zeros(50, 0))
    whole = predict_points(objects, task, cloud)
    objects.trained = {"recipe": {"augmentation": {"points": {"region": {"points": 20}}}}}
    assert (predict_points(objects, task, cloud) == whole).all()
