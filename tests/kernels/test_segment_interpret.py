"""Reductions over segments in Triton's interpreter: as accurate as eager ones."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.fake_gpu import dirty_memory
from helpers.gradients import assert_as_accurate_as_eager
from helpers.segment import gradient_of_first, make_case, with_gradients
from pointformer import segment_logsumexp, segment_reduce, segment_softmax
from pointformer.kernels.segment import fused_segment_reduce, fused_segment_softmax
from pointformer.kernels.triton import segment as kernels
from pointformer.kernels.triton.runtime import INTERPRETED, Variant

if not INTERPRETED:
    reason = "kernels run compiled here: set TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)

OPS: dict[str, Callable] = {
    name: partial(segment_reduce, reduce=name) for name in ("sum", "mean", "min", "max", "std")
}
OPS |= {"logsumexp": segment_logsumexp, "softmax": segment_softmax}


@given(
    name=st.sampled_from(sorted(OPS)),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    channels=st.sampled_from([(), (1,), (3,), (2, 5), (70,)]),
    long=st.sampled_from([7, 512]),  # rows from which on several programs share a segment
    seed=st.integers(0, 2**16),
)
@example("std", [0, 0, 10], (), 7, 0)  # two rows that are almost equal
def test_as_accurate_as_eager(name, lengths, channels, long, seed):
    values, _, offsets = make_case([n + 2 for n in lengths], channels, seed)
    with mock.patch.object(kernels, "_LONG", long):
        assert_as_accurate_as_eager(
            partial(with_gradients, OPS[name], values, offsets=offsets),
            "triton",
            # A softmax's gradient is a difference of cotangents, whose last digits are 1e-7.
            lambda key, exact: 2e-6 * exact[key].abs().max() + 1e-7 * (key == "grad"),
            dirty_memory,
        )


@pytest.mark.parametrize("name", OPS)
def test_empty_segments_and_rows_in_any_order(name):
    values, index, _ = make_case((0, 5, 0, 3, 0), (3,), ties=True)
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    run = partial(with_gradients, OPS[name], values[shuffled], index=index[shuffled], count=5)
    with dirty_memory():
        ours = run(impl="triton")
    expected = run(impl="cpu")
    torch.testing.assert_close(ours["out"], expected["out"], rtol=1e-5, atol=1e-6)
    if name != "logsumexp":
        torch.testing.assert_close(ours["grad"], expected["grad"], rtol=1e-5, atol=1e-5)


@given(
    name=st.sampled_from(["min", "max"]),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    long=st.sampled_from([7, 512]),
    seed=st.integers(0, 2**16),
    odd=st.sampled_from([0.0, 0.2]),
)
def test_of_equal_rows_the_first_gets_the_gradient(name, lengths, long, seed, odd):
    values, index, offsets = make_case(lengths, (5,), seed, ties=True, odd=odd)
    with mock.patch.object(kernels, "_LONG", long):
        found = with_gradients(OPS[name], values, offsets=offsets, impl="triton")
    assert torch.equal(found["grad"], gradient_of_first(name, values, index, len(lengths)))


def test_values_that_are_not_finite():
    values = torch.tensor([1.0, torch.nan, 2.0, -torch.inf, 3.0, -torch.inf])
    for name, op in OPS.items():
        ours, theirs = (op(values, sizes=[3, 2, 1], impl=impl) for impl in ("triton", "cpu"))
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=name)


@pytest.mark.parametrize("name", ["max", "std", "logsumexp"])
def test_opcheck(name):
    values, _, offsets = make_case((5, 0, 3))
    torch.library.opcheck(
        fused_segment_reduce, (values.requires_grad_(), offsets, name, 1, "triton")
    )
    torch.library.opcheck(fused_segment_softmax, (values, offsets, "triton"))


def test_channels_are_no_second_axis_of_programs(monkeypatch):
    """Of which GPUs have no more than 65,535."""
    grids = []
    monkeypatch.setattr(Variant, "launch", lambda self, grid, *_: grids.append(self.programs(grid)))
    values, offsets = torch.empty(2, 1 << 22), torch.tensor([0, 2])
    kernels.fold(values, offsets, None, "sum")
    kernels.spread(values[:1], offsets, None, None, 2, torch.float32, "copy")
    assert [len(grid) for grid in grids] == [1, 1]
    assert grids[0] == ((1 << 22) // 64,)
