"""Cityscapes: what is read, what is written, and what is wrong with files."""

import shutil

import numpy as np
import pytest

from helpers import scenes
from helpers.scenes import error_of
from pointformer import data
from pointformer.data import VOID


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
        written = data.Objects(objects.masks, objects.classes, scores, objects.size)
        data.write_cityscapes_objects(tmp_path / "out", annotation.name, written, table)
        read = data.read_cityscapes_objects(tmp_path / "out", annotation, table)
        np.testing.assert_array_equal(read.dense(), written.dense())
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
    assert len(read()) == 0  # a road is no object
    shutil.copy(text, out / "town_000000_000019_more.txt")
    assert "found town_000000_000019_more.txt and" in error_of(read)
