"""Neighborhood merging in Triton's interpreter, values and gradients, against float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.fake_gpu import dirty_memory, fake_gpu
from helpers.gradients import value_and_gradients
from helpers.merge import NET, assert_as_accurate, make_case, weight_counts
from helpers.strategies import tokens
from pointformer import (
    Neighborhoods,
    TokenSet,
    balanced_cluster,
    nearest_clusters,
    point_conv,
    scored_merge,
)
from pointformer.kernels.merge import fused_merge
from pointformer.kernels.triton import merge as kernels
from pointformer.kernels.triton.runtime import INTERPRETED, Variant

if not INTERPRETED:
    reason = "kernels run compiled here: set TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)

MERGED = ("features", "scores", *NET)


def random_net(generator, width, mid=4):
    sizes = {"weight": (mid, width), "bias": (mid,), "norm_weight": (mid,), "norm_bias": (mid,)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


options = st.fixed_dictionaries(
    {
        "channels": st.integers(1, 40),
        "full": st.booleans(),
        "mid": weight_counts(32),
        "seed": st.integers(0, 2**16),
    }
)


@given(
    sample=tokens(max_size=12, max_samples=2),
    cluster_size=st.sampled_from([4, 8, 20]),
    num_clusters=st.integers(1, 3),
    drop=st.sampled_from([0.0, 0.3]),
    options=options,
)
def test_merge_is_as_accurate_as_eager(sample, cluster_size, num_clusters, drop, options):
    clusters = balanced_cluster(sample.positions, cluster_size, sizes=sample.sizes)
    positions = sample.positions[clusters.order]
    count, dimensions = positions.shape
    g = torch.Generator().manual_seed(options["seed"])
    neighborhoods = nearest_clusters(positions, clusters, num_clusters)
    index = neighborhoods.cluster_index
    index[torch.rand(index.shape, generator=g) < drop] = -1
    case = {
        "features": torch.randn(count, options["channels"], generator=g),
        "scores": torch.rand(count, generator=g),
        "positions": positions,
        "center_index": torch.randperm(count, generator=g)[: (count + 3) // 4],
        "neighborhoods": neighborhoods,
        **random_net(g, 2 * dimensions + 1 if options["full"] else dimensions, options["mid"]),
    }
    assert_as_accurate(scored_merge, case, MERGED, "triton", memory=dirty_memory)


@given(
    sample=tokens(max_size=4, max_samples=2), k=st.integers(1, 20), elsewhere=st.booleans(),
    options=options,
)  # fmt: skip
def test_point_conv_is_as_accurate_as_eager(sample, k, elsewhere, options):
    count, dimensions = sample.positions.shape
    g = torch.Generator().manual_seed(options["seed"])
    queries = 3 if elsewhere else count
    index = torch.randint(-1, max(count, 1), (queries, k), generator=g)
    case = {
        "features": torch.randn(count, options["channels"], generator=g),
        "positions": sample.positions,
        "neighbor_index": index if count else torch.full_like(index, -1),
        **random_net(g, 2 * dimensions + 1 if options["full"] else dimensions, options["mid"]),
    }
    if elsewhere:
        case["center_positions"] = torch.randn(queries, dimensions, generator=g)
    assert_as_accurate(point_conv, case, ("features", *NET), "triton", memory=dirty_memory)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_clusters": 10, "cluster_size": 4},  # more clusters than are looked up together
        {"cluster_size": 20, "channels": 70},  # more tokens than rows of a product, uneven chunks
        {
            "sizes": (21,),
            "cluster_size": 2,
            "channels": 272,
            "num_clusters": 2,
        },  # blocks of channels
        {"sizes": (5, 0, 1, 16), "channels": 16},
        *({"sizes": (9, 4), "channels": 18, "mid": mid} for mid in (3, 8, 17)),
        {"sizes": (13,), "dimensions": 3, "cluster_size": 20, "channels": 48, "mid": 12},
    ],
)
def test_shapes_that_need_several_blocks(shape):
    assert_as_accurate(scored_merge, make_case(**shape), MERGED, "triton", memory=dirty_memory)


def test_gradients_computed_together_or_apart():
    """In one kernel, as for bfloat16, whose arithmetic the interpreter lacks."""
    case = make_case()
    with mock.patch.object(kernels, "_backward_parts", return_value=("both",)):
        together = value_and_gradients(scored_merge, case, MERGED, impl="triton")
    apart = value_and_gradients(scored_merge, case, MERGED, impl="triton")
    for name, value in together.items():
        torch.testing.assert_close(value, apart[name], rtol=1e-5, atol=1e-5)


def test_the_order_of_centers_changes_nothing():
    case = make_case()
    expected = value_and_gradients(scored_merge, case, MERGED, impl="triton")
    with (
        mock.patch.object(kernels, "_CACHE", 0),
        mock.patch.object(kernels, "_ENOUGH_PROGRAMS", 3),
    ):
        result = value_and_gradients(scored_merge, case, MERGED, impl="triton")
    assert torch.equal(result["out"], expected["out"])
    assert torch.equal(result["features"], expected["features"])
    for name in NET:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-5, atol=1e-5)


def test_a_cluster_listed_twice_counts_twice():
    case = make_case(num_clusters=3)
    case["neighborhoods"].cluster_index[:, 1] = case["neighborhoods"].cluster_index[:, 0]
    assert_as_accurate(scored_merge, case, MERGED, "triton", memory=dirty_memory)


@pytest.mark.parametrize("mid", [4, 6])
def test_lists_in_place_of_clusters(mid):
    """Any lists, also shorter and empty ones."""
    case = make_case(channels=17, mid=mid)
    index = torch.rand(47, 47, generator=torch.Generator().manual_seed(4)).argsort(1)[:, :7]
    index[::3, 4:] = -1
    index[case["center_index"][0]] = -1
    case["neighborhoods"] = Neighborhoods.from_lists(index, case["positions"])
    assert_as_accurate(scored_merge, case, MERGED, "triton", memory=dirty_memory)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_samples_do_not_see_each_other():
    case = make_case((20, 30))
    case["features"][20:] = float("nan")
    case["scores"][20:] = float("inf")
    mine = case["center_index"] < 20
    out = scored_merge(**case, impl="triton")
    assert out[mine].isfinite().all()
    features = case["features"].requires_grad_()
    scored_merge(**case, impl="triton")[mine].sum().backward()
    assert features.grad[:20].isfinite().all()


def test_centers_do_not_see_each_other():
    """Where one has fewer tokens than the other, and where it has none."""
    case = make_case((24,), cluster_size=8)
    index = case["neighborhoods"].cluster_index
    index[:] = torch.tensor([0, -1, -1])
    expected = scored_merge(**case, impl="triton")
    case["features"][8:] = float("nan")
    index[case["center_index"][::2]] = torch.tensor([1, 2, 0], dtype=torch.int32)
    assert torch.equal(scored_merge(**case, impl="triton")[1::2], expected[1::2])
    index[case["center_index"][1::2]] = -1
    assert scored_merge(**case, impl="triton")[1::2].eq(0).all()


def test_entries_out_of_range_are_left_out():
    case = make_case()
    index = case["neighborhoods"].cluster_index
    index[:, 0] = -1
    expected = scored_merge(**case, impl="triton")
    index[:, 0] = 99
    assert torch.equal(scored_merge(**case, impl="triton"), expected)


def test_features_beyond_2_31_elements():
    """In memory that is reserved only: the merge of the last cluster touches 8 rows of it."""
    rows = (1 << 31) // 16 + 8
    g = torch.Generator().manual_seed(0)
    try:
        features = torch.empty(rows, 16, dtype=torch.float16)
        scores, positions = torch.empty(rows), torch.empty(rows, 2)
    except RuntimeError:
        pytest.skip("needs 6 GB of address space")
    for tensor in (features, scores, positions):
        tensor[-8:] = torch.randn(tensor[-8:].shape, generator=g)
    net = random_net(g, 5).values()
    rest = (torch.zeros(3, 1, dtype=torch.int32), *net, 8, 1e-5)
    results = []
    for first in (0, rows - 8):
        tensors = [x[rows - 8 - first :] for x in (features, scores, positions)]
        offsets = torch.tensor([first, first + 8], dtype=torch.int32)
        arguments = (*tensors, positions[-3:], offsets, *rest)
        out = kernels.forward(*arguments)
        grads = kernels.backward(out, *arguments)
        results.append((out, *(x[-8:] for x in grads)))
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)


def test_translation_changes_nothing():
    case = make_case()
    moved = case | {"positions": case["positions"] + torch.tensor([64.0, -32.0])}
    assert torch.equal(scored_merge(**case, impl="triton"), scored_merge(**moved, impl="triton"))


@pytest.mark.parametrize("mid", [4, 7])
def test_half_precision_is_rounded_once(mid):
    case = make_case(mid=mid)
    case["features"] = case["features"].half()
    expected = scored_merge(**case | {"features": case["features"].float()}, impl="triton").half()
    assert torch.equal(scored_merge(**case, impl="triton"), expected)
    grads = value_and_gradients(scored_merge, case, ("features",), torch.float16, impl="triton")
    assert grads["features"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_net_is_read_in_its_dtype(dtype):
    case = make_case(full=False) | {"features": torch.randn(47, 16)}
    case |= {name: case[name].to(dtype) for name in ("features", *NET)}
    expected = value_and_gradients(scored_merge, case, NET, impl="triton")
    result = value_and_gradients(scored_merge, case, NET, dtype, impl="triton")
    assert torch.equal(result["out"], expected["out"])
    for name in NET:  # the interpreter cuts numbers off where a GPU rounds them
        assert result[name].dtype == dtype
        torch.testing.assert_close(
            result[name].float(), expected[name], rtol=torch.finfo(dtype).eps, atol=0
        )


def test_empty_inputs():
    for case in (
        make_case((0,)),
        make_case((0, 0)),
        make_case(channels=0),
        make_case(num_clusters=0),
    ):
        with dirty_memory():
            result = value_and_gradients(scored_merge, case, MERGED, impl="triton")
        assert result["out"].shape == (len(case["center_index"]), 4 * case["features"].shape[1])
        assert all(value.eq(0).all() for value in result.values())
    case = make_case() | {"center_index": torch.empty(0, dtype=torch.int64)}
    assert value_and_gradients(scored_merge, case, MERGED, impl="triton")["features"].eq(0).all()
    net = {name: case[name] for name in NET}
    index = torch.full((5, 3), -1)
    none = torch.empty(0, 7), torch.empty(0, 2)
    with dirty_memory():
        out = point_conv(*none, index, center_positions=torch.zeros(5, 2), **net, impl="triton")
    assert torch.equal(out, torch.zeros(5, 28))


def fused_arguments(case, impl):
    chosen = case["neighborhoods"].select(case["center_index"])
    positions = case["positions"], case["positions"][case["center_index"]]
    lists = chosen.clusters.offsets, chosen.cluster_index
    floats = [case[name].requires_grad_() for name in MERGED]
    size = chosen.clusters.cluster_size
    return (*floats[:2], *positions, *lists, *floats[2:], size, 1e-5, impl)


def test_registered_op():
    torch.library.opcheck(fused_merge, fused_arguments(make_case((9,), channels=3), "triton"))


def test_compiles_into_one_graph():
    case = make_case((9,), channels=3)
    features = case.pop("features").requires_grad_()

    def run(features):
        return scored_merge(features, **case, impl="triton").square().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(run(features), features)
    (grad,) = torch.autograd.grad(compiled(features), features)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("large", [False, True])
def test_a_uniform_batch_can_be_captured(large):
    """Neither the public op nor what the kernels' launchers do beside launching waits."""
    limits = mock.patch.multiple(kernels, _CACHE=0 if large else 1 << 30)
    with fake_gpu(), limits, mock.patch.object(Variant, "launch"):
        cells = TokenSet.from_grid(torch.rand(2, 24, 8, 12, device="cuda")).cluster()
        neighborhoods = nearest_clusters(cells.positions, cells.clusters)
        centers = torch.arange(0, 192, 4, device="cuda")
        net = {n: torch.rand((4, 5) if n == "weight" else 4, device="cuda") for n in NET}
        scores = torch.rand(192, device="cuda")
        tensors = (cells.features, scores, cells.positions, centers, neighborhoods)
        assert scored_merge(*tensors, **net).shape == (48, 96)
        chosen = neighborhoods.select(centers)
        inputs = (
            cells.features, scores, cells.positions, cells.positions[centers],
            cells.clusters.offsets, chosen.cluster_index, *net.values(), 8, 1e-5,
        )  # fmt: skip
        out = kernels.forward(*inputs)
        grads = kernels.backward(out, *inputs)
        for x, grad in zip((*inputs[:2], *inputs[6:10]), grads, strict=True):
            assert grad.shape == x.shape
            assert grad.device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.rand(47, 11).double()}, "features are float64"),
        ({name: torch.rand((33, 5) if name == "weight" else 33) for name in NET}, "M = 33 rows"),
    ],
)
def test_what_kernels_cannot_do(change, message):
    with pytest.raises(ValueError, match=f"{message}.*use impl='reference'"):
        scored_merge(**make_case() | change, impl="triton")
