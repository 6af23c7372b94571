"""What all formats have in common, and their class tables."""

import hashlib
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from helpers import scenes
from helpers.scenes import error_of
from pointformer import data
from pointformer.data import VOID


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
    assert data.COCO_PANOPTIC[:80] == data.COCO
    # What the weights that are released number so; any change gives what they find other names.
    for table, digest in (
        (data.ADE20K, "b9fdf29f4b3c254d"),
        (data.COCO_PANOPTIC, "689edbe813a92dfa"),
    ):
        text = "\n".join(f"{c.id} {c.name} {c.is_thing} {c.color}" for c in table)
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


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
        assert error_of(lambda: data.read_categories(path)).startswith(f"{path}: e")


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


def test_json_with_anything_in_it_is_read_or_refused_in_one_line(tmp_path):
    """Every value in turn becomes something else, in each of the formats."""
    segments_json, folder, images, _ = scenes.coco_panoptic(tmp_path)
    objects_json = scenes.coco_instances(tmp_path, images=1)
    plain = scenes.instance_folder(
        tmp_path / "plain", np.array([[0, 1, 2]]), [{"id": 1, "class": 1}]
    )
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
    message = f"{path}: the pictures 000000001000.jpg and 000000001000.jpg are images 1000 and 4"
    assert error_of(lambda: data.read_coco_instances(path, tmp_path / "val2017")).startswith(
        message
    )
    dataset = data.read_coco_instances(path, tmp_path / "val2017", skip_bad=True)
    assert dataset.skipped == {"000000001000": message}
    assert len(dataset) == 4


def test_class_maps_as_objects():
    semantic = np.array([[VOID, 3, 3], [0, 3, VOID]])
    objects = data.Annotation("a", None, (2, 3), "a", semantic=semantic).objects()
    assert objects.classes.tolist() == [0, 3]
    np.testing.assert_array_equal(objects.dense(), [semantic == 0, semantic == 3])
    nothing = data.Annotation("a", None, (2, 3), "a", semantic=np.full((2, 3), VOID)).objects()
    assert nothing.dense().shape == (0, 2, 3)


def test_data_sets_travel_to_worker_processes(tmp_path):
    path, folder, images, annotations = scenes.coco_panoptic(tmp_path)
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
    with pytest.raises(ValueError, match=r"expected height and width \(4, 3\), got \(3, 4\)"):
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


def test_classes_that_cannot_be_told_apart(tmp_path):
    root = scenes.instance_folder(tmp_path, np.array([[0, 1, 2]]))
    table = (data.Category(1, "cat"), data.Category(1, "dog"))
    assert "expected categories with different ids, got 1 twice" in error_of(
        lambda: data.read_folder(root, "val", "instance", categories=table)
    )


@pytest.mark.parametrize("kind", ["coco", "panoptic", "folder"])
def test_files_with_broken_bytes_are_read_or_refused_in_one_line(tmp_path, kind):
    """Bytes are deleted, doubled or replaced."""
    if kind == "coco":
        path = scenes.coco_instances(tmp_path, images=1)
        read = lambda: data.read_coco_instances(path, tmp_path / "val2017", skip_bad=True)  # noqa: E731
    elif kind == "panoptic":
        path, folder, images, _ = scenes.coco_panoptic(tmp_path)
        read = lambda: data.read_coco_panoptic(path, folder, images, skip_bad=True)  # noqa: E731
    else:
        segments = [{"id": 1, "class": 1}, {"id": 2, "class": 7}]
        root = scenes.instance_folder(tmp_path, np.array([[0, 1, 2]]), segments)
        path = root / "segments.json"
        read = lambda: data.read_folder(root, "val", "instance", skip_bad=True)  # noqa: E731
    whole, random = path.read_bytes(), scenes.rng(4)
    refused = []
    for trial in range(150):
        start = int(random.integers(len(whole)))
        end = start + int(random.integers(1, 30 if trial % 5 == 0 else 3))
        middle = (b"", whole[start:end] * 2, random.bytes(1), b'"', b"0", b"null")[trial % 6]
        path.write_bytes(whole[:start] + middle + whole[end:])
        try:
            list(read())
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 20
    for message in refused:
        assert "\n" not in message
        assert len(message) < 1000
        assert message.startswith(str(tmp_path))


def test_where_objects_overlap_the_smaller_one_is_on_top():
    """By the area of the whole object, which is what a crop keeps; crowds are void."""
    pixels = np.zeros((3, 6, 8), bool)
    pixels[0, :5, :6], pixels[1, 1:3, 1:3], pixels[2, 4:, 4:] = True, True, True
    rows = [
        data.Segment(n, n, int(p.sum()), n == 2, mask=data.Mask.of(p)) for n, p in enumerate(pixels)
    ]
    expected = np.select([pixels[2], pixels[1], pixels[0]], [VOID, 1, 0], VOID)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        segments = tuple(rows[n] for n in order)
        annotation = data.Annotation("a", None, (6, 8), "a", segments=segments)
        np.testing.assert_array_equal(annotation.classes(), expected)
        numbers, crowds = annotation.instances()
        np.testing.assert_array_equal(crowds, pixels[2])
        np.testing.assert_array_equal(numbers == 1 + order.index(1), pixels[1])
        np.testing.assert_array_equal(numbers == 1 + order.index(0), pixels[0] & ~pixels[1])
    cut = data.Segment(0, 0, 1, mask=data.Mask.of(pixels[0]), whole=30)
    annotation = data.Annotation("a", None, (6, 8), "a", segments=(rows[1], cut))
    assert annotation.classes()[1, 1] == 1
