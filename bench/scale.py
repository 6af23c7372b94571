"""How time and memory grow with the number of tokens in one set, 10^4 to 10^7.

    python bench/scale.py [--most 10000000] [--fresh]

For each cloud (3-D, even density and five dense blobs) and number of tokens a process of its own
makes clusters of eight, neighborhoods of six of these, attention (16 channels, one head, with
position bias) and a merge around every fourth token, without gradients, and writes a line per step:
CPU seconds of all threads, those that the system took among them (for memory: virtual machines take
long for what no process had before), and the largest resident memory meanwhile (of the whole
process, inputs and interpreter included), all in `results/scale.jsonl`. What is there already is
not measured again. Then exponents are fitted, of time over tokens, with and without the system's,
and `results/scale.png` is drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

RESULTS = Path(__file__).parent / "results" / "scale.jsonl"
COUNTS = [count for power in (4, 5, 6) for count in (10**power, 3 * 10**power)] + [10**7]
CLOUDS = ("even", "blobs")
STEPS = ("cluster", "neighborhoods", "attention", "merge")
CHANNELS = 16
REPEATED = 1_000_000  # tokens that are enough to measure: fewer are measured several times
GOAL = 1.05
T = TypeVar("T")


def measure(cloud: str, count: int) -> Iterator[dict]:
    import torch

    from pointformer import balanced_cluster, nearest_clusters, neighborhood_attention, scored_merge

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if cloud == "blobs":
        middles = 1000 * torch.rand(5, 3)
        positions = torch.randn(count, 3).add_(middles[torch.randint(0, 5, (count,))])
    else:
        positions = 100 * torch.rand(count, 3)
    net = {"weight": torch.randn(4, 7), "bias": torch.randn(4)}
    net |= {"norm_weight": torch.randn(4), "norm_bias": torch.randn(4)}

    def steps(positions: torch.Tensor) -> Iterator[tuple[str, Spent]]:
        clusters, used = spent(lambda: balanced_cluster(positions))
        yield "cluster", used
        ordered = positions[clusters.order]
        neighborhoods, used = spent(lambda: nearest_clusters(ordered, clusters))
        yield "neighborhoods", used
        inputs = [*torch.randn(3, len(ordered), 1, CHANNELS)]
        attended, used = spent(
            lambda: neighborhood_attention(
                inputs[0],
                inputs[1],
                inputs[2],
                ordered,
                neighborhoods,
                position_weight=torch.ones(1, 7),
            )
        )
        yield "attention", used
        inputs.clear()
        features, scores = attended[:, 0], torch.rand(len(ordered))
        every_fourth = torch.arange(0, len(ordered), 4)
        _, used = spent(
            lambda: scored_merge(features, scores, ordered, every_fourth, neighborhoods, **net)
        )
        yield "merge", used

    for _ in steps(positions[:10_000]):  # kernels are compiled or loaded
        pass
    rounds = max(1, REPEATED // count)
    measured = [[*steps(positions)] for _ in range(rounds)]
    for step in zip(*measured, strict=True):
        yield {
            "cloud": cloud,
            "tokens": count,
            "step": step[0][0],
            "seconds": round(sum(used.seconds for _, used in step) / rounds, 5),
            "system_seconds": round(sum(used.system for _, used in step) / rounds, 5),
            "peak_gib": round(max(used.peak for _, used in step) / 2**30, 3),
        }


class Spent(NamedTuple):
    """CPU seconds of all threads, the system's among them, and the largest resident bytes."""

    seconds: float
    system: float
    peak: int


def spent(work: Callable[[], T]) -> tuple[T, Spent]:
    """The result, and what it took."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far is forgotten
    start = resource.getrusage(resource.RUSAGE_SELF)
    result = work()
    end = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    system = end.ru_stime - start.ru_stime
    seconds = end.ru_utime - start.ru_utime + system
    return result, Spent(seconds, system, 1024 * int(status.split()[0]))


def known() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def exponent(lines: list[dict], cloud: str, step: str, system: bool = True) -> float:
    import numpy as np

    chosen = [line for line in lines if (line["cloud"], line["step"]) == (cloud, step)]
    seconds = [line["seconds"] - (0 if system else line["system_seconds"]) for line in chosen]
    return float(np.polyfit(np.log([line["tokens"] for line in chosen]), np.log(seconds), 1)[0])


def draw(lines: list[dict]) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for color, step in enumerate(STEPS):
        for cloud, style in zip(CLOUDS, ("-o", "--s"), strict=True):
            chosen = [line for line in lines if (line["cloud"], line["step"]) == (cloud, step)]
            tokens = [line["tokens"] for line in chosen]
            name = f"{step}, {cloud} ({exponent(lines, cloud, step):.2f})"
            look = {"color": f"C{color}", "label": name, "markersize": 3}
            left.loglog(tokens, [line["seconds"] for line in chosen], style, **look)
            right.loglog(tokens, [line["peak_gib"] for line in chosen], style, **look)
    left.set_title("CPU seconds of all threads (exponent)")
    right.set_title("largest resident memory, GiB")
    right.axhline(8, color="gray", linewidth=0.8)
    for axes in (left, right):
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--most", type=int, default=10**7, help="tokens")
    parser.add_argument("--fresh", action="store_true", help="measure all again")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # what its own processes do
    options = parser.parse_args()
    if options.case:
        for line in measure(options.case[0], int(options.case[1])):
            print(json.dumps(line))
        return
    if options.fresh or not RESULTS.exists():
        RESULTS.write_text("")
    for count in (count for count in COUNTS if count <= options.most):
        for cloud in CLOUDS:
            if any((line["cloud"], line["tokens"]) == (cloud, count) for line in known()):
                continue
            made = subprocess.run(
                [sys.executable, __file__, "--case", cloud, str(count)],
                env=os.environ | {"OMP_WAIT_POLICY": "passive"},  # waiting costs no CPU time
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            with RESULTS.open("a") as file:
                file.write(made.stdout)
    lines = known()
    most = max(line["tokens"] for line in lines)
    print(f"{'':24s} exponent, without the system   GiB at {most:,}")
    for cloud in CLOUDS:
        for step in STEPS:
            peak = max(
                line["peak_gib"] for line in lines if (line["cloud"], line["step"]) == (cloud, step)
            )
            print_exponents(lines, cloud, step, f"{peak:14.2f}")
        print_exponents(sums(lines, cloud), cloud, "all")
    draw(lines)


def print_exponents(lines: list[dict], cloud: str, step: str, more: str = "") -> None:
    both = (exponent(lines, cloud, step, system) for system in (True, False))
    marked = (f"{fitted:9.3f}{'*' if fitted > GOAL else ' '}" for fitted in both)
    print(f"{cloud:8s}{step:16s}{'     '.join(marked)}{more}")


def sums(lines: list[dict], cloud: str) -> list[dict]:
    """Lines of all steps together."""
    total: dict[int, dict] = {}
    for line in (line for line in lines if line["cloud"] == cloud):
        none: dict = {"cloud": cloud, "step": "all", "tokens": line["tokens"]}
        none |= {"seconds": 0.0, "system_seconds": 0.0}
        sum_ = total.setdefault(line["tokens"], none)
        for name in ("seconds", "system_seconds"):
            sum_[name] += line[name]
    return list(total.values())


if __name__ == "__main__":
    main()
