"""Selection of merging centers on a lattice: the registered op."""

import torch

from pointformer.kernels.library import LIBRARY, implement

LIBRARY.define(
    "select_on_lattice(Tensor scores, Tensor positions, Tensor offsets, Tensor extent, "
    "Tensor kept_offsets, int kept, float alpha, int stride, str prior, bool reserve, "
    "str impl) -> Tensor"
)
fused_select_on_lattice = torch.ops.pointformer.select_on_lattice.default


@torch.library.register_fake("pointformer::select_on_lattice", lib=LIBRARY)
def _fake(scores, positions, offsets, extent, kept_offsets, kept, *options):
    return offsets.new_empty(kept)


implement("select_on_lattice", "selection.select")
