"""Checkpoints and tables: whole or not there, and what a killed run leaves."""

import os
import signal
import time

import pytest
import torch

from pointformer.train.checkpoints import (
    _Hashing,
    list_checkpoints,
    newest_checkpoint,
    owned,
    read_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from pointformer.train.ending import Ending, left_to_parent
from pointformer.train.logs import Logs, Table, read_table


def test_the_newest_are_kept_one_for_each_step(tmp_path):
    for step in (9, 10, 10, 100):
        save_checkpoint(tmp_path, step, {"value": torch.rand(3)}, keep=2)
    assert [path.name[:13] for path in list_checkpoints(tmp_path)] == [
        "step-00000100",
        "step-00000010",
    ]
    path = save_checkpoint(tmp_path, 5, {"value": torch.zeros(1)}, keep=1)
    assert list_checkpoints(tmp_path) == [path]  # what was just written stays
    assert torch.equal(read_checkpoint(path)["value"], torch.zeros(1))
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("end", [SystemExit(143), KeyboardInterrupt(), OSError(28, "full")])
def test_who_is_told_to_end_while_writing_ends_so(tmp_path, monkeypatch, end):
    """And not with torch's complaint that its file is unfinished."""
    before = save_checkpoint(tmp_path, 1, {"value": torch.zeros(3)}, keep=1)

    plain, calls = _Hashing.write, []

    def write(self, data):
        calls.append(data)
        if len(calls) == 3:
            raise end
        return plain(self, data)

    monkeypatch.setattr(_Hashing, "write", write)
    with pytest.raises(type(end)):
        save_checkpoint(tmp_path, 2, {"value": torch.zeros(3)}, keep=1)
    assert list(tmp_path.iterdir()) == [before]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [(lambda path: path.write_bytes(path.read_bytes()[:-10]), "is damaged"),
     (lambda path: path.write_bytes(b""), "is damaged"),
     (lambda path: path.unlink() or path.mkdir(), "cannot be read: Is a directory")],
)  # fmt: skip
def test_what_cannot_be_read_is_passed_over(tmp_path, spoil, problem):
    first = save_checkpoint(tmp_path, 1, {"step": 1}, keep=3)
    second = save_checkpoint(tmp_path, 2, {"step": 2}, keep=3)
    spoil(second)
    found, problems = newest_checkpoint(list_checkpoints(tmp_path))
    assert found == (first, {"step": 1})
    assert len(problems) == 1
    assert problems[0].startswith(f"{second}: {problem}")
    spoil(first)
    found, problems = newest_checkpoint(list_checkpoints(tmp_path))
    assert found is None
    assert len(problems) == 2


def test_what_is_no_checkpoint(tmp_path):
    for name in ("step-1.pt", "model.pt"):
        with pytest.raises(ValueError, match=r"expected a checkpoint, step-STEP-DIGEST\.pt"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "mine.pt").write_text("mine")
    save_checkpoint(tmp_path, 1, {}, keep=1)
    (tmp_path / ".pointformer-0123.pt").write_text("cut off")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / ".pointformer-4567.jpg").write_text("cut off")
    remove_unfinished(tmp_path)
    (tmp_path / "tokens").rmdir()  # which is empty
    remove_unfinished(tmp_path / "tokens")
    assert sorted(path.name[:7] for path in tmp_path.iterdir()) == ["mine.pt", "step-00"]


def test_a_folder_has_one_owner(tmp_path):
    taken = pytest.raises(ValueError, match="run: another command trains there; wait for its end")
    with owned(tmp_path / "run"), taken, owned(tmp_path / "run"):
        pass
    with owned(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(ValueError, match="file: expected a folder, this is a file"),
        owned(tmp_path / "file"),
    ):
        pass
    with pytest.raises(OSError, match="Not a directory"), owned(tmp_path / "file/run"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_killed_owner_is_in_nobodys_way(tmp_path):
    """Nor are its workers, which live a few seconds longer."""
    read, write = os.pipe()
    owner = os.fork()
    if owner == 0:
        with owned(tmp_path):
            worker = os.fork()
            if worker:
                os.write(write, b"%d" % worker)
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 20))
    with pytest.raises(ValueError, match="another command trains there"), owned(tmp_path):
        pass
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    with owned(tmp_path):
        os.kill(worker, signal.SIGKILL)


def test_a_table_goes_on_after_its_last_good_step(tmp_path):
    path = tmp_path / "log.csv"
    table = Table(path, 0)
    for step in (2, 4, 6):
        table.add(step, {"loss": step / 2, "name, quoted": 'a "b"'})
    with path.open("a") as file:
        file.write("8,4")  # killed while it wrote
    table = Table(path, 4)
    table.add(6, {"loss": 7})
    assert path.read_text().splitlines() == [
        'step,loss,"name, quoted"', '2,1.0,"a ""b"""', '4,2.0,"a ""b"""', "6,7,",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_that_is_made_again_takes_the_place_of_the_first(tmp_path):
    """As of scores at the step of the newest checkpoint, of a run that was killed after them."""
    path = tmp_path / "scores.csv"
    keys = ("step", "final")
    table = Table(path, 0, keys)
    for step, final in ((2, 0), (4, 0), (4, 1)):
        table.add(step, {"final": final, "AP": 0.25})
    for _ in range(2):
        table = Table(path, 4, keys)
        table.add(4, {"final": 0, "AP": 0.5})
        table.add(6, {"final": 0, "AP": 0.75})
    assert path.read_text().splitlines() == [
        "step,final,AP", "2,0,0.25", "4,1,0.25", "4,0,0.5", "6,0,0.75",
    ]  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals to a forked process")
def test_workers_end_when_their_parent_says_so():
    """Ctrl-C and a SIGTERM that goes to all do not end them, one of their parent does."""
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:
        left_to_parent(0)
        os.write(write, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        os.kill(worker, number)
        time.sleep(0.05)
        assert os.waitpid(worker, os.WNOHANG) == (0, 0)
    os.kill(worker, signal.SIGTERM)
    _, status = os.waitpid(worker, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def test_signals_wait_for_the_right_moment():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ending = Ending()
    with ending.awaited():
        signal.raise_signal(signal.SIGTERM)
        assert ending.told == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # the second ends at once
    with ending.awaited(), pytest.raises(KeyboardInterrupt), ending.at_once():
        pass  # one that came before
    ending = Ending()
    with ending.awaited(), ending.at_once(), pytest.raises(SystemExit) as end:
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_damaged_table_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "log.csv").write_bytes(b"step,loss\n1,0.5,7\n2,\xff\x00")
    columns = read_table(tmp_path / "log.csv")
    assert columns["step"].tolist() == [1, 2]
    assert columns["loss"][0] == 0.5
    assert columns["loss"][1] != columns["loss"][1]  # NaN


def test_of_two_checkpoints_of_a_step_the_later_one_is_kept(tmp_path):
    for step in (9, 10, 10):
        save_checkpoint(tmp_path, step, {"value": torch.rand(3)}, keep=2)
    assert [path.name[:13] for path in list_checkpoints(tmp_path)] == [
        "step-00000010", "step-00000009",
    ]  # fmt: skip
    (tmp_path / f"step-00000010-{'a' * 16}.pt").touch()
    pair = list_checkpoints(tmp_path)[:2]
    for first, second in (pair, pair[::-1]):
        os.utime(first, ns=(0, 2 * 10**9))
        os.utime(second, ns=(0, 10**9))
        assert list_checkpoints(tmp_path)[:2] == [first, second]


def test_scores_on_the_way_and_at_the_end_are_two_rows_of_a_step(tmp_path):
    for final in (1, 0):  # the run was over, and then made longer
        with Logs(tmp_path, 4) as logs:
            logs.add_scores(4, {"final": final, "AP": 0.5})
    assert read_table(tmp_path / "scores.csv")["final"].tolist() == [1, 0]


def test_tensorboard_keeps_the_step_that_a_run_goes_on_from(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "torch.utils.tensorboard.SummaryWriter", lambda path, purge_step: seen.append(purge_step)
    )
    for step in (0, 4):
        Logs(tmp_path, step)
    assert seen == [None, 5]


def test_names_of_columns_that_were_cut_off_are_written_anew(tmp_path):
    (tmp_path / "log.csv").write_text("step,lo")
    Table(tmp_path / "log.csv", 0).add(1, {"loss": 0.5, "lr": 1})
    assert read_table(tmp_path / "log.csv")["loss"].tolist() == [0.5]
