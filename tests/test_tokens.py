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
    packed = TokenSet.from_list([*single, moved])
    assert packed.sizes == (5, 0, 7, 7)
    for part, original in zip(packed.to_list(), [*single, moved], strict=True):
        assert torch.equal(part.positions, original.positions)
        assert part.extent == original.extent
    assert packed.origin.tolist() == [[0, 0]] * 3 + [[1e6, 2e6]]


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


def test_edges_are_the_neighborhoods():
    tokens = ragged(30, 9).cluster(8)
    neighborhoods = nearest_clusters(tokens.positions, tokens.clusters, 2)
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
            "positions: expected a tensor, got ndarray",
        ),
    ],
    ids=["4-D", "float64", "rows", "sizes", "negative", "extent", "numpy"],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        TokenSet(*arguments)
