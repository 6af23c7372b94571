"""Clouds in tiles with halos, which dask runs: results are those of the whole cloud."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.strategies import KINDS, UNEVEN, cloud
from pointformer import TokenSet, interpolate, knn, point_conv, radius
from pointformer.data import iterate_points, write_points
from pointformer.integrations import map_tiles

dask = pytest.importorskip("dask", reason="dask, of the extra big, is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def rows_of(tokens, index):
    """Neighbors as rows of the cloud; those of a set that is the whole cloud stay."""
    row = tokens.fields.get("row", torch.arange(tokens.num_tokens))
    return row[index.clamp(min=0)].where(index >= 0, -1) if len(row) else index.long()


def near(tokens, r, k):
    return rows_of(tokens, radius(tokens.positions, r, k))


def nearest(tokens, k):
    index, distance = knn(tokens.positions, k, return_distance=True)
    return rows_of(tokens, index), distance.amax(1)


@pytest.fixture
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS + UNEVEN),
    count=st.integers(0, 30),
    axes=st.sampled_from([2, 3]),
    scale=st.sampled_from([0.02, 0.1, 0.4, 2.0]),
    relative=st.floats(1, 6),
    wider=st.sampled_from([1, 1.5]),
    parts=st.integers(1, 3),
)
def test_any_tiles_have_the_neighbors_of_the_whole(
    seed, kind, count, axes, scale, relative, wider, parts
):
    rng = np.random.default_rng(seed)
    positions, extent = cloud(rng, kind, count, axes)
    r = scale * float(extent.max())
    tokens = TokenSet(torch.from_numpy(positions).float())
    source = [tokens]
    if parts > 1:
        source = [TokenSet(part) for part in tokens.positions.tensor_split(parts)]
    with dask.config.set(scheduler="synchronous"):
        found = map_tiles(
            partial(near, r=r, k=8), source, r * wider * relative, r * wider,
            origin=torch.zeros(axes, dtype=torch.float64),
        )  # fmt: skip
    assert torch.equal(found, near(tokens, r, 8))


def map_cloud(count=3000):
    g = torch.Generator().manual_seed(0)
    corner = torch.tensor([771_234.0, 6_277_553.0, 120.0], dtype=torch.float64)
    places = corner + torch.rand(count, 3, generator=g, dtype=torch.float64) * torch.tensor(
        [200.0, 200.0, 20.0], dtype=torch.float64
    )
    features = torch.randn(count, 6, generator=g)
    labels = torch.randint(0, 9, (count,), generator=g, dtype=torch.uint8)
    return TokenSet.from_world(places, features, fields={"classification": labels})


def blurred(tokens, k=6):
    """A weighted sum over neighbors, then interpolation from every point."""
    index, distance = knn(tokens.positions, k, return_distance=True)
    g = torch.Generator().manual_seed(1)
    net = [torch.randn(*shape, generator=g) for shape in ((4, 7), (4,), (4,), (4,))]
    names = ("weight", "bias", "norm_weight", "norm_bias")
    summed = point_conv(
        tokens.features, tokens.positions, index, **dict(zip(names, net, strict=True))
    )
    smooth = interpolate(tokens.features, tokens.positions, tokens.positions + 0.1, k=3)
    return torch.cat([summed, smooth], 1), distance.amax(1)


def test_convolution_and_interpolation_in_threads():
    tokens = map_cloud()
    expected, _ = blurred(tokens)
    found = map_tiles(blurred, tokens, (60, 70, 1000), 40)
    assert torch.equal(found, expected)
    # Each tile's own origin: positions are rounded otherwise.
    found = map_tiles(blurred, iter([tokens]), (60, 70, 1000), 40)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_file_in_parts_gives_a_mapped_file(tmp_path, one_thread):
    tokens = map_cloud(500)
    write_points(tmp_path / "cloud.laz", tokens)
    parts = [*iterate_points(tmp_path / "cloud.laz", 128)]
    assert [part.num_tokens for part in parts] == [128, 128, 128, 116]
    assert torch.equal(
        torch.cat([part.fields["classification"] for part in parts]),
        tokens.fields["classification"],
    )

    def classes(tile):
        assert tile.num_tokens < 500
        assert tile.world_positions()[:, 1].min() > 6e6
        return tile.fields["classification"]

    out = tmp_path / "classes.npy"
    found = map_tiles(classes, tmp_path / "cloud.laz", 50.0, 5.0, out=out)
    assert torch.equal(found, tokens.fields["classification"])
    assert np.array_equal(np.load(out), tokens.fields["classification"])
    assert sorted(os.listdir(tmp_path)) == ["classes.npy", "cloud.laz"]
    with pytest.raises(FileExistsError, match="is there already"):
        map_tiles(classes, tokens, 50.0, 5.0, out=out)


def test_tiles_are_in_the_order_of_the_source_and_beside_the_result(tmp_path, one_thread):
    tokens, out = map_cloud(300), tmp_path / "rows.npy"
    seen = []

    def rows(tile):
        row = tile.fields["row"]
        seen.append((row.diff() > 0).all() and not tile.fields["inner"].all())
        assert any(name.startswith("tiles-") for name in os.listdir(tmp_path))
        return row

    parts = [tokens.select(torch.arange(300).view(2, 150)[n], [150]) for n in range(2)]
    assert torch.equal(map_tiles(rows, parts, 50.0, 20.0, out=out), torch.arange(300))
    assert len(seen) > 10
    assert all(seen)


def test_a_function_may_look_as_far_as_the_halo_from_the_points_of_the_box(one_thread):
    tokens = map_cloud(100)

    def look(tile, inside, outside):
        inner = tile.fields["inner"]
        return inner.long(), torch.where(inner, inside, outside)

    found = map_tiles(partial(look, inside=20.0, outside=1e9), tokens, 50.0, 20.0)
    assert torch.equal(found, torch.ones(100, dtype=torch.int64))
    with pytest.raises(ValueError, match="halo: expected more"):
        map_tiles(partial(look, inside=torch.nan, outside=1.0), tokens, 50.0, 20.0)
    # Of one tile that has all points no one knows better.
    whole = map_tiles(partial(nearest, k=120), tokens, 1000.0, 500.0)
    assert torch.equal(whole, nearest(tokens, 120)[0])


def test_odd_clouds(one_thread):
    for count in (0, 1, 5):
        same = TokenSet(torch.full((count, 3), 3.5), torch.ones(count, 2, dtype=torch.bfloat16))
        assert torch.equal(map_tiles(partial(near, r=1.0, k=7), same, 1.0, 1.0), near(same, 1.0, 7))
        found = map_tiles(lambda tile: 2 * tile.features, same, 1.0, 1.0)
        assert torch.equal(found, torch.full((count, 2), 2.0))


def test_what_does_not_fit(one_thread):
    tokens = map_cloud(100)
    with pytest.raises(ValueError, match=r"halo: expected at least \d+.*looks, got 5$"):
        map_tiles(partial(nearest, k=4), tokens, 100.0, 5.0)
    with pytest.raises(ValueError, match=r"halo: expected more, as far .* got 5$"):
        map_tiles(partial(nearest, k=99), tokens, 100.0, 5.0)
    with pytest.raises(ValueError, match="tile_size: expected at least the halo, 20, got 1"):
        map_tiles(blurred, tokens, 1.0, 20.0)
    with pytest.raises(ValueError, match=r"tile_size: expected at least the halo, 20, got .*1"):
        map_tiles(blurred, tokens, (99.0, 99.0, 1.0), 20.0)
    with pytest.raises(ValueError, match="tile_size: expected 1 or 3 numbers, got 2"):
        map_tiles(blurred, tokens, (9.0, 9.0), 5.0)
    with pytest.raises(ValueError, match="tile_size: expected tiles that can be counted"):
        map_tiles(blurred, tokens, 1e-10, 0.0)
    with pytest.raises(ValueError, match="halo: expected a number of at least 0, got -1"):
        map_tiles(blurred, tokens, 9.0, -1)
    with pytest.raises(ValueError, match="source: expected one sample"):
        map_tiles(blurred, TokenSet(torch.rand(4, 2), sizes=(2, 2)), 9.0, 1.0)
    with pytest.raises(ValueError, match="source: expected parts alike"):
        map_tiles(blurred, [tokens, tokens.with_fields(more=torch.ones(100))], 9.0, 1.0)
    with pytest.raises(ValueError, match="source: expected at least one part"):
        map_tiles(blurred, [], 9.0, 1.0)
    with pytest.raises(ValueError, match=r"function: expected a tensor of \d+ rows"):
        map_tiles(lambda tile: torch.ones(2, 9, 9), tokens, 50.0, 1.0)
    with pytest.raises(ValueError, match="function: expected rows of one shape and dtype"):
        map_tiles(lambda tile: torch.ones(tile.num_tokens, tile.num_tokens), tokens, 50.0, 1.0)


@pytest.mark.parametrize(
    "argument", ["function", "source", "tile_size", "halo", "out", "origin", "scratch"]
)
@pytest.mark.parametrize(
    "value", [2**200, -3.0, True, [[1.0]] * 999, {1: 2}, torch.zeros(7, dtype=torch.complex64)]
)
def test_wrong_kinds_are_named(one_thread, argument, value):
    arguments = {"function": blurred, "source": map_cloud(20), "tile_size": 9.0, "halo": 1.0}
    with pytest.raises((TypeError, ValueError), match=f"^{argument}") as caught:
        map_tiles(**{**arguments, argument: value})
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_two_workers(tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    tokens = map_cloud()
    expected, _ = blurred(tokens)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
            local_directory=str(tmp_path),
        ) as cluster,
        distributed.Client(cluster),
    ):  # fmt: skip
        assert torch.equal(map_tiles(blurred, tokens, 60, 40), expected)


@pytest.mark.parametrize(
    ("places", "origin"),
    [((-(2.0**-26), 1.0), 0.0), ((999.99998, 1001.0), 1000.0)],
    ids=["differences", "positions"],
)
def test_halos_have_what_rounding_brings_near(one_thread, places, origin):
    """As far away as the halo in float32, in truth a little farther."""
    world = torch.zeros(2, 3, dtype=torch.float64)
    world[:, 0] = torch.tensor(places, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    expected = near(TokenSet.from_world(world, origin=zero), 1.0, 2)
    assert expected.sort(1).values.tolist() == [[0, 1], [0, 1]]
    source = TokenSet.from_world(world, origin=zero + origin)
    found = map_tiles(partial(near, r=1.0, k=2), source, 1.0, 1.0, origin=zero)
    assert torch.equal(found, expected)


def test_an_empty_cloud_has_a_file_too(tmp_path, one_thread):
    empty, out = TokenSet(torch.zeros(0, 3), torch.zeros(0, 2)), tmp_path / "none"
    found = map_tiles(lambda tile: tile.features, empty, 1.0, 1.0, out=out)
    assert found.shape == np.load(out).shape == (0, 2)
    assert os.listdir(tmp_path) == ["none"]


def test_positions_that_learn_are_taken_as_numbers(one_thread):
    tokens = TokenSet(torch.rand(20, 3).requires_grad_(), torch.rand(20, 2))
    found = map_tiles(lambda tile: tile.features, tokens, 1.0, 0.5)
    assert torch.equal(found, tokens.features)
