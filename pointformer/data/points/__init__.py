"""Point clouds in files: LAS and LAZ, PLY, NPZ, and text in columns (XYZ, PTS, CSV).

A format is a module with `read`, from a path to columns by name, `write`, the way back,
`objection`, what speaks against a name of a column in a file of a suffix, and `write_classes`, a
copy of a file with a class per point.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointformer._checks import brief, check_count, check_flags, check_tensor, describe
from pointformer._files import atomic_path
from pointformer.data.discovery import unread_format
from pointformer.data.points import las, npz, ply, text
from pointformer.data.points.columns import (
    columns_of,
    feature_of,
    field_of,
    lost_digits,
    positions_of,
    together,
)
from pointformer.tokens import TokenSet

__all__ = [
    "class_limit",
    "coordinate_unit",
    "iterate_points",
    "points_suffix",
    "read_points",
    "write_classes",
    "write_points",
]

_FORMATS = {
    las: (".las", ".laz"),
    ply: (".ply",),
    npz: (".npz",),
    text: (".xyz", ".txt", ".csv", ".pts", ".asc"),
}

_KINDS = {suffix: kind for kind, suffixes in _FORMATS.items() for suffix in suffixes}


def read_points(
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    origin: Tensor | None = None,
    features: Sequence[str] | None = None,
) -> TokenSet:
    """A point cloud as a token set of one sample: world coordinates, see `TokenSet.from_world`, and
    all else that the file says of its points as `fields` of the same names.

    The format is told by the content, not by the name:

    * LAS and LAZ: coordinates with the file's scale and offset, `classification` (codes as they
      are), `intensity`, `return_number`, `gps_time`, extra dimensions, ...;
    * PLY: the scalars of `vertex`; faces are not read;
    * NPZ: points in `positions`, `xyz`, `points`, `coord` or `pos`, or in `x`, `y` and `z`; of the
      other arrays those with a row per point, `features` as the features;
    * text: numbers in columns, with names in a first line, or x, y, z and `column_3`, ...; without
      z in 2-D.

    `red`, `green`, `blue` are one field `color` (T, 3), `nx`, `ny`, `nz` one `normal`. Rows are in
    the order of the file. Unsigned integers of 16 bits and more are int32 or int64. A warning says
    where coordinates of fewer than 64 bits do not tell neighbors apart, as float32 far from 0.

    Args:
        path: a file.
        fields: names of those to keep; `None` keeps all.
        origin: as for `TokenSet.from_world`; zeros leave the coordinates as they are, rounded.
        features: names of columns that become the features (T, C) float32, in this order, as
            models of points are trained with them: `intensity`, however it is spelled, which must
            not be negative, is divided by its 99th percentile in the file and at most 1, others
            are as they are. Groups are not joined here: `red`. Other spellings of a name are found
            too: `ReturnNumber` and `scalar_Return_Number`, as PDAL and CloudCompare write it, for
            `return_number`. `None`: the file's own.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is no such file, or damaged, has no such field, or a position or a feature
            is NaN, or an intensity negative; the message names it.
        ImportError: a package of the extra `points` is missing.
    """
    path = _checked_path(path)
    _check_names("fields", fields)
    _check_names("features", features)
    try:
        columns = _format_of(path).read(path)
        _warn_of_digits(path, columns)
        return _set_of(columns, fields, origin, features)
    except ValueError as error:
        raise ValueError(f"{path}: {_in_a_line(error)}") from None


def iterate_points(
    path: str | os.PathLike[str],
    size: int = 1_000_000,
    *,
    fields: Sequence[str] | None = None,
    origin: Tensor | None = None,
) -> Iterator[TokenSet]:
    """The parts of `size` points (the last one may be shorter) of a file, in its order, so that LAS
    and LAZ files larger than memory can be read; other formats are read whole first.

    Each part is as `read_points` gives it, with an origin of its own unless one is given. An empty
    file has one empty part. Errors are those of `read_points`, in part after parts that are whole.
    """
    path = _checked_path(path)
    _check_names("fields", fields)
    check_count("size", size)
    kind = _format_of(path)
    try:
        if kind is las:
            for part in las.iterate(path, size):
                yield _set_of(part, fields, origin)
            return
        columns = kind.read(path)
        _warn_of_digits(path, columns)
        count = len(next(iter(columns.values()), ()))
        for start in range(0, max(count, 1), size):
            part = {name: rows[start : start + size] for name, rows in columns.items()}
            yield _set_of(part, fields, origin)
    except ValueError as error:
        raise ValueError(f"{path}: {_in_a_line(error)}") from None


def _warn_of_digits(path: Path, columns: dict[str, np.ndarray]) -> None:
    lost = lost_digits(columns) if {"x", "y"} <= set(columns) else ""
    if lost:
        warnings.warn(f"{path}: {lost}", stacklevel=3)


def _check_names(argument: str, names: object) -> None:
    if names is not None and (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(name, str) for name in names)
    ):
        raise TypeError(f"{argument}: expected names, got {describe(names)}")


def _format_of(path: Path) -> Any:
    """The module of a file's format, told by its content."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"LASF":
        return las
    if start[:3] == b"ply":
        return ply
    if start == b"PK\x03\x04":
        return npz
    if unread := unread_format(path):
        raise ValueError(unread)
    kind = next((kind for kind, own in _FORMATS.items() if path.suffix.lower() in own), text)
    if start and kind is not text:
        raise ValueError(f"is named {path.suffix}, but does not begin like one")
    return text


def _set_of(
    columns: dict[str, np.ndarray],
    fields: Sequence[str] | None,
    origin: Tensor | None,
    features: Sequence[str] | None = None,
) -> TokenSet:
    rows = None
    if features is not None:
        chosen = [feature_of(name, columns) for name in features]
        count = len(next(iter(columns.values()), ()))
        rows = torch.from_numpy(np.stack(chosen, 1) if chosen else np.zeros((count, 0), np.float32))
    columns = together(columns)
    positions = torch.from_numpy(positions_of(columns))
    own = columns.pop("features", None)
    if fields is not None:
        for name in fields:
            if name not in columns:
                raise ValueError(
                    f"has no field {brief(name)} with a row for each of {len(positions)} points, "
                    f"only {', '.join(columns) or 'positions'}"
                )
        columns = {name: columns[name] for name in fields}
    named = {name: field_of(name, values) for name, values in columns.items()}
    if rows is None and own is not None:
        rows = field_of("features", own)
    return TokenSet.from_world(positions, rows, origin=origin, fields=named)


def write_points(
    path: str | os.PathLike[str], tokens: TokenSet, *, overwrite: bool = False
) -> None:
    """World coordinates and `fields` of one sample, in the format of the path's suffix: .las, .laz,
    .ply, .npz, or columns of text in .xyz, .txt, .csv, .pts or .asc. `read_points` is the way back.

    A LAS file gets fields that are dimensions of point formats 6 and 7 as these, others as extra
    dimensions; NPZ alone holds features. To change the classes of a file that is there, and nothing
    else, use `write_classes`.

    Raises:
        FileExistsError: there is such a file, and not `overwrite`.
        TypeError, ValueError: there are several samples, the suffix is another, or a field does not
            fit the format, or has a name by which it would be read as something else.
        ImportError: a package of the extra `points` is missing.
    """
    path = _checked_path(path)
    check_flags(overwrite=overwrite)
    if not isinstance(tokens, TokenSet):
        raise TypeError(f"tokens: expected a TokenSet, got {describe(tokens)}")
    if len(tokens) != 1:
        raise ValueError(f"tokens: expected one sample, got {len(tokens)}; write tokens.sample(b)")
    suffix = path.suffix.lower()
    kind: Any = _KINDS.get(suffix)
    if kind is None:
        raise ValueError(
            f"path: expected a name that ends in {', '.join(_KINDS)}, got {brief(str(path))}"
        )
    if tokens.dimensions != 3 and kind in (las, ply):
        raise ValueError(f"tokens: {path.suffix} files hold 3-D positions, got {tokens}")
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path}: is there already")
    try:
        columns = columns_of(tokens, kind is npz, lambda name: kind.objection(name, suffix))
        with atomic_path(path, replace=overwrite) as temporary:
            kind.write(temporary, columns)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {_in_a_line(error)}") from None


def write_classes(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    classes: Tensor,
    *,
    overwrite: bool = False,
) -> None:
    """A copy of a file of points with other classes, `classification` as the file spells it (see
    `read_points`), in the format of the source.

    * LAS and LAZ (where `path` ends in .laz): all else stays, header, coordinate system, other
      records and every other dimension of the points, bit for bit. A cloud-optimized LAZ becomes a
      plain one, since its index is not written.
    * PLY: all elements and comments stay, and whether it is text.
    * NPZ: all arrays stay, those that have no row per point too.
    * Text: all columns stay, coordinates with nine significant digits of the extent; names of the
      columns are in a first line, which starts with "#" unless `path` ends in .csv.

    Args:
        path: of the copy.
        source: the file.
        classes: (T,) integers from 0 to 255, or 31 in LAS point formats 0 to 5 (see `class_limit`),
            the code of each of its points, in its order.

    Raises:
        FileExistsError: there is such a file, and not `overwrite`; or it is the source.
        TypeError, ValueError: the source is no such file, or the classes do not fit its points.
        ImportError: a package of the extra `points` is missing.
    """
    check_flags(overwrite=overwrite)
    codes = check_tensor("classes", classes, ("T",))
    if codes.is_floating_point() or codes.is_complex():
        raise TypeError(f"classes: expected integers, got {codes.dtype}")
    codes = codes.detach().cpu().long()
    path, source = _checked_path(path), _checked_path(source)
    if os.path.lexists(path) and (not overwrite or os.path.samefile(path, source)):
        raise FileExistsError(f"{path}: is there already")
    try:
        kind = _format_of(source)
        most = class_limit(source)
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) <= most:
            raise ValueError(
                f"classes: expected codes from 0 to {most} in this file, got {int(codes.min())} to "
                f"{int(codes.max())}"
            )
        with atomic_path(path, replace=overwrite) as temporary:
            kind.write_classes(temporary, source, codes.numpy().astype(np.uint8))
    except ValueError as error:
        raise ValueError(f"{source}: {_in_a_line(error)}") from None


def class_limit(path: str | os.PathLike[str]) -> int:
    """The largest code of a class that a file of points can hold: 255, or 31 in LAS point formats 0
    to 5.

    Raises:
        OSError, ValueError: the file cannot be read.
        ImportError: a package of the extra `points` is missing.
    """
    path = _checked_path(path)
    return las.class_limit(path) if _format_of(path) is las else 255


def coordinate_unit(path: str | os.PathLike[str]) -> str:
    """The unit of the coordinates on the ground: "degrees" or "feet" where the file, of LAS, says
    so; "" for meters, and where it says nothing.

    Raises:
        OSError, ValueError: the file cannot be read.
        ImportError: a package of the extra `points` is missing.
    """
    path = _checked_path(path)
    return las.coordinate_unit(path) if _format_of(path) is las else ""


def points_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of other files in the format of this one: its own, in lower case, if that is one
    of its format's, which its content tells; else the format's first."""
    path = _checked_path(path)
    suffixes = _FORMATS[_format_of(path)]
    own = path.suffix.lower()
    return own if own in suffixes else suffixes[0]


def _checked_path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected one of a file, got {describe(path)}")
    return Path(path)


def _in_a_line(error: Exception) -> str:
    """In one line, without thousands of numbers."""
    words = " ".join(str(error).split())
    return words if len(words) <= 240 else f"{words[:237]}..."
