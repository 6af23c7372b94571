"""Whole models, and the ops that heads add, on a GPU."""

import copy

import pytest
import torch

from helpers.deformable import LEARNED
from helpers.deformable import make_case as deformable_case
from helpers.gather import make_case as gather_case
from pointformer import deformable_attention, weighted_gather
from pointformer.models import capture, create_model

pytestmark = pytest.mark.gpu


def small_model():
    torch.manual_seed(0)
    return create_model("aff_nano", num_classes=10).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_matches_the_reference(dtype):
    features, index, weights = (x.cuda() for x in gather_case(300, 500, 9, 70))
    index[0, 0] = 300  # does not exist: left out
    features = features.to(dtype)
    known = index.masked_fill(index >= 300, -1)
    exact = weighted_gather(features.double(), known, weights.double(), impl="reference")
    found = weighted_gather(features, index, weights)
    torch.testing.assert_close(found, exact.to(dtype))
    assert torch.equal(found, weighted_gather(features, index, weights))


def test_deformable_attention_matches_the_reference():
    case = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in deformable_case(queries=200, channels=32).items()
    }

    def run(dtype, impl):
        leaves = {n: case[n].detach().to(dtype).requires_grad_() for n in LEARNED}
        out = deformable_attention(**{**case, **leaves}, impl=impl)
        return out, *torch.autograd.grad(out.sum(), list(leaves.values()))

    exact, plain, fused, again = (
        run(torch.float64, "reference"),
        run(torch.float32, "reference"),
        run(torch.float32, None),
        run(torch.float32, None),
    )
    for true, theirs, ours, second in zip(exact, plain, fused, again, strict=True):
        error, allowed = (ours - true).abs().max(), 2 * (theirs - true).abs().max()
        assert error <= allowed + 1e-5 * true.abs().max()
        assert torch.equal(ours, second)


def test_forward_equals_the_cpu():
    model = small_model().eval()
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        ours = model(images.cuda()).cpu()
        torch.testing.assert_close(ours, model.cpu()(images), atol=1e-3, rtol=1e-3)


def test_nothing_waits():
    """Neither a forward nor a training step, outside of a graph."""
    model = small_model()
    images = torch.randn(2, 3, 96, 96, device="cuda")
    model(images).sum().backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            model.eval()(images)
        model.train()(images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_steps_replay_as_a_graph():
    """Captured once, replayed on new images: the same losses as without a graph."""
    model = small_model().train()
    batches = [torch.randn(2, 3, 64, 64, device="cuda") for _ in range(5)]

    def step_of(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)

        def step(images):
            optimizer.zero_grad()
            loss = model(images).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        return step

    plain = step_of(copy.deepcopy(model))
    step = capture(step_of(model), batches[0], warmup=2)
    for _ in range(2):
        plain(batches[0])
    for batch in batches[1:]:
        assert step(batch).item() == pytest.approx(plain(batch).item(), rel=1e-4)


@pytest.mark.parametrize("head", ["classification", "dense", "mask2former", "hcformer", "stars"])
@pytest.mark.parametrize("sizes", [[(64, 48)] * 2, [(64, 48), (40, 96)]])
def test_inference_replays_as_a_graph(head, sizes):
    """Batches of images of one size and of several, from the CPU or the GPU."""
    torch.manual_seed(0)
    model = create_model("aff_nano", head=head, num_classes=3).cuda().eval()
    first, second = ([torch.randn(3, *size, device="cuda") for size in sizes] for _ in range(2))
    with torch.no_grad():
        run = capture(model, first)
        for images in (first, second):
            ours, theirs = run([image.cpu() for image in images]), model(images)
            if "former" in head:
                ours, theirs = ours.class_logits, theirs.class_logits
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, other)
