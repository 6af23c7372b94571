"""Farthest points in Triton's interpreter: the picks of the CPU."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.fake_gpu import dirty_memory
from helpers.strategies import KINDS, UNEVEN, tokens
from pointformer import farthest_point_sample
from pointformer.kernels.sampling import fused_farthest_points
from pointformer.kernels.triton import sampling as kernels
from pointformer.kernels.triton.runtime import INTERPRETED

if not INTERPRETED:
    reason = "kernels run compiled here: set TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)


@given(
    tokens((*KINDS, *UNEVEN), max_size=20, max_samples=3),
    st.sampled_from([1, 4, 30]),
    st.integers(0, 2**16),
)
def test_picks_are_those_of_the_cpu(sample, count, seed):
    start = [seed % max(size, 1) for size in sample.sizes]
    arguments = {"count": count, "sizes": sample.sizes, "start": start}
    with mock.patch.object(kernels, "_BLOCKS", (8, 8)), dirty_memory():
        ours = farthest_point_sample(sample.positions, impl="triton", **arguments)
    expected = farthest_point_sample(sample.positions, impl="cpu", **arguments)
    assert torch.equal(ours[0], expected[0])


def test_opcheck():
    positions = torch.rand(9, 3, requires_grad=True)
    torch.library.opcheck(fused_farthest_points, (positions, [5, 4], [2, 1], [0, 2], "triton"))
