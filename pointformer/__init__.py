"""Irregular tokens for vision: balanced clustering, neighborhood attention, scored merging.

A `TokenSet` is a packed batch of tokens with positions. The ops work on 2-D and 3-D positions and
on batches of samples of different sizes; models built from them are in `pointformer.models`.
"""

from typing import TYPE_CHECKING, Any

from pointformer.clusters import Clusters, Neighborhoods
from pointformer.geometry import (
    Voxels,
    balanced_cluster,
    best_of_runs,
    curve_sample,
    farthest_point_sample,
    knn,
    nearest_clusters,
    radius,
    random_sample,
    select_centers,
    spread_scores,
    voxel_pool,
)
from pointformer.graph import (
    batch_from_sizes,
    knn_graph,
    radius_graph,
    sizes_from_batch,
    sizes_from_ptr,
    to_edge_index,
)
from pointformer.ops import (
    add_norm,
    deformable_attention,
    interpolate,
    neighborhood_attention,
    point_conv,
    scored_merge,
    segment_logsumexp,
    segment_reduce,
    segment_softmax,
    weighted_gather,
)
from pointformer.tokens import TokenSet, collate

if TYPE_CHECKING:
    from pointformer.segmentation.segment import Segmentation, segment

__version__ = "0.1.0"

__all__ = [
    "Clusters",
    "Neighborhoods",
    "Segmentation",
    "TokenSet",
    "Voxels",
    "add_norm",
    "balanced_cluster",
    "batch_from_sizes",
    "best_of_runs",
    "collate",
    "curve_sample",
    "deformable_attention",
    "farthest_point_sample",
    "interpolate",
    "knn",
    "knn_graph",
    "nearest_clusters",
    "neighborhood_attention",
    "point_conv",
    "radius",
    "radius_graph",
    "random_sample",
    "scored_merge",
    "segment",
    "segment_logsumexp",
    "segment_reduce",
    "segment_softmax",
    "select_centers",
    "sizes_from_batch",
    "sizes_from_ptr",
    "spread_scores",
    "to_edge_index",
    "voxel_pool",
    "weighted_gather",
]

_LATER = ("Segmentation", "segment")  # need models, Pillow and the like


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from pointformer.segmentation import segment

        return getattr(segment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
