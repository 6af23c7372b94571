"""Small tables of host numbers."""

import numpy as np
import pytest
import torch

from pointformer.kernels.tables import from_arguments


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
