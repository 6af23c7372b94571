"""How much the scores of each merge matter: a model's score with those of one merge changed.

    python bench/study/stages.py MODEL RECIPE DATA [field=value ...]
    python bench/study/stages.py                     (the table only)

"shuffled": dealt anew among the tokens of each sample, "constant": all the same, but for noise by
which some of equal ones are kept. What is kept is then chance, or the prior's choice alone, and
what is merged is weighted wrongly, or alike. If that costs nothing, the merge might as well keep
any tokens. Of pictures the small objects found are a score, too. A line for each merge and change
is added to the results, unless it is there, and stages.md is made of them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS
from tables import page_of, spread
from torch import Tensor, nn
from trained import Trained, add_arguments, add_line, measured

from pointformer.models import Model
from pointformer.nn import ScoredMerge

_NOISE = 1e-3  # without it, the first rows would be kept, which lie in one corner
CHANGES = ("shuffled", "constant")
SMALL = "small"  # see `Trained.scores`
STAGES = RESULTS.with_name("stages.jsonl")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, STAGES)
    parser.add_argument("--seeds", type=int, default=3, help="how often scores are shuffled")
    measured(
        parser,
        arguments,
        lambda trained, options: measure(trained, options.seeds, options.results),
        page,
    )


def measure(trained: Trained, seeds: int, results: Path) -> None:
    """Add the lines that are not there yet."""
    keys: list[tuple[str, int | None, int]] = [("none", None, 0)]
    for number in range(len(merges_of(trained.model))):
        keys += [("shuffled", number, seed) for seed in range(seeds)]
        keys += [("constant", number, 0)]
    about = trained.about()
    done = {(line["change"], line["merge"], line["seed"]) for line in trained.lines(results)}
    for change, merge, seed in keys:
        if (change, merge, seed) not in done:
            with changed_scores(trained.model, merge, change, seed):
                scores = trained.scores()
            line = {"change": change, "merge": merge, "seed": seed}
            add_line(results, {**about, **line, "scores": scores})


def merges_of(model: Model) -> list[tuple[nn.Module, ScoredMerge]]:
    """The stages whose merges score their tokens, and these."""
    stages: Any = model.backbone.stages
    return [(stage, stage.merge) for stage in stages if isinstance(stage.merge, ScoredMerge)]


@contextlib.contextmanager
def changed_scores(model: Model, merge: int | None, change: str, seed: int = 0) -> Iterator[None]:
    """Within it the scores of one merge, numbered from 0, are not what the model computes.

    Args:
        merge: `None` changes nothing.
        change: see above.
        seed: of the shuffling.
    """
    if merge is None:
        yield
        return
    stage, scored = merges_of(model)[merge]
    sizes: list[int] = []

    def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        sizes[:] = inputs[0].sizes

    def replace(module: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor:
        return torch.cat([changes[change](part) for part in logits.split(sizes)])

    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "shuffled": lambda x: x[torch.randperm(len(x), generator=generator)],
        "constant": lambda x: x.mean(0) + _NOISE * torch.rand(x.shape, generator=generator),
    }
    handles = [
        stage.register_forward_pre_hook(remember),
        scored.score.register_forward_hook(replace),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown: what each change costs, in points."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        about = tuple(str(line[name]) for name in ("model", "weights", "data", "pictures", "score"))
        groups.setdefault(about, []).append(line)
    rows = []
    parts = [
        (about, score, lines) for about, lines in groups.items() for score in (about[4], SMALL)
    ]
    for (model, _, data, pictures, _), score, of_model in parts:
        group = [line for line in of_model if score in line["scores"]]
        whole = [line["scores"][score] or 0.0 for line in group if line["merge"] is None]
        if not whole:
            continue
        for merge in sorted({line["merge"] for line in group} - {None}):
            name = "small objects found" if score == SMALL else score
            row = [model, f"{data} ({pictures})", name, f"{100 * whole[-1]:.1f}", str(merge + 1)]
            for change in CHANGES:
                lost = {
                    line["seed"]: 100 * (whole[-1] - (line["scores"][score] or 0.0))
                    for line in group
                    if (line["merge"], line["change"]) == (merge, change)
                }
                row += [spread([*lost.values()]) if lost else "", str(len(lost))]
            rows.append(row)
    changed = [name for change in CHANGES for name in (f"{change}, points lost", "times")]
    names = ("model", "data (samples)", "score", "as it is, %", "merge", *changed)
    title, more = "How much the scores of each merge matter", " Mean (standard deviation) of the "
    return page_of(title, "stages.py", names, rows, f"{more}seeds of shuffling.")


if __name__ == "__main__":
    main()
