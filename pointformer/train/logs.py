"""Logs of a run in progress: tables as CSV, and the same for TensorBoard."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pointformer._files import atomic_path


class Table:
    """A CSV file with a row per entry, each written at once; `step` is its first column.

    Args:
        path: of the file; one that is there is continued.
        step: rows of later steps, which an interrupted run wrote, are dropped, and so is a row that
            was cut off.
        keys: columns that tell rows apart, `step` the first of them. A row that an interrupted run
            wrote gives way to a new one of the same keys.
    """

    def __init__(self, path: Path, step: int, keys: Sequence[str] = ("step",)) -> None:
        self.path = path
        self.keys = keys
        self.columns: list[str] = []
        kept: list[list[str]] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows = list(csv.reader(file))
            self.columns = rows[0] if rows else []
            kept = [row for row in rows[1:] if self._is_kept(row, step)]
            if not kept:  # the names may be cut off too
                self.columns = []
        self._write(kept)
        made = [row for row in kept if int(row[0]) == step]  # the only ones that can be made again
        self.before = [dict(zip(self.columns, row, strict=True)) for row in made]

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *rows] if self.columns else [])

    def _is_kept(self, row: list[str], step: int) -> bool:
        return len(row) == len(self.columns) and row[0].isdigit() and int(row[0]) <= step

    def _keys_of(self, row: Mapping[str, Any]) -> list[str]:
        return [str(row.get(name)) for name in self.keys]

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a row; the first one names the columns."""
        row = {"step": step, **values}
        if self._keys_of(row) in map(self._keys_of, self.before):
            with self.path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            kept = [old for old in rows if self._keys_of(old) != self._keys_of(row)]
            self._write([list(old.values()) for old in kept])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            if not self.columns:
                self.columns = list(row)
                csv.writer(file).writerow(self.columns)
            csv.DictWriter(file, self.columns, restval="", extrasaction="ignore").writerow(row)


def read_table(path: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV file of a run by name, float64; no columns if there is no such file.

    What is no number is NaN there, as in a file that is damaged.
    """
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name is not None] if rows else []
    return {name: np.array([_number(row[name]) for row in rows]) for name in names}


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


class Logs:
    """The tables log.csv and scores.csv of a run, and the same for TensorBoard, where that is
    installed.

    Args:
        out: folder of the run.
        step: that the run continues from; what was written of later ones is dropped.
        enabled: `False` in processes that leave it to another.
    """

    def __init__(self, out: Path, step: int, enabled: bool = True) -> None:
        self.board = None
        self.enabled = enabled
        if not enabled:
            return
        self.training = Table(out / "log.csv", step)
        self.scores = Table(out / "scores.csv", step, ("step", "final"))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def add_training(self, step: int, values: Mapping[str, float]) -> None:
        """Losses, learning rate and speed of the last steps."""
        if self.enabled:
            self.training.add(step, values)
            self._show("training", step, values)

    def add_scores(self, step: int, values: Mapping[str, float]) -> None:
        """Scores on validation pictures."""
        if self.enabled:
            self.scores.add(step, values)
            self._show("validation", step, values)

    def _show(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, step)
            self.board.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.board is not None:
            self.board.close()
