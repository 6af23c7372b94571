"""Checkpoints of a run: whole or not there, known to be whole, the newest few kept.

A checkpoint is called step-STEP-DIGEST.pt. DIGEST is the start of the SHA-256 of its content, so
that reading detects a file that was cut off or changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from pointformer._files import TEMPORARY_PREFIX, publish, sync, temporary_path

LOCK = "run.lock"
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.pt")


class _Hashing(io.RawIOBase):
    """A file to write to that hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`.

    Args:
        state: of values that `torch.load(weights_only=True)` can read.

    Raises:
        OSError: it cannot be written, such as on a full disk; the ones before it are still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_path(folder / "step.pt") as temporary:
        with temporary.open("wb") as file:
            hashing = _Hashing(file)
            _save(dict(state), cast(BinaryIO, hashing))
        sync(temporary)
        path = folder / f"step-{step:08d}-{hashing.hash.hexdigest()[:16]}.pt"
        publish(temporary, path)
    _sync_folder(folder)
    kept = {path: step}
    for older in list_checkpoints(folder):
        number = _step_of(older)
        if len(kept) < keep and number not in kept.values():
            kept[older] = number
        elif older not in kept:
            older.unlink(missing_ok=True)
    return path


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    """`torch.save`, but for its last word: what ends it, such as a full disk or a signal, it
    replaces by an error of its own about the unfinished file."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError):
            cause = cause.__context__
        if cause is None:
            raise
        raise cause from None


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return -1 if match is None else int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Paths of the checkpoints in a folder, readable or not, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _step_of(path) >= 0]
    return sorted(found, key=lambda path: (_step_of(path), path.stat().st_mtime_ns), reverse=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the content of a checkpoint, tensors on the CPU.

    Raises:
        ValueError: it is no checkpoint, unreadable, or not what was written.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: expected a checkpoint, step-STEP-DIGEST.pt")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not digest.startswith(match[2]):
                raise ValueError(f"{path}: is damaged: its content is not what was written")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: expected a checkpoint, but {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a checkpoint of a run")
    return state


def newest_checkpoint(
    paths: Iterable[Path],
) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    """Find the first readable checkpoint.

    Returns:
        Its path and content, or `None`; and the errors of the unreadable ones before it.
    """
    problems: list[str] = []
    for path in paths:
        try:
            return (path, read_checkpoint(path)), problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make a folder and own it, against all other processes, within this context.

    The lock ends with the process, however that ends. The file `run.lock` that a killed run leaves
    in the folder does not block the next one.

    Raises:
        ValueError: another process owns it, or it is no folder.
        OSError: nothing can be written there.
    """
    from filelock import FileLock, Timeout

    if os.path.lexists(folder) and not folder.is_dir():
        kind = "is a file" if folder.exists() else "link leads nowhere"
        raise ValueError(f"{folder}: expected a folder, this {kind}; use another --out")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    path.open("a").close()  # an error that says why it cannot be written
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder}: another command trains there; wait for its end, or use another --out"
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run was writing, in all of its folders; only for the process that owns
    them."""
    for path in folder.rglob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where systems can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
