"""All that needs a GPU, in one command: tests, figures beside their floors, rivals, sanitizers.

    python bench/gpu/run.py [--out bench/results/gpu.json] [--only PART ...] [--again]

Each part runs in a process of its own, so that an illegal access ends only its own part, and is
written to the file as it ends. A part whose result is there is not run again without `--again`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peers import Flex, gathered_attention
from torch import Tensor, nn

from pointformer import neighborhood_attention
from pointformer.models import Model, create_model
from pointformer.profiling import (
    OPS,
    Call,
    Limits,
    captured,
    describe_machine,
    measure_limits,
    profile,
    record,
    time_call,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DTYPE = torch.bfloat16
REPEATS = 50
# Of AFF-Tiny: (height, width), pictures.
FIGURES = [((512, 512), 8), ((1024, 2048), 8)]
GOALS = {
    "attention forward": "median at most 2.5 x floor, aim 1.7",
    "attention backward": "median at most 3.5 x floor, aim 2.5",
    "FlexAttention forward + backward": "at least 4 x our time",
    "gathered + SDPA forward + backward": "at least 10 x our time and 10 x our memory",
    "search share of a forward pass": "at most 0.1",
    "images per second": {"aff_mini": 28_000, "aff_tiny": 10_000, "aff_small": 7_000},
    "training": "no tensor of size T x M is kept; peak beside the Linear layers' activations",
}


def device() -> torch.device:
    return torch.device("cuda")


def network(name: str, size: tuple[int, int], batch: int) -> tuple[Model, Tensor]:
    """A model of random weights and random pictures in the dtype of the benchmarks."""
    torch.manual_seed(0)
    model = create_model(name).eval().to(device(), DTYPE)
    return model, torch.randn(batch, 3, *size, device=device()).to(DTYPE)


def or_out_of_memory(function: Callable[[], object]) -> object:
    """Its result; where the device has too little memory, that is the result."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        torch.cuda.empty_cache()


def pytest_gpu() -> dict[str, object]:
    """The tests marked gpu."""
    return command([sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests")])


def figures() -> dict[str, object]:
    """Every op and layer of AFF-Tiny beside its floor, and the share of clustering and search."""
    limits = measure_limits(device(), DTYPE)
    result: dict[str, object] = {"bandwidth": limits.bandwidth, "rate": limits.rate}
    for size, batch in FIGURES:
        key = case_name(size, batch)
        result[key] = or_out_of_memory(lambda s=size, b=batch: figures_of(s, b, limits))
    return result


def figures_of(size: tuple[int, int], batch: int, limits: Limits) -> dict[str, object]:
    model, images = network("aff_tiny", size, batch)
    forward = profile(model, images, limits, repeats=REPEATS, graph=device().type == "cuda")
    search = sum(row.times.q50 for row in forward if row.op in OPS and OPS[row.op].search)
    total = forward[-1].times.q50
    training = or_out_of_memory(
        lambda: profile(model, images, limits, backward=True, repeats=REPEATS)
    )
    return {
        "search_share": search / total,
        "inference": [row.as_dict() for row in forward],
        "training": training if isinstance(training, str) else [r.as_dict() for r in training],
    }


def attention() -> dict[str, object]:
    """Attention of AFF-Tiny's first stages against what PyTorch has."""
    result = {}
    for size, batch in FIGURES:
        model, images = network("aff_tiny", size, batch)
        calls = {
            call.stage: call
            for call in record(model, images, backward=True)
            if call.name == "neighborhood_attention" and call.stage in ("1", "2")
        }
        del model, images
        for stage, call in calls.items():
            result[f"{case_name(size, batch)} stage {stage}"] = compare(call)
    return result


def sides_of(call: Call, compiled: bool = True) -> dict[str, Callable]:
    """Our attention and its rivals without a blank token: functions of query, key, value, position
    weight and position bias. FlexAttention also without bias, should the bias be what is slow."""
    positions, lists = call.arguments["positions"], call.arguments["neighborhoods"]
    sides: dict[str, Callable] = {
        "ours": lambda q, k, v, w, b: neighborhood_attention(
            q, k, v, positions, lists, position_weight=w, position_bias=b
        ),
        "gathered + SDPA": lambda q, k, v, w, b: gathered_attention(
            q, k, v, positions, lists, w, b
        ),
    }
    for block in (128, 64):
        flex = Flex(positions, lists, block, compiled)
        sides[f"FlexAttention {block}"] = flex
        sides[f"FlexAttention {block}, no bias"] = lambda q, k, v, w, b, f=flex: f(q, k, v)
    return sides


def compare(call: Call, compiled: bool = True) -> dict[str, object]:
    """All sides on the arguments of a call: what `measure` says, or the error of a rival."""
    call = call.differentiable()
    names = ("query", "key", "value", "position_weight", "position_bias")
    leaves = [call.arguments[name] for name in names]
    sides = sides_of(call, compiled)
    with torch.no_grad():
        expected = sides["ours"](*leaves)
    grad = torch.randn_like(expected)
    result: dict[str, object] = {}
    for name, side in sides.items():
        torch.compiler.reset()  # else the number of compilations reaches its limit
        target = None if "no bias" in name else expected
        try:
            result[name] = or_out_of_memory(lambda f=side, x=target: measure(f, leaves, grad, x))
        except Exception as error:  # a rival's compiler may fail in any way
            if name == "ours":
                raise
            result[name] = f"{type(error).__name__}: {error}"[:500]
    return result


def measure(
    run: Callable, leaves: list[Tensor], grad: Tensor, expected: Tensor | None
) -> dict[str, object]:
    """Times in microseconds, 20%, 50% and 80%; memory beyond the inputs in bytes; the error."""

    def both() -> None:
        torch.autograd.grad(run(*leaves), leaves, grad, allow_unused=True)

    error = None
    with torch.no_grad():
        if expected is not None:
            error = float((run(*leaves).float() - expected.float()).abs().max())
        forward = time_call(lambda: run(*leaves), grad.device, REPEATS)
    both()
    memory = peak_memory(both)
    total = time_call(both, grad.device, REPEATS)
    return {
        "forward_us": [1e6 * t for t in forward.quantiles],
        "forward_backward_us": [1e6 * t for t in total.quantiles],
        "memory": memory,
        "largest_difference": error,
    }


def peak_memory(run: Callable[[], object]) -> int | None:
    """Most bytes allocated at a time beyond those before; `None` without a GPU."""
    if device().type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def throughput() -> dict[str, object]:
    """Images per second at 224 px, batch 64, as a CUDA graph; the L2 cache is cold."""
    result = {}
    for name in ("aff_mini", "aff_tiny", "aff_small"):
        model, images = network(name, (224, 224), 64)
        with torch.no_grad():
            replay = captured(lambda m=model, x=images: m(x))
            times = time_call(replay, device(), REPEATS)
        result[name] = {"ms": [1e3 * t for t in times.quantiles], "images_s": 64 / times.q50}
    return result


def training_memory() -> dict[str, object]:
    """Peak memory of a training step of AFF-Tiny at 512 px, batch 8, beyond weights and their
    gradients."""
    model, images = network("aff_tiny", (512, 512), 8)
    model.train()

    def step() -> None:
        model(images).float().sum().backward()

    step()  # compiles, and makes the gradients
    return {"peak": peak_memory(step), **kept_tensors(model, images)}


def kept_tensors(model: Model, images: Tensor) -> dict[str, object]:
    """Run a step forward and backward, and list what autograd keeps, in bytes.

    Returns:
        kept: all tensors but the weights; linear_inputs, linear_outputs: of the Linear layers;
        tokens_by_neighbors: shapes of kept tensors that have a column per token of a neighborhood.
    """
    storages: dict[int, int] = {}
    shapes: set[tuple[int, ...]] = set()
    layers = {"linear_inputs": 0, "linear_outputs": 0}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        shapes.add(tuple(x.shape))
        return x

    def layer(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        layers["linear_inputs"] += args[0].nbytes
        layers["linear_outputs"] += output.nbytes

    hooks = [m.register_forward_hook(layer) for m in model.modules() if isinstance(m, nn.Linear)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(images)
    for hook in hooks:
        hook.remove()
    output.float().sum().backward()
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    widths = set(model.config.neighborhood_size)
    return {
        "kept": sum(storages.values()),
        **layers,
        "tokens_by_neighbors": sorted(shape for shape in shapes if widths & set(shape[1:])),
    }


def sanitizer(tool: str) -> dict[str, object]:
    """A small run of every kernel under compute-sanitizer."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        return {"skipped": "compute-sanitizer is not installed"}
    return command(
        [found, "--tool", tool, "--error-exitcode", "9", sys.executable, str(HERE / "small.py")],
        # Each tensor is an allocation, so that a step out of it is seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )


def memcheck() -> dict[str, object]:
    """Accesses out of bounds."""
    return sanitizer("memcheck")


def racecheck() -> dict[str, object]:
    """Races in shared memory."""
    return sanitizer("racecheck")


PARTS: dict[str, Callable[[], dict[str, object]]] = {
    part.__name__: part
    for part in (
        pytest_gpu,
        figures,
        attention,
        throughput,
        training_memory,
        memcheck,
        racecheck,
    )
}


def case_name(size: tuple[int, int], batch: int) -> str:
    return f"aff_tiny {size[0]}x{size[1]} batch {batch}"


def command(arguments: list[str], **environment: str) -> dict[str, object]:
    """Run a program: its exit code and the end of what it printed."""
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return {"exit_code": done.returncode, "output": done.stdout[-3000:].splitlines()}


def load(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.exists() else {}


def store(path: Path, **changes: object) -> None:
    """Add to the file, or leave it as it was."""
    report = load(path) | changes
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def run_part(name: str, path: Path) -> dict[str, object]:
    """In a process of its own, which writes its result to the file."""
    part = command([sys.executable, str(HERE / "run.py"), "--out", str(path), "--in-process", name])
    if part["exit_code"]:
        store(path, **{name: {"error": part["output"][-20:]}})
    return load(path)[name]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="also parts whose result is there")
    parser.add_argument("--in-process", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(1, "run.py: error: torch sees no GPU here\n")
    path = options.out.resolve()
    if options.in_process:
        store(path, **{options.in_process: PARTS[options.in_process]()})
        return 0
    store(
        path,
        command=shlex.join(["python", *sys.argv]),
        machine=describe_machine(device()),
        dtype=str(DTYPE).removeprefix("torch."),
        goals=GOALS,
    )
    failed = 0
    for name in options.only or PARTS:
        known = load(path).get(name)
        if known is None or "error" in known or options.again:
            known = run_part(name, path)
        bad = "error" in known or known.get("exit_code", 0) != 0
        failed += bad
        print(f"{name}: {'failed' if bad else 'skipped' if 'skipped' in known else 'done'}")
    print(f"results in {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
