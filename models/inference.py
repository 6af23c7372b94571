"""Running a model without a trace: its modes, statistics and random numbers stay as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode within this context; then restore the mode of every part."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`eval_mode`, and nothing is recorded for gradients."""
    with eval_mode(model), torch.inference_mode():
        yield


@contextlib.contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Within it the model may run as in training; after it, its statistics and torch's random
    numbers on the CPU are as they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(random)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
