"""Which order keeps near tokens together: curves times clouds, as a table.

    python bench/locality.py [--data FOLDER] [--count N] [--write]

For each cloud and order the share of the 48 nearest tokens that the default neighborhood (six
clusters of eight) holds, over 1,000 tokens, and the number of clusters that the neighborhoods of 16
consecutive tokens name together, which is what attention in tiles reads. k-means is the yardstick:
its clusters are as round as can be, but of any size, and neighborhoods are six of those.

`--data` is a folder with `lidar_ign` and `modelnet10`; clouds from there are left out without it.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree

from pointformer import Clusters, balanced_cluster, nearest_clusters, select_centers

RESULTS = Path(__file__).parent / "results" / "locality.jsonl"
ORDERS = {
    "hilbert": {"curve": "hilbert"},
    "hilbert, plain": {"curve": "hilbert", "anchors": False},
    "hilbert, not adaptive": {"curve": "hilbert", "adaptive": False},
    "morton": {"curve": "morton"},
    "peano": {"curve": "peano"},
    "snake": {"curve": "snake"},
    "kd": {"curve": "kd"},
}
QUERIES, NEAREST, TILE = 1000, 48, 16


def clouds(count: int, data: Path | None) -> Iterator[tuple[str, np.ndarray]]:
    """Names and positions (T, D), about `count` of them."""
    rng = np.random.default_rng(0)
    for d in (2, 3):
        even = rng.random((count, d)) * 100
        normal = rng.normal(size=(count, d))
        yield f"uniform {d}-D", even
        middles = rng.random((5, d)) * 1000
        yield f"five blobs {d}-D", middles[rng.integers(0, 5, count)] + normal
        for exponent in (3, 6, 12):
            stray = even.copy()
            stray[7] = 10.0**exponent
            yield f"uniform and a stray at 1e{exponent} {d}-D", stray
        strays = even.copy()
        strays[::100] *= 1e6
        yield f"uniform and 1% strays {d}-D", strays
        radius = 10 ** (rng.random((count, 1)) * 6)
        yield f"log radius {d}-D", radius * normal / np.linalg.norm(normal, axis=1, keepdims=True)
        yield f"two far clouds {d}-D", even + 1e5 * (np.arange(count) % 2)[:, None]
        yield f"duplicates {d}-D", even[rng.integers(0, count // 4, count)]
        yield f"line {d}-D", rng.random((count, 1)) * 100 + 1e-3 * normal
    sheet = rng.random((count, 3)) * 100
    sheet[:, 2] = 10 * np.sin(sheet[:, 0] / 10) + 10 * np.cos(sheet[:, 1] / 15)
    yield "hilly sheet", sheet
    yield "sphere", normal / np.linalg.norm(normal, axis=1, keepdims=True)
    yield "image tokens, 1/4 kept", image_tokens(rng, 2 * int(count**0.5), 1)
    yield "image tokens, 1/16 kept", image_tokens(rng, 4 * int(count**0.5), 2)
    if data is None:
        return
    for name in ("dense_77055_627755", "sparse_0382_6565"):
        tile = np.load(data / "lidar_ign" / f"{name}.npz")["xyz_cm"] / 100.0
        tile -= tile.min(0)
        yield f"lidar {name.split('_')[0]}", tile
    tile[5] = 1e6
    yield "lidar sparse and a stray", tile
    models = np.load(data / "modelnet10" / "modelnet10_1024.npz")
    for row in (0, 150, 340, 520, 700):
        kind = models["classes"][models["test_label"][row]]
        yield f"ModelNet10 {kind}", models["test_xyz"][row] / 2047.0


def image_tokens(rng: np.random.Generator, side: int, merges: int) -> np.ndarray:
    """What merging keeps of a grid whose scores are high around some edges."""
    y, x = np.mgrid[:side, :side] / side
    score = np.zeros((side, side))
    for _ in range(12):
        cx, cy, radius = rng.random(3) * (1, 1, 0.2)
        score += np.exp(-(((np.hypot(x - cx, y - cy) - radius) / 0.02) ** 2))
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
    positions = torch.from_numpy(cells).float()
    for merge in range(merges):
        values = torch.from_numpy(score).float()[positions[:, 1].long(), positions[:, 0].long()]
        index, _ = select_centers(
            values.clamp(max=1), positions, extent=(side, side), rate=0.25, stride=2 ** (merge + 1)
        )
        positions = positions[index]
    return positions.double().numpy()


def k_means(positions: torch.Tensor, count: int) -> Clusters:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clusters that got empty
        _, labels = kmeans2(positions.double().numpy(), count, iter=8, minit="points", rng=0)
    order = np.argsort(labels, kind="stable")
    members = np.bincount(labels)
    lengths = torch.from_numpy(members[members > 0])
    offsets = torch.cat([lengths[:0], lengths.new_zeros(1), lengths.cumsum(0)])
    assignment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    centers = torch.zeros(len(lengths), positions.shape[1], dtype=torch.float64)
    centers.index_add_(0, assignment, positions[order].double())
    centers = (centers / lengths[:, None]).float()
    sizes, counts = (len(positions),), (len(lengths),)
    return Clusters(
        torch.from_numpy(order), offsets.int(), centers, sizes, counts, int(lengths.max())
    )


def locality(positions: torch.Tensor, clusters: Clusters) -> dict[str, float]:
    ordered = positions[clusters.order]
    neighborhoods = nearest_clusters(ordered, clusters, 6)
    rng = np.random.default_rng(1)
    rows = torch.from_numpy(rng.choice(len(ordered), min(QUERIES, len(ordered)), replace=False))
    members, known = (part.numpy() for part in neighborhoods.select(rows).members())
    place = ordered.double().numpy()
    nearest, _ = cKDTree(place).query(place[rows], NEAREST)
    gaps = np.linalg.norm(place[members] - place[rows][:, None], axis=2)
    # Any of equally far tokens will do, as many as are among the nearest.
    held = ((gaps <= nearest[:, -1:] * (1 + 1e-9)) & known).sum(1).clip(max=NEAREST)
    tiles = neighborhoods.cluster_index[: len(ordered) // TILE * TILE].view(-1, TILE * 6)
    named = tiles.sort(1).values
    union = 1 + (named[:, 1:] != named[:, :-1]).sum(1)
    return {
        "share": round(float(held.mean()) / NEAREST, 4),
        "tokens": round(float(known.sum(1).mean()), 2),
        "union": round(float(union.float().mean()), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help=f"to {RESULTS.name}")
    options = parser.parse_args()
    lines = []
    print(
        f"{'share of the nearest':36s}" + "".join(f"{name[:10]:>11s}" for name in ORDERS), "k-means"
    )
    for name, cloud in clouds(options.count, options.data):
        positions = torch.from_numpy(np.ascontiguousarray(cloud)).float()
        row = {order: balanced_cluster(positions, **given) for order, given in ORDERS.items()}
        if len(positions) <= 20_000:
            row["k-means"] = k_means(positions, -(-len(positions) // 8))
        found = {order: locality(positions, clusters) for order, clusters in row.items()}
        print(
            f"{name:36s}" + "".join(f"{value['share']:11.3f}" for value in found.values()),
            flush=True,
        )
        for order, value in found.items():
            lines.append({"cloud": name, "count": len(positions), "order": order, **value})
    if options.write:
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
