"""Compile Triton kernels for GPUs that are not there, and read what they need.

    python tests/aot.py MODULE... [--targets cuda:80,cuda:90,cuda:100,hip:gfx942] [--every N]

Prints one JSON object per line: kernel, constants, target, registers, spills, shared memory. It
runs in a process of its own, because Triton's interpreter, which the other tests use, must be off.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module

import torch
import triton
from triton.backends.compiler import GPUTarget

SHARED_MEMORY = {
    "cuda:80": 163 << 10,
    "cuda:90": 227 << 10,
    "cuda:100": 227 << 10,
    "hip:gfx942": 64 << 10,
}
TARGETS = tuple(SHARED_MEMORY)


def target_of(name):
    backend, arch = name.split(":")
    return GPUTarget("hip", arch, 64) if backend == "hip" else GPUTarget("cuda", int(arch), 32)


def resources(compiled, target):
    """Registers per thread, bytes spilled to memory per thread, and bytes of shared memory."""
    if target.startswith("hip"):
        text = compiled.asm["amdgcn"]

        def count(name):
            return int(re.search(rf"\.{name}:?\s+(\d+)", text).group(1))

        # Spilled scalar registers go to lanes of vector registers, not to memory.
        spilled = max(count("vgpr_spill_count"), count("private_segment_fixed_size"))
        return count("vgpr_count"), spilled, compiled.metadata.shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return int(used["REG"]), int(used["STACK"]), compiled.metadata.shared


def plain(value):
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    assert os.environ.get("TRITON_INTERPRET", "0") != "1"
    for module in arguments.modules:
        variants = import_module(f"pointformer.kernels.triton.{module}").variants()
        for variant in itertools.islice(variants, 0, None, arguments.every):
            for name in arguments.targets.split(","):
                compiled = variant.compile(target_of(name))
                registers, spilled, shared = resources(compiled, name)
                row = {
                    "kernel": variant.name,
                    "types": [str(kind).removeprefix("torch.") for kind in variant.arguments],
                    "constants": {key: plain(value) for key, value in variant.constants.items()},
                    "num_warps": variant.num_warps,
                    "num_stages": variant.num_stages,
                    "target": name,
                    "registers": registers,
                    "spilled": spilled,
                    "shared": shared,
                    "shared_limit": SHARED_MEMORY[name],
                    "triton": triton.__version__,
                    "torch": torch.__version__,
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    sys.exit(main())
