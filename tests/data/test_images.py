"""Pictures as people have them: depths, layouts, planes, channels, orientations, sizes."""

import json
import logging
import os
import pickle
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from pointformer import cli, segment
from pointformer.data import read_image, read_instances, read_labels, tiff
from pointformer.data.images import image_size, open_picture
from pointformer.data.intensities import full_levels, percentile_levels, to_8_bits
from pointformer.data.pillow import without_warnings
from pointformer.data.tiff import StoredTiff
from pointformer.models import create_model

EXAMPLE = Path(__file__).parents[2] / "docs/nuclei.png"
CASES = Path(__file__).parents[1] / "cases/pictures"
EXPECTED = json.loads((CASES / "expected.json").read_text())
COUNT = 72  # objects in docs/nuclei.png


@pytest.fixture(scope="module")
def model():
    return create_model("aff_nano.nuclei").eval()


@pytest.fixture(scope="module")
def example():
    return read_image(EXAMPLE)


def refusal(source, **reading):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_image(source, **reading)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    if isinstance(source, str | Path):
        assert message.startswith(str(source))
    return message


def png(width, height, bits, data):
    """A gray PNG of compressed rows."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# The cases ---------------------------------------------------------------------------------------

CHOICES = {
    "cyx_2_channels.tif": [{"channel": 1}, {"channel": "1"}],
    "zyx_5_planes.tif": [{"plane": 3}, {"plane": "z=3"}, {"project": "max"}],
    "three_contiguous_channels_u16.tif": [{"channel": 0}, {"channel": 2}, {"channel": "0,1,2"}],
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_cases(model, example, name):
    path = CASES / name
    for reading in CHOICES.get(name, [{}]):
        picture = read_image(path, **reading)
        assert image_size(path) == picture.shape[:2]
        if name == "orientation_6.tif":
            np.testing.assert_array_equal(picture, example)
        assert abs(segment(model, path, **reading).num_objects - COUNT) <= 5
    if name in CHOICES:
        message = refusal(path)
        assert ("3 channels" in message) == name.startswith("three")
        assert ("2 channels" in message) == name.startswith("cyx")
        assert ("5 planes (z 5)" in message) == name.startswith("zyx")


# Whatever tifffile can write ---------------------------------------------------------------------

PICTURE = read_image(EXAMPLE)[60:97, 40:103]
DTYPES = {  # of values 0 to 255
    "uint8": lambda x: x.astype(np.uint8),
    "uint16": lambda x: x.astype(np.uint16),
    "uint16 full": lambda x: (x * 257).astype(np.uint16),
    "uint16 of 12 bits": lambda x: (x * 16).astype(np.uint16),
    "uint32": lambda x: (x * 2**23 + 2**31).astype(np.uint32),
    "uint64": lambda x: (x * 2**50).astype(np.uint64),
    "int8": lambda x: (x // 2 - 100).astype(np.int8),
    "int16": lambda x: (x * 11 - 200).astype(np.int16),
    "int32": lambda x: (x * 100_000 - 5).astype(np.int32),
    "int64": lambda x: (x * 10**12 - 7).astype(np.int64),
    "float16": lambda x: (x / 255).astype(np.float16),
    "float32": lambda x: (x / 250).astype(np.float32),
    "float64": lambda x: x * 1e-8 - 3e-7,
    "bool": lambda x: x > 60,
    "complex64": lambda x: x.astype(np.complex64),
}
# What is written, and what chooses the picture in it.
LAYOUTS = ("gray", "rgb", "planar", "rgba", "gray alpha", "two samples", "stack", "channels", "zc")
ORIENTED = {  # what Pillow does to show them
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@st.composite
def tiffs(draw):
    """Samples to write, options of `imwrite`, the samples shown, and how to choose them."""
    dtype, layout = draw(st.sampled_from(sorted(DTYPES))), draw(st.sampled_from(LAYOUTS))
    kind = draw(st.sampled_from(["plain", "shaped", "ome", "imagej"]))
    color = DTYPES[dtype](PICTURE.astype(np.int64))
    gray, nothing = color[..., 0], np.zeros_like(color[..., 0])
    options, choice, shown = {"photometric": "minisblack"}, {}, gray
    if layout == "gray":
        samples = gray
        options["photometric"] = draw(st.sampled_from(["minisblack", "miniswhite"]))
    elif layout in ("rgb", "planar", "rgba"):
        samples = shown = color
        options["photometric"] = "rgb"
        if layout == "planar":
            samples, options["planarconfig"] = np.moveaxis(color, -1, 0), "separate"
        if layout == "rgba":
            samples = np.concatenate([color, nothing[..., None]], -1)
            options["extrasamples"] = [draw(st.sampled_from(["unassalpha", "assocalpha"]))]
    elif layout in ("gray alpha", "two samples"):
        declared = layout == "gray alpha"
        samples = np.stack([gray, nothing] if declared else [nothing, gray], -1)
        options["planarconfig"] = "contig"
        options["extrasamples"] = ["unassalpha" if declared else "unspecified"]
        choice = {} if declared else {"channel": 1}
    else:
        axes = {"stack": draw(st.sampled_from(["ZYX", "TYX"])), "channels": "CYX", "zc": "ZCYX"}
        samples = np.stack([nothing, gray])
        choice = {"channel": 1} if layout == "channels" else {"plane": 1}
        if layout == "zc":
            samples = np.stack([np.zeros_like(samples), samples, np.zeros_like(samples)])
            choice = {"plane": "z=1", "channel": 1}
        options["metadata"] = {"axes": axes[layout]}
        if kind == "plain":  # pages, nothing tells their axes
            choice = {"plane": 3 if layout == "zc" else 1}
    if kind == "plain":
        options["metadata"] = None
    elif kind == "ome" or (kind == "imagej" and "planarconfig" not in options):
        options[kind] = True  # of ImageJ's for samples that ImageJ has
    compressions = [None, None, "zlib", "lzw", "zstd", "lzma", "packbits", "png"]
    options["compression"] = draw(st.sampled_from(compressions))
    options["predictor"] = options["compression"] is not None and draw(st.booleans())
    if draw(st.booleans()):
        options["tile"] = draw(st.sampled_from([(16, 16), (32, 48), (64, 16), (128, 128)]))
    else:
        options["rowsperstrip"] = draw(st.sampled_from([1, 5, 16, 1000]))
    options["byteorder"] = draw(st.sampled_from("<>"))
    options["bigtiff"] = draw(st.booleans())
    orientation = draw(st.integers(1, 8))
    options["extratags"] = [(274, 3, 1, orientation, True)] if orientation > 1 else []
    return samples, options, shown, choice, orientation


@settings(suppress_health_check=list(HealthCheck), deadline=None)
@given(tiffs(), st.integers(0, 40), st.integers(0, 60))
def test_whatever_tifffile_writes_of_a_picture_is_that_picture(tmp_path_factory, made, top, left):
    """Or it is refused, with the reason. Windows are parts of the whole."""
    samples, options, shown, choice, orientation = made
    path = tmp_path_factory.mktemp("tiff") / "a.tif"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tifffile.imwrite(path, samples, **options)
        same = np.array_equal(tifffile.imread(path).ravel(), samples.ravel())
    except Exception:  # of its own kinds
        same = False
    assume(same)  # tifffile cannot write every combination, or not read it again
    if samples.dtype.kind == "c":
        assert "expected integers or real numbers" in refusal(path)
        return
    if choice:
        refusal(path)
    picture = read_image(path, **choice)
    inverted = options["photometric"] == "miniswhite"
    if shown.dtype.itemsize == 1 and shown.dtype.kind in "bu":
        expected = read_image(shown)
        expected = 255 - expected if inverted else expected
    else:
        expected = read_image(-shown.astype(np.float64) if inverted else shown)
    if orientation > 1:
        expected = np.asarray(Image.fromarray(expected).transpose(ORIENTED[orientation]))
    assert picture.shape == expected.shape
    assert image_size(path) == picture.shape[:2]
    tolerance = 0 if shown.dtype.kind in "bu" and shown.dtype.itemsize == 1 else 1
    assert np.abs(picture.astype(int) - expected).max() <= tolerance
    window = slice(top, top + 13), slice(left, left + 22)
    np.testing.assert_array_equal(open_picture(path, **choice)[window], picture[window])


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in ("bool", "complex64")])
def test_every_depth_finds_the_objects(model, example, dtype):
    values = DTYPES[dtype](example[..., 0].astype(np.int64))
    assert abs(segment(model, values).num_objects - COUNT) <= 5


def test_deep_samples_lie_where_those_of_8_bits_do(example):
    """Between the percentiles, in proportion: 99.7% at half of the range, nothing beyond lost."""
    values = example[..., 0].astype(np.float64) * 3 + 100
    shown = read_image(values)[..., 0].astype(int)
    low, high = np.percentile(values, (0.3, 99.7))
    assert abs(shown[values >= high].min() - 128) < 12
    assert shown.min() == 0
    slope, offset = np.polyfit(values.ravel(), shown.ravel(), 1)
    inside = (values > low + 10) & (shown < 250)
    assert np.abs(slope * values + offset - shown)[inside].max() < 2


def spoiled(example):
    """A 12-bit picture with what cameras and programs leave in pictures."""
    rng = np.random.default_rng(0)
    gray = example[..., 0].astype(np.float32) * 12 + 200
    hot, dead, lines, dirt, border, ends = (gray.copy() for _ in range(6))
    hot[rng.random(gray.shape) < 0.01] = 65535
    dead[rng.random(gray.shape) < 0.01] = 0
    lines[:, 100], lines[50] = 65535, 0
    dirt[10:20, 10:20] = 65535
    border[:, :8], border[:3] = np.nan, np.nan
    ends[0, :5], ends[1, :5] = np.inf, -np.inf
    return {"hot": hot, "dead": dead, "lines": lines, "dirt": dirt, "border": border, "ends": ends}


@pytest.mark.parametrize("name", ["hot", "dead", "lines", "dirt", "border", "ends"])
def test_a_few_bad_samples_change_nothing(model, example, name):
    assert abs(segment(model, spoiled(example)[name]).num_objects - COUNT) <= 5


NO_DATA = {
    "float": (np.float32(1), "-9999"),
    "share": (np.float32(1 / 255), "-3.4028234663852886e+38"),
    "16 bits": (np.uint16(10), "65535"),
    "signed": (np.int16(10), "-9999.0"),
    "comma": (np.float64(1), "-9999,5"),
}


@pytest.mark.parametrize("kind", NO_DATA)
def test_what_stands_for_no_data_is_shown_as_nan_is(tmp_path, example, kind):
    """Whole, by windows and in parts that are not in the file."""
    factor, text = NO_DATA[kind]
    samples = example[..., 0] * factor
    known = samples.astype(np.float64)
    known[192:] = np.nan
    samples[192:] = float(text.replace(",", "."))
    tag = [(42113, "s", 0, text, True)]
    for number, form in enumerate(({}, {"tile": (32, 32), "compression": "zlib"})):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, samples, photometric="minisblack", extratags=tag, **form)
        np.testing.assert_array_equal(read_image(path), read_image(known))
        np.testing.assert_array_equal(
            open_picture(path)[180:200, 3:50], read_image(known)[180:200, 3:50]
        )
    tiles = (samples[y : y + 32, x : x + 32] for y in range(0, 256, 32) for x in range(0, 256, 32))
    stored = iter([None if number >= 48 else tile for number, tile in enumerate(tiles)])
    options = {"shape": samples.shape, "dtype": samples.dtype, "photometric": "minisblack"}
    tifffile.imwrite(path, stored, tile=(32, 32), compression="zlib", extratags=tag, **options)
    np.testing.assert_array_equal(read_image(path), read_image(known))


def test_no_data_that_is_none(tmp_path):
    """Of 8 bits, which are shown as they are; of maps; and what no sample can be."""
    gray = np.arange(30, dtype=np.uint8).reshape(5, 6)
    path = tmp_path / "a.tif"

    def write(samples, text):
        tag = [(42113, "s", 0, text, True)]
        tifffile.imwrite(path, samples, photometric="minisblack", extratags=tag)

    write(gray, "29")
    np.testing.assert_array_equal(read_image(path)[..., 0], gray)
    write(gray.astype(np.uint16), "29")
    np.testing.assert_array_equal(read_instances(path), gray)
    for text in ("-9999", "1e9", "0.5", "nan", "none", "inf"):
        write(gray.astype(np.uint16) * 100, text)
        np.testing.assert_array_equal(read_image(path), read_image(gray.astype(np.uint16) * 100))
    write(np.full((5, 6), 7, np.int16), "7")
    assert "no sample of the picture is a finite number" in refusal(path)


@pytest.mark.parametrize(
    ("shape", "noise"), [((85, 100, 3), 0.5), ((2, 300, 1), 0.5), ((60, 61, 2), 40)]
)
def test_levels_are_those_of_the_formula(shape, noise):
    """Percentiles of medians of 3 x 3 pixels (fewer where there are fewer), 40 standard deviations
    of the noise apart at the least; of negated samples where 0 is white."""
    rng = np.random.default_rng(0)
    down, across = (min(3, side) for side in shape[:2])
    values = np.add.outer(7 * np.arange(shape[0]), np.arange(shape[1]))[..., None] * [[[1, 2, 3]]]
    values = values[..., : shape[2]] + rng.normal(0, noise, shape)
    medians, off = [], []
    for top in range(0, shape[0] - down + 1, down):
        for left in range(0, shape[1] - across + 1, across):
            for block in np.moveaxis(values[top : top + down, left : left + across], 2, 0):
                medians.append(np.sort(block.ravel())[block.size // 2])
                off.append(abs(block.ravel()[block.size // 2] - medians[-1]))
    apart = 40 * 1.48 * np.median(off)
    low, high = np.percentile(medians, (0.3, 99.7))
    assert (apart > high - low) == (noise == 40)

    def read(rows, columns):
        return values[rows, columns]

    levels = percentile_levels(read, shape[:2])
    np.testing.assert_allclose(levels, (low, max(high, low + apart)))
    levels = percentile_levels(read, shape[:2], inverted=True)
    np.testing.assert_allclose(levels, (-high, max(-low, -high + apart)))


def test_levels_of_a_picture_that_is_equal_but_for_a_few_pixels_are_its_ends():
    values = np.full((30, 40, 1), 100.0)
    values[4, 4], values[20, 30], values[10, 10] = 50, 220, np.nan

    def read(rows, columns):
        return values[rows, columns]

    assert percentile_levels(read, (30, 40)) == (50, 220)
    assert percentile_levels(read, (30, 40), inverted=True) == (-220, -50)
    values[:] = np.nan
    assert percentile_levels(read, (30, 40)) is None


@pytest.mark.parametrize(
    ("dtype", "bits", "least", "most"),
    [("uint8", 8, 0, 255), ("uint16", 12, 0, 4095), ("int16", 16, -32768, 32767),
     ("float32", 32, 0, 1), ("uint16", 16, 0, 65535)],
)  # fmt: skip
def test_the_full_range_is_that_of_the_type_also_where_0_is_white(dtype, bits, least, most):
    dtype = np.dtype(dtype)
    assert full_levels(dtype, bits) == (least, most)
    assert full_levels(dtype, bits, True) == (-most, -least)
    values = np.linspace(least, most, 256).astype(dtype)[None, :, None]
    levels = [full_levels(dtype, bits, inverted) for inverted in (False, True)]
    shown = to_8_bits(values, levels[0]).astype(int)
    assert (np.diff(shown, axis=1) >= 0).all()
    assert (shown.min(), shown.max()) == (0, 255)
    negative = to_8_bits(values, levels[1], inverted=True)
    assert np.abs(negative - (255 - shown)).max() <= 1  # halves are rounded to even numbers


def test_of_large_pictures_windows_on_a_lattice_are_looked_at(monkeypatch):
    """32 by 32 of them, evenly spaced, apart from each other, and the same part of any picture."""
    monkeypatch.setattr("pointformer.data.intensities._SAMPLED", 2**14)
    for size in ((700, 900), (40, 5000), (130, 127)):
        seen = np.zeros(size, int)
        middles = []

        def read(rows, columns, seen=seen, middles=middles):
            seen[rows, columns] += 1
            middles.append((rows.start + rows.stop, columns.start + columns.stop))
            return np.zeros((rows.stop - rows.start, columns.stop - columns.start, 1))

        percentile_levels(read, size)
        assert seen.max() == 1
        assert 2**12 <= seen.sum() <= 2**14
        for axis in (0, 1):
            places = np.unique([middle[axis] for middle in middles]) / 2
            assert len(places) <= 32
            step = size[axis] / len(places)
            assert np.abs(places - step * (np.arange(len(places)) + 0.5)).max() <= 1


def test_values_a_little_above_a_full_scale_change_nothing(example):
    for full in (1.0, 255, 4095, 65535):
        values = example[..., 0] * (full / 255)
        before = read_image(values).astype(int)
        brightest = np.unravel_index(values.argmax(), values.shape)
        values[brightest] = 1.02 * full
        before[brightest] = read_image(values)[brightest]
        assert np.abs(read_image(values) - before).max() <= 1


def test_noise_is_not_stretched_to_objects(model, example):
    """An empty picture, and one with objects in a thousandth of it."""
    rng = np.random.default_rng(0)
    empty = rng.normal(1000, 30, (256, 256)).astype(np.uint16)
    assert segment(model, empty).num_objects == 0
    few = rng.normal(100, 4, (512, 512))
    few[100:150, 100:150] += example[60:110, 60:110, 0] * 4.0
    found = segment(model, few.astype(np.uint16))
    assert 1 <= found.num_objects <= 4
    rows, columns = np.nonzero(found.labels)
    assert rows.min() >= 95
    assert columns.max() <= 155


def test_extreme_pictures():
    gray = np.linspace(0, 1, 64).reshape(8, 8)
    expected = read_image(gray)
    for factor in (1e-310, 1e-30, 1e30, 1.7e308):
        assert np.abs(read_image(gray * factor).astype(int) - expected).max() <= 1
    both_ends = read_image((gray - 0.5) * 1.7e308 * 2)
    assert np.abs(both_ends.astype(int) - expected).max() <= 1
    for constant in (np.zeros((5, 5)), np.full((4, 6), 7, np.uint16), np.full((1, 1), -3.5)):
        assert (read_image(constant) == 0).all()
    assert read_image(np.arange(7, dtype=np.uint16)[None]).shape == (1, 7, 3)
    for unusable in (np.full((4, 4), np.nan), np.full((4, 4), np.inf)):
        assert "no sample of the picture is a finite number" in refusal(unusable)


def test_intensities_by_the_full_range():
    for values, expected in (
        (np.array([[0, 65535, 32768]], np.uint16), [0, 255, 128]),
        (np.array([[-128, 127, 0]], np.int8), [0, 255, 128]),
        (np.array([[0, 1, 0.5, np.nan]]), [0, 255, 128, 0]),
        (np.array([[0, 1, 127]], np.uint8), [0, 1, 127]),
    ):
        assert read_image(values, intensities="full")[0, :, 0].tolist() == expected
    for outside in (1.01, -0.01):
        message = refusal(np.array([[0.5, outside]]), intensities="full")
        assert "intensities 'full' need real numbers from 0 to 1" in message
    with pytest.raises(ValueError, match=r"intensities: expected one of .*, got 'fulll'"):
        read_image(np.zeros((2, 2)), intensities="fulll")


def test_colors_keep_their_proportions(example):
    """One scale for all channels: a channel at half the brightness stays at half."""
    colors = (example.astype(np.float64) - 11) * (1.0, 0.5, 0.25)
    shown = read_image(colors * 16).astype(float)
    inside = (shown[..., 0] < 250) & (shown[..., 0] > 100)
    assert inside.sum() > 100
    assert np.abs(shown[inside] - shown[inside][:, :1] * (1.0, 0.5, 0.25)).max() < 2


# What is in a file --------------------------------------------------------------------------------


def test_names_of_channels(tmp_path):
    path = tmp_path / "a.tif"
    samples = np.stack([np.full((9, 8), n, np.uint8) for n in (10, 20, 30)])
    metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP", "2"]}}
    tifffile.imwrite(path, samples, ome=True, photometric="minisblack", metadata=metadata)
    assert "3 channels (DAPI, GFP, 2)" in refusal(path)
    assert read_image(path, channel="gfp")[0, 0].tolist() == [20, 20, 20]
    assert read_image(path, channel=2)[0, 0].tolist() == [30, 30, 30]
    assert read_image(path, channel="GFP, dapi, 2")[0, 0].tolist() == [20, 10, 30]
    assert "there is no channel 'RFP'" in refusal(path, channel="RFP")
    for wrong in ("0,1", [], (0, 1, 2, 0)):
        assert "expected one, or three" in refusal_of_choice(path, channel=wrong)


def test_each_image_of_a_file_has_names_of_its_own(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        for first, names in ((10, ["DAPI", "GFP"]), (110, ["GFP", "DAPI"])):
            samples = np.stack([np.full((9, 8), first + n, np.uint8) for n in (0, 10)])
            metadata = {"axes": "CYX", "Channel": {"Name": names}}
            file.write(samples, photometric="minisblack", metadata=metadata)
    for image, value in ((0, 10), (1, 120)):
        assert read_image(path, plane=f"image={image}", channel="DAPI")[0, 0, 0] == value


def refusal_of_choice(path, **reading):
    with pytest.raises(ValueError, match="expected") as error:
        read_image(path, **reading)
    return str(error.value)


def test_planes_of_several_axes(tmp_path):
    path = tmp_path / "a.tif"
    samples = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1) * np.ones((8, 9), np.uint8)
    tifffile.imwrite(path, samples, imagej=True, metadata={"axes": "TZYX"})
    assert "6 planes (t 2, z 3)" in refusal(path)
    assert read_image(path, plane=4)[0, 0, 0] == 4
    assert read_image(path, plane="t=1, z=2")[0, 0, 0] == 5
    assert read_image(path, plane="z=1", project="max")[0, 0, 0] == 4
    assert read_image(path, project="max")[0, 0, 0] == 5
    assert "6 planes (t 2, z 3)" in refusal(path, plane="z=1")
    assert "there is no plane z=3" in refusal(path, plane="z=3,t=0")
    assert "there is no plane 6" in refusal(path, plane=6)
    assert "there is no plane q=0" in refusal(path, plane="q=0,z=0,t=0")
    for wrong in (-1, "z", "z=", "z=-1,t=0", 1.5, True):
        assert "plane: expected a number" in refusal_of_choice(path, plane=wrong)


def test_means_of_planes_are_not_dark(model, tmp_path, example):
    """An object in one plane of thirty has a thirtieth of its brightness in their mean."""
    path = tmp_path / "a.tif"
    samples = np.zeros((30, 256, 256), np.uint8)
    samples[7] = example[..., 0]
    tifffile.imwrite(path, samples, photometric="minisblack", compression="zlib")
    assert abs(segment(model, path, project="mean").num_objects - COUNT) <= 5


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.float32])
def test_means_of_planes_have_the_full_range_of_their_planes(tmp_path, dtype):
    path = tmp_path / "a.tif"
    top = 1 if dtype in (bool, np.float32) else np.iinfo(dtype).max
    samples = np.zeros((2, 3, 4), dtype)
    samples[0, 0], samples[1, 1:] = top, top
    samples[0, 2] = top
    tifffile.imwrite(path, samples, photometric="minisblack")
    zero, full = (128, 255) if dtype == np.int8 else (0, 255)
    half = (zero + full) / 2
    shown = read_image(path, project="mean", intensities="full")[:, 0, 0]
    assert np.abs(shown - [half, half, full]).max() <= 0.5


def test_pages_of_different_sizes_and_what_is_beside_a_picture(tmp_path):
    path = tmp_path / "a.tif"
    small, large = np.full((8, 9), 1, np.uint8), np.full((20, 30), 2, np.uint8)
    with tifffile.TiffWriter(path) as file:
        file.write(large, metadata=None, photometric="minisblack")
        file.write(small, metadata=None, photometric="minisblack")
    assert "holds 2 pictures (20 x 30, 8 x 9)" in refusal(path)
    with pytest.raises(ValueError, match="holds 2 pictures"):
        image_size(path)
    assert read_image(path, plane=1).shape == read_image(path, plane="image=1").shape == (8, 9, 3)
    with tifffile.TiffWriter(path) as file:
        file.write(large, metadata=None, photometric="minisblack")
        file.write(small, metadata=None, photometric="minisblack", subfiletype=1)
    assert read_image(path).shape == (20, 30, 3)
    assert image_size(path) == (20, 30)


def test_the_full_level_of_a_pyramid(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(np.full((64, 96), 5, np.uint8), subifds=2, tile=(16, 16))
        for side in (2, 4):
            level = np.full((64 // side, 96 // side), 9, np.uint8)
            file.write(level, subfiletype=1, tile=(16, 16))
    assert (read_image(path) == 5).all()
    assert image_size(path) == (64, 96)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_channels_in_the_order_that_is_asked_for(tmp_path, suffix):
    """Also three of three."""
    path = tmp_path / f"a.{suffix}"
    colors = Image.fromarray(np.uint8([10, 100, 200]) * np.ones((8, 9, 1), np.uint8))
    colors.save(path, **{"lossless": True} if suffix == "webp" else {})
    for source in (path, colors, np.asarray(colors)):
        assert read_image(source, channel="2,1,0")[0, 0].tolist() == [200, 100, 10]
        assert read_image(source, channel="0,0,0")[0, 0].tolist() == [10, 10, 10]


def test_four_samples_without_a_word_about_the_fourth(tmp_path):
    path = tmp_path / "a.tif"
    samples = np.arange(4, dtype=np.uint8) * np.ones((8, 9, 1), np.uint8)
    tifffile.imwrite(path, samples, photometric="rgb", extrasamples=["unspecified"])
    assert "4 channels (red, green, blue, 3)" in refusal(path)
    assert read_image(path, channel="0,1,2")[0, 0].tolist() == [0, 1, 2]
    assert read_image(path, channel="green")[0, 0].tolist() == [1, 1, 1]


def test_few_bits_palettes_and_inks(tmp_path):
    path = tmp_path / "a.tif"
    values = np.arange(16, dtype=np.uint8).reshape(2, 8)
    tifffile.imwrite(path, values, bitspersample=4, photometric="minisblack")
    np.testing.assert_array_equal(read_image(path)[..., 0], values * 17)
    np.testing.assert_array_equal(read_labels(path), values)
    table = np.random.default_rng(0).integers(0, 65536, (3, 256), dtype=np.uint16)
    tifffile.imwrite(path, values, photometric="palette", colormap=table)
    np.testing.assert_array_equal(read_image(path), (table.T // 256)[values])
    np.testing.assert_array_equal(read_instances(path), values)
    inks = np.random.default_rng(1).integers(0, 256, (8, 9, 4), dtype=np.uint8)
    tifffile.imwrite(path, inks, photometric="separated")
    expected = np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)
    tifffile.imwrite(path, inks.astype(np.uint16) * 257, photometric="separated")
    shown = read_image(path, intensities="full").astype(int)
    assert np.abs(shown - expected).max() <= 1


def test_gray_of_4_bits_in_png_keeps_its_numbers(tmp_path):
    """Which Pillow spreads to 255."""

    def chunk(name, content):
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = b"".join(b"\0" + bytes([0x01 + 0x22 * n for n in range(4)]) for _ in range(2))
    rows += b"".join(b"\0" + bytes([0x89 + 0x22 * n for n in range(4)]) for _ in range(2))
    header = struct.pack(">IIBBBBB", 8, 4, 4, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks))
    expected = np.repeat(np.arange(16).reshape(2, 8), 2, 0)
    np.testing.assert_array_equal(read_labels(path), expected)
    np.testing.assert_array_equal(read_image(path)[..., 0], expected * 17)


def test_jpeg_in_tiff_is_rgb(tmp_path, example):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, example, photometric="rgb", compression="jpeg", tile=(64, 64),
        compressionargs={"level": 95},
    )  # fmt: skip
    assert np.abs(read_image(path).astype(int) - example).mean() < 3


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "zstd", "jpeg", "group4"])
def test_tiffs_that_pillow_writes_are_what_it_reads(tmp_path, example, compression):
    path = tmp_path / "a.tif"
    picture = Image.fromarray(example)
    picture = picture.convert("1") if compression == "group4" else picture
    picture.save(path, compression=compression)
    with Image.open(path) as stored:
        np.testing.assert_array_equal(read_image(path), np.asarray(stored.convert("RGB")))


def test_kinds_of_colors_that_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    colors = np.zeros((8, 8, 3), np.uint8)
    for photometric, name in (("cielab", "CIELAB"), ("cfa", "CFA")):
        samples = colors if photometric == "cielab" else colors[..., 0]
        tifffile.imwrite(path, samples, photometric=photometric)
        assert f"of the kind {name} are not read" in refusal(path)


# Files that Pillow reads --------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path, orientation):
    colors = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    transposed = ORIENTED.get(orientation)
    for suffix, options in ((".png", {}), (".webp", {"lossless": True}), (".jpg", {})):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(colors).save(path, exif=exif, **options)
        with Image.open(path) as stored:
            plain = stored.convert("RGB")
        plain = plain if transposed is None else plain.transpose(transposed)
        np.testing.assert_array_equal(read_image(path), np.asarray(plain))
        assert image_size(path) == (plain.height, plain.width)
        with Image.open(path) as stored:
            np.testing.assert_array_equal(read_image(stored), np.asarray(plain))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png(tmp_path, channels):
    """Pillow keeps 8 bits of its colors."""
    import imagecodecs

    rng = np.random.default_rng(0)
    samples = rng.integers(0, 4096, (30, 40, channels), dtype=np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(samples.squeeze()))
    expected = read_image(samples[..., : 1 if channels < 3 else 3])
    np.testing.assert_array_equal(read_image(path), expected)
    path.write_bytes(imagecodecs.jpeg2k_encode(samples[..., :3].squeeze(), level=0))
    if channels != 2:
        np.testing.assert_array_equal(read_image(path), expected)


def test_16_bit_colors_elsewhere_are_refused(tmp_path):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 3 2 65535\n" + bytes(range(36)))
    assert "16-bit colors of the format PPM are not read" in refusal(path)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_need_a_choice(tmp_path, suffix):
    frames = [Image.new("RGB", (9, 8), (n, n, n)) for n in (40, 80, 120)]
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert "3 planes (frame 3)" in refusal(path)
    for plane in (0, 2, 1):
        assert abs(int(read_image(path, plane=plane)[0, 0, 0]) - 40 * (plane + 1)) <= 1
    assert abs(int(read_image(path, project="max")[0, 0, 0]) - 120) <= 1
    assert image_size(path) == (8, 9)
    with pytest.raises(ValueError, match="3 planes"):
        read_instances(path)


def test_a_photograph_with_a_thumbnail_is_one_picture(tmp_path):
    """MPO, what phones write: the second is no plane unless both say that they are equal."""
    path = tmp_path / "a.jpg"
    photo = Image.fromarray(PICTURE)
    photo.save(path, "MPO", save_all=True, append_images=[photo.rotate(9)])
    assert read_image(path).shape == PICTURE.shape
    with Image.open(path) as stored:
        entries = stored.mpinfo[0xB002]
    assert len(entries) == 2
    data = bytearray(path.read_bytes())
    for entry in entries:  # attribute, size, ...: now both are of the kind "disparity"
        at = data.index(struct.pack("<I", entry["Size"])) - 4
        data[at : at + 4] = struct.pack("<I", 0x020002)
    path.write_bytes(data)
    assert "2 planes (frame 2)" in refusal(path)


# Maps ---------------------------------------------------------------------------------------------


MAP_TYPES = (np.uint8, np.uint16, np.uint32, np.int32, np.float32, bool)


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        *((suffix, dtype) for suffix in (".tif", ".TIF", ".tiff") for dtype in MAP_TYPES),
        *((".PNG", dtype) for dtype in (np.uint8, np.uint16, bool)),
    ],
)
def test_maps_of_every_type(tmp_path, suffix, dtype):
    ids = np.array([[0, 1, 1], [0, 1, 0]]).astype(dtype)
    if dtype is not bool:
        ids[0, 1] = {1: 200, 2: 65535, 4: 70000}[ids.dtype.itemsize]
    path = tmp_path / f"a{suffix}"
    if suffix == ".PNG":
        Image.fromarray(ids).save(path)
    else:
        tifffile.imwrite(path, ids, compression=None if dtype is bool else "lzw")
    read = read_instances(path)
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids.astype(int))


def test_maps_that_are_none(tmp_path):
    path = tmp_path / "a.tif"
    for values, reason in (
        (np.full((3, 3), 2**31, np.uint32), "values from 0 to 2147483647, got 2147483648"),
        (np.full((3, 3), -1, np.int16), "got -1"),
        (np.full((3, 3), 0.5, np.float32), "whole numbers, got fractions"),
        (np.full((3, 3), np.nan, np.float32), "got nan"),
        (np.zeros((4, 3, 3), np.uint16), "got 4 planes"),
    ):
        tifffile.imwrite(path, values, photometric="minisblack")
        with pytest.raises(ValueError, match="expected an instance map") as error:
            read_instances(path)
        assert reason in str(error.value)
    tifffile.imwrite(path, np.zeros((8, 9, 3), np.uint8), photometric="rgb")
    with pytest.raises(ValueError, match="channels red, green, blue"):
        read_labels(path)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_the_numbers_stored(tmp_path, bits):
    """Pillow multiplies the values of gray PNGs, so that the largest is white."""
    labels = np.arange(8, dtype=np.uint8).reshape(1, 8) % 2**bits
    row = np.packbits(np.unpackbits(labels[0][:, None], axis=1)[:, 8 - bits :].ravel()).tobytes()

    path = tmp_path / "a.png"
    path.write_bytes(png(8, 1, bits, zlib.compress(b"\0" + row)))
    np.testing.assert_array_equal(read_labels(path), labels)
    np.testing.assert_array_equal(read_image(path)[..., 0], labels * (255 // (2**bits - 1)))


# Arrays -------------------------------------------------------------------------------------------


def test_a_tensor_whose_channels_are_last():
    message = refusal(torch.zeros(8, 9, 3))
    assert "got (8, 9, 3); permute(2, 0, 1)" in message
    assert read_image(torch.zeros(8, 9, 3).permute(2, 0, 1)).shape == (8, 9, 3)
    assert read_image(torch.zeros(3, 9, 3)).shape == (9, 3, 3)  # it may be so meant


def test_masked_arrays_are_filled_by_who_knows_with_what():
    masked = np.ma.masked_greater(np.arange(72.0).reshape(8, 9), 69)
    assert "2 of its 72 values are masked; use image.filled(value)" in refusal(masked)
    assert read_image(masked.filled(0)).shape == (8, 9, 3)
    assert read_image(np.ma.array(np.zeros((8, 9)))).shape == (8, 9, 3)  # nothing is masked


def test_arrays_tensors_and_pictures_are_read_as_files_are(tmp_path, example):
    gray = example[..., :1]
    alpha = np.zeros_like(gray)
    deep = gray.astype(np.uint16) * 16
    path = tmp_path / "a.tif"
    for values in (example, gray, deep, deep / 255, gray > 60, deep.astype(np.int32)):
        kind = "rgb" if values is example else "minisblack"
        tifffile.imwrite(path, np.squeeze(values), photometric=kind)
        expected = read_image(path)
        tensor = torch.from_numpy(np.moveaxis(values, 2, 0).copy())
        for form in (values, np.squeeze(values), tensor, tensor.squeeze(0)):
            np.testing.assert_array_equal(read_image(form), expected)
    np.testing.assert_array_equal(read_image(np.concatenate([example, alpha], 2)), example)
    for mode in ("RGB", "RGBA", "L", "P", "1", "I", "F", "CMYK", "I;16"):
        picture = Image.fromarray(deep[..., 0])
        if mode != "I;16":
            picture = Image.fromarray(example).convert(mode)
        picture.save(path)
        np.testing.assert_array_equal(read_image(picture), read_image(path))
    assert read_image(torch.rand(3, 8, 9).bfloat16()).shape == (8, 9, 3)


@pytest.mark.parametrize("shape", [(8, 9, 2), (5, 8, 9), (3,), (0, 8), (2, 3, 4, 3)])
def test_arrays_that_are_no_picture(shape):
    assert f"got {shape}" in refusal(np.zeros(shape))


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "U3", "O"])
def test_types_that_are_no_intensities(dtype):
    assert "expected integers or real numbers" in refusal(np.zeros((4, 4), dtype))


# Sizes --------------------------------------------------------------------------------------------


def test_a_header_that_claims_a_huge_picture(tmp_path):
    """Refused before memory is taken; the limit is an option."""
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, 8, zlib.compress(bytes(2**20))))
    tifffile.imwrite(tmp_path / "one.tif", np.zeros((16, 16), np.uint8), tile=(16, 16))
    tracemalloc.start()
    assert "60000 x 60000 pixels are more than 1,073,741,824" in refusal(tmp_path / "bomb.png")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert "max_pixels" in refusal(tmp_path / "one.tif", max_pixels=255)
    assert read_image(tmp_path / "one.tif", max_pixels=256).shape == (16, 16, 3)


def test_pillows_own_limit_is_neither_used_nor_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(path)
    assert read_image(path).shape == (40, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


LAYOUT_OF_LARGE = {
    "tiles": {"tile": (64, 64), "compression": "lzw"},
    "strips": {"rowsperstrip": 32, "compression": "zlib"},
    "raw": {},
}


@pytest.mark.parametrize("kind", LAYOUT_OF_LARGE)
def test_a_window_decodes_what_it_touches(tmp_path, monkeypatch, kind):
    """A window of a picture, once its levels are known, costs its own strips or tiles."""
    path = tmp_path / "a.tif"
    side = 2048
    values = np.random.default_rng(0).integers(0, 4096, (side, side), dtype=np.uint16)
    tifffile.imwrite(path, values, photometric="minisblack", **LAYOUT_OF_LARGE[kind])
    decoded = []
    decode = StoredTiff._decode

    def spy(self, number, segment):
        decoded.append(segment)
        return decode(self, number, segment)

    monkeypatch.setattr(StoredTiff, "_decode", spy)
    whole = read_image(path)
    picture = open_picture(path)
    assert len(picture[0:1, 0:1])  # with the levels
    picture._stored._decoded.clear()
    decoded.clear()
    tracemalloc.start()
    window = picture[1000:1064, 500:564]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(window, whole[1000:1064, 500:564])
    assert len(decoded) == {"tiles": 4, "strips": 3, "raw": 0}[kind]
    assert peak < 2**21  # of 8 MiB
    for top in range(0, side, 512):  # neighbors decode nothing twice
        decoded.clear()
        for left in range(0, side, 512):
            picture[top : top + 512, left : left + 512]
        assert len(decoded) == len(set(decoded))


def test_windows_are_parts_of_the_whole_of_large_pictures(tmp_path, monkeypatch, example):
    """Of large pictures a part is looked at for the levels, the same one however it is read."""
    monkeypatch.setattr("pointformer.data.intensities._SAMPLED", 2**14)
    values = np.tile(example[..., 0] / 99, (2, 2))
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(64, 64), photometric="minisblack")
    whole = read_image(tmp_path / "a.tif")
    picture = open_picture(tmp_path / "a.tif")
    np.testing.assert_array_equal(picture[17:99, 200:450], whole[17:99, 200:450])
    np.testing.assert_array_equal(read_image(values), whole)
    monkeypatch.undo()
    assert np.abs(read_image(values).astype(int) - whole).mean() < 6


def test_a_large_file_is_segmented_by_windows(model, tmp_path, example):
    path = tmp_path / "a.tif"
    deep = np.tile(example[..., 0].astype(np.uint16) * 16, (2, 2))
    tifffile.imwrite(path, deep, tile=(64, 64), compression="zlib", photometric="minisblack")
    result = segment(model, path, tile=256, overlap=48)
    assert abs(result.num_objects - 4 * COUNT) <= 16
    assert result.labels.shape == deep.shape
    assert "image" not in vars(result)  # not read until it is asked for
    np.testing.assert_array_equal(result.image, read_image(deep))


def test_what_the_memory_cannot_hold_is_refused_before_it_is_tried(model, tmp_path, monkeypatch):
    path = tmp_path / "large.tif"
    tifffile.memmap(path, shape=(30_000, 30_000), dtype=np.uint8)  # a hole in the file
    pages = 2**30 // os.sysconf("SC_PAGE_SIZE")
    sysconf = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda n: pages if n == "SC_PHYS_PAGES" else sysconf(n))
    for options in ({}, {"tile": 8192}, {"scale": 0.2}):
        with pytest.raises(
            ValueError, match=r"large\.tif: .* at once need more than .* use a tile"
        ):
            segment(model, path, **options)


def test_choices_through_the_command_line(tmp_path, capsys):
    for name, option in (("cyx_2_channels", "--channel=1"), ("zyx_5_planes", "--plane=z=3")):
        arguments = [str(CASES / f"{name}.tif"), "--out", str(tmp_path), option, "--diameter=9.8"]
        assert cli.main(["segment", *arguments]) == 0
        count = json.loads((tmp_path / f"{name}_summary.json").read_text())["count"]
        assert abs(count - COUNT) <= 5
    picture = str(tmp_path / "focus.png")
    assert cli.main(["focus", str(CASES / "zyx_5_planes.tif"), "--out", picture]) == 1
    assert "5 planes (z 5)" in capsys.readouterr().err
    arguments = [str(CASES / "zyx_5_planes.tif"), "--out", picture, "--project=max"]
    assert cli.main(["focus", *arguments]) == 0


def test_pictures_travel_to_other_processes(tmp_path, monkeypatch, example):
    monkeypatch.chdir(tmp_path)
    stack = np.stack([np.zeros((256, 256), np.uint8), example[..., 0]])
    tifffile.imwrite("a.tif", stack, photometric="minisblack", compression="zlib")
    Image.fromarray(example).save("a.png")
    for source, reading in (
        ("a.tif", {"plane": 1}), ("a.png", {}), (example, {}), (Image.fromarray(example), {}),
    ):  # fmt: skip
        sent = pickle.dumps(open_picture(source, **reading))
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path.parent)
            np.testing.assert_array_equal(pickle.loads(sent).read(), example)


# Sizes of objects ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "low", "high"), [(1024, 66, 74), (64, 66, 76)])
def test_objects_of_other_sizes_than_the_trained(model, example, side, low, high):
    """By factor, and by diameter: the nuclei's median is 9.8. Without, small ones are lost."""
    resized = np.asarray(Image.fromarray(example).resize((side, side), Image.Resampling.BICUBIC))
    if side < example.shape[0]:
        assert segment(model, resized).num_objects < COUNT / 2
    for size in ({"scale": 256 / side}, {"diameter": 9.8 * side / 256}):
        result = segment(model, resized, **size)
        assert low <= result.num_objects <= high
        assert result.labels.shape == (side, side)
        assert {len(result.classes), len(result.scores), len(result.objects())} == {
            result.num_objects
        }


def test_scaled_tiles_agree_with_the_whole(model, example):
    large = np.asarray(Image.fromarray(example).resize((1024, 900), Image.Resampling.BICUBIC))
    tiled = segment(model, large, scale=0.25, tile=160, overlap=48)
    whole = segment(model, large, scale=0.25)
    assert abs(tiled.num_objects - whole.num_objects) <= 3
    picture = open_picture(large)
    for factor in (0.25, 0.37, 1.7):
        seen = picture.scaled(factor)
        parts = np.abs(seen[50:90, 100:170].astype(int) - seen.read()[50:90, 100:170])
        assert parts.max() <= 1


def test_scales_that_cannot_be(model):
    picture = np.zeros((32, 32, 3), np.uint8)
    for wrong in (0, -1, float("nan"), float("inf")):
        for name in ("scale", "diameter"):
            with pytest.raises(ValueError, match=f"{name}: expected a positive number"):
                segment(model, picture, **{name: wrong})
    with pytest.raises(ValueError, match="only one of them"):
        segment(model, picture, scale=2, diameter=8)
    other = create_model("aff_nano", head="dense", num_classes=3).eval()
    with pytest.raises(ValueError, match="diameter: aff_nano does not know the size"):
        segment(other, picture, diameter=8)


# Broken files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "tiles", "ome", "imagej", "jpeg"])
def test_broken_tiffs_give_a_picture_or_one_line(tmp_path, kind, caplog):
    colors = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    options = {
        "plain": {"compression": "lzw"},
        "tiles": {"tile": (16, 16), "compression": "zlib", "predictor": True},
        "ome": {"ome": True},
        "imagej": {"imagej": True},
        "jpeg": {"compression": "jpeg"},
    }[kind]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, colors, photometric="rgb", **options)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    caplog.set_level(logging.CRITICAL, "tifffile")
    rejected = []
    for trial in range(80):
        data = bytearray(whole[: rng.integers(len(whole))] if trial % 2 else whole)
        for _ in range(trial % 5):
            if data:
                data[rng.integers(min(len(data), 300))] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert read_image(path).shape[2:] == (3,)
        except ValueError as error:
            rejected.append(str(error))
    assert len(rejected) > 10
    assert all(message.startswith(str(path)) and "\n" not in message for message in rejected)


def test_a_truncated_file_is_not_filled_with_zeros(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for options in ({}, {"compression": "zlib"}, {"tile": (16, 16)}):
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, colors, photometric="rgb", **options)
        path.write_bytes(path.read_bytes()[:-300])
        assert "truncated" in refusal(path)


def test_a_tiff_file_without_a_picture(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path):
        pass
    assert "the file holds none" in refusal(path)


def test_a_picture_is_not_scaled_to_nothing():
    picture = open_picture(np.zeros((40, 10), np.uint8))
    assert picture.scaled(0.1).shape == (4, 1)
    with pytest.raises(ValueError, match=r"image: nothing is left of 40 x 10 pixels"):
        picture.scaled(0.01)


def test_a_truncated_stack_is_not_taken_for_its_first_plane(tmp_path):
    """ImageJ tells the number of planes in words; without them the pages that are left would do."""
    path = tmp_path / "a.tif"
    samples = np.zeros((3, 64, 64), np.uint8)
    tifffile.imwrite(path, samples, imagej=True, photometric="minisblack")
    whole = path.read_bytes()
    first = whole.index(b"\0" * 64 * 64 * 3)
    path.write_bytes(whole[: first + 64 * 64 + 100])
    refusal(path)
    refusal(path, plane=0)


def test_planes_that_are_named_but_lie_elsewhere(tmp_path):
    """OME's other files are not opened: what is in this one can be chosen."""
    path, planes = tmp_path / "a.ome.tif", np.arange(2, dtype=np.uint8)[:, None, None]
    tifffile.imwrite(path, planes + np.zeros((8, 9), np.uint8), metadata={"axes": "ZYX"})
    text = tifffile.tiffcomment(path).replace('SizeZ="2"', 'SizeZ="3"')
    other = '<TiffData FirstZ="2"><UUID FileName="../b.ome.tif">urn:uuid:2</UUID></TiffData>'
    tifffile.tiffcomment(path, text.replace("</Pixels>", f"{other}</Pixels>").encode())
    tifffile.imwrite(tmp_path.parent / "b.ome.tif", np.full((8, 9), 7, np.uint8))
    assert (read_image(path, plane=1) == 1).all()
    assert "planes" in refusal(path)
    assert "no plane 2" in refusal(path, plane=2)


def test_nothing_is_printed_about_files(tmp_path, capfd):
    path = tmp_path / "a.tif"
    wrong = '{"shape": [9, 9]}'
    tifffile.imwrite(path, np.zeros((8, 8), np.uint8), description=wrong, metadata=None)
    read_image(path)
    path.write_bytes(path.read_bytes()[:60])
    refusal(path)
    assert capfd.readouterr() == ("", "")


def test_threads_that_read_pictures_leave_warnings_as_they_were():
    """One that begins while another reads, and ends after it, must not put back its silence."""
    first, second = without_warnings(), without_warnings()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        warnings.warn("of a picture", stacklevel=1)
        second.__exit__(None, None, None)
        assert warnings.filters == before
        warnings.warn("seen", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["seen"]


def test_planes_whose_0_is_white_are_projected_as_they_are_shown(tmp_path):
    path = tmp_path / "a.tif"
    samples = np.random.default_rng(0).integers(0, 256, (3, 8, 9), np.uint8)
    tifffile.imwrite(path, samples, photometric="miniswhite")
    shown = read_image(path, project="max")[..., 0]
    np.testing.assert_array_equal(shown, 255 - samples.min(0))
    shown = read_image(path, project="mean", intensities="full")[..., 0]
    assert np.abs(shown - (255 - samples.mean(0))).max() <= 0.5


def test_planes_are_counted_over_all_pictures_of_a_file(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for n in range(3):
            file.write(np.full((20, 30), n, np.uint8), metadata=None, photometric="minisblack")
        file.write(np.full((8, 9), 3, np.uint8), metadata=None, photometric="minisblack")
    for plane in range(4):
        assert read_image(path, plane=plane)[0, 0, 0] == plane
    assert read_image(path, plane="image=0,page=2")[0, 0, 0] == 2
    assert read_image(path, plane="image=0", project="max")[0, 0, 0] == 2
    assert "there is no plane 4; the last of its planes is 3" in refusal(path, plane=4)
    assert "it has 3 planes (page 3)" in refusal(path, plane="image=0")


@pytest.mark.parametrize("name", ["label", "Macro", "thumbnail", "overview", "map"])
def test_what_slide_scanners_add_is_told_by_its_name(tmp_path, name):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        for title, size in (("slide", (64, 96)), (name, (20, 30))):
            file.write(np.zeros(size, np.uint8), metadata={"axes": "YX", "Name": title})
    assert read_image(path).shape == (64, 96, 3)
    with tifffile.TiffWriter(path, ome=True) as file:
        for title, size in (("slide", (64, 96)), ("labels of cells", (20, 30))):
            file.write(np.zeros(size, np.uint8), metadata={"axes": "YX", "Name": title})
    assert "holds 2 pictures" in refusal(path)


def test_a_page_that_is_a_mask_of_another_is_no_picture(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(np.full((20, 30), 7, np.uint8), metadata=None)
        file.write(np.zeros((8, 9), bool), metadata=None, subfiletype=4)
    assert read_image(path).shape == (20, 30, 3)


def test_what_was_decoded_does_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "_CACHE", 1000)
    values = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(16, 16), compression="zlib")
    (stored,) = tiff.stored_tiffs(tmp_path / "a.tif", 2**20)
    read = stored.read(0, [0], slice(0, 64), slice(0, 96))[..., 0]
    np.testing.assert_array_equal(read, values)
    assert sum(part.nbytes for part in stored._decoded.values()) <= 1000


def test_palettes_of_8_bits_and_colors_as_cameras_store_them(tmp_path):
    """What programs write that take the 16 bits of TIFF's palettes for 8; YCbCr."""
    path = tmp_path / "a.tif"
    values = np.arange(16, dtype=np.uint8).reshape(2, 8)
    table = np.random.default_rng(0).integers(0, 256, (3, 256), dtype=np.uint16)
    tifffile.imwrite(path, values, photometric="palette", colormap=table)
    np.testing.assert_array_equal(read_image(path), table.T[values])
    stored = np.random.default_rng(1).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    tifffile.imwrite(path, stored, photometric="ycbcr", subsampling=(1, 1))
    expected = np.asarray(Image.fromarray(stored, "YCbCr").convert("RGB"))
    np.testing.assert_array_equal(read_image(path), expected)


def test_scaled_pictures_are_pillows(example):
    """All at once as by windows, with sides to the nearest pixel."""
    picture = open_picture(example[:150])
    for factor in (0.37, 0.5, 1.69):
        size = round(256 * factor), round(150 * factor)
        expected = Image.fromarray(example[:150]).resize(size, Image.Resampling.BICUBIC)
        seen = picture.scaled(factor)
        assert seen.shape == size[::-1]
        np.testing.assert_array_equal(seen.read(), np.asarray(expected))
        window = np.asarray(expected)[10:33, 20:71].astype(int)
        assert np.abs(seen[10:33, 20:71] - window).max() <= 1


@pytest.mark.parametrize(
    ("content", "values"),
    [(b"P5 4 1 3\n" + bytes([0, 1, 2, 3]), [0, 1, 2, 3]),
     (b"P2 3 1 10\n0 5 10\n", [0, 5, 10]),
     (b"P2 3 1 1000\n0 7 1000\n", [0, 7, 1000]),
     (b"P5 3 1 300\n" + np.array([0, 7, 300], ">u2").tobytes(), [0, 7, 300]),
     (b"P5 3 1 255\n" + bytes([0, 7, 255]), [0, 7, 255]),
     (b"P5 2 1 65535\n" + np.array([9, 65535], ">u2").tobytes(), [9, 65535])],
)  # fmt: skip
def test_numbers_of_pgm_files_are_those_in_the_file(tmp_path, content, values):
    """Whatever their largest is said to be."""
    (tmp_path / "a.pgm").write_bytes(content)
    assert read_labels(tmp_path / "a.pgm").tolist() == [values]
    assert read_instances(tmp_path / "a.pgm").tolist() == [values]


def test_scaled_pictures_are_read_into_memory():
    picture = open_picture(np.arange(64, dtype=np.uint8).reshape(8, 8)).scaled(0.5)
    loaded = picture.loaded()
    assert np.array_equal(loaded.read(), picture.read())
    assert loaded.shape == (4, 4)


@pytest.mark.parametrize(
    "tag", ["-3.40282e+38", "-1.79769313486232e+308", "-3.4028234663852886e+38"]
)
def test_numbers_for_no_data_may_have_few_digits(tmp_path, tag):
    values = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    known = values.copy()
    known[2, :5], values[2, :5] = np.nan, np.finfo(np.float32).min
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(42113, "s", 0, tag, True)])
    assert np.array_equal(read_image(tmp_path / "a.tif"), read_image(known))


def test_nan_is_black_whatever_the_levels():
    values = np.array([[np.nan, -np.inf, -1, 0, np.inf]], np.float32)
    for inverted, expected in ((False, [0, 0, 0, 128, 255]), (True, [0, 255, 255, 128, 0])):
        assert to_8_bits(values, (-1.0, 1.0), inverted=inverted).tolist() == [expected]
