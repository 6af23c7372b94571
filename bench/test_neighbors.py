"""Neighbor search on 131,072 points against torch-cluster."""

import pytest
import torch

from pointformer import balanced_cluster, knn, nearest_clusters

TOKENS = 512 * 256


def scene(kind):
    """(131072, 2) positions: a lattice, or 70% of the points in one blob."""
    if kind == "blob":
        generator = torch.Generator().manual_seed(0)
        positions = torch.rand(TOKENS, 2, generator=generator) * 512
        dense = TOKENS * 7 // 10
        positions[:dense] = torch.randn(dense, 2, generator=generator) * 8 + 200
        return positions
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(512.0), indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


@pytest.fixture
def torch_cluster():
    return pytest.importorskip("torch_cluster", reason="torch-cluster is not installed")


@pytest.mark.parametrize("kind", ["lattice", "shuffled", "blob"])
def test_nearest_clusters(compare, torch_cluster, kind):
    """Goals: at least 3.5x on the lattice, 1x with most points in one blob."""
    positions = scene(kind)
    clusters = balanced_cluster(positions, 8)
    positions = positions[clusters.order]
    if kind == "shuffled":  # the rows need not be in cluster order to be answered
        positions = positions[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))]
    compare(
        cpu=lambda: nearest_clusters(positions, clusters, 6),
        torch_cluster=lambda: torch_cluster.knn(clusters.centers, positions, 6),
    )


@pytest.mark.parametrize("kind", ["lattice", "blob"])
@pytest.mark.parametrize("k", [2, 4, 9])
def test_knn(compare, torch_cluster, kind, k):
    positions = scene(kind)
    compare(
        cpu=lambda: knn(positions, k),
        torch_cluster=lambda: torch_cluster.knn(positions, positions, k),
    )


@pytest.mark.parametrize("samples", [1, 64])
def test_samples_in_a_batch(benchmark, samples):
    """The same tokens as one sample or as 64."""
    positions = scene("lattice")
    sizes = (TOKENS // samples,) * samples
    clusters = balanced_cluster(positions, 8, sizes=sizes)
    positions = positions[clusters.order]
    benchmark.pedantic(lambda: nearest_clusters(positions, clusters, 6), rounds=7, warmup_rounds=1)
