"""What models of objects find: AP from the best score on, of kinds of pictures, and by size.

    python bench/study/instances.py MODEL RECIPE DATA [field=value ...]
    python bench/study/instances.py                     (the table only)

Objects are shown from the one of 16 scores with which AP at IoU 0.5 of all pictures is best. Kinds
are what the column `mode` of DATA/index.csv says, if there is one: gray and stained pictures of
nuclei. A line for each model is added to the results, unless it is there, and instances.md is made
of them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import RESULTS
from tables import page_of, shares
from trained import Trained, measured_once

from pointformer.evaluation import predictions
from pointformer.metrics import InstanceAP, RecallBySize
from pointformer.train.run import MIN_SCORES

INSTANCES = RESULTS.with_name("instances.jsonl")
SIDES = (7, 16, 32)  # pixels: limits between the groups of sizes


def main(arguments: Sequence[str] | None = None) -> None:
    measured_once(__doc__, arguments, INSTANCES, measure, page)


def measure(trained: Trained) -> dict[str, Any]:
    """The numbers of a line."""
    validation, task = trained.validation, trained.task
    kinds = kinds_in(Path(trained.recipe.data.path or ""))
    precision, names = InstanceAP(min_scores=MIN_SCORES), []
    recalls = {score: RecallBySize(task.categories, SIDES, score) for score in MIN_SCORES}
    indices = range(len(validation))
    for annotation, _, predicted in predictions(
        trained.model, task, validation, indices, **trained.sight()
    ):
        names.append(annotation.name)
        truth = task.truth(annotation)
        precision.update(predicted, truth)
        for recall in recalls.values():
            recall.update(predicted, truth)
    best = precision.best_min_score()
    shown = MIN_SCORES.index(best)

    def of(kind: str | None) -> InstanceAP:
        """Of pictures of one kind, or of all."""
        chosen = InstanceAP(min_scores=(best,))
        chosen.counts = [
            counts[shown, None]
            for name, counts in zip(names, precision.counts, strict=True)
            if kind is None or kinds.get(name) == kind
        ]
        return chosen

    scores, by_size = of(None).scores(), recalls[best].scores()
    return {
        "min_score": best,
        "precision": round(scores.pooled[0], 4),
        "mean": round(scores.mean, 4),
        "counts": [
            scores.true_positives[0],
            scores.false_positives[0],
            scores.false_negatives[0],
        ],
        "kinds": {
            kind: [len(chosen.counts), round(chosen.scores().pooled[0], 4)]
            for kind in sorted({kinds[name] for name in names if name in kinds})
            for chosen in (of(kind),)
        },
        "classes": [category.name for category in task.categories],
        "sides": SIDES,
        "found": by_size.found.tolist(),
        "annotated": by_size.annotated.tolist(),
        "parameters": sum(weight.numel() for weight in trained.model.parameters()),
        "multiply_adds": trained.multiply_adds(),
    }


def kinds_in(data: Path) -> dict[str, str]:
    """Of pictures by name; empty if the data set does not say."""
    index = data / "index.csv"
    if not index.is_file():
        return {}
    with index.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row["mode"] for row in csv.DictReader(file) if "mode" in row}


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    rows = []
    for line in lines:
        found, annotated = (
            [sum(of_class) for of_class in zip(*line[name], strict=True)]
            for name in ("found", "annotated")
        )
        kinds = (f"{100 * ap:.1f} ({kind}, {many})" for kind, (many, ap) in line["kinds"].items())
        rows.append(
            [
                line["model"],
                f"{line['data']} ({line['pictures']})",
                f"{line['min_score']:g}",
                f"{100 * line['precision']:.1f}",
                ", ".join(kinds),
                f"{100 * line['mean']:.1f}",
                " / ".join(map(str, line["counts"])),
                shares(found, annotated),
                f"{line['parameters'] / 1e6:.2f}",
                f"{line['multiply_adds'] / 1e6:.0f}",
            ]
        )
    limits = " / ".join(map(str, SIDES))
    names = (
        "model", "data (pictures)", "shown from", "AP at IoU 0.5, %", "of kinds (pictures)",
        "mean AP, %", "found / in vain / missed, of any class",
        f"found with its class, %: below {limits} px / above", "M parameters", "M multiply-adds",
    )  # fmt: skip
    return page_of("What models of objects find", "instances.py", names, rows)


if __name__ == "__main__":
    main()
