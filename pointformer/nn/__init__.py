"""The ops as layers of networks, and blocks of them.

Channels, heads and shapes are those of the ops. Each layer says how it starts.
"""

from pointformer.nn.attention import NeighborhoodAttention
from pointformer.nn.blocks import Block, init_linear
from pointformer.nn.merge import PointConv, ScoredMerge, WeightNet

__all__ = [
    "Block",
    "NeighborhoodAttention",
    "PointConv",
    "ScoredMerge",
    "WeightNet",
    "init_linear",
]
