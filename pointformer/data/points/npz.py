"""NPZ: arrays by name."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pointformer._checks import brief
from pointformer.data.points.columns import AXES, column_named, with_axes

UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
"""Errors of archives that are cut off or damaged."""

_POSITIONS = ("positions", "xyz", "points", "coord", "pos", "xyz_cm")
# Names that fields cannot have: of positions and their origin, and of arguments of NumPy.
_TAKEN = (_POSITIONS[0], "origin", "file", "allow_pickle")


def holds_points(names: Iterable[str]) -> bool:
    """Whether arrays of these names are those of points."""
    names = {*names}
    return not names.isdisjoint(_POSITIONS) or {"x", "y"} <= {name.lower() for name in names}


def read(path: Path) -> dict[str, np.ndarray]:
    arrays = _arrays(path)
    for name in _POSITIONS:
        if name in arrays:
            positions = arrays.pop(name)
            if positions.ndim != 2 or positions.shape[1] not in (2, 3):
                raise ValueError(f"{name}: expected shape (n, 2) or (n, 3), got {brief(positions)}")
            if positions.dtype.kind not in "fiu":
                raise ValueError(f"{name}: expected numbers, got {brief(positions)}")
            if name == "xyz_cm":
                positions = positions / 100
            origin = arrays.pop("origin", None)
            if origin is not None:
                if origin.shape != positions.shape[1:] or origin.dtype.kind not in "fiu":
                    raise ValueError(
                        f"origin: expected {positions.shape[1]} numbers, got {brief(origin)}"
                    )
                positions = positions + origin.astype(np.float64)
            arrays |= dict(zip(AXES, positions.T, strict=False))
            break
    else:
        arrays = with_axes(arrays)
    if "x" not in arrays:
        raise ValueError(f"has no array {', '.join(_POSITIONS)} or x, only {brief([*arrays])}")
    rows = arrays["x"].shape[:1]
    if not rows:
        raise ValueError("x: expected a number for each point, got one number")
    for axis in AXES:
        if axis in arrays and arrays[axis].shape != arrays["x"].shape:
            raise ValueError(
                f"{axis}: expected a number for each of {rows[0]} in x, got {brief(arrays[axis])}"
            )
    return {
        name: values
        for name, values in arrays.items()
        if values.shape[:1] == rows and values.dtype.kind in "fiub"
    }


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"cannot be read as NPZ: {error}") from None
    return {name: rows for name, rows in arrays.items() if isinstance(rows, np.ndarray)}


def objection(name: str, suffix: str) -> str:
    return "it would be read as something else" if name in _TAKEN else ""


def write(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # a name would get another suffix
        np.savez_compressed(file, **columns)  # type: ignore[arg-type]


def write_classes(path: Path, source: Path, codes: np.ndarray) -> None:
    count = len(read(source)["x"])
    if len(codes) != count:
        raise ValueError(f"classes: expected those of {count} points, got {len(codes)}")
    arrays = _arrays(source)
    classes = column_named("classification", arrays) or "classification"
    write(path, {**arrays, classes: codes})
