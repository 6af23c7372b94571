"""Neighborhood merging for GPUs: weights are computed where they are used, never stored.

A *pair* is a center and a token of its neighborhood. Bytes per token where a quarter of the tokens
are centers of six clusters of eight, in units of one token's C features:

* Forward, a program, a single warp, takes two centers at a time and 16 tokens of each: a thread
  computes the four weights of a pair, which a matrix product then applies to the features. (Of
  another number of weights each is computed by a thread of its own, one center at a time.) The
  floor is one read of the features and a write of 4 C per center, 2 C. Reads of a row by several
  centers, 12 C in all, should meet in a cache. Centers come in the order of their scores; where the
  features do not fit the L2 cache they are taken in the order of their first clusters instead, and
  those of a program then share rows in L1, too.
* Backward, a program owns clusters and reads the gradient's rows of the centers that list one, 6 C
  in all where the floor is 1 C, beside 2 C for the features and their gradient. Above 64 channels,
  and in float32 and float16, a second kernel reads both again: registers do not hold all sums.
"""

import itertools
from functools import cache

import torch
import triton
import triton.language as tl

from pointformer.kernels.merge import MOST_GPU_WEIGHTS
from pointformer.kernels.triton.attention_pairs import DTYPES, division, learned_dtypes
from pointformer.kernels.triton.inverse import inverse_lists
from pointformer.kernels.triton.runtime import INTERPRETED, Variant

_MIDS = (4, 8, 16, MOST_GPU_WEIGHTS)  # four, and what other numbers are filled up to
_MAX_TOGETHER = 64  # channels up to which one of its kernels computes all gradients
_WIDEST = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 128}  # of its forward kernel
_CACHE = 32 << 20  # bytes of features from which on the order of centers matters
_ENOUGH_PROGRAMS = 2048  # more centers or clusters than these share programs
_INTERPRETED = tl.constexpr(INTERPRETED)
_BACKWARD_INTEGERS = (
    "clusters", "reciprocal", "shift", "columns", "mid", "units", "span",
)  # fmt: skip
_FORWARD_INTEGERS = (
    "tokens", "queries", "per_query", "clusters", "cluster_size", "reciprocal", "shift", "columns",
    "mid", "units", "span",
)  # fmt: skip
# Of products of float32, on any matrix unit, to 24 and to 16 bits.
_FULL = tl.constexpr("ieee" if INTERPRETED else "bf16x6")
_HALF = tl.constexpr("ieee" if INTERPRETED else "bf16x3")


@triton.jit
def _load_points(positions, row, D: tl.constexpr):
    """Coordinates of rows (N,), a tuple of D."""
    point = ()
    for axis in tl.static_range(D):
        point += (tl.load(positions + row * D + axis),)
    return point


@triton.jit
def _differences(a, b, D: tl.constexpr):
    delta = ()
    for axis in tl.static_range(D):
        delta += (a[axis] - b[axis],)
    return delta


@triton.jit
def _add_products(left, right, acc):
    """acc + left (N, C) @ right (K, C) transposed, in float32."""
    if left.dtype == tl.bfloat16 and _INTERPRETED:  # it multiplies the bits
        acc = tl.dot(left.to(tl.float32), tl.trans(right.to(tl.float32)), acc)
    else:
        acc = tl.dot(left, tl.trans(right), acc, input_precision=_FULL)
    return acc


@triton.jit
def _position_features(delta, D: tl.constexpr):
    """phi of differences, a tuple of D: see `pointformer.reference.relative_position`."""
    squared = delta[0] * delta[0] + delta[1] * delta[1]
    if D == 3:
        squared += delta[2] * delta[2]
    least = 1.1754944e-38  # roots take smaller numbers for zero
    inverse = tl.where(squared >= least, tl.rsqrt(tl.maximum(squared, least)), 0.0)
    phi = delta
    if D == 2:
        phi += (squared * inverse, delta[1] * inverse, delta[0] * inverse)
    else:
        x, y, z = delta
        phi += (squared * inverse, x * inverse, y * inverse, z * inverse)
    return phi


@triton.jit
def _load_net(
    weight, bias, norm_weight, norm_bias, columns, mid, D: tl.constexpr, MID: tl.constexpr
):
    """The weight net's numbers as a tuple. Columns that the weight lacks are zero, and means are
    taken off them, as LayerNorm will of logits.

    Four weights: 2 D + 1 columns of the weight and the bias, three numbers each, for a fourth is
    minus the others; then four each of norm_weight and norm_bias. Others: as many rows (1, MID), of
    which the first `mid` numbers count and the others are zero.
    """
    net = ()
    if MID == 4:
        for f in tl.static_range(2 * D + 2):
            column = ()
            for m in tl.static_range(4):
                if f == 2 * D + 1:
                    number = tl.load(bias + m)
                else:
                    number = tl.load(weight + m * columns + f, mask=f < columns, other=0.0)
                column += (number.to(tl.float32),)
            mean = (column[0] + column[1] + (column[2] + column[3])) * 0.25
            net += (column[0] - mean, column[1] - mean, column[2] - mean)
        for m in tl.static_range(4):
            net += (tl.load(norm_weight + m).to(tl.float32),)
        for m in tl.static_range(4):
            net += (tl.load(norm_bias + m).to(tl.float32),)
    else:
        m = tl.arange(0, MID)[None, :]
        known = m < mid
        for f in tl.static_range(2 * D + 2):
            if f == 2 * D + 1:
                row = tl.load(bias + m, mask=known, other=0.0).to(tl.float32)
            else:
                here = known & (f + m * 0 < columns)
                row = tl.load(weight + m * columns + f, mask=here, other=0.0).to(tl.float32)
            net += (tl.where(known, row - tl.sum(row, 1)[:, None] / mid, 0.0),)
        net += (tl.load(norm_weight + m, mask=known, other=0.0).to(tl.float32),)
        net += (tl.load(norm_bias + m, mask=known, other=0.0).to(tl.float32),)
    return net


@triton.jit
def _normalized(net, phi, eps, mid, D: tl.constexpr, MID: tl.constexpr):
    """LayerNorm of the logits before scale and shift, four (N,) or a tuple of one (N, MID), and
    1 / standard deviation."""
    F: tl.constexpr = 2 * D + 1
    if MID == 4:
        logits = ()
        for m in tl.static_range(3):
            logit = net[3 * F + m] + net[m] * phi[0]
            for f in tl.static_range(1, F):
                logit += net[3 * f + m] * phi[f]
            logits += (logit,)
        a, b, c = logits
        d = -(a + b + c)
        inverse = tl.rsqrt((a * a + b * b + (c * c + d * d)) * 0.25 + eps)
        normalized = (a * inverse, b * inverse, c * inverse, d * inverse)
    else:
        logit = net[F] + net[0] * phi[0][:, None]
        for f in tl.static_range(1, F):
            logit += net[f] * phi[f][:, None]
        inverse = tl.rsqrt(tl.sum(logit * logit, 1) / mid + eps)
        normalized = (logit * inverse[:, None],)
    return normalized, inverse


@triton.jit
def _beside(numbers, MID: tl.constexpr):
    """A number of each pair, (N,), as it meets each of `_normalized`."""
    if MID != 4:
        numbers = numbers[:, None]
    return numbers


@triton.jit
def _together(numbers, MID: tl.constexpr):
    """What `_normalized` gives as one (N, MID)."""
    if MID == 4:
        a, b, c, d = numbers
        matrix = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))
    else:
        matrix = numbers[0]
    return matrix


@triton.jit
def _apart(matrix, MID: tl.constexpr):
    """The way back."""
    if MID == 4:
        even, odd = tl.split(tl.reshape(matrix, (matrix.shape[0], 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        numbers = (a, b, c, d)
    else:
        numbers = (matrix,)
    return numbers


@triton.jit
def _scale(net, m: tl.constexpr, D: tl.constexpr, MID: tl.constexpr):
    return net[6 * D + 6 + m] if MID == 4 else net[2 * D + 2]


@triton.jit
def _affine(net, normalized, m: tl.constexpr, D: tl.constexpr, MID: tl.constexpr):
    """After scale and shift."""
    shift = net[6 * D + 10 + m] if MID == 4 else net[2 * D + 3]
    return normalized[m] * _scale(net, m, D, MID) + shift


@triton.jit
def _distribution(x):
    """Of a standard normal variable, absolute error 1e-7, and its density times sqrt(2 pi): GELU(x)
    is x times the former.

    Abramowitz and Stegun 7.1.26: 1 - erf(y) = t * P(t) * exp(-y**2), t = 1 / (1 + 0.3275911 y).
    """
    root = tl.rsqrt(tl.abs(x) * 0.23164189 + 1.0)  # cheaper than a division
    t = root * root
    bell = tl.exp2(x * x * -0.7213475204444817)
    p = (0.5307027145 * t - 0.7265760135) * t + 0.7107068705
    p = (p * t - 0.142248368) * t + 0.127414796
    tail = p * t * bell
    return tl.where(x < 0, tail, 1.0 - tail), bell


@triton.jit
def _no_sums(B: tl.constexpr, C: tl.constexpr, N: tl.constexpr, dtype: tl.constexpr):
    """Zeros for `_add_weighted` to begin with, where values are of that dtype."""
    parts: tl.constexpr = 2 if dtype == tl.bfloat16 and not _INTERPRETED else 1
    return tl.zeros((B, C, N * parts), tl.float32)


@triton.jit
def _add_weighted(values, weights, acc):
    """acc + values (B, K, C) transposed @ weights (B, K, N), float32 weights hardly rounded: of
    bfloat16 they are two numbers, which `_sums` adds up."""
    values = tl.permute(values, (0, 2, 1))
    if acc.shape[2] > weights.shape[2]:
        high = weights.to(tl.bfloat16)
        low = (weights - high.to(tl.float32)).to(tl.bfloat16)
        both = tl.join(high, low)
        acc = tl.dot(values, tl.reshape(both, (acc.shape[0], both.shape[1], acc.shape[2])), acc)
    elif values.dtype == tl.float16:
        acc = tl.dot(values.to(tl.float32), weights, acc, input_precision=_HALF)
    else:
        acc = tl.dot(values.to(tl.float32), weights, acc, input_precision=_FULL)
    return acc


@triton.jit
def _sums(acc, N: tl.constexpr):
    """What `_add_weighted` added up: (B, C, N)."""
    return tl.sum(tl.reshape(acc, (acc.shape[0], acc.shape[1], N, acc.shape[2] // N)), 3)


@triton.jit(do_not_specialize=_FORWARD_INTEGERS)
def scored_merge_fwd_kernel(
    features, scores, positions, centers, offsets, index, order,
    weight, bias, norm_weight, norm_bias, out,
    tokens, queries, per_query, clusters, cluster_size, reciprocal: tl.int64, shift, columns, mid,
    units, span, eps,
    D: tl.constexpr, MID: tl.constexpr, ORDERED: tl.constexpr,
    CENTERS: tl.constexpr, PLACES: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: `span` times CENTERS centers and CHUNK channels, by PLACES of each center's
    tokens, which are counted as if every listed cluster had `cluster_size` of them.

    There are MID weights where that is 4, else `mid`, and MID is the next power of two.
    """
    KINDS: tl.constexpr = 4 if MID == 4 else 1  # of weights, see _normalized
    lines = 4 if MID == 4 else mid
    channels = units * UNIT
    channel = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    net = _load_net(weight, bias, norm_weight, norm_bias, columns, mid, D, MID)
    pair = tl.arange(0, CENTERS * PLACES)
    m = tl.arange(0, MID)
    first = tl.program_id(0) * span
    for group in range(first, tl.minimum(first + span, tl.cdiv(queries, CENTERS))):
        slot = tl.minimum(group * CENTERS + pair // PLACES, queries - 1)
        center = tl.load(order + slot).to(tl.int64) if ORDERED else slot.to(tl.int64)
        origin = _load_points(centers, center, D)
        sums = _no_sums(CENTERS, CHUNK, MID, features.dtype.element_ty)
        for n0 in range(0, per_query * cluster_size, PLACES):
            n = n0 + pair % PLACES
            r = ((n.to(tl.int64) * reciprocal) >> shift).to(tl.int32)  # n // cluster_size
            cluster = tl.load(index + center * per_query + tl.minimum(r, per_query - 1))
            listed = (r < per_query) & (cluster >= 0) & (cluster < clusters)
            cluster = tl.minimum(tl.maximum(cluster, 0), clusters - 1)
            row = tl.load(offsets + cluster) + (n - r * cluster_size)
            exists = listed & (row < tl.load(offsets + cluster + 1))
            row = tl.minimum(row, tokens - 1).to(tl.int64)
            delta = _differences(_load_points(positions, row, D), origin, D)
            normalized = _normalized(net, _position_features(delta, D), eps, mid, D, MID)[0]
            score = tl.where(exists, tl.load(scores + row), 0.0)
            weights = ()
            for i in tl.static_range(KINDS):
                x = _affine(net, normalized, i, D, MID)
                weight_score = x * _distribution(x)[0] * _beside(score, MID)
                weights += (tl.where(_beside(exists, MID), weight_score, 0.0),)
            values = tl.load(
                features + row[:, None] * channels + channel[None, :],
                mask=exists[:, None] & (channel < channels)[None, :],
                other=0.0,
            )
            sums = _add_weighted(
                tl.reshape(values, (CENTERS, PLACES, CHUNK)),
                tl.reshape(_together(weights, MID), (CENTERS, PLACES, MID)),
                sums,
            )
        slot = group * CENTERS + tl.arange(0, CENTERS)
        exists = (slot < queries)[:, None, None] & (channel < channels)[None, :, None]
        slot = tl.minimum(slot, queries - 1)
        center = tl.load(order + slot).to(tl.int64) if ORDERED else slot.to(tl.int64)
        if MID != 4:
            exists &= (m < mid)[None, None, :]
        line = (center[:, None] * lines + m[None, :])[:, None, :]
        tl.store(out + line * channels + channel[None, :, None], _sums(sums, MID), mask=exists)


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def scored_merge_bwd_kernel(
    grad, features, scores, positions, centers, offsets, lists, entries,
    weight, bias, norm_weight, norm_bias, d_features, d_scores, partial,
    clusters, reciprocal: tl.int64, shift, columns, mid, units, span, eps,
    D: tl.constexpr, MID: tl.constexpr, FEATURES: tl.constexpr, NET: tl.constexpr,
    ROWS: tl.constexpr, CENTERS: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: `span` clusters one by one, ROWS of a cluster's tokens and CENTERS of the
    centers that list it at a time. With FEATURES, the gradient of CHUNK channels; with NET, that
    of the scores and a partial sum for the weight net, which needs all channels.

    A token or center that is missing is computed as the last one, and counts nothing; so is a line
    of a weight that is missing, see the forward kernel.
    """
    F: tl.constexpr = 2 * D + 1
    KINDS: tl.constexpr = 4 if MID == 4 else 1  # of weights, see _normalized
    NUMBERS: tl.constexpr = 3 if MID == 4 else 1  # that are summed of each column
    LINES: tl.constexpr = MID * CENTERS  # of the gradient
    weights_of = 4 if MID == 4 else mid
    channels = units * UNIT
    program = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * CHUNK + tl.arange(0, CHUNK))[None, :]
    net = _load_net(weight, bias, norm_weight, norm_bias, columns, mid, D, MID)
    pair = tl.arange(0, CENTERS * ROWS)
    line = tl.arange(0, LINES)
    sums = ()  # of the net's numbers
    if NET:
        for _ in tl.static_range((F + 1) * NUMBERS + 2 * KINDS):
            if MID == 4:
                sums += (tl.zeros((CENTERS * ROWS,), tl.float32),)
            else:
                sums += (tl.zeros((CENTERS * ROWS, MID), tl.float32),)
    for cluster in range(program * span, tl.minimum(program * span + span, clusters)):
        end = tl.load(offsets + cluster + 1)
        list_begin = tl.load(lists + cluster)
        list_end = tl.load(lists + cluster + 1)
        for row0 in range(tl.load(offsets + cluster), end, ROWS):
            row = tl.minimum(row0 + pair % ROWS, end - 1).to(tl.int64)
            point = _load_points(positions, row, D)
            score = tl.load(scores + row)
            inside = row0 + pair % ROWS < end
            tile_row = row0 + tl.arange(0, ROWS)
            tile = features + tl.minimum(tile_row, end - 1).to(tl.int64)[:, None] * channels
            d_score = tl.zeros((CENTERS * ROWS,), tl.float32)
            d_values = _no_sums(1, CHUNK, ROWS, features.dtype.element_ty)
            for e0 in range(list_begin, list_end, CENTERS):
                e = e0 + pair // ROWS
                exists = inside & (e < list_end)
                entry = tl.load(entries + tl.minimum(e, list_end - 1))
                center = (entry * reciprocal) >> shift  # entry // per_query
                delta = _differences(point, _load_points(centers, center, D), D)
                phi = _position_features(delta, D)
                normalized, inverse = _normalized(net, phi, eps, mid, D, MID)
                weights, slope = (), ()
                for i in tl.static_range(KINDS):
                    x = _affine(net, normalized, i, D, MID)
                    less, bell = _distribution(x)
                    here = _beside(exists, MID)
                    weights += (tl.where(here, x * less, 0.0),)
                    slope += (tl.where(here, less + x * 0.3989422804014327 * bell, 0.0),)

                entry = tl.load(entries + tl.minimum(e0 + line // MID, list_end - 1))
                owner = (entry * reciprocal) >> shift
                m = line % MID
                if MID != 4:
                    m = tl.minimum(m, mid - 1)
                lines = grad + (owner * weights_of + m)[:, None] * channels  # (LINES, 1)
                dot = tl.zeros((LINES, ROWS), tl.float32)
                if FEATURES:
                    scored = ()
                    for i in tl.static_range(KINDS):
                        scored += (weights[i] * _beside(score, MID),)
                    factors = tl.reshape(_together(scored, MID), (CENTERS, ROWS, MID))
                    factors = tl.reshape(tl.permute(factors, (0, 2, 1)), (1, LINES, ROWS))
                    grads = tl.load(lines + channel, mask=channel < channels, other=0.0)
                    d_values = _add_weighted(
                        tl.reshape(grads, (1, LINES, CHUNK)), factors, d_values
                    )
                if NET and FEATURES:
                    value = tl.load(tile + channel, mask=channel < channels, other=0.0)
                    dot = _add_products(grads, value, dot)
                elif NET:
                    for c0 in range(0, channels, CHUNK):
                        some = c0 + channel < channels
                        grads = tl.load(lines + (c0 + channel), mask=some, other=0.0)
                        value = tl.load(tile + (c0 + channel), mask=some, other=0.0)
                        dot = _add_products(grads, value, dot)
                if NET:
                    dot = tl.permute(tl.reshape(dot, (CENTERS, MID, ROWS)), (0, 2, 1))
                    dots = _apart(tl.reshape(dot, (CENTERS * ROWS, MID)), MID)
                    d_affine, d_logit, added = (), (), ()
                    if MID == 4:
                        mean = tl.zeros((CENTERS * ROWS,), tl.float32)
                        along = mean
                        for i in tl.static_range(4):
                            d_score += tl.where(exists, dots[i] * weights[i], 0.0)
                            d = tl.where(exists, dots[i] * slope[i] * score, 0.0)
                            d_affine += (d,)
                            d *= _scale(net, i, D, MID)
                            d_logit += (d,)
                            mean += d
                            along += d * normalized[i]
                        mean *= 0.25
                        along *= 0.25
                    else:
                        known = exists[:, None] & (tl.arange(0, MID) < mid)[None, :]
                        d_score += tl.sum(tl.where(known, dots[0] * weights[0], 0.0), 1)
                        d_affine += (tl.where(known, dots[0] * slope[0] * score[:, None], 0.0),)
                        d_logit += (d_affine[0] * _scale(net, 0, D, MID),)
                        mean = (tl.sum(d_logit[0], 1) / mid)[:, None]
                        along = (tl.sum(d_logit[0] * normalized[0], 1) / mid)[:, None]
                    for f in tl.static_range(F + 1):
                        for i in tl.static_range(NUMBERS):
                            # Those of four logits add up to 0.
                            d = (d_logit[i] - mean - normalized[i] * along) * _beside(inverse, MID)
                            product = d * _beside(phi[f], MID) if f < F else d
                            added += (sums[NUMBERS * f + i] + product,)
                    for i in tl.static_range(KINDS):
                        scaled = d_affine[i] * normalized[i]
                        added += (sums[(F + 1) * NUMBERS + i] + scaled,)
                    for i in tl.static_range(KINDS):
                        added += (sums[(F + 1) * NUMBERS + KINDS + i] + d_affine[i],)
                    sums = added
            if NET:
                total = tl.sum(tl.reshape(d_score, (CENTERS, ROWS)), 0)
                tl.store(d_scores + tile_row, total, mask=tile_row < end)
            if FEATURES:
                at = tile_row.to(tl.int64)[:, None] * channels + channel
                total = tl.trans(tl.reshape(_sums(d_values, ROWS), (CHUNK, ROWS)))
                exists = (tile_row < end)[:, None] & (channel < channels)
                tl.store(d_features + at, total, mask=exists)
    if NET:
        partial += program
        programs = tl.num_programs(0).to(tl.int64)
        if MID == 4:
            for f in tl.static_range(F + 1):
                rest = 0.0
                for i in tl.static_range(3):
                    total = tl.sum(sums[3 * f + i], 0)
                    rest -= total
                    tl.store(partial + (4 * f + i) * programs, total)
                tl.store(partial + (4 * f + 3) * programs, rest)
            for i in tl.static_range(8):
                total = tl.sum(sums[3 * F + 3 + i], 0)
                tl.store(partial + (4 * F + 4 + i) * programs, total)
        else:
            m = tl.arange(0, MID)
            for f in tl.static_range(F + 3):
                total = tl.sum(sums[f], 0)
                tl.store(partial + (f * mid + m) * programs, total, mask=m < mid)


@triton.jit(do_not_specialize=("columns", "mid", "programs"))
def sum_partials_kernel(
    partial, d_weight, d_bias, d_norm_weight, d_norm_bias, columns, mid, programs,
    F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one number of the weight net, its partial sums in a fixed order."""
    column, m = tl.program_id(0), tl.program_id(1)
    number = column * mid + m
    total = tl.zeros((BLOCK,), tl.float64)  # similar terms, which may cancel
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = number.to(tl.int64) * programs
        terms = tl.load(partial + row + at, mask=at < programs, other=0.0)
        total += terms.to(tl.float64)
    total = tl.sum(total, 0).to(tl.float32)
    if column < F:
        tl.store(d_weight + m * columns + column, total, mask=column < columns)
    elif column == F:
        tl.store(d_bias + m, total)
    elif column == F + 1:
        tl.store(d_norm_weight + m, total)
    else:
        tl.store(d_norm_bias + m, total)


def _forward_rounds(a):
    groups = triton.cdiv(a["queries"], a["CENTERS"])
    span = groups / triton.cdiv(groups, a["span"])  # groups of centers per program
    steps = triton.cdiv(a["per_query"] * a["cluster_size"], a["PLACES"])
    return {"group": span, "n0": span * steps}


def _backward_rounds(a):
    rows = -(-a["offsets"].diff() // a["ROWS"]).double()
    listed = -(-a["lists"].diff() // a["CENTERS"]).double()
    span = a["clusters"] / triton.cdiv(a["clusters"], a["span"])
    rounds = {"cluster": span, "row0": span * rows.mean().item()}
    rounds["e0"] = span * (rows * listed).mean().item()
    rounds["c0"] = rounds["e0"] * triton.cdiv(a["units"] * a["UNIT"], a["CHUNK"])
    return rounds


def _mid(weights):
    return next(mid for mid in _MIDS if weights == mid or 4 != mid > weights)


@cache
def _forward_variant(dtype, learned, dimensions, ordered, channels, mid):
    f32, i32 = torch.float32, torch.int32
    return Variant(
        scored_merge_fwd_kernel,
        (
            *(dtype, f32, f32, f32, i32, i32, torch.int64 if ordered else i32),
            *((learned,) * 4),
            dtype,
            *("i32" if name != "reciprocal" else "i64" for name in _FORWARD_INTEGERS),
            "fp32",
        ),
        {
            "D": dimensions,
            "MID": mid,
            "ORDERED": ordered,
            "CENTERS": 2 if mid == 4 else 1,
            "PLACES": 16,
            "CHUNK": _block(channels, _WIDEST[dtype], mid),
            "UNIT": _unit(channels),
        },
        writes=("out",),
        tiles={"CENTERS": (1, 4), "PLACES": (32,), "CHUNK": (16, 32, 64)} if mid == 4 else {},
        num_warps=1,
        num_stages=1,
        max_registers=255,
        rounds=_forward_rounds,
    )


@cache
def _backward_variant(dtype, learned, dimensions, size, channels, parts, mid):
    """`size`: tokens of a cluster, at most; `parts`: "features", "net" or "both"."""
    chunk = _block(channels, 32 if dtype == torch.float32 else 64, mid)
    if parts == "net" and (dtype == torch.float32 or _unit(channels) == 1):
        chunk = 16
    f32, i32 = torch.float32, torch.int32
    return Variant(
        scored_merge_bwd_kernel,
        (
            *(dtype, dtype, f32, f32, f32, i32, i32, torch.int64),
            *((learned,) * 4),
            *(dtype, f32, f32),
            *("i32" if name != "reciprocal" else "i64" for name in _BACKWARD_INTEGERS),
            "fp32",
        ),
        {
            "D": dimensions,
            "MID": mid,
            "FEATURES": parts != "net",
            "NET": parts != "features",
            "ROWS": 1 if size == 1 else 8,
            "CENTERS": max(1, (32 if size == 1 else 16) // mid),
            "CHUNK": chunk,
            "UNIT": _unit(channels),
        },
        writes=(
            *(("d_features",) if parts != "net" else ()),
            *(("d_scores", "partial") if parts != "features" else ()),
        ),
        tiles={"CENTERS": (4, 8)} if mid == 4 else {},
        num_warps=1,
        num_stages=1,
        max_registers=255,
        rounds=_backward_rounds,
    )


def _backward_parts(dtype, channels, mid):
    """What one kernel computes together: all, where it fits the registers."""
    fits = dtype == torch.bfloat16 and channels <= _MAX_TOGETHER and mid == 4
    return ("both",) if fits and _unit(channels) > 1 else ("features", "net")


def _block(channels, most, mid):
    """Channels of a program."""
    if mid != 4:
        return max(16, most * 8 // mid)
    if _unit(channels) == 1:
        return min(64, most)  # the slow path: one width for all
    return min(max(triton.next_power_of_2(channels), 16), most)


def _unit(channels):
    """What kernels may assume to divide the number of channels: 16-byte loads need it."""
    return 16 if channels % 16 == 0 else 1


@cache
def _sum_variant(learned, dimensions):
    return Variant(
        sum_partials_kernel,
        (torch.float32, *((learned,) * 4), "i32", "i32", "i32"),
        {"F": 2 * dimensions + 1, "BLOCK": 256},
        writes=("d_weight", "d_bias", "d_norm_weight", "d_norm_bias"),
        tiles={"BLOCK": (128, 512)},
        rounds=lambda a: {"start": triton.cdiv(a["programs"], a["BLOCK"])},
    )


def variants():
    """Every specialization that the launchers below can choose."""
    for dimensions in (2, 3):
        for dtype in DTYPES:
            yield _sum_variant(dtype, dimensions)
            for learned, mid in itertools.product(learned_dtypes(dtype), _MIDS):
                for channels in (1, 16, 32, 64, 128) if mid == 4 else (1, 16):
                    for ordered in (False, True):
                        yield _forward_variant(dtype, learned, dimensions, ordered, channels, mid)
                    for size in (1, 8):
                        for parts in _backward_parts(dtype, channels, mid):
                            yield _backward_variant(
                                dtype, learned, dimensions, size, channels, parts, mid
                            )


def forward(
    features, scores, positions, center_positions, offsets, index,
    weight, bias, norm_weight, norm_bias, cluster_size, eps,
):  # fmt: skip
    """(Q, M * C) in the features' dtype, see `scored_merge`; entries out of range are left out."""
    (tokens, channels), dimensions = features.shape, positions.shape[1]
    (queries, per_query), clusters = index.shape, offsets.shape[0] - 1
    weights = weight.shape[0]
    out = torch.empty(queries, weights * channels, dtype=features.dtype, device=features.device)
    if index.numel() == 0 or features.numel() == 0:
        return out.zero_()
    # Lists of single tokens belong to queries that are tokens in their own order.
    ordered = cluster_size > 1 and features.numel() * features.element_size() > _CACHE
    order = torch.sort(index[:, 0], stable=True).indices if ordered else index
    net = _net(weight, bias, norm_weight, norm_bias, features)
    kind = features.dtype, net[0].dtype, dimensions
    variant = _forward_variant(*kind, ordered, channels, _mid(weights))
    groups = triton.cdiv(queries, variant.constants["CENTERS"])
    span = min(max(groups // _ENOUGH_PROGRAMS, 1), 8)
    arrays = (features, scores, positions, center_positions, offsets, index, order)
    cluster_size = min(cluster_size, tokens)
    variant.launch(
        lambda constants: (
            triton.cdiv(triton.cdiv(queries, constants["CENTERS"]), span),
            triton.cdiv(channels, constants["CHUNK"]),
        ),
        *(*_contiguous(*arrays), *net, out),
        *(tokens, queries, per_query, clusters, cluster_size, *division(cluster_size, 31)),
        *(weight.shape[1], weights, channels // variant.constants["UNIT"], span, eps),
    )
    return out


def backward(
    grad, features, scores, positions, center_positions, offsets, index,
    weight, bias, norm_weight, norm_bias, cluster_size, eps,
):  # fmt: skip
    """Gradients of features, scores, weight, bias, norm_weight and norm_bias."""
    channels, dimensions = features.shape[1], positions.shape[1]
    per_query, clusters = index.shape[1], offsets.shape[0] - 1
    learned = (weight, bias, norm_weight, norm_bias)
    if index.numel() == 0 or features.numel() == 0:
        return tuple(x.new_zeros(x.shape) for x in (features, scores, *learned))
    lists = inverse_lists(index, clusters)
    net = _net(*learned, features)
    # Several clusters per program where there are enough: sums cost as much as a cluster.
    span = min(max(clusters // _ENOUGH_PROGRAMS, 1), 16)
    programs = triton.cdiv(clusters, span)
    d_features, d_scores, *d_net = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (features, scores, *net)
    )
    weights, columns = weight.shape
    numbers = (2 * dimensions + 4) * weights  # of the net, had it all columns
    partial = torch.empty(numbers, programs, dtype=torch.float32, device=features.device)
    arrays = _contiguous(grad, features, scores, positions, center_positions, offsets, *lists)
    mid = _mid(weights)
    kind = features.dtype, net[0].dtype, dimensions
    for parts in _backward_parts(features.dtype, channels, mid):
        variant = _backward_variant(*kind, cluster_size, channels, parts, mid)
        constants = variant.constants
        blocks = triton.cdiv(channels, constants["CHUNK"]) if parts != "net" else 1
        variant.launch(
            (programs, blocks),
            *(*arrays, *net, d_features, d_scores, partial),
            *(clusters, *division(per_query, 31), columns, weights),
            *(channels // constants["UNIT"], span, eps),
        )
    variant = _sum_variant(net[0].dtype, dimensions)
    variant.launch((numbers // weights, weights), partial, *d_net, columns, weights, programs)
    d_net = (d.to(x.dtype) for d, x in zip(d_net, learned, strict=True))
    return d_features, d_scores, *d_net


def _net(weight, bias, norm_weight, norm_bias, features):
    """The four as kernels take them, of one dtype: the features' or float32."""
    given = (weight, bias, norm_weight, norm_bias)
    same = all(x.dtype == features.dtype for x in given)
    dtype = features.dtype if same else torch.float32
    return [x.to(dtype).contiguous() for x in given]


def _contiguous(*tensors):
    return [x.contiguous() for x in tensors]
