"""Columns by name, as files of points have them, and what token sets make of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from pointformer._checks import brief
from pointformer.tokens import TokenSet

AXES = ("x", "y", "z")
# Columns that belong together, by the name of the field that they are.
_GROUPS = {"color": ("red", "green", "blue"), "normal": ("nx", "ny", "nz")}
_AS_SIGNED = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64, "float128": np.float64}


def column_named(name: str, names: Iterable[str]) -> str | None:
    """Which of the names means this one; `None` if none does, or several.

    What LAS files call return_number is ReturnNumber in files that PDAL wrote, and
    scalar_Return_Number in CloudCompare's."""
    names = [*names]
    if name in names:
        return name
    same = [other for other in names if _plain(other) == _plain(name)]
    return same[0] if len(same) == 1 else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower().removeprefix("scalar_"))


def with_axes(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns, "X", "Y" and "Z" under the names of the axes unless there are such."""
    named = {axis.upper(): axis for axis in AXES if axis not in columns}
    return {named.get(name, name): values for name, values in columns.items()}


def together(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns, those of a group as one of several numbers per row."""
    for name, parts in _GROUPS.items():
        if name not in columns and all(part in columns for part in parts):
            columns = columns | {name: np.stack([columns[part] for part in parts], 1)}
            columns = {part: rows for part, rows in columns.items() if part not in parts}
    return columns


def positions_of(columns: dict[str, np.ndarray]) -> np.ndarray:
    """(n, D) float64 of the columns x, y[, z], which are taken out."""
    found = [axis for axis in AXES if axis in columns]
    if found not in (["x", "y"], ["x", "y", "z"]):
        have = f"only {', '.join(list(columns)[:12])}" if columns else "no columns"
        raise ValueError(f"has no coordinates x, y and z, {have}")
    return np.stack([columns.pop(axis).astype(np.float64) for axis in found], 1)


def lost_digits(columns: Mapping[str, np.ndarray]) -> str:
    """What is wrong with coordinates whose dtype does not resolve where the points are, in words;
    nothing if it does."""
    for axis in AXES:
        values = np.asarray(columns.get(axis, 0.0))
        if values.dtype.kind != "f" or values.dtype.itemsize >= 8 or values.size < 2:
            continue
        largest = np.abs(values).max()
        if not np.isfinite(largest):
            continue
        step = float(np.spacing(largest))
        apart = spacing_of(columns)
        if apart and step > apart / 8:
            return (
                f"its {axis} is {values.dtype.name} of up to {float(largest):.7g}, in steps of "
                f"{step:g}, and points are about {apart:.2g} apart: digits are lost; "
                "write coordinates as float64, or subtract an offset before"
            )
    return ""


def spacing_of(columns: Mapping[str, np.ndarray]) -> float:
    """How far points are apart along the ground on average, 0 if they are not spread along x and
    y. Of the middle half along each axis, so that strays do not count."""
    sides = []
    for axis in AXES[:2]:
        values = np.asarray(columns[axis], np.float64)
        low, high = np.percentile(values, (25, 75)) if len(values) else (0.0, 0.0)
        sides.append(2 * float(high - low))
    return math.sqrt(sides[0] * sides[1] / max(len(values), 1))


def field_of(name: str, values: np.ndarray) -> Tensor:
    """A tensor of a dtype with all of torch's functions, in a memory of its own."""
    values = np.asarray(values)
    dtype = _AS_SIGNED.get(values.dtype.name, values.dtype.newbyteorder("="))
    if values.dtype.name == "uint64" and values.size and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"field {name} has integers that int64 does not hold")
    return torch.from_numpy(np.array(values, dtype))


def feature_of(name: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """(n,) float32 of a column as models of points see it: see `read_points`."""
    column = column_named(name, columns)
    if column is None:
        have = ", ".join(other for other in columns if other not in AXES)
        raise ValueError(
            f"has no {brief(name)} with a number for each point, which the model wants, only "
            f"{have or 'x, y, z'}; "
            "if it has another name, name all in the order of the training (--features of "
            "`segment`, data.features of `train`)"
        )
    values = np.asarray(columns[column])
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected a number for each point, got {brief(values)}")
    values = values.astype(np.float32)
    bad = len(values) - np.count_nonzero(np.isfinite(values))
    if bad:
        raise ValueError(f"{name}: is NaN or infinite at {bad} of {len(values)} points")
    if _plain(name) == "intensity" and len(values):
        below = np.count_nonzero(values < 0)
        if below:
            raise ValueError(
                f"{column}: is negative at {below} of {len(values)} points, down to "
                f"{values.min():.4g}, but is to be relative to its 99th percentile; write it on a "
                "linear scale from 0 on (decibels as 10 ** (dB / 10))"
            )
        values = np.minimum(values / max(float(np.percentile(values, 99)), 1e-6), 1)
    return values


def check_names(names: Iterable[str], objection: Callable[[str], str]) -> None:
    """Raise `ValueError` where a column would not be read by its name.

    Args:
        objection: of the file's format: what speaks against a name, "" if nothing does.
    """
    for name in names:
        against = objection(name)
        if against:
            raise ValueError(f"field {brief(name)}: {against}; give it another name")


def columns_of(
    tokens: TokenSet, whole: bool, objection: Callable[[str], str]
) -> dict[str, np.ndarray]:
    """World coordinates and fields; `whole` fields, and features, or columns of numbers.

    Raises:
        ValueError: naming the field, if it would not be read as what it is.
    """

    def against(name: str) -> str:
        taken = not name or name in (*AXES, "features") or "\0" in name  # in all formats
        return "it would be read as something else" if taken else objection(name)

    tokens = tokens.input_order()
    world = tokens.world_positions().cpu().numpy()
    fields = {name: _array(rows) for name, rows in tokens.fields.items()}
    for name, rows in fields.items():
        if rows.dtype.kind == "c":
            raise ValueError(f"field {name}: expected real numbers, got {rows.dtype}")
    if whole:
        check_names(fields, against)
        features = {"features": _array(tokens.features)} if tokens.channels else {}
        return {"positions": world, **features, **fields}
    columns = dict(zip(AXES, world.T, strict=False))
    for name, rows in fields.items():
        width = math.prod(rows.shape[1:])
        parts: tuple[str, ...] = (name,)
        if rows.ndim > 1:
            parts = _GROUPS.get(name, ())
            if len(parts) != width:
                parts = tuple(f"{name}_{i}" for i in range(width))
        check_names(parts, against)
        for part, column in zip(parts, rows.reshape(len(rows), width).T, strict=True):
            if part in columns:
                raise ValueError(f"fields: there are two columns {part}")
            columns[part] = column
    return columns


def _array(rows: Tensor) -> np.ndarray:
    rows = rows.detach().cpu()
    return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()


def as_table(columns: dict[str, np.ndarray]) -> np.ndarray:
    """A structured array (n,) of the columns."""
    table = np.empty(len(columns["x"]), [(name, rows.dtype) for name, rows in columns.items()])
    for name, rows in columns.items():
        table[name] = rows
    return table


def resolution_of(world: np.ndarray) -> float:
    """A power of ten that float32 does not resolve at the extent of these coordinates (n, D), or
    at a single place."""
    if not len(world):
        return 1e-3
    side = float(np.ptp(world, axis=0).max())
    if side == 0:
        side = min(float(np.abs(world).max()), 1e5)
    return 10.0 ** (np.floor(np.log10(side)) - 8) if side > 0 else 1e-3
