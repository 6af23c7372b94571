"""Packed batches and neighborhoods as other libraries describe them."""

from pointformer.graph.batch import batch_from_sizes, sizes_from_batch, sizes_from_ptr
from pointformer.graph.edges import knn_graph, radius_graph, to_edge_index

__all__ = [
    "batch_from_sizes",
    "knn_graph",
    "radius_graph",
    "sizes_from_batch",
    "sizes_from_ptr",
    "to_edge_index",
]
