"""Every registered model: shapes, gradients, ragged batches, options, counts."""

import dataclasses
import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from pointformer import TokenSet, nearest_clusters, spread_scores
from pointformer.models import (
    AFFConfig,
    Model,
    Preprocess,
    SwinConfig,
    complexity_of,
    create_model,
    list_models,
)
from pointformer.models.aff import evenness, gradients
from pointformer.models.config import CONFIGS
from pointformer.nn import NeighborhoodAttention, ScoredMerge
from pointformer.nn.blocks import HIDDEN, add_branch, by_rows, drop_path

# Few blocks and channels: the wiring of AFF without its cost.
TINY = AFFConfig(dims=(16, 32, 32, 48), depths=(1, 1, 1, 1), heads=(2, 2, 4, 2), mlp_ratio=1.0)


def tiny(head="classification", num_classes=5, **overrides) -> Model:
    torch.manual_seed(0)
    return Model("tiny", TINY.override(**overrides), head, num_classes).eval()


def test_a_compiled_backbone_is_reconfigured():
    model = tiny()
    own = model.backbone
    for wrapped in (torch.compile(own), checkpoint_wrapper(own)):
        model.backbone = wrapped
        with model.reconfigured(rate=0.5):
            assert own.config.rate == model.config.rate == 0.5
        assert own.config.rate == model.config.rate == TINY.rate


def images(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", list_models(["aff_*", "swin_*"]))
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
    complexity = complexity_of(create_model(name), 224, 224)
    assert complexity.dense / 1e9 == pytest.approx(billions, rel=0.01)
    assert 0 < complexity.merge < complexity.attention < complexity.dense


@pytest.mark.parametrize("head", ["classification", "dense", "features", "stars"])
def test_every_parameter_gets_a_gradient(head):
    model = tiny(head, layer_scale=0.1).train()
    output = model(images((64, 72), (50, 41)))
    if head == "features":
        output = [tokens.features for tokens in output]
    parts = [output] if isinstance(output, torch.Tensor) else output
    sum((part * torch.randn_like(part)).sum() for part in parts).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("head", ["classification", "dense", "features", "stars"])
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


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.2, 0.1, 0.01, (0.5, 0.1, 1.0), [0.05, 0.3, 0.2]])
def test_rate_sets_the_number_of_tokens(rate, share):
    """One rate, or one for each merge; as the released models do, with reserved tokens on top."""
    model = tiny("features", rate=rate, reserve_share=share)
    with torch.no_grad():
        sizes = [tokens.sizes[0] for tokens in model(torch.randn(2, 3, 128, 96))]
    height, width = 32, 24
    for stage in (1, 2, 3):
        stride = 2 ** (stage + 1)
        reserved = -(-height // stride) * -(-width // stride) if share is None else 1
        asked = int(sizes[stage - 1] * (rate if isinstance(rate, float) else rate[stage - 1]))
        assert sizes[stage] == max(asked, reserved)


def test_small_rates_leave_room_for_the_best_tokens():
    """At a rate of 1/8 the lattice of the released models takes all that the second merge keeps."""
    image = torch.randn(1, 3, 256, 256)
    on_grid = []
    for share in (0.5, None):
        with torch.no_grad():
            tokens = scored(rate=1 / 8, reserve_share=share, prior=None)(image)[2]
        assert tokens.num_tokens == 64
        on_grid.append((tokens.positions % 8 == 0).all(1).double().mean())
    assert on_grid[0] < 0.6
    assert on_grid[1] == 1


def test_released_models_reserve_as_they_were_trained():
    for name, config in CONFIGS.items():
        if isinstance(config, AFFConfig):
            assert config.reserve_share == (0.5 if name == "aff_nano" else None)


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
    """Whatever the scores; with another alpha it is none."""
    image = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        for alpha in (0.0, 4.0):
            for i, tokens in enumerate(scored(alpha=alpha)(image)[1:], 1):
                assert tokens.num_tokens == 32 * 24 // 4**i
                assert bool((tokens.positions % 2**i == 0).all()) == (alpha == 0)


@pytest.mark.parametrize(
    "option",
    [
        {"prior": None},
        {"prior": "grid"},
        {"ranking": "gradient"},
        {"ranking": "lattice"},
        {"spread": 0.2},
        {"reach": 144},
        {"merge_center": True},
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
    if "drop_path" in option:  # both: batch statistics would differ too
        default.train()
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


@pytest.mark.parametrize("sides", [4, (2, 3)])
def test_windows_merge_squares_of_any_side(sides):
    """Positions are those of the squares' corners; what sticks out meets zeros."""
    config = SwinConfig(dims=(8, 16, 16), depths=(1, 1, 1), heads=(2, 2, 2), patch_merge=sides)
    torch.manual_seed(0)
    model = Model("tiny", config, "features", 5).eval()
    with torch.no_grad():
        stages = model.backbone(torch.randn(1, 3, 100, 76))  # 25 x 19 cells
    for stage, stride in zip(stages, config.strides, strict=True):
        places = torch.cartesian_prod(torch.arange(0, 25, stride), torch.arange(0, 19, stride))
        assert torch.equal(stage.tokens.positions, places.flip(1).float())
    merge, side = model.backbone.stages[0].merge, config.merge_sides[0]
    padded = torch.zeros(28, 20, 8)
    padded[:25, :19] = stages[0].tokens.features.view(25, 19, 8)
    square = padded[side : 2 * side, 2 * side : 3 * side].transpose(0, 1).reshape(1, -1)
    row = math.ceil(19 / side) + 2
    expected = merge.linear(merge.norm(square))
    torch.testing.assert_close(stages[1].inputs.features[row : row + 1], expected)
    for wrong, message in (((2, 2, 2), "one for each of 2 merges"), (0, "positive integer")):
        with pytest.raises(ValueError, match=f"patch_merge: expected .*{message}"):
            SwinConfig(dims=(8, 16, 16), depths=(1, 1, 1), heads=(2, 2, 2), patch_merge=wrong)


def test_merges_add_the_centers_own_features():
    """After a norm and a layer, beside what is merged without them."""
    model = tiny("features", merge_center=True)
    merge, tokens = model.backbone.stages[0].merge, model.backbone(images((40, 56)))[0].tokens
    index, around = torch.tensor([3, 0, 77]), tokens.neighborhoods(6)
    scores = merge.logits(tokens.features).sigmoid()
    merged = partial(ScoredMerge.forward, merge, tokens, around, scores, index, [3])
    own = merge.center[1](merge.center[0](tokens.features[index]))
    both = merged().features
    merge.center = None
    alone = merged().features
    torch.testing.assert_close(both, alone + own)


@pytest.mark.parametrize("keep", [4, 8, 16, 32])
def test_ranked_by_a_lattice_any_share_is_an_even_grid(keep):
    """Squares, or squares turned by 45 degrees, whatever scores, alpha and prior say."""
    model = tiny("features", ranking="lattice", rate=(1 / keep, 1.0, 1.0), alpha=9.0)
    torch.nn.init.normal_(model.backbone.stages[0].merge.score.weight)
    with torch.no_grad():
        tokens = model.backbone(images((128, 64), (64, 128)))[1].tokens
    for sample in tokens:
        x, y = sample.positions.unbind(1)
        step = math.isqrt(keep)
        if step**2 < keep:
            step = math.isqrt(keep // 2)
            assert bool(((x + y) % (2 * step) == 0).all())
        assert bool((sample.positions % step == 0).all())
        assert sample.num_tokens == 32 * 16 // keep


def test_ranked_by_gradient_the_steepest_cells_are_kept():
    """Of each picture on its own, whatever its contrast; a flat one is no fault."""
    edge, flat = torch.zeros(3, 64, 64), torch.zeros(3, 48, 64)
    edge[:, 20:40, 20:40] = 1e-3
    model = tiny("features", ranking="gradient", rate=0.125, prior=None, reserve=False)
    with torch.no_grad():
        first, second = model.backbone([edge, flat])[:2]
    touched = torch.zeros(64, 64)
    touched[19:41, 19:41] = 1
    touched[21:39, 21:39] = 0  # differences are central: two pixels on each side of an edge
    cells = touched.unflatten(0, (16, 4)).unflatten(2, (16, 4)).amax((1, 3))
    x, y = second.tokens.sample(0).positions.long().unbind(1)
    assert len(x) == 32
    assert cells[y, x].sum() == 32
    assert first.scores is not None
    assert (first.scores.isfinite() & (first.scores >= 0) & (first.scores < 1)).all()


def test_no_two_cells_are_equally_even():
    """Of canvases of up to 2048 cells, whose best are squares of any power of two."""
    places = torch.cartesian_prod(torch.arange(128.0), torch.arange(64.0))
    ranking = evenness(places)
    assert len(ranking.unique()) == 128 * 64
    for step in (2, 4, 8, 16, 32):
        kept = places[ranking.topk(128 * 64 // step**2).indices]
        assert bool((kept % step == 0).all())
    far = evenness(places + torch.tensor([1920.0, 1984.0]))
    assert len(torch.cat([ranking, far]).unique()) == 2 * 128 * 64
    assert 0 < far.min() < far.max() < ranking.max() == 1


@pytest.mark.parametrize("patch_stride", [2, 4])
def test_gradients_are_those_of_the_formula(patch_stride):
    """Of pixels' central differences of brightness the steepest in a cell, over itself and the mean
    of the picture's cells; at the picture's end the last pixels go on."""
    pictures = [torch.from_numpy(np.random.default_rng(n).random((3, 9 + n, 14))) for n in (0, 1)]
    expected = []
    for image in pictures:
        gray = image.mean(0)
        height, width = gray.shape
        steep = np.zeros((-(-height // patch_stride), -(-width // patch_stride)))
        for y, x in np.ndindex(height, width):
            left, right = gray[y, max(x - 1, 0)], gray[y, min(x + 1, width - 1)]
            above, below = gray[max(y - 1, 0), x], gray[min(y + 1, height - 1), x]
            here = y // patch_stride, x // patch_stride
            steep[here] = max(steep[here], math.hypot(right - left, below - above))
        expected.append((steep / (steep + steep.mean())).ravel())
    found = gradients(pictures, patch_stride)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-6)
    model = tiny("features", ranking="gradient", patch_stride=patch_stride)
    picture = pictures[0].float()
    with torch.no_grad():
        first = model.backbone([picture])[0]
    order = first.tokens.clusters.order
    torch.testing.assert_close(first.scores, gradients([picture], patch_stride)[order])


def test_every_merge_keeps_the_first_of_the_ranking():
    """Not of the learned scores, which say how much a token weighs: spread and as it is."""
    image = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    for spread in (0.0, 0.3):
        model = tiny("features", ranking="gradient", spread=spread, prior=None, reserve=False)
        for stage in model.backbone.stages[:3]:
            torch.nn.init.normal_(stage.merge.score.weight)
        with torch.no_grad():
            stages = model.backbone(image)
        steepness = gradients(image, 4)
        for before, after in itertools.pairwise(stages):
            x, y = before.tokens.positions.long().unbind(1)
            ranking = steepness[y * 32 + x]
            torch.testing.assert_close(before.scores, ranking)
            ranking = spread_scores(ranking, before.tokens.positions, spread=spread)
            best = ranking.topk(after.tokens.num_tokens).indices
            kept = {*map(tuple, after.tokens.positions.tolist())}
            assert kept == {*map(tuple, before.tokens.positions[best].tolist())}


def test_spread_models_keep_the_first_of_the_spread_ranking():
    model = tiny("features", spread=0.3, prior=None, reserve=False)
    torch.nn.init.normal_(model.backbone.stages[0].merge.score.weight)
    with torch.no_grad():
        first, second = model.backbone(torch.randn(2, 3, 64, 96))[:2]
    ranking = spread_scores(
        first.scores, first.tokens.positions, sizes=first.tokens.sizes, spread=0.3
    )
    rows = ranking.unflatten(0, (2, -1)).topk(second.tokens.sizes[0]).indices
    places = first.tokens.positions.unflatten(0, (2, -1))
    for kept, all_places, own in zip(second.tokens, places, rows, strict=True):
        assert set(map(tuple, kept.positions.tolist())) == set(map(tuple, all_places[own].tolist()))


def test_blocks_reach_far_and_merges_take_the_nearest(monkeypatch):
    """Of each stage by its own number, and where that is not more, the paper's neighborhoods."""
    seen = {"attention": [], "merge": []}
    for kind, cls in (("attention", NeighborhoodAttention), ("merge", ScoredMerge)):

        def spied(self, x, tokens, *rest, kind=kind, forward=cls.forward, **options):
            around = rest[0] if kind == "attention" else tokens
            seen[kind].append(around.cluster_index)
            return forward(self, x, tokens, *rest, **options)

        monkeypatch.setattr(cls, "forward", spied)
    image = torch.randn(2, 3, 200, 152, generator=torch.Generator().manual_seed(1))
    model = tiny("features", reach=(48, 144, 1, 400))
    with torch.no_grad():
        outputs = model.backbone(image)
    attended = iter(seen["attention"])
    for stage, (output, size, reach) in enumerate(
        zip(outputs, model.config.neighborhood_size, model.config.reaches, strict=True)
    ):
        count, wide = (round(n / model.config.cluster_size) for n in (size, reach))
        nearest = output.tokens.neighborhoods(count).cluster_index
        expected = nearest
        if wide > count:
            expected = output.tokens.neighborhoods(wide).thinned(count).cluster_index
        for _ in model.backbone.stages[stage].blocks:
            assert torch.equal(next(attended), expected)
        if stage < 3:
            assert torch.equal(seen["merge"][stage], nearest)
        assert torch.equal(expected, nearest) == (stage != 1)  # the last one sees all in any case
    assert next(attended, None) is None
    for wrong in (0, 1.5, (48, 48)):
        with pytest.raises((TypeError, ValueError), match="reach"):
            tiny("features", reach=wrong)


def test_a_lattice_is_not_spread():
    with pytest.raises(ValueError, match="spread: a lattice is even already"):
        tiny("features", ranking="lattice", spread=0.1)


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
            match=r"unknown option queries \(queries is of the head mask2former or hcformer\); "
            r"known options: .*of head 'dense': channels, detail, first_stage, pixel_channels$",
        ):
            make(queries=3)
    with pytest.raises(ValueError, match=r"rate: expected a number in \(0, 1\], got 1.5"):
        create_model("aff_nano", rate=1.5)
    with pytest.raises(ValueError, match=r"rate: .* one for each of 3 merges, got \(0.5, 0.5\)"):
        create_model("aff_nano", rate=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"rate: expected a number in \(0, 1\], got 2"):
        create_model("aff_nano", rate=(0.5, 2, 0.5))
    with pytest.raises(ValueError, match="head: expected one of"):
        create_model("aff_nano", head="boxes")


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
    """Gray and RGB pictures are converted to each other; other channels must be given."""
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
        monkeypatch.setattr("pointformer.nn.blocks.HIDDEN", 5000)
        torch.testing.assert_close(model(images), whole)
    torch.testing.assert_close(model(images).detach(), whole)


def test_rows_are_taken_in_parts_on_cpus_only():
    """On GPUs every part would be a dozen launches more."""

    def calls(device):
        made = []

        def function(x):
            made.append(len(x))
            return x * 2

        with torch.no_grad():
            result = by_rows(function, torch.empty(10, 4, device=device), width=HIDDEN // 4)
        assert result.shape == (10, 4)
        return made

    assert calls("cpu") == [4, 4, 2]
    assert calls("meta") == [10]


# Wiring, literally ---------------------------------------------------------------------------


def scored(**overrides):
    """A model whose scores matter."""
    model = tiny("features", **overrides)
    for stage in model.backbone.stages[:3]:
        torch.nn.init.normal_(stage.merge.score.weight)
        torch.nn.init.normal_(stage.merge.score.bias)
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.7, 4.0, 8.0])
def test_merges_keep_the_best_by_alpha(alpha):
    """Reserved tokens, then those with the largest prior + alpha * score, in every stage."""
    model = scored(alpha=4.0)
    model.reconfigure(alpha=alpha)
    image = torch.randn(1, 3, 100, 132, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        stages = model.backbone(image)
    differs = False
    for i, (before, after) in enumerate(itertools.pairwise(stages)):
        places = before.tokens.positions
        scores = torch.sigmoid(
            before.tokens.features @ model.backbone.stages[i].merge.score.weight[0]
            + model.backbone.stages[i].merge.score.bias
        )
        torch.testing.assert_close(before.scores, scores)
        nearest = torch.cdist(places, places).fill_diagonal_(torch.inf).amin(1)
        step = 2 * 2 ** torch.ceil(torch.log2(nearest - 1e-4)) if i else torch.full_like(nearest, 2)
        prior = (places % step[:, None] == 0).all(1).float()
        reserved = (places % 2 ** (i + 2) == 0).all(1)
        ranks = prior + alpha * before.scores.double()
        keep = max(int(len(places) * 0.25), int(reserved.sum()))
        order = (ranks + 1e3 * reserved).argsort(descending=True, stable=True)[:keep]
        worst = ranks[order[~reserved[order]]].min()
        kept = {tuple(p) for p in after.tokens.positions.tolist()}
        clear = (ranks > worst + 1e-6) | reserved  # the last may tie
        assert {tuple(p) for p in places[clear].tolist()} <= kept
        assert len(kept) == keep
        assert all(ranks[(places == torch.tensor(p)).all(1)] >= worst - 1e-6 or
                   all(x % 2 ** (i + 2) == 0 for x in p) for p in kept)  # fmt: skip
        differs |= bool((places[order] % 2 ** (i + 1) != 0).any())
    assert differs == (alpha >= 4)  # less never outweighs the grid's prior


@pytest.mark.parametrize(
    "change",
    [{"rate": 0.5}, {"alpha": 0.5}, {"spread": 0.2}, {"neighborhood_size": 16}, {"reach": 100}],
    ids=str,
)
def test_a_reconfigured_model_is_one_made_so(change):
    image = torch.randn(1, 3, 96, 132, generator=torch.Generator().manual_seed(1))
    model, made = scored(), scored(**change)
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        before = model(image)[-1].features
        model.reconfigure(**change)
        after, expected = model(image)[-1].features, made(image)[-1].features
    assert torch.equal(after, expected)
    assert before.shape != after.shape or not torch.allclose(before, after)


@pytest.mark.parametrize("sizes", [(3, 1), (2, 2)])
def test_drop_path_drops_whole_samples(sizes):
    """One draw per sample, not per batch or token; the mean stays."""
    torch.manual_seed(0)
    sizes *= 2000
    tokens = TokenSet(torch.zeros(sum(sizes), 2), torch.zeros(sum(sizes), 2), sizes)
    x = torch.ones(sum(sizes), 2)
    y = drop_path(x, 0.2, tokens, True)
    assert set(y.unique().tolist()) == {0.0, 1.25}
    samples = torch.stack([part[0, 0] for part in y.split(sizes)])
    assert torch.equal(samples[tokens.sample_index][:, None].expand_as(y), y)
    assert 0.77 < (samples > 0).float().mean() < 0.83
    assert drop_path(x, 0.2, tokens, False) is x
    assert drop_path(x, 0.0, tokens, True) is x
    assert torch.equal(drop_path(x, 1.0, tokens, True), torch.zeros_like(x))


@pytest.mark.parametrize("config", [
    TINY.override(depths=(2, 1, 3, 1), drop_path=0.6),
    SwinConfig(dims=(8, 16), depths=(3, 4), heads=2, drop_path=0.6),
])  # fmt: skip
def test_drop_path_grows_by_depth(config):
    model = Model("deep", config, "features", 1)
    rates = [b.drop_path_rate for stage in model.backbone.stages for b in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(7)])


@pytest.mark.parametrize("layer_scale", [0.0, 0.3])
def test_a_block_is_its_definition(layer_scale):
    """Pre-norm, both branches scaled, each dropped on its own."""
    torch.manual_seed(0)
    model = tiny("features", layer_scale=layer_scale, drop_path=0.5)
    block = model.backbone.stages[3].blocks[0]
    assert block.drop_path_rate == 0.5
    scale = layer_scale or 1.0
    if layer_scale:
        assert torch.equal(block.gamma1, torch.full((48,), 0.3))
        assert torch.equal(block.gamma2, torch.full((48,), 0.3))
        torch.nn.init.normal_(block.gamma1)
        torch.nn.init.normal_(block.gamma2)
    gammas = (block.gamma1, block.gamma2) if layer_scale else (scale, scale)
    torch.nn.init.normal_(block.norm1.weight)
    torch.nn.init.normal_(block.norm2.weight)
    tokens = TokenSet(torch.rand(6, 2), torch.randn(6, 48), (1,) * 6)
    attended = torch.randn(6, 48)
    seen = []

    def attention(x, *where, project, impl):
        assert not project
        seen.append((x, where))
        return attended

    block.attn.forward = attention
    with torch.no_grad():
        for training in (False, True):
            block.train(training)
            torch.manual_seed(1)
            out, pending = block(tokens, "here")
            out = out.features if pending is None else add_branch(out.features, pending)
            assert (pending is None) != training  # on CPUs
            torch.manual_seed(1)
            drops = [torch.empty(6, 1).bernoulli_(0.5) * 2.0 if training else 1.0 for _ in range(2)]
            x = tokens.features
            middle = x + drops[0] * gammas[0] * block.attn.proj(attended)
            hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(middle)))
            expected = middle + drops[1] * gammas[1] * block.mlp.fc2(hidden)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(seen[-1][0], block.norm1(x))
            assert seen[-1][1] == (tokens, "here")
            torch.manual_seed(1)
            less = tokens.with_features(x - 2 * attended)
            rest, pending = block(less, "here", pending=(attended, torch.full((48,), 2.0)))
            rest = rest.features if pending is None else add_branch(rest.features, pending)
            torch.testing.assert_close(rest, out)


def test_attention_is_its_definition():
    """Query, key, value, each head by head; every option of the op is passed."""
    torch.manual_seed(0)
    attention = tiny("features").backbone.stages[2].blocks[0].attn
    tokens = TokenSet.from_grid(torch.randn(1, 32, 7, 9)).cluster(8)
    neighborhoods = nearest_clusters(tokens.positions, tokens.clusters, 3)
    x = tokens.features
    rows, known = neighborhoods.members()
    with torch.no_grad():
        query, key, value = (part.view(-1, 4, 8) for part in attention.qkv(x).chunk(3, 1))
        step = tokens.positions[rows.clamp(min=0).long()] - tokens.positions[:, None]
        far = step.norm(dim=2, keepdim=True)
        unit = torch.where(far > 0, step / far, 0.0)
        features = torch.cat([step, far, unit[..., 1:], unit[..., :1]], 2)
        bias = features @ attention.position.weight.T + attention.position.bias
        near = rows.clamp(min=0).long()
        logits = torch.einsum("thd,tnhd->tnh", query, key[near]) / 8**0.5 + bias
        logits = logits.masked_fill(~known[..., None], -torch.inf)
        blank = (query * attention.blank_key.view(4, 8)).sum(2, keepdim=True) / 8**0.5
        shares = torch.cat([logits, blank.transpose(1, 2)], 1).softmax(1)
        expected = torch.einsum("tnh,tnhd->thd", shares[:, :-1], value[near])
        expected = expected + shares[:, -1, :, None] * attention.blank_value.view(4, 8)
        out = attention(x, tokens, neighborhoods, project=False)
    torch.testing.assert_close(out, expected.flatten(1), atol=1e-5, rtol=1e-4)


def test_patches_are_two_convolutions():
    model = tiny("features")
    patch = model.backbone.patch_embed
    for layer in (patch.bn, patch.norm):
        torch.nn.init.normal_(layer.weight)
    patch.bn.running_mean.normal_()
    image = torch.randn(2, 3, 21, 34)
    whole = np.pad(image, ((0, 0), (0, 0), (0, 3), (0, 2)), "edge")  # to whole patches
    with torch.no_grad():
        x = torch.nn.functional.conv2d(
            torch.from_numpy(whole), patch.conv1.weight, patch.conv1.bias, 2, 1
        )
        x = torch.nn.functional.gelu(patch.bn(x))
        x = torch.nn.functional.conv2d(x, patch.conv2.weight, patch.conv2.bias, 2, 1)
        expected = patch.norm(x.movedim(1, -1).flatten(0, 2))
        tokens = patch(image)
    torch.testing.assert_close(tokens.features, expected)
    assert tokens.extent == ((9, 6),) * 2
    assert tokens.positions[10].tolist() == [1, 1]


@pytest.mark.parametrize("side", [60, 61, 62, 63])
def test_the_end_of_a_side_is_as_everywhere(side):
    """Of a uniform picture the tokens of the last rows and columns are those of the first: it does
    not matter whether a side is whole patches. (The weights of the package saw a line of nuclei
    along every side of odd length.)"""
    patch = create_model("aff_nano.nuclei").backbone.patch_embed
    with torch.no_grad():
        whole, part = (
            patch(torch.full((1, 3, 64, 64), -1.0)),
            patch(torch.full((1, 3, side, 64), -1.0)),
        )
    rows = -(-side // 4)
    torch.testing.assert_close(
        part.features.view(rows, 16, -1)[-1], whole.features.view(16, 16, -1)[-1]
    )


def test_a_merge_is_its_parts():
    model = scored()
    image = torch.randn(1, 3, 60, 92, generator=torch.Generator().manual_seed(1))
    merge = model.backbone.stages[0].merge
    seen = {}
    merge.norm.register_forward_hook(lambda m, args, out: seen.update(given=args[0], out=out))
    with torch.no_grad():
        stages = model.backbone(image)
        before, after = stages[0], stages[1]
        # Undo the clustering of the second stage: its inputs are the merge's output, reordered.
        order = after.tokens.clusters.order.long()
        torch.testing.assert_close(after.inputs.features, merge.linear(seen["out"])[order])
        place = after.inputs.positions[0]
        row = int((before.tokens.positions == place).all(1).nonzero())
        neighborhoods = nearest_clusters(before.tokens.positions, before.tokens.clusters, 6)
        rows, known = neighborhoods.members()
        near = rows[row][known[row]].long()
        step = before.tokens.positions[near] - place
        far = step.norm(dim=1, keepdim=True)
        unit = torch.where(far > 0, step / far, 0.0)
        features = torch.cat([step, far, unit[:, 1:], unit[:, :1]], 1)
        weights = merge.weight_net(features)
        weights = weights * before.scores[near, None]
        expected = (weights.T @ before.tokens.features[near]).flatten()
    torch.testing.assert_close(seen["given"][order[0]], expected, atol=1e-5, rtol=1e-3)


def standard(parameter):
    return parameter.detach().float().std().item()


@pytest.mark.parametrize("head", ["classification", "mask2former", "hcformer"])
def test_initial_values(head):
    """Part of a recipe: linear layers of backbone and classifier, transformers, projections,
    offsets in eight directions, blank tokens, temperatures."""
    torch.manual_seed(0)
    model = create_model("aff_nano", head=head, num_classes=200)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith("backbone."):
            if layer.weight.numel() > 500:
                assert standard(layer.weight) == pytest.approx(0.02, rel=0.1), name
                assert layer.weight.abs().max() < 0.1
            assert layer.bias is None or not layer.bias.any(), name
        if isinstance(layer, torch.nn.LayerNorm):
            assert torch.all(layer.weight == 1)
            assert not layer.bias.any()
    block = model.backbone.stages[2].blocks[1].attn
    assert 0.8 < standard(torch.cat([block.blank_key, block.blank_value])) < 1.2
    if head == "classification":
        assert standard(model.head.linear.weight) == pytest.approx(0.02, rel=0.05)
        assert not model.head.linear.bias.any()
        return
    decoder = model.head.decoder
    for name, parameter in decoder.layers.named_parameters():
        if parameter.dim() > 1:
            out, into = parameter.shape
            expected = math.sqrt(2 / (out + into))
            assert standard(parameter) == pytest.approx(expected, rel=0.02), name
    for parameter in (decoder.query, decoder.query_position, decoder.level_embed):
        assert standard(parameter) == pytest.approx(1, rel=0.15)
    assert not torch.equal(decoder.query, decoder.query_position)
    if head == "hcformer":
        for assign in model.head.assignments:
            assert assign.temperature.item() == pytest.approx(0.1)
            for layer in (assign.fine_proj, assign.coarse_proj):
                expected = math.sqrt(2 / sum(layer.weight.shape))
                assert standard(layer.weight) == pytest.approx(expected, rel=0.05)
        return
    pixels = model.head.pixel_decoder
    assert standard(pixels.level_embed) == pytest.approx(1, rel=0.15)
    for layer in pixels.layers:
        attn = layer.attn
        assert attn.power.item() == 6
        assert isinstance(attn.power, torch.nn.Parameter)
        places = attn.offsets.bias.view(8, 3, 4, 2)
        # Head 1 looks to the lower right: both coordinates are as far as the point's number.
        directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
        for head_number, direction in enumerate(directions):
            for point in range(4):
                expected = torch.tensor(direction) * (point + 1.0)
                found = places[head_number, :, point]
                torch.testing.assert_close(found, expected.expand(3, 2), atol=1e-5, rtol=1e-5)
        for zero in (attn.offsets.weight, attn.weights.weight, attn.weights.bias):
            assert not zero.any()
        for square in (attn.value, attn.proj):
            assert standard(square.weight) == pytest.approx(math.sqrt(2 / 512), rel=0.02)
            assert not square.bias.any()


def test_published_configurations():
    """Table 1 and the released training settings."""
    rows = {
        "aff_mini": ((32, 128, 256, 384), (2, 2, 6, 2), (2, 4, 8, 16), 2.0, 0.0, 0.0),
        "aff_tiny": ((64, 128, 256, 512), (3, 4, 18, 5), (2, 4, 8, 16), 3.0, 0.2, 0.0),
        "aff_small": ((96, 192, 384, 768), (3, 4, 18, 2), (3, 6, 12, 24), 3.0, 0.3, 1e-5),
        "aff_base": ((128, 256, 512, 1024), (3, 4, 18, 2), (4, 8, 16, 32), 3.0, 0.2, 1e-5),
    }
    for name, (dims, depths, heads, ratio, drop, scale) in rows.items():
        for suffix, rate in (("", 0.25), ("_1_5th", 0.2)):
            if name + suffix not in CONFIGS:
                continue
            assert CONFIGS[name + suffix] == AFFConfig(
                dims, depths, heads, ratio, drop_path=drop, layer_scale=scale, rate=rate,
                cluster_size=8, neighborhood_size=(48, 48, 48, 49), alpha=4.0, image_size=224,
                patch_stride=4, in_channels=3, curve="snake", anchors=True, remainder="last",
                scope="token", prior="adaptive", reserve=True, reserve_share=None,
                expanded_position=True, blank_token=True, merge="adaptive",
            )  # fmt: skip
    for name in ("mini", "tiny", "small"):
        dims, depths, heads, ratio, drop, scale = rows[f"aff_{name}"]
        assert CONFIGS[f"swin_{name}"] == SwinConfig(
            dims, depths, heads, ratio, window_size=7, drop_path=drop, layer_scale=scale
        )
    local = create_model("aff_mini", head="features")
    assert local.config.neighborhood_size == (48,) * 4


def test_neighborhoods_are_the_nearest_number_of_clusters():
    """47 of clusters of 8 are 6 of these, as 48 are."""
    image = torch.randn(1, 3, 96, 132, generator=torch.Generator().manual_seed(1))
    model, found = tiny("features"), {}
    with torch.no_grad():
        for size in (40, 47, 48):
            model.reconfigure(neighborhood_size=size)
            found[size] = model.backbone(image)[0].tokens.features
    assert torch.equal(found[47], found[48])
    assert not torch.allclose(found[40], found[48])


@pytest.mark.parametrize(("stride", "first", "second"), [(4, 2, 2), (2, 2, 1), (1, 1, 1)])
def test_the_first_convolution_has_the_larger_stride(stride, first, second):
    patch = tiny(patch_stride=stride).backbone.patch_embed
    assert (patch.conv1.stride, patch.conv2.stride) == ((first,) * 2, (second,) * 2)


def test_checkpointing_is_turned_on_and_off():
    model = tiny()
    blocks = [stage.blocks[0] for stage in model.backbone.stages]
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert {block.recompute for block in blocks} == {enable}


def test_reconfigured_ends_with_an_error_too():
    model = tiny()
    before = model.config

    def fail():
        with model.reconfigured(rate=0.5):
            assert model.config.rate == 0.5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.config == before


def test_our_own_configurations():
    shared = {
        "mlp_ratio": 2.0, "cluster_size": 8, "neighborhood_size": (48,) * 4, "rate": 0.25,
        "layer_scale": 0.0, "drop_path": 0.0, "curve": "hilbert",
    }  # fmt: skip
    points = shared | {
        "in_channels": 0, "dimensions": 3, "coordinates": "xyz", "unit": None,
        "embed_neighbors": 16, "points": 1024,
    }  # fmt: skip
    nano = {
        "dims": (32, 64, 128, 192), "depths": (2, 2, 4, 2), "heads": (2, 4, 8, 8), "reach": 1,
        "alpha": 4.0, "image_size": 256, "patch_stride": 4, "in_channels": 3, "anchors": True,
        "remainder": "spread", "scope": "token", "include_own": False, "prior": "adaptive",
        "reserve": True, "reserve_share": 0.5, "expanded_position": True, "blank_token": True,
        "merge": "adaptive", "ranking": "scores", "spread": 0.0, "merge_center": False,
    }  # fmt: skip
    small = {"dims": (64, 128, 256, 384), "depths": (2, 2, 6, 2), "heads": (4, 8, 16, 16)}
    of_points = {"dims": (32, 64, 128, 256), "depths": (1, 1, 2, 1), "heads": (2, 4, 8, 8)}
    for name, expected in (
        ("aff_nano", shared | nano),
        ("point_nano", points | of_points),
        ("point_small", points | small | {"drop_path": 0.1}),
    ):
        assert dataclasses.asdict(CONFIGS[name]) == expected, name


def test_numbers_of_numpy_are_numbers():
    given_ = {
        "dims": (np.int64(16), 32), "depths": np.int64(1), "heads": [np.int32(2), 2],
        "neighborhood_size": np.uint8(48), "cluster_size": np.int64(8), "reach": np.int64(2),
        "rate": np.float32(0.25), "alpha": np.float32(3),
    }  # fmt: skip
    config = AFFConfig(**given_)
    assert json.loads(json.dumps(dataclasses.asdict(config)))["dims"] == [16, 32]
    assert (config.depths, config.heads, config.reaches) == ((1, 1), (2, 2), (2, 2))
    assert AFFConfig(**given_ | {"rate": (np.float32(0.5),)}).rate == (0.5,)


@pytest.mark.parametrize(
    ("config", "message"),
    [(lambda: SwinConfig(dims=(1,), depths=1, heads=1), "dims: expected at least 2 channels in"),
     (lambda: AFFConfig((1,), 1, 1, neighborhood_size=48), "dims: expected at least 2 channels in"),
     (lambda: AFFConfig(dims=(16,), depths=1, heads=2, neighborhood_size=48, rate=7.0),
      r"rate: expected a number in \(0, 1\], got 7")],
)  # fmt: skip
def test_configurations_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        config()
    AFFConfig(dims=(16,), depths=1, heads=2, neighborhood_size=48, rate=())
