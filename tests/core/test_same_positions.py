"""Batches whose samples have the same positions: sorted and searched once, with the same result."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_gpu import dirty_memory
from helpers.strategies import tokens
from pointformer import Neighborhoods, TokenSet, balanced_cluster, interpolate, knn
from pointformer import nearest_clusters as search
from pointformer.geometry import neighbors
from pointformer.kernels.triton import neighbors as kernels
from pointformer.kernels.triton.runtime import INTERPRETED
from pointformer.models import create_model

IMPLEMENTATIONS = ["reference", "cpu", *(["triton"] if INTERPRETED else [])]
CLUSTERS = ("order", "offsets", "centers", "sizes", "counts")


def repeated(sample, copies):
    return sample.positions.repeat(copies, 1), [len(sample.positions)] * copies


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)
        else:
            assert mine == other


def listed(plan, impl):
    """The entries of a plan that have a meaning, as lists."""
    if impl != "triton":
        return list(plan)
    counts, *columns = plan[:4]
    tiles = [column[t, :count] for column in columns for t, count in enumerate(counts.tolist())]
    begins, counts, *columns = plan[4:]
    spans = list(zip(begins.tolist(), counts.tolist(), strict=True))
    groups = [column[start : start + count] for column in columns for start, count in spans]
    return [plan[0], *tiles, begins, counts, *groups]


@pytest.fixture(autouse=True, scope="module")
def short_lists():
    """What a program costs in the interpreter depends on the longest list, not on its queries."""
    with mock.patch.multiple(kernels, _QUERIES=256, _IN_LIST=8, _LISTS=(4, 8)):
        yield


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(sample=tokens(max_samples=1, max_size=30), copies=st.integers(1, 3), data=st.data())
@settings(max_examples=10)
def test_clusters_and_neighborhoods(impl, sample, copies, data):
    if not sample.sizes:
        return
    positions, sizes = repeated(sample, copies)
    measured, size = data.draw(st.booleans()), data.draw(st.integers(1, 9))
    options = {
        "sizes": sizes,
        "extent": None if measured else sample.extent * copies,
        "curve": data.draw(st.sampled_from(["hilbert", "morton", "snake"])),
        "anchors": data.draw(st.booleans()),
        "remainder": data.draw(st.sampled_from(["spread", "last"])),
        "global_size": data.draw(st.sampled_from([0, 20])),
    }
    how = {
        "scope": data.draw(st.sampled_from(["token", "tile"])),
        "tile_size": data.draw(st.sampled_from([3, 16])),
        "include_own": data.draw(st.booleans()),
    }
    found = []
    for promised in (False, True):
        with dirty_memory():
            clusters = balanced_cluster(
                positions, size, same_positions=promised, impl=impl, **options
            )
            around = search(positions[clusters.order], clusters, 4, impl=impl, **how)
            plan = around.with_plan(impl=impl).plan
        assert clusters.same_positions is promised
        fields = [getattr(clusters, name) for name in CLUSTERS]
        found.append([*fields, around.cluster_index, *(listed(plan, impl) if plan else [])])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (40, 4, 4)])
def test_grids(impl, shape):
    """Tiles and groups that belong to one sample, and such as reach over several."""
    copies, height, width = shape
    grid = TokenSet.from_grid(torch.randn(copies, 1, height, width))
    found = []
    for promised in (False, True):
        given_ = (grid.positions, grid.features, grid.sizes, grid.extent)
        tokens = TokenSet(*given_, same_positions=promised).cluster(impl=impl)
        with dirty_memory():
            around = search(tokens.positions, tokens.clusters, 4, impl=impl)
            planned = around.with_plan(impl=impl)
        assert planned.copies == (copies if promised else 1)
        found.append([tokens.positions, around.cluster_index, *listed(planned.plan, impl)])
    assert_same(found[1], found[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@given(sample=tokens(max_samples=1, max_size=30), copies=st.integers(1, 3), data=st.data())
@settings(max_examples=10)
def test_neighbors_of_points_and_queries(impl, sample, copies, data):
    if not sample.sizes:
        return
    positions, sizes = repeated(sample, copies)
    query = {"include_self": data.draw(st.booleans())}
    if query["include_self"] and data.draw(st.booleans()):
        places = torch.rand(data.draw(st.integers(0, 9)), sample.dimensions).repeat(copies, 1)
        query = {"query_positions": places * 40, "query_sizes": [len(places) // copies] * copies}
    query["along_curve"] = data.draw(st.booleans())
    options = {"k": data.draw(st.sampled_from([1, 4, 9])), "sizes": sizes, "return_distance": True}
    found = [
        knn(positions, same_positions=promised, impl=impl, **options, **query)
        for promised in (False, True)
    ]
    assert_same(found[1], found[0])


def test_interpolation():
    coarse, fine = torch.rand(5, 2).repeat(3, 1), torch.rand(9, 2).repeat(3, 1)
    features = torch.randn(15, 4)
    sizes = {"sizes": [5] * 3, "query_sizes": [9] * 3}
    plain, promised = (
        interpolate(features, coarse, fine, same_positions=promise, **sizes)
        for promise in (False, True)
    )
    assert torch.equal(plain, promised)


def test_a_grid_keeps_the_promise_as_long_as_it_holds():
    maps = torch.randn(3, 2, 6, 5)
    grid = TokenSet.from_grid(maps)
    assert grid.same_positions
    assert TokenSet.from_grid(list(maps)).same_positions
    assert not TokenSet.from_grid([maps[0], maps[1, :, :5]]).same_positions
    clustered = grid.cluster(4)
    assert clustered.clusters.same_positions
    for kept in (
        grid.with_features(grid.features * 2),
        clustered,
        clustered.input_order(),
        clustered.to("cpu"),
    ):
        assert kept.same_positions
    assert clustered.to("cpu").clusters.same_positions
    every = torch.arange(grid.num_tokens)
    assert not grid.select(every, grid.sizes).same_positions
    assert not TokenSet.from_list([grid, grid]).same_positions
    around = search(clustered.positions, clustered.clusters, 2)
    assert around.copies == 3
    assert around.with_plan().copies == 3
    assert around.select(every).copies == 1
    assert Neighborhoods(around.cluster_index, clustered.clusters).copies == 1


@pytest.mark.parametrize("name", ["aff_nano", "swin_mini"])
def test_models_search_the_first_grid_once(name):
    model = create_model(name, head="hcformer", num_classes=3, dim=32, queries=3).eval()
    images = torch.randn(2, 3, 32, 32)
    for batch in (images, list(images)):
        search = mock.patch.object(neighbors, "fused_nearest", wraps=neighbors.fused_nearest)
        with search as nearest, torch.no_grad():
            model(batch)
        copies = [call.args[-2] for call in nearest.call_args_list]
        assert copies[0] == 2
        assert name != "swin_mini" or set(copies) == {2}  # all of its stages are full grids


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: balanced_cluster(p, sizes=[3, 1], same_positions=True), "samples of one size"),
        (lambda p: balanced_cluster(p, sizes=[2, 2], same_positions=True), "of sample 1 are not"),
        (
            lambda p: balanced_cluster(
                p, sizes=[2, 2], extent=[(4, 4), (4, 5)], same_positions=True
            ),
            "one extent",
        ),
        (lambda p: knn(p, 1, sizes=[2, 2], same_positions=True), "of sample 1 are not"),
        (
            lambda p: knn(
                p[:2].repeat(2, 1),
                1,
                sizes=[2, 2],
                query_positions=p,
                query_sizes=[2, 2],
                same_positions=True,
            ),
            "query_positions of sample 1 are not",
        ),
        (
            lambda p: search(
                p,
                balanced_cluster(p[:2].repeat(2, 1), 2, sizes=[2, 2], same_positions=True),
                1,
            ),
            "of sample 1 are not",
        ),
        (lambda p: TokenSet(p, p, [3, 1], same_positions=True), "samples of one size"),
        (
            lambda p: TokenSet(p, p, [2, 2], [(4, 4), (4, 5)], same_positions=True),
            "one extent",
        ),
        (
            lambda p: interpolate(p, p, p, sizes=[2, 2], query_sizes=[2, 2], same_positions=True),
            "of sample 1 are not",
        ),
    ],
)
def test_a_promise_that_does_not_hold(call, message):
    positions = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    if message == "one extent":
        positions = positions[:2].repeat(2, 1)
    with pytest.raises(ValueError, match=f"same_positions: .*{message}"):
        call(positions)


def test_interpolation_between_grids_and_other_positions():
    """Only where both have the same positions in all samples they are searched for once."""
    g = torch.Generator().manual_seed(0)
    grid = TokenSet.from_grid(torch.rand(2, 3, 4, 5, generator=g))
    other = TokenSet(torch.rand(12, 2, generator=g) * 4, torch.rand(12, 3, generator=g), (6, 6))
    for source, target in ((grid, other), (other, grid)):
        expected = interpolate(
            source.features, source.positions, target.positions,
            sizes=source.sizes, query_sizes=target.sizes,
        )  # fmt: skip
        assert torch.equal(source.interpolate_to(target).features, expected)


@pytest.mark.parametrize("check_values", [True, False])
def test_interpolation_where_origins_differ(check_values):
    """Positions that are the same relative to origins that are not are searched for in each."""
    grid = TokenSet.from_grid(torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    for moved in ([[0.0, 0.0], [4.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]):
        origin = torch.tensor(moved, dtype=torch.float64)
        given_ = grid.positions, grid.features, grid.sizes, grid.extent, origin
        promised, plain = (TokenSet(*given_, same_positions=same) for same in (True, False))
        found = promised.interpolate_to(grid, check_values=check_values)
        assert torch.equal(found.features, plain.interpolate_to(grid).features)
