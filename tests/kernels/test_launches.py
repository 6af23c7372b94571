"""How many kernels a model launches on a GPU: small stages take the time of their launches."""

from collections import Counter
from unittest import mock

import pytest
import torch

from helpers.fake_gpu import fake_gpu
from pointformer import _checks
from pointformer.geometry import selection
from pointformer.models import create_model


def launches_of(name, size, batch, *, training=False, **options):
    """Names of what a forward pass launches in bfloat16, and of what its backward pass does."""
    # Autograd asks for the device of what it differentiates, which CPU builds of torch lack.
    device = "cpu" if training else "cuda"
    model = create_model(name, impl="triton", **options).bfloat16().train(training)
    unread = mock.Mock(return_value=False)
    with (
        mock.patch.object(_checks, "can_read", unread),
        mock.patch.object(selection, "can_read", unread),
        fake_gpu() as launches,
        torch.set_grad_enabled(training),
    ):
        state = {
            key: torch.empty(value.shape, dtype=value.dtype, device=device)
            for key, value in model.state_dict(keep_vars=True).items()
        }
        for key, _ in model.named_parameters():
            state[key].requires_grad_(training)
        images = torch.empty(batch, 3, size, size, dtype=torch.bfloat16, device=device)
        logits = torch.func.functional_call(model, state, images)
        forward = list(launches)
        if training:
            logits.sum().backward()
        return forward, launches[len(forward) :]


def assert_at_most(limit, launches):
    assert len(launches) <= limit, f"{len(launches)}: {Counter(launches).most_common()}"


def test_inference():
    """AFF-Tiny: 30 blocks in four stages."""
    forward, _ = launches_of("aff_tiny", 224, 64)
    assert_at_most(330, forward)


@pytest.mark.parametrize("stage", range(4))
def test_a_block(stage):
    """Four projections, attention, two sums with LayerNorm, activation."""
    depths = [1, 1, 1, 1]
    fewer, _ = launches_of("aff_tiny", 224, 2, depths=tuple(depths))
    depths[stage] = 2
    more, _ = launches_of("aff_tiny", 224, 2, depths=tuple(depths))
    assert_at_most(8, list((Counter(more) - Counter(fewer)).elements()))


def test_a_training_step():
    forward, backward = launches_of("aff_tiny", 224, 64, training=True)
    assert_at_most(557, forward)
    assert_at_most(799, backward)
