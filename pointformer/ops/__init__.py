"""The public ops on tokens."""

from pointformer.ops.attention import neighborhood_attention

__all__ = [
    "neighborhood_attention",
]
