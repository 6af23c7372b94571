"""Files of predictions: complete or not there, and never in the place of somebody else's file.

A file that is there already is replaced only if one of our writers wrote it, which its content
tells. So an output folder can be used again, but no picture and no annotation is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

from pointformer._files import atomic_path

_SOFTWARE = "pointformer"
_INFO = {"info": {"description": f"written by {_SOFTWARE}"}}


def write_png(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Write an array that Pillow knows as a PNG, in a folder that is made if need be.

    Raises:
        ValueError: if a file is there that no writer of ours wrote.
    """
    note = PngImagePlugin.PngInfo()
    note.add_text("Software", _SOFTWARE)
    with _new_file(path, _is_our_png) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=note)


def write_tiff(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    """Write an array as a compressed TIFF; like `write_png`."""
    import tifffile

    with _new_file(path, _is_our_tiff) as temporary:
        tifffile.imwrite(temporary, pixels, compression="zlib", software=_SOFTWARE)


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write an object with keys, and who wrote it as its "info"; raises like `write_text`."""
    begin = json.dumps(_INFO).removesuffix("}")
    write_text(path, to_json(_INFO | content, path), lambda text: text.startswith(begin))


def to_json(content: Any, path: str | os.PathLike[str]) -> str:
    """JSON as every reader takes it.

    Raises:
        ValueError: naming the file, if a number is not finite.
    """
    try:
        return json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: expected finite numbers only: {error}") from None


def write_text(path: str | os.PathLike[str], text: str, is_ours: Callable[[str], bool]) -> None:
    """Write UTF-8, in a folder that is made if need be.

    Args:
        is_ours: whether a writer of ours wrote the text that is there already.

    Raises:
        ValueError: if a file is there that is not ours.
    """
    with _new_file(path, lambda old: is_ours(old.read_text(encoding="utf-8"))) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_our_png(path: Path) -> bool:
    with Image.open(path, formats=["PNG"]) as picture:
        return picture.info.get("Software") == _SOFTWARE


def _is_our_tiff(path: Path) -> bool:
    with Image.open(path, formats=["TIFF"]) as picture:
        return picture.tag_v2.get(TiffImagePlugin.SOFTWARE) == _SOFTWARE  # type: ignore[attr-defined]


def remove_ours(path: str | os.PathLike[str]) -> None:
    """Remove a map that `write_png` or `write_tiff` wrote; what others wrote stays.

    For one that is written anew with the other suffix: beside it, the name would be ambiguous.
    """
    path = Path(path)
    if os.path.lexists(path) and _tells(
        path, _is_our_tiff if path.suffix == ".tif" else _is_our_png
    ):
        path.unlink()


def _tells(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    try:
        return is_ours(path)
    except (OSError, ValueError, SyntaxError):
        return False  # whatever it is, it is nothing that a writer of ours wrote


@contextlib.contextmanager
def _new_file(path: str | os.PathLike[str], is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    there = os.path.lexists(path)
    if there and not _tells(path, is_ours):
        raise ValueError(
            f"{path}: is there already and was not written by {_SOFTWARE}: "
            "remove it, or write to another folder"
        )
    with atomic_path(path, replace=there) as temporary:
        yield temporary
