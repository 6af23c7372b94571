"""One model at many budgets: its score, work and time where the first merge keeps 1/2 to 1/32.

    python bench/study/budgets.py MODEL RECIPE DATA [field=value ...]
    python bench/study/budgets.py                    (the table and the plot only)

For a model that was trained with rates drawn at each step (`rates` of a recipe), beside one that
was not. A line for each rate is added to the results, unless it is there; budgets.md and
budgets.png are made of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import RESULTS
from tables import page_of
from trained import Trained, add_arguments, add_line, measured

from pointformer.rates import Rates

BUDGETS = RESULTS.with_name("budgets.jsonl")
PARTS = (2, 4, 8, 16, 32)  # one token in so many is kept


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, BUDGETS)
    results, lines = measured(
        parser, arguments, lambda trained, options: measure(trained, options.results), page
    )
    if lines:
        plot(lines, results.with_suffix(".png"))


def measure(trained: Trained, results: Path) -> None:
    """Add the lines that are not there yet."""
    about, model = trained.about(), trained.model
    done = trained.lines(results)
    for part in PARTS:
        rates = Rates.of(model).at(model, 1 / part)
        if any(line["rates"] == list(rates) for line in done):
            continue
        with model.reconfigured(rate=rates):
            found = {
                "scores": trained.scores(),
                "multiply_adds": trained.multiply_adds(),
                "cpu_seconds": trained.cpu_seconds(),
            }
        add_line(results, {**about, "rates": rates, **found})


def by_model(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Lines from the highest rate to the lowest, by model, data, samples and score."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["rates"], reverse=True):
        about = tuple(str(line[name]) for name in ("model", "weights", "data", "pictures", "score"))
        groups.setdefault(about, []).append(line)
    return groups


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    rows = [
        [
            model,
            f"{data} ({pictures})",
            f"1/{1 / line['rates'][0]:g}",
            f"{100 * (line['scores'][score] or 0.0):.1f}",
            score,
            f"{line['multiply_adds'] / 1e6:.0f}",
            f"{1e3 * line['cpu_seconds']:.0f}",
        ]
        for (model, _, data, pictures, score), group in by_model(lines).items()
        for line in group
    ]
    names = ("model", "data (samples)", "first rate", "score, %", "which score",
             "M multiply-adds", "CPU ms")  # fmt: skip
    return page_of("One model at many budgets", "budgets.py", names, rows)


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """The score over multiply-adds, and over time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    scales = (("multiply_adds", 1e-6, "million multiply-adds"), ("cpu_seconds", 1e3, "CPU ms"))
    for axis, (key, unit, label) in zip(axes, scales, strict=True):
        for (model, _, data, _, score), group in by_model(lines).items():
            x = [unit * line[key] for line in group]
            y = [100 * (line["scores"][score] or 0.0) for line in group]
            axis.plot(x, y, marker="o", label=f"{model}, {data}")
        axis.set(xlabel=label, ylabel="score, %")
        axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
