"""Neighborhood attention on GPUs, the forward pass.

A program, a single warp, computes one or two heads of a tile, consecutive queries, over the union
of their neighborhoods. A key row is then read once per tile instead of once per query, about 6
times instead of 48, and products are matrix products; in turn about half of the logits belong to no
neighborhood and are masked out by the words of the plan. Nothing of the size of the neighborhoods
is written.

A key or value that is not finite can reach the other queries of its tile.
"""

from functools import cache
from itertools import product

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
    fold_keys,
    heads_together,
    learned_dtypes,
    learned_tensors,
    load_bias,
    load_blank,
    load_feature_values,
    load_keys,
    load_points,
    load_rows,
    pair_logits,
    position_features,
    readable,
    relate,
    store_rows,
    width_of,
    with_moments,
)
from pointformer.kernels.triton.attention_plan import make_plan, tile_lists
from pointformer.kernels.triton.runtime import Variant

__all__ = ["backward", "forward", "make_plan", "variants"]

_STRIDES = ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head")
_INTEGERS = (
    *_STRIDES, "tokens", "heads", "octets", "features", "has_bias", "has_blank", "capacity",
    "cluster_size", "reciprocal", "shift", "last_key",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def neighborhood_attention_fwd_kernel(
    query, key, value, query_positions, positions, counts, rows, lengths, members,
    position_weight, position_bias, position_value, blank_key, blank_value, output, normal,
    query_token, query_head, key_token, key_head, value_token, value_head,
    tokens, heads, octets, features, has_bias, has_blank,
    capacity, cluster_size, reciprocal, shift, last_key, scale,
    AXES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, MOMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With MOMENTS, the features' means over each neighborhood, values have a term of them."""
    parts = heads // HEADS
    first_head = tl.program_id(0) % parts * HEADS
    tile = tl.program_id(0) // parts
    lane = tl.arange(0, TILE)
    row = tl.minimum(tile * TILE + lane, tokens - 1)
    x, y, z = load_points(query_positions, row, AXES)
    point = (x[:, None], y[:, None], z[:, None])
    log2_scale = scale * LOG2_E
    own_bit = (1 << lane)[:, None]

    # The softmax starts with the blank token.
    queries, weights, biases, largest, total, out, moments = (), (), (), (), (), (), ()
    for h in tl.static_range(HEADS):
        head = first_head + h
        q = load_rows(query, row, head, query_token, query_head, octets, WIDTH)
        weight, bias = load_bias(position_weight, position_bias, head, features, has_bias, AXES)
        blank = load_blank(blank_key, head, octets, has_blank, WIDTH)[None, :]
        blank_logit = tl.sum(q.to(tl.float32) * blank, 1) * log2_scale
        blank = load_blank(blank_value, head, octets, has_blank, WIDTH)[None, :]
        queries += (q,)
        weights += (weight,)
        biases += (bias,)
        largest += (tl.where(has_blank != 0, blank_logit, LOWEST),)
        total += (tl.zeros((TILE,), tl.float32) + has_blank,)
        out += (tl.zeros((TILE, WIDTH), tl.float32) + blank,)
        if MOMENTS:
            for _ in tl.static_range(2 * AXES + 1):
                moments += (tl.zeros((TILE, 4), tl.float32),)

    count = tl.load(counts + tile)
    first = tile.to(tl.int64) * capacity
    for start in range(0, count * cluster_size, KEYS):
        key_row, key_point, attending = load_keys(
            start, count, rows + first, lengths + first, members + first,
            cluster_size, reciprocal, shift, positions, last_key, AXES, KEYS,
        )  # fmt: skip
        relation = relate(point, key_point, AXES)
        attends = (attending & own_bit) != 0
        new_largest, new_total, new_out, new_moments = (), (), (), ()
        for h in tl.static_range(HEADS):
            head = first_head + h
            k = load_rows(key, key_row, head, key_token, key_head, octets, WIDTH)
            v = load_rows(value, key_row, head, value_token, value_head, octets, WIDTH)
            logits = pair_logits(
                queries[h], k, relation, weights[h], biases[h], log2_scale, AXES, PRECISION
            )
            logits = tl.where(attends, logits, LOWEST)
            # As long as a row has met no key of its own, it counts others: `fade` is 0 at the
            # first.
            peak = tl.maximum(largest[h], tl.max(logits, 1))
            fade = tl.exp2(largest[h] - peak)
            attention = tl.exp2(logits - peak[:, None])
            new_largest += (peak,)
            new_total += (total[h] * fade + tl.sum(attention, 1),)
            new_out += (dot(attention.to(v.dtype), v, out[h] * fade[:, None], PRECISION),)
            if MOMENTS:
                phi = position_features(relation, AXES)
                for f in tl.static_range(2 * AXES + 1):
                    moment = moments[h * (2 * AXES + 1) + f] * fade[:, None]
                    new_moments += (moment + fold_keys(attention * phi[f]),)
        largest, total, out = new_largest, new_total, new_out
        if MOMENTS:
            moments = new_moments

    row = tile * TILE + lane
    exists = row < tokens
    for h in tl.static_range(HEADS):
        head = first_head + h
        empty = (largest[h] <= LOWEST) & (total[h] >= 0)  # not if its logits are NaN
        factor = tl.where(empty, 0.0, 1.0 / total[h])
        result = tl.where(empty[:, None], 0.0, out[h] * factor[:, None])
        if MOMENTS:
            for f in tl.static_range(2 * AXES + 1):
                moment = tl.sum(moments[h * (2 * AXES + 1) + f], 1) * factor
                values = load_feature_values(position_value, head, octets, f, features, WIDTH)
                result += moment[:, None] * values[None, :]
        store_rows(output, result, row, exists, head, heads, octets, WIDTH)
        target = normal + (row.to(tl.int64) * heads + head) * 2
        tl.store(target, largest[h], mask=exists)
        tl.store(target + 1, factor, mask=exists)


def _rounds(a):
    return {"start": (-(-a["counts"] * a["cluster_size"] // a["KEYS"])).double().mean().item()}


@cache
def _variant(dtype, learned, axes, width, heads, moments):
    wide = dtype == torch.float32
    rows = (dtype,) * 3
    return Variant(
        neighborhood_attention_fwd_kernel,
        (
            *rows,
            torch.float32,
            torch.float32,
            *(torch.int32,) * 4,
            *(learned,) * 5,
            dtype,
            torch.float32,
        )
        + ("i32",) * len(_INTEGERS)
        + ("fp32",),
        {
            "AXES": axes,
            "WIDTH": width,
            "TILE": TILE,
            "HEADS": heads,
            "KEYS": 16 if wide else 32,
            "MOMENTS": moments,
            "PRECISION": "bf16x6",
        },
        writes=("output", "normal"),
        tiles={"KEYS": (16, 32, 64), "HEADS": (1,)},
        num_warps=max(1, width // (32 if wide or moments else 64)),  # registers
        max_registers=255,
        rounds=_rounds,
    )


def variants():
    """Every specialization that `forward` can launch."""
    for dtype in DTYPES:
        for axes in (2, 3):
            for width in WIDTHS:
                for learned, moments in product(learned_dtypes(dtype), with_moments(dtype, width)):
                    for heads in heads_together(dtype, width, moments):
                        yield _variant(dtype, learned, axes, width, heads, moments)


def forward(
    query, key, value, query_positions, positions, cluster_index, cluster_offsets, cluster_size,
    plan, position_weight, position_bias, position_value, blank_key, blank_value, scale,
):  # fmt: skip
    """Output (Q, H, d) and the softmax's normalization (Q, H, 2)."""
    tokens, heads, channels = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    normal = torch.empty((tokens, heads, 2), dtype=torch.float32, device=query.device)
    tiles = plan[:4] or tile_lists(cluster_index, cluster_offsets)
    learned, flags = learned_tensors(
        position_weight, position_bias, position_value, blank_key, blank_value, query
    )
    inputs, strides = zip(*(readable(x) for x in (query, key, value)), strict=True)
    width = width_of(channels)
    moments = position_value is not None
    together = max(n for n in heads_together(query.dtype, width, moments) if heads % n == 0)
    _variant(query.dtype, learned[0].dtype, positions.shape[1], width, together, moments).launch(
        lambda constants: (-(-tokens // TILE) * (heads // constants["HEADS"]),),
        *(
            *inputs,
            query_positions.contiguous(),
            positions.contiguous(),
            *tiles,
            *learned,
            output,
            normal,
        ),
        *(number for pair in strides for number in pair),
        *(tokens, heads, channels // 8, *flags),
        *(tiles[1].shape[1], cluster_size, *division(cluster_size), len(key) - 1, scale),
    )
    return output, normal
