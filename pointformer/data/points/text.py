"""Text: numbers in columns, one point per line."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pointformer.data.points.columns import AXES, as_table, check_names, column_named, resolution_of

_COMMENTS = ("#", "//")
_LINES = 100  # that tell whether it is text


def read(path: Path) -> dict[str, np.ndarray]:
    noted: list[str] = []  # names in the last comment, or none
    names: list[str] = []
    skipped = 0
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = list(itertools.islice(file, _LINES))
        if any("\0" in line or "\ufffd" in line for line in lines):
            raise ValueError("is neither LAS, LAZ, PLY nor NPZ, nor text in UTF-8")
        if len(lines) < _LINES and not any(line.strip() for line in lines):
            raise ValueError("is empty, has no points")
        for skipped, line in enumerate(itertools.chain(lines, file)):  # noqa: B007  (read after it)
            comment, parts, delimiter, decimal, closed = _parsed(line)
            if comment and parts:
                noted = parts
            elif any(_is_number(part.replace(decimal, ".")) for part in parts):
                if len(parts) > 1:
                    break  # the first point; else it is their number, with which PTS files begin
            elif parts:  # an index, as pandas writes it, has no name
                names = [part or f"column_{i}" for i, part in enumerate(parts)]
        else:
            raise ValueError("has no points: expected lines of numbers, x, y and z first")
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            rows: Iterable[str] = file
            if decimal == ",":
                rows = (line.replace(decimal, ".") for line in rows)
            if closed:
                rows = (line.rstrip().removesuffix(delimiter or "") for line in rows)
            table = np.loadtxt(
                rows, delimiter=delimiter, skiprows=skipped, comments=_COMMENTS, ndmin=2
            )
    except ValueError as error:
        raise ValueError(f"after line {skipped}: {str(error).split('; use')[0]}") from None
    width = table.shape[1]
    if not names:
        named = len(noted) == width and {"x", "y"} <= set(noted)
        names = noted if named else [*AXES, *(f"column_{i}" for i in range(3, width))][:width]
    if len(names) != width:
        raise ValueError(f"has {width} columns of numbers and {len(names)} names of columns")
    if len(set(names)) != width:
        raise ValueError(f"has two columns of one name: {', '.join(names[:12])}")
    return {name: _whole(column) for name, column in zip(names, table.T, strict=True)}


def _parsed(line: str) -> tuple[str, list[str], str | None, str, bool]:
    """Of a line: the sign of a comment, its columns (none of an empty line), what is between them
    (`None`: spaces), its decimal sign, whether there is a delimiter after each column."""
    words = line.strip()
    comment = next((sign for sign in _COMMENTS if words.startswith(sign)), "")
    words = words[len(comment) :].strip()
    delimiter = next((sign for sign in ";\t," if sign in words), None)
    if delimiter == "," and _decimal_commas(words):
        delimiter, decimal = None, ","
    else:
        decimal = "," if delimiter in (";", "\t") else "."  # where a column has one
    closed = delimiter in (";", ",") and words.endswith(delimiter)  # after each column
    words = words[:-1] if closed else words
    closed |= delimiter == "\t" and line.rstrip("\r\n ").endswith("\t")
    parts = [part.strip().strip("\"'") for part in words.split(delimiter)] if words else []
    parts = [part.lower() if part.lower() in AXES else part for part in parts]
    return comment, parts, delimiter, decimal, closed


def _decimal_commas(words: str) -> bool:
    """Whether numbers with decimal commas stand between spaces: "1,5 2,5 3", not "1, 2, 3"."""
    parts = words.split()
    return len(parts) > 1 and all(
        part[-1] != "," and _is_number(part.replace(",", ".")) for part in parts
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _whole(column: np.ndarray) -> np.ndarray:
    """Integers, where all are."""
    whole = np.abs(column) < 2.0**53
    whole &= column == np.floor(column)
    return column.astype(np.int64) if whole.all() else column


def objection(name: str, suffix: str) -> str:
    _, parts, *_ = _parsed(_delimiter([name], suffix).join(["x", name]))
    number = suffix == ".csv" and _is_number(name)  # in a line that is no comment
    kept = name.isprintable() and parts == ["x", name] and not number
    return "" if kept else "it cannot stand in the first line of a file of text"


def _delimiter(names: Iterable[str], suffix: str) -> str:
    if suffix == ".csv":
        return ","
    return "\t" if any(" " in name for name in names) else " "


def write(path: Path, columns: dict[str, np.ndarray]) -> None:
    comma = path.suffix.lower() == ".csv"
    axes = [axis for axis in AXES if axis in columns]
    step = resolution_of(np.stack([columns[axis] for axis in axes], 1))
    places = max(0, round(-np.log10(step)))
    formats = [
        f"%.{places}f" if name in axes else "%d" if rows.dtype.kind in "iub" else "%.17g"
        for name, rows in columns.items()
    ]
    table = as_table(columns)
    delimiter = _delimiter(columns, path.suffix.lower())
    header = delimiter.join(columns)
    np.savetxt(
        path,
        table,
        fmt=formats,
        delimiter=delimiter,
        header=header,
        comments="" if comma else "# ",
        encoding="utf-8",
    )


def write_classes(path: Path, source: Path, codes: np.ndarray) -> None:
    columns = read(source)
    count = len(columns["x"])
    if len(codes) != count:
        raise ValueError(f"classes: expected those of {count} points, got {len(codes)}")
    classes = column_named("classification", columns) or "classification"
    others = [name for name in columns if name not in AXES]
    check_names(others, lambda name: objection(name, path.suffix.lower()))
    write(path, {**columns, classes: codes})
