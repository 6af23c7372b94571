"""Cells of the study: which there are, in which order, and the recipe of each. See README.md.

Those of the arms are here, `CELLS`; those of the ablations in ablations.py.
"""

from __future__ import annotations

import abc
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pointformer.train.recipe import Recipe, read_recipe

RESULTS = Path(__file__).parents[1] / "results" / "study.jsonl"
SPREAD, REACH = 0.05, (1, 144)
CHOICES: dict[str, dict[str, Any]] = {  # which tokens are kept: options by arm
    "learned": {},
    "grid": {"ranking": "lattice"},
    "gradient": {"ranking": "gradient"},
    "supervised": {},
    "swin": {},
    "spread": {"spread": SPREAD},
    "learned_spread": {"spread": 0.2},
    "gradient_spread": {"ranking": "gradient", "spread": SPREAD},
    "grid_reach": {"ranking": "lattice", "reach": REACH},
    "spread_reach": {"spread": SPREAD, "reach": REACH},
    "light_spread": {"spread": SPREAD},
    "grid_told": {"ranking": "lattice"},
}
ARMS = tuple(CHOICES)
SCORE_WEIGHTS = {  # in the loss, where scores are told where outlines are
    "supervised": 1.0,
    "spread": 1.0,
    "spread_reach": 1.0,
    "light_spread": 0.2,
    "grid_told": 1.0,
}
HEADS = ("dense", "mask2former")
BUDGETS = (4, 8, 16, 32, 64)  # one token in so many is kept
SEEDS = (0, 1, 2)
LATER_SEEDS = (3, 4, 5)  # nothing was chosen by what they found; with `LONGER` times the steps
LONGER = 2

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


class TrainingRun(abc.ABC):
    """What a line of the results is of.

    Attributes:
        data: name of the data set's folder.
    """

    data: str

    @property
    @abc.abstractmethod
    def name(self) -> str: ...

    @abc.abstractmethod
    def recipe(self, root: Path, changes: Sequence[str] = ()) -> Recipe:
        """The run.

        Args:
            root: folder with the data sets.
            changes: of fields, as `field=value`.
        """

    def as_dict(self) -> dict[str, Any]:
        """What lines call it."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    def is_done(self, root: Path, changes: Sequence[str], lines: Sequence[dict[str, Any]]) -> bool:
        """Whether there is a line of the cell, made by the `recipe` of these arguments."""
        own = [line["recipe"] for line in lines if line["cell"] == self.as_dict()]
        return any(not self.recipe(root, changes).differences(recipe) for recipe in own)


@dataclass(frozen=True)
class Cell(TrainingRun):
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

    @property
    def steps(self) -> int:
        return STEPS[self.head] * (LONGER if self.seed in LATER_SEEDS else 1)

    def recipe(self, root: Path, changes: Sequence[str] = ()) -> Recipe:
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
                "ranking": "scores",
                **CHOICES[self.arm],
            }
        return recipe_of(
            root / self.data,
            self.head,
            changes,
            model="swin_mini" if self.arm == "swin" else "aff_nano",
            options=options,
            score_weight=SCORE_WEIGHTS.get(self.arm, 0.0),
            seed=self.seed,
            steps=self.steps,
        )


def recipe_of(
    data: Path,
    head: str,
    changes: Sequence[str],
    *,
    options: dict[str, Any],
    steps: int | None = None,
    **values: Any,
) -> Recipe:
    """The recipe that all cells of a data set and a head share.

    Args:
        data: folder of the data set.
        options: of the backbone.
        steps: of training; `None`: those of the head.
        values: fields.
    """
    own = DATA[data.name][head]
    if head == "dense":
        loss = LOSSES.get((data.name, head), {})
        options = {**options, "channels": 48, "pixel_channels": 8, "detail": False}
    else:
        options = {**options, **MASKS, "token_queries": own["task"] == "instance"}
        loss = {"points": 2048, "stride": 4, "weights": {"no_object": 1.0}}
    return read_recipe(
        None,
        changes,
        task=own["task"],
        head=head,
        options=options,
        loss=loss,
        data={**own["data"], "path": str(data)},
        augmentation={
            "crop": {"size": 256, "beyond": "mirror"},
            "flip": {"horizontal": 0.5},
            "turn": None if data.name in UPRIGHT else {},
        },
        optimizer={"learning_rate": 1.5e-3, "weight_decay": 0.05, "betas": [0.9, 0.98]},
        schedule={"kind": "cosine", "warmup": 0.05},
        budget={"steps": STEPS[head] if steps is None else steps},
        batch=4,
        precision="bfloat16",
        average=0.99,
        checkpoints={"minutes": 2.0, "keep": 1},
        validation={"times": 4, "pictures": 32, "token_maps": 1},
        **values,
    )


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
    which the goal compares; then the other seeds and budgets; likewise the other data sets; at last
    the later seeds."""
    data, head = list(DATA).index(cell.data), HEADS.index(cell.head)
    goal = {16: 0, 64: 1, 4: 2, 32: 3, 8: 4}[cell.budget]
    block = 3 * head + data + 2 * (goal > 2) + (0, 1, 3, 12, 13, 14)[cell.seed] + (head + data > 0)
    return block, data, head, cell.seed, goal, ARMS.index(cell.arm)


_ALL = [
    *itertools.product(DATA, HEADS, BUDGETS, ARMS, SEEDS),
    *itertools.product(["hit_uav"], ["dense"], [4, 16], ARMS, LATER_SEEDS),  # the goal's
]
CELLS = sorted(filter(_possible, itertools.starmap(Cell, _ALL)), key=_rank)
