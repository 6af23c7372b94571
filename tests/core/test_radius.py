"""Points within a radius, and graphs: against scipy, torch-cluster and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.strategies import KINDS, UNEVEN, tokens
from pointformer import knn, knn_graph, radius, radius_graph, to_edge_index

IMPLS = ("reference", "cpu")


@given(
    sample=tokens((*KINDS, *UNEVEN), max_samples=3),
    k=st.sampled_from([None, 1, 5, 33, 70]),
    r=st.sampled_from([0.0, 0.3, 1.0, 2.0, 9.0, 1e3, 1e25]),
    include_self=st.booleans(),
    data=st.data(),
)
def test_it_is_brute_force(sample, k, r, include_self, data):
    """On lattices many points lie on the border, which belongs to it."""
    positions, sizes = sample.positions, sample.sizes
    query, query_sizes, kwargs = positions, sizes, {"include_self": include_self}
    if data.draw(st.booleans()):
        include_self = True
        query_sizes = [data.draw(st.integers(0, 9)) for _ in sizes]
        query = (torch.rand(sum(query_sizes), sample.dimensions) * 40).round()
        kwargs = {"query_positions": query, "query_sizes": query_sizes}
    lists, square_r = [], float(torch.tensor(r, dtype=torch.float32).square())
    start = first = 0
    for size, queries in zip(sizes, query_sizes, strict=True):
        points = positions[start : start + size].numpy()
        for row in range(first, first + queries):
            square = np.square(query[row].numpy() - points)
            total = square[:, 0] + square[:, 1]
            total = total + square[:, 2] if sample.dimensions == 3 else total
            order = np.argsort(total, kind="stable")
            kept = [int(n) + start for n in order if total[n] <= square_r]
            lists.append([n for n in kept if include_self or n != row][:k])
        start, first = start + size, first + queries
    width = k or max((len(row) for row in lists), default=0)
    expected = torch.tensor(
        [row + [-1] * (width - len(row)) for row in lists], dtype=torch.int32
    ).view(len(query), width)
    every = knn(positions, max(len(positions), 1), sizes=sizes, return_distance=True, **kwargs)
    for impl in IMPLS:
        index, distance = radius(
            positions, r, k, sizes=sizes, return_distance=True, impl=impl, **kwargs
        )
        assert index.dtype == torch.int32
        assert torch.equal(index, expected)
        listed = every[1][:, :width]
        assert torch.equal(
            distance[:, : listed.shape[1]],
            listed.where(index[:, : listed.shape[1]] >= 0, torch.inf),
        )


@pytest.mark.parametrize("dimensions", [2, 3])
def test_scipy(dimensions):
    positions = torch.rand(3000, dimensions, generator=torch.Generator().manual_seed(0))
    tree = pytest.importorskip("scipy.spatial").cKDTree(positions.numpy())
    found = radius(positions, 0.08)
    theirs = tree.query_ball_point(positions.numpy(), 0.08)
    assert [sorted(row[row >= 0].tolist()) for row in found] == [sorted(row) for row in theirs]


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_graphs_are_those_of_torch_cluster(flow, loop):
    torch_cluster = pytest.importorskip("torch_cluster", reason="torch-cluster is not installed")
    positions = torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
    batch = torch.arange(300) // 120
    same = {"loop": loop, "flow": flow}

    def edges(index):
        return sorted(map(tuple, index.T.tolist()))

    ours = knn_graph(positions, 6, batch=batch, **same)
    assert edges(ours) == edges(torch_cluster.knn_graph(positions, 6, batch, **same))
    ours = radius_graph(positions, 0.2, batch=batch, **same)
    theirs = torch_cluster.radius_graph(positions, 0.2, batch, max_num_neighbors=300, **same)
    assert edges(ours) == edges(theirs)
    index = radius(positions, 0.2, 4, impl="torch_cluster")
    assert torch.equal(index, radius(positions, 0.2, 4))


def test_edges_follow_the_lists():
    index = torch.tensor([[2, 0], [-1, -1], [1, -1]], dtype=torch.int32)
    assert to_edge_index(index).tolist() == [[2, 0, 1], [0, 0, 2]]
    assert to_edge_index(index, flow="target_to_source").tolist() == [[0, 0, 2], [2, 0, 1]]
    assert to_edge_index(index[:0]).shape == (2, 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_query", [False, True])
def test_distances_have_gradients(impl, with_query):
    g = torch.Generator().manual_seed(0)
    points = torch.rand(20, 3, generator=g).requires_grad_()
    query = torch.rand(7, 3, generator=g).requires_grad_() if with_query else None
    for search in (knn, lambda *args, **kw: radius(args[0], 0.5, args[1], **kw)):
        index, distance = search(points, 4, query_positions=query, return_distance=True, impl=impl)
        _, plain = search(
            points.detach(), 4, return_distance=True, impl=impl,
            query_positions=None if query is None else query.detach(),
        )  # fmt: skip
        assert torch.equal(distance.detach(), plain)
        finite = distance[distance.isfinite()]
        leaves = (points,) if query is None else (points, query)
        ours = torch.autograd.grad(finite.sum(), leaves)
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        edges = to_edge_index(index)
        apart = exact[-1][edges[1]] - exact[0][edges[0]]
        expected = torch.autograd.grad(apart[apart.any(1)].norm(dim=1).sum(), exact)
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: radius(x, -1.0), "r: expected a number of at least 0"),
        (lambda x: radius(x, torch.nan), "r: expected"),
        (lambda x: radius(x, 1.0, 0), "k: expected a positive integer"),
        (lambda x: radius(x.double(), 1.0), "positions: expected dtype float32"),
        (lambda x: radius_graph(x, 1.0, flow="up"), "flow: expected one of"),
        (lambda x: to_edge_index(x), "neighbor_index: expected dtype"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.rand(9, 2))


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_graphs_by_definition(flow, loop):
    positions = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    batch = torch.arange(40) // 25
    square = (positions[:, None] - positions).square().sum(2)
    square = square.masked_fill(batch[:, None] != batch, torch.inf)
    if not loop:
        square.fill_diagonal_(torch.inf)

    def assert_edges(index, linked):
        pairs = linked.nonzero().tolist()  # query, neighbor
        expected = {tuple(pair if flow == "target_to_source" else pair[::-1]) for pair in pairs}
        assert len(pairs) == index.shape[1]
        assert set(map(tuple, index.T.tolist())) == expected

    nearest = torch.zeros(40, 40).bool().scatter(1, square.argsort(1)[:, :4], True)
    near = square <= 0.3**2
    how = {"batch": batch, "loop": loop, "flow": flow}
    assert_edges(knn_graph(positions, 4, **how), nearest)
    assert_edges(radius_graph(positions, 0.3, **how), near)
    assert_edges(radius_graph(positions, 0.3, 4, **how), near & nearest)
