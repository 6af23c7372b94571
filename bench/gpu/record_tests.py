"""A plugin of pytest: each result goes to the report at once; tests that are done do not run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from report import Report


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers send their results to the first process
        config.pluginmanager.register(_Recorder(Report(Path(os.environ["GPU_REPORT"]))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A list written before the run: all workers, late ones too, must find the same tests."""
    done = set(json.loads(Path(os.environ["GPU_TESTS_DONE"]).read_text()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


class _Recorder:
    def __init__(self, report: Report) -> None:
        self.report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            status = {"passed": "done"}.get(report.outcome, report.outcome)
            self.report.settle(
                "tests",
                report.nodeid,
                status,
                seconds=report.duration,
                **({} if report.passed else {"error": report.longreprtext}),
            )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.report.settle("tests", report.nodeid, "failed", error=report.longreprtext)
