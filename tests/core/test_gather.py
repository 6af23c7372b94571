"""Weighted sums of listed rows: against dense matrices, gradients, the fused CPU path."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from helpers.gather import make_case, with_gradients
from pointformer import weighted_gather
from pointformer.kernels.gather import fused_gather


@given(
    tokens=st.integers(0, 30),
    queries=st.integers(0, 40),
    k=st.integers(1, 10),
    channels=st.integers(1, 40),
    drop=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_it_is_a_sparse_matrix_product(tokens, queries, k, channels, drop, seed):
    case = make_case(tokens, queries, k, channels, drop, seed)
    features, index, weights = case
    dense = torch.zeros(queries, tokens + 1, dtype=torch.float64)  # the last column for -1
    column = torch.where(index >= 0, index, tokens).long()
    dense.scatter_add_(1, column, weights.double())
    expected = dense[:, :tokens] @ features.double()
    exact = with_gradients(*case, torch.float64, "reference")
    plain = with_gradients(*case, torch.float32, "reference")
    fused = with_gradients(*case, torch.float32, "cpu")
    torch.testing.assert_close(exact[0], expected)
    for ours, eager, truth in zip(fused, plain, exact, strict=True):
        if truth.numel():
            budget = 2 * (eager - truth).abs().max() + 1e-6 * truth.abs().max()
            assert (ours - truth).abs().max() <= budget


def test_gradcheck():
    features, index, weights = make_case(5, 4, 3, 2)
    leaves = (features.double().requires_grad_(), weights.double().requires_grad_())

    def run(features, weights):
        return weighted_gather(features, index, weights, impl="reference")

    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


def test_opcheck():
    features, index, weights = make_case()
    torch.library.opcheck(
        fused_gather, (features.requires_grad_(), index, weights.requires_grad_(), "cpu")
    )


def test_errors():
    features, index, weights = make_case()
    with pytest.raises(IndexError, match=r"index: .* below 20, .* got 20"):
        weighted_gather(features, index.clamp(max=0) + 20, weights)
    with pytest.raises(ValueError, match="weights"):
        weighted_gather(features, index, weights[:, :3])
    with pytest.raises(ValueError, match=r"float64.*impl='reference'"):
        weighted_gather(features.double(), index, weights, impl="cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_weights_of_no_token_do_not_matter(impl):
    features, index, weights = make_case(drop=0.4)
    expected = weighted_gather(features, index, weights, impl=impl)
    weights[index < 0] = torch.nan
    assert torch.equal(weighted_gather(features, index, weights, impl=impl), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype(dtype):
    """As in float32; low precision features are rounded once."""
    features, index, weights = make_case()
    weights = weights.to(dtype).requires_grad_()
    expected = weighted_gather(features, index, weights.detach().float(), impl="cpu")
    out = weighted_gather(features, index, weights, impl="cpu")
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert grad.dtype == dtype
    low = features.bfloat16()
    out = weighted_gather(low, index, weights, impl="cpu")
    assert torch.equal(out, weighted_gather(low.float(), index, weights, impl="cpu").bfloat16())


def test_more_rows_than_a_thread_takes_at_once():
    case = make_case(300, 400, 3, 9)
    exact = with_gradients(*case, torch.float64, "reference")
    for ours, truth in zip(with_gradients(*case, torch.float32, "cpu"), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
