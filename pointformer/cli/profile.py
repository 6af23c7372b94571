"""Show where the time of a model goes, beside the least time that the device needs.

Runs a model of random weights (or NAME.TAG of the package, or a FILE) on a random picture, times
its ops and layers one by one, and prints for each the bytes that it must at least move, the
operations that it must at least do, and the floor that these give at the bandwidth of a plain copy
and the rate of a plain matrix product on this device. An op's name profiles that op only, as
--model calls it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
from typing import TYPE_CHECKING

from pointformer.cli.common import is_out_of_memory, use_threads

if TYPE_CHECKING:
    import torch

    from pointformer.models import Model
    from pointformer.profiling import Limits

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="MODEL_OR_OP", help="a model's name or file, or an op's name"
    )
    parser.add_argument("--model", help="the model that calls the op (default: aff_tiny)")
    parser.add_argument("--head", help="of the model, for example dense (default: classification)")
    parser.add_argument("--size", help="pixels: 512, or HEIGHTxWIDTH (default: the model's)")
    parser.add_argument("--batch", type=int, default=8, help="pictures (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: %(default)s")
    parser.add_argument("--backward", action="store_true", help="also the backward pass")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--impl", help="of the ops: reference, cpu, triton (default: the device's)")
    parser.add_argument("--repeats", type=int, help="timings of each (default: 20)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--warm", action="store_true", help="GPU: leave the L2 cache warm (default: cold)"
    )
    parser.add_argument(
        "--graph", action="store_true", help="GPU: time the whole forward pass as a CUDA graph"
    )
    parser.add_argument(
        "--predict",
        action="store_true",
        help="time nothing: bytes and operations, the bytes that the Triton kernels' tiles take "
        "from the L2 cache, and the time in which an H100 issues their instructions",
    )
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/S", help="for the floor, instead of measuring"
    )
    parser.add_argument(
        "--rate", type=float, metavar="TFLOP/S", help="for the floor, instead of measuring"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    import torch

    from pointformer.profiling import describe_machine, profile, table

    _check(options)
    use_threads(options.threads)
    gpu = torch.cuda.is_available() and not options.predict
    device = torch.device(options.device or ("cuda" if gpu else "cpu"))
    dtype = getattr(torch, DTYPES[options.dtype])
    model, only = _model(options)
    side = model.image_config.image_size
    size = (side, side) if options.size is None else _size(options.size)
    shape = (options.batch, model.config.in_channels, *size)
    try:
        limits = _limits(options, device, dtype)
        torch.manual_seed(0)
        rows = profile(
            model.to(device, dtype),
            torch.randn(shape, device=device).to(dtype),
            limits,
            backward=options.backward,
            repeats=0 if options.predict else options.repeats or 20,
            only=only,
            warm=options.warm,
            graph=options.graph,
            instructions=options.predict,
        )
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            message = f"out of memory on {device}: use a smaller --size or --batch"
            raise ValueError(message) from None
        raise
    if not rows:
        raise ValueError(f"{options.target}: {model.name} does not call it; see --model")
    machine = describe_machine(device)
    if options.json:
        report = {
            "command": shlex.join(["pointformer", *sys.argv[1:]]),
            "machine": machine,
            "bandwidth": limits and limits.bandwidth,
            "rate": limits and limits.rate,
            "model": model.name,
            "images": shape,
            "dtype": options.dtype,
            "impl": options.impl,
            "rows": [row.as_dict() for row in rows],
        }
        print(json.dumps(report, indent=1))
        return 0
    pictures = " x ".join(str(side) for side in shape)
    print(f"{model.name}, {pictures} {options.dtype}, impl {options.impl or 'of the device'}")
    name = machine.get("gpu", machine["processor"])
    threads = machine["threads"]
    print(f"{name}, {threads} thread{'s' * (threads != 1)}, torch {machine['torch']}")
    if limits is not None:
        print(f"{limits.bandwidth / 1e9:,.1f} GB/s, {limits.rate / 1e12:,.3g} TFLOP/s")
    print(f"\n{table(rows)}")
    return 0


def _check(options: argparse.Namespace) -> None:
    import torch

    for name, least in (("batch", 1), ("repeats", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}: expected at least {least}, got {value}")
    for name in ("bandwidth", "rate"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name}: expected a positive number, got {value}")
    if options.predict:
        for name in ("repeats", "warm", "graph"):
            if getattr(options, name):
                raise ValueError(f"--{name}: --predict times nothing")
        if importlib.util.find_spec("triton") is None:
            raise ValueError("--predict: Triton is not installed (pip install triton)")
        if options.device == "cuda":
            raise ValueError("--device: --predict counts on the CPU")
    gpu = torch.cuda.is_available()
    if options.device == "cuda" and not gpu:
        raise ValueError("--device: torch sees no GPU here")
    if options.device == "cpu" or not gpu:
        for name in ("warm", "graph"):
            if getattr(options, name):
                raise ValueError(f"--{name}: is for GPUs")


def _model(options: argparse.Namespace) -> tuple[Model, str | None]:
    """The model, with gradients for `--backward`, and the op if there is but one to profile."""
    from pointformer.models import create_model, list_models
    from pointformer.profiling import LAYERS, OPS

    name, only = options.target, None
    if name in OPS or name in LAYERS:
        if options.graph:
            raise ValueError("--graph: times a whole model, not an op")
        name, only = options.model or "aff_tiny", name
    elif options.model is not None:
        raise ValueError(f"--model: is for an op as the target, not for {name!r}")
    if name.partition(".")[0] not in list_models() and not os.path.exists(name):
        raise ValueError(
            f"{name}: no such model or op; models: {', '.join(list_models())}; "
            f"ops: {', '.join([*OPS, *LAYERS])}"
        )
    model = create_model(name, head=options.head, impl=options.impl)
    return model.train(options.backward), only


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--size: expected pixels such as 512 or 1024x2048, got {text!r}")
    return int(sides[0]), int(sides[-1])


def _limits(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Limits | None:
    """Machine as given, or measured; a prediction is for an H100."""
    from pointformer.profiling import Limits, measure_limits
    from pointformer.profiling.report import h100_limits

    given = options.bandwidth, options.rate
    if options.predict and given == (None, None):
        return h100_limits(dtype)
    if None in given:
        if options.predict:
            raise ValueError("--predict: give both --bandwidth and --rate, or neither")
        measured = measure_limits(device, dtype)
    bandwidth = measured.bandwidth if given[0] is None else given[0] * 1e9
    rate = measured.rate if given[1] is None else given[1] * 1e12
    return Limits(bandwidth, rate)
