"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pointformer.models import Model

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="aff_nano.nuclei",
        help="NAME.TAG of weights in the package, or a .safetensors file (default: %(default)s)",
    )
    parser.add_argument("--rate", type=float, help="share of tokens kept by each merge, in (0, 1]")
    parser.add_argument("--alpha", type=float, help="weight of the learned score, 0 = uniform grid")
    parser.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    parser.add_argument(
        "--threads", type=int, help="CPU threads (default: all cores, but one for one picture)"
    )


def model_from(options: argparse.Namespace, pictures: int) -> Model:
    """The model that `--model`, `--rate` and `--alpha` ask for, in eval mode.

    Sets the number of threads too. One picture runs on one thread unless `--threads` says more:
    on a first run, compiling the kernels for several threads takes longer than it saves.
    """
    import torch

    from pointformer.models import create_model, load_model

    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {options.threads}")
    threads = options.threads or (1 if pictures == 1 else None)
    if threads is not None:
        torch.set_num_threads(threads)
    overrides = {
        name: getattr(options, name)
        for name in ("rate", "alpha")
        if getattr(options, name) is not None
    }
    if os.path.sep in options.model or options.model.endswith(".safetensors"):
        model = load_model(options.model, **overrides)
    else:
        name, _, tag = options.model.partition(".")
        model = create_model(name, pretrained=tag or True, **overrides).eval()
    try:
        return model.to(options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {options.device} cannot be used: {reason}") from None


def image_paths(arguments: list[str]) -> list[Path]:
    """Files named by paths, folders (their pictures, not deeper) and glob patterns, in order.

    Raises:
        ValueError: an argument matches nothing.
    """
    paths: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(p) for p in glob.glob(argument, recursive=True))
        if not found:
            raise ValueError(f"{argument}: no picture found (a file, a folder or a pattern)")
        paths += [p for p in found if p not in paths]
    return paths
