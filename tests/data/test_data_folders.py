"""Plain folders and ADE20K: what is read, what is written, and what is wrong with files."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers import scenes
from helpers.scenes import error_of
from pointformer import data
from pointformer.data import VOID
from pointformer.data.images import image_size, read_image


def ade20k(root, values, split="validation"):
    """One picture for each map of labels."""
    for n, labels in enumerate(values):
        scenes.picture(root / "images" / split / f"ADE_val_{n}.jpg", labels.shape)
        scenes.save(root / "annotations" / split / f"ADE_val_{n}.png", labels.astype(np.uint8))
    return root


def test_ade20k_labels_are_shifted_by_one(tmp_path):
    labels = np.array([[0, 1, 150], [2, 0, 3]])
    dataset = data.read_ade20k(ade20k(tmp_path, [labels, labels.T]))
    assert [entry.name for entry in dataset.entries] == ["ADE_val_0", "ADE_val_1"]
    assert dataset.categories == data.ADE20K
    annotation = dataset[0]
    assert annotation.semantic.dtype == np.int32
    np.testing.assert_array_equal(annotation.semantic, labels - 1)
    assert (annotation.size, dataset[1].size) == ((2, 3), (3, 2))
    assert read_image(annotation.image).shape == (2, 3, 3)


def test_labels_are_written_as_they_are_read(tmp_path):
    classes = scenes.rng().integers(VOID, 150, (20, 30))
    data.write_labels(tmp_path / "a" / "x.png", classes, data.ADE20K, void=0)
    np.testing.assert_array_equal(data.read_labels(tmp_path / "a" / "x.png"), classes + 1)
    classes = scenes.rng().integers(VOID, 19, (20, 30))
    data.write_labels(tmp_path / "y.png", classes, data.CITYSCAPES, void=255)
    ids = np.array([category.id for category in data.CITYSCAPES] + [255])
    np.testing.assert_array_equal(data.read_labels(tmp_path / "y.png"), ids[classes])
    with pytest.raises(ValueError, match=r"expected -1 to 18, got 2 to 19"):
        data.write_labels(tmp_path / "z.png", np.array([[2, 19]]), data.CITYSCAPES, void=0)
    with pytest.raises(ValueError, match=r"z\.png: a PNG holds 0 to 65535, got -1 to 3"):
        data.write_map(tmp_path / "z.png", np.array([[-1, 3]]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "y.png"]


@given(st.integers(1, 65535), st.integers(0, 2**32))
def test_maps_survive_whatever_their_depth(tmp_path_factory, largest, seed):
    path = tmp_path_factory.getbasetemp() / "map.png"
    values = scenes.rng(seed).integers(0, largest, (3, 4), endpoint=True)
    data.write_map(path, values)
    np.testing.assert_array_equal(data.read_labels(path), values)


def test_palette_pictures_are_read_as_indices(tmp_path):
    picture = Image.fromarray(np.array([[0, 5, 9]], np.uint8))
    picture.putpalette(scenes.rng().integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert picture.mode == "P"
    picture.save(tmp_path / "p.png")
    np.testing.assert_array_equal(data.read_labels(tmp_path / "p.png"), [[0, 5, 9]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_picture_as_read(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(path, exif=exif)
    assert image_size(path) == read_image(path).shape[:2]


def test_plain_labels(tmp_path):
    labels = np.array([[0, 1, 11], [1, 10, 255]])
    for split in ("train", "val"):
        scenes.picture(tmp_path / split / "images" / "a.jpg", (2, 3))
        scenes.save(tmp_path / split / "labels" / "a.png", labels.astype(np.uint8))
    names = [f"class {n}" for n in range(11)]
    dataset = data.read_folder(tmp_path, "val", categories=names, void=(11, 255))
    assert [category.name for category in dataset.categories] == names
    np.testing.assert_array_equal(dataset[0].semantic, [[0, 1, VOID], [1, 10, VOID]])
    assert "labels: which labels there are" in error_of(lambda: data.read_folder(tmp_path, "val"))
    bad = data.read_folder(tmp_path, "val", categories=names)
    message = error_of(lambda: bad[0])
    assert message.startswith(str(tmp_path / "val" / "labels" / "a.png"))
    assert "label 11 at row 0, column 2 is outside" in message


@pytest.mark.parametrize("void", [(), (2_000_000_000,), (1,)])
def test_labels_of_32_bits(tmp_path, void):
    """Without a table as long as the largest is large, 7 GiB."""
    labels = np.array([[0, 1, 2], [2, 2_000_000_000, 0]])
    scenes.picture(tmp_path / "images" / "a.jpg", (2, 3))
    data.write_map(tmp_path / "labels" / "a.tif", labels)
    dataset = data.open_dataset(tmp_path, void=void)
    ids = [category.id for category in dataset.categories]
    assert ids == [n for n in (0, 1, 2, 2_000_000_000) if n not in void]
    numbers = {label: number for number, label in enumerate(ids)} | dict.fromkeys(void, VOID)
    found = dataset[0].semantic
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.vectorize(numbers.get)(labels))
    data.write_map(tmp_path / "labels" / "a.tif", labels + (labels == 2))
    message = error_of(lambda: dataset[0])
    assert message.startswith(str(tmp_path / "labels" / "a.tif"))
    assert "label 3 at row 0, column 2 is outside the" in message


def test_label_errors_name_file_and_value(tmp_path):
    good = np.array([[0, 1, 150]])
    root = ade20k(tmp_path, [good, np.array([[3, 151, 9]]), good, good])
    dataset = data.read_ade20k(root)
    assert len(dataset) == 4
    message = error_of(lambda: dataset[1])
    assert message.startswith(str(root / "annotations" / "validation" / "ADE_val_1.png"))
    assert "label 151 at row 0, column 1 is outside the 151 known labels 0 to 150" in message
    assert error_of(lambda: list(dataset)) == message

    scenes.picture(root / "images/validation/ADE_val_2.jpg", (4, 4))
    message = error_of(lambda: data.read_ade20k(root)[2])
    assert "ADE_val_2.png: expected the height and width of" in message
    (root / "images/validation/ADE_val_3.jpg").unlink()
    message = error_of(lambda: data.read_ade20k(root))
    assert "ADE_val_3.png: annotates" in message
    assert "ADE_val_3.jpg, but there is no such file" in message
    (root / "annotations/validation/ADE_val_0.png").unlink()
    message = error_of(lambda: data.read_ade20k(root))
    assert "ADE_val_0.png: expected the annotation of" in message
    assert "(and 1 more such errors); skip_bad (--skip-bad) leaves out" in message
    assert "images/training: expected pictures" in error_of(
        lambda: data.read_ade20k(root, "training")
    )


def test_skip_bad_counts_and_lists(tmp_path):
    good = np.array([[0, 1, 150]])
    root = ade20k(tmp_path, [good, np.array([[3, 151, 9]]), good, good])
    (root / "images/validation/ADE_val_3.jpg").unlink()
    (root / "annotations/validation/ADE_val_2.png").write_bytes(b"no picture")
    dataset = data.read_ade20k(root, skip_bad=True)
    assert (len(dataset), list(dataset.skipped)) == (3, ["ADE_val_3"])
    for _ in range(2):  # a second pass does not count twice
        assert [annotation.name for annotation in dataset] == ["ADE_val_0"]
        assert sorted(dataset.skipped) == ["ADE_val_1", "ADE_val_2", "ADE_val_3"]
    assert "label 151" in dataset.skipped["ADE_val_1"]
    assert "ADE_val_2.png: expected a picture" in dataset.skipped["ADE_val_2"]
    assert "label 151" in error_of(lambda: dataset[1])
    (root / "images/validation/ADE_val_0.jpg").unlink()
    scenes.picture(root / "images/validation/ADE_val_1.png", (1, 3))  # of which is the map?
    (root / "annotations/validation/ADE_val_2.png").unlink()
    message = error_of(lambda: data.read_ade20k(root, skip_bad=True))
    assert "found none (4 skipped: " in message
    assert "ADE_val_3" not in message


def test_plain_instances_are_of_one_class(tmp_path):
    ids = np.array([[0, 1, 1], [300, 0, 2]])
    dataset = data.read_folder(scenes.instance_folder(tmp_path, ids), "val", "instance")
    assert [category.name for category in dataset.categories] == ["object"]
    annotation = dataset[0]
    found = [(s.id, s.category, s.area, s.crowd) for s in annotation.segments]
    assert found == [(1, 0, 2, False), (2, 0, 1, False), (300, 0, 1, False)]
    objects = annotation.objects()
    np.testing.assert_array_equal(objects.dense(), [ids == 1, ids == 2, ids == 300])
    np.testing.assert_array_equal(annotation.classes(), np.where(ids > 0, 0, VOID))


def test_objects_are_of_the_class_of_most_of_their_pixels(tmp_path):
    """Of several classes that are named, where there are maps of them too."""
    ids = np.array([[0, 7, 7, 7], [9, 9, 0, 7], [4, 4, 0, 0]])
    labels = np.array([[0, 2, 1, 2], [3, 1, 0, 1], [255, 255, 0, 0]])
    scenes.picture(tmp_path / "images" / "a.png", ids.shape)
    scenes.save(tmp_path / "instances" / "a.png", ids.astype(np.uint16))
    scenes.save(tmp_path / "labels" / "a.png", labels.astype(np.uint8))
    names = ["background", "person", "car", "bicycle"]
    dataset = data.read_folder(tmp_path, task="instance", categories=names)
    assert [(c.id, c.name) for c in dataset.categories] == [
        (1, "person"),
        (2, "car"),
        (3, "bicycle"),
    ]
    with pytest.raises(
        ValueError, match=r"labels.a\.png: segment 4 of a: is of the unknown class 255"
    ):
        dataset[0]
    dataset = data.read_folder(tmp_path, task="instance", categories=names, void=[4])
    # Of equally frequent ones the least: 7 and 9 have two of their classes each.
    assert [(s.id, s.category, s.crowd) for s in dataset[0].segments] == [
        (7, 0, False), (9, 0, False), (4, VOID, True),
    ]  # fmt: skip
    scenes.save(tmp_path / "labels" / "a.png", labels[:2].astype(np.uint8))
    with pytest.raises(ValueError, match=r"labels.a\.png: expected the height and width of"):
        dataset[0]
    (tmp_path / "labels" / "a.png").unlink()
    assert [s.category for s in data.read_folder(tmp_path, task="instance")[0].segments] == [0] * 3


@given(st.integers(0, 2**32))
def test_classes_of_objects_are_those_of_each_alone(tmp_path_factory, seed):
    random = scenes.rng(seed)
    ids, labels = random.integers(0, 9, (8, 9)), random.integers(1, 5, (8, 9))
    labels[labels == 4] = 2_000_000_000
    root = tmp_path_factory.getbasetemp() / "classes of objects"
    scenes.picture(root / "images" / "a.png", ids.shape)
    data.write_map(root / "instances" / "a.png", ids)
    data.write_map(root / "labels" / "a.tif", labels)
    dataset = data.read_folder(
        root,
        task="instance",
        categories=[data.Category(n, str(n)) for n in (1, 2, 3, 2_000_000_000)],
    )
    expected = []
    for n in np.unique(ids[ids > 0]):
        values, counts = np.unique(labels[ids == n], return_counts=True)
        expected.append((n, values[counts.argmax()]))
    names = [category.id for category in dataset.categories]
    assert [(s.id, names[s.category]) for s in dataset[0].segments] == expected


def test_plain_instances_with_classes_and_crowd(tmp_path):
    ids = np.array([[0, 1, 1], [255, 0, 2]])
    segments = [{"id": 2, "class": 7}, {"id": 1, "class": 1, "crowd": 1}]
    root = scenes.instance_folder(tmp_path, ids, segments)
    dataset = data.read_folder(root, "val", "instance", void=(255,))
    found = [(s.id, s.category, s.area, s.crowd) for s in dataset[0].segments]
    assert found == [(2, 1, 1, False), (1, 0, 2, True), (255, VOID, 1, True)]
    assert dataset[0].objects().classes.tolist() == [1]
    np.testing.assert_array_equal(dataset[0].classes() == 1, ids == 2)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([{"id": 1, "class": 1}], "a.png: ids 2 are not in segments.json"),
        (
            [{"id": n, "class": 1} for n in (1, 2, 3)],
            "a.png: ids 3 of segments.json are not in the picture",
        ),
        ([{"id": 1, "class": 1}] * 2, "a.png: ids 2 are not in segments.json"),
        (
            [{"id": 1, "class": 4}, {"id": 2, "class": 1}],
            "segments.json: segment 1 of a: is of the unknown class 4",
        ),
        (
            [{"id": 1, "class": 1, "score": True}, {"id": 2, "class": 1}],
            "segments.json: segment 1 of a: expected a finite number as 'score', got True",
        ),
        (
            [{"id": 1, "class": 1}, {"id": 2, "class": 1}, {"id": "2", "class": 7}],
            "segments.json: segment 2 of a: there are several with this id;",
        ),
        ({}, "segments.json: expected a list of the segments of a"),
    ],
)
def test_instance_ids_must_be_those_of_the_json(tmp_path, segments, message):
    dataset = data.read_folder(
        scenes.instance_folder(tmp_path, np.array([[0, 1, 2]]), segments), "val", "instance"
    )
    assert message in error_of(lambda: dataset[0])


def test_folder_errors(tmp_path):
    root = scenes.instance_folder(tmp_path, np.array([[0, 1, 2]]), [{"id": 1}])
    scenes.dump(root / "segments.json", {"classes": {}, "images": []})
    assert "segments.json: expected {'classes'" in error_of(
        lambda: data.read_folder(root, "val", "instance")
    )
    scenes.dump(root / "segments.json", {"classes": {"1": "a", "01": "b"}, "images": {}})
    assert "segments.json: expected categories with different ids, got 1 twice" in error_of(
        lambda: data.read_folder(root, "val", "instance")
    )
    (root / "segments.json").write_text("{")
    assert "segments.json: expected JSON, but" in error_of(
        lambda: data.read_folder(root, "val", "instance")
    )
    with pytest.raises(ValueError, match="task: expected semantic or instance, got 'boxes'"):
        data.read_folder(root, "val", "boxes")
    scenes.picture(root / "val/images/a.jpg", (1, 3))
    (root / "val/labels").mkdir()
    (root / "val/labels/a.png").write_bytes((root / "val/instances/a.png").read_bytes())
    both = f"{root / 'val/images/a.png'}: there is another picture {root / 'val/images/a.jpg'}"
    for task in ("semantic", "instance"):
        (root / "segments.json").unlink(missing_ok=True)
        assert error_of(
            lambda task=task: data.read_folder(root, "val", task, categories=["x"])
        ).startswith(both)


def test_written_folder_of_objects_is_read_again(tmp_path):
    masks = np.zeros((4, 5, 6), bool)
    masks[0, :3], masks[1, 2:], masks[2, 0, :2], masks[3, 0, :2] = True, True, True, True
    objects = data.Objects(masks, np.array([0, 1, 1, 0]), np.float32([0.5, 0.9, 0.2, 0.8]))
    table = data.named_categories(["cat", "dog"])
    scenes.picture(tmp_path / "images/a.jpg", (5, 6))
    data.write_folder_objects(tmp_path, [("a", objects)], table)
    dataset = data.read_folder(tmp_path, task="instance")
    assert [category.name for category in dataset.categories] == ["cat", "dog"]
    read = dataset[0].objects()
    # Object 2 lies below object 3; object 0 lost a row to the more certain object 1.
    np.testing.assert_array_equal(read.dense()[0], masks[0] & ~masks[1] & ~masks[3])
    np.testing.assert_array_equal(read.dense()[1:], masks[[1, 3]])
    np.testing.assert_array_equal(read.classes, [0, 1, 0])
    np.testing.assert_allclose(read.scores, [0.5, 0.9, 0.8])


def junk(folder):
    for name in ("._a.png", "Thumbs.db", ".DS_Store", "desktop.ini", "~$a.png", "a.png.part"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no picture")


def readers(root):
    """Every reader of folders with one picture "a", and files that are nobody's."""
    ids = np.array([[0, 1, 2]])
    for images, maps in (
        ("val/images", "val/labels"),
        ("images/validation", "annotations/validation"),
    ):
        scenes.picture(root / images / "a.png", ids.shape)
        scenes.save(root / maps / "a.png", ids.astype(np.uint8))
        junk(root / images)
        junk(root / maps)
    scenes.instance_folder(root, ids)
    junk(root / "val/instances")
    scenes.cityscapes(root / "streets", frames=1)
    ending = "_gtFine_labelIds.png"
    for folder in ("leftImg8bit/val/town", "gtFine/val/town"):
        junk(root / "streets" / folder)
        (root / "streets" / folder / f"._a{ending}").write_bytes(b"")
    return {
        "semantic": lambda **options: data.read_folder(
            root, "val", categories=list("abc"), **options
        ),
        "instance": lambda **options: data.read_folder(root, "val", "instance", **options),
        "ade20k": lambda **options: data.read_ade20k(root, **options),
        "cityscapes": lambda **options: data.read_cityscapes(root / "streets", **options),
    }


@pytest.mark.parametrize("kind", ["semantic", "instance", "ade20k", "cityscapes"])
def test_hidden_files_are_nobodys_pictures(tmp_path, kind):
    (only,) = readers(tmp_path)[kind]()
    assert only.name == ("town_000000_000019" if kind == "cityscapes" else "a")


@pytest.mark.parametrize("kind", ["semantic", "instance", "ade20k"])
def test_names_keep_their_folders(tmp_path, kind):
    read = readers(tmp_path)[kind]
    images, maps = {
        "semantic": ("val/images", "val/labels"),
        "ade20k": ("images/validation", "annotations/validation"),
    }.get(kind, ("val/images", "val/instances"))
    for site, value in (("site1", 1), ("site2", 2)):
        scenes.picture(tmp_path / images / site / "a.png", (4, 5))
        scenes.save(tmp_path / maps / site / "a.png", np.full((4, 5), value, np.uint8))
    found = list(read())
    assert [item.name for item in found] == ["a", "site1/a", "site2/a"]
    for item, value in zip(found[1:], (1, 2), strict=True):
        if kind == "instance":
            ids = item.ids
            assert (ids == value).all()
        else:
            assert (item.semantic == (value if kind == "semantic" else value - 1)).all()


@pytest.mark.parametrize("suffix", [".PNG", ".tif", ".TIF", ".tiff", ".bmp"])
@pytest.mark.parametrize("kind", ["semantic", "instance", "ade20k"])
def test_suffixes_of_maps(tmp_path, kind, suffix):
    read = readers(tmp_path)[kind]
    for folder in ("val/labels", "val/instances", "annotations/validation"):
        old = tmp_path / folder / "a.png"
        Image.open(old).convert("L").save(tmp_path / folder / f"a{suffix}")
        old.unlink()
    (only,) = read()
    assert only.name == "a"


@pytest.mark.parametrize("where", ["images", "labels"])
def test_two_files_of_one_name_are_ambiguous(tmp_path, where):
    read = readers(tmp_path)["semantic"]
    scenes.picture(tmp_path / "val/images/b.png", (1, 3))
    scenes.save(tmp_path / "val/labels/b.png", np.array([[0, 1, 2]], np.uint8))
    first = tmp_path / f"val/{where}/a.png"
    first.with_suffix(".tif").write_bytes(first.read_bytes())
    kind = "picture" if where == "images" else "annotation"
    problem = f"{first.with_suffix('.tif')}: there is another {kind} {first}, both are 'a'"
    assert error_of(read).startswith(problem)
    dataset = read(skip_bad=True)
    assert [annotation.name for annotation in dataset] == ["b"]
    assert dataset.skipped == {"a": problem}


def test_names_that_differ_in_case_are_two(tmp_path):
    read = readers(tmp_path)["semantic"]
    if (tmp_path / "val/images/A.png").exists():
        pytest.skip("this file system does not tell a.png from A.png")
    scenes.picture(tmp_path / "val/images/A.png", (1, 3))
    assert "labels/A.png: expected the annotation of" in error_of(read)
    scenes.save(tmp_path / "val/labels/A.png", np.array([[2, 1, 2]], np.uint8))
    assert [annotation.semantic[0, 0] for annotation in read()] == [2, 0]


def test_cityscapes_without_folders_of_cities(tmp_path):
    root = scenes.cityscapes(tmp_path, frames=2)
    for folder in ("leftImg8bit/val", "gtFine/val"):
        for path in (root / folder / "town").iterdir():
            path.rename(root / folder / path.name.replace("_000000_", "_000007_"))
    dataset = data.read_cityscapes(root, task="instance")
    assert [item.name for item in dataset] == ["town_000001_000019", "town_000007_000019"]
    (root / "leftImg8bit/val/other").mkdir()
    (root / "gtFine/val/other").mkdir()
    for folder, ending in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_instanceIds")):
        path = root / folder / f"val/town_000001_000019_{ending}.png"
        (root / folder / "val/other" / path.name).write_bytes(path.read_bytes())
    assert "there is another picture" in error_of(
        lambda: data.read_cityscapes(root, task="instance")
    )
    dataset = data.read_cityscapes(root, task="instance", skip_bad=True)
    assert list(dataset.skipped) == ["town_000001_000019"]


def test_segments_json_as_others_write_it(tmp_path):
    """Texts for numbers are taken; a bad row is left out alone, a bad list with its picture."""
    segments = [{"id": "1", "class": "7"}, {"id": 2.0, "class": 1.0, "crowd": None, "score": None}]
    root = scenes.instance_folder(tmp_path, np.array([[0, 1, 2]]), segments)
    found = data.read_folder(root, "val", "instance")[0].segments
    assert [(s.id, s.category, s.crowd, s.score) for s in found] == [
        (1, 1, False, 1.0),
        (2, 0, False, 1.0),
    ]
    scenes.instance_folder(root, np.array([[0, 1, 2]]), [{"id": 1, "class": 7}, {"id": 2}])
    dataset = data.read_folder(root, "val", "instance", skip_bad=True)
    assert [[s.id for s in annotation.segments] for annotation in dataset] == [[1]]
    assert list(dataset.skipped) == ["segment 2 of a"]
    content = {"classes": {"1": "cat"}, "images": {"a": {"segments": None}}}
    scenes.dump(root / "segments.json", content)
    dataset = data.read_folder(root, "val", "instance", skip_bad=True)
    assert (list(dataset), list(dataset.skipped)) == ([], ["a"])
    (root / "segments.json").write_text('{"classes": {}, "images": {"a": {}, "a": {}}}')
    assert "an object has the key 'a' twice" in error_of(
        lambda: data.read_folder(root, "val", "instance")
    )


def test_one_name_in_two_splits(tmp_path):
    """A JSON file for all splits does not tell whose segments it lists; each split's own does."""
    segments = [{"id": 1, "class": 1}, {"id": 2, "class": 7}]
    root = scenes.instance_folder(tmp_path, np.array([[0, 1, 2]]), segments)
    assert len(data.read_folder(root, "val", "instance")[0].segments) == 2
    scenes.picture(root / "train/images/b.png")
    assert len(data.read_folder(root, "val", "instance")[0].segments) == 2
    other = scenes.picture(root / "train/images/a.png")
    message = error_of(lambda: data.read_folder(root, "val", "instance"))
    assert f"a may be {root / 'val/images/a.png'} or {other}: expected a segments.json" in message
    (root / "segments.json").rename(root / "val/segments.json")
    assert len(data.read_folder(root, "val", "instance")[0].segments) == 2


def pictures_and(root, kind, *maps, pictures=("a.png", "b_1.png")):
    """Pictures beside files in the place of maps, which are maps where their names are of such."""
    for name in pictures:
        scenes.picture(root / "images" / name, (2, 3))
    for name in maps:
        path = root / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".tif"):
            scenes.save(path, np.array([[0, 1, 1], [0, 0, 2]], np.uint8))
        else:
            path.touch()
    return root


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (["a.txt", "b_1.txt"], "it holds .txt, but no PNG or TIFF; boxes and outlines as YOLO has"),
        (["a.jpg"], "it holds .jpg, but no PNG or TIFF; JPEG changes the numbers in maps"),
        (["a.xml", ".DS_Store"], r"it holds .xml, but no PNG or TIFF$"),
        ([".DS_Store"], "it is empty"),
        (["a_2.png"], "none has the name of a picture: maps are called as 'a_2', pictures as 'a';"),
        (["a_mask2.png", "b_1_mask2.png"], "none has the name of a picture"),
        (["a_mask.png", "b_1_label.png"], "one ending behind these for all maps, as 'a_mask'"),
        (["mask_a.png"], "none has the name of a picture"),
    ],
)
def test_what_is_there_in_the_place_of_maps(tmp_path, maps, message):
    pictures_and(tmp_path, "labels", *maps)
    with pytest.raises(ValueError, match=message) as error:
        data.open_dataset(tmp_path)
    folders = f"{tmp_path / 'labels'}: expected maps of the pictures in {tmp_path / 'images'}, "
    assert str(error.value).startswith(folders)
    other = error_of(lambda: data.open_dataset(tmp_path, task="instance"))
    assert other.startswith(
        f"{tmp_path / 'instances'}: there is no such folder, only {tmp_path / 'labels'}"
    )
    assert ("but no PNG or TIFF" in other) == (not maps[0].endswith((".png", ".DS_Store")))


@pytest.mark.parametrize("kind", ["labels", "instances"])
@pytest.mark.parametrize("ending", ["_mask.png", "-seg.tif", "_label_ids.png"])
def test_maps_may_have_an_ending_more_than_their_pictures(tmp_path, kind, ending):
    pictures_and(tmp_path, kind, f"a{ending}", f"b_1{ending}")
    dataset = data.open_dataset(tmp_path, task="semantic" if kind == "labels" else "instance")
    assert [entry.name for entry in dataset.entries] == ["a", "b_1"]
    assert dataset.entries[0].labels == tmp_path / kind / f"a{ending}"
    (tmp_path / kind / f"a{ending}").unlink()
    with pytest.raises(ValueError, match=r"a[-_][a-z_]+\.png: expected the annotation of"):
        data.read_folder(tmp_path, task="instance", folder=kind)


def test_an_ending_that_may_belong_to_a_picture_is_none(tmp_path):
    pictures_and(tmp_path, "labels", "a_b_mask.png", pictures=("a.png", "a_b.png"))
    with pytest.raises(ValueError, match="none has the name of a picture"):
        data.open_dataset(tmp_path)


def test_what_is_wrong_with_all_maps_is_said(tmp_path):
    pictures_and(tmp_path, "labels", "a.png", pictures=["a.png"])
    scenes.save(tmp_path / "labels/a.png", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a\.png: .*red, green, blue; for each color write"):
        data.open_dataset(tmp_path)


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_are_the_same_however_they_are_stored(tmp_path, stored):
    other = {"NFC": "NFD", "NFD": "NFC"}[stored]
    pictures, maps = (unicodedata.normalize(form, "Zoë/café") for form in (stored, other))
    pictures_and(tmp_path, "instances", f"{maps}.png", pictures=[f"{pictures}.png"])
    rows = [{"id": 1, "class": 1}, {"id": 2, "class": 1}]
    images = {pictures: {"segments": rows}}
    scenes.dump(tmp_path / "segments.json", {"classes": {"1": "x"}, "images": images})
    dataset = data.read_folder(tmp_path, task="instance")
    assert [entry.name for entry in dataset.entries] == ["Zoë/café"]
    assert len(dataset[0].segments) == 2
