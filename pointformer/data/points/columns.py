"""Columns by name, as files of points have them, and what token sets make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pointformer._checks import brief
from pointformer.tokens import TokenSet

AXES = ("x", "y", "z")
# Columns that belong together, by the name of the field that they are.
_GROUPS = {"color": ("red", "green", "blue"), "normal": ("nx", "ny", "nz")}
_AS_SIGNED = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64, "float128": np.float64}


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


def field_of(name: str, values: np.ndarray) -> Tensor:
    """A tensor of a dtype with all of torch's functions, in a memory of its own."""
    values = np.asarray(values)
    dtype = _AS_SIGNED.get(values.dtype.name, values.dtype.newbyteorder("="))
    if values.dtype.name == "uint64" and values.size and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"field {name} has integers that int64 does not hold")
    return torch.from_numpy(np.array(values, dtype))


def feature_of(name: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """(n,) float32 of a column as models of points see it: see `read_points`."""
    if name not in columns:
        have = ", ".join(other for other in columns if other not in AXES)
        raise ValueError(
            f"has no {brief(name)}, which the model wants of each point, only {have or 'x, y, z'}"
        )
    values = np.asarray(columns[name])
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected a number for each point, got {brief(values)}")
    values = values.astype(np.float32)
    bad = len(values) - np.count_nonzero(np.isfinite(values))
    if bad:
        raise ValueError(f"{name}: is NaN or infinite at {bad} of {len(values)} points")
    if name == "intensity" and len(values):
        values = np.minimum(values / max(float(np.percentile(values, 99)), 1e-6), 1)
    return values


def columns_of(tokens: TokenSet, whole: bool) -> dict[str, np.ndarray]:
    """World coordinates and fields; `whole` fields, and features, or columns of numbers."""
    tokens = tokens.input_order()
    world = tokens.world_positions().cpu().numpy()
    fields = {name: _array(rows) for name, rows in tokens.fields.items()}
    if whole:
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
    """A power of ten that float32 does not resolve at the extent of these coordinates (n, D)."""
    side = float(np.ptp(world, axis=0).max()) if len(world) else 0.0
    return 10.0 ** (np.floor(np.log10(side)) - 8) if side > 0 else 1e-3
