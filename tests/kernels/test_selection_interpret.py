"""Selection of centers in Triton's interpreter: the rows of the CPU, in the same order."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.fake_gpu import dirty_memory, fake_gpu
from helpers.strategies import KINDS, UNEVEN, full_lattice, tokens
from pointformer import select_centers, spread_scores
from pointformer.kernels.selection import fused_select_from_nearest
from pointformer.kernels.triton import neighbors, selection
from pointformer.kernels.triton.runtime import INTERPRETED

PARITY = Path(__file__).parents[1] / "parity"
PRIORS = ("adaptive", "grid", None)

if not INTERPRETED:
    reason = "kernels run compiled here: set TRITON_INTERPRET=1"
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True, scope="module")
def many_tokens_per_program():
    """What a program costs here hardly depends on its tokens."""
    with (
        mock.patch.object(neighbors, "_QUERIES", 512),
        mock.patch.object(selection, "_BLOCK", 1024),
    ):
        yield


options = st.fixed_dictionaries(
    {
        "rate": st.sampled_from([0.1, 0.25, 0.5, 1.0]),
        "alpha": st.sampled_from([0.0, 1.0, 4.0]),
        "stride": st.sampled_from([1, 2, 4, 8]),
        "prior": st.sampled_from(PRIORS),
        "reserve": st.booleans(),
        "reserve_share": st.sampled_from([None, 0.3]),
        "lattice": st.sampled_from([True, True, False]),
    }
)


@given(
    sample=tokens(kinds=KINDS + UNEVEN, max_size=40, max_samples=3),
    options=options,
    measured=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_the_cpu(sample, options, measured, seed):
    extent = None if measured else sample.extent
    if options["lattice"]:
        sample.positions.clamp_(-1e6, 1e6).floor_()
    if options["lattice"] and not measured:
        sample.positions.clamp_(min=0)
        extent = [(1e6 + 1,) * sample.dimensions] * len(sample.sizes)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 16, (len(sample.positions),), generator=generator) / 16
    kwargs = {"sizes": sample.sizes, "extent": extent, **options}
    with dirty_memory():
        index, keep = select_centers(scores, sample.positions, impl="triton", **kwargs)
    expected, kept = select_centers(scores, sample.positions, impl="cpu", **kwargs)
    assert keep == kept
    assert torch.equal(index, expected)


def test_a_launch_has_the_block_of_what_was_compiled():
    """Variants are made once: another constant of the module later must not cut the grid."""
    positions = torch.stack(torch.meshgrid(*(torch.arange(20.0),) * 2, indexing="xy"), -1)
    arguments = torch.rand(400), positions.view(-1, 2)
    options = {"extent": (20, 20), "rate": 0.25, "stride": 2}
    expected, _ = select_centers(*arguments, impl="cpu", **options)
    for block in (64, 1024):
        with mock.patch.object(selection, "_BLOCK", block), dirty_memory():
            index, _ = select_centers(*arguments, impl="triton", **options)
        assert torch.equal(index, expected)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2, 3])
def test_released_selection(stage):
    stored = np.load(PARITY / "mini_160x192.npz")
    index, _ = select_centers(
        torch.from_numpy(stored[f"s{stage}_scores"][0]),
        torch.from_numpy(stored[f"s{stage}_positions"][0]).float(),
        extent=(48, 40), rate=0.25, stride=2**stage, impl="triton",
    )  # fmt: skip
    assert np.array_equal(index, stored[f"s{stage}_kept"][0])


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("gap", [1, 2, 3, 5, 2**13, 2**23])
def test_spacings_up_to_those_of_a_lone_token(gap, dimensions):
    """Pairs of tokens on nodes of all levels, and tokens far from all others."""
    nodes = torch.tensor([0, 1, 2, 4, 6, 8, 12, 2**13, 2**14, 2**23, 2**24 - 2])
    first = nodes[:, None].expand(-1, dimensions).float()
    second = first.clone()
    second[:, 0] = (second[:, 0] - gap).abs()
    scores = torch.zeros(22)
    for positions, sizes in ((torch.cat([first, second]), [22]), (first, [1] * 11)):
        kwargs = {
            "sizes": sizes, "extent": (2**24,) * dimensions, "rate": 0.5, "stride": 2, "alpha": 0.0,
            "reserve": False,
        }  # fmt: skip
        index, expected = (
            select_centers(scores[: len(positions)], positions, impl=impl, **kwargs)[0]
            for impl in ("triton", "reference")
        )
        assert torch.equal(index, expected)


def test_more_reserved_tokens_than_room():
    positions = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [2.0, 3.0]])
    kwargs = {"extent": (4, 4), "rate": 0.25, "stride": 2}
    index, keep = select_centers(torch.zeros(4), positions, impl="triton", **kwargs)
    assert (index.tolist(), keep) == ([1], (1,))


@pytest.mark.parametrize("prior", PRIORS)
def test_registered_op(prior):
    positions = full_lattice((6, 4))
    pair = torch.arange(48, dtype=torch.int32).view(24, 2) // 2 if prior == "adaptive" else None
    arguments = (torch.rand(24), positions, pair, [12, 12], [5, 6], 4.0, 2, prior == "grid", [4, 4])
    torch.library.opcheck(fused_select_from_nearest, (*arguments, "triton"))


def test_compiles_in_one_graph():
    def run(scores, positions):
        return select_centers(scores, positions, extent=(8, 8), rate=0.25, stride=2, impl="triton")[
            0
        ]

    scores, positions = torch.rand(64), full_lattice((8, 8))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(scores, positions), run(scores, positions))


@pytest.mark.parametrize("heights", [(6, 6), (4, 8)])
@pytest.mark.parametrize("lattice", [True, False])
@pytest.mark.parametrize("prior", PRIORS)
def test_batches_can_be_captured(prior, lattice, heights):
    """Uniform ones and ragged ones; without an `impl` it is Triton's that runs on a GPU."""
    with fake_gpu():
        positions = torch.rand(96, 2, device="cuda")
        sizes, extent = [8 * height for height in heights], [(8, height) for height in heights]
        kwargs = {"sizes": sizes, "extent": extent, "rate": 0.25, "stride": 2, "prior": prior}
        for impl in (None, "triton"):
            index, keep = select_centers(
                torch.rand(96, device="cuda"), positions, lattice=lattice, impl=impl, **kwargs
            )
            kept = tuple(size // 4 for size in sizes)
            assert (index.shape, index.device.type, keep) == ((24,), "cuda", kept)


def test_a_side_too_long_is_an_error():
    with pytest.raises(ValueError, match=r"extent has a side of 2147483649.*impl='reference'"):
        select_centers(
            torch.zeros(1), torch.zeros(1, 2), extent=(2**31 + 1, 1), rate=1, stride=1,
            impl="triton",
        )  # fmt: skip


@given(sample=tokens(kinds=KINDS, max_size=40, max_samples=3), neighbors=st.integers(1, 9))
def test_spread_scores_are_those_of_the_reference(sample, neighbors):
    generator = torch.Generator().manual_seed(neighbors)
    scores = torch.randint(0, 16, (len(sample.positions),), generator=generator) / 16
    options = {"sizes": sample.sizes, "spread": 0.3, "neighbors": neighbors}
    found = spread_scores(scores, sample.positions, impl="triton", **options)
    assert torch.equal(found, spread_scores(scores, sample.positions, impl="reference", **options))
