"""Data sets in the field's formats: what is read, what is written, and what is wrong with files."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import scenes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO as PackageCOCO

from pointformer import data
from pointformer.data import VOID
from pointformer.data.coco import decode_mask, encode_mask, mask_tools
from pointformer.data.images import image_size, read_image


def error_of(action):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def ade20k(root, values, split="validation"):
    """One picture for each map of labels."""
    for n, labels in enumerate(values):
        scenes.picture(root / "images" / split / f"ADE_val_{n}.jpg", labels.shape)
        scenes.save(root / "annotations" / split / f"ADE_val_{n}.png", labels.astype(np.uint8))
    return root


# Class tables


def test_tables_have_the_published_numbers_of_classes():
    counts = {
        "ADE20K": (150, 100),
        "COCO": (80, 80),
        "COCO_PANOPTIC": (133, 80),
        "CITYSCAPES": (19, 8),
        "CITYSCAPES_THINGS": (8, 8),
    }
    for name, (classes, things) in counts.items():
        table = getattr(data, name)
        assert len(table) == classes
        assert sum(category.is_thing for category in table) == things
        assert len({category.id for category in table}) == classes
        assert len({category.color for category in table}) == classes
    assert [data.ADE20K[n].name for n in (0, 12, 149)] == ["wall", "person", "flag"]
    assert [c.id for c in data.ADE20K] == list(range(1, 151))
    assert (data.COCO[79].id, data.COCO_PANOPTIC[-1].id) == (90, 200)


def test_cityscapes_table_is_the_packages():
    from cityscapesscripts.helpers.labels import labels

    scored = [label for label in labels if not label.ignoreInEval]
    expected = [(label.id, label.name, label.hasInstances, label.color) for label in scored]
    assert [(c.id, c.name, c.is_thing, c.color) for c in data.CITYSCAPES] == expected
    assert [label.trainId for label in scored] == list(range(19))


def test_categories_from_json(tmp_path):
    path = scenes.dump(tmp_path / "categories.json", scenes.COCO_CATEGORIES[::-1])
    table = data.read_categories(path)
    assert [category.id for category in table] == [1, 3, 90, 187]
    assert [category.is_thing for category in table] == [True, True, True, False]
    scenes.dump(path, {"categories": [{"id": 4, "name": "a", "color": [1, 2, 3]}]})
    assert data.read_categories(path) == (data.Category(4, "a", True, (1, 2, 3)),)
    for bad in ({}, [{"id": 1}], [1], [{"id": 1, "name": "a"}] * 2):
        scenes.dump(path, bad)
        assert error_of(lambda: data.read_categories(path)).startswith(f"{path}: expected cat")


# ADE20K and plain labels


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
    assert message.endswith("(and 1 more such errors)")
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
    (root / "annotations/validation/ADE_val_1.png").unlink()
    (root / "annotations/validation/ADE_val_2.png").unlink()
    message = error_of(lambda: data.read_ade20k(root, skip_bad=True))
    assert message.endswith("found none, 4 skipped")


# Plain instances


def instance_folder(root, ids, segments=None, classes=None):
    scenes.picture(root / "val/images/a.png", ids.shape)
    scenes.save(root / "val/instances/a.png", ids.astype(np.uint16))
    if segments is not None:
        scenes.dump(
            root / "segments.json",
            {
                "classes": classes or {"1": "cat", "7": "dog"},
                "images": {"a": {"segments": segments}},
            },
        )
    return root


def test_plain_instances_are_of_one_class(tmp_path):
    ids = np.array([[0, 1, 1], [300, 0, 2]])
    dataset = data.read_folder(instance_folder(tmp_path, ids), "val", "instance")
    assert [category.name for category in dataset.categories] == ["object"]
    annotation = dataset[0]
    found = [(s.id, s.category, s.area, s.crowd) for s in annotation.segments]
    assert found == [(1, 0, 2, False), (2, 0, 1, False), (300, 0, 1, False)]
    objects = annotation.objects()
    np.testing.assert_array_equal(objects.masks, [ids == 1, ids == 2, ids == 300])
    np.testing.assert_array_equal(annotation.classes(), np.where(ids > 0, 0, VOID))


def test_plain_instances_with_classes_and_crowd(tmp_path):
    ids = np.array([[0, 1, 1], [255, 0, 2]])
    segments = [{"id": 2, "class": 7}, {"id": 1, "class": 1, "crowd": 1}]
    root = instance_folder(tmp_path, ids, segments)
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
        ([{"id": 1, "class": 1}] * 2, "a.png: segments.json lists an id twice"),
        (
            [{"id": 1, "class": 4}, {"id": 2, "class": 1}],
            "segments.json: segment 1 of a is of the unknown class 4",
        ),
    ],
)
def test_instance_ids_must_be_those_of_the_json(tmp_path, segments, message):
    dataset = data.read_folder(
        instance_folder(tmp_path, np.array([[0, 1, 2]]), segments), "val", "instance"
    )
    assert error_of(lambda: dataset[0]).endswith(message)


def test_folder_errors(tmp_path):
    root = instance_folder(tmp_path, np.array([[0, 1, 2]]), [{"id": 1}])
    assert "segments.json: expected {'classes'" in error_of(
        lambda: data.read_folder(root, "val", "instance")
    )
    (root / "segments.json").write_text("{")
    assert "segments.json: expected JSON, but" in error_of(
        lambda: data.read_folder(root, "val", "instance")
    )
    with pytest.raises(ValueError, match="task: expected semantic or instance, got 'boxes'"):
        data.read_folder(root, "val", "boxes")
    scenes.picture(root / "val/images/a.jpg", (1, 3))
    assert "a.png: there is another picture a.jpg" in error_of(
        lambda: data.read_folder(root, "val", categories=["x"])
    )


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
    np.testing.assert_array_equal(read.masks[0], masks[0] & ~masks[1] & ~masks[3])
    np.testing.assert_array_equal(read.masks[1:], masks[[1, 3]])
    np.testing.assert_array_equal(read.classes, [0, 1, 0])
    np.testing.assert_allclose(read.scores, [0.5, 0.9, 0.8])


# Cityscapes


def test_cityscapes_tasks_agree(tmp_path):
    root = scenes.cityscapes(tmp_path)
    tasks = ("semantic", "instance", "panoptic")
    semantic, instance, panoptic = (data.read_cityscapes(root, task=task) for task in tasks)
    assert len(semantic) == 3
    for n in range(3):
        raw = panoptic[n].ids
        labels = np.where(raw >= 1000, raw // 1000, raw)
        trained = {category.id: k for k, category in enumerate(data.CITYSCAPES)}
        expected = np.vectorize(lambda label, t=trained: t.get(label, VOID))(labels)
        np.testing.assert_array_equal(semantic[n].semantic, expected)
        groups = np.isin(raw, [24, 26])  # things, but not told apart
        np.testing.assert_array_equal(panoptic[n].classes(), np.where(groups, VOID, expected))
        objects = {s.id: s for s in instance[n].segments}
        assert sorted(objects) == [24, 26, 24000, 24001, 24002, 26000, 26001, 26002, 33000]
        assert [s.id for s in instance[n].segments if s.crowd] == [24, 26]
        assert {data.CITYSCAPES_THINGS[s.category].id for s in objects.values()} == {24, 26, 33}
        assert sum(s.area for s in panoptic[n].segments) == np.isin(labels, list(trained)).sum()


def test_cityscapes_panoptic_is_the_packages(tmp_path, capsys):
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    root = scenes.cityscapes(tmp_path / "data")
    convert2panoptic(str(root / "gtFine"), str(tmp_path), setNames=["val"])
    capsys.readouterr()
    made = data.read_coco_panoptic(
        tmp_path / "cityscapes_panoptic_val.json", tmp_path / "cityscapes_panoptic_val"
    )
    assert made.categories == data.CITYSCAPES
    for ours, theirs in zip(data.read_cityscapes(root, task="panoptic"), made, strict=True):
        assert ours.id == theirs.id
        assert ours.segments == theirs.segments
        listed = np.isin(ours.ids, [s.id for s in ours.segments])
        np.testing.assert_array_equal(np.where(listed, ours.ids, 0), theirs.ids)


def test_cityscapes_errors(tmp_path):
    root = scenes.cityscapes(tmp_path, frames=2)
    folder = root / "gtFine/val/town"
    for value in (34, 23001, 40000):
        scenes.save(
            folder / "town_000000_000019_gtFine_instanceIds.png",
            np.full(scenes.SIZE, value, np.uint16),
        )
        message = error_of(lambda: data.read_cityscapes(root, task="panoptic")[0])
        assert message.startswith(
            f"{folder / 'town_000000_000019_gtFine_instanceIds.png'}: {value} "
        )
    scenes.save(
        folder / "town_000000_000019_gtFine_labelIds.png", np.full(scenes.SIZE, 34, np.uint8)
    )
    assert "label 34 at row 0, column 0" in error_of(lambda: data.read_cityscapes(root)[0])
    (root / "leftImg8bit/val/town/town_000001_000019_leftImg8bit.png").unlink()
    message = error_of(lambda: data.read_cityscapes(root))
    assert message.startswith(f"{folder / 'town_000001_000019_gtFine_labelIds.png'}: annotates ")
    skipping = data.read_cityscapes(root, skip_bad=True)
    assert list(skipping) == []
    assert sorted(skipping.skipped) == ["town_000000_000019", "town_000001_000019"]
    assert "test: expected annotated pictures" in error_of(
        lambda: data.read_cityscapes(root, "test")
    )
    with pytest.raises(ValueError, match="task: expected semantic, instance or panoptic"):
        data.read_cityscapes(root, task="depth")


def test_cityscapes_objects_are_written_and_read(tmp_path):
    dataset = data.read_cityscapes(scenes.cityscapes(tmp_path), task="instance")
    table = dataset.categories
    for annotation in dataset:
        objects = annotation.objects()
        scores = scenes.rng().random(len(objects.scores), np.float32)
        written = data.Objects(objects.masks, objects.classes, scores)
        data.write_cityscapes_objects(tmp_path / "out", annotation.name, written, table)
        read = data.read_cityscapes_objects(tmp_path / "out", annotation, table)
        np.testing.assert_array_equal(read.masks, written.masks)
        np.testing.assert_array_equal(read.classes, written.classes)
        np.testing.assert_array_equal(read.scores, written.scores)
    lines = (tmp_path / "out" / f"{annotation.name}_pred.txt").read_text().splitlines()
    assert lines[0].split()[:2] == [f"{annotation.name}_pred_0.png", "24"]


def test_bad_cityscapes_predictions(tmp_path):
    dataset = data.read_cityscapes(scenes.cityscapes(tmp_path), task="instance")
    annotation, out, table = dataset[0], tmp_path / "out", dataset.categories

    def read():
        return data.read_cityscapes_objects(out, annotation, table)

    assert "expected one file town_000000_000019*.txt, found none" in error_of(read)
    data.write_cityscapes_objects(out, annotation.name, annotation.objects(), table)
    text = out / "town_000000_000019_pred.txt"
    scenes.save(out / "town_000000_000019_pred_0.png", np.zeros((2, 2), np.uint8))
    assert "pred_0.png: expected height and width (96, 128), got (2, 2)" in error_of(read)
    text.write_text("a.png car 0.5\n")
    assert "in line 1, got 'a.png car 0.5'" in error_of(read)
    text.write_text("a.png 7 0.5\n")
    assert len(read().masks) == 0  # a road is no object
    shutil.copy(text, out / "town_000000_000019_more.txt")
    assert "found town_000000_000019_more.txt and" in error_of(read)


# COCO objects


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools with NumPy 2
def test_coco_masks_are_the_packages(tmp_path, capsys):
    path = scenes.coco_instances(tmp_path)
    dataset, package = data.read_coco_instances(path, tmp_path / "val2017"), PackageCOCO(path)
    capsys.readouterr()
    assert [category.id for category in dataset.categories] == [1, 3, 90]
    assert len(dataset) == 5
    assert dataset[4].segments == ()
    assert dataset[4].objects().masks.shape == (0, 200, 240)
    for annotation in dataset:
        rows = package.imgToAnns[annotation.id]
        assert [s.id for s in annotation.segments] == [row["id"] for row in rows]
        for segment, row in zip(annotation.segments, rows, strict=True):
            np.testing.assert_array_equal(segment.mask, package.annToMask(row).astype(bool))
            assert (segment.area, segment.crowd) == (row["area"], row["iscrowd"] == 1)
            assert dataset.categories[segment.category].id == row["category_id"]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_run_lengths(height, width, seed):
    mask = scenes.rng(seed).random((height, width)) < 0.4
    for form in (encode_mask(mask), scenes.run_lengths(mask)):
        json.dumps(form)
        np.testing.assert_array_equal(decode_mask(form, mask.shape, ""), mask)
    package = mask_tools().encode(np.asfortranarray(mask, np.uint8))
    assert encode_mask(mask)["counts"].encode() == package["counts"]


def test_long_runs():
    mask = np.zeros((900, 1100), bool)
    for mask[:, 100:1000], mask[7:800, 200:203] in ((True, False), (False, True), (False, False)):
        package = mask_tools().encode(np.asfortranarray(mask, np.uint8))
        assert encode_mask(mask)["counts"].encode() == package["counts"]
        np.testing.assert_array_equal(decode_mask(package, mask.shape, ""), mask)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=130), max_size=12))
def test_any_string_is_a_mask_or_an_error(text):
    try:
        mask = decode_mask({"size": [5, 4], "counts": text}, (5, 4), "file")
    except ValueError as error:
        assert str(error) == "file: expected polygons or run lengths as a mask"  # noqa: PT017
    else:
        assert encode_mask(mask)["counts"] or not text


def test_coco_results_are_written_and_read(tmp_path, capsys):
    path = scenes.coco_instances(tmp_path)
    dataset = data.read_coco_instances(path, tmp_path / "val2017")
    pairs = [(annotation.id, annotation.objects()) for annotation in dataset]
    data.write_coco_results(tmp_path / "out/results.json", pairs, dataset.categories)
    results = data.CocoResults(tmp_path / "out/results.json", dataset.categories)
    for annotation in dataset:
        objects, read = annotation.objects(), results.objects(annotation)
        np.testing.assert_array_equal(read.masks, objects.masks)
        np.testing.assert_array_equal(read.classes, objects.classes)
        np.testing.assert_array_equal(read.scores, objects.scores)
    package = PackageCOCO(path).loadRes(str(tmp_path / "out/results.json"))
    capsys.readouterr()
    assert len(package.anns) == sum(len(objects.masks) for _, objects in pairs)


def test_coco_errors(tmp_path):
    path = scenes.coco_instances(tmp_path)
    content = json.loads(path.read_text())
    folder = tmp_path / "val2017"

    def changed(**fields):
        row = {**content["annotations"][0], **fields}
        rows = [row, *content["annotations"][1:]]
        scenes.dump(path, {**content, "annotations": rows})
        return data.read_coco_instances(path, folder, skip_bad=False)

    assert error_of(lambda: changed(image_id=77)) == (
        f"{path}: annotation 1 is of image 77, which is not listed"
    )
    assert error_of(lambda: changed(category_id=2)) == (
        f"{path}: annotation 1 is of the unknown category 2"
    )
    far, nan = [[1e30, 2, 3, 4, 5, 6]], [[math.nan, 2, 3, 4, 5, 6]]
    odd, short = [[1, 2, 3, 4, 5, 6, 7]], {"counts": [5, 7], "size": [200, 240]}
    for bad in ([], [[1, 2, 3]], {"counts": [5]}, "x", None, [["a"] * 6], far, nan, odd, short):
        dataset = changed(segmentation=bad)
        message = error_of(lambda dataset=dataset: dataset[0])
        assert message == f"{path}: annotation 1: expected polygons or run lengths as a mask"
    dataset = changed(segmentation=scenes.run_lengths(np.ones((3, 4), bool)))
    assert error_of(lambda: dataset[0]).endswith("expected a mask of (200, 240), got (3, 4)")
    error_of(lambda: changed(image_id=77))
    skipping = data.read_coco_instances(path, folder, skip_bad=True)
    assert (len(skipping), list(skipping.skipped)) == (5, ["annotation 1"])

    name = content["images"][1]["file_name"]
    scenes.picture(folder / name, (20, 24))
    message = error_of(lambda: changed()[1])
    assert message.startswith(f"{path}: expected the height and width of {folder / name}, (20, 24)")
    (folder / name).unlink()
    message = error_of(changed)
    assert message == f"{path}: annotates {folder / name}, but there is no such file"
    skipping = data.read_coco_instances(path, folder, skip_bad=True)
    assert (len(list(skipping)), list(skipping.skipped)) == (4, [name.removesuffix(".jpg")])
    del content["annotations"][0]["image_id"]
    scenes.dump(path, content)
    assert "entry 0 of the annotations has no valid 'image_id'" in error_of(
        lambda: data.read_coco_instances(path, folder)
    )
    scenes.dump(path, {"images": []})
    assert "expected a list 'categories'" in error_of(
        lambda: data.read_coco_instances(path, folder)
    )
    scenes.dump(path, [])
    assert "expected a JSON dict, got list" in error_of(
        lambda: data.read_coco_instances(path, folder)
    )
    assert "no such file" in error_of(lambda: data.read_coco_instances(tmp_path / "x", folder))


def test_bad_coco_results(tmp_path):
    path = scenes.coco_instances(tmp_path)
    dataset = data.read_coco_instances(path, tmp_path / "val2017")
    row = {"image_id": dataset[0].id, "category_id": 1, "score": 0.5}
    row["segmentation"] = encode_mask(np.ones((3, 4), bool))
    file = scenes.dump(tmp_path / "results.json", [row])
    results = data.CocoResults(file, dataset.categories)
    assert error_of(lambda: results.objects(dataset[0])) == (
        f"{file}: a result for image {dataset[0].id}: expected a mask of (200, 240), got (3, 4)"
    )
    scenes.dump(file, [{**row, "category_id": 4}])
    assert "4 is an unknown category" in error_of(
        lambda: data.CocoResults(file, dataset.categories)
    )
    scenes.dump(file, [row, {}])
    assert "entry 1 of the results has no valid 'image_id'" in error_of(
        lambda: data.CocoResults(file, dataset.categories)
    )


# COCO panoptic


@pytest.fixture
def panoptic(tmp_path):
    """A data set of three pictures, written by us: (JSON, PNG folder, pictures, annotations)."""
    table = data.read_categories(scenes.dump(tmp_path / "table.json", scenes.COCO_CATEGORIES))
    pairs = []
    for n in range(3):
        ids = scenes.rectangles([3, 70_000, 16_777_215, 256], seed=n)
        segments = tuple(
            data.Segment(value, category, int((ids == value).sum()), crowd)
            for value, category, crowd in (
                (3, 0, False),
                (70_000, 0, True),
                (16_777_215, 3, False),
                (256, 1, False),
            )
        )
        image = scenes.picture(tmp_path / "images" / f"{n}.jpg")
        annotation = data.Annotation(str(n), image, ids.shape, 10 + n, None, ids, segments)
        pairs.append((annotation, annotation))
    data.write_coco_panoptic(tmp_path / "p.json", tmp_path / "p", pairs, table)
    return tmp_path / "p.json", tmp_path / "p", tmp_path / "images", [a for a, _ in pairs]


def test_coco_panoptic_round_trip(panoptic):
    path, folder, images, annotations = panoptic
    colors = read_image(folder / "0.png")
    assert set(map(tuple, colors.reshape(-1, 3).tolist())) == {
        (0, 0, 0),
        (3, 0, 0),
        (112, 17, 1),
        (255, 255, 255),
        (0, 1, 0),
    }
    for dataset in (
        data.read_coco_panoptic(path, folder, images),
        data.read_coco_panoptic(path, folder, images, categories=data.read_categories(path)),
    ):
        for read, written in zip(dataset, annotations, strict=True):
            np.testing.assert_array_equal(read.ids, written.ids)
            assert read.segments == written.segments
            assert (read.id, read.name, read.image) == (written.id, written.name, written.image)
    info = json.loads(path.read_text())["annotations"][0]["segments_info"][0]
    rows, columns = np.nonzero(annotations[0].ids == 3)
    x, y, width, height = info["bbox"]
    assert (x, x + width, y, y + height) == (
        columns.min(),
        columns.max() + 1,
        rows.min(),
        rows.max() + 1,
    )
    predictions = data.read_coco_panoptic(path, folder, categories=data.read_categories(path))
    assert predictions[0].image is None
    assert [p.id for p in predictions] == [10, 11, 12]


def test_panoptic_errors(panoptic):
    path, folder, images, _ = panoptic
    content = json.loads(path.read_text())

    def read(change=lambda row: None, **options):
        fresh = json.loads(json.dumps(content))
        change(fresh["annotations"][0])
        scenes.dump(path, fresh)
        return data.read_coco_panoptic(path, folder, images, **options)

    dataset = read(lambda row: row["segments_info"].pop(0))
    assert error_of(lambda: dataset[0]) == f"{folder / '0.png'}: ids 3 are not in p.json"
    dataset = read(lambda row: row["segments_info"].append({"id": 9, "category_id": 1}))
    assert error_of(lambda: dataset[0]) == (
        f"{folder / '0.png'}: ids 9 of p.json are not in the picture"
    )
    dataset = read(lambda row: row["segments_info"][0].update(category_id=5))
    assert error_of(lambda: dataset[0]) == f"{path}: segment 3 of 0 is of the unknown class 5"
    dataset = read(lambda row: row.update(segments_info=[{"id": 3}]))
    assert "entry 0 of the segments of 0 has no valid 'category_id'" in error_of(lambda: dataset[0])
    assert error_of(lambda: read(lambda row: row.update(image_id=4))) == (
        f"{path}: 0 is of image 4, which is not listed"
    )
    assert error_of(lambda: read(lambda row: row.update(file_name="q.png"))) == (
        f"{folder / 'q.png'}: expected the annotation of {images / '0.jpg'}, there is no such file"
    )
    (images / "1.jpg").unlink()
    message = error_of(read)
    assert message == (
        f"{folder / '1.png'}: annotates {images / '1.jpg'}, but there is no such file"
    )
    skipping = read(lambda row: row["segments_info"].pop(0), skip_bad=True)
    assert [annotation.name for annotation in skipping] == ["2"]
    assert sorted(skipping.skipped) == ["0", "1"]


def test_panoptic_writer_rejects_ids_that_three_bytes_do_not_hold(tmp_path):
    ids = np.full((2, 2), 1 << 24)
    annotation = data.Annotation("a", None, (2, 2), 1, None, ids, (data.Segment(1 << 24, 0, 4),))
    table = data.named_categories(["x"])
    with pytest.raises(ValueError, match=r"a: expected ids of 1 to 16777215"):
        data.write_coco_panoptic(tmp_path / "a.json", tmp_path, [(annotation, annotation)], table)
    assert not list(tmp_path.iterdir())


# All formats


def places(content, path=()):
    yield path
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places(content[key], (*path, key))


def replaced(content, path, value):
    if not path:
        return value
    content = content.copy()
    content[path[0]] = replaced(content[path[0]], path[1:], value)
    return content


def test_json_with_anything_in_it_is_read_or_refused_in_one_line(tmp_path, panoptic):
    """Every value in turn becomes something else, in each of the formats."""
    segments_json, folder, images, _ = panoptic
    objects_json = scenes.coco_instances(tmp_path, images=1)
    plain = instance_folder(tmp_path / "plain", np.array([[0, 1, 2]]), [{"id": 1, "class": 1}])
    plain_json = plain / "segments.json"

    def few(path, count):
        content = json.loads(path.read_text())
        wanted = {row["image_id"] for row in content["annotations"][:count]}
        content["annotations"] = content["annotations"][:count]
        content["images"] = [row for row in content["images"] if row["id"] in wanted]
        return content

    readers = (
        (
            objects_json,
            few(objects_json, 2),
            lambda p: data.read_coco_instances(p, tmp_path / "val2017"),
        ),
        (
            segments_json,
            few(segments_json, 1),
            lambda p: data.read_coco_panoptic(p, folder, images),
        ),
        (
            plain_json,
            json.loads(plain_json.read_text()),
            lambda p: data.read_folder(plain, "val", "instance"),
        ),
    )
    for path, content, read in readers:
        refused = []
        for place in places(content):
            for value in (None, "x", -7, 0.5, [], {}, [[]]):
                scenes.dump(path, replaced(content, place, value))
                try:
                    list(read(path))
                except ValueError as error:
                    refused.append(str(error))
        assert len(refused) > 50
        assert not [message for message in refused if "\n" in message]
        assert not [message for message in refused if not message.startswith(str(tmp_path))]


def test_pictures_with_one_name(tmp_path):
    path = scenes.coco_instances(tmp_path)
    content = json.loads(path.read_text())
    content["images"].append({**content["images"][0], "id": 4})
    scenes.dump(path, content)
    message = error_of(lambda: data.read_coco_instances(path, tmp_path / "val2017", skip_bad=True))
    assert message == f"{path}: expected different names of pictures, got 000000001000 twice"


def test_class_maps_as_objects():
    semantic = np.array([[VOID, 3, 3], [0, 3, VOID]])
    objects = data.Annotation("a", None, (2, 3), "a", semantic=semantic).objects()
    assert objects.classes.tolist() == [0, 3]
    np.testing.assert_array_equal(objects.masks, [semantic == 0, semantic == 3])
    nothing = data.Annotation("a", None, (2, 3), "a", semantic=np.full((2, 3), VOID)).objects()
    assert nothing.masks.shape == (0, 2, 3)


def test_data_sets_travel_to_worker_processes(tmp_path, panoptic):
    path, folder, images, annotations = panoptic
    dataset = pickle.loads(pickle.dumps(data.read_coco_panoptic(path, folder, images)))
    np.testing.assert_array_equal(dataset[2].ids, annotations[2].ids)
    root = scenes.cityscapes(tmp_path / "cityscapes")
    for task in ("semantic", "instance"):
        dataset = pickle.loads(pickle.dumps(data.read_cityscapes(root, task=task)))
        assert dataset[0].size == scenes.SIZE
    assert dataset[-1].name == dataset.entries[2].name
    with pytest.raises(TypeError, match="no slices"):
        dataset[:2]


def test_objects_from_tensors_and_their_errors():
    import torch

    class Predicted:
        masks = torch.zeros(2, 3, 4, dtype=torch.bool)
        classes = torch.tensor([1, 0])
        scores = torch.tensor([0.5, 0.25])

    objects = data.Objects.of(Predicted, (3, 4))
    assert (objects.classes.dtype, objects.scores.tolist()) == (np.int64, [0.5, 0.25])
    with pytest.raises(ValueError, match=r"expected masks \(2, 4, 3\), .* got \(2, 3, 4\)"):
        data.Objects.of(Predicted, (4, 3))


def test_writing_fails_without_leaving_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    data.write_map(path, np.ones((2, 2), int))
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        data.write_map(path, np.zeros((2, 2), int))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
