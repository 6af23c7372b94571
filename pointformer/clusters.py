"""Clusters of tokens, and the neighborhoods made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import pointformer.kernels.attention  # noqa: F401  (registers the plan)
from pointformer._checks import (
    INTEGERS,
    MOST_ROWS,
    alike,
    as_int32,
    can_read,
    check_count,
    check_flags,
    check_positions,
    check_rows,
    check_tensor,
    describe,
    too_many,
)
from pointformer._dispatch import choose, lacks_nothing
from pointformer.kernels.tables import from_host, starts_of

_LOOKED_AT, _ROWS_LOOKED_AT = 16, 1024  # clusters, and rows in them, to tell the order of rows


class PerSample(NamedTuple):
    """Host numbers of each sample of a batch: a tuple, and a tensor on the host that compiled code
    has in its place, so that one graph is for any number of samples of any sizes.

    Sets whose samples are alike by promise, and those that are made by compiled code from a tuple,
    have none: their graphs know that samples are alike.
    """

    numbers: tuple | None
    table: Tensor | None

    @classmethod
    def of(cls, numbers: Any, alike: bool, dtype: torch.dtype = torch.int64) -> PerSample:
        """From B numbers, B rows of them or, while compiling, a tensor."""
        if isinstance(numbers, PerSample):
            return numbers
        if isinstance(numbers, Tensor):
            return cls(None, numbers)
        if alike or torch.compiler.is_compiling():
            return cls(numbers, None)
        return cls(numbers, from_host(numbers, dtype, None))

    @classmethod
    def each(cls, numbers: tuple, dtype: torch.dtype = torch.int64) -> Iterator[PerSample]:
        """Those of each sample alone, without a step of torch for each."""
        if torch.compiler.is_compiling():
            return (cls((own,), None) for own in numbers)
        tables = from_host(numbers, dtype, None).split(1)
        # Of nothing there is one part, which is empty.
        return (cls((own,), table) for own, table in zip(numbers, tables, strict=False))

    def leaves(self) -> Any:
        """What pytrees have: the tuple also while exporting, so that all see the same tree."""
        return self.table if self.numbers is None else self.numbers

    def read(self) -> Any:
        """The tensor while compiling, else the tuple."""
        if self.table is not None and torch.compiler.is_compiling():
            return self.table
        if self.table is not None and self.numbers is None:  # it comes out of compiled code
            rows = self.table.tolist()
            return tuple(map(tuple, rows) if self.table.dim() > 1 else rows)
        return self.numbers


def total_of(sizes: Sequence[int] | Tensor) -> int:
    """The sum, also of a tensor while compiling, when it is a number yet unknown."""
    return sizes.sum().item() if isinstance(sizes, Tensor) else sum(sizes)  # type: ignore[return-value]


def offsets_of(sizes: Sequence[int] | Tensor, device: torch.device | None = None) -> Tensor:
    """Start of each sample in a packed batch, and the end: (B+1,) int64 from B host integers."""
    if isinstance(sizes, Tensor):
        return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(device)
    if alike(sizes):  # no copy from the host
        return torch.arange(len(sizes) + 1, device=device) * (sizes[0] if sizes else 0)
    return from_host(starts_of(sizes), torch.int64, device)


def sample_of_rows(
    sizes: Sequence[int] | Tensor, device: torch.device | None, total: int | None = None
) -> Tensor:
    """(T,) int64, the sample of each row of a packed batch; of `total` rows where that is known."""
    lengths = offsets_of(sizes, device).diff()
    samples = torch.arange(len(sizes), device=device)
    total = total_of(sizes) if total is None else total
    return torch.repeat_interleave(samples, lengths, output_size=total)


def check_neighborhoods(
    neighborhoods: object, queries: int, tokens: int, device: torch.device
) -> None:
    """Raise if these are not the neighborhoods of so many queries among so many tokens, on this
    device."""
    if not isinstance(neighborhoods, Neighborhoods):
        raise TypeError(f"neighborhoods: expected Neighborhoods, got {describe(neighborhoods)}")
    if not isinstance(neighborhoods.clusters, Clusters):
        raise TypeError(
            f"neighborhoods: expected Clusters in it, got {describe(neighborhoods.clusters)}"
        )
    if neighborhoods.num_queries != queries or neighborhoods.clusters.num_tokens != tokens:
        wanted = f"{tokens} tokens"
        if queries != tokens:
            wanted = f"{queries} queries among {tokens} tokens"
        raise ValueError(f"neighborhoods: expected those of {wanted}, got {neighborhoods!r}")
    check_tensor("neighborhoods", neighborhoods.cluster_index, ("Q", "R"), (torch.int32,), device)
    _check_offsets(neighborhoods.clusters)


def _check_offsets(clusters: Clusters) -> None:
    """Raise if clusters are not parts of the tokens, or longer than they may be: kernels would read
    and write beyond their memory. On CPUs."""
    offsets = clusters.offsets
    if type(offsets) is not Tensor or offsets.device.type != "cpu" or not can_read(offsets):
        return
    ends = offsets.numpy()
    lengths = np.diff(ends)
    whole = len(lengths) == clusters.num_clusters and lengths.min(initial=0) >= 0
    if not whole or ends[0] != 0 or ends[-1] != clusters.num_tokens:
        raise ValueError(
            f"neighborhoods: the offsets of its {clusters.num_clusters} clusters do not rise from "
            f"0 to {clusters.num_tokens}, its tokens"
        )
    if lengths.max(initial=0) > clusters.cluster_size:
        raise ValueError(
            f"neighborhoods: has a cluster of {lengths.max()} tokens, its cluster_size is "
            f"{clusters.cluster_size}"
        )


def check_order(name: str, positions: Tensor, clusters: Clusters, wait: bool = False) -> None:
    """Raise if these positions (T, D) are rows in input order in place of cluster order.

    A few clusters are looked at: their centers are the means of the rows that they would have in
    input order, but not of those that they have. Positions of other units or other places, which
    have means of their own, pass. On GPUs only if it may `wait`.
    """
    centers = clusters.centers
    if not can_read(positions) or not (wait or positions.device.type == "cpu"):
        return
    if type(positions) is not Tensor:  # a stand-in without numbers, or one of a transformation
        return
    if positions.shape != (clusters.num_tokens, centers.shape[1]) or len(centers) < 2:
        return
    size = min(clusters.cluster_size, clusters.num_tokens)
    few = min(_LOOKED_AT, 1 + _ROWS_LOOKED_AT // size, len(centers))
    some = np.arange(few) * (len(centers) // few)
    expected = _taken(centers, some)
    starts, ends = (_taken(clusters.offsets, some + i)[:, None] for i in (0, 1))
    rows = starts + np.arange(size)
    inside = (rows < ends)[..., None]
    rows = np.minimum(rows, clusters.num_tokens - 1)
    rounding = size * 2.0**-23 * np.abs(expected).max()

    def differ(rows: np.ndarray) -> bool:
        means = np.where(inside, _taken(positions, rows), 0.0).sum(1) / inside.sum(1)
        return bool((np.abs(means - expected) > rounding).any())

    if differ(rows) and not differ(_taken(clusters.order, rows)):
        raise ValueError(
            f"{name}: expected rows in cluster order, got them in input order; put all rows that "
            "belong to tokens in that order, x[clusters.order], or use tokens.cluster()"
        )


def _taken(tensor: Tensor, rows: np.ndarray) -> np.ndarray:
    """These rows, on the host; for few rows on CPUs in a fraction of torch's time."""
    if tensor.device.type == "cpu":
        return tensor.detach().numpy()[rows]
    return tensor.detach()[torch.from_numpy(rows).to(tensor.device)].cpu().numpy()


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Clusters:
    """Tokens of a packed batch sorted so that every cluster is a contiguous range of rows.

    Attributes:
        order: (T,) int64, `order[r]` is the input row that stands in row r.
        offsets: (K+1,) int32, cluster c is rows `offsets[c]` to `offsets[c+1]`.
        centers: (K, D) float32, mean position of each cluster's tokens.
        sizes: tokens per sample, B host integers.
        counts: clusters per sample, B host integers; an empty sample has none.
        cluster_size: no cluster has more tokens than this.
        global_size: neighborhoods in samples of at most this many tokens are all their clusters.
        same_positions: promises that all samples have the clusters of the first one.
    """

    order: Tensor
    offsets: Tensor
    centers: Tensor
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    cluster_size: int
    global_size: int
    same_positions: bool

    def __init__(
        self,
        order: Tensor,
        offsets: Tensor,
        centers: Tensor,
        sizes: tuple[int, ...],
        counts: tuple[int, ...],
        cluster_size: int,
        global_size: int = 0,
        same_positions: bool = False,
    ) -> None:
        for name, value in (
            ("order", order),
            ("offsets", offsets),
            ("centers", centers),
            ("_sizes", PerSample.of(sizes, same_positions)),
            ("_counts", PerSample.of(counts, same_positions)),
            ("cluster_size", cluster_size),
            ("global_size", global_size),
            ("same_positions", same_positions),
        ):
            object.__setattr__(self, name, value)

    @property  # type: ignore[no-redef]
    def sizes(self) -> tuple[int, ...]:
        return self._sizes.read()  # type: ignore[attr-defined]

    @property  # type: ignore[no-redef]
    def counts(self) -> tuple[int, ...]:
        return self._counts.read()  # type: ignore[attr-defined]

    @property
    def num_tokens(self) -> int:
        return self.order.shape[0]

    @property
    def num_clusters(self) -> int:
        return self.centers.shape[0]

    @property
    def inverse_order(self) -> Tensor:
        """(T,) int64, the row where each input token went: `x[order][inverse_order]` is `x`."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(self.num_tokens, device=self.order.device)
        return inverse

    @property
    def assignment(self) -> Tensor:
        """(T,) int64, the cluster of each row (rows in cluster order)."""
        lengths = (self.offsets[1:] - self.offsets[:-1]).long()
        index = torch.arange(self.num_clusters, device=self.offsets.device)
        return torch.repeat_interleave(index, lengths, output_size=self.num_tokens)

    def __repr__(self) -> str:
        return (
            f"Clusters({self.num_clusters} of at most {self.cluster_size}, "
            f"{self.num_tokens} tokens in {len(self.sizes)} samples)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Neighborhoods:
    """The clusters that each query attends to; its neighborhood is all of their tokens.

    Attributes:
        cluster_index: (Q, R) int32, nearest cluster first; -1 where a query has fewer than R.
            Queries are the tokens in cluster order, or a selection of them.
        clusters: the clusters that `cluster_index` points to.
        plan: index lists that fast ops derive from the two above, in an order of their own. Build
            them once per stage with `with_plan`, else each call builds its own.
        plan_impl: the implementation that `plan` is for; the others do not use it.
        copies: how many samples there are whose lists are those of the first one, with clusters
            counted on; 1 where that is not known.
    """

    cluster_index: Tensor
    clusters: Clusters
    plan: tuple[Tensor, ...] = ()
    plan_impl: str | None = None
    copies: int = 1

    @classmethod
    def from_lists(
        cls, neighbor_index: Tensor, positions: Tensor, *, check_values: bool = True
    ) -> Neighborhoods:
        """Neighborhoods that are listed token by token, in any order of rows, such as by `knn`.

        Args:
            neighbor_index: (Q, k) int32 or int64, rows of the tokens, none twice in a list, -1
                where there are fewer.
            positions: (T, D) float32, of the tokens.
            check_values: whether to look for rows that do not exist or are twice in a list, which
                waits for the device and sorts the lists.

        Raises:
            TypeError, ValueError: an argument's type, shape, dtype or device does not fit, or a row
                is twice in a list.
            IndexError: there is no such row.
        """
        check_positions("positions", positions)
        device = positions.device
        check_tensor("neighbor_index", neighbor_index, ("Q", "k"), INTEGERS, device)
        check_flags(check_values=check_values)
        tokens = len(positions)
        if check_values and can_read(neighbor_index) and neighbor_index.numel():
            check_rows("neighbor_index", neighbor_index, tokens, none=True)
            lists = neighbor_index.sort(1).values
            twice = ((lists[:, 1:] == lists[:, :-1]) & (lists[:, 1:] >= 0)).any(1)
            if bool(twice.any()):
                raise ValueError(
                    f"neighbor_index: has a row twice in list {int(twice.int().argmax())}"
                )
        clusters = Clusters(
            torch.arange(tokens, device=device),
            torch.arange(tokens + 1, dtype=torch.int32, device=device),
            positions,
            (tokens,),
            (tokens,),
            cluster_size=1,
        )
        return cls(as_int32(neighbor_index), clusters)

    @property
    def num_queries(self) -> int:
        return self.cluster_index.shape[0]

    @property
    def num_clusters(self) -> int:
        """R, the number of clusters in a neighborhood."""
        return self.cluster_index.shape[1]

    def with_plan(self, *, training: bool = True, impl: str | None = None) -> Neighborhoods:
        """The same neighborhoods with what the fast ops derive from them.

        Args:
            training: also with what backward passes need.
            impl: that of the ops to come: "cpu", "triton", or `None` for the device's own. There is
                nothing to prepare for the reference, and for forward passes on the CPU.

        Raises:
            ValueError: `impl` does not exist or cannot run here.
        """
        check_flags(training=training)
        index, clusters = self.cluster_index, self.clusters
        lacks = {"cpu": lacks_nothing, "triton": self.triton_lacks}
        chosen = choose("Neighborhoods.with_plan", impl, lacks, index.device)
        if chosen == "reference" or (chosen == "cpu" and not training):
            return self
        lists = torch.ops.pointformer.neighborhood_plan(
            index, clusters.offsets, clusters.cluster_size, training, self.copies, chosen
        )
        return Neighborhoods(index, clusters, tuple(lists), chosen, self.copies)

    def triton_lacks(self) -> str | None:
        """For `choose`: why Triton kernels cannot take these neighborhoods, or `None`."""
        rows = self.cluster_index.numel(), self.clusters.num_tokens
        if too_many(*rows):
            return f"neighborhoods has {max(rows)} tokens or list entries, more than {MOST_ROWS}"
        return None

    def select(self, rows: Tensor) -> Neighborhoods:
        """The neighborhoods of some queries, by row index (Q',); clusters stay as they are.

        Raises:
            TypeError, ValueError: `rows` is of another type, shape, dtype or device.
            IndexError: there is no such row. GPUs do not wait to find out here.
        """
        check_tensor("rows", rows, ("Q'",), INTEGERS, self.cluster_index.device)
        check_rows("rows", rows, self.num_queries, wait=False)
        return self._of_rows(rows)

    def _of_rows(self, rows: Tensor) -> Neighborhoods:
        return Neighborhoods(self.cluster_index.index_select(0, rows), self.clusters)

    def nearest(self, num_clusters: int) -> Neighborhoods:
        """The first `num_clusters` of each list."""
        check_count("num_clusters", num_clusters)
        return self._with_lists(self.cluster_index[:, :num_clusters])

    def thinned(self, num_clusters: int) -> Neighborhoods:
        """Of each list the first, the last, and ever fewer in between: `num_clusters` in all.

        They reach as far as all of the list at the cost of a short one, as dilated neighborhoods do
        on grids (Hassani and Shi 2022): where tokens crowd, the nearest alone see nothing of what
        is around. Entry i of r = `num_clusters` is the one at place floor(n^(i / (r - 1))) - 1 of a
        list of n, counted from 0, or at place i, whatever is more. A list of at most r stays.

        Returns:
            Neighborhoods with `cluster_index` (Q, min(R, num_clusters)), in the same order.

        Raises:
            TypeError, ValueError: `num_clusters` is not a count.
        """
        check_count("num_clusters", num_clusters)
        index = self.cluster_index
        if index.shape[1] <= num_clusters:
            return self
        length = torch.arange(index.shape[1] + 1, dtype=torch.float64, device=index.device)
        place = torch.arange(num_clusters, device=index.device)
        # A root that is a whole number may come out a last bit below it.
        power = length[:, None] ** (place.double() / max(1, num_clusters - 1)) * (1 + 1e-12)
        places = torch.maximum(power.long() - 1, place)
        return self._with_lists(index.gather(1, places[(index >= 0).sum(1)]))

    def _with_lists(self, cluster_index: Tensor) -> Neighborhoods:
        return Neighborhoods(cluster_index.contiguous(), self.clusters, copies=self.copies)

    def members(self) -> tuple[Tensor, Tensor]:
        """Token rows of each neighborhood: index (Q, R*m) int64 and mask (Q, R*m) bool, where m is
        `cluster_size`, or the number of tokens if that is less.

        Entries follow `cluster_index`, then the row inside the cluster. Where the mask is False
        the index is 0. For references and graph tools: the fast ops never build it.
        """
        size = min(self.clusters.cluster_size, self.clusters.num_tokens)
        index = self.cluster_index.long()
        known = index >= 0
        index = index.clamp(min=0)
        starts = self.clusters.offsets[index].long()
        lengths = starts  # of no cluster
        if self.clusters.num_clusters:
            lengths = self.clusters.offsets[index + 1].long() - starts
        slot = torch.arange(size, device=index.device)
        mask = (slot < lengths[..., None]) & known[..., None]
        rows = torch.where(mask, starts[..., None] + slot, 0)
        return rows.flatten(1), mask.flatten(1)

    def to_edge_index(self) -> Tensor:
        """(2, E) int64 edges (token, query): messages flow from row 0 to row 1, as in PyG."""
        rows, mask = self.members()
        query, place = mask.nonzero().unbind(1)
        return torch.stack([rows[query, place], query])

    def __repr__(self) -> str:
        return f"Neighborhoods({self.num_queries} queries x {self.num_clusters} of {self.clusters})"


_NAMES = tuple(field.name for field in fields(Clusters))


def _flatten(clusters: Clusters) -> list:
    stored = {"sizes": clusters._sizes.leaves(), "counts": clusters._counts.leaves()}  # type: ignore[attr-defined]
    return [stored[name] if name in stored else getattr(clusters, name) for name in _NAMES]


pytree.register_pytree_node(
    Clusters,
    lambda clusters: (_flatten(clusters), None),
    lambda values, context: Clusters(*values),
    serialized_type_name="pointformer.Clusters",
    flatten_with_keys_fn=lambda clusters: (
        list(zip(map(pytree.GetAttrKey, _NAMES), _flatten(clusters), strict=True)),
        None,
    ),
)
torch.export.register_dataclass(Neighborhoods, serialized_type_name="pointformer.Neighborhoods")
# Lets `torch.load` read them without running other code.
torch.serialization.add_safe_globals([Clusters, Neighborhoods, PerSample])
