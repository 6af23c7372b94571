"""`TokenSet`: a packed batch of tokens with positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pointformer._checks import (
    INTEGERS,
    brief,
    can_read,
    check_device,
    check_finite,
    check_flags,
    check_number,
    check_per_sample,
    check_positions,
    check_same_positions,
    check_sizes,
    check_tensor,
    describe,
)
from pointformer.clusters import Clusters, Neighborhoods, offsets_of
from pointformer.geometry.boxes import bounding_boxes
from pointformer.geometry.clustering import balanced_cluster
from pointformer.geometry.neighbors import nearest_clusters
from pointformer.graph import batch_from_sizes
from pointformer.kernels.tables import from_host

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

    Attributes:
        positions: (T, D) float32, D = 2 or 3, axes in the order x, y[, z].
        features: (T, C), any float dtype.
        sizes: tokens per sample, B host integers.
        extent: per sample the D sides of the canvas, in the units of `positions` (host numbers), or
            `None` where no canvas is known. A feature map of h x w has the extent (w, h).
        origin: (B, D) float64 on the host, what to add to `positions` for world coordinates, or
            `None` for zero.
        clusters: set by `cluster`; rows are then in cluster order. Permuting or selecting rows
            clears it.
        same_positions: promises that all samples have the same positions, in the same order, and
            one extent: what depends on positions alone is then found once. `from_grid` knows it of
            maps of one size; `with_features`, `cluster`, `input_order` and `to` keep it.

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

    def __init__(
        self,
        positions: Tensor,
        features: Tensor,
        sizes: Sequence[int] | None = None,
        extent: Sequence | Tensor | None = None,
        origin: Tensor | None = None,
        clusters: Clusters | None = None,
        same_positions: bool = False,
    ) -> None:
        check_positions("positions", positions)
        count, dimensions = positions.shape
        check_tensor("features", features, (count, "C"), device=positions.device)
        if not features.is_floating_point():
            raise TypeError(
                f"features: expected a floating dtype, got {describe(features)}; use "
                "features.float()"
            )
        sizes = check_sizes("sizes", sizes, count)
        if extent is not None:
            extent = check_per_sample("extent", extent, len(sizes), dimensions, least=0)
        if origin is not None:
            check_tensor("origin", origin, (len(sizes), dimensions), (torch.float64,))
        if clusters is not None and not isinstance(clusters, Clusters):
            raise TypeError(
                f"clusters: expected Clusters, as tokens.cluster() makes, got {describe(clusters)}"
            )
        if clusters is not None and clusters.sizes != sizes:
            raise ValueError(f"clusters: expected samples of {brief(sizes)} tokens, got {clusters}")
        check_flags(same_positions=same_positions)
        if same_positions:
            check_same_positions("positions", positions, sizes, False)
            if extent is not None and any(sides != extent[0] for sides in extent[1:]):
                raise ValueError(f"same_positions: expected one extent, got {brief(extent)}")
        for name, value in (
            ("positions", positions),
            ("features", features),
            ("sizes", sizes),
            ("extent", extent),
            ("origin", origin),
            ("clusters", clusters),
            ("same_positions", same_positions),
        ):
            object.__setattr__(self, name, value)

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
        return len(set(self.sizes)) <= 1

    @property
    def batch_offsets(self) -> Tensor:
        """(B+1,) int64, the row where each sample starts, and T."""
        return offsets_of(self.sizes, self.device)

    @property
    def sample_index(self) -> Tensor:
        """(T,) int64, the sample of each row."""
        return batch_from_sizes(self.sizes, self.device)

    def with_features(self, features: Tensor) -> TokenSet:
        """The same tokens with other features (T, C')."""
        return self._with_rows(self.positions, features, self.clusters)

    def _with_rows(
        self, positions: Tensor, features: Tensor, clusters: Clusters | None
    ) -> TokenSet:
        """The same samples with rows in an order that may be another, the same one in each."""
        rest = (self.sizes, self.extent, self.origin, clusters, self.same_positions)
        return TokenSet(positions, features, *rest)

    def select(self, index: Tensor, sizes: Sequence[int]) -> TokenSet:
        """The rows `index` (T',), grouped by sample, `sizes` of them per sample; no clusters.

        Raises:
            TypeError, ValueError: `index` is no int32 or int64 vector, or `sizes` do not fit it.
            IndexError: there is no such row.
        """
        check_tensor("index", index, ("T'",), INTEGERS, self.device)
        sizes = check_sizes("sizes", sizes, len(index))
        known = self.extent is not None or self.origin is not None
        if known and len(sizes) != self.batch_size:
            raise ValueError(
                f"sizes: expected {self.batch_size} samples, as in the set, got {brief(sizes)}"
            )
        return TokenSet(
            self.positions[index], self.features[index], sizes, self.extent, self.origin
        )

    def cluster(
        self,
        cluster_size: int = 8,
        *,
        curve: str = "hilbert",
        anchors: bool = True,
        remainder: str = "spread",
        global_size: int = 0,
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
            same_positions=self.same_positions,
            check_values=check_values,
            impl=impl,
        )
        positions, features = self.positions, self.features
        if any(size > global_size for size in self.sizes):  # the others keep their order
            positions, features = positions[clusters.order], features[clusters.order]
        return self._with_rows(positions, features, clusters)

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

    def input_order(self) -> TokenSet:
        """Undo `cluster`: the tokens in the order they had before, without clusters."""
        if self.clusters is None:
            return self
        index = self.clusters.inverse_order
        return self._with_rows(self.positions[index], self.features[index], None)

    @classmethod
    def from_world(
        cls,
        positions: Tensor,
        features: Tensor,
        sizes: Sequence[int] | None = None,
        extent: Sequence | Tensor | None = None,
        *,
        origin: Tensor | None = None,
    ) -> TokenSet:
        """Tokens at world coordinates in float64, such as meters of a map projection.

        Each sample gets an origin, which is subtracted in float64; what is left is rounded to
        float32, by at most 2**-24 of the distance from the origin along each axis (0.06 mm at
        1 km). `world_positions` is the way back.

        Args:
            positions: (T, D) float64, D = 2 or 3.
            features, sizes, extent: as for `TokenSet`.
            origin: (B, D) float64 on the host, or (D,) for all samples, in world coordinates: the
                `origin` of a set whose positions these are to be used with. `None`: the sample's
                lower corner, not counting points farther below the middle half of the others than
                16 times its width, which would cost them digits.

        Raises:
            TypeError, ValueError: an argument does not fit, or a position is NaN or infinite.
        """
        check_tensor("positions", positions, ("T", "D"), (torch.float64,))
        count, dimensions = positions.shape
        sizes = check_sizes("sizes", sizes, count)
        check_finite("positions", positions, sizes, torch.finfo(torch.float64).max)
        if origin is None:
            origin = _lower_corners(positions, sizes).cpu()
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
        return cls(local, features, sizes, extent, origin)

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
        return TokenSet.from_world(self.world_positions(), self.features, self.sizes, origin=origin)

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
        in and `fill` in cells without one; a list of maps if the extents differ.

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
            raise ValueError(f"to_grid: a token lies outside of its canvas {brief(self.extent)}")
        cell += offsets_of(volumes, self.device)[sample]
        flat = self.features.new_full((sum(volumes), self.channels), fill)
        flat = flat.index_copy(0, cell, self.features)
        if same:
            batch = flat.view(self.batch_size, volumes[0], self.channels).transpose(1, 2)
            return batch.reshape(self.batch_size, self.channels, *shapes[0])
        pieces = flat.split(volumes)
        return [
            piece.T.reshape(self.channels, *shape)
            for piece, shape in zip(pieces, shapes, strict=True)
        ]

    @classmethod
    def from_list(cls, sets: Sequence[TokenSet]) -> TokenSet:
        """Pack several token sets into one batch, in order; clusters are dropped."""
        if not isinstance(sets, list | tuple) or not all(isinstance(s, TokenSet) for s in sets):
            raise TypeError(f"sets: expected a list of TokenSets, got {describe(sets)}")
        if not sets:
            raise ValueError("sets: expected at least one token set, got none")
        for name in ("dimensions", "channels", "device"):
            found = [getattr(s, name) for s in sets]
            if len(set(found)) > 1:
                raise ValueError(f"sets: expected all of the same {name}, got {brief(found)}")
        sets = [s.input_order() for s in sets]
        extent = None
        if all(s.extent is not None for s in sets):
            extent = list(itertools.chain.from_iterable(s.extent for s in sets if s.extent))
        origin = None
        if any(s.origin is not None for s in sets):
            zeros = [torch.zeros(s.batch_size, s.dimensions, dtype=torch.float64) for s in sets]
            origins = [
                zero if s.origin is None else s.origin for s, zero in zip(sets, zeros, strict=True)
            ]
            origin = torch.cat(origins)
        return cls(
            torch.cat([s.positions for s in sets]),
            torch.cat([s.features for s in sets]),
            [size for s in sets for size in s.sizes],
            extent,
            origin,
        )

    def to_list(self) -> list[TokenSet]:
        """One token set per sample, rows as they stand, clusters dropped."""
        return [
            TokenSet(
                positions,
                features,
                (size,),
                None if self.extent is None else (self.extent[b],),
                None if self.origin is None else self.origin[b : b + 1],
            )
            for b, (positions, features, size) in enumerate(
                zip(
                    self.positions.split(self.sizes),
                    self.features.split(self.sizes),
                    self.sizes,
                    strict=True,
                )
            )
        ]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TokenSet:
        """Move all tensors to `device`; cast the features (never the positions) to `dtype`."""
        device = check_device(device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating dtype, got {describe(dtype)}")
        clusters = self.clusters
        if clusters is not None:
            clusters = replace(
                clusters,
                order=clusters.order.to(device),
                offsets=clusters.offsets.to(device),
                centers=clusters.centers.to(device),
            )
        features = self.features.to(device=device, dtype=dtype)
        return self._with_rows(self.positions.to(device), features, clusters)

    def __repr__(self) -> str:
        sizes = f"{self.sizes[0]} each" if self.is_uniform and self.sizes else brief(self.sizes)
        name = str(self.dtype).removeprefix("torch.")
        clusters = "" if self.clusters is None else f", {self.clusters.num_clusters} clusters"
        return (
            f"TokenSet({self.num_tokens} tokens in {self.dimensions}-D, {self.channels} channels "
            f"{name} on {self.device}, {self.batch_size} samples: {sizes}{clusters})"
        )


_FIELDS = tuple(field.name for field in fields(TokenSet))


def _unflatten(values: Iterable, context: None) -> TokenSet:
    """Rebuild without checks: transformations put other things in the place of tensors."""
    tokens = object.__new__(TokenSet)
    for name, value in zip(_FIELDS, values, strict=True):
        object.__setattr__(tokens, name, value)
    return tokens


pytree.register_pytree_node(
    TokenSet,
    lambda tokens: ([getattr(tokens, name) for name in _FIELDS], None),
    _unflatten,
    serialized_type_name="pointformer.TokenSet",
    flatten_with_keys_fn=lambda tokens: (
        [(pytree.GetAttrKey(name), getattr(tokens, name)) for name in _FIELDS],
        None,
    ),
)
# Lets `torch.load` and `torch.export.load` read token sets without running other code.
torch.serialization.add_safe_globals([TokenSet])
