"""Archives of points, and changes of point sets."""

import gc
import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch

from helpers.clouds import write_objects, write_scenes
from pointformer import TokenSet
from pointformer.annotations import VOID, Category
from pointformer.data import find_source, open_dataset, open_splits
from pointformer.data.point_sets import PointAnnotation, read_objects
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


def test_opening_scenes_keeps_no_points(tmp_path):
    def sets():
        gc.collect()
        return sum(type(found) is TokenSet for found in gc.get_objects())

    write_scenes(tmp_path)
    before = sets()
    dataset = open_dataset(tmp_path, task="point_segmentation", split="val")
    assert sets() == before
    assert [a.tokens.num_tokens for a in dataset] == [40] * 3


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
    with pytest.raises(ValueError, match=r"scene0.npz: has no 'color' .* only label, split, int"):
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


def write_codes(path, codes, name="classification", count=60):
    """A file whose points have these codes in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    classes = torch.tensor(codes, dtype=torch.uint8).repeat(count)[:count]
    world = torch.from_numpy(rng.uniform(0, 50, (count, 3)))
    write_points(path, TokenSet.from_world(world, fields={name: classes}))


@pytest.mark.parametrize("suffix", [".las", ".xyz"])
def test_classes_of_a_model_are_found_by_their_codes(tmp_path, suffix, recwarn):
    """In files that lack some, or have others; numbers without a name in the standard too."""
    write_codes(tmp_path / "a" / f"a{suffix}", (2, 6, 12, 200, 0))
    trained = open_dataset(tmp_path / "a", task="point_segmentation").categories
    assert [c.name for c in trained] == ["ground", "building", "12", "200"]
    write_codes(tmp_path / "b" / f"b{suffix}", (200, 6, 0, 12))
    other = open_dataset(tmp_path / "b", task="point_segmentation", categories=trained)
    assert other.categories == trained
    assert other[0].labels[:4].tolist() == [3, 1, VOID, 2]
    assert not recwarn
    # Of another model: by name, whatever the numbers of its training.
    named = [Category(4, "Buildings"), Category(7, "other"), Category(1, "ground")]
    with pytest.warns(UserWarning, match=r"a: 40% have labels .*: \['12', '200'\]"):
        found = open_dataset(tmp_path / "a", task="point_segmentation", categories=named)
    assert found[0].labels[:5].tolist() == [2, 0, VOID, VOID, VOID]
    assert [c.name for c in found.categories] == ["Buildings", "other", "ground"]


def test_classes_of_a_model_are_found_by_names_that_files_list(tmp_path):
    xyz = np.random.default_rng(0).random((30, 3))
    np.savez(tmp_path / "a.npz", xyz=xyz, label=np.arange(30) % 3, classes=["void", "Tree", "car"])
    model = [Category(0, "car"), Category(1, "boat"), Category(2, "tree")]
    found = open_dataset(tmp_path, task="point_segmentation", categories=model)
    assert found[0].labels[:3].tolist() == [VOID, 2, 0]
    assert [c.name for c in found.categories] == ["car", "boat", "tree"]


def write_named(path, labels, classes):
    xyz = np.random.default_rng(0).random((len(labels), 3))
    np.savez(path, xyz=xyz, label=labels, classes=classes)


def test_classes_are_found_by_name_where_files_number_them_in_their_own_ways(tmp_path, recwarn):
    write_named(tmp_path / "a.npz", [0, 1, 2], ["ground", "Building", "ignored"])
    write_named(tmp_path / "b.npz", [0, 1, 2, -1], ["building", "tree", "ground"])
    write_codes(tmp_path / "c.las", (2, 6, 9, 0), count=4)
    write_named(tmp_path / "d.npz", [0, 1], ["ground", "Building"])
    dataset = open_dataset(tmp_path, task="point_segmentation")
    names = [c.name for c in dataset.categories]
    assert names == ["ground", "Building", "tree", "water"]
    expected = [[0, 1, VOID], [1, 2, 0, VOID], [0, 1, 3, VOID], [0, 1]]
    assert [a.labels.tolist() for a in pickle.loads(pickle.dumps(dataset))] == expected
    model = [Category(0, "building"), Category(1, "Ground")]
    assert not [w for w in recwarn if "'-1'" not in str(w.message)]
    with pytest.warns(UserWarning, match=r"none of the classes, .*: \['-1', 'tree', 'water'\]"):
        found = open_dataset(tmp_path, task="point_segmentation", categories=model)
    assert [a.labels[:2].tolist() for a in found] == [[1, 0], [0, VOID], [1, 0], [1, 0]]


def test_a_label_that_its_file_does_not_list_is_no_class_of_others(tmp_path):
    write_named(tmp_path / "a.npz", [0, 1], ["ground", "tree"])
    write_named(tmp_path / "b.npz", [0, 1], ["ground"])
    with pytest.warns(UserWarning, match="25% have labels that are none of the classes"):
        dataset = open_dataset(tmp_path, task="point_segmentation")
    assert [a.labels.tolist() for a in dataset] == [[0, 1], [0, VOID]]


@pytest.mark.parametrize(
    ("more", "given", "message"),
    [
        ({"label": [0, 1]}, {}, r"c.npz: has classes without names beside a.npz and b.npz, which"),
        ({"label": [0, 1], "classes": ["x", "X"]}, {}, "c.npz: has two classes 'x'"),
        ({}, {"categories": ["earth", "house"]}, r"b.npz: numbers its classes in another way"),
        ({}, {"void": [0]}, r"b.npz: numbers its classes in another way .* \(data.categories, "),
    ],
)
def test_classes_that_cannot_be_found_by_name(tmp_path, more, given, message):
    write_named(tmp_path / "a.npz", [0, 1], ["ground", "building"])
    write_named(tmp_path / "b.npz", [0, 1], ["building", "ground"])
    if more:
        np.savez(tmp_path / "c.npz", xyz=np.eye(3)[:2], **more)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, task="point_segmentation", **given)


def test_labels_below_0_are_void(tmp_path):
    labels = np.array([-1, 0, 2, -1, 0, 255])
    np.savez(tmp_path / "a.npz", xyz=np.eye(6)[:, :3], labels=labels)
    dataset = open_dataset(tmp_path, task="point_segmentation", split="")
    assert [category.id for category in dataset.categories] == [0, 2, 255]
    assert dataset[0].classes().tolist() == [VOID, 0, 1, VOID, 0, 2]
    dataset = open_dataset(tmp_path, task="point_segmentation", split="", void=[255])
    assert [category.id for category in dataset.categories] == [-1, 0, 2]


def test_files_without_names_have_the_numbers_of_those_with_names(tmp_path):
    write_named(tmp_path / "a.npz", [0, 1], ["tree", "car"])
    write_codes(tmp_path / "b.ply", (1, 0), "label", 2)
    for names in (["tree", "car"], ["tree", "car", "ground"]):
        dataset = open_dataset(tmp_path, task="point_segmentation")
        assert [c.name for c in dataset.categories] == names
        assert [a.labels.tolist() for a in dataset][:2] == [[0, 1], [1, 0]]
        if "ground" not in names:
            write_codes(tmp_path / "c.las", (2,))


def test_objects_are_scored_by_the_classes_of_the_model(tmp_path):
    write_objects(tmp_path / "all.npz")
    every = read_objects(tmp_path / "all.npz", "train").categories
    few = np.zeros(4, np.int64)
    np.savez(tmp_path / "few.npz", xyz=np.zeros((4, 5, 3)), label=few)
    found = open_dataset(tmp_path / "few.npz", task="point_classification", categories=every)
    assert len(found.categories) == len(every)


def test_bad_clouds_are_named_or_left_out(tmp_path):
    write_codes(tmp_path / "a.laz", (2, 6))
    write_codes(tmp_path / "b.las", (2, 5))
    write_codes(tmp_path / "a.las", (2, 5))
    write_codes(tmp_path / "none.ply", (2,), "height")
    (tmp_path / "cut.laz").write_bytes((tmp_path / "a.laz").read_bytes()[:700])
    (tmp_path / "x.ply").write_bytes(b"ply\n")
    with pytest.raises(
        ValueError, match=r"(cut.laz|none.ply|x.ply): .* \(and 2 more such errors\)"
    ):
        open_dataset(tmp_path, task="point_segmentation")
    found = open_dataset(tmp_path, task="point_segmentation", skip_bad=True)
    assert [entry.name for entry in found.entries] == ["a.las", "a.laz", "b"]
    assert [c.name for c in found.categories] == ["ground", "high vegetation", "building"]
    assert sorted(found.skipped) == ["cut.laz", "none.ply", "x.ply"]


def test_a_folder_without_classes_is_named(tmp_path):
    write_codes(tmp_path / "a.ply", (1,), "height")
    with pytest.raises(ValueError, match="none of points with a column label, labels or classif"):
        open_dataset(tmp_path, task="point_segmentation")
    write_codes(tmp_path / "b" / "a.las", (0,))
    with pytest.raises(ValueError, match="expected points with classes, found only never class"):
        open_dataset(tmp_path / "b", task="point_segmentation")
    write_codes(tmp_path / "c" / "a.las", (2,))
    with pytest.raises(ValueError, match=r"a.las: is the only point set"):
        open_splits(tmp_path / "c", task="point_segmentation")


@pytest.mark.parametrize("name", ["Classification", "scalar_Label"])
def test_columns_of_classes_as_other_programs_call_them(tmp_path, name):
    write_codes(tmp_path / "a.ply", (2, 6), name)
    found = open_dataset(tmp_path, task="point_segmentation")
    words = ["ground", "building"] if name == "Classification" else ["2", "6"]
    assert [c.name for c in found.categories] == words
    assert found[0].labels[:2].tolist() == [0, 1]


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


def test_turns_and_mirror_images_are_those_that_are_asked_for():
    """Turns by at most so many degrees, either way; mirror images along x, or along y."""
    tokens, annotation = sample(40)
    far = int(tokens.positions[:, :2].square().sum(1).argmax())
    x, y, _ = tokens.positions[far].tolist()
    angles = []
    for seed in range(60):
        turned, _ = RandomRotation(10.0)(tokens, annotation, np.random.default_rng(seed))
        u, v, _ = turned.positions[far].tolist()
        angles.append(np.angle(complex(u, v) / complex(x, y), deg=True))
    assert -10.01 < min(angles) < -8
    assert 8 < max(angles) < 10.01
    for change, signs in (
        (RandomMirror(1.0, 0.0), [-1, 1, 1]),
        (RandomMirror(0.0, 1.0), [1, -1, 1]),
    ):
        changed, _ = change(tokens, annotation, np.random.default_rng(1))
        assert torch.equal(changed.positions, tokens.positions * torch.tensor(signs))


def test_lengths_are_scaled_alike_or_along_each_axis():
    tokens, annotation = sample(40)
    found = {}
    for each_axis in (False, True):
        change = RandomScale((0.5, 2.0), each_axis)
        changed = [
            change(tokens, annotation, np.random.default_rng(n))[0].positions for n in range(60)
        ]
        found[each_axis] = torch.stack([p.amax(0) / tokens.positions.amax(0) for p in changed])
        assert 0.499 < found[each_axis].min() < 0.6
        assert 1.9 < found[each_axis].max() < 2.001
    assert (found[False] - found[False][:, :1]).abs().max() < 1e-5
    assert ((found[True] - found[True][:, :1]).abs()[:, 1:] > 1e-4).all()


def test_relative_noise_is_a_share_of_the_distance_from_the_middle():
    tokens, annotation = sample(2000)
    centered = tokens.positions.double() - tokens.positions.double().mean(0)
    distance = float(centered.square().sum(1).mean().sqrt())
    changed, _ = RandomJitter(0.1, relative=True)(tokens, annotation, np.random.default_rng(1))
    noise = changed.positions - tokens.positions
    assert noise.std() == pytest.approx(0.1 * distance, rel=0.05)


def test_at_most_the_share_is_left_out_and_one_point_is_kept():
    tokens, annotation = sample()
    kept = np.zeros(300)
    shares = []
    for seed in range(100):
        few, labels = RandomDrop(0.5)(tokens, annotation, np.random.default_rng(seed))
        shares.append(few.num_tokens / 300)
        kept[labels.labels] += 1
    assert 0.5 <= min(shares) < 0.55
    assert 0.95 < max(shares) <= 1
    assert kept.min() > 45  # all points alike
    assert kept.max() < 100
    tokens, annotation = sample(1)
    for seed in range(9):
        few, _ = RandomDrop(1.0)(tokens, annotation, np.random.default_rng(seed))
        assert few.num_tokens == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_archives_that_are_cut_off_are_named_or_left_out(tmp_path, share):
    write_scenes(tmp_path, 2)
    path = tmp_path / "scene1.npz"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"scene1\.npz: "):
        open_dataset(tmp_path, task="point_segmentation")[1]
    dataset = open_dataset(tmp_path, task="point_segmentation", skip_bad=True)
    assert [annotation.name for annotation in dataset] == ["scene0"]
    with pytest.raises(ValueError, match=r"scene1\.npz"):
        open_dataset(path, task="point_classification")


def test_names_of_classes_may_be_bytes(tmp_path):
    write_scenes(tmp_path, 1)
    write_objects(tmp_path / "objects.npz")
    for path, task in (
        ("scene0.npz", "point_segmentation"),
        ("objects.npz", "point_classification"),
    ):
        with np.load(tmp_path / path) as file:
            arrays = dict(file)
        names = arrays["classes"].tolist()
        arrays["classes"] = np.array([name.encode() for name in names])
        np.savez(tmp_path / path, **arrays)
        dataset = open_dataset(tmp_path / path, task=task, split="train")
        assert [c.name for c in dataset.categories] == [name for name in names if name != "ignored"]


def test_defaults_of_changes():
    assert tuple(asdict(RandomMirror()).values()) == (0.5, 0.5)
