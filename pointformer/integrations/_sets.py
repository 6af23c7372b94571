"""Token sets of positions in any dtype, as other libraries have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pointformer import TokenSet, batch_from_sizes
from pointformer._checks import check_sizes, check_tensor, describe


def set_of(
    name: str,
    positions: Tensor,
    features: Tensor | None,
    sizes: Sequence[int] | None,
    origin: Tensor | None,
    fields: Mapping[str, Tensor],
    extent: Tensor | None = None,
) -> TokenSet:
    """A token set at `positions` (T, D) relative to an origin (B, D) or (D,), zeros if `None`.

    Where float32 may not hold them, each sample gets an origin of its own, unless there is an
    extent, which the positions are on.

    Raises:
        TypeError, ValueError: something does not fit; the message names it.
    """
    check_tensor(name, positions, ("T", "D"))
    count, dimensions = positions.shape
    sizes = check_sizes("sizes", sizes, count)
    if origin is not None:
        if origin.shape not in ((dimensions,), (len(sizes), dimensions)):
            raise ValueError(
                f"origin: expected shape ({len(sizes)}, {dimensions}), got {describe(origin)}"
            )
        origin = origin.double().cpu().expand(len(sizes), dimensions)
    if positions.is_floating_point() and positions.dtype != torch.float64:
        return TokenSet(positions.float(), features, sizes, extent, origin, fields=fields)
    world = positions.double()
    if origin is not None:
        world = world + origin.to(world.device)[batch_from_sizes(sizes, world.device)]
    if extent is not None and origin is None:
        origin = torch.zeros(dimensions, dtype=torch.float64)
    kept = origin if extent is not None else None
    return TokenSet.from_world(world, features, sizes, extent, origin=kept, fields=fields)
