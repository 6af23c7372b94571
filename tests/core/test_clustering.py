"""Balanced clustering: balance, the exact order, and equal bits in every implementation."""

import inspect
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.strategies import KINDS, UNEVEN, Tokens, full_lattice, scattered, tokens
from pointformer import TokenSet, balanced_cluster, curve_sample, nearest_clusters
from pointformer.geometry import (
    boxes,
    clustering,
    hilbert_code,
    morton_code,
    peano_code,
    snake_code,
)
from pointformer.kernels.clustering import fused_cluster_centers, fused_cluster_keys, fused_kd_keys
from pointformer.reference import clustering as reference

PARITY = Path(__file__).parents[1] / "parity"
GRIDS = ("hilbert", "morton", "peano", "snake")  # curves through cells
CURVES = (*GRIDS, "kd")
IMPLEMENTATIONS = ("reference", "cpu")

options = st.fixed_dictionaries(
    {
        "curve": st.sampled_from(CURVES),
        "anchors": st.booleans(),
        "remainder": st.sampled_from(["spread", "last"]),
        "cluster_size": st.sampled_from([1, 3, 8, 24]),
        "global_size": st.sampled_from([0, 0, 20]),
    }
)


def cluster(sample: Tokens, **kwargs):
    return balanced_cluster(sample.positions, sizes=sample.sizes, extent=sample.extent, **kwargs)


def expected_keys(positions, extent, cluster_size, curve):
    """The stated keys (anchor, ratio, row) of one sample, one token at a time in numpy float32."""
    f32 = np.float32
    n, dimensions = positions.shape
    k = math.ceil(n / cluster_size)
    shape, length = [1] * dimensions, 1.0
    axes = [a for a in range(dimensions) if extent[a] > 0]
    while axes:
        length = math.prod(extent[a] for a in axes) / k
        length = math.sqrt(length) if len(axes) == 2 else length ** (1 / len(axes))
        counts = {a: round(extent[a] / length) for a in axes}
        if min(counts.values()) > 0:
            for a in axes:
                shape[a] = counts[a]
            break
        axes = [a for a in axes if counts[a] > 0]
    cell = [f32(extent[a] / shape[a] if extent[a] > 0 else length) for a in range(dimensions)]
    cells = full_lattice(shape).long()
    code = {
        "hilbert": lambda: hilbert_code(cells),
        "morton": lambda: morton_code(cells),
        "peano": lambda: peano_code(cells),
        "snake": lambda: snake_code(cells, torch.tensor(shape)),
    }[curve]()
    walk = [tuple(c) for c in cells[torch.argsort(code)].tolist()]
    rank_of = {c: rank for rank, c in enumerate(walk)}
    if curve == "snake":
        centers = [
            np.array(
                [f32(f32(g) * s) + s / f32(2) - f32(0.5) for g, s in zip(c, cell, strict=True)], f32
            )
            for c in walk
        ]
        unit = [f32(1)] * dimensions
    else:
        centers = [np.array(c, f32) + f32(0.5) for c in walk]
        unit = cell
    step = np.zeros(dimensions, f32)
    step[extent.index(max(extent))] = 1
    step *= np.array(cell) / np.array(unit)
    if len(walk) == 1:
        before, after = centers[0] - step, centers[0] + step
    else:
        before = centers[0] - (centers[1] - centers[0])
        after = centers[-1] + (centers[-1] - centers[-2])
    centers = [before, *centers, after]

    def squared(a, b):
        total = f32(0)
        for u, v in zip(a, b, strict=True):
            total = f32(total + (u - v) * (u - v))
        return total

    keys = []
    for row, p in enumerate(positions.numpy()):
        where = tuple(
            min(max(int(np.floor(p[a] / cell[a])), 0), shape[a] - 1) for a in range(dimensions)
        )
        point = [p[a] / unit[a] for a in range(dimensions)]
        rank = rank_of[where]
        ratio = squared(point, centers[rank]) / (squared(point, centers[rank + 2]) + f32(1e-5))
        keys.append((rank, ratio, row))
    return sorted(keys)


def longest_axis(positions):
    """The first of the longest sides of the bounding box, in float32."""
    return int(np.argmax(np.ptp(positions.numpy(), axis=0)))


def lengths_of(n, cluster_size):
    k = math.ceil(n / cluster_size)
    return [n // k + (i < n % k) for i in range(k)]


def expected_walk(positions, cluster_size, curve, extent=None):
    """Rows in order and those in crowded cells, which are ordered in their own bounding box."""
    low = 0.0
    given = extent is not None
    if not given:
        low = positions.amin(0)
        extent = (positions.amax(0) - low).tolist()
    order, crowded = [], set()
    keys = expected_keys(positions - low, extent, cluster_size, curve)
    for _, cell in itertools.groupby(keys, lambda key: key[0]):
        rows = [row for *_, row in cell]
        is_released = given and curve == "snake"
        is_part = len(rows) < len(positions) or given
        if len(rows) > 4 * cluster_size and is_part and not is_released:
            again, _ = expected_walk(positions[rows], cluster_size, curve)
            rows = [rows[i] for i in again]
            crowded.update(rows)
        order += rows
    return order, crowded


def expected_order(positions, cluster_size, curve, extent=None):
    """The stated order of one sample, with pairs of clusters of crowded cells cut across."""
    if curve == "kd":
        return expected_cuts(positions, lengths_of(len(positions), cluster_size))
    order, crowded = expected_walk(positions, cluster_size, curve, extent)
    lengths, start = lengths_of(len(order), cluster_size), 0
    for i in range(0, len(lengths), 2):
        end = start + sum(lengths[i : i + 2])
        pair = order[start:end]
        if crowded & set(pair) and len(lengths) > i + 1:
            axis = longest_axis(positions[pair])
            order[start:end] = sorted(pair, key=lambda row, axis=axis: float(positions[row, axis]))
        start = end
    return order


def expected_cuts(positions, lengths):
    """The stated order of "kd", by recursion; the clusters have `lengths` tokens."""

    def cut(rows, lengths, back):
        if len(lengths) == 1:
            return rows
        axis = longest_axis(positions[rows])
        sign = -1 if axis in back else 1
        rows = sorted(rows, key=lambda row: sign * float(positions[row, axis]))
        half = (len(lengths) + 1) // 2
        first = sum(lengths[:half])
        turned = back ^ (set(range(positions.shape[1])) - {axis})
        return cut(rows[:first], lengths[:half], back) + cut(rows[first:], lengths[half:], turned)

    return cut(list(range(len(positions))), lengths, set())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(
    sample=tokens(kinds=KINDS + UNEVEN, max_size=40, max_samples=2),
    curve=st.sampled_from(CURVES),
    measured=st.booleans(),
)
def test_order_is_the_stated_one(impl, sample, curve, measured):
    """One token at a time; with cells that are crowded, of the canvas or of the bounding box."""
    extent = None if measured else sample.extent
    result = balanced_cluster(
        sample.positions, 2, sizes=sample.sizes, extent=extent, curve=curve, impl=impl
    )
    start, expected = 0, []
    for part in sample.samples():
        if part.sizes[0]:
            canvas = None if measured else part.extent[0]
            expected += [start + r for r in expected_order(part.positions, 2, curve, canvas)]
        start += part.sizes[0]
    assert result.order.tolist() == expected


UNFIT = [(1e5, 1e5), (1e12, 3.0), (0.01, 0.01), (0.0, 1e6)]


@pytest.mark.parametrize("extent", UNFIT)
@pytest.mark.parametrize("curve", GRIDS)
def test_a_canvas_that_does_not_fit_costs_nothing(curve, extent):
    positions = scattered("even", 3000, 2)
    even = share_of_nearest(positions, curve=curve)
    options = {"curve": curve, "anchors": curve != "snake", "adaptive": True}
    assert share_of_nearest(positions, extent=extent, **options) > even - 0.06
    worse = share_of_nearest(positions, extent=extent, **options | {"adaptive": False})
    assert worse < even - 0.2
    if curve == "hilbert":
        assert share_of_nearest(positions, extent=extent) > even - 0.06


def test_only_the_released_order_is_not_adaptive():
    """And what waits is an error where nothing can, unless it was not asked for."""
    positions = scattered("blobs", 400, 2)
    for curve, anchors in itertools.product(GRIDS, (True, False)):
        default, *orders = (
            balanced_cluster(
                positions, extent=(2e4, 2e4), curve=curve, anchors=anchors, **given
            ).order
            for given in ({}, {"adaptive": False}, {"adaptive": True})
        )
        is_released = curve == "snake" and anchors
        assert [torch.equal(default, order) for order in orders] == [is_released, not is_released]

    def run(positions, adaptive):
        return balanced_cluster(positions, extent=(2e4, 2e4), adaptive=adaptive).order

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(positions, None), run(positions, False))
    with pytest.raises(Exception, match="adaptive: True waits for the device"):
        compiled(positions, True)


@pytest.mark.parametrize("curve", CURVES)
def test_a_shift_in_float64_changes_nothing(curve):
    """A cloud in map coordinates, whose origin is subtracted as in `TokenSet.from_world`."""
    local = scattered("blobs", 500, 3).double()
    world = local + torch.tensor([771_234.0, 6_277_553.0, 120.0])
    shifted = (world - world.amin(0)).float(), (local - local.amin(0)).float()
    first, second = (balanced_cluster(part, curve=curve).order for part in shifted)
    assert (first == second).double().mean() > 0.9  # the others are rounded in float64


def test_the_default_is_the_best_of_the_measured_orders():
    """Of those with 0.65 of the nearest on every cloud the one with the fewest clusters to read."""
    table = Path(__file__).parents[2] / "bench" / "results" / "locality.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    found = {
        order: [row for row in rows if row["order"] == order]
        for order in ("hilbert", "morton", "peano", "snake", "kd")
    }
    assert all(len(of_order) == len(found["hilbert"]) > 20 for of_order in found.values())
    good = [order for order, of in found.items() if min(row["share"] for row in of) >= 0.65]
    best = min(good, key=lambda order: sum(row["union"] for row in found[order]))
    assert best == inspect.signature(balanced_cluster).parameters["curve"].default


def share_of_nearest(positions, skip=(), **options):
    """Share of the 48 nearest tokens that are in the default neighborhoods, every fifth token's."""
    clusters = balanced_cluster(positions, **options)
    ordered = positions[clusters.order].double()
    members, known = nearest_clusters(ordered.float(), clusters).members()
    rows = torch.tensor([r for r in range(0, len(ordered), 5) if clusters.order[r] not in skip])
    nearest = torch.cdist(ordered[rows], ordered).topk(48, largest=False).indices
    found = (nearest[:, :, None] == members[rows, None]) & known[rows, None]
    return found.any(2).double().mean()


@pytest.mark.parametrize("anchors", [True, False])
@pytest.mark.parametrize("curve", GRIDS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_neighborhoods_hold_the_nearest_at_any_density(dimensions, curve, anchors):
    options = {"curve": curve, "anchors": anchors}
    even = share_of_nearest(scattered("even", 3000, dimensions), **options)
    default = curve == "hilbert" and anchors
    assert even > (0.7 if dimensions == 2 else 0.6)
    assert not default or even > (0.75 if dimensions == 2 else 0.65)
    for kind in ("strays", "blobs"):
        share = share_of_nearest(scattered(kind, 3000, dimensions), **options)
        assert share > even - 0.1
        assert not default or share > 0.65


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_stray_point_costs_nothing(dimensions):
    positions = scattered("even", 3000, dimensions)
    before = share_of_nearest(positions)
    for exponent in range(2, 19, 4):
        for axes in (slice(None), 0):
            positions[5, axes] = 10.0**exponent
            assert share_of_nearest(positions, skip=(5,)) > before - 0.02


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("anchors", [True, False])
@pytest.mark.parametrize("curve", CURVES)
def test_cells_are_divided_until_points_are_equal(curve, anchors, impl):
    """Sizes over all of float32's range, and equal points in one of the smallest cells."""
    rng = np.random.default_rng(0)
    nested = np.concatenate([rng.random((40, 3)) * 10.0**-n for n in range(-17, 40)])
    nested = np.concatenate([nested, nested[:1].repeat(300, 0)]).astype(np.float32)
    sizes = [len(nested) - 300, len(nested)]
    positions = torch.from_numpy(np.concatenate([nested[:-300], nested]))
    result = balanced_cluster(positions, sizes=sizes, curve=curve, anchors=anchors, impl=impl)
    for part in result.order.split(sizes):
        assert torch.equal(part.sort().values, torch.arange(len(part)) + part.min())
    equal = (positions == positions[sizes[0]]).all(1).nonzero()[1:, 0]
    places = result.inverse_order[equal]
    assert places.diff().min() > 0
    if curve != "kd":  # but where the pair of clusters at an end is cut
        assert places[-1] - places[0] < 301 + 2 * 8


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_more_samples_than_a_fine_curve_can_number(impl):
    """In 3-D: the place on the curve and the sample share 63 bits."""
    positions = torch.rand(2 * 300_000, 3, generator=torch.Generator().manual_seed(0))
    result = balanced_cluster(
        positions, sizes=[2] * 300_000, extent=(1, 1, 1), anchors=False, impl=impl
    )
    assert torch.equal(result.order // 2, torch.arange(600_000) // 2)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_sample_of_the_global_size_keeps_its_order(impl):
    positions = torch.rand(41, 2, generator=torch.Generator().manual_seed(0))
    result = balanced_cluster(positions, 4, sizes=[20, 21], global_size=20, impl=impl)
    alone = balanced_cluster(positions[20:], 4, impl=impl)
    assert result.order[:20].tolist() == list(range(20))
    assert result.order[20:].tolist() == (alone.order + 20).tolist() != list(range(20, 41))


@pytest.mark.parametrize("sides", [(3e6, 0.0), (0.0, 7.0, 0.0)])
def test_no_axis_has_more_cells_than_curves_can_number(sides):
    """3 M clusters on a line: 2**20 cells that cover it."""
    shape, cell = clustering._anchor_grid(sides, 3_000_000)
    for side, cells, length in zip(sides, shape, cell, strict=True):
        assert cells == (2**20 if side else 1)
        assert cells * length == pytest.approx(side or length)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["any", "flat", "equal", "integers", "thin"])
def test_grids_of_all_canvases_are_those_of_each(kind, dimensions):
    """Bit for bit, for a cell that is rounded otherwise gives another order."""
    rng = np.random.default_rng(0)
    sides = rng.random((2000, dimensions)) * 10.0 ** rng.integers(-9, 9, (2000, 1))
    if kind == "flat":
        sides[rng.random(sides.shape) < 0.4] = 0
    elif kind == "equal":
        sides[:] = sides[:, :1]
    elif kind == "integers":
        sides = rng.integers(0, 200, sides.shape).astype(float)
    elif kind == "thin":
        sides *= 10.0 ** rng.integers(-5, 5, sides.shape)
    counts = (10 ** (rng.random(2000) * 6.5)).astype(int)
    counts[:100] = 0
    shape, cell = clustering._anchor_grid_arrays(sides, counts)
    expected = [
        clustering._anchor_grid(*c) for c in zip(sides.tolist(), counts.tolist(), strict=True)
    ]
    assert shape.tolist() == [cells for cells, _ in expected]
    assert cell.tolist() == [lengths for _, lengths in expected]


@pytest.mark.parametrize("anchors", [True, False])
@pytest.mark.parametrize("measured", [True, False])
def test_no_function_is_called_for_each_sample(measured, anchors):
    def calls(samples):
        rng = np.random.default_rng(0)
        positions = torch.from_numpy(rng.random((samples * 5, 2), np.float32)) * 30
        extent = None if measured else (1 + 30 * rng.random((samples, 2))).tolist()
        sizes, names = rng.multinomial(samples * 5, [1 / samples] * samples).tolist(), Counter()

        def count(frame, event, _):
            if event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR:
                names[(frame.f_code.co_filename, frame.f_code.co_name)] += 1

        sys.setprofile(count)
        try:
            balanced_cluster(positions, sizes=sizes, extent=extent, anchors=anchors)
        finally:
            sys.setprofile(None)
        return names

    calls(50)  # what is done only once
    assert calls(50) == calls(200)


@given(sample=tokens(kinds=KINDS + UNEVEN), options=options, measured=st.booleans())
def test_clusters_are_balanced_and_cover_each_sample(sample, options, measured):
    extent = None if measured else sample.extent
    result = balanced_cluster(sample.positions, sizes=sample.sizes, extent=extent, **options)
    size = options["cluster_size"]
    assert result.sizes == sample.sizes
    assert result.counts == tuple(-(-n // size) for n in sample.sizes)
    assert result.offsets.dtype == torch.int32
    lengths = result.offsets.diff().tolist()
    first_cluster, start = 0, 0
    for n, count in zip(result.sizes, result.counts, strict=True):
        mine = lengths[first_cluster : first_cluster + count]
        rows = result.order[start : start + n].tolist()
        assert sum(mine) == n
        assert sorted(rows) == list(range(start, start + n))
        if options["remainder"] == "last":
            assert all(length == size for length in mine[:-1])
        elif mine:
            assert mine == sorted(mine, reverse=True)
            assert mine[0] - mine[-1] <= 1
        if n <= options["global_size"]:
            assert rows == list(range(start, start + n))
        first_cluster += count
        start += n
    members = sample.positions[result.order].double()
    means = torch.zeros(len(lengths), sample.dimensions, dtype=torch.float64)
    means.index_add_(0, result.assignment, members)
    means /= torch.tensor(lengths, dtype=torch.float64)[:, None]
    torch.testing.assert_close(result.centers.double(), means, rtol=1e-6, atol=1e-4)


@given(sample=tokens(kinds=KINDS + UNEVEN), options=options, measured=st.booleans())
def test_implementations_agree_bit_for_bit(sample, options, measured):
    extent = None if measured else sample.extent
    first, second = (
        balanced_cluster(sample.positions, sizes=sample.sizes, extent=extent, impl=impl, **options)
        for impl in IMPLEMENTATIONS
    )
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.offsets, second.offsets)
    assert torch.equal(first.centers, second.centers)


@given(sample=tokens(kinds=KINDS + UNEVEN), options=options, measured=st.booleans())
def test_a_ragged_batch_equals_its_samples(sample, options, measured):
    def run(part):
        extent = None if measured else part.extent
        return balanced_cluster(part.positions, sizes=part.sizes, extent=extent, **options)

    whole, start, first_cluster = run(sample), 0, 0
    for part in sample.samples():
        single, n = run(part), part.sizes[0]
        assert torch.equal(whole.order[start : start + n] - start, single.order)
        clusters = slice(first_cluster, first_cluster + single.num_clusters)
        assert torch.equal(whole.centers[clusters], single.centers)
        assert torch.equal(whole.offsets[:-1][clusters] - start, single.offsets[:-1])
        start += n
        first_cluster += single.num_clusters


THREE = Tokens(torch.tensor([[9.0, 1.0], [0.5, 20.0], [31.0, 15.0]]), (3,), ((34.0, 25.0),))


@example(sample=THREE, curve="kd", seed=0)
@given(
    sample=tokens(kinds=("uniform", "blob"), max_samples=1),
    curve=st.sampled_from(CURVES),
    seed=st.integers(0, 1000),
)
def test_permuted_tokens_fall_into_the_same_places(sample, curve, seed):
    shuffle = torch.randperm(len(sample.positions), generator=torch.Generator().manual_seed(seed))
    shuffled = Tokens(sample.positions[shuffle], sample.sizes, sample.extent)
    first, second = cluster(sample, curve=curve), cluster(shuffled, curve=curve)
    if curve == "kd" and first.num_clusters == 1:  # which nothing is to be cut for
        assert torch.equal(first.order, torch.arange(len(shuffle)))
        assert torch.equal(second.order, first.order)
        return
    moved = (first.inverse_order[shuffle] - second.inverse_order).abs()
    # Ratios of two random positions hardly ever tie; where they do, two neighbors swap places.
    assert bool((moved <= 1).all())
    assert moved.sum() <= 2


@pytest.mark.parametrize("curve", ["hilbert", "morton"])
def test_the_unit_of_positions_does_not_matter(curve):
    positions = torch.rand(500, 2, generator=torch.Generator().manual_seed(3)) * 20
    order = balanced_cluster(positions, extent=(20, 20), curve=curve).order
    scaled = balanced_cluster(positions / 64, extent=(20 / 64, 20 / 64), curve=curve).order
    assert torch.equal(order, scaled)


@pytest.mark.parametrize("anchors", [True, False])
def test_origin_is_the_corner_of_the_canvas(anchors):
    positions = torch.randint(0, 64, (300, 2), generator=torch.Generator().manual_seed(4)).float()
    shift = torch.tensor([128.0, -64.0])
    here = balanced_cluster(positions, extent=(64, 64), anchors=anchors)
    there = balanced_cluster(positions + shift, extent=(64, 64), origin=shift, anchors=anchors)
    assert torch.equal(here.order, there.order)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("curve", ["hilbert", "morton"])
def test_plain_curve_order(curve, dimensions):
    positions = torch.rand(400, dimensions, generator=torch.Generator().manual_seed(5))
    levels = 2**16 if dimensions == 2 else 2**15
    code = {"hilbert": hilbert_code, "morton": morton_code}[curve]((positions * levels).long())
    result = balanced_cluster(positions, extent=(1.0,) * dimensions, curve=curve, anchors=False)
    assert torch.equal(result.order, torch.sort(code, stable=True).indices)


@pytest.mark.parametrize("curve", CURVES)
def test_clusters_are_compact(curve):
    """Clusters of 8 on a full lattice are closer to a patch (mean radius 1.2) than to a row (2)."""
    positions = full_lattice((40, 40))
    result = balanced_cluster(positions, extent=(40, 40), curve=curve)
    spread = (positions[result.order] - result.centers[result.assignment]).norm(dim=1)
    assert spread.mean() < 1.7


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_released_order(impl, stage):
    stored = np.load(PARITY / "mini_160x192.npz")
    positions = full_lattice((48, 40))
    for i in range(1, stage):
        positions = positions[stored[f"s{i}_order"][0].astype(np.int64)]
        positions = positions[stored[f"s{i}_kept"][0].astype(np.int64)]
    result = balanced_cluster(
        positions, extent=(48, 40), curve="snake", remainder="last", global_size=48, impl=impl
    )
    assert np.array_equal(result.order, stored[f"s{stage}_order"][0])
    if stage < 4:
        assert np.array_equal(result.centers, stored[f"s{stage}_cluster_mean"][0])


@given(sample=tokens(kinds=KINDS[:2]))
def test_the_same_bits_with_any_number_of_threads(sample):
    threads = torch.get_num_threads()
    first = cluster(sample)
    try:
        torch.set_num_threads(1)
        second = cluster(sample)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.centers, second.centers)


def test_registered_ops():
    positions = torch.rand(60, 2)
    order, offsets = torch.randperm(60), torch.tensor([0, 20, 41, 60], dtype=torch.int32)
    torch.library.opcheck(fused_cluster_centers, (positions, order, offsets, "cpu"))
    first, last, back = torch.tensor([[0, 1, 1], [1, 3, 3], [0, 2, 2]])
    parts = (positions, order, offsets, first, last, back)
    torch.library.opcheck(fused_kd_keys, (*parts, "cpu"))
    for ours, theirs in zip(fused_kd_keys(*parts, "cpu"), reference.kd_keys(*parts), strict=True):
        assert torch.equal(ours, theirs)
    ones = torch.ones(2, 2)
    walk = (
        torch.tensor([0, 25, 60]), torch.zeros(2, 2), ones, ones, torch.ones(2, 2).long(),
        torch.tensor([0, 1]), torch.tensor([1, 4]), torch.rand(6, 2),
    )  # fmt: skip
    torch.library.opcheck(fused_cluster_keys, (positions, *walk, "cpu"))
    assert torch.equal(
        fused_cluster_keys(positions, *walk, "cpu"), reference.cluster_keys(positions, *walk)
    )


def test_clustering_compiles_in_one_graph():
    def run(positions):
        clusters = balanced_cluster(positions, sizes=[64, 36], extent=(16, 16))
        return clusters.order, clusters.centers

    positions = torch.rand(100, 2) * 16
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(compiled(positions), run(positions), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_position_that_is_not_finite_names_its_sample(value):
    positions = torch.zeros(10, 2)
    positions[7, 1] = value
    with pytest.raises(ValueError, match=r"positions: sample 1 has a NaN or infinite .* row 3"):
        balanced_cluster(positions, sizes=[4, 6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cluster_size": 0}, "cluster_size: expected a positive integer, got 0"),
        ({"curve": "spiral"}, "curve: expected one of hilbert, .*, kd, got 'spiral'"),
        ({"remainder": "first"}, "remainder: expected one of spread, last"),
        ({"sizes": [3, 3]}, "add up to 6, expected 10"),
        ({"extent": (1, 2, 3)}, "extent: expected 2 numbers per sample"),
        ({"extent": (1, -2)}, "extent: expected finite numbers >= 0"),
        ({"origin": (1, 2)}, "origin: give extent too"),
        ({"impl": "cuda"}, "impl='cuda' does not exist"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        balanced_cluster(torch.zeros(10, 2), **arguments)


def test_wrong_positions_are_named():
    with pytest.raises(TypeError, match=r"positions: expected dtype float32, got a float64"):
        balanced_cluster(torch.zeros(10, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"positions: expected shape"):
        balanced_cluster(torch.zeros(10, 4))
    with pytest.raises(TypeError, match=r"adaptive: expected True or False, got int 1"):
        balanced_cluster(torch.zeros(10, 2), adaptive=1)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("curve", ["hilbert", "morton", "peano"])
def test_plain_orders_have_the_stated_levels(curve, dimensions):
    """Points so near each other that coarser levels do not tell them apart."""
    levels = {"peano": 3 ** (10 if dimensions == 2 else 9)}.get(curve, 2 ** (18 - dimensions))
    if curve != "peano":
        levels = 2**16 if dimensions == 2 else 2**15
    side = torch.tensor(1 / levels, dtype=torch.float32)
    unit = torch.rand(400, dimensions, generator=torch.Generator().manual_seed(5))
    positions = 0.3 + unit * 16 * side
    code = {"hilbert": hilbert_code, "morton": morton_code, "peano": peano_code}[curve]
    expected = torch.sort(code((positions / side).long()), stable=True).indices
    result = balanced_cluster(positions, extent=(1.0,) * dimensions, curve=curve, anchors=False)
    assert torch.equal(result.order, expected)


@pytest.mark.parametrize("sizes", [(9,), (4, 0, 5), (0, 9), (3, 3, 3, 0), (0,), ()])
def test_bounding_boxes_are_those_of_each_sample(sizes):
    """By NumPy, and by torch as on GPUs."""
    positions = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(0))
    parts = [part if len(part) else torch.zeros(1, 3) for part in positions.split(sizes)]
    for can_read in (True, False):
        with mock.patch.object(boxes, "can_read", return_value=can_read):
            low, high = boxes.bounding_boxes(positions, sizes)
        assert low.tolist() == [part.amin(0).tolist() for part in parts]
        assert high.tolist() == [part.amax(0).tolist() for part in parts]


@pytest.mark.parametrize("anchors", [True, False])
@pytest.mark.parametrize("curve", GRIDS)
def test_boxes_too_small_to_be_divided(curve, anchors):
    """Of one step of float32, at zero."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 2, (16, 2), generator=generator) * 1e-45
    orders = [
        balanced_cluster(positions, 1, sizes=[8, 8], curve=curve, anchors=anchors, impl=impl).order
        for impl in IMPLEMENTATIONS
    ]
    assert torch.equal(*orders)
    assert (orders[0] // 8).tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize("curve", GRIDS)
def test_a_box_of_no_numbers_cannot_be_measured(curve):
    positions = torch.rand(9, 2)
    positions[4, 1] = math.nan
    with pytest.raises(ValueError, match="extent: cannot measure it, a position is NaN"):
        balanced_cluster(positions, 2, curve=curve, check_values=False)


def test_more_tokens_than_a_thread_takes_at_once():
    positions = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0))
    first, second = (
        balanced_cluster(positions, 1, sizes=[3000, 0, 7000], impl=impl) for impl in IMPLEMENTATIONS
    )
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.centers, second.centers)


@pytest.mark.parametrize("anchors", [True, False])
@pytest.mark.parametrize("side", [1e-200, 1e-41])
def test_canvases_too_small_for_cells(side, anchors):
    """Nothing is divided by what float32 does not hold, nor is there a cell for each step of it."""
    positions = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    for curve, impl in itertools.product(GRIDS, IMPLEMENTATIONS):
        order = balanced_cluster(
            positions, 2, sizes=[6, 6], extent=(side, side), curve=curve, anchors=anchors, impl=impl
        ).order
        assert (order // 6).tolist() == [0] * 6 + [1] * 6


def test_a_sample_of_a_tiny_cloud_is_its_own():
    positions = torch.tensor([[0.0, 0], [1e-44, 0], [0, 1e-44]]).repeat(2, 1)
    rows, counts = curve_sample(positions, count=1, sizes=[3, 3])
    assert counts == (1, 1)
    assert (rows // 3).tolist() == [0, 1]


def test_clusters_larger_than_the_samples_cost_nothing():
    """One for each sample, however many tokens it may have."""
    tokens = TokenSet(torch.rand(10, 2), sizes=(5, 5)).cluster(2**31 - 1)
    around = tokens.neighborhoods(1)
    rows, mask = around.members()
    assert rows.shape == mask.shape == (10, 10)
    assert mask.sum(1).tolist() == [5] * 10


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_both_zeros_are_one_number(impl):
    positions = torch.tensor([[0.0, 0], [0.0, 0], [-0.0, 0], [1.0, 0], [-0.0, 0], [2.0, 0]])
    order = balanced_cluster(positions, 1, curve="kd", impl=impl).order
    assert order.tolist() == [0, 1, 2, 4, 3, 5]
