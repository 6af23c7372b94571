"""Clouds larger than memory in spatial tiles, which dask works on: in threads, processes, or on the
machines of a cluster."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointformer._checks import brief, check_number, check_tensor, describe
from pointformer._files import atomic_path
from pointformer.data.points import iterate_points
from pointformer.tokens import TokenSet

_LARGEST_CELL = 2.0**52

_Columns = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of a row
_Result = Tensor | tuple[Tensor, Tensor]


def map_tiles(
    function: Callable[[TokenSet], _Result],
    source: TokenSet | str | os.PathLike[str] | Iterable[TokenSet],
    tile_size: float | list[float] | tuple[float, ...],
    halo: float,
    *,
    out: str | os.PathLike[str] | None = None,
    origin: Tensor | None = None,
    scratch: str | os.PathLike[str] | None = None,
) -> Tensor:
    """`function` of a cloud, tile by tile: what it says of each point, in the order of the source.

    The cloud is read once, in parts, and its tiles are kept as files until the end. Each is a box
    of `tile_size` and what is at most `halo` outside of it; of the results those of the box are
    kept. What a result depends on has to be within `halo`: then it is that of the whole cloud, to
    the bit if `origin` is also the same. dask runs the tiles: in threads, or where a
    `dask.distributed.Client` was made on its workers, which need to see the folder `scratch`.

    Args:
        function: takes a set of one sample, a tile with its halo, which is never empty unless the
            cloud is. Rows are in the order of the source; its fields are those of the source and
            `row` (T,) int64, the row in the source, and `inner` (T,) bool, whether it is of the
            box. Gives (T, ...), in one shape and dtype but for T, or a pair of that and `reach`
            (T,), how far away from each point it had to look, such as its k-th neighbor's
            distance: more than `halo` is an error.
        source: a set of one sample; a LAS or LAZ file, which is read in parts, or another that
            `read_points` takes, whole; or parts of one cloud, as from `iterate_points`.
        tile_size: of the boxes, in the units of the positions, along all axes or along each.
        halo: how far results depend on others, at most `tile_size`.
        out: a new .npy file for the result, which is then mapped into memory where it is used.
            `None`: the result is in memory.
        origin: (D,) or (1, D) float64, to which the positions of all tiles are relative. `None`:
            that of the set, or for files and parts each tile's own lower corner, which keeps the
            digits of clouds of any size.
        scratch: an existing folder for the files of tiles. `None`: beside `out`, or else the
            system's for temporary files.

    Returns:
        (T, ...) on the host; bfloat16 becomes float32.

    Raises:
        FileExistsError: `out` is there already.
        TypeError, ValueError: an argument or result does not fit, positions are NaN or infinite,
            or `halo` is smaller than what `function` says it needs.
        ImportError: dask, of the extra `big`, is missing.
    """
    try:
        import dask
    except ImportError:
        raise ImportError("tiles need dask: pip install 'pointformer[big]'") from None
    if not callable(function):
        raise TypeError(f"function: expected one of a TokenSet, got {describe(function)}")
    check_number("halo", halo, least=0)
    for name, path in (("out", out), ("scratch", scratch)):
        if path is not None and not isinstance(path, str | os.PathLike):
            raise TypeError(f"{name}: expected a path, got {describe(path)}")
    sides = [*tile_size] if isinstance(tile_size, list | tuple) else [tile_size]
    for side in sides:
        check_number("tile_size", side, above=0)
    if halo > min(sides, default=halo):
        raise ValueError(f"tile_size: expected at least the halo, {halo:g}, got {brief(tile_size)}")
    if origin is None and isinstance(source, TokenSet):
        origin = source.origin
        if origin is None:
            origin = torch.zeros(source.dimensions, dtype=torch.float64)
    if out is not None:
        if os.path.lexists(out):
            raise FileExistsError(f"{out}: is there already")
        if scratch is None:
            scratch = Path(out).absolute().parent
    with tempfile.TemporaryDirectory(prefix="tiles-", dir=scratch) as folder:
        cloud = _Tiles(Path(folder), sides, float(halo), origin)
        for part in _parts(source):
            cloud.add(part)
        if cloud.empty is None:
            raise ValueError("source: expected at least one part, got none")
        if cloud.count == 0:
            return _kept(_checked(function(cloud.empty), 0)[0], out)
        shared = dask.delayed(function, traverse=False, pure=False)
        run = dask.delayed(_run, pure=False)
        tasks = [
            run(shared, path, cloud.columns, cloud.count, float(halo), origin)
            for path in cloud.paths.values()
        ]
        return _stitched(dask.compute(*tasks), [*cloud.paths.values()], cloud.count, out)


class _Tiles:
    """The tiles of a cloud, as files of records."""

    def __init__(
        self, folder: Path, sides: Sequence[float], halo: float, origin: Tensor | None
    ) -> None:
        self.folder, self.sides, self.halo, self.origin = folder, sides, halo, origin
        self.count = 0
        self.empty: TokenSet | None = None  # a set of no points, with all the fields
        self.columns: _Columns = {}
        self.paths: dict[tuple[int, ...], Path] = {}

    def add(self, part: TokenSet) -> None:
        world = part.world_positions().detach().cpu()
        rows = {"row": torch.arange(self.count, self.count + len(world)), "world": world}
        rows |= {"features": part.features.detach().cpu()}
        rows |= {f"field {name}": values.detach().cpu() for name, values in part.fields.items()}
        columns = {name: (value.dtype, (*value.shape[1:],)) for name, value in rows.items()}
        if self.empty is None:
            for name in ("row", "inner"):
                if name in part.fields:
                    raise ValueError(f"source: has a field {name}, which is a name of tiles' own")
            self.columns = columns
            none = {name: value[:0] for name, value in rows.items()}
            self.empty = _set_of(none | {"inner": none["row"].bool()}, self.origin)
        elif columns != self.columns:
            raise ValueError(
                f"source: expected parts alike, but from point {self.count} on there are "
                f"{brief(sorted(columns))} in other dtypes, shapes or names than before"
            )
        self.count += len(world)
        if len(world) == 0:
            return
        records = _records(rows)
        for cell, chosen, inner in self._cells(world.numpy()):
            path = self.paths.setdefault(cell, self.folder / f"{len(self.paths)}.tile")
            tile = records[chosen]
            tile["inner"] = inner
            with path.open("ab") as file:
                tile.tofile(file)

    def _cells(self, world: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray, bool]]:
        """(Tile, ascending points of `world`, whether they are in its box or in its halo)."""
        dimensions = world.shape[1]
        if len(self.sides) not in (1, dimensions):
            raise ValueError(
                f"tile_size: expected 1 or {dimensions} numbers, got {len(self.sides)}"
            )
        sides = np.broadcast_to(np.array(self.sides, dtype=np.float64), (dimensions,))
        # Distances are compared in float32, of positions that may have been rounded to it: what
        # counts as just within the halo may be farther away by so much.
        local = sides + self.halo if self.origin is None else np.abs(world - self.origin.numpy())
        reach = self.halo * (1 + 2**-20) + np.minimum(local * 2**-22, sides)
        own, low, high = (np.floor((world + shift) / sides) for shift in (0.0, -reach, reach))
        if not np.abs(own).max() < _LARGEST_CELL:
            raise ValueError(
                f"tile_size: expected tiles that can be counted, got {brief(self.sides)} for "
                f"positions up to {np.abs(world).max():g}"
            )
        spans = [
            range(int((low - own)[:, axis].min()), int((high - own)[:, axis].max()) + 1)
            for axis in range(dimensions)
        ]
        for shift in itertools.product(*spans):
            cells = own + np.array(shift)
            chosen = np.flatnonzero(((cells >= low) & (cells <= high)).all(1))
            cells = cells[chosen].astype(np.int64)
            order = np.lexsort(cells.T)  # stable
            cells = cells[order]
            starts = np.flatnonzero((cells[1:] != cells[:-1]).any(1)) + 1
            for group in np.split(np.arange(len(cells)), starts):
                if len(group):
                    cell = tuple(int(number) for number in cells[group[0]])
                    yield cell, chosen[order[group]], not any(shift)


def _parts(source: object) -> Iterable[TokenSet]:
    if isinstance(source, TokenSet):
        source = [source]
    elif isinstance(source, str | os.PathLike):
        source = iterate_points(source)
    elif isinstance(source, Tensor) or not isinstance(source, Iterable):
        raise TypeError(f"source: expected a TokenSet, a file or parts, got {describe(source)}")
    for part in source:
        if not isinstance(part, TokenSet):
            raise TypeError(f"source: expected parts that are TokenSets, got {describe(part)}")
        if len(part) != 1:
            raise ValueError(f"source: expected one sample, got {part}")
        if not bool(part.positions.isfinite().all()):
            raise ValueError("source: has a NaN or infinite position")
        yield part


def _record(columns: _Columns) -> np.dtype:
    """All of a point as bytes, whatever the dtypes."""
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in columns.items()}
    kinds = [(name, "u1", (size,)) for name, size in sizes.items() if size]
    return np.dtype([("inner", "?"), *kinds])


def _records(rows: dict[str, Tensor]) -> np.ndarray:
    kind = _record({name: (value.dtype, (*value.shape[1:],)) for name, value in rows.items()})
    records = np.zeros(len(rows["row"]), kind)
    for name in kind.names[1:]:  # type: ignore[index]
        flat = rows[name].contiguous().view(len(records), -1)
        records[name] = flat.view(torch.uint8).numpy()
    return records


def _read(path: Path, columns: _Columns) -> dict[str, Tensor]:
    records = np.fromfile(path, _record(columns))
    # Parts come one after the other, but of a part first some and then other neighbors.
    row = records["row"].copy().view(np.int64)[:, 0]
    records = records[np.argsort(row, kind="stable")]
    rows = {"inner": torch.from_numpy(records["inner"].copy())}
    for name, (dtype, shape) in columns.items():
        if math.prod(shape) == 0:
            rows[name] = torch.empty(len(records), *shape, dtype=dtype)
            continue
        flat = torch.from_numpy(records[name].copy())
        rows[name] = flat.view(dtype).view(len(records), *shape)
    return rows


def _set_of(rows: dict[str, Tensor], origin: Tensor | None) -> TokenSet:
    fields = {
        name.removeprefix("field "): values
        for name, values in rows.items()
        if name not in ("world", "features")
    }
    return TokenSet.from_world(rows["world"], rows["features"], origin=origin, fields=fields)


def _run(
    function: Callable[[TokenSet], _Result],
    path: Path,
    columns: _Columns,
    count: int,
    halo: float,
    origin: Tensor | None,
) -> tuple[tuple[int, ...], str]:
    """Write the results of the box, and the rows they are of; the shape of one, and the dtype."""
    rows = _read(path, columns)
    inner = rows["inner"]
    if not bool(inner.any()):  # nothing but halo
        return (), ""
    tile = _set_of(rows, origin)
    result, reach = _checked(function(tile), len(inner))
    if reach is not None and len(inner) < count:
        farthest = float(reach[inner].max())
        if not farthest <= halo:
            wanted = f"at least {farthest:g}" if math.isfinite(farthest) else "more"
            raise ValueError(f"halo: expected {wanted}, as far as the function looks, got {halo:g}")
    kept = result[inner].numpy()
    np.save(path.with_suffix(".rows.npy"), rows["row"][inner].numpy())
    np.save(path.with_suffix(".npy"), kept)
    return kept.shape[1:], str(kept.dtype)


def _checked(result: object, count: int) -> tuple[Tensor, Tensor | None]:
    reach = None
    if isinstance(result, tuple):
        if len(result) != 2:
            raise ValueError(f"function: expected a result and reach, got {len(result)} values")
        result, reach = result
        reach = check_tensor("function's reach", reach, (count,)).detach().cpu()
    if not isinstance(result, Tensor) or result.shape[:1] != (count,):
        raise ValueError(f"function: expected a tensor of {count} rows, got {describe(result)}")
    result = result.detach().cpu()
    return result.float() if result.dtype == torch.bfloat16 else result, reach


def _kept(result: Tensor, out: str | os.PathLike[str] | None) -> Tensor:
    if out is not None:
        # A path without a suffix would get one from NumPy.
        with atomic_path(out, replace=False) as temporary, temporary.open("wb") as file:
            np.save(file, result.detach().cpu().numpy())
    return result


def _stitched(
    kinds: Sequence[tuple[tuple[int, ...], str]],
    paths: Sequence[Path],
    count: int,
    out: str | os.PathLike[str] | None,
) -> Tensor:
    filled = [(kind, path) for kind, path in zip(kinds, paths, strict=True) if kind[1]]
    (shape, dtype), _ = filled[0]
    for kind, _ in filled:
        if kind != (shape, dtype):
            raise ValueError(
                f"function: expected rows of one shape and dtype, got {kind[0]} {kind[1]} of one "
                f"tile and {shape} {dtype} of another"
            )

    def fill(values: Any) -> None:
        for _, path in filled:
            rows = np.load(path.with_suffix(".rows.npy"))
            values[rows] = np.load(path.with_suffix(".npy"))

    if out is None:
        values = np.empty((count, *shape), dtype)
        fill(values)
        return torch.from_numpy(values)
    with atomic_path(out, replace=False) as temporary:
        mapped = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=np.dtype(dtype), shape=(count, *shape)
        )
        fill(mapped)
        mapped.flush()
        del mapped
    return torch.from_numpy(np.load(out, mmap_mode="r+"))
