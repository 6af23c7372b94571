"""Files that are complete under their final name or not there at all, inside the folder given."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

TEMPORARY_PREFIX = ".pointformer-"
"""Starts the names of files that are being written: those of a killed run may be deleted."""


def cache_folder() -> Path:
    """Folder of what is kept between runs: $POINTFORMER_CACHE, or ~/.cache/pointformer."""
    return Path(os.environ.get("POINTFORMER_CACHE") or Path.home() / ".cache" / "pointformer")


def path_inside(folder: str | os.PathLike[str], name: str, *, follow_links: bool = False) -> Path:
    """`folder / name` for a name that came out of a file: it cannot lead out of the folder.

    Names are judged by the rules of POSIX and of Windows both, so that a data set is good or bad
    on every machine alike.

    Args:
        folder: what the user named; may itself be a link.
        name: relative, with or without subfolders ("a.png", "train/a.png").
        follow_links: whether subfolders may be links that leave the folder, which is right for
            reading only: the links are the user's own, but what is written belongs in `folder`.
            A link in the last place is never followed: it is what `atomic_path` replaces.

    Raises:
        ValueError: the name is no text, empty or absolute, has a drive, "..", or a null character,
            or its folder is a link that leaves `folder`.
    """
    if not isinstance(name, str):
        raise ValueError(f"{str(name)[:80]!r}: expected a file name, got {type(name).__name__}")
    parts = PureWindowsPath(name).parts  # takes / and \ both as separators
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor
    # Windows drops dots and spaces at the end of a name: ".. " is ".." there.
    dots = any(not part.rstrip(" .") for part in parts)
    if absolute or not parts or dots or "\0" in name:
        raise ValueError(f"{name[:200]!r}: expected the name of a file inside of its folder")
    path = Path(folder) / name
    if not follow_links:
        inside = Path(os.path.realpath(path.parent))
        if not inside.is_relative_to(os.path.realpath(folder)):
            raise ValueError(f"{name[:200]!r}: leaves {folder} through a link")
    return path


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where there is none.

    Raises:
        OSError: naming it, if it cannot be made or is no folder.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{path}: expected a folder, this is none") from None


@contextlib.contextmanager
def temporary_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file in the folder of `path`, with its suffix, removed at the end if still there.

    Errors of writing name `path`, which is what its user knows.
    """
    path = Path(path)
    # Of a fixed length: the final name may be as long as names can be.
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= 16 else ""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{suffix}")
    try:
        # The file gets the permissions that the process's umask leaves.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
    except OSError as error:  # a full disk has no name, a folder that is not there the other one's
        if error.errno is None or str(error.filename) not in ("None", str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk: else a power failure could leave its name without it."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def publish(temporary: Path, path: str | os.PathLike[str], *, replace: bool = True) -> None:
    """Give a whole file, see `sync`, its final name in the same folder.

    Args:
        path: the final name. A link there is replaced, not followed.
        replace: whether a file that is there already is replaced.

    Raises:
        FileExistsError: `replace` is false and something is there.
    """
    if replace:
        temporary.replace(path)
        return
    try:  # one step that fails if there is something
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{os.fspath(path)}: is there already") from None
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            temporary.replace(path)
        except BaseException:
            os.unlink(path)
            raise


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[Path]:
    """A temporary path in the folder of `path`, with its suffix, moved to `path` on success.

    On an error the temporary file is removed and `path` stays as it was. What is at `path` is never
    half of the old and half of the new, not even after a power failure. See `publish`.
    """
    with temporary_path(path) as temporary:
        yield temporary
        sync(temporary)
        publish(temporary, path, replace=replace)
