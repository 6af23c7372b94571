"""`segment` and `focus` on point clouds: what is written, and what is wrong with files."""

import csv
import json
import os
import shutil
from pathlib import Path

import laspy
import numpy as np
import plyfile
import pytest
from PIL import Image

from helpers.processes import finished, started
from helpers.tiles import CLASSES, CORNER, write_cloud, write_point_model
from pointformer import cli
from pointformer.cli.inputs import Clouds
from pointformer.cli.results import is_result
from pointformer.data import read_points
from pointformer.segmentation import clouds

PREDICT = "pointformer.segmentation.clouds.predict_points"
DRAWN = ("above.png", "classes.csv", "side.png", "summary.json")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def points_model(tmp_path_factory):
    return write_point_model(tmp_path_factory.mktemp("model") / "points.safetensors")


@pytest.fixture
def quick(monkeypatch):
    """A stand-in for the network: the class is the row modulo 3, the score the row over all."""

    def predict(model, task, tokens, progress):
        rows = np.arange(tokens.num_tokens)
        found = np.empty(len(rows), [("class", np.int32), ("score", np.float32)])
        found["class"], found["score"] = rows % 3, (rows + 1) / len(rows)
        return found

    monkeypatch.setattr(PREDICT, predict)


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_tile_as_the_model_sees_it(capsys, points_model):
    """Nothing is put in the place of the network here."""
    tile = write_cloud("tile.laz", 200)
    code, text, error = run(capsys, "segment", tile, "--out", "o", "--model", points_model)
    assert (code, error) == (0, "")
    assert text.startswith("tile.laz: 200 points in ")
    assert sorted(os.listdir("o")) == sorted(f"tile_{kind}" for kind in (*DRAWN, "points.laz"))
    codes = np.array(laspy.read("o/tile_points.laz").classification)
    assert set(codes) <= {2, 6, 64}
    with Path("o/tile_classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["code"], row["class"]) for row in rows] == [
        ("2", "ground"), ("6", "building"), ("64", "odd thing"), ("", "total"),
    ]  # fmt: skip
    assert [int(row["points"]) for row in rows[:3]] == [np.sum(codes == c) for c in (2, 6, 64)]
    assert 1 / 3 <= float(rows[3]["mean_score"]) <= 1
    code, text, error = run(capsys, "focus", tile, "--out", "f.png", "--model", points_model)
    assert (code, error) == (0, "")
    assert text == "tile.laz: tokens 200 -> 50; picture in f.png\n"
    assert is_result(Path("f.png"))


def test_the_weights_of_the_package_know_ground_and_roofs(capsys):
    """A flat-roofed house on a meadow, as scanned from the air; no `--model` is named."""
    rng = np.random.default_rng(0)
    world = rng.random((10_000, 3)) * [30, 25, 0] + rng.normal(0, 0.03, (10_000, 3))
    house = np.all(np.abs(world[:, :2] - [15, 12]) < [7, 5], axis=1)
    world[house, 2] += 8
    write_cloud("house.laz", world=world + CORNER)
    scan = laspy.read("house.laz")
    scan.intensity = rng.normal(600, 60, len(world)).clip(1)
    scan.return_number[:] = scan.number_of_returns[:] = 1
    scan.write("house.laz")
    code, _, error = run(capsys, "segment", "house.laz", "--out", "o")
    assert (code, error) == (0, "")
    codes = np.array(laspy.read("o/house_points.laz").classification)
    assert np.mean(codes[~house] == 2) > 0.9
    assert np.mean(codes[house] == 6) > 0.9
    assert json.loads(Path("o/house_summary.json").read_text())["model"] == "point_nano.lidar"


def test_a_las_file_keeps_all_else(capsys, points_model, quick):
    for point_format, codes in ((6, [2, 6, 64]), (3, [2, 6, 31])):
        tile = write_cloud("in/tile.las", point_format=point_format)
        code, _, error = run(capsys, "segment", tile, "--out", "o", "--model", points_model)
        assert (code, error) == (0, "")
        before, after = laspy.read(tile), laspy.read("o/tile_points.las")
        assert after.header.point_format.id == point_format
        assert [vlr.record_data_bytes() for vlr in after.vlrs] == [b"\1\2\3"]
        for name in ("X", "Y", "Z", "intensity", "gps_time"):
            assert np.array_equal(after[name], before[name])
        assert np.array_equal(after.classification, np.resize(codes, 60))


def test_the_table_adds_up(capsys, points_model, quick):
    write_cloud("tile.npz", 4)
    assert run(capsys, "segment", "tile.npz", "--out", "o", "--model", points_model)[0] == 0
    assert Path("o/tile_classes.csv").read_text().splitlines() == [
        "code,class,points,share,mean_score",
        "2,ground,2,0.500000,0.6250",
        "6,building,1,0.250000,0.5000",
        "64,odd thing,1,0.250000,0.7500",
        ",total,4,1.000000,0.6250",
    ]
    summary = json.loads(Path("o/tile_summary.json").read_text())
    assert summary["classes"] == {"2": "ground", "6": "building", "64": "odd thing"}
    assert summary["points"] == 4


@pytest.mark.parametrize("suffix", ["las", "laz", "ply", "npz", "xyz", "csv", "txt", "pts"])
def test_formats_keep_their_own(capsys, points_model, quick, suffix):
    tile = write_cloud(f"tile.{suffix}")
    code, _, error = run(capsys, "segment", tile, "--out", "o", "--model", points_model)
    assert (code, error) == (0, "")
    before, after = read_points(tile), read_points(f"o/tile_points.{suffix}")
    assert set(after.fields) == {*before.fields, "classification"}
    assert after.fields["classification"].tolist() == [2, 6, 64] * 20
    assert after.fields["intensity"].equal(before.fields["intensity"])
    assert (after.world_positions() - before.world_positions()).abs().max() < 1e-6


def test_the_format_is_told_by_the_content(capsys, points_model, quick):
    write_cloud("a.las")
    shutil.move("a.las", "in.dat")
    code, _, error = run(capsys, "segment", "in.dat", "--out", "o", "--model", points_model)
    assert (code, error) == (0, "")
    assert Path("o/in.dat_points.las").is_file()


def test_pictures_have_the_colors_of_classes(capsys, points_model, quick):
    corners = CORNER + np.array([[0, 0, 0], [40, 0, 5], [40, 40, 9]])
    write_cloud("tile.npz", world=corners)
    assert run(capsys, "segment", "tile.npz", "--out", "o", "--model", points_model)[0] == 0
    for name in ("above", "side"):
        shown = np.asarray(Image.open(f"o/tile_{name}.png").convert("RGB")).astype(int)
        body = shown[30:-40].reshape(-1, 3)
        body = body[body.min(1) < 200]  # neither paper nor caption
        hue = {(r, g) for r, g, b in np.round(body / body[:, 2:], 1)[:, :3] if b}
        assert hue == {(0.0, 0.5), (0.4, 0.5), (0.8, 0.5)} or len(hue) >= 3


def test_resume_and_folders(capsys, points_model, quick, monkeypatch):
    for name in ("a.laz", "b.xyz", "notes.txt", "c.png"):
        Path("in").mkdir(exist_ok=True)
        if name in ("notes.txt", "c.png"):
            Path("in", name).write_text("mine")
        else:
            write_cloud(f"in/{name}")
    arguments = ("segment", "in", "--out", "in", "--model", points_model)
    code, text, error = run(capsys, *arguments)
    assert (code, error) == (0, "")
    assert text == "2 of 2 point clouds done; results in in\n"
    names = sorted(os.listdir("in"))
    code, text, error = run(capsys, *arguments)  # replaces its own, which are no inputs
    assert (code, error) == (0, "")
    assert "2 of 2 point clouds done, 2 results of earlier runs left out" in text
    assert sorted(os.listdir("in")) == names
    monkeypatch.setattr(PREDICT, lambda *a: pytest.fail("computed"))
    assert run(capsys, *arguments, "--resume")[0] == 0
    code, text, _ = run(capsys, "segment", "in/a.laz", *arguments[2:], "--resume")
    assert (code, text) == (0, "a.laz: done already; results in in\n")
    text = run(capsys, "segment", "in/a*", *arguments[2:], "--resume")[1]
    assert text == "1 of 1 point clouds done, 1 result of earlier runs left out; results in in\n"
    Path("in/b_points.xyz").write_text("mine")
    code, _, error = run(capsys, *arguments, "--resume")
    assert code == 1
    assert "b_points.xyz: is an input" in error
    assert Path("in/b_points.xyz").read_text() == "mine"


def test_what_is_wrong_is_a_line_and_the_rest_is_done(capsys, points_model, quick):
    write_cloud("good.laz")
    write_cloud("one.laz", 1)
    write_cloud("stray.xyz", world=CORNER + np.eye(3)[[0, 1, 2, 0]] * [[1], [1], [1], [1e7]])
    write_cloud("none.xyz", intensity=False)
    write_cloud("empty.las", 0)
    Path("nan.xyz").write_text("x y z intensity\n1 2 3 4\n1 nan 3 4\n")
    Path("dark.xyz").write_text("x y z intensity\n1 2 3 nan\n1 2 3 4\n")
    Path("flat.xyz").write_text("x y intensity\n1 2 3\n2 3 4\n")
    Path("words.xyz").write_text("no points here\n")
    shutil.copy("good.laz", "cut.laz")
    os.truncate("cut.laz", 700)
    Image.new("RGB", (8, 8)).save("c.png")
    bad = {
        "none.xyz": "has no 'intensity' with a number for each point, which the model wants",
        "empty.las": "has no points",
        "nan.xyz": "NaN",
        "dark.xyz": "intensity: is NaN or infinite at 1 of 2 points",
        "flat.xyz": "has 2-D points, point_nano takes 3-D",
        "words.xyz": "has no points",
        "cut.laz": "cut off",
        "c.png": "is a picture, point_nano takes point clouds; choose another --model",
        "no.laz": "no point cloud found",
    }
    good = ("good.laz", "one.laz", "stray.xyz")
    code, text, error = run(capsys, "segment", *bad, *good, "--out", "o", "--model", points_model)
    assert code == 1
    assert f"3 of {3 + len(bad)} point clouds done" in text
    lines = error.splitlines()
    assert len(lines) == len(bad)
    assert max(map(len, lines)) < 400
    for name, words in bad.items():
        assert any(name in line and words in line for line in lines), (name, error)
    assert len(os.listdir("o")) == 5 * len(good)


def test_the_other_kind_of_model(capsys, model, points_model, quick):
    write_cloud("in/a.laz")
    write_cloud("in/b.ply")
    for named, words in (
        ("in/a.laz", "in/a.laz: is a point cloud, small takes pictures; choose another --model"),
        ("in", "in: no picture found but 2 point clouds, which small does not take; choose"),
    ):
        code, _, error = run(capsys, "segment", named, "--out", "o", "--model", model)
        assert code == 1
        assert error.count("\n") == 1
        assert words in error
    code, _, error = run(capsys, "focus", "in/a.laz", "--out", "f.png", "--model", model)
    assert (code, error.count("\n")) == (1, 1)
    assert "is a point cloud" in error
    code, _, error = run(
        capsys, "segment", "in", "--out", "o", "--model", points_model, "--tile", 9
    )
    assert code == 1
    assert "--tile: is for models of pictures, point_nano takes point clouds" in error
    whole = write_point_model("whole.safetensors", task="point_classification")
    code, _, error = run(capsys, "segment", "in", "--out", "o", "--model", whole)
    assert (code, error.count("\n")) == (1, 1)
    assert "made for 'point_classification' and finds no classes of points" in error


def test_a_folder_of_both_kinds(capsys, points_model, quick):
    """What is left out by the model that is chosen for them is told of."""
    write_cloud("in/a.laz")
    Image.new("RGB", (64, 64)).save("in/b.png")
    code, text, error = run(capsys, "segment", "in", "--out", "o")
    assert (code, error.count("\n")) == (0, 1)
    assert "in: 1 point cloud left out, beside pictures; --model point_nano.lidar takes" in error
    assert text.startswith("b.png: ")
    assert run(capsys, "segment", "in", "--out", "o", "--model", points_model)[::2] == (0, "")


def test_files_of_others_are_only_replaced_where_that_is_said(capsys, points_model, quick):
    write_cloud("a.laz")
    Path("o").mkdir()
    Path("o/a_points.laz").write_text("mine")
    arguments = ("segment", "a.laz", "--out", "o", "--model", points_model)
    code, _, error = run(capsys, *arguments)
    assert (code, error.count("\n")) == (1, 1)
    assert "a_points.laz: is there, and not as this program wrote it" in error
    assert Path("o/a_points.laz").read_text() == "mine"
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    assert len(read_points("o/a_points.laz").fields["classification"]) == 60
    # But never what is read, under any name.
    shutil.copy("a.laz", "b_points.laz")
    os.link("b_points.laz", "b.laz")
    code, _, error = run(
        capsys, "segment", "b.laz", "--out", ".", "--model", points_model, "--overwrite"
    )
    assert (code, error.count("\n")) == (1, 1)
    assert "b_points.laz: is an input, and inputs are never replaced" in error


def test_rates_of_a_model_of_points(capsys, points_model):
    write_cloud("a.laz", 200)
    kept = []
    for rate in ("0.25", "0.5", "0.1"):
        code, text, _ = run(
            capsys, "focus", "a.laz", "--out", f"{rate}.png", "--model", points_model,
            "--rate", rate,
        )  # fmt: skip
        assert code == 0
        kept.append(text)
    assert [f"200 -> {n}" in text for n, text in zip((50, 100, 20), kept, strict=True)] == [
        True
    ] * 3
    code, _, error = run(
        capsys, "segment", "a.laz", "--out", "o", "--model", points_model, "--rate", "0.5,0.5"
    )
    assert code == 1
    assert "rate: expected one number, or one for each of 1 merges" in error


def test_the_model_of_the_package_is_scored_on_clouds(capsys):
    rng = np.random.default_rng(0)
    world = CORNER + rng.random((300, 3)) * [20, 20, 0.1]
    columns = {"return_number": 1, "number_of_returns": 1, "classification": 2}
    np.savez(
        "a.npz", xyz=world, intensity=rng.integers(1, 999, 300),
        **{name: np.full(300, value) for name, value in columns.items()},
    )  # fmt: skip
    code, text, error = run(capsys, "evaluate", ".")
    assert (code, "mIoU" in text) == (0, True), error


def test_features_may_be_named(capsys, quick):
    from pointformer.models import load_model, save_model

    file = write_point_model("m.safetensors", features=("intensity", "column"))
    unnamed = load_model(file)
    save_model(unnamed, "unnamed.safetensors", trained={})
    write_cloud("a.laz")
    arguments = ("segment", "a.laz", "--out", "o", "--model", "unnamed.safetensors")
    code, _, error = run(capsys, *arguments)
    assert code == 1
    assert "takes 2 features for each point and does not say which; name them (--features)" in error
    code, _, error = run(capsys, *arguments, "--features", "intensity")
    assert code == 1
    assert "point_nano takes 2 for each point, got intensity" in error
    assert run(capsys, *arguments, "--features", "intensity,return_number")[0] == 0


@pytest.mark.long
def test_processes_share_clouds(points_model, tmp_path):
    for name in ("a.laz", "b.ply", "c.npz"):
        write_cloud(tmp_path / "in" / name)
    (tmp_path / "in/d.laz").write_bytes(b"LASF")
    out = tmp_path / "o"
    command = ["segment", tmp_path / "in", "--out", out, "--model", points_model, "--threads", "1"]
    found = finished(started(2, *command))
    assert [code for _, _, code in found] == [1, 1]
    spoken = "".join(text for text, _, _ in found)
    assert spoken.splitlines() == [f"3 of 4 point clouds done; results in {out}"]
    assert {p.name for p in out.glob("*_summary.json")} == {f"{n}_summary.json" for n in "abc"}


def test_faces_and_other_arrays_stay(capsys, points_model, quick):
    tile = write_cloud("tile.ply", 3)
    content = plyfile.PlyData.read(tile, mmap=False)
    faces = np.array([([0, 1, 2],)], [("vertex_indices", "i4", (3,))])
    content = plyfile.PlyData(
        [content["vertex"], plyfile.PlyElement.describe(faces, "face")],
        text=True,
        comments=["of me"],
    )
    content.write("tile.ply")
    assert run(capsys, "segment", "tile.ply", "--out", "o", "--model", points_model)[0] == 0
    after = plyfile.PlyData.read("o/tile_points.ply")
    assert after.text
    assert after.comments == ["of me"]
    assert after["face"].data["vertex_indices"][0].tolist() == [0, 1, 2]
    assert after["vertex"]["classification"].tolist() == [2, 6, 64]
    arrays = {
        "xyz_cm": np.arange(12, dtype=np.int32).reshape(4, 3),
        "origin": CORNER,
        "intensity": np.arange(4, dtype=np.uint16),
        "classes": np.array(CLASSES),
    }
    np.savez("scene.npz", **arrays)
    assert run(capsys, "segment", "scene.npz", "--out", "o", "--model", points_model)[0] == 0
    with np.load("o/scene_points.npz") as after:
        assert set(after.files) == {*arrays, "classification"}
        for name, values in arrays.items():
            assert np.array_equal(after[name], values)
            assert after[name].dtype == values.dtype
    world = read_points("scene.npz").world_positions().numpy()
    assert np.allclose(world, CORNER + np.arange(12).reshape(4, 3) / 100, rtol=0, atol=1e-6)


def test_clouds_are_scaled_and_have_a_time(capsys, points_model, quick, monkeypatch):
    seen, plain = [], clouds.segment_points

    def segment_points(model, tokens, *, budget, **options):
        seen.append((np.ptp(tokens.positions.numpy(), 0), budget and budget.seconds))
        return plain(model, tokens, **options)

    monkeypatch.setattr(clouds, "segment_points", segment_points)
    write_cloud("tile.npz")
    arguments = ("segment", "tile.npz", "--out", "o", "--model", points_model)
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, *arguments, "--scale", 0.5, "--budget", "100s")[0] == 0
    (whole, never), (half, seconds) = seen
    np.testing.assert_allclose(half, whole / 2, rtol=1e-5)
    assert (never, seconds) == (None, 100)
    code, _, error = run(capsys, *arguments, "--rate", 0.5, "--budget", "1s")
    assert (code, error.count("\n")) == (1, 1)
    assert "--rate, --budget: only one of them can be given" in error


@pytest.mark.parametrize("text", ["50", "0s", "-1s", "soon", "1min", "0.0ms", "1e3s"])
def test_what_is_no_time(capsys, text):
    with pytest.raises(SystemExit):
        cli.main(["segment", "x.laz", "--out", "o", f"--budget={text}"])
    assert f"expected a time such as 50ms or 2s, got {text!r}" in capsys.readouterr().err


def test_small_clouds_are_those_of_small_files():
    """Or those that cannot be read, which is said later."""
    clouds = object.__new__(Clouds)
    for name, size in (("small.laz", 2**20), ("large.laz", 2**20 + 1)):
        Path(name).write_bytes(bytes(size))
    assert clouds.are_small([Path("small.laz"), Path("none.laz")])
    assert not clouds.are_small([Path("small.laz"), Path("large.laz")])


@pytest.mark.long
def test_kernels_for_points_are_compiled(capsys, points_model, monkeypatch):
    monkeypatch.setattr("pointformer.cli.warmup.POINTS", (64, 500))
    code, text, error = run(capsys, "warmup", "--model", points_model, "--training")
    assert (code, error) == (0, "")
    assert "compiled CPU kernels" in text


def test_the_shares_of_the_most_frequent_classes_are_said(capsys, points_model, quick):
    write_cloud("tile.npz", 5)
    text = run(capsys, "segment", "tile.npz", "--out", "o", "--model", points_model)[1]
    assert text.endswith(" s: ground 40.0%, building 40.0%, odd thing 20.0%; results in o\n")
    write_cloud("two.npz", 2)  # what there is none of is not said
    text = run(capsys, "segment", "two.npz", "--out", "o", "--model", points_model)[1]
    assert text.endswith(" s: ground 50.0%, building 50.0%; results in o\n")
