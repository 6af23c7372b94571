"""Gradients for positions: references give them, the fast paths say that they do not."""

import inspect
from functools import partial

import pytest
import torch
from torch.utils import _pytree as pytree

from helpers import attention, deformable, interpolate, merge
from pointformer import (
    TokenSet,
    balanced_cluster,
    deformable_attention,
    geometry,
    neighborhood_attention,
    ops,
    point_conv,
    scored_merge,
)
from pointformer import interpolate as interpolation


def calls():
    """By the op's name: a call of `impl`, and its positions by name."""
    tensors, positions, neighborhoods = attention.make_inputs(dtype=torch.float32)
    found = {
        "neighborhood_attention": (
            lambda positions, impl: attention.attend(tensors, positions, neighborhoods, impl=impl),
            {"positions": positions},
        )
    }
    given, places, lists = attention.make_lists(queries=9)
    given = {key: tensor.float() for key, tensor in given.items()}
    found["neighborhood_attention of others"] = (
        partial(neighborhood_attention, **given, neighborhoods=lists),
        dict(zip(("positions", "query_positions"), places, strict=True)),
    )
    case = merge.make_case()
    conv = {name: case[name] for name in ("features", *merge.NET)}
    conv["neighbor_index"] = torch.randint(0, 47, (20, 5))
    cases = {
        "scored_merge": (scored_merge, case, ["positions"]),
        "point_conv": (
            point_conv,
            {**conv, "positions": case["positions"], "center_positions": torch.rand(20, 2)},
            ["positions", "center_positions"],
        ),
        "interpolate": (interpolation, interpolate.make_case(), ["positions", "query_positions"]),
        "deformable_attention": (
            deformable_attention, deformable.make_case(), ["positions", "query_positions"],
        ),
    }  # fmt: skip
    for name, (op, case, names) in cases.items():
        rest = {key: value for key, value in case.items() if key not in names}
        found[name] = (partial(op, **rest), {key: case[key] for key in names})
    return found


def test_no_op_is_left_out():
    takes = {
        name
        for name in ops.__all__
        if "positions" in inspect.signature(getattr(ops, name)).parameters
    }
    assert takes == {name.split()[0] for name in calls()}


@pytest.mark.parametrize("op", calls())
def test_the_reference_gives_them_as_differences_do(op):
    call, positions = calls()[op]
    moved = {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in positions.items():  # off the lattice: at distance 0 there is a kink
        moved[name] = tensor + torch.rand(tensor.shape, generator=generator) / 4
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in moved.items()}
    out = call(**leaves, impl="reference")
    cotangent = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    for (name, tensor), grad in zip(moved.items(), grads, strict=True):
        assert grad.any()
        way = torch.randn(tensor.shape, generator=generator)
        step = 2.0**-9
        ends = [
            (call(**{**moved, name: tensor + s * way}, impl="reference") * cotangent).double().sum()
            for s in (step, -step)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        size = (grad * way).double().norm()  # of what adds up to the slope
        assert abs((grad * way).double().sum() - slope) < 0.02 * size, name


@pytest.mark.parametrize("impl", [None, "cpu", "triton"])
@pytest.mark.parametrize("op", calls())
def test_fast_paths_refuse_them(op, impl):
    call, positions = calls()[op]
    for name, tensor in positions.items():
        learned = {**positions, name: tensor.clone().requires_grad_()}
        with pytest.raises(
            ValueError, match=rf"{op.split()[0]}: impl=.* {name} requires a gradient; use impl='ref"
        ):
            call(**learned, impl=impl)
        if impl != "triton":
            with torch.no_grad():
                call(**learned, impl=impl)


@pytest.mark.parametrize("op", calls())
def test_they_are_finite_at_distance_zero(op):
    call, positions = calls()[op]
    leaves = {name: torch.zeros_like(tensor).requires_grad_() for name, tensor in positions.items()}
    call(**leaves, impl="reference").sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


def found_by_geometry(positions, impl):
    """What each geometric function finds among two samples of positions, by its name."""
    common = {"sizes": (14, 9), "impl": impl}
    clusters = geometry.balanced_cluster(positions, 8, **common)
    found = {
        "balanced_cluster": clusters,
        "curve_sample": geometry.curve_sample(positions, count=5, **common),
        "farthest_point_sample": geometry.farthest_point_sample(positions, count=5, **common),
        "knn": geometry.knn(positions, 3, return_distance=True, **common),
        "nearest_clusters": geometry.nearest_clusters(
            positions[clusters.order], clusters, 3, impl=impl
        ),
        "radius": geometry.radius(positions, 2.0, 4, return_distance=True, **common),
        "select_centers": geometry.select_centers(
            torch.rand(23), positions, rate=0.25, lattice=False, stride=1.0, **common
        ),
        "voxel_pool": geometry.voxel_pool(positions, None, 2.0, **common),
    }
    same = geometry.balanced_cluster(positions[:20], 8, sizes=(10, 10), impl=impl)
    return found | {"balanced_cluster of equal samples": same}


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_all_numbers_that_geometry_finds_have_them(impl):
    """Whatever it finds is integers, or has a way back to the positions, the same in each."""
    generator = torch.Generator().manual_seed(2)
    leaf = (torch.rand(23, 2, generator=generator) * 8).requires_grad_()
    alike = [
        found_by_geometry(leaf, impl),
        found_by_geometry(leaf, "reference"),
        found_by_geometry(leaf.detach(), impl),
    ]
    for name in alike[0]:
        numbers = [
            [
                x
                for x in pytree.tree_leaves(found[name])
                if torch.is_tensor(x) and x.is_floating_point()
            ]
            for found in alike
        ]
        for number, other, alone in zip(*numbers, strict=True):
            assert torch.equal(number, alone)
            cotangent = torch.randn(number.shape, generator=generator)
            finite = number.detach().isfinite()
            grads = [
                torch.autograd.grad(x[finite], leaf, cotangent[finite], retain_graph=True)[0]
                for x in (number, other)
            ]
            torch.testing.assert_close(*grads, msg=name)


def test_no_geometric_function_is_left_out():
    takes = {
        name
        for name in geometry.__all__
        if callable(getattr(geometry, name))
        and "positions" in inspect.signature(getattr(geometry, name)).parameters
    }
    names = {name.split()[0] for name in found_by_geometry(torch.rand(23, 2), "reference")}
    # What voxel_pool gives; scores, which change in steps.
    assert takes - names == {"Voxels", "spread_scores"}


def test_centers_have_those_of_their_members():
    positions = torch.rand(21, 3, requires_grad=True)
    clusters = balanced_cluster(positions, 8, sizes=(0, 21))
    (grad,) = torch.autograd.grad(clusters.centers[1].sum(), positions)
    members = clusters.order[clusters.offsets[1] : clusters.offsets[2]]
    expected = torch.zeros(21, 3)
    expected[members] = 1 / len(members)
    assert torch.equal(grad, expected)
    tokens = TokenSet(positions).cluster().detach()
    assert not tokens.clusters.centers.requires_grad


def test_an_origin_is_a_constant():
    positions = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    tokens = TokenSet.from_world(positions, sizes=(4, 5))
    assert not tokens.origin.requires_grad
    (grad,) = torch.autograd.grad(tokens.positions[0].sum(), positions)
    assert grad[0].eq(1).all()
    assert not grad[1:].any()
