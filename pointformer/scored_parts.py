"""Parts of a data set that are scored, kept in a folder from which scoring goes on.

The folder has evaluation.json, what the scores are of, and for each part a file
part-START-STOP-DIGEST.safetensors with the states of the metrics; the digest is the start of the
SHA-256 of what is in the file. Parts are never changed: each is as small as what was scored since
the one before.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import safe_open

from pointformer._files import TEMPORARY_PREFIX, atomic_path, make_folder
from pointformer.metrics import Metric

_MADE_WITH = "evaluation.json"
_NAME = re.compile(r"part-(\d+)-(\d+)-([0-9a-f]{16})\.safetensors")
_METADATA = "pointformer"


@dataclass
class ScoredPart:
    """Neighboring pictures of a data set that are scored.

    Attributes:
        metrics: of these pictures.
        start, stop: their numbers in the data set, the end exclusive.
        pictures: how many of them are scored; the others are skipped.
        skipped: what was left out, see `Dataset.skipped`.
    """

    metrics: list[Metric]
    start: int
    stop: int
    pictures: int = 0
    skipped: dict[str, str] = field(default_factory=dict)

    def merge(self, following: ScoredPart) -> None:
        """Add the pictures after these."""
        for mine, other in zip(self.metrics, following.metrics, strict=True):
            mine.merge(other)
        self.stop = following.stop
        self.pictures += following.pictures
        self.skipped |= following.skipped


def joined(parts: Iterable[ScoredPart]) -> list[ScoredPart]:
    """Parts in the order of the data set, neighbors as one; of overlapping ones only the first."""
    found: list[ScoredPart] = []
    for part in sorted(parts, key=lambda part: (part.start, -part.stop)):
        if not found or part.start > found[-1].stop:
            found.append(part)
        elif part.start == found[-1].stop:
            found[-1].merge(part)
    return found


class PartsFolder:
    """A folder of parts.

    Args:
        folder: a new or empty one, or one of an earlier evaluation.
        make: makes the metrics.
        states: of the files of each picture; a part of which one has changed is left out.
        seconds: of work that may be lost: how often a part is written.
    """

    def __init__(
        self,
        folder: Path,
        make: Callable[[], Sequence[Metric]],
        states: Sequence[str],
        seconds: float = 30,
    ) -> None:
        self.folder, self.make = folder, make
        self.states = states
        self.seconds = seconds
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether a part should be saved."""
        return time.monotonic() - self._saved >= self.seconds

    def open(self, made_with: Mapping[str, Any]) -> list[ScoredPart]:
        """The parts that are there, `joined`; one process does this before the first saves.

        Args:
            made_with: what the scores depend on, of what JSON can hold.

        Raises:
            ValueError: the folder is somebody else's, its parts were made with something else, or
                one is damaged; the message names it.
            OSError: it cannot be read or written.
        """
        description = self.folder / _MADE_WITH
        given = json.loads(json.dumps(made_with))
        if description.exists():
            self._check(description, given)
        else:
            make_folder(self.folder)
            if any(not p.name.startswith(TEMPORARY_PREFIX) for p in self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder}: expected a new folder, or one of an earlier evaluation, but "
                    f"there are other files and no {_MADE_WITH}"
                )
            self._write(description, (json.dumps(given, indent=2) + "\n").encode())
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there", str(self.folder))
        matches = [(path, _NAME.fullmatch(path.name)) for path in sorted(self.folder.iterdir())]
        parts = (self._read(path, match) for path, match in matches if match is not None)
        return joined(part for part in parts if part is not None)

    def save(self, part: ScoredPart) -> None:
        """Write a part, whole or not at all.

        Raises:
            OSError: it cannot be written, such as on a full disk.
        """
        tensors = {
            f"{number}.{name}": array
            for number, metric in enumerate(part.metrics)
            for name, array in metric.state().items()
        }
        state = self._state(part.start, part.stop)
        more = json.dumps({"pictures": part.pictures, "skipped": part.skipped, "state": state})
        content = safetensors.numpy.save(tensors, {_METADATA: more})
        digest = hashlib.sha256(content).hexdigest()[:16]
        name = f"part-{part.start:08d}-{part.stop:08d}-{digest}.safetensors"
        self._write(self.folder / name, content)
        self._saved = time.monotonic()

    def _write(self, path: Path, content: bytes) -> None:
        make_folder(self.folder)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def _check(self, description: Path, given: Mapping[str, Any]) -> None:
        try:
            known = json.loads(description.read_bytes())
        except ValueError:
            known = None
        if not isinstance(known, dict) or known.keys() != given.keys():
            raise ValueError(f"{description}: is not of this version's evaluations; choose another")
        for name, value in given.items():
            if known[name] != value:
                digests = isinstance(value, str) and len(value) == 64
                how = "" if digests else f": {str(known[name])[:80]}, not {str(value)[:80]}"
                raise ValueError(
                    f"{self.folder}: holds scores made with another {name}{how}; choose another "
                    "folder"
                )

    def _state(self, start: int, stop: int) -> str:
        return hashlib.sha256(repr(self.states[start:stop]).encode()).hexdigest()

    def _read(self, path: Path, match: re.Match[str]) -> ScoredPart | None:
        """A part; `None` if its pictures have changed."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(match[3]):
            raise ValueError(
                f"{path}: is damaged: its content is not what was written; remove it, and its "
                "pictures are scored again"
            )
        metrics = list(self.make())
        states: list[dict[str, Any]] = [{} for _ in metrics]
        with safe_open(path, "np") as file:
            for key in file.keys():  # noqa: SIM118
                number, _, name = key.partition(".")
                states[int(number)][name] = file.get_tensor(key)
            more = json.loads(file.metadata()[_METADATA])
        start, stop = int(match[1]), int(match[2])
        if more.get("state") != self._state(start, stop):
            return None
        for metric, state in zip(metrics, states, strict=True):
            metric.load(state)
        return ScoredPart(metrics, start, stop, more["pictures"], more["skipped"])
