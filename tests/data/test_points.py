"""Point clouds in files: coordinates, fields, what is left alone, and what is wrong with them."""

import io
import re
import struct
import zipfile

import laspy
import numpy as np
import plyfile
import pytest
import torch

from pointformer import TokenSet
from pointformer.annotations import Category
from pointformer.data.points import (
    coordinate_unit,
    iterate_points,
    ply,
    read_points,
    write_classes,
    write_points,
)
from pointformer.data.points.asprs import class_codes, standard_name
from pointformer.data.points.columns import resolution_of

CORNER = np.array([651_000.0, 6_861_000.0, 30.0])  # of a tile in a map projection, in meters


def tile(path, count=500, point_format=7, version="1.4", scale=(0.01, 0.01, 0.001)):
    """An airborne tile with a coordinate system, records, an extra dimension: its raw content."""
    rng = np.random.default_rng(0)
    header = laspy.LasHeader(version=version, point_format=point_format)
    header.scales, header.offsets = np.array(scale), CORNER - [0.5, 0, 0]
    header.system_identifier, header.generating_software = "scanner 7", "surveyor"
    header.global_encoding.wkt = point_format >= 6
    header.add_extra_dim(laspy.ExtraBytesParams("height_above_ground", np.float32))
    header.vlrs.append(laspy.VLR("owner", 4711, "of a survey", b"\1\2\3"))
    if point_format >= 6:
        header.vlrs.append(laspy.vlrs.known.WktCoordinateSystemVlr('PROJCS["Lambert-93"]'))
    cloud = laspy.LasData(header)
    cloud.points = laspy.ScaleAwarePointRecord.zeros(count, header=header)
    cloud.X, cloud.Y, cloud.Z = rng.integers(0, 100_000, (3, count))
    for name, most in (("classification", 31), ("intensity", 65_535), ("return_number", 4)):
        cloud[name] = rng.integers(0, most + 1, count)
    cloud.gps_time = 3e8 + rng.random(count)
    for name in {"red", "green", "blue"} & set(cloud.point_format.dimension_names):
        cloud[name] = rng.integers(0, 65_536, count)
    cloud.height_above_ground = rng.random(count).astype(np.float32)
    cloud.write(path)
    return cloud


def of_world(world, **fields):
    return TokenSet.from_world(torch.as_tensor(world, dtype=torch.float64), fields=fields)


@pytest.mark.parametrize("suffix", ["las", "laz"])
def test_las(tmp_path, suffix):
    cloud = tile(tmp_path / f"tile.{suffix}")
    tokens = read_points(tmp_path / f"tile.{suffix}")
    assert tokens.sizes == (500,)
    assert np.abs(tokens.world_positions().numpy() - cloud.xyz).max() < 1e-4
    assert tokens.positions.abs().max() < 1001
    fields = tokens.fields
    for name in ("classification", "intensity", "return_number", "gps_time", "height_above_ground"):
        assert np.array_equal(fields[name].numpy(), cloud[name]), name
    assert np.array_equal(fields["color"][:, 1].numpy(), cloud.green)
    assert fields["intensity"].dtype == torch.int32
    few = read_points(tmp_path / f"tile.{suffix}", fields=("classification",))
    assert few.fields.keys() == {"classification"}
    with pytest.raises(
        ValueError, match=rf"tile.{suffix}: has no field 'label' with .*, only intensity,"
    ):
        read_points(tmp_path / f"tile.{suffix}", fields=("label",))


@pytest.mark.parametrize(("point_format", "version"), [(7, "1.4"), (6, "1.4"), (3, "1.2")])
@pytest.mark.parametrize("ways", [("las", "laz"), ("laz", "laz"), ("laz", "las")])
def test_classes_change_and_nothing_else(tmp_path, point_format, version, ways):
    source, path = tmp_path / f"tile.{ways[0]}", tmp_path / f"found.{ways[1]}"
    before = tile(source, point_format=point_format, version=version)
    if point_format >= 6:  # a record after the points
        with laspy.open(source, "a") as file:
            file.append_points(before.points[:1])
        before = laspy.read(source)
        before.evlrs.append(laspy.VLR("owner", 17, "after the points", bytes(70_000)))
        before.write(source)
    before = laspy.read(source)
    content = source.read_bytes()
    classes = (torch.as_tensor(np.array(before.classification)).long() + 1) % 32
    write_classes(path, source, classes)
    after = laspy.read(path)
    for name in before.point_format.dimension_names:
        expected = classes.numpy() if name == "classification" else before[name]
        assert np.array_equal(after[name], expected), name
    for name in (
        "scales", "offsets", "mins", "maxs", "system_identifier", "generating_software",
        "creation_date", "point_count", "version", "file_source_id", "number_of_points_by_return",
    ):  # fmt: skip
        assert np.array_equal(getattr(after.header, name), getattr(before.header, name)), name
    assert after.header.global_encoding.value == before.header.global_encoding.value
    known = [(vlr.user_id, vlr.record_id, vlr.record_data_bytes()) for vlr in before.vlrs]
    assert [(vlr.user_id, vlr.record_id, vlr.record_data_bytes()) for vlr in after.vlrs] == known
    if point_format >= 6:
        assert [vlr.record_data_bytes() for vlr in after.evlrs] == [bytes(70_000)]
    assert source.read_bytes() == content
    with laspy.open(path) as file:
        assert file.header.are_points_compressed == (ways[1] == "laz")
    with pytest.raises(FileExistsError, match=f"found.{ways[1]}: is there already"):
        write_classes(path, source, classes)
    with pytest.raises(FileExistsError, match=f"tile.{ways[0]}: is there already"):
        write_classes(source, source, classes, overwrite=True)
    write_classes(path, source, classes * 0, overwrite=True)
    assert not np.any(laspy.read(path).classification)


def test_classes_that_do_not_fit(tmp_path):
    tile(tmp_path / "old.las", point_format=3, version="1.2")
    for classes, error, message in (
        (torch.zeros(499, dtype=torch.int64), ValueError, "expected those of 500 points, got 499"),
        (torch.full((500,), 40), ValueError, "codes from 0 to 31 in this file, got 40 to 40"),
        (torch.zeros(500), TypeError, "classes: expected integers"),
    ):
        with pytest.raises(error, match=message):
            write_classes(tmp_path / "new.las", tmp_path / "old.las", classes)
    assert not list(tmp_path.glob("new*")) + list(tmp_path.glob(".pointformer*"))


@pytest.mark.parametrize("suffix", ["las", "laz", "ply", "npz", "xyz", "csv"])
def test_written_and_read(tmp_path, suffix):
    rng = np.random.default_rng(0)
    world = CORNER + rng.random((200, 3)) * 1000
    fields = {
        "classification": torch.arange(200, dtype=torch.uint8) % 20,
        "color": torch.randint(0, 256, (200, 3)).int(),
        "height": torch.rand(200),
        "time": torch.rand(200).double() * 1e9,
        "code": torch.rand(200, 2),
        "planar": torch.arange(200) % 2 == 0,
    }
    tokens = of_world(world, **fields)
    write_points(tmp_path / f"a.{suffix}", tokens.cluster(8))
    again = read_points(tmp_path / f"a.{suffix}")
    assert (again.world_positions() - tokens.world_positions()).abs().max() < 2e-4
    for name in ("classification", "color", "height", "time", "planar"):
        assert torch.equal(again.fields[name].double(), fields[name].double()), name
    code = again.fields.get("code")
    if code is None:
        code = torch.stack([again.fields["code_0"], again.fields["code_1"]], 1)
    assert torch.equal(code, fields["code"]) or suffix in ("xyz", "csv")
    assert torch.allclose(code.float(), fields["code"])
    with pytest.raises(FileExistsError, match="is there already"):
        write_points(tmp_path / f"a.{suffix}", tokens)
    write_points(tmp_path / f"a.{suffix}", tokens.select(torch.arange(0)), overwrite=True)
    if suffix in ("xyz", "csv"):
        with pytest.raises(ValueError, match="has no points"):
            read_points(tmp_path / f"a.{suffix}")
    else:
        assert read_points(tmp_path / f"a.{suffix}").num_tokens == 0


def test_small_and_flat_clouds_keep_their_digits(tmp_path):
    unit = TokenSet(torch.randn(100, 3) * 0.01)
    flat = TokenSet(torch.rand(100, 2) * 5)
    for suffix in ("las", "ply", "npz", "xyz", "csv"):
        path = tmp_path / f"unit.{suffix}"
        write_points(path, unit)
        assert (read_points(path).world_positions() - unit.positions).abs().max() < 1e-8
        if suffix in ("npz", "xyz", "csv"):
            write_points(path, flat, overwrite=True)
            assert (read_points(path).world_positions() - flat.positions).abs().max() < 1e-6
    features = flat.with_features(torch.rand(100, 7))
    write_points(tmp_path / "f.npz", features)
    assert torch.equal(read_points(tmp_path / "f.npz").features, features.features)


TEXTS = {
    "plain": "1 2 3\n4 5 6\n",
    "tabs": "1\t2\t3\n4\t5\t6\n",
    "commas": "1,2,3\r\n4,5,6\r\n",
    "semicolons": "1;2;3\n4;5;6",
    "header": "X,Y,Z\n1,2,3\n4,5,6\n",
    "quoted": '"x", "y", "z"\n1, 2, 3\n4, 5, 6\n',
    "comments": "# a survey\n# of 1999\n\n1 2 3\n4 5 6\n",
    "many comments": "# a survey\n" * 150 + "x y z\n1 2 3\n4 5 6\n",
    "many empty lines": "\n" * 150 + "1 2 3\n4 5 6\n",
    "noted": "//X Y Z\n1 2 3\n4 5 6\n",
    "other order": "z y x\n3 2 1\n6 5 4\n",
    "number of points": "2\n1 2 3\n4 5 6\n",
    "decimal commas": "x;y;z\n1,0;2,0;3,0\n4;5;6,00\n",
    "decimal commas between spaces": "x y z\n1,0 2,0 3,0\n4 5 6,00\n",
    "a sign after each column": "x,y,z,\n1,2,3,\n4,5,6,\n",
    "byte order mark": "\ufeffx y z\n1 2 3\n4 5 6\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(tmp_path, name):
    path = tmp_path / "a.dat"
    path.write_text(TEXTS[name], encoding="utf-8")
    tokens = read_points(path)
    assert tokens.world_positions().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not tokens.fields


def test_columns_of_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x;y;z;Intensity;red;green;blue\n1.5;2;3;0.25;1;2;3\n")
    tokens = read_points(path)
    assert tokens.fields["Intensity"].tolist() == [0.25]
    assert tokens.fields["color"].tolist() == [[1, 2, 3]]
    path.write_text("1 2 3 7\n1 2 3 8\n")
    assert read_points(path).fields["column_3"].tolist() == [7, 8]
    assert read_points(path).fields["column_3"].dtype == torch.int64
    path.write_text("1 2\n1 2\n")
    assert read_points(path).dimensions == 2


@pytest.mark.parametrize("byte_order", ["=", "<", ">", "text"])
def test_ply(tmp_path, byte_order):
    real = [(name, "f4") for name in ("x", "y", "nx", "ny", "nz")]
    bytes_ = [(name, "u1") for name in ("red", "green", "blue")]
    table = np.zeros(4, [*real, ("z", "f8"), *bytes_, ("label", "u2")])
    table["x"], table["z"], table["ny"], table["label"] = range(4), 7, 1, 60_000
    table["blue"] = 200
    faces = np.array([([0, 1, 2],)], [("vertex_indices", "i4", (3,))])
    elements = [
        plyfile.PlyElement.describe(table, "vertex"),
        plyfile.PlyElement.describe(faces, "face"),
    ]
    text = byte_order == "text"
    options = {"text": True} if text else {"byte_order": byte_order}
    plyfile.PlyData(elements, **options).write(str(tmp_path / "a.ply"))
    tokens = read_points(tmp_path / "a.ply")
    assert tokens.world_positions().tolist() == [[i, 0, 7] for i in range(4)]
    assert tokens.fields["color"].tolist() == [[0, 0, 200]] * 4
    assert tokens.fields["normal"].tolist() == [[0, 1, 0]] * 4
    assert tokens.fields["label"].tolist() == [60_000] * 4


def test_classes_in_a_big_endian_ply_with_lists(tmp_path):
    """What plyfile reads, it would write back in the order of this machine."""
    path = tmp_path / "a.ply"
    header = (
        "ply\nformat binary_big_endian 1.0\nelement vertex 2\nproperty float x\n"
        "property float y\nproperty float z\nproperty list uchar int near\nend_header\n"
    )
    rows = struct.pack(">3fB2i", 1, 2, 3, 2, 7, 8) + struct.pack(">3fB1i", 4, 5, 6, 1, 9)
    path.write_bytes(header.encode() + rows)
    ply.write_classes(tmp_path / "b.ply", path, np.array([3, 4]))
    tokens = read_points(tmp_path / "b.ply")
    assert tokens.world_positions().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tokens.fields["classification"].tolist() == [3, 4]
    near = plyfile.PlyData.read(tmp_path / "b.ply")["vertex"]["near"]
    assert [row.tolist() for row in near] == [[7, 8], [9]]


def test_small_numbers_in_ply_are_as_they_were(tmp_path):
    """Which has no half precision."""
    values = torch.tensor([0.1, 2, 65504], dtype=torch.float16)
    write_points(tmp_path / "a.ply", TokenSet(torch.rand(3, 3), fields={"weight": values}))
    back = read_points(tmp_path / "a.ply").fields["weight"]
    assert back.dtype == torch.float32
    assert torch.equal(back, values.float())


@pytest.mark.parametrize(("side", "step"), [(99.9, 1e-7), (100, 1e-6), (0.5, 1e-9)])
def test_steps_of_coordinates_are_below_those_of_float32(side, step):
    corners = np.array([[0, 0, 0], [side, 0, 0]]) + CORNER
    assert resolution_of(corners) == pytest.approx(step)
    assert resolution_of(corners) < np.spacing(np.float32(side))


def damaged(tmp_path, kind):
    """A file with something wrong, and what the error is to say."""
    path = tmp_path / "bad.bin"
    whole = tmp_path / "whole.laz"
    if kind.startswith(("cut off laz", "cut off las")):
        whole = tmp_path / f"whole.{kind[8:11]}"
        tile(whole, 2000)
        content = whole.read_bytes()
        path.write_bytes(content[: len(content) * (1 if "start" in kind else 9) // 10])
        return path, "cut off|cannot be read as LAS or LAZ"
    if kind == "las header":
        path.write_bytes(b"LASF" + bytes(20))
        return path, "cannot be read as LAS or LAZ"
    if kind.startswith("ply"):
        name, text = kind[4:], kind.endswith("text")
        fields = [("x", "f4"), ("y", "f4")] + ([] if "without" in name else [("z", "f4")])
        rows = np.zeros(50, fields)
        if "nan" in name:
            rows["y"][30] = np.nan
        element = plyfile.PlyElement.describe(rows, "face" if "vertex" in name else "vertex")
        plyfile.PlyData([element], text=text).write(str(path))
        if "without x" in name:
            path.write_bytes(path.read_bytes().replace(b"float x", b"float u"))
        if "cut" in name:
            path.write_bytes(path.read_bytes()[:-40])
            return path, "cannot be read as PLY"
        return path, {"nan": "sample 0 has a NaN .* row 30", "ver": "has no element vertex"}.get(
            name[:3], "has no coordinates x, y and z, only [uxy]"
        )
    if kind.startswith("npz"):
        arrays = {
            "npz without points": ({"label": np.zeros(4)}, "has no array positions, .* only"),
            "npz of clouds": ({"points": np.zeros((9, 9, 3))}, r"points: expected shape \(n, 2\)"),
            "npz of objects": ({"xyz": np.array([None] * 3)}, "cannot be read as NPZ"),
            "npz of words": ({"xyz": np.array([["a"] * 3])}, "xyz: expected numbers"),
            "npz cut": ({"xyz": np.random.default_rng(0).random((99, 3))}, "cannot be read as NPZ"),
            "npz without y": ({"x": np.zeros(3)}, "has no coordinates x, y and z"),
        }[kind]
        buffer = io.BytesIO()
        np.savez(buffer, **arrays[0])
        path.write_bytes(buffer.getvalue()[: -200 if kind == "npz cut" else None])
        return path, arrays[1]
    content, message = {
        "nothing": (b"", "has no points"),
        "picture": (b"\x89PNG\r\n\x1a\n\0\0", "is neither LAS, LAZ, PLY nor NPZ, nor text"),
        "prose": (b"To be, or not\nto be\n", "has no points"),
        "words": (b"x,y,z,class\n1,2,3,tree\n", "after line 1: could not convert string 'tree'"),
        "ragged text": (b"1 2 3\n1 2 3\n1 2\n", "the number of columns changed from 3 to 2"),
        "commas of all kinds": (b"1,5, 2,5, 3,5, x\n", "could not convert string ' x'"),
        "text nan": (b"1 2 3\n1 nan 3\n", "sample 0 has a NaN .* row 1"),
        "infinite text": (b"1 2 3\n1 2 inf\n", "sample 0 has a NaN .* row 1"),
        "other names": (b"lon,lat,h\n1,2,3\n", "has no coordinates x, y and z, only lon, lat, h"),
        "one column": (b"x\n1\n2\n", "has no (points|coordinates)"),
        "names": (b"x,y,z\n1,2,3,4\n", "4 columns of numbers and 3 names"),
        "twice": (b"x,y,z,x\n1,2,3,4\n", "two columns of one name"),
    }[kind]
    path.write_bytes(content)
    return path, message


BAD = (
    "cut off laz", "cut off laz start", "cut off las", "cut off las start", "las header",
    "ply without z", "ply without x", "ply without z text", "ply vertex", "ply nan", "ply nan text",
    "ply cut", "npz without points", "npz of clouds", "npz of objects", "npz of words", "npz cut",
    "npz without y", "nothing", "picture", "prose", "words", "ragged text", "commas of all kinds",
    "text nan", "infinite text", "other names", "one column", "names", "twice",
)  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_said_in_one_line(tmp_path, kind):
    path, message = damaged(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"bad\.bin: .*({message})") as caught:
        read_points(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_cannot_be_read_or_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.laz"):
        read_points(tmp_path / "nothing.laz")
    with pytest.raises(IsADirectoryError):
        read_points(tmp_path)
    tokens = TokenSet(torch.rand(4, 3), sizes=(2, 2), fields={"classification": torch.arange(4)})
    with pytest.raises(ValueError, match=r"tokens: expected one sample, got 2"):
        write_points(tmp_path / "a.las", tokens)
    tokens = tokens.select(torch.arange(2), (2, 0)).sample(0)
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.las, \.laz"):
        write_points(tmp_path / "a.png", tokens)
    wrong = tokens.with_fields(classification=torch.tensor([1, 300]))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/a.las: ")):
        write_points(tmp_path / "a.las", wrong)
    with pytest.raises(ValueError, match=r"tokens: \.las files hold 3-D positions"):
        write_points(tmp_path / "a.las", TokenSet(torch.rand(3, 2)))
    two = {"x": torch.zeros(2, 2), "x_0": torch.zeros(2)}
    with pytest.raises(ValueError, match="fields: there are two columns x_0"):
        write_points(tmp_path / "a.ply", tokens.with_fields(**two))
    with pytest.raises(ValueError, match="field c: expected real numbers, got complex64"):
        write_points(tmp_path / "a.xyz", tokens.with_fields(c=torch.zeros(2, dtype=torch.cfloat)))
    assert not list(tmp_path.iterdir())


NAMES = (
    *("x", "X", "Z", "positions", "origin", "features", "points", "file", "my col", "'q'", "é"),
    *("1", "nan", "a,b", "a;b", "a\tb", "a\nb", "#a", " a", "", "a" * 40, "scales", "\0", "label"),
)


@pytest.mark.parametrize(
    ("suffix", "dimensions"),
    [(suffix, 3) for suffix in ("las", "ply", "npz", "xyz", "csv")]
    + [(suffix, 2) for suffix in ("npz", "xyz", "csv")],
)
def test_fields_are_read_by_their_names_or_refused(tmp_path, suffix, dimensions):
    """No field becomes a coordinate, or one that is called otherwise."""
    path = tmp_path / f"a.{suffix}"
    world = torch.rand(4, dimensions).double()
    refused = []
    for name in NAMES:
        tokens = TokenSet.from_world(world, fields={name: torch.tensor([1, 0, 1, 1])})
        try:
            write_points(path, tokens, overwrite=True)
        except ValueError as error:
            assert f"field {name!r}: " in str(error)  # noqa: PT017
            refused.append(name)
            continue
        again = read_points(path)
        torch.testing.assert_close(again.world_positions(), world, rtol=0, atol=1e-6)
        assert again.fields[name].tolist() == [1, 0, 1, 1], name
    assert {"x", "features", ""} <= {*refused}
    fine = {"label", "#a", "points"} - ({"points"} if suffix == "las" else set())
    assert not fine & {*refused}
    assert ("my col" in refused) == (suffix == "ply")


def test_classes_of_text_whose_columns_have_names_of_several_words(tmp_path):
    (tmp_path / "a.txt").write_text("x\ty\tz\tscan angle\n1\t2\t3\t4\n")
    write_classes(tmp_path / "b.txt", tmp_path / "a.txt", torch.tensor([7]))
    fields = read_points(tmp_path / "b.txt").fields
    assert {name: rows.tolist() for name, rows in fields.items()} == {
        "scan angle": [4],
        "classification": [7],
    }
    (tmp_path / "a.txt").write_text("x;y;z;a,b\n1;2;3;4\n")
    with pytest.raises(ValueError, match=r"a.txt: field 'a,b': it cannot stand in the first line"):
        write_classes(tmp_path / "c.txt", tmp_path / "a.txt", torch.tensor([7]))


@pytest.mark.parametrize(
    ("module", "suffix"), [("laspy", "laz"), ("lazrs", "laz"), ("plyfile", "ply")]
)
def test_missing_packages_are_named(tmp_path, monkeypatch, module, suffix):
    write_points(tmp_path / f"a.{suffix}", TokenSet(torch.rand(5, 3)))
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}: pip install 'pointformer\[points\]'"):
        read_points(tmp_path / f"a.{suffix}")


def test_a_cloud_optimized_file_becomes_a_plain_one(tmp_path):
    """Its index has places of points in the file, which are others in the copy."""
    tile(tmp_path / "tile.las")
    cloud = laspy.read(tmp_path / "tile.las")
    cloud.vlrs.append(laspy.VLR("copc", 1, "info", bytes(160)))
    cloud.write(tmp_path / "tile.las")
    write_classes(tmp_path / "new.laz", tmp_path / "tile.las", torch.zeros(500, dtype=torch.uint8))
    owners = [vlr.user_id for vlr in laspy.read(tmp_path / "new.laz").vlrs]
    assert "copc" not in owners
    assert "owner" in owners


@pytest.mark.parametrize("suffix", [".las", ".laz", ".ply", ".npz", ".LAZ"])
def test_text_is_not_what_its_name_says(tmp_path, suffix):
    path = tmp_path / f"tile{suffix}"
    path.write_text("1 2 3\n4 5 6\n")
    with pytest.raises(ValueError, match=f"is named {suffix}, but does not begin like one"):
        read_points(path)


@pytest.mark.parametrize("name", ["scan.pcd", "scan.E57", "scan.pcd.gz"])
def test_formats_that_are_not_read_have_a_way_out(tmp_path, name):
    path = tmp_path / name
    path.write_text("1 2 3\n4 5 6\n")
    suffix = name.removeprefix("scan").removesuffix(".gz").lower()
    with pytest.raises(ValueError, match=f"{name}: {suffix} files are not read, write it as PLY"):
        read_points(path)


def test_features_of_points(tmp_path):
    cloud = tile(tmp_path / "tile.laz")
    tokens = read_points(tmp_path / "tile.laz", fields=(), features=("intensity", "red"))
    most = np.percentile(cloud.intensity.astype(np.float32), 99)
    expected = np.stack([np.minimum(cloud.intensity / most, 1), cloud.red], 1)
    assert torch.allclose(tokens.features, torch.from_numpy(expected).float())
    assert tokens.fields == {}
    with pytest.raises(ValueError, match=r"tile.laz: has no 'height' with a number for each"):
        read_points(tmp_path / "tile.laz", features=("height",))
    with pytest.raises(TypeError, match="features: expected names"):
        read_points(tmp_path / "tile.laz", features="intensity")


def test_intensities_are_relative_to_their_largest(tmp_path):
    """Which means nothing of decibels; NaN is named, nothing but zeros stays so."""
    path = tmp_path / "a.npz"
    for intensity, message in (
        ([-30, -20, -10], r"a.npz: Intensity: is negative at 3 of 3 points, down to -30, .* \*\* "),
        ([0, 100, -1], "Intensity: is negative at 1 of 3 points"),
        ([0, np.nan, 1], "ntensity: is NaN or infinite at 1 of 3 points"),
    ):
        np.savez(path, xyz=np.eye(3), Intensity=np.array(intensity, np.float32))
        for spelled in ("intensity", "Intensity", "scalar_Intensity"):
            with pytest.raises(ValueError, match=message):
                read_points(path, features=[spelled])
    np.savez(path, xyz=np.eye(3), Intensity=np.array([1, 2, 4]))
    assert read_points(path, features=["Intensity"]).features.max() == 1
    np.savez(path, xyz=np.eye(3), Intensity=np.zeros(3), height=-np.arange(3.0))
    features = read_points(path, features=["intensity", "height"]).features
    assert features.tolist() == [[0, 0], [0, -1], [0, -2]]


@pytest.mark.parametrize(
    ("classes", "most", "codes"),
    [
        (((1, "unclassified"), (2, "Ground"), (7, "other")), 255, [1, 2, 64]),
        (((1, "low_vegetation"), (2, "Buildings"), (7, "other")), 31, [3, 6, 31]),
        (((0, "car"), (5, "tree")), 255, [0, 5]),  # no class of the standard: as in the data set
        (((3, "a"), (3, "b"), (900, "c")), 255, [3, 64, 65]),
        (((9, "road"), (65, "6"), (11, "road surface")), 255, [11, 65, 64]),
        (((2, "ground"), (12, "12"), (200, "200"), (8, "keypoint")), 255, [2, 12, 200, 64]),
    ],
)
def test_codes_of_classes(classes, most, codes):
    assert class_codes([Category(n, name) for n, name in classes], most) == codes


def test_more_classes_than_codes():
    many = [Category(n, str(n)) for n in range(33)]
    assert class_codes(many[:32], 31) == list(range(32))
    with pytest.raises(ValueError, match="a file with codes from 0 to 31 cannot hold 33"):
        class_codes(many, 31)


@pytest.mark.parametrize("suffix", ["ply", "npz", "csv"])
def test_names_as_other_programs_write_them(tmp_path, suffix):
    """PDAL's "ReturnNumber", CloudCompare's "scalar_Classification" and "X": the column of the
    classes is the one that is replaced, under its name."""
    rng = np.random.default_rng(0)
    columns = {
        **dict(zip("XYZ", rng.random((3, 20)).astype(np.float32), strict=True)),
        "Intensity": np.arange(20, dtype=np.float32),
        "ReturnNumber": (np.arange(20) % 3).astype(np.uint8),
        "scalar_Classification": np.full(20, 2, np.float32),
    }
    path, copy = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    if suffix == "npz":
        np.savez(path, **columns)
    elif suffix == "csv":
        header = ",".join(columns)
        np.savetxt(path, np.stack([*columns.values()], 1), "%.8f", ",", header=header, comments="")
    else:
        table = np.empty(20, [(name, values.dtype) for name, values in columns.items()])
        for name, values in columns.items():
            table[name] = values
        plyfile.PlyData([plyfile.PlyElement.describe(table, "vertex")]).write(str(path))
    read = read_points(path, features=["intensity", "return_number"])
    assert read.features[:, 1].tolist() == [i % 3 for i in range(20)]
    assert read.features[:, 0].max() == 1
    write_classes(copy, path, torch.arange(20))
    fields = read_points(copy).fields
    assert fields["scalar_Classification"].tolist() == [*range(20)]
    assert [*fields] == [*read_points(path).fields]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("offset", [0.0, 6e6])
def test_lost_digits_are_told(tmp_path, dtype, offset, recwarn):
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        xyz = rng.random((2000, 3)) * 20 + (offset if dtype != np.float16 else offset / 1e4)
        np.savez(tmp_path / "a.npz", xyz=xyz.astype(dtype))
    read_points(tmp_path / "a.npz")
    lost = offset > 0 and dtype != np.float64
    assert [
        str(w.message) for w in recwarn if "digits are lost" in str(w.message)
    ] != [] or not lost
    assert len(recwarn) == lost


METERS = 'PROJCS["a",GEOGCS["b",UNIT["degree",0.0174532925199433]],UNIT["metre",1]]'
FEET = METERS.replace('"metre",1', '"US survey foot",0.3048006096012192')
UNITS = {
    METERS: "",
    FEET: "feet",
    'GEOGCS["WGS 84",DATUM["WGS_1984"],UNIT["degree",0.0174532925199433]]': "degrees",
    f'COMPD_CS["c",{METERS},VERT_CS["d",UNIT["foot",0.3048]]]': "",
    'GEOGCRS["WGS 84",ELLIPSOID["e",6378137,298.25,LENGTHUNIT["metre",1]],'
    'CS[ellipsoidal,2],ANGLEUNIT["degree",0.0174532925199433]]': "degrees",
    'PROJCRS["p",BASEGEOGCRS["b",ELLIPSOID["e",6378137,298.25,LENGTHUNIT["metre",1]]],'
    'CS[Cartesian,2],LENGTHUNIT["foot",0.3048]]': "feet",
    "": "",
}


@pytest.mark.parametrize("text", UNITS)
def test_units_of_coordinate_systems(tmp_path, text):
    header = laspy.LasHeader(version="1.4", point_format=6)
    if text:
        header.vlrs.append(laspy.vlrs.known.WktCoordinateSystemVlr(text))
    laspy.LasData(header).write(tmp_path / "a.laz")
    assert coordinate_unit(tmp_path / "a.laz") == UNITS[text]


@pytest.mark.parametrize(
    ("keys", "unit"), [((1, 9001), ""), ((1, 9003), "feet"), ((2, 0), "degrees")]
)
def test_units_of_geotiff_keys(tmp_path, keys, unit):
    header = laspy.LasHeader(version="1.2", point_format=3)
    entries = [(1024, 0, 1, keys[0]), (3076, 0, 1, keys[1])]
    numbers = np.array([(1, 1, 0, len(entries)), *entries], "<u2")
    header.vlrs.append(laspy.VLR("LASF_Projection", 34735, "", numbers.tobytes()))
    laspy.LasData(header).write(tmp_path / "a.las")
    assert coordinate_unit(tmp_path / "a.las") == unit
    (tmp_path / "a.xyz").write_text("1 2 3\n")
    assert coordinate_unit(tmp_path / "a.xyz") == ""


def test_digits_are_lost_from_an_eighth_of_the_distance_on(tmp_path, recwarn):
    """Of points in the middle: a stray is no reason to see them farther apart."""
    xyz = np.random.default_rng(0).random((2000, 3)) * 20  # 0.45 apart
    for offset, lost in ((2e5, 0), (6e5, 1)):  # in steps of 0.016 and 0.063
        far = xyz + np.array([offset, 0, 0])
        far[7] = [offset, 1e5, 0]
        np.savez(tmp_path / "a.npz", xyz=far.astype(np.float32))
        read_points(tmp_path / "a.npz")
        assert len(recwarn) == lost


CODES = (
    "never classified", "unclassified", "ground", "low vegetation", "medium vegetation",
    "high vegetation", "building", "low point", None, "water", "rail", "road surface", None,
    "wire guard", "wire conductor", "transmission tower", "wire structure connector",
    "bridge deck", "high noise", "overhead structure", "ignored ground", "snow",
    "temporal exclusion", None,
)  # fmt: skip


def test_codes_of_the_standard():
    """ASPRS LAS 1.4 R15, table 17."""
    for code, name in enumerate(CODES):
        assert standard_name(code) == (name or str(code))
        if name is not None:
            assert class_codes([Category(70, f"{name.upper().replace(' ', '-')}S")]) == [code]
    others = {"road": 11, "bridge": 17, "noise": 7, "unassigned": 1, "low noise": 7}
    for name, code in others.items():
        assert class_codes([Category(70, name)]) == [code]


@pytest.mark.parametrize(("number", "unit"), [(9001, ""), (9002, "feet"), (9005, "feet")])
def test_feet_of_several_kinds(tmp_path, number, unit):
    header = laspy.LasHeader(version="1.2", point_format=3)
    numbers = np.array([(1, 1, 0, 2), (1024, 0, 1, 1), (3076, 0, 1, number)], "<u2")
    header.vlrs.append(laspy.VLR("LASF_Projection", 34735, "", numbers.tobytes()))
    laspy.LasData(header).write(tmp_path / "a.las")
    assert coordinate_unit(tmp_path / "a.las") == unit


def test_parts_of_a_cloud_have_origins_of_their_own(tmp_path):
    """Along a million meters float32 does not hold what is far from the first."""
    x = np.linspace(0, 1e6, 1000) + 0.1234
    np.savez(tmp_path / "a.npz", xyz=np.stack([x, x * 0, x * 0], 1), number=np.arange(1000))
    parts = [*iterate_points(tmp_path / "a.npz", 400)]
    assert [part.num_tokens for part in parts] == [400, 400, 200]
    assert len({tuple(part.origin[0].tolist()) for part in parts}) == 3
    world = torch.cat([part.world_positions() for part in parts])[:, 0]
    assert (world - torch.from_numpy(x)).abs().max() < 0.02
    assert torch.cat([part.fields["number"] for part in parts]).tolist() == [*range(1000)]
    own = torch.zeros(1, 3, dtype=torch.float64)
    for part in iterate_points(tmp_path / "a.npz", 400, origin=own):
        assert torch.equal(part.origin, own)


def test_an_index_without_a_heading(tmp_path):
    """As pandas writes it."""
    (tmp_path / "a.csv").write_text(",x,y,z\n0,1.5,2,3\n1,4,5,6\n")
    tokens = read_points(tmp_path / "a.csv")
    assert tokens.fields["column_0"].tolist() == [0, 1]
    write_classes(tmp_path / "b.csv", tmp_path / "a.csv", torch.tensor([2, 6]))
    again = read_points(tmp_path / "b.csv")
    assert again.fields["classification"].tolist() == [2, 6]
    assert again.fields["column_0"].tolist() == [0, 1]


@pytest.mark.parametrize("text", ["1\t2\t3\t\n4\t5\t6\t\n", "1 2 3\t\n4 5 6\t\n"])
def test_tabs_at_the_end_of_lines(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    world = read_points(tmp_path / "a.txt").world_positions()
    assert world.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_names_in_other_alphabets_are_different_names(tmp_path):
    np.savez(tmp_path / "a.npz", **{"x": np.zeros(2), "y": np.zeros(2), "z": np.ones(2),
                                    "反射": np.arange(2), "größe": np.arange(2)})  # fmt: skip
    for name in ("高度", "gre", "gr"):
        with pytest.raises(ValueError, match="has no '"):
            read_points(tmp_path / "a.npz", features=[name])
    assert read_points(tmp_path / "a.npz", features=["Größe"]).features[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("suffix", [".xyz", ".las", ".csv"])
def test_a_single_place_keeps_its_digits(tmp_path, suffix):
    place = torch.tensor([[0.123456, 5.4321987, 1.0]], dtype=torch.float64)
    for count in (1, 3):
        path = tmp_path / f"{count}{suffix}"
        write_points(path, TokenSet.from_world(place.expand(count, 3)))
        found = read_points(path).world_positions()
        assert (found - place).abs().max() < 1e-6


def test_archives_with_other_things_in_them(tmp_path):
    np.savez(tmp_path / "a.npz", xyz=np.eye(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as file:
        file.writestr("README.txt", "about")
    assert read_points(tmp_path / "a.npz").num_tokens == 3
    np.savez(tmp_path / "b.npz", x=1.0, y=2.0, z=3.0)
    with pytest.raises(ValueError, match="x: expected a number for each point, got one number"):
        read_points(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=np.arange(3), y=np.arange(3), z=np.arange(2))
    with pytest.raises(ValueError, match="z: expected a number for each of 3 in x"):
        read_points(tmp_path / "c.npz")


def test_text_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("x,y,z,Höhe\n1,2,3,4\n".encode("latin-1"))
    with pytest.raises(ValueError, match="nor text in UTF-8"):
        read_points(tmp_path / "a.csv")
