"""From a point cloud to a class of each point, and to the points that a model kept."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointformer import TokenSet
from pointformer._checks import check_number, describe
from pointformer.annotations import Category
from pointformer.data.points import coordinate_unit, read_points
from pointformer.data.points.columns import AXES, spacing_of
from pointformer.models import Model
from pointformer.models.inference import evaluating
from pointformer.prediction import predict_points, recipe_value, region_of
from pointformer.rates import TimeBudget, check_budget
from pointformer.segmentation.regions import Region, Regions
from pointformer.tasks import task_of
from pointformer.tasks.points import PointSegmentation
from pointformer.tasks.task import Size

_ENOUGH = 100  # points, of which a feature tells something
_APART = 30.0  # times the model's unit that points may be nearer or farther apart


@dataclass(frozen=True, eq=False)
class SegmentedCloud:
    """Result of `segment_points`.

    Attributes:
        tokens: what was segmented, one sample of T points.
        classes: (T,) int32 class of each point, a place among `categories`.
        scores: (T,) float32 probability of that class.
        categories: names and colors of the classes.
        seconds: time for the network and for reading its output.
        rates: shares of the tokens that the model's merges kept.
    """

    tokens: TokenSet
    classes: np.ndarray
    scores: np.ndarray
    categories: tuple[Category, ...]
    seconds: float
    rates: tuple[float, ...] = ()

    def counts(self) -> np.ndarray:
        """(K,) int64 points of each class."""
        return np.bincount(self.classes, minlength=len(self.categories))

    def mean_scores(self) -> np.ndarray:
        """(K,) float64 mean score of the points of each class, NaN where there are none."""
        sums = np.bincount(self.classes, self.scores, minlength=len(self.categories))
        counts = self.counts()
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def segment_points(
    model: Model,
    tokens: TokenSet,
    *,
    progress: Callable[[Regions], Iterable[Region]] = iter,
    budget: TimeBudget | None = None,
) -> SegmentedCloud:
    """Find the class of each point.

    Args:
        model: for point segmentation.
        tokens: one sample, with the features that the model was trained with, such as
            `read_cloud` gives.
        progress: see `predict_points`.
        budget: see `segment`.

    Raises:
        ValueError, TypeError: the model is made for another task, the points do not fit it, or they
            take more time than the budget.
    """
    task = check_model(model)
    check_budget(budget, model)
    _check_cloud(tokens)

    def look() -> SegmentedCloud:
        start = time.perf_counter()
        found = predict_points(model, _Scored(task.categories), tokens, progress=progress)
        seconds = time.perf_counter() - start
        rates = getattr(model.config, "rates", ())
        return SegmentedCloud(
            tokens, found["class"], found["score"], task.categories, seconds, rates
        )

    return look() if budget is None else budget.run(tokens.num_tokens, look)


@dataclass(frozen=True, eq=False)
class KeptPoints:
    """The tokens of a stage, which are points of the cloud.

    Attributes:
        rows: (M,) int64 of the cloud.
        scores: (M,) float32 importance of each, by which the merge after this stage chose; `None`
            of the last stage.
    """

    rows: np.ndarray
    scores: np.ndarray | None


def focus_points(model: Model, tokens: TokenSet) -> list[KeptPoints]:
    """The points that are tokens in each stage of a model, all of them in the first.

    In regions, as `segment_points` predicts: each shows the tokens among its own points.

    Args:
        tokens: one sample, see `read_cloud`.
    """
    from scipy.spatial import cKDTree

    _check_cloud(tokens)
    parts: list[list[tuple[np.ndarray, np.ndarray | None]]] = []
    device = next(model.parameters()).device
    with evaluating(model):
        for region in Regions(tokens, region_of(model) or tokens.num_tokens):
            inputs: Any = model.preprocess(region.tokens.to(device))
            stages: Any = model.backbone(inputs)
            row_of = np.where(region.own, region.rows, -1)
            tree = cKDTree(inputs.positions.cpu().numpy())
            part: list[tuple[np.ndarray, np.ndarray | None]] = []
            for stage in stages:
                _, place = tree.query(stage.tokens.positions.cpu().numpy())
                found = row_of[place]
                scores = None if stage.scores is None else stage.scores.float().cpu().numpy()
                part.append((found[found >= 0], scores if scores is None else scores[found >= 0]))
            parts.append(part)
    kept = []
    for stage in zip(*parts, strict=True):
        scores = [part for _, part in stage if part is not None]
        kept.append(
            KeptPoints(
                np.concatenate([rows for rows, _ in stage]),
                np.concatenate(scores) if scores else None,
            )
        )
    return kept


def _check_cloud(tokens: object) -> None:
    if not isinstance(tokens, TokenSet):
        raise TypeError(f"tokens: expected a TokenSet, got {describe(tokens)}")
    if len(tokens) != 1 or not tokens.num_tokens:
        raise ValueError(f"tokens: expected one sample with points, got {tokens}")


def check_model(model: Model) -> PointSegmentation:
    """The task of a model for point segmentation.

    Raises:
        ValueError: it is for another one.
    """
    task = task_of(model)
    if not isinstance(task, PointSegmentation):
        raise ValueError(
            f"model: {model.name} is made for {task.name!r} and finds no classes of points; use "
            "one for 'point_segmentation'"
        )
    return task


def read_cloud(
    path: str | os.PathLike[str],
    model: Model,
    features: Sequence[str] | None = None,
    scale: float = 1.0,
) -> TokenSet:
    """A file of points as a model of points was trained to see it, see `read_points`.

    A warning tells what the file lacks for that: features that are 0 at all points, and
    coordinates in another unit, as degrees or feet, so far as that shows.

    Args:
        features: names of columns; `None`: those that the model's file says it was trained with.
        scale: factor of the coordinates: 0.3048 for feet and a model that was trained in meters.

    Raises:
        OSError, ValueError, ImportError: it is no such file, has no points, or not the dimensions
            or the features that the model wants; the message names it.
    """
    check_number("scale", scale, above=0)
    config: Any = model.config
    names = features_of(model) if features is None else tuple(features)
    if names is not None and len(names) != config.in_channels:
        raise ValueError(
            f"features: {model.name} takes {config.in_channels} for each point, got "
            f"{', '.join(names) or 'none'}"
        )
    tokens = read_points(path, fields=(), features=names)
    if tokens.dimensions != config.dimensions:
        raise ValueError(
            f"{path}: has {tokens.dimensions}-D points, {model.name} takes {config.dimensions}-D"
        )
    if not tokens.num_tokens:
        raise ValueError(f"{path}: has no points")
    if tokens.channels != config.in_channels:
        raise ValueError(
            f"{path}: {model.name} takes {config.in_channels} features for each point and does not "
            "say which; name them (--features), in the order of its training"
        )
    if scale != 1:
        origin = None if tokens.origin is None else tokens.origin * scale
        tokens = TokenSet(tokens.positions * scale, tokens.features, tokens.sizes, origin=origin)
    doubts = [
        *_doubts_of_features(tokens, names or ()),
        *_doubts_of_unit(coordinate_unit(path) if scale == 1 else "", tokens, config.unit),
    ]
    if doubts:
        warnings.warn(f"{path}: {'; '.join(doubts)}", stacklevel=2)
    return tokens


def _doubts_of_features(tokens: TokenSet, names: Sequence[str]) -> list[str]:
    """In words, which features the file does not really have."""
    if tokens.num_tokens < _ENOUGH or not names:
        return []
    zero = [n for n, some in zip(names, tokens.features.any(0).tolist(), strict=True) if not some]
    if not zero:
        return []
    return [
        f"{' and '.join(zero)} {'is' if len(zero) == 1 else 'are'} 0 at all points, as where a "
        "file has none: the model was trained with it, expect worse classes"
    ]


def _doubts_of_unit(named: str, tokens: TokenSet, unit: float | None) -> list[str]:
    """In words, why distances may not be those that the model knows.

    Args:
        named: see `coordinate_unit`.
        unit: of the model, in the units of its training.
    """
    if unit is None:
        return []
    if named == "degrees":
        return ["coordinates are in degrees, where the model knows lengths: project them before"]
    if named:
        return [f"coordinates are in {named}; of a model trained in meters use --scale 0.3048"]
    apart = spacing_of(dict(zip(AXES, tokens.positions.numpy().T, strict=False)))
    if tokens.num_tokens < _ENOUGH or not apart or unit / _APART <= apart <= unit * _APART:
        return []
    return [
        f"points are about {apart:.2g} apart, where the model knows about {unit:g}: are "
        "coordinates in another unit (--scale), or in degrees (project them before)?"
    ]


def features_of(model: Model) -> tuple[str, ...] | None:
    """Names of the features that a model of points was trained with, `None` if it does not say."""
    if not model.of_points or model.config.in_channels == 0:
        return ()
    found = recipe_value(model, "data.features")
    named = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return tuple(found) if named and len(found) == model.config.in_channels else None


class _Scored(PointSegmentation):
    """Predictions are (n,) of a class and its probability."""

    def decode(
        self,
        output: Tensor,
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[np.ndarray]:
        # As exp(best - log of the sum): no (T, K) of probabilities.
        best, classes = output.float().max(1)
        scores = torch.exp(best - output.float().logsumexp(1)).cpu().numpy()
        found = np.empty(len(output), [("class", np.int32), ("score", np.float32)])
        found["class"], found["score"] = classes.cpu().numpy(), scores
        return np.split(found, np.cumsum([points for points, _ in sizes])[:-1])
