"""The public ops on tokens."""

from pointformer.ops.attention import neighborhood_attention
from pointformer.ops.deformable import deformable_attention
from pointformer.ops.gather import weighted_gather
from pointformer.ops.interpolate import interpolate
from pointformer.ops.merge import point_conv, scored_merge
from pointformer.ops.norm import add_norm
from pointformer.ops.segment import segment_logsumexp, segment_reduce, segment_softmax

__all__ = [
    "add_norm",
    "deformable_attention",
    "interpolate",
    "neighborhood_attention",
    "point_conv",
    "scored_merge",
    "segment_logsumexp",
    "segment_reduce",
    "segment_softmax",
    "weighted_gather",
]
