"""Compile Triton kernels for GPUs that are not there, and read what they need.

    python tests/aot.py [MODULE...] [--targets cuda:80,...] [--covering N] > rows.jsonl

Prints one JSON object per line: kernel, constants, target, registers, spills, shared memory. It
runs in a process of its own, because Triton's interpreter, which the other tests use, must be off.
"""

import argparse
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from importlib import import_module

import triton
from triton.backends.compiler import GPUTarget

from pointformer.kernels import triton as kernels

# Most shared memory of one program, in bytes.
SHARED_MEMORY = {
    "cuda:80": 163 << 10,
    "cuda:90": 227 << 10,
    "cuda:100": 227 << 10,
    "hip:gfx942": 64 << 10,
}
TARGETS = tuple(SHARED_MEMORY)


def modules():
    """Names of the kernel files that have variants."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    return [name for name in names if hasattr(_module(name), "variants")]


def _module(name):
    return import_module(f"pointformer.kernels.triton.{name}")


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
        used = dict(re.findall(r"(REG|STACK):(\d+)", _dump("--dump-resource-usage", file.name)))
        stack = int(used["STACK"])
        # Some kernels reserve a stack frame and never touch it: that is no spill.
        if stack and not re.search(r"\b(STL|LDL)\b", _dump("-sass", file.name)):
            stack = 0
    return int(used["REG"]), stack, compiled.metadata.shared


def _dump(option, path):
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


def plain(value):
    return value if isinstance(value, int | float | str | bool | None) else str(value)


def traits(variant, target):
    """What two specializations of one kernel can differ in, by name."""
    types = {f"type {i}": str(kind) for i, kind in enumerate(variant.arguments)}
    constants = {key: plain(value) for key, value in variant.constants.items()}
    launch = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    return {"target": target, **constants, **launch, **types}


def identity(variant):
    """The same for variants that compile to the same code."""
    return variant.name, json.dumps(traits(variant, ""), sort_keys=True), variant.fp_fusion


def covering(cases, number):
    """A part of (variant, target) cases in which every `number` traits of a kernel that occur
    together do so: every trait for 1, every pair for 2."""

    def combinations(case):
        variant, target = case
        items = sorted(traits(variant, target).items(), key=str)
        return {(variant.name, *some) for some in itertools.combinations(items, number)}

    remaining = [(case, combinations(case)) for case in cases]
    missing = set().union(*(combined for _, combined in remaining))
    while missing:
        best = max(remaining, key=lambda entry: len(entry[1] & missing))
        missing -= best[1]
        remaining.remove(best)
        yield best[0]


def row(variant, target):
    compiled = variant.compile(target_of(target))
    registers, spilled, shared = resources(compiled, target)
    return {
        "kernel": variant.name,
        "target": target,
        "types": [str(kind).removeprefix("torch.") for kind in variant.arguments],
        "constants": {key: plain(value) for key, value in variant.constants.items()},
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "fp_fusion": variant.fp_fusion,
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "triton": triton.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description="Compile kernels ahead of time.")
    parser.add_argument("modules", nargs="*", help="kernel files; all by default")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument(
        "--covering", type=int, metavar="N", help="a subset with every N traits of a kernel"
    )
    parser.add_argument("--part", default="0/1", help="I/N: every Nth case, beginning with case I")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels cannot be compiled while interpreting")
    part, parts = (int(number) for number in arguments.part.split("/"))
    for module in arguments.modules or modules():
        unique = {identity(variant): variant for variant in _module(module).variants()}
        cases = [
            (variant, target)
            for variant in unique.values()
            for target in arguments.targets.split(",")
        ]
        chosen = list(covering(cases, arguments.covering)) if arguments.covering else cases
        for variant, target in chosen[part::parts]:
            print(json.dumps(row(variant, target)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
