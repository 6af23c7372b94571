"""Batches of a data set for training, in an order that only the seed and the step decide."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pointformer import TokenSet
from pointformer.data import Annotation, Dataset, Reading
from pointformer.data.point_sets import read_sample
from pointformer.data.transforms import Transform
from pointformer.train.ending import left_to_parent

_ORDER, _SAMPLE = 0, 1  # what random numbers are for
_WORKERS_AHEAD, _AHEAD = 4, 2  # batches that each worker, or the thread, has ready
_PATIENCE = 10.0  # seconds, at the end


class Batch(NamedTuple):
    """The part of a step's batch that one process has.

    Attributes:
        images: (B, 3, H, W) uint8, or B of (3, H, W) where sizes differ, or B point sets.
        annotations: B, of the images.
        names: of the pictures in the data set.
        seconds: that one worker took to load it.
    """

    images: Tensor | list[Tensor] | list[TokenSet]
    annotations: list[Annotation]
    names: list[str]
    seconds: float


class Batches:
    """Pictures of a data set, drawn and changed at random, in batches without an end.

    The stream of samples goes through the data set again and again, each time in another order. The
    order is a function of the seed, and a sample's random numbers are one of the seed and its
    place in the stream. So a resumed run needs no state but the number of its next step, and
    `world` processes together see what one would see.

    Args:
        dataset: what to draw from.
        transform: called with a picture (H, W, 3) uint8, its annotation and a random generator of
            its own; `None`: pictures as they are.
        batch: samples of a step, over all processes.
        seed: of the order and of the transforms.
        workers: processes that load ahead; 0: a thread of this one does.
        pin: whether batches are in pinned memory, from which they are copied to a GPU while it
            works.
        rank, world: number of this process, and of all.
        accumulate: parts of a batch that are worked through one after the other; each is split over
            the processes.
        weights: how often a sample is drawn, relative to others: a pass then draws as many as there
            are with replacement. `None`: a pass has each sample once.
        reading: how pictures are read, see `pointformer.data.Reading`.

    Raises:
        ValueError: the batch cannot be split evenly over the processes, or the weights do not fit.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform | None = None,
        *,
        batch: int,
        seed: int,
        workers: int = 0,
        pin: bool = False,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        weights: Sequence[float] | np.ndarray | None = None,
        reading: Reading | None = None,
    ) -> None:
        if batch < 1 or batch % (world * accumulate):
            parts = f", times {accumulate} parts of a batch" if accumulate > 1 else ""
            raise ValueError(
                f"batch: expected a positive multiple of the {world} processes{parts}, got {batch}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1}, got {rank}")
        if workers < 0:
            raise ValueError(f"workers: expected at least 0, got {workers}")
        self.dataset, self.batch, self.seed = dataset, batch, seed
        self.workers, self.pin, self.rank, self.world = workers, pin, rank, world
        self.accumulate = accumulate
        self._samples = _Samples(dataset, transform, seed, reading or {})
        self._shares = None if weights is None else _shares(weights, len(dataset))

    def __len__(self) -> int:
        """Samples in a pass over the data set."""
        return len(self.dataset)

    def steps(self, start: int = 0) -> Generator[Batch, None, None]:
        """This process's part of batch `start`, `start + 1`, and so on without an end.

        Close it, or let go of it, to end its workers.

        Raises:
            ValueError: a picture or an annotation cannot be read; the message names it.
        """
        loader: DataLoader = DataLoader(
            self._samples,  # type: ignore[arg-type]
            batch_sampler=_Places(self, start),
            num_workers=self.workers,
            collate_fn=_collated,
            pin_memory=self.pin,
            prefetch_factor=_WORKERS_AHEAD if self.workers else None,
            worker_init_fn=left_to_parent,
        )
        with contextlib.ExitStack() as stack:
            batches: Iterator[Batch | _Failure] = iter(loader)
            if not self.workers:
                gpu = torch.cuda.current_device() if self.pin else None
                batches = stack.enter_context(contextlib.closing(_ahead(batches, gpu)))
            for loaded in batches:
                if isinstance(loaded, _Failure):
                    raise ValueError(loaded.message)
                yield loaded

    def indices(self, epoch: int) -> np.ndarray:
        """Numbers of the samples that a pass over the data set draws, in order; int64."""
        rng = _generator(self.seed, _ORDER, epoch)
        count = len(self.dataset)
        if self._shares is None:
            return rng.permutation(count)
        return rng.choice(count, count, p=self._shares)


class _Places:
    """For each step, the places in the stream and the samples there."""

    def __init__(self, batches: Batches, start: int) -> None:
        self.batches, self.start = batches, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self.batches
        part = batches.batch // batches.accumulate
        own = part // batches.world
        first = self.start * batches.batch
        epoch, order = -1, np.empty(0, np.int64)
        while True:
            places = []
            for start in range(first, first + batches.batch, part):
                start += batches.rank * own
                for place in range(start, start + own):
                    if place // len(batches) != epoch:
                        epoch = place // len(batches)
                        order = batches.indices(epoch)
                    places.append((place, int(order[place % len(batches)])))
            yield places
            first += batches.batch


class _Failure(NamedTuple):
    """An error that crosses processes as it was, in one line."""

    message: str


_Sample = tuple[np.ndarray | TokenSet, Annotation, str, float]


class _Samples:
    """Samples by their place in the stream, read and augmented; what workers index."""

    def __init__(
        self, dataset: Dataset, transform: Transform | None, seed: int, reading: Reading
    ) -> None:
        self.dataset, self.transform, self.seed, self.reading = dataset, transform, seed, reading

    def __getitem__(self, place: tuple[int, int]) -> _Sample | _Failure:
        position, index = place
        start = time.perf_counter()
        try:
            annotation = self.dataset[index]
            image: Any = read_sample(annotation, self.reading)
        except ValueError as error:
            return _Failure(str(error))
        if self.transform is not None:
            rng = _generator(self.seed, _SAMPLE, position)
            image, annotation = self.transform(image, annotation, rng)
        if not isinstance(image, TokenSet):
            image = np.moveaxis(image, 2, 0)
        return image, annotation, self.dataset.entries[index].name, time.perf_counter() - start


def _collated(samples: list[_Sample | _Failure]) -> Batch | _Failure:
    good = []
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
        good.append(sample)
    images, annotations, names, seconds = (list(column) for column in zip(*good, strict=True))
    pixels: Tensor | list[Tensor] | list[TokenSet]
    if isinstance(images[0], TokenSet):
        pixels = images
    elif len({image.shape for image in images}) == 1:
        pixels = torch.from_numpy(np.stack(images))  # on one thread, which torch's may not be
    else:
        pixels = [torch.from_numpy(np.ascontiguousarray(image)) for image in images]
    return Batch(pixels, annotations, names, sum(seconds))


def _ahead(
    batches: Iterator[Batch | _Failure], gpu: int | None
) -> Generator[Batch | _Failure, None, None]:
    """Batches of an iterator, fetched ahead by a thread.

    Closing waits for the batch that is being loaded, but not for long: a thread within torch when
    Python ends would abort the process.

    Args:
        gpu: that pinned memory is for.
    """
    ready: SimpleQueue[Batch | _Failure | Exception] = SimpleQueue()
    room, done = threading.Semaphore(_AHEAD), threading.Event()

    def load() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            while room.acquire() and not done.is_set():
                ready.put(next(batches))
        except Exception as error:
            ready.put(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        while True:
            batch = ready.get()
            room.release()
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        done.set()
        room.release()
        thread.join(_PATIENCE)


def _generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, number)))


def _shares(weights: Sequence[float] | np.ndarray, count: int) -> np.ndarray:
    values = np.asarray(weights, np.float64)
    total = float(values.sum()) if values.shape == (count,) else math.nan
    if not (np.isfinite(total) and total > 0 and values.min() >= 0):
        raise ValueError(
            f"weights: expected {count} numbers of at least 0 that are not all 0, "
            f"got {values.shape}"
        )
    return values / total
