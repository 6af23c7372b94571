"""Token sets as other libraries have them: both ways, and what does not fit."""

import numpy as np
import pytest
import torch

from pointformer import TokenSet
from pointformer.integrations import (
    from_nested,
    from_pointcept,
    from_pyg,
    to_nested,
    to_pointcept,
    to_pyg,
)


def make(*sizes, channels=4):
    total = sum(sizes)
    world = torch.rand(total, 3).double() * 100 + 5e6
    fields = {"segment": torch.arange(total), "normal": torch.rand(total, 3)}
    return TokenSet.from_world(world, torch.rand(total, channels), sizes, fields=fields)


def assert_same(found, expected):
    assert found.sizes == expected.sizes
    assert found.fields.keys() == expected.fields.keys()
    assert torch.equal(found.world_positions(), expected.world_positions())
    assert torch.equal(found.features, expected.features)
    for name, rows in expected.fields.items():
        assert torch.equal(found.fields[name], rows), name


@pytest.mark.parametrize("sizes", [(5, 3, 8), (4,), (3, 0, 2, 0)])
def test_pyg_both_ways(sizes):
    from torch_geometric.data import Batch, Data

    tokens = make(*sizes)
    batch = to_pyg(tokens)
    assert isinstance(batch, Batch)
    assert batch.num_graphs == len(sizes)
    assert batch.get_example(0).pos.shape == (sizes[0], 3)
    assert_same(from_pyg(batch), tokens)
    bare = make(*sizes, channels=0)
    assert_same(from_pyg(to_pyg(bare)), bare)
    canvas = TokenSet(torch.rand(6, 2), sizes=(2, 4), extent=[(3, 4), (5, 6)])
    assert from_pyg(to_pyg(canvas)).extent == canvas.extent
    edges = torch.zeros(2, 5, dtype=torch.int64)
    of_graph = {"y": torch.tensor([1]), "edge_index": edges}
    found = from_pyg(Data(pos=torch.rand(5, 3), x=torch.arange(5), **of_graph))
    assert (found.sizes, found.channels, list(found.fields)) == ((5,), 0, ["x"])
    points = Data(pos=torch.rand(5, 3), y=torch.arange(5))
    assert from_pyg(Batch.from_data_list([points, points])).fields["y"].tolist() == [*range(5)] * 2
    with pytest.raises(ValueError, match="data: expected positions in pos"):
        from_pyg(Data(x=torch.rand(3, 2)))
    with pytest.raises(TypeError, match="data: expected a Data or Batch, got dict"):
        from_pyg({"pos": torch.rand(3, 2)})
    with pytest.raises(TypeError, match="tokens: expected a TokenSet, got int 3"):
        to_pyg(3)
    far = from_pyg(Data(pos=torch.rand(5, 3).double() + 6e6))
    assert far.positions.abs().max() <= 1


def test_pyg_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_geometric", None)
    with pytest.raises(ImportError, match="torch_geometric: pip install torch-geometric"):
        to_pyg(make(3))


def test_nested_both_ways():
    tokens = TokenSet(torch.rand(16, 3), torch.rand(16, 4), (5, 3, 8))
    positions, features = to_nested(tokens)
    assert positions.layout == torch.jagged
    assert torch.cat([positions, features], 2).values().shape == (16, 7)
    assert_same(from_nested(positions, features), tokens)
    strided = torch.nested.nested_tensor(list(tokens.positions.split(tokens.sizes)))
    assert from_nested(strided).sizes == tokens.sizes
    starts, lengths = torch.tensor([0, 1]), torch.tensor([2, 3])
    maps = torch.arange(24.0).view(2, 4, 3)
    padded = torch.nested.narrow(maps, 1, starts, lengths, torch.jagged)
    assert from_nested(padded).sizes == (2, 3)
    assert from_nested(padded).positions[2].tolist() == [15, 16, 17]
    with pytest.raises(TypeError, match="positions: expected a nested tensor"):
        from_nested(tokens.positions)
    with pytest.raises(ValueError, match="features: expected samples of the same sizes"):
        from_nested(positions, to_nested(TokenSet(torch.rand(3, 2), torch.rand(3, 1)))[1])


def test_pointcept_both_ways():
    tokens = make(5, 3, 8)
    points = to_pointcept(tokens)
    assert points["offset"].tolist() == [5, 8, 16]
    assert_same(from_pointcept(points), tokens)
    raw = {
        "coord": np.random.default_rng(0).random((9, 3)).astype(np.float32),
        "color": np.zeros((9, 3), np.uint8),
        "segment": np.arange(9),
        "name": "scene0000_00",
        "grid_size": 0.02,
        "split": np.array(["train"] * 9),
    }
    found = from_pointcept(raw)
    assert found.sizes == (9,)
    assert np.array_equal(found.positions.numpy(), raw["coord"])
    assert found.fields.keys() == {"color", "segment"}
    world = from_pointcept({"coord": raw["coord"].astype(np.float64) + 5e6})
    assert world.positions.max() <= 1
    with pytest.raises(ValueError, match="points: expected an entry coord, got"):
        from_pointcept({"feat": torch.rand(3, 2)})
    with pytest.raises(ValueError, match="ptr: expected rows that do not descend"):
        from_pointcept({"coord": torch.rand(9, 3), "offset": torch.tensor([5, 3, 9])})
    with pytest.raises(ValueError, match="add up to 7, expected 9"):
        from_pointcept({"coord": torch.rand(9, 3), "offset": torch.tensor([5, 7])})
