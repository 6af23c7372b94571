"""TIFF files: what they hold, and windows of it."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from pointformer.data.stored import (
    RGB,
    Layout,
    PictureError,
    as_bytes,
    check_dtype,
    check_pixels,
    rgb_from_cmyk,
)

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

# What is wrong with a file is raised, or read in spite of it; nothing is printed.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB, _PALETTE, _MASK, _CMYK, _YCBCR = range(7)
_GRAY = (_MIN_IS_WHITE, _MIN_IS_BLACK, _MASK)
_ALPHA = (1, 2)  # values of ExtraSamples; 0 is "unspecified"
_ORIENTATION = 274
_NO_DATA = 42113  # GDAL's, a number as text
_UNMEASURED = 1e37  # samples beyond are no measurement
_REDUCED_OR_MASK = 1 | 4  # bits of NewSubfileType
_BESIDES = {"thumbnail", "label", "macro", "overview", "map"}  # what slide scanners add
_DECODED_TO_RGB = {6, 7, 33007, 34892}  # JPEG
_JPEG_2000_YCBCR = 33003
_AXES = {"I": "page", "Q": "plane"}
_CACHE = 2**27  # bytes of decoded strips or tiles that are kept for the next windows


def is_tiff(head: bytes) -> bool:
    """Whether a file's first four bytes are those of a TIFF or BigTIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def stored_tiffs(
    path: str | os.PathLike[str],
    max_pixels: int,
    numbers: bool = False,
    content: bytes | None = None,
) -> list[StoredTiff]:
    """The pictures of a TIFF file, each with its planes and channels.

    Smaller copies in pyramids, masks, and what slide scanners add (thumbnail, label) are left out.

    Args:
        max_pixels: the most that a plane may have.
        numbers: read the numbers of palette pictures, and of those of less than 8 bits, as stored.
        content: of the file, where `path` is only its name.
    """
    handle = _Handle(path, content)
    if not handle.file.series:
        raise PictureError(f"{os.fspath(path)}: expected a picture, but the file holds none")
    first, *others = handle.file.series
    described = handle.file.imagej_metadata or {}
    if first.kind != "imagej" and described.get("images", 1) > len(handle.file.pages):
        raise PictureError(
            f"{os.fspath(path)}: expected {described['images']} images, as its description says, "
            f"got {len(handle.file.pages)}: the file is truncated"
        )
    series = [first, *(item for item in others if not _is_beside(item))]
    return [
        StoredTiff(os.fspath(path), handle, item, max_pixels, numbers, place)
        for place, item in enumerate(series)
    ]


def _stored_again(
    path: str, max_pixels: int, numbers: bool, content: bytes | None, place: int
) -> StoredTiff:
    return stored_tiffs(path, max_pixels, numbers, content)[place]


class _Handle:
    """An open file that closes when the last picture that reads from it is gone."""

    def __init__(self, path: str | os.PathLike[str], content: bytes | None) -> None:
        from tifffile import TiffFile

        self.path = os.path.abspath(path) if content is None else os.fspath(path)
        self.content = content
        # The other files that OME metadata name are not opened: a file decides about itself only.
        opened = self.path if content is None else io.BytesIO(content)
        self.file: TiffFile = TiffFile(opened, _multifile=False)
        self.lock = threading.Lock()
        weakref.finalize(self, self.file.close)


def _is_beside(series: TiffPageSeries) -> bool:
    kind = series.keyframe.subfiletype
    return bool(kind & _REDUCED_OR_MASK) or series.name.lower() in _BESIDES


class StoredTiff:
    """A series of equal pages, a `Stored`.

    Of compressed files only the strips or tiles of a window are decoded, of others only its bytes
    are read.
    """

    def __init__(
        self,
        name: str,
        handle: _Handle,
        series: TiffPageSeries,
        max_pixels: int,
        numbers: bool,
        place: int,
    ) -> None:
        # In another process the file is opened again.
        self._again = handle.path, max_pixels, numbers, handle.content, place
        self.name = name
        self._handle, self._series, self._page = handle, series, series.keyframe
        self._numbers = numbers
        self._decoded: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        axes, shape = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
        if "Y" not in axes or "X" not in axes or math.prod(shape) == 0:
            raise PictureError(f"{self.name}: expected rows and columns, got axes {axes} {shape}")
        self._axes, self._shape = axes, tuple(shape)
        self._channel_axes = [n for n, axis in enumerate(axes) if axis in "CS"]
        self._plane_axes = [n for n, axis in enumerate(axes) if axis not in "YXCS"]
        self._y, self._x = axes.index("Y"), axes.index("X")
        height, width = shape[self._y], shape[self._x]
        check_pixels(self.name, height, width, max_pixels)
        self._max_pixels = max_pixels
        self._no_data = _no_data(self._page)
        self._whole: np.ndarray | None = None
        self.layout = self._layout((height, width))

    def __reduce__(self):
        return _stored_again, self._again

    # What there is ------------------------------------------------------------------------------

    def _layout(self, size: tuple[int, int]) -> Layout:
        page = self._page
        dtype = np.dtype(self._series.dtype)
        check_dtype(self.name, dtype)
        photometric = int(page.photometric)
        if photometric not in (*_GRAY, _RGB, _PALETTE, _CMYK, _YCBCR):
            raise PictureError(
                f"{self.name}: pictures of the kind {_name_of(page.photometric)} are not read; "
                "save it as RGB or gray"
            )
        self._used = self._without_alpha(math.prod(self._lengths(self._channel_axes)))
        count = len(self._used)
        bits = page.bitspersample
        bits = 8 * dtype.itemsize if not isinstance(bits, int) else bits
        self._convert = self._conversion(photometric, count, dtype, bits)
        colors = photometric in (_RGB, _YCBCR) and count == 3
        if self._convert is not None:
            colors, count = True, 3
            dtype = self._convert(np.zeros((1, 1, len(self._used)), dtype)).dtype
            bits = 8 * dtype.itemsize
        elif photometric in (_PALETTE, _CMYK, _YCBCR) and not colors and not self._numbers:
            raise PictureError(
                f"{self.name}: {_name_of(page.photometric)} with {count} channels is not read; "
                "save it as RGB or gray"
            )
        tag = page.tags.get(_ORIENTATION)
        orientation = tag.value if tag is not None else 1
        return Layout(
            size,
            np.dtype(np.uint8) if dtype.kind == "b" and not self._numbers else dtype,
            bits,
            RGB if colors else self._channel_names(count, photometric),
            colors,
            self._planes(),
            int(orientation) if orientation in range(1, 9) else 1,
            photometric == _MIN_IS_WHITE,
        )

    def _planes(self) -> tuple[tuple[str, int], ...]:
        planes: dict[str, int] = {}
        for place in self._plane_axes:
            name = _AXES.get(self._axes[place], self._axes[place].lower())
            while name in planes:
                name += "2"
            if self._shape[place] > 1:
                planes[name] = self._shape[place]
        return tuple(planes.items())

    def _lengths(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._shape[place] for place in places)

    def _without_alpha(self, stored: int) -> list[int]:
        """Numbers of the channels that are not declared to be alpha."""
        extra = tuple(int(kind) for kind in self._page.extrasamples)
        samples = max(1, self._page.samplesperpixel)
        first = samples - len(extra)
        alpha = {first + n for n, kind in enumerate(extra) if kind in _ALPHA}
        kept = [n for n in range(stored) if stored % samples or n % samples not in alpha]
        return kept or list(range(stored))

    def _channel_names(self, count: int, photometric: int) -> tuple[str, ...]:
        if count == 1:
            return ("gray",)
        names = _ome_names(self._handle.file, self._series)
        if len(names) == count and len(set(names)) == count:
            return names
        one = len(self._page.extrasamples) + 3 == self._page.samplesperpixel >= count
        first = RGB if photometric == _RGB and one else ()
        return (*first, *(str(n) for n in range(len(first), count)))

    def _conversion(self, photometric: int, count: int, dtype: np.dtype, bits: int):
        """Function from stored samples (h, w, n) to RGB, or `None` where they are what is shown."""
        if self._numbers:
            return None
        if photometric == _PALETTE and count == 1 and dtype.kind == "u":
            colors = self._page.colormap
            if colors is None:
                raise PictureError(f"{self.name}: a palette picture without its palette")
            # 16-bit colors; some programs write 8-bit ones.
            table = (colors // 256 if colors.max() > 255 else colors).T.astype(np.uint8)
            return lambda values: table[np.minimum(values[..., 0], len(table) - 1)]
        if photometric == _CMYK and count == 4 and dtype.kind == "u":
            return rgb_from_cmyk
        ycbcr = photometric == _YCBCR and int(self._page.compression) not in _DECODED_TO_RGB
        ycbcr |= int(self._page.compression) == _JPEG_2000_YCBCR
        if ycbcr and count == 3:
            if dtype != np.uint8:
                raise PictureError(f"{self.name}: YCbCr of {dtype} is not read; save it as RGB")
            return lambda values: np.asarray(
                Image.fromarray(np.ascontiguousarray(values), mode="YCbCr").convert("RGB")
            )
        return None

    # Reading ------------------------------------------------------------------------------------

    def read(self, plane: int, channels: Sequence[int], rows: slice, columns: slice) -> np.ndarray:
        place: list[int | slice] = [0] * len(self._axes)
        _put(place, self._plane_axes, np.unravel_index(plane, self._lengths(self._plane_axes)))
        place[self._y], place[self._x] = rows, columns
        stored = self._used if self._convert is not None else [self._used[n] for n in channels]
        parts = []
        for number in stored:
            of_channel = np.unravel_index(number, self._lengths(self._channel_axes))
            _put(place, self._channel_axes, of_channel)
            parts.append(self._read_samples(tuple(place)))
        values = np.stack(parts, axis=-1)
        if self._convert is not None:
            return self._convert(values)[..., list(channels)]
        if self._numbers:
            return values
        return self._without_no_data(as_bytes(values, self.layout.bits))

    def _without_no_data(self, values: np.ndarray) -> np.ndarray:
        """NaN where there is no data; samples of 8 bits, which are shown as they are, are kept."""
        if self._no_data is None or values.dtype == np.uint8:
            return values
        with np.errstate(over="ignore"):  # the number may be none of the type
            missing = values == self._no_data
        if abs(self._no_data) > _UNMEASURED:  # the type's last number, in whichever digits
            missing |= np.abs(values) > _UNMEASURED
        if not missing.any():
            return values
        values = values.astype(np.result_type(values, np.float16))  # which holds all its integers
        values[missing] = np.nan
        return values

    def _read_samples(self, place: tuple) -> np.ndarray:
        """A window (h, w) of one channel of one plane, by an index for each axis."""
        array = self._array()
        if array is not None:
            values = np.array(array[place])
            values = values.T if self._y > self._x else values
            return values.astype(values.dtype.newbyteorder("="), copy=False)
        after = self._y + 2
        outer = np.ravel_multi_index(place[: self._y], self._shape[: self._y]) if self._y else 0
        inner = (
            np.ravel_multi_index(place[after:], self._shape[after:]) if self._shape[after:] else 0
        )
        separate, depth = self._page.shaped[:2]
        number, sample, layer = np.unravel_index(outer, (len(self._series), separate, depth))
        return self._read_page(
            int(number), int(sample), int(layer), int(inner), place[self._y], place[self._x]
        )

    def _array(self) -> np.ndarray | None:
        """The series as one array, or `None` where it is read by pages."""
        series = self._series
        if series.transform is None and series.dataoffset is not None and self._page.is_memmappable:
            # The file's own bytes, for one window: what was looked at counts as used memory.
            dtype = np.dtype(series.dtype).newbyteorder(self._handle.file.byteorder)
            end = series.dataoffset + math.prod(self._shape) * dtype.itemsize
            if end > self._handle.file.filehandle.size:
                raise self._truncated()
            content = self._handle.content
            if content is not None:
                return np.ndarray(self._shape, dtype, content, series.dataoffset)
            return np.memmap(self._handle.path, dtype, "r", series.dataoffset, self._shape)
        if self._whole is None and not self._in_pages():
            check_pixels(self.name, math.prod(self._shape), 1, 4 * self._max_pixels)
            self._whole = series.asarray().reshape(self._shape)
        return self._whole

    def _in_pages(self) -> bool:
        """Whether an index of the series tells the page and the place in it."""
        separate, depth, height, width, contiguous = self._page.shaped
        return (
            self._series.transform is None
            and self._x == self._y + 1
            and self._lengths((self._y, self._x)) == (height, width)
            and math.prod(self._shape[: self._y]) == len(self._series) * separate * depth
            and math.prod(self._shape[self._x + 1 :]) == contiguous
        )

    def _read_page(
        self, number: int, sample: int, layer: int, inner: int, rows: slice, columns: slice
    ) -> np.ndarray:
        page = self._page
        if page.is_tiled:
            depth, height, width = page.tiledepth, page.tilelength, page.tilewidth
        else:
            depth, height, width = 1, page.rowsperstrip, page.imagewidth
        samples = page.shaped[4]
        check_pixels(self.name, height * depth * samples, width, 4 * self._max_pixels)
        across = -(-page.imagewidth // width)
        down = -(-page.imagelength // height)
        deep = -(-page.imagedepth // depth)
        result = np.empty((rows.stop - rows.start, columns.stop - columns.start), page.dtype)
        for i in range(rows.start // height, -(-rows.stop // height)):
            for j in range(columns.start // width, -(-columns.stop // width)):
                segment = ((sample * deep + layer // depth) * down + i) * across + j
                values = self._segment(number, segment)[layer % depth, :, :, inner]
                top, left = i * height, j * width
                first, start = max(top, rows.start), max(left, columns.start)
                last = min(top + len(values), rows.stop)
                end = min(left + values.shape[1], columns.stop)
                result[
                    first - rows.start : last - rows.start,
                    start - columns.start : end - columns.start,
                ] = values[first - top : last - top, start - left : end - left]
        return result

    def _segment(self, number: int, segment: int) -> np.ndarray:
        """A decoded strip or tile: (depth, rows, columns, samples)."""
        with self._handle.lock:
            key = number, segment
            if key in self._decoded:
                self._decoded.move_to_end(key)
                return self._decoded[key]
            values = self._decode(number, segment)
            self._decoded[key] = values
            kept = sum(item.nbytes for item in self._decoded.values())
            while kept > _CACHE and len(self._decoded) > 1:
                kept -= self._decoded.popitem(last=False)[1].nbytes
            return values

    def _decode(self, number: int, segment: int) -> np.ndarray:
        page = self._series[number]
        if page is None:
            raise PictureError(f"{self.name}: plane {number} is not in the file")
        offset, length = page.dataoffsets[segment], page.databytecounts[segment]
        options = {}
        if int(self._page.compression) in _DECODED_TO_RGB:
            options = {"jpegtables": page.jpegtables, "jpegheader": self._page.jpegheader}
        data = None  # a part that was left out, as nothing is in it
        if length:
            file = self._handle.file.filehandle
            file.seek(offset)
            data = file.read(length)
            if len(data) < length:
                raise self._truncated()
        values, _, shape = self._page.decode(data, segment, **options)
        if values is None:
            empty = np.full((), 0 if self._no_data is None else self._no_data, self._page.dtype)
            return np.broadcast_to(empty, shape)
        return values

    def _truncated(self) -> PictureError:
        return PictureError(f"{self.name}: expected a picture, but the file is truncated")


def _no_data(page: TiffPage) -> float | None:
    """The sample that stands for none; `None` where no sample can be it."""
    tag, dtype = page.tags.get(_NO_DATA), np.dtype(page.dtype)
    if tag is None or dtype.kind not in "iuf":
        return None
    try:
        number = float(str(tag.value).replace(",", ".").strip("\0 "))
    except ValueError:
        return None
    if dtype.kind == "f":
        return number
    limits = np.iinfo(dtype)
    return number if number.is_integer() and limits.min <= number <= limits.max else None


def _put(place: list[int | slice], axes: Sequence[int], numbers: Sequence[np.intp]) -> None:
    for axis, number in zip(axes, numbers, strict=True):
        place[axis] = int(number)


def _name_of(value: object) -> str:
    return getattr(value, "name", str(value))


def _ome_names(file: TiffFile, series: TiffPageSeries) -> tuple[str, ...]:
    """Names of the channels of a series in OME metadata, as many as there are."""
    if series.kind != "ome":
        return ()
    images = []
    with contextlib.suppress(ElementTree.ParseError, TypeError):
        for element in ElementTree.fromstring(file.ome_metadata or "").iter():
            if element.tag.rpartition("}")[2] == "Pixels":
                channels = (e for e in element if e.tag.rpartition("}")[2] == "Channel")
                images.append(tuple(e.get("Name", "") for e in channels))
    if len(images) == len(file.series):
        return images[next(n for n, other in enumerate(file.series) if other is series)]
    # Some images are not in this file, and which is not said.
    return images[0] if len(set(images)) == 1 else ()
