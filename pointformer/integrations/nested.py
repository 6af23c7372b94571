"""torch's nested tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pointformer import TokenSet, sizes_from_ptr
from pointformer._checks import check_tensor, describe


def from_nested(positions: Tensor, features: Tensor | None = None) -> TokenSet:
    """A token set of nested tensors (B, n, D) and (B, n, C), whose n differ from sample to sample.

    Raises:
        TypeError, ValueError: one of them is no nested tensor, or they are of other samples.
    """
    values, sizes = _packed("positions", positions)
    rows = None
    if features is not None:
        rows, others = _packed("features", features)
        if others != sizes:
            raise ValueError("features: expected samples of the same sizes as in positions")
    return TokenSet(values, rows, sizes)


def to_nested(tokens: TokenSet) -> tuple[Tensor, Tensor]:
    """Positions (B, n, D) and features (B, n, C) as nested tensors of the jagged layout.

    They have one n, so that operations take both together. Fields, origin and extent stay behind.
    """
    if not isinstance(tokens, TokenSet):
        raise TypeError(f"tokens: expected a TokenSet, got {describe(tokens)}")
    positions: Any = torch.nested.nested_tensor_from_jagged(tokens.positions, tokens.batch_offsets)
    return positions, torch.nested.nested_tensor_from_jagged(tokens.features, positions.offsets())


def _packed(name: str, nested: object) -> tuple[Tensor, tuple[int, ...]]:
    """The rows of all samples, and how many there are of each."""
    tensor: Any = check_tensor(name, nested)  # whose class does not say what nested ones have
    if not tensor.is_nested:
        raise TypeError(f"{name}: expected a nested tensor, got {describe(tensor)}")
    if tensor.dim() != 3:
        raise ValueError(
            f"{name}: expected 3 axes, samples, tokens and channels, got {tensor.dim()}"
        )
    ragged = getattr(tensor, "_ragged_idx", 1)
    if ragged != 1:
        raise ValueError(f"{name}: expected samples that differ along axis 1, got axis {ragged}")
    if tensor.layout == torch.jagged and tensor.lengths() is None:
        return tensor.values(), sizes_from_ptr(tensor.offsets())
    samples = tensor.unbind()
    return torch.cat(samples), tuple(len(sample) for sample in samples)
