"""Random changes of point sets for training, which their classes follow.

As in `transforms`: called with the points (a `TokenSet` of one sample), their `PointAnnotation` and
a generator of random numbers, and equal generators give equal results. Lengths are in the units of
the positions; z is up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from pointformer._checks import check_count, check_number
from pointformer.data.point_sets import PointAnnotation
from pointformer.tokens import TokenSet

Sample = tuple[TokenSet, PointAnnotation]


class _Checked:
    """Checks of fields by their names."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            name, value = field.name, getattr(self, field.name)
            if name == "points":
                check_count(name, value)
            elif name == "scales":
                if len(value) != 2 or not 0 < value[0] <= value[1]:
                    raise ValueError(
                        f"{name}: expected two positive numbers that rise, got {tuple(value)}"
                    )
            elif name in ("degrees", "deviation"):
                check_number(name, value, least=0)
            elif isinstance(value, float | int) and not isinstance(value, bool):
                check_number(name, value, least=0, most=1)


def _selected(tokens: TokenSet, annotation: PointAnnotation, rows: np.ndarray) -> Sample:
    index = torch.from_numpy(rows)
    labels = None if annotation.labels is None else annotation.labels[rows]
    return tokens.select(index, [len(rows)]), replace(annotation, labels=labels)


def _moved(tokens: TokenSet, positions: Tensor) -> TokenSet:
    return TokenSet(positions, tokens.features, tokens.sizes, origin=tokens.origin)


@dataclass(frozen=True)
class RandomRegion(_Checked):
    """The points nearest to a random one along the ground, as many as `points`; positions are then
    relative to the region's lower corner."""

    points: int

    def __call__(
        self, tokens: TokenSet, annotation: PointAnnotation, rng: np.random.Generator
    ) -> Sample:
        if tokens.num_tokens > self.points:
            ground = tokens.positions[:, :2]
            middle = ground[int(rng.integers(tokens.num_tokens))]
            distance = (ground - middle).square().sum(1).numpy()
            rows = np.sort(np.argpartition(distance, self.points)[: self.points])
            tokens, annotation = _selected(tokens, annotation, rows)
        return tokens.with_origin(None), annotation


@dataclass(frozen=True)
class RandomDrop(_Checked):
    """Leave out a random share of the points, at most `share`; one is always kept."""

    share: float = 0.5

    def __call__(
        self, tokens: TokenSet, annotation: PointAnnotation, rng: np.random.Generator
    ) -> Sample:
        count = tokens.num_tokens
        kept = max(1, round(count * (1 - rng.uniform(0, self.share))))
        rows = np.sort(rng.permutation(count)[:kept])
        return _selected(tokens, annotation, rows)


@dataclass(frozen=True)
class RandomRotation(_Checked):
    """A turn about the vertical axis by at most so many `degrees` either way."""

    degrees: float = 180.0

    def __call__(
        self, tokens: TokenSet, annotation: PointAnnotation, rng: np.random.Generator
    ) -> Sample:
        angle = math.radians(rng.uniform(-self.degrees, self.degrees))
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = tokens.positions[:, 0], tokens.positions[:, 1]
        turned = tokens.positions.clone()
        turned[:, 0], turned[:, 1] = cos * x - sin * y, sin * x + cos * y
        return _moved(tokens, turned), annotation


@dataclass(frozen=True)
class RandomMirror(_Checked):
    """Mirror images: probabilities along x, and along y."""

    x: float = 0.5
    y: float = 0.5

    def __call__(
        self, tokens: TokenSet, annotation: PointAnnotation, rng: np.random.Generator
    ) -> Sample:
        signs = torch.ones(tokens.dimensions)
        for axis, probability in enumerate((self.x, self.y)):
            if rng.random() < probability:
                signs[axis] = -1
        return _moved(tokens, tokens.positions * signs), annotation


@dataclass(frozen=True)
class RandomScale(_Checked):
    """A random factor of lengths.

    Attributes:
        scales: least and largest.
        each_axis: another factor along each axis.
    """

    scales: tuple[float, float] = (0.8, 1.25)
    each_axis: bool = False

    def __call__(
        self, tokens: TokenSet, annotation: PointAnnotation, rng: np.random.Generator
    ) -> Sample:
        factors = rng.uniform(*self.scales, tokens.dimensions if self.each_axis else 1)
        scale = torch.from_numpy(factors.astype(np.float32))
        return _moved(tokens, tokens.positions * scale), annotation


@dataclass(frozen=True)
class RandomJitter(_Checked):
    """Noise of the positions: normally distributed, cut off at three deviations.

    Attributes:
        deviation: standard deviation, as a share of the root mean square distance of the points
            from their middle where `relative`, else in the units of the positions.
    """

    deviation: float = 0.01
    relative: bool = False

    def __call__(
        self, tokens: TokenSet, annotation: PointAnnotation, rng: np.random.Generator
    ) -> Sample:
        noise = rng.standard_normal(tokens.positions.shape, dtype=np.float32).clip(-3, 3)
        deviation = self.deviation
        if self.relative:
            centered = tokens.positions - tokens.positions.mean(0)
            deviation *= float(centered.square().sum(1).mean().sqrt())
        return _moved(tokens, tokens.positions + deviation * torch.from_numpy(noise)), annotation
