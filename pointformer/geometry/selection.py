"""Selection of the merging centers of a stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pointformer._checks import (
    FLOATS,
    MOST_ROWS,
    alike,
    brief,
    can_read,
    check_count,
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
from pointformer.clusters import offsets_of, sample_of_rows
from pointformer.geometry.boxes import bounding_boxes
from pointformer.geometry.clustering import balanced_cluster
from pointformer.geometry.neighbors import knn
from pointformer.kernels.selection import fused_select_from_nearest, fused_select_on_lattice
from pointformer.kernels.tables import from_host
from pointformer.reference import selection as reference

_CELLS_PER_TOKEN = 1024  # emptier lattices are searched with `knn`
_KEY_BITS = 30  # what the score and the reserved flag leave of a 64-bit key for (sample, row)
_LONGEST_SIDE = 1 << 31  # of a lattice on GPUs: coordinates are integers of 32 bits
_LEAST_STRIDE = 2.0**-126  # with all digits in float32
_LARGEST_STRIDE = 2.0**60  # twice of it fits int64, and squared float32
_PRIORS = ("adaptive", "grid", None)
_ROW_BITS = MOST_ROWS.bit_length()


def select_centers(
    scores: Tensor,
    positions: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    extent: Sequence | Tensor | None = None,
    origin: Sequence | Tensor | None = None,
    rate: float,
    alpha: float = 4.0,
    stride: float,
    prior: str | None = "adaptive",
    reserve: bool = True,
    reserve_share: float | None = None,
    lattice: bool = True,
    along_curve: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """The tokens around which a stage merges (AutoFocusFormer, section 3.3.2).

    Tokens are ranked by prior + alpha * score in float32, where the prior is 1 for the tokens that
    a regular grid would keep and 0 for the others. Of n tokens max(int(n * rate), reserved) are
    kept, at least one and at most n; with `reserve`, a coarse lattice is kept whatever its scores.

    On a lattice (integer positions), with S = `stride` and coordinates from the `origin`:

    * reserved are the tokens whose coordinates all are multiples of 2S. Of a given `extent` there
      is room for one in each of the ceil(side / 2S) nodes per axis; room that is not needed goes to
      the best of the others, so that the number of kept tokens depends on `sizes` and `extent`
      only. Else those that there are count, which waits for the device.
    * the prior "grid" is 1 where all coordinates are multiples of S; "adaptive" where they are
      multiples of 2t, t being the smallest power of two (1, 2, 4, ...) that is at least the
      distance to the nearest other token. `None` ranks by score alone.

    Off a lattice the nodes are the same points, and each node's part is played by the token closest
    to it, ties to the lowest row, among the tokens to which it is the nearest node inside the
    canvas; for the adaptive prior among those of them with the same t, which may be below 1, down
    to what float32 resolves at the token's coordinates. A full lattice gives the same result either
    way. The reserved tokens that there are count, which waits for the device; under `torch.compile`
    and while a CUDA graph is captured there is room for all nodes instead.

    Args:
        scores: (T,) floating, importance of each token, usually in (0, 1).
        positions: (T, D) float32, D = 2 or 3, rows of a sample in any order.
        sizes: tokens per sample, B host integers; `None` for one sample.
        batch: in place of `sizes` the sample of each token, see `sizes_from_batch`.
        extent: sides of each sample's canvas, B x D host numbers, or D for all samples. `None`
            measures the points (the canvas begins at the multiples of 2S at or below the lowest
            coordinates and ends at the largest, plus one on a lattice), which waits for the device.
        origin: lower corner of each sample's canvas, like `extent`; 0 by default. Without `extent`
            it is measured and cannot be given.
        rate: share of the tokens to keep, in (0, 1].
        alpha: weight of the scores against the prior.
        stride: S, distance between the nodes of the grid to keep, in the units of `positions`: 2, 4
            and 8 after the first, second and third stage.
        prior: "adaptive", "grid" or `None`.
        reserve: keep the coarse lattice.
        reserve_share: leave room for the others: while more than this share of max(1, int(n *
            rate)) tokens is reserved, nodes lie twice as far apart as 2S, and so on. In (0, 1].
            `None` reserves what there is at 2S, be it more than `rate` asks for, as the released
            models do.
        lattice: whether positions are integers; `False` accepts any.
        along_curve: whether the rows of each sample follow a space-filling curve, as in cluster
            order, so that none has to be found.
        check_values: whether to look for scores and positions that do not fit, which waits for the
            device. Never done under `torch.compile` and while a CUDA graph is captured.
        impl: "reference", "cpu" or "triton"; `None` chooses by device.

    Returns:
        Rows of the kept tokens, (T',) int64, and how many of them per sample. In each sample those
        taken by rank come first, best first; then the reserved ones in row order. Of equal rank, on
        a lattice the first rows are taken. Off a lattice those that are spread most evenly: in the
        order of the places along a Hilbert curve with their bits reversed (every second one, then
        every second of the others, and so on).

    Raises:
        TypeError, ValueError: an argument does not fit, a score is NaN, a position is NaN or
            infinite, or with `lattice` not an integer inside the canvas.
    """
    positions = check_positions("positions", positions).detach()
    tokens, dimensions = positions.shape
    scores = check_tensor("scores", scores, (tokens,), FLOATS, positions.device).detach().float()
    sizes = check_sizes("sizes", sizes, tokens, batch)
    if isinstance(sizes, Tensor):
        canvas, corners = (
            x if x is None or isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)
            for x in (extent, origin)
        )
        return _untraced(
            scores, positions, sizes, canvas, corners, rate, alpha, stride, prior, reserve,
            reserve_share, lattice, along_curve, check_values, impl,
        )  # fmt: skip
    rate = check_number("rate", rate, above=0, most=1)
    alpha = check_number("alpha", alpha)
    check_option("prior", prior, _PRIORS)
    check_flags(
        reserve=reserve, lattice=lattice, along_curve=along_curve, check_values=check_values
    )
    if reserve_share is not None:
        check_number("reserve_share", reserve_share, above=0, most=1)
    check_number("stride", stride, above=0)
    if not _LEAST_STRIDE <= stride <= _LARGEST_STRIDE:
        raise ValueError(
            f"stride: expected a number from {_LEAST_STRIDE:g} to {_LARGEST_STRIDE:g}, got "
            f"{brief(stride)}"
        )
    if alpha == 0:  # an infinite score has no say either
        scores = torch.zeros_like(scores)
    if lattice and stride != int(stride):
        raise ValueError(
            f"stride: expected a positive integer, got {stride}; use lattice=False for others"
        )
    if check_values:
        check_finite("positions", positions, sizes)
        _check_scores(scores)
    is_measured = extent is None
    if extent is None:
        if origin is not None:
            raise ValueError("origin: give extent too, or neither")
        low, high = bounding_boxes(positions, sizes)
        corner = ((low.double() / (2 * stride)).floor() * (2 * stride)).float()
        origin, extent = corner, (high - corner).double() + int(lattice)  # rounded as positions
    sides = check_per_sample("extent", extent, len(sizes), dimensions)
    if origin is not None:
        corners = check_per_sample("origin", origin, len(sizes), dimensions)
        if any(itertools.chain(*corners)):
            positions = positions - _of_rows(corners, sizes, positions)
    if lattice and check_values:
        _check_lattice(positions, sides, sizes)
    triton_lacks = partial(_triton_lacks, sides, lattice)
    chosen = choose(
        "select_centers", impl, {"cpu": lacks_nothing, "triton": triton_lacks}, positions.device
    )
    keep = tuple(min(size, max(1, int(size * rate))) for size in sizes)
    coarse = [0.0] * len(sizes)
    if reserve:
        nodes = partial(_nodes, sides)
        if (is_measured or not lattice) and can_read(positions):
            nodes = partial(_reserved, positions, sizes, sides, lattice)
        coarse, room = _reserved_strides(nodes, sides, keep, stride, reserve_share)
        keep = tuple(
            min(size, max(count, most)) for size, count, most in zip(sizes, keep, room, strict=True)
        )
    search = partial(
        knn, positions, sizes=sizes, along_curve=along_curve, check_values=False, impl=chosen
    )
    if chosen == "triton" and lattice:
        pair = search(2) if prior == "adaptive" else None
        options = (alpha, int(stride), prior == "grid", [*map(int, coarse)], chosen)
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
            [*map(int, coarse)],
            chosen,
        )
        return index, keep

    nearest, even = None, None
    if prior == "adaptive":
        index = search(1, include_self=False)
        assert isinstance(index, Tensor)
        nearest = index[:, 0].long()
    if not lattice:
        even = _evenly(positions, sizes, sides, along_curve, chosen)
    has_prior = _has_prior(positions, nearest, sizes, sides, stride, prior, lattice)
    reserved = _nodes_of(positions, sizes, sides, coarse, lattice)
    ranking = has_prior.float() + alpha * scores
    return reference.select(ranking, reserved, sizes, keep, even), keep


def spread_scores(
    scores: Tensor,
    positions: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    spread: float,
    neighbors: int = 8,
    along_curve: bool = False,
    check_values: bool = True,
    impl: str | None = None,
) -> Tensor:
    """Scores whose best lie on more places: s * (1 - spread)^r for a token with a score of s, of
    whose nearest tokens r score higher.

    To rank by, where few tokens are kept (`select_centers`). Scores that say what is worth a closer
    look are high side by side: the best of them crowd on the clearest objects, and others get none.
    A further token on the same object tells less than the first one on another.

    Args:
        scores: (T,) floating, finite, at least 0.
        positions: (T, D) float32, D = 2 or 3, samples one after the other.
        sizes: tokens per sample, B host integers; `None` for one sample.
        batch: in place of `sizes` the sample of each token, see `sizes_from_batch`.
        spread: share of a score that each better neighbor takes, in [0, 1].
        neighbors: how many tokens are looked at, the nearest in the sample; of fewer all.
        along_curve, impl: see `knn`, which finds them.
        check_values: whether to look for scores and positions that do not fit, which waits for the
            device. Never done under `torch.compile` and while a CUDA graph is captured.

    Returns:
        (T,) float32 without gradients; a score that no neighbor exceeds is as it was.

    Raises:
        TypeError, ValueError: an argument does not fit, a score is NaN, infinite or negative, or a
            position is NaN or infinite.
    """
    positions = check_positions("positions", positions).detach()
    scores = check_tensor("scores", scores, positions.shape[:1], FLOATS, positions.device)
    scores = scores.detach().float()
    check_number("spread", spread, least=0, most=1)
    check_count("neighbors", neighbors)
    check_flags(check_values=check_values)
    if check_values and can_read(scores) and not bool(((scores >= 0) & scores.isfinite()).all()):
        raise ValueError("scores: expected finite numbers of at least 0")
    nearest = knn(
        positions, neighbors, sizes=sizes, batch=batch, include_self=False, along_curve=along_curve,
        check_values=check_values, impl=impl,
    )  # fmt: skip
    assert isinstance(nearest, Tensor)
    better = (scores[nearest.clamp(min=0).long()] > scores[:, None]) & (nearest >= 0)
    return scores * (1 - spread) ** better.sum(1, dtype=scores.dtype)


def best_of_runs(
    scores: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    rate: float,
    check_values: bool = True,
) -> tuple[Tensor, tuple[int, ...]]:
    """Of each sample's rows, in ceil(n * rate) runs as equal as can be, the best-scored of each.

    Of rows along a space-filling curve, as in cluster order, it keeps the density, whatever the
    extent, with a say of the scores.

    Args:
        scores: (T,) floating, importance of each row.
        sizes: rows per sample, B host integers; `None` for one sample.
        batch: in place of `sizes` the sample of each row, see `sizes_from_batch`.
        rate: share of the rows to keep, in (0, 1].
        check_values: whether to look for scores that are NaN, which else are above all; this waits
            for the device. Never done under `torch.compile` and while a CUDA graph is captured.

    Returns:
        Rows, (T',) int64 ascending, the first of equal ones, and how many there are per sample.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or value does not fit, or a score is
            NaN.
    """
    scores = check_tensor("scores", scores, ("T",), FLOATS).detach()
    sizes = check_sizes("sizes", sizes, len(scores), batch)
    rate = check_number("rate", rate, above=0, most=1)
    check_flags(check_values=check_values)
    if check_values:
        _check_scores(scores)
    # 70 * 0.1 is a little more than 7 in binary numbers, and not meant so.
    counts: tuple[int, ...]
    if isinstance(sizes, Tensor):
        counts = (sizes.double() * rate - 1e-6).ceil().long().maximum(sizes.clamp(max=1))
    else:
        counts = tuple(max(math.ceil(size * rate - 1e-6), min(size, 1)) for size in sizes)
    longest = math.ceil(1 / rate)
    if not torch.compiler.is_compiling():
        longest = min(longest, max(sizes, default=0))
    longest = max(longest, 1)
    device = scores.device
    sample = sample_of_rows(counts, device)
    runs, rows = offsets_of(counts, device), offsets_of(sizes, device)
    size, count = rows.diff()[sample], runs.diff()[sample]
    run = torch.arange(len(sample), device=device) - runs[sample]
    start = rows[sample]
    first, end = start + run * size // count, start + (run + 1) * size // count
    row = first[:, None] + torch.arange(longest, device=device)
    inside = row < end[:, None]
    found = scores[torch.where(inside, row, 0)].masked_fill(~inside, -torch.inf)
    return first + found.argmax(1), counts


def _of_rows(
    rows: Sequence[tuple[float, ...]], sizes: tuple[int, ...], positions: Tensor
) -> Tensor:
    """(T, D) or (1, D) float32: the numbers of each row's sample."""
    if rows and all(map(alike, zip(*rows, strict=True))):  # no copy from the host
        return torch.stack([torch.full_like(positions[:, 0], number) for number in rows[0]], 1)
    table = from_host(rows, torch.float32, positions.device).reshape(len(sizes), positions.shape[1])
    return table[sample_of_rows(sizes, positions.device)]


def _nodes(sides: Sequence[tuple[float, ...]], coarse: Sequence[float]) -> list[int]:
    """Multiples of `coarse` in each canvas."""
    return [
        math.prod([max(1, math.ceil(length / apart)) for length in side])
        for side, apart in zip(sides, coarse, strict=True)
    ]


def _nodes_of(
    positions: Tensor,
    sizes: tuple[int, ...],
    sides: Sequence[tuple[float, ...]],
    coarse: Sequence[float],
    lattice: bool,
) -> Tensor:
    """(T,) bool: the tokens that play the part of multiples of `coarse`; none where that is 0."""
    if not any(coarse):
        return torch.zeros(len(positions), dtype=torch.bool, device=positions.device)
    dtype = torch.int64 if lattice else torch.float32
    sample = sample_of_rows(sizes, positions.device)
    if len(set(coarse)) == 1:  # no copy from the host
        apart = torch.full_like(sample, coarse[0], dtype=dtype)
    else:
        apart = from_host(coarse, dtype, positions.device)[sample]
    if lattice:
        return reference.on_lattice(positions, apart)
    return reference.nearest_to_nodes(positions, sample, apart, _of_rows(sides, sizes, positions))


def _reserved(
    positions: Tensor,
    sizes: tuple[int, ...],
    sides: Sequence[tuple[float, ...]],
    lattice: bool,
    coarse: Sequence[float],
) -> list[int]:
    """Number of tokens of each sample that play the part of multiples of `coarse`."""
    chosen = _nodes_of(positions, sizes, sides, coarse, lattice)
    total = torch.nn.functional.pad(chosen.cumsum(0), (1, 0))
    return total[offsets_of(sizes, positions.device)].diff().tolist()


def _reserved_strides(
    nodes: Callable[[Sequence[float]], list[int]],
    sides: Sequence[tuple[float, ...]],
    keep: tuple[int, ...],
    stride: float,
    share: float | None,
) -> tuple[list[float], list[int]]:
    """Distance between reserved nodes of each sample, and how many of them `nodes` counts."""
    coarse = [2.0 * stride] * len(sides)
    while True:
        count = nodes(coarse)
        crowded = [
            share is not None and found > max(1, share * kept) and apart < max(side)
            for found, kept, apart, side in zip(count, keep, coarse, sides, strict=True)
        ]
        if not any(crowded):
            return coarse, count
        coarse = [apart * (1 + more) for apart, more in zip(coarse, crowded, strict=True)]


def _evenly(
    positions: Tensor,
    sizes: tuple[int, ...],
    sides: Sequence[tuple[float, ...]],
    along_curve: bool,
    impl: str,
) -> Tensor:
    """(T,) int64 that sort rows of a sample so that the first ones are spread evenly."""
    place = torch.arange(len(positions), device=positions.device)
    if not along_curve:
        extent = None if can_read(positions) else [*map(list, sides)]
        order = balanced_cluster(
            positions, sizes=sizes, extent=extent, anchors=False, check_values=False, impl=impl
        ).order
        place = torch.empty_like(order).scatter(0, order, place)
    sample = sample_of_rows(sizes, positions.device)
    place = place - offsets_of(sizes, positions.device)[sample]
    even = torch.zeros_like(place)
    # More bits than the longest sample needs change no order; compiled code is for any sizes.
    bits = _ROW_BITS if torch.compiler.is_compiling() else max((0, *sizes)).bit_length()
    for _ in range(bits):
        even, place = 2 * even + place % 2, place // 2
    return even


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


def _has_prior(
    positions: Tensor,
    nearest: Tensor | None,
    sizes: tuple[int, ...],
    sides: Sequence[tuple[float, ...]],
    stride: float,
    prior: str | None,
    lattice: bool,
) -> Tensor:
    """(T,) bool"""
    if nearest is None:
        apart = stride if prior == "grid" else 0.0
        return _nodes_of(positions, sizes, sides, [float(apart)] * len(sizes), lattice)
    if lattice:
        return reference.on_lattice(positions, 2 * reference.lattice_spacing(positions, nearest))
    sample = sample_of_rows(sizes, positions.device)
    limit = _of_rows(sides, sizes, positions)
    side = 2 * reference.spacing(positions, nearest, limit.amax(1))
    return reference.nearest_to_nodes(positions, sample, side, limit)


def _check_scores(scores: Tensor) -> None:
    if not can_read(scores):
        return
    bad = scores.isnan()
    if bool(bad.any()):
        raise ValueError(
            f"scores: expected numbers, got NaN in {int(bad.sum())} of {len(scores)} rows, "
            f"first in row {int(bad.nonzero()[0])}; look for NaN in what they were computed from, "
            "such as images and weights"
        )


def _check_lattice(
    positions: Tensor, sides: Sequence[tuple[float, ...]], sizes: tuple[int, ...]
) -> None:
    """Raise if a position is not an integer inside the canvas, naming the sample."""
    if not can_read(positions):
        return
    limit = torch.tensor(sides, dtype=torch.float64, device=positions.device)
    limit = limit.reshape(len(sizes), positions.shape[1])
    sample = sample_of_rows(sizes, positions.device)
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


@torch.library.custom_op("pointformer::ragged_centers", mutates_args=())
def _untraced(
    scores: Tensor,
    positions: Tensor,
    sizes: Tensor,
    extent: Tensor | None,
    origin: Tensor | None,
    rate: float,
    alpha: float,
    stride: float,
    prior: str | None,
    reserve: bool,
    reserve_share: float | None,
    lattice: bool,
    along_curve: bool,
    check_values: bool,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """`select_centers` within compiled code."""
    index, keep = select_centers(
        scores, positions, sizes=sizes.tolist(), extent=extent, origin=origin, rate=rate,
        alpha=alpha, stride=stride, prior=prior, reserve=reserve, reserve_share=reserve_share,
        lattice=lattice, along_curve=along_curve, check_values=check_values, impl=impl,
    )  # fmt: skip
    return index, from_host(keep, torch.int64, None)


@_untraced.register_fake
def _fake_untraced(scores, positions, sizes, *options):
    kept = torch.library.get_ctx().new_dynamic_size()
    return positions.new_empty(kept, dtype=torch.int64), torch.empty_like(sizes)
