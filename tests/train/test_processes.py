"""Two processes train as one does."""

import ast
import re
import signal
import time

import pytest
import torch
from PIL import Image

from helpers.processes import finished, started
from helpers.training import TINY, crops, write_folder
from pointformer.train.checkpoints import list_checkpoints, read_checkpoint

MASKS = ["options.queries=12", "options.dim=64", "options.hidden=64", "options.decoder_layers=1",
         "options.pixel_hidden=64", "options.pixel_layers=1", "loss.points=128"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("nuclei"), val=3)


def trained(world, folder, out, *changes, task="instance"):
    found = finished(started(world, "train", TINY, folder, "--task", task, "--out", out,
                             "freeze_batch_norm=true", "average=0.9", "batch=4", "log_every=1",
                             "options.drop_path=0.3", "validation.times=0", *changes))  # fmt: skip
    assert [code for _, _, code in found] == [0] * world, found
    return found


def table(path):
    lines = [line.split(",") for line in path.read_text().splitlines()]
    skipped = ("seconds", "images_per_second", "loaded_per_second", "waiting")
    kept = [i for i, name in enumerate(lines[0]) if name not in skipped]
    return [[float(line[i]) for i in kept] for line in lines[1:]]


def tensors(value):
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def assert_alike(one, two):
    """Curves, scores and all that a run continues from."""
    for first, second in zip(table(one / "log.csv"), table(two / "log.csv"), strict=True):
        assert second == pytest.approx(first, rel=1e-5, abs=1e-6)
    first, second = (table(out / "scores.csv")[-1] for out in (one, two))
    assert second == pytest.approx(first, rel=1e-3, abs=1e-3, nan_ok=True)
    states = [read_checkpoint(list_checkpoints(out / "checkpoints")[0]) for out in (one, two)]
    for name in ("model", "average", "optimizer"):
        pairs = zip(*(tensors(state[name]) for state in states), strict=True)
        for first, second in pairs:
            torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)


def test_two_processes_train_as_one(folder, tmp_path):
    """Also in parts of batches; and a run continues with another number of processes."""
    steps = ["accumulate=2", "schedule.kind=constant", "schedule.warmup=0"]
    trained(1, folder, tmp_path / "one", "budget.steps=4", *steps)
    trained(1, folder, tmp_path / "two", "budget.steps=2", *steps)
    found = trained(2, folder, tmp_path / "two", "budget.steps=4", *steps)
    assert found[1][:2] == ("", "")  # one of them speaks
    assert "the model is in" in found[0][0]
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
def test_a_run_goes_on_with_sharded_parameters_and_without(folder, tmp_path):
    same = ["schedule.kind=constant", "schedule.warmup=0", "options.impl=reference"]
    trained(1, folder, tmp_path / "one", "budget.steps=6", *same)
    for steps, strategy in ((2, "ddp"), (4, "fsdp"), (6, "ddp")):
        budget = f"budget.steps={steps}"
        trained(2, folder, tmp_path / "two", budget, f"strategy={strategy}", *same)
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Pictures of two classes."""
    folder = tmp_path_factory.mktemp("kinds")
    for split, count in (("train", 6), ("val", 2)):
        for number, (picture, ids) in enumerate(crops(count, 48)):
            path = folder / split / ("many" if ids.max() > 20 else "few") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
            path = folder / split / ("few" if ids.max() > 20 else "many") / f"{number}t.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[::-1]).save(path)
    return folder


@pytest.mark.long
def test_mixtures_are_those_of_the_whole_batch(kinds, tmp_path):
    changes = ["augmentation.mix.mixup=0.8", "augmentation.mix.cutmix=1.0", "accumulate=1"]
    for world, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        trained(world, kinds, out, "budget.steps=4", *changes, task="classification")
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
def test_pictures_of_any_size_are_shared(tmp_path):
    """Without crops a batch is a list, whose pictures differ from process to process."""
    folder = write_folder(tmp_path / "data", train=8, val=3)
    for number in range(8):
        for kind in ("images", "instances"):
            path = folder / f"train/{kind}/{number}.png"
            whole = Image.open(path)
            whole.crop((0, 0, 30 + 4 * number, 64 - 3 * number)).save(path)
    for world, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        trained(world, folder, out, "budget.steps=4", "augmentation.crop=null")
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("semantic", ["rates={least: 0.1, most: 0.9, merges: apart}"]),
        ("instance", ["head=mask2former", *MASKS]),
    ],
)
def test_each_loss_is_that_of_the_whole_batch(folder, tmp_path, task, changes):
    for world, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        trained(world, folder, out, "budget.steps=4", *changes, task=task)
    assert_alike(tmp_path / "one", tmp_path / "two")


NAN = """
import os
from pointformer.train.trainer import Trainer
step, loss = Trainer.step, Trainer._loss
def told(self, batch):
    if self.steps == 2 and os.environ["RANK"] == "1":
        print(batch.names, flush=True)
    step(self, batch)
def bad(self, *arguments):
    wrong = self.steps == 2 and os.environ["RANK"] == "1"
    factor = float("nan") if wrong else 1
    return {name: term * factor for name, term in loss(self, *arguments).items()}
Trainer.step, Trainer._loss = told, bad
"""


def test_a_loss_that_is_not_finite_in_one_process_ends_all(folder, tmp_path):
    """One says it, with the pictures of that batch, and a checkpoint from before is there."""
    out = tmp_path / "run"
    command = ["train", TINY, folder, "--task", "instance", "--out", out, "budget.steps=9",
               "batch=4", "checkpoints.steps=1", "validation.times=0"]  # fmt: skip
    (_, first, code), (names, second, other) = finished(started(2, *command, before=NAN))
    assert (code, other) == (1, 1)
    assert second == ""
    (error,) = [line for line in first.splitlines() if line.startswith("pointformer: error")]
    named = re.fullmatch(
        r"pointformer: error: the loss is nan at step 2, with ([\d, ]+); a lower "
            r"optimizer\.learning_rate may help; "
        r"(step-0000000[12]-\w+\.pt) is from before", error
    )  # fmt: skip
    assert ast.literal_eval(names) == named[1].split(", ")
    assert read_checkpoint(out / "checkpoints" / named[2])["steps"] in (1, 2)


BROKEN = """
import os
from pointformer.data import Annotation
read, count = Annotation.read_image, 0
def bad(self, **reading):
    global count
    count += os.environ["RANK"] == "1"
    if count == 6:
        raise ValueError(f"{self.image}: expected a picture, but this one is broken")
    return read(self, **reading)
Annotation.read_image = bad
"""


@pytest.mark.long
def test_a_picture_that_breaks_in_one_process_ends_all(folder, tmp_path):
    """That one says which; the other does not wait, and the run can go on."""
    out = tmp_path / "run"
    command = ["train", TINY, folder, "--task", "instance", "--out", out, "budget.steps=9",
               "batch=4", "checkpoints.steps=1", "validation.times=0"]  # fmt: skip
    (_, first, code), (_, second, other) = finished(started(2, *command, before=BROKEN))
    assert (code, other) == (1, 1)
    assert re.search(r"\.png: expected a picture, but this one is broken.* is from before", second)
    assert "broken" not in first
    assert first.splitlines()[-1].startswith("pointformer: error: process 0 of 2: lost the connect")
    assert list_checkpoints(out / "checkpoints")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_that_ends_ends_all(folder, tmp_path, number):
    """Told to end, all save first; killed, the others say so, and the run goes on from before."""
    out = tmp_path / "run"
    command = ["train", TINY, folder, "--task", "instance", "--out", out, "budget.steps=100000",
               "validation.times=0", "log_every=1", "checkpoints.steps=1"]  # fmt: skip
    processes = started(2, *command)
    while len(list_checkpoints(out / "checkpoints")) < 2 and processes[0].poll() is None:
        time.sleep(0.2)
    processes[1].send_signal(number)
    (first, said, code), (_, _, other) = finished(processes)
    if number == signal.SIGTERM:
        assert "told to end at step" in first
        assert said.endswith("pointformer: interrupted\n")
        assert (code, other) == (130, 143)
    else:
        assert code == 1
        assert said.splitlines()[-1] == (
            "pointformer: error: process 0 of 2: lost the connection to another one, which ended; "
            "the same command goes on"
        )
    assert read_checkpoint(list_checkpoints(out / "checkpoints")[0])["steps"] > 0
