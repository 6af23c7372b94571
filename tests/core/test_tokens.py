"""TokenSet: packing, feature maps, immutability, errors."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from pointformer import TokenSet, nearest_clusters


def ragged(*sizes, dimensions=2, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    return TokenSet(
        torch.rand(total, dimensions, generator=generator) * 50,
        torch.randn(total, channels, generator=generator),
        sizes,
        [(50.0,) * dimensions] * len(sizes),
    )


def test_grid_round_trip():
    for shape in [(2, 3, 4, 5), (1, 2, 3, 4, 5)]:
        maps = torch.randn(shape)
        tokens = TokenSet.from_grid(maps)
        assert tokens.extent == (tuple(float(n) for n in shape[:1:-1]),) * shape[0]
        assert torch.equal(tokens.to_grid(), maps)
        assert torch.equal(tokens.cluster(4).to_grid(), maps)


def test_grid_positions_are_x_then_y():
    tokens = TokenSet.from_grid(torch.arange(6.0).view(1, 1, 2, 3))
    assert tokens.positions.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert tokens.features[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_grids_of_different_sizes():
    maps = [torch.randn(3, 4, 6), torch.randn(3, 2, 2), torch.randn(3, 1, 9)]
    tokens = TokenSet.from_grid(maps)
    assert tokens.sizes == (24, 4, 9)
    for back, original in zip(tokens.to_grid(), maps, strict=True):
        assert torch.equal(back, original)
    assert TokenSet.from_grid(torch.randn(0, 3, 4, 6)).to_grid() == []


def test_cells_without_a_token_are_filled():
    tokens = TokenSet(torch.tensor([[2.0, 1.0]]), torch.ones(1, 1), extent=(3, 2))
    assert tokens.to_grid(fill=-1)[0, 0].tolist() == [[-1, -1, -1], [-1, -1, 1]]


@pytest.mark.parametrize("place", [[-1.0, 0.0], [0.0, -1.0], [3.0, 0.0], [0.0, 2.0], [-0.0, -7.0]])
def test_a_token_outside_of_its_canvas_has_no_cell(place):
    tokens = TokenSet(torch.tensor([[1.0, 1.0], place]), torch.ones(2, 1), extent=(3, 2))
    with pytest.raises(ValueError, match="a token lies outside of its canvas"):
        tokens.to_grid()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from([2, 3]))
def test_clustering_and_back(sizes, dimensions):
    tokens = ragged(*sizes, dimensions=dimensions)
    clustered = tokens.cluster(8)
    assert clustered.clusters.sizes == tuple(sizes)
    back = clustered.input_order()
    assert back.clusters is None
    assert torch.equal(back.positions, tokens.positions)
    assert torch.equal(back.features, tokens.features)


def test_list_round_trip_keeps_origin_and_extent():
    single = [ragged(5), ragged(0), ragged(7)]
    moved = TokenSet(
        single[2].positions,
        single[2].features,
        extent=(50, 50),
        origin=torch.tensor([[1e6, 2e6]], dtype=torch.float64),
    )
    packed = TokenSet.cat([*single, moved])
    assert packed.sizes == (5, 0, 7, 7)
    for part, original in zip(packed, [*single, moved], strict=True):
        assert torch.equal(part.positions, original.positions)
        assert part.extent == original.extent
    assert packed.origin.tolist() == [[0, 0]] * 3 + [[1e6, 2e6]]


WORLD = torch.tensor([[500_000.0, 5_000_000.0], [350_000.0, -20.0]], dtype=torch.float64)


def at_utm(dimensions=2):
    """Points of two tiles of 1 km in millimeters, as a map projection has them."""
    g = torch.Generator().manual_seed(0)
    local = torch.randint(0, 10**6, (900, 2), generator=g).double() / 1000
    world = local + WORLD.repeat_interleave(torch.tensor([500, 400]), 0)
    if dimensions == 3:
        world = torch.cat([world, 300 + 50 * torch.rand(900, 1, generator=g).double()], 1)
    return world


@pytest.mark.parametrize("dimensions", [2, 3])
def test_world_coordinates_keep_their_digits(dimensions):
    world = at_utm(dimensions)
    assert (world.float() - world).abs().max() > 0.1  # what it is for
    tokens = TokenSet.from_world(world, torch.rand(900, 4), (500, 400))
    assert tokens.positions.amin(0).tolist() == [0.0] * dimensions
    packed = TokenSet.cat([tokens, tokens]).to_list()[2:]
    ways = {
        "as made": (tokens, world),
        "clustered": (tokens.cluster(8).input_order(), world),
        "moved": (tokens.to("cpu", torch.bfloat16).with_features(torch.rand(900, 1)), world),
        "list": (TokenSet.from_list(packed), world),
        "selected": (tokens.select(torch.arange(0, 900, 2), (250, 200)), world[::2]),
        "other origin": (tokens.with_origin(tokens.origin[0]), None),
    }
    for name, (found, expected) in ways.items():
        if expected is not None:
            assert (found.world_positions() - expected).abs().max() < 1e-4, name
    order = tokens.cluster(8).clusters.order
    assert torch.equal(tokens.cluster(8).world_positions(), tokens.world_positions()[order])
    with pytest.raises(TypeError, match=r"TokenSet\.from_world"):
        TokenSet(world, torch.rand(900, 4), (500, 400))


def test_two_sets_share_an_origin():
    world = at_utm()[:500]
    tokens = TokenSet.from_world(world, world.float())
    queries = TokenSet.from_world(world[100:110], torch.zeros(10, 1), origin=tokens.origin)
    assert torch.equal(queries.positions, tokens.positions[100:110])
    alone = TokenSet.from_world(world[100:110], torch.zeros(10, 1))
    assert not torch.equal(alone.origin, tokens.origin)
    moved = alone.with_origin(tokens.origin)
    assert (moved.positions - queries.positions).abs().max() < 1e-4


@pytest.mark.parametrize("stray", [0.0, -1e7, 1e9])
def test_a_stray_point_costs_the_others_no_digits(stray):
    world = at_utm()[:500]
    world[7] = stray
    tokens = TokenSet.from_world(world, world.float())
    others = torch.arange(500) != 7
    assert (tokens.world_positions() - world)[others].abs().max() < 1e-4
    assert tokens.positions[others].min() >= 0


def test_world_coordinates_that_do_not_fit():
    features = torch.zeros(4, 1)
    assert TokenSet.from_world(torch.zeros(0, 2).double(), features[:0], (0, 0)).num_tokens == 0
    sizes = TokenSet.from_world(torch.ones(4, 2).double(), features, (0, 4)).origin
    assert sizes.tolist() == [[0, 0], [1, 1]]
    with pytest.raises(TypeError, match="positions: expected dtype float64"):
        TokenSet.from_world(torch.zeros(4, 2), features)
    bad = torch.tensor([[0, 0], [1, 1], [torch.nan, 0], [1e300, 0]]).double()
    with pytest.raises(ValueError, match=r"positions: sample 1 has a NaN .* row 1"):
        TokenSet.from_world(bad, features, (1, 3))
    with pytest.raises(ValueError, match="minus origin: sample 0"):
        TokenSet.from_world(bad[[0, 1, 1, 1]] * 1e300, features)


def test_neighborhoods_follow_the_clusters():
    tokens = TokenSet(torch.rand(70, 2), torch.zeros(70, 1), sizes=(50, 20))
    tokens = tokens.cluster(4, global_size=20).to("cpu")
    index = tokens.neighborhoods(3).cluster_index
    assert torch.equal(index, nearest_clusters(tokens.positions, tokens.clusters, 3).cluster_index)
    assert (index >= 0).sum(1).tolist() == [3] * 50 + [5] * 20  # the small sample lists them all
    with pytest.raises(ValueError, match="neighborhoods: these tokens have no clusters"):
        tokens.select(torch.arange(45, 55), (5, 5)).neighborhoods()


def test_selecting_clears_clusters():
    tokens = ragged(20, 12).cluster(4)
    part = tokens.select(torch.tensor([3, 5, 25]), (2, 1))
    assert part.clusters is None
    assert torch.equal(part.features, tokens.features[[3, 5, 25]])


def test_to_casts_features_only():
    tokens = ragged(9).cluster(4).to("cpu", torch.bfloat16)
    assert tokens.dtype == torch.bfloat16
    assert tokens.positions.dtype == torch.float32
    assert tokens.clusters.num_clusters == 3


def test_is_immutable():
    with pytest.raises(AttributeError):
        ragged(3).features = torch.zeros(3, 3)


def test_repr_says_what_matters():
    text = repr(ragged(20, 12).cluster(4))
    assert text == (
        "TokenSet(32 tokens in 2-D, 3 channels float32 on cpu, 2 samples: (20, 12), 8 clusters)"
    )


def test_is_a_pytree_and_survives_export():
    tokens = ragged(16, 16).cluster(4)
    doubled = pytree.tree_map_only(torch.Tensor, lambda x: x * 2, tokens)
    assert isinstance(doubled, TokenSet)
    assert torch.equal(doubled.features, tokens.features * 2)

    class Double(torch.nn.Module):
        def forward(self, tokens):
            return tokens.with_features(tokens.features * 2)

    plain = ragged(16, 16)
    program = torch.export.export(Double(), (plain,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    result = torch.export.load(buffer).module()(plain)
    assert torch.equal(result.features, plain.features * 2)
    compiled = torch.compile(Double(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(plain).features, plain.features * 2)


def test_saved_and_loaded_without_running_code():
    tokens = TokenSet.from_world(torch.rand(20, 2).double() + 5e6, torch.rand(20, 3), (12, 8))
    tokens = tokens.cluster(4)
    around = tokens.neighborhoods(2).with_plan()
    buffer = io.BytesIO()
    torch.save({"tokens": tokens, "around": around}, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert torch.equal(again["tokens"].world_positions(), tokens.world_positions())
    assert again["tokens"].clusters.counts == tokens.clusters.counts
    assert torch.equal(again["around"].cluster_index, around.cluster_index)
    assert again["around"].plan_impl == "cpu"
    assert all(map(torch.equal, again["around"].plan, around.plan))


def test_edges_are_the_neighborhoods():
    tokens = ragged(30, 9).cluster(8)
    neighborhoods = tokens.neighborhoods(2)
    token, query = neighborhoods.to_edge_index()
    rows, mask = neighborhoods.members()
    assert token.shape[0] == int(mask.sum())
    for q in (0, 17, 38):
        assert set(token[query == q].tolist()) == set(rows[q][mask[q]].tolist())
    sample = tokens.sample_index
    assert torch.equal(sample[token], sample[query])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(3, 1)), ValueError, "positions: expected shape"),
        ((torch.zeros(3, 2).double(), torch.zeros(3, 1)), TypeError, "positions: expected dtype"),
        ((torch.zeros(3, 2), torch.zeros(4, 1)), ValueError, r"features: expected shape \(3, C\)"),
        ((torch.zeros(3, 2), torch.zeros(3, 1), (1, 1)), ValueError, "add up to 2, expected 3"),
        ((torch.zeros(3, 2), torch.zeros(3, 1), (4, -1)), ValueError, "not be negative"),
        ((torch.zeros(3, 2), torch.zeros(3, 1), None, (1, 2, 3)), ValueError, "extent: expected 2"),
        (
            (np.zeros((3, 2)), torch.zeros(3, 1)),
            TypeError,
            r"positions: expected a tensor, got a float64 array .*; use torch.as_tensor",
        ),
    ],
    ids=["4-D", "float64", "rows", "sizes", "negative", "extent", "numpy"],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        TokenSet(*arguments)


def test_tokens_between_cells():
    """They are in the cell that they lie in, not in the nearest one."""
    positions = torch.tensor([[0.9, 0.0], [1.6, 1.99], [2.999, 0.5]])
    tokens = TokenSet(positions, torch.tensor([[1.0], [2.0], [3.0]]), extent=(3, 2))
    assert tokens.to_grid()[0, 0].tolist() == [[1, 0, 3], [0, 2, 0]]
    with pytest.raises(ValueError, match="a token lies outside of its canvas"):
        TokenSet(torch.tensor([[-0.5, 0.0]]), torch.ones(1, 1), extent=(3, 2)).to_grid()


@pytest.mark.parametrize(("least", "corner"), [(-2.5, -2.5), (-3.0, 5.0)])
def test_a_point_far_below_the_others_does_not_move_the_corner(least, corner):
    """Farther than 16 times the width of the middle half, 0.505, below that, which is at 5.242."""
    line = torch.linspace(5, 6, 100, dtype=torch.float64)
    world = torch.cat([line.new_tensor([least]), line])[:, None].expand(101, 2)
    assert TokenSet.from_world(world).origin.tolist() == [[corner, corner]]
