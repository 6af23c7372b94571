"""Edges between points, as graph libraries take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer._checks import INTEGERS, check_flags, check_option, check_tensor
from pointformer.geometry.neighbors import knn, radius

_FLOWS = ("source_to_target", "target_to_source")


def to_edge_index(neighbor_index: Tensor, *, flow: str = "source_to_target") -> Tensor:
    """The edges of lists of neighbors, as from `knn` and `radius`.

    Args:
        neighbor_index: (Q, k) int32 or int64, rows of the neighbors, -1 for none.
        flow: "source_to_target" has the neighbors in row 0 and the queries in row 1, so that in
            graph libraries messages flow from neighbors to queries; "target_to_source" swaps them.

    Returns:
        (2, E) int64, query by query, each one's neighbors in the order of its list. Waits for the
        device.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or value does not fit.
    """
    neighbor_index = check_tensor("neighbor_index", neighbor_index, ("Q", "k"), INTEGERS)
    check_option("flow", flow, _FLOWS)
    query, place = (neighbor_index >= 0).nonzero().unbind(1)
    edges = neighbor_index[query, place].long(), query
    return torch.stack(edges if flow == "source_to_target" else edges[::-1])


def knn_graph(
    positions: Tensor,
    k: int,
    *,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    along_curve: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Edges (2, E) int64 between each point and the k nearest of its sample.

    Args:
        loop: whether a point may be its own neighbor.
        flow: see `to_edge_index`.

    Other arguments, and errors, are those of `knn`.
    """
    check_flags(loop=loop)
    check_option("flow", flow, _FLOWS)
    index = knn(
        positions, k, sizes=sizes, batch=batch, include_self=loop, along_curve=along_curve,
        check_values=check_values, impl=impl,
    )  # fmt: skip
    return to_edge_index(index, flow=flow)


def radius_graph(
    positions: Tensor,
    r: float,
    k: int | None = None,
    *,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    along_curve: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Edges (2, E) int64 between each point and those of its sample that are at most `r` away.

    Args:
        k: the most neighbors of a point, the nearest of them; `None` for all.
        loop: whether a point is its own neighbor.
        flow: see `to_edge_index`.

    Other arguments, and errors, are those of `radius`.
    """
    check_flags(loop=loop)
    check_option("flow", flow, _FLOWS)
    index = radius(
        positions, r, k, sizes=sizes, batch=batch, include_self=loop, along_curve=along_curve,
        check_values=check_values, impl=impl,
    )  # fmt: skip
    return to_edge_index(index, flow=flow)
