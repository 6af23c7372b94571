"""Neighborhood attention by what PyTorch has: FlexAttention, and gathered keys with SDPA.

Both take what `neighborhood_attention` takes, without a blank token, and give equal results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from pointformer import Neighborhoods
from pointformer.reference.relative_position import relative_position


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    neighborhoods: Neighborhoods,
    position_weight: Tensor | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """Keys and values of each query gathered to (T, H, M, d), then SDPA with one query each."""
    rows, mask = neighborhoods.members()  # (T, M)
    heads = query.shape[1]
    bias = query.new_zeros(()).where(mask, -torch.inf)[:, None]  # (T, 1, M)
    if position_weight is not None:
        delta = positions[rows] - positions[:, None]
        features = relative_position(delta, position_weight.shape[1] > positions.shape[1])
        bias = bias + (features @ position_weight.float().T).permute(0, 2, 1)  # (T, H, M)
    if position_bias is not None:
        bias = bias + position_bias[:, None]
    bias = bias.to(query.dtype).expand(-1, heads, -1)
    keys, values = (x[rows].transpose(1, 2) for x in (key, value))  # (T, H, M, d)
    out = scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=bias[:, :, None])
    return out[:, :, 0]


class Flex:
    """FlexAttention on the same lists, for a batch of samples of equal size.

    Args:
        positions: (T, 2).
        neighborhoods: of the T tokens of all samples.
        block: rows of queries and of keys in a block of the mask.
        compiled: whether to compile it; without, it stores all scores, and is for tests.
    """

    def __init__(
        self,
        positions: Tensor,
        neighborhoods: Neighborhoods,
        block: int = 128,
        compiled: bool = True,
    ) -> None:
        sizes = neighborhoods.clusters.sizes
        if len(set(sizes)) != 1:
            raise ValueError(f"neighborhoods: expected samples of one size, got {sizes}")
        self.batch, self.length = len(sizes), sizes[0]
        self.positions = positions
        self.mask = block_mask(neighborhoods, block)
        self.attention: Callable = flex_attention
        if compiled:
            self.attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_weight: Tensor | None = None,
        position_bias: Tensor | None = None,
    ) -> Tensor:
        """(T, H, d), as `neighborhood_attention`."""
        samples = [
            x.unflatten(0, (self.batch, self.length)).transpose(1, 2) for x in (query, key, value)
        ]
        score_mod = None
        if position_weight is not None:
            score_mod = self._bias(position_weight, position_bias)
        out = self.attention(*samples, score_mod=score_mod, block_mask=self.mask)
        return out.transpose(1, 2).flatten(0, 1)

    def _bias(self, weight: Tensor, bias: Tensor | None) -> Callable:
        """The five features of a relative position, written out: a score at a time is modified."""
        x, y = self.positions.T.contiguous()
        length = self.length

        def score_mod(score, b, h, q, k):
            dx = x[b * length + k] - x[b * length + q]
            dy = y[b * length + k] - y[b * length + q]
            squared = dx * dx + dy * dy
            apart = squared > 0
            inverse = torch.where(apart, torch.rsqrt(torch.where(apart, squared, 1.0)), 0.0)
            score = score + weight[h, 0] * dx + weight[h, 1] * dy + weight[h, 2] * squared * inverse
            score = score + (weight[h, 3] * dy + weight[h, 4] * dx) * inverse
            return score if bias is None else score + bias[h]

        return score_mod


def block_mask(neighborhoods: Neighborhoods, block: int) -> BlockMask:
    """The lists of neighborhoods as a mask of blocks, without a look at pairs of tokens.

    A block of queries lists the blocks of keys that hold a token of any of its clusters; inside of
    a block, a key belongs to a query if its cluster is in the query's list.
    """
    clusters, index = neighborhoods.clusters, neighborhoods.cluster_index
    batch, length = len(clusters.sizes), clusters.sizes[0]
    blocks = -(-length // block)
    query, slot = torch.nonzero(index >= 0, as_tuple=True)
    cluster = index[query, slot].long()
    listed = torch.zeros(batch, blocks, blocks, dtype=torch.bool, device=index.device)
    # A cluster may lie across blocks; it is no longer than one.
    for row in (clusters.offsets[cluster], clusters.offsets[cluster + 1] - 1):
        listed[query // length, query % length // block, row.long() % length // block] = True
    counts = listed.sum(2, dtype=torch.int32)[:, None]  # (B, 1, blocks)
    order = torch.argsort(~listed, dim=2, stable=True).int()[:, None]  # listed ones first
    assignment = clusters.assignment.int()

    def is_neighbor(b, h, q, k):
        own, found = assignment[b * length + k], False
        for place in range(index.shape[1]):
            found = (index[b * length + q, place] == own) | found
        return found

    return BlockMask.from_kv_blocks(
        counts, order, BLOCK_SIZE=block, mask_mod=is_neighbor, seq_lengths=(length, length)
    )
