"""What the backward passes of attention on the CPU share, over blocks and over lists of tokens."""

from pointformer.kernels.cpu.attention_blocks import (
    add_bias,
    add_features,
    add_scaled,
    dot_rows,
    power8,
    power16,
    sum_features,
)
from pointformer.kernels.cpu.runtime import inlined
from pointformer.kernels.cpu.simd import (
    f32,
    fma,
    hmax,
    hsum,
    load16,
    splat,
    splat16,
    store,
    zero,
)

BATCH = 64  # queries of a cluster that the backward pass takes at a time


@inlined
def shared_size(shape):
    """What the two loops share for a head of a token: twice its blocks, in whole pairs."""
    return (shape.blocks + 1) // 2 * 32


@inlined
def shared_at(token, tile_first, shape):
    """Where the softmax's weights of a token's first head start; gradients of logits follow."""
    return (token - tile_first) * shape.heads * shared_size(shape)


@inlined
def partial_size(shape):
    values = 2 + shape.feature_blocks * shape.features
    return shape.heads * (shape.features + 1 + values * shape.channels)


@inlined
def clear_partial(chunk, shape, partial):
    for n in range(chunk * partial_size(shape), (chunk + 1) * partial_size(shape)):
        partial[n] = f32(0.0)


@inlined
def add_weight_sums(chunk, shape, weight_sums, partial):
    for n in range(shape.heads * shape.features):
        partial[chunk * partial_size(shape) + n] = hsum(load16(weight_sums, n * 16))


@inlined
def row_gradients(
    chunk, token, head, grad, query, bias, scale, log2_scale, shape, normal, count,
    logits, grad_logits, feature_changes, feature_at, phi, features,
    shared, weights, weight_sums, moments, partial,
):  # fmt: skip
    """From products of a query with its `count` blocks of keys (`logits`), of its output's gradient
    with their values (`grad_logits`) and with the weights of `position_value` (from `feature_at`
    on): the softmax's weights and the gradients of logits, to `shared[weights:]`, and what the row
    adds to the gradients of what is learned. The gradient of the blank token's logit."""
    # This chunk's sums: position_weight (H * F), position_bias (H), blank_key, blank_value (H * d),
    # position_value (H * F * d).
    bias_at = chunk * partial_size(shape) + shape.heads * shape.features
    key_at = bias_at + shape.heads
    value_at = key_at + shape.heads * shape.channels
    features_at = value_at + shape.heads * shape.channels
    at = token * grad.token_stride + head * grad.head_stride
    query_at = token * query.token_stride + head * query.head_stride
    own = head * shape.channels
    changes = weights + shared_size(shape) // 2
    add_bias(logits, 0, count, phi, features, head, log2_scale, bias, shape)
    shift = normal[2 * (token * shape.heads + head)]
    factor = normal[2 * (token * shape.heads + head) + 1]
    blank = blank_grad = f32(0.0)
    if bias.has_blank:
        logit = dot_rows(query.data, query_at, bias.blank_key, own, shape.channels)
        blank = hmax(power8(splat(logit * log2_scale) - splat(shift))) * factor
        blank_grad = dot_rows(grad.data, at, bias.blank_value, own, shape.channels)
    total = splat16(f32(0.0))
    for pair in range((count + 1) // 2):
        weight = power16(load16(logits, pair * 16) - splat16(shift)) * splat16(factor)
        store(shared, weights + pair * 16, weight)
        change = load16(grad_logits, pair * 16)
        if shape.feature_blocks:
            x = features + pair * (1 + shape.features) * 16
            change = add_features(change, phi, x, feature_changes, feature_at, shape)
            store(grad_logits, pair * 16, change)
        total = fma(weight, change, total)
    if shape.feature_blocks:
        sum_features(shared, weights, count, phi, features, shape, moments, 0)
        for feature in range(shape.features):
            to = features_at + (head * shape.features + feature) * shape.channels
            moment = splat(moments[feature])
            add_scaled(moment, grad.data, at, partial, to, shape.channels)
    mean = hsum(total) + blank * blank_grad
    for pair in range((count + 1) // 2):
        change = load16(grad_logits, pair * 16) - splat16(mean)
        change = load16(shared, weights + pair * 16) * change
        store(shared, changes + pair * 16, change)
    for feature in range(shape.features):
        to = (head * shape.features + feature) * 16
        total = load16(weight_sums, to)
        for pair in range((count + 1) // 2):
            x = load16(phi, features + (pair * (1 + shape.features) + 1 + feature) * 16)
            total = fma(load16(shared, changes + pair * 16), x, total)
        store(weight_sums, to, total)
    blank_change = blank * (blank_grad - mean)
    if bias.has_blank:
        # The gradients of a row's logits add up to 0: less rounding than their sum.
        partial[bias_at + head] -= blank_change
        scaled = splat(blank_change * scale)
        add_scaled(scaled, query.data, query_at, partial, key_at + own, shape.channels)
        add_scaled(splat(blank), grad.data, at, partial, value_at + own, shape.channels)
    return blank_change


@inlined
def clear_rows(first, last, size, grad_key, grad_value):
    for n in range(first * size, last * size, 8):
        store(grad_key, n, zero())
        store(grad_value, n, zero())


@inlined
def list_active(cluster_index, first, last, shape, begins, ends, active):
    """Write the clusters that entries `first` to `last` name, and move the end of each one's own
    entries, which ascend, to the last of them; how many clusters."""
    found = 0
    for entry in range(first, last):
        cluster = cluster_index[entry]
        if 0 <= cluster < shape.clusters:
            if begins[cluster] == ends[cluster]:
                active[found] = cluster
                found += 1
            ends[cluster] += 1
    return found
