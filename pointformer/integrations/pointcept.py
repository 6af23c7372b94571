"""Dictionaries of points as Pointcept's data sets and models have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointformer import TokenSet, sizes_from_ptr
from pointformer._checks import brief, check_tensor, describe

_KNOWN = {"coord", "feat", "offset", "batch", "origin"}


def from_pointcept(points: Mapping[str, Any]) -> TokenSet:
    """A token set of a dictionary with `coord` (T, 3), `feat` (T, C) and `offset` (B,), the row
    after each sample's last one.

    Everything else with a row per point (`segment`, `grid_coord`, `color`, ...) is a field. Without
    `offset` (as before a data set's samples are put together) there is one sample, without `feat`
    there are no features. Arrays of NumPy are taken too; coordinates in float64 get an origin.

    Raises:
        TypeError, ValueError: there is no `coord`, or something does not fit.
    """
    if not isinstance(points, Mapping):
        raise TypeError(f"points: expected a dictionary, got {describe(points)}")
    entries = {
        name: torch.as_tensor(value)
        for name, value in points.items()
        if isinstance(value, Tensor | np.ndarray) and getattr(value.dtype, "kind", "f") in "biuf"
    }
    if "coord" not in entries:
        raise ValueError(f"points: expected an entry coord, got {brief([*points])}")
    coord = check_tensor("points['coord']", entries["coord"], ("T", "D"))
    sizes = None
    if "offset" in entries:
        offset = check_tensor("points['offset']", entries["offset"], ("B",))
        sizes = sizes_from_ptr([0, *offset.tolist()])
    rows = entries.get("feat")
    fields = {
        name: values
        for name, values in entries.items()
        if name not in _KNOWN and values.shape[:1] == coord.shape[:1]
    }
    origin = entries.get("origin")
    if coord.dtype == torch.float64:
        return TokenSet.from_world(coord, rows, sizes, fields=fields)
    return TokenSet(coord.float(), rows, sizes, origin=origin, fields=fields)


def to_pointcept(tokens: TokenSet) -> dict[str, Tensor]:
    """`coord`, `feat`, `offset` and the fields; `origin` (B, D) where the set has one, to which
    `coord` is relative.
    """
    if not isinstance(tokens, TokenSet):
        raise TypeError(f"tokens: expected a TokenSet, got {describe(tokens)}")
    points = {
        "coord": tokens.positions,
        "feat": tokens.features,
        "offset": tokens.batch_offsets[1:],
        **tokens.fields,
    }
    return points if tokens.origin is None else points | {"origin": tokens.origin}
