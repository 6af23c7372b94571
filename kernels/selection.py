"""Selection of merging centers on a lattice: the registered ops.

CPUs find the distance to the nearest other token in a map of the canvas (`select_on_lattice`). GPUs
get the nearest tokens from the search for neighbors (`select_from_nearest`): its work and memory do
not depend on the canvas.
"""

import torch

from pointformer.kernels.library import LIBRARY, implement

# `coarse` is how far apart the reserved nodes of each sample lie; 0 where none are.
LIBRARY.define(
    "select_on_lattice(Tensor scores, Tensor positions, Tensor offsets, Tensor extent, "
    "Tensor kept_offsets, int kept, float alpha, int stride, str prior, SymInt[] coarse, "
    "str impl) -> Tensor"
)
# `nearest` (T, 2) int32 are the two tokens nearest to each, itself among them, -1 for none: the
# prior is adaptive. Without it, it is that of the grid or none.
LIBRARY.define(
    "select_from_nearest(Tensor scores, Tensor positions, Tensor? nearest, SymInt[] sizes, "
    "SymInt[] kept, float alpha, int stride, bool grid, SymInt[] coarse, str impl) -> Tensor"
)
fused_select_on_lattice = torch.ops.pointformer.select_on_lattice.default
fused_select_from_nearest = torch.ops.pointformer.select_from_nearest.default


@torch.library.register_fake("pointformer::select_on_lattice", lib=LIBRARY)
def _fake(scores, positions, offsets, extent, kept_offsets, kept, *options):
    return offsets.new_empty(kept)


@torch.library.register_fake("pointformer::select_from_nearest", lib=LIBRARY)
def _fake_from_nearest(scores, positions, nearest, sizes, kept, *options):
    return scores.new_empty(sum(kept), dtype=torch.int64)


implement("select_on_lattice", "selection.select")
implement("select_from_nearest", "selection.select_from_nearest")
