"""NPZ: arrays by name."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from pointformer._checks import brief
from pointformer.data.points.columns import AXES

_POSITIONS = ("positions", "xyz", "points", "coord", "pos")


def read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot be read as NPZ: {error}") from None
    for name in _POSITIONS:
        if name in arrays:
            positions = arrays.pop(name)
            if positions.ndim != 2 or positions.shape[1] not in (2, 3):
                raise ValueError(f"{name}: expected shape (n, 2) or (n, 3), got {brief(positions)}")
            if positions.dtype.kind not in "fiu":
                raise ValueError(f"{name}: expected numbers, got {brief(positions)}")
            arrays |= dict(zip(AXES, positions.T, strict=False))
            break
    if "x" not in arrays:
        raise ValueError(f"has no array {', '.join(_POSITIONS)} or x, only {brief([*arrays])}")
    rows = arrays["x"].shape[:1]
    return {
        name: values
        for name, values in arrays.items()
        if values.shape[:1] == rows and values.dtype.kind in "fiub"
    }


def write(path: Path, columns: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # a name would get another suffix
        np.savez_compressed(file, **columns)  # type: ignore[arg-type]
