"""Neighborhood attention on GPUs, the forward pass.

A program computes one head of a tile, consecutive queries, over the union of their neighborhoods. A
key row is then read once per tile instead of once per query, about 5 times instead of 48, and
products are matrix products; in turn about two thirds of the logits belong to no neighborhood and
are masked out by the words of the plan. Nothing of the size of the neighborhoods is written.

A key or value that is not finite can reach the other queries of its tile.
"""

import torch
import triton
import triton.language as tl

from pointformer.kernels.attention import TILE
from pointformer.kernels.triton.attention_backward import backward
from pointformer.kernels.triton.attention_pairs import (
    DTYPES,
    LOG2_E,
    LOWEST,
    WIDTHS,
    division,
    dot,
    learned_tensors,
    load_bias,
    load_blank,
    load_keys,
    load_points,
    load_rows,
    pair_logits,
    readable,
    store_rows,
    width_of,
)
from pointformer.kernels.triton.attention_plan import make_plan, tile_lists
from pointformer.kernels.triton.runtime import Variant

__all__ = ["backward", "forward", "make_plan", "variants"]

_STRIDES = ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head")
_INTEGERS = (
    *_STRIDES, "tokens", "heads", "octets", "features", "has_bias", "has_blank", "capacity",
    "cluster_size", "reciprocal", "shift",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def neighborhood_attention_fwd_kernel(
    query, key, value, positions, counts, rows, lengths, members,
    position_weight, position_bias, blank_key, blank_value, output, normal,
    query_token, query_head, key_token, key_head, value_token, value_head,
    tokens, heads, octets, features, has_bias, has_blank,
    capacity, cluster_size, reciprocal, shift, scale,
    AXES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads * QUERIES + tl.arange(0, QUERIES)
    tile = tl.program_id(0) // heads * QUERIES // TILE
    exists = row < tokens
    q = load_rows(query, row, exists, head, query_token, query_head, octets, WIDTH)
    x, y, z = load_points(positions, row, exists, AXES)
    point = (x[:, None], y[:, None], z[:, None])
    weights, bias = load_bias(position_weight, position_bias, head, features, has_bias, AXES)
    log2_scale = scale * LOG2_E
    own_bit = (1 << row % TILE)[:, None]

    # The softmax starts with the blank token.
    blank = load_blank(blank_key, head, octets, has_blank, WIDTH)[None, :]
    blank_logit = tl.sum(q.to(tl.float32) * blank, 1) * log2_scale
    largest = tl.where(has_blank != 0, blank_logit, LOWEST)
    total = tl.zeros((QUERIES,), tl.float32) + has_blank
    out = tl.zeros((QUERIES, WIDTH), tl.float32)
    out += load_blank(blank_value, head, octets, has_blank, WIDTH)[None, :]

    slots = tl.load(counts + tile) * cluster_size
    first = tile.to(tl.int64) * capacity
    for start in range(0, slots, KEYS):
        k, v, key_point, attending = load_keys(
            start, slots, rows, lengths, members, first, cluster_size, reciprocal, shift,
            key, value, positions, head, key_token, key_head, value_token, value_head, octets,
            AXES, WIDTH, KEYS,
        )  # fmt: skip
        _, logits = pair_logits(q, k, point, key_point, weights, bias, log2_scale, AXES, PRECISION)
        logits = tl.where((attending & own_bit) != 0, logits, LOWEST)
        # As long as a row has met no key of its own, it counts others: `fade` is 0 at the first.
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        fade = tl.exp2(largest - new_largest)
        attention = tl.exp2(logits - new_largest[:, None])
        total = total * fade + tl.sum(attention, 1)
        out = dot(attention.to(v.dtype), v, out * fade[:, None], PRECISION)
        largest = new_largest

    empty = (largest <= LOWEST) & (total >= 0)  # not if its logits are NaN
    factor = tl.where(empty, 0.0, 1.0 / total)
    out = tl.where(empty[:, None], 0.0, out * factor[:, None])
    store_rows(output, out, row, exists, head, heads, octets, WIDTH)
    normal += (row.to(tl.int64) * heads + head) * 2
    tl.store(normal, largest, mask=exists)
    tl.store(normal + 1, factor, mask=exists)


def _rounds(a):
    return {"start": (-(-a["counts"] * a["cluster_size"] // a["KEYS"])).double().mean().item()}


def _variant(dtype, axes, width):
    wide = dtype == torch.float32
    rows = (dtype,) * 3
    floats = (torch.float32,) * 4
    return Variant(
        neighborhood_attention_fwd_kernel,
        (*rows, torch.float32, *(torch.int32,) * 4, *floats, dtype, torch.float32)
        + ("i32",) * len(_INTEGERS)
        + ("fp32",),
        {
            "AXES": axes,
            "WIDTH": width,
            "TILE": TILE,
            "QUERIES": 16 if wide and width > 64 else TILE,
            "KEYS": 16 if wide else 32,
            "PRECISION": "bf16x6",
        },
        num_warps=4 if wide or width > 32 else 2,
        max_registers=255 if width > 64 else None,
        rounds=_rounds,
    )


def variants():
    """Every specialization that `forward` can launch."""
    for dtype in DTYPES:
        for axes in (2, 3):
            for width in WIDTHS:
                yield _variant(dtype, axes, width)


def forward(
    query, key, value, positions, cluster_index, cluster_offsets, cluster_size, plan,
    position_weight, position_bias, blank_key, blank_value, scale,
):  # fmt: skip
    """Output (T, H, d) and the softmax's normalization (T, H, 2)."""
    tokens, heads, channels = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    normal = torch.empty((tokens, heads, 2), dtype=torch.float32, device=query.device)
    tiles = plan[:4] or tile_lists(cluster_index, cluster_offsets)
    learned, flags = learned_tensors(
        position_weight, position_bias, blank_key, blank_value, absent=normal
    )
    inputs, strides = zip(*(readable(x) for x in (query, key, value)), strict=True)
    variant = _variant(query.dtype, positions.shape[1], width_of(channels))
    variant.launch(
        (triton.cdiv(tokens, variant.constants["QUERIES"]) * heads,),
        *(*inputs, positions.contiguous(), *tiles, *learned, output, normal),
        *(number for pair in strides for number in pair),
        *(tokens, heads, channels // 8, *flags),
        *(tiles[1].shape[1], cluster_size, *division(cluster_size), scale),
    )
    return output, normal
