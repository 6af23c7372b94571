"""Parameters and multiply-adds of a model, counted on the instance."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pointformer import TokenSet
from pointformer._checks import brief, check_count, describe
from pointformer.models.config import PointConfig
from pointformer.models.hcformer import SoftAssignment
from pointformer.models.heads import DenseHead, HCFormerHead, StarHead
from pointformer.models.inference import evaluating
from pointformer.models.layers import MultiheadAttention
from pointformer.models.mask2former import MaskDecoder, MaskPredictions
from pointformer.models.model import Model
from pointformer.models.pixel_decoder import DeformableAttention, PixelDecoder
from pointformer.models.points import PointDecoder
from pointformer.models.swin import WindowAttention
from pointformer.nn import NeighborhoodAttention, PointConv, ScoredMerge

# The paper's figures in billions, by model and head: classification at 224 px with 1000 classes
# (Table 2), Mask2Former* at 512 px with 150 classes (Table 3).
PUBLISHED = {
    ("aff_mini", "classification"): 1.08,
    ("aff_mini_1_5th", "classification"): 0.72,
    ("aff_tiny", "classification"): 4.03,
    ("aff_tiny_1_5th", "classification"): 2.74,
    ("aff_small", "classification"): 8.16,
    ("aff_small_1_5th", "classification"): 5.69,
    ("swin_mini", "classification"): 1.07,
    ("swin_tiny", "classification"): 4.0,
    ("swin_small", "classification"): 8.14,
    ("aff_mini", "mask2former"): 48.3,
    ("aff_mini_1_5th", "mask2former"): 39.9,
    ("aff_tiny", "mask2former"): 64.6,
    ("aff_tiny_1_5th", "mask2former"): 51.1,
    ("aff_small", "mask2former"): 87.0,
    ("aff_small_1_5th", "mask2former"): 67.2,
    ("swin_mini", "mask2former"): 48.9,
}


@dataclass(frozen=True)
class Complexity:
    """Counts for one image.

    Attributes:
        parameters: numbers in the weights, whether they are trained or not.
        dense: multiply-adds of the Linear and convolution layers.
        attention: of neighborhoods and windows, in the backbone and in decoders of points: scores,
            weighted values, position bias.
        merge: of the scored merge: weight net and weighted sums.
        decoder: of the attention of queries, to tokens and to each other: scores, weighted values.
        points: of sums over near tokens, in heads and where points are embedded: deformable
            attention, point convolution, interpolation, learned clusters.
        masks: of the products of queries and mask features.
        semantic: of class scores and masks at every pixel, what a semantic map is made of; it comes
            after the model, so `total` leaves it out.
        published: what papers call "FLOPs", by the tools of this one. For classifiers that is
            `dense`: a hook on each layer. For mask heads it is a trace of the whole inference, in
            which matrix products count too: `dense`, the attention of windows, `decoder`, `masks`
            and `semantic`. Neither sees into functions of the authors' own, which hold the
            attention of neighborhoods, `merge`, and in `points` all but the layers.
    """

    parameters: int
    dense: int
    attention: int
    merge: int
    decoder: int
    points: int
    masks: int
    semantic: int
    published: int

    @property
    def total(self) -> int:
        """All multiply-adds of the model."""
        parts = (self.dense, self.attention, self.merge, self.decoder, self.points, self.masks)
        return sum(parts)


def layer_multiply_adds(layer: nn.Linear | nn.Conv2d, output: Tensor) -> int:
    """Of a layer that gave `output`: one for each weight that each number of it depends on."""
    return output.numel() * layer.weight[0].numel()


def attention_multiply_adds(pairs: int, blanks: int, channels: int, bias_weights: int) -> int:
    """Of neighborhood attention: scores, weighted values, and the position bias.

    Args:
        pairs: tokens and neighbors, summed over the tokens.
        blanks: tokens that also attend to a blank token.
        channels: of all heads together.
        bias_weights: weights of the position bias, heads times features.
    """
    return 2 * (pairs + blanks) * channels + pairs * bias_weights


def merge_multiply_adds(pairs: int, channels: int, mid_channels: int, features: int) -> int:
    """Of a scored merge: weighted sums of `channels`, and the weight net's Linear layer.

    Args:
        pairs: centers and neighbors, summed over the centers.
        channels: of the tokens.
        mid_channels, features: outputs and inputs of the weight net.
    """
    return pairs * mid_channels * (channels + features)


def complexity_of(
    model: Model,
    height: int | None = None,
    width: int | None = None,
    *,
    points: int | None = None,
    parts: Sequence[nn.Module] | None = None,
) -> Complexity:
    """Run one made-up image of height x width pixels, or so many points, and count what each layer
    did.

    A layer counts by the shapes that it sees, so rate, neighborhood size and options count as
    they are set. Linear layers and convolutions give zeros meanwhile, which is faster. Of a foreign
    backbone only these two are known.

    Args:
        parts: modules of the model: only what they do counts, and only their parameters. `None`:
            all of it.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model: expected a Model, got {describe(model)}")
    if model.of_points:
        check_count("points", points)
        if height is not None or width is not None:
            raise ValueError(f"height, width: expected None, {model.name} takes points")
    elif points is not None:
        raise ValueError(f"points: expected None, {model.name} takes images, got {brief(points)}")
    else:
        check_count("height", height)
        check_count("width", width)
    given = [model] if parts is None else parts
    if not isinstance(given, Sequence) or not all(isinstance(m, nn.Module) for m in given):
        raise TypeError(f"parts: expected modules, got {describe(parts)}")
    totals: Counter[str] = Counter()
    handles = []
    counted = nn.ModuleList(given)
    for module in counted.modules():
        for kind, counts in _COUNTS.items():
            if isinstance(module, kind):
                handles.append(module.register_forward_hook(_adding(totals, counts)))
    parameter = next(model.parameters())
    made: Tensor | TokenSet
    if points is not None and isinstance(model.config, PointConfig):
        generator = torch.Generator().manual_seed(0)
        places = torch.rand(points, model.config.dimensions, generator=generator)
        features = torch.zeros(points, model.config.in_channels)
        made = model.preprocess(TokenSet(places, features)).to(parameter.device, parameter.dtype)
    else:
        assert height is not None
        assert width is not None
        made = torch.zeros(1, model.config.in_channels, height, width).to(parameter)
    try:
        with evaluating(model), _ShapesOnly():
            output = model(made)
    finally:
        for handle in handles:
            handle.remove()
    published = totals["dense"]
    if isinstance(output, MaskPredictions) and parts is None:
        _, queries, classes = output.class_logits.shape
        assert isinstance(made, Tensor)
        totals["semantic"] = queries * (classes - 1) * made.shape[-2:].numel()
        published += sum(totals[part] for part in ("windows", "decoder", "masks", "semantic"))
    totals["attention"] += totals.pop("windows", 0)
    names = ("dense", "attention", "merge", "decoder", "points", "masks", "semantic")
    return Complexity(
        parameters=sum(p.numel() for p in counted.parameters()),
        **{name: totals[name] for name in names},
        published=published,
    )


class _ShapesOnly(TorchFunctionMode):
    """Linear layers and convolutions give zeros of the right shape."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in (nn.functional.linear, nn.functional.conv2d):
            return function(*args, **kwargs)
        device = args[0].device
        args, kwargs = torch.utils._pytree.tree_map_only(
            Tensor, lambda x: x.to("meta"), (args, kwargs)
        )
        return torch.zeros_like(function(*args, **kwargs), device=device)


def _adding(totals: Counter[str], counts: Callable) -> Callable:
    def hook(module: nn.Module, args: tuple, output: object) -> None:
        totals.update(counts(module, args, output))

    return hook


def _layer(module: nn.Linear | nn.Conv2d, args: tuple, output: Tensor) -> dict[str, int]:
    return {"dense": layer_multiply_adds(module, output)}


def _attention(module: NeighborhoodAttention, args: tuple, output: Tensor) -> dict[str, int]:
    _, _, neighborhoods = args
    pairs = int(neighborhoods.members()[1].sum())
    blanks = 0 if module.blank_key is None else output.shape[0]
    bias_weights = module.position.weight.numel()
    return {"attention": attention_multiply_adds(pairs, blanks, output.shape[1], bias_weights)}


def _windows(module: WindowAttention, args: tuple, output: Tensor) -> dict[str, int]:
    """Padding to whole windows counts: it is computed."""
    _, tokens, windows = args
    cells = tokens.batch_size * windows.padded[0] * windows.padded[1]
    return {"windows": 2 * cells * windows.size**2 * output.shape[-1]}


def _merge(module: ScoredMerge, args: tuple, output) -> dict[str, int]:
    tokens, neighborhoods = args[:2]
    mean_size = float(neighborhoods.members()[1].sum()) / max(tokens.num_tokens, 1)
    pairs = round(mean_size * output.num_tokens)
    linear = module.weight_net.linear
    mid, features = linear.out_features, linear.in_features
    return {"merge": merge_multiply_adds(pairs, tokens.channels, mid, features)}


def _multihead(module: MultiheadAttention, args: tuple, output: Tensor) -> dict[str, int]:
    """The projections into the heads are no layer of their own; the one out of them is."""
    query, key = args[:2]
    batch, queries, channels = query.shape
    keys = key.shape[1]
    return {
        "dense": batch * (queries + 2 * keys) * channels**2,
        "decoder": 2 * batch * queries * keys * channels,
    }


def _deformable(module: DeformableAttention, args: tuple, output: Tensor) -> dict[str, int]:
    lookup, (_, levels, points) = args[2], module.shape
    return {"points": output.numel() * levels * points * lookup.index.shape[2]}


def _point_conv(module: PointConv, args: tuple, output) -> dict[str, int]:
    tokens = args[0]
    pairs = _near(tokens, tokens, module.k)
    linear = module.weight_net.linear
    mid, features = linear.out_features, linear.in_features
    return {"points": merge_multiply_adds(pairs, tokens.channels, mid, features)}


def _near(tokens: TokenSet, others: TokenSet, k: int) -> int:
    """Pairs of tokens and their `k` nearest ones in other tokens of the same samples."""
    return sum(size * min(other, k) for size, other in zip(tokens.sizes, others.sizes, strict=True))


def _pixel_decoder(module: PixelDecoder, args: tuple, output: tuple) -> dict[str, int]:
    """The interpolation of the second stage's tokens, of which 4 are near, to the first's."""
    return {"points": _near(output[0], args[0][1], 4) * module.dim}


def _point_decoder(module: PointDecoder, args: tuple, output: TokenSet) -> dict[str, int]:
    """The interpolation of each stage's tokens to those of the stage before."""
    sums = [
        _near(fine.tokens, coarse.tokens, module.neighbors) * fine.tokens.channels
        for fine, coarse in itertools.pairwise(args[0])
    ]
    return {"points": sum(sums)}


def _map_head(module: DenseHead | StarHead, args: tuple, output) -> dict[str, int]:
    """The interpolation of later stages' tokens, of which 3 are near, to the first's."""
    tokens = [stage.tokens for stage in args[0]]
    pairs = sum(_near(tokens[0], coarse, 3) for coarse in tokens[max(module.first_stage, 1) :])
    return {"points": pairs * module.channels}


def _assignment(module: SoftAssignment, args: tuple, output: tuple) -> dict[str, int]:
    """Similarities; of absent tokens too, which are computed."""
    index, _ = output
    return {"points": index.numel() * module.fine_proj.out_features}


def _decoding(module: HCFormerHead, args: tuple, output: MaskPredictions) -> dict[str, int]:
    queries = output.mask_logits.shape[1]
    tokens = [stage.tokens for stage in args[0]]
    steps: Any = zip(itertools.pairwise(tokens), module.assignments, strict=True)
    pairs = sum(_near(fine, coarse, assign.k) for (fine, coarse), assign in steps)
    return {"points": pairs * queries}


def _masks(module: MaskDecoder, args: tuple, output: MaskPredictions) -> dict[str, int]:
    """Before the first layer and after each."""
    return {"masks": (len(module.layers) + 1) * output.mask_logits.numel() * module.dim}


_COUNTS: dict[type[nn.Module], Callable[..., dict[str, int]]] = {
    nn.Linear: _layer,
    nn.Conv2d: _layer,
    NeighborhoodAttention: _attention,
    WindowAttention: _windows,
    ScoredMerge: _merge,
    MultiheadAttention: _multihead,
    DeformableAttention: _deformable,
    PointConv: _point_conv,
    PixelDecoder: _pixel_decoder,
    PointDecoder: _point_decoder,
    DenseHead: _map_head,
    StarHead: _map_head,
    SoftAssignment: _assignment,
    HCFormerHead: _decoding,
    MaskDecoder: _masks,
}
