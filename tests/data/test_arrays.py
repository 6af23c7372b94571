"""Pictures in .npz files: which arrays are what, their shapes and types, and what is wrong."""

import io
import os
import pickle
import re
import warnings
import zipfile

import numpy as np
import pytest

from helpers.scenes import encoded, pixels
from pointformer.data import find_source, open_dataset, open_splits

COLORS = np.stack([pixels(n) for n in range(5)])
LABELS = np.array([2, 0, 1, 1, 0])


def opened(tmp_path, task="classification", *, compressed=False, options=None, **arrays):
    path = tmp_path / "own.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return open_dataset(path, task=task, **(options or {}))


def pictures(dataset):
    return np.stack([annotation.read_image() for annotation in dataset])


NAMES = [
    {"images": COLORS, "labels": LABELS},
    {"x": COLORS, "y": LABELS},
    {"data": COLORS, "targets": LABELS[:, None].astype(np.uint8)},
    {"X": COLORS, "Y": np.eye(3)[LABELS]},
    {"img": COLORS, "label": LABELS.astype(np.float32), "ids": np.arange(9), "arr_0": COLORS},
    {"val_images": COLORS, "val_labels": LABELS, "train_images": COLORS[:1], "train_labels": [1]},
    {"xVal": COLORS, "yVal": LABELS, "xTest": COLORS[:2], "yTest": LABELS[:2]},
    {"val/image": COLORS, "val/label": LABELS},
]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("arrays", NAMES, ids=lambda arrays: next(iter(arrays)))
def test_names_of_arrays(tmp_path, arrays, compressed):
    dataset = opened(tmp_path, compressed=compressed, **arrays)
    assert [annotation.label for annotation in dataset] == LABELS.tolist()
    assert [category.name for category in dataset.categories] == ["0", "1", "2"]
    assert [entry.name for entry in dataset.entries] == ["0", "1", "2", "3", "4"]
    np.testing.assert_array_equal(pictures(dataset), COLORS)
    again = pickle.dumps(dataset)
    assert len(again) < 5 * 1000  # each process opens the file itself
    np.testing.assert_array_equal(pictures(pickle.loads(again)), COLORS)


GRAY = COLORS[..., :1]


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (np.moveaxis(COLORS, -1, 1), COLORS),
        (np.moveaxis(GRAY, -1, 1), GRAY),
        (GRAY, GRAY),
        (GRAY[..., 0], GRAY),
        (np.asfortranarray(COLORS), COLORS),
        (np.concatenate([COLORS, GRAY], axis=-1), COLORS),  # alpha
        (GRAY[..., 0] > 128, np.where(GRAY > 128, 255, 0)),
    ],
)
def test_shapes_of_pictures(tmp_path, stored, shown):
    dataset = opened(tmp_path, images=stored, labels=LABELS)
    np.testing.assert_array_equal(pictures(dataset), np.broadcast_to(shown, COLORS.shape))


def test_real_numbers_are_read_as_asked_for(tmp_path):
    dataset = opened(tmp_path, images=COLORS.astype(np.float32) / 255, labels=LABELS)
    for annotation, image in zip(dataset, COLORS, strict=True):
        np.testing.assert_array_equal(annotation.read_image(intensities="full"), image)


FILES = [encoded(image) for image in COLORS]


@pytest.mark.parametrize("header", [0, 20])
def test_files_of_pictures_one_after_the_other(tmp_path, header):
    arrays = {
        "val_scan": np.frombuffer(b"".join(file[header:] for file in FILES), np.uint8),
        "val_offset": np.cumsum([0, *(len(file) - header for file in FILES)]).astype(np.uint32),
        "val_label": LABELS.astype(np.uint8),
        "classes": np.array(["cat", "dog", "bird"]),
    }
    if header:
        arrays["png_header"] = np.frombuffer(FILES[0][:header], np.uint8)
    dataset = opened(tmp_path, **arrays)
    assert [category.name for category in dataset.categories] == ["cat", "dog", "bird"]
    assert [annotation.label for annotation in dataset] == LABELS.tolist()
    np.testing.assert_array_equal(pictures(dataset), COLORS)


@pytest.mark.parametrize("name", ["image_names", "file_names", "filenames", "imagePaths", "img_id"])
def test_names_of_pictures_are_no_classes(tmp_path, name):
    paths = np.array(["a/p.png", "a\\q.png", "b/p.jpg", "r.x", "s"])
    for stored in (paths, paths.astype("S")):
        dataset = opened(tmp_path, images=COLORS, labels=LABELS, **{name: stored})
        assert [category.name for category in dataset.categories] == ["0", "1", "2"]
        assert [entry.name for entry in dataset.entries] == ["a/p", "a/q", "b/p", "r.x", "s"]
        np.testing.assert_array_equal(pictures(dataset), COLORS)


@pytest.mark.parametrize(
    "names", [["p"] * 5, ["../p", *"qrst"], ["/p", *"qrst"], ["p", "q"], [None]]
)
def test_names_that_tell_no_pictures_apart_are_numbers(tmp_path, names):
    dataset = opened(tmp_path, images=COLORS, labels=LABELS, image_names=np.array([*names]))
    assert [entry.name for entry in dataset.entries] == ["0", "1", "2", "3", "4"]


OTHERS = {
    "image_ids": np.array([7, 3, 5, 1, 9]),
    "image_names": np.array(list("abcde")),
    "image_sizes": np.full((5, 2), 9),
    "class_weights": np.array([0.2, 0.3, 0.5]),
    "channel_names": np.array(["red", "green", "blue"]),
    "mask_names": np.array(list("abcde")),
}


@pytest.mark.parametrize("split", ["", "val_"])
def test_what_more_is_in_a_file_does_no_harm(tmp_path, split):
    arrays = {f"{split}images": COLORS, f"{split}labels": LABELS}
    for others in (OTHERS, {f"{split}{name}": array for name, array in OTHERS.items()}):
        for given in (arrays | others, others | arrays):
            dataset = opened(tmp_path, **given)
            assert [category.name for category in dataset.categories] == ["0", "1", "2"]
            assert [annotation.label for annotation in dataset] == LABELS.tolist()
            np.testing.assert_array_equal(pictures(dataset), COLORS)
            assert find_source(tmp_path / "own.npz").splits == (split.strip("_"),)
    named = opened(tmp_path, **arrays, **OTHERS, class_names=np.array(["cat", "dog", "bird"]))
    assert [category.name for category in named.categories] == ["cat", "dog", "bird"]


def test_files_of_pictures_as_texts_of_bytes(tmp_path):
    dataset = opened(tmp_path, image_bytes=np.array(FILES), labels=np.array(list("cabba")))
    assert [category.name for category in dataset.categories] == ["a", "b", "c"]
    assert [annotation.label for annotation in dataset] == LABELS.tolist()
    np.testing.assert_array_equal(pictures(dataset), COLORS)


@pytest.mark.parametrize("axis", [0, 1])  # (N, H, W), (N, H, W, 1)
def test_maps(tmp_path, axis):
    values = np.random.default_rng(0).integers(0, 3, (5, 12, 16)).astype(np.uint8)
    values[0, 0, 0] = 255
    stored = values[..., None] if axis else values
    dataset = opened(tmp_path, "semantic", images=COLORS, masks=stored)
    assert [category.id for category in dataset.categories] == [0, 1, 2]
    found = np.stack([annotation.semantic for annotation in dataset])
    np.testing.assert_array_equal(found, np.where(values == 255, -1, values.astype(int)))
    dataset = opened(tmp_path, "instance", x=COLORS, y=stored)
    np.testing.assert_array_equal(np.stack([annotation.ids for annotation in dataset]), values)
    dataset = opened(tmp_path, "semantic", images=COLORS, masks=stored == 1)
    np.testing.assert_array_equal(np.stack([a.semantic for a in dataset]), values == 1)


def test_splits(tmp_path):
    arrays = {"x_train": COLORS, "y_train": LABELS, "x_test": COLORS[:2], "y_test": LABELS[:2]}
    np.savez(tmp_path / "own.npz", **arrays)
    for path in (tmp_path / "own.npz", tmp_path):
        training, validation = open_splits(path, task="classification", val="test")
        assert (len(training), len(validation)) == (5, 2)
        training, validation = open_splits(path, task="classification", val_share=0.2)
        assert (len(training), len(validation)) == (4, 1)
        with pytest.raises(ValueError, match="has no split 'val'; there are: test, train"):
            open_dataset(path, task="classification")
    (tmp_path / "own.npz").unlink()
    np.savez(tmp_path / "train.npz", x=COLORS, y=LABELS)
    np.savez(tmp_path / "validation.npz", x=COLORS[:2], y=LABELS[:2])
    assert find_source(tmp_path).splits == ("train", "validation")
    assert len(open_dataset(tmp_path, task="classification")) == 2


FAULTS = {
    "names": ({"arr_0": COLORS, "arr_1": LABELS}, "expected arrays with names such as"),
    "two": ({"x": COLORS, "images": COLORS, "y": LABELS}, "both 'x' and 'images' may be"),
    "flat": ({"x": COLORS.reshape(5, -1), "y": LABELS}, "expected pictures in 'x', as (N, H,"),
    "channels": ({"x": np.zeros((5, 8, 8, 7)), "y": LABELS}, "of 1, 3 or 4 channels, got float64"),
    "fewer": ({"x": COLORS, "y": LABELS[:4]}, "expected as many labels in 'y' as"),
    "none": ({"x": COLORS}, "expected an array of labels for the pictures 'x'"),
    "several": ({"x": COLORS, "y": np.ones((5, 3))}, "expected one class for each picture"),
    "fractions": ({"x": COLORS, "y": LABELS / 2}, "expected numbers or names of classes in 'y'"),
    "objects": ({"x": np.array([{}, 1, 2, 3, 4], object), "y": LABELS}, "array 'x' cannot"),
    "offsets": ({"jpeg": np.zeros(9, np.uint8), "offsets": [0, 5, 3], "y": [0, 1]}, "in 'offsets'"),
    "beyond": ({"jpeg": np.zeros(9, np.uint8), "offsets": [0, 5, 10], "y": [0, 1]}, "in 'jpeg'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_a_line(tmp_path, fault):
    arrays, message = FAULTS[fault]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        opened(tmp_path, **arrays)
    assert str(caught.value).startswith(str(tmp_path / "own.npz"))
    assert "\n" not in str(caught.value)


def test_labels_of_no_class_can_be_left_out(tmp_path):
    options = {"categories": ["a", "b"]}
    with pytest.raises(ValueError, match=r"own.npz/x\[0\]: label 2 is none of the 2 classes \(0 a"):
        opened(tmp_path, x=COLORS, y=LABELS, options=options)
    kept = opened(tmp_path, x=COLORS, y=LABELS, options=options | {"skip_bad": True})
    assert [entry.name for entry in kept.entries] == ["1", "2", "3", "4"]


def test_a_negative_label_is_a_class_and_a_warning_where_it_may_mean_none(tmp_path):
    with pytest.warns(UserWarning, match=r"own.npz: the label -1 is a class, as 2 is; leave out"):
        dataset = opened(tmp_path, x=COLORS, y=np.array([2, 0, -1, 1, 0]))
    assert [category.id for category in dataset.categories] == [-1, 0, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = opened(tmp_path, x=COLORS, y=np.array([1, -1, -1, 1, 1]))
    assert [category.id for category in dataset.categories] == [-1, 1]


def test_files_that_are_damaged_or_change(tmp_path):
    path = tmp_path / "own.npz"
    for content in (b"", b"no ZIP at all", encoded(COLORS[0])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"own.npz: expected a .npz file"):
            open_dataset(path, task="classification")
    opened(tmp_path, compressed=True, x=COLORS, y=LABELS)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"own.npz: the array '.' cannot be read: "):
        open_dataset(path, task="classification")
    dataset = pickle.loads(pickle.dumps(opened(tmp_path, x=COLORS, y=LABELS)))
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match="'x' cannot be read: was changed after it was opened"):
        dataset[0]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"no array")
        content = io.BytesIO()
        np.save(content, LABELS)
        archive.writestr("y.npy", content.getvalue())
    with pytest.raises(ValueError, match=r"own.npz: the array 'x' cannot be read"):
        open_dataset(path, task="classification")
