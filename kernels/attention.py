"""Neighborhood attention as registered ops: schemas, shapes, gradient.

`neighborhood_plan` makes what an implementation derives from the neighborhoods alone, so that all
blocks of a stage share it: a list of int32 tensors, as long as the worst case needs. The attention
ops take it as `plan` and make what is missing; an empty list will do. The CPU's plan are, for
training, offsets (K + 1) and entries (Q * R): for each cluster its places in the flat lists.
Triton's is in `kernels.triton.attention_plan`. No cluster may be twice in one neighborhood.
Where the lists of all samples are those of the first one with clusters counted on, `copies` is the
number of samples, else 1: it lets a plan be made of one of them.

`position_weight` (H, F) and `position_value` (H, d, F) are of the same F; with the latter the
former is given. What `position_value` adds to an output is its product with the *moments*, the
means of the position features over the neighborhood: F numbers per query and head.

`normal` (T, H, 2) holds the largest logit in units of log2 and the inverse of the softmax's sum,
0 where there is nothing to sum. What is learned is of any dtypes. The backward op may use
`output` (T, H, d) for the mean gradient of a row's logits: Triton does; the CPU does not, because
in half precision it is rounded.
"""

import torch

from pointformer.kernels.library import LIBRARY, differentiate, implement

TILE = 16  # consecutive queries that Triton kernels take together: rows of a matrix product
GROUP_KEYS = 16  # keys of a Triton program's clusters, if they fit: rows of a matrix product


def clusters_per_group(cluster_size):
    """How many consecutive clusters share a list of queries in Triton's backward pass."""
    return max(1, GROUP_KEYS // max(cluster_size, 1))


def tile_capacity(per_query, clusters):
    """The most clusters that the union of a tile's neighborhoods can have."""
    return torch.sym_min(TILE * per_query, clusters)


LIBRARY.define(
    "neighborhood_plan(Tensor cluster_index, Tensor cluster_offsets, int cluster_size, "
    "bool training, int copies, str impl) -> Tensor[]"
)


@torch.library.register_fake("pointformer::neighborhood_plan", lib=LIBRARY)
def _plan_fake(cluster_index, cluster_offsets, cluster_size, training, copies, impl):
    (queries, per_query), clusters = cluster_index.shape, cluster_offsets.shape[0] - 1
    if impl == "cpu":
        shapes = [(clusters + 1,), (queries * per_query,)] if training else []
    else:
        tiles, groups = -(-queries // TILE), -(-clusters // clusters_per_group(cluster_size))
        shapes = [(tiles,), *[(tiles, tile_capacity(per_query, clusters))] * 3]
        if training:
            shapes += [(groups,), (groups,), (queries * per_query,), (queries * per_query,)]
    return [cluster_index.new_empty(shape) for shape in shapes]


implement("neighborhood_plan", "attention.make_plan")

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor query_positions, Tensor positions, "
    "Tensor cluster_index, "
    "Tensor cluster_offsets, int cluster_size, Tensor[] plan, Tensor? position_weight, "
    "Tensor? position_bias, Tensor? position_value, Tensor? blank_key, Tensor? blank_value, "
    "float scale, str impl"
)
LIBRARY.define(f"neighborhood_attention({_ARGUMENTS}) -> (Tensor output, Tensor normal)")
LIBRARY.define(
    f"neighborhood_attention_backward(Tensor grad, Tensor output, Tensor normal, {_ARGUMENTS}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_position_weight, "
    "Tensor grad_position_bias, Tensor grad_position_value, Tensor grad_blank_key, "
    "Tensor grad_blank_value)"
)


@torch.library.register_fake("pointformer::neighborhood_attention", lib=LIBRARY)
def _forward_fake(query, *arguments):
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(
        (*query.shape[:2], 2), dtype=torch.float32
    )


@torch.library.register_fake("pointformer::neighborhood_attention_backward", lib=LIBRARY)
def _backward_fake(grad, output, normal, query, key, value, *arguments):
    rows = [x.new_empty(x.shape) for x in (query, key, value)]
    learned = [normal.new_empty(0) if x is None else x.new_empty(x.shape) for x in arguments[-7:-2]]
    return (*rows, *learned)


implement("neighborhood_attention", "attention.forward")
implement("neighborhood_attention_backward", "attention.backward")


LEARNED = 5  # arguments before `scale`: weights, bias, values of positions, blank tokens


def _save(ctx, inputs, output):
    *tensors, ctx.cluster_size, plan = inputs[: -LEARNED - 2]
    *learned, ctx.scale, ctx.impl = inputs[-LEARNED - 2 :]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for it would be a launch
    ctx.rows = len(tensors)
    ctx.save_for_backward(*output, *tensors, *learned, *plan)


def _differentiate(ctx, grad, _):
    output, normal, *tensors = ctx.saved_tensors
    rows, learned = tensors[: ctx.rows], tensors[ctx.rows : ctx.rows + LEARNED]
    plan = tensors[ctx.rows + LEARNED :]
    gradients = torch.ops.pointformer.neighborhood_attention_backward(
        grad, output, normal, *rows, ctx.cluster_size, plan, *learned, ctx.scale, ctx.impl
    )
    learned_grads = [
        gradient if tensor is not None else None
        for tensor, gradient in zip(learned, gradients[-LEARNED:], strict=True)
    ]
    unlearned = [None] * (ctx.rows - 3 + 2)  # positions, lists, cluster_size, plan
    return *gradients[:-LEARNED], *unlearned, *learned_grads, None, None


differentiate("neighborhood_attention", _differentiate, _save)


def _differentiate_twice(ctx, *grads):
    raise NotImplementedError(
        "neighborhood_attention: the fused op is differentiable once; use impl='reference'"
    )


differentiate("neighborhood_attention_backward", _differentiate_twice, lambda *_: None)
