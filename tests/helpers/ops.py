"""A call of every op that has Triton kernels, and the same call with other tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.utils import _pytree as pytree

from helpers import attention, deformable, gather, interpolate, merge
from pointformer import (
    Clusters,
    Neighborhoods,
    add_norm,
    balanced_cluster,
    deformable_attention,
    farthest_point_sample,
    knn,
    nearest_clusters,
    neighborhood_attention,
    point_conv,
    radius,
    scored_merge,
    segment_reduce,
    segment_softmax,
    select_centers,
    weighted_gather,
)
from pointformer import interpolate as interpolate_op


@dataclass(frozen=True)
class OpCall:
    """An op with its arguments by name.

    Attributes:
        rows: names of the arguments in the dtype of the features.
        learned: of the differentiable ones that may have another dtype.
    """

    op: Callable
    arguments: dict[str, object]
    rows: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()

    def changed(self, change):
        """With `change(name, tensor)` in place of each tensor, also of those in neighborhoods."""

        def tree(name, value):
            if isinstance(value, torch.Tensor):
                return change(name, value)
            if isinstance(value, Clusters):
                tensors = {n: getattr(value, n) for n in ("order", "offsets", "centers")}
                return replace(value, **{n: change(n, x) for n, x in tensors.items()})
            if isinstance(value, Neighborhoods):
                index = change("cluster_index", value.cluster_index)
                return Neighborhoods(index, tree("clusters", value.clusters))
            return value

        return replace(self, arguments={n: tree(n, value) for n, value in self.arguments.items()})

    def to(self, device=None, rows=None, learned=None):
        dtypes = dict.fromkeys(self.rows, rows) | dict.fromkeys(self.learned, learned)
        return self.changed(lambda name, x: x.to(device=device, dtype=dtypes.get(name)))

    def run(self, impl="triton"):
        """Outputs, then gradients, as a flat list of tensors."""
        names = (*self.rows, *self.learned)
        leaves = {name: self.arguments[name].detach().requires_grad_() for name in names}
        found = self.op(**self.arguments | leaves, impl=impl)
        if isinstance(found, Neighborhoods):
            found = (found.cluster_index, found.plan)
        elif isinstance(found, Clusters):
            found = (found.order, found.offsets, found.centers)
        outputs = [x for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
        if not leaves:
            return outputs
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        return [x.detach() for x in (*outputs, *grads)]


def _attention(dimensions, channels, value_features=0):
    options = {"dimensions": dimensions, "channels": channels, "value_features": value_features}
    tensors, positions, neighborhoods = attention.make_inputs(
        sizes=(14, 5), dtype=torch.float32, **options
    )
    arguments = {**tensors, "positions": positions, "neighborhoods": neighborhoods}
    learned = tuple(name for name in attention.LEARNED if name in tensors)
    return OpCall(neighborhood_attention, arguments, ("query", "key", "value"), learned)


def _plan(cluster_index, clusters, impl):
    return Neighborhoods(cluster_index, clusters).with_plan(impl=impl)


def _merge(channels, dimensions=2):
    case = merge.make_case((11, 6), channels=channels, dimensions=dimensions)
    return OpCall(scored_merge, case, ("features",), ("scores", *merge.NET))


def op_calls():
    """By name."""
    g = torch.Generator().manual_seed(0)
    positions, scores = torch.rand(70, 2, generator=g) * 30, torch.rand(70, generator=g)
    lattice = torch.cartesian_prod(torch.arange(7.0), torch.arange(10.0))
    neighborhoods = attention.make_inputs()[2]
    segments = torch.randn(20, 5, generator=g)
    listed = merge.make_case((9,), channels=16)
    points = {"features": listed["features"], "positions": listed["positions"]}
    points |= {"neighbor_index": torch.randint(0, 9, (9, 3), generator=g, dtype=torch.int32)}
    net = {name: listed[name] for name in merge.NET}
    between = interpolate.make_case(7, 9, channels=32)
    names = ("features", "index", "weights")
    gathered = dict(zip(names, gather.make_case(9, 19, 5, 40), strict=True))
    summed = {name: torch.randn(23, 24, generator=g) for name in ("x", "branch")}
    summed |= {name: torch.randn(24, generator=g) for name in ("weight", "bias", "scale")}
    clusters = balanced_cluster(positions, sizes=(40, 30), impl="reference")
    ordered = positions[clusters.order]
    uneven, even = {"sizes": (40, 30)}, {"sizes": (35, 35)}
    selection = {"scores": scores, "rate": 0.3, "stride": 2}
    return {
        "attention": _attention(2, 8),
        "attention in 3-D": _attention(3, 24, value_features=7),
        "plan": OpCall(
            _plan,
            {"cluster_index": neighborhoods.cluster_index, "clusters": neighborhoods.clusters},
        ),
        "merge": _merge(11),
        "merge in 3-D": _merge(80, 3),
        "point_conv": OpCall(point_conv, points | net, ("features",), merge.NET),
        "interpolate": OpCall(interpolate_op, between, ("features",), ("power",)),
        "gather": OpCall(weighted_gather, gathered, ("features",), ("weights",)),
        "deformable": OpCall(
            deformable_attention,
            deformable.make_case(queries=9, points=3, channels=8),
            ("value",),
            ("offsets", "weights", "power"),
        ),
        "add_norm": OpCall(add_norm, summed, ("x", "branch"), ("weight", "bias", "scale")),
        "cluster": OpCall(balanced_cluster, {"positions": positions, **uneven}),
        "cluster uniform": OpCall(
            balanced_cluster, {"positions": positions, **even, "curve": "snake"}
        ),
        "nearest": OpCall(
            nearest_clusters, {"positions": ordered, "clusters": clusters, "num_clusters": 4}
        ),
        "knn": OpCall(knn, {"positions": positions, "k": 2, "return_distance": True, **even}),
        "knn, long lists": OpCall(
            knn,
            {
                "positions": positions,
                "k": 40,
                "query_positions": ordered[:9],
                "return_distance": True,
            },
        ),
        "radius": OpCall(
            radius,
            {"positions": positions, "r": 4.0, "k": 4, "return_distance": True, **uneven},
        ),
        "farthest": OpCall(
            farthest_point_sample, {"positions": positions[:20], "count": 3, "sizes": (12, 8)}
        ),
        "segment_reduce": OpCall(
            segment_reduce, {"values": segments, "reduce": "std", "sizes": (9, 0, 11)}, ("values",)
        ),
        "segment_softmax": OpCall(
            segment_softmax, {"values": segments, "index": torch.arange(20) % 3}, ("values",)
        ),
        "select": OpCall(select_centers, {"positions": lattice, **selection, **uneven}),
        "select by a grid": OpCall(
            select_centers, {"positions": lattice, **selection, **even, "prior": "grid"}
        ),
    }
