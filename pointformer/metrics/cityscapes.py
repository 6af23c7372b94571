"""Cityscapes' own average precision of objects, computed by cityscapesscripts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pointformer.annotations import Category, Objects
from pointformer.data import Annotation
from pointformer.metrics.metric import array_of, value_of


@dataclass(frozen=True, eq=False)
class CityscapesScores:
    """Scores in [0, 1]; NaN where there is no annotated object.

    Attributes:
        ap: mean over classes and the overlaps 0.5 to 0.95; `ap50` at an overlap of 0.5.
        per_class: (K,) AP; NaN for stuff.
    """

    ap: float
    ap50: float
    per_class: np.ndarray


def _protocol() -> Any:
    """The package's module with the protocol's parameters and its evaluation of matches."""
    try:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling
    except ImportError:
        raise ImportError(
            "Cityscapes' AP needs cityscapesscripts: pip install pointformer[eval]"
        ) from None
    return evalInstanceLevelSemanticLabeling


class CityscapesAP:
    """Average precision of Cityscapes objects over a data set.

    Overlaps of predicted with annotated objects are counted here, from arrays; what follows from
    them is the package's code (whose own counting reads a file per object, and does not run with
    NumPy 2.4).

    Args:
        categories: the classes, with Cityscapes' label ids.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)
        self._module = _protocol()
        self._args = copy.copy(self._module.args)
        self._module.setInstanceLabels(self._args)
        self._void = [label.id for label in self._module.labels if label.ignoreInEval]
        self._matches: dict[str, dict] = {}

    def __getstate__(self) -> tuple[tuple[Category, ...], dict[str, dict]]:
        return self.categories, self._matches  # the package's modules cannot be sent

    def __setstate__(self, state: tuple[tuple[Category, ...], dict[str, dict]]) -> None:
        categories, matches = state
        self.__init__(categories)  # type: ignore[misc]
        self._matches = matches

    def update(self, predicted: Any, annotation: Annotation) -> None:
        """Add one picture.

        Args:
            predicted: see `Objects.of`.
            annotation: of the task "instance" or "panoptic", with the file's map of ids.

        Raises:
            ValueError: if sizes differ, a class is out of range or the map of ids is missing.
        """
        if annotation.ids is None:
            raise ValueError(f"annotation: {annotation.name} has no map of ids")
        found = Objects.of(predicted, annotation.size)
        classes = found.classes.tolist()
        if any(not 0 <= category < len(self.categories) for category in classes):
            raise ValueError(f"predicted: unknown class in the objects of {annotation.name}")
        known: dict[str, dict[int, dict]] = {name: {} for name in self._args.instLabels}  # by id
        matched: dict[str, list[dict[str, Any]]] = {name: [] for name in self._args.instLabels}
        ids, areas = np.unique(annotation.ids, return_counts=True)
        for value, area in zip(ids.tolist(), areas.tolist(), strict=True):
            label = value if value < 1000 else value // 1000
            name = self._module.id2label[label].name
            if name in known:
                # The package's values where distances are unknown.
                row = {"instID": value, "labelID": label, "pixelCount": area}
                known[name][value] = {**row, "medDist": -1, "distConf": 0.0, "matchedPred": []}
        void = np.isin(annotation.ids, self._void)
        for n, (mask, category) in enumerate(zip(found.masks, classes, strict=True)):
            label = self.categories[category].id
            name = self._module.id2label[label].name
            values, counts = np.unique(annotation.ids[mask.window][mask.pixels], return_counts=True)
            if name not in known or not len(values):
                continue
            prediction: dict[str, Any] = {
                "predID": n,
                "labelID": label,
                "pixelCount": int(counts.sum()),
                "confidence": float(found.scores[n]),
                "voidIntersection": int(void[mask.window][mask.pixels].sum()),
                "matchedGt": [],
            }
            for value, overlap in zip(values.tolist(), counts.tolist(), strict=True):
                truth = known[name].get(value)
                if truth is not None:
                    seen = {key: truth[key] for key in truth if key != "matchedPred"}
                    truth["matchedPred"].append({**prediction, "intersection": overlap})
                    prediction["matchedGt"].append({**seen, "intersection": overlap})
            matched[name].append(prediction)
        truths = {name: list(rows.values()) for name, rows in known.items()}
        self._matches[annotation.name] = {"groundTruth": truths, "prediction": matched}

    def merge(self, other: CityscapesAP) -> None:
        """Add the pictures of another part of the data set."""
        self._matches |= other._matches

    def state(self) -> dict[str, np.ndarray]:
        """The objects of each picture and their overlaps."""
        return {"matches": array_of(self._matches)}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the pictures of a `state`."""
        self._matches = value_of(state["matches"])

    def compute(self) -> dict[str, float]:
        """The means of `scores` by name."""
        scores = self.scores()
        return {"Cityscapes AP": scores.ap, "Cityscapes AP50": scores.ap50}

    def scores(self) -> CityscapesScores:
        """Scores of all pictures so far."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # means over no classes
            table = self._module.evaluateMatches(self._matches, self._args)
            averages = self._module.computeAverages(table, self._args)
        by_name = averages["classes"]
        absent = {"ap": np.nan}
        per_class = [by_name.get(category.name, absent)["ap"] for category in self.categories]
        return CityscapesScores(
            float(averages["allAp"]), float(averages["allAp50%"]), np.array(per_class, float)
        )
