"""What each op must move and do, and what its kernels will read, before any GPU ran them.

    python bench/gpu/predict.py [--out bench/results/predicted_traffic.json]

Models of random weights run once on the CPU on random pictures, in the dtype of the prediction;
bytes, operations and rows are counted from the clusters and lists that they made. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from pointformer.models import create_model
from pointformer.profiling import Limits, describe_machine, profile

H200 = Limits(bandwidth=4.3e12, rate=790e12)  # a measured copy, and bfloat16
CASES = [  # model, (height, width), pictures
    ("aff_mini", (224, 224), 64),
    ("aff_tiny", (224, 224), 64),
    ("aff_small", (224, 224), 64),
    ("aff_tiny", (512, 512), 8),
    ("aff_tiny", (1024, 2048), 8),
]


def predict(model: str, size: tuple[int, int], batch: int) -> dict[str, object]:
    torch.manual_seed(0)
    network = create_model(model).eval().bfloat16()
    images = torch.randn(batch, 3, *size).bfloat16()
    rows = profile(network, images, H200, backward=True)
    return {
        "model": model,
        "images": [batch, 3, *size],
        "dtype": "bf16",
        "rows": [row.as_dict() for row in rows],
    }


def one_line_per_row(report: dict[str, Any]) -> str:
    """As JSON that people can read, too."""
    rows: list[str] = []

    def placeholder(row: dict[str, object]) -> str:
        rows.append(json.dumps(row))
        return f"row {len(rows) - 1}"

    cases = [case | {"rows": [placeholder(r) for r in case["rows"]]} for case in report["cases"]]
    text = json.dumps(report | {"cases": cases}, indent=1)
    for index, row in enumerate(rows):
        text = text.replace(f'"row {index}"', row)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "results" / "predicted_traffic.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python bench/gpu/predict.py",
        "machine": describe_machine(torch.device("cpu")),
        "floor": "H200: 4.3 TB/s (a measured copy), 790 TFLOP/s (bfloat16)",
        "note": (
            "Counted on the CPU from clusters and lists of models of random weights (seed 0) on "
            "random pictures. Rows sum all calls of a stage. predicted_l2_bytes: what the programs "
            "of the Triton kernels read and write, with tiles of 32 queries. Rows per token: "
            "attention forward, key rows (and as many value rows); backward, those and the query "
            "rows of the pass for keys and values; merge, feature or gradient rows."
        ),
        "cases": [],
    }
    for case in CASES:
        print(*case, file=sys.stderr)
        report["cases"].append(predict(*case))
    options.out.write_text(one_line_per_row(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
