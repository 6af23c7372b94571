"""Whole models in one graph: compiled without breaks, exported, free of waits on a GPU."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from helpers.fake_gpu import fake_gpu
from pointformer import TokenSet
from pointformer.kernels.triton.runtime import INTERPRETED
from pointformer.models import AFFConfig, Model, PointConfig, create_model

TINY = AFFConfig(dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)
TWO_STAGES = AFFConfig(
    dims=(16, 32), depths=(1, 1), heads=(2, 2), neighborhood_size=(48, 48), curve="snake"
)
RELEASED = TINY.override(curve="snake", remainder="last")
MASKS = {"queries": 4, "dim": 32, "hidden": 32, "decoder_layers": 2}
HEADS = {
    "classification": {},
    "mask2former": MASKS | {"pixel_hidden": 32, "pixel_layers": 1},
    "hcformer": MASKS,
}


def make(head="classification", config=TINY, impl=None):
    torch.manual_seed(0)
    return Model("tiny", config, head, 3, impl, **HEADS[head])


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch.compiler.reset()
    counters.clear()


@pytest.mark.parametrize("config", [TINY, TINY.override(reach=96)], ids=["plain", "reach"])
def test_training_step_compiles_without_graph_breaks(config):
    images = torch.randn(2, 3, 72, 64)
    plain, model = make(config=config), make(config=config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, ours = plain(images), compiled(images)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    ours.square().sum().backward()
    for (name, theirs), mine in zip(plain.named_parameters(), model.parameters(), strict=True):
        bound = 1e-4 * theirs.grad.abs().max() + 1e-6
        assert (mine.grad - theirs.grad).abs().max() <= bound, name


@pytest.mark.long
def test_another_image_size_compiles_anew():
    """The curve's grid depends on the canvas: a new size is a new graph, again without breaks."""
    model = make(config=TWO_STAGES).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for height, width in ((72, 64), (60, 104)):
            images = torch.randn(2, 3, height, width)
            torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)


def point_model(head):
    config = PointConfig(
        dims=(16, 32), depths=(1, 1), heads=(2, 2), neighborhood_size=(16, 16), embed_neighbors=4
    )
    torch.manual_seed(0)
    return Model("tiny", config, head, 3).eval()  # nothing is dropped


def check_training(model, compiled, sizes):
    """The same output and gradients for samples of these sizes."""
    tokens = model.preprocess(TokenSet(torch.rand(sum(sizes), 3), sizes=sizes))
    results = []
    for run in (model, compiled):
        model.zero_grad()
        output = run(tokens)
        output.square().sum().backward()
        results.append((output.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-6
    with torch.no_grad():
        output = compiled(tokens)
    torch.testing.assert_close(output, results[0][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "head", ["point_segmentation", pytest.param("point_classification", marks=pytest.mark.long)]
)
def test_training_on_point_sets_of_any_sizes_compiles_twice(head):
    model, graphs = point_model(head), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for sizes in ((40, 90), (1, 70, 2, 30), (5, 5, 5), (200, 3)):
        check_training(model, compiled, sizes)
    assert len(graphs) == 4  # with gradients and without


@pytest.mark.long
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(
                not any(map(shutil.which, ("c++", "g++", "clang++"))),
                reason="Inductor needs a C++ compiler",
            ),
        ),
    ],
)
def test_point_models_by_backends(backend):
    model = point_model("point_segmentation")
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for sizes in ((40, 90), (1, 70, 2, 30)):
        check_training(model, compiled, sizes)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("head", ["mask2former", "hcformer"])
def test_mask_heads_compile_without_graph_breaks(head):
    model = make(head).eval()
    images = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        expected = model(images).mask_logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images).mask_logits, expected, atol=1e-5, rtol=1e-5)


def test_export():
    model = make().eval()
    images = torch.randn(2, 3, 64, 48)
    program = torch.export.export(model, (images,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.long
def test_mask_heads_are_exported():
    model = make("hcformer").eval()
    images = torch.randn(2, 3, 64, 48)
    program = torch.export.export(model, (images,), strict=False)
    with torch.no_grad():
        found, expected = program.module()(images), model(images)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits)
    torch.testing.assert_close(found.class_logits, expected.class_logits)


def on_fake_gpu(model, images, *, training=False):
    """What a model gives for images of (C, H, W), a batch or a list, with all values on the GPU."""
    for layer in model.modules():
        layer.training = training and not isinstance(layer, torch.nn.BatchNorm2d)
    images = [torch.empty(shape, device="cuda") for shape in images]
    state = {
        name: torch.empty(value.shape, dtype=value.dtype, device="cuda")
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    # Nothing asks for a gradient: autograd on CUDA devices is not in CPU builds of torch.
    with torch.set_grad_enabled(training):
        return torch.func.functional_call(model, state, (images,))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU is there: tests marked gpu capture real graphs")
@pytest.mark.parametrize("head", [*HEADS, "dense", "stars"])
@pytest.mark.parametrize(
    ("name", "sizes", "training", "options"),
    [
        ("aff_nano", [(64, 48)] * 2, False, {}),
        ("aff_nano", [(64, 48), (40, 96)], True, {"reach": 144, "spread": 0.1}),
        ("swin_mini", [(64, 48), (40, 96)], False, {}),
    ],
)
def test_forward_does_not_wait_for_the_gpu(name, head, sizes, training, options):
    """No copy from or to the host and no shape that depends on values: a CUDA graph can hold it,
    of images of one size and of several."""
    model = create_model(name, head=head, num_classes=3, **HEADS.get(head, {}), **options)
    with fake_gpu():
        output = on_fake_gpu(model, [(3, *size) for size in sizes], training=training)
        if head == "classification":
            assert output.shape == (2, 3)


@pytest.mark.skipif(not INTERPRETED, reason="kernels run compiled here")
def test_a_model_on_interpreted_kernels_is_that_on_the_cpu():
    """Same tokens, and features and gradients that differ by rounding only."""
    images = torch.randn(1, 3, 40, 44, generator=torch.Generator().manual_seed(0))
    results = {}
    for impl in ("cpu", "triton"):
        model = make(config=TWO_STAGES, impl=impl)
        stages = model.backbone(images)
        logits = model.head(stages, images, impl)
        logits.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results[impl] = (stages, logits.detach(), gradients)
    (ours, logits, gradients), (theirs, expected, reference) = results["triton"], results["cpu"]
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.tokens.positions, other.tokens.positions)
        torch.testing.assert_close(
            mine.tokens.features, other.tokens.features, atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        bound = 1e-4 * reference[name].abs().max() + 1e-6
        assert (gradient - reference[name]).abs().max() <= bound, name
