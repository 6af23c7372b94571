"""Some of the points: far from each other, along a curve, at random."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer._checks import (
    brief,
    check_count,
    check_device,
    check_finite,
    check_flags,
    check_integers,
    check_number,
    check_positions,
    check_sizes,
    describe,
    on_host,
)
from pointformer._dispatch import choose, lacks_nothing
from pointformer.clusters import offsets_of, total_of
from pointformer.geometry.clustering import balanced_cluster
from pointformer.graph.batch import batch_from_sizes
from pointformer.kernels.sampling import fused_farthest_points
from pointformer.reference.sampling import farthest_points


def farthest_point_sample(
    positions: Tensor,
    *,
    rate: float | None = None,
    count: int | Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    start: int | Sequence[int] = 0,
    generator: torch.Generator | None = None,
    check_values: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Points far from each other: each is the one farthest from all that were picked before.

    Exact, and the same bit for bit in every implementation: squared distances in float32,
    dx*dx + dy*dy [+ dz*dz] with every operation rounded, ties to the lowest row. No row is picked
    twice, also where points are equal. On CPUs each pick looks only at the points around it.

    Args:
        positions: (T, D) float32, D = 2 or 3, samples one after the other.
        rate: share of each sample to pick, in (0, 1]: int(n * rate) of n points, at least one.
        count: in place of `rate`, how many to pick of each sample, one number for all or B of them;
            of a smaller sample all are.
        sizes: points per sample, B host integers; `None` for one sample.
        batch: in place of `sizes` the sample of each point, see `sizes_from_batch`.
        start: row within its sample of the first pick, one for all samples or B of them.
        generator: draws the first picks in place of `start`; one of the CPU.
        check_values: whether to look for positions that are not finite, which waits for the device.
        impl: "reference", "cpu" or "triton"; `None` chooses by device. "torch_cluster" for
            comparison where torch-cluster is installed: it starts with row 0.

    Returns:
        Rows of `positions`, int64, sample by sample in the order in which they are picked, so that
        a part from the front of a sample's is spread as well; and how many there are per sample.

    Raises:
        TypeError, ValueError: an argument does not fit, or a position is not finite.
    """
    positions = check_positions("positions", positions).detach()
    sizes = check_sizes("sizes", sizes, len(positions), batch)
    check_flags(check_values=check_values)
    if check_values:
        check_finite("positions", positions, sizes)
    counts = _counts(sizes, rate, count)
    if isinstance(sizes, Tensor):
        _check_generator(generator)
        if generator is not None:
            raise ValueError("generator: expected None in compiled code; draw start outside")
        rows = _untraced(positions, sizes, counts, on_host(start), total_of(counts), impl)
        return rows, counts
    return _picks(positions, sizes, counts, _first_picks(sizes, start, generator), impl), counts


def _picks(
    positions: Tensor,
    sizes: tuple[int, ...],
    counts: tuple[int, ...],
    first: tuple[int, ...],
    impl: str | None,
) -> Tensor:
    def torch_cluster_lacks() -> str | None:
        return "start is not row 0 of all samples" if any(first) else None

    implementations = {"cpu": lacks_nothing, "triton": lacks_nothing}
    implementations["torch_cluster"] = torch_cluster_lacks  # type: ignore[assignment]
    chosen = choose("farthest_point_sample", impl, implementations, positions.device)
    if chosen == "reference":
        return farthest_points(positions, sizes, counts, first)
    return fused_farthest_points(positions, sizes, counts, first, chosen)


@torch.library.custom_op("pointformer::ragged_farthest_points", mutates_args=())
def _untraced(
    positions: Tensor, sizes: Tensor, counts: Tensor, start: Tensor, total: int, impl: str | None
) -> Tensor:
    """The rows of `farthest_point_sample` within compiled code."""
    points = tuple(sizes.tolist())
    first = _first_picks(points, start.tolist(), None)
    return _picks(positions, points, tuple(counts.tolist()), first, impl)


@_untraced.register_fake
def _fake(positions, sizes, counts, start, total, impl):
    return positions.new_empty(total, dtype=torch.int64)


def curve_sample(
    positions: Tensor,
    *,
    rate: float | None = None,
    count: int | Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    batch: Tensor | None = None,
    curve: str = "hilbert",
    check_values: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Every n-th point along a space-filling curve: of even parts of it the points in the middle.

    It keeps the density of the points, in linear time.

    Args:
        curve: see `balanced_cluster`.

    Other arguments, and errors, are those of `farthest_point_sample`.

    Returns:
        Rows of `positions`, int64, sample by sample along the curve, and how many per sample.
    """
    check_positions("positions", positions)
    sizes = check_sizes("sizes", sizes, len(positions), batch)
    counts = _counts(sizes, rate, count)
    order = balanced_cluster(
        positions, 1, sizes=sizes, curve=curve, anchors=False, check_values=check_values, impl=impl
    ).order
    sample = batch_from_sizes(counts, positions.device)
    nth = torch.arange(len(sample), device=positions.device)
    nth = nth - offsets_of(counts, positions.device)[sample]
    starts = offsets_of(sizes, positions.device)
    length, number = starts.diff()[sample], offsets_of(counts, positions.device).diff()[sample]
    return order[starts[sample] + (2 * nth + 1) * length // (2 * number)], counts


def random_sample(
    sizes: Sequence[int],
    *,
    rate: float | None = None,
    count: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Rows of a packed batch at random, each subset of a sample as likely as the others.

    Args:
        sizes: rows per sample, B host integers.
        rate, count: see `farthest_point_sample`.
        generator: of `device`; `None` for torch's own.
        device: where the rows are wanted; `None` for that of the generator, or the CPU.

    Returns:
        Rows, int64, sample by sample in random order, and how many per sample.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    sizes, device = check_sizes("sizes", sizes, None), check_device(device)
    counts = _counts(sizes, rate, count)
    _check_generator(generator)
    if isinstance(sizes, Tensor) and generator is not None:
        raise ValueError("generator: expected None in compiled code; use torch.manual_seed outside")
    if device is None and generator is not None:
        device = generator.device
    if isinstance(sizes, Tensor):  # while compiling, when there is no permutation of unknown length
        shuffled = torch.rand(total_of(sizes), dtype=torch.float64, device=device).argsort()
    else:
        shuffled = torch.randperm(sum(sizes), generator=generator, device=device)
    sample = batch_from_sizes(sizes, device)
    order = shuffled[torch.sort(sample[shuffled], stable=True).indices]
    taken = batch_from_sizes(counts, device)
    nth = torch.arange(len(taken), device=device) - offsets_of(counts, device)[taken]
    return order[offsets_of(sizes, device)[taken] + nth], counts


def _counts(
    sizes: tuple[int, ...], rate: float | None, count: int | Sequence[int] | None
) -> tuple[int, ...]:
    if (rate is None) == (count is None):
        given = "none" if rate is None else "both"
        raise ValueError(f"rate, count: expected one of them, got {given}")
    if rate is not None:
        rate = check_number("rate", rate, above=0, most=1)
    if isinstance(sizes, Tensor):  # while compiling
        if rate is not None:
            return torch.minimum(sizes, (sizes.double() * rate).long().clamp(min=1))
        wanted = on_host(count)
        if wanted.dim():
            torch._check(len(wanted) == len(sizes), lambda: "count: expected one for each sample")
        return torch.minimum(sizes, wanted)
    if rate is not None:
        return tuple(min(size, max(1, int(size * rate))) for size in sizes)
    return tuple(map(min, sizes, _per_sample("count", count, len(sizes))))


def _per_sample(name: str, given: object, samples: int) -> tuple[int, ...]:
    """B integers of at least 0, from one for all or B of them."""
    if isinstance(given, Sequence | Tensor) and not isinstance(given, str):
        numbers = check_integers(name, given, "one for each sample")
        if len(numbers) != samples:
            raise ValueError(
                f"{name}: expected one for each of {samples} samples, got {brief(given)}"
            )
    else:
        numbers = (given,) * samples  # type: ignore[assignment]
        check_count(name, given, least=0)
    for number in set(numbers):
        check_count(name, number, least=0)
    return tuple(map(operator.index, numbers))


def _first_picks(
    sizes: tuple[int, ...], start: int | Sequence[int], generator: torch.Generator | None
) -> tuple[int, ...]:
    _check_generator(generator)
    if generator is not None:
        share = torch.rand(len(sizes), generator=generator, dtype=torch.float64).tolist()
        return tuple(int(x * size) for x, size in zip(share, sizes, strict=True))
    first = _per_sample("start", start, len(sizes))
    for sample, (row, size) in enumerate(zip(first, sizes, strict=True)):
        if row >= size > 0:
            raise ValueError(
                f"start: row {row} of sample {sample} with {size} points does not exist"
            )
    return first


def _check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {describe(generator)}")
