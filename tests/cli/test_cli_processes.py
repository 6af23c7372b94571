"""Two processes share the pictures of a command."""

import json
import os
import shutil

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
