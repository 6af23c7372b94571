"""What `run.py` runs: parts, each with cases and a limit in seconds.

A part's cases are made when they are reached, so that those of a part share a model or a call.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import small
import torch
from peers import Flex, gathered_attention
from report import Case, Part, Report
from torch import Tensor, nn

from pointformer import neighborhood_attention
from pointformer.models import Model, capture, create_model
from pointformer.profiling import (
    OPS,
    Call,
    Limits,
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


def usable() -> bool:
    """Whether this process can use the GPU; not after an illegal access."""
    try:
        torch.cuda.synchronize()
    except (AssertionError, RuntimeError):  # built without, there is none, or it failed
        return False
    return True


def machine() -> dict[str, object]:
    """What figures depend on; `name` tells cards apart."""
    return {"name": torch.cuda.get_device_name(), **describe_machine(device())}


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


def small_ops() -> Iterator[Case]:
    """Every op on a few tokens: what is broken shows here first."""
    for dtype, dimensions in small.CASES:
        yield f"{dtype} {dimensions}-D", lambda d=dtype, n=dimensions: small.check(device(), d, n)


def tests() -> Iterator[Case]:
    """The tests marked gpu, dealt out to workers; each is a case of its own."""
    yield "pytest", run_tests


def run_tests() -> object:
    report = Report(Path(os.environ["GPU_REPORT"]))
    status = report.status("tests")
    files = [str(f) for f in sorted((ROOT / "tests").rglob("test_*.py")) if marked_gpu(f)]
    arguments = ["-m", "gpu", "-p", "record_tests", "-p", "no:cacheprovider"]
    arguments += ["--continue-on-collection-errors", *shlex.split(os.environ["GPU_PYTEST"])]
    if find_spec("xdist"):  # workers hide each other's compiling
        arguments += ["-n", str(min(12, len(os.sched_getaffinity(0))))]
    if find_spec("pytest_timeout"):
        arguments += ["--timeout", "100", "--timeout-method", "thread"]
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / "done.json"
        done.write_text(json.dumps([case for case, state in status.items() if state == "done"]))
        code = command(
            [sys.executable, "-m", "pytest", "-v", *arguments, *files],
            GPU_TESTS_DONE=str(done),
            PYTHONPATH=os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            HYPOTHESIS_STORAGE_DIRECTORY=folder,
        )
    if code not in (0, 5):  # 5: all were done
        raise RuntimeError(f"pytest ended with code {code}")
    return {"exit_code": code}


def marked_gpu(file: Path) -> bool:
    return "mark.gpu" in file.read_text()


@functools.cache
def limits_of_card() -> Limits:
    return measure_limits(device(), DTYPE)


def figures() -> Iterator[Case]:
    """Every op and layer of AFF-Tiny beside its floor, and the share of clustering and search."""
    for size, batch in FIGURES:
        for name, function in (("inference", inference), ("training", training)):
            yield (
                f"{case_name(size, batch)} {name}",
                lambda f=function, s=size, b=batch: or_out_of_memory(
                    lambda: f(s, b, limits_of_card())
                ),
            )


def inference(size: tuple[int, int], batch: int, limits: Limits) -> dict[str, object]:
    model, images = network("aff_tiny", size, batch)
    rows = profile(model, images, limits, repeats=REPEATS, graph=device().type == "cuda")
    searches = [row for row in rows if row.op in OPS and OPS[row.op].search]
    times: list[float] = [row.times.q50 for row in searches]
    return {
        "bandwidth": limits.bandwidth,
        "rate": limits.rate,
        "search_share": sum(times) / rows[-1].times.q50,
        "rows": [row.as_dict() for row in rows],
    }


def training(size: tuple[int, int], batch: int, limits: Limits) -> dict[str, object]:
    model, images = network("aff_tiny", size, batch)
    rows = profile(model, images, limits, backward=True, repeats=REPEATS)
    return {"rows": [row.as_dict() for row in rows]}


def attention() -> Iterator[Case]:
    """Attention of AFF-Tiny's first stages against what PyTorch has."""
    for size, batch in FIGURES:
        for stage in ("1", "2"):
            sides = functools.cache(lambda s=size, b=batch, n=stage: attention_sides(s, b, n))
            for name in SIDES:
                case = f"{case_name(size, batch)} stage {stage}: {name}"
                yield case, lambda s=sides, n=name: s()[n]()


def attention_sides(size: tuple[int, int], batch: int, stage: str) -> dict[str, Callable]:
    model, images = network("aff_tiny", size, batch)
    for call in record(model, images, backward=True):
        if call.name == "neighborhood_attention" and call.stage == stage:
            return compare(call)
    raise LookupError(f"no attention in stage {stage}")


BLOCKS = (128, 64)
SIDES = ["ours", "gathered + SDPA"]
SIDES += [f"FlexAttention {block}{rest}" for block in BLOCKS for rest in ("", ", no bias")]


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
    for block in BLOCKS:
        flex = Flex(positions, lists, block, compiled)
        sides[f"FlexAttention {block}"] = flex
        sides[f"FlexAttention {block}, no bias"] = lambda q, k, v, w, b, f=flex: f(q, k, v)
    return sides


def compare(call: Call, compiled: bool = True) -> dict[str, Callable[[], object]]:
    """For each side, what measures it on the arguments of a call, as `measure` says."""
    call = call.differentiable()
    names = ("query", "key", "value", "position_weight", "position_bias")
    leaves = [call.arguments[name] for name in names]
    sides = sides_of(call, compiled)
    with torch.no_grad():
        expected = sides["ours"](*leaves)
    grad = torch.randn_like(expected)

    def measured(name: str) -> object:
        torch.compiler.reset()  # else the number of compilations reaches its limit
        target = None if "no bias" in name else expected
        return or_out_of_memory(lambda: measure(sides[name], leaves, grad, target))

    return {name: functools.partial(measured, name) for name in sides}


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


def throughput() -> Iterator[Case]:
    """Images per second at 224 px, batch 64, as a CUDA graph; the L2 cache is cold."""
    for name in ("aff_mini", "aff_tiny", "aff_small"):
        yield name, lambda n=name: images_per_second(n)


def images_per_second(name: str) -> dict[str, object]:
    model, images = network(name, (224, 224), 64)
    with torch.no_grad():
        replay = capture(lambda: model(images))
        times = time_call(replay, device(), REPEATS)
    return {"ms": [1e3 * t for t in times.quantiles], "images_s": 64 / times.q50}


def training_memory() -> Iterator[Case]:
    """Peak memory of a training step of AFF-Tiny at 512 px, batch 8, beyond weights and their
    gradients."""
    yield "aff_tiny 512x512 batch 8", step_memory


def step_memory() -> dict[str, object]:
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


def sanitizer(tool: str, cases: list[tuple[str, int]]) -> Iterator[Case]:
    """A small run of every kernel under compute-sanitizer."""
    for dtype, dimensions in cases:
        yield (
            f"{dtype} {dimensions}-D",
            lambda d=dtype, n=dimensions: sanitized(tool, ["--dtype", d, "--dimensions", str(n)]),
        )


def sanitized(tool: str, arguments: list[str]) -> dict[str, object]:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    program = [sys.executable, str(HERE / "small.py"), *arguments]
    code = command(
        [found, "--tool", tool, "--error-exitcode", "9", *program],
        # Each tensor is an allocation, so that a step out of it is seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    if code:
        raise RuntimeError(f"{tool} ended with code {code}, see log.txt")
    return {"exit_code": code}


def memcheck() -> Iterator[Case]:
    """Accesses out of bounds."""
    return sanitizer("memcheck", small.CASES)


def racecheck() -> Iterator[Case]:
    """Races in shared memory, first where products are tiles of bfloat16."""
    return sanitizer("racecheck", sorted(small.CASES, key=lambda case: case != ("bfloat16", 2)))


PARTS = {
    "small": Part(small_ops, 150),
    "tests": Part(tests, 330),
    "figures": Part(figures, 180),
    "throughput": Part(throughput, 120),
    "attention": Part(attention, 300),
    "training_memory": Part(training_memory, 60),
    "memcheck": Part(memcheck, 240),
    "racecheck": Part(racecheck, 180),
}


def case_name(size: tuple[int, int], batch: int) -> str:
    return f"aff_tiny {size[0]}x{size[1]} batch {batch}"


def command(arguments: list[str], **environment: str) -> int:
    """Run a program, which prints where this one does: its exit code."""
    return subprocess.run(arguments, cwd=ROOT, env=os.environ | environment).returncode
