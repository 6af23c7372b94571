"""Reading pictures and instance maps, and folders of them."""

import numpy as np
import pytest
from PIL import Image

from pointformer.data import (
    read_folder,
    read_image,
    read_instances,
)

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = COLORS[..., 0]


def saved(folder, picture, name="a.png", **options):
    picture.save(folder / name, **options)
    return folder / name


def test_rgb_is_unchanged_and_alpha_is_dropped(tmp_path):
    np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(COLORS))), COLORS)
    alpha = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
    rgba = Image.fromarray(np.concatenate([COLORS, alpha], 2))
    np.testing.assert_array_equal(read_image(saved(tmp_path, rgba)), COLORS)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P"])
def test_gray_and_palette_become_equal_channels(tmp_path, mode):
    picture = Image.fromarray(GRAY).convert(mode)
    expected = np.repeat(np.asarray(picture.convert("L"))[..., None], 3, 2)
    np.testing.assert_array_equal(read_image(saved(tmp_path, picture)), expected)


def test_palette_with_transparent_entries(tmp_path):
    picture = Image.fromarray(COLORS).quantize(16)
    path = saved(tmp_path, picture, transparency=bytes(range(16)))
    np.testing.assert_array_equal(read_image(path), np.asarray(picture.convert("RGB")))


def test_what_is_no_picture_is_one_line_with_the_file_name(tmp_path):
    (tmp_path / "text.png").write_text("not a picture\n" * 5)
    (tmp_path / "empty.png").touch()
    for path in (tmp_path / "text.png", tmp_path / "empty.png", tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            read_image(path)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "gif", "bmp"])
def test_broken_files_give_a_picture_or_a_value_error(tmp_path, suffix):
    picture = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    whole = saved(tmp_path, picture, f"whole.{suffix}").read_bytes()
    broken = tmp_path / f"broken.{suffix}"
    rng = np.random.default_rng(1)
    rejected = 0
    for trial in range(60):
        data = bytearray(whole[: rng.integers(len(whole))] if trial % 2 else whole)
        for _ in range(trial % 4):
            if data:
                data[rng.integers(min(len(data), 200))] = rng.integers(256)
        broken.write_bytes(data)
        try:
            image = read_image(broken)
        except ValueError:
            rejected += 1
        else:
            assert image.shape[2:] == (3,)
    assert rejected > 10


def test_instance_maps(tmp_path):
    ids = np.array([[0, 1, 300], [65535, 2, 0]], np.uint16)
    read = read_instances(saved(tmp_path, Image.fromarray(ids)))
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids)
    with pytest.raises(ValueError, match=r"a\.png: expected an instance map.*red, green, blue"):
        read_instances(saved(tmp_path, Image.fromarray(COLORS)))


def test_instances_of_a_split_in_memory(tmp_path):
    for folder in ("images", "instances"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    for name in ("b", "a"):
        saved(tmp_path / "train/images", Image.fromarray(COLORS), f"{name}.png")
        saved(tmp_path / "train/instances", Image.fromarray(GRAY), f"{name}.png")
    samples = list(read_folder(tmp_path, "train", "instance"))
    assert [sample.name for sample in samples] == ["a", "b"]
    np.testing.assert_array_equal(samples[0].ids, GRAY)
    saved(tmp_path / "train/instances", Image.fromarray(GRAY.T), "b.png")
    with pytest.raises(ValueError, match=r"b\.png: expected .*\(5, 7\), got \(7, 5\)"):
        list(read_folder(tmp_path, "train", "instance"))
    (tmp_path / "train/instances/b.png").unlink()
    with pytest.raises(ValueError, match="no such file"):
        list(read_folder(tmp_path, "train", "instance"))
    with pytest.raises(ValueError, match=r"val.*found none"):
        read_folder(tmp_path, "val", "instance")
