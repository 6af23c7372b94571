"""What a launch hands to Triton, with a stand-in for the driver: nothing is computed."""

import importlib
import os
import pkgutil
import subprocess
import sys

import torch

import pointformer.kernels.triton as triton_kernels
from pointformer.kernels.triton import gather, runtime
from pointformer.kernels.triton.runtime import Variant

SCRIPT = """
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CALLS = []


class Utils:
    load_binary = lambda self, name, kernel, shared, device: (1, 1, 64, 0, 1024)
    get_device_properties = lambda self, device: {"max_shared_mem": 232448, "warpSize": 32}


class Driver:
    utils = Utils()
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_active_torch_device = lambda self: torch.device("cpu")
    map_python_to_cpp_type = lambda self, kind: kind

    def launcher_cls(self, source, metadata):
        signature = tuple(source.signature.values())
        return lambda *given: CALLS.append((signature, metadata.hash, given[:3], given[9:]))


driver.set_active(Driver())
import triton

from pointformer.kernels.triton import gather

variant = gather._variant(gather.gather_fwd_kernel, torch.float32, 16)
assert variant is gather._variant(gather.gather_fwd_kernel, torch.float32, 16)
rows, index = torch.rand(64, 16), torch.zeros(32, 4, dtype=torch.int32)
weights, out = torch.rand(32, 4), torch.empty(32, 16)
launches = [
    (rows, 32, 64, 4, 16),
    (rows[:, 1:], 32, 64, 4, 16),  # not aligned
    (rows, 32, 64, 1, 16),  # numbers are not specialized for
    (rows, 32, 1 << 31, 4, 16),  # does not fit 32 bits
]
options = variant._options("cuda")
for _ in range(2):  # compiled, then as they were compiled
    for features, *numbers in launches:
        arguments = (features, index, weights, out, *numbers)
        variant.launch((2, 1), *arguments)
        variant.kernel[(2, 1)](*arguments, **variant.constants, **options)
    for ours, theirs in zip(CALLS[::2], CALLS[1::2], strict=True):
        assert ours[:3] == theirs[:3], (ours, theirs)
        assert all(x is y or x == y for x, y in zip(ours[3], theirs[3], strict=True))
assert len({call[1] for call in CALLS}) == 3
for kind in (torch.float16, torch.float64):
    try:
        variant.launch((2, 1), rows.to(kind), *arguments[1:])
    except TypeError as error:
        assert "argument 0 is torch.float" in str(error), error
    else:
        raise AssertionError(kind)
variant.launch((0, 1), *arguments)
assert len(CALLS) == 16


# What was compiled is launched without Triton's own lookup, which takes several times as long.
with mock.patch.object(type(variant.kernel), "run", side_effect=AssertionError("looked up")):
    for features, *numbers in launches:
        variant.launch((2, 1), features, index, weights, out, *numbers)
assert len(CALLS) == 20
"""


def test_launches_are_what_triton_would_launch_without_its_lookup():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_variants_are_made_once():
    """What was compiled is kept in them."""
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        content = vars(importlib.import_module(f"{triton_kernels.__name__}.{module.name}"))
        for name, function in content.items():
            if name.endswith("_variant"):
                assert hasattr(function, "cache_info"), f"{module.name}.{name}"


def test_amd_compiles_apart_for_large_storages(monkeypatch):
    """Small ones are read with 32-bit offsets, which would read zeros beyond."""
    seen = []
    monkeypatch.setattr(runtime, "_BACKEND", "hip")
    monkeypatch.setattr(
        Variant, "_run", lambda self, grid, given, device, traits: seen.append(traits)
    )
    variant = gather._variant(gather.gather_fwd_kernel, torch.float16, 16)
    index, weights = torch.zeros(32, 4, dtype=torch.int32), torch.rand(32, 4)
    for rows in (64, 128, (1 << 26) + 1):
        features = torch.empty(rows, 16, dtype=torch.float16, device="meta")
        out = torch.empty(32, 16, dtype=torch.float16)
        variant.launch((2, 1), features, index, weights, out, 32, rows, 4, 16)
    assert seen[0] == seen[1] != seen[2]
