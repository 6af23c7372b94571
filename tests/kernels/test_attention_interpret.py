"""Triton's neighborhood attention in the interpreter, against the float64 reference."""

import logging
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.attention import (
    attend,
    check_against_float64,
    check_large_logits,
    check_nan,
    clusters_of,
    cut,
    gradients,
    low_precision,
    make_inputs,
    make_lists,
    nearest,
    neighborhood_lists,
    registered_arguments,
)
from helpers.fake_gpu import dirty_memory, fake_gpu
from helpers.strategies import tokens
from pointformer import balanced_cluster, nearest_clusters, neighborhood_attention
from pointformer.clusters import Neighborhoods
from pointformer.kernels.attention import TILE, clusters_per_group
from pointformer.kernels.triton import attention
from pointformer.kernels.triton.attention_backward import learned_gradients
from pointformer.kernels.triton.attention_pairs import division, load_rows
from pointformer.kernels.triton.runtime import INTERPRETED, Variant

if not INTERPRETED:
    reason = "kernels run compiled here: set TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)


@st.composite
def token_sets(draw):
    """`make_inputs` on degenerate positions, which are scaled to logits of a usual size."""
    sample = draw(tokens(max_size=18, max_samples=2))
    dimensions = sample.dimensions
    inputs, _, _ = make_inputs(
        sizes=sample.sizes,
        dimensions=dimensions,
        heads=draw(st.integers(1, 2)),
        channels=draw(st.sampled_from([8, 24, 32])),
        features=draw(st.sampled_from([0, dimensions, 2 * dimensions + 1])),
        bias=draw(st.booleans()),
        blank=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        value_features=draw(st.sampled_from([0, dimensions, 2 * dimensions + 1])),
    )
    positions = sample.positions
    if len(positions):
        positions = positions * (10 / positions.abs().max().clamp(min=10))
    cluster_size = draw(st.sampled_from([5, 8, 24]))
    clusters = clusters_of(positions, cut(sample.sizes, cluster_size), cluster_size)
    neighborhoods = nearest(positions, clusters, draw(st.integers(1, 4)))
    planned = draw(st.sampled_from([None, False, True]))
    if planned is not None:
        with dirty_memory():
            neighborhoods = neighborhoods.with_plan(training=planned, impl="triton")
    return inputs, positions, neighborhoods


@given(token_sets())
def test_matches_float64(inputs):
    check_against_float64(inputs, impl="triton", memory=dirty_memory)


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 40, "cluster_size": 24, "num_clusters": 2, "dimensions": 3},
        {
            "channels": 72,
            "cluster_size": 40,
            "num_clusters": 2,
        },  # more keys than rows of one program
        {"channels": 128, "cluster_size": 1, "num_clusters": 8},
        {"channels": 8, "cluster_size": 8, "num_clusters": 7},  # global
    ],
)
def test_other_shapes(options):
    inputs = make_inputs(sizes=(40, 5), heads=1, **options)
    check_against_float64(inputs, impl="triton", memory=dirty_memory)


@pytest.mark.parametrize("options", [{}, {"blank": False}, {"value_features": 5}])
def test_half_precision(options):
    inputs = make_inputs(sizes=(40, 7), cluster_size=8, channels=24, **options)
    check_against_float64(inputs, torch.float16, impl="triton", eager=low_precision)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("mixed", [False, True])
def test_learned_tensors_of_any_dtype(impl, mixed):
    """They are read in their dtype, computed with in float32, and their gradients rounded once."""
    options = {"cluster_size": 8, "channels": 24, "value_features": 5}
    tensors, positions, neighborhoods = make_inputs(sizes=(40, 7), **options)
    low = {name: tensor.half() for name, tensor in tensors.items()}
    if mixed:
        low["position_bias"] = low["position_bias"].bfloat16()
    learned = set(low) - {"query", "key", "value"}
    assert len(learned) == 5
    high = {n: t.float() if n in learned else t for n, t in low.items()}
    cotangent = torch.ones_like(low["value"])
    out, ours = gradients(low, positions, neighborhoods, cotangent, impl=impl)
    want, theirs = gradients(high, positions, neighborhoods, cotangent, impl=impl)
    assert torch.equal(out, want)
    for name, gradient in ours.items():
        assert torch.equal(gradient, theirs[name].to(low[name].dtype)), name


@pytest.mark.parametrize("blank", [False, True])
def test_gradients_of_a_row_add_up_to_zero(blank):
    """In half precision too, where the output is rounded: learned gradients are as exact as if it
    were not, and those of equal queries' keys cancel."""
    options = {"channels": 16, "features": 2, "value_features": 2}
    inputs = make_inputs(sizes=(48,), cluster_size=8, blank=blank, **options)
    tensors, positions, neighborhoods = inputs
    cast = ("query", "key", "value")
    half = {n: t.half() if n in cast else t.float() for n, t in tensors.items()}
    half["value"] = half["value"] + 8  # the output has three bits less for what differs
    cotangent = torch.ones_like(half["value"])
    exact = {name: tensor.double() for name, tensor in half.items()}
    _, want = gradients(exact, positions, neighborhoods, cotangent.double())
    _, ours = gradients(half, positions, neighborhoods, cotangent, impl="triton")
    for name in set(tensors) - set(cast):
        largest = want[name].abs().max().item()
        limit = 1e-5 * max(largest, positions.abs().max().item())
        assert (ours[name].double() - want[name]).abs().max() <= limit, name


@given(
    num_clusters=st.integers(0, 5),
    clusters=st.integers(1, 9),
    size=st.sampled_from([1, 3, 5, 8, 24]),
    queries=st.integers(0, 70),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_lists_of_the_plan(num_clusters, clusters, size, queries, seed):
    """Every (query, cluster) pair once in the lists of tiles, and once in those of groups."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(queries, max(num_clusters, clusters) + 3, generator=generator).argsort(1)
    index = index[:, :num_clusters].int() - 2  # some are negative, some too large
    lengths = torch.randint(1, size + 1, (clusters,), generator=generator)
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    want = {(q, c) for q, row in enumerate(index.tolist()) for c in row if 0 <= c < clusters}
    with dirty_memory():
        tiles, groups = attention.make_plan(index, offsets, size, True, 1), clusters_per_group(size)
    counts, rows, row_counts, members = (lists.tolist() for lists in tiles[:4])
    cluster_of = {row: c for c, row in enumerate(offsets[:-1].tolist())}
    found = []
    for tile, count in enumerate(counts):
        union = [cluster_of[row] for row in rows[tile][:count]]
        assert union == sorted(union)
        assert row_counts[tile][:count] == [lengths[c] for c in union]
        for c, word in zip(union, members[tile], strict=False):
            found += [(tile * TILE + t, c) for t in range(TILE) if word >> t & 1]
    assert len(found) == len(set(found))
    assert set(found) == want
    begins, counts, entries, members = (lists.tolist() for lists in tiles[4:])
    found = []
    for group, count in enumerate(counts):
        listed = slice(begins[group], begins[group] + count)
        assert entries[listed] == sorted(set(entries[listed]))
        for query, word in zip(entries[listed], members[listed], strict=True):
            found += [(query, group * groups + c) for c in range(groups) if word >> c & 1]
    assert len(found) == len(set(found))
    assert set(found) == want


@given(st.integers(1, 5000), st.lists(st.integers(0, 2**29 - 1)))
def test_division(divisor, numbers):
    reciprocal, shift = division(divisor)
    assert reciprocal < 2**31
    numbers += [2**29 - 1, 2**29 // divisor * divisor - 1, divisor - 1, divisor]
    assert [n * reciprocal >> shift for n in numbers] == [n // divisor for n in numbers]


@pytest.mark.parametrize("programs", [0, 1, 256, 601])
@pytest.mark.parametrize("absent", [(), (0, 2), (1,), (2,), (3, 4), (0, 1, 2, 3, 4)])
def test_sums_of_learned_gradients(programs, absent):
    heads, channels = 3, 16
    shapes = [(heads, 5), (heads,), (heads, channels, 5), (heads, channels), (heads, channels)]
    given_ = [None if i in absent else torch.ones(shape) for i, shape in enumerate(shapes)]
    parts = [torch.rand(programs, *shape, dtype=torch.float64) for shape in shapes]
    columns = [parts[0]] if given_[0] is not None else []
    if given_[2] is not None:
        columns.append(parts[2].flatten(2))
    if given_[3] is not None:
        columns += [parts[1][..., None], parts[3], parts[4]]
    shares = torch.cat([*columns, torch.zeros(programs, heads, 0)], 2).flatten(1).float()
    with dirty_memory():
        got = learned_gradients(shares, given_, heads, channels)
    for i, part in enumerate(parts):
        want = part.sum(0)
        if i == 1 and given_[3] is None:  # without a blank token the bias has no effect
            want = torch.zeros(heads)
        if i in absent:
            assert got[i].numel() == 0
        else:
            torch.testing.assert_close(got[i], want.float())


def test_bits_repeat_and_plans_change_nothing():
    options = {"num_clusters": 4, "cluster_size": 8, "dtype": torch.float32, "value_features": 5}
    inputs = make_inputs(sizes=(35, 0, 7), **options)
    tensors, positions, neighborhoods = inputs
    neighborhoods.cluster_index[::3, 2:] = -1
    results = []
    for chosen in (
        neighborhoods,
        neighborhoods.with_plan(training=False, impl="triton"),
        neighborhoods.with_plan(impl="triton"),
    ):
        with dirty_memory():
            output, grads = gradients(tensors, positions, chosen, tensors["value"], impl="triton")
        results.append([output, *grads.values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("layout", ["one projection", "channels first", "heads", "tokens"])
def test_strides(layout):
    """Views of one tensor; read in place if their strides are multiples of eight elements."""
    tensors, positions, neighborhoods = make_inputs(channels=16, dtype=torch.float32)
    parts = torch.stack([tensors[name] for name in ("query", "key", "value")], 2)  # (T, H, 3, d)
    tokens, heads, _, channels = parts.shape
    if layout == "channels first":
        parts = parts.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    elif layout == "heads":  # 52 elements from head to head, 104 from token to token
        wide = parts.new_zeros(tokens, heads, 3 * channels + 4)
        wide[..., :-4] = parts.flatten(2)
        parts = wide[..., :-4].unflatten(2, (3, channels))
    elif layout == "tokens":  # 48 elements from head to head, 100 from token to token
        wide = parts.new_zeros(tokens, 3 * heads * channels + 4)
        wide[:, :-4] = parts.flatten(1)
        parts = wide[:, :-4].unflatten(1, (heads, 3, channels))
    parts.requires_grad_()
    query, key, value = parts.unbind(2)
    aligned = [stride % 8 == 0 for stride in key.stride()[:2]]
    assert aligned == [layout != "tokens", layout != "heads"] or layout == "channels first"
    assert (key.stride(2) == 1) == (layout != "channels first")
    strided = tensors | {"query": query, "key": key, "value": value}
    output = attend(strided, positions, neighborhoods, impl="triton")
    assert torch.equal(output, attend(tensors, positions, neighborhoods, impl="triton"))
    cotangent = torch.ones(()).expand(output.shape)
    (grad,) = torch.autograd.grad(output, parts, cotangent)
    _, grads = gradients(tensors, positions, neighborhoods, cotangent.clone(), impl="triton")
    assert torch.equal(grad, torch.stack([grads[n] for n in ("query", "key", "value")], 2))


@pytest.mark.parametrize("blank", [False, True])
def test_empty_neighborhood(blank):
    options = {"dtype": torch.float32, "blank": blank, "value_features": 5}
    tensors, positions, neighborhoods = make_inputs(**options)
    neighborhoods.cluster_index[3] = -1
    ones = torch.ones_like(tensors["query"])
    with dirty_memory():
        output, grads = gradients(tensors, positions, neighborhoods, ones, impl="triton")
    expected = tensors["blank_value"] if blank else torch.zeros_like(output[3])
    torch.testing.assert_close(output[3], expected)
    assert not grads["query"][3].any()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("queries", [None, 5, 40])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_lists_and_other_queries(queries, dimensions):
    options = {"dimensions": dimensions, "value_features": dimensions}
    inputs = make_lists(queries=queries, seed=dimensions, **options)
    check_against_float64(inputs, impl="triton", memory=dirty_memory)


@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("sizes", [(), (0,), (0, 1), (1,)])
def test_few_tokens(sizes, blank):
    inputs = make_inputs(sizes=sizes, blank=blank, value_features=2)
    check_against_float64(inputs, impl="triton", memory=dirty_memory)


@pytest.mark.parametrize("name", ["query", "key"])
def test_nan_is_not_hidden(name):
    check_nan(name, "triton")


def test_large_logits():
    check_large_logits("triton")


@pytest.mark.parametrize(
    "options", [{"value_features": 5}, {"blank": False, "bias": False, "features": 0}]
)
def test_opcheck(options):
    tensors, positions, neighborhoods = make_inputs(sizes=(9,), dtype=torch.float32, **options)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    plan = torch.ops.pointformer.neighborhood_plan.default
    # Not "test_aot_dispatch_dynamic", which compares values: the ends of the lists have none.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for training in (False, True):
        lists = (*neighborhood_lists(neighborhoods), training, 1, "triton")
        torch.library.opcheck(plan, lists, test_utils=checks)
    neighborhoods = neighborhoods.with_plan(impl="triton")
    arguments = registered_arguments(tensors, positions, neighborhoods, "triton")
    torch.library.opcheck(torch.ops.pointformer.neighborhood_attention.default, arguments)
    with torch.no_grad():
        output, normal = torch.ops.pointformer.neighborhood_attention(*arguments)
        torch.library.opcheck(
            torch.ops.pointformer.neighborhood_attention_backward.default,
            (torch.ones_like(output), output, normal, *arguments),
        )


class Attention(torch.nn.Module):
    def forward(self, tensors, positions, neighborhoods):
        neighborhoods = neighborhoods.with_plan(training=torch.is_grad_enabled(), impl="triton")
        return attend(tensors, positions, neighborhoods, impl="triton")


def test_compiles_in_one_graph():
    inputs = make_inputs(dtype=torch.float32, features=2, value_features=5)
    cotangent = inputs[0]["value"]
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    eager = gradients(*inputs, cotangent, function=Attention())
    output, grads = gradients(*inputs, cotangent, function=compiled)
    assert torch.equal(output, eager[0])
    assert all(torch.equal(grads[name], eager[1][name]) for name in grads)


def test_exports(tmp_path, caplog):
    caplog.set_level(logging.ERROR, "torch._export.serde.serialize")  # a broken warning of torch
    inputs = make_inputs(dtype=torch.float32)
    with torch.no_grad():
        torch.export.save(torch.export.export(Attention(), inputs), tmp_path / "attention.pt2")
        program = torch.export.load(tmp_path / "attention.pt2")
        assert torch.equal(program.module()(*inputs), Attention()(*inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "query is float64"),
        ({"channels": 12}, "query has 12 channels"),
        ({"channels": 72, "value_features": 5}, "position_value is given .* 72 float32 channels"),
    ],
)
def test_what_it_lacks(options, message):
    inputs = make_inputs(**{"dtype": torch.float32, **options})
    with pytest.raises(ValueError, match=f"impl='triton' .*{message}.*; use impl='reference'"):
        attend(*inputs, impl="triton")


def test_lists_that_are_too_long_are_refused():
    _, _, neighborhoods = make_inputs()
    index = neighborhoods.cluster_index[:1, :1].expand(1 << 16, 1 << 16)
    neighborhoods = Neighborhoods(index, neighborhoods.clusters)
    with pytest.raises(ValueError, match=r"4294967296 tokens or list entries.*impl='reference'"):
        neighborhoods.with_plan(impl="triton")


def test_unknown_implementation_of_a_plan():
    _, _, neighborhoods = make_inputs()
    with pytest.raises(ValueError, match="impl='fast' does not exist"):
        neighborhoods.with_plan(impl="fast")
    assert neighborhoods.with_plan(impl="reference") is neighborhoods


@pytest.mark.parametrize("training", [True, False])
def test_can_be_captured(training):
    """Neither the public functions nor what launches the kernels waits for the device."""
    with fake_gpu():
        positions = torch.rand(96, 2, device="cuda")
        clusters = balanced_cluster(positions, sizes=(48, 48), extent=((1.0, 1.0),) * 2)
        neighborhoods = nearest_clusters(positions, clusters, 3).with_plan(training=training)
        rows = [torch.rand(96, 2, 16, device="cuda") for _ in range(3)]
        weight, values = torch.rand(2, 5, device="cuda"), torch.rand(2, 16, 5, device="cuda")
        given_ = {"position_weight": weight, "position_value": values}
        output = neighborhood_attention(*rows, positions, neighborhoods, **given_)
        # The registered ops ran as their fakes: now what stands behind them.
        lists = neighborhood_lists(neighborhoods)
        with mock.patch.object(Variant, "launch") as launch:
            plan = attention.make_plan(*lists, training, 1)
            for made, planned in zip(plan, neighborhoods.plan, strict=True):
                assert (made.shape, made.dtype) == (planned.shape, planned.dtype)
            learned = (weight, None, values, None, None, 0.25)
            arguments = (*rows, positions, positions, *lists, plan, *learned)
            made, normal = attention.forward(*arguments)
            assert made.shape == output.shape
            if training:
                attention.backward(output, output, normal, *arguments)
        assert launch.call_count == (6 if training else 2)


@triton.jit
def _read_rows(data, out, token_stride, head_stride):
    row, head = tl.arange(0, 16), tl.program_id(0)
    values = load_rows(data, row % 2, head, token_stride, head_stride, 2, 16)
    place = head * 256 + row[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + place, values)


def test_strides_beyond_2_31_elements():
    """Of tokens and of heads, in memory that is reserved only."""
    far = (1 << 31) + 64
    try:
        memory = torch.empty(far + 2048, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("needs 4 GB of address space")
    for token_stride, head_stride in ((far, 64), (64, far)):
        rows = memory.as_strided((2, 2, 16), (head_stride, token_stride, 1))
        rows.copy_(torch.randn(2, 2, 16))
        out = torch.empty(2, 16, 16, dtype=torch.float16)
        _read_rows[(2,)](memory, out, token_stride // 8, head_stride // 8)
        assert torch.equal(out[:, :2], rows)
