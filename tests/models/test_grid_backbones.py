"""Backbones on grids: feature maps of any module as token sets, and Swin with shifted windows."""

import itertools
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pointformer import TokenSet
from pointformer._dispatch import choose
from pointformer.models import (
    AFFConfig,
    GridBackbone,
    Model,
    SwinConfig,
    create_model,
    load_model,
    save_model,
    token_sets,
)
from pointformer.models.heads import mean_tokens
from pointformer.models.losses import Targets, segmentation_loss
from pointformer.models.swin import Swin, WindowAttention, Windows

DIMS = (8, 12, 16, 20)
HEADS = {
    "classification": {},
    "dense": {"channels": 8},
    "stars": {"channels": 8, "cell_channels": 4, "hidden": 8, "rays": 4},
    "features": {},
    "mask2former": {
        "queries": 5, "dim": 32, "hidden": 48, "pixel_hidden": 48, "pixel_layers": 2,
        "decoder_layers": 4,
    },
    "hcformer": {"queries": 5, "dim": 32, "hidden": 48, "decoder_layers": 3},
}  # fmt: skip
AFF = AFFConfig(
    dims=(16, 16, 32, 32), depths=1, heads=2, mlp_ratio=1.0, neighborhood_size=48
)  # fmt: skip
SMALL = SwinConfig(dims=(8, 16, 16, 24), depths=(2, 1, 2, 1), heads=(2, 2, 4, 2), window_size=4)


class Features(nn.Module):
    """What timm gives for `features_only=True`: maps of strides 4 to 32, and `feature_info`."""

    def __init__(self, strides=(4, 2, 2, 2)):
        super().__init__()
        channels = (3, *DIMS)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, s, s) for a, b, s in zip(channels, DIMS, strides, strict=False)
        )
        self.feature_info = SimpleNamespace(channels=lambda: list(DIMS))

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            maps.append(x)
        return maps


def images(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=generator) for shape in shapes]


def grid_model(head):
    torch.manual_seed(0)
    return Model("foreign", GridBackbone(Features()), head, 3, **HEADS[head])


def aff_model(head, **overrides):
    torch.manual_seed(0)
    return Model("small", AFF.override(**overrides), head, 3, **HEADS[head])


def swin_model(head, **overrides):
    torch.manual_seed(0)
    return Model("small", SMALL.override(**overrides), head, 3, **HEADS[head])


def small_targets(*shapes):
    g = torch.Generator().manual_seed(1)
    return [
        Targets(torch.randint(0, 3, (n,), generator=g), torch.rand(n, h, w, generator=g) > 0.6)
        for n, h, w in shapes
    ]


def outputs_of(output):
    """One tensor per image."""
    if hasattr(output, "masks"):
        return [torch.cat([c.flatten(), m.flatten()])
                for c, m in zip(output.class_logits, output.masks(), strict=True)]  # fmt: skip
    if isinstance(output[0], torch.Tensor):
        return list(output)
    samples = zip(*(tokens.to_list() for tokens in output), strict=True)
    return [torch.cat([tokens.features.flatten() for tokens in stages]) for stages in samples]


# Feature maps as token sets -----------------------------------------------------------------


@pytest.mark.parametrize("rounding", [math.ceil, math.floor])
@pytest.mark.parametrize("size", [(16, 24), (13, 21), (8, 9)])
def test_coarse_tokens_sit_on_finer_ones(size, rounding):
    maps = [torch.randn(2, 3, *(max(1, rounding(n / 2**i)) for n in size)) for i in range(4)]
    sets = token_sets(maps)
    for i, (tokens, values) in enumerate(zip(sets, maps, strict=True)):
        assert tokens.extent == ((size[1], size[0]),) * 2
        assert torch.all(tokens.positions % 2**i == 0)
        grid = tokens.to_grid()[..., :: 2**i, :: 2**i]
        assert torch.equal(grid[..., : values.shape[-2], : values.shape[-1]], values)
    for finer, coarser in itertools.pairwise(sets):
        have = {tuple(p) for p in finer.to_list()[0].positions.tolist()}
        assert {tuple(p) for p in coarser.to_list()[0].positions.tolist()} <= have


def test_maps_of_other_strides_are_refused():
    with pytest.raises(ValueError, match=r"map 1 is \(4, 4\), expected .*\(16, 16\) divided by 2"):
        token_sets([torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 4, 4)])


@pytest.mark.parametrize("size", [(64, 96), (50, 90), (7, 5)])
def test_a_modules_maps_are_the_stages(size):
    """Padded to a multiple of 32, cut to the image's own part."""
    module = Features()
    batch = torch.stack(images(size, size))
    down, right = (-n % 32 for n in size)
    padded = torch.from_numpy(np.pad(batch, ((0, 0), (0, 0), (0, down), (0, right)), "edge"))
    with torch.no_grad():
        maps = module(padded)
        stages = GridBackbone(module)(batch)
    for i, (stage, values) in enumerate(zip(stages, maps, strict=True)):
        height, width = (math.ceil(n / (4 * 2**i)) for n in size)
        grid = stage.tokens.to_grid()[..., :: 2**i, :: 2**i]
        assert torch.equal(grid, values[..., :height, :width])
        assert stage.inputs is stage.tokens
        assert stage.scores is None


def test_a_dict_of_maps_and_given_channels():
    class Named(Features):
        def forward(self, x):
            return {f"res{i + 2}": values for i, values in enumerate(super().forward(x))}

    batch = torch.stack(images((64, 64)))
    module = Named()
    stages = GridBackbone(module, DIMS)(batch)
    assert [stage.tokens.channels for stage in stages] == list(DIMS)
    del module.feature_info
    with pytest.raises(ValueError, match="dims: needed"):
        GridBackbone(module)


@pytest.mark.parametrize(
    ("module", "dims", "message"),
    [
        (Features((2, 2, 2, 2)), DIMS, r"expected map 0 to be \(1, 8, 16, 16\)"),
        (Features(), (8, 12, 16, 24), r"expected map 3 to be \(1, 24, 2, 2\).*got \(1, 20, 2, 2\)"),
        (Features(), (8, 12, 16), "expected 3 maps, one for each of dims, got 4"),
    ],
)
def test_maps_that_do_not_fit_are_refused(module, dims, message):
    with pytest.raises(ValueError, match=message):
        GridBackbone(module, dims)(torch.zeros(1, 3, 64, 64))


# Every head on every backbone ---------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("made", [grid_model, swin_model])
def test_images_of_different_sizes_equal_single_images(made, head):
    model = made(head).eval()
    batch = images((64, 64), (50, 90), (64, 64), (33, 20), (16, 30))
    with torch.no_grad():
        together = outputs_of(model(batch))
        for image, result in zip(batch, together, strict=True):
            single = outputs_of(model(image[None]))[0]
            torch.testing.assert_close(result, single, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("made", [grid_model, swin_model])
def test_gradients_reach_every_parameter(made, head):
    model = made(head).train()
    with torch.no_grad():  # some layers start as zeros, which nothing passes
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = torch.stack(images((72, 64), (72, 64)))
    output = model(batch)
    if hasattr(output, "masks"):
        assert output.masks().shape == (2, 5, 18, 16)
        loss = sum(segmentation_loss(output, small_targets((4, 72, 64), (0, 72, 64)),
                                     points=200).values())  # fmt: skip
    else:
        loss = sum((part * torch.randn_like(part)).sum() for part in outputs_of(output))
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 256), (130, 157)])
@pytest.mark.parametrize("made", [grid_model, swin_model])
def test_any_image_size(made, shape):
    with torch.no_grad():
        masks = made("mask2former").eval()(torch.randn(2, 3, *shape)).masks()
    assert masks.shape == (2, 5, math.ceil(shape[0] / 4), math.ceil(shape[1] / 4))
    assert masks.isfinite().all()


# Swin ----------------------------------------------------------------------------------------


def raster(maps):
    """Tokens of maps (B, H, W, C)."""
    return TokenSet.from_grid(maps.movedim(-1, 1))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (10, 13), (4, 9), (3, 4), (2, 2)])
def test_window_attention_is_its_definition(size, shifted):
    """Token by token: keys are the tokens of the same window, windows of 4 that start at 0, or at
    2 where they are shifted, unless one window covers the axis."""
    torch.manual_seed(0)
    window, heads, dim = 4, 2, 6
    layer = WindowAttention(dim, heads, window).double()
    nn.init.normal_(layer.bias)
    maps = torch.randn(2, *size, dim, dtype=torch.float64)
    tokens = raster(maps)
    windows = Windows(*size, window, shifted, maps.device)
    ours = layer(tokens.features, tokens, windows, project=False, impl=None)
    starts = [window // 2 if shifted and side > window else 0 for side in size]
    query, key, value = layer.qkv(maps).view(2, *size, 3, heads, -1).unbind(3)
    expected = torch.empty(2, *size, heads, dim // heads, dtype=torch.float64)
    cells = list(itertools.product(range(size[0]), range(size[1])))
    for y, x in cells:

        def place(cell):
            return [(p - start) // window for p, start in zip(cell, starts, strict=True)]

        same = [cell for cell in cells if place(cell) == place((y, x))]
        rows, columns = torch.tensor(same).unbind(1)
        bias = layer.bias.view(2 * window - 1, 2 * window - 1, heads)
        bias = bias[y - rows + window - 1, x - columns + window - 1]
        logits = (query[:, y, x, None] * key[:, rows, columns]).sum(3) / math.sqrt(dim // heads)
        share = (logits + bias).softmax(1)
        expected[:, y, x] = (share[..., None] * value[:, rows, columns]).sum(1)
    torch.testing.assert_close(ours, expected.view(-1, dim))


def test_padding_and_masks_let_finite_gradients_through():
    layer = WindowAttention(6, 2, 4)
    maps = torch.randn(1, 5, 6, 6, requires_grad=True)
    tokens = raster(maps)
    windows = Windows(5, 6, 4, True, maps.device)
    layer(tokens.features, tokens, windows, project=False, impl=None).square().sum().backward()
    assert maps.grad.isfinite().all()
    assert maps.grad.flatten(0, 2).any(1).all()


def test_stages_have_inputs_on_their_own_positions():
    """What came into a stage is the merge's output: HCFormer assigns to that."""
    stages = swin_model("features").eval().backbone(torch.randn(2, 3, 60, 84))
    sizes = [(15, 21), (8, 11), (4, 6), (2, 3)]
    for i, (stage, (height, width)) in enumerate(zip(stages, sizes, strict=True)):
        assert stage.tokens.sizes == (height * width,) * 2
        assert torch.all(stage.tokens.positions % 2**i == 0)
        assert torch.equal(stage.inputs.positions, stage.tokens.positions)
        assert not torch.allclose(stage.inputs.features, stage.tokens.features)


@pytest.mark.parametrize("blocks", [1, 2])
def test_only_shifted_windows_carry_beyond_a_window(blocks):
    config = SwinConfig(dims=(8,), depths=(blocks,), heads=(2,), window_size=4)
    torch.manual_seed(0)
    backbone = Swin(config).double().eval()
    image = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    other = image.clone()
    other[..., :2, :2] += 1  # of the first cell; the embedding carries it to its neighbors
    with torch.no_grad():
        a, b = (backbone(x)[0].tokens.to_grid() for x in (image, other))
    changed = ((a - b).abs() > 1e-12).any(1)[0]
    reach = 4 if blocks == 1 else 6
    assert changed[: reach - 1, : reach - 1].any()
    assert changed.nonzero().max() == reach - 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("swin_mini", 6_762_916), ("swin_tiny", 27_043_278), ("swin_small", 42_640_249)],
)
def test_parameters_of_the_papers_swin(name, parameters):
    """Table 2: 6.76M (its "6.716M" has the same misprint as "6.715M" for AFF-Mini's 6,754,451),
    27M and 42.6M. From AFF's: no blank tokens, scores, weight nets, merge biases and position
    biases, but 13**2 offsets for each head of each block."""
    with torch.device("meta"):
        model = create_model(name)
        aff = create_model(name.replace("swin", "aff"))
    config: AFFConfig = aff.config
    count = sum(p.numel() for p in aff.parameters())
    for dim, depth, heads in zip(config.dims, config.depths, config.heads, strict=True):
        count += depth * (169 * heads - 6 * heads - 2 * dim)
    for dim, wider in itertools.pairwise(config.dims):
        count -= dim + 1 + wider + (5 * 4 + 4 + 2 * 4)
    assert sum(p.numel() for p in model.parameters()) == count == parameters


def test_save_and_load(tmp_path):
    model = swin_model("mask2former").eval()
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    batch = torch.stack(images((40, 64)))
    with torch.no_grad():
        assert torch.equal(model(batch).mask_logits, loaded(batch).mask_logits)


def test_what_a_grid_cannot_do_is_said(tmp_path):
    model = grid_model("dense")
    with pytest.raises(ValueError, match="foreign: a foreign backbone is not saved"):
        save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="nothing can change"):
        swin_model("dense").reconfigure(rate=0.5)
    with pytest.raises(TypeError, match=r"unknown option rate; known options: .*window_size"):
        create_model("swin_mini", rate=0.5)
    with pytest.raises(ValueError, match="heads: stage 1 has 16 channels for 3 heads"):
        SMALL.override(heads=(2, 3, 4, 2))


@pytest.mark.parametrize("option", [{"layer_scale": 0.1}, {"drop_path": 0.5}, {"patch_stride": 2}])
def test_options_change_the_model(option):
    batch = torch.stack(images((40, 64)))
    plain, changed = swin_model("classification"), swin_model("classification", **option)
    changed.load_state_dict(plain.state_dict(), strict=False)
    if "drop_path" in option:
        torch.manual_seed(1)
    else:
        plain.eval()
        changed.eval()
    assert not torch.allclose(plain(batch), changed(batch))


@pytest.mark.parametrize(
    ("made", "dtype"),
    [
        *((aff_model, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
        *((aff_model, "autocast"), (swin_model, torch.bfloat16), (grid_model, torch.bfloat16)),
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_other_dtypes(made, head, dtype):
    """Inference is that of float32 but for rounding (relative to the root mean square); a training
    step reaches every weight. Images in float32 are converted."""
    model = made(head).eval()
    batch = images((72, 64), (50, 90))
    with torch.no_grad():
        expected = outputs_of(model(batch))
    tolerance = {torch.float64: 1e-5, torch.float16: 0.01}.get(dtype, 0.15)
    context = torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else nullcontext()
    if dtype != "autocast":
        model = model.to(dtype)
    if dtype == torch.float64:
        model.backbone.impl = "reference"  # what the kernels lack is said
    with context:
        with torch.no_grad():
            output = model(batch)
        for part, wanted in zip(outputs_of(output), expected, strict=True):
            error = (part.float() - wanted).square().mean() / wanted.square().mean()
            assert error.sqrt() < tolerance
        output = model.train()(batch)
        if hasattr(output, "masks"):
            for logits in (output.class_logits, output.mask_logits):
                assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            targets = small_targets((4, 72, 64), (2, 50, 90))
            loss = sum(segmentation_loss(output, targets, points=200).values())
        else:
            loss = sum(part.float().square().mean() for part in outputs_of(output))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_means_of_many_tokens_in_half_precision():
    """4,097 ones, and one that is 1,000: sums in bfloat16 would stand still at 256."""
    features = torch.ones(4098 + 3, 1)
    features[5] = 1000
    tokens = TokenSet(torch.zeros(len(features), 2), features.bfloat16(), (4098, 3))
    means = mean_tokens(tokens)
    assert means.dtype == torch.bfloat16
    torch.testing.assert_close(
        means.float(), torch.tensor([[5097 / 4098], [1.0]]), rtol=0.01, atol=0
    )


OPS = {
    "classification": set(),
    "features": set(),
    "dense": {"interpolate"},
    "stars": {"interpolate"},
    "mask2former": {"knn", "deformable_attention", "interpolate", "point_conv"},
    "hcformer": {"knn", "weighted_gather"},
}
AFF_OPS = {
    "balanced_cluster", "nearest_clusters", "neighborhood_attention", "select_centers",
    "scored_merge",
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("made", [grid_model, swin_model, aff_model])
def test_impl_reaches_every_op(made, head, monkeypatch):
    model = made(head).train()
    model.backbone.impl = "reference"
    asked = set()

    def spy(op, impl, *others, **more):
        asked.add((op, impl))
        return choose(op, impl, *others, **more)

    for name, module in list(sys.modules.items()):
        if name.startswith("pointformer.") and getattr(module, "choose", None) is choose:
            monkeypatch.setattr(module, "choose", spy)
    model(torch.stack(images((64, 40))))
    expected = OPS[head] | (AFF_OPS if made is aff_model else set())
    assert expected <= {op for op, _ in asked}
    assert {impl for _, impl in asked} <= {"reference"}


def test_images_of_a_list_come_back_in_its_order():
    """Of four in an order by shape that is not its own inverse."""
    model = swin_model("classification").eval()
    batch = images((16, 16), (16, 24), (24, 16), (16, 16))
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in batch])
        torch.testing.assert_close(model(batch), alone, atol=1e-5, rtol=1e-4)


def test_windows_of_odd_sides_move_by_half_rounded_down():
    assert Windows(20, 5, 7, True, torch.device("cpu")).shift == (3, 0)
    assert Windows(4, 3, 3, True, torch.device("cpu")).shift == (1, 0)


@pytest.mark.parametrize("side", [4, 7])
def test_biases_of_windows_start_small(side):
    torch.manual_seed(0)
    bias = WindowAttention(64, 32, side).bias
    assert bias.shape == ((2 * side - 1) ** 2, 32)
    assert bias.std().item() == pytest.approx(0.02, rel=0.1)


def test_checkpointing_of_a_foreign_backbone_is_its_own():
    module, asked = nn.Conv2d(3, 8, 4, 4), []
    model = Model("foreign", GridBackbone(module, (8,)), "classification", 3)
    with pytest.raises(
        ValueError, match="set_grad_checkpointing: the backbone of foreign has none"
    ):
        model.set_grad_checkpointing()
    module.set_grad_checkpointing = asked.append
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
    assert asked == [True, False]
