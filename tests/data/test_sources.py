"""Which format a folder has, its splits, and the classes of what has none."""

import shutil
import unicodedata
import warnings

import numpy as np
import pytest

from helpers import scenes
from helpers.clouds import write_objects, write_scenes
from helpers.scenes import encoded, picture, pixels, rectangles, save
from pointformer.annotations import Category
from pointformer.cli.common import FORMATS as NAMES
from pointformer.data import ADE20K, FORMATS, find_source, open_dataset, open_splits
from pointformer.data.annotations import matched_classes, renumbered


def folder(root, splits=("train", "val"), labels=(0, 1, 2), number=3, kind="labels"):
    for split in splits:
        for n in range(number):
            picture(root / split / "images" / f"{n}.png")
            values = rectangles([v for v in labels if v], seed=n).astype(np.uint8)
            save(root / split / kind / f"{n}.png", values)
    return root


def classes(root, counts, splits=("train", "val")):
    for split in splits:
        for name, count in counts.items():
            for n in range(count):
                picture(root / split / name / f"{n}.jpg", (12, 16))
    return root


def ade20k(root, name="ADE_1"):
    for split in ("training", "validation"):
        picture(root / "images" / split / f"{name}.jpg")
        save(root / "annotations" / split / f"{name}.png", rectangles([1, 150]).astype(np.uint8))
    return root


def coco(root):
    """As it is published: annotations/ with all kinds of files beside train2017/ and val2017/."""
    for split in ("train", "val"):
        scenes.coco_instances(root)
        made = root / "val2017"
        if split == "train":
            made.rename(root / "train2017")
    files = list(root.rglob("*.json"))
    (root / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val"):
        shutil.copy(files[0], root / "annotations" / f"instances_{split}2017.json")
        (root / "annotations" / f"captions_{split}2017.json").write_text(
            '{"images": [], "annotations": [{"caption": "a"}]}'
        )
    for file in files:
        if file.parent != root / "annotations":
            file.unlink()
    return root


def roboflow(root):
    coco(root / "as")
    for split, name in (("train", "train"), ("val", "valid")):
        (root / "as" / f"{split}2017").rename(root / name)
        shutil.move(
            root / "as" / "annotations" / f"instances_{split}2017.json",
            root / name / "_annotations.coco.json",
        )
    shutil.rmtree(root / "as")
    return root


def cityscapes(root):
    for split in ("train", "val"):
        scenes.cityscapes(root, 1, split)
    return root


def shards(root):
    for split in ("train", "val"):
        for n in range(2):
            files = {}
            for k in range(3):
                files |= {f"{k}.jpg": encoded(pixels(k), "jpg"), f"{k}.cls": k}
            scenes.shard(root / f"own-{split}-{n:04d}.tar", files)
    return root


def arrays(root):
    content = {}
    for split in ("train", "valid"):
        content[f"x_{split}"] = np.stack([pixels(k) for k in range(3)])
        content[f"y_{split}"] = np.arange(3)
    np.savez(root / "own-val.npz", **content)
    return root


MADE = {
    "folder": (folder, "semantic"),
    "instances": (lambda root: folder(root, kind="instances"), "instance"),
    "classes": (lambda root: classes(root, {"cat": 2, "dog": 3}), "classification"),
    "ade20k": (ade20k, "semantic"),
    "cityscapes": (cityscapes, "panoptic"),
    "coco": (coco, "instance"),
    "roboflow": (roboflow, "instance"),
    "shards": (shards, "classification"),
    "arrays": (arrays, "classification"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_format_is_recognized(tmp_path, name):
    make, task = MADE[name]
    root = make(tmp_path)
    source = find_source(root, task=task)
    assert source.format == {"instances": "folder", "roboflow": "coco"}.get(name, name)
    assert str(root) in str(source)
    assert source.format in str(source)
    training, validation = open_splits(root, task=task)
    assert training.categories == validation.categories
    for part, split in ((training, "train"), (validation, "val")):
        assert len(part)
        assert all(source.split(split) in str(entry.image) for entry in part.entries)
        for annotation in part:
            assert annotation.read_image().shape[:2] == annotation.size
    assert len(open_dataset(root, task=task)) == len(validation)
    for other in {"semantic", "instance", "panoptic", "classification"} - set(
        FORMATS[source.format].tasks
    ):
        with pytest.raises(ValueError, match=r"nothing for the task|looks like no data set"):
            open_dataset(root, task=other)


def test_the_command_line_knows_all_formats():
    assert set(NAMES) == set(FORMATS)


def test_a_folder_of_nothing_known_is_an_error(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"^{tmp_path}: looks like no data set of a known format"):
        find_source(tmp_path)
    with pytest.raises(
        ValueError, match="gone: expected a data set, there is no such folder or file"
    ):
        find_source(tmp_path / "gone")
    with pytest.raises(ValueError, match="a JSON file of objects, found none; `evaluate` takes"):
        find_source(tmp_path, "coco")
    with pytest.raises(ValueError, match=r"format: expected one of .*, got 'voc'"):
        find_source(tmp_path, "voc")


def test_splits_have_several_names(tmp_path):
    folder(tmp_path, ("training", "valid", "extra"))
    source = find_source(tmp_path)
    assert source.split("train") == "training"
    assert source.split("val") == "valid"
    assert source.split("extra") == "extra"
    assert source.split("test") is None
    with pytest.raises(ValueError, match="no split 'test'; there are: extra, training, valid"):
        open_dataset(tmp_path, split="test")


@pytest.mark.parametrize("make", [folder, lambda root, splits: classes(root, {"a": 1}, splits)])
def test_splits_in_upper_case(tmp_path, make):
    make(tmp_path, ["Train", "VALID"])
    source = find_source(tmp_path)
    assert [source.split(name) for name in ("train", "val", "test")] == ["Train", "VALID", None]


def test_a_task_that_a_format_has_nothing_for(tmp_path):
    folder(tmp_path)
    with pytest.raises(ValueError, match="folder has nothing for the task 'classification', only"):
        open_dataset(tmp_path, task="classification")


def test_classes_are_listed_or_found_in_the_maps(tmp_path):
    folder(tmp_path, labels=(0, 1, 7))
    found = open_dataset(tmp_path, split="train").categories
    assert [category.id for category in found] == [0, 1, 7]
    (tmp_path / "classes.txt").write_text("sky\n" + "\n".join(f"c{n}" for n in range(1, 8)))
    listed = open_dataset(tmp_path, split="train").categories
    assert [category.name for category in listed] == ["sky", *(f"c{n}" for n in range(1, 8))]
    named = open_dataset(tmp_path, split="train", categories=[str(n) for n in range(8)])
    assert len(named.categories) == 8


def test_masks_of_0_and_255_have_one_class_or_two(tmp_path):
    folder(tmp_path, labels=(0, 255))
    with pytest.raises(ValueError, match=r"hold only 0, and 255, which is void; .*void=\[\]"):
        open_dataset(tmp_path)
    assert [c.id for c in open_dataset(tmp_path, void=()).categories] == [0, 255]


def test_maps_that_are_all_void(tmp_path):
    picture(tmp_path / "images/a.png")
    save(tmp_path / "labels/a.png", np.full(scenes.SIZE, 255, np.uint8))
    with pytest.raises(ValueError, match=r"labels: expected labels, found only void \(255\)"):
        open_dataset(tmp_path)


def test_labels_that_only_the_validation_maps_have(tmp_path):
    maps = {"train": [0, 1], "val": [0, 2]}
    for split, labels in maps.items():
        picture(tmp_path / split / "images/a.png")
        values = np.resize(np.array(labels, np.uint8), scenes.SIZE)
        save(tmp_path / split / "labels/a.png", values)
    with pytest.raises(ValueError, match=r"holds \[2\], no class of .*train.*data\.categories"):
        open_splits(tmp_path)
    _, validation = open_splits(tmp_path, categories=["sky", "land", "sea"])
    assert validation[0].semantic.max() == 2
    _, validation = open_splits(tmp_path, void=(2, 255))
    assert validation[0].semantic.min() == -1
    _, validation = open_splits(tmp_path, skip_bad=True)
    assert len(validation) == 1  # which is left out when it is read


def test_nearly_data_sets_are_told_what_they_lack(tmp_path):
    picture(tmp_path / "cats/a.png")
    with pytest.raises(ValueError, match="format \\(cats is the only folder of pictures"):
        find_source(tmp_path)
    picture(tmp_path / "plain/images/a.png")
    with pytest.raises(ValueError, match="images has neither labels/ nor instances/ beside it"):
        find_source(tmp_path / "plain")
    picture(tmp_path / "upper/Images/a.png")
    picture(tmp_path / "upper/Labels/a.png")
    for task in ("semantic", "classification"):
        with pytest.raises(
            ValueError, match=r"Images has neither .*, only Labels/: maps of classes"
        ):
            find_source(tmp_path / "upper", task=task)
    picture(tmp_path / "boxes/images/a.png")
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}
    content = {"images": [], "annotations": [row], "categories": []}
    scenes.dump(tmp_path / "boxes/a.json", content)
    with pytest.raises(ValueError, match=r"pass the folder that has it, .*boxes\)"):
        find_source(tmp_path / "boxes/a.json")
    with pytest.raises(
        ValueError, match=r"boxes/a\.json has boxes but no outlines: each annotation"
    ):
        find_source(tmp_path / "boxes")


@pytest.mark.parametrize(
    ("pictures", "maps"),
    [
        ("JPEGImages", ["SegmentationClass", "SegmentationObject"]),
        ("image", ["mask"]),
        ("img", ["labels"]),
    ],
)
@pytest.mark.parametrize("split", ["", "VOC2012", "train"])
def test_pictures_beside_their_maps_are_no_classes(tmp_path, pictures, maps, split):
    """Pascal VOC's folders, and others': they would be learned as classes."""
    for name in (pictures, *maps):
        picture(tmp_path / split / name / "a.png")
    message = (
        f"{pictures} has neither .*, only {'/, '.join(maps)}/: maps of .*, pictures in images/"
    )
    for task in ("classification", "semantic"):
        with pytest.raises(ValueError, match=message):
            find_source(tmp_path, task=task)


@pytest.mark.parametrize("names", [("image", "text"), ("mask", "no mask")])
def test_classes_may_be_called_as_pictures_or_maps_are(tmp_path, names):
    classes(tmp_path, dict.fromkeys(names, 1), [""])
    dataset = open_dataset(tmp_path, task="classification")
    assert [category.name for category in dataset.categories] == [*names]


def test_class_folders_count_classes_that_a_split_lacks(tmp_path):
    classes(tmp_path, {"a": 1, "b": 1, "c": 2}, ["train"])
    classes(tmp_path, {"a": 1, "c": 1}, ["val"])
    (tmp_path / "val" / "b").mkdir()
    validation = open_dataset(tmp_path, task="classification")
    assert [category.name for category in validation.categories] == ["a", "b", "c"]
    assert [annotation.label for annotation in validation] == [0, 2]
    assert [entry.name for entry in validation.entries] == ["a/0", "c/0"]
    (tmp_path / "val" / "b").rmdir()
    own = [Category(5, "a"), Category(6, "c")]
    assert [a.label for a in open_dataset(tmp_path, task="classification", categories=own)] == [
        0,
        1,
    ]
    picture(tmp_path / "val/x/0.png")
    with pytest.raises(ValueError, match=r"val/x: is none of the 2 classes \(a, c\)"):
        open_dataset(tmp_path, task="classification", categories=own)
    kept = open_dataset(tmp_path, task="classification", categories=own, skip_bad=True)
    assert len(kept) == 2
    assert list(kept.skipped) == ["x"]


def test_folders_that_are_no_classes_are_told(tmp_path):
    classes(tmp_path, {"a": 1, "b": 1}, [""])
    for name in ("c/c.heic", "d/e/0.png", ".cache/x", "f/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"the folders \['c', 'd'\] are no classes: no picture"):
        dataset = open_dataset(tmp_path, task="classification")
    assert [entry.name for entry in dataset.entries] == ["a/0", "b/0"]
    own = [Category(n, name) for n, name in enumerate("abcd")]
    dataset = open_dataset(tmp_path, task="classification", categories=own)
    assert [entry.name for entry in dataset.entries] == ["a/0", "b/0", "d/e/0"]


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_classes_with_accents_however_they_are_stored(tmp_path, stored):
    other = {"NFC": "NFD", "NFD": "NFC"}[stored]
    for split, form in (("train", stored), ("val", other)):
        classes(tmp_path, {unicodedata.normalize(form, "pâte"): 1, "sel": 1}, [split])
    training, validation = open_splits(tmp_path, task="classification")
    for dataset in (training, validation):
        assert [category.name for category in dataset.categories] == ["pâte", "sel"]
        assert [annotation.label for annotation in dataset] == [0, 1]
    wanted = [Category(n, unicodedata.normalize(other, name)) for n, name in enumerate("éà")]
    listed = [Category(9 - n, unicodedata.normalize(stored, name)) for n, name in enumerate("éà")]
    assert [c.id for c in matched_classes(wanted, listed, "x")] == [9, 8]


def test_free_ids_are_none_of_8_bits():
    table = [Category(0, "a"), Category(1, "b"), Category(2, "c")]
    assert [c.id for c in renumbered(table, [0, None, None])] == [0, 256, 257]
    assert [c.id for c in renumbered(table, [300, None, None], [301])] == [300, 302, 303]


def test_names_of_classes_are_different(tmp_path):
    folder(tmp_path)
    (tmp_path / "classes.txt").write_text("cell\n\ncell\n")
    with pytest.raises(ValueError, match=r"classes\.txt: .* different names, got 'cell' twice"):
        open_dataset(tmp_path)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(ValueError, match="categories: expected different names, got 'x' twice"):
        open_dataset(tmp_path, categories=["x", "y", "x"])


def test_a_share_is_kept_where_there_is_no_split(tmp_path):
    for name, count in (("rare", 1), ("few", 4), ("many", 40)):
        for n in range(count):
            picture(tmp_path / name / f"{n}.png", (4, 4))
    training, validation = open_splits(tmp_path, task="classification", val_share=0.25)
    labels = [entry.label for entry in validation.entries]
    assert [training.categories[k].name for k in sorted(set(labels))] == ["few", "many"]
    assert np.bincount(labels).tolist() == [1, 10]
    names = {entry.name for entry in training.entries} | {e.name for e in validation.entries}
    assert len(names) == len(training) + len(validation) == 45
    again = open_splits(tmp_path, task="classification", val_share=0.25)[1]
    assert [e.name for e in again.entries] == [e.name for e in validation.entries]
    other = open_splits(tmp_path, task="classification", val_share=0.25, seed=1)[1]
    assert [e.name for e in other.entries] != [e.name for e in validation.entries]
    picture(tmp_path / "many" / "new.png", (4, 4))  # changes little for the others
    more = open_splits(tmp_path, task="classification", val_share=0.25)[1]
    kept = {e.name for e in more.entries} & {e.name for e in validation.entries}
    assert len(kept) >= 10
    alone, nothing = open_splits(tmp_path, task="classification", val_share=0)
    assert (len(alone), nothing) == (46, None)


@pytest.mark.parametrize(
    ("number", "share", "message"),
    [(1, 0.1, "is the only picture; expected at least two"), (3, 1.0, "val_share: expected a")],
)
def test_what_cannot_be_divided(tmp_path, number, share, message):
    folder(tmp_path, [""], number=number)
    with pytest.raises(ValueError, match=message):
        open_splits(tmp_path, val_share=share)


def test_two_pictures_are_one_to_learn_from_and_one_to_score(tmp_path):
    folder(tmp_path, [""], number=2)
    assert [len(part) for part in open_splits(tmp_path, val_share=0.01)] == [1, 1]
    assert [len(part) for part in open_splits(tmp_path, val_share=0.99)] == [1, 1]


def test_the_one_that_is_kept_is_of_the_largest_class(tmp_path):
    for name, count in (("few", 2), ("many", 4)):
        for n in range(count):
            picture(tmp_path / name / f"{n}.png", (4, 4))
    training, validation = open_splits(tmp_path, task="classification", val_share=0.1)
    assert (len(training), len(validation)) == (5, 1)
    assert validation.categories[validation.entries[0].label].name == "many"


def test_annotations_of_any_name(tmp_path):
    coco(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").rename(tmp_path / "mine.json")
    options = {"annotations": tmp_path / "mine.json", "task": "instance"}
    assert len(open_dataset(tmp_path / "val2017", **options)) == 5
    (tmp_path / "annotations" / "instances_more_train2017.json").write_bytes(
        (tmp_path / "mine.json").read_bytes()
    )
    with pytest.raises(ValueError, match="may be the annotations; move one away"):
        open_dataset(tmp_path, task="instance", split="train")
    (tmp_path / "annotations" / "instances_more_train2017.json").rename(
        tmp_path / "annotations" / "a_person_keypoints_train2017.json"
    )
    assert len(open_dataset(tmp_path, task="instance", split="train")) == 5  # of the instances


def test_pictures_that_are_learned_and_scored_are_told(tmp_path):
    coco(tmp_path)
    text = (tmp_path / "annotations/instances_train2017.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_splits(tmp_path, task="instance")
    for name in ("train2017", "val2017"):
        for file in (tmp_path / name).iterdir():
            shutil.copy(file, tmp_path / file.name)
        shutil.rmtree(tmp_path / name)
    (tmp_path / "annotations/instances_val2017.json").write_text(text)
    with pytest.warns(UserWarning, match=r"is in both .* as are 5 of the 5 pictures to be scored"):
        open_splits(tmp_path, task="instance")


@pytest.mark.parametrize(
    ("task", "write", "count"),
    [("point_segmentation", write_scenes, 3),
     ("point_classification", lambda path: write_objects(path / "all.npz"), 12)],
)  # fmt: skip
def test_splits_within_a_file_share_nothing(tmp_path, task, write, count):
    write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_splits(tmp_path, task=task)
    message = f"is in both .* as are {count} of the {count} point sets to be scored on"
    with pytest.warns(UserWarning, match=message):
        open_splits(tmp_path, task=task, val="train")


@pytest.mark.parametrize("val", ["val/images", "images/Valid"])
def test_a_folder_to_be_scored_on_without_annotations_is_told(tmp_path, val):
    for name in "ab":
        for kind in ("images", "labels"):
            path = tmp_path / ("train/" + kind if val == "val/images" else kind + "/train")
            save(path / f"{name}.png", rectangles([1, 2]).astype(np.uint8))
    picture(tmp_path / val / "a.png")
    with pytest.warns(UserWarning, match=r"(val|Valid): has no annotations that were found"):
        training, validation = open_splits(tmp_path)
    assert (len(training), len(validation)) == (1, 1)


@pytest.mark.parametrize(("splits", "listed"), [("train val", False), ("training", True)])
def test_own_classes_are_not_taken_for_those_of_ade20k(tmp_path, splits, listed):
    for split in splits.split():
        picture(tmp_path / "images" / split / "a.png")
        save(tmp_path / "annotations" / split / "a.png", rectangles([1, 2]).astype(np.uint8))
    if listed:
        (tmp_path / "classes.txt").write_text("field\ncrop\nweed\n")
    with pytest.raises(ValueError, match=r"only annotations/: maps of classes belong in labels/"):
        find_source(tmp_path)


def test_other_pictures_in_folders_of_ade20k_are_told(tmp_path):
    root = ade20k(tmp_path, "field")
    with pytest.warns(UserWarning, match=r"read as ADE20K by its folders, with the 150 .* labels/"):
        assert open_dataset(root).categories == ADE20K


@pytest.mark.parametrize("format", ["ade20k", "cityscapes", "coco"])
def test_names_of_classes_are_not_ignored(tmp_path, format):
    """Of a data set that has names of its own."""
    make, task = MADE[format]
    root = make(tmp_path)
    own = [category.name for category in open_dataset(root, task=task, split="val").categories]
    again = open_dataset(root, task=task, split="val", categories=own)
    assert [category.name for category in again.categories] == own
    for names in (own[::-1], own[:-1], ["field", "crop"]):
        with pytest.raises(ValueError, match=r"names of its own, .*\(data.categories\) out, got"):
            open_dataset(root, task=task, split="val", categories=names)


def cats_and_dogs(root, **tables):
    """COCO's JSON of each split: a cat at the left, a dog at the right."""
    for split, table in tables.items():
        picture(root / split / "a.jpg", (20, 40))
        rows = [
            {"id": n + 1, "image_id": 1, "category_id": table[name], "segmentation": [corners]}
            for n, (name, corners) in enumerate(
                (("cat", [1, 1, 9, 1, 9, 9]), ("dog", [21, 1, 29, 1, 29, 9]))
            )
        ]
        named = [{"id": number, "name": name} for name, number in table.items()]
        images = [{"id": 1, "file_name": "a.jpg", "height": 20, "width": 40}]
        content = {"images": images, "annotations": rows, "categories": named}
        scenes.dump(root / "annotations" / f"instances_{split}.json", content)
    return root


@pytest.mark.parametrize("table", [{"dog": 1, "cat": 2}, {"Cat": 0, "Dog": 1, "cow": 2}])
def test_classes_of_coco_are_matched_by_name(tmp_path, table):
    cats_and_dogs(tmp_path, train={"cat": 1, "dog": 2}, val={n.lower(): table[n] for n in table})
    training, validation = open_splits(tmp_path, task="instance")
    for dataset in (training, validation):
        assert [category.name for category in dataset.categories] == ["cat", "dog"]
        assert [segment.category for segment in dataset[0].segments] == [0, 1]


def test_other_classes_are_named_with_those_that_were_expected(tmp_path):
    cats_and_dogs(tmp_path, val={"dog": 3, "cat": 5})
    asked = [Category(3, "person"), Category(5, "car")]
    with pytest.raises(
        ValueError, match=r"lists the classes \['dog', 'cat'\]; .*\['person', 'car'\]: give them"
    ):
        open_dataset(tmp_path, task="instance", categories=asked)
    asked = [Category(3, "person"), Category(5, "dog")]
    with pytest.raises(ValueError, match=r"annotates \['cat'\] of .* skip_bad"):
        open_dataset(tmp_path, task="instance", categories=asked)
    kept = open_dataset(tmp_path, task="instance", categories=asked, skip_bad=True)
    assert [segment.category for segment in kept[0].segments] == [1]
    # Numbers are no names: ids say which class is which.
    asked = [Category(5, "0"), Category(3, "1")]
    numbered = open_dataset(tmp_path, task="instance", categories=asked)
    assert [segment.category for segment in numbered[0].segments] == [0, 1]


def test_classes_that_a_data_set_lacks_have_free_ids():
    """Their own where they are free; else beyond 8 bits and all that there are."""
    asked = [Category(1, "Cat"), Category(7, "dog"), Category(300, "cow"), Category(2, "hen")]
    for other, free in ((1, 301), (400, 401)):
        listed = [Category(7, "cat"), Category(2, "x"), Category(other, "y")]
        found = matched_classes(asked, listed, "here")
        assert [c.id for c in found] == [7, free, 300, free + 1]
        assert [c.name for c in found] == [c.name for c in asked]
    listed = [Category(1, "1"), Category(2, "2")]  # numbers that are all found are names too
    asked = [Category(0, "2"), Category(1, "1")]
    assert [c.id for c in matched_classes(asked, listed, "here")] == [2, 1]
    assert matched_classes([*asked, Category(5, "3")], listed, "here") == (*asked, Category(5, "3"))
    listed = [Category(3, "Cat"), Category(4, "cat")]  # two kinds: case tells them apart
    assert [c.id for c in matched_classes(listed[::-1], listed, "here", [3, 4])] == [4, 3]
    for same in (listed, listed[::-1]):
        assert [c.id for c in matched_classes([Category(9, "cat")], same, "here", [4])] == [4]
    with pytest.raises(ValueError, match=r"here: annotates \['Cat'\] of the classes"):
        matched_classes([Category(9, "cat")], listed, "here", [3, 4])
    with pytest.raises(ValueError, match=r"here: lists the classes \['Cat', 'cat'\]; expected"):
        matched_classes([Category(9, "cow")], listed, "here")


def test_one_class_of_another_name_is_the_one_that_is_meant(tmp_path):
    folder(tmp_path, splits=("",), labels=(0, 1), number=1, kind="instances")
    (tmp_path / "classes.txt").write_text("_background_\ncell\n")
    with pytest.warns(UserWarning, match="its class 'cell' is taken for 'nucleus'"):
        dataset = open_dataset(tmp_path, task="instance", categories=[Category(0, "nucleus")])
    assert [segment.category for segment in dataset[0].segments] == [0]


def test_classes_of_a_model_are_found_in_lists_by_name(tmp_path):
    folder(tmp_path / "maps", splits=("",), number=1)
    (tmp_path / "maps" / "classes.txt").write_text("bright\nmid\ndark\n")
    asked = [Category(n, name) for n, name in enumerate(("dark", "mid", "bright"))]
    own = open_dataset(tmp_path / "maps")[0].classes()
    found = open_dataset(tmp_path / "maps", categories=asked)[0].classes()
    np.testing.assert_array_equal(found, 2 - own)
    # Names without ids are those of the labels, in training and in validation.
    training, validation = open_splits(folder(tmp_path / "own"), categories=["a", "b", "c"])
    assert training.categories == validation.categories
    shown, labels = np.zeros((3, 8, 8), np.uint8), np.arange(3)
    np.savez(tmp_path / "a.npz", images=shown, labels=labels, classes=["bright", "mid", "dark"])
    found = open_dataset(tmp_path / "a.npz", task="classification", categories=asked)
    assert [annotation.label for annotation in found] == [2, 1, 0]


def test_archives_by_split(tmp_path):
    """Of what else is there none is taken, and none of two of a split is left out."""
    for name in ("train.NPZ", "val.npz", "._train.npz", "sizes.npz"):
        with open(tmp_path / name, "wb") as file:
            np.savez(file, images=np.zeros((5, 8, 8), np.uint8), labels=np.arange(5))
    (tmp_path / "._train.npz").write_bytes(b"Mac OS X")
    assert find_source(tmp_path).splits == ("train", "val")
    assert [len(part) for part in open_splits(tmp_path, task="classification")] == [5, 5]
    np.savez(tmp_path / "train_2.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.arange(2))
    with pytest.raises(ValueError, match=r"train.NPZ: .* split 'train', there is train_2.npz too"):
        open_splits(tmp_path, task="classification")


def test_an_archive_of_pictures_is_none_of_points(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((5, 8, 8), np.uint8), labels=np.arange(5))
    assert find_source(tmp_path / "a.npz").format == "arrays"
    for name in ("M.NPZ", "m.npz"):
        (tmp_path / name[0]).mkdir()
        with open(tmp_path / name[0] / name, "wb") as file:
            np.savez(file, xyz=np.zeros((4, 9, 3)), label=np.arange(4))
        assert find_source(tmp_path / name[0]).format == "objects"


def test_lists_of_segments_tell_classes_by_name(tmp_path):
    for split, classes in (("train", ("car", "person")), ("val", ("person", "car"))):
        picture(tmp_path / split / "images" / "a.png", (4, 6))
        save(tmp_path / split / "instances" / "a.png", np.uint8([[1, 1, 2, 2, 0, 0]] * 4))
        rows = [
            {"id": n + 1, "class": classes.index(c) + 1} for n, c in enumerate(("car", "person"))
        ]
        listed = {str(n + 1): name for n, name in enumerate(classes)}
        content = {"classes": listed, "images": {"a": {"segments": rows}}}
        scenes.dump(tmp_path / split / "segments.json", content)
    for dataset in open_splits(tmp_path, task="instance"):
        assert [segment.category for segment in dataset[0].segments] == [0, 1]
    asked = [Category(0, "boat"), Category(1, "car")]
    with pytest.raises(
        ValueError, match=r"annotates \['person'\] of the classes \['person', 'car'"
    ):
        open_dataset(tmp_path, task="instance", categories=asked)


def test_formats_with_classes_of_their_own_are_for_models_of_these(tmp_path):
    ade20k(tmp_path)
    own = open_dataset(tmp_path).categories
    assert open_dataset(tmp_path, categories=own).categories == own
    with pytest.raises(ValueError, match=r"expected those of the model in this order"):
        open_dataset(tmp_path, categories=own[::-1])
    with pytest.raises(ValueError, match=r"expected those of the model or the training, \['a0'"):
        open_dataset(tmp_path, categories=[Category(n, f"a{n}") for n in range(150)])


@pytest.mark.parametrize("kind", ["labels", "instances"])
def test_splits_may_be_folders_of_the_pictures_and_of_the_maps(tmp_path, kind):
    made = folder(tmp_path / "made", kind=kind)
    for split in ("train", "val"):
        for name in ("images", kind):
            shutil.copytree(made / split / name, tmp_path / "data" / name / split)
    (tmp_path / "data" / "images" / "test").mkdir()  # without maps
    assert find_source(tmp_path / "data").splits == ("train", "val")
    task = "semantic" if kind == "labels" else "instance"
    turned, plain = (open_splits(tmp_path / root, task=task) for root in ("data", "made"))
    for part, other, split in zip(turned, plain, ("train", "val"), strict=True):
        assert [entry.name for entry in part.entries] == [entry.name for entry in other.entries]
        assert all(split in entry.image.parts for entry in part.entries)
        assert len(list(part)) == 3
    if kind == "instances":
        listed = {"classes": {"1": "cell"}, "images": {}}
        scenes.dump(tmp_path / "data" / "segments.json", listed)
        with pytest.raises(ValueError, match=r"0 may be .*images/train/0\.png or .*images/val/0"):
            open_dataset(tmp_path / "data", split="train", task=task)
    picture(tmp_path / "data" / "images" / "a.png")  # folders are parts of names then
    assert find_source(tmp_path / "data").splits == ("",)


@pytest.mark.parametrize("splits", [("",), ("train", "val")])
@pytest.mark.parametrize("task", ["instance", "classification"])
def test_pictures_and_masks_are_no_classes(tmp_path, splits, task):
    folder(tmp_path, splits, kind="masks")
    with pytest.raises(
        ValueError, match=r"images has neither .*, only masks/: maps .* instances/\)"
    ):
        find_source(tmp_path, task=task)
