"""Shares of tokens that merges keep: ranges of them, and the largest that fits into a time."""

import contextlib
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.tiles import write_point_model
from pointformer import TokenSet, segment
from pointformer.models import create_model, load_model
from pointformer.rates import Rates, TimeBudget, rates_of
from pointformer.segmentation.clouds import segment_points

SMALL = {"dims": (8, 8, 8), "depths": 1, "heads": 1, "neighborhood_size": 16, "cluster_size": 8}
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def small(trained=None, **options):
    options = {"head": "dense", "num_classes": 3, "task": "semantic", **SMALL, **options}
    model = create_model("aff_nano", **options).eval()
    model.trained = None if trained is None else {"recipe": {"rates": trained}}
    return model


class Machine:
    """A clock of calls that take a time by the model's rates, and the rates of all calls."""

    def __init__(self, model, seconds_at=lambda rates: rates[0]):
        self.model, self.seconds_at = model, seconds_at
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def call(self):
        self.calls.append(self.model.config.rates)
        self.now += self.seconds_at(self.model.config.rates)
        return self.model.config.rates


WIDE = {"least": 1 / 32, "most": 0.5, "merges": "first"}
MODEL = small(WIDE)


@given(st.floats(0.01, 1.0), st.floats(0.0, 0.4))
def test_the_largest_rate_that_fits_is_taken(seconds, always):
    machine = Machine(MODEL, lambda rates: always + rates[0])
    budget = TimeBudget(MODEL, seconds, clock=machine)
    steps = Rates(**WIDE).steps()
    assert (steps[0], steps[-1], len(steps)) == (0.5, 1 / 32, 9)
    # What a clock says is a difference of its readings, which are rounded.
    fitting = [r for r in steps if always + r <= seconds - 1e-9]
    unsure = [r for r in steps if abs(always + r - seconds) <= 1e-9]
    if unsure:
        return
    if not fitting:
        with pytest.raises(ValueError, match=r"budget: 100 pixels take .* even at the least rate"):
            budget.run(100, machine.call)
    else:
        assert budget.run(100, machine.call) == (fitting[0], 0.25)
    assert MODEL.config.rates == (0.25, 0.25)
    assert len(machine.calls) <= 4 * 4 + 1  # four halvings of nine


def test_a_size_is_measured_once():
    model = small(WIDE)
    machine = Machine(model)
    budget = TimeBudget(model, 0.2, clock=machine)
    for size, fresh in ((1000, True), (1000, False), (910, False), (905, True), (1001, True)):
        machine.calls.clear()
        assert budget.run(size, machine.call)[0] == pytest.approx(0.177, abs=1e-3)
        assert (len(machine.calls) > 1) == fresh, size
    budget = TimeBudget(model, 0.02, clock=machine)
    for fresh in (True, False):  # what cannot be neither
        machine.calls.clear()
        with pytest.raises(ValueError, match=r"0\.0312 s even at .* 0\.0312, more than 0\.02 s"):
            budget.run(1000, machine.call)
        assert bool(machine.calls) == fresh


def test_the_rate_is_that_of_the_nearest_size():
    """Of known ones that are not smaller."""
    model = small(WIDE)
    machine = Machine(model, lambda rates: rates[0] * size / 1000)
    budget = TimeBudget(model, 0.26, clock=machine)
    for size, rate in ((1000, 0.25), (1090, 0.177), (995, 0.25), (1001, 0.177)):
        assert budget.run(size, machine.call)[0] == pytest.approx(rate, abs=1e-3), size


def test_a_rate_that_takes_just_the_time_fits():
    model = small(WIDE)
    machine = Machine(model, lambda rates: 3.0 if rates[0] > 0.3 else 1.0)
    assert TimeBudget(model, 1.0, clock=machine).run(10, machine.call)[0] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("merges", "later"), [("first", (0.25, 0.25)), ("alike", (0.1, 0.1)), ("apart", (0.1, 0.1))]
)
def test_a_budget_changes_the_merges_that_were_trained_so(merges, later):
    model = small({"least": 0.1, "most": 0.5, "merges": merges}, dims=(8,) * 4)
    machine = Machine(model)
    found = TimeBudget(model, 0.11, clock=machine).run(10, machine.call)
    assert found == pytest.approx((0.1, *later))


@pytest.mark.parametrize(("slow", "fits"), [(0, True), (1, False), (3, False), (4, True)])
def test_one_slow_call_counts_and_the_first_does_not(slow, fits):
    """The first compiles; a time that is kept to now and then is not kept."""
    model = small({"least": 0.25, "most": 0.25, "merges": "first"})
    machine = Machine(model, lambda _: 9.0 if len(machine.calls) == slow + 1 else 0.1)
    budget = TimeBudget(model, 1.0, clock=machine)
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="budget: 10 pixels"):
        budget.run(10, machine.call)
    assert fits or len(machine.calls) == slow + 1  # nothing is tried further


def test_a_failed_call_leaves_the_model_as_it_was():
    model = small(WIDE)

    def fail():
        raise KeyError("broken")

    with pytest.raises(KeyError):
        TimeBudget(model, 1.0).run(10, fail)
    assert model.config.rate == 0.25


def test_segment_keeps_to_a_budget():
    model = small(WIDE)
    seen = []

    def clock():  # a call at a rate takes as many seconds
        seen.append(seen[-1] + model.config.rates[0] if seen else 0.0)
        return seen[-1]

    budget = TimeBudget(model, 0.1, clock=clock)
    result = segment(model, PICTURE, budget=budget)
    assert result.rates[0] == max(r for r in Rates(**WIDE).steps() if r <= 0.1)
    assert result.rates[1:] == (0.25,)
    assert result.tokens[0] == 120
    assert result.tokens[1] == int(120 * result.rates[0])
    with model.reconfigured(rate=result.rates):
        assert np.array_equal(segment(model, PICTURE).labels, result.labels)
    assert segment(model, PICTURE).rates == (0.25, 0.25)
    before = len(seen)
    segment(model, PICTURE, budget=budget)
    assert len(seen) == before


@pytest.mark.parametrize(
    ("options", "pixels"),
    [({}, "1,920"), ({"scale": 0.5}, "480"), ({"tile": 32, "overlap": 8}, "4,096")],
)
def test_a_size_is_of_all_that_the_model_sees(options, pixels):
    """Scaled, and of all windows."""
    model = small({"least": 0.25, "most": 0.25})
    with pytest.raises(ValueError, match=f"^budget: {pixels} pixels take"):
        segment(model, PICTURE, budget=TimeBudget(model, 1e-9), **options)


def test_points_keep_to_a_budget(tmp_path):
    model = load_model(write_point_model(tmp_path / "m.safetensors", features=())).eval()
    points = TokenSet(torch.rand(300, 3, generator=torch.Generator().manual_seed(0)) * 20)
    budget = TimeBudget(model, 1e9)
    assert segment_points(model, points, budget=budget).rates == rates_of(model)
    with pytest.raises(ValueError, match=r"^budget: 300 points .* see fewer points$"):
        segment_points(model, points, budget=TimeBudget(model, 1e-9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TimeBudget(create_model("swin_mini"), 1.0), "swin_mini has no merges that keep"),
        (lambda: TimeBudget(small(merge="patch"), 1.0), "model: aff_nano has no merges that keep"),
        (lambda: TimeBudget(small(dims=(8,)), 1.0), "model: aff_nano has no merges that keep"),
        (lambda: TimeBudget(small(), 0), "seconds: expected"),
        (
            lambda: segment(small(), PICTURE, budget=TimeBudget(small(), 1.0)),
            "budget: expected one",
        ),
        (lambda: Rates(0.5, 0.25), "least: expected at most 0.25"),
        (lambda: Rates(0.0, 0.25), "least: expected"),
        (lambda: Rates(0.1, 1.5), "most: expected"),
        (lambda: Rates(0.1, 0.5, "some"), "merges: expected one of"),
        (lambda: Rates(0.3, 0.5).check(small()), "model's own rate in it, 0.25, .* got 0.3 to 0.5"),
        (lambda: Rates(0.1, 0.5, "alike").check(small(rate=(0.5, 0.6))), "model's own rate"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_things_are_no_budget():
    with pytest.raises(TypeError, match="budget: expected a TimeBudget or None, got float"):
        segment(small(), PICTURE, budget=0.05)
    with pytest.raises(TypeError, match="model: expected a Model"):
        TimeBudget("aff_nano", 0.05)


def test_rates_are_drawn_evenly_in_octaves():
    model = small(rate=(0.25, 0.5))
    rng = np.random.default_rng(0)
    drawn = {
        merges: np.array([Rates(1 / 32, 0.5, merges).draw(model, rng) for _ in range(2000)])
        for merges in ("first", "alike", "apart")
    }
    for rates in drawn.values():
        assert 1 / 32 <= rates[:, 0].min() < 1 / 31
        assert 0.48 < rates[:, 0].max() <= 0.5
        octaves = np.histogram(np.log2(rates[:, 0]), bins=4, range=(-5, -1))[0]
        assert np.abs(octaves / 2000 - 0.25).max() < 0.03
    assert (drawn["first"][:, 1] == 0.5).all()
    assert (drawn["alike"][:, 0] == drawn["alike"][:, 1]).all()
    assert abs(np.corrcoef(drawn["apart"].T)[0, 1]) < 0.1


def test_a_range_is_of_the_merges_that_it_is_for():
    """The own rates of the others may lie outside."""
    model = small(rate=(0.5, 0.6))
    Rates(0.1, 0.5).check(model)
    for merges in ("alike", "apart"):
        Rates(0.1, 0.6, merges).check(model)
        with pytest.raises(ValueError, match=r"model's own rate in it, 0\.5"):
            Rates(0.1, 0.5, merges).check(model)


def test_one_rate_is_a_range_too():
    rates = Rates(0.2, 0.2)
    assert rates.steps() == [0.2, 0.2]
    assert rates.draw(small(), np.random.default_rng(0)) == pytest.approx((0.2, 0.25))
    assert Rates.of(small(rate=0.5)).steps()[::2] == pytest.approx([0.5, 0.25, 0.125, 0.0625])


def test_the_ends_of_a_range_are_in_it():
    for ends in ((0.25, 0.5), (0.1, 0.25), (0.25, 0.25)):
        Rates(*ends).check(small())


def test_calls_in_other_threads_wait():
    """Times of calls side by side say nothing, and one would run at the rate of another."""
    model, now, most = small(WIDE), [], []

    def call():
        now.append(threading.current_thread())
        most.append(len(now))
        time.sleep(0.002)
        now.pop()

    budget = TimeBudget(model, 60.0)
    threads = [threading.Thread(target=budget.run, args=(100, call)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
