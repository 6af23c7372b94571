"""The machine: its name, and the speeds that it reaches."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from pointformer.profiling.timing import time_call
from pointformer.profiling.work import Work


@dataclass(frozen=True)
class Limits:
    """Speeds of a device in a plain copy and a plain matrix product.

    Attributes:
        bandwidth: bytes per second, read and written, of copying a large buffer.
        rate: operations per second of `torch.matmul` in one dtype, as torch is set.
    """

    bandwidth: float
    rate: float

    def floor(self, work: Work) -> float:
        """Seconds that the work takes at least: the longer of moving and computing."""
        return max(work.bytes / self.bandwidth, work.operations / self.rate)


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Copy, and multiply matrices of two sizes, on the device; the fastest counts.

    In several rounds, since what else the machine does slows some of them down.
    """
    on_gpu = device.type == "cuda"
    numbers, sides = (2**28, (4096, 8192)) if on_gpu else (2**25, (512, 1024))
    source = torch.ones(numbers, device=device)  # far more than a cache holds
    target = torch.empty_like(source)
    # Random numbers: on zeros a GPU runs faster than it can in earnest.
    matrices = [torch.randn(2, side, side, device=device).to(dtype) for side in sides]
    bandwidth = rate = 0.0
    for _ in range(5):
        copy = time_call(lambda: target.copy_(source), device, 4)
        bandwidth = max(bandwidth, 2 * source.nbytes / copy.q20)
        for pair in matrices:
            product = time_call(partial(torch.matmul, *pair), device, 4)
            rate = max(rate, 2 * pair.shape[1] ** 3 / product.q20)
    return Limits(bandwidth, rate)


def describe_machine(device: torch.device) -> dict[str, object]:
    """Names and versions that a figure depends on."""
    machine: dict[str, object] = {
        "device": str(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in ("torch", "triton", "numba", "pointformer"):
        try:
            machine[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine[package] = None
    machine["torch"] = torch.__version__  # with the build, such as +cpu
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "memory": properties.total_memory,
            "l2_cache": properties.L2_cache_size,
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": _driver(),
        }
    return machine


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else None
