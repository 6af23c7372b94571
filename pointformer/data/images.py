"""Pictures and instance maps from files and arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import numpy as np
from PIL import Image

from pointformer._checks import brief, check_count, check_option, describe
from pointformer.data import intensities as levels
from pointformer.data.packed import Packed
from pointformer.data.pillow import StoredPillow
from pointformer.data.stored import (
    Layout,
    PictureError,
    Stored,
    StoredArray,
    check_pixels,
    decoding,
    stored_array,
)
from pointformer.data.tiff import is_tiff, stored_tiffs

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 2**30
_PROJECTIONS = ("max", "mean")
_INTENSITIES = ("percentiles", "full")


class Reading(TypedDict, total=False):
    """Choices in reading a picture: the keywords of `open_picture` and of all that open pictures.

    Attributes:
        channel: number from 0, or name where the file has names, of the channel to be shown in
            gray; three of them, as a sequence or as "0,2,1", are shown as red, green and blue.
            `None`: the colors of a color picture, or the only channel.
        plane: which of several planes (z, time, pages, frames), counted from 0 over all of them,
            the last axis fastest; or by axes, as "z=3,t=0". `None`: the only one.
        project: "max" or "mean" over the planes that `plane` leaves open. `None`: a picture that
            has several planes is an error. Means of 8 bits have more, see `intensities`.
        intensities: of samples of more than 8 bits, and of signed and real ones. "percentiles"
            (default): by robust percentiles of the whole picture, see `data.intensities`. "full":
            the range of integers, and 0 to 1 of floats, become 0 to 255; other floats are an error.
            NaN is shown as 0 and counts for no percentile, as do samples that a GeoTIFF says stand
            for no data.
        max_pixels: height times width of the largest picture to read, default 2**30: a file of a
            few bytes can claim any size.
    """

    channel: int | str | Sequence[int | str] | None
    plane: int | str | None
    project: Literal["max", "mean"] | None
    intensities: Literal["percentiles", "full"]
    max_pixels: int


class Picture:
    """A picture read by windows: `picture[rows, columns]` is (h, w, 3) uint8, RGB.

    Windows of TIFF files are read from the file (of compressed ones, the strips or tiles that they
    touch); other files are decoded once and kept. Intensities are those of the whole picture, so
    that windows agree.

    Attributes:
        name: the file, or "image".
        shape: (H, W).
    """

    def __init__(
        self,
        stored: Stored,
        channels: Sequence[int],
        planes: Sequence[int],
        project: str | None,
        intensities: str,
    ) -> None:
        self.name, self.shape = stored.name, stored.layout.shown_size
        self._stored, self._channels, self._planes = stored, channels, planes
        self._project, self._intensities = project, intensities

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        rows, columns = self._inside(window)
        layout = self._stored.layout
        values = _shown(self._read(*_stored_window(layout, rows, columns)), layout.orientation)
        if values.dtype != np.uint8:
            low, high, top = self._levels
            self._check_range(values)
            values = levels.to_8_bits(values, (low, high), top, layout.inverted)
        elif layout.inverted:
            values = 255 - values
        if values.shape[2] == 1:
            values = np.repeat(values, 3, axis=2)
        return np.ascontiguousarray(values)

    def read(self) -> np.ndarray:
        """All of it, (H, W, 3) uint8."""
        return self[:, :]

    def loaded(self) -> Picture:
        """The same, read and in memory."""
        if isinstance(self._stored, StoredArray) and self._stored.layout.dtype == np.uint8:
            return self
        return Picture(stored_array(self.read(), self.name), range(3), [0], None, self._intensities)

    def scaled(self, factor: float) -> Picture:
        """The same with sides `factor` times as long, resampled window by window.

        Raises:
            PictureError: not a pixel would be left.
        """
        shape = round(self.shape[0] * factor), round(self.shape[1] * factor)
        if 0 in shape:
            raise PictureError(
                f"{self.name}: nothing is left of {self.shape[0]} x {self.shape[1]} pixels with "
                f"sides {factor:g} times as long; use a larger scale, or a smaller diameter"
            )
        return self if shape == self.shape else _Resampled(self, shape)

    def _inside(self, window: tuple[slice, slice]) -> tuple[slice, slice]:
        rows, columns = (
            slice(*span.indices(length)[:2])
            for span, length in zip(window, self.shape, strict=True)
        )
        return rows, columns

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        """Samples (h, w, 1 or 3) of the chosen planes, as stored."""
        with decoding(self.name):
            parts = (self._stored.read(n, self._channels, rows, columns) for n in self._planes)
            result = next(parts)
            if len(self._planes) == 1:
                return result
            if self._project == "max":
                darkest = self._stored.layout.inverted
                for part in parts:
                    result = (np.fmin if darkest else np.fmax)(result, part)
                return result
            total = result.astype(np.float64)
            for part in parts:
                total += part
            return total / len(self._planes)

    @cached_property
    def _levels(self) -> tuple[float, float, float]:
        layout = self._stored.layout
        if self._intensities == "full":
            bits = 8 if layout.dtype == np.uint8 else layout.bits  # fewer are read as 0 to 255
            return *levels.full_levels(layout.dtype, bits, layout.inverted), 255.0
        fitted = levels.percentile_levels(self._read, layout.size, layout.inverted)
        if fitted is None:
            raise PictureError(
                f"{self.name}: no sample of the picture is a finite number, and none that stands "
                "for no data"
            )
        return *fitted, levels.TOP

    def _check_range(self, values: np.ndarray) -> None:
        # Means of integers are real numbers, and samples without data NaN: the range stays.
        real = self._stored.layout.dtype.kind == "f"
        if self._intensities != "full" or not real or not values.size:
            return
        smallest, largest = (float(f.reduce(values, axis=None)) for f in (np.fmin, np.fmax))
        if smallest < 0 or largest > 1:
            raise PictureError(
                f"{self.name}: intensities 'full' need real numbers from 0 to 1, got {smallest:g} "
                f"to {largest:g}"
            )


class _Resampled(Picture):
    def __init__(self, whole: Picture, shape: tuple[int, int]) -> None:
        self.name, self.shape, self._whole = whole.name, shape, whole

    def loaded(self) -> Picture:
        return Picture(stored_array(self.read(), self.name), range(3), [0], None, "full")

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        spans, box = [], []
        for span, length, own in zip(
            self._inside(window), self._whole.shape, self.shape, strict=True
        ):
            ratio = length / own
            margin = math.ceil(2 * max(1.0, ratio)) + 1  # what a bicubic filter sees
            begin = max(0, math.floor(span.start * ratio) - margin)
            end = min(length, math.ceil(span.stop * ratio) + margin)
            spans.append(slice(begin, end))
            box.append((span.start * ratio - begin, span.stop * ratio - begin, span))
        (top, bottom, rows), (left, right, columns) = box
        part = Image.fromarray(self._whole[spans[0], spans[1]])
        size = columns.stop - columns.start, rows.stop - rows.start
        return np.array(part.resize(size, Image.Resampling.BICUBIC, (left, top, right, bottom)))


if TYPE_CHECKING:
    PictureSource = (
        str | os.PathLike[str] | Packed | np.ndarray | torch.Tensor | Image.Image | Picture
    )


def open_picture(
    source: PictureSource,
    *,
    channel: int | str | Sequence[int | str] | None = None,
    plane: int | str | None = None,
    project: Literal["max", "mean"] | None = None,
    intensities: Literal["percentiles", "full"] = "percentiles",
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """A picture to be read as RGB, from whatever holds it.

    Samples of 8 bits are taken as they are, deeper ones by `intensities`. The orientation that a
    file tells is applied, palettes, CMYK and pictures whose 0 is white are converted, channels
    declared to be alpha are left out. Whatever else there is more of than can be shown is an error
    that says how to choose.

    Args:
        source: a file (TIFF, or what Pillow reads), an array (H, W), (H, W, 1), (H, W, 3) or, with
            alpha, (H, W, 4), a tensor (H, W) or (1, 3 or 4, H, W), or a picture of Pillow; of truth
            values, integers or real numbers of any size. Or a picture that is open, as it is.
        channel, plane, project, intensities, max_pixels: see `Reading`.

    Raises:
        ValueError: in one line that names the file: it is none, no picture, or broken; it needs a
            choice, or the choice is not in it; it is larger than `max_pixels`.
        TypeError: `source` is nothing of the above.
    """
    check_option("project", project, (None, *_PROJECTIONS))
    check_option("intensities", intensities, _INTENSITIES)
    check_count("max_pixels", max_pixels, most=2**62)
    if isinstance(source, Picture):
        return source
    stored, planes = _choose_planes(_stored(source, max_pixels), plane, project)
    channels = _choose_channels(stored.name, stored.layout, channel)
    return Picture(stored, channels, planes, project, intensities)


def read_image(source: PictureSource, **reading: Unpack[Reading]) -> np.ndarray:
    """All of a picture as RGB, (H, W, 3) uint8; see `open_picture`."""
    return open_picture(source, **reading).read()


def image_size(path: str | os.PathLike[str] | Packed) -> tuple[int, int]:
    """Height and width of the picture that `open_picture` opens, from the file's header.

    Raises:
        ValueError: in one line that names the file, if it does not exist, is no picture, or holds
            pictures of several sizes.
    """
    pictures = _stored(path, MAX_PIXELS)
    sizes = {picture.layout.shown_size for picture in pictures}
    if len(sizes) > 1:
        raise _several_pictures(pictures)
    return sizes.pop()


def is_turned(path: str | os.PathLike[str] | Packed) -> bool:
    """Whether rows and columns change places by the orientation that the file tells."""
    return any(picture.layout.orientation >= 5 for picture in _stored(path, MAX_PIXELS))


def read_instances(path: str | os.PathLike[str] | Packed) -> np.ndarray:
    """Read an instance map as int32 of shape (H, W).

    0 is background; every other value is the id of an instance. One channel of whole numbers, of
    any type; the numbers are taken as stored, of a palette picture its indices.

    Raises:
        ValueError: in one line that names the file, if it cannot be read, has colors, several
            planes or channels, or values that are no whole numbers from 0 to 2^31 - 1.
    """
    return _read_map(path, "an instance map")


def read_labels(path: str | os.PathLike[str] | Packed) -> np.ndarray:
    """Read a map of labels like `read_instances`; every value is a label."""
    return _read_map(path, "a map of labels")


def _read_map(path: str | os.PathLike[str] | Packed, what: str) -> np.ndarray:
    pictures = _stored(path, MAX_PIXELS, numbers=True)
    layout = pictures[0].layout
    count = sum(picture.layout.num_planes for picture in pictures)
    if count > 1 or len(layout.channels) > 1:
        raise PictureError(
            f"{path}: expected {what}, one channel of whole numbers, got "
            + (f"{count} planes" if count > 1 else f"the channels {', '.join(layout.channels)}")
            + "; for each color write a number" * layout.rgb
        )
    height, width = layout.size
    with decoding(path):
        values = pictures[0].read(0, [0], slice(0, height), slice(0, width))
    values = _shown(values, layout.orientation)[..., 0]
    smallest, largest = values.min(), values.max()
    if not (smallest >= 0 and largest <= np.iinfo(np.int32).max):
        raise PictureError(
            f"{path}: expected {what} of values from 0 to {np.iinfo(np.int32).max}, "
            f"got {smallest} to {largest}"
        )
    whole = values.astype(np.int32)
    if values.dtype.kind == "f" and (whole != values).any():
        raise PictureError(f"{path}: expected {what} of whole numbers, got fractions")
    return whole


def _stored(source: PictureSource, max_pixels: int, numbers: bool = False) -> Sequence[Stored]:
    """The pictures that a source holds."""
    if isinstance(source, Packed):
        content = source.read()
        if isinstance(content, bytes):
            with decoding(source):
                if is_tiff(content[:4]):
                    return stored_tiffs(str(source), max_pixels, numbers, content)
                return [StoredPillow(str(source), max_pixels, numbers, content)]
        if numbers and content.dtype == bool:
            content = content.astype(np.uint8)
        stored = stored_array(content, str(source))
        check_pixels(stored.name, *stored.layout.size, max_pixels)
        return [stored]
    if isinstance(source, str | os.PathLike):
        with decoding(source):
            with open(source, "rb") as file:
                tiff = is_tiff(file.read(4))
            if tiff:
                return stored_tiffs(source, max_pixels, numbers)
            return [StoredPillow(source, max_pixels, numbers)]
    if isinstance(source, Image.Image):
        with decoding("image"):
            return [StoredPillow(source, max_pixels, numbers)]
    if type(source).__module__.partition(".")[0] == "torch":
        source = _array_of(source)
    if not isinstance(source, np.ndarray):
        raise TypeError(
            "image: expected a file, an array, a tensor or a picture of Pillow, "
            f"got {describe(source)}"
        )
    if masked := np.ma.count_masked(source):
        raise PictureError(
            f"image: {masked} of its {source.size} values are masked; use image.filled(value)"
        )
    return [stored_array(np.asarray(source))]


def _array_of(tensor) -> np.ndarray:
    """(C, H, W) to (H, W, C)."""
    import torch

    if tensor.ndim == 3 and len(tensor) not in (1, 3, 4) and tensor.shape[2] in (1, 3, 4):
        raise PictureError(
            "image: expected (1, H, W), (3, H, W) or (4, H, W) of a tensor, got "
            f"{tuple(tensor.shape)}; permute(2, 0, 1), or pass an array"
        )
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array = tensor.detach().cpu().numpy()
    return np.moveaxis(array, 0, -1) if array.ndim == 3 else array


# Choices ----------------------------------------------------------------------------------------


def _several_pictures(pictures: Sequence[Stored]) -> PictureError:
    sizes = [" x ".join(map(str, picture.layout.shown_size)) for picture in pictures[:4]]
    more = ", ..." if len(pictures) > 4 else ""
    return PictureError(
        f"{pictures[0].name}: holds {len(pictures)} pictures ({', '.join(sizes)}{more}); choose "
        "one with plane (--plane; in training: data.plane), "
        f'"image=0" to "image={len(pictures) - 1}"'
    )


def _choose_planes(
    pictures: Sequence[Stored], plane: int | str | None, project: str | None
) -> tuple[Stored, list[int]]:
    """The picture, and its planes."""
    wanted = _plane_numbers(pictures[0].name, plane)
    if isinstance(wanted, int):
        number = wanted
        for picture in pictures:
            if number < picture.layout.num_planes:
                return picture, [number]
            number -= picture.layout.num_planes
        count = sum(picture.layout.num_planes for picture in pictures)
        raise PictureError(
            f"{pictures[0].name}: there is no plane {wanted}; the last of its planes is {count - 1}"
        )
    image = wanted.pop("image", None if len(pictures) > 1 else 0)
    if image is None:
        raise _several_pictures(pictures)
    axes = {} if image >= len(pictures) else dict(pictures[image].layout.planes)
    for axis, number in {"image": image, **wanted}.items():
        length = len(pictures) if axis == "image" else axes.get(axis, 0)
        if number >= length:
            raise PictureError(
                f"{pictures[0].name}: there is no plane {axis}={number}; "
                f"{_described(pictures[0].layout)}"
            )
    picture = pictures[image]
    left = [axis for axis in axes if axis not in wanted]
    if left and project is None:
        raise PictureError(
            f"{picture.name}: {_described(picture.layout)}; choose one with plane (--plane; in "
            f"training: data.plane), 0 to {picture.layout.num_planes - 1} or by axes (for example "
            f'"{",".join(f"{axis}=0" for axis in left)}"), or project (--project; data.project) '
            '"max" or "mean"'
        )
    lengths = tuple(axes.values()) or (1,)
    grid = np.arange(math.prod(lengths)).reshape(lengths)
    return picture, grid[tuple(wanted.get(axis, slice(None)) for axis in axes)].ravel().tolist()


def _plane_numbers(name: str, plane: int | str | None) -> int | dict[str, int]:
    if plane is None:
        return {}
    if isinstance(plane, str):
        try:
            if "=" not in plane:
                plane = int(plane)
            else:
                pairs = (part.split("=") for part in plane.split(","))
                numbers = {axis.strip().lower(): int(number) for axis, number in pairs}
                if min(numbers.values()) >= 0:
                    return numbers
        except ValueError:
            pass
    if isinstance(plane, int) and not isinstance(plane, bool) and 0 <= plane < 2**63:
        return plane
    raise ValueError(f'plane: expected a number from 0, or as "z=3,t=0", got {brief(plane)}')


def _described(layout: Layout) -> str:
    if not layout.planes:
        return "it has one plane"
    axes = ", ".join(f"{name} {length}" for name, length in layout.planes)
    return f"it has {layout.num_planes} planes ({axes})"


def _choose_channels(
    name: str, layout: Layout, channel: int | str | Sequence[int | str] | None
) -> list[int]:
    names = layout.channels
    count = len(names)
    if channel is None:
        if layout.rgb or count == 1:
            return list(range(count))
        three = ', or three to be red, green and blue, as "0,1,2"' if count > 2 else ""
        raise PictureError(
            f"{name}: it has {_named(names)}; choose one with channel (--channel; in training: "
            f"data.channel), 0 to {count - 1}{three}"
        )
    items: list = list(channel) if isinstance(channel, list | tuple) else [channel]
    if isinstance(channel, str) and channel.strip().lower() not in map(str.lower, names):
        items = list(channel.split(","))
    known = all(
        isinstance(item, str) or (type(item) is int and abs(item) < 2**63) for item in items
    )
    if len(items) not in (1, 3) or not known:
        raise ValueError(
            f"channel: expected one, or three as red, green and blue, got {brief(channel)}"
        )
    return [_channel_number(name, names, item) for item in items]


def _channel_number(name: str, names: Sequence[str], item: int | str) -> int:
    text = str(item).strip().lower()
    lower = [known.lower() for known in names]
    if text in lower and not (text.isdecimal() and isinstance(item, int)):
        return lower.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise PictureError(f"{name}: it has {_named(names)}, there is no channel {brief(item)}")


def _named(channels: Sequence[str]) -> str:
    count = len(channels)
    listed = "" if list(channels) == [*map(str, range(count))] else f" ({', '.join(channels)})"
    return f"{count} channel{'s' if count > 1 else ''}{listed}"


# Orientation: rows and columns change places first (5 to 8), then either is turned over ---------

_ROWS_TURNED, _COLUMNS_TURNED = (3, 4, 7, 8), (2, 3, 6, 7)


def _stored_window(layout: Layout, rows: slice, columns: slice) -> tuple[slice, slice]:
    """Window as stored, of one of the picture as shown."""
    height, width = layout.shown_size
    if layout.orientation in _ROWS_TURNED:
        rows = slice(height - rows.stop, height - rows.start)
    if layout.orientation in _COLUMNS_TURNED:
        columns = slice(width - columns.stop, width - columns.start)
    return (rows, columns) if layout.orientation < 5 else (columns, rows)


def _shown(values: np.ndarray, orientation: int) -> np.ndarray:
    """A stored window (h, w, channels) as it is shown."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    if orientation in _ROWS_TURNED:
        values = values[::-1]
    if orientation in _COLUMNS_TURNED:
        values = values[:, ::-1]
    return values
