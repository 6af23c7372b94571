"""Selection of merging centers in plain torch: which tokens have a role, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer.clusters import offsets_of, sample_of_rows
from pointformer.reference.neighbors import squared_distance

_EXPONENTS = 24  # of spacings on a lattice: float32 holds integers up to 2**24


def on_lattice(positions: Tensor, side: Tensor | int) -> Tensor:
    """(T,) bool: every coordinate is a multiple of `side` (an integer, or one per token)."""
    if isinstance(side, Tensor):
        side = side[:, None]
    return (positions.long() % side == 0).all(1)


def lattice_spacing(positions: Tensor, nearest: Tensor) -> Tensor:
    """Smallest power of two >= the distance to the nearest other token, exact: (T,) int64.

    Args:
        positions: (T, D) float32 with integer values.
        nearest: (T,) int64, the nearest other token; -1 (no other) counts as infinitely far.
    """
    difference = positions.long() - positions[nearest.clamp(min=0)].long()
    difference = difference.clamp(-(2**_EXPONENTS), 2**_EXPONENTS)
    square = (difference * difference).sum(1)
    square = square.where(nearest >= 0, 4**_EXPONENTS)
    squares = 4 ** torch.arange(_EXPONENTS, device=positions.device)
    return 1 << torch.searchsorted(squares, square)


def spacing(positions: Tensor, nearest: Tensor, longest_side: Tensor) -> Tensor:
    """Smallest power of two >= the distance to the nearest other token: (T,) float32.

    Not below what float32 resolves at the token's coordinates, which is also the spacing of
    duplicates, nor above twice the canvas' longest side, the spacing of a lone token.

    Args:
        positions: (T, D) float32, from the canvas' corner.
        nearest: (T,) int64, the nearest other token; -1 for none.
        longest_side: (T,) float32, the longest side of the token's canvas.
    """
    distance = squared_distance(positions, positions[nearest.clamp(min=0)]).sqrt()
    largest = 2 * longest_side
    distance = distance.where(nearest >= 0, largest).minimum(largest)
    numbers = torch.finfo(torch.float32)
    distance = distance.maximum(positions.abs().amax(1) * numbers.eps).clamp(min=numbers.tiny)
    mantissa, exponent = torch.frexp(distance)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(distance), exponent)


def nearest_to_nodes(positions: Tensor, sample: Tensor, side: Tensor, limit: Tensor) -> Tensor:
    """Off a lattice: the tokens that play the part of lattice nodes, (T,) bool.

    The nodes of a token are the multiples of its `side`. Of the tokens of a sample with the same
    side and the same nearest node (inside the canvas), the one closest to the node plays its part;
    ties go to the lowest row.

    Args:
        positions: (T, D) float32.
        sample: (T,) int64.
        side: (T,) float32, distance between the nodes.
        limit: (T, D) float32, sides of each token's canvas: nodes lie at 0 <= node < limit.
    """
    side = side[:, None]
    last = ((limit / side).ceil() - 1).clamp(min=0)
    node = (positions / side + 0.5).floor().clamp(min=0).minimum(last)
    distance = squared_distance(positions, node * side)
    # Least significant key first; every sort is stable.
    keys = [*node.unbind(1), side[:, 0], sample]
    order = torch.sort(distance, stable=True).indices
    for key in keys:
        order = order[torch.sort(key[order], stable=True).indices]
    heads = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    heads[:1] = True
    for key in keys:
        sorted_key = key[order]
        heads[1:] |= sorted_key[1:] != sorted_key[:-1]
    chosen = torch.empty_like(heads)
    chosen[order] = heads
    return chosen


def select(
    score: Tensor,
    reserved: Tensor,
    sizes: Sequence[int],
    keep: Sequence[int],
    even: Tensor | None = None,
) -> Tensor:
    """Rows kept of each sample: the best by score, then the reserved ones in row order.

    Args:
        score: (T,) float32 selection score.
        reserved: (T,) bool, taken whatever their score.
        sizes: tokens per sample.
        keep: how many of them to keep. If more are reserved, the first rows of those.
        even: (T,) int64, ties go to the lowest of these; `None`: to the lowest row.

    Returns:
        (sum(keep),) int64.
    """
    device = score.device
    bits = score.view(torch.int32).long()
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers ordered like the floats
    place = torch.where(reserved, 0, (1 << 32) + (1 << 31) - 1 - ascending)
    sample = sample_of_rows(sizes, device)
    keys = (sample << 34) | place
    if even is None:
        order = torch.sort(keys, stable=True).indices
    else:
        order = torch.sort(even.where(~reserved, torch.arange(len(even), device=device))).indices
        order = order[torch.sort(keys[order], stable=True).indices]

    start, first = offsets_of(tuple(sizes), device), offsets_of(tuple(keep), device)
    total = torch.cat([start[:1], reserved.cumsum(0)])
    kept = first.diff()
    taken = total[start].diff().minimum(kept)  # reserved ones, at the front of each sample's order
    sample = sample_of_rows(keep, device)
    row = torch.arange(sum(keep), device=device) - first[sample]
    return order[start[sample] + (row + taken[sample]) % kept[sample]]
