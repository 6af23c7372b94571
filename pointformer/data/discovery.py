"""Pictures in folders, and their names: one rule for all that lists folders.

A picture is a file with a suffix of `PICTURE_SUFFIXES`, upper or lower case. Nobody's pictures are:
hidden files (macOS's ._x.png is one) and Office's ~$x.png, folders, links that lead nowhere, and
whatever has another suffix (Thumbs.db, desktop.ini, x.png.part).
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePosixPath

MAP_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm"})
"""Of pictures that keep their values: those that can hold ids or labels."""

PICTURE_SUFFIXES = MAP_SUFFIXES | {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".ppm", ".pbm", ".pnm"),
    *(".btf", ".tf8", ".lsm", ".stk", ".svs", ".ndpi", ".scn", ".qptiff"),  # kinds of TIFF
}

CLOUD_SUFFIXES = frozenset({".las", ".laz", ".ply", ".npz", ".xyz", ".pts", ".asc"})
"""Of point clouds; columns of text in .txt and .csv are some only where a user says so."""

_INSTEAD = {
    "TIFF": (
        *(".czi", ".lif", ".nd2", ".oib", ".oif", ".oir", ".vsi", ".ims", ".mrxs"),  # microscopes
        *(".dcm", ".nii", ".mha", ".nrrd", ".zarr", ".h5", ".hdf5", ".heic", ".dng", ".pdf"),
    ),
    "PLY, LAS or LAZ": (".pcd", ".e57", ".rcp", ".ptx", ".obj", ".stl", ".off"),
}
"""What files of known formats that are not read can be written as."""

_LITTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}
"""Folders that operating systems and file servers put beside pictures."""


def is_picture(path: str | os.PathLike[str], suffixes: frozenset[str] = PICTURE_SUFFIXES) -> bool:
    """Whether a path that was found, not named by the user, is to be taken for a picture."""
    return has_picture_name(path, suffixes) and os.path.isfile(path)


def has_picture_name(
    path: str | os.PathLike[str], suffixes: frozenset[str] = PICTURE_SUFFIXES
) -> bool:
    """Whether something of this name would be a picture if it is a file that can be read."""
    path = Path(path)
    return not is_litter(path.name) and path.suffix.lower() in suffixes


def unread_format(path: str | os.PathLike[str]) -> str:
    """What to do about a file whose name says that it is of a format that is not read; "" for all
    others."""
    name = PurePosixPath(os.fspath(path)).name.lower()
    suffix = PurePosixPath(name.removesuffix(".gz")).suffix
    return next(
        (
            f"{suffix} files are not read, write it as {instead}"
            for instead, suffixes in _INSTEAD.items()
            if suffix in suffixes
        ),
        "",
    )


def is_litter(name: str) -> bool:
    """Whether a file or folder of this path in its data set is one that operating systems and
    office programs leave behind."""
    parts = PurePosixPath(name).parts
    return any(part.startswith((".", "~$")) or part in _LITTER for part in parts)


def pictures_in(
    folder: str | os.PathLike[str],
    *,
    deep: bool = False,
    suffixes: frozenset[str] = PICTURE_SUFFIXES,
) -> list[Path]:
    """Pictures in a folder, none if there is no such folder.

    Args:
        deep: those in its folders too; links to folders are followed, hidden folders and those of
            thumbnails (`@eaDir`) are not entered.

    Returns:
        Paths that begin with `folder`, sorted by the names of folders and file, which compare by
        code points: "B" before "a", "10" before "9".

    Raises:
        ValueError: naming the folder, if it cannot be listed.
    """
    found = _files(Path(folder), deep, (), suffixes)
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def archives_in(path: Path) -> list[Path]:
    """The .npz files that a path stands for: itself, or those in a folder."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".npz" else []
    return pictures_in(path, suffixes=frozenset({".npz"}))


def picture_name(
    file_name: str | os.PathLike[str], suffixes: frozenset[str] = PICTURE_SUFFIXES
) -> str:
    """Name of a picture: its path in its data set without the suffix, as "site1/a", `composed`."""
    return without_suffix(composed(os.fspath(file_name)), suffixes)


def without_suffix(
    file_name: str | os.PathLike[str], suffixes: frozenset[str] = PICTURE_SUFFIXES
) -> str:
    """A path without its suffix if that is of pictures: "scan.1" and "scan.2" are two names."""
    path = PurePosixPath(file_name)
    return str(path.with_suffix("") if path.suffix.lower() in suffixes else path)


def composed(name: str) -> str:
    """A name with each accented letter as one character (NFC): macOS has listed "e" and its accent
    as two (NFD), and both are the same name to whoever reads it."""
    return unicodedata.normalize("NFC", name)


def pictures_by_name(
    folder: Path, suffixes: frozenset[str] = PICTURE_SUFFIXES
) -> dict[str, list[Path]]:
    """Pictures in a folder and in its folders by what they are called; several if ambiguous."""
    named: dict[str, list[Path]] = {}
    for path in pictures_in(folder, deep=True, suffixes=suffixes):
        named.setdefault(picture_name(path.relative_to(folder)), []).append(path)
    return named


def _files(
    folder: Path, deep: bool, above: tuple[tuple[int, int], ...], suffixes: frozenset[str]
) -> list[Path]:
    if not os.path.isdir(folder):
        return []
    try:
        status, paths = folder.stat(), list(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder}: this folder cannot be listed: {error.strerror}") from None
    here = status.st_dev, status.st_ino
    if here in above:  # a link to a folder that it lies in
        return []
    found = [path for path in paths if is_picture(path, suffixes)]
    if deep:
        for path in paths:
            if not is_litter(path.name) and os.path.isdir(path):
                found += _files(path, deep, (*above, here), suffixes)
    return found
