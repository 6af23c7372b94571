"""Files that a command may write: never over what it reads, nor over one that is not its own.

A result can be told from other files, and from itself after somebody changed it: a JSON file has a
key "seal", and a picture a text of that name, with the SHA-256 of the rest of its content; and
NAME_summary.json lists the SHA-256 of the other NAME_* under "files".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointformer._files import publish, sync, temporary_path

if TYPE_CHECKING:
    from PIL import Image

_SEAL = "seal"


@dataclass(frozen=True)
class Found:
    """What is in one input, to be written.

    Attributes:
        writers: by kind of file, what writes it to a path.
        description: for the summary.
        words: for the user.
    """

    writers: Mapping[str, Callable[[Path], None]]
    description: Mapping[str, Any]
    words: str


class Results:
    """The files that one run of a command writes.

    Args:
        overwrite: whether files that are no results may be replaced; what the run reads never is.
    """

    def __init__(self, *, overwrite: bool = False) -> None:
        self._overwrite = overwrite
        # By device and file number: the same for links and for names that differ in case or "..".
        self._protected: dict[tuple[int, int], str] = {}

    def protect(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Never replace these files, which are read, under any name; pass by missing ones."""
        for path in paths:
            self._protect(Path(path), "is an input, and inputs are never replaced")

    def check(self, path: Path) -> bool:
        """Whether there is a file that `path` will replace; an error if it must not be written.

        Raises:
            OSError: naming the path: it is an input, somebody else's, a folder, cannot be a name,
                or its folder cannot be written to.
        """
        folder = next(above for above in path.absolute().parents if os.path.lexists(above))
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder}: expected a folder, this is none")
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder}: no permission to write there")
        try:
            status = path.lstat()
        except FileNotFoundError:
            return False
        with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
            status = path.stat()
        protected = self._protected.get((status.st_dev, status.st_ino))
        if protected is not None:
            raise FileExistsError(f"{path}: {protected}; choose another name")
        if path.is_dir():
            raise IsADirectoryError(f"{path}: expected a name for a file, this is a folder")
        if not self._overwrite and not is_result(path):
            raise FileExistsError(
                f"{path}: is there, and not as this program wrote it; move it, choose another "
                "name, or pass --overwrite"
            )
        return True

    @contextlib.contextmanager
    def write(self, path: Path) -> Iterator[Path]:
        """A temporary path that becomes `path`, whole or not at all; errors as of `check`."""
        with temporary_path(path) as temporary:
            yield temporary
            sync(temporary)
            for error in self.publish({path: temporary}).values():
                raise error

    def publish(self, files: Mapping[Path, Path]) -> dict[Path, OSError]:
        """Give whole files their final names, in this order.

        All are checked before the first is moved, which may be the list that knows the others.

        Args:
            files: temporary paths by final ones.

        Returns:
            What is wrong with those that stay as they were: see `check`, or something came there
            meanwhile.
        """
        failures: dict[Path, OSError] = {}
        replace: dict[Path, bool] = {}
        for path in files:
            try:
                replace[path] = self.check(path)
            except OSError as error:
                failures[path] = error
        for path, there in replace.items():
            try:
                publish(files[path], path, replace=there)
            except OSError as error:
                failures[path] = error
            else:
                self._protect(path, "is a result of this run already, for another picture")
        return failures

    def _protect(self, path: Path, why: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            status = path.stat()
            self._protected[status.st_dev, status.st_ino] = why


def is_result(path: Path) -> bool:
    """Whether a file is what a command wrote, and as it was written."""
    with contextlib.suppress(OSError, AttributeError):  # unreadable, or sealed by somebody else
        if path.is_symlink() or not path.is_file():
            return False
        if path.suffix == ".json":
            return bool(_sealed(path))
        summary = path.with_name(f"{path.name.rpartition('_')[0]}_summary.json")
        listed = _sealed(summary).get("files", {}).get(path.name)
        return _is_sealed_picture(path) if listed is None else listed == content_of(path)
    return False


def is_complete(summary: Path, **expected: Any) -> bool:
    """Whether a NAME_summary.json says what is expected, and it and all results that it lists are
    as they were written."""
    content = _sealed(summary) if is_result(summary) else {}
    listed = content.get("files", {})
    return (
        bool(listed)
        and all(content.get(name) == value for name, value in expected.items())
        and all(is_result(summary.with_name(name)) for name in listed)
    )


def content_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that `is_result` knows."""
    path.write_text(_json({**content, _SEAL: _digest(_json(content).encode())}) + "\n")


def save_sealed(path: Path, picture: Image.Image) -> None:
    """Write a PNG that `is_result` knows."""
    from PIL.PngImagePlugin import PngInfo

    seal = PngInfo()
    seal.add_text(_SEAL, _digest(picture.tobytes()))
    picture.save(path, format="PNG", pnginfo=seal)


def _sealed(path: Path) -> dict[str, Any]:
    """The content of a JSON file that `write_sealed` wrote, else nothing."""
    try:
        content = json.loads(path.read_bytes())
        seal = content.pop(_SEAL)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return {}
    return content if seal == _digest(_json(content).encode()) else {}


def _is_sealed_picture(path: Path) -> bool:
    from PIL import Image

    from pointformer.data.pillow import without_warnings

    with (
        contextlib.suppress(Exception),  # whatever else it is
        without_warnings(),
        Image.open(path, formats=("PNG",)) as picture,
    ):
        seal = picture.info.get(_SEAL)
        return seal is not None and seal == _digest(picture.tobytes())
    return False


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
