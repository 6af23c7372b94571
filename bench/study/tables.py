"""Tables of the study, and a plot for each data set, made of the lines that run.py wrote.

    python bench/study/tables.py [--results FILE] [--out DIR]

writes study.md and study_DATA.png beside the results, or into DIR; and ablations.md of the lines in
ablations.jsonl, where it is beside the results.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ablations import ABLATION_RESULTS, BASE, CHANGES
from cells import ARMS, DATA, HEADS, RESULTS, SEEDS, read_lines

Line = dict[str, Any]
MAIN = {  # scores, by task
    "semantic": "mIoU",
    "classification": "top-1 accuracy",
    "instance": "AP at IoU 0.5 (TP / (TP + FP + FN))",
    "point_segmentation": "mIoU",
}
IOU = "IoU, "  # in the names of scores, before that of a class
FLAT = 0.97  # of a curve whose last tenth has at least this share of the loss of the one before
_SPREAD = ("spread", "light_spread", "spread_reach")
YARDSTICKS = {  # with which arms are compared, beside the grid, and which
    "grid_reach": ("spread_reach",),
    "grid_told": ("supervised", "spread"),
    "gradient": ("learned", "supervised"),
    "gradient_spread": ("learned_spread", *_SPREAD),
}
PLENTY = 4  # one token in so many: what few tokens in the right places are to reach
LEAST, MOST_LOST = 2.0, 1.0  # points of small objects won, and of the main score lost, if it pays


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help="folder (default: that of the results)")
    options = parser.parse_args(arguments)
    out = options.out or options.results.parent
    lines = newest(read_lines(options.results))
    (out / "study.md").write_text(page(lines), "utf-8")
    for data in DATA:
        own = [line for line in lines if line["cell"]["data"] == data]
        if own:
            plot(own, out / f"study_{data}.png")
    ablations = newest(read_lines(options.results.with_name(ABLATION_RESULTS.name)))
    if ablations:
        (out / "ablations.md").write_text(ablation_page(ablations), "utf-8")


def newest(lines: Sequence[Line]) -> list[Line]:
    """The last line of each cell."""
    return list({tuple(line["cell"].values()): line for line in lines}.values())


def page(lines: Sequence[Line]) -> str:
    """All tables, in Markdown."""
    parts = [
        "# Results of the study\n\nMade by `python bench/study/tables.py`; see ../study/README.md."
    ]
    for data, head in itertools.product(DATA, HEADS):
        kinds = {"data": data, "head": head}
        own = [line for line in lines if kinds.items() <= line["cell"].items()]
        if not own:
            continue
        first = own[0]
        score = MAIN[first["recipe"]["task"]]
        sides = [*map(str, first["scores"]["sides"])]
        limits = [
            f"below {sides[0]}",
            *map(" to ".join, itertools.pairwise(sides)),
            f"from {sides[-1]}",
        ]
        annotated = [
            sum(row[i] for row in first["scores"]["annotated"]) for i in range(len(limits))
        ]
        groups = ", ".join(f"{n} {name}" for n, name in zip(annotated, limits, strict=True))
        parts.append(
            f"## {data}, {head}\n\nMain score: {score}, on {first['scores']['pictures']} pictures. "
            f"Objects by their side in pixels: {groups}. Mean (standard deviation) of the seeds."
        )
        parts.append(table(own, score))
        parts += filter(None, [differences(own, score, "grid"), with_fewer(own, score)])
        others = [differences(own, score, over, arms) for over, arms in YARDSTICKS.items()]
        if others := [*filter(None, others)]:
            title = "Points over arms other than the grid"
            parts += [f"<details><summary>{title}</summary>", *others, "</details>"]
    return "\n\n".join(parts) + "\n"


def table(lines: Sequence[Line], score: str) -> str:
    """A row for each head, budget, number of steps and arm."""
    rows, overlaps = [], [name for name in lines[0]["scores"] if name.startswith(IOU)]
    for (head, budget, steps, arm), group in grouped(lines).items():
        found, annotated = (
            [
                sum(row[i] for line in group for row in line["scores"][name])
                for i in range(len(group[0]["scores"]["sides"]) + 1)
            ]
            for name in ("found", "annotated")
        )
        of_classes = [mean(line["scores"][name] or 0.0 for line in group) for name in overlaps]
        flat = [is_flat(line["curve"]["loss"]) for line in group]
        cells = [
            head,
            f"1/{budget}",
            str(steps),
            arm,
            str(len(group)),
            spread([100 * line["scores"]["small"] for line in group]),
            spread([100 * (line["scores"][score] or 0.0) for line in group]),
            *([shares(of_classes)] if overlaps else []),
            shares(found, annotated),
            f"{mean(line['multiply_adds_after'] for line in group) / 1e6:.0f}",
            f"{mean(line['multiply_adds'] for line in group) / 1e6:.0f}",
            f"{mean(line['parameters'] for line in group) / 1e6:.2f}",
            f"{sum(flat)} of {len(flat)}",
        ]
        rows.append(cells)
    classes = " / ".join(name.removeprefix(IOU) for name in overlaps)
    names = (
        "head", "budget", "steps", "arm", "seeds", "small found, %", "main score, %",
        *([f"IoU of {classes}, %"] if overlaps else []), "found by size, %",
        "M multiply-adds after the first stage", "in all", "M parameters", "flat",
    )  # fmt: skip
    return markdown(names, rows)


def ablation_page(lines: Sequence[Line]) -> str:
    """A row for each change of the base, in Markdown."""
    score = MAIN[lines[0]["recipe"]["task"]]
    by_change: dict[str, dict[int, Line]] = defaultdict(dict)
    for line in lines:
        by_change[line["cell"]["change"]][line["cell"]["seed"]] = line
    base, rows = by_change[BASE], []
    for change in (change for change in CHANGES if by_change.get(change)):
        group = [*by_change[change].values()]
        pairs = [(line, base[seed]) for seed, line in by_change[change].items() if seed in base]
        cells = [change, str(len(group))]
        for of in (lambda s: s["small"], lambda s: s[score] or 0.0):
            cells.append(spread([100 * of(line["scores"]) for line in group]))
            cells.append(spread(points(pairs, of)) if pairs and change != BASE else "")
        rows.append(
            [
                *cells,
                f"{mean(line['multiply_adds'] for line in group) / 1e6:.0f}",
                f"{1e3 * mean(line['cpu_seconds'] for line in group):.0f}",
                f"{sum(is_flat(line['curve']['loss']) for line in group)} of {len(group)}",
            ]
        )
    names = (
        "change", "seeds", "small found, %", "points over the base", f"{score}, %",
        "points over the base", "M multiply-adds", "CPU ms", "flat",
    )  # fmt: skip
    return (
        "# Results of the ablations\n\nMade by `python bench/study/tables.py`; see "
        "../study/README.md and ../study/ablations.py. Mean (standard deviation) of the seeds.\n\n"
        f"{markdown(names, rows)}\n"
    )


def is_flat(losses: Sequence[float]) -> bool:
    """Of tenths of the steps."""
    return len(losses) > 1 and losses[-1] >= FLAT * losses[-2]


def differences(
    lines: Sequence[Line], score: str, over: str, arms: Sequence[str] | None = None
) -> str:
    """Of arms (`None`: all) and the one `over`, seed by seed, in points; empty without pairs."""
    groups, rows = grouped(lines), []
    for (head, budget, steps, arm), group in groups.items():
        pairs = paired(group, groups.get((head, budget, steps, over), []))
        if arm == over or (arms is not None and arm not in arms) or not pairs:
            continue
        small = points(pairs, lambda s: s["small"])
        whole = points(pairs, lambda s: s[score] or 0.0)
        rows.append(
            [head, f"1/{budget}", str(steps), arm, str(len(pairs)), spread(small), spread(whole),
             verdict(small, whole, rising(pairs))]
        )  # fmt: skip
    names = (
        "head", "budget", "steps", "arm", "seeds", f"small found, points over {over}",
        f"{score}, points over {over}", "by the rule",
    )  # fmt: skip
    return markdown(names, rows) if rows else ""


def with_fewer(lines: Sequence[Line], score: str) -> str:
    """Of arms with fewer tokens than a grid of `PLENTY` what they have over it, seed by seed, in
    points; empty without pairs."""
    groups, rows = grouped(lines), []
    for (head, budget, steps, arm), group in groups.items():
        pairs = paired(group, groups.get((head, PLENTY, steps, "grid"), []))
        if budget <= PLENTY or not pairs:
            continue
        share = mean(a["multiply_adds_after"] / b["multiply_adds_after"] for a, b in pairs)
        rows.append(
            [head, f"1/{budget}", str(steps), arm, str(len(pairs)), f"{100 * share:.0f}",
             spread(points(pairs, lambda s: s["small"])),
             spread(points(pairs, lambda s: s[score] or 0.0))]
        )  # fmt: skip
    over = f"points over the grid at 1/{PLENTY}"
    names = (
        "head", "budget", "steps", "arm", "seeds",
        f"% of the multiply-adds of the grid at 1/{PLENTY}", f"small found, {over}",
        f"{score}, {over}",
    )  # fmt: skip
    return markdown(names, rows) if rows else ""


def paired(lines: Sequence[Line], others: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Those of the same seeds."""
    by_seed = {other["cell"]["seed"]: other for other in others}
    return [(line, by_seed[s]) for line in lines if (s := line["cell"]["seed"]) in by_seed]


def rising(pairs: Sequence[tuple[Line, Line]]) -> int:
    """Number of cells whose curves are not flat."""
    return sum(not is_flat(line["curve"]["loss"]) for pair in pairs for line in pair)


def verdict(small: Sequence[float], whole: Sequence[float], rising: int = 0) -> str:
    """Whether an arm pays, by the rule of the protocol: what is claimed needs flat curves.

    Args:
        small, whole: its points over the yardstick, of each seed.
        rising: number of the cells whose curves are not flat.
    """
    if len(small) < len(SEEDS):
        return "open: too few seeds"
    error = stdev(small) / math.sqrt(len(small))
    if mean(small) + 2 * error < LEAST:
        found, would = "does not pay", "would not pay"
    elif mean(small) < max(LEAST, 2 * error) or mean(whole) < -MOST_LOST:
        return "open"
    else:
        found, would = "pays", "would pay"
    return f"{would}, but {rising} of {2 * len(small)} curves are not flat" if rising else found


def shares(parts: Sequence[float], wholes: Sequence[float] | None = None) -> str:
    """In percent, of 1 each without `wholes`; a dash where there is nothing to have a share of."""
    pairs = zip(parts, [1] * len(parts) if wholes is None else wholes, strict=True)
    return " / ".join(f"{100 * part / whole:.0f}" if whole else "–" for part, whole in pairs)


def points(pairs: Sequence[tuple[Line, Line]], of: Callable[[Line], float]) -> list[float]:
    return [100 * (of(own["scores"]) - of(grid["scores"])) for own, grid in pairs]


def grouped(lines: Sequence[Line]) -> dict[tuple[str, int, int, str], list[Line]]:
    """Lines of all seeds by head, budget, steps and arm, in the order of the protocol."""
    groups: dict[tuple[str, int, int, str], list[Line]] = defaultdict(list)
    for line in lines:
        cell = line["cell"]
        groups[cell["head"], cell["budget"], line["curve"]["steps"], cell["arm"]].append(line)

    def place(key: tuple[str, int, int, str]) -> tuple[int, int, int, int]:
        return HEADS.index(key[0]), key[1], key[2], ARMS.index(key[3])

    return {key: groups[key] for key in sorted(groups, key=place)}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.1f}" + (f" ({stdev(values):.1f})" if len(values) > 1 else "")


def page_of(
    title: str,
    script: str,
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    more: str = "",
) -> str:
    """A page with one table, which says how it was made."""
    made = f"Made by `python bench/study/{script}`; see ../study/README.md."
    return f"# {title}\n\n{made}{more}\n\n{markdown(names, rows)}\n"


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(lines: Sequence[Line], path: Path) -> None:
    """Small objects found, and the main score, over multiply-adds after the first stage; of heads
    of which a model finds something."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    seeing = [line for line in lines if line["scores"]["small"]] or lines  # others have no curves
    heads = [head for head in HEADS if any(line["cell"]["head"] == head for line in seeing)]
    figure, axes = plt.subplots(
        len(heads), 2, figsize=(12, 4 * len(heads)), squeeze=False, layout="constrained"
    )
    groups, colors = grouped(lines), plt.colormaps["tab20"]
    for row, head in zip(axes, heads, strict=True):
        task = next(line["recipe"]["task"] for line in lines if line["cell"]["head"] == head)
        score = MAIN[task]
        for axis, (name, value) in zip(
            row, (("small found", "small"), (score, score)), strict=True
        ):
            budgets = set()
            own = {key[1:]: group for key, group in groups.items() if key[0] == head}
            kinds = sorted({(steps, ARMS.index(arm)) for _, steps, arm in own})
            for steps, number in kinds:
                arm, longer = ARMS[number], steps > kinds[0][0]
                of_kind = [group for key, group in own.items() if key[1:] == (steps, arm)]
                x = [mean(line["multiply_adds_after"] for line in group) / 1e6 for group in of_kind]
                y = [[100 * (line["scores"][value] or 0.0) for line in group] for group in of_kind]
                error = [stdev(v) if len(v) > 1 else math.nan for v in y]
                axis.errorbar(
                    x,
                    [*map(mean, y)],
                    error,
                    marker="s" if longer else "o",
                    linestyle="--" if longer else "-",
                    capsize=3,
                    color=colors(2 * number % 20 + number // 10),  # the same in all plots
                    label=f"{arm}, {steps} steps" if longer else arm,
                )
                budgets |= set(x)
            axis.set(xscale="log", title=f"{head}: {name.partition(' (')[0]}, %")
            axis.set_xlabel("million multiply-adds after the first stage")
            ticks: list[float] = []
            for x in sorted(budgets):  # labels closer to each other would overlap
                ticks += [x] * (not ticks or x > 1.2 * ticks[-1])
            axis.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.set_xlim(min(budgets) / 1.3, max(budgets) * 1.3)  # equal ones lie on each other
    shown = [axis.get_legend_handles_labels() for axis in axes.flat]
    legend = {name: handle for pair in shown for handle, name in zip(*pair, strict=True)}
    figure.legend([*legend.values()], [*legend], loc="outside right center")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
