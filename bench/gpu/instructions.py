"""What the Triton kernels of AFF-Tiny's first stage issue, counted from machine code without a GPU.

    python bench/gpu/instructions.py [--size 1024x2048 --batch 8] [--write]

Prints one line per kernel: programs, instructions of a warp outside of loops and in a round of each
loop, how many rounds, and the least time in which an H100 issues all of it. `--write` puts them
into bench/results/instructions.jsonl, in place of those of the installed version of Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from math import prod
from pathlib import Path

import torch
import triton

import pointformer as pf
from pointformer.profiling.launches import HOPPER, Launch, code_of, launches_of

TABLE = Path(__file__).parents[1] / "results" / "instructions.jsonl"
NUM_CLUSTERS, CHANNELS, HEADS = 6, 64, 2  # clusters of eight, as the released model has them


def cases(height: int, width: int, batch: int) -> dict[str, dict[str, object]]:
    """Arguments of the stage's ops, in bfloat16, by name."""
    torch.manual_seed(0)
    grid = torch.randn(batch, CHANNELS, height // 4, width // 4).bfloat16()
    tokens = pf.TokenSet.from_grid(grid).cluster(8, curve="snake", remainder="last")
    neighborhoods = pf.nearest_clusters(tokens.positions, tokens.clusters, NUM_CLUSTERS)
    rows = (tokens.num_tokens, HEADS, CHANNELS // HEADS)
    scores = torch.rand(tokens.num_tokens)
    index, _ = pf.select_centers(
        scores, tokens.positions, sizes=tokens.sizes, extent=tokens.extent, rate=0.25, stride=4
    )
    attention = {name: torch.randn(rows).bfloat16() for name in ("query", "key", "value")}
    learned = {
        "position_weight": torch.randn(HEADS, 5),
        "position_bias": torch.randn(HEADS),
        "blank_key": torch.randn(rows[1:]),
        "blank_value": torch.randn(rows[1:]),
    }
    common = {"positions": tokens.positions, "neighborhoods": neighborhoods}
    net = {"weight": torch.randn(4, 5), "bias": torch.randn(4)}
    net |= {"norm_weight": torch.randn(4), "norm_bias": torch.randn(4)}
    merge = {"features": tokens.features, "scores": scores, "center_index": index}
    search = {"positions": tokens.positions, "clusters": tokens.clusters}
    return {
        "nearest_clusters": {**search, "num_clusters": NUM_CLUSTERS},
        "plan": {"self": neighborhoods, "training": True},
        "neighborhood_attention": {**attention, **common, **learned},
        "scored_merge": {**merge, **common, **net},
    }


def row(case: str, launch: Launch) -> dict[str, object]:
    instructions = launch.instructions()
    return {
        "op": case,
        "kernel": launch.variant.name,
        "programs": prod(launch.grid),
        "warps": launch.variant.num_warps,
        "instructions": {k: round(v, 2) for k, v in code_of(launch.variant).per_round().items()},
        "rounds": {k: round(v, 3) for k, v in launch.rounds.items()},
        "issued": round(instructions),
        "issue_us": round(HOPPER.issue(instructions) * 1e6, 2),
    }


def rows(height: int, width: int, batch: int) -> list[dict[str, object]]:
    found = []
    for name, arguments in cases(height, width, batch).items():
        passes = ["forward"] if name in ("nearest_clusters", "plan") else ["forward", "backward"]
        for direction, launches in launches_of(name, arguments, passes).items():
            found += [row(f"{name} {direction}", launch) for launch in launches]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1024x2048", help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pictures (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="keep them in bench/results")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels cannot be compiled while interpreting")
    height, width = (int(side) for side in options.size.split("x"))
    shape = f"{options.size} batch {options.batch}"
    version = {"triton": triton.__version__, "shape": shape}
    found = [version | line for line in rows(height, width, options.batch)]
    for line in found:
        print(json.dumps(line))
    if options.write:
        lines = TABLE.read_text().splitlines() if TABLE.exists() else []
        kept = [
            line
            for line in map(json.loads, lines)
            if (line["triton"], line["shape"]) != (triton.__version__, shape)
        ]
        TABLE.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
