"""Transformer blocks on token sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pointformer._checks import check_count, check_number, describe
from pointformer.nn.parallel import WHOLE, BatchPart
from pointformer.ops import add_norm
from pointformer.tokens import TokenSet

# A residual branch (T, C) and its scale (C,), if it has one, before they are added.
Branch = tuple[Tensor, Tensor | None]
HIDDEN = 1 << 22  # numbers that a hidden layer holds at a time at inference


def init_linear(module: nn.Module) -> None:
    """Start all its Linear layers as transformers do: weights from a normal distribution of
    standard deviation 0.02, cut off at 2, and biases 0."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a module, got {describe(module)}")
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class GELU(nn.GELU):
    """GELU that overwrites its input, a layer's output, where no gradient is recorded: to fill new
    memory would take as long as the function itself."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return torch.ops.aten.gelu_(x, approximate=self.approximate)


class FeedForward(nn.Sequential):
    """Linear, activation, Linear."""

    def __init__(self, dim: int, hidden: int, activation: type[nn.Module] = GELU) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("hidden", hidden)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation()
        self.fc2 = nn.Linear(hidden, dim)


def drop_path(
    x: Tensor, rate: float, tokens: TokenSet, training: bool, part: BatchPart = WHOLE
) -> Tensor:
    """Zero a residual branch (T, C) for whole samples with probability `rate`, rescale the rest."""
    if not training or rate == 0:
        return x
    factor = part.bernoulli(1 - rate, tokens.batch_size, x)[:, None].div_(1 - rate or 1)
    if tokens.is_uniform and tokens.batch_size:
        samples = x.view(tokens.batch_size, len(x) // tokens.batch_size, x.shape[1])
        return (samples * factor[:, None]).view(x.shape)
    return x * factor[tokens.sample_index]


def add_branch(x: Tensor, branch: Branch) -> Tensor:
    """(T, C) with the branch."""
    rows, scale = branch
    return x + rows if scale is None else torch.addcmul(x, rows, scale)


def by_rows(function: Callable[..., Tensor], *inputs: Tensor, width: int) -> Tensor:
    """`function(*inputs)`, on CPUs at most `HIDDEN / width` rows at a time at inference.

    For functions that treat every row alone. What they need inside would take several times the
    memory of their result, and on CPUs fresh memory takes longer than the layers that fill it. On
    GPUs memory is used again, and every part would be a dozen launches more.
    """
    rows, total = max(1, HIDDEN // width), len(inputs[0])
    whole = torch.compiler.is_compiling() or torch.is_grad_enabled() or total <= rows
    if whole or inputs[0].device.type != "cpu":
        return function(*inputs)
    result = torch.empty(0)
    for first in range(0, total, rows):
        part = function(*(x[first : first + rows] for x in inputs))
        if first == 0:
            result = part.new_empty(total, *part.shape[1:])
        result[first : first + rows] = part
    return result


class BlockAttention(nn.Module):
    """Attention of a block, called as `attention(x, tokens, *where, project=False, impl=impl)`,
    which leaves its output projection to the block."""

    proj: nn.Linear


class Block(nn.Module):
    """Pre-norm transformer block on a token set. Its layers start as torch's do; `init_linear`
    gives them the start that models have.

    Args:
        attention: of normalized features x (T, C), such as `NeighborhoodAttention`. The block runs
            its output projection `proj`, on a few rows at a time.
        dim, hidden: channels C, and hidden ones of the feed-forward layer.
        layer_scale: initial value of the residual branches' scale; 0 means no scale.
        drop_path_rate: of the residual branches.

    Attributes:
        recompute: keep only the input for the backward pass, and run the block again there.
        part: of the batch that this process has.
    """

    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(
        self,
        attention: BlockAttention,
        dim: int,
        hidden: int,
        layer_scale: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(attention, nn.Module):
            raise TypeError(f"attention: expected a module, got {describe(attention)}")
        check_count("dim", dim)
        check_number("layer_scale", layer_scale, least=0)
        check_number("drop_path_rate", drop_path_rate, least=0, most=1)
        self.drop_path_rate = drop_path_rate
        self.recompute = False
        self.part = WHOLE
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, hidden)
        for name in ("gamma1", "gamma2"):
            scale = torch.full((dim,), float(layer_scale))
            self.register_parameter(name, nn.Parameter(scale) if layer_scale > 0 else None)

    def forward(
        self,
        tokens: TokenSet,
        *where: object,
        pending: Branch | None = None,
        impl: str | None = None,
    ) -> tuple[TokenSet, Branch | None]:
        """Tokens whose features lack a last branch, which is left to the next block's LayerNorm.

        Args:
            where: tells the attention who sees whom.
            pending: what the block before left; `None` for none.
        """
        x, normed = tokens.features, None
        if pending is None:
            normed = self.norm1(x)
        else:
            x, normed = self._add_norm(x, pending, self.norm1, impl)
        attended = self.attn(normed, tokens, *where, project=False, impl=impl)

        def branches(x: Tensor, attended: Tensor) -> tuple[Tensor, Branch]:
            branch = self._dropped(self.attn.proj(attended), tokens), self.gamma1
            x, normed = self._add_norm(x, branch, self.norm2, impl)
            return x, (self._dropped(self.mlp(normed), tokens), self.gamma2)

        if self.training or x.device.type != "cpu":  # paths are dropped for whole samples
            x, pending = branches(x, attended)
            return tokens.with_features(x), pending
        width = self.mlp.fc1.out_features
        x = by_rows(lambda *rows: add_branch(*branches(*rows)), x, attended, width=width)
        return tokens.with_features(x), None

    @staticmethod
    def _add_norm(
        x: Tensor, branch: Branch, norm: nn.LayerNorm, impl: str | None
    ) -> tuple[Tensor, Tensor]:
        rows, scale = branch
        return add_norm(x, rows, norm.weight, norm.bias, scale=scale, eps=norm.eps, impl=impl)

    def _dropped(self, branch: Tensor, tokens: TokenSet) -> Tensor:
        return drop_path(branch, self.drop_path_rate, tokens, self.training, self.part)


def run_blocks(
    blocks: nn.ModuleList, tokens: TokenSet, where: Sequence[tuple], impl: str | None
) -> TokenSet:
    """The tokens after all blocks, each with its part of `where`."""
    pending = None
    for block, seen in zip(blocks, where, strict=True):
        run: Callable = block
        if block.recompute and torch.is_grad_enabled():
            run = partial(checkpoint, block, use_reentrant=False)
        tokens, pending = run(tokens, *seen, pending=pending, impl=impl)
    return tokens if pending is None else tokens.with_features(add_branch(tokens.features, pending))
