"""Inverse-distance interpolation: parity, gradients, the fused CPU path, odd inputs."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from torch.autograd import gradcheck, gradgradcheck

from helpers.gradients import (
    assert_same_for_any_threads,
    value_and_gradients,
)
from helpers.interpolate import assert_as_accurate, make_case, with_gradients
from pointformer import interpolate
from pointformer.kernels.cpu.inverse import inverse_lists
from pointformer.kernels.cpu.simd import load, splat, store
from pointformer.kernels.cpu.special import log2, power
from pointformer.kernels.interpolate import fused_interpolate
from pointformer.kernels.triton.runtime import INTERPRETED
from pointformer.reference.interpolate import interpolate as reference

PARITY = np.load(Path(__file__).parents[1] / "parity" / "ops.npz")


def test_parity():
    def get(array):
        return torch.from_numpy(PARITY[f"shepard_{array}"])

    samples, tokens, _ = get("features").shape
    index = get("neighbors").long() + tokens * torch.arange(samples)[:, None, None]
    features = get("features").flatten(0, 1).requires_grad_()
    out = interpolate(
        features,
        get("positions").flatten(0, 1).float(),
        get("query_positions").flatten(0, 1).float(),
        neighbor_index=index.flatten(0, 1),
        impl="reference",
    )
    torch.testing.assert_close(out, get("out").flatten(0, 1), rtol=0, atol=1e-10)
    out.backward(get("cotangent").flatten(0, 1))
    torch.testing.assert_close(features.grad.view_as(get("features")), get("grad_features"))


def test_finds_the_nearest_tokens_of_the_same_sample():
    case = make_case()
    sizes, query_sizes = (12, 0, 18), (20, 4, 17)
    found = interpolate(
        case["features"],
        case["positions"],
        case["query_positions"],
        sizes=sizes,
        query_sizes=query_sizes,
        k=3,
    )
    distances = torch.cdist(case["query_positions"].double(), case["positions"].double())
    sample = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    query_sample = torch.arange(3).repeat_interleave(torch.tensor(query_sizes))
    distances[query_sample[:, None] != sample] = float("inf")
    nearest = distances.sort(dim=1, stable=True)
    index = torch.where(nearest.values < float("inf"), nearest.indices, -1)[:, :3]
    expected = interpolate(
        case["features"], case["positions"], case["query_positions"], neighbor_index=index
    )
    torch.testing.assert_close(found, expected)
    assert found[20:24].eq(0).all()


def test_reference_is_differentiable_twice():
    case = make_case(9, 5, 3, 2, exponent=2.5)
    g = torch.Generator().manual_seed(2)
    positions, queries = (torch.rand(n, 2, generator=g).double().requires_grad_() for n in (9, 5))
    features, exponent = (case[n].double().requires_grad_() for n in ("features", "power"))

    def function(*inputs):
        features, positions, queries, exponent = inputs
        return reference(features, positions, queries, case["neighbor_index"], exponent, 1e-3)

    assert gradcheck(function, (features, positions, queries, exponent))
    assert gradgradcheck(function, (features, positions, queries, exponent))


@pytest.mark.parametrize("exponent", [1.0, 6.0])
def test_gradients_at_distance_zero_are_finite(exponent):
    case = make_case(exponent=exponent)
    case["query_positions"][:30] = case["positions"]
    case["neighbor_index"][:30, 0] = torch.arange(30)
    names = ("features", "power", "positions", "query_positions")
    case = {n: x.double() if n in ("features", "power") else x for n, x in case.items()}
    leaves = [case[n].clone().requires_grad_() for n in names]
    out = interpolate(**case | dict(zip(names, leaves, strict=True)), impl="reference")
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    assert all(g.isfinite().all() for g in (*grads, *second))


@given(
    st.fixed_dictionaries(
        {
            "tokens": st.integers(0, 40),
            "queries": st.integers(0, 60),
            "k": st.integers(1, 9),
            "channels": st.integers(1, 40),
            "dimensions": st.sampled_from([2, 3]),
            "exponent": st.floats(0.5, 9.0, width=32),
            "drop": st.sampled_from([0.0, 0.3]),
            "seed": st.integers(0, 2**16),
        }
    )
)
def test_cpu_is_as_accurate_as_eager(shape):
    assert_as_accurate(make_case(**shape))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_values_at_tokens_and_constants_are_kept(impl):
    g = torch.Generator().manual_seed(0)
    lattice = torch.cartesian_prod(torch.arange(6.0), torch.arange(7.0))
    features = torch.randn(42, 5, generator=g)
    out = interpolate(features, lattice, lattice, impl=impl)
    torch.testing.assert_close(out, features, rtol=1e-5, atol=1e-5)
    queries = torch.rand(50, 2, generator=g) * 6
    out = interpolate(torch.full((42, 5), 3.0), lattice, queries, impl=impl)
    torch.testing.assert_close(out, torch.full((50, 5), 3.0))


IMPLS = [
    "reference",
    "cpu",
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs a GPU here")),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("exponent", [1.0, 6.0, 40.0])
def test_units_do_not_matter(impl, exponent):
    """Bit for bit for powers of two, which change no digit of a position."""
    g = torch.Generator().manual_seed(3)
    case = make_case(channels=3, exponent=exponent)
    case["positions"], queries = (torch.rand(n, 2, generator=g) * 9 for n in (30, 41))
    queries[:3] = case["positions"][:3]
    case |= {"query_positions": queries, "neighbor_index": None, "k": 3}
    expected = with_gradients(case, impl=impl)
    exact = with_gradients(case, torch.float64, impl="reference")
    assert torch.equal(expected["out"][:3], case["features"][:3])
    for scale in (2.0**-50, 2.0**-20, 2.0**27, 2.0**55):
        moved = {name: case[name] * scale for name in ("positions", "query_positions")}
        found = with_gradients(case | moved, impl=impl)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for scale in (1e-6, 3e6, 1e8):
        moved = {name: case[name] * scale for name in ("positions", "query_positions")}
        found = with_gradients(case | moved, impl=impl)
        for name in exact:
            error = (found[name] - exact[name]).abs().max()
            assert error < 3e-6 * exponent * exact[name].abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_distances_whose_squares_vanish_count_as_zero(impl):
    """The border of what the units do not matter for: 2**-63, the root of the smallest normal."""
    features = torch.tensor([[1.0], [5.0], [20.0]])
    places = torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 0.0]])
    for scale, exponent, expected in (
        (2.0**-62, 1.0, (1.0 + 5.0 / 2 + 20.0 / 9) / (1 + 1 / 2 + 1 / 9)),
        (2.0**-63, 1.0, 1.0),  # the first is at the border, the next just above
        (2.0**-64, 1.0, (1.0 + 5.0) / 2),
        (2.0**-70, 6.0, (1.0 + 5.0 + 20.0) / 3),
    ):
        out = interpolate(
            features, places * scale, torch.zeros(1, 2), power=exponent, k=3, impl=impl
        )
        torch.testing.assert_close(out, torch.tensor([[expected]]), rtol=1e-6, atol=0.0)


def test_positions_far_apart_have_finite_gradients():
    case = make_case(drop=0.0)
    far = {name: case[name] * 2.0**50 for name in ("positions", "query_positions")}
    names = ("features", "positions", "query_positions", "power")
    found = value_and_gradients(interpolate, case | far, names, impl="reference")
    expected = value_and_gradients(interpolate, case, names, impl="reference")
    for name in ("positions", "query_positions"):
        found[name] = found[name] * 2.0**50
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@given(st.floats(0.25, 10.0, width=32), st.integers(0, 2**16))
def test_power(h, seed):
    g = np.random.default_rng(seed)
    x = np.exp2(g.uniform(-100 / h, 100 / h, 64).clip(-60, 60)).astype(np.float32)
    value, logarithm = np.empty_like(x), np.empty_like(x)
    _powers(x, np.float32(h), value, logarithm)
    exact = x.astype(np.float64) ** np.float64(np.float32(h))
    assert np.all(np.abs(value / exact - 1) < (1 + h) * 1.5e-7)
    exact = np.log2(x.astype(np.float64))
    assert np.all(np.abs(logarithm - exact) < 1e-7 + np.abs(exact) * 6e-8)


@njit
def _powers(x, h, value, logarithm):
    for i in range(0, len(x), 8):
        store(value, i, power(load(x, i), splat(h)))
        store(logarithm, i, log2(load(x, i)))


@given(st.lists(st.integers(-1, 9), max_size=50))
def test_inverse_lists(index):
    offsets, entries = inverse_lists(np.array(index, np.int32), 10)
    for number in range(10):
        expected = [i for i, value in enumerate(index) if value == number]
        assert entries[offsets[number] : offsets[number + 1]].tolist() == expected
    assert len(entries) == offsets[10]


def test_neighbors_that_are_not_listed_do_not_matter():
    case = make_case(drop=0.4)
    used = torch.zeros(30, dtype=torch.bool)
    used[5:] = True
    case["neighbor_index"][case["neighbor_index"] < 5] = -1
    case["features"][~used] = float("nan")
    assert interpolate(**case, impl="reference").isfinite().all()
    assert interpolate(**case, impl="cpu").isfinite().all()


def test_bits_do_not_depend_on_threads_or_runs():
    case = make_case(3000, 5000)
    assert_same_for_any_threads(partial(with_gradients, case, impl="cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    case = make_case()
    case["features"] = case["features"].to(dtype)
    expected = interpolate(**case | {"features": case["features"].float()}).to(dtype)
    assert torch.equal(interpolate(**case), expected)
    torch.testing.assert_close(interpolate(**case, impl="reference"), expected)
    assert with_gradients(case, dtype, ("features",))["features"].dtype == dtype


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("change", [{"tokens": 0}, {"queries": 0}, {"k": 0}, {"channels": 0}])
def test_empty_inputs(change, impl):
    result = with_gradients(make_case(**change), impl=impl)
    assert all(value.eq(0).all() for value in result.values())


def test_opcheck():
    case = make_case()
    case["neighbor_index"] = case["neighbor_index"].int()
    case["features"].requires_grad_()
    torch.library.opcheck(fused_interpolate, (*case.values(), 1e-11, "cpu"))
    case["power"].requires_grad_()
    torch.library.opcheck(fused_interpolate, (*case.values(), 1e-11, "cpu"))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("exponent", [4.0, torch.tensor([4.0])])
def test_compiles_without_graph_breaks(exponent, impl):
    case = make_case() | {"power": exponent}
    features = case.pop("features")

    def function(features):
        return interpolate(features, **case, impl=impl).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (function, compiled):
        leaf = features.clone().requires_grad_()
        f(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.rand(29, 3)}, ValueError, r"positions: expected shape \(29, D\)"),
        ({"query_positions": torch.rand(41, 3)}, ValueError, "query_positions: expected shape"),
        ({"query_positions": torch.full((41, 2), np.nan)}, ValueError, "query_positions: sample 0"),
        ({"neighbor_index": torch.zeros(40, 4).int()}, ValueError, r"\(41, k\)"),
        ({"neighbor_index": torch.zeros(41, 4)}, TypeError, "neighbor_index: expected dtype"),
        ({"neighbor_index": torch.full((41, 1), 30)}, IndexError, "below 30, .* got 30"),
        ({"power": -1.0}, ValueError, "power: expected a positive number, got -1.0"),
        ({"power": torch.ones(2)}, ValueError, "power: expected one number"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive number"),
        ({"sizes": (10, 10)}, ValueError, "sizes .* add up to 20"),
        ({"impl": "cuda"}, ValueError, "impl='cuda'"),
        ({"features": torch.rand(30, 3).double(), "impl": "cpu"}, ValueError, "float64"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        interpolate(**make_case() | change)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("eps", [1e-3, 0.5, 40.0])
def test_shares_are_those_of_the_definition(impl, eps):
    """1 / ((distance / distance of the nearest) ** power + eps); with large eps all alike."""
    positions = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 20.0]])
    features, place = torch.tensor([[1.0], [5.0], [20.0]]), torch.tensor([[3.0, 4.0]])
    distance = (positions - place).double().norm(dim=1)
    shares = 1 / ((distance / distance.min()) ** 2.5 + eps)
    expected = (shares / shares.sum()) @ features.double()
    found = interpolate(features, positions, place, k=3, power=2.5, eps=eps, impl=impl)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("eps", [1e-3, 0.5, 40.0])
def test_gradients_where_eps_matters(impl, eps):
    case = make_case(channels=3, exponent=2.5) | {"eps": eps}
    exact = with_gradients(case, torch.float64, impl="reference")
    found = with_gradients(case, impl=impl)
    for name, value in exact.items():
        assert (found[name] - value).abs().max() <= 5e-5 * value.abs().max(), name


def test_more_rows_than_a_thread_takes_at_once():
    assert_as_accurate(make_case(300, 400))
