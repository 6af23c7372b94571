"""Dictionaries of points as Pointcept's data sets and models have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointformer import TokenSet, sizes_from_batch, sizes_from_ptr
from pointformer._checks import brief, check_tensor, describe
from pointformer.integrations._sets import set_of

_KNOWN = {"coord", "feat", "offset", "batch", "origin"}


def from_pointcept(points: Mapping[str, Any]) -> TokenSet:
    """A token set of a dictionary with `coord` (T, 3), `feat` (T, C) and `offset` (B,), the row
    after each sample's last one, or `batch` (T,), the sample of each row.

    Everything else with a row per point (`segment`, `grid_coord`, `color`, ...) is a field. Without
    `offset` and `batch` (as before a data set's samples are put together) there is one sample,
    without `feat` there are no features. Arrays of NumPy are taken too, and lists for the named
    entries; coordinates in float64 and integers get an origin, beside `origin`, to which they are
    relative.

    Raises:
        TypeError, ValueError: there is no `coord`, or something does not fit.
    """
    if not isinstance(points, Mapping):
        raise TypeError(f"points: expected a dictionary, got {describe(points)}")
    entries = {}
    for name, value in points.items():
        if isinstance(value, np.ndarray) or (name in _KNOWN and isinstance(value, list | tuple)):
            value = np.asarray(value)  # from views and other byte orders to what torch takes
            value = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        if isinstance(value, Tensor) or getattr(value, "dtype", np.dtype("O")).kind in "biuf":
            entries[name] = torch.as_tensor(value)
    if "coord" not in entries:
        raise ValueError(f"points: expected an entry coord, got {brief([*points])}")
    coord = check_tensor("points['coord']", entries["coord"], ("T", "D"))
    sizes = None
    if "offset" in entries:
        offset = check_tensor("points['offset']", entries["offset"], ("B",))
        sizes = sizes_from_ptr([0, *offset.tolist()])
    elif "batch" in entries:
        sizes = sizes_from_batch(check_tensor("points['batch']", entries["batch"], (len(coord),)))
    rows = entries.get("feat")
    fields = {
        name: values
        for name, values in entries.items()
        if name not in _KNOWN and values.shape[:1] == coord.shape[:1]
    }
    return set_of("points['coord']", coord, rows, sizes, entries.get("origin"), fields)


def to_pointcept(tokens: TokenSet) -> dict[str, Tensor]:
    """`coord`, `feat`, `offset` and the fields; `origin` (B, D) where the set has one, to which
    `coord` is relative.

    Raises:
        ValueError: a field has the name of one of these.
    """
    if not isinstance(tokens, TokenSet):
        raise TypeError(f"tokens: expected a TokenSet, got {describe(tokens)}")
    taken = next((name for name in tokens.fields if name in _KNOWN), None)
    if taken is not None:
        raise ValueError(
            f"tokens: field {taken!r} is something else in Pointcept; give it another name"
        )
    points = {
        "coord": tokens.positions,
        "feat": tokens.features,
        "offset": tokens.batch_offsets[1:],
        **tokens.fields,
    }
    return points if tokens.origin is None else points | {"origin": tokens.origin}
