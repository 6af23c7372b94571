"""Whole models: against their own Linear and convolution layers, and over image sizes."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pointformer.models import create_model


def layers_alone(model, images, training=False):
    """A function that runs the model's Linear and convolution layers on what they saw for
    `images`, and nothing else; each on all of its rows at once, as where gradients are recorded.
    `training`: their backward passes too."""
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda m, args: calls.append((m, args[0])))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.enable_grad():
        model(images)
    for handle in handles:
        handle.remove()
    # All but the images get gradients.
    inputs = [
        (module, torch.rand_like(x, requires_grad=i > 0)) for i, (module, x) in enumerate(calls)
    ]
    gradients = [torch.rand_like(module(x)) for module, x in inputs] if training else []

    def run():
        for module, x in inputs:
            module(x)

    def step():
        for (module, x), gradient in zip(inputs, gradients, strict=True):
            x.grad = None
            module(x).backward(gradient)
        model.zero_grad()

    return step if training else run


def training_step(model, images):
    """A function that runs forward and backward."""

    def step():
        model(images).square().mean().backward()
        model.zero_grad()

    return step


@pytest.mark.parametrize("name", ["aff_mini", "aff_mini_1_5th", "aff_tiny"])
def test_inference_at_224(compare, name):
    """Goal for Mini: at most 1.6x the layers' time (0.63x here), aiming at 1.4x (0.71x)."""
    model = create_model(name).eval()
    images = torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        compare(model=lambda: model(images), layers=layers_alone(model, images))


def test_training_step_at_224(compare):
    """Goal: at most 2x the time of the layers' forward and backward (0.5x here)."""
    model = create_model("aff_mini").train()
    images = torch.randn(16, 3, 224, 224)
    layers = layers_alone(model, images, training=True)
    compare(rounds=5, model=training_step(model, images), layers=layers)


def test_training_step_against_the_reference(compare):
    images = torch.randn(2, 3, 224, 224)
    sides = {
        "cpu": create_model("aff_mini"),
        "reference": create_model("aff_mini", impl="reference"),
    }
    compare(rounds=3, **{name: training_step(model, images) for name, model in sides.items()})


@pytest.fixture
def swin():
    """Hugging Face's Swin-T on images, giving logits."""
    transformers = pytest.importorskip("transformers", reason="pip install 'pointformer[bench]'")
    network = transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=1000))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images).logits

    return Logits()


def test_training_against_swin(compare, swin):
    """Goal: 1.1x."""
    model, images = create_model("aff_tiny").train(), torch.randn(8, 3, 224, 224)
    swin.train()
    compare(rounds=5, aff=training_step(model, images), swin=training_step(swin, images))


def test_inference_against_swin(compare, swin):
    """Goal: 1.35x."""
    model, images = create_model("aff_tiny").eval(), torch.randn(8, 3, 224, 224)
    swin.eval()
    with torch.no_grad():
        compare(rounds=5, aff=lambda: model(images), swin=lambda: swin(images))


HEADS = ["features", "mask2former", "hcformer"]
SIZES = [(256, 256), (512, 512), (1024, 1024), (1024, 2048), (2048, 2048)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("head", HEADS)
def test_time_over_image_size(benchmark, head, size):
    """Time per pixel should stay the same; read it in the extra information."""
    model = create_model("aff_mini", head=head, num_classes=150).eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        benchmark.pedantic(lambda: model(image), rounds=3, warmup_rounds=1)
    benchmark.extra_info["ns_per_pixel"] = 1e9 * benchmark.stats.stats.median / image[0, 0].numel()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("head", HEADS)
def test_memory_over_image_size(benchmark, head, size):
    """Peak memory of a fresh process; bytes per pixel are its growth over a small image's."""

    def peak(height, width):
        code = (
            "import resource, sys, torch\n"
            "from pathlib import Path\n"
            "from pointformer.models import create_model\n"
            f"model = create_model('aff_mini', head='{head}', num_classes=150).eval()\n"
            f"with torch.no_grad(): model(torch.randn(1, 3, {height}, {width}))\n"
            "status = Path('/proc/self/status')\n"
            "if status.exists():\n"  # Linux counts the parent's memory in `ru_maxrss`
            "    line = next(x for x in status.open() if x.startswith('VmHWM'))\n"
            "    print(int(line.split()[1]) * 1024)\n"
            "else:\n"
            "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # bytes on macOS
        )
        output = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        return int(output)

    height, width = size
    small = peak(64, 64)
    large = benchmark.pedantic(peak, args=size, rounds=1)
    benchmark.extra_info["MiB"] = large / 2**20
    benchmark.extra_info["bytes_per_pixel"] = (large - small) / (height * width - 64**2)
