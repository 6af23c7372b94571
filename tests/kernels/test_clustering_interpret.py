"""Balanced clustering in Triton's interpreter: order and centers of the CPU, bit for bit."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_gpu import dirty_memory, fake_gpu
from helpers.strategies import KINDS, UNEVEN, full_lattice, tokens
from pointformer import TokenSet, balanced_cluster
from pointformer.kernels.clustering import fused_cluster_centers, fused_curve_keys, fused_kd_keys
from pointformer.kernels.triton import clustering as kernels
from pointformer.kernels.triton.runtime import INTERPRETED

PARITY = Path(__file__).parents[1] / "parity"
CURVES = ("hilbert", "morton", "peano", "snake", "kd")

if not INTERPRETED:
    reason = "kernels run compiled here: set TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def many_tokens_per_program():
    """What a program costs here hardly depends on its tokens."""
    with mock.patch.object(kernels, "_BLOCK", 512):
        yield


options = st.fixed_dictionaries(
    {
        "curve": st.sampled_from(CURVES),
        "anchors": st.booleans(),
        "remainder": st.sampled_from(["spread", "last"]),
        "cluster_size": st.sampled_from([1, 3, 8]),
        "global_size": st.sampled_from([0, 0, 10]),
    }
)


def assert_equal(first, second):
    assert torch.equal(first.order, second.order)
    assert torch.equal(first.offsets, second.offsets)
    assert torch.equal(first.centers, second.centers)


@given(
    sample=tokens(kinds=KINDS + UNEVEN, max_size=35, max_samples=3),
    options=options,
    measured=st.booleans(),
)
def test_clusters_are_those_of_the_cpu(sample, options, measured):
    extent = None if measured else sample.extent

    def run(impl):
        return balanced_cluster(
            sample.positions, sizes=sample.sizes, extent=extent, impl=impl, **options
        )

    with dirty_memory():
        ours = run("triton")
    assert_equal(ours, run("cpu"))


@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=3),
    uniform=st.booleans(),
    curve=st.sampled_from(CURVES),
)
def test_the_walk_over_every_grid(shape, uniform, curve):
    """A token per cell: the keys count the cells as the curve visits them."""
    other = shape if uniform else shape[::-1]
    lattices = [full_lattice(sides) for sides in (shape, other)]
    kwargs = {"sizes": [len(lattice) for lattice in lattices], "extent": [shape, other]}
    clusters = [
        balanced_cluster(torch.cat(lattices), 1, curve=curve, impl=impl, **kwargs)
        for impl in ("triton", "cpu")
    ]
    assert_equal(*clusters)


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_origins_and_long_canvases(curve, dimensions):
    generator = torch.Generator().manual_seed(1)
    extent = (700.0, 2.5, 1.0)[:dimensions]
    origin = (-300.0, 7.0, 0.25)[:dimensions]
    unit = torch.rand(90, dimensions, generator=generator)
    positions = unit * torch.tensor(extent) + torch.tensor(origin)
    positions[0], positions[1] = -1e6, 1e6  # outside
    clusters = [
        balanced_cluster(positions, 4, extent=extent, origin=origin, curve=curve, impl=impl)
        for impl in ("triton", "cpu")
    ]
    assert_equal(*clusters)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_released_order(stage):
    stored = np.load(PARITY / "mini_160x192.npz")
    positions = full_lattice((48, 40))
    for i in range(1, stage):
        positions = positions[stored[f"s{i}_order"][0].astype(np.int64)]
        positions = positions[stored[f"s{i}_kept"][0].astype(np.int64)]
    result = balanced_cluster(
        positions, extent=(48, 40), curve="snake", remainder="last", global_size=48, impl="triton"
    )
    assert np.array_equal(result.order, stored[f"s{stage}_order"][0])
    if stage < 4:
        assert np.array_equal(result.centers, stored[f"s{stage}_cluster_mean"][0])


@pytest.mark.parametrize("anchors", [True, False])
def test_registered_ops(anchors):
    positions = torch.rand(40, 2)
    side, cells = (0.25, 4) if anchors else (2.0**-16, 2**16)
    grids = ([0.0] * 4, [side] * 4, [cells] * 4, [0, 1])
    arguments = (positions, [15, 25], *grids, "hilbert", anchors, "triton")
    torch.library.opcheck(fused_curve_keys, arguments)
    order, offsets = torch.randperm(40), torch.tensor([0, 20, 23, 40], dtype=torch.int32)
    torch.library.opcheck(fused_cluster_centers, (positions, order, offsets, "triton"))
    first, last, back = torch.tensor([[0, 1, 1], [1, 3, 3], [0, 2, 2]])
    torch.library.opcheck(fused_kd_keys, (positions, order, offsets, first, last, back, "triton"))


def test_compiles_in_one_graph():
    def run(positions):
        clusters = balanced_cluster(positions, sizes=[32, 16], extent=(16, 16), impl="triton")
        return clusters.order, clusters.centers

    positions = torch.rand(48, 2) * 16
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(compiled(positions), run(positions), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"curve": "snake", "remainder": "last", "cluster_size": 7},
        {"anchors": False, "cluster_size": 7},
        {"global_size": 100},
    ],
)
@pytest.mark.parametrize("widths", [(12, 12, 12), (12, 9, 15)])
def test_batches_can_be_captured(options, widths):
    """Uniform ones and ragged ones: nothing is copied from the host."""
    with fake_gpu():
        maps = [torch.rand(5, 8, width, device="cuda") for width in widths]
        tokens = TokenSet.from_grid(maps).cluster(**options)
        assert tokens.features.shape == (288, 5)
        assert tokens.clusters.centers.device.type == "cuda"
        assert tokens.sample_index.shape == (288,)
        back = tokens.to_grid()
        assert [tuple(m.shape) for m in back] == [(5, 8, width) for width in widths]


def test_too_many_tokens_are_an_error():
    positions = torch.zeros(1, 2).expand(2**28 + 1, 2)
    with pytest.raises(ValueError, match=r"positions has 268435457 rows.*impl='reference'"):
        balanced_cluster(positions, extent=(1, 1), check_values=False, impl="triton")
