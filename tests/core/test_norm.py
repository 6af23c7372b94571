"""Residual sums and their LayerNorm: the definition, the Triton kernel, gradients, dtypes."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from helpers.fake_gpu import dirty_memory
from pointformer import add_norm
from pointformer.kernels.norm import fused_add_norm
from pointformer.kernels.triton.runtime import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


def make_case(rows=37, channels=24, scaled=True, seed=0, device=DEVICE):
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (rows, channels), "branch": (rows, channels)}
    shapes |= dict.fromkeys(("weight", "bias", "scale"), (channels,))
    case = {name: torch.randn(shape, generator=g).to(device) for name, shape in shapes.items()}
    return case if scaled else case | {"scale": None}


def with_gradients(case, dtype, impl):
    case = {
        name: None if value is None else value.detach().to(dtype or value.dtype).requires_grad_()
        for name, value in case.items()
    }
    outputs = add_norm(**case, impl=impl)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=g).to(x) for x in outputs]
    leaves = [value for value in case.values() if value is not None]
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    return [x.detach() for x in (*outputs, *grads)]


def test_definition():
    case = {name: value.double() for name, value in make_case(device="cpu").items()}
    total, normed = add_norm(**case, impl="reference")
    torch.testing.assert_close(total, case["x"] + case["scale"] * case["branch"])
    centered = total - total.mean(1, keepdim=True)
    expected = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed, expected * case["weight"] + case["bias"])
    plain = add_norm(**case | {"scale": None}, impl="cpu")[0]
    torch.testing.assert_close(plain, case["x"] + case["branch"])


def test_reference_is_differentiable_twice():
    case = make_case(3, 4, device="cpu")
    inputs = [value.double().requires_grad_() for value in case.values()]

    def run(x, branch, weight, bias, scale):
        return add_norm(x, branch, weight, bias, scale=scale, impl="reference")

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("rows", "channels"), [(37, 24), (1, 1), (130, 16), (5, 7), (3, 300), (0, 8), (200, 8)]
)
def test_kernel_is_as_accurate_as_torch(rows, channels, scaled):
    case = make_case(rows, channels, scaled)
    exact, plain = (with_gradients(case, dtype, "reference") for dtype in (torch.double, None))
    with dirty_memory():
        found = with_gradients(case, None, "triton")
    for true, theirs, ours in zip(exact, plain, found, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if true.numel():
            error, allowed = (ours - true).abs().max(), 2 * (theirs - true).abs().max()
            assert error <= allowed + 1e-6 * true.abs().max()


def test_rows_with_a_large_mean_keep_their_digits():
    case = make_case()
    case["x"] += 1000
    exact, plain = (with_gradients(case, dtype, "reference") for dtype in (torch.double, None))
    found = with_gradients(case, None, "triton")
    error, allowed = ((x[1] - exact[1]).abs().max() for x in (found, plain))
    assert error <= 2 * allowed


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_one_output(used):
    case = make_case()
    grads = []
    for impl in ("reference", "triton"):
        leaves = {name: value.clone().requires_grad_() for name, value in case.items()}
        out = add_norm(**leaves, impl=impl)[used]
        grads.append(torch.autograd.grad(out.square().sum(), leaves.values(), allow_unused=True))
    for expected, found in zip(*grads, strict=True):
        assert (expected is None) == (found is None)
        if found is not None:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_opcheck():
    for scaled in (False, True):
        case = make_case(5, 8, scaled)
        inputs = [None if x is None else x.requires_grad_() for x in case.values()]
        x, branch, weight, bias, scale = inputs
        torch.library.opcheck(fused_add_norm, (x, branch, scale, weight, bias, 1e-5, "triton"))


def test_views_are_read_as_they_are():
    case = make_case(16, 16)
    plain = add_norm(**case, impl="triton")
    turned = {
        name: value.mT.contiguous().mT if value.dim() == 2 else value
        for name, value in case.items()
    }
    for ours, expected in zip(add_norm(**turned, impl="triton"), plain, strict=True):
        assert torch.equal(ours, expected)


def test_what_the_kernel_cannot_do():
    with pytest.raises(ValueError, match="x or branch are float64; use impl='reference'"):
        add_norm(*(value.double() for value in list(make_case().values())[:4]), impl="triton")
    with pytest.raises(ValueError, match="x has 4097 channels, not 1 to 4096"):
        add_norm(**make_case(1, 4097), impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 24, 64, 512, 4096])
def test_kernel_on_a_gpu(dtype, channels):
    case = make_case(1000, channels)
    exact = with_gradients({n: x.to(dtype) for n, x in case.items()}, torch.double, "reference")
    plain, found = (with_gradients(case, dtype, impl) for impl in ("reference", None))
    for true, theirs, ours in zip(exact, plain, found, strict=True):
        error, allowed = (ours - true).abs().max(), 2 * (theirs - true).abs().max()
        assert error <= allowed + 1e-5 * true.abs().max()
    mixed = add_norm(**case | {"branch": case["branch"].bfloat16()})
    assert [x.dtype for x in mixed] == [torch.float32] * 2


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("x", "branch", "wide"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),  # also where scale is float32
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtypes_are_promoted_without_a_kernel(x, branch, wide, scaled):
    case = make_case(scaled=scaled, device="cpu")
    case |= {"x": case["x"].to(x), "branch": case["branch"].to(branch)}
    exact = case["branch"].double() * (case["scale"].double() if scaled else 1)
    exact = case["x"].double() + exact
    for impl in (None, "reference"):
        total, normed = add_norm(**case, impl=impl)
        assert total.dtype == normed.dtype == wide
        torch.testing.assert_close(total, exact.to(wide))
