"""COCO: what is read, what is written, and what is wrong with files."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import scenes
from helpers.scenes import error_of
from pointformer import data
from pointformer.annotations import Mask
from pointformer.data.coco import decode_mask, encode_mask, mask_tools
from pointformer.data.images import read_image


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools with NumPy 2
def test_coco_masks_are_the_packages(tmp_path, capsys):
    from pycocotools.coco import COCO as PackageCOCO

    path = scenes.coco_instances(tmp_path)
    dataset, package = data.read_coco_instances(path, tmp_path / "val2017"), PackageCOCO(path)
    capsys.readouterr()
    assert [category.id for category in dataset.categories] == [1, 3, 90]
    assert len(dataset) == 5
    assert dataset[4].segments == ()
    assert dataset[4].objects().dense().shape == (0, 200, 240)
    for annotation in dataset:
        rows = package.imgToAnns[annotation.id]
        assert [s.id for s in annotation.segments] == [row["id"] for row in rows]
        for segment, row in zip(annotation.segments, rows, strict=True):
            np.testing.assert_array_equal(
                segment.mask.dense((200, 240)), package.annToMask(row).astype(bool)
            )
            assert (segment.area, segment.crowd) == (row["area"], row["iscrowd"] == 1)
            assert dataset.categories[segment.category].id == row["category_id"]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32))
def test_run_lengths(height, width, seed):
    mask = scenes.rng(seed).random((height, width)) < 0.4
    for form in (encode_mask(Mask.of(mask), mask.shape), scenes.run_lengths(mask)):
        json.dumps(form)
        np.testing.assert_array_equal(decode_mask(form, mask.shape, "").dense(mask.shape), mask)
    package = mask_tools().encode(np.asfortranarray(mask, np.uint8))
    assert encode_mask(Mask.of(mask), mask.shape)["counts"].encode() == package["counts"]


def test_long_runs():
    mask = np.zeros((900, 1100), bool)
    for mask[:, 100:1000], mask[7:800, 200:203] in ((True, False), (False, True), (False, False)):
        package = mask_tools().encode(np.asfortranarray(mask, np.uint8))
        assert encode_mask(Mask.of(mask), mask.shape)["counts"].encode() == package["counts"]
        np.testing.assert_array_equal(decode_mask(package, mask.shape, "").dense(mask.shape), mask)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=130), max_size=12))
def test_any_string_is_a_mask_or_an_error(text):
    try:
        mask = decode_mask({"size": [5, 4], "counts": text}, (5, 4), "file")
    except ValueError as error:
        assert str(error).startswith("file: expected ")  # noqa: PT017
    else:
        assert encode_mask(mask, (5, 4))["counts"] or not text


def test_a_small_object_takes_little_memory_in_a_large_picture():
    size, small = (20_000, 20_000), Mask(12_345, 19_900, scenes.rng().random((30, 20)) < 0.8)
    form = encode_mask(small, size)
    tracemalloc.start()
    found = decode_mask(form, size, "")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.box == small.box
    np.testing.assert_array_equal(found.pixels, small.pixels)
    assert peak < 10e6


def test_coco_results_are_written_and_read(tmp_path, capsys):
    from pycocotools.coco import COCO as PackageCOCO

    path = scenes.coco_instances(tmp_path)
    dataset = data.read_coco_instances(path, tmp_path / "val2017")
    pairs = [(annotation.id, annotation.objects()) for annotation in dataset]
    data.write_coco_results(tmp_path / "out/results.json", pairs, dataset.categories)
    results = data.CocoResults(tmp_path / "out/results.json", dataset.categories)
    for annotation in dataset:
        objects, read = annotation.objects(), results.objects(annotation)
        np.testing.assert_array_equal(read.dense(), objects.dense())
        np.testing.assert_array_equal(read.classes, objects.classes)
        np.testing.assert_array_equal(read.scores, objects.scores)
    package = PackageCOCO(path).loadRes(str(tmp_path / "out/results.json"))
    capsys.readouterr()
    assert len(package.anns) == sum(len(objects) for _, objects in pairs)


def test_coco_errors(tmp_path):
    path = scenes.coco_instances(tmp_path)
    content = json.loads(path.read_text())
    folder = tmp_path / "val2017"

    def changed(**fields):
        row = {**content["annotations"][0], **fields}
        rows = [row, *content["annotations"][1:]]
        scenes.dump(path, {**content, "annotations": rows})
        return data.read_coco_instances(path, folder, skip_bad=False)

    assert error_of(lambda: changed(image_id=77)).startswith(
        f"{path}: annotation 1: is of image 77, which is not listed; skip_bad (--skip-bad)"
    )
    assert error_of(lambda: changed(category_id=2)).startswith(
        f"{path}: annotation 1: is of the unknown category 2; skip_bad (--skip-bad)"
    )
    far, nan = [[1e30, 2, 3, 4, 5, 6]], [[math.nan, 2, 3, 4, 5, 6]]
    odd, short = [[1, 2, 3, 4, 5, 6, 7]], {"counts": [5, 7], "size": [200, 240]}
    for bad in ([], [[1, 2, 3]], {"counts": [5]}, "x", None, [["a"] * 6], far, nan, odd, short):
        dataset = changed(segmentation=bad)
        message = error_of(lambda dataset=dataset: dataset[0])
        assert message.startswith(f"{path}: annotation 1: ")
    dataset = changed(segmentation=scenes.run_lengths(np.ones((3, 4), bool)))
    assert "expected a mask of (200, 240), got (3, 4)" in error_of(lambda: dataset[0])
    error_of(lambda: changed(image_id=77))
    skipping = data.read_coco_instances(path, folder, skip_bad=True)
    assert (len(skipping), list(skipping.skipped)) == (5, ["annotation 1"])

    name = content["images"][1]["file_name"]
    scenes.picture(folder / name, (20, 24))
    message = error_of(lambda: changed()[1])
    assert message.startswith(f"{path}: expected the height and width of {folder / name}, (20, 24)")
    (folder / name).unlink()
    message = error_of(changed)
    assert message.startswith(f"{path}: annotates {folder / name}, but there is no such file;")
    skipping = data.read_coco_instances(path, folder, skip_bad=True)
    assert (len(list(skipping)), list(skipping.skipped)) == (4, [name.removesuffix(".jpg")])
    del content["annotations"][0]["image_id"]
    scenes.dump(path, content)
    assert (
        "annotation 1: expected a whole number or a text as 'image_id', there is none"
        in error_of(lambda: data.read_coco_instances(path, folder))
    )
    scenes.dump(path, {"images": []})
    assert "expected categories as a list of {id, name}" in error_of(
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
    row["segmentation"] = encode_mask(Mask.of(np.ones((3, 4))), (3, 4))
    file = scenes.dump(tmp_path / "results.json", [row])
    results = data.CocoResults(file, dataset.categories)
    assert error_of(lambda: results.objects(dataset[0])) == (
        f"{file}: entry 0 of the results: expected a mask of (200, 240), got (3, 4)"
    )
    scenes.dump(file, [{**row, "category_id": 4}])
    assert "entry 0 of the results: is of the unknown category 4" in error_of(
        lambda: data.CocoResults(file, dataset.categories)
    )
    scenes.dump(file, [row, {}])
    assert "entry 1 of the results: expected a whole number or a text as 'image_id'" in error_of(
        lambda: data.CocoResults(file, dataset.categories)
    )


def test_coco_panoptic_round_trip(tmp_path):
    path, folder, images, annotations = scenes.coco_panoptic(tmp_path)
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


def test_panoptic_errors(tmp_path):
    path, folder, images, _ = scenes.coco_panoptic(tmp_path)
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
    assert f"{path}: segment 3 of 0: is of the unknown class 5;" in error_of(lambda: dataset[0])
    dataset = read(lambda row: row["segments_info"][0].pop("category_id"))
    assert "segment 3 of 0: expected a whole number as 'category_id', there is none" in error_of(
        lambda: dataset[0]
    )
    assert f"{path}: annotation of image 4: this image is not listed" in error_of(
        lambda: read(lambda row: row.update(image_id=4))
    )
    assert error_of(lambda: read(lambda row: row.update(file_name="q.png"))).startswith(
        f"{folder / 'q.png'}: expected the annotation of {images / '0.jpg'}, there is no such file"
    )
    (images / "1.jpg").unlink()
    message = error_of(read)
    assert message.startswith(
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


def test_panoptic_rows_that_are_ambiguous(tmp_path):
    path, folder, images, annotations = scenes.coco_panoptic(tmp_path)
    content = json.loads(path.read_text())

    def skipped(change, pictures=images):
        fresh = json.loads(json.dumps(content))
        change(fresh)
        scenes.dump(path, fresh)
        assert error_of(lambda: list(data.read_coco_panoptic(path, folder, pictures)))
        dataset = data.read_coco_panoptic(path, folder, pictures, skip_bad=True)
        for found in dataset:
            truth = annotations[int(found.name)]
            np.testing.assert_array_equal(found.ids, truth.ids)
            assert {*found.segments} <= {*truth.segments}
        return len(dataset), list(dataset.skipped)

    rows = "annotations"
    assert skipped(lambda c: c[rows][0].update(image_id=11)) == (1, ["1", "0"])
    assert skipped(lambda c: c[rows].append(c[rows][0])) == (2, ["0"])
    assert skipped(lambda c: c[rows].append(c[rows][0]), None) == (2, ["0"])
    assert skipped(lambda c: c[rows][0].update(image_id=11), None) == (1, ["0", "1"])
    assert skipped(lambda c: c[rows][0].update(file_name="1.png")) == (1, ["0", "1"])
    assert skipped(lambda c: c[rows].pop(0)) == (2, ["0"])
    assert skipped(lambda c: c["images"][0].update(id=11)) == (
        1,
        ["0", "1", "annotation of image 10"],
    )
    assert skipped(lambda c: c["images"][0].update(file_name="1.jpg")) == (1, ["1"])
    for name in ("../p/0.png", "/0.png", None):
        assert skipped(lambda c, name=name: c[rows][0].update(file_name=name)) == (
            2,
            ["annotation of image 10", "0"],
        )
    assert skipped(lambda c: c[rows][0].update(image_id=None))[0] == 2

    for change in (
        lambda c: c[rows][0]["segments_info"].append(c[rows][0]["segments_info"][0]),
        lambda c: c[rows][0]["segments_info"][0].update(category_id=4),
        lambda c: c[rows][0]["segments_info"][0].update(iscrowd="no"),
    ):
        assert skipped(change) == (3, ["segment 3 of 0"])
    for change in (
        lambda c: c[rows][0]["segments_info"].append(None),
        lambda c: c[rows][0]["segments_info"].append({}),
    ):
        assert skipped(change) == (3, ["entry 4 of the segments of 0"])


def test_panoptic_numbers_written_otherwise(tmp_path):
    path, folder, images, annotations = scenes.coco_panoptic(tmp_path)
    content = json.loads(path.read_text())
    for picture, row in zip(content["images"], content["annotations"], strict=True):
        picture["id"], row["image_id"] = float(picture["id"]), str(row["image_id"])
        for segment in row["segments_info"]:
            segment["id"], segment["category_id"] = (
                str(segment["id"]),
                float(segment["category_id"]),
            )
            segment.update(area=None, bbox=None)
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    for found, truth in zip(
        data.read_coco_panoptic(path, folder, images), annotations, strict=True
    ):
        assert (found.id, found.segments) == (truth.id, truth.segments)


def test_panoptic_scores_and_areas_are_written(tmp_path):
    ids = np.array([[1, 1, 1], [7, 0, 7]])
    segments = (data.Segment(1, 0, 5, score=0.25), data.Segment(7, 1, 9, score=0.5))
    annotation = data.Annotation("a", None, (2, 3), 4, None, ids, segments)
    table = data.named_categories(["x", "y"], first=3)
    data.write_coco_panoptic(tmp_path / "a.json", tmp_path, [(annotation, annotation)], table)
    (read,) = data.read_coco_panoptic(tmp_path / "a.json", tmp_path)
    assert [(s.id, s.category, s.area, s.score) for s in read.segments] == [
        (1, 0, 3, 0.25),
        (7, 1, 2, 0.5),
    ]
    content = json.loads((tmp_path / "a.json").read_text())
    rows = content["annotations"][0]["segments_info"]
    assert [(row["area"], row["bbox"]) for row in rows] == [(3, [0, 0, 3, 1]), (2, [0, 1, 3, 1])]
    assert content["images"] == [{"id": 4, "file_name": "a.jpg", "height": 2, "width": 3}]
