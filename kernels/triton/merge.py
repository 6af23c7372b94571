"""Neighborhood merging for GPUs: weights are computed where they are used, never stored.

A *pair* is a center and a token of its neighborhood. Bytes per token where a quarter of the tokens
are centers of six clusters of eight, in units of one token's C features:

* Forward, a program takes centers one after the other and multiplies the 48 tokens of each by their
  48 x 4 weights. The floor is one read of the features and a write of 4 C per center, 2 C. Reads of
  a row by several centers, 12 C in all, should meet in a cache. Centers come in the order of their
  scores; where the features do not fit the L2 cache they are taken in the order of their first
  clusters instead, and those of a program then share rows in L1, too.
* Backward, a program owns clusters and reads the gradient's rows of the centers that list one, 6 C
  in all where the floor is 1 C, beside 2 C for the features and their gradient. Above 64 channels,
  and in float32 and float16, a second kernel reads both again: registers do not hold all sums.
"""

import torch
import triton
import triton.language as tl

from pointformer.kernels.triton.inverse import inverse_lists
from pointformer.kernels.triton.runtime import INTERPRETED, Variant

_CENTERS = 8  # of a list, in the backward pass at a time
_MAX_TOGETHER = 64  # channels up to which one of its kernels computes all gradients
_CACHE = 32 << 20  # bytes of features from which on the order of centers matters
_ENOUGH_PROGRAMS = 2048  # more centers or clusters than these share programs
_FEATURES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = tl.constexpr(INTERPRETED)
# Of products of float32, on any matrix unit, to 24 and to 16 bits.
_FULL = tl.constexpr("ieee" if INTERPRETED else "bf16x6")
_HALF = tl.constexpr("ieee" if INTERPRETED else "bf16x3")


@triton.jit
def _position_features(delta, D: tl.constexpr):
    """phi of differences, a tuple of D: see `pointformer.reference.relative_position`."""
    squared = delta[0] * delta[0] + delta[1] * delta[1]
    if D == 3:
        squared += delta[2] * delta[2]
    apart = squared >= 1.1754944e-38  # the root below takes smaller numbers for zero
    inverse = tl.where(apart, tl.rsqrt(tl.where(apart, squared, 1.0)), 0.0)
    phi = delta
    if D == 2:
        phi += (squared * inverse, delta[1] * inverse, delta[0] * inverse)
    else:
        x, y, z = delta
        phi += (squared * inverse, x * inverse, y * inverse, z * inverse)
    return phi


@triton.jit
def _normalized(phi, weight, bias, eps, F: tl.constexpr, AXIS: tl.constexpr):
    """LayerNorm of the four logits before scale and shift, and 1 / standard deviation.

    `weight`, `bias` point to one number for each place along AXIS, where phi has size 1.
    """
    logits = tl.load(bias) + tl.load(weight) * phi[0]
    for f in tl.static_range(1, F):
        logits += tl.load(weight + f) * phi[f]
    logits -= tl.sum(logits, AXIS, keep_dims=True) * 0.25
    inverse = tl.rsqrt(tl.sum(logits * logits, AXIS, keep_dims=True) * 0.25 + eps)
    return logits * inverse, inverse


@triton.jit
def _distribution(x):
    """Of a standard normal variable: GELU(x) is x times it."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _add_weighted(values, weights, acc):
    """acc (C, N) + values (K, C) transposed @ weights (K, N), float32 weights hardly rounded."""
    if weights.shape[1] == 1:
        acc += tl.sum(values.to(tl.float32) * weights, 0)[:, None]
    elif values.dtype == tl.bfloat16 and not _INTERPRETED:  # the interpreter multiplies bits
        high = weights.to(tl.bfloat16)
        low = (weights - high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(tl.trans(values), low, acc)
        acc = tl.dot(tl.trans(values), high, acc)
    elif values.dtype == tl.float16:
        values = tl.trans(values.to(tl.float32))
        acc = tl.dot(values, weights, acc, input_precision=_HALF)
    else:
        values = tl.trans(values.to(tl.float32))
        acc = tl.dot(values, weights, acc, input_precision=_FULL)
    return acc


@triton.jit
def _products(left, right):
    """left (N, C) @ right (K, C) transposed, in float32."""
    if right.shape[0] == 1:
        product = tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)[:, None]
    elif left.dtype == tl.bfloat16 and _INTERPRETED:
        product = tl.dot(left.to(tl.float32), tl.trans(right.to(tl.float32)))
    else:
        product = tl.dot(left, tl.trans(right), input_precision=_FULL)
    return product


@triton.jit
def scored_merge_fwd_kernel(
    features, scores, positions, centers, offsets, index, order,
    weight, bias, norm_weight, norm_bias, out,
    queries, radius, clusters, units, span, eps,
    D: tl.constexpr, ORDERED: tl.constexpr, LISTED: tl.constexpr,
    STEP: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: `span` centers one by one, CHUNKS times CHUNK channels. LISTED clusters of a
    list are looked up together, their tokens summed STEP at a time."""
    F: tl.constexpr = 2 * D + 1
    channels = units * UNIT
    first_channel = tl.program_id(1) * (CHUNK * CHUNKS)
    m = tl.arange(0, 4)
    first_slot = tl.program_id(0) * span
    for slot in range(first_slot, tl.minimum(first_slot + span, queries)):
        center = slot
        if ORDERED:
            center = tl.load(order + slot).to(tl.int32)
        sums = ()
        for _ in tl.static_range(CHUNKS):
            sums += (tl.zeros((CHUNK, 4), tl.float32),)
        for r0 in range(0, radius, LISTED):
            r = r0 + tl.arange(0, LISTED)  # (LISTED,)
            cluster = tl.load(index + center * radius + r, mask=r < radius, other=-1)
            known = (cluster >= 0) & (cluster < clusters)
            begin = tl.load(offsets + cluster, mask=known, other=0)
            length = tl.load(offsets + cluster + 1, mask=known, other=0) - begin
            stop = tl.cumsum(length, 0)
            start = stop - length
            total = tl.sum(length, 0)
            for n0 in range(0, total, STEP):
                n = n0 + tl.arange(0, STEP)  # (STEP,)
                within = (n[:, None] >= start[None, :]) & (n[:, None] < stop[None, :])
                row = n + tl.sum(tl.where(within, (begin - start)[None, :], 0), 1)
                row = row.to(tl.int64)
                inside = n < total
                delta = ()
                for axis in tl.static_range(D):
                    position = tl.load(positions + row * D + axis, mask=inside, other=0.0)
                    delta += ((position - tl.load(centers + center * D + axis))[:, None],)
                phi = _position_features(delta, D)  # of (STEP, 1)
                normalized, inverse = _normalized(  # noqa: RUF059 - types of `_` would differ
                    phi, (weight + m * F)[None, :], (bias + m)[None, :], eps, F, 1
                )
                x = normalized * tl.load(norm_weight + m)[None, :] + tl.load(norm_bias + m)[None, :]
                score = tl.load(scores + row, mask=inside, other=0.0)
                weights = tl.where(inside[:, None], x * _distribution(x) * score[:, None], 0.0)
                added = ()
                for i in tl.static_range(CHUNKS):
                    channel = first_channel + i * CHUNK + tl.arange(0, CHUNK)
                    values = tl.load(
                        features + row[:, None] * channels + channel[None, :],
                        mask=inside[:, None] & (channel < channels)[None, :],
                        other=0.0,
                    )  # (STEP, CHUNK)
                    added += (_add_weighted(values, weights, sums[i]),)
                sums = added
        for i in tl.static_range(CHUNKS):
            channel = first_channel + i * CHUNK + tl.arange(0, CHUNK)
            tl.store(
                out + (center.to(tl.int64) * 4 + m)[None, :] * channels + channel[:, None],
                sums[i],
                mask=(channel < channels)[:, None],
            )


@triton.jit
def scored_merge_bwd_kernel(
    grad, features, scores, positions, centers, offsets, lists, entries,
    weight, bias, norm_weight, norm_bias, d_features, d_scores, partial,
    radius, clusters, units, span, eps,
    D: tl.constexpr, FEATURES: tl.constexpr, NET: tl.constexpr,
    ROWS: tl.constexpr, CENTERS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One program: `span` clusters one by one, ROWS of a cluster's tokens and CENTERS of the
    centers that list it at a time. With FEATURES, the gradient of CHUNKS times CHUNK channels;
    with NET, that of the scores and a partial sum for the weight net, which needs all channels.

    Numbers of pairs are (CENTERS, 4, ROWS) or have size 1 where they are the same for all four m;
    `line` counts rows of the gradient, four per center.
    """
    F: tl.constexpr = 2 * D + 1
    LINES: tl.constexpr = 4 * CENTERS
    channels = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    first_channel = tl.program_id(1) * (CHUNK * CHUNKS)
    m = tl.arange(0, 4)[None, :, None]
    line = tl.arange(0, LINES)
    sums = ()  # of F columns of the weight, bias, norm_weight, norm_bias
    if NET:
        for _ in tl.static_range(F + 3):
            sums += (tl.zeros((CENTERS, 4), tl.float32),)
    for cluster in range(program * span, tl.minimum(program * span + span, clusters)):
        end = tl.load(offsets + cluster + 1)
        list_begin = tl.load(lists + cluster)
        list_end = tl.load(lists + cluster + 1)
        for row0 in range(tl.load(offsets + cluster), end, ROWS):
            row = (row0 + tl.arange(0, ROWS)).to(tl.int64)  # (ROWS,)
            inside = row < end
            score = tl.load(scores + row, mask=inside, other=0.0)[None, None, :]
            d_score = tl.zeros((CENTERS, 4, ROWS), tl.float32)
            d_values = ()
            if FEATURES:
                for _ in tl.static_range(CHUNKS):
                    d_values += (tl.zeros((CHUNK, ROWS), tl.float32),)
            for e0 in range(list_begin, list_end, CENTERS):
                e = e0 + tl.arange(0, CENTERS)  # (CENTERS,)
                entry = tl.load(entries + e, mask=e < list_end, other=0).to(tl.int32)
                query = (entry // radius).to(tl.int64)
                pair = (e < list_end)[:, None, None] & inside[None, None, :]
                delta = ()
                for axis in tl.static_range(D):
                    own = tl.load(positions + row * D + axis, mask=inside, other=0.0)
                    difference = (
                        own[None, None, :] - tl.load(centers + query * D + axis)[:, None, None]
                    )
                    delta += (tl.where(pair, difference, 0.0),)
                phi = _position_features(delta, D)
                normalized, inverse = _normalized(phi, weight + m * F, bias + m, eps, F, 1)
                scale = tl.load(norm_weight + m)
                x = normalized * scale + tl.load(norm_bias + m)
                below = _distribution(x)

                entry = tl.load(entries + e0 + line // 4, mask=e0 + line // 4 < list_end, other=0)
                owner = (entry.to(tl.int32) // radius).to(tl.int64)
                slopes = grad + (owner * 4 + line % 4)[:, None] * channels  # (LINES, 1)
                listed = (e0 + line // 4 < list_end)[:, None]
                dot = tl.zeros((LINES, ROWS), tl.float32)
                if FEATURES:
                    weights = tl.where(pair, x * below * score, 0.0)
                    weights = tl.reshape(weights, (LINES, ROWS))
                    added = ()
                    for i in tl.static_range(CHUNKS):
                        channel = first_channel + i * CHUNK + tl.arange(0, CHUNK)
                        some = (channel < channels)[None, :]
                        slope = tl.load(slopes + channel[None, :], mask=listed & some, other=0.0)
                        added += (_add_weighted(slope, weights, d_values[i]),)
                        if NET:
                            at = row[:, None] * channels + channel[None, :]
                            mask = inside[:, None] & some
                            value = tl.load(features + at, mask=mask, other=0.0)  # (ROWS, CHUNK)
                            dot += _products(slope, value)
                    d_values = added
                else:
                    for c0 in range(0, channels, CHUNK):
                        channel = c0 + tl.arange(0, CHUNK)
                        some = (channel < channels)[None, :]
                        slope = tl.load(slopes + channel[None, :], mask=listed & some, other=0.0)
                        at = row[:, None] * channels + channel[None, :]
                        value = tl.load(features + at, mask=inside[:, None] & some, other=0.0)
                        dot += _products(slope, value)
                if NET:
                    dot = tl.where(pair, tl.reshape(dot, (CENTERS, 4, ROWS)), 0.0)
                    d_score += dot * x * below
                    density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
                    d_affine = dot * (below + x * density) * score
                    d_logit = d_affine * scale
                    mean = tl.sum(d_logit, 1, keep_dims=True) * 0.25
                    along = tl.sum(d_logit * normalized, 1, keep_dims=True) * 0.25
                    d_logit = (d_logit - mean - normalized * along) * inverse
                    added = ()
                    for f in tl.static_range(F):
                        added += (sums[f] + tl.sum(d_logit * phi[f], 2),)
                    added += (tl.sum(d_logit, 2) + sums[F],)
                    added += (tl.sum(d_affine * normalized, 2) + sums[F + 1],)
                    added += (tl.sum(d_affine, 2) + sums[F + 2],)
                    sums = added
            if NET:
                total = tl.sum(tl.sum(d_score, 1), 0)
                tl.store(d_scores + row, total, mask=inside)
            if FEATURES:
                for i in tl.static_range(CHUNKS):
                    channel = first_channel + i * CHUNK + tl.arange(0, CHUNK)
                    tl.store(
                        d_features + row[None, :] * channels + channel[:, None],
                        d_values[i],
                        mask=inside[None, :] & (channel < channels)[:, None],
                    )
    if NET:
        number = tl.arange(0, 4)
        for i in tl.static_range(F + 3):
            total = tl.sum(sums[i], 0)  # (4,)
            tl.store(partial + (i * 4 + number) * tl.num_programs(0).to(tl.int64) + program, total)


@triton.jit
def sum_partials_kernel(
    partial, d_weight, d_bias, d_norm_weight, d_norm_bias, programs,
    F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one number of the weight net, its partial sums in a fixed order."""
    number = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)  # similar terms, which may cancel
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = number.to(tl.int64) * programs
        terms = tl.load(partial + row + at, mask=at < programs, other=0.0)
        total += terms.to(tl.float64)
    total = tl.sum(total, 0).to(tl.float32)
    column, m = number // 4, number % 4
    if column < F:
        tl.store(d_weight + m * F + column, total)
    elif column == F:
        tl.store(d_bias + m, total)
    elif column == F + 1:
        tl.store(d_norm_weight + m, total)
    else:
        tl.store(d_norm_bias + m, total)


def _forward_rounds(a):
    index = a["index"]
    known = (index >= 0) & (index < a["clusters"])
    tokens = torch.where(known, a["offsets"].diff()[index.where(known, 0)], 0)
    pad = -tokens.shape[1] % a["LISTED"]
    tokens = torch.nn.functional.pad(tokens, (0, pad)).unflatten(1, (-1, a["LISTED"])).sum(2)
    steps = (-(-tokens // a["STEP"])).sum(1).double().mean().item()
    span = a["queries"] / triton.cdiv(a["queries"], a["span"])  # centers per program
    return {"slot": span, "r0": span * tokens.shape[1], "n0": span * steps}


def _backward_rounds(a):
    rows = -(-a["offsets"].diff() // a["ROWS"]).double()
    listed = -(-a["lists"].diff() // a["CENTERS"]).double()
    span = a["clusters"] / triton.cdiv(a["clusters"], a["span"])
    rounds = {"cluster": span, "row0": span * rows.mean().item()}
    rounds["e0"] = span * (rows * listed).mean().item()
    rounds["c0"] = rounds["e0"] * triton.cdiv(a["units"] * a["UNIT"], a["CHUNK"])
    return rounds


def _forward_variant(dtype, dimensions, size, ordered, channels):
    """`size`: tokens of a cluster, about."""
    block = _block(channels, 128 if dtype == torch.float32 else 256)
    warps = 4 if block > 64 else 2
    chunk = min(block, warps * (16 if dtype == torch.float32 else 32))
    f32, i32 = torch.float32, torch.int32
    return Variant(
        scored_merge_fwd_kernel,
        (
            *(dtype, f32, f32, f32, i32, i32, torch.int64 if ordered else i32),
            *(f32, f32, f32, f32, dtype),
            *("i32", "i32", "i32", "i32", "i32", "fp32"),
        ),
        {
            "D": dimensions,
            "ORDERED": ordered,
            "LISTED": 16 if size <= 1 else 8,
            "STEP": 16 if size <= 1 else 32,
            "CHUNK": chunk,
            "CHUNKS": block // chunk,
            "UNIT": _unit(channels),
        },
        num_warps=warps,
        num_stages=1,
        max_registers=128 if dtype == torch.bfloat16 and channels % 16 == 0 else 255,
        rounds=_forward_rounds,
    )


def _backward_variant(dtype, dimensions, size, channels, parts):
    """`size`: tokens of a cluster, about; `parts`: "features", "net" or "both"."""
    block = _block(channels, 64 if dtype == torch.float32 else 128)
    chunk = min(block, 32 if dtype == torch.float32 or size <= 1 else 64)
    if parts == "net" and (dtype == torch.float32 or _unit(channels) == 1):
        chunk = 16
    f32, i32 = torch.float32, torch.int32
    return Variant(
        scored_merge_bwd_kernel,
        (
            *(dtype, dtype, f32, f32, f32, i32, i32, torch.int64),
            *(f32, f32, f32, f32, dtype, f32, f32),
            *("i32", "i32", "i32", "i32", "fp32"),
        ),
        {
            "D": dimensions,
            "FEATURES": parts != "net",
            "NET": parts != "features",
            "ROWS": 1 if size <= 1 else 8 if size <= 8 and dtype != torch.float32 else 16,
            "CENTERS": _CENTERS,
            "CHUNK": chunk,
            "CHUNKS": block // chunk if parts != "net" else 1,
            "UNIT": _unit(channels),
        },
        num_warps=2,
        num_stages=1,
        max_registers=255,
        rounds=_backward_rounds,
    )


def _backward_parts(dtype, channels):
    """What one kernel computes together: all, where it fits the registers."""
    together = dtype == torch.bfloat16 and channels <= _MAX_TOGETHER and _unit(channels) > 1
    return ("both",) if together else ("features", "net")


def _block(channels, most):
    """Channels of a program."""
    if _unit(channels) == 1:
        return 64  # the slow path: one width for all
    return min(max(triton.next_power_of_2(channels), 16), most)


def _blocks(variant, channels):
    """Programs for all channels."""
    return triton.cdiv(channels, variant.constants["CHUNK"] * variant.constants["CHUNKS"])


def _unit(channels):
    """What kernels may assume to divide the number of channels: 16-byte loads need it."""
    return 16 if channels % 16 == 0 else 1


def _sum_variant(width):
    f32 = torch.float32
    constants = {"F": width, "BLOCK": 256}
    return Variant(
        sum_partials_kernel,
        (f32, f32, f32, f32, f32, "i32"),
        constants,
        rounds=lambda a: {"start": triton.cdiv(a["programs"], a["BLOCK"])},
    )


def variants():
    """Every specialization that the launchers below can choose."""
    for dimensions in (2, 3):
        yield _sum_variant(2 * dimensions + 1)
        for dtype in _FEATURES:
            for channels in (1, 16, 32, 64, 128, 256):
                for size, ordered in ((1, False), (8, False), (8, True)):
                    yield _forward_variant(dtype, dimensions, size, ordered, channels)
                for size in (1, 8, 16):
                    for parts in _backward_parts(dtype, channels):
                        yield _backward_variant(dtype, dimensions, size, channels, parts)


def forward(
    features, scores, positions, center_positions, offsets, index,
    weight, bias, norm_weight, norm_bias, eps,
):  # fmt: skip
    """(Q, 4 * C) in the features' dtype, see `scored_merge`; entries out of range are left out."""
    (tokens, channels), dimensions = features.shape, positions.shape[1]
    (queries, radius), clusters = index.shape, offsets.shape[0] - 1
    out = torch.empty(queries, 4 * channels, dtype=features.dtype, device=features.device)
    size = triton.cdiv(tokens, max(clusters, 1))
    # Lists of single tokens belong to queries that are tokens in their own order.
    ordered = size > 1 and radius > 0 and features.numel() * features.element_size() > _CACHE
    order = torch.sort(index[:, 0], stable=True).indices if ordered else index
    variant = _forward_variant(features.dtype, dimensions, size, ordered, channels)
    span = min(max(queries // _ENOUGH_PROGRAMS, 1), 4)
    grid = triton.cdiv(queries, span), _blocks(variant, channels)
    arrays = (features, scores, positions, center_positions, offsets, index, order)
    net = (_all_weights(weight, dimensions), bias, norm_weight, norm_bias)
    sizes = (queries, radius, clusters, channels // variant.constants["UNIT"], span)
    variant.launch(grid, *_contiguous(*arrays, *net), out, *sizes, eps)
    return out


def backward(
    grad, features, scores, positions, center_positions, offsets, index,
    weight, bias, norm_weight, norm_bias, eps,
):  # fmt: skip
    """Gradients of features, scores, weight, bias, norm_weight and norm_bias."""
    (tokens, channels), dimensions = features.shape, positions.shape[1]
    radius, clusters = index.shape[1], offsets.shape[0] - 1
    given = weight.shape[1]
    net = (_all_weights(weight, dimensions), bias, norm_weight, norm_bias)
    if index.numel() == 0 or features.numel() == 0:
        learned = (weight, bias, norm_weight, norm_bias)
        return tuple(torch.zeros_like(x) for x in (features, scores, *learned))
    lists = inverse_lists(index, clusters)
    # Several clusters per program where there are enough: sums cost as much as a cluster.
    span = min(max(clusters // _ENOUGH_PROGRAMS, 1), 8)
    programs = triton.cdiv(clusters, span)
    d_features, d_scores, *d_net = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (features, scores, *net)
    )
    width = 2 * dimensions + 1
    partial = torch.empty(4 * width + 12, programs, device=weight.device, dtype=torch.float32)
    arrays = (grad, features, scores, positions, center_positions, offsets, *lists, *net)
    outputs = (d_features, d_scores, partial)
    size = triton.cdiv(tokens, clusters)
    for parts in _backward_parts(features.dtype, channels):
        variant = _backward_variant(features.dtype, dimensions, size, channels, parts)
        blocks = _blocks(variant, channels) if parts != "net" else 1
        sizes = (radius, clusters, channels // variant.constants["UNIT"], span)
        variant.launch((programs, blocks), *_contiguous(*arrays), *outputs, *sizes, eps)
    _sum_variant(width).launch((4 * width + 12,), partial, *d_net, programs)
    return d_features, d_scores, d_net[0][:, :given].contiguous(), *d_net[1:]


def _all_weights(weight, dimensions):
    """(4, 2 D + 1): zeros where those of distance and direction are absent."""
    return torch.nn.functional.pad(weight, (0, 2 * dimensions + 1 - weight.shape[1]))


def _contiguous(*tensors):
    return [x.contiguous() for x in tensors]
