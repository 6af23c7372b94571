"""Results as lines of JSON, each written as soon as it is known, so that nothing is lost."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

Case = tuple[str, Callable[[], object]]


class Part(NamedTuple):
    """What runs in a process of its own: named functions, and a limit in seconds for all."""

    cases: Callable[[], Iterator[Case]]
    limit: float


class Report:
    """A file of lines, of which the last one about a case holds.

    A line `{"run": ...}` begins a run and says on which `card`; every other line has the `part`,
    the `case`, that `card`, and a `status`: "running", "done", "failed" or "skipped".
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict]:
        """All but a last one that was cut off."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return lines

    def add(self, **fields: object) -> None:
        """Append a line, on disk when this returns."""
        with self.path.open("a+b") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                file.write(b"\n")  # the line before was cut off
            file.write(json.dumps(fields).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def begin(self, card: str, **fields: object) -> None:
        self.add(run=fields, card=card)

    @functools.cached_property
    def card(self) -> str:
        """The card of the run that is under way."""
        return next(line["card"] for line in reversed(self.lines()) if "run" in line)

    def settle(self, part: str, case: str, status: str, **fields: object) -> None:
        self.add(part=part, case=case, card=self.card, status=status, **fields)

    def status(self, part: str) -> dict[str, str]:
        """Of each case of a part: what this run says, or "done" where an earlier one on such a card
        says so. Times of another card are no times of this one."""
        lines = self.lines()
        begun = max((i for i, line in enumerate(lines) if "run" in line), default=0)
        found: dict[str, str] = {}
        for i, line in enumerate(lines):
            if line.get("part") != part or line["card"] != self.card:
                continue
            if i > begun or line["status"] == "done":
                found[line["case"]] = line["status"]
            else:
                found.pop(line["case"], None)
        return found
