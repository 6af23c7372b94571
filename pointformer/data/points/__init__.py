"""Point clouds in files: LAS and LAZ, PLY, NPZ, and text in columns (XYZ, PTS, CSV).

A format is a module with `read`, from a path to columns by name, and `write`, the way back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pointformer._checks import brief, check_count, check_flags, describe
from pointformer._files import atomic_path
from pointformer.data.points import las, npz, ply, text
from pointformer.data.points.columns import columns_of, field_of, positions_of, together
from pointformer.data.points.las import write_classes
from pointformer.tokens import TokenSet

__all__ = ["iterate_points", "read_points", "write_classes", "write_points"]

_WRITERS = {
    ".las": las.write,
    ".laz": las.write,
    ".ply": ply.write,
    ".npz": npz.write,
    ".xyz": text.write,
    ".txt": text.write,
    ".csv": text.write,
}


def read_points(
    path: str | os.PathLike[str],
    *,
    fields: Sequence[str] | None = None,
    origin: Tensor | None = None,
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
    the order of the file. Unsigned integers of 16 bits and more are int32 or int64.

    Args:
        path: a file.
        fields: names of those to keep; `None` keeps all.
        origin: as for `TokenSet.from_world`; zeros leave the coordinates as they are, rounded.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: it is no such file, or damaged, or a position is NaN; the message names it.
        ImportError: a package of the extra `points` is missing.
    """
    path = _checked_path(path)
    _check_names(fields)
    try:
        return _set_of(_reader_of(path)(path), fields, origin)
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
    _check_names(fields)
    check_count("size", size)
    reader = _reader_of(path)
    try:
        if reader is las.read:
            for columns in las.iterate(path, size):
                yield _set_of(columns, fields, origin)
            return
        whole = _set_of(reader(path), fields, origin)
        for rows in torch.arange(whole.num_tokens).split(size):
            yield whole.select(rows, (len(rows),))
    except ValueError as error:
        raise ValueError(f"{path}: {_in_a_line(error)}") from None


def _check_names(fields: object) -> None:
    if fields is not None and (
        isinstance(fields, str)
        or not isinstance(fields, Sequence)
        or not all(isinstance(name, str) for name in fields)
    ):
        raise TypeError(f"fields: expected names, got {describe(fields)}")


def _reader_of(path: Path) -> Callable[[Path], dict[str, np.ndarray]]:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"LASF":
        return las.read
    if start[:3] == b"ply":
        return ply.read
    if start == b"PK\x03\x04":
        return npz.read
    return text.read


def _set_of(
    columns: dict[str, np.ndarray], fields: Sequence[str] | None, origin: Tensor | None
) -> TokenSet:
    columns = together(columns)
    positions = torch.from_numpy(positions_of(columns))
    features = columns.pop("features", None)
    named = {name: field_of(name, values) for name, values in columns.items()}
    if fields is not None:
        for name in fields:
            if name not in named:
                raise ValueError(f"has no field {brief(name)}, only {', '.join(named)}")
        named = {name: named[name] for name in fields}
    rows = None if features is None else field_of("features", features)
    return TokenSet.from_world(positions, rows, origin=origin, fields=named)


def write_points(
    path: str | os.PathLike[str], tokens: TokenSet, *, overwrite: bool = False
) -> None:
    """World coordinates and `fields` of one sample, in the format of the path's suffix: .las, .laz,
    .ply, .npz, .xyz, .txt or .csv. `read_points` is the way back.

    A LAS file gets fields that are dimensions of point formats 6 and 7 as these, others as extra
    dimensions; NPZ alone holds features. To change the classes of a LAS file that is there, and
    nothing else, use `write_classes`.

    Raises:
        FileExistsError: there is such a file, and not `overwrite`.
        TypeError, ValueError: there are several samples, the suffix is another, or a field does not
            fit the format.
        ImportError: a package of the extra `points` is missing.
    """
    path = _checked_path(path)
    check_flags(overwrite=overwrite)
    if not isinstance(tokens, TokenSet):
        raise TypeError(f"tokens: expected a TokenSet, got {describe(tokens)}")
    if len(tokens) != 1:
        raise ValueError(f"tokens: expected one sample, got {len(tokens)}; write tokens.sample(b)")
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ValueError(
            f"path: expected a name that ends in {', '.join(_WRITERS)}, got {brief(str(path))}"
        )
    if tokens.dimensions != 3 and writer in (las.write, ply.write):
        raise ValueError(f"tokens: {path.suffix} files hold 3-D positions, got {tokens}")
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path}: is there already")
    try:
        columns = columns_of(tokens, whole=writer is npz.write)
        with atomic_path(path, replace=overwrite) as temporary:
            writer(temporary, columns)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {_in_a_line(error)}") from None


def _checked_path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected one of a file, got {describe(path)}")
    return Path(path)


def _in_a_line(error: Exception) -> str:
    """In one line, without thousands of numbers."""
    words = " ".join(str(error).split())
    return words if len(words) <= 240 else f"{words[:237]}..."
