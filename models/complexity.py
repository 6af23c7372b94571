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


def count(model: Model, height: int, width: int) -> Complexity:
    """Run one made-up image of height x width pixels and count what each layer did.

    A layer counts by the shapes that it sees, so rate, neighbourhood size and options count as
    they are set.
    """
    totals = {"dense": 0, "attention": 0, "merge": 0}

    def linear(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        totals["dense"] += output.numel() * module.in_features

    def convolution(module: nn.Conv2d, args: tuple[Tensor], output: Tensor) -> None:
        totals["dense"] += output.numel() * module.weight[0].numel()

    def attention(module: Attention, args: tuple, output: Tensor) -> None:
        _, _, neighborhoods, _ = args
        pairs = int(neighborhoods.members()[1].sum())
        blanks = 0 if module.blank_key is None else output.shape[0]
        features = module.position.in_features
        totals["attention"] += 2 * (pairs + blanks) * output.shape[1]
        totals["attention"] += pairs * module.heads * features

    def merge(module: AdaptiveMerge, args: tuple, output) -> None:
        tokens, neighborhoods = args[:2]
        mean_size = float(neighborhoods.members()[1].sum()) / max(tokens.num_tokens, 1)
        pairs = round(mean_size * output.num_tokens)
        weight_net = module.weight_net[0].in_features * module.mid_channels
        totals["merge"] += pairs * module.mid_channels * tokens.channels + pairs * weight_net

    hooks = {nn.Linear: linear, nn.Conv2d: convolution, Attention: attention, AdaptiveMerge: merge}
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
