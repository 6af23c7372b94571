"""ModelNet10 by a Point Transformer of PyG, as a yardstick for `point_nano`.

    python bench/points/modelnet10.py train DATA [--minutes M] [--write]
    python bench/points/modelnet10.py speed DATA [--rounds N] [--write]
    python bench/points/modelnet10.py curve RUN [--write]

`train` follows the recipe `modelnet10.yaml` (changes of the points, loss, optimizer, batch, moving
average of the weights) with a schedule of so many minutes of CPU time in steps, and scores all test
objects several times, which the minutes leave out. `speed` lets both models take steps in turns in
one process. `curve` reads the scores of a finished `pointformer train modelnet10.yaml`, whose steps
count with `speed`'s time, and draws accuracy over time of both. The network is that of PyG's
example, as wide and deep as `point_nano`: attention over the 16 nearest points, farthest points and
the maximum over their 16 nearest to go down.

`--write` adds the lines to results/points.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lines import RESULTS, add_options, prepare, report
from torch import Tensor, nn
from torch_cluster import fps, knn, knn_graph  # PyG's own need pyg-lib
from torch_geometric.nn import MLP, PointTransformerConv, global_mean_pool
from torch_geometric.utils import scatter

from pointformer import TokenSet
from pointformer.data.point_sets import PointAnnotation, PointDataset, read_objects
from pointformer.models import create_model
from pointformer.models.points import PointPreprocess
from pointformer.train.recipe import read_recipe

DIMS, DEPTHS, NEAREST = (32, 64, 128, 256), (1, 1, 2, 1), 16


class Attention(nn.Module):
    """A block of PyG's example, with a way around it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.before = nn.Linear(dim, dim)
        self.attention = PointTransformerConv(
            dim,
            dim,
            pos_nn=MLP([3, 64, dim], norm=None, plain_last=False),
            attn_nn=MLP([dim, 64, dim], norm=None, plain_last=False),
        )
        self.after = nn.Linear(dim, dim)

    def forward(self, x: Tensor, positions: Tensor, edges: Tensor) -> Tensor:
        y = self.attention(self.before(x).relu(), positions, edges)
        return x + self.after(y).relu()


class PointTransformer(nn.Module):
    """Logits (B, classes) of a batch of point sets."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.preprocess = PointPreprocess()
        self.embed = MLP([3, DIMS[0]], plain_last=False)
        self.down = nn.ModuleList(
            MLP([fine, coarse], plain_last=False) for fine, coarse in itertools.pairwise(DIMS)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(Attention(dim) for _ in range(depth))
            for dim, depth in zip(DIMS, DEPTHS, strict=True)
        )
        self.head = MLP([DIMS[-1], 64, 64, classes], norm=None)

    def forward(self, points: TokenSet) -> Tensor:
        positions, batch = points.positions, points.sample_index
        x = self.embed(positions)
        for stage, blocks in enumerate(self.blocks):
            if stage:
                kept = fps(positions, batch, ratio=0.25)
                query, near = knn(positions, positions[kept], NEAREST, batch, batch[kept])
                x = self.down[stage - 1](x)[near]
                x = scatter(x, query, 0, len(kept), reduce="max")
                positions, batch = positions[kept], batch[kept]
            edges = knn_graph(positions, NEAREST, batch)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, positions, edges)
        return self.head(global_mean_pool(x, batch, points.batch_size))


class Batches:
    """Changed training objects, batch after batch, as the recipe says."""

    def __init__(self, data: PointDataset, seed: int) -> None:
        self.recipe = read_recipe("modelnet10.yaml", [])
        self.data, self.rng = data, np.random.default_rng(seed)
        self.left: list[int] = []

    def next(self) -> tuple[TokenSet, Tensor]:
        changes = self.recipe.augmentation.points
        tokens: list[TokenSet] = []
        labels: list[int] = []
        while len(tokens) < self.recipe.batch:
            if not self.left:
                self.left = self.rng.permutation(len(self.data)).tolist()
            annotation = self.data[self.left.pop()]
            assert isinstance(annotation, PointAnnotation)
            one = annotation.tokens
            for change in (changes.drop, changes.mirror, changes.scale, changes.jitter):
                assert change is not None
                one, _ = change(one, annotation, self.rng)
            tokens.append(one)
            labels.append(annotation.label)
        return TokenSet.cat(tokens), torch.tensor(labels)


def loss_of(model: nn.Module, batch: tuple[TokenSet, Tensor]) -> Tensor:
    points, labels = batch
    preprocess = model.preprocess
    assert isinstance(preprocess, nn.Module)
    return F.cross_entropy(model(preprocess(points)), labels, label_smoothing=0.1)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[TokenSet, Tensor]
) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.inference_mode()
def accuracy(model: nn.Module, data: PointDataset, rows: Sequence[int]) -> float:
    model.eval()
    hits = 0
    for start in range(0, len(rows), 64):
        some = [
            a for row in rows[start : start + 64] if isinstance(a := data[row], PointAnnotation)
        ]
        points = TokenSet.cat([a.tokens for a in some])
        found = model(model.preprocess(points)).argmax(1)  # type: ignore[operator]
        hits += sum(int(f) == a.label for f, a in zip(found, some, strict=True))
    model.train()
    return hits / len(rows)


def train(options: argparse.Namespace) -> list[dict[str, Any]]:
    batches = Batches(read_objects(options.data, "train"), options.seed)
    test = read_objects(options.data, "test")
    model = PointTransformer(len(test.categories))
    mean = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    lines: list[dict[str, Any]] = []
    steps, spent, scored = 0, 0.0, 0
    total = 60 * options.minutes
    while spent < total:
        share = spent / total
        rate = share / 0.05 if share < 0.05 else (1 + math.cos(math.pi * (share - 0.05) / 0.95)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * max(rate, 1e-3)
        batch = batches.next()
        start = time.process_time()  # as `speed` counts: neither loading nor the moving average
        loss = step(model, optimizer, batch)
        spent += time.process_time() - start
        steps += 1
        decay = min(0.999, (1 + steps) / (10 + steps))
        with torch.no_grad():
            for ours, theirs in zip(
                mean.state_dict().values(), model.state_dict().values(), strict=True
            ):
                ours.lerp_(theirs, 1 - decay) if ours.is_floating_point() else ours.copy_(theirs)
        if spent >= total * (scored + 1) / options.times:
            scored += 1
            lines.append(
                {
                    "method": "Point Transformer of PyG",
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "minutes": options.minutes,
                    "seed": options.seed,
                    "step": steps,
                    "cpu_seconds": round(spent, 1),
                    "loss": round(loss, 4),
                    "accuracy": round(accuracy(mean, test, range(len(test))), 4),
                }
            )
            print(f"step {steps}: {lines[-1]['accuracy']}", flush=True)
    return lines


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    batches = Batches(read_objects(options.data, "train"), options.seed)
    sides = {
        "point_nano": create_model("point_nano", num_classes=10),
        "Point Transformer of PyG": PointTransformer(10),
    }
    optimizers = {name: optimizer_of(model) for name, model in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds + 1):  # the first one warms up
        batch = batches.next()
        for name, model in sides.items():
            start = time.process_time()
            step(model, optimizers[name], batch)
            times[name].append(time.process_time() - start)
    return [
        {
            "method": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "cpu_seconds_per_step": [round(t, 4) for t in times[name][1:]],
            "median": round(median(times[name][1:]), 4),
        }
        for name, model in sides.items()
    ]


def curve(options: argparse.Namespace) -> list[dict[str, Any]]:
    kept = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    per_step = {
        line["method"]: line["median"] for line in kept if line["bench"] == "modelnet10 speed"
    }["point_nano"]
    with (options.data / "scores.csv").open() as file:
        ours: list[dict[str, Any]] = [
            {
                "method": "point_nano",
                "step": int(row["step"]),
                "cpu_seconds": round(int(row["step"]) * per_step, 1),
                "objects": int(row["pictures"]),
                "accuracy": round(float(row["top-1 accuracy"]), 4),
            }
            for row in csv.DictReader(file)
        ]
    theirs = [line for line in kept if line["bench"] == "modelnet10 train"]
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for lines in (ours, theirs):
        minutes = [line["cpu_seconds"] / 60 for line in lines]
        found = [100 * line["accuracy"] for line in lines]
        axes.plot(minutes, found, marker="o", label=lines[0]["method"])
    axes.set(xlabel="minutes of one CPU thread in steps", ylabel="accuracy on ModelNet10, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    if options.write:
        figure.savefig(RESULTS.with_name("modelnet10.png"), dpi=120)
    return ours


COMMANDS = {"train": train, "speed": speed, "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("data", type=Path, help="folder of the archive, or of the run")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--times", type=int, default=10, help="of scoring")
    parser.add_argument("--rounds", type=int, default=7)
    add_options(parser)
    options = parser.parse_args()
    prepare(options)
    found = COMMANDS[options.command](options)
    report(f"modelnet10 {options.command}", found, options)


if __name__ == "__main__":
    main()
