"""The op behind `nearest_clusters`, `knn` and `radius`."""

import torch

from pointformer.kernels.library import LIBRARY, differentiate, implement

# query (Q, D) or None for the points themselves, points (P, D), both float32. `limits` neighbors
# are listed per sample, at most `width`, none beyond the squared distance `reach`; `along_curve`
# promises that the rows of both follow a space-filling curve in each sample (it costs time, not
# exactness, if they do not). Returns rows of `points` (Q, width) int32, nearest first, ties to the
# lowest, -1 for none, and squared distances (Q, width) float32, every operation rounded, infinite
# for none. Both are repeated: the batch has `copies` times as many samples as are given, and rows
# of each copy are counted on.
LIBRARY.define(
    "nearest(Tensor? query, Tensor points, SymInt[] query_sizes, SymInt[] point_sizes, "
    "SymInt[] limits, SymInt width, float reach, bool along_curve, SymInt copies, str impl) -> "
    "(Tensor index, Tensor distance)"
)
fused_nearest = torch.ops.pointformer.nearest.default


@torch.library.register_fake("pointformer::nearest", lib=LIBRARY)
def _fake(query, points, query_sizes, point_sizes, limits, width, reach, along_curve, copies, impl):
    shape = ((points if query is None else query).shape[0] * copies, width)
    return points.new_empty(shape, dtype=torch.int32), points.new_empty(shape)


implement("nearest", "neighbors.nearest")


def _no_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


differentiate("nearest", lambda ctx, *grads: (None,) * 10, _no_gradient)
