"""How often classifiers of pictures are right, and what they cost.

    python bench/study/classification.py MODEL RECIPE DATA [field=value ...]
    python bench/study/classification.py                     (the table only)

A line for each model is added to the results, unless it is there, and classification.md is made of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cells import RESULTS
from tables import page_of
from trained import Trained, measured_once

CLASSIFICATION = RESULTS.with_name("classification.jsonl")
SCORES = ("top-1 accuracy", "top-5 accuracy")


def main(arguments: Sequence[str] | None = None) -> None:
    measured_once(__doc__, arguments, CLASSIFICATION, measure, page)


def measure(trained: Trained) -> dict[str, Any]:
    """The numbers of a line."""
    scores = trained.scores()
    return {
        "scores": {name: scores[name] for name in SCORES},
        "budget": asdict(trained.recipe.budget),
        "parameters": sum(weight.numel() for weight in trained.model.parameters()),
        "multiply_adds": trained.multiply_adds(),
        "cpu_seconds": trained.cpu_seconds(),
    }


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    rows = [
        [
            line["model"],
            f"{line['data']} ({line['pictures']})",
            ", ".join(f"{n:g} {unit}" for unit, n in line["budget"].items() if n is not None),
            *(f"{100 * line['scores'][name]:.1f}" for name in SCORES),
            f"{line['parameters'] / 1e6:.2f}",
            f"{line['multiply_adds'] / 1e6:.0f}",
            f"{1e3 * line['cpu_seconds']:.0f}",
        ]
        for line in lines
    ]
    names = (
        "model", "data (pictures)", "trained for", *(f"{name}, %" for name in SCORES),
        "M parameters", "M multiply-adds", "CPU ms",
    )  # fmt: skip
    return page_of("Classifiers of pictures", "classification.py", names, rows)


if __name__ == "__main__":
    main()
