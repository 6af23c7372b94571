"""Signals that end a run, without losing what was done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


def left_to_parent(worker: int) -> None:
    """Make a worker process ignore signals to the whole terminal or job; its parent ends it.

    Args:
        worker: its number, which DataLoader gives.
    """

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, first)


class Ending:
    """Signals that tell this process to end (Ctrl-C, SIGTERM), kept for the right moment.

    A second one ends it at once.

    Attributes:
        told: number of the signal; 0 as long as there was none.
    """

    def __init__(self) -> None:
        self.told = 0
        self._at_once = False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Keep signals in `told` within this context."""
        old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                old[number] = signal.signal(number, self._tell)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the first signal, also one kept before, end the process within this context."""
        if self.told:
            self.end()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def end(self) -> None:
        """End the process as the signal would have."""
        if self.told in (0, signal.SIGINT):
            raise KeyboardInterrupt
        raise SystemExit(128 + self.told)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        again, self.told = self.told, number
        if again or self._at_once:
            self.end()
