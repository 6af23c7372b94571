"""Deformable attention and weighted sums in Triton's interpreter, against float64."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.deformable import LEARNED, check_half_way, make_case, with_gradients
from helpers.fake_gpu import dirty_memory, fake_gpu
from helpers.gather import make_case as make_gather_case
from helpers.gather import with_gradients as with_gather_gradients
from pointformer import deformable_attention, weighted_gather
from pointformer.kernels.triton import deformable, gather
from pointformer.kernels.triton.runtime import INTERPRETED, Variant

if not INTERPRETED:
    reason = "kernels run compiled here: set TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize(
    ("channels", "power"),
    [(5, 6.0), *(pytest.param(*c, marks=pytest.mark.long) for c in ((16, 4.0), (32, 2.5)))],
)
def test_deformable_is_as_exact_as_plain_float32(channels, power):
    """Within twice the largest error of the reference in float32; the same bits every time."""
    errors = {"triton": {}, "reference": {}}
    for seed in range(3):
        case = make_case(channels=channels, seed=seed) | {"power": torch.tensor([power])}
        exact = with_gradients(case, torch.float64, impl="reference")
        for impl, largest in errors.items():
            with dirty_memory():
                results = with_gradients(case, impl=impl)
            for name, ours in results.items():
                error = (ours - exact[name]).abs().max().item()
                largest[name] = max(largest.get(name, 0), error)
    for name, error in errors["triton"].items():
        budget = 2 * errors["reference"][name]
        if name == "power":  # a sum over all queries and channels, which may cancel
            budget += 5e-7 * exact["out"].numel() ** 0.5
        assert error <= budget, name
    again = with_gradients(case, impl="triton")
    first = with_gradients(case, impl="triton")
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_places_half_way_between_cells_round_to_even():
    check_half_way("triton")


@pytest.mark.parametrize("near", [1, 3, 6])
def test_lists_of_any_length(near):
    """Also chunks of places, and numbers of queries, that do not come out even; rows missing."""
    case = make_case(points=3, channels=8, queries=9)
    case["lookup"] = case["lookup"].repeat(1, 1, 2)[:, :, :near]
    case["lookup"][::5, 0] = -1
    exact = with_gradients(case, torch.float64, impl="reference")
    with dirty_memory():
        ours = with_gradients(case, impl="triton")
    for name, value in exact.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-4, atol=2e-5)


class _Sizes(TorchDispatchMode):
    """Bytes of every tensor that an op makes."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        tensors = made if isinstance(made, tuple | list) else [made]
        self.bytes += [x.nbytes for x in tensors if isinstance(x, torch.Tensor)]
        return made


def test_no_list_of_all_neighbors():
    """Forward writes its output only; backward keeps less than rows and factors of all places."""
    queries, heads, levels, points, near = 500, 4, 3, 4, 4
    places = queries * heads * levels * points
    value = torch.zeros(300, heads, 8)
    offsets = torch.zeros(queries, heads, levels, points, 2)
    arguments = (
        *(value, torch.zeros(300, 2), offsets, torch.zeros(offsets.shape[:-1])),
        *(torch.zeros(queries, 2), torch.zeros(queries, 3, dtype=torch.int32)),
        *(torch.zeros(24, levels, near, dtype=torch.int32), torch.ones(1), 1e-11),
    )
    with mock.patch.object(Variant, "launch"):
        with _Sizes() as forward:
            out = deformable.forward(*arguments)
        with mock.patch("torch.empty", torch.zeros), _Sizes() as backward:
            deformable.backward(out, *arguments)
    assert max(forward.bytes) == out.nbytes
    assert max(backward.bytes) == places * near * 4


def test_half_precision_is_read_as_it_is():
    """No casts of offsets and weights: kernels are launched with the dtypes of the call."""
    case = make_case(channels=8)
    half = {n: case[n].bfloat16().requires_grad_() for n in LEARNED}
    given = []
    with mock.patch.object(Variant, "launch", lambda self, *a: given.append(self.arguments)):
        deformable_attention(**{**case, **half}, impl="triton")
        mixed = {"value": half["value"], "offsets": half["offsets"]}
        deformable_attention(**{**case, **mixed}, impl="triton")
    read = [tuple(kinds[i] for i in (0, 2, 3, 7)) for kinds in given]
    own = torch.bfloat16
    assert read == [(own,) * 4, (own, own, torch.float32, torch.float32)]


@pytest.mark.parametrize("shape", [(20, 31, 9, 11), (5, 40, 4, 130), (0, 3, 2, 4), (4, 0, 2, 4)])
def test_gather_is_as_exact_as_plain_float32(shape):
    case = make_gather_case(*shape)
    exact = with_gather_gradients(*case, torch.float64, "reference")
    plain = with_gather_gradients(*case, torch.float32, "reference")
    with dirty_memory():
        ours = with_gather_gradients(*case, torch.float32, "triton")
    for mine, eager, truth in zip(ours, plain, exact, strict=True):
        if truth.numel():
            budget = 2 * (eager - truth).abs().max() + 1e-6 * truth.abs().max()
            assert (mine - truth).abs().max() <= budget


def test_unsupported_arguments_are_named():
    case = make_case()
    case["value"] = case["value"].double()
    with pytest.raises(ValueError, match=r"value is float64.*impl='reference'"):
        deformable_attention(**case, impl="triton")
    features, index, weights = make_gather_case()
    with pytest.raises(ValueError, match=r"float64.*impl='reference'"):
        weighted_gather(features.double(), index, weights, impl="triton")


def test_nothing_waits_for_the_gpu():
    """All but the kernels themselves runs without values: it can be captured in a CUDA graph."""
    with fake_gpu(), mock.patch.object(Variant, "launch"):
        cuda = {"device": "cuda"}
        features, weights = torch.rand(20, 8, **cuda), torch.rand(30, 3, **cuda)
        index = torch.zeros(30, 3, dtype=torch.int32, **cuda)
        out = gather.forward(features, index, weights)
        slopes = gather.backward(out, features, index, weights)
        assert [tuple(slope.shape) for slope in slopes] == [(20, 8), (30, 3)]
        assert weighted_gather(features, index, weights).shape == out.shape
        arguments = {
            "value": torch.rand(20, 2, 8, **cuda),
            "positions": torch.rand(20, 2, **cuda),
            "offsets": torch.rand(30, 2, 1, 4, 2, **cuda),
            "weights": torch.rand(30, 2, 1, 4, **cuda),
            "query_positions": torch.rand(30, 2, **cuda),
        }
        lookup = torch.zeros(24, 1, 4, dtype=torch.int32, **cuda)
        sample = torch.zeros(30, dtype=torch.int64, **cuda)
        out = deformable_attention(
            **arguments, query_sample=sample, lookup=lookup, extent=[(4, 3), (4, 3)]
        )
        lists = (torch.zeros(30, 3, dtype=torch.int32, **cuda), lookup, torch.ones(1, **cuda))
        assert deformable.forward(*arguments.values(), *lists, 1e-11).shape == out.shape
        slopes = deformable.backward(out, *arguments.values(), *lists, 1e-11)
        expected = [tuple(arguments[name].shape) for name in LEARNED[:3]]
        assert [tuple(slope.shape) for slope in slopes] == [*expected, (1,)]


def test_halves_at_an_odd_address_are_copied():
    """Two of them are read as one word."""
    values = torch.randn(1 + 6 * 2 * 8).bfloat16()
    rest = [torch.zeros(1) for _ in range(5)]
    lookup, power = torch.zeros(1, 1, 4, dtype=torch.int32), torch.ones(())
    for start in (0, 1):
        value = values[start : start + 96].view(6, 2, 8)
        offsets = torch.zeros(3, 2, 1, 4, 2)
        (prepared, *_), *_ = deformable._prepare(value, rest[0], offsets, *rest[2:], lookup, power)
        assert prepared.data_ptr() % 4 == 0
        assert torch.equal(prepared, value)
