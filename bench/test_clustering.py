"""Clustering against a bare sort, a batch against one sample, and selection of centers."""

import pytest
import torch

from pointformer import balanced_cluster, knn, nearest_clusters, select_centers


def points(count, dimensions, side):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, dimensions, generator=generator) * side


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("curve", ["hilbert", "morton", "peano", "snake", "kd"])
def test_a_million_points(compare, curve, dimensions):
    """Goal: at most 3x the time of sorting as many random integers: torch_sort at least 0.33x."""
    positions = points(1_000_000, dimensions, 1000)
    integers = torch.randint(-(2**63), 2**63 - 1, (1_000_000,))
    compare(
        cpu=lambda: balanced_cluster(positions, extent=(1000,) * dimensions, curve=curve),
        torch_sort=lambda: torch.sort(integers),
    )


@pytest.mark.parametrize("size", [784, 3136])
@pytest.mark.parametrize("curve", ["hilbert", "snake"])
def test_64_samples(compare, curve, size):
    """Goal: at most 1.3x the time of one sample: one_sample at least 0.77x."""
    positions = points(64 * size, 2, 56)
    compare(
        batch=lambda: balanced_cluster(positions, sizes=[size] * 64, extent=(56, 56), curve=curve),
        one_sample=lambda: balanced_cluster(positions, extent=(448, 448), curve=curve),
    )


@pytest.mark.parametrize("samples", [2_000, 10_000])
@pytest.mark.parametrize("measured", [True, False])
def test_many_samples(compare, measured, samples):
    """Goal: at most 2x (2,000) and 3x (10,000 samples) the time of one: at least 0.5x and 0.33x."""
    positions = points(40_000, 2, 10)
    sizes = [40_000 // samples - 1, 40_000 // samples + 1] * (samples // 2)
    sides = [(10 + sample / samples, 11.0) for sample in range(samples)]
    compare(
        batch=lambda: balanced_cluster(positions, sizes=sizes, extent=None if measured else sides),
        one_sample=lambda: balanced_cluster(positions, extent=None if measured else (10, 10)),
    )


def cloud(kind, count, dimensions):
    """Points on all scales, or on a sphere, or even ones with points far away or in five blobs."""
    even = points(count, dimensions, 100)
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(count, dimensions, generator=generator)
    if kind == "stray":
        even[count // 2] = 1e12
    elif kind == "strays":
        even[::100] *= 1e6
    elif kind == "blobs":
        even = (points(5, dimensions, 1e4) + 5 * normal.view(-1, 5, dimensions)).flatten(0, 1)
    elif kind == "heavy tails":
        even = normal / torch.randn(count, 1, generator=generator)
    elif kind == "sphere":
        even = normal / normal.norm(dim=1, keepdim=True)
    return even[torch.randperm(count, generator=generator)]


@pytest.mark.parametrize("kind", ["even", "stray", "strays", "blobs", "heavy tails", "sphere"])
@pytest.mark.parametrize("curve", ["hilbert", "morton", "peano", "snake", "kd"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_any_density(compare, dimensions, curve, kind):
    """Goals: at most 2x the time of even density: even at least 0.5x; at least 0.65 of the 48
    nearest tokens in a neighborhood along the Hilbert curve, 0.75 in 2-D.
    """

    def run(positions):
        clusters = balanced_cluster(positions, curve=curve)
        ordered = positions[clusters.order]
        return ordered, nearest_clusters(ordered, clusters)

    uneven, even = cloud(kind, 50_000, dimensions), cloud("even", 50_000, dimensions)
    ordered, neighborhoods = run(uneven)
    members, known = neighborhoods.select(torch.arange(0, len(ordered), 100)).members()
    nearest = knn(ordered, 48, query_positions=ordered[::100])
    found = (nearest[:, :, None] == members[:, None]) & known[:, None]
    print(f"\nshare of the 48 nearest: {found.any(2).float().mean():.3f}")
    compare(cpu=lambda: run(uneven), even=lambda: run(even))


@pytest.mark.parametrize("stride", [2, 4])
def test_select_centers(compare, stride):
    """The first two stages of AutoFocusFormer at 224 px, batch 8."""
    y, x = torch.meshgrid(torch.arange(56.0), torch.arange(56.0), indexing="ij")
    cells = torch.stack([x.flatten(), y.flatten()], 1)
    generator = torch.Generator().manual_seed(0)
    size = 3136 * 4 // stride**2
    rows = [torch.randperm(3136, generator=generator)[:size] for _ in range(8)]
    positions, scores = torch.cat([cells[r] for r in rows]), torch.rand(8 * size)
    kwargs = {"sizes": [size] * 8, "extent": (56, 56), "rate": 0.25, "stride": stride}
    compare(
        cpu=lambda: select_centers(scores, positions, **kwargs),
        reference=lambda: select_centers(scores, positions, impl="reference", **kwargs),
    )
