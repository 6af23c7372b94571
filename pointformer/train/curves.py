"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pointformer._files import atomic_path
from pointformer.train.logs import read_table

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(f"training needs {error.name}: pip install 'pointformer[train]'") from None


def plot_curves(run: Path) -> Figure:
    """Loss, scores, learning rate and speed of a run over its steps.

    Raises:
        ValueError: nothing was logged yet.
    """
    log, scores = read_table(run / "log.csv"), read_table(run / "scores.csv")
    if not log:
        raise ValueError(f"{run / 'log.csv'}: nothing was logged yet")
    figure = Figure((11, 7), layout="constrained")
    loss, score, rate, speed = figure.subplots(2, 2, sharex=True).flat
    rates = ("images_per_second", "loaded_per_second")
    known = ("step", "epoch", "seconds", "gradient", "learning_rate", "waiting", *rates)
    terms = [name for name in log if name not in known]
    _lines(loss, log, terms, "loss", log_scale=True)
    if scores:
        _lines(
            score, scores, [n for n in scores if n not in ("step", "final", "pictures")], "score"
        )
    score.set_ylim(0, 1)
    _lines(rate, log, ["learning_rate", "gradient"], "learning rate, gradient", log_scale=True)
    shown = [name for name in rates if name in log]
    _lines(speed, log, shown, "pictures per second, learned and to be loaded", log_scale=True)
    for axes in (rate, speed):
        axes.set_xlabel("step")
    return figure


def _lines(
    axes: Axes, table: dict[str, np.ndarray], names: Sequence[str], title: str, *, log_scale=False
) -> None:
    axes.set_title(title)
    shown = [name for name in names if np.isfinite(table[name]).any()]
    for name in shown:
        mark = "o" if len(table["step"]) < 30 else ""
        axes.plot(table["step"], table[name], label=name, marker=mark, markersize=3, linewidth=1.2)
    if log_scale and all((table[name][np.isfinite(table[name])] > 0).all() for name in shown):
        axes.set_yscale("log")
    if len(shown) > 1:
        axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)


def save_curves(run: Path) -> Path:
    """Write `plot_curves` as curves.png in the run's folder."""
    figure = plot_curves(run)
    with atomic_path(run / "curves.png") as temporary:
        figure.savefig(temporary, dpi=100)
    return run / "curves.png"
