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


@pytest.mark.parametrize("name", ["y", "adj", "keys", "self", "_x", "num_graphs", "node_type", ""])
@pytest.mark.parametrize("sizes", [(4, 2), (0, 3), ()])
def test_fields_come_back_from_pyg(name, sizes):
    rows = torch.arange(sum(sizes))
    origin = torch.arange(len(sizes) * 3).view(-1, 3) * 1e6
    extent = [(0.1, 2**24 + 1, 3)] * len(sizes)
    tokens = TokenSet(
        torch.rand(sum(sizes), 3), None, sizes, extent, origin.double(), fields={name: rows}
    )
    batch = to_pyg(tokens)
    assert_same(from_pyg(batch), tokens)
    assert from_pyg(batch).extent == tokens.extent
    assert batch.num_graphs == len(sizes)


def test_integers_called_x_come_back_from_pyg():
    tokens = TokenSet(torch.rand(5, 3), None, (2, 3), fields={"x": torch.arange(5)})
    assert_same(from_pyg(to_pyg(tokens)), tokens)


PYG_NAMES = (
    *("point_index", "batch_id", "face", "edge_attr", "edge_index", "edges"),
    *("x", "pos", "batch", "ptr", "num_nodes", "num_edges", "origin", "extent"),
)


@pytest.mark.parametrize("name", PYG_NAMES)
def test_fields_that_pyg_would_change_are_named(name):
    tokens = TokenSet(torch.rand(5, 3), torch.rand(5, 1), (2, 3), fields={name: torch.arange(5)})
    with pytest.raises(ValueError, match=f"tokens: field {name!r} would be changed or lost"):
        to_pyg(tokens)


def of_pyg(pos, **more):
    from torch_geometric.data import Data

    return from_pyg(Data(pos=pos, **more))


def of_pointcept(pos, **more):
    return from_pointcept({"coord": pos, **more})


@pytest.mark.parametrize("take", [of_pyg, of_pointcept])
def test_positions_keep_their_digits_and_their_origin(take):
    whole = torch.tensor([[500_000_001, 3, 4], [500_000_017, 3, 4]])
    assert take(whole).world_positions().tolist() == whole.tolist()
    near = torch.tensor([[1.0, 3, 4], [2, 3, 4]])
    for origin in (torch.full((1, 3), 100.0).double(), torch.full((3,), 100)):
        for pos in (near, near.double(), near.long(), near.half()):
            world = take(pos, origin=origin).world_positions()
            assert world.tolist() == [[101, 103, 104], [102, 103, 104]]
    two = take(near.double(), origin=torch.tensor([[1.0], [9]]).expand(2, 3), batch=torch.arange(2))
    assert two.world_positions().tolist() == [[2, 4, 5], [11, 12, 13]]
    with pytest.raises(ValueError, match=r"origin: expected shape \(1, 3\), got"):
        take(near.double(), origin=torch.zeros(2, 3))


def test_positions_on_a_canvas_stay_where_they_are():
    pos = torch.tensor([[1.5, 2], [3, 3]]).double()
    found = of_pyg(pos, extent=torch.tensor([[4, 4]]))
    assert found.positions.tolist() == pos.tolist()
    assert found.extent == ((4, 4),)


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
    with pytest.raises(ValueError, match="tokens: field 'coord' is something else in Pointcept"):
        to_pointcept(TokenSet(torch.rand(3, 2), fields={"coord": torch.rand(3)}))


def test_samples_of_pointcept():
    coord = np.random.default_rng(0).random((6, 3))
    batch = np.array([0, 0, 0, 0, 1, 1])
    for more in (
        {"batch": batch},
        {"batch": torch.from_numpy(batch)},
        {"offset": [4, 6]},
        {"offset": np.array([4, 6], ">i4"), "batch": batch},
    ):
        assert from_pointcept({"coord": coord, **more}).sizes == (4, 2)
    found = from_pointcept({"coord": coord[::-1].tolist(), "z": coord[::-1, 2]})
    torch.testing.assert_close(found.world_positions()[:, 2], found.fields["z"], rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="batch: expected the tokens of a sample in consecutive"):
        from_pointcept({"coord": coord, "batch": batch[::-1]})


def test_samples_of_pyg_by_their_offsets():
    """What `Batch` calls `ptr`, in a `Data` without `batch`."""
    assert of_pyg(torch.rand(5, 3), ptr=torch.tensor([0, 2, 5])).sizes == (2, 3)


def test_one_feature_of_pyg_may_have_no_axis():
    assert of_pyg(torch.rand(5, 3), x=torch.rand(5)).channels == 1


def test_flags_of_pointcept_are_fields():
    tokens = of_pointcept(np.eye(9, 3), mask=np.ones(9, bool))
    assert tokens.fields["mask"].tolist() == [True] * 9


def test_nested_channels_are_on_the_last_axis():
    positions, features = to_nested(make(3, 4))
    with pytest.raises(ValueError, match="features: expected samples that differ along axis 1"):
        from_nested(positions, features.transpose(1, 2))
