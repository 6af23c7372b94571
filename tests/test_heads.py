"""Mask heads: gradients, ragged batches, HCFormer against a dense grid, saving and loading."""

import pytest
import torch

from pointformer import TokenSet, knn
from pointformer.models import create_model, load_model, save_model
from pointformer.models.hcformer import SoftAssignment, decode
from pointformer.models.inference import predict
from pointformer.models.losses import Targets, segmentation_loss

SMALL = {
    "mask2former": {
        "queries": 5, "dim": 32, "hidden": 48, "pixel_hidden": 48, "pixel_layers": 2,
        "decoder_layers": 4,
    },
    "hcformer": {"queries": 5, "dim": 32, "hidden": 48, "decoder_layers": 3},
    "hcformer+": {
        "queries": 5, "dim": 32, "hidden": 48, "decoder_layers": 2, "encoder_layers": 2,
    },
}  # fmt: skip


def small_model(head, **options):
    torch.manual_seed(0)
    options = {**SMALL[head], **options}
    return create_model("aff_nano", head=head.removesuffix("+"), num_classes=3, **options)


def small_targets(*shapes):
    g = torch.Generator().manual_seed(1)
    return [
        Targets(torch.randint(0, 3, (n,), generator=g), torch.rand(n, h, w, generator=g) > 0.6)
        for n, h, w in shapes
    ]


@pytest.mark.parametrize("head", SMALL)
def test_gradients_reach_every_parameter(head):
    """The temperatures and the learned powers too; an image without objects is part of it."""
    model = small_model(head).train()
    with torch.no_grad():  # some layers start as zeros, which nothing passes
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 64, 72, generator=torch.Generator().manual_seed(0))
    out = model(images)
    assert out.class_logits.shape == (2, 5, 4)
    assert out.masks().shape == (2, 5, 16, 18)
    losses = segmentation_loss(out, small_targets((4, 64, 72), (0, 64, 72)), points=200)
    assert ("temperature" in losses) == head.startswith("hcformer")
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("head", SMALL)
def test_images_of_different_sizes_equal_single_images(head):
    model = small_model(head).eval()
    g = torch.Generator().manual_seed(2)
    images = [torch.randn(3, h, w, generator=g) for h, w in ((64, 64), (48, 90), (33, 64))]
    with torch.no_grad():
        batch = model(images)
        masks = batch.masks()
        for number, image in enumerate(images):
            single = model(image[None])
            torch.testing.assert_close(
                batch.class_logits[number], single.class_logits[0], atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(masks[number], single.masks()[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("head", SMALL)
def test_save_and_load(head, tmp_path):
    model = small_model(head, task="panoptic").eval()
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.task == "panoptic"
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).mask_logits, loaded(images).mask_logits)


def test_options_of_a_head_are_checked():
    with pytest.raises(TypeError, match="queries"):
        create_model("aff_nano", head="dense", queries=3)
    with pytest.raises(ValueError, match="expected one of classification, dense"):
        create_model("aff_nano", head="masks")
    with pytest.raises(ValueError, match="task"):
        create_model("aff_nano", head="mask2former", task="boxes")


# HCFormer ------------------------------------------------------------------------------------


def grids(height=6, width=8, channels=(5, 7)):
    """A fine grid, and the coarse one of every second row and column in the fine one's units."""
    g = torch.Generator().manual_seed(3)
    fine = TokenSet.from_grid(torch.randn(2, channels[0], height, width, generator=g))
    coarse = TokenSet.from_grid(torch.randn(2, channels[1], height // 2, width // 2, generator=g))
    positions = 2 * coarse.positions
    return fine, TokenSet(positions, coarse.features, coarse.sizes, fine.extent)


def three_by_three(height, width):
    """Coarse rows around each fine cell's parent, (cells, 9), -1 outside of the grid."""
    rows = torch.full((height, width, 9), -1)
    for y in range(height):
        for x in range(width):
            for n, (dy, dx) in enumerate((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
                cy, cx = y // 2 + dy, x // 2 + dx
                if 0 <= cy < height // 2 and 0 <= cx < width // 2:
                    rows[y, x, n] = cy * (width // 2) + cx
    return rows.flatten(0, 1)


def test_on_a_grid_it_equals_a_dense_implementation():
    """Assignment and decoding against padded 3 x 3 windows of the coarse feature map."""
    height, width = 6, 8
    fine, coarse = grids(height, width)
    cells, count = height * width, height * width // 4
    layer = SoftAssignment(5, 7, dim=16)
    lists = three_by_three(height, width)
    index = torch.cat([lists, torch.where(lists >= 0, lists + count, -1)])
    masks = torch.randn(2 * count, 11)
    _, shares = layer(fine, coarse, index)
    ours = decode(masks, [(index, shares)]).view(2, cells, 11)

    def windows(x):  # (2, C, h/2, w/2) to (2, cells, 9, C), each fine cell its parent's window
        patches = torch.nn.functional.unfold(x, 3, padding=1).view(2, x.shape[1], 9, *x.shape[2:])
        patches = patches.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return patches.flatten(3).permute(0, 3, 2, 1)

    def maps(x):
        return x.view(2, height // 2, width // 2, -1).permute(0, 3, 1, 2)

    f = torch.nn.functional.normalize(layer.fine_proj(layer.fine_norm(fine.features)), dim=1)
    c = torch.nn.functional.normalize(layer.coarse_proj(layer.coarse_norm(coarse.features)), dim=1)
    cosine = (windows(maps(c)) * f.view(2, cells, 1, -1)).sum(3)
    inside = windows(maps(torch.ones(2 * count, 1)))[..., 0] > 0
    dense = (cosine / layer.temperature.abs()).masked_fill(~inside, -torch.inf).softmax(2)
    expected = (dense[..., None] * windows(maps(masks))).sum(2)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_candidates_of_tokens_that_stayed_are_the_windows():
    """A fine token that is a coarse one too, away from the border, has no ties: 9 nearest = 3 x 3.

    Others lie between coarse tokens: their windows lean to one side, the nearest nine do not.
    """
    fine, coarse = grids(12, 12)
    index = knn(coarse.positions, 9, query=fine.positions, sizes=coarse.sizes,
                query_sizes=fine.sizes)  # fmt: skip
    windows = three_by_three(12, 12)
    x, y = fine.positions[:144].unbind(1)
    stayed = (x % 2 == 0) & (y % 2 == 0) & (x > 1) & (x < 10) & (y > 1) & (y < 10)
    assert stayed.sum() == 16
    assert torch.equal(index[:144][stayed].long().sort(1)[0], windows[stayed].sort(1)[0])


@pytest.mark.parametrize("head", ["mask2former", "hcformer"])
@pytest.mark.parametrize("stride", [1, 2])
def test_other_strides(head, stride):
    """Masks, losses and post-processing follow the stride of the first stage."""
    model = small_model(head, patch_stride=stride, task="instance").train()
    image = torch.randn(1, 3, 18, 23)
    out = model(image)
    assert out.stride == out.auxiliary[0].stride == stride
    assert out.masks().shape[2:] == (18 // stride, -(-23 // stride))
    assert sum(segmentation_loss(out, small_targets((2, 18, 23)), points=50).values()).isfinite()
    assert predict(model.eval(), image[0]).masks.shape[1:] == (18, 23)
