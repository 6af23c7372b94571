"""Neighborhood attention: the reference, and the fused CPU path against it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from helpers.attention import (
    attend,
    check_against_float64,
    check_large_logits,
    check_nan,
    clusters_of,
    cut,
    gradients,
    make_inputs,
    make_lists,
    nearest,
    neighborhood_lists,
    places_of,
    registered_arguments,
)
from pointformer import TokenSet
from pointformer.clusters import Clusters, Neighborhoods
from pointformer.kernels.cpu import attention_backward
from pointformer.ops import neighborhood_attention
from pointformer.reference.attention import neighborhood_attention as reference_attention
from pointformer.reference.relative_position import relative_position

# Kernels on CPUs take small clusters apart, token by token, and larger ones in blocks.
APART_AND_BLOCKS = pytest.mark.parametrize("cluster_size", [3, 8])
PARITY = np.load(Path(__file__).parents[1] / "parity" / "ops.npz")


def brute_force(tensors, positions, neighborhoods, scale):
    """The definition, one query at a time."""
    offsets = neighborhoods.clusters.offsets.tolist()
    rows_out = []
    for i, clusters in enumerate(neighborhoods.cluster_index.tolist()):
        rows = [j for c in clusters if c >= 0 for j in range(offsets[c], offsets[c + 1])]
        logits = scale * torch.einsum("hd,jhd->hj", tensors["query"][i], tensors["key"][rows])
        points, places = places_of(positions)
        delta = points[rows].to(logits.dtype) - places[i]
        if "position_weight" in tensors:
            weight = tensors["position_weight"]
            phi = relative_position(delta, full=weight.shape[1] != delta.shape[1])
            logits = logits + weight @ phi.T
        if "position_bias" in tensors:
            logits = logits + tensors["position_bias"][:, None]
        values = tensors["value"][rows]
        if "position_value" in tensors:
            weight = tensors["position_value"]
            phi = relative_position(delta, full=weight.shape[2] != delta.shape[1])
            values = values + (weight @ phi.T).permute(2, 0, 1)
        if "blank_key" in tensors:
            blank = scale * (tensors["query"][i] * tensors["blank_key"]).sum(-1, keepdim=True)
            logits = torch.cat([logits, blank], -1)
            values = torch.cat([values, tensors["blank_value"][None]])
        rows_out.append(torch.einsum("hj,jhd->hd", logits.softmax(-1), values))
    return torch.stack(rows_out)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("options", [{}, {"blank": False}, {"features": 0, "bias": False}])
def test_reference_is_the_definition(dimensions, options):
    inputs = make_inputs(dimensions=dimensions, **options)
    output = attend(*inputs, scale=0.3)
    torch.testing.assert_close(output, brute_force(*inputs, scale=0.3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("queries", [None, 9])
def test_reference_over_lists_is_the_definition(queries):
    inputs = make_lists(queries=queries)
    output = attend(*inputs, scale=0.3)
    torch.testing.assert_close(output, brute_force(*inputs, scale=0.3), rtol=0, atol=1e-13)


@pytest.mark.parametrize("features", [3, 7])
@pytest.mark.parametrize("options", [{}, {"queries": 9}, {"blank": False, "features": 0}])
def test_relative_values_are_the_definition(options, features):
    inputs = make_lists(**options, value_features=features)
    output = attend(*inputs, scale=0.3)
    torch.testing.assert_close(output, brute_force(*inputs, scale=0.3), rtol=0, atol=1e-13)


def test_relative_values_of_clusters_are_the_definition():
    inputs = make_inputs(value_features=5)
    output = attend(*inputs, scale=0.3)
    torch.testing.assert_close(output, brute_force(*inputs, scale=0.3), rtol=0, atol=1e-13)


def test_relative_values_of_equal_values_are_a_linear_function_of_the_mean_difference():
    """Uniform attention among differences: the term alone, by other means than the op's."""
    tensors, positions, neighborhoods = make_lists(blank=False, features=0, value_features=3)
    zeros = {name: torch.zeros_like(tensors[name]) for name in ("query", "key", "value")}
    output = attend({**tensors, **zeros}, positions, neighborhoods)
    rows, mask = neighborhoods.members()
    for i in range(len(rows)):
        near = positions[rows[i][mask[i]]].double()
        shift = (near.mean(0) if len(near) else positions[i].double()) - positions[i].double()
        torch.testing.assert_close(output[i], tensors["position_value"] @ shift)


def test_gradients_of_relative_values():
    """Those of positions too, twice; checked in float64, which `positions` cannot be in public."""
    options = {"tokens": 5, "queries": 3, "k": 3, "heads": 1, "channels": 2, "value_features": 7}
    tensors, places, neighborhoods = make_lists(**options)
    arguments = {**tensors, "positions": places[0], "query_positions": places[1]}
    leaves = [tensor.double().requires_grad_() for tensor in arguments.values()]

    def function(*values):
        named = dict(zip(arguments, values, strict=True))
        return reference_attention(**named, neighborhoods=neighborhoods, scale=0.5)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_reference_gradcheck_of_cross_attention():
    tensors, places, neighborhoods = make_lists(tokens=6, queries=3, k=3, heads=1, channels=2)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}

    def function(*values):
        return attend(dict(zip(tensors, values, strict=True)), places, neighborhoods)

    assert torch.autograd.gradcheck(function, list(tensors.values()))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("blank", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_reference_gradcheck(dimensions, blank, full):
    tensors, positions, neighborhoods = make_inputs(
        sizes=(5, 2),
        dimensions=dimensions,
        channels=2,
        heads=1,
        blank=blank,
        lattice=True,
        features=None if full else dimensions,
    )
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def function(*values):
        named = dict(zip(tensors, values, strict=True))
        return attend(named, positions, neighborhoods)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("case", ["mask", "full", "global"])
def test_released_attention(case):
    """Values and gradients of the released AFF's attention in float64."""
    data = {
        name.removeprefix(f"attn_{case}_"): torch.from_numpy(PARITY[name])
        for name in PARITY.files
        if name.startswith(f"attn_{case}_")
    }
    batch, tokens = data["positions"].shape[:2]
    positions = data["positions"].flatten(0, 1).float()
    # The released clusters are full, but for the last one of a sample.
    lengths = [[min(8, tokens - i) for i in range(0, tokens, 8)]] * batch
    clusters = clusters_of(positions, lengths, 8)
    per_sample = clusters.counts[0]
    first = torch.arange(batch)[:, None, None] * per_sample
    if case == "global":
        nearest_clusters = torch.arange(per_sample).expand(batch, tokens, per_sample)
    else:
        nearest_clusters = data["nearest_clusters"]
    neighborhoods = Neighborhoods((nearest_clusters + first).flatten(0, 1).int(), clusters)
    names = {
        "query": "q",
        "key": "k",
        "value": "v",
        "position_weight": "bias_weight",
        "position_bias": "bias_bias",
        "blank_key": "blank_k",
        "blank_value": "blank_v",
    }

    def packed(name):
        return data[name].flatten(0, 1) if data[name].dim() == 4 else data[name]

    output, grads = gradients(
        {name: packed(theirs) for name, theirs in names.items()},
        positions,
        neighborhoods,
        packed("cotangent"),
        scale=float(data["scale"]),
    )
    torch.testing.assert_close(output, packed("out"), rtol=0, atol=1e-10)
    for name, theirs in names.items():
        torch.testing.assert_close(grads[name], packed(f"grad_{theirs}"), rtol=0, atol=1e-10)


@st.composite
def token_sets(draw):
    dimensions = draw(st.sampled_from([2, 3]))
    features = draw(st.sampled_from([0, dimensions, 5 if dimensions == 2 else 7]))
    return make_inputs(
        sizes=tuple(draw(st.lists(st.integers(0, 30), min_size=1, max_size=3))),
        dimensions=dimensions,
        heads=draw(st.integers(1, 3)),
        channels=draw(st.sampled_from([8, 16, 24, 32, 40])),
        cluster_size=draw(st.sampled_from([2, 4, 8, 24])),
        num_clusters=draw(st.integers(1, 9)),
        features=features,
        bias=draw(st.booleans()),
        blank=draw(st.booleans()),
        lattice=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        value_features=draw(st.sampled_from([0, dimensions, 2 * dimensions + 1])),
    )


@given(token_sets())
def test_fused_matches_float64(inputs):
    check_against_float64(inputs)


@st.composite
def listed_tokens(draw):
    dimensions = draw(st.sampled_from([2, 3]))
    return make_lists(
        tokens=draw(st.integers(1, 60)),
        queries=draw(st.sampled_from([None, 1, 7, 30])),
        k=draw(st.integers(1, 40)),
        dimensions=dimensions,
        heads=draw(st.integers(1, 3)),
        channels=draw(st.sampled_from([8, 16, 24, 32, 40])),
        features=draw(st.sampled_from([0, dimensions, 2 * dimensions + 1])),
        blank=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        value_features=draw(st.sampled_from([0, dimensions, 2 * dimensions + 1])),
    )


@given(listed_tokens())
def test_fused_over_lists_matches_float64(inputs):
    check_against_float64(inputs)


def test_no_queries_among_tokens():
    """Their gradients are zero, not what memory held."""
    tensors, places, neighborhoods = make_lists(queries=0)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for impl in ("reference", "cpu"):
        output, grads = gradients(tensors, places, neighborhoods, tensors["query"], impl=impl)
        assert output.shape == (0, 2, 8)
        assert not any(grad.any() for grad in grads.values())


def test_queries_among_no_tokens():
    tensors, places, neighborhoods = make_lists(tokens=0, queries=3)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for impl in ("reference", "cpu"):
        output = attend(tensors, places, neighborhoods, impl=impl)
        torch.testing.assert_close(output, tensors["blank_value"].expand(3, -1, -1))


def test_cross_attention_over_clusters():
    """Queries at the tokens' own places, in another order and fewer."""
    tensors, positions, neighborhoods = make_inputs(dtype=torch.float32)
    rows = torch.tensor([7, 3, 3, 20, 0])
    some = tensors | {"query": tensors["query"][rows]}
    for impl in ("reference", "cpu"):
        whole = attend(tensors, positions, neighborhoods, impl=impl)
        places = positions, positions[rows]
        own = neighborhoods.select(rows)
        torch.testing.assert_close(attend(some, places, own, impl=impl), whole[rows])


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([[0, 1], [2, 2]], ValueError, "row twice in list 1"),
        ([[0, 3]], IndexError, "rows from 0 to below 3, or -1 for none, got 3"),
        ([[-2, 1]], IndexError, "below 3, or -1 for none, got -2"),
        ([0, 1], ValueError, "neighbor_index: expected shape"),
        ([[0.0, 1.0]], TypeError, "neighbor_index: expected dtype"),
    ],
)
def test_lists_that_cannot_be(index, error, message):
    with pytest.raises(error, match=message):
        Neighborhoods.from_lists(torch.tensor(index), torch.zeros(3, 2))


@APART_AND_BLOCKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"blank": False}, {"value_features": 5}])
def test_fused_half_precision(dtype, options, cluster_size):
    check_against_float64(
        make_inputs(sizes=(90, 20), channels=32, cluster_size=cluster_size, **options), dtype
    )


@APART_AND_BLOCKS
def test_strided_key_and_value(cluster_size):
    """Views of one projection, key and value side by side in every head."""
    tensors, positions, neighborhoods = make_inputs(
        channels=16, cluster_size=cluster_size, dtype=torch.float32
    )
    both = torch.stack([tensors["key"], tensors["value"]], 2).requires_grad_()
    strided = dict(tensors, key=both[:, :, 0], value=both[:, :, 1])
    output = attend(strided, positions, neighborhoods, impl="cpu")
    assert torch.equal(output, attend(tensors, positions, neighborhoods, impl="cpu"))
    (grad,) = torch.autograd.grad(output, both, output.detach())
    _, grads = gradients(tensors, positions, neighborhoods, output.detach(), impl="cpu")
    assert torch.equal(grad, torch.stack([grads["key"], grads["value"]], 2))


@APART_AND_BLOCKS
def test_other_strides(cluster_size):
    tensors, positions, neighborhoods = make_inputs(
        channels=16, cluster_size=cluster_size, dtype=torch.float32
    )
    want = attend(tensors, positions, neighborhoods, impl="cpu")
    channels_first = {
        name: tensors[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        for name in ("query", "key", "value")
    }
    assert channels_first["key"].stride(2) != 1
    got = attend(tensors | channels_first, positions, neighborhoods, impl="cpu")
    assert torch.equal(got, want)


@APART_AND_BLOCKS
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("blank", [False, True])
def test_empty_neighborhood(impl, blank, cluster_size):
    options = {"dtype": torch.float32, "blank": blank, "value_features": 5}
    options["cluster_size"] = cluster_size
    tensors, positions, neighborhoods = make_inputs(**options)
    neighborhoods.cluster_index[3] = -1
    output, grads = gradients(
        tensors, positions, neighborhoods, torch.ones_like(tensors["query"]), impl=impl
    )
    expected = tensors["blank_value"] if blank else torch.zeros_like(output[3])
    torch.testing.assert_close(output[3], expected)
    assert not grads["query"][3].any()
    assert all(grad.isfinite().all() for grad in grads.values())


@APART_AND_BLOCKS
@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("sizes", [(), (0,), (0, 1), (1,)])
def test_few_tokens(impl, sizes, cluster_size):
    inputs = make_inputs(
        sizes=sizes, cluster_size=cluster_size, dtype=torch.float32, value_features=5
    )
    output, grads = gradients(*inputs, torch.ones_like(inputs[0]["query"]), impl=impl)
    assert output.shape == inputs[0]["query"].shape
    assert all(grad.isfinite().all() for grad in grads.values())


@APART_AND_BLOCKS
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_is_not_hidden(name, cluster_size):
    check_nan(name, "cpu", cluster_size=cluster_size)


@APART_AND_BLOCKS
def test_large_logits(cluster_size):
    check_large_logits("cpu", cluster_size=cluster_size)


@APART_AND_BLOCKS
def test_all_tokens_attend_to_one_cluster(cluster_size):
    """More queries per cluster than the backward pass takes at a time."""
    inputs = make_inputs(sizes=(150,), cluster_size=cluster_size)
    inputs[2].cluster_index[:] = torch.tensor([4, 9, -1])
    check_against_float64(inputs)


@pytest.mark.parametrize("cluster_size", [1, 8, 12])
def test_backward_pass_in_many_tiles_of_queries(monkeypatch, cluster_size):
    """Clusters with queries in several tiles, and clusters of which one tile sees nothing."""
    monkeypatch.setattr(attention_backward, "TILE_FLOATS", 1)
    inputs = make_inputs(sizes=(150, 41), cluster_size=cluster_size, value_features=5)
    check_against_float64(inputs)


def test_translation():
    tensors, positions, neighborhoods = make_inputs(dtype=torch.float32)
    positions = (positions * 8).round() / 8  # so that the translation is exact
    moved = attend(tensors, positions + 64, neighborhoods, impl="cpu")
    assert torch.equal(moved, attend(tensors, positions, neighborhoods, impl="cpu"))


def test_ragged_batch_is_its_samples():
    sizes = (19, 0, 30)
    tensors, positions, neighborhoods = make_inputs(sizes=sizes, cluster_size=8, num_clusters=2)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    together = attend(tensors, positions, neighborhoods, impl="cpu")
    lengths = cut(sizes, 8)
    for sample, rows in enumerate(torch.arange(sum(sizes)).split(sizes)):
        part = positions[rows]
        alone = nearest(part, clusters_of(part, lengths[sample : sample + 1], 8), 2)
        own = {n: t[rows] if n in ("query", "key", "value") else t for n, t in tensors.items()}
        assert torch.equal(attend(own, part, alone, impl="cpu"), together[rows])


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@APART_AND_BLOCKS
def test_bits_do_not_depend_on_threads(threads, cluster_size):
    options = {
        "cluster_size": cluster_size,
        "num_clusters": 6,
        "dtype": torch.float32,
        "value_features": 5,
    }
    inputs = make_inputs(sizes=(150, 60), **options)
    results = []
    for count in (1, 2, 2):
        threads(count)
        output, grads = gradients(*inputs, inputs[0]["value"], impl="cpu")
        results.append([output, *grads.values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@APART_AND_BLOCKS
@pytest.mark.parametrize("training", [True, False])
def test_given_plan_changes_nothing(training, cluster_size):
    tensors, positions, neighborhoods = make_inputs(
        sizes=(50, 7), num_clusters=5, cluster_size=cluster_size, dtype=torch.float32
    )
    neighborhoods.cluster_index[::3, 2:] = -1
    cotangent = tensors["value"]
    _, built = gradients(tensors, positions, neighborhoods, cotangent, impl="cpu")
    planned = neighborhoods.with_plan(training=training)
    _, given_ = gradients(tensors, positions, planned, cotangent, impl="cpu")
    assert all(torch.equal(built[name], given_[name]) for name in built)


@pytest.mark.parametrize(
    "options", [{"value_features": 5}, {"blank": False, "bias": False, "features": 0}]
)
@APART_AND_BLOCKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(options, dtype, cluster_size):
    tensors, positions, neighborhoods = make_inputs(cluster_size=cluster_size, **options)
    rows = ("query", "key", "value")
    tensors = {n: t.to(dtype if n in rows else torch.float32) for n, t in tensors.items()}
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    plan = torch.ops.pointformer.neighborhood_plan.default
    torch.library.opcheck(plan, (*neighborhood_lists(neighborhoods), True, 1, "cpu"))
    arguments = registered_arguments(tensors, positions, neighborhoods.with_plan())
    torch.library.opcheck(torch.ops.pointformer.neighborhood_attention.default, arguments)
    with torch.no_grad():
        output, normal = torch.ops.pointformer.neighborhood_attention(*arguments)
        torch.library.opcheck(
            torch.ops.pointformer.neighborhood_attention_backward.default,
            (torch.ones_like(output), output, normal, *arguments),
        )


def test_other_derivatives_are_the_references():
    """Forward ones and those of torch.func; fused ops, whose forward ones torch would take to be
    zero, say so."""
    tokens = TokenSet(torch.rand(40, 2)).cluster(8)
    neighborhoods = tokens.neighborhoods(2)
    values, tangent = torch.randn(2, 40, 2, 8, dtype=torch.float64)

    def attention(values, impl="reference"):
        return neighborhood_attention(
            values, values, values, tokens.positions, neighborhoods, impl=impl
        )

    result, forward = torch.func.jvp(attention, (values,), (tangent,))
    step = 1e-6 * tangent
    expected = (attention(values + step) - attention(values - step)) / 2e-6
    torch.testing.assert_close(forward, expected, rtol=1e-6, atol=1e-7)
    with forward_ad.dual_level():
        dual = attention(forward_ad.make_dual(values, tangent))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, forward)
        with pytest.raises(ValueError, match=r"no forward derivatives.*; use impl"):
            attention(forward_ad.make_dual(values.float(), tangent.float()), None)
    leaf = values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((attention(leaf) * tangent).sum(), leaf)
    assert torch.equal(torch.func.grad(lambda v: (attention(v) * tangent).sum())(values), gradient)
    assert torch.equal(torch.vmap(attention)(values[None])[0], result)
    single = values.float()
    for transformed in (
        lambda: torch.func.grad(lambda v: attention(v, None).sum())(single),
        lambda: torch.vmap(lambda v: attention(v, None))(single[None]),
        lambda: torch.func.jvp(lambda v: attention(v, None), (single,), (single,)),
    ):
        with pytest.raises(ValueError, match=r"none under torch\.func; use impl='reference'"):
            transformed()


def test_second_derivative_of_the_fused_op_is_an_error():
    tensors, positions, neighborhoods = make_inputs(dtype=torch.float32)
    query = tensors["query"].requires_grad_()
    output = attend(tensors, positions, neighborhoods, impl="cpu")
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='reference'"):
        torch.autograd.grad(grad.sum(), query)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_compile(impl):
    inputs = make_inputs(dtype=torch.float32, features=2, value_features=5)
    cotangent = inputs[0]["value"]
    eager = gradients(*inputs, cotangent, impl=impl)
    compiled_attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs[0].items()}
    output = compiled_attend(leaves, *inputs[1:], impl=impl)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent)
    torch.testing.assert_close(output, eager[0])
    torch.testing.assert_close(dict(zip(leaves, grads, strict=True)), eager[1])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_autocast_follows_the_inputs(impl):
    tensors, positions, neighborhoods = make_inputs(dtype=torch.float32)
    plain = attend(tensors, positions, neighborhoods, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(tensors, positions, neighborhoods, impl=impl), plain)
        half = {n: tensors[n].bfloat16() for n in ("query", "key", "value")}
        output = attend(tensors | half, positions, neighborhoods, impl=impl)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), plain, rtol=0.05, atol=0.05)


def test_default_implementation():
    tensors, positions, neighborhoods = make_inputs(dtype=torch.float32)
    default = attend(tensors, positions, neighborhoods)
    assert torch.equal(default, attend(tensors, positions, neighborhoods, impl="cpu"))
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    assert attend(exact, positions, neighborhoods).dtype == torch.float64


_PEAK = """
import resource, sys, torch
sys.path.insert(0, {tests!r})
from helpers.attention import gradients, make_inputs

def run(tokens, num_clusters):
    tensors, positions, neighborhoods = make_inputs(
        sizes=(tokens,), num_clusters=num_clusters, channels=16, cluster_size={cluster_size},
        dtype=torch.float32,
    )
    neighborhoods = neighborhoods.with_plan()
    torch.ones(64 << 20)  # raise the peak beyond that of the preparation, and what was freed
    rest = [torch.ones(64 << 20)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients(tensors, positions, neighborhoods, tensors["value"], impl="cpu")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

run(100, 3)  # compiles
print(run(4000, {num_clusters}))
"""


@pytest.mark.parametrize("cluster_size", [1, 8])
def test_memory_does_not_grow_with_the_neighborhood(cluster_size):
    grown = {}
    for num_clusters in (16 // cluster_size, 320 // cluster_size):
        script = _PEAK.format(
            tests=str(Path(__file__).parents[1]),
            num_clusters=num_clusters,
            cluster_size=cluster_size,
        )
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        grown[num_clusters * cluster_size] = int(run.stdout)
    # One (T, M) array of floats would be 5 MiB at the larger M; each thread's own sums are 1 MiB,
    # and which threads get to touch theirs is chance.
    assert grown[320] < grown[16] + 2560, grown


class _Worker(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return attend(*make_inputs(dtype=torch.float32, seed=index), impl="cpu")


def test_forked_worker_after_a_parallel_call(threads):
    threads(2)
    expected = [_Worker()[0], _Worker()[1]]
    loader = torch.utils.data.DataLoader(
        _Worker(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for got, want in zip(loader, expected, strict=True):
        assert torch.equal(got, want)


BAD = {
    "query: expected shape": lambda a: a.update(query=a["query"][0]),
    "query: expected dtype": lambda a: a.update(query=a["query"].long()),
    "key: expected shape": lambda a: a.update(key=a["key"][:-1]),
    "value: expected dtype": lambda a: a.update(value=a["value"].bfloat16()),
    "positions: expected shape": lambda a: a.update(positions=a["positions"][:-1]),
    "positions: expected dtype": lambda a: a.update(positions=a["positions"].double()),
    "neighborhoods: expected Neighborhoods": lambda a: a.update(neighborhoods=None),
    "neighborhoods: expected those of": lambda a: a.update(
        neighborhoods=a["neighborhoods"].select(torch.arange(3))
    ),
    "position_weight: expected shape": lambda a: a.update(position_weight=torch.ones(2, 3)),
    "position_value: expected shape": lambda a: a.update(position_value=torch.ones(2, 8, 3)),
    "position_value: .* got .*2, 7, 5": lambda a: a.update(position_value=torch.ones(2, 7, 5)),
    "position_bias: expected shape": lambda a: a.update(position_bias=torch.ones(3)),
    "blank_value: expected a tensor": lambda a: a.update(blank_value=None),
    "blank_key: expected shape": lambda a: a.update(blank_key=torch.ones(2, 9)),
    "blank_key: expected a tensor": lambda a: a.update(blank_key=None),
    "impl='fast' does not exist": lambda a: a.update(impl="fast"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    tensors, positions, neighborhoods = make_inputs(dtype=torch.float32)
    arguments = dict(tensors, positions=positions, neighborhoods=neighborhoods)
    BAD[message](arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        neighborhood_attention(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": torch.float64}, "float64"), ({"channels": 12}, "12 channels")],
)
def test_what_the_fused_op_lacks(options, message):
    inputs = make_inputs(**{"dtype": torch.float32, **options})
    with pytest.raises(ValueError, match=f"impl='cpu' .*{message}.*; use impl='reference'"):
        attend(*inputs, impl="cpu")
    with pytest.raises(ValueError, match=f"impl=None .*{message}"):  # no silent fallback
        attend(*inputs, impl=None)


@APART_AND_BLOCKS
@pytest.mark.parametrize("scale", [0.7, -0.2, 0])
def test_fused_heeds_the_scale(scale, cluster_size):
    """Not the default one, in any of the gradients either."""
    tensors, *where = make_inputs(channels=16, cluster_size=cluster_size, value_features=5)
    cotangent = torch.randn(24, 2, 16, generator=torch.Generator().manual_seed(1)).double()
    out, grads = gradients(tensors, *where, cotangent, scale=scale)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    found, found_grads = gradients(single, *where, cotangent, scale=scale, impl="cpu")
    torch.testing.assert_close(found.double(), out, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        error = (found_grads[name] - grad).abs().max()
        assert error <= 1e-5 * grad.abs().max() + 1e-4, name


@pytest.mark.parametrize("cluster_size", [3, 16])
def test_sums_over_chunks_may_cancel(cluster_size):
    """48 tokens, three chunks: the gradients of the first and last undo each other."""
    tensors, positions, neighborhoods = make_inputs(
        (48,), cluster_size=cluster_size, features=0, bias=False, dtype=torch.float32
    )
    for name in ("query", "key", "value"):
        tensors[name].zero_()
    neighborhoods.cluster_index[:] = torch.tensor([0, 1, 2])
    cotangent = torch.ones(48, 2, 8)
    cotangent[:16], cotangent[32:] = 1e9, -1e9
    _, grads = gradients(tensors, positions, neighborhoods, cotangent, impl="cpu")
    share = 16 / (1 + 3 * cluster_size)
    torch.testing.assert_close(grads["blank_value"], torch.full((2, 8), share))


@pytest.mark.parametrize("cluster_size", [1, 3, 8])
def test_nan_gradients_reach_what_the_query_saw(cluster_size):
    inputs = make_inputs((40,), cluster_size=cluster_size, num_clusters=2, dtype=torch.float32)
    cotangent = torch.ones(40, 2, 8)
    cotangent[11, 1, 3] = torch.nan
    both = (gradients(*inputs, cotangent, impl=impl)[1] for impl in ("reference", "cpu"))
    for expected, found in zip(*map(dict.values, both), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_clusters_longer_than_they_say_are_refused(impl):
    """Kernels would write beyond their memory."""
    positions = torch.rand(40, 2)
    clusters = Clusters(
        torch.arange(40), torch.tensor([0, 40], dtype=torch.int32),
        positions.mean(0, keepdim=True), (40,), (1,), 1,
    )  # fmt: skip
    near = Neighborhoods(torch.zeros(40, 1, dtype=torch.int32), clusters)
    x = torch.rand(40, 1, 8)
    with pytest.raises(ValueError, match="has a cluster of 40 tokens, its cluster_size is 1"):
        neighborhood_attention(x, x, x, positions, near, impl=impl)
    for ends in ([0, 400], [1, 40], [0], [0, 60, 40]):
        other = Clusters(
            clusters.order, torch.tensor(ends, dtype=torch.int32), clusters.centers,
            (40,), (1,), 400,
        )  # fmt: skip
        with pytest.raises(ValueError, match="offsets of its 1 clusters do not rise from 0 to 40"):
            neighborhood_attention(
                x, x, x, positions, Neighborhoods(near.cluster_index, other), impl=impl
            )
