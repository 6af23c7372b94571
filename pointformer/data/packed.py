"""Pictures and maps that are parts of larger files: members of tar shards, rows of arrays."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from pointformer.data.stored import PictureError


class FileState(NamedTuple):
    """Size of a file in bytes, and when it was written: one changes when the file does."""

    size: int
    modified: int

    @staticmethod
    def of(status: os.stat_result) -> FileState:
        return FileState(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Packed(ABC):
    """A file, or the samples of a picture or a map, within a larger file.

    Attributes:
        path: the larger file.
        state: of it, when its parts were listed.
        member: what the part is called in it.
    """

    path: Path
    state: FileState
    member: str

    @property
    def name(self) -> str:
        """The last part of what it is called, as that of a path."""
        return PurePosixPath(self.member).name

    @abstractmethod
    def read(self) -> bytes | np.ndarray:
        """The content of the file, or samples as `open_picture` takes them.

        Raises:
            PictureError: the larger file cannot be read, or is not as it was.
        """

    def check(self, status: os.stat_result) -> None:
        """Raise a `PictureError` if the larger file is another than the one that was listed."""
        if FileState.of(status) != self.state:
            raise PictureError(
                f"{self.path}: was changed after its pictures were listed; start again"
            )

    def __str__(self) -> str:
        return f"{self.path}/{self.member}"


PictureFile = Path | Packed
"""A picture's or a map's file."""


def is_there(file: PictureFile) -> bool:
    """Whether there is such a file; parts of files were found in them."""
    return isinstance(file, Packed) or os.path.isfile(file)


def state_of(file: PictureFile) -> FileState | None:
    """Of the file, or of the larger one when its parts were listed; `None` if there is none."""
    if isinstance(file, Packed):
        return file.state
    try:
        return FileState.of(os.stat(file))
    except OSError:
        return None


def file_of(file: PictureFile) -> Path:
    """The file that it is, or is a part of."""
    return file.path if isinstance(file, Packed) else file
