"""Compile what a model needs, so that no later command does: for images of containers.

Runs the model on small random pictures, or point clouds, of every kind. CPU kernels are compiled
as they run on one thread and on several, for the CPU at hand (NUMBA_CPU_NAME=x86-64-v3 and
NUMBA_CPU_FEATURES= serve several kinds, where later commands have them too); with --device cuda,
Triton's for that GPU. They are kept in NUMBA_CACHE_DIR, else beside the package, else in the user's
cache folder, and read from there even where it cannot be written.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pointformer.cli.common import DEFAULT_MODEL, add_model_arguments, model_from

if TYPE_CHECKING:
    from torch import Tensor

    from pointformer import TokenSet
    from pointformer.models import Model

# All tokens attend to all in some stages, and in none.
SIDES, POINTS = ((64, 64), (192, 256)), (64, 20_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.set_defaults(model=None)
    parser.add_argument(
        "--head", help="a new head for --model NAME, as for training (default: the model's own)"
    )
    parser.add_argument("--training", action="store_true", help="also what training needs")


def run(options: argparse.Namespace) -> int:
    from pointformer.kernels.cpu import cache

    before = set(cache.builds())
    compile_for(_model(options), options.training)
    builds = cache.builds()
    for folder in sorted({path.parent for path in builds}):
        here = [path for path in builds if path.parent == folder]
        new = sum(path not in before for path in here)
        size = sum(path.stat().st_size for path in here) / 2**20
        print(f"{folder}: {len(here)} compiled CPU kernels, {new} of them new, {size:.1f} MiB")
    if options.device.startswith("cuda"):
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        print(f"{folder}: compiled GPU kernels, {size:.1f} MiB")
        return 0
    return 0 if builds else 1  # the reason was a warning


def compile_for(model: Model, training: bool = False) -> None:
    """Compile, or load, every kernel that `model` needs, in its builds for one thread and several.

    Args:
        model: on the device that it will run on; keeps its mode and parameters.
        training: also the backward passes.
    """
    import torch

    from pointformer.kernels.cpu.runtime import every_build
    from pointformer.models.inference import eval_mode

    # In eval mode the kernels are the same, and nothing of the model moves.
    with every_build(), eval_mode(model):
        for batch in (_clouds if model.of_points else _pictures)(model):
            with torch.no_grad():
                model(batch)
            if training:
                outputs = [x for x in _tensors(model(batch)) if x.requires_grad]
                parameters = [p for p in model.parameters() if p.requires_grad]
                total = torch.stack([x.sum() for x in outputs]).sum()
                torch.autograd.grad(total, parameters, allow_unused=True)


def _pictures(model: Model) -> Iterator[Tensor | list[Tensor]]:
    import torch

    like = next(model.parameters())
    pictures = [like.new_empty(model.config.in_channels, *size) for size in SIDES]
    pictures = [torch.rand_like(picture).sub_(0.5) for picture in pictures]
    yield from (picture[None] for picture in pictures)
    yield pictures


def _clouds(model: Model) -> Iterator[TokenSet]:
    import torch

    from pointformer import TokenSet
    from pointformer.models.config import PointConfig

    config, device = model.config, next(model.parameters()).device
    assert isinstance(config, PointConfig)
    clouds = [
        TokenSet(torch.rand(n, config.dimensions), torch.rand(n, config.in_channels)).to(device)
        for n in POINTS
    ]
    yield from map(model.preprocess, (*clouds, TokenSet.cat(clouds)))


def _model(options: argparse.Namespace) -> Model:
    if options.head is None:
        options.model = options.model or DEFAULT_MODEL
        return model_from(options)
    if options.model is None:
        raise ValueError(
            "--head: needs --model NAME, as in --model aff_nano: the default, "
            f"{DEFAULT_MODEL}, has a head"
        )
    return model_from(options, pretrained=False, head=options.head, num_classes=2)


def _tensors(value: object) -> Iterator[Tensor]:
    """Of an output of any head."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
