"""Reading JSON files that others wrote: nothing in them is taken for granted."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of values of a JSON file; `read` gives None where it is something else."""

    description: str
    read: Callable[[Any], Any]


def _whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    if isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit():
        return int(value) if len(value) < 20 else None
    return value if type(value) is int and abs(value) < 1 << 63 else None


def _number(value: Any) -> float | None:
    if type(value) not in (int, float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _flag(value: Any) -> bool | None:
    number = int(value) if isinstance(value, bool) else _whole(value)
    return bool(number) if number in (0, 1) else None


WHOLE = Kind("a whole number", _whole)
"""Other tools write 3 as 3.0 or "3" too; true is no number."""
NUMBER = Kind("a finite number", _number)
FLAG = Kind("0 or 1", _flag)
TEXT = Kind("a text", lambda value: value if isinstance(value, str) else None)
IDENTIFIER = Kind(
    "a whole number or a text", lambda value: value if isinstance(value, str) else _whole(value)
)
"""A text stays one; compare identifiers as texts, since files mix 3 and "3"."""

_NEEDED = object()


def value_of(row: Any, key: str, kind: Kind, default: Any = _NEEDED) -> Any:
    """The value of a key, as its kind reads it; `default` where it is missing or null.

    Raises:
        ValueError: if it is of another kind, missing without a default, or `row` is no object.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with keys, got {reprlib.repr(row)}")
    value = row.get(key)
    if value is None and default is not _NEEDED:
        return default
    result = kind.read(value)
    if result is None:
        given = f"got {reprlib.repr(value)}" if key in row else "there is none"
        raise ValueError(f"expected {kind.description} as {key!r}, {given}")
    return result


def shown(identifier: int | str) -> str:
    """An identifier for a message: one short line whatever it is."""
    text = str(identifier)
    return text if len(text) < 80 and text.removeprefix("-").isalnum() else reprlib.repr(text)


def repeated(keys: Iterable[str]) -> set[str]:
    """Keys that are there more than once."""
    seen: set[str] = set()
    return {key for key in keys if key in seen or seen.add(key)}  # type: ignore[func-returns-value]


def read_json(path: str | os.PathLike[str], kind: type = dict) -> Any:
    """Content of a JSON file in UTF-8, UTF-16 or UTF-32, with a byte-order mark or without.

    Raises:
        ValueError: in one line that names the file, if it is missing, no JSON, no `kind`, or gives
            a key of an object twice.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a JSON file, there is no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: expected JSON, but {error}") from None
    return parse_json(content, path, kind)


def parse_json(content: bytes, source: object, kind: type = dict) -> Any:
    """Value of a file's content, which errors call `source`; see `read_json`."""
    try:
        parsed = json.loads(content, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, but {error}") from None
    if not isinstance(parsed, kind):
        raise ValueError(f"{source}: expected a JSON {kind.__name__}, got {type(parsed).__name__}")
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        key = min(repeated([key for key, _ in pairs]))
        raise ValueError(f"an object has the key {reprlib.repr(key)} twice")
    return content
