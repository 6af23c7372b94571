"""Cells of the study: which there are, in which order, and the recipe of each. See README.md."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pointformer.train.recipe import Recipe, read_recipe

RESULTS = Path(__file__).parents[1] / "results" / "study.jsonl"
ARMS = ("learned", "grid", "gradient", "supervised", "swin")
HEADS = ("dense", "mask2former")
BUDGETS = (4, 8, 16, 32, 64)  # one token in so many is kept
SEEDS = (0, 1, 2)

# The tasks, by data set and head; a head of masks counts objects where there are any.
_CLASSES = {"format": "folder", "void": [255]}
_OBJECTS = {"format": "folder", "draw": "by_objects"}
_NUCLEI = {"task": "instance", "data": _OBJECTS}
_HIT_UAV = ["background", "person", "car", "bicycle", "other"]
_CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car",
           "pedestrian", "bicyclist"]  # fmt: skip
_ROADS = {"task": "semantic", "data": {"format": "folder", "void": [11], "categories": _CAMVID}}
DATA: dict[str, dict[str, dict[str, Any]]] = {
    "hit_uav": {
        "dense": {"task": "semantic", "data": {**_CLASSES, "categories": _HIT_UAV}},
        "mask2former": {"task": "instance", "data": {**_OBJECTS, "void": [65535]}},
    },
    "nuclei_dsb2018": {"dense": _NUCLEI, "mask2former": _NUCLEI},
    "camvid": {"dense": _ROADS, "mask2former": _ROADS},
}
# Weights in the loss: where there is little of a class, its pixels count more.
LOSSES: dict[tuple[str, str], dict[str, Any]] = {
    ("hit_uav", "dense"): {"class_weights": [1, 10, 10, 10, 10]},
    ("nuclei_dsb2018", "dense"): {"inside_weight": 1, "border_weight": 3},
}
BACKGROUND = "background"  # no object, where it is a class
UPRIGHT = ("camvid",)  # pictures with an up and a down
STEPS = {"dense": 3000, "mask2former": 1500}
MASKS = {  # of the head mask2former: as many queries as crops have objects, small decoders
    "queries": 60,
    "pixel_layers": 1,
    "decoder_layers": 2,
    "dim": 96,
    "hidden": 192,
    "pixel_hidden": 192,
}


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        data: name of the data set's folder.
        head, arm: see `HEADS`, `ARMS`.
        budget: tokens of the first stage for each one after the merge.
    """

    data: str
    head: str
    budget: int
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.head}-{self.budget}-{self.arm}-{self.seed}"

    def recipe(self, root: Path, changes: Sequence[str] = ()) -> Recipe:
        """The run.

        Args:
            root: folder with the data sets.
            changes: of fields, as `field=value`.
        """
        own, upright = DATA[self.data][self.head], self.data in UPRIGHT
        options: dict[str, Any] = {
            "dims": [32, 96],
            "depths": [1, 4],
            "heads": [2, 6],
            "mlp_ratio": 2.0,
            "first_stage": 1,
        }
        if self.arm == "swin":
            options |= {"patch_merge": math.isqrt(self.budget), "window_size": 7}
        else:
            options |= {
                "neighborhood_size": 48,
                "rate": 1 / self.budget,
                "prior": None,
                "reserve_share": 0.25,
                "ranking": {"gradient": "gradient", "grid": "lattice"}.get(self.arm, "scores"),
            }
        if self.head == "dense":
            loss = LOSSES.get((self.data, self.head), {})
            options |= {"channels": 48, "pixel_channels": 8, "detail": False}
        else:
            options |= {**MASKS, "token_queries": own["task"] == "instance"}
            loss = {"points": 2048, "stride": 4, "weights": {"no_object": 1.0}}
        return read_recipe(
            None,
            changes,
            task=own["task"],
            model="swin_mini" if self.arm == "swin" else "aff_nano",
            head=self.head,
            options=options,
            loss=loss,
            data={**own["data"], "path": str(root / self.data)},
            augmentation={
                "crop": {"size": 256, "beyond": "mirror"},
                "flip": {"horizontal": 0.5},
                "turn": None if upright else {},
            },
            optimizer={"learning_rate": 1.5e-3, "weight_decay": 0.05, "betas": [0.9, 0.98]},
            schedule={"kind": "cosine", "warmup": 0.05},
            budget={"steps": STEPS[self.head]},
            score_weight=1.0 if self.arm == "supervised" else 0.0,
            batch=4,
            precision="bfloat16",
            average=0.99,
            seed=self.seed,
            checkpoints={"minutes": 2.0, "keep": 1},
            validation={"times": 4, "pictures": 32, "token_maps": 1},
        )

    def is_done(self, root: Path, changes: Sequence[str], lines: Sequence[dict[str, Any]]) -> bool:
        """Whether there is a line of the cell, made by the `recipe` of these arguments."""
        own = [line["recipe"] for line in lines if line["cell"] == asdict(self)]
        return any(not self.recipe(root, changes).differences(recipe) for recipe in own)


def read_lines(results: Path) -> list[dict[str, Any]]:
    """Of the finished cells, in the order in which they were done."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()]


def _possible(cell: Cell) -> bool:
    """Windows need square patches."""
    return cell.arm != "swin" or math.isqrt(cell.budget) ** 2 == cell.budget


def _rank(cell: Cell) -> tuple[int, ...]:
    """The most telling first: the arms at the budget of the goal, at the scarcest, and at 1/4, with
    which the goal compares; then the other seeds and budgets; likewise the other data sets."""
    data, head = list(DATA).index(cell.data), HEADS.index(cell.head)
    goal = {16: 0, 64: 1, 4: 2, 32: 3, 8: 4}[cell.budget]
    block = 3 * head + data + 2 * (goal > 2) + (0, 1, 3)[cell.seed] + (head + data > 0)
    return block, data, head, cell.seed, goal, ARMS.index(cell.arm)


CELLS = sorted(
    filter(
        _possible, itertools.starmap(Cell, itertools.product(DATA, HEADS, BUDGETS, ARMS, SEEDS))
    ),
    key=_rank,
)
