"""Training steps that wait for their pictures: how fast these are loaded beside how fast they are
learned, with recipes of the package, and no worker processes.
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pointformer.annotations import Category
from pointformer.data import Annotation, Dataset
from pointformer.data.annotations import Entry
from pointformer.data.classes import read_class
from pointformer.tasks import task_of
from pointformer.train.initial import make_model
from pointformer.train.loading import Batches
from pointformer.train.recipe import read_recipe
from pointformer.train.trainer import Trainer

DOCS = Path(__file__).parents[1] / "docs"
PICTURES, STEPS = 16, 6


def photographs(folder):
    """Of the size of ImageNet's, with much detail, in two classes."""
    rng, entries = np.random.default_rng(0), []
    for n in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8))
        path = folder / f"{n}.jpg"
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)
        entries.append(
            Entry(str(n), path, None, lambda n=n, p=path: read_class(str(n), p, n % 2), n % 2)
        )
    return Dataset(folder, [Category(0, "even"), Category(1, "odd")], entries)


def nuclei(folder):
    """The example, with objects of its size."""
    path, size = DOCS / "nuclei.png", Image.open(DOCS / "nuclei.png").size[::-1]
    rows, columns = np.indices(size) // 24
    middle = ((np.indices(size) % 24 - 12) ** 2).sum(0) < 80
    ids = np.where(middle, 1 + rows * (columns.max() + 1) + columns, 0).astype(np.int32)
    entries = [
        Entry(str(n), path, None, lambda n=n: Annotation.of_objects(ids, str(n), path))
        for n in range(PICTURES)
    ]
    return Dataset(folder, [Category(1, "nucleus")], entries)


@pytest.mark.parametrize(
    ("recipe", "make"), [("imagenet_mini.yaml", photographs), ("nuclei.yaml", nuclei)]
)
def test_waiting(recipe, make, tmp_path, benchmark, capsys):
    chosen = replace(read_recipe(recipe), batch=8)
    dataset = make(tmp_path)
    model = make_model(chosen, dataset.categories)
    trainer = Trainer(chosen, model, task_of(model), PICTURES)
    batches = Batches(dataset, chosen.augmentation.transform(), batch=chosen.batch, seed=0)
    waited = loading = seconds = 0.0

    def run():
        nonlocal waited, loading, seconds
        steps = batches.steps(trainer.steps)
        trainer.step(next(steps))  # the first batch has nothing to be loaded beside
        trainer.check()
        begin = time.perf_counter()
        for _ in range(STEPS):
            start = time.perf_counter()
            batch = next(steps)
            waited += time.perf_counter() - start
            loading += batch.seconds
            trainer.step(batch)
        trainer.check()
        seconds = time.perf_counter() - begin
        steps.close()

    def forget():
        nonlocal waited, loading
        waited = loading = 0.0

    benchmark.pedantic(run, setup=forget, rounds=1, warmup_rounds=1)
    pictures, learning = STEPS * chosen.batch, seconds - waited
    found = {
        "learned per second": pictures / learning,
        "loaded per second": pictures / loading,
        "share of waiting": waited / seconds,
        "share of loading, if it were in turn": loading / (loading + learning),
    }
    benchmark.extra_info.update(found)
    with capsys.disabled():
        print(f"\n{recipe}: {', '.join(f'{name} {value:.3g}' for name, value in found.items())}")
