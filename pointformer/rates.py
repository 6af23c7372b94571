"""Shares of the tokens that merges keep: drawn in training, and chosen for a time afterwards."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from pointformer._checks import check_number, check_option, describe
from pointformer.models import Model
from pointformer.models.config import AFFConfig, PointConfig
from pointformer.prediction import recipe_value

_FINEST = 2**0.5  # between the rates that are tried for a time
_UNTRAINED = 8  # of a model that was trained at one rate: down to this part of it
_REPEATS = 3  # of a measurement
_ALIKE = 1.1  # pictures of up to so many times the pixels count as of one size
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Rates:
    """A range of rates, which are shares of the tokens that merges keep.

    Attributes:
        least, most: its ends, in (0, 1].
        merges: whose rate it is. "first": of the first merge, on which the later ones' work depends
            too; their rates stay those of the model. "alike": the same for all. "apart": for all,
            but each is drawn by itself.
    """

    least: float
    most: float
    merges: Literal["first", "alike", "apart"] = "first"

    def __post_init__(self) -> None:
        for name in ("least", "most"):
            check_number(name, getattr(self, name), above=0, most=1)
        check_option("merges", self.merges, ("first", "alike", "apart"))
        if self.least > self.most:
            raise ValueError(f"least: expected at most {self.most:g}, the most, got {self.least:g}")

    @classmethod
    def of(cls, model: Model) -> Rates:
        """That a model was trained on; of one that was trained at one rate, from there down to an
        eighth of it, where it finds less than one that was trained on the range.

        Raises:
            ValueError, TypeError: see `rates_of`.
        """
        own = rates_of(model)[0]
        trained = recipe_value(model, "rates")
        return cls(own / _UNTRAINED, own) if trained is None else cls(**trained)

    def check(self, model: Model) -> None:
        """Raise `ValueError` if the model has no rates, or is scored at others than it learns."""
        own = rates_of(model)
        own = own[:1] if self.merges == "first" else own
        if not all(self.least <= rate <= self.most for rate in own):
            raise ValueError(
                f"rates: expected a range with the model's own rate in it, {own[0]:g}, at which it "
                f"is scored, got {self.least:g} to {self.most:g}; see options.rate"
            )

    def draw(self, model: Model, rng: np.random.Generator) -> tuple[float, ...]:
        """The rates of all merges: of equal probability in each octave."""
        own = rates_of(model)
        low, high = math.log(self.least), math.log(self.most)
        if self.merges == "apart":
            return tuple(np.exp(rng.uniform(low, high, len(own))).clip(0, 1).tolist())
        return self.at(model, min(math.exp(rng.uniform(low, high)), 1.0))

    def at(self, model: Model, rate: float) -> tuple[float, ...]:
        """The rates of all merges at one of the range."""
        own = rates_of(model)
        return (rate, *own[1:]) if self.merges == "first" else (rate,) * len(own)

    def steps(self) -> list[float]:
        """From the most down to the least, two in each octave."""
        many = max(1, math.ceil(math.log(self.most / self.least, _FINEST) - 1e-6))
        share = self.least / self.most
        return [self.most * share ** (step / many) for step in range(many)] + [self.least]


def rates_of(model: Model) -> tuple[float, ...]:
    """Shares of the tokens that a model's merges keep.

    Raises:
        ValueError: its merges choose none.
        TypeError: it is no model.
    """
    if not isinstance(model, Model):
        raise TypeError(f"model: expected a Model, got {describe(model)}")
    config = model.config
    chosen = isinstance(config, PointConfig) or (
        isinstance(config, AFFConfig) and config.merge == "adaptive"
    )
    if not chosen or len(config.dims) < 2:
        raise ValueError(
            f"model: {model.name} has no merges that keep a share of the tokens, a rate"
        )
    assert isinstance(config, AFFConfig | PointConfig)
    return config.rates


class TimeBudget:
    """A time in which a model is to answer, as well as it can: at the largest rate that fits.

    The times are measured on this machine, on the first input of each size; sizes up to a tenth
    below a known one take its rate. Rates are those of the model's training, see `Rates.of`.
    `segment` and `segment_points` take one as `budget`; `run` is for anything else.

    Args:
        model: whose rate is chosen; it has its own again after each call.
        seconds: for one input, by the clock.
        clock: tells seconds.

    Raises:
        TypeError, ValueError: there is no such time, or the model has no rate.
    """

    def __init__(
        self, model: Model, seconds: float, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._range = Rates.of(model)
        check_number("seconds", seconds, above=0)
        self.model, self.seconds = model, seconds
        self._clock = clock
        self._known: dict[int, tuple[float, ...] | str] = {}  # by size, or what is wrong
        self._alone = threading.Lock()  # times of calls side by side say nothing

    def run(self, size: int, call: Callable[[], _Result]) -> _Result:
        """What `call` returns, with the model at the largest rate at which it takes no longer than
        `seconds`. The first call of a size runs it several times.

        Args:
            size: of what it looks at, in pixels or points.
            call: runs the model.

        Raises:
            ValueError: it takes longer at the least rate.
        """
        with self._alone:
            near = [known for known in self._known if size <= known <= _ALIKE * size]
            key = min(near, default=size)
            if key not in self._known:
                self._known[key] = self._fitting(size, call)
            rates = self._known[key]
            if isinstance(rates, str):
                raise ValueError(f"budget: {rates}")
            with self.model.reconfigured(rate=rates):
                return call()

    def _fitting(self, size: int, call: Callable[[], object]) -> tuple[float, ...] | str:
        """The largest rates that fit, found by halving; or what is wrong."""
        steps = self._range.steps()
        first, end = 0, len(steps)  # where the first that fits is among them
        taken = 0.0
        while first < end:
            middle = (first + end) // 2
            taken = self._time_at(steps[middle], call)
            if taken <= self.seconds:
                end = middle
            else:
                first = middle + 1
        if first < len(steps):
            return self._range.at(self.model, steps[first])
        kind, how = ("points", "") if self.model.of_points else ("pixels", ", by a lower scale")
        return (
            f"{size:,} {kind} take {taken:.3g} s even at the least rate, {steps[-1]:.3g}, more "
            f"than {self.seconds:.3g} s; allow more time, or let the model see fewer {kind}{how}"
        )

    def _time_at(self, rate: float, call: Callable[[], object]) -> float:
        """Seconds of the slowest of some calls, or of the first that takes too long."""
        longest = 0.0
        with self.model.reconfigured(rate=self._range.at(self.model, rate)):
            call()  # what is done once only, such as compiling
            for _ in range(_REPEATS):
                start = self._clock()
                call()
                longest = max(longest, self._clock() - start)
                if longest > self.seconds:
                    break
        return longest


def check_budget(budget: object, model: Model) -> None:
    """Raise if it is no budget of this model."""
    if budget is not None and not isinstance(budget, TimeBudget):
        raise TypeError(f"budget: expected a TimeBudget or None, got {describe(budget)}")
    if budget is not None and budget.model is not model:
        raise ValueError(
            f"budget: expected one of this model, got one of another, {budget.model.name}"
        )
