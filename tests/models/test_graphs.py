"""`capture`: inference and training steps recorded once and replayed on other inputs."""

import copy

import numpy as np
import pytest
import torch

from helpers.graphs import recorded_graphs
from pointformer.models import AFFConfig, Model, capture

CONFIG = AFFConfig(
    dims=(16, 32), depths=(1, 1), heads=(2, 2), mlp_ratio=1.0, neighborhood_size=(48, 48)
)


@pytest.fixture
def recorded():
    with recorded_graphs():
        yield


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model("tiny", CONFIG, "classification", 3)


@pytest.mark.parametrize("sizes", [[(48, 40)] * 2, [(48, 40), (32, 64)]])
def test_inference(model, sizes, recorded):
    def images():
        pictures = [torch.randn(3, *size) for size in sizes]
        return torch.stack(pictures) if len(set(sizes)) == 1 else pictures

    model.eval()
    with torch.no_grad():
        run = capture(model, images())
        first, second = images(), images()
        ours = run(first)
        assert not ours.requires_grad
        torch.testing.assert_close(ours, model(first))
        kept = ours.clone()
        assert run(second) is ours
        torch.testing.assert_close(ours, model(second))
        assert not torch.equal(ours, kept)


def test_training_steps(model, recorded):
    """Loss, gradients, optimizer and statistics go on as without a graph."""

    def step_of(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(images, labels):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            return {"loss": loss}

        return step

    batches = [(torch.randn(2, 3, 32, 32), torch.randint(3, (2,))) for _ in range(4)]
    plain = step_of(copy.deepcopy(model))
    step = capture(step_of(model), *batches[0], warmup=2)
    for _ in range(2 + 1):  # the stand-in runs what it records
        plain(*batches[0])
    for batch in batches[1:]:
        ours, theirs = step(*batch)["loss"], plain(*batch)["loss"]
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_other_values_stay(recorded):
    def scaled(inputs):
        return inputs["x"] * inputs["factor"]

    run = capture(scaled, {"x": torch.ones(2), "factor": 3})
    assert run({"x": torch.full((2,), 2.0), "factor": 3}).tolist() == [6, 6]
    with pytest.raises(ValueError, match="inputs: expected 3, as captured, got 4"):
        run({"x": torch.ones(2), "factor": 4})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(3),), r"a float32 tensor of shape \(2,\) on cpu, as captured, got .*\(3,\)"),
        ((torch.ones(2).double(),), "a float32 tensor.*, as captured, got a float64 tensor"),
        ((2.0,), "a float32 tensor of shape.*, as captured, got 2.0"),
        (([torch.ones(2)],), r"\('tensor',\), got \(\['tensor'\],\)"),
        ((), r"\('tensor',\), got \(\)"),
    ],
)
def test_other_inputs_are_named(inputs, message, recorded):
    run = capture(torch.neg, torch.ones(2))
    with pytest.raises(ValueError, match=f"^inputs: expected {message}"):
        run(*inputs)


def test_what_cannot_be_captured():
    with pytest.raises(TypeError, match="function: expected a model or a function, got int 3"):
        capture(3, torch.ones(2))
    with pytest.raises(ValueError, match="inputs: expected tensors on one GPU, got cpu"):
        capture(torch.neg, torch.ones(2))
    with pytest.raises(ValueError, match="inputs: expected tensors on one GPU, got none"):
        capture(torch.neg)
    with pytest.raises(ValueError, match="warmup"):
        capture(torch.neg, torch.ones(2), warmup=0)


def test_arrays_of_numpy_are_values_that_stay(recorded):
    values = np.array([3.0, np.nan])
    run = capture(lambda x, factor: x * float(factor[0]), torch.ones(2), values)
    assert run(torch.ones(2), values.copy()).tolist() == [3, 3]
    for other in (np.array([3.0, 5.0]), np.array([3.0]), values.astype(np.float32)):
        with pytest.raises(ValueError, match="inputs: expected"):
            run(torch.ones(2), other)
