"""Rows of profiles, limits, and what machine code issues: by hand."""

from types import SimpleNamespace

import torch

from pointformer.profiling import Limits, Row, Times, Work, launches, machine, table
from pointformer.profiling.launches import Card, Launch
from pointformer.profiling.machine_code import Code, Loop, _unrolled, rounds_of
from pointformer.profiling.report import h100_limits


def test_rows_for_people_and_for_programs():
    times = Times(1e-6, 2e-6, 0.1234)
    row = Row("1", "knn", "forward", 2, Work(1_500_000, 20), 30, 1.23456, times, 1e-6, 4e-6)
    assert row.as_dict() == {
        "stage": "1", "op": "knn", "pass": "forward", "calls": 2, "bytes": 1_500_000,
        "operations": 20, "predicted_l2_bytes": 30, "predicted_rows_per_token": 1.235,
        "time_us": [1.0, 2.0, 123400.0], "floor_us": 1.0, "issue_us": 4.0, "bound_us": 4.0,
        "ratio": 2.0,
    }  # fmt: skip
    both = row + row
    assert (both.calls, both.work, both.traffic, both.rows) == (4, row.work * 2, 60, None)
    assert (both.times, both.floor, both.issue) == (times * 2, 2e-6, 8e-6)
    plain = Row("2", "linear", "forward", 1, Work(1, 1))
    assert (row + plain).as_dict().keys() == plain.as_dict().keys()
    assert Row("1", "knn", "forward", 1, Work(), 11 * 10**12, floor=1.0, issue=0.5).bound == 2
    # Titles, then cells: small numbers with an exponent, three digits of all others.
    lines = [" ".join(line.split()) for line in table([row, plain]).splitlines()]
    assert lines == [
        "stage op pass calls 20% ms 50% ms 80% ms MB GFLOP floor ms ratio issue ms bound ms",
        "1 knn forward 2 1.0e-03 2.0e-03 123 1.50 2.0e-08 1.0e-03 2.00 4.0e-03 4.0e-03",
        "2 linear forward 1 - - - 1.0e-06 1.0e-09 - - - -",
    ]
    for megabytes, shown in ((1234.5, "1,234"), (100, "100"), (99.9, "99.9"), (10, "10.0"),
                             (9.5, "9.50"), (1, "1.00"), (0.5, "0.500"), (0.0096, "0.010"),
                             (0.0094, "9.4e-03"), (0, "-")):  # fmt: skip
        line = table([Row("1", "knn", "forward", 1, Work(round(megabytes * 1e6), 1))])
        assert line.splitlines()[1].split()[4] == shown


def test_limits_are_what_was_moved_and_multiplied(monkeypatch):
    """Read and written; the fastest round and size, at the time of a fifth of the calls."""
    given = iter([4.0, 8.0, 1.0] + [2.0, 1.0, 1.0] * 4)
    monkeypatch.setattr(machine, "time_call", lambda *a: Times(next(given), 99.0, 99.0))
    found = machine.measure_limits(torch.device("cpu"), torch.float32)
    assert found == Limits(2 * 4 * 2**25 / 2.0, 2 * 1024**3 / 1.0)
    assert h100_limits(torch.float32) == Limits(3.0e12, 50e12)
    assert h100_limits(torch.bfloat16) == Limits(3.0e12, 790e12)


def test_rounds_of_unrolled_loops():
    """A copy of four rounds and one of the rest: a round takes a fourth of the first."""
    four = Loop("start", ("kernel.py", 2), {"load": 8, "other": 12})
    one = Loop("start", ("kernel.py", 2), {"load": 2, "other": 4})
    inside = Loop("start.least", ("kernel.py", 3), {"other": 7})
    loops = list(_unrolled([four, one, inside]))
    assert [loop.unroll for loop in loops] == [4, 1, 1]
    code = Code(tuple(loops), {"other": 5})
    assert code.per_round() == {"": 5, "start": 5, "start.least": 7}
    assert code.issued({"start": 3, "start.least": 2, "least": 9}) == 5 + 3 * 5 + 2 * 7
    assert rounds_of({"least": 9}, "start.least") == 9
    near = Loop("start", ("kernel.py", 2), {"load": 2, "other": 6})  # a copy, not unrolled
    assert [loop.unroll for loop in _unrolled([near, one])] == [1, 1]


def test_a_launch_issues_for_all_warps(monkeypatch):
    monkeypatch.setattr(launches, "code_of", lambda variant: Code((), {"other": 5}))
    launch = Launch(SimpleNamespace(name="k", num_warps=4), (2, 3), {})
    assert launch.instructions() == 2 * 3 * 4 * 5
    assert Card(2, 10.0).issue(160) == 2  # four schedulers each
