"""Inputs as they come: views, several dtypes in one call, GPUs that are not the current one."""

import itertools

import pytest
import torch

from helpers.fake_gpu import dirty_memory
from helpers.ops import op_calls
from pointformer.kernels.triton import tuning
from pointformer.kernels.triton.runtime import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
SLOW = {"attention in 3-D", "merge in 3-D", "point_conv", "deformable", "knn, long lists",
        "select", "knn"}  # fmt: skip
OPS = [
    pytest.param(name, marks=[pytest.mark.long] if INTERPRETED and name in SLOW else [])
    for name in op_calls()
]
MIXED = [
    pytest.param(name, marks=[pytest.mark.long] if INTERPRETED and name in SLOW else [])
    for name, call in op_calls().items()
    if call.learned
]
LOW, FULL = torch.bfloat16, torch.float32


def poison(x):
    """What no one should read: NaN, or an index far out of bounds."""
    return torch.nan if x.is_floating_point() else 1 << 30


def sliced(_, x):
    """A part of a larger tensor that begins at no multiple of 16 bytes, with gaps between rows."""
    larger = x.new_full([n + 3 for n in x.shape], poison(x))
    view = larger[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


def skipping(_, x):
    """Every other element of each axis."""
    larger = x.new_full([2 * n for n in x.shape], poison(x))
    return larger[(slice(None, None, 2),) * x.dim()].copy_(x)


def transposed(_, x):
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def results(call, impl="triton"):
    with dirty_memory():
        return call.run(impl)


def assert_same(ours, expected, place=""):
    for number, (mine, other) in enumerate(zip(ours, expected, strict=True)):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other.to(mine.device)), f"{place} result {number}"


VIEWS = (sliced, skipping, transposed)


def in_turn():
    """Each view of some of the arguments."""
    views = itertools.cycle(VIEWS)
    return lambda name, x: next(views)(name, x)


def check_views(call, impl, *views):
    expected = results(call, impl)
    for view in views:
        assert_same(results(call.changed(view), impl), expected, view)


@pytest.mark.parametrize("name", OPS)
def test_views(name):
    """Slices and transposed tensors give the bits that contiguous ones do."""
    check_views(op_calls()[name].to(DEVICE), "triton", in_turn())


@pytest.mark.long
@pytest.mark.parametrize("name", op_calls())
def test_each_view_of_all_arguments(name):
    check_views(op_calls()[name].to(DEVICE), "triton", *VIEWS)


@pytest.mark.parametrize("name", OPS)
def test_views_on_the_cpu(name):
    check_views(op_calls()[name], "cpu", *VIEWS)


@pytest.mark.parametrize("name", OPS)
def test_expanded_rows(name):
    """One row in memory, or as many."""
    call = op_calls()[name].to(DEVICE)
    rows = (*call.rows, *call.learned)

    def one_row(name, x, expanded):
        if name not in rows or not x.dim():
            return x
        return x[:1].expand(x.shape) if expanded else x[:1].repeat(len(x), *[1] * (x.dim() - 1))

    if rows:
        same = results(call.changed(lambda name, x: one_row(name, x, expanded=False)))
        assert_same(results(call.changed(lambda name, x: one_row(name, x, expanded=True))), same)


@pytest.mark.parametrize(
    ("rows", "learned"),
    [
        (LOW, FULL),
        pytest.param(FULL, LOW, marks=pytest.mark.long),
        pytest.param(torch.float16, LOW, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes(name, rows, learned):
    """As under autocast, or with a part of a model cast: the reference's dtypes and values."""
    call = op_calls()[name].to(DEVICE, rows=rows, learned=learned)
    budget = 2 * tuning.budget_of([rows, learned])
    for ours, expected in zip(results(call), call.run("reference"), strict=True):
        assert ours.dtype == expected.dtype
        assert tuning.agree(ours, expected, budget)


@pytest.mark.parametrize("name", MIXED)
def test_learned_tensors_of_several_dtypes(name):
    call = op_calls()[name].to(DEVICE)
    kinds = dict(
        zip(call.learned, (torch.float16, torch.float32, torch.bfloat16) * 3, strict=False)
    )
    call = call.changed(lambda name, x: x.to(kinds[name]) if name in kinds else x)
    for ours, expected in zip(results(call), call.run("reference"), strict=True):
        assert ours.dtype == expected.dtype
        assert tuning.agree(ours, expected, 2 * tuning.budget_of([torch.bfloat16]))


@pytest.mark.gpu
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("name", op_calls())
def test_another_gpu(name, current):
    """The bits of the first one, whichever is current, and it stays current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if len({torch.cuda.get_device_name(i) for i in range(2)}) > 1:
        pytest.skip("needs two GPUs of one kind")
    call = op_calls()[name]
    expected = results(call.to("cuda:0"))
    with torch.cuda.device(current):
        ours = results(call.to("cuda:1"))
        assert torch.cuda.current_device() == current
    assert all(x.device == torch.device("cuda:1") for x in ours)
    assert_same(ours, expected)
