"""Selection of the merging centers of a stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pointformer._checks import (
    FLOATS,
    alike,
    brief,
    can_read,
    check_finite,
    check_flags,
    check_number,
    check_option,
    check_per_sample,
    check_positions,
    check_sizes,
    check_tensor,
)
from pointformer._dispatch import choose, lacks_nothing
from pointformer.clusters import offsets_of
from pointformer.geometry.boxes import bounding_boxes
from pointformer.geometry.neighbors import knn
from pointformer.kernels.selection import fused_select_from_nearest, fused_select_on_lattice
from pointformer.kernels.tables import from_host
from pointformer.reference import selection as reference

_CELLS_PER_TOKEN = 1024  # emptier lattices are searched with `knn`
_KEY_BITS = 30  # what the score and the reserved flag leave of a 64-bit key for (sample, row)
_LONGEST_SIDE = 1 << 31  # of a lattice on GPUs: coordinates are integers of 32 bits
_LARGEST_STRIDE = 2.0**60  # twice of it fits int64, and squared float32
_PRIORS = ("adaptive", "grid", None)


def select_centers(
    scores: Tensor,
    positions: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    extent: Sequence | Tensor | None = None,
    rate: float,
    alpha: float = 4.0,
    stride: float,
    prior: str | None = "adaptive",
    reserve: bool = True,
    lattice: bool = True,
    along_curve: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """The tokens around which a stage merges (AutoFocusFormer, section 3.3.2).

    Tokens are ranked by prior + alpha * score in float32, where the prior is 1 for the tokens that
    a regular grid would keep and 0 for the others. Of n tokens max(int(n * rate), reserved) are
    kept, at least one and at most n; with `reserve`, a coarse lattice is kept whatever its scores.

    On a lattice (integer positions), with S = `stride`:

    * reserved are the tokens whose coordinates all are multiples of 2S. There is room for one in
      each of the ceil(side / 2S) nodes per axis of the canvas; room that is not needed goes to the
      best of the others, so that the number of kept tokens depends on `sizes` and `extent` only.
    * the prior "grid" is 1 where all coordinates are multiples of S; "adaptive" where they are
      multiples of 2t, t being the smallest power of two (1, 2, 4, ...) that is at least the
      distance to the nearest other token. `None` ranks by score alone.

    Off a lattice the nodes are the same points, and each node's part is played by the token closest
    to it, ties to the lowest row, among the tokens to which it is the nearest node inside the
    canvas; for the adaptive prior among those of them with the same t, which may be below 1. A
    full lattice gives the same result either way.

    Args:
        scores: (T,) floating, importance of each token, usually in (0, 1).
        positions: (T, D) float32, D = 2 or 3, rows of a sample in any order, not negative.
        sizes: tokens per sample, B host integers; `None` for one sample.
        batch: in place of `sizes` the sample of each token, see `sizes_from_batch`.
        extent: sides of each sample's canvas, B x D host numbers, or D for all samples. `None`
            measures the largest coordinates (plus one on a lattice), which waits for the device.
        rate: share of the tokens to keep, in (0, 1].
        alpha: weight of the scores against the prior.
        stride: S, distance between the nodes of the grid to keep, in the units of `positions`: 2, 4
            and 8 after the first, second and third stage.
        prior: "adaptive", "grid" or `None`.
        reserve: keep the coarse lattice.
        lattice: whether positions are integers; `False` accepts any.
        along_curve: whether the rows of each sample follow a space-filling curve, as in cluster
            order, see `knn`. The result is the same in any case.
        check_values: whether to look for scores and positions that do not fit, which waits for the
            device. Never done under `torch.compile` and while a CUDA graph is captured.
        impl: "reference", "cpu" or "triton"; `None` chooses by device.

    Returns:
        Rows of the kept tokens, (T',) int64, and how many of them per sample. In each sample those
        taken by rank come first, best first, ties by row; then the reserved ones in row order.

    Raises:
        TypeError, ValueError: an argument does not fit, a score is NaN, a position is NaN or
            infinite, or with `lattice` not an integer inside the canvas.
    """
    positions = check_positions("positions", positions).detach()
    tokens, dimensions = positions.shape
    scores = check_tensor("scores", scores, (tokens,), FLOATS, positions.device).detach().float()
    sizes = check_sizes("sizes", sizes, tokens, batch)
    check_number("rate", rate, above=0, most=1)
    check_number("alpha", alpha)
    check_option("prior", prior, _PRIORS)
    check_flags(
        reserve=reserve, lattice=lattice, along_curve=along_curve, check_values=check_values
    )
    check_number("stride", stride, above=0)
    if stride > _LARGEST_STRIDE:
        raise ValueError(f"stride: expected at most {_LARGEST_STRIDE:g}, got {brief(stride)}")
    if lattice and stride != int(stride):
        raise ValueError(
            f"stride: expected a positive integer, got {stride}; use lattice=False for others"
        )
    if check_values:
        check_finite("positions", positions, sizes)
        _check_scores(scores)
    if extent is None:
        extent = bounding_boxes(positions, sizes)[1] + int(lattice)
    sides = check_per_sample("extent", extent, len(sizes), dimensions)
    if lattice and check_values:
        _check_lattice(positions, sides, sizes)
    keep = tuple(
        _number_kept(size, side, rate, stride if reserve else None)
        for size, side in zip(sizes, sides, strict=True)
    )
    triton_lacks = partial(_triton_lacks, sides, lattice)
    chosen = choose(
        "select_centers", impl, {"cpu": lacks_nothing, "triton": triton_lacks}, positions.device
    )
    search = partial(
        knn, positions, sizes=sizes, along_curve=along_curve, check_values=False, impl=chosen
    )
    if chosen == "triton" and lattice:
        pair = search(2) if prior == "adaptive" else None
        options = (alpha, int(stride), prior == "grid", reserve, chosen)
        return fused_select_from_nearest(scores, positions, pair, sizes, keep, *options), keep
    if chosen == "cpu" and lattice and _map_fits(sizes, sides):
        canvas = torch.tensor(sides, dtype=torch.float64).ceil().long()
        index = fused_select_on_lattice(
            scores,
            positions,
            offsets_of(sizes),
            canvas.reshape(len(sizes), dimensions),
            offsets_of(keep),
            sum(keep),
            alpha,
            int(stride),
            prior or "none",
            reserve,
            chosen,
        )
        return index, keep

    nearest = None
    if prior == "adaptive":
        index = search(1, include_self=False)
        assert isinstance(index, Tensor)
        nearest = index[:, 0].long()
    if lattice:
        has_prior, reserved = _lattice_parts(positions, nearest, int(stride), prior, reserve)
    else:
        has_prior, reserved = _free_parts(positions, nearest, sizes, sides, stride, prior, reserve)
    ranking = has_prior.float() + alpha * scores
    return reference.select(ranking, reserved, sizes, keep), keep


def _triton_lacks(sides: Sequence[tuple[float, ...]], lattice: bool) -> str | None:
    if lattice:
        for side in itertools.chain(*sides):
            if side > _LONGEST_SIDE:
                return f"extent has a side of {side}, more than {_LONGEST_SIDE}, with lattice=True"
    return None


def _map_fits(sizes: tuple[int, ...], sides: Sequence[tuple[float, ...]]) -> bool:
    """Whether the fused op for lattices can run: it maps the canvas and packs keys in 64 bits."""
    cells = sum([math.prod(row) for row in sides])
    keys = 4 * len(sizes) * max((0, *sizes))  # at least what the two parts' whole bits can hold
    return cells <= _CELLS_PER_TOKEN * (sum(sizes) + 1024) and keys <= 2**_KEY_BITS


def _lattice_parts(
    positions: Tensor, nearest: Tensor | None, stride: int, prior: str | None, reserve: bool
) -> tuple[Tensor, Tensor]:
    """Which tokens have the prior and which are reserved, on a lattice: (T,) bool each."""
    nobody = torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
    has_prior = nobody
    if nearest is not None:
        has_prior = reference.on_lattice(
            positions, 2 * reference.lattice_spacing(positions, nearest)
        )
    elif prior == "grid":
        has_prior = reference.on_lattice(positions, stride)
    return has_prior, reference.on_lattice(positions, 2 * stride) if reserve else nobody


def _free_parts(
    positions: Tensor,
    nearest: Tensor | None,
    sizes: tuple[int, ...],
    sides: Sequence[tuple[float, ...]],
    stride: float,
    prior: str | None,
    reserve: bool,
) -> tuple[Tensor, Tensor]:
    """Which tokens have the prior and which are reserved, off a lattice: (T,) bool each."""
    sample = reference.sample_of_rows(sizes, positions.device)
    if sides and all(map(alike, zip(*sides, strict=True))):  # no copy from the host
        limit = torch.stack([torch.full_like(positions[:, 0], side) for side in sides[0]], 1)
    else:
        limit = from_host(sides, torch.float32, positions.device)
        limit = limit.reshape(len(sizes), positions.shape[1])[sample]
    nobody = torch.zeros_like(sample, dtype=torch.bool)
    every = torch.full_like(limit[:, 0], stride)
    has_prior = nobody
    if nearest is not None:
        side = 2 * reference.spacing(positions, nearest, limit.amax(1))
        has_prior = reference.nearest_to_nodes(positions, sample, side, limit)
    elif prior == "grid":
        has_prior = reference.nearest_to_nodes(positions, sample, every, limit)
    if not reserve:
        return has_prior, nobody
    return has_prior, reference.nearest_to_nodes(positions, sample, 2 * every, limit)


def _number_kept(size: int, side: Sequence[float], rate: float, stride: float | None) -> int:
    """How many of `size` tokens to keep; `stride` is that of the reserved lattice, if any."""
    reserved = 1
    if stride is not None:
        reserved = math.prod([max(1, math.ceil(length / (2 * stride))) for length in side])
    return min(size, max(int(size * rate), reserved))


def _check_scores(scores: Tensor) -> None:
    if not can_read(scores):
        return
    bad = scores.isnan()
    if bool(bad.any()):
        raise ValueError(
            f"scores: expected numbers, got NaN in {int(bad.sum())} of {len(scores)} rows, "
            f"first in row {int(bad.nonzero()[0])}"
        )


def _check_lattice(
    positions: Tensor, sides: Sequence[tuple[float, ...]], sizes: tuple[int, ...]
) -> None:
    """Raise if a position is not an integer inside the canvas, naming the sample."""
    if not can_read(positions):
        return
    limit = torch.tensor(sides, device=positions.device).reshape(len(sizes), positions.shape[1])
    sample = reference.sample_of_rows(sizes, positions.device)
    limit = limit[0] if len(set(sides)) == 1 else limit[sample]
    good = (positions == positions.floor()) & (positions >= 0) & (positions < limit)
    if bool(good.all()):
        return
    row = int((~good).any(1).nonzero()[0])
    index = int(sample[row])
    raise ValueError(
        f"positions: sample {index} has {positions[row].tolist()} in row "
        f"{row - sum(sizes[:index])}, which is not on the lattice of its canvas {sides[index]} "
        "(integers from 0 to below the extent); use lattice=False for free positions"
    )
