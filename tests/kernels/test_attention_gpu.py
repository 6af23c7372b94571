"""Neighborhood attention on a GPU: accurate in all dtypes, at size, repeatable, capturable."""

import pytest
import torch

from helpers.attention import attend, check_against_float64, gradients, low_precision, make_inputs
from helpers.fake_gpu import dirty_memory
from pointformer import balanced_cluster, nearest_clusters
from pointformer.clusters import Clusters, Neighborhoods

pytestmark = pytest.mark.gpu


def to_gpu(inputs):
    tensors, positions, neighborhoods = inputs
    clusters = neighborhoods.clusters
    clusters = Clusters(
        *(x.cuda() for x in (clusters.order, clusters.offsets, clusters.centers)),
        *(clusters.sizes, clusters.counts, clusters.cluster_size),
    )
    neighborhoods = Neighborhoods(neighborhoods.cluster_index.cuda(), clusters)
    return {name: x.cuda() for name, x in tensors.items()}, positions.cuda(), neighborhoods


def lattice(side, heads, channels, dtype=torch.float32, samples=1, num_clusters=6, training=True):
    """Inputs on the GPU, from a jittered square lattice of side**2 tokens per sample."""
    generator = torch.Generator("cuda").manual_seed(0)
    axis = torch.arange(side, device="cuda", dtype=torch.float32)
    positions = torch.cartesian_prod(axis, axis).repeat(samples, 1)
    noise = torch.rand(positions.shape, generator=generator, device="cuda")
    positions = positions + noise * 0.5
    sizes = (side * side,) * samples
    clusters = balanced_cluster(positions, sizes=sizes, extent=((side, side),) * samples)
    positions = positions[clusters.order]
    neighborhoods = nearest_clusters(positions, clusters, num_clusters).with_plan(training=training)
    shapes = dict.fromkeys(("query", "key", "value"), (len(positions), heads, channels))
    shapes |= {"position_weight": (heads, 5), "position_bias": (heads,)}
    shapes |= dict.fromkeys(("blank_key", "blank_value"), (heads, channels))
    tensors = {
        name: torch.randn(
            shape, generator=generator, device="cuda", dtype=dtype if len(shape) == 3 else None
        )
        for name, shape in shapes.items()
    }
    return tensors, positions, neighborhoods


@pytest.mark.parametrize("channels", range(8, 136, 8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_matches_float64(dimensions, dtype, channels):
    options = {"sizes": (700, 0, 90, 3), "channels": channels, "cluster_size": 8, "num_clusters": 6}
    eager = None if dtype == torch.float32 else low_precision
    few = dtype != torch.float32 or channels <= 64
    for value_features in (0, 2 * dimensions + 1)[: 1 + few]:
        options["value_features"] = value_features
        inputs = to_gpu(make_inputs(dimensions=dimensions, **options))
        check_against_float64(inputs, dtype, impl="triton", eager=eager, memory=dirty_memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [0, 2, 5])
@pytest.mark.parametrize(
    ("cluster_size", "num_clusters"), [(1, 9), (5, 4), (8, 18), (24, 6), (40, 3)]
)
def test_other_neighborhoods(cluster_size, num_clusters, features, bias, blank, dtype):
    options = {"channels": 32, "features": features, "bias": bias, "blank": blank}
    inputs = make_inputs(
        sizes=(500, 21), cluster_size=cluster_size, num_clusters=num_clusters, **options
    )
    eager = None if dtype == torch.float32 else low_precision
    check_against_float64(to_gpu(inputs), dtype, impl="triton", eager=eager, memory=dirty_memory)


@pytest.mark.parametrize(("side", "heads", "channels"), [(128, 2, 16), (64, 4, 32), (32, 16, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stages(dtype, side, heads, channels):
    inputs = lattice(side, heads, channels, samples=2)
    eager = None if dtype == torch.float32 else low_precision
    check_against_float64(inputs, dtype, impl="triton", eager=eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_repeat(dtype):
    tensors, positions, neighborhoods = lattice(512, 2, 32, dtype, samples=4)
    results = []
    for _ in range(3):
        with dirty_memory():
            output, grads = gradients(tensors, positions, neighborhoods, tensors["value"])
        results.append([output, *grads.values()])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_equal_to_the_cpu_at_size():
    tensors, positions, neighborhoods = lattice(256, 2, 32)
    output = attend(tensors, positions, neighborhoods)
    clusters = neighborhoods.clusters
    clusters = Clusters(
        *(x.cpu() for x in (clusters.order, clusters.offsets, clusters.centers)),
        *(clusters.sizes, clusters.counts, clusters.cluster_size),
    )
    on_cpu = {name: x.cpu() for name, x in tensors.items()}
    lists = Neighborhoods(neighborhoods.cluster_index.cpu(), clusters)
    want = attend(on_cpu, positions.cpu(), lists, impl="cpu")
    torch.testing.assert_close(output.cpu(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strided", [False, True])
def test_offsets_beyond_32_bits(strided):
    """Samples are alike; so are their results, also where element offsets pass 2**31."""
    side, heads, channels = 256, 16, 128
    samples = (1 << 31) // (side * side * heads * channels) + 2
    rows = samples * side * side * heads * channels
    if torch.cuda.get_device_properties(0).total_memory < 2 * rows * 16:
        pytest.skip("needs a GPU with about 75 GB of memory")
    one, positions, neighborhoods = lattice(side, heads, channels, torch.bfloat16)
    many = lattice(side, 1, 8, samples=samples)
    positions, neighborhoods = positions.repeat(samples, 1), many[2]
    index = lattice(side, 1, 8)[2].cluster_index
    shift = neighborhoods.clusters.counts[0] * torch.arange(samples, device="cuda").int()
    index = (index[None] + shift[:, None, None]).flatten(0, 1)
    neighborhoods = Neighborhoods(index, neighborhoods.clusters).with_plan()
    tensors = dict(one)
    for name in ("query", "key", "value"):
        tensors[name] = one[name].repeat(samples, 1, 1)
    if strided:  # beyond 2**31 earlier
        pair = torch.stack([tensors.pop("key"), tensors.pop("value")], 2)
        tensors["key"], tensors["value"] = pair.unbind(2)
    with torch.no_grad():
        output = attend(tensors, positions, neighborhoods)
        arguments = (side * side, heads, channels)
        first, last = output[: side * side], output[-side * side :]
        assert last.shape == arguments
        assert torch.equal(first, last)
    del output, first, last
    _, grads = gradients(tensors, positions, neighborhoods, tensors["value"])
    for name in ("query", "key", "value"):
        assert torch.equal(grads[name][: side * side], grads[name][-side * side :])


def test_a_graph_replays():
    """Plan, forward and backward pass in one CUDA graph."""
    tensors, positions, neighborhoods = lattice(64, 2, 32, torch.bfloat16)
    bare = Neighborhoods(neighborhoods.cluster_index, neighborhoods.clusters)
    query = tensors["query"]

    def run():
        output, grads = gradients(tensors, positions, bare.with_plan(), tensors["value"])
        return [output, *grads.values()]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    query.copy_(query.flip(0))
    graph.replay()
    for ours, theirs in zip(captured, run(), strict=True):
        assert torch.equal(ours, theirs)
