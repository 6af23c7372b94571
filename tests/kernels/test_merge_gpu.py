"""Merging, PointConv and interpolation on a GPU: dtypes, sizes, repeatability, graphs."""

import pytest
import torch

from helpers.fake_gpu import dirty_memory
from helpers.merge import NET
from pointformer import (
    TokenSet,
    balanced_cluster,
    interpolate,
    knn,
    nearest_clusters,
    point_conv,
    scored_merge,
)
from pointformer.kernels.interpolate import fused_interpolate
from pointformer.kernels.merge import fused_merge

pytestmark = pytest.mark.gpu
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LEARNED = ("features", "scores", "power", *NET)


def random_net(dimensions):
    sizes = {"weight": (4, 2 * dimensions + 1), "bias": (4,), "norm_weight": (4,)}
    return {name: torch.randn(size, device="cuda") for name, size in sizes.items()} | {
        "norm_bias": torch.randn(4, device="cuda")
    }


def merge_case(tokens, channels, dimensions=2, cluster_size=8, num_clusters=6, dtype=torch.float32):
    positions = torch.rand(tokens, dimensions, device="cuda") * 256
    clusters = balanced_cluster(positions, cluster_size, sizes=(tokens // 3, tokens - tokens // 3))
    positions = positions[clusters.order]
    return {
        "features": torch.randn(tokens, channels, device="cuda").to(dtype),
        "scores": torch.rand(tokens, device="cuda"),
        "positions": positions,
        "center_index": torch.randperm(tokens, device="cuda")[: tokens // 4],
        "neighborhoods": nearest_clusters(positions, clusters, num_clusters),
        **random_net(dimensions),
    }


def conv_case(tokens, channels, dimensions=2, dtype=torch.float32):
    positions = torch.rand(tokens, dimensions, device="cuda")
    return {
        "features": torch.randn(tokens, channels, device="cuda").to(dtype),
        "positions": positions,
        "neighbor_index": knn(positions, 9),
        **random_net(dimensions),
    }


def interpolation_case(tokens, channels, dimensions=2, dtype=torch.float32):
    return {
        "features": torch.randn(tokens, channels, device="cuda").to(dtype),
        "positions": torch.rand(tokens, dimensions, device="cuda"),
        "query_positions": torch.rand(4 * tokens, dimensions, device="cuda"),
        "power": torch.tensor(6.0, device="cuda"),
    }


CASES = {
    "merge": (scored_merge, merge_case),
    "conv": (point_conv, conv_case),
    "interpolate": (interpolate, interpolation_case),
}


def with_gradients(op, case, **kwargs):
    names = [name for name in LEARNED if name in case]
    leaves = {name: case[name].detach().clone().requires_grad_() for name in names}
    out = op(**{**case, **leaves, **kwargs})
    g = torch.Generator(out.device).manual_seed(1)
    cotangent = torch.randn(out.shape, generator=g, device=out.device).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return dict(zip(("out", *names), (out.detach(), *grads), strict=True))


def in_float64(case):
    return {name: x.double() if name in LEARNED else x for name, x in case.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("channels", [11, 32, 64, 96, 320])
@pytest.mark.parametrize("name", CASES)
def test_is_as_accurate_as_eager(name, channels, dimensions, dtype):
    op, make = CASES[name]
    torch.manual_seed(0)
    case = make(900, channels, dimensions, dtype=dtype)
    exact = with_gradients(op, in_float64(case), impl="reference")
    eager = with_gradients(op, case, impl="reference")
    with dirty_memory():
        fused = with_gradients(op, case)
    largest = max(exact[n].abs().max() for n in NET if n in exact) if "weight" in exact else 0
    for n, value in exact.items():
        assert fused[n].dtype == eager[n].dtype
        scale = largest if n in NET else value.abs().max()
        if n == "power":  # a sum over all queries and channels, which may cancel
            scale = exact["out"].numel() ** 0.5
        allowed = 2 * (eager[n] - value).abs().max() + 4e-6 * scale + 1e-6
        error = (fused[n] - value).abs().max()
        assert error <= allowed, f"{n}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("cluster_size", [3, 8, 24, 32])
@pytest.mark.parametrize("num_clusters", [1, 6, 18])
def test_cluster_sizes(num_clusters, cluster_size):
    torch.manual_seed(1)
    case = merge_case(
        1500, 64, cluster_size=cluster_size, num_clusters=num_clusters, dtype=torch.bfloat16
    )
    exact = with_gradients(scored_merge, in_float64(case), impl="reference")
    fused = with_gradients(scored_merge, case)
    for name, value in exact.items():
        error = (fused[name] - value).abs().max() / value.abs().max()
        assert error < (2**-7 if name in ("out", "features") else 2**-6), name


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_runs(name, dtype):
    op, make = CASES[name]
    case = make(60_000, 96, dtype=dtype)
    first = with_gradients(op, case)
    for _ in range(10):
        with dirty_memory():
            again = with_gradients(op, case)
        assert all(torch.equal(again[n], value) for n, value in first.items())


def test_features_beyond_the_cache_are_merged_in_another_order():
    torch.manual_seed(2)
    case = merge_case(300_000, 64, dtype=torch.bfloat16)
    out = scored_merge(**case)
    some = torch.arange(0, len(case["center_index"]), 500, device="cuda")
    expected = scored_merge(**case | {"center_index": case["center_index"][some]}, impl="reference")
    torch.testing.assert_close(out[some], expected, rtol=2**-7, atol=2**-7)


def test_offsets_beyond_32_bits():
    """Element offsets of features, output and gradients pass 2**31 where rows do not."""
    channels = 256
    rows = (1 << 31) // channels + 1000
    if torch.cuda.get_device_properties(0).total_memory < 6 * 2 * rows * channels:
        pytest.skip("needs a GPU with about 30 GB of memory")
    g = torch.Generator("cuda").manual_seed(0)
    last = 1000
    features = torch.zeros(rows, channels, dtype=torch.bfloat16, device="cuda")
    features[-last:] = torch.randn(last, channels, generator=g, device="cuda")
    positions = torch.zeros(rows, 2, device="cuda")
    positions[-last:] = torch.rand(last, 2, generator=g, device="cuda")
    scores = torch.ones(rows, device="cuda")
    offsets = torch.arange(0, rows + 1, 8, dtype=torch.int32, device="cuda")
    index = torch.arange(len(offsets) - 101, len(offsets) - 1, dtype=torch.int32, device="cuda")
    centers = positions[-800::8].contiguous()
    net = random_net(2).values()
    lists = [(features, scores, positions, centers, offsets, index[:, None])]
    cut = offsets[-101:] - offsets[-101]
    small = (
        features[-800:],
        scores[-800:],
        positions[-800:],
        centers,
        cut,
        index[:, None] - index[0],
    )
    lists.append(small)
    results = []
    for arguments in lists:
        leaf = arguments[0].requires_grad_()
        out = fused_merge(leaf, *arguments[1:], *net, 8, 1e-5, "triton")
        (grad,) = torch.autograd.grad(out.float().square().sum(), leaf)
        results.append((out.detach(), grad[-800:].clone()))
        del grad
    for big, little in zip(*results, strict=True):
        torch.testing.assert_close(big, little)
    nearest = torch.arange(rows - 100, rows, dtype=torch.int32, device="cuda")[:, None]
    power = torch.tensor(6.0, device="cuda")
    query = positions[-100:].contiguous()
    with torch.no_grad():
        out = fused_interpolate(features, positions, query, nearest, power, 1e-11, "triton")
    torch.testing.assert_close(out, features[-100:].detach())


def test_output_beyond_32_bits():
    channels = 128
    queries = (1 << 31) // (4 * channels) + 1000
    if torch.cuda.get_device_properties(0).total_memory < 4 * 4 * queries * channels:
        pytest.skip("needs a GPU with about 10 GB of memory")
    torch.manual_seed(3)
    case = conv_case(64, channels, dtype=torch.bfloat16)
    case["neighbor_index"] = case["neighbor_index"].repeat(queries // 64, 1)
    case["center_positions"] = case["positions"].repeat(queries // 64, 1)
    out = point_conv(**case)
    torch.testing.assert_close(out[-64:], out[:64])


def test_graphs_replay():
    tokens = TokenSet.from_grid(torch.rand(2, 64, 64, 48, device="cuda")).cluster()
    neighborhoods = nearest_clusters(tokens.positions, tokens.clusters)
    features = tokens.features.clone().requires_grad_()
    scores = torch.rand(len(features), device="cuda", requires_grad=True)
    centers = torch.arange(0, len(features), 4, device="cuda")
    net = {name: x.requires_grad_() for name, x in random_net(2).items()}
    power = torch.tensor(6.0, device="cuda", requires_grad=True)
    index = knn(tokens.positions[centers], 4, query_positions=tokens.positions, sizes=(768, 768),
                query_sizes=(3072, 3072))  # fmt: skip
    leaves = (features, scores, power, *net.values())

    def step():
        out = scored_merge(features, scores, tokens.positions, centers, neighborhoods, **net)
        back = interpolate(
            out, tokens.positions[centers], tokens.positions, neighbor_index=index, power=power
        )
        return torch.autograd.grad(back.square().mean(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        features.copy_(torch.rand_like(features))
    graph.replay()
    for ours, theirs in zip(captured, step(), strict=True):
        assert torch.equal(ours, theirs)


def test_memory_of_a_step_does_not_grow_with_neighborhoods():
    case = merge_case(200_000, 64, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_gradients(scored_merge, case)
    rise = torch.cuda.max_memory_allocated() - before
    pairs = len(case["center_index"]) * 48
    assert rise < pairs * 64 * 2  # what a gathered copy of the features takes
