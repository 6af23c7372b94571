"""Parameters and multiply-adds of a model, counted on the instance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pointformer.models.aff import AdaptiveMerge, Attention
from pointformer.models.model import Model


@dataclass(frozen=True)
class Complexity:
    """Counts for one image.

    Attributes:
        parameters: trainable numbers.
        dense: multiply-adds of the Linear and convolution layers, what papers call "FLOPs".
        attention: of the neighbourhood attention: scores, position bias and weighted values.
        merge: of the scored merge: weight net and weighted sums.
    """

    parameters: int
    dense: int
    attention: int
    merge: int


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


def count(model: Model, height: int, width: int) -> Complexity:
    """Run one made-up image of height x width pixels and count what each layer did.

    A layer counts by the shapes that it sees, so rate, neighbourhood size and options count as
    they are set.
    """
    totals = {"dense": 0, "attention": 0, "merge": 0}

    def layer(module: nn.Linear | nn.Conv2d, args: tuple[Tensor], output: Tensor) -> None:
        totals["dense"] += layer_multiply_adds(module, output)

    def attention(module: Attention, args: tuple, output: Tensor) -> None:
        _, _, neighborhoods, _ = args
        pairs = int(neighborhoods.members()[1].sum())
        blanks = 0 if module.blank_key is None else output.shape[0]
        totals["attention"] += attention_multiply_adds(
            pairs, blanks, output.shape[1], module.position.weight.numel()
        )

    def merge(module: AdaptiveMerge, args: tuple, output) -> None:
        tokens, neighborhoods = args[:2]
        mean_size = float(neighborhoods.members()[1].sum()) / max(tokens.num_tokens, 1)
        pairs = round(mean_size * output.num_tokens)
        totals["merge"] += merge_multiply_adds(
            pairs, tokens.channels, module.mid_channels, module.weight_net[0].in_features
        )

    hooks = {nn.Linear: layer, nn.Conv2d: layer, Attention: attention, AdaptiveMerge: merge}
    handles = [
        module.register_forward_hook(hooks[type(module)])
        for module in model.modules()
        if type(module) in hooks
    ]
    parameter = next(model.parameters())
    image = torch.rand(1, model.config.in_channels, height, width).to(parameter)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(image)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return Complexity(sum(p.numel() for p in model.parameters()), **totals)
