"""Selection of merging centers: the stated tokens in the stated order, in every implementation."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.strategies import KINDS, UNEVEN, full_lattice, tokens
from pointformer import (
    TokenSet,
    balanced_cluster,
    best_of_runs,
    knn,
    select_centers,
    spread_scores,
)
from pointformer.kernels.selection import fused_select_on_lattice
from pointformer.reference import selection as reference

PARITY = Path(__file__).parents[1] / "parity"
IMPLEMENTATIONS = ("reference", "cpu")
LATTICES = ("lattice", "row")

options = st.fixed_dictionaries(
    {
        "rate": st.sampled_from([0.1, 0.25, 0.5, 1.0]),
        "alpha": st.sampled_from([0.0, 1.0, 4.0]),
        "stride": st.sampled_from([1, 2, 4, 8]),
        "prior": st.sampled_from(["adaptive", "grid", None]),
        "reserve": st.booleans(),
    }
)


def scores_of(sample, seed=0):
    """Scores with ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (len(sample.positions),), generator=generator) / 16


def power_of_two_above(distance):
    t = 1.0
    while t < distance:
        t *= 2
    while t / 2 >= distance:
        t /= 2
    return t


def spacings(positions):
    """Distance to the nearest other token, infinite for a lone one, in float32."""
    squares = torch.zeros(len(positions), len(positions))
    for axis in positions.T:
        squares += (axis[:, None] - axis).square()
    squares.fill_diagonal_(math.inf)
    return squares.amin(1).sqrt().tolist()


def expected(scores, has_prior, reserved, room, rate, alpha, ties=None):
    """Rows kept of one sample in their order; `ties` says which of equal ones come first."""
    n = len(scores)
    ties = ties or list(range(n))
    keep = min(n, max(int(n * rate), room))
    ranking = np.float32(alpha) * scores + np.array(has_prior, np.float32)
    fixed = [row for row in range(n) if reserved[row]][:keep]
    others = sorted((-ranking[row], ties[row], row) for row in range(n) if not reserved[row])
    return [row for *_, row in others[: keep - len(fixed)]] + fixed


def room_for(extent, stride, reserve):
    return math.prod(max(1, math.ceil(side / (2 * stride))) for side in extent) if reserve else 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(sample=tokens(kinds=LATTICES, max_size=60), options=options)
def test_selection_on_a_lattice_is_the_stated_one(impl, sample, options):
    scores = scores_of(sample)
    index, keep = select_centers(
        scores, sample.positions, sizes=sample.sizes, extent=sample.extent, impl=impl, **options
    )
    rows, kept, start = [], [], 0
    for part in sample.samples():
        (n,), cells = part.sizes, part.positions.long().tolist()
        sides = [1] * n
        if options["prior"] == "grid":
            sides = [options["stride"]] * n
        elif options["prior"] == "adaptive" and n > 0:
            near = spacings(part.positions)
            # A lone token is infinitely far from the others: only the origin is a node.
            sides = [2 * int(power_of_two_above(max(d, 1))) if d < 1e9 else 2**30 for d in near]
        on = [all(c % side == 0 for c in cell) for cell, side in zip(cells, sides, strict=True)]
        has_prior = on if options["prior"] else [False] * n
        reserved = [
            options["reserve"] and all(c % (2 * options["stride"]) == 0 for c in cell)
            for cell in cells
        ]
        mine = expected(
            scores[start : start + n].numpy(),
            has_prior,
            reserved,
            room_for(part.extent[0], options["stride"], options["reserve"]),
            options["rate"],
            options["alpha"],
        )
        rows += [start + row for row in mine]
        kept.append(len(mine))
        start += n
    assert keep == tuple(kept)
    assert index.tolist() == rows


def node_players(positions, side, extent):
    """The token nearest to each node, node by node, in float32; `side` per token."""
    f32 = np.float32
    best = {}
    for row, p in enumerate(positions.numpy()):
        node, square = [], f32(0)
        for x, length in zip(p, extent, strict=True):
            # Exact, as sides are powers of two: in float32 it is infinite for the least of them.
            last = max(math.ceil(float(f32(length)) / float(side[row])) - 1, 0)
            node.append(min(max(int(np.floor(x / f32(side[row]) + f32(0.5))), 0), last))
            difference = x - f32(node[-1]) * f32(side[row])
            square = square + difference * difference
        key = (side[row], *node)
        if key not in best or square < best[key][0]:
            best[key] = (square, row)
    players = {row for _, row in best.values()}
    return [row in players for row in range(len(positions))]


def every_second_first(positions):
    """The stated order of equal tokens: places on the curve as binary fractions, read backwards."""
    order = balanced_cluster(positions, anchors=False).order.tolist()
    digits = len(f"{len(order):b}")
    ties = {row: int(f"{place:0{digits}b}"[::-1], 2) for place, row in enumerate(order)}
    return [ties[row] for row in range(len(order))]


@example(  # two tokens at the origin: the spacing is the least that there is
    TokenSet(torch.tensor([[1.0, 4.0], [0.0, 0.0], [0.0, 0.0]]), extent=[(2.0, 13.0)]),
    {"rate": 0.5, "alpha": 0.0, "stride": 1, "prior": "adaptive", "reserve": False},
)
@given(sample=tokens(kinds=("uniform", "lattice", "blob", *UNEVEN), max_samples=1), options=options)
def test_selection_off_a_lattice_is_the_stated_one(sample, options):
    if len(sample.positions) == 0:
        return
    (n,), (extent,) = sample.sizes, sample.extent
    scores, stride = scores_of(sample), float(options["stride"])
    has_prior = reserved = [False] * n
    if options["prior"] == "grid":
        has_prior = node_players(sample.positions, [stride] * n, extent)
    elif options["prior"] == "adaptive":
        longest = max(extent)
        finest = (sample.positions.abs().amax(1) * 2.0**-23).clamp(min=2.0**-126).tolist()
        near = [
            max(min(d, 2 * longest), fine)
            for d, fine in zip(spacings(sample.positions), finest, strict=True)
        ]
        sides = [2 * power_of_two_above(np.float32(d)) for d in near]
        has_prior = node_players(sample.positions, sides, extent)
    if options["reserve"]:
        reserved = node_players(sample.positions, [2 * stride] * n, extent)
    assert sum(reserved) <= room_for(extent, stride, options["reserve"])
    index, _ = select_centers(
        scores, sample.positions, extent=sample.extent, lattice=False, **options
    )
    room = max(1, sum(reserved))
    ties = every_second_first(sample.positions)
    rows = expected(
        scores.numpy(), has_prior, reserved, room, options["rate"], options["alpha"], ties
    )
    assert index.tolist() == rows


@given(
    sample=tokens(kinds=KINDS + UNEVEN),
    options=options,
    share=st.sampled_from([None, 0.3]),
    lattice=st.booleans(),
    measured=st.booleans(),
)
def test_implementations_agree_and_samples_are_independent(
    sample, options, share, lattice, measured
):
    if lattice:
        sample.positions.floor_()
    if lattice and not measured:
        sample.positions.clamp_(0, 2**23)
        sample.extent = tuple(
            tuple((part.amax(0) + 1).tolist() if len(part) else (1.0,) * sample.dimensions)
            for part in sample.positions.split(sample.sizes)
        )
    options = {**options, "lattice": lattice, "reserve_share": share}
    scores = scores_of(sample)

    def run(part, values, impl):
        extent = None if measured else part.extent
        return select_centers(
            values, part.positions, sizes=part.sizes, extent=extent, impl=impl, **options
        )

    index, keep = run(sample, scores, "reference")
    fused = run(sample, scores, "cpu")
    assert torch.equal(index, fused[0])
    assert keep == fused[1]
    start, first = 0, 0
    for part, kept in zip(sample.samples(), keep, strict=True):
        values = scores[start : start + part.sizes[0]]
        for impl in IMPLEMENTATIONS:
            single, _ = run(part, values, impl)
            assert torch.equal(single + start, index[first : first + kept])
        start += part.sizes[0]
        first += kept


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("extent", [(11, 7), (8, 8), (1, 30), (5, 6, 4), (1, 1)])
@pytest.mark.parametrize("prior", ["adaptive", "grid", None])
def test_a_full_lattice_needs_no_lattice(prior, extent, impl):
    generator = torch.Generator().manual_seed(6)
    positions = full_lattice(extent)
    positions = positions[torch.randperm(len(positions), generator=generator)]
    scores = torch.rand(len(positions), generator=generator)
    kwargs = {"extent": extent, "rate": 0.3, "stride": 2, "prior": prior, "impl": impl}
    on, off = (select_centers(scores, positions, lattice=x, **kwargs) for x in (True, False))
    assert torch.equal(on[0], off[0])
    assert on[1] == off[1]


@given(sample=tokens(kinds=("uniform",), max_samples=1), seed=st.integers(0, 1000))
def test_permuted_tokens_give_the_same_centers(sample, seed):
    generator = torch.Generator().manual_seed(seed)
    count = len(sample.positions)
    shuffle = torch.randperm(count, generator=generator)
    scores = torch.randperm(count, generator=generator).float() / max(count, 1)
    kwargs = {"rate": 0.25, "stride": 2, "prior": None, "reserve": False, "lattice": False}
    first, _ = select_centers(scores, sample.positions, **kwargs)
    second, _ = select_centers(scores[shuffle], sample.positions[shuffle], **kwargs)
    assert torch.equal(shuffle[second], first)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_released_selection(impl, stage):
    stored = np.load(PARITY / "mini_160x192.npz")
    index, keep = select_centers(
        torch.from_numpy(stored[f"s{stage}_scores"][0]),
        torch.from_numpy(stored[f"s{stage}_positions"][0]).float(),
        extent=(48, 40),
        rate=0.25,
        stride=2**stage,
        impl=impl,
    )
    assert keep == stored[f"s{stage}_kept"].shape[1:]
    assert np.array_equal(index, stored[f"s{stage}_kept"][0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["merge_s2", "merge_s4"])
def test_released_merge_centers(impl, case):
    stored = np.load(PARITY / "ops.npz")
    batch, n = stored[f"{case}_scores"].shape
    index, _ = select_centers(
        torch.from_numpy(stored[f"{case}_scores"]).flatten(),
        torch.from_numpy(stored[f"{case}_positions"]).float().flatten(0, 1),
        sizes=[n] * batch,
        extent=stored[f"{case}_canvas_wh"].tolist(),
        rate=float(stored[f"{case}_rate"]),
        alpha=float(stored[f"{case}_alpha"]),
        stride=int(stored[f"{case}_stride"]),
        impl=impl,
    )
    expected_rows = stored[f"{case}_kept"] + n * np.arange(batch)[:, None]
    assert np.array_equal(index, expected_rows.ravel())


def test_more_reserved_tokens_than_room():
    """Duplicates of a node: the first rows have the room."""
    positions = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [2.0, 3.0]])
    for impl in IMPLEMENTATIONS:
        index, keep = select_centers(
            torch.zeros(4), positions, extent=(4, 4), rate=0.25, stride=2, impl=impl
        )
        assert keep == (1,)
        assert index.tolist() == [1]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("together", [1, 2, 127, 128, 129, 255, 256, 257, 512])
def test_any_number_of_tokens_in_one_cell(impl, together):
    """The prior goes to multiples of twice the spacing, which is 1 where tokens share a cell."""
    positions = torch.tensor([[1.0, 0.0], *[[2.0, 2.0]] * together, [6.0, 6.0]])
    scores = torch.zeros(len(positions))
    scores[0] = 0.2
    index, _ = select_centers(
        scores, positions, extent=(8, 8), rate=2 / len(positions), alpha=4.0, stride=8,
        reserve=False, impl=impl,
    )  # fmt: skip
    # (2, 2) is a multiple of 2 times 1 if tokens share it, but not of 2 times 2 if one is alone.
    assert index.tolist() == ([1, 2] if together > 1 else [0, 1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("lattice", "kept"), [(True, 4), (False, 1)])
def test_a_measured_canvas_ends_after_the_last_cell(impl, lattice, kept):
    """Cells 0 to 4 have nodes of spacing 4 at 0 and 4; points in [0, 4] only at 0."""
    positions = full_lattice((5, 5))
    index, keep = select_centers(
        torch.zeros(25), positions, rate=0.01, stride=2, lattice=lattice, impl=impl
    )
    assert keep == (kept,)
    assert index.tolist() == [0, 4, 20, 24][:kept]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("lattice", [True, False])
def test_a_measured_canvas_begins_at_a_node(impl, lattice):
    """Cells 2 to 9 have nodes of spacing 4 at 4 and 8, wherever the lowest one is."""
    positions = full_lattice((8, 8)) + 2
    index, keep = select_centers(
        torch.zeros(64), positions, rate=0.01, stride=2, lattice=lattice, impl=impl
    )
    assert {(4, 4), (8, 4), (4, 8), (8, 8)} <= {*map(tuple, positions[index].tolist())}
    assert not lattice or keep == (4,)


def test_spacing_by_hand():
    """Powers of two not below the distance, between float32's steps and twice the canvas' side."""
    positions = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [7.0, 4.0], [0.0, 1e-9]])
    nearest = torch.tensor([1, 2, 1, 1, -1])
    side = torch.tensor([100.0, 100.0, 1.0, 1.5, 3.0])
    expected = [8.0, 2.0**-21, 2.0**-21, 4.0, 8.0]  # the fourth is cut to 3, the last is alone
    assert reference.spacing(positions, nearest, side).tolist() == expected


def surface(count, seed=0):
    """Points on a hilly sheet in map coordinates: (T, 3) float64, in meters, 0.5 m apart."""
    rng = np.random.default_rng(seed)
    xy = rng.random((count, 2)) * 0.5 * count**0.5
    z = 3 * np.sin(xy[:, 0] / 7) + 2 * np.cos(xy[:, 1] / 5)
    return torch.from_numpy(np.column_stack([xy, z])) + torch.tensor([771_200.0, 6_277_550.0, 80.0])


def gaps(positions, index):
    """Distances (T,) from all points to the nearest selected one."""
    _, distance = knn(positions[index], 1, query_positions=positions, return_distance=True)
    return distance[:, 0]


WORLD = surface(3000)
FREE = {"rate": 0.25, "stride": 1.0, "lattice": False}


@pytest.mark.parametrize("where", ["corner", "centered", "far", "stray"])
@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("prior", ["adaptive", "grid", None])
def test_a_cloud_is_thinned_evenly_wherever_it_is(where, reserve, prior):
    """Constant scores: the choice is spread, of the size asked for, and a stray costs nothing."""
    center = {"corner": WORLD.amin(0), "centered": WORLD.mean(0), "far": 0, "stray": WORLD.mean(0)}
    positions = (WORLD - center[where]).float()
    if where == "stray":
        positions[7] = 1e7
    kwargs = {**FREE, "stride": 0.5, "reserve": reserve, "prior": prior}
    index, keep = select_centers(torch.full((3000,), 0.5), positions, **kwargs)
    assert keep == (len(index),)
    assert 750 <= len(index) <= 1500
    near = gaps(positions, index).sort().values[:-1]  # the last may be the stray's
    assert near.mean() < (1.2 if where == "far" else 0.55)


@pytest.mark.parametrize("prior", ["adaptive", "grid", None])
@pytest.mark.parametrize("lattice", [True, False])
def test_a_shift_by_nodes_selects_the_same(lattice, prior):
    """Measured: in positive and negative coordinates, of any size that float32 holds."""
    generator = torch.Generator().manual_seed(0)
    cells = full_lattice((20, 20))[torch.randperm(400, generator=generator)[:150]]
    positions = cells if lattice else cells + torch.rand(150, 2, generator=generator).mul(8) / 8
    scores = torch.rand(150, generator=generator)
    kwargs = {"rate": 0.3, "stride": 4, "lattice": lattice, "prior": prior}
    expected = select_centers(scores, positions, **kwargs)
    for shift in ((8, -16), (-80, 8000), (80_000, -800)):
        moved = positions + torch.tensor(shift)
        moved = moved if lattice else (moved * 64).round() / 64
        alike = moved - torch.tensor(shift)
        index, keep = select_centers(scores, moved, **kwargs)
        reference_index, kept = select_centers(scores, alike, **kwargs)
        assert torch.equal(index, reference_index)
        assert keep == kept
        given = select_centers(scores, moved, origin=shift, extent=(20, 20), **kwargs)
        assert torch.equal(given[0], select_centers(scores, alike, extent=(20, 20), **kwargs)[0])
    assert expected[1] == (max(45, expected[1][0]),)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rate", [0.25, 1 / 8, 1 / 32, 1 / 300])
@pytest.mark.parametrize("lattice", [True, False])
def test_reserved_tokens_leave_room(impl, rate, lattice):
    positions = full_lattice((32, 24)).repeat(2, 1)
    kwargs = {"sizes": [768, 768], "extent": [(32, 24)] * 2, "stride": 2, "lattice": lattice}
    scores = torch.rand(1536, generator=torch.Generator().manual_seed(0))
    index, keep = select_centers(
        scores, positions, rate=rate, reserve_share=0.5, impl=impl, **kwargs
    )
    asked = int(768 * rate)
    assert keep == (asked, asked)
    nodes, apart = 48, 4
    while nodes > max(1, asked / 2):
        apart *= 2
        nodes = math.ceil(32 / apart) * math.ceil(24 / apart)
    reserved = (positions % apart == 0).all(1).nonzero()[:, 0].tolist()
    assert set(reserved) <= set(index.tolist())
    best = scores[:768].masked_fill((positions[:768] % apart == 0).all(1), -1)
    free = index[: asked - nodes]
    by_rank, _ = select_centers(
        scores, positions, rate=rate, reserve_share=0.5, prior=None, impl=impl, **kwargs
    )
    assert torch.equal(by_rank[: len(free)], best.argsort(descending=True)[: len(free)])
    _, more = select_centers(scores, positions, rate=rate, impl=impl, **kwargs)
    assert more == (max(48, asked),) * 2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nodes_go_apart_as_long_as_a_side_is_longer_and_one_stays(impl):
    """On a strip of 2 x 64 of 16 nodes 2 are left, of the 3 that half of 6 tokens are; and where
    one token is a node it is kept, the best of the others or not."""
    strip = full_lattice((2, 64))
    options = {"stride": 2, "reserve_share": 0.5, "prior": None, "impl": impl}
    index, keep = select_centers(torch.rand(128), strip, extent=(2, 64), rate=6 / 128, **options)
    assert keep == (6,)
    assert {(0.0, 0.0), (0.0, 32.0)} <= {*map(tuple, strip[index].tolist())}
    few = torch.tensor([[1.0, 1.0], [9.0, 3.0], [4.0, 0.0], [7.0, 5.0]])
    scores = torch.tensor([0.9, 0.8, 0.1, 0.7])
    index, _ = select_centers(scores, few, rate=0.25, **options)
    assert index.tolist() == [2]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_each_sample_has_reserved_tokens_of_its_own(impl):
    """Canvases and sizes of all kinds in a batch: as one by one."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(40, 40), (8, 8), (3, 60), (40, 40)]
    parts = [full_lattice(shape) for shape in shapes]
    parts[3] = parts[3][torch.randperm(1600, generator=generator)[:200]]
    scores = [torch.rand(len(part), generator=generator) for part in parts]
    options = {"rate": 0.06, "stride": 2, "reserve_share": 0.4, "impl": impl}
    index, keep = select_centers(
        torch.cat(scores), torch.cat(parts), sizes=[*map(len, parts)], extent=shapes, **options
    )
    start = 0
    for part, values, shape, rows in zip(parts, scores, shapes, index.split(keep), strict=True):
        alone, _ = select_centers(values, part, extent=shape, **options)
        assert torch.equal(alone + start, rows)
        start += len(part)


def test_scores_of_any_sign_and_dtype():
    positions = full_lattice((8, 8))
    scores = torch.randn(64, generator=torch.Generator().manual_seed(7)) * 1e3
    for impl in IMPLEMENTATIONS:
        index, _ = select_centers(
            scores,
            positions,
            extent=(8, 8),
            rate=0.5,
            stride=2,
            prior=None,
            reserve=False,
            impl=impl,
        )
        assert torch.equal(index, scores.argsort(descending=True)[:32])
    half, _ = select_centers(scores.bfloat16(), positions, extent=(8, 8), rate=0.5, stride=2)
    full, _ = select_centers(
        scores.bfloat16().float(), positions, extent=(8, 8), rate=0.5, stride=2
    )
    assert torch.equal(half, full)


def test_an_empty_canvas_is_searched_without_a_map():
    positions = torch.tensor([[0.0, 0.0], [99_999.0, 5.0], [64.0, 64.0], [65.0, 64.0]])
    kwargs = {"extent": (100_000, 100_000), "rate": 0.5, "stride": 2, "reserve": False}
    for impl in (None, "reference", "cpu"):
        index, _ = select_centers(torch.zeros(4), positions, impl=impl, **kwargs)
        assert index.tolist() == [0, 2]


def test_registered_op():
    positions = full_lattice((8, 8))
    arguments = (
        torch.rand(64), positions, torch.tensor([0, 64]), torch.tensor([[8, 8]]),
        torch.tensor([0, 16]), 16, 4.0, 2, "adaptive", [4], "cpu",
    )  # fmt: skip
    torch.library.opcheck(fused_select_on_lattice, arguments)


@pytest.mark.parametrize("lattice", [True, False])
def test_selection_compiles_in_one_graph(lattice):
    def run(scores, positions):
        return select_centers(
            scores, positions, extent=(8, 8), rate=0.25, stride=2, lattice=lattice
        )[0]

    scores, positions = torch.rand(64), full_lattice((8, 8))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(scores, positions), run(scores, positions))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0.0}, r"rate: expected a number in \(0, 1\], got 0.0"),
        ({"rate": 1.5}, r"rate: expected a number in \(0, 1\], got 1.5"),
        ({"scores": torch.zeros(9)}, r"scores: expected shape \(16\), got a float32 tensor"),
        ({"scores": torch.full((16,), math.nan)}, "NaN in 16 of 16 .* images and weights"),
        ({"reserve_share": 0.0}, r"reserve_share: expected a number in \(0, 1\], got 0.0"),
        ({"extent": None, "origin": (1, 2)}, "origin: give extent too, or neither"),
        ({"prior": "density"}, "prior: expected one of adaptive, grid, None, got 'density'"),
        ({"stride": 1.5}, "stride: expected a positive integer, got 1.5"),
        ({"stride": 2.0**61}, r"stride: expected a number from .* to 1\.15292e\+18, got 2\.3"),
        ({"extent": (4, 3)}, r"positions: sample 0 has \[0.0, 3.0\] in row 12, which is not on"),
        ({"positions": full_lattice((4, 4)) / 2}, r"sample 0 has \[0.5, 0.0\] in row 1.*lattice="),
        ({"positions": full_lattice((4, 4)) * math.inf}, "positions: sample 0 has a NaN"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    good = {
        "scores": torch.zeros(16),
        "positions": full_lattice((4, 4)),
        "extent": (4, 4),
        "rate": 0.25,
        "stride": 2,
    }
    with pytest.raises(ValueError, match=message):
        select_centers(**{**good, **arguments})


@pytest.mark.parametrize("sides", [[(4, 4), (4, 3)], [(4, 3), (4, 3)]])
def test_the_sample_and_its_row_off_the_lattice_are_named(sides):
    positions = torch.cat([full_lattice((4, 3)), full_lattice((4, 4))])
    message = r"sample 1 has \[0.0, 3.0\] in row 12, which is not on .* canvas \(4, 3\)"
    with pytest.raises(ValueError, match=message):
        select_centers(torch.zeros(28), positions, sizes=[12, 16], extent=sides, rate=0.5, stride=2)


@example([70], 0.1)  # 7 and a little more, in binary numbers
@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.floats(0.05, 1.0))
def test_best_of_runs(sizes, rate):
    generator = torch.Generator().manual_seed(sum(sizes))
    scores = torch.rand(sum(sizes), generator=generator)
    index, counts = best_of_runs(scores, sizes=sizes, rate=rate)
    expected, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        assert count - 1 < size * rate - 1e-6 <= count
        ends = [start + run * size // max(count, 1) for run in range(count + 1)]
        for first, end in pairwise(ends):
            expected.append(first + int(scores[first:end].argmax()))
        start += size
    assert index.tolist() == expected


def test_best_of_runs_without_numbers():
    scores = torch.tensor([0.1, math.nan, 0.3, 0.2])
    with pytest.raises(ValueError, match="scores: expected numbers, got NaN in 1 of 4 rows"):
        best_of_runs(scores, rate=0.5)
    assert best_of_runs(scores, rate=0.5, check_values=False)[0].tolist() == [1, 2]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(
    sample=tokens(max_size=40),
    spread=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    neighbors=st.integers(1, 12),
)
def test_better_neighbors_take_their_share_of_a_score(impl, sample, spread, neighbors):
    """As defined, of one token after the other: of its nearest, ties to the lowest row."""
    scores = scores_of(sample)
    found = spread_scores(
        scores, sample.positions, sizes=sample.sizes, spread=spread, neighbors=neighbors, impl=impl
    )
    start, expected = 0, []
    for size in sample.sizes:
        of, places = scores[start : start + size], sample.positions[start : start + size]
        for row in range(size):
            squares = torch.zeros(size)
            for axis in places.T:
                squares += (axis - axis[row]).square()
            others = sorted((float(squares[n]), n) for n in range(size) if n != row)[:neighbors]
            better = sum(bool(of[n] > of[row]) for _, n in others)
            expected.append(float(of[row]) * (1 - spread) ** better)
        start += size
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_spread_scores_keep_more_objects():
    """Of an even lattice with two bright squares, one brighter, the best 16 are all on that one;
    spread they are on both, and the brightest of each stay the best."""
    scores, places = torch.full((32, 32), 0.1), full_lattice((32, 32))
    bright = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) / 100
    scores[4:10, 4:10], scores[20:26, 20:26] = 0.9 + bright[0], 0.88 + bright[1]
    scores = scores.flatten()

    def on_second(ranking):
        kept = places[ranking.topk(16).indices]
        return int((kept.amin(1) >= 20).sum())

    spread = spread_scores(scores, places, spread=0.05)
    assert on_second(scores) == 0
    assert 3 <= on_second(spread) <= 13
    for square in (places.amax(1) < 16, places.amin(1) >= 16):
        assert (spread * square).argmax() == (scores * square).argmax()


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.1])
def test_spread_scores_are_finite_and_not_negative(score):
    scores = torch.rand(16)
    scores[3] = score
    with pytest.raises(ValueError, match="scores: expected"):
        spread_scores(scores, full_lattice((4, 4)), spread=0.5)


def test_spread_scores_of_a_batch_and_of_low_precision():
    generator = torch.Generator().manual_seed(0)
    scores, places = torch.rand(30, generator=generator), torch.rand(30, 3, generator=generator)
    sizes = (10, 0, 1, 19)
    batch = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    found = spread_scores(scores, places, sizes=sizes, spread=0.3)
    assert torch.equal(spread_scores(scores, places, batch=batch, spread=0.3), found)
    assert found[10] == scores[10]  # alone
    assert spread_scores(scores.bfloat16(), places, spread=0.3).dtype == torch.float32
    assert spread_scores(scores[:0], places[:0], spread=0.3).shape == (0,)


def test_more_tokens_than_a_thread_takes_at_once():
    extent = [(70, 70), (30, 30)]
    positions = torch.cat([full_lattice(sides) for sides in extent])
    scores = torch.rand(5800, generator=torch.Generator().manual_seed(0))
    first, second = (
        select_centers(
            scores, positions, sizes=[4900, 900], extent=extent, rate=0.25, stride=2, impl=impl
        )
        for impl in IMPLEMENTATIONS
    )
    assert first[1] == second[1]
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_position_below_the_canvas_is_named(impl):
    positions = full_lattice((4, 4)) - torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=r"sample 0 has \[0.0, -1.0\] in row 0, which is not on"):
        select_centers(torch.zeros(16), positions, extent=(4, 4), rate=0.5, stride=2, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_of_rows_along_a_curve_every_second_comes_first(impl):
    """The order of the rows is taken, whatever their positions."""
    positions = torch.rand(19, 2, generator=torch.Generator().manual_seed(0))
    index, keep = select_centers(
        torch.zeros(19), positions, sizes=(13, 6), rate=1.0, stride=1.0, prior=None,
        reserve=False, lattice=False, along_curve=True, impl=impl,
    )  # fmt: skip
    assert keep == (13, 6)
    places = sorted(range(13), key=lambda row: f"{row:04b}"[::-1])
    assert index.tolist() == [*places, *(13 + row for row in places if row < 6)]


def test_a_small_rate_keeps_a_run_of_each_sample():
    index, counts = best_of_runs(torch.rand(10), sizes=[7, 0, 3], rate=1e-7)
    assert counts == (1, 0, 1)
    assert index[0] < 7 <= index[1]


def test_infinite_scores_have_no_say_at_alpha_zero():
    positions, scores = full_lattice((4, 4)), torch.zeros(16)
    for impl in IMPLEMENTATIONS:
        found = [
            select_centers(
                scores + infinite, positions, extent=(4, 4), rate=0.25, stride=2, alpha=0,
                impl=impl,
            )[0]
            for infinite in (0.0, torch.where(torch.arange(16) == 0, torch.inf, 0.0))
        ]  # fmt: skip
        assert torch.equal(*found)


def test_a_stride_that_float32_does_not_hold_is_named():
    with pytest.raises(ValueError, match="stride: expected a number from"):
        select_centers(torch.rand(9), torch.rand(9, 2), rate=0.5, stride=1e-300, lattice=False)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_of_more_reserved_tokens_than_room_the_first_are_kept_in_order(impl):
    positions = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 0.0], [4.0, 0.0], [0.0, 0.0]])
    index, keep = select_centers(
        torch.zeros(5), positions, extent=(5, 1), rate=0.2, stride=2, impl=impl
    )
    assert keep == (2,)
    assert index.tolist() == [0, 1]
