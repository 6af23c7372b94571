"""Gradients for positions: references give them, the fast paths say that they do not."""

import inspect
from functools import partial

import pytest
import torch

from helpers import attention, deformable, interpolate, merge
from pointformer import deformable_attention, neighborhood_attention, ops, point_conv, scored_merge
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
