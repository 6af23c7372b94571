"""Two processes share the pictures of a command."""

import json
import os
import shutil
import time

import pytest

from helpers.processes import finished, started
from helpers.training import write_folder
from pointformer.cli import main


def test_pictures_are_shared_and_what_is_done_stays(tmp_path):
    pictures = write_folder(tmp_path / "data", train=3, val=1) / "train/images"
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "out"
    command = ["segment", pictures, "--out", out, "--threads", "1"]
    found = finished(started(2, *command))
    assert [code for _, _, code in found] == [1, 1]
    spoken = "".join(text for text, _, _ in found)
    assert spoken.splitlines() == [f"3 of 4 pictures done; results in {out}"]
    complaints = "".join(text for _, text, _ in found)
    assert complaints.count("pointformer: error: ") == 1
    assert {f"{n}_summary.json" for n in range(3)} == {p.name for p in out.glob("*_summary.json")}

    alone = tmp_path / "alone"
    (pictures / "broken.png").unlink()
    shutil.copytree(out, alone)
    (alone / "1_labels.png").unlink()
    before = {path.name: os.stat(path).st_ino for path in alone.iterdir()}
    assert main([*map(str, command[:2]), "--out", str(alone), "--threads", "1", "--resume"]) == 0
    after = {path.name: os.stat(path).st_ino for path in alone.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"1_{kind}" for kind in
                       ("labels.png", "objects.csv", "overlay.png", "summary.json")}  # fmt: skip


def test_scores_of_two_processes_are_those_of_one(tmp_path):
    data = write_folder(tmp_path / "data", train=1, val=3)
    scores = []
    for world in (1, 2):
        file = tmp_path / f"{world}.json"
        found = finished(started(world, "evaluate", data, "--json", file, "--threads", "1"))
        assert [code for _, _, code in found] == [0] * world, found
        assert all(text == "" for text, _, _ in found[1:])
        scores.append(json.loads(file.read_text()))
        del scores[-1]["seal"]
    assert scores[0] == scores[1]
    assert scores[0]["images"] == 3


def errors(said):
    return [line for line in said.splitlines() if line.startswith("pointformer: error")]


def test_an_error_in_one_process_is_said_once_and_the_rest_is_kept(tmp_path):
    """The second has the broken picture; what the first scores is not scored again."""
    data = write_folder(tmp_path / "data", train=1, val=4)
    whole = (data / "val/images/2.png").read_bytes()
    (data / "val/images/2.png").write_bytes(whole[:60])
    command = ["evaluate", data, "--threads", "1", "--resume", tmp_path / "kept"]
    (_, first, code), (_, second, other) = finished(started(2, *command))
    assert (code, other) == (1, 1)
    assert errors(first) == []
    (error,) = errors(second)
    assert "2.png: " in error
    kept = [path.name[:22] for path in (tmp_path / "kept").glob("part-*")]
    assert kept == ["part-00000000-00000002"]
    (data / "val/images/2.png").write_bytes(whole)
    assert main([*map(str, command), "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 4


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["segment", "{data}/val/images", "--out", "{out}", "--model", "no.safetensors"], "no.saf"),
        (["segment", "{data}/val/images", "--out", "{data}/val/images/0.png"], "0.png"),
        (["segment", "{data}/val/images", "--out", "{out}", "--rate", "7"], "rate"),
        (["segment", "{data}/val/images", "--out", "{out}", "--threads", "0"], "threads"),
        (["evaluate", "{data}/nowhere"], "nowhere"),
        (["evaluate", "{data}", "--model", "no.safetensors"], "no.safetensors"),
        (["evaluate", "{data}", "--task", "semantic"], "made for"),
        (["evaluate", "{data}", "--resume", "{data}"], "expected a new folder"),
    ],
)
def test_what_is_wrong_for_all_is_said_once(tmp_path, arguments, error):
    data = write_folder(tmp_path / "data", train=1, val=2)
    filled = [part.format(data=data, out=tmp_path / "out") for part in arguments]
    found = finished(started(2, *filled))
    assert [code for _, _, code in found] == [1, 1]
    (line,) = errors(found[0][1] + found[1][1])
    assert error in line


SLOW = """
import os, time
import pointformer.evaluation as evaluation
predict = evaluation.predict
def slow(*arguments, **options):
    print("looking", flush=True)
    time.sleep(600 if os.environ["RANK"] == "1" else 0)
    return predict(*arguments, **options)
evaluation.predict = slow
"""


@pytest.mark.long
def test_a_process_that_dies_is_not_waited_for(tmp_path):
    data = write_folder(tmp_path / "data", train=1, val=2)
    command = ["evaluate", data, "--threads", "1", "--resume", tmp_path / "kept"]
    processes = started(2, *command, before=SLOW)
    assert processes[1].stdout.readline() == "looking\n"
    while not list((tmp_path / "kept").glob("part-*")):
        time.sleep(0.1)
    processes[1].kill()
    (_, said, code), _ = finished(processes)
    assert code == 1
    assert errors(said) == [
        "pointformer: error: process 0 of 2: lost the connection to another one, which ended; the "
        "same command goes on"
    ]
    assert [code for _, _, code in finished(started(2, *command))] == [0, 0]
