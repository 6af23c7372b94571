"""Every registered model: shapes, gradients, ragged batches, options, counts."""

import dataclasses
import itertools

import pytest
import torch

from pointformer import TokenSet
from pointformer.models import AFFConfig, Model, Preprocess, count, create_model, list_models

# Few blocks and channels: the wiring of AFF without its cost.
TINY = AFFConfig(dims=(16, 32, 32, 48), depths=(1, 1, 1, 1), heads=(2, 2, 4, 2), mlp_ratio=1.0)


def tiny(head="classification", num_classes=5, **overrides) -> Model:
    torch.manual_seed(0)
    return Model("tiny", TINY.override(**overrides), head, num_classes).eval()


def images(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", list_models())
def test_forward_is_finite(name):
    model = create_model(name, num_classes=7).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("aff_mini", 6_754_451),
        ("aff_tiny", 27_020_367),
        ("aff_small", 42_612_961),
        ("aff_base", 75_341_075),
    ],
)
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("aff_mini", 1.07),
        ("aff_mini_1_5th", 0.72),
        ("aff_tiny", 4.00),
        ("aff_tiny_1_5th", 2.74),
        ("aff_small", 8.12),
        ("aff_small_1_5th", 5.69),
    ],
)
def test_multiply_adds_at_224(name, billions):
    complexity = count(create_model(name), 224, 224)
    assert complexity.dense / 1e9 == pytest.approx(billions, rel=0.01)
    assert 0 < complexity.merge < complexity.attention < complexity.dense


@pytest.mark.parametrize("head", ["classification", "dense", "features"])
def test_every_parameter_gets_a_gradient(head):
    model = tiny(head, layer_scale=0.1).train()
    output = model(images((64, 72), (50, 41)))
    if head == "features":
        output = [tokens.features for tokens in output]
    parts = [output] if isinstance(output, torch.Tensor) else output
    sum((part * torch.randn_like(part)).sum() for part in parts).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("head", ["classification", "dense", "features"])
def test_batch_equals_images_one_by_one(head):
    model = tiny(head)
    batch = images((64, 64), (64, 64), (30, 121), (16, 256), (7, 5))
    with torch.no_grad():
        together = model(batch)
        alone = [model([image]) for image in batch]
    if head == "features":
        for stage, tokens in enumerate(together):
            for part, single in zip(tokens.to_list(), alone, strict=True):
                assert torch.equal(part.positions, single[stage].positions)
                torch.testing.assert_close(part.features, single[stage].features)
    else:
        for part, single in zip(together, alone, strict=True):
            torch.testing.assert_close(part, single[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (32, 32), (96, 96), (130, 157), (16, 256), (256, 16)]
)
@pytest.mark.parametrize("patch_stride", [4, 2, 1])
def test_any_image_size(shape, patch_stride):
    shape = tuple(max(1, side * patch_stride // 4) for side in shape)
    model = tiny("dense", patch_stride=patch_stride)
    with torch.no_grad():
        logits = model(torch.randn(2, 3, *shape))
        stages = model.backbone(torch.randn(1, 3, *shape))
    assert logits.shape == (2, 5, *shape)
    assert logits.isfinite().all()
    cells = -(-shape[0] // patch_stride) * -(-shape[1] // patch_stride)
    assert stages[0].tokens.num_tokens == cells


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.2, 0.1, 0.01])
def test_rate_sets_the_number_of_tokens(rate):
    model = tiny("features", rate=rate)
    with torch.no_grad():
        sizes = [tokens.sizes[0] for tokens in model(torch.randn(2, 3, 128, 96))]
    height, width = 32, 24
    for stage in (1, 2, 3):
        stride = 2 ** (stage + 1)
        reserved = -(-height // stride) * -(-width // stride)
        assert sizes[stage] == max(int(sizes[stage - 1] * rate), reserved)


def test_merging_keeps_the_centers_positions():
    with torch.no_grad():
        stages = tiny("features").backbone(torch.randn(2, 3, 96, 128))
    for before, after in itertools.pairwise(stages):
        for a, b in zip(before.tokens.to_list(), after.tokens.to_list(), strict=True):
            have = {tuple(p) for p in a.positions.tolist()}
            kept = {tuple(p) for p in b.positions.tolist()}
            assert len(kept) == b.num_tokens
            assert kept <= have


def test_rate_alpha_and_neighborhood_change_on_a_made_model():
    model = tiny("features")
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        before = model(image)
        model.reconfigure(rate=0.5, alpha=0.0, neighborhood_size=32)
        after = model(image)
    assert after[1].num_tokens == 288 > before[1].num_tokens
    with pytest.raises(ValueError, match=r"dims cannot change"):
        model.reconfigure(dims=(1, 2, 3, 4))


def test_alpha_zero_is_a_uniform_grid():
    with torch.no_grad():
        second = tiny("features", alpha=0.0)(torch.randn(1, 3, 128, 128))[1]
    assert torch.all(second.positions % 2 == 0)
    assert second.num_tokens == 256


@pytest.mark.parametrize(
    "option",
    [
        {"prior": None},
        {"prior": "grid"},
        {"expanded_position": False},
        {"blank_token": False},
        {"reserve": False},
        {"merge": "patch"},
        {"scope": "tile"},
        {"curve": "snake"},
        {"curve": "morton"},
        {"anchors": False},
        {"remainder": "last"},
        {"cluster_size": 24, "neighborhood_size": 144},
        {"drop_path": 0.5},
    ],
    ids=str,
)
def test_options_change_the_model(option):
    """Each choice of Tables 5 and 6, and of the geometry: trains, and differs from the default."""
    image = torch.randn(2, 3, 132, 100, generator=torch.Generator().manual_seed(1))
    default, changed = tiny("features"), tiny("features", **option)
    for stage in default.backbone.stages[:3]:
        torch.nn.init.normal_(stage.merge.score.weight)  # so that the scores matter
    shared = {k: v for k, v in default.state_dict().items() if k in changed.state_dict()}
    shared = {k: v for k, v in shared.items() if changed.state_dict()[k].shape == v.shape}
    changed.load_state_dict(shared, strict=False)
    if "drop_path" in option:
        changed.train()
    a, b = default(image)[-1], changed(image)[-1]
    assert b.features.isfinite().all()
    b.features.square().sum().backward()
    same = a.features.shape == b.features.shape and torch.allclose(a.features, b.features)
    assert not same


def test_patch_merging_is_swins_on_a_grid():
    """Concatenate the 2x2 patch in Swin's order, LayerNorm, Linear, whatever the token order."""
    model = tiny("features", merge="patch")
    with torch.no_grad():
        stages = model.backbone(torch.randn(1, 3, 24, 40))
        merge = model.backbone.stages[0].merge
        grid = stages[0].tokens.to_grid()
        x = grid.permute(0, 2, 3, 1)
        patches = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        expected = merge.linear(merge.norm(torch.cat(patches, -1)))
        merged = merge(stages[0].tokens)
    assert torch.equal(merged.positions.view(3, 5, 2)[1, 2], torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(merged.features.view_as(expected), expected)


def test_aff_base_384_uses_larger_clusters():
    config = create_model("aff_base_384", num_classes=2).config
    assert config.cluster_size == 24
    assert config.neighborhood_size == (144,) * 4
    assert config.image_size == 384


def test_bad_names_and_options_say_what_is_known():
    with pytest.raises(ValueError, match=r"unknown model 'aff_huge'; known models: .*aff_mini"):
        create_model("aff_huge")
    with pytest.raises(TypeError, match=r"unknown option ratee; known options: .*rate"):
        create_model("aff_nano", ratee=0.5)
    for make in (
        lambda **options: create_model("aff_nano", head="dense", **options),
        lambda **options: Model("tiny", TINY, "dense", 3, **options),
    ):
        with pytest.raises(
            TypeError,
            match=r"unknown option queries \(queries is of the head hcformer or mask2former\); "
            r"known options: .*of head 'dense': channels, pixel_channels$",
        ):
            make(queries=3)
    with pytest.raises(ValueError, match=r"rate: expected a number in \(0, 1\], got 1.5"):
        create_model("aff_nano", rate=1.5)
    with pytest.raises(ValueError, match="head: expected one of"):
        create_model("aff_nano", head="boxes")
    with pytest.raises(ValueError, match="aff_mini: no weights"):
        create_model("aff_mini", pretrained=True)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"expected \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"got \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"got \(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "model.preprocess"),
        ([], ValueError, "at least one image"),
    ],
    ids=["no batch", "one channel", "no rows", "uint8", "empty list"],
)
def test_bad_images(value, error, message):
    with pytest.raises(error, match=message):
        tiny()(value)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_normalization_has_the_models_channels(channels):
    """Grey and RGB pictures are converted to each other; other channels must be given."""
    model = tiny(in_channels=channels)
    values = torch.randint(0, 256, (2, channels, 5, 7), dtype=torch.uint8)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else (
        (0.449,) * channels, (0.226,) * channels)  # fmt: skip
    expected = torch.stack([(values[:, c] / 255 - mean[c]) / std[c] for c in range(channels)], 1)
    torch.testing.assert_close(model.preprocess(values), expected)
    torch.testing.assert_close(model.preprocess(values / 255), expected)
    assert model(model.preprocess(values)).shape == (2, 5)
    for given in {1, 3, 4} - {channels}:
        image = torch.randint(0, 256, (given, 5, 7), dtype=torch.uint8)
        if {given, channels} == {1, 3}:
            one = image if given == 1 else torch.tensordot(
                torch.tensor([0.299, 0.587, 0.114]), image / 255, 1)[None]  # fmt: skip
            torch.testing.assert_close(model.preprocess(image), model.preprocess(
                one.expand(channels, -1, -1)), atol=1e-5, rtol=1e-5)  # fmt: skip
        else:
            with pytest.raises(ValueError, match=rf"image: the model takes {channels} channels, "
                               rf"got \({given}, 5, 7\)"):  # fmt: skip
                model.preprocess(image)


def test_bad_normalization():
    for mean, std, message in (
        ((0.5,), (0.2, 0.2), "std: expected one number for each of mean's 1"),
        ((0.5,), (0.0,), "std: expected positive"),
        ((float("nan"),), (0.2,), "mean: expected finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocess(mean, std)


def test_config_round_trips():
    config = create_model("aff_nano").config
    assert AFFConfig(**dataclasses.asdict(config)) == config


def test_features_are_token_sets_in_cluster_order():
    with torch.no_grad():
        outputs = tiny("features")(torch.randn(2, 3, 64, 64))
    assert [type(tokens) for tokens in outputs] == [TokenSet] * 4
    assert [tokens.channels for tokens in outputs] == list(TINY.dims)
    assert all(tokens.clusters is not None for tokens in outputs)


def test_hidden_layers_take_a_few_rows_at_a_time(monkeypatch):
    model = create_model("aff_nano", num_classes=10).eval()
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        whole = model(images)
        monkeypatch.setattr("pointformer.models.backbone.HIDDEN", 5000)
        torch.testing.assert_close(model(images), whole)
    torch.testing.assert_close(model(images).detach(), whole)
