"""What AFF-Tiny's ops move and what their Triton kernels issue, counted without a GPU.

    python bench/gpu/instructions.py [--size 512x1024 --batch 1] [--write]

A training step of a model of random weights (Mask2Former's decoder, bfloat16) runs once on the CPU
on a random picture. Prints one line per stage, op and pass, of one call of those that are alike:
bytes that it must move, and operations; bytes that its kernels take from the L2 cache, where they
read rows several times; the least time of an H100 for bytes and operations (floor) and to issue the
kernels' instructions, and the largest of floor, issue and L2 (bound). Then for each kernel its
programs, the instructions of a warp outside of loops and in a round of each loop, and how many
rounds, from the machine code. Weighted sums, which the model does not use, are made up.

`--write` puts the lines into bench/results/instructions.jsonl, in place of those of the installed
version of Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
import triton

from pointformer.models import create_model
from pointformer.profiling import OPS
from pointformer.profiling.launches import HOPPER, Launch, code_of, launches_of
from pointformer.profiling.ops import Call
from pointformer.profiling.record import record
from pointformer.profiling.report import Row, h100_limits

TABLE = Path(__file__).parents[1] / "results" / "instructions.jsonl"


def kernel(launch: Launch) -> dict[str, object]:
    return {
        "kernel": launch.variant.name,
        "programs": prod(launch.grid),
        "warps": launch.variant.num_warps,
        "instructions": {k: round(v, 2) for k, v in code_of(launch.variant).per_round().items()},
        "rounds": {k: round(v, 3) for k, v in launch.rounds.items()},
        "issued": round(launch.instructions()),
    }


def weighted_sums(queries: int) -> Call:
    """Of nine rows of 64 channels each, near each other as on a curve."""
    start = torch.arange(queries)[:, None].clamp(max=queries - 9)
    arguments = {
        "features": torch.randn(queries, 64).bfloat16(),
        "index": (start + torch.arange(9)).int(),
        "weights": torch.rand(queries, 9),
    }
    op = OPS["weighted_gather"]
    output = op.function(**arguments)
    work = {direction: count(arguments, output) for direction, count in op.work.items()}
    traffic = {direction: count(arguments, output) for direction, count in op.traffic.items()}
    return Call("weighted_gather", "made up", work, traffic, arguments)


def rows(height: int, width: int, batch: int) -> Iterator[dict[str, object]]:
    """One after the other, since each kernel takes seconds to compile."""
    torch.manual_seed(0)
    model = create_model("aff_tiny", head="mask2former").bfloat16().train()
    images = torch.randn(batch, 3, height, width).bfloat16()
    limits = h100_limits(torch.bfloat16)
    for call in [*record(model, images, backward=True), weighted_sums(height * width // 16)]:
        if call.name not in OPS:
            continue
        for direction, launches in launches_of(call.name, call.arguments, call.work).items():
            kernels = [kernel(launch) for launch in launches]
            work, traffic = call.work[direction], call.traffic.get(direction)
            row = Row(
                call.stage,
                call.name,
                direction,
                call.count,
                work,
                traffic and traffic.bytes,
                floor=limits.floor(work),
                issue=HOPPER.issue(sum(launch.instructions() for launch in launches)),
            )
            yield {**row.as_dict(), "kernels": kernels}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="512x1024", help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="pictures (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="keep them in bench/results")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels cannot be compiled while interpreting")
    height, width = (int(side) for side in options.size.split("x"))
    shape = f"{options.size} batch {options.batch}"
    found = []
    for row in rows(height, width, options.batch):
        found.append({"triton": triton.__version__, "shape": shape} | row)
        print(json.dumps(found[-1]), flush=True)
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
