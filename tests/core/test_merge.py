"""Neighborhood merging and PointConv: parity, gradients, the fused CPU path, odd inputs."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from torch.autograd import gradcheck, gradgradcheck

from helpers.gradients import (
    assert_same_for_any_threads,
    value_and_gradients,
)
from helpers.merge import NET, assert_as_accurate, make_case, make_clusters, weight_counts
from pointformer import Clusters, Neighborhoods, point_conv, scored_merge
from pointformer.kernels.cpu.simd import load, store
from pointformer.kernels.cpu.special import normal_density, normal_distribution
from pointformer.kernels.merge import fused_merge
from pointformer.reference.merge import merge
from pointformer.reference.relative_position import relative_position

PARITY = np.load(Path(__file__).parents[1] / "parity" / "ops.npz")


shapes = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
        "cluster_size": st.integers(1, 20),
        "num_clusters": st.integers(1, 5),
        "channels": st.integers(1, 40),
        "dimensions": st.sampled_from([2, 3]),
        "full": st.booleans(),
        "drop": st.sampled_from([0.0, 0.3]),
        "seed": st.integers(0, 2**16),
        "mid": weight_counts(34),
    }
)


def by_definition(case):
    """Eq. 4 with loops over centers and neighbors, in float64."""
    neighborhoods, weight = case["neighborhoods"], case["weight"].double()
    offsets = neighborhoods.clusters.offsets.tolist()
    positions, rows = case["positions"].double(), []
    for center in case["center_index"].tolist():
        total = torch.zeros(len(weight), case["features"].shape[1], dtype=torch.float64)
        for cluster in neighborhoods.cluster_index[center].tolist():
            for j in range(offsets[cluster], offsets[cluster + 1]) if cluster >= 0 else ():
                d = positions[j] - positions[center]
                r = d.norm()
                unit = d / r if r > 0 else d * 0
                unit = unit.flip(0) if len(d) == 2 else unit
                phi = torch.cat([d, r[None], unit])[: weight.shape[1]]
                z = weight @ phi + case["bias"]
                z = (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt()
                z = z * case["norm_weight"] + case["norm_bias"]
                w = z * 0.5 * (1 + torch.erf(z / 2**0.5)) * case["scores"][j]
                total += w[:, None] * case["features"][j]
        rows.append(total.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("mid", [1, 3, 4, 6, 16])
@pytest.mark.parametrize(("dimensions", "full"), [(2, True), (2, False), (3, True), (3, False)])
def test_is_equation_4(dimensions, full, mid, impl):
    case = make_case(dimensions=dimensions, full=full, mid=mid)
    torch.testing.assert_close(
        scored_merge(**case, impl=impl).double(), by_definition(case), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_merging_over_lists(impl):
    """Any lists, also shorter and empty ones: Equation 4, and as of the clusters with the same
    members."""
    case = make_case(channels=17)
    generator = torch.Generator().manual_seed(4)
    index = torch.rand(47, 47, generator=generator).argsort(1)[:, :7]
    index[torch.rand(index.shape, generator=generator) < 0.2] = -1
    index[case["center_index"][0]] = -1
    lists = {**case, "neighborhoods": Neighborhoods.from_lists(index, case["positions"])}
    out = scored_merge(**lists, impl=impl)
    assert not out[0].any()
    torch.testing.assert_close(out.double(), by_definition(lists), rtol=1e-5, atol=1e-5)
    rows, mask = case["neighborhoods"].members()
    same = Neighborhoods.from_lists(rows.masked_fill(~mask, -1), case["positions"])
    torch.testing.assert_close(
        scored_merge(**{**case, "neighborhoods": same}, impl=impl), scored_merge(**case, impl=impl)
    )


def test_merging_over_lists_is_as_accurate_as_eager():
    case = make_case(channels=17)
    index = torch.rand(47, 47, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :7]
    case["neighborhoods"] = Neighborhoods.from_lists(index, case["positions"])
    assert_as_accurate(scored_merge, case, ("features", "scores", *NET))


def parity(name):
    return lambda array: torch.from_numpy(PARITY[f"{name}_{array}"])


def packed_index(index, tokens):
    """(b, n, k) row numbers of each sample to row numbers of the packed batch."""
    return (index.long() + tokens * torch.arange(index.shape[0])[:, None, None]).flatten(0, 1)


def parity_leaves(get):
    names = {
        "weight": "weight_net.0.weight",
        "bias": "weight_net.0.bias",
        "norm_weight": "weight_net.1.weight",
        "norm_bias": "weight_net.1.bias",
        "after_norm_weight": "norm.weight",
        "after_norm_bias": "norm.bias",
        "linear_weight": "linear.weight",
        "linear_bias": "linear.bias",
    }
    return {n: (get(f"param_{key}").requires_grad_(), f"grad_{key}") for n, key in names.items()}


def after_merge(merged, leaves):
    norm = (leaves[n][0] for n in ("after_norm_weight", "after_norm_bias"))
    normalized = F.layer_norm(merged, merged.shape[1:], *norm)
    return F.linear(normalized, leaves["linear_weight"][0], leaves["linear_bias"][0])


def assert_parity(get, out, leaves):
    torch.testing.assert_close(out, get("out").flatten(0, 1), rtol=0, atol=1e-10)
    out.backward(get("cotangent").flatten(0, 1))
    for leaf, key in leaves.values():
        torch.testing.assert_close(leaf.grad, get(key).view_as(leaf), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["merge_s2", "merge_s4"])
def test_parity_of_merging(name):
    get = parity(name)
    samples, tokens, _ = get("features").shape
    clusters = make_clusters((tokens,) * samples, 8)
    lengths = [8] * (tokens // 8) + [tokens % 8] * (tokens % 8 > 0)
    offsets = torch.tensor([0, *np.cumsum(lengths * samples)], dtype=torch.int32)
    sizes, counts = clusters.sizes, clusters.counts
    clusters = Clusters(clusters.order, offsets, clusters.centers, sizes, counts, 8)
    first_members = get("neighbors")[..., ::8]
    cluster_index = packed_index(first_members // 8, -(-tokens // 8)).int()
    leaves = parity_leaves(get)
    leaves["features"] = get("features").flatten(0, 1).requires_grad_(), "grad_features"
    leaves["scores"] = get("scores").flatten().requires_grad_(), "grad_scores"
    merged = scored_merge(
        leaves["features"][0],
        leaves["scores"][0],
        get("positions").flatten(0, 1).float(),
        packed_index(get("kept")[..., None], tokens)[:, 0],
        Neighborhoods(cluster_index, clusters),
        **{n: leaves[n][0] for n in NET},
        impl="reference",
    )
    assert_parity(get, after_merge(merged, leaves), leaves)


@pytest.mark.parametrize("name", ["pointconv_grid", "pointconv_sparse"])
def test_parity_of_point_conv(name):
    get = parity(name)
    leaves = parity_leaves(get)
    leaves["features"] = get("features").flatten(0, 1).requires_grad_(), "grad_features"
    net = {n: leaves[n][0] for n in NET}
    # The released decoder subtracts the neighbor from the center.
    net["weight"] = net["weight"] * torch.tensor([-1, -1, 1, -1, -1])
    out = point_conv(
        leaves["features"][0],
        get("positions").flatten(0, 1).float(),
        packed_index(get("neighbors"), get("features").shape[1]),
        **net,
        impl="reference",
    )
    assert_parity(get, after_merge(out, leaves), leaves)


def test_reference_is_differentiable_twice():
    case = make_case((9,), 4, 2, channels=3)
    rows, mask = case["neighborhoods"].select(case["center_index"]).members()
    g = torch.Generator().manual_seed(3)
    positions = torch.rand(9, 2, generator=g) * 9  # apart: the distance has a kink at 0
    centers = (positions[case["center_index"]] + 0.1).double().requires_grad_()
    names = ("features", "scores", *NET)
    features, scores, *net = (case[n].double().requires_grad_() for n in names)
    inputs = (features, scores, positions.double().requires_grad_(), centers, *net)

    def function(features, scores, positions, centers, *net):
        return merge(features, scores, positions, centers, rows, mask, *net, 1e-5)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_relative_position_at_distance_zero(dimensions):
    delta = torch.zeros(3, dimensions, dtype=torch.float64, requires_grad=True)
    phi = relative_position(delta)
    (grad,) = torch.autograd.grad(phi.sum(), delta, create_graph=True)
    (second,) = torch.autograd.grad((phi * phi).sum() + grad.sum(), delta)
    assert phi.eq(0).all()
    assert grad.eq(1).all()  # of the differences alone
    assert second.isfinite().all()


@given(st.integers(0, 2**16), st.sampled_from([2, 3]), st.floats(0.1, 6.2))
def test_relative_position_under_rotation_and_scale(seed, dimensions, angle):
    g = torch.Generator().manual_seed(seed)
    delta = torch.randn(5, dimensions, generator=g).double()
    rotation = torch.eye(dimensions, dtype=torch.float64)
    c, s = np.cos(angle), np.sin(angle)
    rotation[:2, :2] = torch.tensor([[c, -s], [s, c]])
    distance = relative_position(delta)[:, dimensions]
    torch.testing.assert_close(relative_position(delta @ rotation.T)[:, dimensions], distance)
    direction = relative_position(delta)[:, dimensions + 1 :]
    torch.testing.assert_close(relative_position(delta * angle)[:, dimensions + 1 :], direction)


@given(shapes)
def test_cpu_is_as_accurate_as_eager(shape):
    assert_as_accurate(scored_merge, make_case(**shape), ("features", "scores", *NET))


@given(shapes, st.booleans())
def test_cpu_point_conv_is_as_accurate_as_eager(shape, elsewhere):
    case = make_case(**shape)
    tokens, dimensions = case["positions"].shape
    g = torch.Generator().manual_seed(shape["seed"] + 1)
    queries = 7 if elsewhere else tokens
    index = torch.randint(-1, max(tokens, 1), (queries, shape["num_clusters"]), generator=g)
    case = {n: case[n] for n in ("features", "positions", *NET)}
    case["neighbor_index"] = index if tokens else torch.full_like(index, -1)
    if elsewhere:
        case["center_positions"] = torch.randn(queries, dimensions, generator=g)
    assert_as_accurate(point_conv, case, ("features", *NET))


def small_nets(mid):
    """Of 60 cases: exact, as the reference in float32 has it, and fused."""
    kinds = ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "cpu"))
    for seed in range(60):
        sizes, drop = (9 + seed % 32, seed % 17), 0.3 * (seed % 3 == 0)
        shape = (sizes, 1 + seed % 9, 1 + seed % 4, 1 + seed % 20)
        case = make_case(*shape, drop=drop, seed=seed, mid=mid)
        names = ("features", "scores", *NET)
        yield [value_and_gradients(scored_merge, case, names, t, impl=i) for t, i in kinds]


def test_one_weight():
    """It is GELU(norm_bias) for all pairs, with a slope that may be nearly zero."""
    for exact, _, fused in small_nets(1):
        for name in ("out", "features", "scores", "norm_bias"):
            torch.testing.assert_close(fused[name].double(), exact[name], rtol=1e-5, atol=1e-4)
        assert not any(fused[name].any() for name in ("weight", "bias", "norm_weight"))


def test_two_weights():
    """Of them the norm leaves little but a sign, whose gradient is the difference of two numbers
    that are nearly the same: what is left of single cases is luck, not what is left of many."""
    ratios = []
    for exact, eager, fused in small_nets(2):
        for name in ("out", "features", "scores", "norm_weight", "norm_bias"):
            torch.testing.assert_close(fused[name].double(), exact[name], rtol=1e-4, atol=1e-4)
        scale = max(exact[n].abs().max() for n in NET)
        errors = [
            max((values[n] - exact[n]).abs().max() for n in ("weight", "bias"))
            for values in (fused, eager)
        ]
        assert errors[0] < 5e-3 * scale
        ratios.append(float(errors[0] / errors[1]))
    assert np.median(ratios) < 1, np.median(ratios)


def test_normal_distribution_and_density():
    @njit
    def evaluate(x, distribution, density):
        for i in range(0, len(x), 8):
            store(distribution, i, normal_distribution(load(x, i)))
            store(density, i, normal_density(load(x, i)))

    # A sample of all float32 numbers: the largest errors are at 5.2 to 5.5.
    numbers = np.arange(0, np.float32(12).view(np.int32), 701, dtype=np.int32).view(np.float32)
    x = np.concatenate([-numbers, numbers, np.linspace(5, 6, 80_000, dtype=np.float32)])
    x = x[: len(x) // 8 * 8]
    distribution, density = np.empty_like(x), np.empty_like(x)
    evaluate(x, distribution, density)
    exact = torch.special.ndtr(torch.from_numpy(x).double()).numpy()
    assert np.abs(distribution - exact).max() < 2.7e-7
    square = np.square(x.astype(np.float64))
    exact = np.exp(-square / 2) / np.sqrt(2 * np.pi)
    assert np.all(np.abs(density / exact - 1) < (2 + square) * 1e-7)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_samples_do_not_see_each_other(impl):
    case = make_case((20, 30))
    case["features"][25:] = float("nan")
    case["scores"][25:] = float("inf")
    mine = case["center_index"] < 20
    out = scored_merge(**case, impl=impl)
    assert out[mine].isfinite().all()
    case["center_index"] = case["center_index"][mine]
    assert torch.equal(scored_merge(**case, impl=impl), out[mine])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_translation_changes_nothing(impl):
    case = make_case()
    moved = case | {"positions": case["positions"] + torch.tensor([64.0, -32.0])}
    assert torch.equal(scored_merge(**case, impl=impl), scored_merge(**moved, impl=impl))


@pytest.mark.parametrize("mid", [4, 7])
def test_bits_do_not_depend_on_threads_or_runs(mid):
    case = make_case((3000,), num_clusters=6, channels=37, mid=mid)
    names = ("features", "scores", *NET)
    assert_same_for_any_threads(partial(value_and_gradients, scored_merge, case, names, impl="cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    case = make_case()
    case["features"] = case["features"].to(dtype)
    expected = scored_merge(**case | {"features": case["features"].float()}).to(dtype)
    assert torch.equal(scored_merge(**case), expected)
    reference = scored_merge(**case, impl="reference")
    assert reference.dtype == dtype
    torch.testing.assert_close(reference, expected)
    grads = value_and_gradients(scored_merge, case, ("features",), dtype)
    assert grads["features"].dtype == dtype


def test_autocast_keeps_the_weight_net_in_float32():
    case = make_case()
    expected = scored_merge(**case, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scored_merge(**case, impl="reference"), expected)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_empty_inputs(impl):
    names = ("features", "scores", *NET)
    for case in (
        make_case((0,)),
        make_case((0, 0)),
        make_case(channels=0),
        make_case(num_clusters=0),
    ):
        result = value_and_gradients(scored_merge, case, names, impl=impl)
        assert result["out"].shape == (len(case["center_index"]), 4 * case["features"].shape[1])
        assert all(value.eq(0).all() for value in result.values())
    case = make_case() | {"center_index": torch.empty(0, dtype=torch.int64)}
    assert value_and_gradients(scored_merge, case, names, impl=impl)["features"].eq(0).all()
    case = make_case()
    net = {n: case[n] for n in NET}
    index = torch.full((5, 3), -1)
    none = torch.empty(0, 7), torch.empty(0, 2)
    out = point_conv(*none, index, center_positions=torch.zeros(5, 2), **net, impl=impl)
    assert torch.equal(out, torch.zeros(5, 28))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_net_may_have_any_dtype(dtype):
    case = make_case(full=False)
    net = [case.pop(name).to(dtype) for name in NET]
    results = []
    for leaves in (net, [x.float() for x in net]):
        leaves = [x.requires_grad_() for x in leaves]
        out = scored_merge(**case, **dict(zip(NET, leaves, strict=True)), impl="cpu")
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for low, full in zip(*results, strict=True):
        assert torch.equal(low, full.to(low.dtype))
    assert {x.dtype for x in results[0][1:]} == {dtype}


@pytest.mark.parametrize("mid", [4, 7])
def test_opcheck(mid):
    case = make_case(mid=mid)
    chosen = case["neighborhoods"].select(case["center_index"])
    positions = case["positions"], case["positions"][case["center_index"]]
    lists = chosen.clusters.offsets, chosen.cluster_index
    floats = [case[n].requires_grad_() for n in ("features", "scores", *NET)]
    torch.library.opcheck(
        fused_merge, (*floats[:2], *positions, *lists, *floats[2:], 8, 1e-5, "cpu")
    )


def test_second_derivative_is_an_error():
    case = make_case()
    case["features"].requires_grad_()
    out = scored_merge(**case, impl="cpu")
    (grad,) = torch.autograd.grad((out * out).sum(), case["features"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_compiles_without_graph_breaks(impl):
    case = make_case()
    net = {n: case.pop(n) for n in NET}
    index = torch.arange(47 * 3).reshape(47, 3) % 47

    def both(features, positions):
        merged = scored_merge(**case | {"features": features}, **net, impl=impl)
        return (
            merged.sum() + point_conv(features, positions, index, **net, impl=impl).square().sum()
        )

    features = case["features"].clone().requires_grad_()
    both(features, case["positions"]).backward()
    compiled_features = case["features"].clone().requires_grad_()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    compiled(compiled_features, case["positions"]).backward()
    torch.testing.assert_close(compiled_features.grad, features.grad)


def peak_memory(function):
    """Bytes by which resident memory rises above its level before the call."""

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak memory")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def test_memory_does_not_grow_with_the_neighborhood():
    tokens, channels, num_clusters = 4000, 64, 40
    names = ("features", "scores", *NET)
    small = make_case((tokens,), 8, 2, channels)
    large = make_case((tokens,), 8, num_clusters, channels)
    value_and_gradients(scored_merge, small, names, impl="cpu")
    lists = large["neighborhoods"].cluster_index.nbytes
    rise = peak_memory(lambda: value_and_gradients(scored_merge, large, names, impl="cpu"))
    arrays = 6 * 4 * tokens * channels + 4 * 4 * len(large["center_index"]) * channels * 4
    gathered = len(large["center_index"]) * num_clusters * 8 * channels * 4
    assert rise < arrays + 4 * lists < gathered / 4


def test_weights_do_not_touch_each_other():
    """But for the LayerNorm over them: those that are alike give the same bits, wherever they are
    among the others, and as many more of the same leave the mean and the variance alone."""
    case = make_case(channels=19, mid=3)
    merged = scored_merge(**case, impl="cpu").view(-1, 3, 19)
    twice = case | {name: torch.cat([case[name], case[name]]) for name in NET}
    merged_twice = scored_merge(**twice, impl="cpu").view(-1, 2, 3, 19)
    torch.testing.assert_close(merged_twice[:, 0], merged)
    assert torch.equal(merged_twice[:, 0], merged_twice[:, 1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.rand(46)}, ValueError, r"scores: expected shape \(47\)"),
        ({"positions": torch.rand(47, 4)}, ValueError, r"positions: .* \(T, 2\) or \(T, 3\)"),
        ({"positions": torch.rand(46, 2)}, ValueError, "positions: expected shape"),
        ({"positions": torch.rand(47, 2).double()}, TypeError, "positions: expected dtype"),
        ({"features": torch.ones(47, 11, dtype=torch.int64)}, TypeError, "features: expected"),
        (
            {"center_index": torch.zeros(3)},
            TypeError,
            "center_index: expected dtype int32 or int64",
        ),
        ({"center_index": torch.tensor([47])}, IndexError, "center_index: .* below 47, got 47"),
        ({"center_index": torch.tensor([3, -1])}, IndexError, "center_index: .* 47, got -1; leave"),
        (
            {"center_index": torch.tensor([-2]), "impl": "reference"},
            IndexError,
            "center_index: expected rows from 0 to below 47, got -2",
        ),
        ({"weight": torch.rand(4, 7)}, ValueError, r"weight: expected shape \(M, 5\), or \(M, 2\)"),
        ({"norm_bias": torch.rand(5)}, ValueError, r"norm_bias: expected shape \(4\)"),
        ({"bias": torch.rand(4, device="meta")}, ValueError, "bias: expected a tensor on cpu"),
        ({"impl": "cuda"}, ValueError, "impl='cuda'"),
        ({"features": torch.rand(47, 11).double(), "impl": "cpu"}, ValueError, "float64"),
        ({"weight": torch.rand(0, 5)}, ValueError, "weight: expected at least one row"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        scored_merge(**make_case() | change)


def test_bad_rows():
    case = make_case()
    other = make_case((40,))["neighborhoods"]
    with pytest.raises(ValueError, match="neighborhoods: expected those of 47 tokens"):
        scored_merge(**case | {"neighborhoods": other})
    broken = case["neighborhoods"].cluster_index.clone()
    broken[case["center_index"][0], 0] = 99
    broken = Neighborhoods(broken, case["neighborhoods"].clusters)
    with pytest.raises(IndexError, match="99"):
        scored_merge(**case | {"neighborhoods": broken}, impl="cpu")
    net = {n: case[n] for n in NET}
    with pytest.raises(ValueError, match="neighbor_index: expected one row for each"):
        point_conv(case["features"], case["positions"], torch.zeros(5, 2).int(), **net)
    nan = torch.full((5, 2), float("nan"))
    index = torch.zeros(5, 2).int()
    with pytest.raises(ValueError, match="center_positions"):
        point_conv(case["features"], case["positions"], index, center_positions=nan, **net)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_eps_of_the_norm(impl):
    """By definition, of both ops, and in the gradients."""
    case, eps = make_case(drop=0.0), 0.7
    rows, mask = case["neighborhoods"].select(case["center_index"]).members()
    centers = case["positions"][case["center_index"]]
    z = relative_position(case["positions"][rows] - centers[:, None]) @ case["weight"].T
    z = z + case["bias"]
    z = z - z.mean(-1, keepdim=True)
    z = z / (z.square().mean(-1, keepdim=True) + eps).sqrt()
    weights = F.gelu(z * case["norm_weight"] + case["norm_bias"]) * mask[..., None]
    near = case["features"][rows]
    listed = torch.einsum("qsm,qsc->qmc", weights, near).flatten(1)
    scored = weights * case["scores"][rows][..., None]
    scored = torch.einsum("qsm,qsc->qmc", scored, near).flatten(1)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(scored_merge(**case, eps=eps, impl=impl), scored)
    net = {name: case[name] for name in NET}
    index = rows.masked_fill(~mask, -1)
    places = {"center_positions": centers, "eps": eps, "impl": impl}
    close(point_conv(case["features"], case["positions"], index, **net, **places), listed)
    names = ("features", "scores", *NET)
    exact = value_and_gradients(scored_merge, case, names, torch.float64, eps=eps, impl="reference")
    found = value_and_gradients(scored_merge, case, names, eps=eps, impl=impl)
    for name, value in exact.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def test_a_cluster_of_more_pairs_than_a_block():
    assert_as_accurate(scored_merge, make_case((150,), 75, 2), ("features", "scores", *NET))


def test_sums_over_chunks_may_cancel():
    """96 clusters of one token, three chunks: gradients of the first and the last cancel."""
    case = make_case((96,), 1, 1, channels=1, drop=0.0)
    case["center_index"] = torch.arange(96)
    case["neighborhoods"].cluster_index[:] = torch.arange(96)[:, None]
    case |= {"features": torch.ones(96, 1), "scores": torch.ones(96)}
    grads = []
    for large in (1e9, 0.0):
        leaf = case["norm_bias"].clone().requires_grad_()
        out = scored_merge(**case | {"norm_bias": leaf}, impl="cpu")
        cotangent = torch.ones_like(out)
        cotangent[:32], cotangent[64:] = large, -large
        grads += torch.autograd.grad(out, leaf, cotangent)
    torch.testing.assert_close(*grads)
