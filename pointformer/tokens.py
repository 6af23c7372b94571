"""`TokenSet`: a packed batch of tokens with positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.collate import collate as collate_by_type
from torch.utils.data._utils.collate import default_collate_fn_map

from pointformer._checks import (
    INTEGERS,
    brief,
    can_read,
    check_batch,
    check_count,
    check_device,
    check_finite,
    check_flags,
    check_number,
    check_per_sample,
    check_positions,
    check_rows,
    check_same_positions,
    check_sizes,
    check_tensor,
    describe,
)
from pointformer.clusters import (
    Clusters,
    Neighborhoods,
    PerSample,
    check_order,
    offsets_of,
    sample_of_rows,
)
from pointformer.geometry.boxes import bounding_boxes
from pointformer.geometry.clustering import balanced_cluster
from pointformer.geometry.neighbors import nearest_clusters
from pointformer.graph import batch_from_sizes
from pointformer.kernels.tables import from_host
from pointformer.ops.interpolate import interpolate

Extent = tuple[tuple[float, ...], ...]


def _cells(samples: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Cell indices (x, y[, z]) of `samples` grids of shape ([Z,] H, W), x fastest: float32."""
    cells = torch.empty(samples, *shape, len(shape), device=device, dtype=torch.float32)
    for axis, side in enumerate(reversed(shape)):
        index = torch.arange(side, dtype=torch.float32, device=device)
        cells[..., axis] = index.view(-1, *[1] * axis)
    return cells.view(-1, len(shape))


def _lower_corners(positions: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(B, D): per sample and axis the least of the positions (T, D) that are not far from most."""
    sample = batch_from_sizes(sizes, positions.device)
    starts = offsets_of(sizes, positions.device)
    last = (starts.diff() - 1).clamp(min=0)
    corners = positions.new_zeros(len(sizes), positions.shape[1])
    if len(positions) == 0:
        return corners
    for axis, values in enumerate(positions.unbind(1)):
        order = torch.sort(values, stable=True).indices
        values = values[order[torch.sort(sample[order], stable=True).indices]]
        first, third = (
            values[(starts[:-1] + last * quarter // 4).clamp(max=len(values) - 1)]
            for quarter in (1, 3)
        )
        fence = first - 16 * (third - first)
        near = values.where(values >= fence[sample], torch.inf)
        corners[:, axis] = bounding_boxes(near[:, None], sizes)[0][:, 0]
    return corners


@dataclass(frozen=True, eq=False, repr=False, init=False)
class TokenSet:
    """Tokens of a batch of samples, packed: one flat list, never padded. Immutable.

    `len(tokens)` is the number of samples, and a loop over the set gives sets of one sample each.

    Attributes:
        positions: (T, D) float32, D = 2 or 3, axes in the order x, y[, z].
        features: (T, C), any float dtype; (T, 0) where none are given.
        sizes: tokens per sample, B host integers (in compiled code a host tensor, unless samples
            are alike by promise). In their place `batch` can be given, the sample of each token,
            see `sizes_from_batch`.
        extent: per sample the D sides of the canvas, in the units of `positions` (host numbers), or
            `None` where no canvas is known. A feature map of h x w has the extent (w, h).
        origin: (B, D) float64 on the host, what to add to `positions` for world coordinates, or
            `None` for zero.
        clusters: set by `cluster`; rows are then in cluster order. Permuting or selecting rows
            clears it.
        same_positions: promises that all samples have the same positions, in the same order, and
            one extent: what depends on positions alone is then found once. `from_grid` knows it of
            maps of one size; `with_features`, `cluster`, `input_order` and `to` keep it.
        fields: by name, tensors (T, ...) of any dtype that stay with their tokens wherever these
            go, such as labels and intensities.

    Raises:
        TypeError, ValueError: a shape, dtype, device or size does not fit; the message names it.
    """

    positions: Tensor
    features: Tensor
    sizes: tuple[int, ...]
    extent: Extent | None
    origin: Tensor | None
    clusters: Clusters | None
    same_positions: bool
    fields: dict[str, Tensor]

    def __init__(
        self,
        positions: Tensor,
        features: Tensor | None = None,
        sizes: Sequence[int] | None = None,
        extent: Sequence | Tensor | None = None,
        origin: Tensor | None = None,
        clusters: Clusters | None = None,
        same_positions: bool = False,
        fields: Mapping[str, Tensor] | None = None,
        *,
        batch: Tensor | None = None,
    ) -> None:
        check_positions("positions", positions)
        count, dimensions = positions.shape
        if features is None:
            features = positions.new_empty(count, 0)
        features = _checked_features(features, positions)
        sizes = check_sizes("sizes", sizes, count, batch)
        if extent is not None:
            extent = check_per_sample("extent", extent, len(sizes), dimensions, least=0)
        if origin is not None:
            check_tensor("origin", origin, (len(sizes), dimensions), (torch.float64,))
            if can_read(origin) and not bool(origin.isfinite().all()):
                raise ValueError(f"origin: expected finite numbers, got {brief(origin.tolist())}")
        if clusters is not None and not isinstance(clusters, Clusters):
            raise TypeError(
                f"clusters: expected Clusters, as tokens.cluster() makes, got {describe(clusters)}"
            )
        told = clusters is not None and not isinstance(sizes, Tensor)
        if told and clusters.sizes != sizes:  # type: ignore[union-attr]
            raise ValueError(f"clusters: expected samples of {brief(sizes)} tokens, got {clusters}")
        if clusters is not None:
            check_order("positions", positions, clusters)
        fields = _checked_fields(fields, positions)
        check_flags(same_positions=same_positions)
        if same_positions:
            check_same_positions("positions", positions, sizes, False)
            if extent is not None and any(sides != extent[0] for sides in extent[1:]):
                raise ValueError(f"same_positions: expected one extent, got {brief(extent)}")
        values = positions, features, sizes, extent, origin, clusters, same_positions, fields
        _set(self, dict(zip(_NAMES, values, strict=True)))

    @property  # type: ignore[no-redef]
    def sizes(self) -> tuple[int, ...]:
        return self._sizes.read()  # type: ignore[attr-defined]

    @property  # type: ignore[no-redef]
    def extent(self) -> Extent | None:
        extent = self._extent  # type: ignore[attr-defined]
        return None if extent is None else extent.read()

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[TokenSet]:
        return iter(self.to_list())

    def sample(self, b: int) -> TokenSet:
        """Sample `b` (from the end where negative) alone, rows as they stand, without clusters."""
        check_count("b", b, least=-len(self))
        if b >= len(self):
            raise ValueError(f"b: expected one of {len(self)} samples, got {b}")
        b %= len(self)
        start = sum(self.sizes[:b])
        return self._with_rows(
            slice(start, start + self.sizes[b]),
            sizes=(self.sizes[b],),
            extent=None if self.extent is None else (self.extent[b],),
            origin=None if self.origin is None else self.origin[b : b + 1],
            same_positions=False,
        )

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def batch_size(self) -> int:
        return len(self.sizes)

    @property
    def dimensions(self) -> int:
        return self.positions.shape[1]

    @property
    def channels(self) -> int:
        return self.features.shape[1]

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def is_uniform(self) -> bool:
        """Whether all samples have the same number of tokens, so that (B, N, C) is a view."""
        sizes = self.sizes
        return not isinstance(sizes, Tensor) and len(set(sizes)) <= 1

    @property
    def batch_offsets(self) -> Tensor:
        """(B+1,) int64, the row where each sample starts, and T."""
        return offsets_of(self.sizes, self.device)

    @property
    def sample_index(self) -> Tensor:
        """(T,) int64, the sample of each row."""
        return sample_of_rows(self.sizes, self.device, self.num_tokens)

    def with_features(self, features: Tensor) -> TokenSet:
        """The same tokens with other features (T, C')."""
        return self._changed(features=_checked_features(features, self.positions))

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenSet:
        """The same tokens with the features `function(features)`, such as of a module."""
        if not callable(function):
            raise TypeError(f"function: expected one of features, got {describe(function)}")
        return self.with_features(function(self.features))

    def with_fields(self, **fields: Tensor | None) -> TokenSet:
        """The same tokens with these `fields` besides, in place of those of their names; `None`
        leaves a field out.
        """
        kept = {name: rows for name, rows in self.fields.items() if name not in fields}
        more = {name: rows for name, rows in fields.items() if rows is not None}
        return self._changed(fields=kept | _checked_fields(more, self.positions))

    def with_positions(
        self, positions: Tensor, extent: Sequence | Tensor | None = None
    ) -> TokenSet:
        """The same tokens at other positions (T, D') relative to the same origin, on another canvas
        or none, without clusters. Where D changes there is no origin any more.
        """
        origin = self.origin
        if isinstance(positions, Tensor) and positions.shape[-1:] != self.positions.shape[-1:]:
            origin = None
        check_tensor("positions", positions, (self.num_tokens, "D"))
        return TokenSet(positions, self.features, self.sizes, extent, origin, fields=self.fields)

    def select(
        self,
        index: Tensor,
        sizes: Sequence[int] | None = None,
        *,
        features: Tensor | None = None,
        check_values: bool = True,
    ) -> TokenSet:
        """The rows `index` (T',), grouped by sample; no clusters.

        Args:
            index: (T',) int32 or int64, or a mask (T,) bool of the rows to keep.
            sizes: how many of them per sample, B host integers; `None` counts them, which waits for
                the device.
            features: (T', C') to take in place of those of the rows.
            check_values: whether to look for rows that do not exist or are not of their sample,
                which waits for the device. Never done under `torch.compile` and while a CUDA graph
                is captured.

        Raises:
            TypeError, ValueError: an argument does not fit; rows are not grouped by sample.
            IndexError: there is no such row.
        """
        check_flags(check_values=check_values)
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            check_tensor("index", index, (self.num_tokens,), device=self.device)
            index, check_values = index.nonzero()[:, 0], check_values and sizes is not None
        check_tensor("index", index, ("T'",), INTEGERS, self.device)
        if check_values:
            check_rows("index", index, self.num_tokens)
        if sizes is None:
            given = check_batch("index", self.sample_index[index], len(self))
        else:
            given = check_sizes("sizes", sizes, len(index))
        if len(given) != len(self):
            raise ValueError(
                f"sizes: expected {len(self)} samples, as in the set, got {brief(given)}"
            )
        if sizes is not None and check_values and len(given) > 1 and can_read(index):
            wrong = self.sample_index[index] != batch_from_sizes(given, self.device)
            if bool(wrong.any()):
                row = int(wrong.int().argmax())
                raise ValueError(
                    f"index: expected {brief(given)} rows of the samples one after the other, but "
                    f"index[{row}] = {int(index[row])} is a row of sample "
                    f"{int(self.sample_index[index[row]])}"
                )
        if features is not None:
            check_tensor("features", features, (len(index), "C'"))
        return self._with_rows(index, features, sizes=given, same_positions=False)

    def _changed(self, **changes: Any) -> TokenSet:
        """Another set, of values that fit each other for sure."""
        kept = {
            name: getattr(self, name) for name in _STORED if name.removeprefix("_") not in changes
        }
        return _set(object.__new__(TokenSet), kept | changes)

    def _with_rows(
        self, rows: Tensor | slice, features: Tensor | None = None, **changes: Any
    ) -> TokenSet:
        """The rows of all that is there for each token; without clusters, if none are given."""
        positions = self.positions[rows]
        if features is None:
            features = self.features[rows]
        else:
            features = _checked_features(features, positions)
        changes = {"clusters": None} | changes
        changes["fields"] = {name: values[rows] for name, values in self.fields.items()}
        return self._changed(positions=positions, features=features, **changes)

    def cluster(
        self,
        cluster_size: int = 8,
        *,
        curve: str = "hilbert",
        anchors: bool = True,
        remainder: str = "spread",
        global_size: int = 0,
        adaptive: bool | None = None,
        check_values: bool = True,
        impl: str | None = None,
    ) -> TokenSet:
        """The tokens reordered into balanced clusters; see `balanced_cluster`."""
        clusters = balanced_cluster(
            self.positions,
            cluster_size,
            sizes=self.sizes,
            extent=self.extent,
            curve=curve,
            anchors=anchors,
            remainder=remainder,
            global_size=global_size,
            adaptive=adaptive,
            same_positions=self.same_positions,
            check_values=check_values,
            impl=impl,
        )
        sizes = self.sizes
        if isinstance(sizes, Tensor) or any(size > global_size for size in sizes):
            return self._with_rows(clusters.order, clusters=clusters)
        return self._changed(clusters=clusters)  # all keep their order

    def neighborhoods(
        self,
        num_clusters: int = 6,
        *,
        scope: str = "token",
        tile_size: int = 16,
        include_own: bool = False,
        check_values: bool = True,
        impl: str | None = None,
    ) -> Neighborhoods:
        """The clusters nearest to each token; see `nearest_clusters`.

        Raises:
            ValueError: the tokens have no clusters.
        """
        if self.clusters is None:
            raise ValueError("neighborhoods: these tokens have no clusters; call cluster() first")
        return nearest_clusters(
            self.positions,
            self.clusters,
            num_clusters,
            scope=scope,
            tile_size=tile_size,
            include_own=include_own,
            check_values=check_values,
            impl=impl,
        )

    def interpolate_to(
        self,
        target: TokenSet,
        *,
        k: int = 4,
        power: Tensor | float = 6.0,
        check_values: bool = True,
        impl: str | None = None,
    ) -> TokenSet:
        """The features of these tokens at the positions of others, sample by sample.

        Args:
            target: tokens of as many samples; their origins are taken into account.
            k, power, check_values, impl: see `interpolate`.

        Returns:
            `target` with the interpolated features: zeros where a sample has no tokens here.

        Raises:
            TypeError, ValueError: `target` is no set of as many samples, or an argument does not
                fit.
        """
        if not isinstance(target, TokenSet):
            raise TypeError(f"target: expected a TokenSet, got {describe(target)}")
        if (target.batch_size, target.dimensions) != (self.batch_size, self.dimensions):
            raise ValueError(
                f"target: expected {self.batch_size} samples in {self.dimensions}-D, got "
                f"{target.batch_size} in {target.dimensions}-D"
            )
        query, same = target.positions, self.same_positions and target.same_positions
        origins = [torch.zeros(()) if x.origin is None else x.origin for x in (self, target)]
        if not torch.equal(*origins):
            move = origins[1] - origins[0]
            same = same and bool((move == move[:1]).all())
            query = (query + move.to(self.device)[target.sample_index]).float()
        features = interpolate(
            self.features,
            self.positions,
            query,
            sizes=self.sizes,
            query_sizes=target.sizes,
            k=k,
            power=power,
            same_positions=same,
            check_values=check_values,
            impl=impl,
        )
        return target.with_features(features)

    def input_order(self) -> TokenSet:
        """Undo `cluster`: the tokens in the order they had before, without clusters."""
        if self.clusters is None:
            return self
        return self._with_rows(self.clusters.inverse_order)

    @classmethod
    def from_world(
        cls,
        positions: Tensor,
        features: Tensor | None = None,
        sizes: Sequence[int] | None = None,
        extent: Sequence | Tensor | None = None,
        *,
        origin: Tensor | None = None,
        fields: Mapping[str, Tensor] | None = None,
        batch: Tensor | None = None,
    ) -> TokenSet:
        """Tokens at world coordinates in float64, such as meters of a map projection.

        Each sample gets an origin, which is subtracted in float64; what is left is rounded to
        float32, by at most 2**-24 of the distance from the origin along each axis (0.06 mm at
        1 km). `world_positions` is the way back.

        Args:
            positions: (T, D) float64, D = 2 or 3.
            features, sizes, extent, fields, batch: as for `TokenSet`.
            origin: (B, D) float64 on the host, or (D,) for all samples, in world coordinates: the
                `origin` of a set whose positions these are to be used with. `None`: the sample's
                lower corner, not counting points farther below the middle half of the others than
                16 times its width, which would cost them digits.

        Raises:
            TypeError, ValueError: an argument does not fit, or a position is NaN or infinite.
        """
        check_tensor("positions", positions, ("T", "D"), (torch.float64,))
        count, dimensions = positions.shape
        sizes = check_sizes("sizes", sizes, count, batch)
        check_finite("positions", positions, sizes, torch.finfo(torch.float64).max)
        if origin is None:
            origin = _lower_corners(positions.detach(), sizes).cpu()
        else:
            check_tensor("origin", origin, None, (torch.float64,))
            if origin.shape not in ((dimensions,), (len(sizes), dimensions)):
                raise ValueError(
                    f"origin: expected shape ({len(sizes)}, {dimensions}) or ({dimensions},), got "
                    f"{describe(origin)}"
                )
            origin = origin.cpu().broadcast_to(len(sizes), dimensions).clone()
        sample = batch_from_sizes(sizes, positions.device)
        local = (positions - origin.to(positions.device)[sample]).float()
        check_finite("positions minus origin", local, sizes)
        return cls(local, features, sizes, extent, origin, fields=fields)

    def world_positions(self) -> Tensor:
        """(T, D) float64, `positions` plus `origin`."""
        positions = self.positions.double()
        if self.origin is None:
            return positions
        return positions + self.origin.to(self.device)[self.sample_index]

    def with_origin(self, origin: Tensor | None) -> TokenSet:
        """The same tokens relative to another origin, (B, D) or (D,) float64, `None` as for
        `from_world`: to use the positions of two sets together, give one the other's. Clusters and
        a canvas, which moves, are dropped.
        """
        return TokenSet.from_world(
            self.world_positions(), self.features, self.sizes, origin=origin, fields=self.fields
        )

    @classmethod
    def from_grid(cls, maps: Tensor | Sequence[Tensor]) -> TokenSet:
        """One token per cell of feature maps: (B, C, H, W) or (B, C, Z, H, W), or a list of maps
        without the batch axis whose sizes may differ. Positions are cell indices (x, y[, z]),
        x fastest; the extent is (W, H[, Z]).
        """
        if isinstance(maps, Tensor) and maps.dim() not in (4, 5):
            raise ValueError(
                f"maps: expected (B, C, H, W) or (B, C, Z, H, W), got {describe(maps)}"
            )
        if not isinstance(maps, Tensor | list | tuple):
            raise TypeError(
                f"maps: expected (B, C, H, W), or a list of (C, H, W), got {describe(maps)}"
            )
        for sample in [maps] if isinstance(maps, Tensor) else maps:
            if isinstance(sample, Tensor) and not sample.is_floating_point():
                raise TypeError(f"maps: expected a floating dtype, got {describe(sample)}")
        if isinstance(maps, Tensor):
            batch, _, *shape = maps.shape
            positions = _cells(batch, shape, maps.device)
            features = maps.flatten(2).transpose(1, 2).flatten(0, 1)
            sizes = [math.prod(shape)] * batch
            return cls(positions, features, sizes, shape[::-1], same_positions=True)
        if not maps:
            raise ValueError("maps: expected at least one feature map, got none")
        for sample in maps:
            if not isinstance(sample, Tensor) or sample.dim() not in (3, 4):
                raise ValueError(
                    f"maps: expected (C, H, W) or (C, Z, H, W), got {describe(sample)}"
                )
            if sample.shape[0] != maps[0].shape[0] or sample.dim() != maps[0].dim():
                raise ValueError(
                    f"maps: expected one number of axes and channels, got {describe(maps[0])} and "
                    f"{describe(sample)}"
                )
        shapes = [tuple(sample.shape[1:]) for sample in maps]
        grids = {shape: _cells(1, shape, maps[0].device) for shape in set(shapes)}
        return cls(
            torch.cat([grids[shape] for shape in shapes]),
            torch.cat([sample.flatten(1).T for sample in maps]),
            [len(grids[shape]) for shape in shapes],
            [shape[::-1] for shape in shapes],
            same_positions=len(grids) == 1,
        )

    def to_grid(self, fill: float = 0.0, *, check_values: bool = True) -> Tensor | list[Tensor]:
        """Feature maps (B, C, H, W) or (B, C, Z, H, W) with each token in the cell that it lies
        in and `fill` in cells without one; a list of maps if the extents differ, or there are none.
        Of several tokens in a cell it has one, whichever; of an extent the whole cells.

        Args:
            check_values: whether to look for tokens outside of the canvas, which waits for the
                device. Never done under `torch.compile` and while a CUDA graph is captured.

        Raises:
            ValueError: there is no extent, or a token lies outside of it.
        """
        if self.extent is None:
            raise ValueError("to_grid: this token set has no extent, so the map's size is unknown")
        check_flags(check_values=check_values)
        if not (isinstance(fill, float) and not math.isfinite(fill)):  # those may fill, too
            check_number("fill", fill)
        shapes = [tuple(int(side) for side in reversed(extent)) for extent in self.extent]
        if not shapes:
            return []
        volumes = [math.prod(shape) for shape in shapes]
        sample = self.sample_index
        same = len(set(shapes)) == 1  # then nothing is copied from the host
        sides = from_host(shapes, torch.int64, self.device)[sample] if not same else None
        cell = torch.zeros_like(sample)
        places = self.positions.floor().long()  # NaN becomes the least integer
        outside = None
        for axis in range(self.dimensions):  # of the map: the last position first
            side = shapes[0][axis] if sides is None else sides[:, axis]
            place = places[:, -1 - axis]
            cell = cell * side + place
            if check_values and can_read(place):
                there = (place < 0) | (place >= side)
                outside = there if outside is None else outside | there
        if outside is not None and bool(outside.any()):
            raise ValueError(
                "to_grid: a token lies outside of its canvas, or in no whole cell of it, "
                f"{brief(self.extent)}"
            )
        cell += offsets_of(volumes, self.device)[sample]
        flat = self.features.new_full((sum(volumes), self.channels), fill)
        flat = flat.index_copy(0, cell, self.features)
        if same:
            batch = flat.view(len(self), volumes[0], self.channels).transpose(1, 2)
            return batch.reshape(len(self), self.channels, *shapes[0])
        pieces = flat.split(volumes)
        return [
            piece.T.reshape(self.channels, *shape)
            for piece, shape in zip(pieces, shapes, strict=True)
        ]

    @classmethod
    def cat(cls, sets: Sequence[TokenSet]) -> TokenSet:
        """The samples of several token sets in one, in order; clusters are dropped. Fields of
        different dtypes get the one that holds both, unless numbers would be rounded.
        """
        if not isinstance(sets, list | tuple) or not all(isinstance(s, TokenSet) for s in sets):
            raise TypeError(f"sets: expected a list of TokenSets, got {describe(sets)}")
        if not sets:
            raise ValueError("sets: expected at least one token set, got none")
        for name in ("dimensions", "channels", "device"):
            found = {getattr(s, name): None for s in sets}
            if len(found) > 1:
                raise ValueError(f"sets: expected all of the same {name}, got {brief([*found])}")
        names = sets[0].fields.keys()
        for s in sets:
            if s.fields.keys() != names:
                raise ValueError(
                    f"sets: expected all with the same fields, got {brief([*names])} and "
                    f"{brief([*s.fields])}"
                )
        sets = [s.input_order() for s in sets]
        extent = None
        if all(s.extent is not None for s in sets):
            extent = tuple(itertools.chain.from_iterable(s.extent for s in sets if s.extent))
        origin = None
        if any(s.origin is not None for s in sets):
            zeros = torch.zeros(1, sets[0].dimensions, dtype=torch.float64)
            origin = torch.cat(
                [zeros.expand(len(s), -1) if s.origin is None else s.origin for s in sets]
            )
        joined = {}
        for name in names:
            rows = [s.fields[name] for s in sets]
            if len({x.shape[1:] for x in rows}) > 1:
                shapes = brief([*{tuple(x.shape[1:]): None for x in rows}])
                raise ValueError(f"sets: field {name} has entries of different shapes: {shapes}")
            joined[name] = torch.cat(rows)
            for x in rows:
                if x.dtype != joined[name].dtype and not _holds(joined[name].dtype, x):
                    dtypes = brief([*{_dtype_name(x): None for x in rows}])
                    raise ValueError(
                        f"sets: field {name} is of different dtypes, {dtypes}, and would be "
                        f"rounded; give it one with tokens.with_fields({name}=...)"
                    )
        return _unchecked(
            torch.cat([s.positions for s in sets]),
            torch.cat([s.features for s in sets]),
            tuple(itertools.chain.from_iterable(s.sizes for s in sets)),
            extent,
            origin,
            None,
            False,
            joined,
        )

    @classmethod
    def from_list(
        cls, samples: Sequence[TokenSet] | Sequence[Tensor] | Sequence[tuple[Tensor, Tensor]]
    ) -> TokenSet:
        """A batch of samples of any sizes: token sets, see `cat`, or positions (n, D) of each, or
        pairs (positions, features) with features (n, C).
        """
        if not isinstance(samples, list | tuple) or not samples:
            raise TypeError(
                f"samples: expected a list of token sets or positions, got {describe(samples)}"
            )
        if isinstance(samples[0], TokenSet):
            other = next((x for x in samples if not isinstance(x, TokenSet)), None)
            if other is not None:
                raise TypeError(f"samples: expected token sets only, got {describe(other)} too")
            return cls.cat(samples)
        pairs = [sample if isinstance(sample, list | tuple) else (sample,) for sample in samples]
        lengths = dict.fromkeys(map(len, pairs))
        if lengths.keys() not in ({1}, {2}):
            raise ValueError(
                "samples: expected positions, or pairs (positions, features), of all samples, got "
                f"{brief([*lengths])} tensors"
            )
        columns: list[Tensor | None] = [None, None]
        for place, column in enumerate(zip(*pairs, strict=True)):
            name = ("positions", "features")[place]
            for tensor in column:
                check_tensor(f"samples: {name}", tensor, ("n", "DC"[place]))
            kinds = {(x.shape[1], str(x.device)): None for x in column}
            if len(kinds) > 1:
                raise ValueError(
                    f"samples: expected {name} with one number of columns, on one device, got "
                    f"{brief([*kinds])}"
                )
            columns[place] = torch.cat(column)
        positions, features = columns
        assert positions is not None
        return cls(positions, features, [len(pair[0]) for pair in pairs])

    def to_list(self) -> list[TokenSet]:
        """One token set per sample, rows as they stand, without clusters."""
        nothing = itertools.repeat(None)
        sizes, extent = self.sizes, self.extent
        named = [[(name, x) for x in rows.split(sizes)] for name, rows in self.fields.items()]
        parts = zip(
            self.positions.split(sizes),
            self.features.split(sizes),
            PerSample.each(sizes),
            nothing if extent is None else PerSample.each(extent, torch.float64),
            nothing if self.origin is None else self.origin.split(1),
            nothing,
            itertools.repeat(False),
            map(dict, zip(*named, strict=True)) if named else ({} for _ in sizes),
        )
        return [_unchecked(*values) for values in parts]

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> TokenSet:
        """Move all tensors to `device`; cast the features (never the positions) to `dtype`.

        `non_blocking` does not wait for copies from page-locked memory, see `pin_memory`.
        """
        device = check_device(device)
        check_flags(non_blocking=non_blocking)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating dtype, got {describe(dtype)}")
        move = partial(Tensor.to, device=device, non_blocking=non_blocking)
        clusters = self.clusters
        if clusters is not None:
            clusters = replace(
                clusters,
                order=move(clusters.order),
                offsets=move(clusters.offsets),
                centers=move(clusters.centers),
            )
        return self._changed(
            positions=move(self.positions),
            features=move(self.features, dtype=dtype),
            clusters=clusters,
            fields={name: move(rows) for name, rows in self.fields.items()},
        )

    def detach(self) -> TokenSet:
        """The same tokens without a way back for gradients."""
        return pytree.tree_map_only(Tensor, Tensor.detach, self)

    def pin_memory(self) -> TokenSet:
        """The same tokens in page-locked memory, as a DataLoader with `pin_memory` asks for."""
        return pytree.tree_map_only(Tensor, Tensor.pin_memory, self)

    def __repr__(self) -> str:
        sizes = f"{self.sizes[0]} each" if self.is_uniform and self.sizes else brief(self.sizes)
        rest = ""
        if self.clusters is not None:
            rest += f", {self.clusters.num_clusters} clusters"
        if self.origin is not None and len(self.origin):
            corner = ", ".join(f"{x:.12g}" for x in self.origin[0].tolist())
            same = bool((self.origin == self.origin[0]).all())
            rest += f", origin ({corner}){'' if same else ' ...'}"
        if self.fields:
            names = [f"{name} {_dtype_name(rows)}" for name, rows in self.fields.items()]
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            rest += f", fields {', '.join(names[:6])}{more}"
        return (
            f"TokenSet({self.num_tokens} tokens in {self.dimensions}-D, {self.channels} channels "
            f"{_dtype_name(self.features)} on {self.device}, {len(self)} samples: {sizes}{rest})"
        )


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Whether values of a dtype that `dtype` is promoted from stay what they are: all but large
    integers, which become floating numbers."""
    if values.is_floating_point() or values.is_complex() or not can_read(values):
        return True
    return torch.equal(values.to(dtype).to(values.dtype), values)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _checked_features(features: Tensor, positions: Tensor) -> Tensor:
    check_tensor("features", features, (len(positions), "C"), device=positions.device)
    if not features.is_floating_point():
        raise TypeError(
            f"features: expected a floating dtype, got {describe(features)}; use features.float()"
        )
    return features


def _checked_fields(fields: Mapping[str, Tensor] | None, positions: Tensor) -> dict[str, Tensor]:
    if fields is None:
        return {}
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
        raise TypeError(f"fields: expected tensors (T, ...) by name, got {describe(fields)}")
    for name, rows in fields.items():
        named = f"fields[{brief(name)}]"
        check_tensor(named, rows, device=positions.device)
        if rows.shape[:1] != positions.shape[:1]:
            raise ValueError(
                f"{named}: expected shape ({len(positions)}, ...), got {describe(rows)}"
            )
    return dict(fields)


def collate(samples: Sequence) -> Any:
    """A batch of what a data set gives, for `DataLoader(data, collate_fn=pointformer.collate)`.

    Token sets are put into one (`TokenSet.cat`), also inside of tuples and dictionaries; all else
    is as `torch.utils.data.default_collate` has it.
    """
    if not isinstance(samples, list | tuple) or not samples:
        raise TypeError(f"samples: expected a list of samples, got {describe(samples)}")
    return collate_by_type(samples, collate_fn_map=_COLLATE)


def _collate_sets(sets: Sequence[TokenSet], *, collate_fn_map: object = None) -> TokenSet:
    return TokenSet.cat(sets)


_COLLATE = {TokenSet: _collate_sets, **default_collate_fn_map}
_NAMES = tuple(field.name for field in fields(TokenSet))
_STORED = tuple({"sizes": "_sizes", "extent": "_extent"}.get(name, name) for name in _NAMES)


def _set(tokens: TokenSet, values: dict[str, Any]) -> TokenSet:
    """Give a set its attributes, by their names, or those of what it stores in their place."""
    if "sizes" in values:
        values["_sizes"] = PerSample.of(values.pop("sizes"), values["same_positions"])
    if "extent" in values:
        extent = values.pop("extent")
        if extent is not None:
            extent = PerSample.of(extent, values["_sizes"].table is None, torch.float64)
        values["_extent"] = extent
    for name, value in values.items():
        object.__setattr__(tokens, name, value)
    return tokens


def _unchecked(*values: Any) -> TokenSet:
    """A set of its attributes, in order. Transformations put other things in the place of tensors,
    and thousands of samples need not be checked one by one.
    """
    return _set(object.__new__(TokenSet), dict(zip(_NAMES, values, strict=True)))


def _flatten(tokens: TokenSet) -> list:
    """The values of all attributes, also while exporting such that `_unchecked` makes the set again
    outside."""
    values = {name: getattr(tokens, stored) for name, stored in zip(_NAMES, _STORED, strict=True)}
    return [given.leaves() if isinstance(given, PerSample) else given for given in values.values()]


def _unflatten(values: Iterable, context: None) -> TokenSet:
    return _unchecked(*values)


pytree.register_pytree_node(
    TokenSet,
    lambda tokens: (_flatten(tokens), None),
    _unflatten,
    serialized_type_name="pointformer.TokenSet",
    flatten_with_keys_fn=lambda tokens: (
        list(zip(map(pytree.GetAttrKey, _NAMES), _flatten(tokens), strict=True)),
        None,
    ),
)
# Lets `torch.load` and `torch.export.load` read token sets without running other code.
torch.serialization.add_safe_globals([TokenSet])
