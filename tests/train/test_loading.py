"""Batches: their order, random numbers, workers and errors."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from helpers.scenes import save
from pointformer.data import Annotation, read_folder
from pointformer.train import loading
from pointformer.train.loading import Batches


@pytest.fixture
def dataset(tmp_path):
    """Seven pictures of one gray value each, with an object of as many pixels."""
    for n in range(7):
        ids = np.zeros((8, 10), np.uint8)
        ids.ravel()[: n + 1] = 1
        save(tmp_path / f"train/images/{n}.png", np.full((8, 10), 10 * n, np.uint8))
        save(tmp_path / f"train/instances/{n}.png", ids)
    return read_folder(tmp_path, "train", "instance")


def noisy(image, annotation, rng):
    """The first two pixels tell the generator's numbers."""
    image = image.copy()
    image[0, :2] = rng.integers(0, 256, (2, 3))
    return image, annotation


def first(batches, number, start=0):
    return list(itertools.islice(batches.steps(start), number))


def same(one, other):
    assert one.names == other.names
    torch.testing.assert_close(one.images, other.images, rtol=0, atol=0)
    for left, right in zip(one.annotations, other.annotations, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)


def test_a_batch_has_pictures_beside_their_annotations(dataset):
    (batch,) = first(Batches(dataset, batch=3, seed=0), 1)
    assert batch.images.shape == (3, 3, 8, 10)
    assert batch.images.dtype == torch.uint8
    for image, annotation, name in zip(*batch[:3], strict=True):
        assert annotation.name == name
        assert image.unique().tolist() == [10 * int(name)]
        assert annotation.segments[0].area == int(name) + 1


def test_a_pass_has_each_picture_once_and_passes_differ(dataset):
    batches = Batches(dataset, batch=2, seed=3)
    names = list(itertools.chain(*(batch.names for batch in first(batches, 7))))
    assert sorted(names[:7]) == sorted(names[7:]) == [str(n) for n in range(7)]
    assert names[:7] != names[7:]
    assert batches.indices(1).tolist() == [int(name) for name in names[7:]]
    assert batches.indices(0).tolist() != Batches(dataset, batch=2, seed=4).indices(0).tolist()


def test_a_step_depends_on_the_seed_and_its_number_only(dataset):
    whole = first(Batches(dataset, noisy, batch=4, seed=1), 6)
    for start in (1, 4):
        for left, right in zip(
            whole[start:], first(Batches(dataset, noisy, batch=4, seed=1), 6 - start, start),
            strict=True,
        ):  # fmt: skip
            same(left, right)
    pixels = torch.cat([batch.images[:, :, 0, 0] for batch in whole])
    assert len(pixels.unique(dim=0)) == len(pixels)  # no two samples have the same numbers
    (other,) = first(Batches(dataset, noisy, batch=4, seed=2), 1)
    assert not torch.equal(other.images, whole[0].images)


def test_workers_change_nothing(dataset):
    alone = first(Batches(dataset, noisy, batch=4, seed=1), 3, 2)
    for left, right in zip(
        alone, first(Batches(dataset, noisy, batch=4, seed=1, workers=2), 3, 2), strict=True
    ):
        same(left, right)


def test_a_thread_loads_a_little_ahead(dataset):
    seen, learned = [], threading.Event()

    def noted(image, annotation, rng):
        seen.append(threading.current_thread())
        if len(seen) > 2:  # the second batch
            learned.wait(10)
        return image, annotation

    steps = Batches(dataset, noted, batch=2, seed=0).steps()
    batch = next(steps)
    assert batch.seconds > 0
    while len(seen) < 3:  # the next batch is begun without being asked for
        time.sleep(0.001)
    learned.set()
    while len(seen) < 6:
        time.sleep(0.001)
    assert threading.current_thread() not in seen
    time.sleep(0.05)
    assert len(seen) == 6  # two are ready, and no more
    steps.close()
    assert not seen[0].is_alive()


def test_closing_waits_for_the_batch_that_is_being_loaded(dataset, monkeypatch):
    """A thread inside torch when Python ends would abort the process; one that hangs is left."""
    begun, hang, threads = threading.Event(), threading.Event(), []

    def slow(image, annotation, rng):
        threads.append(threading.current_thread())
        if len(threads) == 2:
            begun.set()
            hang.wait(0.2)
        return image, annotation

    steps = Batches(dataset, slow, batch=1, seed=0).steps()
    next(steps)
    assert begun.wait(10)
    steps.close()
    assert not threads[0].is_alive()
    monkeypatch.setattr(loading, "_PATIENCE", 0.01)
    monkeypatch.setattr(hang, "wait", lambda _: threading.Event().wait(1))
    threads.clear()
    begun.clear()
    steps = Batches(dataset, slow, batch=1, seed=0).steps()
    next(steps)
    assert begun.wait(10)
    steps.close()
    assert threads[0].is_alive()


def test_processes_together_see_what_one_sees(dataset):
    (one,) = first(Batches(dataset, noisy, batch=6, seed=1), 1, 3)
    parts = [
        first(Batches(dataset, noisy, batch=6, seed=1, rank=rank, world=3), 1, 3)[0]
        for rank in range(3)
    ]
    assert [name for part in parts for name in part.names] == one.names
    assert torch.equal(torch.cat([part.images for part in parts]), one.images)


def test_each_part_of_a_batch_is_split_over_the_processes(dataset):
    """What is worked through at a time is, over all processes, what one works through."""
    (one,) = first(Batches(dataset, noisy, batch=8, seed=1, accumulate=2), 1, 3)
    parts = [
        first(Batches(dataset, noisy, batch=8, seed=1, rank=rank, world=2, accumulate=2), 1, 3)[0]
        for rank in range(2)
    ]
    for half in range(2):
        names = [name for part in parts for name in part.names[2 * half : 2 * half + 2]]
        assert names == one.names[4 * half : 4 * half + 4]
    with pytest.raises(ValueError, match="multiple of the 2 processes, times 3 parts of a batch"):
        Batches(dataset, batch=8, seed=1, world=2, accumulate=3)


def test_weights_decide_how_often(dataset):
    batches = Batches(dataset, batch=7, seed=0, weights=[0, 0, 1, 0, 3, 0, 0])
    counts = np.bincount(np.concatenate([batches.indices(epoch) for epoch in range(200)]))
    assert set(np.flatnonzero(counts)) == {2, 4}
    assert 0.7 < counts[4] / counts.sum() < 0.8


def test_pictures_of_several_sizes_stay_apart(dataset):
    def cropped(image, annotation, rng):
        height = int(annotation.name) % 2 + 3
        return image[:height], Annotation.of_objects(annotation.ids[:height])

    (batch,) = first(Batches(dataset, cropped, batch=7, seed=0), 1)
    assert isinstance(batch.images, list)
    for image, annotation, name in zip(*batch[:3], strict=True):
        assert image.shape[1:] == annotation.ids.shape == (int(name) % 2 + 3, 10)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_named_in_one_line(dataset, workers):
    broken = dataset.entries[5].image
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"^{broken}: expected a picture") as error:
        first(Batches(dataset, batch=7, seed=0, workers=workers), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch: expected a positive multiple of the 1 processes, got 0"),
        ({"batch": 5, "world": 2}, "batch: expected a positive multiple of the 2 processes, got 5"),
        ({"batch": 2, "rank": 2, "world": 2}, "rank: expected 0 to 1, got 2"),
        ({"batch": 2, "workers": -1}, "workers: expected at least 0, got -1"),
        ({"batch": 2, "weights": [1, 2]}, "weights: expected 7 numbers"),
        ({"batch": 2, "weights": [0] * 7}, "weights: expected 7 numbers"),
        ({"batch": 2, "weights": [float("nan")] * 7}, "weights: expected 7 numbers"),
        ({"batch": 2, "weights": [-1, *[1] * 6]}, "weights: expected 7 numbers"),
    ],
)
def test_wrong_arguments(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        Batches(dataset, seed=0, **options)


def test_weighted_samples_are_in_random_order(dataset):
    order = Batches(dataset, batch=7, seed=0, weights=[1] * 7).indices(0).tolist()
    assert order != sorted(order)
