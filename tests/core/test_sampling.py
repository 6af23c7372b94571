"""Choosing and pooling points: against brute force, torch-cluster and laws."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.strategies import KINDS, UNEVEN, tokens
from pointformer import (
    TokenSet,
    balanced_cluster,
    curve_sample,
    farthest_point_sample,
    interpolate,
    random_sample,
    segment_reduce,
    voxel_pool,
)
from pointformer.geometry.curves import CURVES
from pointformer.kernels.sampling import fused_farthest_points

IMPLS = ("reference", "cpu")
ANY = tokens((*KINDS, *UNEVEN), max_size=60, max_samples=3)
COUNTS = st.sampled_from([0, 1, 3, 20, 100])


def pick_farthest(points, count, row):
    """By definition, in numpy."""
    distance = np.full(len(points), np.inf, np.float32)
    picks = []
    for _ in range(min(count, len(points))):
        picks.append(row)
        square = np.square(points - points[row])
        total = square[:, 0] + square[:, 1]
        distance = np.minimum(distance, total + square[:, 2] if square.shape[1] == 3 else total)
        left = [n for n in range(len(points)) if n not in picks]
        row = max(left, key=lambda n: (distance[n], -n), default=0)
    return picks


@given(ANY, COUNTS, st.integers(0, 2**16))
def test_farthest_points_are_those_of_the_definition(sample, count, seed):
    start = [seed % max(size, 1) for size in sample.sizes]
    expected, first = [], 0
    for size, row in zip(sample.sizes, start, strict=True):
        points = sample.positions[first : first + size].numpy()
        expected += [first + n for n in pick_farthest(points, count, row)]
        first += size
    for impl in IMPLS:
        index, sizes = farthest_point_sample(
            sample.positions, count=count, sizes=sample.sizes, start=start, impl=impl
        )
        assert index.tolist() == expected
        assert sizes == tuple(min(size, count) for size in sample.sizes)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["uniform", "lattice", "stray"])
def test_farthest_points_of_many(kind, dimensions):
    """Trees of several levels, samples side by side."""
    g = torch.Generator().manual_seed(0)
    positions = torch.rand(3000, dimensions, generator=g) * 30
    if kind == "lattice":
        positions = positions.floor()
    elif kind == "stray":
        positions[::100] *= 1e6
    arguments = {"sizes": [2500, 0, 500], "rate": 0.2, "start": [9, 0, 499]}
    picks = [farthest_point_sample(positions, impl=impl, **arguments)[0] for impl in IMPLS]
    assert torch.equal(*picks)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_farthest_points_of_torch_cluster(dimensions):
    torch_cluster = pytest.importorskip("torch_cluster", reason="torch-cluster is not installed")
    positions = torch.rand(900, dimensions, generator=torch.Generator().manual_seed(0))
    batch = torch.arange(900) // 400
    ours, _ = farthest_point_sample(positions, rate=0.25, batch=batch)
    assert torch.equal(ours, torch_cluster.fps(positions, batch, 0.25, random_start=False))
    arguments = {"sizes": (400, 0, 500), "count": (30, 5, 41)}
    by_it = farthest_point_sample(positions, impl="torch_cluster", **arguments)
    assert torch.equal(by_it[0], farthest_point_sample(positions, **arguments)[0])
    with pytest.raises(ValueError, match=r"start is not row 0.*impl='reference'"):
        farthest_point_sample(positions, count=3, start=1, impl="torch_cluster")


def test_first_picks():
    positions = torch.rand(30, 2)
    draw = [
        farthest_point_sample(
            positions, count=1, sizes=[10, 20], generator=torch.Generator().manual_seed(seed)
        )[0].tolist()
        for seed in (0, 0, 1, 2)
    ]
    assert draw[0] == draw[1]
    assert len(set(map(tuple, draw))) > 1
    assert all(a < 10 <= b < 30 for a, b in draw)
    assert any(a // 2 != (b - 10) // 4 for a, b in draw)  # each sample has its own


def test_opcheck():
    positions = torch.rand(30, 3, requires_grad=True)
    torch.library.opcheck(fused_farthest_points, (positions, [18, 12], [3, 5], [0, 2], "cpu"))


@given(ANY, st.sampled_from([0.1, 0.5, 1.0]), st.integers(0, 2**16))
def test_samples_are_rows_of_each_sample_once(sample, rate, seed):
    generator = torch.Generator().manual_seed(seed)
    at_random = random_sample(sample.sizes, rate=rate, generator=generator)
    along = curve_sample(sample.positions, rate=rate, sizes=sample.sizes)
    for index, sizes in (at_random, along):
        assert sizes == tuple(min(size, max(1, int(size * rate))) for size in sample.sizes)
        first = 0
        for size, part in zip(sample.sizes, index.split(sizes), strict=True):
            assert len(part.unique()) == len(part)
            assert ((part >= first) & (part < first + size)).all()
            first += size
    again = random_sample(sample.sizes, rate=rate, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(again[0], at_random[0])


def test_points_along_a_curve_are_spread():
    """Each cell of a lattice has its part."""
    positions = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    index, _ = curve_sample(positions, count=400)
    cells = (positions[index] * 4).long()
    counts = (cells[:, 0] * 4 + cells[:, 1]).bincount(minlength=16)
    assert counts.min() >= 15
    assert counts.max() <= 35


@pytest.mark.parametrize("curve", CURVES)
def test_points_along_a_curve_are_the_middles_of_its_parts(curve):
    """Of 35 points in 5 parts the 4th of each 7; of 9 in 2 the 3rd and the 7th."""
    positions = torch.rand(44, 2, generator=torch.Generator().manual_seed(0))
    sizes = (35, 9)
    index, counts = curve_sample(positions, count=(5, 2), sizes=sizes, curve=curve)
    order = balanced_cluster(positions, 1, sizes=sizes, curve=curve, anchors=False).order
    assert counts == (5, 2)
    assert index.tolist() == order[[3, 10, 17, 24, 31, 35 + 2, 35 + 6]].tolist()


def test_all_rows_are_as_likely():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(30)
    for _ in range(600):
        counts[random_sample([10, 20], count=5, generator=generator)[0]] += 1
    assert ((counts[:10] / 600 - 0.5).abs() < 0.1).all()
    assert ((counts[10:] / 600 - 0.25).abs() < 0.1).all()


@pytest.mark.parametrize("impl", IMPLS)
@given(ANY, st.sampled_from([0.5, 3.0, 1e4]), st.sampled_from(["mean", "max", "sum", "std"]))
def test_voxels(impl, sample, side, reduce):
    positions = sample.positions.clamp(-1e9, 1e9) - 5
    features = torch.rand(len(positions), 3)
    pooled = voxel_pool(positions, features, side, sizes=sample.sizes, reduce=reduce, impl=impl)
    cells = np.floor(positions.double().numpy() / side).astype(np.int64)
    owner = np.repeat(np.arange(len(sample.sizes)), sample.sizes)[:, None]
    keys = np.concatenate([owner, cells[:, ::-1]], 1)
    found, inverse = np.unique(keys, axis=0, return_inverse=True)
    assert torch.equal(pooled.assignment, torch.from_numpy(inverse).view(-1))
    assert pooled.sizes == tuple(np.bincount(found[:, 0], minlength=len(sample.sizes)))
    index, count = pooled.assignment, len(found)
    into = {"index": index, "count": count, "impl": "reference"}
    expected = segment_reduce(features.double(), reduce, **into)
    torch.testing.assert_close(pooled.features.double(), expected, rtol=1e-5, atol=1e-5)
    expected = segment_reduce(
        positions.double(), "mean", index=index, count=count, impl="reference"
    )
    torch.testing.assert_close(pooled.positions.double(), expected, rtol=1e-5, atol=1e-5)


def test_cells_end_where_their_sides_do_in_float64():
    """0.7 in float32 is less than 7 * 0.1, and in float32 their ratio is 7."""
    positions = torch.tensor([[0.65, 0.0], [0.7, 0.0], [0.7, 0.7], [-0.3, 0.0], [-0.29, 0.0]])
    assert float(positions[1, 0] / 0.1) == 7.0
    assert voxel_pool(positions, None, 0.1).assignment.tolist() == [2, 2, 3, 0, 1]


def test_voxels_do_not_depend_on_other_points():
    positions = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 4
    far = torch.cat([positions, torch.full((1, 3), 1e6)])
    alone, beside = voxel_pool(positions, None, 1.0), voxel_pool(far, None, 1.0)
    assert alone.features is None
    assert torch.equal(beside.positions[:-1], alone.positions)
    assert torch.equal(beside.assignment[:-1], alone.assignment)


def test_voxels_have_gradients():
    positions = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    features = torch.rand(30, 2, requires_grad=True)
    pooled = voxel_pool(positions, features, 0.3)
    (pooled.positions.sum() + (pooled.features[pooled.assignment] ** 2).sum()).backward()
    lengths = pooled.assignment.bincount()[pooled.assignment]
    torch.testing.assert_close(positions.grad, (1 / lengths)[:, None].expand(30, 2))
    assert features.grad.all()


@pytest.mark.parametrize("impl", IMPLS)
def test_interpolate_to_another_set(impl):
    g = torch.Generator().manual_seed(0)
    world = torch.rand(40, 3, generator=g, dtype=torch.float64) * 10 + 4e5
    source = TokenSet.from_world(world, torch.rand(40, 5, generator=g), [25, 0, 15])
    places = torch.rand(12, 3, generator=g, dtype=torch.float64) * 10 + 4e5
    target = TokenSet.from_world(places, torch.zeros(12, 1), [5, 4, 3])
    found = source.interpolate_to(target, k=3, power=2.0, impl=impl)
    assert found.sizes == target.sizes
    assert torch.equal(found.positions, target.positions)
    expected = interpolate(
        source.features,
        (source.world_positions() - 4e5).float(),
        (target.world_positions() - 4e5).float(),
        sizes=source.sizes, query_sizes=target.sizes, k=3, power=2.0,
    )  # fmt: skip
    torch.testing.assert_close(found.features, expected, rtol=1e-3, atol=1e-3)
    assert not found.features[5:9].any()
    with pytest.raises(ValueError, match="target: expected 3 samples in 3-D, got 1 in 2-D"):
        source.interpolate_to(TokenSet(torch.rand(4, 2), torch.rand(4, 1)))


X = torch.rand(9, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: farthest_point_sample(X), "rate, count: expected one of them, got none"),
        (lambda: random_sample([3], rate=0.5, count=1), "rate, count: .* got both"),
        (
            lambda: farthest_point_sample(X, count=[1, 2]),
            "count: expected one for each of 1",
        ),
        (lambda: farthest_point_sample(X, count=2, start=9), "start: row 9 of sample 0 with 9"),
        (lambda: farthest_point_sample(X * torch.nan, count=2), "positions: sample 0 has a NaN"),
        (lambda: curve_sample(X, rate=1.5), "rate: expected a number in"),
        (lambda: voxel_pool(X, X[:3], 1.0), "features: expected 9 rows"),
        (lambda: voxel_pool(X, X, 0.0), "side: expected a positive"),
        (lambda: voxel_pool(X, X, 1e-30), "side: expected a larger one"),
        (lambda: voxel_pool(-1 - X, X, 1e-30), "side: expected a larger one"),
        (lambda: voxel_pool(X * torch.nan, X, 1.0), "positions: sample 0 has a NaN"),
        (lambda: farthest_point_sample(X, count=[-1]), "count: expected .* at least 0, got -1"),
        (lambda: farthest_point_sample(X, count=2, start=[-1]), "start: expected .* at least 0"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_every_row_is_as_likely_the_first_pick():
    generator = torch.Generator().manual_seed(0)
    counts, positions = torch.zeros(8), torch.zeros(8, 2)
    for _ in range(500):
        rows, _ = farthest_point_sample(
            positions, count=1, sizes=(1, 2, 5), generator=generator, impl="reference"
        )
        counts[rows] += 1
    assert counts[0] == 500
    assert ((counts[1:3] / 500 - 0.5).abs() < 0.1).all()
    assert ((counts[3:] / 500 - 0.2).abs() < 0.1).all()


def test_as_many_cells_as_float64_counts():
    positions = torch.tensor([[0.5, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert voxel_pool(positions, None, 2.0**-52).assignment.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="side: expected a larger one"):
        voxel_pool(positions, None, 2.0**-53)


def test_rates_of_few_bits():
    _, counts = random_sample([100_000], rate=np.float16(0.5))
    assert counts == (50_000,)
