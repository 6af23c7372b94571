"""Reductions over segments: against torch segment by segment, torch-scatter, gradients."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from helpers.gradients import assert_same_for_any_threads
from helpers.segment import gradient_of_first, make_case, with_gradients
from pointformer import TokenSet, segment_logsumexp, segment_reduce, segment_softmax
from pointformer.kernels.cpu import segment as cpu
from pointformer.kernels.segment import fused_segment_reduce, fused_segment_softmax

REDUCTIONS = ("sum", "mean", "min", "max", "std")
OPS: dict[str, Callable] = {
    **{name: partial(segment_reduce, reduce=name) for name in REDUCTIONS},
    "logsumexp": segment_logsumexp,
    "softmax": segment_softmax,
}
IMPLS = ("reference", "cpu")
LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), max_size=5)
CHANNELS = st.sampled_from([(), (1,), (2,), (3,), (4,), (7,), (8,), (12,), (16,), (2, 5), (0,)])


def by_definition(name, values, lengths):
    """Segment by segment, with the functions of torch."""
    empty = values.new_full(values.shape[1:], -torch.inf if name == "logsumexp" else 0.0)
    rows = []
    for part in values.split(lengths):
        if name == "softmax":
            rows.append(part.softmax(0))
        elif len(part) == 0 or (name == "std" and len(part) == 1):
            rows.append(empty[None])
        else:
            found = getattr(torch, name)(part, 0, keepdim=True)
            rows.append(found.values if name in ("min", "max") else found)
    return torch.cat([empty[None][:0], *rows])


@given(
    name=st.sampled_from(sorted(OPS)),
    lengths=LENGTHS,
    channels=CHANNELS,
    seed=st.integers(0, 2**16),
    piece=st.sampled_from([9, 8192]),
)
def test_each_segment_alone(name, lengths, channels, seed, piece):
    values, index, offsets = make_case(lengths, channels, seed)
    expected = by_definition(name, values.double(), lengths)
    op = OPS[name]
    run = partial(with_gradients, op, values, sizes=lengths)
    exact, eager = run(torch.float64, impl="reference"), run(impl="reference")
    torch.testing.assert_close(exact["out"], expected)
    with mock.patch.object(cpu, "_PIECE", piece), mock.patch.object(cpu, "_SHORTEST_PIECE", piece):
        fast = run(impl="cpu")
        assert torch.equal(op(values, offsets=offsets.int(), impl="cpu"), fast["out"])
    assert torch.equal(op(values, index=index, count=len(lengths), impl="reference"), eager["out"])
    for key, truth in exact.items():
        if truth.numel() == 0:
            assert fast[key].shape == truth.shape
            continue
        finite = truth.isfinite()
        assert torch.equal(fast[key][~finite].double(), truth[~finite])
        allowed = 2 * (eager[key] - truth)[finite].abs().max() if finite.any() else 0
        scale = truth[finite].abs().max() if finite.any() else 0
        error = (fast[key] - truth)[finite].abs().max() if finite.any() else 0
        assert error <= allowed + 1e-6 * scale + 1e-7, key


@given(
    name=st.sampled_from(sorted(OPS)),
    impl=st.sampled_from(IMPLS),
    lengths=LENGTHS,
    seed=st.integers(0, 2**16),
)
def test_rows_in_any_order(name, impl, lengths, seed):
    """The rows of a segment keep their order, so that not a bit changes."""
    values, index, _ = make_case(lengths, (3,), seed)
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    back = torch.sort(index[shuffled], stable=True).indices
    count = len(lengths)
    op = partial(OPS[name], impl=impl)
    found = op(values[shuffled], index=index[shuffled], count=count)
    expected = op(values[shuffled][back], index=index[shuffled][back], count=count)
    if name == "softmax":
        found = found[back]
    assert torch.equal(found, expected)


@given(
    name=st.sampled_from(["min", "max"]),
    impl=st.sampled_from(IMPLS),
    lengths=LENGTHS,
    seed=st.integers(0, 2**16),
    odd=st.sampled_from([0.0, 0.2]),
    piece=st.sampled_from([9, 8192]),
)
def test_of_equal_rows_the_first_gets_the_gradient(name, impl, lengths, seed, odd, piece):
    values, index, _ = make_case(lengths, (5,), seed, ties=True, odd=odd)
    with mock.patch.object(cpu, "_PIECE", piece), mock.patch.object(cpu, "_SHORTEST_PIECE", piece):
        found = with_gradients(OPS[name], values, index=index, count=len(lengths), impl=impl)
    assert torch.equal(found["grad"], gradient_of_first(name, values, index, len(lengths)))


@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name):
    values, _, offsets = make_case((4, 0, 1, 3), (2,))
    leaf = values.double().requires_grad_()
    run = partial(OPS[name], offsets=offsets, impl="reference")
    if name == "logsumexp":  # -inf is no number to differentiate
        run = partial(OPS[name], sizes=[4, 1, 3], impl="reference")
    assert gradcheck(run, leaf)
    assert gradgradcheck(run, leaf)


@pytest.mark.parametrize("name", OPS)
def test_torch_scatter(name):
    """Its own functions, and as an implementation."""
    pytest.importorskip("torch_scatter", reason="torch-scatter is not installed")
    import torch_scatter
    from torch_scatter import composite

    values, index, offsets = make_case((5, 0, 60, 1, 9), (6,), ties=name in ("min", "max"))
    own = {
        "std": lambda x: composite.scatter_std(x, index, 0, dim_size=5),
        "logsumexp": lambda x: composite.scatter_logsumexp(x, index, 0, dim_size=5),
        "softmax": lambda x: composite.scatter_softmax(x, index, 0),
    }
    theirs = own.get(name, lambda x: torch_scatter.scatter(x, index, 0, dim_size=5, reduce=name))
    ours = with_gradients(OPS[name], values, index=index, count=5, impl="cpu")
    # Theirs divides by the count and 1e-6 for "std", and has its own value for empty segments.
    kept = index.unique() if name == "logsumexp" else slice(None)
    torch.testing.assert_close(ours["out"][kept], theirs(values)[kept], rtol=2e-6, atol=2e-6)
    by_scatter = with_gradients(OPS[name], values, offsets=offsets, impl="torch_scatter")
    if name == "max":
        assert torch.equal(by_scatter["out"], ours["out"])
    for key in ours:
        torch.testing.assert_close(by_scatter[key], ours[key], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_values_that_are_not_finite(impl):
    inf, nan = torch.inf, torch.nan
    values = torch.tensor([1.0, nan, 2.0, -inf, 3.0, -inf, -inf, inf, 0.0])
    run = {"sizes": [3, 2, 2, 2], "impl": impl}
    expected = {
        "max": [nan, 3.0, -inf, inf], "min": [nan, -inf, -inf, 0.0],
        "sum": [nan, -inf, -inf, inf], "logsumexp": [nan, 3.0, -inf, inf],
        "softmax": [nan, nan, nan, 0.0, 1.0, nan, nan, nan, nan],
    }  # fmt: skip
    for name, numbers in expected.items():
        found = OPS[name](values, **run)
        torch.testing.assert_close(found, torch.tensor(numbers), equal_nan=True, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [80.0, 1e4, 3e37])
def test_large_logits(impl, scale):
    values, _, offsets = make_case((40, 9, 70), (2,))
    values = values * scale / 3
    exact = segment_softmax(values.double(), offsets=offsets, impl="reference")
    found = segment_softmax(values, offsets=offsets, impl=impl)
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=1e-30)
    exact = segment_logsumexp(values.double(), offsets=offsets, impl="reference")
    found = segment_logsumexp(values, offsets=offsets, impl=impl)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPS)
def test_low_precision_is_rounded_once(name, impl, dtype):
    values, _, offsets = make_case((300, 0, 2, 5), (3,))
    values = values.to(dtype)
    found = OPS[name](values, offsets=offsets, impl=impl)
    assert found.dtype == dtype
    expected = OPS[name](values.float(), offsets=offsets, impl=impl)
    assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("name", OPS)
def test_same_bits_for_any_threads(name):
    values, _, offsets = make_case((9000, 3, 0, 2000, *(16,) * 900), (3,))
    assert_same_for_any_threads(
        lambda: with_gradients(OPS[name], values, offsets=offsets, impl="cpu")
    )


def test_global_pools():
    tokens = TokenSet(torch.rand(9, 3), torch.rand(9, 4), [5, 0, 4])
    pooled = segment_reduce(tokens.features, "max", sizes=tokens.sizes)
    expected = [tokens.features[:5].amax(0), torch.zeros(4), tokens.features[5:].amax(0)]
    assert torch.equal(pooled, torch.stack(expected))


@pytest.mark.parametrize("name", [*REDUCTIONS, "logsumexp"])
def test_opcheck_reduce(name):
    values, _, offsets = make_case()
    torch.library.opcheck(fused_segment_reduce, (values.requires_grad_(), offsets, name, 1, "cpu"))


def test_opcheck_softmax():
    values, _, offsets = make_case()
    torch.library.opcheck(fused_segment_softmax, (values.requires_grad_(), offsets, "cpu"))


def test_compiles_into_one_graph():
    values, index, offsets = make_case((5, 2, 17, 1, 2))

    def run(values):
        shares = segment_softmax(values, index=index, count=5, impl="cpu")
        return segment_reduce(shares, "std", offsets=offsets, impl="cpu")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    out, expected = compiled(leaves[0]), run(leaves[1])
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


VALUES, INDEX, OFFSETS = make_case()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segment_reduce(VALUES), "expected one of them, got none"),
        (lambda: segment_reduce(VALUES, sizes=[25], index=INDEX), "got sizes and index"),
        (lambda: segment_reduce(VALUES, "median", index=INDEX), "reduce: expected one of sum"),
        (lambda: segment_reduce(VALUES, offsets=OFFSETS.flip(0)), "offsets: expected to ascend"),
        (lambda: segment_reduce(VALUES, offsets=OFFSETS + 1), "from 0 to 25, the rows of values"),
        (lambda: segment_reduce(VALUES, sizes=[5, 9]), "values: expected 14 rows"),
        (lambda: segment_reduce(VALUES, index=INDEX[:9]), "index: expected 25 rows"),
        (lambda: segment_reduce(VALUES, index=INDEX, count=3), "index: segment 4 of 3"),
        (lambda: segment_reduce(VALUES, index=INDEX - 1), "index: segment -1"),
        (lambda: segment_reduce(VALUES, sizes=[25], count=1), "count: expected None"),
        (lambda: segment_softmax(VALUES.double(), sizes=[25], impl="cpu"), "values are float64"),
        (lambda: segment_softmax(VALUES.long(), sizes=[25]), "values: expected a floating"),
        (lambda: segment_softmax(VALUES, offsets=OFFSETS[:0]), "offsets: expected at least one"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call()


def test_the_kernel_looks_at_what_no_one_checked():
    run = partial(segment_reduce, VALUES, check_values=False, impl="cpu")
    with pytest.raises(ValueError, match="offsets: expected to ascend"):
        run(offsets=OFFSETS * 2)
    with pytest.raises(IndexError, match="index: expected segments from 0 to 2"):
        run(index=INDEX.flip(0), count=3)


def test_rows_out_of_order_beyond_those_that_are_looked_at_first():
    index = torch.cat([torch.arange(1200) // 100, torch.zeros(300, dtype=torch.int64)])
    for impl in IMPLS:
        found = segment_reduce(torch.ones(1500), index=index, impl=impl)
        assert found.tolist() == [400, *[100] * 11]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("correction", [0, 2, 7])
def test_correction_of_deviations(correction, impl):
    """Values and gradients are torch's; 0 where there are no more rows than that."""
    lengths = (9, 0, 1, 2, 30)
    values, _, offsets = make_case(lengths, (3,))
    options = {"offsets": offsets, "correction": correction, "impl": impl}
    found = with_gradients(partial(segment_reduce, reduce="std"), values, **options)
    leaf = values.double().requires_grad_()
    rows = [
        part.std(0, correction=correction) if len(part) > correction else part.new_zeros(3)
        for part in leaf.split(lengths)
    ]
    out = torch.stack(rows)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    (grad,) = torch.autograd.grad(out, leaf, cotangent)
    torch.testing.assert_close(found["out"].double(), out.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["grad"].double(), grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_count_that_is_one_too_small(impl):
    with pytest.raises(IndexError, match="index: segment 4 of 4 does not exist"):
        segment_reduce(VALUES, index=INDEX, count=4, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_where_all_are_minus_infinity_are_zero(impl):
    values = torch.tensor([-torch.inf, -torch.inf, 1.0, 1.0], requires_grad=True)
    segment_logsumexp(values, sizes=[2, 2], impl=impl).backward(torch.ones(2))
    assert values.grad.tolist() == [0.0, 0.0, 0.5, 0.5]


def test_gradients_of_deviations_add_up_to_zero():
    """Also where rows are almost equal, and most of a difference is the mean's rounding."""
    values = 1000 + torch.randn(5000, 1, generator=torch.Generator().manual_seed(0)) / 1000
    segment_reduce(values.requires_grad_(), "std", sizes=[5000], impl="cpu").sum().backward()
    assert abs(values.grad.double().sum()) < 1e-6 * values.grad.abs().sum()


def test_offsets_and_index_of_any_strides():
    values = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 0]])[:, 0]
    expected = torch.stack([values[index == n].sum(0) for n in (0, 1)])
    torch.testing.assert_close(segment_reduce(values, "sum", index=index, impl="cpu"), expected)
    offsets = torch.tensor([[0, 9], [2, 9], [6, 9]])[:, 0]
    found = segment_reduce(values, "sum", offsets=offsets, impl="cpu")
    torch.testing.assert_close(found, torch.stack([values[:2].sum(0), values[2:].sum(0)]))
