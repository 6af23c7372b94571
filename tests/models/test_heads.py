"""Mask heads: gradients, ragged batches, HCFormer against a dense grid, saving and loading."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from pointformer import TokenSet, deformable_attention, interpolate, knn
from pointformer.models import create_model, load_model, save_model
from pointformer.models.hcformer import SoftAssignment, decode
from pointformer.models.layers import pack_samples, pad_samples, sine_encoding
from pointformer.models.losses import Targets, segmentation_loss
from pointformer.models.mask2former import MaskDecoder, Spotlight, TokenQueries
from pointformer.models.pixel_decoder import PixelDecoder
from pointformer.tasks import task_of

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
SMALL["mask2former of later stages"] = {**SMALL["mask2former"], "first_stage": 1}
SMALL |= {f"{head} of tokens": SMALL[head] | {"token_queries": True} for head in list(SMALL)[:2]}


def small_model(head, **options):
    torch.manual_seed(0)
    options = {**SMALL[head], **options}
    return create_model(
        "aff_nano", head=head.split()[0].removesuffix("+"), num_classes=3, **options
    )


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
    assert ("middles" in losses) == head.endswith("of tokens")
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("head", SMALL)
def test_images_of_different_sizes_equal_single_images(head):
    model = small_model(head).eval()
    g = torch.Generator().manual_seed(2)
    images = [
        torch.randn(3, h, w, generator=g) for h, w in ((64, 64), (48, 90), (33, 64), (14, 27))
    ]
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
    index = knn(coarse.positions, 9, query_positions=fine.positions, sizes=coarse.sizes,
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
    with torch.no_grad():
        (found,) = task_of(model).decode(model.eval()(image), [(18, 23)])
    assert found.size == (18, 23)


# Heads from their parts ----------------------------------------------------------------------


def aff_stages(*shapes, head="hcformer", seed=0, **options):
    """A small model, and its backbone's stages of pictures of these shapes."""
    model = small_model(head, **options)
    g = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, *shape, generator=g) for shape in shapes]
    with torch.no_grad():
        return model, images, model.eval().backbone(images)


@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_hcformer_is_its_parts(encoder_layers):
    """Shares of a stage's tokens in what came into the next; queries see the coarsest tokens; masks
    are carried down from there, those of earlier layers only in training."""
    model, images, stages = aff_stages((64, 72), (48, 40), encoder_layers=encoder_layers)
    head = model.head
    assert (head.encoder is not None) == (encoder_layers > 0)
    with torch.no_grad():
        coarsest = stages[3].tokens.with_features(head.norm(stages[3].tokens.features))
        memory = coarsest.with_features(head.project(coarsest.features))
        if encoder_layers:
            coarsest = memory = head.encoder(memory)
        mask_features = coarsest.with_features(head.mask_features(coarsest.features))
        expected = head.decoder(mask_features, [memory])
        shares = [head.assignments[i](stages[i].tokens, stages[i + 1].inputs) for i in range(3)]
        for training in (False, True):
            out = head.train(training)(stages, images, None)
            layers = [(expected, out)]
            if training:
                layers += zip(expected.auxiliary, out.auxiliary, strict=True)
            else:
                assert out.auxiliary == ()
            for theirs, ours in layers:
                masks = theirs.mask_logits
                for index, weights in reversed(shares):
                    rows = masks[index.clamp(min=0).long()]
                    masks = (rows * (weights * (index >= 0))[..., None]).sum(1)
                torch.testing.assert_close(ours.mask_logits, masks, atol=1e-5, rtol=1e-4)
                assert torch.equal(ours.class_logits, theirs.class_logits)
                assert ours.tokens.num_tokens == stages[0].tokens.num_tokens
            assert [t.item() for t in out.temperatures] == pytest.approx([0.1] * 3)


def test_mask2former_is_its_parts():
    model, images, stages = aff_stages((40, 72), head="mask2former")
    head = model.head
    with torch.no_grad():
        tokens = [
            stage.tokens.with_features(norm(stage.tokens.features))
            for stage, norm in zip(stages, head.features.norms, strict=True)
        ]
        expected = head.decoder(*head.pixel_decoder(tokens))
        out = head(stages, images, None)
    assert torch.equal(out.mask_logits, expected.mask_logits)
    assert len(out.auxiliary) == SMALL["mask2former"]["decoder_layers"]


def test_mask_decoder_is_its_definition():
    """Layer by layer in its own words: which level, where queries may look, what they become."""
    torch.manual_seed(0)
    decoder = MaskDecoder(3, levels=2, dim=16, queries=4, layers=3, heads=2, hidden=24).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    finest = TokenSet.from_grid(torch.randn(1, 16, 6, 10))
    levels = []
    for stride in (4, 2):
        x, y = finest.positions.unbind(1)
        kept = (x % stride == 0) & (y % stride == 0)
        features = torch.randn(int(kept.sum()), 16)
        levels.append(TokenSet(finest.positions[kept], features, None, finest.extent))

    def attend(layer, query, key, value, blocked=None):
        """torch's own, with the layer's weights."""
        own = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
        own.in_proj_weight.data, own.in_proj_bias.data = layer.in_proj.weight, layer.in_proj.bias
        own.out_proj.weight.data, own.out_proj.bias.data = layer.proj.weight, layer.proj.bias
        return own(query, key, value, attn_mask=blocked)[0]

    def predict(x):
        x = decoder.norm(x)
        embedded = x
        for i in (0, 2, 4):
            embedded = decoder.mask_embed[i](embedded)
            embedded = embedded.relu() if i < 4 else embedded
        return decoder.classify(x), embedded @ finest.features.T

    with torch.no_grad():
        out = decoder(finest, levels)
        x, where = decoder.query[None], decoder.query_position[None]
        expected = [predict(x)]
        for i, layer in enumerate(decoder.layers):
            level = levels[i % 2]
            memory = (level.features + decoder.level_embed[i % 2])[None]
            code = sine_encoding(level, 16)[None]
            rows = (level.positions[:, 1] * 10 + level.positions[:, 0]).long()
            blocked = expected[-1][1][0][:, rows].sigmoid() < 0.5
            blocked = (blocked & ~blocked.all(1, keepdim=True)).repeat(2, 1, 1)
            x = layer.cross_norm(x + attend(layer.cross, x + where, memory + code, memory, blocked))
            x = layer.attn_norm(x + attend(layer.attn, x + where, x + where, x))
            x = layer.mlp_norm(x + layer.mlp.fc2(layer.mlp.fc1(x).relu()))
            expected.append(predict(x))
    for ours, (classes, masks) in zip((*out.auxiliary, out), expected, strict=True):
        torch.testing.assert_close(ours.class_logits, classes, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.masks().flatten(2), masks, atol=1e-3, rtol=1e-4)
    assert out.stride == 4


def test_queries_of_tokens_are_peaks_first():
    """Of two bumps first both tops, then other tokens by their logits; of a sample with fewer
    tokens than queries all, and the others are not there."""
    torch.manual_seed(0)
    choose = TokenQueries(2, queries=3)
    choose.norm = torch.nn.Identity()
    with torch.no_grad():
        choose.middle.weight.copy_(torch.tensor([[1.0, 0]]))
    low, high = torch.zeros(2, 5, 8), torch.zeros(2, 1, 2)
    low[0] -= (torch.arange(5)[:, None] + torch.arange(8)) / 100  # a level ground were all peaks
    low[0, 1, 1:4] = torch.tensor([2.0, 3, 2.5])
    low[0, 3, 6] = 1.0
    high[0, 0, 1] = 1.0
    tokens = TokenSet.from_grid([low, high])
    code = torch.arange(42.0)[:, None]
    queries, logits = choose(tokens, code)
    assert queries.positions[0].tolist() == [[2, 1], [6, 3], [3, 1]]
    assert queries.positions[1, :2].tolist() == [[1, 0], [0, 0]]
    assert queries.present.tolist() == [[True] * 3, [True, True, False]]
    assert queries.code[0, :, 0].tolist() == [10, 30, 11]
    torch.testing.assert_close(queries.content[0, 0], choose.content(tokens.features[10]))
    start = math.log(0.01 / 0.99)  # of all tokens the same, but for their features
    torch.testing.assert_close(logits.features[:, 0], tokens.features[:, 0] + start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peaks_are_ranked_whatever_the_precision(dtype):
    """Six of probabilities near 0.02, to which half precision adds 1 without a difference."""
    logits = torch.full((1, 1, 3, 13), -6.0)
    logits[0, 0, 1, 1::2] = torch.tensor([-3.89, -3.875, -3.86, -3.797, -3.75, -3.734])
    tokens = TokenSet.from_grid(logits.to(dtype))
    choose = TokenQueries(1, queries=4)
    rows, present = choose._choose(tokens, tokens.features[:, 0], None)
    assert present is None
    assert tokens.positions[rows[0]].tolist() == [[11, 1], [9, 1], [7, 1], [5, 1]]


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("mask2former", {"power": 4}),
        ("mask2former", {"power": 4, "learn_power": False}),
        ("hcformer", {"temperature": 1}),
        ("hcformer", {"temperature": np.float64(0.1)}),
        ("dense", {"layer_scale": 1}),
    ],
)
def test_numbers_of_any_kind_are_options(head, options):
    few = {"dims": (16, 16, 16, 16), "depths": 1, "heads": 2, **SMALL.get(head, {})}
    model = create_model("aff_nano", head=head, num_classes=3, **few, **options)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))


def test_a_query_without_a_token_is_no_object():
    model, images, stages = aff_stages((64, 64), (8, 8), token_queries=True)
    assert stages[3].tokens.sizes == (4, 1)
    with torch.no_grad():
        out = model.head(stages, images, None)
    for logits, count in zip(out.class_logits, stages[3].tokens.sizes, strict=True):
        probability = logits.softmax(1)
        assert (probability[:count, -1] < 0.9).all()
        assert (probability[count:, -1] > 0.9999).all()


def test_spotlight_is_its_formula():
    """At the start a disk of 2.7 cells around the query; later where and as wide as it says."""
    torch.manual_seed(0)
    light = Spotlight(4)
    x, places = torch.randn(1, 2, 4), 9 * torch.rand(1, 30, 2)
    positions = torch.tensor([[[2.0, 3], [7, 5]]])
    with torch.no_grad():
        distance = (positions[:, :, None] - places[:, None]).norm(dim=3)
        assert torch.equal(
            light(x, positions, places) > 0, distance < 3 * math.sqrt(2 * math.log(1.5))
        )
        torch.nn.init.normal_(light.shape.weight, std=0.3)
        logits = light(x, positions, places)
        for query in range(2):
            shift_x, shift_y, scale = light.shape(x[0, query]).tolist()
            width = 3 * math.exp(scale)
            for token in range(30):
                dx = places[0, token, 0].item() - positions[0, query, 0].item() - width * shift_x
                dy = places[0, token, 1].item() - positions[0, query, 1].item() - width * shift_y
                expected = 9 * math.exp(-(dx**2 + dy**2) / (2 * width**2)) - 6
                assert logits[0, query, token].item() == pytest.approx(expected, abs=1e-4)


def test_sine_encoding_is_its_formula():
    """Per axis: sines of 2 pi times the share of the peak over powers of the temperature, then
    cosines; the peak is the sample's, or the batch's."""
    positions = torch.tensor([[0.0, 0], [6, 2], [3, 4], [2, 1], [8, 2]])
    tokens = TokenSet(positions, torch.zeros(5, 1), (3, 2))
    for norm, peaks in (("image", [(6, 4)] * 3 + [(8, 2)] * 2), ("batch", [(8, 4)] * 5)):
        code = sine_encoding(tokens, 8, norm)
        for row, (place, peak) in enumerate(zip(positions.tolist(), peaks, strict=True)):
            expected = []
            for at, most in zip(place, peak, strict=True):
                angles = [2 * math.pi * at / most / 10000 ** (i / 2) for i in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(code[row], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_pixel_decoder_is_its_parts():
    """Coarse levels go through the layers together; then one step of a pyramid. Levels with fewer
    than four tokens list none of another level's."""
    torch.manual_seed(0)
    decoder = PixelDecoder((6, 8, 10, 12), dim=16, layers=2, hidden=24).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for layer in decoder.layers:
        torch.nn.init.constant_(layer.attn.power, 3.0)
    finest = TokenSet.from_grid([torch.randn(6, 4, 10), torch.randn(6, 3, 5)])
    stages = [finest]
    for stride, channels in ((2, 8), (4, 10), (8, 12)):
        kept = (finest.positions % stride == 0).all(1)
        sizes = [int(part.sum()) for part in kept.split(finest.sizes)]
        features = torch.randn(int(kept.sum()), channels)
        stages.append(TokenSet(finest.positions[kept], features, sizes, finest.extent))
    coarse = stages[:0:-1]
    assert coarse[1].sizes == (3, 2)
    with torch.no_grad():
        mask_features, levels = decoder(stages)
        x = torch.cat([p(t.features) for p, t in zip(decoder.projections, coarse, strict=True)])
        code = torch.cat(
            [sine_encoding(t, 16) + e for t, e in zip(coarse, decoder.level_embed, strict=True)]
        )
        starts = [sum(t.num_tokens for t in coarse[:i]) for i in range(3)]
        lookup = torch.full((finest.num_tokens, 3, 4), -1)
        for i, tokens in enumerate(coarse):
            for row, (place, sample) in enumerate(
                zip(finest.positions, finest.sample_index, strict=True)
            ):
                own = (tokens.sample_index == sample).nonzero()[:, 0]
                order = (tokens.positions[own] - place).square().sum(1).argsort(stable=True)[:4]
                lookup[row, i, : len(order)] = own[order] + starts[i]
        positions = torch.cat([t.positions for t in coarse])
        sample = torch.cat([t.sample_index for t in coarse])
        for layer in decoder.layers:
            query, attn = x + code, layer.attn
            weights = attn.weights(query).view(-1, 8, 12).softmax(2).view(-1, 8, 3, 4)
            seen = deformable_attention(
                attn.value(x).view(-1, 8, 2), positions, attn.offsets(query).view(-1, 8, 3, 4, 2),
                weights, positions, sample, lookup, finest.extent, power=3.0, impl="reference",
            )  # fmt: skip
            x = layer.norm1(x + attn.proj(seen.flatten(1)))
            x = layer.norm2(x + layer.mlp.fc2(layer.mlp.fc1(x).relu()))
        for tokens, start, level in zip(coarse, starts, levels, strict=True):
            expected = x[start : start + tokens.num_tokens]
            torch.testing.assert_close(level.features, expected, atol=1e-4, rtol=1e-4)
        up = interpolate(
            levels[2].features, stages[1].positions, finest.positions, sizes=stages[1].sizes,
            query_sizes=finest.sizes, k=4, power=6.0, impl="reference",
        )  # fmt: skip
        lateral, norm = decoder.lateral
        fused = finest.with_features(norm(lateral(finest.features)) + up)
        fused = decoder.conv_norm(decoder.conv(fused).features).clamp(min=0)
        torch.testing.assert_close(
            mask_features.features, decoder.mask_features(fused), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(("first", "detail"), [(0, True), (0, False), (1, True), (3, False)])
def test_dense_head_is_its_parts(first, detail):
    """Later stages are interpolated from three tokens by squared distance; pixels see the image."""
    torch.manual_seed(0)
    options = {"channels": 8, "pixel_channels": 4, "first_stage": first, "detail": detail}
    model = create_model("aff_nano", head="dense", num_classes=3, **options)
    model.eval()
    head, image = model.head, torch.randn(1, 3, 62, 98)
    with torch.no_grad():
        stages = model.backbone(image)
        grid = stages[0].tokens
        projections = dict(zip(range(first, 4), head.projections, strict=True))
        total = projections[0](grid.features) if first == 0 else 0
        for number in range(max(first, 1), 4):
            projection, tokens = projections[number], stages[number].tokens
            total = total + interpolate(
                projection(tokens.features), tokens.positions, grid.positions, k=3, power=2.0,
                impl="reference",
            )  # fmt: skip
        maps = grid.with_features(total).to_grid()
        pixels = head.to_pixels(head.mix(maps))[..., :62, :98]
        assert (head.detail is not None) == detail
        expected = head.classify(pixels + head.detail(image) if detail else pixels)
        out = head(stages, image, None)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("patch_stride", [1, 2, 4])
def test_stars_of_any_stride_are_of_cells_of_two_pixels(patch_stride):
    """Also of sides that cells do not divide; every ray is 8 pixels long at first, about."""
    torch.manual_seed(0)
    model = create_model("aff_nano", head="stars", num_classes=2, patch_stride=patch_stride,
                         rays=8, channels=8, cell_channels=8, hidden=8).eval()  # fmt: skip
    for height, width in ((16, 24), (17, 9), (1, 1)):
        with torch.no_grad():
            output = model(torch.randn(2, 3, height, width))
        assert output.shape == (2, 2 + 8, -(-height // 2), -(-width // 2))
        assert output[:, 2:].exp().median() == pytest.approx(8, rel=0.6)
    with pytest.raises(ValueError, match="rays: expected a multiple of 4, got 6"):
        create_model("aff_nano", head="stars", num_classes=1, rays=6)


@pytest.mark.parametrize("head", ["dense", "mask2former"])
def test_stages_that_a_head_does_not_read(head):
    """Their features change nothing, only the positions of the first are used."""
    torch.manual_seed(0)
    small = SMALL["mask2former"] if head == "mask2former" else {"detail": False}
    model = create_model("aff_nano", head=head, num_classes=3, first_stage=1, **small).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, *later = model.backbone(image)
        other = torch.randn_like(first.tokens.features)
        changed = dataclasses.replace(first, tokens=first.tokens.with_features(other))
        a, b = (model.head([stage, *later], image, None) for stage in (first, changed))
    if head == "mask2former":
        a, b = a.mask_logits, b.mask_logits
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"first_stage: expected at most \d, got 4"):
        create_model("aff_nano", head=head, num_classes=3, first_stage=4)


@pytest.mark.parametrize("sizes", [(3, 0, 5, 1), (2, 2), (0, 0), (4,)])
def test_padded_samples(sizes):
    rows = torch.arange(2.0 * sum(sizes)).view(-1, 2) + 1
    padded, there = pad_samples(rows, sizes)
    assert padded.shape == (len(sizes), max(sizes), 2)
    if there is None:
        there = torch.ones(padded.shape[:2], dtype=torch.bool)
    for sample, own, held in zip(padded, rows.split(sizes), there, strict=True):
        assert torch.equal(sample[: len(own)], own)
        assert not sample[len(own) :].any()
        assert held.tolist() == [True] * len(own) + [False] * (max(sizes) - len(own))
    assert torch.equal(pack_samples(padded, sizes), rows)


def test_options_of_the_assignments_and_of_the_powers_are_used():
    """Temperature and neighbors of all clusterings; a power that is learned or is not."""
    model = small_model("hcformer", neighbors=4, temperature=0.25)
    assert [assign.k for assign in model.head.assignments] == [4] * 3
    assert [assign.temperature.item() for assign in model.head.assignments] == [0.25] * 3
    with torch.no_grad():
        stages = model.eval().backbone(torch.randn(1, 3, 64, 64))
        index, shares = model.head.assignments[0](stages[0].tokens, stages[1].inputs)
    assert index.shape == shares.shape == (256, 4)
    for learned in (False, True):
        model = small_model("mask2former", power=3.0, learn_power=learned)
        powers = [layer.attn.power for layer in model.head.pixel_decoder.layers]
        assert [power.item() for power in powers] == [3.0] * 2
        assert [isinstance(power, torch.nn.Parameter) for power in powers] == [learned] * 2


def test_a_temperature_has_no_sign():
    """A step of the optimizer may take it through zero; the most similar still get the most."""
    fine, coarse = grids()
    layer = SoftAssignment(5, 7, dim=16)
    with torch.no_grad():
        _, expected = layer(fine, coarse)
        layer.temperature.neg_()
        _, shares = layer(fine, coarse)
    torch.testing.assert_close(shares, expected)


def test_a_spotlight_is_at_most_so_wide_and_so_narrow():
    """Of any scale that a query says: 3 cells times or over exp(5)."""
    light = Spotlight(1)
    x = torch.tensor([[[-1.0], [1]]])
    positions, places = torch.zeros(1, 2, 2), torch.tensor([[[0.0, 0], [1, 0], [400, 0]]])
    with torch.no_grad():
        light.shape.weight[2] = 1e3
        logits = light(x, positions, places)
    for query, width in enumerate((3 * math.exp(-5), 3 * math.exp(5))):
        expected = [9 * math.exp(-0.5 * (d / width) ** 2) - 6 for d in (0, 1, 400)]
        assert logits[0, query].tolist() == pytest.approx(expected, abs=1e-3)


def test_most_cells_are_no_stars_at_first():
    """One of a hundred, about."""
    torch.manual_seed(0)
    model = create_model("aff_nano", head="stars", num_classes=2, rays=8).eval()
    assert torch.allclose(model.head.classify.bias.sigmoid(), torch.tensor(0.01))
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 64))
    assert output[:, :2].sigmoid().median() < 0.1
