"""Clouds from above and from the side, and the points that a model keeps."""

import re

import numpy as np
import pytest
import torch

from helpers.tiles import CORNER, write_point_model
from pointformer import TokenSet
from pointformer.annotations import Category
from pointformer.models import load_model
from pointformer.segmentation.cloud_drawing import (
    View,
    above,
    beside,
    cloud_from_above,
    cloud_pictures,
    focus_cloud,
)
from pointformer.segmentation.clouds import (
    KeptPoints,
    SegmentedCloud,
    focus_points,
    read_cloud,
    segment_points,
)
from pointformer.segmentation.drawing import caption_font, heat


def cloud(count, seed=0, size=(20, 30, 5)):
    world = CORNER + np.random.default_rng(seed).random((count, 3)) * size
    return TokenSet.from_world(torch.from_numpy(world))


def test_the_nearest_point_is_seen():
    across, up = np.array([0.0, 0.0, 9.0]), np.array([0.0, 0.0, 9.0])
    view = View(across, up, np.array([1.0, 2.0, 0.0]), side=90, least=1)
    assert view.size == (90, 90)
    assert set(view.shown.ravel()) == {-1, 1, 2}
    assert view.shown[-1, 0] == 1  # below, at the left
    assert view.shown[0, -1] == 2


@pytest.mark.parametrize("count", [1, 2, 1000, 200_000])
def test_any_number_of_points_covers_its_place(count):
    """Few are dots, many are no holes."""
    view = above(np.random.default_rng(0).random((count, 3)) * 50)
    share = np.mean(view.shown >= 0)
    assert max(view.size) == (1200 if count > 1 else 240)
    assert share > (0.6 if count > 1000 else 0)
    assert view.outside == 0


def test_a_point_far_away_costs_nothing():
    points = np.random.default_rng(0).random((2000, 3)) * 50
    points[7] = 1e7
    view = above(points)
    assert view.outside == 1
    assert np.mean(view.shown >= 0) > 0.08
    assert 7 not in view.shown


@pytest.mark.parametrize("kind", ["point", "line", "column", "sheet"])
def test_flat_clouds(kind):
    points = np.random.default_rng(0).random((50, 3))
    points[:, {"point": [0, 1, 2], "line": [1, 2], "column": [0, 1], "sheet": [2]}[kind]] = 3.0
    for view in (above(points), beside(points)):
        assert (view.shown >= 0).any()
        assert min(view.size) >= 240


def test_low_clouds_are_stretched_and_say_so():
    points = np.random.default_rng(0).random((500, 3)) * [10, 1000, 20]
    view = beside(points)  # from the east: the longer side is across
    assert view.size == (1200, 240)
    assert view.stretch == pytest.approx(240 / (1200 * 20 / 1000), rel=0.02)


def test_pictures_of_two_dimensions_have_no_side():
    tokens = TokenSet(torch.rand(30, 2))
    result = SegmentedCloud(
        tokens, np.zeros(30, np.int32), np.ones(30, np.float32), (Category(0, "a"),), 0.0
    )
    assert list(cloud_pictures(result)) == ["above"]


def test_regions_and_the_points_they_keep(tmp_path):
    model = load_model(write_point_model(tmp_path / "m.safetensors", features=()))
    tokens = cloud(300)
    model.trained = {"recipe": {"augmentation": {"points": {"region": {"points": 128}}}}}
    result = segment_points(model, tokens)
    assert result.classes.shape == result.scores.shape == (300,)
    assert ((result.scores >= 1 / 3) & (result.scores <= 1)).all()
    assert result.counts().sum() == 300
    first, second = focus_points(model, tokens)
    assert sorted(first.rows) == list(range(300))
    assert 50 < len(second.rows) < 100
    assert len(set(second.rows)) == len(second.rows)
    assert second.scores is None
    assert first.scores.shape == (300,)
    picture = focus_cloud(tokens, [first, second])
    red = (np.asarray(picture) == (255, 60, 50)).all(-1)
    assert red.sum() >= len(second.rows) / 2
    whole = TokenSet(tokens.positions, sizes=[100, 200])
    with pytest.raises(ValueError, match="tokens: expected one sample with points"):
        segment_points(model, whole)


def test_scores_are_the_probabilities_of_the_classes(tmp_path):
    model = load_model(write_point_model(tmp_path / "m.safetensors", features=())).eval()
    tokens = cloud(80)
    with torch.no_grad():
        expected = model(model.preprocess(tokens)).softmax(1).max(1)
    result = segment_points(model, tokens)
    assert np.array_equal(result.classes, expected.indices)
    assert np.allclose(result.scores, expected.values, atol=1e-6)


def test_models_that_want_other_points(tmp_path):
    model = load_model(write_point_model(tmp_path / "m.safetensors"))
    (tmp_path / "a.xyz").write_text("x y z intensity\n1 2 3 4\n2 3 4 8\n")
    assert read_cloud(tmp_path / "a.xyz", model).features.tolist() == [
        pytest.approx([0.5], rel=0.01), pytest.approx([1.0]),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="point_nano takes 1 for each point, got x, y"):
        read_cloud(tmp_path / "a.xyz", model, ["x", "y"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda world, rows: (world, rows), None),
        (lambda world, rows: (world, rows * 0), "intensity is 0 at all points"),
        (
            lambda world, rows: (world * [1e-5, 1e-5, 1], rows),
            "points are about .*e-0. apart, .* or in degrees",
        ),
        (lambda world, rows: (world * 1000, rows), "points are about .* apart, where the model"),
        (lambda world, rows: (world[:50] * 1000, rows[:50] * 0), None),  # too few to tell
        (lambda world, rows: (world * [0, 1, 1], rows), None),  # a wall
    ],
)
def test_what_a_cloud_lacks_for_a_model_is_told(tmp_path, recwarn, change, words):
    model = load_model(write_point_model(tmp_path / "m.safetensors"))
    rng = np.random.default_rng(0)
    world, rows = change(rng.random((400, 3)) * [30, 30, 5], rng.random(400))
    np.savez(tmp_path / "a.npz", xyz=world, intensity=rows)
    read_cloud(tmp_path / "a.npz", model)
    assert len(recwarn) == (words is not None)
    for warning in recwarn:
        assert re.search(rf"a.npz: {words}", str(warning.message))


def test_coordinates_are_scaled_to_the_unit_of_the_model(tmp_path, recwarn):
    model = load_model(write_point_model(tmp_path / "m.safetensors", features=()))
    world = np.random.default_rng(0).random((300, 3)) * 30 + CORNER
    np.savez(tmp_path / "meters.npz", xyz=world)
    np.savez(tmp_path / "feet.npz", xyz=world / 0.3048)
    meters = read_cloud(tmp_path / "meters.npz", model)
    feet = read_cloud(tmp_path / "feet.npz", model, scale=0.3048)
    torch.testing.assert_close(feet.world_positions(), meters.world_positions(), rtol=0, atol=1e-4)
    assert not recwarn
    with pytest.raises(ValueError, match="scale"):
        read_cloud(tmp_path / "feet.npz", model, scale=0.0)


def test_one_region_after_the_other_is_reported(tmp_path):
    model = load_model(write_point_model(tmp_path / "m.safetensors", features=()))
    model.trained = {"recipe": {"augmentation": {"points": {"region": {"points": 128}}}}}
    seen = []

    def progress(regions):
        for region in regions:
            seen.append(len(regions))
            yield region

    segment_points(model, cloud(300), progress=progress)
    assert seen == [seen[0]] * seen[0]
    assert seen[0] > 2


@pytest.mark.parametrize("east", [False, True])
def test_from_the_side_the_nearer_hides_what_is_behind(east):
    """From the south, or from the east if the cloud reaches further from there."""
    points = np.array([[0, 0, 0], [9, 0, 9], [4, 1, 4], [4, 2, 4.0]])
    if east:
        points = points[:, [1, 0, 2]]
    shown = set(beside(points).shown.ravel().tolist()) - {-1}
    assert shown == ({0, 1, 3} if east else {0, 1, 2})


def test_the_higher_the_brighter():
    tokens = TokenSet(torch.tensor([[0.0, 0, 0], [10, 0, 5], [0, 10, 10]]))
    kinds = (Category(0, "a", color=(200, 100, 0)), Category(1, "b", color=(0, 100, 200)))
    image = cloud_from_above(tokens, np.array([0, 1, -1]), kinds)
    colors = {tuple(c) for c in image.reshape(-1, 3).tolist()} - {(255, 255, 255)}
    assert colors == {(130, 65, 0), (0, 82, 165), (150, 150, 150)}


def test_captions_of_pictures_say_what_is_special(monkeypatch):
    """How many points, from where, how much they are stretched, and how many are not shown."""
    said = []

    def captioned(picture, text):
        said.append(text)
        return picture

    monkeypatch.setattr("pointformer.segmentation.cloud_drawing._captioned", captioned)
    positions = np.random.default_rng(0).random((2000, 3)) * [100, 100, 2]
    positions[7] = 1e6
    count = len(positions)
    result = SegmentedCloud(
        TokenSet(torch.from_numpy(positions).float()), np.zeros(count, np.int32),
        np.ones(count, np.float32), (Category(0, "a"),), 0.0,
    )  # fmt: skip
    cloud_pictures(result)
    assert said == [
        "2,000 points from above, the higher the brighter, without 1 far away",
        "2,000 points from the side, the higher the brighter, heights 10.0 times as long, "
        "without 1 far away",
    ]


def test_scores_are_drawn_at_the_points_that_have_them():
    """Each point in the color of the score of the nearest token; the rest of the panel is gray."""
    tokens = TokenSet(torch.tensor([[0.0, 0, 0], [10, 0, 0], [0, 10, 0], [10, 10, 0]]))
    stages = [
        KeptPoints(np.array([3, 0]), np.array([1.0, 0.0], np.float32)),
        KeptPoints(np.array([3]), None),
    ]
    picture = np.asarray(focus_cloud(tokens, stages))
    panel = picture[-408:-8, 8 + 408 : 8 + 808]
    assert panel[2, -3].tolist() == heat(np.array(1.0)).tolist()  # above, at the right
    assert panel[-3, 2].tolist() == heat(np.array(0.0)).tolist()
    assert panel[200, 200].tolist() == [150, 150, 150]


def test_pictures_are_as_wide_as_their_captions():
    points = torch.rand(2000, 3) * torch.tensor([1.0, 100.0, 1.0])
    kinds = np.zeros(2000, np.int32), np.ones(2000, np.float32)
    result = SegmentedCloud(TokenSet(points), *kinds, (Category(0, "a"),), 0.0)
    length = caption_font().getlength("2,000 points from above, the higher the brighter")
    assert cloud_pictures(result)["above"].width >= length


def test_what_is_no_cloud_has_no_focus(tmp_path):
    model = load_model(write_point_model(tmp_path / "m.safetensors", features=()))
    for sizes in ((60, 60), (0,)):
        tokens = TokenSet(torch.rand(sum(sizes), 3), sizes=sizes)
        with pytest.raises(ValueError, match="tokens: expected one sample with points, got"):
            focus_points(model, tokens)
    with pytest.raises(TypeError, match="tokens: expected a TokenSet, got"):
        focus_points(model, torch.rand(60, 3))
