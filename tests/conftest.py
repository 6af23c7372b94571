"""Options and profiles shared by all tests."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton decides at import whether kernels are interpreted: without a GPU they are, in these tests.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("default", max_examples=100, **_COMMON)
settings.register_profile("thorough", max_examples=5000, **_COMMON)
settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes")
    parser.addoption(
        "--data",
        default=os.environ.get("POINTFORMER_DATA"),
        help="folder with the larger data sets (or the environment variable POINTFORMER_DATA)",
    )


def pytest_ignore_collect(collection_path, config):
    """With --benchmark-only there is nothing to find here: see bench/conftest.py."""
    return True if config.getoption("--benchmark-only", default=False) else None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
