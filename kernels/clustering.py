"""Balanced clustering: the registered ops for curve codes, sort keys and cluster centers.

Centers have gradients for positions; all else is integers.

GPUs compute the keys from the grids alone (`curve_keys`). CPUs look anchors up in tables, made once
per call from the codes of all cells (`curve_code`, `cluster_keys`): fewer operations per token.
"""

import torch

from pointformer.kernels.library import LIBRARY, differentiate, implement

LIBRARY.define(
    "cluster_keys(Tensor positions, Tensor offsets, Tensor origin, Tensor cell_size, Tensor unit, "
    "Tensor shape, Tensor first_cell, Tensor anchor_of_cell, Tensor anchors, str impl) -> Tensor"
)
LIBRARY.define("curve_code(str curve, Tensor cells, Tensor shape, int bits, str impl) -> Tensor")
# Grids as flat lists with D numbers per sample: corner of the canvas, sides of a cell, cells per
# axis; `longest` is the axis along which a single anchor has its virtual neighbors. Without
# `anchors`, keys are places along the curve, and grids but those of the snake have `plain_levels`
# cells per axis.
LIBRARY.define(
    "curve_keys(Tensor positions, SymInt[] sizes, float[] origin, float[] cell_size, "
    "SymInt[] shape, SymInt[] longest, str curve, bool anchors, str impl) -> Tensor"
)
# Keys that cut parts of clusters in two; see `pointformer.reference.clustering.kd_keys`.
LIBRARY.define(
    "kd_keys(Tensor positions, Tensor order, Tensor offsets, Tensor first, Tensor last, "
    "Tensor back, str impl) -> (Tensor keys, Tensor axis)"
)
LIBRARY.define(
    "cluster_centers(Tensor positions, Tensor order, Tensor offsets, str impl) -> Tensor"
)
# Ranges of the rows and centers of clusters where all samples are alike: each has `size` tokens in
# `count` clusters, of which `longer` have `length` + 1 tokens, the others `length`, the last maybe
# fewer. For GPUs, where every step of it would be a launch.
LIBRARY.define(
    "cluster_ranges(Tensor positions, Tensor order, SymInt samples, SymInt size, SymInt count, "
    "SymInt length, SymInt longer, str impl) -> (Tensor offsets, Tensor centers)"
)
fused_curve_code = torch.ops.pointformer.curve_code.default
fused_cluster_keys = torch.ops.pointformer.cluster_keys.default
fused_curve_keys = torch.ops.pointformer.curve_keys.default
fused_kd_keys = torch.ops.pointformer.kd_keys.default
fused_cluster_centers = torch.ops.pointformer.cluster_centers.default
fused_cluster_ranges = torch.ops.pointformer.cluster_ranges.default


@torch.library.register_fake("pointformer::curve_code", lib=LIBRARY)
def _fake_code(curve, cells, shape, bits, impl):
    return cells.new_empty(cells.shape[0])


@torch.library.register_fake("pointformer::cluster_keys", lib=LIBRARY)
def _fake_keys(positions, offsets, *walk_and_impl):
    return offsets.new_empty(positions.shape[0])


@torch.library.register_fake("pointformer::curve_keys", lib=LIBRARY)
def _fake_curve_keys(positions, *grids_and_impl):
    return positions.new_empty(positions.shape[0], dtype=torch.int64)


@torch.library.register_fake("pointformer::kd_keys", lib=LIBRARY)
def _fake_kd_keys(positions, order, offsets, first, last, back, impl):
    return torch.empty_like(order), torch.empty_like(first)


@torch.library.register_fake("pointformer::cluster_centers", lib=LIBRARY)
def _fake_centers(positions, order, offsets, impl):
    return positions.new_empty(offsets.shape[0] - 1, positions.shape[1])


@torch.library.register_fake("pointformer::cluster_ranges", lib=LIBRARY)
def _fake_ranges(positions, order, samples, size, count, length, longer, impl):
    clusters = samples * count
    offsets = positions.new_empty(clusters + 1, dtype=torch.int32)
    return offsets, positions.new_empty(clusters, positions.shape[1])


implement("curve_code", "clustering.curve_code")
implement("cluster_keys", "clustering.keys")
implement("curve_keys", "clustering.curve_keys")
implement("kd_keys", "clustering.kd_keys")
implement("cluster_centers", "clustering.centers")
implement("cluster_ranges", "clustering.ranges")


def _save_centers(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2])


def _save_ranges(ctx, inputs, output):
    offsets, _ = output
    ctx.mark_non_differentiable(offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[1], offsets)


def _differentiate_means(ctx, grad):
    """Each token's share of the mean of its cluster."""
    order, offsets = ctx.saved_tensors
    lengths = offsets.diff().long()
    rows = torch.repeat_interleave(grad / lengths[:, None], lengths, 0, output_size=len(order))
    return torch.empty_like(rows).index_copy(0, order, rows)


def _differentiate_centers(ctx, grad):
    return _differentiate_means(ctx, grad), None, None, None


def _differentiate_ranges(ctx, _, grad):
    return None if grad is None else _differentiate_means(ctx, grad), *(None,) * 7


differentiate("cluster_centers", _differentiate_centers, _save_centers)
differentiate("cluster_ranges", _differentiate_ranges, _save_ranges)
