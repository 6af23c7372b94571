"""Packed batches as other libraries describe them."""

from pointformer.graph.batch import batch_from_sizes, sizes_from_batch

__all__ = ["batch_from_sizes", "sizes_from_batch"]
