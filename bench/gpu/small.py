"""Every op forward and backward on a few tokens: what compute-sanitizer runs.

compute-sanitizer --tool memcheck python bench/gpu/small.py [--dtype float32] [--dimensions 2]
"""

from __future__ import annotations

import argparse
import sys

import torch

from pointformer import (
    TokenSet,
    deformable_attention,
    interpolate,
    knn,
    nearest_clusters,
    neighborhood_attention,
    point_conv,
    scored_merge,
    select_centers,
    weighted_gather,
)
from pointformer.geometry.clustering import CURVES

SIZES = (203, 0, 61)
CASES = [
    (dtype, dimensions) for dtype in ("float32", "bfloat16", "float16") for dimensions in (2, 3)
]


def leaf(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)


def run_all(device: torch.device, dtype: torch.dtype, dimensions: int) -> list[torch.Tensor]:
    """Outputs and gradients of all ops, on ragged samples; one is empty."""
    total, heads, channels = sum(SIZES), 2, 24
    results = []

    def differentiate(output: torch.Tensor, *leaves: torch.Tensor) -> None:
        results.extend([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])

    positions = torch.rand(total, dimensions, device=device) * 20
    features = torch.randn(total, heads * channels, device=device, dtype=dtype)
    extent = [(20.0,) * dimensions] * len(SIZES)
    for curve in CURVES:
        tokens = TokenSet(positions, features, SIZES, extent).cluster(8, curve=curve)
        for scope in ("token", "tile"):
            around = nearest_clusters(tokens.positions, tokens.clusters, 6, scope=scope)
            results.append(around.cluster_index)
    phi = 5 if dimensions == 2 else 7
    query, key, value = (leaf(total, heads, channels, device=device, dtype=dtype) for _ in range(3))
    learned = {
        "position_weight": leaf(heads, phi, device=device),
        "position_bias": leaf(heads, device=device),
        "blank_key": leaf(heads, channels, device=device),
        "blank_value": leaf(heads, channels, device=device),
    }
    out = neighborhood_attention(query, key, value, tokens.positions, around, **learned)
    differentiate(out, query, key, value, *learned.values())

    scores = torch.rand(total, device=device, requires_grad=True)
    centers, _ = select_centers(
        scores.detach(),
        tokens.positions,
        sizes=SIZES,
        extent=extent,
        rate=0.25,
        stride=2,
        lattice=False,
    )
    cells = TokenSet.from_grid([torch.zeros(1, *[6] * dimensions, device=device)] * 2)
    for prior in ("adaptive", "grid", None):
        chosen, _ = select_centers(
            torch.rand(cells.num_tokens, device=device),
            cells.positions,
            sizes=cells.sizes,
            extent=cells.extent,
            rate=0.25,
            stride=2,
            prior=prior,
        )
        results.append(chosen)
    rows = leaf(total, heads * channels, device=device, dtype=dtype)
    net = {
        "weight": leaf(4, phi, device=device),
        "bias": leaf(4, device=device),
        "norm_weight": leaf(4, device=device),
        "norm_bias": leaf(4, device=device),
    }
    out = scored_merge(rows, scores, tokens.positions, centers, around, **net)
    differentiate(out, rows, scores, *net.values())

    nearest = knn(tokens.positions, 5, sizes=SIZES)
    out = point_conv(rows, tokens.positions, nearest, **net)
    differentiate(out, rows, *net.values())

    power = torch.full((1,), 2.0, device=device, requires_grad=True)
    sizes = {"sizes": SIZES, "query_sizes": SIZES}
    out = interpolate(rows, tokens.positions, positions, k=4, power=power, **sizes)
    differentiate(out, rows, power)

    shares = leaf(total, 5, device=device)
    differentiate(weighted_gather(rows, nearest, shares), rows, shares)
    if dimensions == 2:
        offsets, weights = (
            leaf(72, heads, 2, 3, 2, device=device),
            leaf(72, heads, 2, 3, device=device),
        )
        lookup = torch.randint(-1, total, (72, 2, 4), device=device)
        out = deformable_attention(
            key,
            tokens.positions,
            offsets,
            weights,
            cells.positions,
            cells.sample_index,
            lookup,
            extent=cells.extent,
            power=power,
        )
        differentiate(out, key, offsets, weights, power)
    return results


def check(device: torch.device, dtype: str, dimensions: int) -> int:
    """The number of results of `run_all`, which all have to be finite."""
    torch.manual_seed(0)
    results = run_all(device, getattr(torch, dtype), dimensions)
    bad = sum(not torch.isfinite(result).all() for result in results)
    if bad:
        raise ValueError(f"{dtype}, {dimensions}-D: {bad} of {len(results)} results are not finite")
    return len(results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; all by default")
    parser.add_argument("--dimensions", type=int, help="2 or 3; both by default")
    options = parser.parse_args()
    for dtype, dimensions in CASES:
        if options.dtype in (None, dtype) and options.dimensions in (None, dimensions):
            count = check(torch.device(options.device), dtype, dimensions)
            print(f"{dtype}, {dimensions}-D: {count} results, all finite", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
