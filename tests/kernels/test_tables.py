"""Small tables of host numbers."""

import numpy as np
import pytest
import torch

from pointformer.kernels.tables import from_arguments, plain_levels


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([2**62 + 1, -3, 0], torch.int64),
        ([[1, 2], [2**31 - 1, -5]], torch.int32),
        ([0.1, float("inf"), 1e-40, -0.5, 2**24 + 1], torch.float32),
        ([], torch.int64),
    ],
)
def test_arguments_of_launches_keep_every_bit(values, dtype):
    table = from_arguments(np.array(values), dtype, torch.device("cpu"))
    assert table.dtype == dtype
    assert torch.equal(table, torch.tensor(values, dtype=dtype))


@pytest.mark.parametrize("curve", ["hilbert", "morton", "peano"])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("samples", [1, 2**18, 2**18 + 1, 2**26])
def test_a_cell_and_the_sample_fill_at_most_63_bits(curve, dimensions, samples):
    cells = plain_levels(curve, dimensions, samples) ** dimensions
    assert (cells - 1).bit_length() + (samples - 1).bit_length() <= 63
