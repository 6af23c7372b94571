"""Pictures and instance maps from files."""

from __future__ import annotations

import os
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

_ORIENTATION = 0x0112  # the EXIF tag

# What Pillow's decoders raise on broken files.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    NotImplementedError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a picture as RGB, uint8 of shape (H, W, 3).

    Grey, palette, CMYK, 1-bit and 16-bit pictures are converted, EXIF orientation is applied, an
    alpha channel is dropped, and of an animation the first frame is read. Grey pictures of more
    than 8 bits are divided by the smallest full scale of 8 to 32 bits that holds their largest
    value, so that 12-bit camera data in a 16-bit file are not nearly black; floats up to 1 count
    as having full scale 1.

    Raises:
        ValueError: in one line that names the file, if it does not exist, is no picture, is
            truncated or holds negative, NaN or infinite values.
    """
    picture = _decode(path)
    if picture.mode.startswith(("I", "F")):
        return _rgb_from_deep_grey(np.asarray(picture), path)
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")
    return np.array(picture.convert("RGB"))


def read_instances(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an instance map, a grey picture of 8 to 32 bits, as int32 of shape (H, W).

    0 is background; every other value is the id of an instance. Of a palette picture, the
    palette's indices are read.

    Raises:
        ValueError: in one line that names the file, if it cannot be read or has colors.
    """
    return _read_map(path, "an instance map")


def read_labels(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a map of labels like `read_instances`; every value is a label."""
    return _read_map(path, "a map of labels")


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of the picture that `read_image` reads, from the file's header.

    Raises:
        ValueError: in one line that names the file, if it does not exist or is no picture.
    """
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
            width, height = reversed(picture.size) if turned else picture.size
            return height, width
    except _DECODER_ERRORS as error:
        raise _no_picture(path, error) from None


def _read_map(path: str | os.PathLike[str], what: str) -> np.ndarray:
    picture = _decode(path)
    if not picture.mode.startswith(("1", "L", "I", "P")) or len(picture.getbands()) > 1:
        raise ValueError(
            f"{path}: expected {what} (one channel of integers), "
            f"got a picture of mode {picture.mode}"
        )
    values = np.asarray(picture).astype(np.int32)
    if values.size and values.min() < 0:
        raise ValueError(f"{path}: expected {what} of values of at least 0, got {values.min()}")
    return values


def _decode(path: str | os.PathLike[str]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is decoded in spite of a flaw is good enough
            with Image.open(path) as picture:
                return ImageOps.exif_transpose(picture)
    except _DECODER_ERRORS as error:
        raise _no_picture(path, error) from None


def _no_picture(path: str | os.PathLike[str], error: BaseException) -> ValueError:
    if not os.path.exists(path):
        reason = "there is no such file"
    elif os.path.isdir(path):
        reason = "this is a folder"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{os.fspath(path)}: expected a picture, but {reason}")


def _rgb_from_deep_grey(values: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    values = values.astype(np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{os.fspath(path)}: expected finite values of at least 0 in a picture")
    largest = values.max()
    if largest <= 1:
        full_scale = 1.0
    else:
        full_scale = 2.0 ** max(8, np.ceil(np.log2(largest + 1))) - 1
    grey = np.rint(values * (255 / full_scale)).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
