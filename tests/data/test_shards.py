"""Tar shards: what is in them, what is wrong with them, and that they are data sets as others."""

import gzip
import io
import itertools
import os
import pickle
import re
import shutil
import tarfile

import numpy as np
import pytest
import tifffile

from helpers.scenes import SIZE, encoded, pixels, rectangles, shard
from pointformer.data import find_source, open_dataset, open_splits
from pointformer.data import shards as module
from pointformer.data.shards import _braces_expanded, read_shards, shard_files
from pointformer.data.statistics import examine, without_bad
from pointformer.train.loading import Batches

JPG = encoded(pixels(), "jpg")


def classes(root, shards=3, samples=4, split="train"):
    for n in range(shards):
        files = {}
        for k in range(samples):
            number = n * samples + k
            files[f"{number:04d}.png"] = encoded(np.full((8, 10, 3), number, np.uint8))
            files[f"{number:04d}.cls"] = number % 3
        shard(root / f"{split}-{n:04d}.tar", files)
    return root


def opened(path, task="classification", **options):
    return open_dataset(path, task=task, **options)


def test_samples_are_read_where_they_lie(tmp_path):
    dataset = opened(classes(tmp_path) / "train-{0000..0002}.tar")
    assert len(dataset) == 12
    assert [category.name for category in dataset.categories] == ["0", "1", "2"]
    for number in (11, 0, 5):
        annotation = dataset[number]
        assert annotation.name == f"train-{number // 4:04d}/{number:04d}"
        assert annotation.label == dataset.entries[number].label == number % 3
        assert (annotation.read_image() == number).all()
    again = pickle.loads(pickle.dumps(dataset))
    assert (again[7].read_image() == 7).all()


def test_batches_can_begin_anywhere_and_be_divided(tmp_path):
    dataset = opened(classes(tmp_path), split="train")

    def names(start=0, **options):
        batches = Batches(dataset, batch=4, seed=3, **options)
        return [b.names for b in itertools.islice(batches.steps(start), 6 - start)]

    whole = names()
    assert names(4) == whole[4:]
    parts = [names(rank=rank, world=2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


LABELS = {
    "number": ({"cls": 2}, 2),
    "line": ({"cls": "2\n"}, 2),
    "name": ({"cls": "dog"}, "dog"),
    "json": ({"json": '{"label": 2, "width": 7}'}, 2),
    "json name": ({"json": '{"key": 1, "class_name": "dog"}'}, "dog"),
    "json alone": ({"cls.json": "2"}, 2),
    "both": ({"json": '{"label": 1}', "cls": 2}, 2),
    "other json": ({"json": '{"caption": "a dog"}', "cls": 2}, 2),
    "caption": ({"txt": "a dog\nin a park", "cls": 2}, 2),
    "text": ({"txt": "dog"}, "dog"),
    "upper case": ({"CLS": 2}, 2),
    "of an index": ({"__index__": 0, "cls": 2}, 2),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(tmp_path, name):
    parts, label = LABELS[name]
    files = {"a.jpg": JPG} | {f"a.{kind}": content for kind, content in parts.items()}
    path = shard(tmp_path / "x.tar", files)
    (dataset,) = (opened(path),)
    category = dataset.categories[dataset[0].label]
    assert label in (category.id, category.name)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["./s/a.jpg", "./s/a.cls", "./s/b.jpg", "./s/b.cls"], ["s/a", "s/b"]),
        (["/s.1/a.jpg", "/s.1/a.cls"], ["s.1/a"]),
        (["a.jpg", "b.jpg", "a.cls", "b.cls"], ["a", "b"]),  # all pictures first
        (["a.jpg", "a.cls", "._a.jpg", "__MACOSX/a.jpg", "Thumbs.db", "README.txt"], ["a"]),
        (["ä ö/ü.jpg", "ä ö/ü.cls"], ["ä ö/ü"]),
        (["x" * 150 + "/a.jpg", "x" * 150 + "/a.cls"], ["x" * 150 + "/a"]),
    ],
)
def test_names_of_samples(tmp_path, files, names):
    contents = [(name, JPG if name.endswith("jpg") else 1) for name in files]
    dataset = opened(shard(tmp_path / "x.tar", contents))
    assert [entry.name for entry in dataset.entries] == [f"x/{name}" for name in names]
    assert all(annotation.read_image().shape == (12, 16, 3) for annotation in dataset)


def test_links_and_formats_of_tar_files(tmp_path):
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as archive:
            archive.addfile(_info("s", type=tarfile.DIRTYPE))
            archive.addfile(_info("s/a.jpg", len(JPG)), io.BytesIO(JPG))
            archive.addfile(_info("s/a.cls", 1), io.BytesIO(b"0"))
            archive.addfile(_info("s/b.jpg", type=tarfile.LNKTYPE, linkname="s/a.jpg"))
            archive.addfile(_info("s/b.cls", 1), io.BytesIO(b"1"))
            archive.addfile(_info("s/c.jpg", type=tarfile.SYMTYPE, linkname="../s/a.jpg"))
            archive.addfile(_info("s/c.cls", 1), io.BytesIO(b"1"))
        dataset = opened(path)
        assert [annotation.label for annotation in dataset] == [0, 1, 1]
        first, *others = (annotation.read_image() for annotation in dataset)
        assert all((first == other).all() for other in others)


def _info(name, size=0, **fields):
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def test_which_files_a_path_stands_for(tmp_path):
    names = ["a-00.tar", "a-01.tar", "b/c.tar", "b/d.TAR", ".hidden.tar", "b/e.tar.part", "f.txt"]
    for name in names:
        shard(tmp_path / name, {})

    def found(path):
        return [str(file.relative_to(tmp_path)) for file in shard_files(tmp_path / path)]

    assert found("") == ["a-00.tar", "a-01.tar", "b/c.tar", "b/d.TAR"]
    assert found("a-01.tar") == ["a-01.tar"]
    assert found("f.txt") == []
    assert found("a-*.tar") == ["a-00.tar", "a-01.tar"]
    assert found("**/*.tar") == ["a-00.tar", "a-01.tar", "b/c.tar"]
    assert found("a-{00..02}.tar") == ["a-00.tar", "a-01.tar", "a-02.tar"]
    assert found("{a-{8..10},b/[cd]}.tar") == ["a-10.tar", "a-8.tar", "a-9.tar", "b/c.tar"]
    assert found("{a-{01..00},a-01}.tar") == ["a-00.tar", "a-01.tar"]
    with pytest.raises(ValueError, match="more than 1,000,000 names"):
        found("{0..10000000}.tar")


def test_splits_are_told_by_folders_or_names(tmp_path):
    classes(tmp_path / "folders" / "train")
    classes(tmp_path / "folders" / "validation", 1, split="part")
    for root in (tmp_path / "folders", classes(classes(tmp_path / "names"), 1, split="in1k-val")):
        training, validation = open_splits(root, task="classification")
        assert (len(training), len(validation)) == (12, 4)
        assert training.categories == validation.categories
    both = tmp_path / "names" / "{train,in1k-val}-{0000..0000}.tar"
    assert find_source(both).splits == ("train", "val")
    assert find_source(tmp_path / "names" / "train-*.tar").splits == ("",)


def test_classes_are_those_of_all_splits_or_listed(tmp_path):
    shard(tmp_path / "train.tar", {"a.jpg": JPG, "a.cls": 7, "b.jpg": JPG, "b.cls": 3})
    shard(tmp_path / "val.tar", {"a.jpg": JPG, "a.cls": 5})
    assert [c.id for c in opened(tmp_path).categories] == [3, 5, 7]
    assert opened(tmp_path)[0].label == 1
    (tmp_path / "classes.txt").write_text("\n".join(f"c{n}" for n in range(8)))
    for path in (tmp_path, tmp_path / "val.tar"):
        assert opened(path)[0].label == 5
        assert opened(path).categories[5].name == "c5"
    with pytest.raises(
        ValueError, match=r"val.tar: 'a' has a class .*: label 5 is none of the 2 classes \(0 x, 1"
    ):
        opened(tmp_path / "val.tar", categories=["x", "y"])


def test_numbers_and_names_cannot_both_be_labels(tmp_path):
    path = shard(tmp_path / "x.tar", {"a.jpg": JPG, "a.cls": 1, "b.jpg": JPG, "b.cls": "dog"})
    with pytest.raises(ValueError, match=r"x.tar: expected labels that are all .* got 1 and 'dog'"):
        opened(path)


MAPS = {
    "named": ("jpg", "seg.png", "semantic"),
    "beside": ("jpg", "png", "semantic"),
    "both named": ("image.png", "mask.png", "semantic"),
    "picture named": ("image.png", "png", "semantic"),
    "objects": ("tif", "instances.png", "instance"),
    "objects beside": ("jpg", "png", "instance"),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps(tmp_path, name):
    picture, label, task = MAPS[name]
    values = rectangles([1, 2])
    image = pixels(size=SIZE)
    content = io.BytesIO()
    tifffile.imwrite(content, image)
    shown = content.getvalue() if picture == "tif" else encoded(image, picture.split(".")[-1])
    path = shard(tmp_path / "x.tar", {f"a.{picture}": shown, f"a.{label}": encoded(
        values.astype(np.uint8))})  # fmt: skip
    (annotation,) = opened(path, task)
    found = annotation.classes() if task == "semantic" else annotation.ids
    np.testing.assert_array_equal(found, values)
    if picture != "jpg":
        np.testing.assert_array_equal(annotation.read_image(), image)
    if task == "instance":
        assert [segment.category for segment in annotation.segments] == [0, 0]


def test_objects_of_several_classes(tmp_path):
    files = {
        "a.jpg": encoded(pixels(size=SIZE), "jpg"),
        "a.instances.png": encoded(rectangles([1, 2]).astype(np.uint8)),
        "a.json": '{"segments": [{"id": 1, "class": 0}, {"id": 2, "class": 1, "crowd": 1}]}',
    }
    path = shard(tmp_path / "x.tar", files)
    (annotation,) = opened(path, "instance", categories=["cell", "group"])
    assert [(s.category, s.crowd) for s in annotation.segments] == [(0, False), (1, True)]
    path = shard(tmp_path / "y.tar", files | {"a.json": '{"segments": [{"id": 1, "class": 0}]}'})
    with pytest.raises(ValueError, match=r"y.tar/a.instances.png: ids 2 are not in a.json"):
        opened(path, "instance", categories=["cell", "group"])[0]


def whole(**more):
    return {"a.jpg": JPG, "a.cls": 0, "b.jpg": JPG, "b.cls": 1} | more


def cut(path, keep=None, at=None):
    content = path.read_bytes()
    path.write_bytes(
        content[:keep] if at is None else content[:at] + b"\xff" * 40 + content[at + 40 :]
    )


def gzipped(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


def joined(path):
    path.write_bytes(path.read_bytes() * 2)


AFTER_A = 512 + -(-len(JPG) // 512) * 512 + 1024

FAULTS = {
    "compressed": (whole(), gzipped, "x.tar: is compressed (gzip); shards are read at"),
    "no tar": (whole(), lambda p: p.write_bytes(JPG), "x.tar: expected a tar file: "),
    "empty": (whole(), lambda p: p.write_bytes(b""), "x.tar: expected a tar file: empty"),
    "cut in a file": (whole(), lambda p: cut(p, 512 + 300), "x.tar: is cut off or damaged after"),
    "cut between files": (whole(), lambda p: cut(p, AFTER_A), "x.tar: is cut off: a tar file ends"),
    "damaged": (whole(), lambda p: cut(p, at=2560), "x.tar: holds more after its end at byte"),
    "joined": (whole(), joined, "were joined without tar --concatenate"),
    "gone": (whole(), lambda p: p.unlink(), "x.tar: expected a shard, but there is no such file"),
    "second file": ([*whole().items(), ("a.jpg", JPG)], None, "'a' has a second file 'a.jpg'"),
    "no picture": (whole(**{"c.cls": 0}), None, "x.tar: 'c' has no picture"),
    "no label": (whole(**{"c.jpg": JPG}), None, "x.tar: 'c' has no class, as a number"),
    "negative": (whole(**{"c.jpg": JPG, "c.cls": -1}), None, "x.tar: 'c' has no class"),
    "empty label": (whole(**{"c.jpg": JPG, "c.cls": ""}), None, "x.tar: 'c' has no class"),
    "pickled": (whole(**{"c.jpg": JPG, "c.cls": pickle.dumps(3)}), None, "'c.cls' expected the"),
    "list": (whole(**{"c.jpg": JPG, "c.cls.json": "[1, 2]"}), None, "expected the number"),
    "bad JSON": (whole(**{"c.jpg": JPG, "c.json": "{"}), None, "'c.json' expected the number"),
    "two pictures": (whole(**{"c.1.jpg": JPG, "c.2.jpg": JPG, "c.1.cls": 0}), None,
                     "'c' has two files that may be its picture, .1.jpg and .2.jpg (names of"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_a_line_and_can_be_left_out(tmp_path, fault):
    files, harm, message = FAULTS[fault]
    classes(tmp_path, 1, 6, split="good")
    path = shard(tmp_path / "x.tar", files)
    if harm is not None:
        harm(path)
    pattern = tmp_path / "{good-0000,x}.tar"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        opened(pattern)
    assert "\n" not in str(caught.value)
    kept = opened(pattern, skip_bad=True)
    assert any(message in problem for problem in kept.skipped.values())
    names = {entry.name for entry in kept.entries}
    assert {f"good-0000/{n:04d}" for n in range(6)} <= names
    assert len(list(kept)) == len(kept)  # what is left is whole
    for annotation in kept:
        annotation.read_image()


def test_members_that_cannot_be_read_in_place(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in "ab":
            archive.addfile(_info(f"{name}.jpg", len(JPG)), io.BytesIO(JPG))
            archive.addfile(_info(f"{name}.cls", 1), io.BytesIO(b"0"))
        archive.addfile(_info("c.jpg", type=tarfile.SYMTYPE, linkname="../../c.jpg"))
        archive.addfile(_info("c.cls", 1), io.BytesIO(b"0"))
        fields = {"major": "1", "minor": "0", "realsize": "9"}
        headers = {f"GNU.sparse.{name}": value for name, value in fields.items()}
        sparse = _info("d.jpg", len(JPG), pax_headers=headers)
        archive.addfile(sparse, io.BytesIO(b"1\n0\n9\n" + bytes(len(JPG))))
        archive.addfile(_info("d.cls", 1), io.BytesIO(b"0"))
    kept = opened(path, skip_bad=True)
    assert len(kept) == 2
    assert [problem.split(": ", 1)[1] for problem in kept.skipped.values()] == [
        "'c' cannot be read: 'c.jpg' is a link to '../../c.jpg', which is not in the shard",
        "'d' cannot be read: 'd.jpg' is a sparse file; make the shard anew without --sparse",
    ]


def test_a_broken_picture_is_named_before_training(tmp_path):
    path = shard(
        tmp_path / "x.tar", whole(**{"c.jpg": JPG[:200], "c.cls": 0, "d.jpg": b"no", "d.cls": 1})
    )
    dataset = opened(path, skip_bad=True)
    found = examine(dataset, "pictures")
    assert list(found.problems) == ["x/c", "x/d"]
    assert all(f"x.tar/{n}.jpg: expected a picture, but" in found.problems[f"x/{n}"] for n in "cd")
    assert len(without_bad(dataset, found)) == 2


def test_what_is_there_for_no_sample(tmp_path):
    path = shard(
        tmp_path / "x.tar", {"a.jpg": JPG, "a.txt": "a dog " * 60, "b.jpg": JPG, "b.npy": b"1"}
    )
    with pytest.raises(
        ValueError, match=r"none of the 2 samples has a class.*\.jpg, \.npy, \.txt$"
    ):
        opened(path)
    with pytest.raises(ValueError, match=r"none of the 2 samples has a map of classes, such"):
        opened(path, "semantic")
    with pytest.raises(ValueError, match="expected annotated pictures, found none"):
        opened(shard(tmp_path / "y.tar", {}))
    with pytest.raises(ValueError, match="shards has nothing for the task 'panoptic'"):
        opened(path, "panoptic")


def test_what_is_known_of_a_shard_is_kept_until_it_changes(tmp_path, monkeypatch):
    path = classes(tmp_path, 1) / "train-0000.tar"
    first = opened(path)
    listed = []
    original = module._list_members
    monkeypatch.setattr(module, "_list_members", lambda *a: listed.append(1) or original(*a))
    assert [e.image for e in opened(path).entries] == [e.image for e in first.entries]
    assert not listed
    shard(path, whole())
    assert len(opened(path)) == 2
    assert listed == [1]
    for entry in (first.entries[0], first.entries[3]):
        with pytest.raises(
            ValueError, match=r"train-0000.tar: was changed after its pictures were"
        ):
            entry.read()
    path.unlink()
    with pytest.raises(ValueError, match=r"train-0000.tar: cannot be read: No such file"):
        first[0]


def test_a_cache_that_is_of_no_use_is_none(tmp_path, monkeypatch):
    path = classes(tmp_path, 1) / "train-0000.tar"
    for content in (b"", b"{}", b"[1, [2, 3], null, 7]", None):
        folder = tmp_path / "cache"
        monkeypatch.setenv("POINTFORMER_CACHE", str(folder))
        shutil.rmtree(folder, ignore_errors=True)
        if content is None:
            folder.write_bytes(b"a file in the way")
        else:
            opened(path)
            (kept,) = (folder / "shards").iterdir()
            kept.write_bytes(content)
        assert len(opened(path)) == 4


def test_read_shards_needs_a_known_task(tmp_path):
    classes(tmp_path, 1)
    with pytest.raises(
        ValueError, match="task: expected one of classification, semantic, instance, got"
    ):
        read_shards(shard_files(tmp_path), "panoptic")
    assert os.listdir(tmp_path) == ["train-0000.tar"]  # nothing is written beside them


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("{8..010}", ["008", "009", "010"]), ("{08..10}", ["08", "09", "10"]),
     ("{9..11}", ["9", "10", "11"]), ("{0..10}", [str(n) for n in range(11)])],
)  # fmt: skip
def test_braces_are_those_of_a_shell(pattern, names):
    assert _braces_expanded(pattern) == names
