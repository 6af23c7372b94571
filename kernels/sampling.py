"""The op behind `farthest_point_sample`."""

import torch

from pointformer.kernels.library import LIBRARY, differentiate, implement

# positions (T, D) float32; how many rows of each sample to pick, at most its size, and the row in
# it to begin with. Returns rows (sum of counts,) int64: always the one whose squared distance
# (float32, every operation rounded) from all that were picked before is largest, ties to the lowest
# row, none twice.
LIBRARY.define(
    "farthest_points(Tensor positions, SymInt[] sizes, SymInt[] counts, SymInt[] start, "
    "str impl) -> Tensor"
)
fused_farthest_points = torch.ops.pointformer.farthest_points.default


@torch.library.register_fake("pointformer::farthest_points", lib=LIBRARY)
def _fake(positions, sizes, counts, start, impl):
    return positions.new_empty(sum(counts), dtype=torch.int64)


implement("farthest_points", "sampling.farthest_points")


def _no_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


differentiate("farthest_points", lambda ctx, *grads: (None,) * 5, _no_gradient)
