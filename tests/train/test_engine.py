"""The training engine on small crops of real pictures, with tiny models."""

import contextlib
import copy
import csv
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from helpers.training import dataset_of, recipe_of, trainer_of, write_folder
from pointformer import cli, segment
from pointformer.annotations import Category
from pointformer.data import read_folder
from pointformer.data.statistics import PictureFacts, Statistics, examine
from pointformer.evaluation import evaluate
from pointformer.models import AFFConfig, Output, create_model, save_model
from pointformer.models.aff import AFF
from pointformer.models.config import CONFIGS
from pointformer.models.released import to_released
from pointformer.rates import Rates
from pointformer.tasks import task_of
from pointformer.train import run
from pointformer.train.checkpoints import list_checkpoints
from pointformer.train.ending import Ending, left_to_parent
from pointformer.train.initial import make_model
from pointformer.train.loading import Batches
from pointformer.train.logs import read_table
from pointformer.train.optimization import Budget
from pointformer.train.pictures import describe, object_diameter
from pointformer.train.recipe import read_recipe
from pointformer.train.report import write_report
from pointformer.train.run import train
from pointformer.train.trainer import Trainer

TIMES = (
    "seconds",
    "images_per_second",
    "loaded_per_second",
    "waiting",
)  # columns that differ from run to run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("nuclei"))


def silent(line):
    pass


def rows(path):
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{name: v for name, v in row.items() if name not in TIMES} for row in found]


def weights(out):
    return create_model(out / "model.safetensors").state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def killed_at_random(run, kills, seed):
    """Run in processes that are killed at random moments, so many times, then to the end."""
    rng = random.Random(seed)
    killed = 0
    while True:
        child = os.fork()
        if child == 0:
            tqdm.set_lock(threading.RLock())  # a shared one stays with who is killed
            try:
                run()
            except BaseException:
                os._exit(1)
            os._exit(0)
        if killed < kills:
            time.sleep(rng.uniform(0.05, 0.7))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return killed
        killed += 1


@pytest.fixture
def one_thread():
    """As forked processes have: torch's sums depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.long)])
def test_a_run_that_is_killed_at_random_equals_one_that_is_not(folder, tmp_path, kills):
    """Bit for bit, with drop path, drawn rates and the average; it writes checkpoints most of the
    time."""
    recipe = recipe_of(
        folder, "budget.steps=16", "average=0.9", "options.drop_path=0.3", "log_every=3",
        "rates={least: 0.1, most: 0.9}", "checkpoints.steps=1", "validation.times=1",
        "validation.pictures=1",
    )  # fmt: skip
    train(recipe, tmp_path / "whole", say=silent)
    killed_at_random(lambda: train(recipe, tmp_path / "killed", say=silent), kills, seed=kills)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    for name in ("log.csv", "scores.csv"):
        assert rows(tmp_path / "whole" / name) == rows(tmp_path / "killed" / name)
    assert len(rows(tmp_path / "whole/log.csv")) == 6
    left = [path.name for path in (tmp_path / "killed").rglob(".pointformer-*")]
    assert left == []


def test_rates_are_drawn_in_training_only(folder, tmp_path, monkeypatch):
    """Each step has its own, which depends on its number; scores are at the model's, and the file
    of the model knows the range."""
    drawn, scored = [], []
    forward = AFF.forward

    def recorded(self, images):
        (drawn if torch.is_grad_enabled() else scored).append(self.config.rates)
        return forward(self, images)

    monkeypatch.setattr(AFF, "forward", recorded)
    rates = {"least": 0.1, "most": 0.9, "merges": "first"}
    recipe = recipe_of(folder, "budget.steps=3", "accumulate=2", "average=0", "seed=5", rates=rates)
    train(recipe, tmp_path / "run", say=silent)
    assert drawn[::2] == drawn[1::2]  # of the parts of a batch
    assert len(set(drawn)) == 3
    assert all(0.1 <= rate[0] <= 0.9 and rate[1:] == (0.25,) * 2 for rate in drawn)
    assert set(scored) == {(0.25,) * 3}
    model = create_model(tmp_path / "run/model.safetensors")
    assert Rates.of(model) == Rates(**rates)
    assert model.config.rate == 0.25
    first, drawn[:] = list(drawn), []
    train(replace(recipe, workers=1), tmp_path / "again", say=silent)
    assert drawn == first
    narrow = {"dims": [16, 16], "depths": [1, 1], "heads": [2, 2]}
    for changes, message in (
        ({"options": {"rate": 0.05}}, "rates: expected a range with the model's own rate in it"),
        ({"model": "swin_mini", "options": narrow}, "swin_mini has no merges"),
    ):
        recipe = recipe_of(folder, "budget.steps=3", rates=rates, **changes)
        with pytest.raises(ValueError, match=message):
            train(recipe, tmp_path / "no")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_saves_what_it_did(folder, tmp_path, monkeypatch, number):
    """In the middle of a step; the score that is due then is made when it goes on."""
    recipe = recipe_of(folder, "budget.steps=6", "validation.times=2", "average=0.9")
    train(recipe, tmp_path / "whole", say=silent)
    plain = Trainer._loss

    def loss(self, images, annotations):
        if self.steps == 1:
            signal.raise_signal(number)
        return plain(self, images, annotations)

    monkeypatch.setattr(Trainer, "_loss", loss)
    lines = []
    kind = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(kind) as end:
        train(recipe, tmp_path / "ended", say=lines.append)
    assert kind is KeyboardInterrupt or end.value.code == 143
    assert lines[-1] == "told to end at step 2; the same command goes on"  # the step was finished
    assert [row["step"] for row in rows(tmp_path / "ended/scores.csv")] == []
    monkeypatch.undo()
    train(recipe, tmp_path / "ended", say=silent)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "ended"))
    scores = rows(tmp_path / "ended/scores.csv")
    assert scores == rows(tmp_path / "whole/scores.csv")
    assert [row["step"] for row in scores] == ["2", "4", "6"]


def test_a_run_that_had_more_than_the_budget_stays_as_it_is(folder, tmp_path):
    lines = []
    scores = train(recipe_of(folder, "budget.steps=3"), tmp_path / "run", say=silent)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = train(recipe_of(folder, "budget.steps=2"), tmp_path / "run", say=lines.append)
    np.testing.assert_equal(again, scores)
    assert lines[-1].startswith("nothing to train: 3 steps are done, which is all of this budget")
    assert {path: path.read_bytes() for path in before} == before
    train(recipe_of(folder, "budget.steps=4"), tmp_path / "run", say=lines.append)
    assert read_recipe(tmp_path / "run" / "recipe.yaml").budget.steps == 4


@pytest.mark.parametrize("place", ["first step", "batch", "validation"])
def test_a_run_that_is_told_to_end_does_not_wait(folder, tmp_path, monkeypatch, place):
    """For kernels that are compiled in the first step, for a batch, or for scores."""
    recipe = recipe_of(folder, "budget.steps=4", "validation.times=1", "average=0.9")
    train(recipe, tmp_path / "whole", say=silent)

    def hang(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    plain = Batches.steps

    def steps(self, start=0):
        for number, batch in enumerate(plain(self, start)):
            if number == 1:
                hang()
            yield batch

    if place == "batch":
        monkeypatch.setattr(Batches, "steps", steps)
    else:
        owner, name = {"first step": (Trainer, "_loss"), "validation": (run, "evaluate")}[place]
        monkeypatch.setattr(owner, name, hang)
    with pytest.raises(SystemExit) as end:
        train(recipe, tmp_path / "ended", say=silent)
    assert end.value.code == 143
    done = {"first step": 0, "batch": 1, "validation": 2}[place]
    newest = list_checkpoints(tmp_path / "ended/checkpoints")[0].name
    assert newest.startswith(f"step-{done:08d}-")
    monkeypatch.undo()
    train(recipe, tmp_path / "ended", say=silent)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "ended"))


ENDS = {signal.SIGINT: (KeyboardInterrupt, None), signal.SIGTERM: (SystemExit, 143)}


@contextlib.contextmanager
def ended_by(number):
    kind, code = ENDS[number]
    with pytest.raises(kind) as end:
        yield
    assert getattr(end.value, "code", None) == code


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_is_kept_and_the_second_ends(number):
    before = [signal.getsignal(n) for n in ENDS]
    ending = Ending()
    with ending.awaited():
        assert ending.told == 0
        signal.raise_signal(number)
        assert ending.told == number
        with ended_by(number):
            signal.raise_signal(number)
    assert [signal.getsignal(n) for n in ENDS] == before
    with ended_by(number):
        ending.end()


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_ends_at_once_where_nothing_is_lost(number):
    """Within and not after; also one that was kept before."""
    ending = Ending()
    with ending.awaited():
        with ended_by(number), ending.at_once():
            signal.raise_signal(number)
        with ended_by(number), ending.at_once():
            raise AssertionError("went on")
    ending = Ending()
    with ending.awaited():
        with ending.at_once():
            pass
        signal.raise_signal(number)
        assert ending.told == number


def test_signals_are_left_alone_in_other_threads():
    before, seen = [signal.getsignal(n) for n in ENDS], []

    def run():
        with Ending().awaited():
            seen.extend(signal.getsignal(n) for n in ENDS)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_workers_end_with_their_parent_or_when_told_twice():
    """Ctrl-C is for all processes of a terminal, and the first SIGTERM may be for all of a job."""

    def told(*numbers):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            left_to_parent(0)
            for number in numbers:
                os.kill(os.getpid(), number)
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert told(signal.SIGINT, signal.SIGINT, signal.SIGTERM) == 7
    assert told(signal.SIGTERM, signal.SIGTERM) == -signal.SIGTERM


def test_two_commands_do_not_train_in_one_folder(folder, tmp_path, monkeypatch):
    recipe = recipe_of(folder, "budget.steps=1", "validation.times=0")
    plain, errors = Trainer._loss, []

    def loss(self, images, annotations):
        with pytest.raises(ValueError, match="another command trains there") as error:
            train(recipe, tmp_path, say=silent)
        errors.append(error)
        return plain(self, images, annotations)

    monkeypatch.setattr(Trainer, "_loss", loss)
    train(recipe, tmp_path, say=silent)
    assert len(errors) == 1


def test_minutes_are_of_steps_without_compiling(folder, tmp_path, monkeypatch):
    """Nor loading kernels when the run goes on."""
    recipe = recipe_of(folder, "budget.steps=3", "validation.times=0", "log_every=1")
    plain, steps, now = Trainer._loss, [], [0.0]

    def loss(self, images, annotations):
        now[0] += 100 if not steps else 1
        steps.append(self.steps)
        return plain(self, images, annotations)

    monkeypatch.setattr(Trainer, "_loss", loss)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for most in (3, 6):
        steps.clear()
        train(replace(recipe, budget=Budget(steps=most)), tmp_path, say=silent)
    with (tmp_path / "log.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    assert [float(row["seconds"]) for row in log] == [0, 2, 3, 3, 5, 6]
    assert [float(row["images_per_second"]) for row in log] == [0.02, 2, 2, 0.02, 2, 2]


def test_other_pictures_are_another_run(folder, tmp_path):
    recipe = recipe_of(folder, "budget.steps=1", "validation.times=0")
    train(recipe, tmp_path / "run", say=silent)
    more = write_folder(tmp_path / "more", train=5)
    other = replace(recipe, data=replace(recipe.data, path=str(more)))
    with pytest.raises(ValueError, match=r"step-00000001-.*: made with other training pictures"):
        train(other, tmp_path / "run", say=silent)
    copied = write_folder(tmp_path / "copied")
    moved = replace(recipe, data=replace(recipe.data, path=str(copied)))
    assert train(moved, tmp_path / "run", say=silent)


@pytest.fixture(scope="module")
def gray_and_stacks(tmp_path_factory):
    """Data sets of the same gray pictures, once as stacks: planes of two channels, of which the
    second has a part of the picture in each plane."""
    gray, stacks = (tmp_path_factory.mktemp(name) for name in ("gray", "stacks"))
    for path in write_folder(gray).glob("*/images/*.png"):
        picture = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(picture).save(path)
        generator = np.random.default_rng(int(path.stem))
        stack = generator.integers(0, 256, (3, 2, *picture.shape), np.uint8)
        stack[:, 1] = picture * (
            generator.integers(0, 3, picture.shape) == np.arange(3)[:, None, None]
        )
        target = stacks / path.relative_to(gray).with_suffix(".tif")
        target.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(target, stack, imagej=True, metadata={"axes": "ZCYX"})
        maps = target.parents[1] / "instances"
        shutil.copytree(path.parents[1] / "instances", maps, dirs_exist_ok=True)
    return gray, stacks


def test_stacks_are_read_as_the_recipe_says_and_later_as_in_training(gray_and_stacks, tmp_path):
    models = []
    for data, changes in zip(
        gray_and_stacks, ([], ["data.channel=1", "data.project=max"]), strict=True
    ):
        out = tmp_path / data.name
        recipe = recipe_of(data, "budget.steps=4", "head=stars", "validation.times=1", *changes)
        train(recipe, out, say=silent)
        write_report(
            out, model := create_model(out / "model.safetensors"), None, out / "report.html"
        )
        models.append(model)
    first, second = (tmp_path / data.name for data in gray_and_stacks)
    assert same(weights(first), weights(second))
    assert (first / "scores.csv").read_text() == (second / "scores.csv").read_text()
    drawn = sorted(path.relative_to(first) for path in first.glob("tokens/*"))
    assert len(drawn) == 4
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in drawn)

    pictures = [read_folder(data, "val", "instance")[0].image for data in gray_and_stacks]
    expected, found = (
        segment(model, path, min_score=0.0) for model, path in zip(models, pictures, strict=True)
    )
    np.testing.assert_array_equal(found.picture.read(), expected.picture.read())
    np.testing.assert_array_equal(found.labels, expected.labels)
    chosen = segment(models[1], pictures[1], channel=0, plane=0)
    np.testing.assert_array_equal(chosen.picture.read()[..., 0], tifffile.imread(pictures[1])[0, 0])
    alone = segment(models[1], tifffile.imread(pictures[1])[0, 0])  # an array is one already
    np.testing.assert_array_equal(alone.picture.read(), chosen.picture.read())

    for model, path in ((first, pictures[0]), (second, pictures[1])):
        options = [str(path), "--model", str(model / "model.safetensors"), "--out"]
        assert cli.main(["segment", *options, str(model)]) == 0
        assert cli.main(["focus", *options, str(model / "focus.png")]) == 0
    for name in ("0_overlay.png", "focus.png"):
        np.testing.assert_array_equal(*(np.asarray(Image.open(o / name)) for o in (first, second)))

    scores = [
        evaluate(model, read_folder(data, "val", "instance")).scores
        for model, data in zip(models, gray_and_stacks, strict=True)
    ]
    np.testing.assert_equal(scores[1], scores[0])
    with pytest.raises(ValueError, match=r"3 planes .*in training: data\.plane"):
        train(recipe_of(gray_and_stacks[1], "budget.steps=1"), tmp_path / "none", say=silent)


def test_a_run_in_a_folder(folder, tmp_path):
    """What is written, that it is used by everything else, and what the same command does again."""
    recipe = recipe_of(folder, "budget.epochs=2", "average=0.5", "log_every=1")
    scores = train(recipe, tmp_path, say=silent)
    assert {path.name for path in tmp_path.iterdir()} == {
        "recipe.yaml", "data", "checkpoints", "log.csv", "scores.csv", "curves.png", "tokens",
        "tensorboard", "model.safetensors", "run.lock",
    }  # fmt: skip
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    log = rows(tmp_path / "log.csv")
    assert [float(row["epoch"]) for row in log] == [0.5, 1, 1.5, 2]
    times = read_table(tmp_path / "log.csv")
    assert (times["loaded_per_second"] > 0).all()
    assert ((times["waiting"] >= 0) & (times["waiting"] < 1)).all()
    assert all(float(row["loss"]) == pytest.approx(float(row["cross_entropy"]) + float(row["dice"]))
               for row in log)  # fmt: skip
    model = create_model(tmp_path / "model.safetensors")
    assert model.trained["steps"] == 4
    assert model.trained["recipe"]["budget"]["epochs"] == 2
    assert model.trained["recipe"]["data"]["path"] == folder.name
    assert str(folder) not in str(model.trained)
    assert model.task == "instance"
    facts = examine(read_folder(folder, "train", "instance"), "objects")
    assert model.object_diameter == object_diameter(facts)
    assert segment(model, folder / "val/images/0.png").labels.shape == (64, 64)
    dataset = dataset_of(tmp_path / "checkpoints", "instance", 2)
    assert evaluate(model, dataset).pictures == 2
    assert rows(tmp_path / "scores.csv")[-1]["final"] == "1"

    lines = []
    assert train(recipe, tmp_path, say=lines.append) == pytest.approx(scores, nan_ok=True)
    assert len(lines) == 2
    assert lines[0].startswith("goes on from step-00000004-")
    longer = replace(recipe, budget=replace(recipe.budget, epochs=3), workers=0)
    train(longer, tmp_path, say=silent)
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == ["1", "2", "3", "4", "5", "6"]
    with pytest.raises(
        ValueError, match=r"step-00000006.*made with another recipe: batch 2, now 1"
    ):
        train(replace(recipe, batch=1), tmp_path, say=silent)


def started(recipe, out, monkeypatch):
    """A run that has not trained."""
    kept = []
    monkeypatch.setattr(run.Run, "finish", lambda self: kept.append(self))
    train(recipe, out, say=silent)
    monkeypatch.undo()
    return kept[0]


def test_crowded_pictures_are_drawn_more_often(tmp_path, monkeypatch):
    """With 17 objects three times as often as with one; or as often."""
    data = write_folder(tmp_path / "data", train=2)
    ids = np.zeros((64, 64), np.uint16)
    ids[:4, :4] = 1
    Image.fromarray(ids).save(data / "train/instances/0.png")
    ids[8::12, 8::12].flat = np.arange(25) % 17 + 1
    Image.fromarray(ids).save(data / "train/instances/1.png")
    for draw, share in (("by_objects", 0.75), ("evenly", 0.5)):
        recipe = recipe_of(data, "budget.steps=1", f"data.draw={draw}")
        batches = started(recipe, tmp_path / draw, monkeypatch).batches
        drawn = np.concatenate([batches.indices(epoch) for epoch in range(1000)])
        assert (drawn == 1).mean() == pytest.approx(share, abs=0.03)


def test_the_seed_decides_all(tmp_path, monkeypatch):
    """The pictures to be scored on, the order and the changes of the others, the first weights."""
    data = write_folder(tmp_path / "data", train=12, side=48)
    shutil.rmtree(data / "val")
    found = []
    for number, seed in enumerate((0, 1, 0)):
        recipe = recipe_of(data, "budget.steps=1", "data.val_share=0.5", f"seed={seed}")
        made = started(recipe, tmp_path / str(number), monkeypatch)
        whole = replace(recipe, data=replace(recipe.data, val_share=0))
        every = started(whole, tmp_path / f"whole{number}", monkeypatch).batches
        found.append((
            [entry.name for entry in made.validation.entries],
            np.concatenate([every.indices(epoch) for epoch in range(2)]).tolist(),
            next(every.steps()).images.tolist(),
            made.trainer.model.backbone.patch_embed.conv1.weight.tolist(),
        ))  # fmt: skip
    for first, other, again in zip(*found, strict=True):
        assert first == again != other


@pytest.mark.parametrize(
    ("task", "change"),
    [("instance", "options.drop_path=0.5"), ("instance", "rates={least: 0.1, most: 0.9}"),
     ("classification", "augmentation.mix={}")],
)  # fmt: skip
def test_the_seed_decides_what_is_random_in_a_step(tmp_path, task, change):
    dataset = dataset_of(tmp_path, task, 4, 32)
    losses, state = [], None
    for seed in (0, 1, 0):
        recipe = recipe_of("x", "budget.steps=1", "batch=4", f"seed={seed}", change, task=task)
        trainer = trainer_of(dataset, recipe)
        state = state or copy.deepcopy(trainer.model.state_dict())
        trainer.model.load_state_dict(state)
        trainer.step(next(Batches(dataset, None, batch=4, seed=0).steps()))
        trainer.check()
        losses.append(trainer.recent[0]["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_a_damaged_checkpoint_is_passed_over(folder, tmp_path):
    recipe = recipe_of(folder, "budget.steps=4", "checkpoints.steps=1", "checkpoints.keep=2")
    train(recipe, tmp_path / "whole", say=silent)
    train(recipe, tmp_path / "run", say=silent)
    newest, earlier = list_checkpoints(tmp_path / "run/checkpoints")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (tmp_path / "run/model.safetensors").unlink()
    lines = []
    train(recipe, tmp_path / "run", say=lines.append)
    assert lines[0] == (
        f"{newest}: is damaged: its content is not what was written; an earlier checkpoint is "
        "looked for"
    )
    assert lines[1] == f"goes on from {earlier.name}"
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    for path in list_checkpoints(tmp_path / "run/checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be read; remove the folder to start"):
        train(recipe, tmp_path / "run", say=silent)


def test_a_full_disk_ends_with_a_line_and_leaves_the_last_checkpoint(folder, tmp_path):
    import resource  # not on Windows

    recipe = recipe_of(folder, "budget.steps=3", "checkpoints.steps=1")
    train(recipe, tmp_path, say=silent)
    before = [(path, path.read_bytes()) for path in list_checkpoints(tmp_path / "checkpoints")]
    longer = replace(recipe, budget=replace(recipe.budget, steps=5))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0][1]) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large; step-00000003-\w+\.pt is from before"):
            train(longer, tmp_path, say=silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [
        (path, path.read_bytes()) for path in list_checkpoints(tmp_path / "checkpoints")
    ] == before
    assert list(tmp_path.rglob(".pointformer-*")) == []
    train(longer, tmp_path, say=silent)


def test_a_loss_that_is_no_number_names_its_pictures(folder, tmp_path, monkeypatch):
    """The run stops, and the newest checkpoint is one from before."""
    recipe = recipe_of(folder, "budget.steps=6", "checkpoints.steps=1", "validation.times=0")
    plain, seen = Trainer._loss, []

    def loss(self, images, annotations):
        terms = plain(self, images, annotations)
        if self.steps == 3:
            seen.append([annotation.name for annotation in annotations])
            terms["dice"] = terms["dice"] * float("nan")
        return terms

    monkeypatch.setattr(Trainer, "_loss", loss)
    with pytest.raises(FloatingPointError, match="step 3") as error:
        train(recipe, tmp_path, say=silent)
    text = str(error.value)
    assert text.startswith(f"the loss is nan at step 3, with {', '.join(seen[0])}; ")
    newest = list_checkpoints(tmp_path / "checkpoints")[0].name
    assert text.endswith(f"; {newest} is from before")
    assert newest.startswith("step-00000003-")
    monkeypatch.undo()
    train(recipe, tmp_path, say=silent)
    train(recipe, tmp_path.with_name("whole"), say=silent)
    assert same(weights(tmp_path), weights(tmp_path.with_name("whole")))


def test_weights_that_a_step_has_spoilt_are_not_saved(folder, tmp_path):
    recipe = recipe_of(
        folder, "budget.steps=3", "checkpoints.steps=1", "validation.times=0",
        "optimizer.learning_rate=1e30", "schedule.warmup=0",
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"after step 0, with .*learning_rate") as error:
        train(recipe, tmp_path, say=silent)
    (saved,) = list_checkpoints(tmp_path / "checkpoints")
    assert saved.name.startswith("step-00000000-")
    assert str(error.value).endswith(f"; {saved.name} is from before")


def test_nothing_to_be_scored_on_is_said_before_training(tmp_path):
    write_folder(tmp_path / "data", train=2, val=1)
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(tmp_path / "data/val/instances/0.png")
    recipe = recipe_of(tmp_path / "data", "budget.steps=1")
    with pytest.raises(ValueError, match=r"to be scored on; .*: expected an object, the picture"):
        train(recipe, tmp_path / "run", say=silent)


@pytest.mark.parametrize("name", ["checkpoints", "model.safetensors", "log.csv", "scores.csv"])
def test_a_new_run_replaces_nothing(folder, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{name}: is there, but no recipe\.yaml of a run"):
        train(recipe_of(folder, "budget.steps=1"), tmp_path, say=silent)
    assert (tmp_path / name).read_text() == "mine"


def test_what_is_no_folder_of_a_run(folder, tmp_path):
    recipe = recipe_of(folder, "budget.steps=1")
    (tmp_path / "recipe.yaml").write_text("task: instance")
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(ValueError, match="checkpoints: expected the folder of a run, this is a"):
        train(recipe, tmp_path, say=silent)


def test_a_link_that_leads_nowhere_is_no_folder(folder, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="run: expected a folder, this link leads nowhere"):
        train(recipe_of(folder, "budget.steps=1"), tmp_path / "run", say=silent)


def test_parts_of_a_batch_and_recomputed_blocks_give_the_same_step(tmp_path):
    """As far as numbers go, where the loss is a mean over pictures."""
    dataset = dataset_of(tmp_path, "classification", 4, 32)
    base = recipe_of("x", "batch=4", "budget.steps=2", "freeze_batch_norm=true",
                     task="classification")  # fmt: skip
    results = []
    for changes in ({}, {"accumulate": 2}, {"gradient_checkpointing": True}):
        recipe = replace(base, **changes)
        trainer = trainer_of(dataset, recipe)
        steps = Batches(dataset, None, batch=4, seed=0).steps()
        for _ in range(2):
            trainer.step(next(steps))
        trainer.check()
        results.append((trainer.recent, trainer.model.state_dict()))
    for recent, state in results[1:]:
        for expected, found in zip(results[0][0], recent, strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-3, atol=1e-4)


def test_half_precision_learns(tmp_path):
    dataset = dataset_of(tmp_path, "instance", 2, 32)
    losses = {}
    for precision in ("float32", "bfloat16"):
        trainer = trainer_of(dataset, recipe_of("x", "budget.steps=1", f"precision={precision}"))
        trainer.step(next(Batches(dataset, None, batch=2, seed=0).steps()))
        trainer.check()
        losses[precision] = trainer.recent[0]["loss"]
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_frozen_batch_norm_stays(tmp_path):
    dataset = dataset_of(tmp_path, "instance", 2, 32)
    trainer = trainer_of(dataset, recipe_of("x", "budget.steps=1", "freeze_batch_norm=true"))
    before = {
        name: v.clone() for name, v in trainer.model.backbone.patch_embed.bn.state_dict().items()
    }
    trainer.step(next(Batches(dataset, None, batch=2, seed=0).steps()))
    assert same(trainer.model.backbone.patch_embed.bn.state_dict(), before)


MASKS = ["options.queries=12", "options.dim=64", "options.hidden=64", "options.decoder_layers=1",
         "options.pixel_hidden=64", "options.pixel_layers=1", "loss.points=512",
         "optimizer.learning_rate=2e-3"]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "head", "steps", "share", "score", "changes"),
    [("classification", None, 30, 0.05, ("top-1 accuracy", 1.0), []),
     ("semantic", None, 60, 0.05, ("mIoU", 0.9), []),
     ("instance", None, 120, 0.1, ("AP at IoU 0.5", 0.9), []),
     pytest.param("instance", "mask2former", 120, 0.2, ("AP at IoU 0.5", 0.9), MASKS,
                  marks=pytest.mark.long),
     pytest.param("panoptic", "mask2former", 120, 0.2, ("PQ", 0.8), MASKS, marks=pytest.mark.long),
     pytest.param("semantic", "mask2former", 120, 0.2, ("mIoU", 0.9), MASKS,
                  marks=pytest.mark.long)],
)  # fmt: skip
def test_learns_real_pictures_by_heart(tmp_path, task, head, steps, share, score, changes):
    """The loss falls to a small share of the first, as far as masks of soft edges let it."""
    size = {"classification": (48, 1), "semantic": (24, 2)}.get(task, (24, 3))
    dataset = dataset_of(tmp_path, task, 8, *(size if head is None else (24, 3)))
    recipe = recipe_of(
        "x", "batch=8", f"budget.steps={steps}", "optimizer.learning_rate=5e-3",
        "optimizer.weight_decay=0", "options.dims=[32,32,32,32]", *changes, task=task, head=head,
    )  # fmt: skip
    trainer = trainer_of(dataset, recipe)
    batches = Batches(dataset, None, batch=8, seed=0).steps()
    for _ in range(steps):
        trainer.step(next(batches))
    trainer.check()
    assert trainer.recent[-1]["loss"] < share * trainer.recent[0]["loss"]
    scores = evaluate(trainer.averaged, dataset, trainer.task).scores
    (found,) = [value for name, value in scores.items() if name.startswith(score[0])][:1]
    assert found >= score[1]


@pytest.mark.parametrize("changes", [["head=stars"], ["head=mask2former", *MASKS]])
def test_how_sure_shown_objects_must_be_is_chosen_on_what_is_scored(folder, tmp_path, changes):
    """The file knows it, so that evaluating gives the scores of the end of training, also where
    the model is saved after an interruption."""
    recipe = recipe_of(folder, "budget.steps=12", "optimizer.learning_rate=5e-3", *changes)
    scores = train(recipe, tmp_path, say=silent)
    model = create_model(tmp_path / "model.safetensors")
    assert model.min_score in run.MIN_SCORES
    dataset = read_folder(folder, "val", "instance")
    tile = run.validation_tile(recipe, task_of(model))
    assert evaluate(model, dataset, tile=tile).scores == pytest.approx(scores, nan_ok=True)
    picture = dataset[0].image
    shown = segment(model, picture, tile=tile)
    assert np.array_equal(
        shown.labels, segment(model, picture, tile=tile, min_score=model.min_score).labels
    )
    assert all(score >= model.min_score for score in shown.scores)
    (tmp_path / "model.safetensors").unlink()
    train(recipe, tmp_path, say=silent)
    assert create_model(tmp_path / "model.safetensors").min_score == model.min_score


def test_stages_of_other_weights():
    trained = create_model("aff_nano.nuclei").backbone
    (nucleus,) = create_model("aff_nano.nuclei").categories
    recipe = read_recipe(task="instance", head="stars", init="aff_nano.nuclei", init_stages=2)
    fresh = make_model(replace(recipe, init=None, init_stages=None, model="aff_nano"), [nucleus])
    for kept in (2, 0, 4):
        backbone = "the backbone" if kept == 4 else "weights of the backbone"
        with pytest.warns(UserWarning, match=f"{backbone} and 0 of 34 weights of the head"):
            started = make_model(replace(recipe, init_stages=kept), [nucleus]).backbone
        assert same(started.patch_embed.state_dict(), trained.patch_embed.state_dict())
        for stage in range(4):
            source = trained if stage < kept else fresh.backbone
            assert same(started.stages[stage].state_dict(), source.stages[stage].state_dict())
    whole = make_model(replace(recipe, init_stages=None), [nucleus])
    assert same(whole.state_dict(), create_model("aff_nano.nuclei").state_dict())
    with pytest.raises(ValueError, match=r"init: aff_nano\.nuclei holds weights of aff_nano, not"):
        make_model(replace(recipe, init_stages=None, model="aff_mini"), [nucleus])
    with pytest.raises(ValueError, match=r"aff_nano\.nuclei: not a checkpoint of aff_mini: "):
        make_model(replace(recipe, model="aff_mini"), [nucleus])
    with pytest.raises(ValueError, match="init_stages: expected 0 to 4, got 5"):
        make_model(replace(recipe, init_stages=5), [nucleus])


def test_stages_of_any_backbone(tmp_path):
    """Also one that is deeper than the other from there on."""

    def swin(depths, **options):
        return create_model("swin_tiny", num_classes=3, dims=(16, 32, 64, 128), heads=(2, 2, 2, 2),
                            depths=depths, **options)  # fmt: skip

    trained = swin((1, 1, 2, 1))
    save_model(trained, tmp_path / "swin.safetensors")
    recipe = read_recipe(task="semantic", init=str(tmp_path / "swin.safetensors"), init_stages=2)
    recipe = replace(recipe, model="swin_tiny", options={
        "dims": [16, 32, 64, 128], "heads": [2, 2, 2, 2], "depths": [1, 1, 1, 1]})  # fmt: skip
    with pytest.warns(UserWarning, match="weights of the backbone"):
        started = make_model(recipe, [Category(n, str(n)) for n in range(4)])
    for stage in range(2):
        assert same(started.backbone.stages[stage].state_dict(),
                    trained.backbone.stages[stage].state_dict())  # fmt: skip
    assert not torch.equal(started.backbone.stages[2].blocks[0].mlp.fc1.weight,
                           trained.backbone.stages[2].blocks[0].mlp.fc1.weight)  # fmt: skip


@pytest.mark.parametrize("stages", [None, 4])
@pytest.mark.filterwarnings("ignore:aff_nano.nuclei")
def test_a_training_before_is_forgotten(stages):
    """What it says of pictures and scores is not of this one."""
    trained = create_model("aff_nano.nuclei")
    assert None not in (trained.trained, trained.min_score, trained.object_diameter)
    recipe = read_recipe(task="instance", init="aff_nano.nuclei", head="stars", init_stages=stages)
    started = make_model(recipe, trained.categories)
    assert started.trained is started.min_score is started.object_diameter is None


def test_the_head_of_initial_weights_is_kept_where_it_can_learn_the_task(tmp_path):
    kinds = [Category(1, "round"), Category(2, "long")]
    few = {"queries": 4, "dim": 16, "hidden": 16, "pixel_hidden": 16, "pixel_layers": 1,
           "decoder_layers": 1}  # fmt: skip
    made = create_model("aff_nano", head="mask2former", task="instance", num_classes=2,
                        categories=kinds, **few)  # fmt: skip
    save_model(made, tmp_path / "m.safetensors")
    for task, head in (("instance", "mask2former"), ("semantic", "mask2former")):
        recipe = read_recipe(task=task, init=str(tmp_path / "m.safetensors"))
        assert make_model(recipe, kinds).head_name == head
    recipe = read_recipe(task="classification", init=str(tmp_path / "m.safetensors"))
    with pytest.warns(UserWarning, match="kept: the backbone and 0 of"):
        assert make_model(recipe, kinds).head_name == "classification"


def test_heads_by_task():
    kinds = [Category(1, "round"), Category(2, "long")]
    heads = {"semantic": "dense", "instance": "stars", "panoptic": "mask2former",
             "classification": "classification"}  # fmt: skip
    for task, head in heads.items():
        model = make_model(read_recipe(task=task, model="aff_nano"), kinds)
        assert (model.head_name, model.task, model.num_classes) == (head, task, 2)
        assert model.categories == tuple(kinds)
    assert (
        make_model(read_recipe(task="instance", model="aff_nano"), kinds[:1]).head_name == "dense"
    )
    with pytest.raises(ValueError, match=r"head: 'dense' cannot find 2 kinds .*: stars, mask2"):
        make_model(read_recipe(task="instance", model="aff_nano", head="dense"), kinds)
    with pytest.raises(ValueError, match=r"head: 'dense' cannot find .*: classification$"):
        make_model(read_recipe(task="classification", model="aff_nano", head="dense"), kinds)
    with pytest.raises(ValueError, match=r"options\.num_classes: num_classes follows from the"):
        make_model(read_recipe(task="semantic", overrides=["options.num_classes=3"]), kinds)


def test_a_model_that_is_not_named(monkeypatch):
    """Of pictures and of points."""

    def made(name, **options):
        return SimpleNamespace(name=name, forget_training=lambda: None)

    monkeypatch.setattr("pointformer.train.initial.create_model", made)
    kinds = [Category(1, "round"), Category(2, "long")]
    recipe = replace(read_recipe(task="classification"), model=None)
    assert make_model(recipe, kinds).name == "aff_tiny"
    recipe = replace(read_recipe(task="point_classification"), model=None)
    assert make_model(recipe, kinds, 0).name == "point_nano"


def test_a_start_may_be_of_another_task():
    """The backbone stays, the head is that of the data, as is what the recipe's options say."""
    recipe = read_recipe(task="semantic", init="aff_nano.nuclei", overrides=["options.rate=0.4"])
    kinds = [Category(n, str(n)) for n in range(4)]
    with pytest.warns(UserWarning, match="kept: the backbone"):
        started = make_model(recipe, kinds)
    assert (started.task, started.num_classes, started.config.rate) == ("semantic", 4, 0.4)
    assert started.categories == tuple(kinds)
    trained = create_model("aff_nano.nuclei")
    assert same(started.backbone.state_dict(), trained.backbone.state_dict())


def test_weights_are_no_model(tmp_path):
    (tmp_path / "own.safetensors").touch()
    kinds = [Category(1, "round")]
    for weights in ("aff_nano.nuclei", str(tmp_path / "own.safetensors")):
        recipe = read_recipe(task="instance", model=weights)
        with pytest.raises(ValueError, match=r"model: expected a name, not weights; .*as init"):
            make_model(recipe, kinds)
    for unknown, message in (("aff_pico", "name: unknown model"), ("aff_nano.", "no such weights"),
                             ("nowhere.safetensors", "not a readable")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make_model(read_recipe(task="instance", model=unknown), kinds)


def test_channels_are_those_of_the_points():
    """Also where they have none."""
    recipe = read_recipe(task="point_classification", model="point_nano")
    kinds = [Category(1, "round"), Category(2, "long")]
    for channels in (0, 3):
        assert make_model(recipe, kinds, channels).config.in_channels == channels
        with pytest.raises(ValueError, match=r"options\.in_channels: in_channels follows from"):
            make_model(replace(recipe, options={"in_channels": 2}), kinds, channels)


def test_no_budget():
    with pytest.raises(ValueError, match="budget: expected steps, epochs or minutes"):
        train(read_recipe(), "x", say=silent)


def test_mixed_pictures_have_the_mixed_loss(tmp_path):
    dataset = dataset_of(tmp_path, "classification", 4, 32)
    recipe = recipe_of("x", "batch=4", "budget.steps=1", "augmentation.mix={}", "accumulate=2",
                       "freeze_batch_norm=true", task="classification")  # fmt: skip
    trainer = trainer_of(dataset, recipe)
    batch = next(Batches(dataset, None, batch=4, seed=0).steps())
    images = trainer.model.preprocess(batch.images)
    trainer.model.eval()
    expected = []
    for part in (slice(0, 2), slice(2, 4)):
        rng = np.random.default_rng([recipe.seed, 0])
        mixed, partners, share = recipe.augmentation.mix(images[part], rng)
        assert 0 < share < 1
        labels = torch.tensor([annotation.label for annotation in batch.annotations[part]])
        logits = trainer.model(mixed)
        first, second = (F.cross_entropy(logits, some) for some in (labels, labels[partners]))
        expected.append(share * first + (1 - share) * second)
    trainer.step(batch)
    trainer.check()
    assert trainer.recent[0]["loss"] == pytest.approx(sum(expected).item() / 2, rel=1e-5)
    with pytest.raises(ValueError, match=r"augmentation\.mix: only for classes of whole pictures"):
        recipe_of("x", "augmentation.mix={}")


def test_the_diameter_of_objects():
    """The median of the pictures' medians: of areas of 52, 16 and 64 that of 52."""
    facts = [PictureFacts(str(n), (9, 9), areas=areas)
             for n, areas in enumerate([(4, 100), (16,), (), (64, 64, 2)])]  # fmt: skip
    broken = PictureFacts("4", areas=(10**6,), problem="broken")
    statistics = Statistics((Category(1, "cell"),), (*facts, broken), "objects")
    assert object_diameter(statistics) == 8.1
    assert object_diameter(replace(statistics, facts=(facts[2],))) is None


def test_what_a_model_cannot_work_with_is_named(folder, tmp_path):
    """Here it is numbers that ran away."""
    recipe = recipe_of(
        folder, "budget.steps=6", "optimizer.learning_rate=1e10", "schedule.warmup=0",
        "optimizer.clip=null", "validation.times=0",
    )  # fmt: skip
    expected = r"got NaN in .*\(at step 1, with \d, \d\); step-00000000-\w+\.pt is from before"
    with pytest.raises(ValueError, match=expected):
        train(recipe, tmp_path, say=silent)


def test_a_released_checkpoint_is_a_start(tmp_path, monkeypatch):
    small = AFFConfig(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2))
    monkeypatch.setitem(CONFIGS, "aff_mini", small)
    model = create_model("aff_mini", num_classes=10)
    state = to_released(model.state_dict(), model.config)
    torch.save({"model": state}, tmp_path / "mini.pth")
    recipe = read_recipe(task="semantic", model="aff_mini", init=str(tmp_path / "mini.pth"))
    with pytest.warns(UserWarning, match="kept: the backbone and 0 of 24 weights of the head"):
        started = make_model(recipe, [Category(n, str(n)) for n in range(2)])
    assert (started.head_name, started.num_classes) == ("dense", 2)
    assert same(started.backbone.state_dict(), model.backbone.state_dict())
    with pytest.raises(ValueError, match=r"model: needed, as .*mini\.pth does not say"):
        make_model(replace(recipe, model=None), [Category(1, "x")])


@pytest.fixture
def seconds(monkeypatch):
    """Each step takes one by the clock of the run."""
    now, plain = [0.0], Trainer._loss

    def loss(self, images, annotations):
        now[0] += 1
        return plain(self, images, annotations)

    monkeypatch.setattr(Trainer, "_loss", loss)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: now[0]))


@pytest.mark.usefixtures("seconds")
def test_checkpoints_are_written_by_the_clock(folder, tmp_path, monkeypatch):
    """The first step counts as nothing here, the second for two."""
    saved = []
    monkeypatch.setattr(run, "save_checkpoint", lambda folder, step, *rest: saved.append(step))
    recipe = recipe_of(
        folder, "budget.steps=6", "validation.times=0", "log_every=1",
        f"checkpoints.minutes={2 / 60}",
    )  # fmt: skip
    train(recipe, tmp_path, say=silent)
    assert saved == [0, 2, 4, 6, 6, 6]  # the last ones at the end, and with its scores


@pytest.mark.usefixtures("seconds")
def test_a_line_of_the_log_is_of_all_steps_since_the_last(folder, tmp_path):
    recipe, logs = recipe_of(folder, "budget.steps=5", "validation.times=0"), []
    for often in (1, 2):
        train(replace(recipe, log_every=often), tmp_path / str(often), say=silent)
        logs.append(read_table(tmp_path / str(often) / "log.csv"))
    every, some = logs
    assert some["step"].tolist() == [2, 4, 5]
    for name in ("loss", "gradient"):
        means = [every[name][:2].mean(), every[name][2:4].mean(), every[name][4]]
        np.testing.assert_allclose(some[name], means, rtol=1e-6)
    assert some["images_per_second"].tolist() == [2, 2, 2]


@pytest.mark.usefixtures("seconds")
def test_the_file_says_from_what_and_for_how_long(folder, tmp_path):
    recipe = recipe_of(folder, "budget.steps=12", "validation.times=0")
    train(recipe, tmp_path / "first", say=silent)
    weights = tmp_path / "first/model.safetensors"
    assert create_model(weights).trained["minutes"] == 0.2
    train(recipe_of(folder, "budget.steps=1", f"init={weights}"), tmp_path / "next", say=silent)
    trained = create_model(tmp_path / "next/model.safetensors").trained
    assert trained["recipe"]["init"] == "model.safetensors"  # not where it is on this machine
    assert str(tmp_path) not in str(trained)


def test_some_pictures_are_scored_on_the_way_and_all_at_the_end(folder, tmp_path):
    changes = ["validation.times=1", "validation.pictures=1", "validation.token_maps=1"]
    train(recipe_of(folder, "budget.steps=2", *changes), tmp_path, say=silent)
    scores = [(row["step"], row["final"], row["pictures"]) for row in rows(tmp_path / "scores.csv")]
    assert scores == [("1", "0", "1"), ("2", "1", "2")]
    maps = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert maps == ["00000001-0.jpg", "00000002-0.jpg"]


def test_what_is_scored_is_seen_as_in_training():
    """Windows of the crops where queries are, regions of points; or as is said."""
    masks, borders = (SimpleNamespace(output=output) for output in (Output.MASKS, Output.BORDERS))
    for changes, tile in (
        (["augmentation.crop.size=[64,32]"], 32),
        (["augmentation.crop.size=48"], 48),
        (["augmentation.crop.size=48", "validation.tile=96"], 96),
        (["augmentation.crop=null"], None),
    ):
        recipe = read_recipe("instance.yaml", changes)
        assert run.validation_tile(recipe, masks) == tile
        assert run.validation_tile(recipe, borders) == recipe.validation.tile
    recipe = read_recipe("point_segmentation.yaml", ["augmentation.points.region.points=80"])
    for output, points in ((Output.POINT_CLASSES, 80), (Output.POINT_SCORES, None)):
        assert run.validation_region(recipe, SimpleNamespace(output=output)) == points


def test_the_learning_rate_that_is_shown_is_the_highest(tmp_path):
    dataset = dataset_of(tmp_path, "instance", 2, 32)
    recipe = recipe_of(
        "x", "budget.steps=2", "optimizer.learning_rate=1e-2", "optimizer.backbone_rate=0.25",
        "schedule.warmup=0",
    )  # fmt: skip
    trainer = trainer_of(dataset, recipe)
    trainer.step(next(Batches(dataset, None, batch=2, seed=0).steps()))
    assert trainer.learning_rate == pytest.approx(1e-2)


@pytest.mark.parametrize(("wanted", "times"), [("true", 2), ("false", 1)])
def test_blocks_are_computed_again_where_that_is_wanted(tmp_path, wanted, times):
    dataset, seen = dataset_of(tmp_path, "instance", 2, 32), []
    recipe = recipe_of("x", "budget.steps=1", f"gradient_checkpointing={wanted}")
    trainer = trainer_of(dataset, recipe)
    block = trainer.model.backbone.stages[0].blocks[0]
    block.attn.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    trainer.step(next(Batches(dataset, None, batch=2, seed=0).steps()))
    assert len(seen) == times


@pytest.mark.parametrize(
    ("task", "change"),
    [("instance", "options.drop_path=0.5"), ("classification", "augmentation.mix={}")],
)
def test_the_step_decides_what_is_random_in_it(tmp_path, task, change):
    dataset = dataset_of(tmp_path, task, 4, 32)
    recipe = recipe_of("x", "budget.steps=4", "batch=4", "optimizer.learning_rate=0", change,
                       "freeze_batch_norm=true", task=task)  # fmt: skip
    trainer = trainer_of(dataset, recipe)
    batch = next(Batches(dataset, None, batch=4, seed=0).steps())
    for _ in range(3):  # of the same pictures and weights
        trainer.step(batch)
    trainer.check()
    assert len({row["loss"] for row in trainer.recent}) == 3


def test_frozen_batch_norm_does_not_learn(tmp_path):
    dataset = dataset_of(tmp_path, "instance", 2, 32)
    changes = ["budget.steps=1", "freeze_batch_norm=true", "schedule.warmup=0"]
    trainer = trainer_of(dataset, recipe_of("x", *changes))
    norm = trainer.model.backbone.patch_embed.bn
    before = {name: v.clone() for name, v in norm.state_dict().items()}
    trainer.step(next(Batches(dataset, None, batch=2, seed=0).steps()))
    assert same(norm.state_dict(), before)


def test_a_longer_run_is_scored_again_at_its_end(folder, tmp_path):
    recipe = recipe_of(folder, "budget.steps=1", "validation.times=0")
    for steps in (1, 2):
        train(replace(recipe, budget=Budget(steps=steps)), tmp_path, say=silent)
    found = [(row["step"], row["final"]) for row in rows(tmp_path / "scores.csv")]
    assert found == [("1", "1"), ("2", "1")]


def test_the_same_pictures_are_scored_each_time(folder, tmp_path, monkeypatch):
    seen = []

    def noted(model, dataset, *args, **options):
        seen.append([entry.name for entry in dataset.entries])
        return SimpleNamespace(metrics=[], scores={}, pictures=len(dataset))

    monkeypatch.setattr(run, "evaluate", noted)
    changes = ["budget.steps=7", "validation.times=6", "validation.pictures=1"]
    train(recipe_of(folder, *changes, "validation.token_maps=0"), tmp_path, say=silent)
    assert len(seen) == 7
    assert seen[:6] == [seen[0]] * 6


def test_what_was_waited_and_what_could_be_loaded(folder, tmp_path, monkeypatch):
    """Of each line of the log; workers load at the same time."""
    now, loss, steps = [0.0], Trainer._loss, Batches.steps

    def worked(self, images, annotations):
        now[0] += 1
        return loss(self, images, annotations)

    def loaded(self, start=0):
        self.workers = 0
        for batch in steps(self, start):
            now[0] += 3
            yield batch._replace(seconds=2.0)

    monkeypatch.setattr(Trainer, "_loss", worked)
    monkeypatch.setattr(Batches, "steps", loaded)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    changes = ["budget.steps=3", "validation.times=0", "log_every=1", "workers=4"]
    train(recipe_of(folder, *changes), tmp_path, say=silent)
    log = read_table(tmp_path / "log.csv")
    assert log["waiting"].tolist() == [0.75] * 3
    assert log["loaded_per_second"].tolist() == [4.0] * 3


def test_crops_are_compared_with_what_pictures_are_magnified_to():
    facts = tuple(PictureFacts(str(n), (40, 50), ((0, 900), (1, 1100))) for n in range(2))
    statistics = Statistics((Category(0, "a"), Category(1, "b")), facts, "pixels")
    data, model = (
        SimpleNamespace(source="here", skipped={}),
        SimpleNamespace(config=None, name="m", head_name="dense", parameters=list),
    )
    for change, number in (("scales=[1,1.5]", 1), ("scales=[1,1.6]", 0), ("measure=fit", 0)):
        crop = ["augmentation={}", "augmentation.crop.size=64", f"augmentation.crop.{change}"]
        lines = []
        describe(data, None, statistics, read_recipe("semantic.yaml", crop), model, lines.append)
        assert sum(line.startswith("advice: crops of 64 x 64") for line in lines) == number, change
