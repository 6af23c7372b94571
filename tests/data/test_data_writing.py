"""Writers of predictions: where files land, and what they never replace."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from helpers import scenes
from helpers.scenes import error_of
from pointformer import data

TABLE = data.named_categories(["cell", "dirt"], first=3)
SIZE = (6, 8)


def objects(count=2, classes=None, scores=None):
    masks = np.zeros((count, *SIZE), bool)
    for n in range(count):
        masks[n, 2 * n : 2 * n + 2, 1:4] = True
    classes = np.arange(count) % 2 if classes is None else np.array(classes)
    return data.Objects(masks, classes, np.float32([0.5] * count if scores is None else scores))


class Panoptic:
    ids = np.repeat([[0, 1, 2, 2]], 4, 0)
    segments = (data.Segment(1, 0, 4), data.Segment(2, 1, 8))


def annotation(name, image=None):
    return data.Annotation(name, image, Panoptic.ids.shape, name)


def write_folder(folder, name, image):
    data.write_folder_objects(folder, [(name, objects())], TABLE)


def write_panoptic(folder, name, image):
    pairs = [(annotation(name, image), Panoptic)]
    data.write_coco_panoptic(folder / "p.json", folder / "instances", pairs, TABLE)


def write_cityscapes(folder, name, image):
    data.write_cityscapes_objects(folder / "instances", name, objects(), TABLE)


WRITERS = pytest.mark.parametrize("write", [write_folder, write_panoptic, write_cityscapes])


def files_of(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@WRITERS
@pytest.mark.parametrize("kind", ["absolute", "climbing", "windows", "linked"])
def test_names_never_lead_out_of_the_folder(tmp_path, write, kind):
    source = scenes.picture(tmp_path / "data/a.png", SIZE)
    out = tmp_path / "out"
    (out / "instances").mkdir(parents=True)
    (out / "instances/link").symlink_to(source.parent)
    name = {
        "absolute": str(source.with_suffix("")),
        "climbing": "../../data/a",
        "windows": "..\\..\\data\\a",
        "linked": "link/a",
    }[kind]
    before = files_of(tmp_path)
    message = error_of(lambda: write(out, name, source))
    assert ("through a link" if kind == "linked" else "inside of its folder") in message
    assert files_of(tmp_path) == before


@WRITERS
def test_pictures_and_annotations_of_others_are_not_replaced(tmp_path, write):
    suffix = "_pred_0" if write is write_cityscapes else ""
    theirs = scenes.picture(tmp_path / f"instances/a{suffix}.png", SIZE)
    before = files_of(tmp_path)
    message = error_of(lambda: write(tmp_path, "a", theirs))
    assert message.startswith(f"{theirs}: is there already and was not written by pointformer")
    assert files_of(tmp_path) == before


@WRITERS
def test_links_are_not_followed_or_replaced(tmp_path, write):
    suffix = "_pred_0" if write is write_cityscapes else ""
    theirs = scenes.picture(tmp_path / "theirs.png", SIZE)
    (tmp_path / "instances").mkdir()
    for target in (theirs, tmp_path / "nowhere"):
        link = tmp_path / f"instances/a{suffix}.png"
        link.symlink_to(target)
        assert "is there already" in error_of(lambda: write(tmp_path, "a", None))
        assert os.readlink(link) == str(target)
        link.unlink()


@WRITERS
def test_what_a_writer_wrote_is_replaced(tmp_path, write):
    for name in ("site1/a", "site2/a", "site1/a"):
        write(tmp_path, name, None)
    first = files_of(tmp_path)
    write(tmp_path, "site1/a", None)
    assert files_of(tmp_path).keys() == first.keys()
    assert {name.split("/")[1] for name in first if "/" in name} >= {"site1", "site2"}


@pytest.mark.parametrize(
    "write",
    [
        lambda path: data.write_coco_results(path, [(1, objects())], TABLE),
        lambda path: data.write_folder_objects(path.parent, [("a", objects())], TABLE),
        lambda path: write_panoptic(path.parent, "a", None),
    ],
)
@pytest.mark.parametrize("text", ['{"images": []}', "", "not JSON", "\xff", '{"info": {}}'])
def test_json_files_of_others_are_not_replaced(tmp_path, write, text):
    for name in ("segments.json", "p.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    before = {name: (tmp_path / name).read_bytes() for name in ("segments.json", "p.json")}
    path = tmp_path / "segments.json"
    assert "json: is there already and was not written by pointformer" in error_of(
        lambda: write(path)
    )
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_results_are_replaced_by_results(tmp_path):
    path = tmp_path / "results.json"
    for count in (2, 0, 1, 1):
        data.write_coco_results(path, [(1, objects(count))], TABLE)
        assert len(json.loads(path.read_text())) == count


def test_names_with_folders_are_read_again(tmp_path):
    """What is predicted for site1/a and for site2/a, in each format that has folders."""
    predicted = {"site1/a": objects(2), "site2/a": objects(1), "b": objects(3)}
    for name in predicted:
        scenes.picture(tmp_path / "images" / f"{name}.png", SIZE)
    data.write_folder_objects(tmp_path, predicted.items(), TABLE)
    dataset = data.read_folder(tmp_path, task="instance")
    assert {a.name: len(a.segments) for a in dataset} == {"b": 3, "site1/a": 2, "site2/a": 1}
    for item in dataset:
        np.testing.assert_array_equal(item.objects().dense(), predicted[item.name].dense())
        data.write_cityscapes_objects(tmp_path / "c", item.name, predicted[item.name], TABLE)
    for item in dataset:
        read = data.read_cityscapes_objects(tmp_path / "c", item, TABLE)
        np.testing.assert_array_equal(read.dense(), predicted[item.name].dense())

    for name in predicted:
        scenes.picture(tmp_path / "images" / f"{name}.png", (4, 4))
    pairs = [(annotation(n, tmp_path / "images" / f"{n}.png"), Panoptic) for n in predicted]
    data.write_coco_panoptic(tmp_path / "p.json", tmp_path / "p", pairs, TABLE)
    for images in (tmp_path / "images", None):
        dataset = data.read_coco_panoptic(tmp_path / "p.json", tmp_path / "p", images)
        assert [a.name for a in dataset] == list(predicted)
        np.testing.assert_array_equal(dataset[1].ids, Panoptic.ids)


@pytest.mark.parametrize("names", [("frame_1", "frame_10"), ("a[1]", "a1"), ("my scan", "my")])
def test_cityscapes_predictions_of_names_that_are_alike(tmp_path, names):
    for count, name in enumerate(names, 1):
        data.write_cityscapes_objects(tmp_path, name, objects(count), TABLE)
    for count, name in enumerate(names, 1):
        wanted = data.Annotation(name, None, SIZE, name)
        if name == "my":  # my scan_pred.txt may be of it too
            assert "expected one file my*.txt" in error_of(
                lambda wanted=wanted: data.read_cityscapes_objects(tmp_path, wanted, TABLE)
            )
        else:
            assert len(data.read_cityscapes_objects(tmp_path, wanted, TABLE).scores) == count


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x.png inf 0.5", "expected PICTURE LABEL CONFIDENCE in line 1"),
        ("x.png 3.5 0.5", "expected PICTURE LABEL CONFIDENCE in line 1"),
        ("x.png 3 nan", "expected PICTURE LABEL CONFIDENCE in line 1"),
        ("x.png 3", "expected PICTURE LABEL CONFIDENCE in line 1"),
        ("../../x.png 3 0.5", "line 1: '../x.png': expected the name of a file inside"),
        ("/etc/x.png 3 0.5", "line 1: '/etc/x.png': expected the name of a file inside"),
    ],
)
def test_cityscapes_lines(tmp_path, line, message):
    scenes.save(tmp_path / "masks/x.png", np.ones(SIZE, np.uint8))
    path = tmp_path / "lists/a_pred.txt"
    path.parent.mkdir()
    wanted = data.Annotation("a", None, SIZE, "a")
    path.write_text("\ufeff../masks/x.png 3 0.5\n\n", encoding="utf-8")
    assert data.read_cityscapes_objects(tmp_path, wanted, TABLE).dense().all()
    path.write_text(f"{line}\n")
    assert message in error_of(lambda: data.read_cityscapes_objects(tmp_path, wanted, TABLE))
    path.write_bytes(b"\xff\xfe\x00")
    assert "expected text in UTF-8" in error_of(
        lambda: data.read_cityscapes_objects(tmp_path, wanted, TABLE)
    )


@WRITERS
def test_a_picture_is_predicted_once(tmp_path, write):
    if write is write_folder:
        message = error_of(
            lambda: data.write_folder_objects(tmp_path, [("a", objects())] * 2, TABLE)
        )
    elif write is write_panoptic:
        pairs = [(annotation("a"), Panoptic)] * 2
        message = error_of(
            lambda: data.write_coco_panoptic(tmp_path / "p.json", tmp_path, pairs, TABLE)
        )
    else:
        pairs = [(7, objects()), ("7", objects())]
        message = error_of(lambda: data.write_coco_results(tmp_path / "r.json", pairs, TABLE))
    assert "expected each picture once" in message


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (objects(1, classes=[-1]), "expected classes 0 to 1, got -1"),
        (objects(1, classes=[2]), "expected classes 0 to 1, got 2"),
        (objects(1, scores=[np.nan]), "finite"),
    ],
)
def test_predictions_that_no_reader_takes(tmp_path, predicted, message):
    for write in (
        lambda: data.write_folder_objects(tmp_path, [("a", predicted)], TABLE),
        lambda: data.write_coco_results(tmp_path / "r.json", [(1, predicted)], TABLE),
        lambda: data.write_cityscapes_objects(tmp_path / "c", "a", predicted, TABLE),
    ):
        assert message in error_of(write)


def test_segments_that_are_ambiguous_or_not_to_be_seen(tmp_path):
    class Hidden(Panoptic):
        segments = (*Panoptic.segments, data.Segment(9, 0, 0))

    class Twice(Panoptic):
        segments = (*Panoptic.segments, data.Segment(2, 0, 8))

    pairs = [(annotation("a"), Hidden)]
    data.write_coco_panoptic(tmp_path / "p.json", tmp_path, pairs, TABLE)
    read = data.read_coco_panoptic(tmp_path / "p.json", tmp_path)[0]
    assert [segment.id for segment in read.segments] == [1, 2]
    pairs = [(annotation("b"), Twice)]
    assert "b: expected different ids of segments" in error_of(
        lambda: data.write_coco_panoptic(tmp_path / "q.json", tmp_path, pairs, TABLE)
    )


def test_maps_say_who_wrote_them(tmp_path):
    path = tmp_path / "a.png"
    scenes.save(path, np.ones((2, 2), np.uint8))
    before = path.read_bytes()
    for write in (
        lambda: data.write_map(path, np.zeros((2, 2), int)),
        lambda: data.write_labels(path, np.zeros((2, 2), int), TABLE, void=0),
    ):
        assert "is there already" in error_of(write)
        assert path.read_bytes() == before
    path.unlink()
    data.write_map(path, np.zeros((2, 2), int))
    data.write_labels(path, np.ones((2, 2), int), TABLE, void=0)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), 4)


def test_more_objects_than_a_png_can_number(tmp_path, monkeypatch):
    """Such a map is a TIFF file; a map with the other suffix from an earlier run goes."""
    scenes.picture(tmp_path / "images/a.png", SIZE)
    for limit, suffix in ((65535, ".png"), (1, ".tif"), (65535, ".png")):
        monkeypatch.setattr("pointformer.data.folders.MOST_PNG_IDS", limit)
        data.write_folder_objects(tmp_path, [("a", objects())], TABLE)
        assert [path.name for path in (tmp_path / "instances").iterdir()] == [f"a{suffix}"]
        found = data.read_folder(tmp_path, task="instance")[0].objects()
        np.testing.assert_array_equal(found.dense(), objects().dense())
    many = np.array([[0, 65536, (1 << 31) - 1]])
    for _ in range(2):
        data.write_map(tmp_path / "many.tif", many)
    np.testing.assert_array_equal(data.read_instances(tmp_path / "many.tif"), many)
    for path, value in (("a.tif", 1 << 31), ("b.png", 65536), ("c.tif", -1)):
        assert "holds 0 to" in error_of(
            lambda path=path, value=value: data.write_map(tmp_path / path, np.array([[value]]))
        )
    theirs = scenes.picture(tmp_path / "instances/a.tif", SIZE)
    before = theirs.read_bytes()
    monkeypatch.setattr("pointformer.data.folders.MOST_PNG_IDS", 1)
    assert "a.tif: is there already" in error_of(
        lambda: data.write_folder_objects(tmp_path, [("a", objects())], TABLE)
    )
    assert theirs.read_bytes() == before
