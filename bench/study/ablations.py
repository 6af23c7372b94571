"""Ablations: one configuration, and one change each; see README.md.

The paper's Tables 5 and 6, and the choices of this library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import RESULTS, SEEDS, SPREAD, TrainingRun, recipe_of

from pointformer.train.recipe import Recipe

ABLATION_RESULTS = RESULTS.with_name("ablations.jsonl")
BASE = "base"
# Two merges that keep a quarter each, as the paper's prior supposes: the head reads one token in
# 16. What is changed below is as in `AFFConfig`, and said, should that change.
_OPTIONS: dict[str, Any] = {
    "dims": [32, 64, 96],
    "depths": [1, 1, 4],
    "heads": [2, 4, 6],
    "mlp_ratio": 2.0,
    "neighborhood_size": 48,
    "first_stage": 2,
    "rate": 0.25,
    "alpha": 4.0,
    "prior": "adaptive",
    "reserve": True,
    "reserve_share": 0.5,
    "expanded_position": True,
    "blank_token": True,
    "merge": "adaptive",
    "merge_center": False,
    "ranking": "scores",
    "curve": "hilbert",
    "anchors": True,
    "remainder": "spread",
    "scope": "token",
    "include_own": False,
}
# The options that differ, or other fields of the recipe.
CHANGES: dict[str, dict[str, Any]] = {
    BASE: {},
    # Table 5.
    "no_prior": {"options": {"prior": None}},
    "grid_prior": {"options": {"prior": "grid"}},
    "differences": {"options": {"expanded_position": False}},
    "no_blank": {"options": {"blank_token": False}},
    "no_reserved": {"options": {"reserve": False}},
    "all_reserved": {"options": {"reserve_share": None}},
    "patch_merging": {"options": {"merge": "patch"}},
    # Table 6; the base has 4.
    **{f"alpha_{alpha}": {"options": {"alpha": float(alpha)}} for alpha in (0, 1, 2, 8, 10, 12)},
    # How tokens are clustered, and which clusters they attend to.
    **{f"{curve}_curve": {"options": {"curve": curve}} for curve in ("snake", "morton", "peano")},
    "kd_curve": {"options": {"curve": "kd"}},
    "no_anchors": {"options": {"anchors": False}},
    "last_short": {"options": {"remainder": "last"}},
    "tile_scope": {"options": {"scope": "tile"}},
    "own_cluster": {"options": {"include_own": True}},
    # What is merged, how scores learn, and whether they matter.
    "center": {"options": {"merge_center": True}},
    "supervised": {"score_weight": 1.0},
    "spread": {"options": {"spread": SPREAD}},
    "supervised_spread": {"options": {"spread": SPREAD}, "score_weight": 1.0},
    "lattice": {"options": {"ranking": "lattice"}},
    "gradient": {"options": {"ranking": "gradient"}},
    # One model for all budgets, see budgets.py.
    "drawn_rates": {"rates": {"least": 1 / 32, "most": 1 / 2, "merges": "first"}},
}


@dataclass(frozen=True)
class Ablation(TrainingRun):
    """A change of the base, on a data set, with the dense head.

    Attributes:
        change: see `CHANGES`.
    """

    data: str
    change: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.change}-{self.seed}"

    def recipe(self, root: Path, changes: Sequence[str] = ()) -> Recipe:
        change = dict(CHANGES[self.change])
        options = {**_OPTIONS, **change.pop("options", {})}
        return recipe_of(
            root / self.data,
            "dense",
            changes,
            model="aff_nano",
            options=options,
            seed=self.seed,
            **change,
        )


ABLATIONS = [Ablation("hit_uav", change, seed) for seed in SEEDS for change in CHANGES]
