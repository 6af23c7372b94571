"""Packed batches as other libraries describe them."""

from pointformer.graph.batch import batch_from_sizes, sizes_from_batch, sizes_from_ptr

__all__ = ["batch_from_sizes", "sizes_from_batch", "sizes_from_ptr"]
