"""Balanced clustering: the registered ops for curve codes, sort keys and cluster centers."""

import torch

from pointformer.kernels.library import LIBRARY

LIBRARY.define(
    "cluster_keys(Tensor positions, Tensor offsets, Tensor origin, Tensor cell_size, Tensor unit, "
    "Tensor shape, Tensor first_cell, Tensor anchor_of_cell, Tensor anchors) -> Tensor"
)
LIBRARY.define("curve_code(str curve, Tensor cells, Tensor shape, int bits) -> Tensor")
LIBRARY.define("cluster_centers(Tensor positions, Tensor order, Tensor offsets) -> Tensor")
fused_curve_code = torch.ops.pointformer.curve_code.default
fused_cluster_keys = torch.ops.pointformer.cluster_keys.default
fused_cluster_centers = torch.ops.pointformer.cluster_centers.default


@torch.library.register_fake("pointformer::curve_code", lib=LIBRARY)
def _fake_code(curve, cells, shape, bits):
    return cells.new_empty(cells.shape[0])


@torch.library.register_fake("pointformer::cluster_keys", lib=LIBRARY)
def _fake_keys(positions, offsets, *walk):
    return offsets.new_empty(positions.shape[0])


@torch.library.register_fake("pointformer::cluster_centers", lib=LIBRARY)
def _fake_centers(positions, order, offsets):
    return positions.new_empty(offsets.shape[0] - 1, positions.shape[1])


@torch.library.impl("pointformer::curve_code", "cpu", lib=LIBRARY)
def _code_cpu(curve, cells, shape, bits):
    from pointformer.kernels.cpu import clustering

    return clustering.curve_code(curve, cells, shape, bits)


@torch.library.impl("pointformer::cluster_keys", "cpu", lib=LIBRARY)
def _keys_cpu(positions, *tables):
    from pointformer.kernels.cpu import clustering

    return clustering.keys(positions, *tables)


@torch.library.impl("pointformer::cluster_centers", "cpu", lib=LIBRARY)
def _centers_cpu(positions, order, offsets):
    from pointformer.kernels.cpu import clustering

    return clustering.centers(positions, order, offsets)
