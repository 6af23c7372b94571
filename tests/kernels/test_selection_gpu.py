"""Selection of centers on a GPU: the rows of the CPU at size, repeatable, capturable."""

import pytest
import torch

from helpers.fake_gpu import dirty_memory
from helpers.strategies import full_lattice
from pointformer import select_centers

pytestmark = pytest.mark.gpu
PRIORS = ("adaptive", "grid", None)


def some_of_a_lattice(extent, share, seed):
    generator = torch.Generator().manual_seed(seed)
    positions = full_lattice(extent)
    kept = torch.rand(len(positions), generator=generator) < share
    kept |= (positions % 8 == 0).all(1)
    positions = positions[kept]
    return positions[torch.randperm(len(positions), generator=generator)]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("lattice", [True, False])
@pytest.mark.parametrize("extents", [[(500, 300)] * 3, [(512, 300), (1, 4000), (90, 70)]])
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_rows_are_those_of_the_cpu(extents, share, lattice, prior):
    parts = [some_of_a_lattice(extent, share, seed) for seed, extent in enumerate(extents)]
    positions = torch.cat(parts)
    if not lattice:
        positions += 0.3
    generator = torch.Generator().manual_seed(7)
    scores = torch.randint(0, 999, (len(positions),), generator=generator) / 999
    kwargs = {
        "sizes": [len(part) for part in parts], "extent": extents, "rate": 0.25, "stride": 2,
        "prior": prior, "lattice": lattice,
    }  # fmt: skip
    theirs, kept = select_centers(scores, positions, **kwargs)
    for _ in range(2):
        with dirty_memory():
            index, keep = select_centers(scores.cuda(), positions.cuda(), **kwargs)
        assert keep == kept
        assert torch.equal(index.cpu(), theirs)


@pytest.mark.parametrize("lattice", [True, False])
def test_a_graph_replays_and_nothing_waits(lattice):
    positions = full_lattice((64, 48)).repeat(2, 1).cuda()
    scores = torch.rand(6144, device="cuda")

    def run():
        return select_centers(
            scores, positions, sizes=(3072,) * 2, extent=(64, 48), rate=0.25, stride=2,
            lattice=lattice, check_values=False,
        )[0]  # fmt: skip

    run()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    scores.copy_(scores.flip(0))
    graph.replay()
    assert torch.equal(captured, run())
