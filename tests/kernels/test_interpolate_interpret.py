"""Inverse-distance interpolation in Triton's interpreter, values and gradients, against float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.fake_gpu import dirty_memory, fake_gpu
from helpers.interpolate import assert_as_accurate, make_case, with_gradients
from helpers.strategies import tokens
from pointformer import interpolate
from pointformer.kernels.interpolate import fused_interpolate
from pointformer.kernels.triton import gather
from pointformer.kernels.triton import interpolate as kernels
from pointformer.kernels.triton.runtime import INTERPRETED, Variant

if not INTERPRETED:
    reason = "kernels run compiled here: set TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)


@given(
    sample=tokens(max_size=7, max_samples=2),
    queries=st.integers(0, 20),
    k=st.integers(1, 6),
    channels=st.integers(1, 40),
    exponent=st.floats(0.5, 9.0, width=32),
    drop=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_is_as_accurate_as_eager(sample, queries, k, channels, exponent, drop, seed):
    count, dimensions = sample.positions.shape
    case = make_case(count, queries, k, channels, dimensions, exponent, drop, seed)
    case["positions"] = sample.positions
    if count:
        chosen = torch.randint(0, count, (queries // 2,))
        case["query_positions"][: queries // 2] = sample.positions[chosen]
    assert_as_accurate(case, "triton", memory=dirty_memory)


@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 3, "channels": 272},  # blocks of channels, lists longer than a step
        {"tokens": 6, "channels": 64, "k": 1},
        {"tokens": 2, "dimensions": 3, "k": 7},
    ],
)
def test_shapes_that_need_several_blocks(shape):
    assert_as_accurate(make_case(**shape), "triton", memory=dirty_memory)


def test_large_coordinates_keep_their_precision():
    case = make_case(6, 20, 3, channels=3)
    for name in ("positions", "query_positions"):
        case[name] = case[name] * 700
    case["features"] = torch.rand(case["features"].shape)
    exact = with_gradients(case, torch.float64, impl="reference")
    fused = with_gradients(case, impl="triton")
    torch.testing.assert_close(fused["out"].double(), exact["out"], rtol=2e-6, atol=1e-7)


def test_neighbors_that_are_not_listed_do_not_matter():
    case = make_case(12, drop=0.4)
    case["neighbor_index"][case["neighbor_index"] < 5] = -1
    expected = interpolate(**case, impl="triton")
    case["features"][:5] = float("nan")
    assert expected.isfinite().all()
    assert torch.equal(interpolate(**case, impl="triton"), expected)
    case["neighbor_index"][case["neighbor_index"] < 0] = 99
    assert torch.equal(interpolate(**case, impl="triton"), expected)


def test_features_beyond_2_31_elements():
    """In memory that is reserved only, of which the last rows are touched."""
    rows = (1 << 31) // 16 + 8
    try:
        features = torch.empty(rows, 16, dtype=torch.float16)
        positions = torch.empty(rows, 2)
    except RuntimeError:
        pytest.skip("needs 6 GB of address space")
    features[-8:] = torch.randn(8, 16)
    positions[-8:] = torch.rand(8, 2)
    index = torch.arange(rows - 8, rows, dtype=torch.int32).view(2, 4)
    queries, power = torch.rand(2, 2), torch.tensor(6.0)
    results = []
    for first in (0, rows - 8):
        tensors = [x[rows - 8 - first :] for x in (features, positions)]
        lists = index - (rows - 8) + first
        interpolated = kernels.forward(*tensors, queries, lists, power, 1e-11)
        results.append((interpolated, gather.forward(tensors[0], lists, torch.ones(2, 4))))
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)


def test_values_at_tokens_are_kept():
    lattice = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0))
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    out = interpolate(features, lattice, lattice, impl="triton")
    torch.testing.assert_close(out, features, rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_once():
    case = make_case(8, 11)
    case["features"] = case["features"].half()
    expected = interpolate(**case | {"features": case["features"].float()}, impl="triton").half()
    assert torch.equal(interpolate(**case, impl="triton"), expected)
    grads = with_gradients(case, torch.float16, ("features",), impl="triton")
    assert grads["features"].dtype == torch.float16


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_power_may_have_any_dtype(dtype, impl):
    case = make_case(exponent=5.5)
    if impl == "triton" and dtype != torch.float64:
        case["features"] = case["features"].to(dtype)
    results = []
    for power in (case.pop("power").to(dtype), torch.tensor(5.5)):
        out = interpolate(**case, power=power.requires_grad_(), impl=impl)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), power)))
    (low, low_slope), (full, slope) = results
    assert torch.equal(low, full)
    assert torch.equal(low_slope.float(), slope.to(dtype).float())


@pytest.mark.parametrize("change", [{"tokens": 0}, {"queries": 0}, {"k": 0}, {"channels": 0}])
def test_empty_inputs(change):
    with dirty_memory():
        result = with_gradients(make_case(**change), impl="triton")
    assert all(value.eq(0).all() for value in result.values())


@pytest.mark.parametrize("learn", [False, True])
def test_registered_op(learn):
    case = make_case(5, 7, channels=3)
    case["neighbor_index"] = case["neighbor_index"].int()
    case["features"].requires_grad_()
    case["power"].requires_grad_(learn)
    torch.library.opcheck(fused_interpolate, (*case.values(), 1e-11, "triton"))


@pytest.mark.parametrize("exponent", [4.0, torch.tensor([4.0])])
def test_compiles_into_one_graph(exponent):
    case = make_case(5, 7, channels=3) | {"power": exponent}
    features = case.pop("features").requires_grad_()

    def run(features):
        return interpolate(features, **case, impl="triton").square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(run(features), features)
    (grad,) = torch.autograd.grad(compiled(features), features)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("learn", [False, True])
def test_a_uniform_batch_can_be_captured(learn):
    """Neither the public op nor what the kernels' launchers do beside launching waits."""
    with fake_gpu(), mock.patch.object(Variant, "launch"):
        features = torch.rand(40, 24, device="cuda")
        positions, queries = (torch.rand(n, 2, device="cuda") for n in (40, 160))
        sizes = {"sizes": (20, 20), "query_sizes": (80, 80)}
        assert interpolate(features, positions, queries, **sizes).shape == (160, 24)
        index = torch.zeros(160, 4, dtype=torch.int32, device="cuda")
        inputs = (features, positions, queries, index, torch.rand((), device="cuda"), 1e-11)
        out = kernels.forward(*inputs)
        d_features, d_power = kernels.backward(out, *inputs, learn)
        assert (out.shape, d_features.shape, d_power.shape) == ((160, 24), (40, 24), ())
        assert d_features.device.type == d_power.device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.rand(30, 3).double()}, "features are float64"),
        ({"positions": torch.rand(30, 2, requires_grad=True)}, "requires a gradient"),
    ],
)
def test_what_kernels_cannot_do(change, message):
    with pytest.raises(ValueError, match=f"{message}.*use impl='reference'"):
        interpolate(**make_case() | change, impl="triton")
