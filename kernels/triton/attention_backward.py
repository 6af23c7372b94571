"""Neighborhood attention on GPUs, the backward pass: three kernels, no atomics.

* Per tile of queries and head, as in the forward pass: the mean gradient of a row's logits, the
  gradient of the queries, and the tile's share of those of weights and blank tokens.
* Per group of clusters and head, over the queries that attend to any of them: the gradients of keys
  and values. About half of the pairs are in no neighborhood.
* The tiles' shares, added up in two passes of a fixed order.

The gradients of a row's logits add up to 0. So that of the bias, which all logits but the blank's
have, is minus the sum over the blank's logits, with less rounding; without a blank token it is 0.
"""

from functools import cache
from itertools import product

import torch
import triton
import triton.language as tl

from pointformer.kernels.attention import GROUP_KEYS, TILE, clusters_per_group
from pointformer.kernels.triton.attention_pairs import (
    DTYPES,
    LOG2_E,
    WIDTHS,
    add_features,
    division,
    dot,
    fold,
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
from pointformer.kernels.triton.attention_plan import group_lists, tile_lists
from pointformer.kernels.triton.runtime import Variant

_SPAN = 256  # tiles whose shares one program of the first pass adds up
_BLOCK = {"ROWS": 32, "BLOCK": 32}  # shares added up at a time
_STRIDES = (
    "grad_token", "grad_head", "query_token", "query_head",
    "key_token", "key_head", "value_token", "value_head",
)  # fmt: skip
_QUERY_INTEGERS = (
    *_STRIDES, "tokens", "heads", "octets", "features", "has_bias", "has_blank", "capacity",
    "cluster_size", "reciprocal", "shift", "last_key",
)  # fmt: skip
_LEARNED_INTEGERS = (
    "rows", "heads", "features", "has_bias", "has_blank", "channels",
)  # fmt: skip
_KEY_INTEGERS = (*_STRIDES, "clusters", "heads", "octets", "features", "has_bias", "group")


@triton.jit(do_not_specialize=_QUERY_INTEGERS)
def neighborhood_attention_bwd_query_kernel(
    grad, output, normal, query, key, value, query_positions, positions,
    counts, rows, lengths, members,
    position_weight, position_bias, position_value, blank_key, blank_value,
    grad_query, means, grad_moments, shares,
    grad_token, grad_head, query_token, query_head, key_token, key_head, value_token, value_head,
    tokens, heads, octets, features, has_bias, has_blank,
    capacity, cluster_size, reciprocal, shift, last_key, scale,
    AXES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    MOMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The mean gradient of a row's logits is that of its output, up to the rounding of both.

    But the gradients of the logits add up to 0: what they add up to tells how far the mean was off.
    All but the gradient of the query, which is rounded itself, is corrected by it.
    """
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    lane = tl.arange(0, TILE)
    row = tl.minimum(tile * TILE + lane, tokens - 1)
    q = load_rows(query, row, head, query_token, query_head, octets, WIDTH)
    g = load_rows(grad, row, head, grad_token, grad_head, octets, WIDTH)
    out = load_rows(output, row, head, heads * octets, octets, octets, WIDTH)
    at = row.to(tl.int64) * heads + head
    mean = tl.sum(g.to(tl.float32) * out.to(tl.float32), 1)
    largest = tl.load(normal + at * 2)
    factor = tl.load(normal + at * 2 + 1)
    scaled_mean = (mean * factor)[:, None]
    x, y, z = load_points(query_positions, row, AXES)
    point = (x[:, None], y[:, None], z[:, None])
    weights, bias = load_bias(position_weight, position_bias, head, features, has_bias, AXES)
    log2_scale = scale * LOG2_E
    own_bit = (1 << lane)[:, None]
    d_query = tl.zeros((TILE, WIDTH), tl.float32)
    excess = tl.zeros((TILE, 4), tl.float32)  # of the mean gradient over its estimate
    sums = ()  # of the logits' gradients times each feature
    moments = ()  # of the attention, times each feature
    d_moments = ()
    for f in tl.static_range(2 * AXES + 1):
        sums += (tl.zeros((8, 4), tl.float32),)
        moments += (excess,)
        if MOMENTS:
            values = load_feature_values(position_value, head, octets, f, features, WIDTH)
            d_moments += (tl.sum(g.to(tl.float32) * values[None, :], 1)[:, None],)

    count = tl.load(counts + tile)
    first = tile.to(tl.int64) * capacity
    for start in range(0, count * cluster_size, KEYS):
        key_row, key_point, attending = load_keys(
            start, count, rows + first, lengths + first, members + first,
            cluster_size, reciprocal, shift, positions, last_key, AXES, KEYS,
        )  # fmt: skip
        k = load_rows(key, key_row, head, key_token, key_head, octets, WIDTH)
        v = load_rows(value, key_row, head, value_token, value_head, octets, WIDTH)
        relation = relate(point, key_point, AXES)
        logits = pair_logits(q, k, relation, weights, bias, log2_scale, AXES, PRECISION)
        attention = tl.exp2(logits - largest[:, None])
        attention = tl.where((attending & own_bit) != 0, attention, 0.0)
        d_attention = dot(g, tl.trans(v), tl.zeros((TILE, KEYS), tl.float32), PRECISION)
        if MOMENTS:
            d_attention = add_features(d_attention, relation, d_moments, AXES)
        d_logits = attention * (d_attention * factor[:, None] - scaled_mean)
        d_query = dot(d_logits.to(k.dtype), k, d_query, PRECISION)
        excess += fold_keys(d_logits)
        phi = position_features(relation, AXES)
        new_sums, new_moments = (), ()
        for f in tl.static_range(2 * AXES + 1):
            new_moments += (moments[f] + fold_keys(attention * phi[f]),)
        for f in tl.static_range(2 * AXES + 1):
            new_sums += (sums[f] + fold(fold_keys(d_logits * phi[f])),)
        sums, moments = new_sums, new_moments

    blank = load_blank(blank_key, head, octets, has_blank, WIDTH)[None, :]
    blank_out = load_blank(blank_value, head, octets, has_blank, WIDTH)[None, :]
    blank_logit = tl.sum(q.to(tl.float32) * blank, 1) * log2_scale
    exists = tile * TILE + lane < tokens
    attention = tl.exp2(blank_logit - largest) * factor
    attention = tl.where(exists & (has_blank != 0), attention, 0.0)
    d_attention = tl.sum(g.to(tl.float32) * blank_out, 1)
    missing = tl.sum(excess, 1) + attention * (d_attention - mean)
    mean += missing
    d_logit = attention * (d_attention - mean)
    tl.store(means + at, mean, mask=exists)
    d_query = (d_query + d_logit[:, None] * blank) * scale
    store_rows(grad_query, d_query, row, exists, head, heads, octets, WIDTH)

    channels = octets * 8
    channel = tl.arange(0, WIDTH)
    values_size = MOMENTS * features * channels
    columns = features + values_size + has_blank * (1 + 2 * channels)
    shares += tl.program_id(0).to(tl.int64) * columns
    for f in tl.static_range(2 * AXES + 1):
        total = sums[f] - fold((missing * factor)[:, None] * moments[f])
        tl.store(shares + f, tl.sum(total), mask=f < features)
        if MOMENTS:
            tl.store(
                grad_moments + (at * (2 * AXES + 1) + f)[:, None],
                d_moments[f],
                mask=exists[:, None],
            )
            moment = (tl.sum(moments[f], 1) * factor)[:, None]
            d_values = tl.sum(moment * g.to(tl.float32), 0)
            stored = channel < tl.where(f < features, channels, 0)
            tl.store(shares + features + channel * features + f, d_values, mask=stored)
    shares += values_size
    tl.store(shares + features, -tl.sum(d_logit, 0), mask=has_blank != 0)
    stored = channel < channels * has_blank
    d_blank = tl.sum(d_logit[:, None] * q.to(tl.float32), 0) * scale
    tl.store(shares + features + 1 + channel, d_blank, mask=stored)
    d_blank = tl.sum(attention[:, None] * g.to(tl.float32), 0)
    tl.store(shares + features + 1 + channels + channel, d_blank, mask=stored)


@triton.jit(do_not_specialize=_KEY_INTEGERS)
def neighborhood_attention_bwd_key_kernel(
    grad, normal, means, grad_moments, query, key, value, query_positions, positions,
    cluster_offsets, begins, counts, queries, members,
    position_weight, position_bias, grad_key, grad_value,
    grad_token, grad_head, query_token, query_head, key_token, key_head, value_token, value_head,
    clusters, heads, octets, features, has_bias, group, scale,
    AXES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    QUERIES: tl.constexpr, MOMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS of the keys of one group of clusters, which are consecutive rows."""
    parts = heads // HEADS
    first_head = tl.program_id(0) % parts * HEADS
    index = tl.program_id(0) // parts
    first = index * group
    row = tl.load(cluster_offsets + first) + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    last = tl.load(cluster_offsets + tl.minimum(first + group, clusters)) - 1
    exists = row <= last
    row = tl.maximum(tl.minimum(row, last), 0)
    cluster = tl.zeros((ROWS,), tl.int32)  # within the group
    for following in range(1, group):
        end = tl.load(cluster_offsets + tl.minimum(first + following, clusters))
        cluster += (row >= end).to(tl.int32)
    own_bit = tl.where(exists, 1 << cluster, 0)[:, None]
    x, y, z = load_points(positions, row, AXES)
    point = (x[:, None], y[:, None], z[:, None])
    log2_scale = scale * LOG2_E
    keys, values, weights, biases, d_key, d_value = (), (), (), (), (), ()
    for h in tl.static_range(HEADS):
        head = first_head + h
        keys += (load_rows(key, row, head, key_token, key_head, octets, WIDTH),)
        values += (load_rows(value, row, head, value_token, value_head, octets, WIDTH),)
        weight, bias = load_bias(position_weight, position_bias, head, features, has_bias, AXES)
        weights += (weight,)
        biases += (bias,)
        d_key += (tl.zeros((ROWS, WIDTH), tl.float32),)
        d_value += (tl.zeros((ROWS, WIDTH), tl.float32),)

    queries += tl.load(begins + index)
    members += tl.load(begins + index)
    count = tl.load(counts + index)
    for start in range(0, count, QUERIES):
        slot = start + tl.arange(0, QUERIES)
        listed = slot < count
        slot = tl.minimum(slot, count - 1)
        query_row = tl.load(queries + slot)
        attended = tl.where(listed, tl.load(members + slot), 0)
        qx, qy, qz = load_points(query_positions, query_row, AXES)
        relation = relate((qx[None, :], qy[None, :], qz[None, :]), point, AXES)
        attends = (attended[None, :] & own_bit) != 0
        new_key, new_value = (), ()
        for h in tl.static_range(HEADS):
            head = first_head + h
            q = load_rows(query, query_row, head, query_token, query_head, octets, WIDTH)
            g = load_rows(grad, query_row, head, grad_token, grad_head, octets, WIDTH)
            at = query_row.to(tl.int64) * heads + head
            largest = tl.load(normal + at * 2)[None, :]
            factor = tl.load(normal + at * 2 + 1)[None, :]
            mean = tl.load(means + at)[None, :]
            logits = pair_logits(
                keys[h], q, relation, weights[h], biases[h], log2_scale, AXES, PRECISION
            )
            attention = tl.where(attends, tl.exp2(logits - largest) * factor, 0.0)
            new_value += (dot(attention.to(g.dtype), g, d_value[h], PRECISION),)
            d_attention = dot(
                values[h], tl.trans(g), tl.zeros((ROWS, QUERIES), tl.float32), PRECISION
            )
            if MOMENTS:
                d_moments = ()
                for f in tl.static_range(2 * AXES + 1):
                    d_moments += (tl.load(grad_moments + at * (2 * AXES + 1) + f)[None, :],)
                d_attention = add_features(d_attention, relation, d_moments, AXES)
            d_logits = attention * (d_attention - mean)
            new_key += (dot(d_logits.to(q.dtype), q, d_key[h], PRECISION),)
        d_key, d_value = new_key, new_value

    for h in tl.static_range(HEADS):
        head = first_head + h
        store_rows(grad_key, d_key[h] * scale, row, exists, head, heads, octets, WIDTH)
        store_rows(grad_value, d_value[h], row, exists, head, heads, octets, WIDTH)


@triton.jit
def _sum_rows(source, column, begin, end, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of some columns (BLOCK,) of a (rows, columns) array over the rows `begin` to `end`."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(begin, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        mask = (row < end) & (column < columns)[None, :]
        offset = row.to(tl.int64) * columns + column[None, :]
        total += tl.load(source + offset, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=("rows", "columns"))
def sum_shares_kernel(
    source, target, rows, columns, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum every SPAN consecutive rows of a (rows, columns) array."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    end = tl.minimum((part + 1) * SPAN, rows)
    total = _sum_rows(source, column, part * SPAN, end, columns, ROWS, BLOCK)
    tl.store(target + part.to(tl.int64) * columns + column, total, mask=column < columns)


@triton.jit(do_not_specialize=_LEARNED_INTEGERS)
def learned_gradients_kernel(
    shares, grad_weight, grad_bias, grad_value, grad_blank_key, grad_blank_value,
    rows, heads, features, has_bias, has_blank, channels,
    MOMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum (rows, heads, columns) over the rows, and deal the columns out to the gradients."""
    values = MOMENTS * features * channels
    width = features + values + has_blank * (1 + 2 * channels)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stored = column < heads * width
    total = _sum_rows(shares, column, 0, rows, heads * width, ROWS, BLOCK)
    head = column // width
    column = column % width
    tl.store(grad_weight + head * features + column, total, mask=stored & (column < features))
    column -= features
    if MOMENTS:
        in_values = stored & (column >= 0) & (column < values)
        tl.store(grad_value + head * values + column, total, mask=in_values)
        column -= values
    tl.store(grad_bias + head, total, mask=stored & (column >= 0) & (column < has_bias))
    column -= 1
    in_key = stored & (column >= 0) & (column < channels)
    tl.store(grad_blank_key + head * channels + column, total, mask=in_key)
    column -= channels
    tl.store(grad_blank_value + head * channels + column, total, mask=stored & (column >= 0))


def _query_rounds(a):
    return {"start": (-(-a["counts"] * a["cluster_size"] // a["KEYS"])).double().mean().item()}


def _key_rounds(a):
    start = (-(-a["counts"] // a["QUERIES"])).double().mean().item()
    return {"following": a["group"] - 1, "start": start}


@cache
def _query_variant(dtype, learned, axes, width, moments):
    wide = dtype == torch.float32
    warps = max(1 + moments, _warps(dtype, width, moments))
    return Variant(
        neighborhood_attention_bwd_query_kernel,
        (dtype, dtype, torch.float32, *(dtype,) * 3, *(torch.float32,) * 2, *(torch.int32,) * 4)
        + (*(learned,) * 5, dtype, *(torch.float32,) * 3)
        + ("i32",) * len(_QUERY_INTEGERS)
        + ("fp32",),
        {
            "AXES": axes,
            "WIDTH": width,
            "TILE": TILE,
            # 3-D has two features more: with 32 keys they spill on sm_100, as moments do.
            "KEYS": 16 if wide or moments or (axes == 3 and width > 16) else 32,
            "MOMENTS": moments,
            "PRECISION": "ieee" if width > 32 or (moments and width == 16) else "bf16x6",
        },
        writes=("grad_query", "means", "grad_moments", "shares"),
        tiles={"KEYS": (16, 32)},
        num_warps=warps,
        num_stages=1 if wide and width == 16 else 2,  # registers
        amd_warps=min(4, warps),
        max_registers=255,
        rounds=_query_rounds,
    )


@cache
def _key_variant(dtype, learned, axes, width, heads, moments):
    wide = dtype == torch.float32
    return Variant(
        neighborhood_attention_bwd_key_kernel,
        (dtype, *(torch.float32,) * 3, *(dtype,) * 3, torch.float32, torch.float32)
        + (*(torch.int32,) * 5, learned, learned, dtype, dtype)
        + ("i32",) * len(_KEY_INTEGERS)
        + ("fp32",),
        {
            "AXES": axes,
            "WIDTH": width,
            "ROWS": GROUP_KEYS,
            "HEADS": heads,
            "QUERIES": 16 if wide or width > 64 else 32,
            "MOMENTS": moments,
            "PRECISION": "ieee" if width > 64 else "bf16x6",
        },
        writes=("grad_key", "grad_value"),
        tiles={"QUERIES": (16, 32), "HEADS": (1,)},
        num_warps=_warps(dtype, width, moments),
        max_registers=255,
        rounds=_key_rounds,
    )


def _warps(dtype, width, moments):
    """As many as the registers need: float32 has no matrix product of its own."""
    return max(1, width // (16 if moments or dtype == torch.float32 else 32))


_SUM = Variant(
    sum_shares_kernel,
    (torch.float32, torch.float32, "i32", "i32"),
    {"SPAN": _SPAN, **_BLOCK},
    writes=("target",),
    tiles={"ROWS": (16, 64)},
    rounds=lambda a: {"start": min(a["SPAN"], a["rows"]) / a["ROWS"]},
)


@cache
def _learned_variant(dtype, moments):
    return Variant(
        learned_gradients_kernel,
        (torch.float32, *(dtype,) * 5) + ("i32",) * len(_LEARNED_INTEGERS),
        {"MOMENTS": moments, **_BLOCK},
        writes=("grad_weight", "grad_bias", "grad_value", "grad_blank_key", "grad_blank_value"),
        tiles={"ROWS": (16, 64)},
        rounds=lambda a: {"start": triton.cdiv(a["rows"], a["ROWS"])},
    )


def variants():
    """Every specialization that `backward` can launch."""
    yield _SUM
    for dtype in DTYPES:
        for moments in (False, True):
            yield _learned_variant(dtype, moments)
        for axes in (2, 3):
            for width in WIDTHS:
                for learned, moments in product(learned_dtypes(dtype), with_moments(dtype, width)):
                    yield _query_variant(dtype, learned, axes, width, moments)
                    for heads in heads_together(dtype, width, moments):
                        yield _key_variant(dtype, learned, axes, width, heads, moments)


def backward(
    grad, output, normal,
    query, key, value, query_positions, positions, cluster_index, cluster_offsets, cluster_size,
    plan, position_weight, position_bias, position_value, blank_key, blank_value, scale,
):  # fmt: skip
    """Gradients of query, key, value and what is learned; empty ones for what is `None`."""
    (tokens, heads, channels), axes = query.shape, positions.shape[1]
    device, clusters = query.device, cluster_offsets.shape[0] - 1
    tiles = plan[:4] or tile_lists(cluster_index, cluster_offsets)
    groups = plan[4:] or group_lists(cluster_index, clusters, cluster_size)
    given = (position_weight, position_bias, position_value, blank_key, blank_value)
    learned, flags = learned_tensors(*given, query)
    features, _, has_blank = flags
    moments = position_value is not None
    inputs, strides = zip(*(readable(x) for x in (grad, query, key, value)), strict=True)
    grad, *inputs = inputs
    strides = [number for pair in strides for number in pair]
    points = query_positions.contiguous(), positions.contiguous()
    width = width_of(channels)

    d_rows = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in (query, key, value)]
    means = torch.empty(tokens, heads, device=device, dtype=torch.float32)
    d_moments = means.new_empty(tokens, heads, 2 * axes + 1) if moments else means.new_empty(0)
    columns = heads * (features * (1 + moments * channels) + has_blank * (1 + 2 * channels))
    variant = _query_variant(query.dtype, learned[0].dtype, axes, width, moments)
    programs = -(-tokens // TILE)
    shares = torch.empty(programs, columns, device=device, dtype=torch.float32)
    variant.launch(
        (programs * heads,),
        *(grad, output.contiguous(), normal, *inputs, *points, *tiles, *learned),
        *(d_rows[0], means, d_moments, shares),
        *(*strides, tokens, heads, channels // 8, *flags),
        *(tiles[1].shape[1], cluster_size, *division(cluster_size), len(key) - 1, scale),
    )
    group = clusters_per_group(cluster_size)
    together = max(n for n in heads_together(query.dtype, width, moments) if heads % n == 0)
    _key_variant(query.dtype, learned[0].dtype, axes, width, together, moments).launch(
        lambda constants: (
            groups[1].shape[0] * (heads // constants["HEADS"]),
            -(-group * cluster_size // GROUP_KEYS),
        ),
        *(
            grad,
            normal,
            means,
            d_moments,
            *inputs,
            *points,
            cluster_offsets.contiguous(),
            *groups,
            *learned[:2],
        ),
        *(*d_rows[1:], *strides, clusters, heads, channels // 8, *flags[:2], group, scale),
    )
    return *d_rows, *learned_gradients(shares, given, heads, channels)


def learned_gradients(shares, given, heads, channels):
    """Sum the shares (programs, columns) and part them: one tensor like each of the given."""
    device, columns = shares.device, shares.shape[1]
    dtypes = {x.dtype for x in given if x is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= set(DTYPES) else torch.float32
    gradients = [
        torch.empty(0 if x is None else x.shape, dtype=dtype, device=device) for x in given
    ]
    weight, bias, values, blank_key, _ = given
    if blank_key is None:
        gradients[1].zero_()
    blocks = -(-columns // _BLOCK["BLOCK"])
    if len(shares) > _SPAN:
        sums = torch.empty(
            triton.cdiv(len(shares), _SPAN), columns, device=device, dtype=torch.float32
        )
        _SUM.launch((blocks, len(sums)), shares, sums, len(shares), columns)
        shares = sums
    features = 0 if weight is None else weight.shape[1]
    _learned_variant(dtype, values is not None).launch(
        (blocks,),
        shares,
        *gradients,
        len(shares),
        heads,
        features,
        *(int(x is not None) for x in (bias, blank_key)),
        channels,
    )
    return [
        total.to(torch.float32 if x is None else x.dtype)
        for total, x in zip(gradients, given, strict=True)
    ]
