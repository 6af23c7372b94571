"""Files that Pillow reads, and Pillow's own pictures."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pointformer.data.stored import RGB, Layout, PictureError, check_pixels

_ORIENTATION = 0x0112  # the EXIF tag
# Formats whose further pictures are layers or copies in other sizes.
_ONE_PICTURE = {"PSD", "ICO", "ICNS", "CUR", "FPX"}
_LOCK = threading.Lock()  # of what is one for the whole program: its warnings, Pillow's limit
_SILENT = contextlib.ExitStack()
_silencers = 0


def _renew_lock() -> None:
    global _LOCK, _silencers
    _LOCK, _silencers = threading.Lock(), 0
    _SILENT.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Show no warnings meanwhile, in several threads at a time too: `warnings.catch_warnings` there
    leaves the filters of one thread behind for all. The first one in switches them off here, and
    the last one out on again.
    """
    global _silencers
    with _LOCK:
        if _silencers == 0:
            _SILENT.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _silencers += 1
    try:
        yield
    finally:
        with _LOCK:
            _silencers -= 1
            if _silencers == 0:
                _SILENT.close()


def _opened(file: str | io.BytesIO) -> Image.Image:
    """Pillow's limit of pixels is one for the whole program; `max_pixels` is checked instead."""
    with _LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = before


class StoredPillow:
    """A `Stored` that is decoded whole, when it is read first.

    Args:
        source: a file, or a picture in memory.
        max_pixels: the most that it may have.
        numbers: read the indices of palette pictures, and numbers of less than 8 bits, as stored.
        content: of the file, where `source` is only its name.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Image.Image,
        max_pixels: int,
        numbers: bool = False,
        content: bytes | None = None,
    ) -> None:
        self._numbers, self._content = numbers, content
        known = isinstance(source, Image.Image) or content is not None
        again = source if known else os.path.abspath(source)  # type: ignore[arg-type]
        # In another process the file is opened again.
        self._again = again, max_pixels, numbers, content
        self._decoded: tuple[int, np.ndarray] | None = None
        with without_warnings():  # what is decoded in spite of a flaw is good enough
            if isinstance(source, Image.Image):
                self.name, self._picture, frames, deep = "image", source, 1, ""
            else:
                self.name = os.fspath(source)
                self._picture = _opened(self.name if content is None else io.BytesIO(content))
                weakref.finalize(self, self._picture.close)
                check_pixels(self.name, self._picture.height, self._picture.width, max_pixels)
                frames = _frames(self._picture)
                deep = _deep_colors(self.name, self._picture, content)
            picture = self._picture
            self._first, self._single = picture.tell(), frames == 1
            self._deep = deep
            self._scale = _scale(picture) if numbers else 1
            orientation = picture.getexif().get(_ORIENTATION, 1)  # which may load the picture
        gray, dtype = self._kind()
        self.layout = Layout(
            (picture.height, picture.width),
            dtype,
            8 * dtype.itemsize,
            ("gray",) if gray else RGB,
            not gray,
            (("frame", frames),) if frames > 1 else (),
            orientation if orientation in range(1, 9) else 1,
        )

    def __reduce__(self):
        return StoredPillow, self._again

    def _kind(self) -> tuple[bool, np.dtype]:
        """Whether there is one channel, and of what type."""
        mode = self._picture.mode
        if self._deep:
            return self._deep == "LA", np.dtype(np.uint16)
        if mode.startswith("I;16") or (mode == "I" and self._picture.format in ("PNG", "PPM")):
            return True, np.dtype(np.uint16)  # which some versions of Pillow hold in 32 bits
        if mode in ("I", "F"):
            return True, np.dtype(np.int32 if mode == "I" else np.float32)
        gray = ("1", "L", "LA", "La", *(("P", "PA") if self._numbers else ()))
        return mode in gray and self._single, np.dtype(np.uint8)

    def read(self, plane: int, channels: Sequence[int], rows: slice, columns: slice) -> np.ndarray:
        if self._decoded is None or self._decoded[0] != plane:
            with without_warnings():
                self._decoded = plane, self._decode(plane)
        values = self._decoded[1][rows, columns]
        every = range(values.shape[2])
        return values if [*channels] == [*every] else values[..., list(channels)]

    def _decode(self, frame: int) -> np.ndarray:
        if self._deep:
            values = _with_all_bits(self.name, self._picture, self._content)
            return values[..., : len(self.layout.channels)]
        picture = self._picture
        if not self._single:
            picture.seek(self._first + frame)
        if self.layout.rgb:
            if picture.mode in ("P", "PA"):
                picture = picture.convert("RGBA")
            return np.array(picture.convert("RGB"))
        if picture.mode in ("LA", "La", "PA"):
            picture = picture.getchannel(0)
        elif picture.mode == "1" and not self._numbers:
            picture = picture.convert("L")
        values = np.array(picture).astype(self.layout.dtype, copy=False)
        if self._scale != 1:
            values = np.rint(values / self._scale).astype(values.dtype)
        return values[..., None]


def _frames(picture: Image.Image) -> int:
    """Number of pictures of equal rank in a file."""
    if picture.format in _ONE_PICTURE:
        return 1
    if picture.format == "MPO":  # besides the photograph often a thumbnail or a map of depths
        kinds = [entry["Attribute"]["MPType"] for entry in picture.mpinfo[0xB002]]  # type: ignore[attr-defined]
        if sum("Multi-Frame" in kind for kind in kinds) < 2:
            return 1
    return getattr(picture, "n_frames", 1)


def _deep_colors(name: str, picture: Image.Image, content: bytes | None) -> str:
    """Stored mode of colors of more than 8 bits, of which Pillow would keep 8; "" of others."""
    arguments = _arguments(picture)
    if picture.format == "JPEG2000" and len(picture.getbands()) > 1:
        values = _with_all_bits(name, picture, content)
        return "" if values.dtype == np.uint8 else picture.mode
    if picture.format == "PPM" and isinstance(arguments, tuple):
        deep = len(picture.getbands()) > 1 and arguments[-1] > 255
    else:
        raw = arguments if isinstance(arguments, str) else str(arguments[:1])
        deep = len(picture.getbands()) > 1 and ";16" in raw
    if not deep:
        return ""
    if picture.format != "PNG":
        raise PictureError(
            f"{name}: 16-bit colors of the format {picture.format} are not read; "
            "save it as TIFF or PNG"
        )
    return arguments.partition(";")[0]


def _with_all_bits(name: str, picture: Image.Image, content: bytes | None) -> np.ndarray:
    import imagecodecs

    data = Path(name).read_bytes() if content is None else content
    if picture.format == "PNG":
        return imagecodecs.png_decode(data)
    return imagecodecs.jpeg2k_decode(data)


def _scale(picture: Image.Image) -> float:
    """Factor by which Pillow multiplied the numbers of a gray picture: of 2 or 4 bits, and in PGM
    files whose largest number is none of a type."""
    arguments = _arguments(picture)
    if isinstance(arguments, str):
        return {"L;2": 85, "L;4": 17}.get(arguments, 1)
    if picture.format != "PPM" or picture.mode not in ("L", "I"):
        return 1
    largest = arguments[-1]
    return (255 if picture.mode == "L" else 65535) / largest


def _arguments(picture: Image.Image) -> Any:
    """Arguments of a file's decoder, among them the mode as stored."""
    tiles = getattr(picture, "tile", None)
    return tiles[0][3] if tiles else ""
