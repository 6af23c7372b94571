"""Exact nearest neighbors: the clusters around each token, and the k nearest points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal, overload

import torch
from torch import Tensor

from pointformer._checks import (
    check_count,
    check_finite,
    check_flags,
    check_number,
    check_option,
    check_positions,
    check_query_sizes,
    check_same_positions,
    check_sizes,
    check_tensor,
    describe,
    on_host,
)
from pointformer._dispatch import choose, lacks_nothing
from pointformer.clusters import Clusters, Neighborhoods, check_order, offsets_of
from pointformer.kernels.neighbors import fused_nearest
from pointformer.reference import neighbors as reference

_FIRST_WIDTH = 64  # of lists as long as they have to be; more where that is not enough
_SCOPES = ("token", "tile")
_MOST_POINTS = 8**9  # in the box tree on GPUs
_LONGEST_LIST = 100  # of torch-cluster on GPUs


def nearest_clusters(
    positions: Tensor,
    clusters: Clusters,
    num_clusters: int = 6,
    *,
    scope: str = "token",
    tile_size: int = 16,
    include_own: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> Neighborhoods:
    """The clusters whose centers are nearest to each token (AutoFocusFormer, section 3.2).

    Exact and the same bit for bit in every implementation: clusters of the token's own sample by
    squared distance in float32, dx*dx + dy*dy [+ dz*dz] with every operation rounded, ties to the
    lowest cluster. The fast path takes linear time also for very uneven density, as long as the
    clusters follow a space-filling curve.

    Args:
        positions: (T, D) float32, D = 2 or 3, rows in cluster order.
        clusters: the clusters of these tokens. Where they promise the same positions in all
            samples, only the first one's are searched for.
        num_clusters: clusters in a neighborhood. A sample with fewer, or with at most
            `clusters.global_size` tokens, lists all it has.
        scope: "token" for a neighborhood around each token; "tile" to let the tokens of a query
            tile share the one around their mean position. Tiles are `tile_size` consecutive rows,
            starting with a sample's first; its last tile may be short. The mean is the float32 sum
            in row order divided by the count.
        tile_size: tokens in a tile.
        include_own: put clusters that the token, or a token of its tile, belongs to in the place of
            the farthest others if they are missing. Where a tile belongs to more than
            `num_clusters` clusters, some of them are left out.
        check_values: whether to look for positions that are not finite, or in input order, which
            waits for the device. Never done under `torch.compile` and while a CUDA graph is
            captured.
        impl: "reference", "cpu" or "triton"; `None` chooses by device. "torch_cluster" for
            comparison where torch-cluster is installed: of equally far clusters it may list others.

    Returns:
        Neighborhoods with `cluster_index` (T, R) int32, nearest first, padded with -1. R is the
        longest list of a sample; of ragged sets under `torch.compile` the longest that any could
        have.

    Raises:
        TypeError, ValueError: an argument does not fit, or a position is NaN or infinite.
    """
    positions = check_positions("positions", positions).detach()
    tokens, dimensions = positions.shape
    if not isinstance(clusters, Clusters):
        raise TypeError(f"clusters: expected Clusters, got {describe(clusters)}")
    if tokens != clusters.num_tokens:
        raise ValueError(
            f"positions: expected {clusters.num_tokens} rows as in clusters, got {tokens}"
        )
    centers = check_tensor(
        "clusters.centers", clusters.centers, ("K", dimensions), (torch.float32,), positions.device
    ).detach()
    check_count("num_clusters", num_clusters)
    check_count("tile_size", tile_size)
    check_option("scope", scope, _SCOPES)
    check_flags(include_own=include_own, check_values=check_values)
    sizes, counts = clusters.sizes, clusters.counts
    if isinstance(sizes, Tensor):
        assert isinstance(counts, Tensor)
        index = _untraced_clusters(
            positions, clusters.order, clusters.offsets, centers, sizes, counts,
            clusters.cluster_size, clusters.global_size, num_clusters, scope, tile_size,
            include_own, check_values, impl,
        )  # fmt: skip
        return Neighborhoods(index, clusters)
    if check_values:
        check_finite("positions", positions, sizes)
    if clusters.same_positions:
        check_same_positions("positions", positions, sizes, check_values)
    if check_values:
        check_order("positions", positions, clusters, wait=True)
    # Python's own would be compiled for which samples are small, and again for others.
    compiling = torch.compiler.is_compiling()
    smaller, larger = (torch.sym_min, torch.sym_max) if compiling else (min, max)
    limits = tuple(
        count if size <= clusters.global_size else smaller(num_clusters, count)
        for size, count in zip(sizes, counts, strict=True)
    )
    width = reduce(larger, limits, 0)
    chosen = choose(
        "nearest_clusters",
        impl,
        _fast(centers, width, "clusters", "num_clusters"),
        positions.device,
    )
    tile = tile_size if scope == "tile" else 1
    query, query_sizes = positions, sizes
    if tile > 1:
        rows, query_sizes = _tile_rows(sizes, tile, positions.device)
        query = _tile_means(positions, rows)
    copies = len(sizes) if clusters.same_positions and sizes else 1
    if chosen == "reference":
        index, _ = reference.nearest(query, centers, query_sizes, counts, limits, width)
    else:
        search = _of_first(copies, query, centers, query_sizes, counts, limits)
        index, _ = fused_nearest(*search, width, torch.inf, True, copies, chosen)
    if include_own and width:
        own = clusters.assignment.int()
        own = own[rows.clamp(min=0)].where(rows >= 0, -1) if tile > 1 else own[:, None]
        index = _include(own, index, query, centers)
    if tile > 1:
        repeats = (rows >= 0).sum(1)
        index = torch.repeat_interleave(index, repeats, 0, output_size=tokens)
    return Neighborhoods(index, clusters, copies=copies)


@overload
def knn(
    positions: Tensor,
    k: int,
    *,
    query_positions: Tensor | None = ...,
    sizes: Sequence[int] | None = ...,
    batch: Tensor | None = ...,
    query_sizes: Sequence[int] | None = ...,
    query_batch: Tensor | None = ...,
    include_self: bool = ...,
    return_distance: Literal[False] = ...,
    along_curve: bool = ...,
    same_positions: bool = ...,
    check_values: bool = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def knn(
    positions: Tensor,
    k: int,
    *,
    query_positions: Tensor | None = ...,
    sizes: Sequence[int] | None = ...,
    batch: Tensor | None = ...,
    query_sizes: Sequence[int] | None = ...,
    query_batch: Tensor | None = ...,
    include_self: bool = ...,
    return_distance: Literal[True],
    along_curve: bool = ...,
    same_positions: bool = ...,
    check_values: bool = ...,
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def knn(
    positions: Tensor,
    k: int,
    *,
    query_positions: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    query_sizes: Sequence[int] | None = None,
    query_batch: Tensor | None = None,
    include_self: bool = True,
    return_distance: bool = False,
    along_curve: bool = False,
    same_positions: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The k nearest points of the same sample, for each point or for given query positions.

    Exact: squared distances in float32, dx*dx + dy*dy [+ dz*dz] with every operation rounded, ties
    to the lowest row. (Distances below 1e-19 lose digits, those below 2e-23 count as 0.)

    Args:
        positions: (T, D) float32, D = 2 or 3, samples one after the other.
        k: neighbors per query.
        query_positions: (Q, D) float32; `None` asks for the neighbors of the points.
        sizes: points per sample, B host integers; `None` for one sample.
        batch: in place of `sizes` the sample of each point, see `sizes_from_batch`.
        query_sizes, query_batch: the same of the queries.
        include_self: `False` leaves each point out of its own list; only without `query_positions`.
        return_distance: also return the distances.
        along_curve: whether the rows of each sample follow a space-filling curve, as in cluster
            order, so that no such order has to be found. The result is the same in any case.
        same_positions: promises that all samples have the points and queries of the first one, row
            by row: only that one is searched.
        check_values: whether to look for positions that are not finite, or not the same where that
            is promised, which waits for the device. Never done under `torch.compile` and while a
            CUDA graph is captured.
        impl: "reference", "cpu" or "triton"; `None` chooses by device. "torch_cluster" for
            comparison where torch-cluster is installed: of equally far points it may list others.

    Returns:
        Rows of `positions`, (Q, k) int32, nearest first, -1 where the sample has too few points.
        With `return_distance` also the distances (Q, k) float32, in the units of `positions`,
        infinite there, with gradients for both positions, which are zero at distance zero.

    Raises:
        TypeError, ValueError: an argument does not fit, or a position is NaN, infinite or beyond
            4.6e18, where squares overflow.
    """
    check_count("k", k)
    return _search(
        "knn", positions, k, torch.inf, query_positions, sizes, batch, query_sizes, query_batch,
        include_self, return_distance, along_curve, same_positions, check_values, impl,
    )  # fmt: skip


@overload
def radius(
    positions: Tensor,
    r: float,
    k: int | None = ...,
    *,
    query_positions: Tensor | None = ...,
    sizes: Sequence[int] | None = ...,
    batch: Tensor | None = ...,
    query_sizes: Sequence[int] | None = ...,
    query_batch: Tensor | None = ...,
    include_self: bool = ...,
    return_distance: Literal[False] = ...,
    along_curve: bool = ...,
    same_positions: bool = ...,
    check_values: bool = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def radius(
    positions: Tensor,
    r: float,
    k: int | None = ...,
    *,
    query_positions: Tensor | None = ...,
    sizes: Sequence[int] | None = ...,
    batch: Tensor | None = ...,
    query_sizes: Sequence[int] | None = ...,
    query_batch: Tensor | None = ...,
    include_self: bool = ...,
    return_distance: Literal[True],
    along_curve: bool = ...,
    same_positions: bool = ...,
    check_values: bool = ...,
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def radius(
    positions: Tensor,
    r: float,
    k: int | None = None,
    *,
    query_positions: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    query_sizes: Sequence[int] | None = None,
    query_batch: Tensor | None = None,
    include_self: bool = True,
    return_distance: bool = False,
    along_curve: bool = False,
    same_positions: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The points of the same sample at most `r` away, for each point or given query positions.

    The lists of `knn` without the points whose squared distance is above that of `r`, both in
    float32: the border belongs to it, as in scipy and unlike in torch-cluster.

    Args:
        r: in the units of `positions`, not negative.
        k: the most points to list, the nearest of them. `None` lists all, in as many columns as the
            longest list has, which waits for the device.

    Other arguments, and errors, are those of `knn`.

    Returns:
        Rows of `positions`, (Q, k) int32, nearest first, ties to the lowest row, filled up with -1.
        With `return_distance` also the distances, as from `knn`.
    """
    check_number("r", r, least=0)
    if k is not None:
        check_count("k", k)
    return _search(
        "radius", positions, k, r, query_positions, sizes, batch, query_sizes, query_batch,
        include_self, return_distance, along_curve, same_positions, check_values, impl,
    )  # fmt: skip


def _search(
    op: str,
    positions: Tensor,
    k: int | None,
    r: float,
    query_positions: Tensor | None,
    sizes: Sequence[int] | None,
    batch: Tensor | None,
    query_sizes: Sequence[int] | None,
    query_batch: Tensor | None,
    include_self: bool,
    return_distance: bool,
    along_curve: bool,
    same_positions: bool,
    check_values: bool,
    impl: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`knn`, without what is beyond the distance `r`; `k` is `None` for all."""
    learned = check_positions("positions", positions), query_positions
    positions = positions.detach()
    if query_positions is None:
        if query_sizes is not None or query_batch is not None:
            name = "query_batch" if query_sizes is None else "query_sizes"
            raise ValueError(f"{name}: expected None where query_positions is None")
        query_sizes = sizes = check_sizes("sizes", sizes, positions.shape[0], batch)
    else:
        query_positions = check_positions(
            "query_positions", query_positions, positions.shape[1]
        ).detach()
        check_tensor("query_positions", query_positions, device=positions.device)
        sizes, query_sizes = check_query_sizes(
            sizes, batch, len(positions), query_sizes, query_batch, len(query_positions)
        )
    check_flags(
        include_self=include_self,
        return_distance=return_distance,
        along_curve=along_curve,
        same_positions=same_positions,
        check_values=check_values,
    )
    if check_values:
        check_finite("positions", positions, sizes)
    if same_positions:
        check_same_positions("positions", positions, sizes, check_values)
    if query_positions is not None:
        if not include_self:
            raise ValueError(
                "include_self: False needs query_positions=None, there is no own point else"
            )
        if check_values:
            check_finite("query_positions", query_positions, query_sizes)
        if same_positions:
            check_same_positions("query_positions", query_positions, query_sizes, check_values)
    options = k, r, include_self, along_curve, same_positions, impl
    if isinstance(sizes, Tensor) or (k is None and torch.compiler.is_compiling()):
        counts = on_host(query_sizes), on_host(sizes)
        found = _untraced_lists(op, query_positions, positions, *counts, *options)
    else:
        found = _lists(op, query_positions, positions, query_sizes, sizes, *options)
    index, distance = found
    if not return_distance:
        return index
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned):
        points, query = learned
        return index, _distances(points if query is None else query, points, index)
    return index, distance.sqrt()


def _lists(
    op: str,
    query_positions: Tensor | None,
    positions: Tensor,
    query_sizes: tuple[int, ...],
    sizes: tuple[int, ...],
    k: int | None,
    r: float,
    include_self: bool,
    along_curve: bool,
    same_positions: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """Rows (Q, k) and squared distances of arguments that are checked; without `k`, in as many
    columns as the longest list has."""
    if k is None:
        k = _FIRST_WIDTH
        options = r, include_self, along_curve, same_positions, impl
        while True:
            found = _lists(op, query_positions, positions, query_sizes, sizes, k, *options)
            longest = int((found[0] >= 0).sum(1).amax()) if len(found[0]) else 0
            if longest < k or k >= len(positions):
                return found[0][:, :longest], found[1][:, :longest]
            k = min(4 * k, len(positions))
    reach = torch.inf
    if r < torch.inf:
        bound = torch.tensor(r, dtype=torch.float32)
        reach = float(bound * bound)
    width = k if include_self else k + 1
    limits = (width,) * len(sizes)
    chosen = choose(op, impl, _fast(positions, width, "positions", "k"), positions.device)
    if chosen == "reference":
        asking = positions if query_positions is None else query_positions
        index, distance = reference.nearest(
            asking, positions, query_sizes, sizes, limits, width, reach
        )
    else:
        copies = len(sizes) if same_positions and sizes else 1
        search = _of_first(copies, query_positions, positions, query_sizes, sizes, limits)
        index, distance = fused_nearest(*search, width, reach, along_curve, copies, chosen)
    if not include_self:
        own = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
        after_own = (index == own[:, None]).cumsum(1)[:, :k] > 0
        index = torch.where(after_own, index[:, 1:], index[:, :k])
        distance = torch.where(after_own, distance[:, 1:], distance[:, :k])
    return index, distance


@torch.library.custom_op("pointformer::ragged_lists", mutates_args=())
def _untraced_lists(
    op: str,
    query: Tensor | None,
    points: Tensor,
    query_sizes: Tensor,
    sizes: Tensor,
    k: int | None,
    r: float,
    include_self: bool,
    along_curve: bool,
    same_positions: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """`_lists` within compiled code."""
    counts = tuple(query_sizes.tolist()), tuple(sizes.tolist())
    index, distance = _lists(
        op, query, points, *counts, k, r, include_self, along_curve, same_positions, impl
    )
    return index.contiguous(), distance.contiguous()


@_untraced_lists.register_fake
def _fake_lists(op, query, points, query_sizes, sizes, k, *options):
    width = torch.library.get_ctx().new_dynamic_size() if k is None else k
    shape = (points if query is None else query).shape[0], width
    return points.new_empty(shape, dtype=torch.int32), points.new_empty(shape)


@torch.library.custom_op("pointformer::ragged_neighborhoods", mutates_args=())
def _untraced_clusters(
    positions: Tensor,
    order: Tensor,
    offsets: Tensor,
    centers: Tensor,
    sizes: Tensor,
    counts: Tensor,
    cluster_size: int,
    global_size: int,
    num_clusters: int,
    scope: str,
    tile_size: int,
    include_own: bool,
    check_values: bool,
    impl: str | None,
) -> Tensor:
    """`nearest_clusters` within compiled code."""
    per_sample = tuple(sizes.tolist()), tuple(counts.tolist())
    clusters = Clusters(order, offsets, centers, *per_sample, cluster_size, global_size)
    index = nearest_clusters(
        positions, clusters, num_clusters, scope=scope, tile_size=tile_size,
        include_own=include_own, check_values=check_values, impl=impl,
    ).cluster_index  # fmt: skip
    width = _widest(num_clusters, cluster_size, global_size)
    return torch.nn.functional.pad(index, (0, width - index.shape[1]), value=-1)


@_untraced_clusters.register_fake
def _fake_clusters(
    positions, order, offsets, centers, sizes, counts, cluster_size, global_size, num_clusters,
    *options,
):  # fmt: skip
    width = _widest(num_clusters, cluster_size, global_size)
    return positions.new_empty(positions.shape[0], width, dtype=torch.int32)


def _widest(num_clusters: int, cluster_size: int, global_size: int) -> int:
    """Clusters in the longest list of a token that there can be."""
    return max(num_clusters, -(-global_size // cluster_size))


def _distances(query: Tensor, points: Tensor, index: Tensor) -> Tensor:
    """Of the listed points, with gradients, which are zero at distance zero."""
    square = reference.squared_distance(query[:, None], points[index.clamp(min=0).long()])
    apart = (index >= 0) & (square > 0)
    found = square.where(apart, 1.0).sqrt()
    return found.where(apart, torch.zeros_like(found).masked_fill(index < 0, torch.inf))


def _of_first(
    copies: int,
    query: Tensor | None,
    points: Tensor,
    query_sizes: tuple[int, ...],
    point_sizes: tuple[int, ...],
    limits: tuple[int, ...],
) -> tuple[Tensor | None, Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Points and queries, where the samples are so many copies of the first one."""
    if copies > 1:
        query_sizes, point_sizes, limits = query_sizes[:1], point_sizes[:1], limits[:1]
        query = None if query is None else query[: query_sizes[0]]
        points = points[: point_sizes[0]]
    return query, points, query_sizes, point_sizes, limits


def _fast(
    points: Tensor, width: int, points_name: str, width_name: str
) -> dict[str, Callable[[], str | None]]:
    """The fast implementations, and what they lack for lists of `width` of these points."""

    def triton_lacks() -> str | None:
        if len(points) > _MOST_POINTS:
            return f"{points_name} has {len(points)} rows, more than {_MOST_POINTS}"
        return None

    def torch_cluster_lacks() -> str | None:
        if points.device.type != "cpu" and width > _LONGEST_LIST:
            return f"{width_name} asks for lists of {width}, more than {_LONGEST_LIST}"
        return None

    return {"cpu": lacks_nothing, "triton": triton_lacks, "torch_cluster": torch_cluster_lacks}


def _tile_rows(
    sizes: Sequence[int], tile: int, device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """Rows of each tile, (tiles, tile) int64 with -1 for none, and the tiles per sample."""
    counts = tuple(-(-size // tile) for size in sizes)
    tiles = sum(counts)
    starts, first_tile = offsets_of(tuple(sizes), device), offsets_of(counts, device)
    samples = torch.arange(len(sizes), device=device)
    sample = torch.repeat_interleave(samples, first_tile.diff(), output_size=tiles)
    first = starts[sample] + (torch.arange(tiles, device=device) - first_tile[sample]) * tile
    rows = first[:, None] + torch.arange(tile, device=device)
    return rows.where(rows < starts[sample + 1, None], -1), counts


def _tile_means(positions: Tensor, rows: Tensor) -> Tensor:
    """Mean position of each tile: a float32 sum in row order, divided by the count."""
    known = (rows >= 0)[..., None]
    members = positions[rows.clamp(min=0)].where(known, 0.0)
    total = members[:, 0]
    for slot in range(1, rows.shape[1]):
        total = total + members[:, slot]
    return total / known.sum(1)


def _include(own: Tensor, index: Tensor, query: Tensor, centers: Tensor) -> Tensor:
    """Put the clusters `own` (Q, W), -1 for none, into the lists `index` (Q, R).

    A cluster missing from a full list is farther than all of it, so the list stays sorted if the
    farthest entries that are not own are dropped and the missing ones appended by distance.
    """
    repeated = torch.zeros_like(own, dtype=torch.bool)
    repeated[:, 1:] = own[:, 1:] == own[:, :-1]  # tokens of one cluster are consecutive
    listed = (own[..., None] == index[:, None, :]).any(2)
    missing = (own >= 0) & ~repeated & ~listed
    if own.shape[1] > 1:
        distance = reference.squared_distance(query[:, None], centers[own.clamp(min=0).long()])
        nearest = torch.sort(distance.where(missing, torch.inf), dim=1, stable=True).indices
        own, missing = own.gather(1, nearest), missing.gather(1, nearest)
    spare = (index[..., None] != own[:, None, :]).all(2) & (index >= 0)
    from_the_end = spare.flip(1).cumsum(1).flip(1)
    keep = (index >= 0) & ~(spare & (from_the_end <= missing.sum(1, keepdim=True)))
    # Kept and missing clusters move to the left; a column on the right takes what is left out.
    wanted = torch.cat([keep, missing], 1)
    slot = wanted.cumsum(1) - 1
    wanted &= slot < (index >= 0).sum(1, keepdim=True)
    width = index.shape[1]
    result = index.new_full((index.shape[0], width + 1), -1)
    result.scatter_(1, slot.where(wanted, width), torch.cat([index, own], 1))
    return result[:, :width].contiguous()
