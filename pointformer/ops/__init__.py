"""The public ops on tokens."""

from pointformer.ops.attention import neighborhood_attention
from pointformer.ops.deformable import deformable_attention
from pointformer.ops.gather import weighted_gather
from pointformer.ops.interpolate import interpolate
from pointformer.ops.merge import point_conv, scored_merge
from pointformer.ops.norm import add_norm

__all__ = [
    "add_norm",
    "deformable_attention",
    "interpolate",
    "neighborhood_attention",
    "point_conv",
    "scored_merge",
    "weighted_gather",
]
