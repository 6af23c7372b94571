"""What is in a data set, what is wrong with it, and what is advised."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from helpers import scenes
from helpers.scenes import save
from pointformer.data import Category, open_dataset, read_coco_instances, read_folder, statistics
from pointformer.data.statistics import (
    PictureFacts,
    Statistics,
    examine,
    left_out_lines,
    without_bad,
)


def cells(root, sizes=((40, 60), (40, 60), (20, 20)), side=5):
    """A picture of each size with two objects: squares of `side` and of 2 pixels."""
    for n, size in enumerate(sizes):
        ids = np.zeros(size, np.uint8)
        ids[3 : 3 + side, 3 : 3 + side] = 1
        ids[12:14, 12:14] = 2
        save(root / f"images/{n}.png", np.full(size, 10 * n, np.uint8))
        save(root / f"instances/{n}.png", ids)
    return open_dataset(root, task="instance", skip_bad=False)


def classes(root, labels, void=255):
    """Maps of one label each."""
    for n, label in enumerate(labels):
        save(root / f"images/{n}.png", np.zeros((8, 8), np.uint8))
        values = np.full((8, 8), label, np.uint8)
        values[0] = void
        save(root / f"labels/{n}.png", values)
    return open_dataset(root, categories=["a", "b", "c"])


def test_objects_are_counted_and_measured(tmp_path):
    found = examine(cells(tmp_path), "objects")
    assert found.per_class == [6]
    assert found.diameters.tolist() == [5, 2] * 3
    first, _, third = found.lines()
    assert first == "3 pictures, width x height 60 x 40 (2), 20 x 20 (1)"
    assert third.startswith("6 objects, up to 2 in a picture, diameters 2 to 5 px")
    found.check()


def test_objects_are_measured_by_their_pixels(tmp_path):
    """Not by the area that a COCO file gives them."""
    square = [10, 10, 30, 10, 30, 30, 10, 30]
    row = {"id": 1, "image_id": 1, "category_id": 1, "area": 0, "segmentation": [square]}
    scenes.picture(tmp_path / "a.png", (40, 50))
    path = scenes.dump(
        tmp_path / "a.json",
        {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [row],
            "categories": [{"id": 1, "name": "cell"}],
        },
    )
    found = examine(read_coco_instances(path, tmp_path), "objects")
    assert found.diameters.tolist() == [20]
    assert any("1 of 1 objects (100%) are smaller" in line for line in found.advice(32))


def test_small_objects_and_large_crops_are_advised_on(tmp_path):
    found = examine(cells(tmp_path), "objects")
    small, large = found.advice(4, (32, 32))
    assert small.startswith("3 of 6 objects (50%) are smaller than a token of 4 x 4 px")
    assert "enlarge the pictures 2 times" in small
    assert large.startswith("crops of 32 x 32 px are larger than 1 of the 3 pictures (as 20 x 20)")
    assert found.advice(4, (32, 32), scale=2) == []
    assert found.advice(2, (20, 20)) == []


def test_maps_that_do_not_tell_objects_apart(tmp_path):
    """Masks of 0 and 255 are one object each, and so they may be meant."""
    ids = np.zeros((20, 20), np.uint8)
    ids[2:8, 2:8] = ids[12:18, 12:18] = 255
    for n in range(2):
        save(tmp_path / f"images/{n}.png", ids)
        save(tmp_path / f"instances/{n}.png", ids)
    (advice,) = examine(open_dataset(tmp_path, task="instance"), "objects").advice(1)
    assert "each needs a number of its own" in advice
    ids[12:18, 12:18] = 254
    save(tmp_path / "instances/1.png", ids)
    assert examine(open_dataset(tmp_path, task="instance"), "objects").advice(1) == []


def test_classes_of_pixels(tmp_path):
    found = examine(classes(tmp_path, [0, 0, 2]), "pixels")
    assert found.per_class == [112, 0, 56]
    assert found.lines()[1:] == ["3 classes, by pixels: a 66.7%, c 33.3%, b 0%", "12.5% void"]
    assert found.advice() == ["1 class (b) without pixels: nothing is learned of these"]
    found.check()


def test_classes_of_pictures(tmp_path):
    for name, count in (("cat", 3), ("dog", 1)):
        for n in range(count):
            save(tmp_path / name / f"{n}.png", np.zeros((8, 8), np.uint8))
    found = examine(open_dataset(tmp_path, task="classification"), "pictures")
    assert found.per_class == [3, 1]
    assert found.lines()[1] == "2 classes, by pictures: cat 75%, dog 25%"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([255, 255], "a pixel with a class, the 2 pictures have none but void"),
        ([1, 1], "two classes to be told apart, the 2 pictures have only 'b'"),
    ],
)
def test_what_cannot_be_learned_from(tmp_path, labels, message):
    with pytest.raises(ValueError, match=f"^data: expected .*{message}"):
        examine(classes(tmp_path, labels), "pixels").check()


def test_one_class_of_pixels_and_no_objects(tmp_path):
    classes(tmp_path / "a", [0])
    one = open_dataset(tmp_path / "a", categories=["only"])
    with pytest.raises(ValueError, match=r"expected at least two classes .* got one \(only\)"):
        examine(one, "pixels").check()
    save(tmp_path / "b/images/0.png", np.zeros((8, 8), np.uint8))
    save(tmp_path / "b/instances/0.png", np.zeros((8, 8), np.uint8))
    empty = examine(open_dataset(tmp_path / "b", task="instance"), "objects")
    with pytest.raises(ValueError, match="expected an object, the picture has none"):
        empty.check()
    assert empty.advice()[0].startswith("1 picture: the model will learn it by heart")


def broken(root):
    """Of six pictures one ends early, one is none, one has a map of another size."""
    cells(root, [(20, 20)] * 6)
    content = (root / "images/1.png").read_bytes()
    (root / "images/1.png").write_bytes(content[: len(content) // 2])
    (root / "images/3.png").write_text("no picture")
    save(root / "instances/4.png", np.zeros((9, 9), np.uint8))
    return ["1", "3", "4"]


def test_broken_pictures_are_named_before_training(tmp_path):
    bad = broken(tmp_path)
    dataset = open_dataset(tmp_path, task="instance")
    found = examine(dataset, "objects")
    assert sorted(found.problems) == bad
    with pytest.raises(ValueError, match=r"^3 of 6 pictures cannot be used: ") as error:
        without_bad(dataset, found)
    assert "\n" not in str(error.value)
    for name in ("images/1.png", "images/3.png", "instances/4.png", "--skip-bad leaves them out"):
        assert name in str(error.value)
    dataset = open_dataset(tmp_path, task="instance", skip_bad=True)
    kept = without_bad(dataset, examine(dataset, "objects"))
    assert [entry.name for entry in kept.entries] == ["0", "2", "5"]
    assert sorted(kept.skipped) == bad
    assert len(dataset) == 6


def test_who_is_told_to_end_does_not_wait_for_all_pictures(tmp_path, monkeypatch):
    cells(tmp_path, ((20, 20),) * 24)
    dataset, seen = open_dataset(tmp_path, task="instance"), []
    plain = statistics._facts

    def ended(results, *args, **options):
        next(results)
        raise KeyboardInterrupt

    def look(*args):
        seen.append(args)
        time.sleep(0.02)
        return plain(*args)

    monkeypatch.setattr(statistics, "_facts", look)
    monkeypatch.setattr("tqdm.tqdm", ended)
    with pytest.raises(KeyboardInterrupt):
        examine(dataset, "objects", threads=1, progress=True)
    assert 1 <= len(seen) < 15


def test_what_was_found_is_kept_until_a_list_of_objects_or_a_map_of_classes_changes(tmp_path):
    save(tmp_path / "images/a.png", np.zeros((20, 20), np.uint8))
    save(
        tmp_path / "instances/a.png",
        np.kron(np.arange(4).reshape(2, 2), np.ones((10, 10))).astype(np.uint8),
    )
    (tmp_path / "classes.txt").write_text("background\nsmall\nlarge\n")
    cache = tmp_path / "found.json"

    def counted():
        dataset = open_dataset(tmp_path, task="instance")
        return dict(examine(dataset, "objects", cache=cache).good[0].classes)

    for label in (1, 2):
        save(tmp_path / "labels/a.png", np.full((20, 20), label, np.uint8))
        assert counted() == {label - 1: 3}
    listed = {"classes": {"1": "small", "2": "large"}, "images": {"a": {}}}
    for kind in (2, 1):
        listed["images"]["a"]["segments"] = [{"id": n, "class": kind} for n in (1, 2, 3)]
        (tmp_path / "classes.txt").unlink(missing_ok=True)
        (tmp_path / "segments.json").write_text(json.dumps(listed))
        assert counted() == {kind - 1: 3}


def test_what_was_found_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    bad, cache = broken(tmp_path), tmp_path / "run" / "found.json"
    dataset, read = open_dataset(tmp_path, task="instance"), []
    look = statistics._facts

    def spied(dataset, index, *rest):
        read.append(dataset.entries[index].name)
        return look(dataset, index, *rest)

    monkeypatch.setattr(statistics, "_facts", spied)

    def examined(counts="objects", **reading):
        read.clear()
        found = examine(dataset, counts, cache=cache, **reading)
        return found, sorted(read)

    everything = [str(n) for n in range(6)]
    first, looked = examined()
    assert looked == everything
    assert examined() == (first, [])
    save(tmp_path / "images/3.png", np.zeros((20, 20), np.uint8))
    mended, looked = examined()
    assert looked == ["3"]
    assert sorted(mended.problems) == [name for name in bad if name != "3"]
    assert examined(plane=0)[1] == everything
    cache.write_text("[]")
    assert examined()[1] == everything


def test_crowds_are_no_objects_and_factors_are_rounded_up(tmp_path):
    cells(tmp_path)
    found = examine(read_folder(tmp_path, task="instance", void=[1]), "objects")
    assert found.per_class == [3]
    assert found.diameters.tolist() == [2] * 3
    assert found.lines()[2].startswith("3 objects, up to 1 in a picture, diameters 2 to 2 px")
    found = examine(open_dataset(tmp_path, task="instance"), "objects")
    assert found.lines()[2].endswith("(5% to 95%), median 3.5")
    (small,) = found.advice(5)
    assert small.startswith("3 of 6 objects (50%) are smaller than a token of 5 x 5 px")
    assert small.endswith("enlarge the pictures 3 times")


def test_few_small_objects_need_no_larger_pictures(tmp_path):
    ids = np.zeros((200, 200), np.uint8)
    for n in range(25):
        row, column = divmod(n, 5)
        ids[40 * row : 40 * row + 20, 40 * column : 40 * column + 20] = n + 1
    ids[:20, :20] = 0
    ids[:2, :2] = 1
    for n in range(2):
        save(tmp_path / f"images/{n}.png", ids)
        save(tmp_path / f"instances/{n}.png", ids)
    (small,) = examine(open_dataset(tmp_path, task="instance"), "objects").advice(4)
    assert small.startswith("2 of 50 objects (4%) are smaller")
    assert small.endswith("and are easily missed")


def test_crops_may_be_too_large_along_one_side(tmp_path):
    (large,) = examine(cells(tmp_path), "objects").advice(2, (30, 10))
    assert large.startswith("crops of 10 x 30 px are larger than 1 of the 3 pictures")


def test_what_was_found_is_of_its_labels(tmp_path):
    for name in ("cat", "dog"):
        save(tmp_path / name / f"{name}.png", np.zeros((8, 8), np.uint8))
    dataset = open_dataset(tmp_path, task="classification")
    cat, dog = dataset.entries
    changed = replace(dog, label=0, read=lambda: replace(dog.read(), label=0))
    for entries, counts in (([cat, dog], [1, 1]), ([cat, changed], [2, 0])):
        dataset.entries[:] = entries
        assert examine(dataset, "pictures", cache=tmp_path / "found.json").per_class == counts


def test_what_was_found_is_of_its_classes(tmp_path):
    dataset = classes(tmp_path, [0, 0, 2])
    other = open_dataset(tmp_path, categories=[Category(n, f"{n}") for n in (0, 2, 1)])
    for some, counts in ((dataset, [112, 0, 56]), (other, [112, 56, 0])):
        assert examine(some, "pixels", cache=tmp_path / "found.json").per_class == counts


def test_of_many_classes_and_errors_the_first_are_named():
    categories = tuple(Category(n, str(n)) for n in range(9))
    facts = PictureFacts("a", (8, 8), tuple((n, 1) for n in range(9)))
    for number, end in ((8, "7 12.5%"), (9, "7 11.1%, and 1 more")):
        some = Statistics(categories[:number], (replace(facts, classes=facts.classes[:number]),),
                          "pictures")  # fmt: skip
        assert some.lines()[1].endswith(end)
    assert left_out_lines("abcde") == ["a", "b", "c", "d", "e"]
    assert left_out_lines("abcdefg") == ["a", "b", "c", "d", "e", "and 2 more"]
