"""Samples as files and arrays store them, before any are chosen: one description for all."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from pointformer.data.discovery import unread_format

RGB = ("red", "green", "blue")


class PictureError(ValueError):
    """A picture cannot be read, or not without a choice; the message names it, in one line."""


@dataclass(frozen=True)
class Layout:
    """Size, type, channels and planes of a stored picture.

    Attributes:
        size: rows and columns as stored, before `orientation`.
        dtype, bits: of the samples; `bits` are those in use. Unsigned samples of at most 8 bits
            are read as 0 to 255.
        channels: names of the channels, without alpha.
        rgb: the channels are the three of one color picture.
        planes: name and length of each axis besides rows, columns and channels.
        orientation: how rows and columns are shown, 1 to 8 as in EXIF.
        inverted: 0 is white.
    """

    size: tuple[int, int]
    dtype: np.dtype
    bits: int
    channels: tuple[str, ...] = ("gray",)
    rgb: bool = False
    planes: tuple[tuple[str, int], ...] = ()
    orientation: int = 1
    inverted: bool = False

    @property
    def num_planes(self) -> int:
        return math.prod(length for _, length in self.planes)

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width after `orientation`."""
        return self.size if self.orientation < 5 else (self.size[1], self.size[0])


class Stored(Protocol):
    """A picture in a file, or in memory."""

    name: str
    layout: Layout

    def read(self, plane: int, channels: Sequence[int], rows: slice, columns: slice) -> np.ndarray:
        """(h, w, len(channels)) samples of a window in stored coordinates; `plane` counts over all
        axes of planes, the last one fastest."""
        ...


class StoredArray:
    """A `Stored` in memory: (planes, H, W, channels)."""

    def __init__(self, name: str, values: np.ndarray, layout: Layout) -> None:
        self.name, self.layout, self._values = name, layout, values

    def read(self, plane: int, channels: Sequence[int], rows: slice, columns: slice) -> np.ndarray:
        return self._values[plane, rows, columns][..., list(channels)]


def stored_array(values: np.ndarray, name: str = "image") -> StoredArray:
    """An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), whose fourth channel is alpha."""
    gray = values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 1)
    color = values.ndim == 3 and values.shape[2] in (3, 4)
    if not (gray or color) or values.size == 0:
        raise PictureError(
            f"{name}: expected the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of an array, or "
            f"(1, H, W), (3, H, W) or (4, H, W) of a tensor, got {values.shape}; of others pick a "
            "plane or a channel first"
        )
    check_dtype(name, values.dtype)
    values = as_bytes(values.reshape(*values.shape[:2], -1)[..., :3], 8 * values.dtype.itemsize)
    layout = Layout(
        values.shape[:2],
        values.dtype,
        8 * values.dtype.itemsize,
        ("gray",) if gray else RGB,
        not gray,
    )
    return StoredArray(name, values[None], layout)


def check_dtype(name: str, dtype: np.dtype) -> None:
    if dtype.kind not in "buif":
        raise PictureError(f"{name}: expected integers or real numbers in a picture, got {dtype}")


def as_bytes(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values of less than 8 bits, and truth values, as 0 to 255; others as they are."""
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8 and bits < 8:
        table = np.minimum(np.rint(np.arange(256) * (255 / (2**bits - 1))), 255)
        return table.astype(np.uint8)[values]
    return values


def check_pixels(name: str, height: int, width: int, limit: int) -> None:
    """Refuse a picture by what its header says, before memory is taken for it."""
    if height * width > limit:
        raise PictureError(
            f"{name}: {height} x {width} pixels are more than {limit:,}; "
            f"if it is no mistake, raise max_pixels (--max-pixels)"
        )


@contextlib.contextmanager
def decoding(name: object) -> Iterator[None]:
    """Errors of decoders, which may be any, as one line that names the file."""
    try:
        yield
    except PictureError:
        raise
    except Exception as error:
        path = str(name)
        if isinstance(error, FileNotFoundError | NotADirectoryError) or (
            isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
        ):
            path = path if len(path) <= 200 else f"...{path[-200:]}"
            reason = "there is no such file"
        elif isinstance(error, IsADirectoryError):
            reason = unread_format(path) or "this is a folder"
        elif isinstance(error, MemoryError):
            reason = "there is not enough memory for the size that it claims"
        else:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            reason = f"it cannot be decoded: {unread_format(path) or text}"
        raise PictureError(f"{path}: expected a picture, but {reason}") from None


def rgb_from_cmyk(values: np.ndarray) -> np.ndarray:
    """(..., 3) of the type of inks (..., 4), unsigned integers, as Pillow does it for 8 bits."""
    if values.dtype == np.uint8:
        return np.array(Image.fromarray(np.ascontiguousarray(values), "CMYK").convert("RGB"))
    full = float(np.iinfo(values.dtype).max)
    inks = values / full
    return np.rint((1 - inks[..., :3]) * (1 - inks[..., 3:]) * full).astype(values.dtype)
