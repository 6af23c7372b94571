"""Archives of points, and changes of point sets."""

import pickle

import numpy as np
import pytest
import torch

from helpers.clouds import write_objects, write_scenes
from pointformer import TokenSet
from pointformer.annotations import VOID
from pointformer.data import find_source, open_dataset, open_splits
from pointformer.data.point_sets import PointAnnotation
from pointformer.data.point_transforms import (
    RandomDrop,
    RandomJitter,
    RandomMirror,
    RandomRegion,
    RandomRotation,
    RandomScale,
)
from pointformer.data.points import write_points
from pointformer.data.statistics import examine
from pointformer.train.recipe import read_recipe


def test_objects(tmp_path):
    write_objects(tmp_path / "things.npz")
    for path in (tmp_path, tmp_path / "things.npz"):
        source = find_source(path)
        assert (source.format, source.splits) == ("objects", ("train", "test"))
    train, val = open_splits(tmp_path, task="point_classification", val_share=0.5)
    assert (len(train), len(val), train.channels) == (6, 6, 0)
    test = open_dataset(tmp_path, task="point_classification", split="test")
    assert [c.name for c in test.categories] == ["long", "flat"]
    assert [annotation.label for annotation in test] == [0, 1, 0, 1]
    tokens = test[1].tokens
    stored = np.load(tmp_path / "things.npz")["test_xyz"][1]
    np.testing.assert_array_equal(tokens.world_positions().numpy(), stored.astype(np.float64))
    assert examine(train, "sets").per_class == [3, 3]


def test_objects_of_one_split_by_found_classes(tmp_path):
    xyz = np.random.default_rng(0).normal(size=(6, 10, 3))
    np.savez(tmp_path / "a.npz", xyz=xyz, label=np.array([7, 3, 7, 3, 3, 7]))
    dataset = open_dataset(tmp_path, task="point_classification")
    assert [c.name for c in dataset.categories] == ["3", "7"]
    assert [annotation.label for annotation in dataset] == [1, 0, 1, 0, 0, 1]


def test_scenes(tmp_path):
    write_scenes(tmp_path)
    assert find_source(tmp_path).splits == ("train", "val")
    dataset = open_dataset(tmp_path, task="point_segmentation", split="val", features=["intensity"])
    annotation = dataset[0]
    assert [c.name for c in dataset.categories] == ["ground", "box"]
    assert (annotation.tokens.num_tokens, dataset.channels) == (40, 1)
    assert set(annotation.labels.tolist()) <= {VOID, 0, 1}
    features = annotation.tokens.features
    assert ((features >= 0) & (features <= 1)).all()
    world = annotation.tokens.world_positions()
    assert (world[:, 0] > 799_999).all()
    assert annotation.tokens.positions.abs().max() < 30  # digits are kept
    train = open_dataset(tmp_path, task="point_segmentation", split="train")
    facts = examine(train, "points")
    assert sum(facts.per_class) + sum(f.void for f in facts.facts) == 480
    assert facts.facts[0].void == 5
    assert "3 point sets of 160 points" in facts.lines()[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"xyz": np.zeros((4, 4)), "label": np.ones(4)}, r"xyz: expected shape \(n, 2\)"),
        ({"xyz": np.zeros((4, 3)), "label": np.ones(3)}, "no field 'label' with a row .* 4 points"),
        ({"xyz": np.full((4, 3), np.nan), "label": np.ones(4)}, "NaN"),
        ({"xyz": np.zeros((4, 3), "U3"), "label": np.ones(4)}, "xyz: expected numbers"),
        ({"xyz": np.zeros((4, 3)), "label": np.full(4, 0.5)}, "'label': expected an integer"),
        ({"xyz": np.zeros((4, 3)), "label": np.full(4, np.nan)}, "'label': expected an integer"),
    ],
)
def test_bad_scenes_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=f"bad.*{message}"):
        open_dataset(tmp_path, task="point_segmentation")[0]


def test_missing_features_are_named(tmp_path):
    write_scenes(tmp_path, 1)
    dataset = open_dataset(tmp_path, task="point_segmentation", split="train", features=["color"])
    with pytest.raises(ValueError, match=r"scene0.npz: has no 'color', .* only label, split, int"):
        dataset[0]


@pytest.mark.parametrize("suffix", [".las", ".laz", ".ply", ".xyz", ".npz"])
def test_scenes_in_files_of_any_format(tmp_path, suffix):
    """Names of classes by the standard, for all splits; what was never classified is void."""
    rng = np.random.default_rng(0)
    names = {"train": (2, 6, 0), "val": (2, 5)}
    for split, codes in names.items():
        (tmp_path / split).mkdir()
        world = torch.from_numpy(rng.uniform(0, 50, (60, 3)) + np.array([5e5, 6e6, 100]))
        classes = torch.tensor(codes, dtype=torch.uint8).repeat(60)[:60]
        fields = {"classification": classes, "intensity": torch.arange(60, dtype=torch.int32)}
        points = TokenSet.from_world(world, fields=fields)
        write_points(tmp_path / split / f"tile{suffix}", points)
    assert find_source(tmp_path).splits == ("train", "val")
    train, val = open_splits(tmp_path, task="point_segmentation", features=["intensity"])
    for dataset, codes in ((train, names["train"]), (val, names["val"])):
        assert [c.name for c in dataset.categories] == ["ground", "high vegetation", "building"]
        assert [c.id for c in dataset.categories] == [2, 5, 6]
        annotation = pickle.loads(pickle.dumps(dataset))[0]
        want = [{2: 0, 5: 1, 6: 2}.get(codes[i % len(codes)], VOID) for i in range(60)]
        assert annotation.labels.tolist() == want
        assert (annotation.tokens.world_positions() > 99).all()
        assert annotation.tokens.features[:, 0].diff().gt(0)[:50].all()


def test_a_cloud_without_classes_is_named(tmp_path):
    for name, codes in (("a", 2), ("b", 0)):
        fields = {"classification": torch.full((9,), codes, dtype=torch.uint8)}
        points = TokenSet.from_world(torch.rand(9, 3, dtype=torch.float64), fields=fields)
        write_points(tmp_path / f"{name}.las", points)
    dataset = open_dataset(tmp_path, task="point_segmentation")
    assert dataset[0].labels.tolist() == [0] * 9
    with pytest.raises(ValueError, match=r"b.las: expected labels of the 1 classes, found none"):
        dataset[1]


def sample(points=300, seed=0):
    rng = np.random.default_rng(seed)
    tokens = TokenSet.from_world(
        torch.from_numpy(rng.uniform(0, 10, (points, 3)) + 1e6),
        torch.arange(points, dtype=torch.float32)[:, None],
    )
    return tokens, PointAnnotation("a", tokens, labels=np.arange(points, dtype=np.int32))


CHANGES = [
    RandomRegion(50),
    RandomDrop(0.5),
    RandomRotation(180.0),
    RandomMirror(0.5, 0.5),
    RandomScale((0.5, 2.0)),
    RandomScale((0.5, 2.0), each_axis=True),
    RandomJitter(0.1),
    RandomJitter(0.1, relative=True),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_repeat_and_take_the_classes_along(change):
    tokens, annotation = sample()
    before = tokens.positions.clone()
    changed, labels = change(tokens, annotation, np.random.default_rng(3))
    again, _ = change(tokens, annotation, np.random.default_rng(3))
    other, _ = change(tokens, annotation, np.random.default_rng(4))
    assert torch.equal(changed.positions, again.positions)
    assert changed.positions.shape != other.positions.shape or not torch.equal(
        changed.positions, other.positions
    )
    assert torch.equal(tokens.positions, before)
    assert labels.labels.tolist() == changed.features[:, 0].int().tolist()


def test_a_region_is_what_is_nearest_on_the_ground():
    tokens, annotation = sample()
    region, labels = RandomRegion(50)(tokens, annotation, np.random.default_rng(0))
    assert region.num_tokens == 50
    kept = set(labels.labels.tolist())
    ground = tokens.positions[:, :2]
    found = []
    for row in kept:
        nearest = (ground - ground[row]).square().sum(1).argsort()[:50]
        found.append(set(nearest.tolist()) == kept)
    assert any(found)
    torch.testing.assert_close(region.positions.amin(0), torch.zeros(3), rtol=0, atol=1e-6)
    world = tokens.world_positions()[sorted(kept)]
    torch.testing.assert_close(region.world_positions(), world, rtol=0, atol=1e-6)
    whole, _ = RandomRegion(1000)(tokens, annotation, np.random.default_rng(0))
    assert whole.num_tokens == 300


def test_turns_and_mirror_images_keep_distances():
    tokens, annotation = sample(40)
    for change in (RandomRotation(), RandomMirror(1.0, 1.0)):
        changed, _ = change(tokens, annotation, np.random.default_rng(1))
        torch.testing.assert_close(
            torch.cdist(changed.positions.double(), changed.positions.double()),
            torch.cdist(tokens.positions.double(), tokens.positions.double()),
            rtol=1e-4,
            atol=1e-3,
        )
        assert torch.equal(changed.positions[:, 2], tokens.positions[:, 2])


def test_noise_is_as_large_as_it_says():
    tokens, annotation = sample(2000)
    changed, _ = RandomJitter(0.1)(tokens, annotation, np.random.default_rng(1))
    noise = changed.positions - tokens.positions
    assert noise.std() == pytest.approx(0.1, rel=0.1)
    assert noise.abs().max() <= 0.3001


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomRegion(0), "points: expected a positive integer"),
        (lambda: RandomDrop(1.5), "share: expected a number"),
        (lambda: RandomScale((2.0, 1.0)), "scales: expected two positive numbers"),
        (lambda: RandomJitter(-1.0), "deviation: expected a number"),
    ],
)
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_recipes_say_how_points_change():
    recipe = read_recipe("lidar.yaml")
    names = [type(change).__name__ for change in recipe.augmentation.transform(True).transforms]
    assert names[0] == "RandomRegion"
    assert "RandomJitter" in names
    assert not recipe.augmentation.transform().transforms
