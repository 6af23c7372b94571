"""Matching and losses against slow, literal versions on tiny cases."""

import inspect
import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from pointformer import TokenSet
from pointformer.models.losses import (
    LossWeights,
    Targets,
    dice_loss,
    mask_cross_entropy,
    match,
    matching_cost,
    middle_loss,
    middle_targets,
    sample_points,
    sample_targets,
    segmentation_loss,
    uncertain_points,
)
from pointformer.models.mask2former import MaskPredictions
from pointformer.nn.parallel import WHOLE

WEIGHTS = LossWeights()


def literal_terms(logits, labels):
    """Cross-entropy and dice of one mask, point by point."""
    entropy, overlap, total = 0.0, 0.0, 0.0
    for x, t in zip(logits.tolist(), labels.tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        entropy -= t * math.log(p) + (1 - t) * math.log(1 - p)
        overlap += p * t
        total += p + t
    return entropy / len(logits), 1 - (2 * overlap + 1) / (total + 1)


def test_mask_losses_are_the_literal_ones():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 30, generator=g), (torch.rand(4, 30, generator=g) > 0.5).float()
    expected = torch.tensor([literal_terms(x, t) for x, t in zip(logits, labels, strict=True)])
    torch.testing.assert_close(mask_cross_entropy(logits, labels), expected[:, 0])
    torch.testing.assert_close(dice_loss(logits, labels), expected[:, 1])


def test_costs_are_the_literal_ones():
    g = torch.Generator().manual_seed(1)
    class_logits, mask_logits = torch.randn(5, 4, generator=g), torch.randn(5, 20, generator=g)
    classes = torch.tensor([2, 0, 2])
    masks = (torch.rand(3, 20, generator=g) > 0.5).float()
    cost = matching_cost(class_logits, mask_logits, classes, masks, WEIGHTS)
    for q, k in itertools.product(range(5), range(3)):
        entropy, dice = literal_terms(mask_logits[q], masks[k])
        probability = class_logits[q].softmax(0)[classes[k]].item()
        expected = 5 * entropy + 5 * dice - 2 * probability
        assert cost[q, k].item() == pytest.approx(expected, rel=1e-5)


def test_sample_points_is_bilinear_between_pixel_centers():
    maps = torch.arange(12.0).view(1, 3, 4)
    points = torch.tensor([[0.5 / 4, 0.5 / 3], [3.5 / 4, 2.5 / 3], [1.0 / 4, 0.5 / 3]])
    torch.testing.assert_close(sample_points(maps, points), torch.tensor([[0.0, 11.0, 0.5]]))


def test_uncertain_points_are_near_the_outline():
    x = torch.linspace(-8, 8, 64)
    logits = x.expand(2, 64, 64)
    points = uncertain_points(logits, 400)
    assert points.shape == (2, 400, 2)
    values = sample_points(logits, points).abs()
    assert values[:, :300].max() < values[:, 300:].max()
    assert (values[:, :300] < 3).all()  # a third of the candidates has less than 2.7


def test_matching_is_optimal():
    g = torch.Generator().manual_seed(2)
    targets = Targets(torch.tensor([1, 0, 1]), torch.rand(3, 8, 8, generator=g) > 0.5, 4)
    class_logits, maps = torch.randn(4, 3, generator=g), torch.randn(4, 8, 8, generator=g)
    torch.manual_seed(0)
    queries, objects = match(class_logits, maps, targets, WEIGHTS, 50)
    torch.manual_seed(0)
    at = torch.rand(50, 2)
    cost = matching_cost(
        class_logits, sample_points(maps, at), targets.classes, sample_points(targets.masks, at),
        WEIGHTS,
    )  # fmt: skip
    best = min(
        sum(cost[q, k].item() for k, q in enumerate(chosen))
        for chosen in itertools.permutations(range(4), 3)
    )
    assert cost[queries, objects].sum().item() == pytest.approx(best, rel=1e-5)


def predictions_of(class_logits, maps):
    """(B, Q, K + 1) and (B, Q, h, w) as predictions on a grid."""
    grid = TokenSet.from_grid(maps)
    return MaskPredictions(class_logits, grid.features, grid)


def test_perfect_predictions_cost_little_and_wrong_ones_much():
    masks = torch.zeros(1, 2, 16, 16)
    masks[0, 0, :8], masks[0, 1, 8:] = 1, 1
    targets = [Targets(torch.tensor([0, 2]), masks[0] > 0, 4)]
    classes = torch.full((1, 3, 4), -10.0)
    classes[0, 0, 2], classes[0, 1, 0], classes[0, 2, 3] = 10, 10, 10
    maps = torch.stack([masks[0, 1], masks[0, 0], torch.zeros(16, 16)])[None] * 40 - 20
    good = segmentation_loss(predictions_of(classes, maps), targets, points=500)
    bad = segmentation_loss(predictions_of(classes, maps.transpose(2, 3)), targets, points=500)
    assert good["classes"] < 1e-4
    assert bad["mask"] > 5 * good["mask"]  # even there the outline's points are between two pixels
    assert bad["dice"] > 3 * good["dice"]


def test_class_loss_weighs_no_object_a_tenth():
    class_logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3))
    out = predictions_of(class_logits, torch.randn(1, 3, 4, 4))
    none = [Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 4))]
    losses = segmentation_loss(out, none, points=10)
    expected = -class_logits[0].log_softmax(1)[:, 3].mean()  # a weighted mean of equal weights
    torch.testing.assert_close(losses["classes"], 2 * expected)
    one = [Targets(torch.tensor([1]), torch.ones(1, 4, 4), 4)]
    torch.manual_seed(0)
    losses = segmentation_loss(out, one, points=10)
    logs = class_logits[0].log_softmax(1)
    options = []
    for query in range(3):
        others = sum(-logs[q, 3] for q in range(3) if q != query)
        options.append(2 * (-logs[query, 1] + 0.1 * others) / 1.2)
    assert any(torch.isclose(losses["classes"], option) for option in options)


def test_errors_name_the_image():
    out = predictions_of(torch.randn(2, 3, 4), torch.randn(2, 3, 4, 4))
    none = Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 4))
    with pytest.raises(ValueError, match="each of 2 images, got 1"):
        segmentation_loss(out, [none])
    wrong = Targets(torch.tensor([3]), torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="image 1 has class 3, the head has 3 classes"):
        segmentation_loss(out, [none, wrong])
    for masks, message in (
        (torch.ones(2, 4, 4), "image 0 has 1 classes for 2 masks"),
        (torch.ones(1, 21, 16), r"image 0 has masks of \(21, 16\) cells of 1 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            segmentation_loss(out, [Targets(torch.tensor([1]), masks), none])
    with pytest.raises(ValueError, match="image 0 has class -1"):
        segmentation_loss(out, [Targets(torch.tensor([-1]), torch.ones(1, 16, 16)), none])


@pytest.mark.parametrize("side", [16, 17, 18, 41])
@pytest.mark.parametrize("stride", [1, 2])
def test_targets_lie_where_post_processing_shows_them(side, stride):
    """The best mask for the loss, resized and cropped, is the object: a half of an image whose
    sides the cells do not divide."""
    cells = math.ceil(side / 4)
    image = torch.zeros(1, side, side)
    image[0, :, side // 2 :] = 1
    padded = torch.nn.functional.pad(image, (0, -side % stride, 0, -side % stride))
    masks = torch.nn.functional.avg_pool2d(padded, stride)
    x = torch.arange(cells) * 4 + 2.0  # centers of cells, in pixels
    losses = {}
    for shift in (-2.0, 0.0, 2.0):
        logits = (x - side // 2 + shift).clamp(-8, 8).expand(1, 1, cells, cells)
        classes = torch.tensor([[[9.0, -9.0]]])
        torch.manual_seed(0)
        out = predictions_of(classes, logits)
        terms = segmentation_loss(out, [Targets(torch.tensor([0]), masks, stride)], points=3000)
        losses[shift] = (terms["mask"] + terms["dice"]).item()
    assert min(losses, key=losses.get) == 0.0


# The whole loss, literally -------------------------------------------------------------------


def literal_sample(image, x, y):
    """Bilinear value of a picture (rows of numbers) at x, y in [0, 1], zero outside."""
    height, width = len(image), len(image[0])
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column), math.floor(row)
    value = 0.0
    for r, c in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= r < height and 0 <= c < width:
            value += (1 - abs(row - r)) * (1 - abs(column - c)) * image[r][c]
    return value


def literal_loss(layers, targets, weights, stride, points, oversample, importance):
    """The sum over layers in float64, drawing the numbers that the library draws. `layers` are
    class logits (B, Q, K + 1) and mask logits (B, Q, h, w)."""
    objects = max(1, sum(len(target.classes) for target in targets))
    sums = {"classes": 0.0, "mask": 0.0, "dice": 0.0}
    generators = WHOLE.generators(len(targets), torch.device("cpu"))
    for class_logits, maps in layers:
        logs = class_logits.double().log_softmax(2)
        queries, nothing = class_logits.shape[1], class_logits.shape[2] - 1
        wanted = torch.full(class_logits.shape[:2], nothing)
        for image, target in enumerate(targets):
            grid, count = maps[image].double().tolist(), len(target.classes)
            if count == 0:
                continue
            # From the grid of cells, which reaches beyond the picture, to the masks' own rows.
            height, width = (side * target.stride for side in target.masks.shape[1:])
            across = maps.shape[3] * stride / width
            down = maps.shape[2] * stride / height
            masks = target.masks.double().tolist()

            def terms(q, k, at, grid=grid, masks=masks, across=across, down=down):
                logits = torch.tensor([literal_sample(grid[q], x, y) for x, y in at])
                labels = [literal_sample(masks[k], x * across, y * down) for x, y in at]
                return literal_terms(logits, torch.tensor(labels))

            random = partial(torch.rand, generator=generators[image])
            at = random(points, 2).tolist()
            cost = [
                [
                    weights.mask * entropy + weights.dice * dice
                    - weights.classes * math.exp(logs[image, q, target.classes[k]])
                    for k in range(count)
                    for entropy, dice in [terms(q, k, at)]
                ]
                for q in range(queries)
            ]  # fmt: skip
            best = min(
                itertools.permutations(range(queries), count),
                key=lambda chosen, cost=cost: sum(cost[q][k] for k, q in enumerate(chosen)),
            )
            pairs = sorted((q, k) for k, q in enumerate(best))
            many = random(count, int(points * oversample), 2)
            kept = int(importance * points)
            rest = random(count, points - kept, 2)
            for n, (q, k) in enumerate(pairs):
                wanted[image, q] = target.classes[k]
                some = sorted(
                    many[n].tolist(), key=lambda p, q=q, grid=grid: abs(literal_sample(grid[q], *p))
                )[:kept]
                entropy, dice = terms(q, k, some + rest[n].tolist())
                sums["mask"] += weights.mask * entropy / objects
                sums["dice"] += weights.dice * dice / objects
        share = torch.where(wanted == nothing, weights.no_object, 1.0).double()
        picked = logs.gather(2, wanted[..., None])[..., 0]
        sums["classes"] += float(weights.classes * -(share * picked).sum() / share.sum())
    return sums


@pytest.mark.parametrize("stride", [4, 2])
@pytest.mark.parametrize(
    "weights", [LossWeights(), LossWeights(1.5, 3.0, 4.0, 0.3, 0.2)], ids=["default", "other"]
)
def test_the_whole_loss_is_the_literal_one(stride, weights):
    """Several layers, pictures that are neither square nor a whole number of cells, several objects
    and none, masks in pixels and in shares of cells."""
    g = torch.Generator().manual_seed(4)
    height, width = 11 * stride // 4, 23 * stride // 4
    cells = (math.ceil(height / stride), math.ceil(width / stride))
    layers = [
        (torch.randn(3, 4, 4, generator=g), 3 * torch.randn(3, 4, *cells, generator=g))
        for _ in range(3)
    ]
    shares = torch.rand(1, math.ceil(height / 2), math.ceil(width / 2), generator=g)
    targets = [
        Targets(torch.tensor([2, 0, 2]), torch.rand(3, height, width, generator=g) > 0.6),
        Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, height, width)),
        Targets(torch.tensor([1]), shares, 2),
    ]
    made = [replace(predictions_of(*layer), stride=stride, temperatures=()) for layer in layers]
    last = replace(
        made[-1],
        auxiliary=tuple(made[:-1]),
        temperatures=(torch.tensor(0.5), torch.tensor(-0.25), torch.tensor(0.125)),
    )
    torch.manual_seed(5)
    losses = segmentation_loss(
        last, targets, weights=weights, points=20, oversample=2.0, importance=0.6
    )
    torch.manual_seed(5)
    expected = literal_loss(layers, targets, weights, stride, 20, 2.0, 0.6)
    assert losses.pop("temperature").item() == pytest.approx(weights.temperature * 0.875)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-4), name


def test_the_published_settings():
    """Mask2Former's weights and points; a temperature's weight is HCFormer's."""
    assert LossWeights() == LossWeights(2.0, 5.0, 5.0, 0.1, 0.1)
    parameters = inspect.signature(segmentation_loss).parameters
    defaults = [parameters[name].default for name in ("points", "oversample", "importance")]
    assert defaults == [12544, 3.0, 0.75]
    parameters = inspect.signature(uncertain_points).parameters
    assert [parameters[name].default for name in ("oversample", "importance")] == [3.0, 0.75]


def test_targets_are_sampled_where_the_logits_are():
    """A picture of 5 x 11 pixels under 2 x 3 cells of 4 pixels: x goes by the width."""
    target = Targets(torch.tensor([0]), torch.rand(1, 5, 11))
    points = torch.rand(7, 2)
    expected = [
        literal_sample(target.masks[0].tolist(), x * 12 / 11, y * 8 / 5) for x, y in points.tolist()
    ]
    found = sample_targets(target, points, (2, 3))
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_a_diverged_query_is_matched_last():
    class_logits = torch.zeros(3, 3)
    maps = torch.zeros(3, 4, 6)
    maps[0] = torch.nan
    targets = Targets(torch.tensor([0, 1]), torch.rand(2, 16, 24) > 0.5)
    queries, objects = match(class_logits, maps, targets, WEIGHTS, 10)
    assert sorted(queries.tolist()) == [1, 2]
    assert sorted(objects.tolist()) == [0, 1]


# Middles of objects --------------------------------------------------------------------------


def test_middles_of_objects():
    """A disk's is at its center and fades as a Gaussian of half its radius; a ring's is on it; an
    object that lies between the tokens has one all the same."""
    y, x = torch.meshgrid(torch.arange(80) + 0.5, torch.arange(120) + 0.5, indexing="ij")

    def from_(center_x, center_y):
        return ((x - center_x) ** 2 + (y - center_y) ** 2).sqrt()

    disk, ring = from_(30, 30) < 20, (from_(84, 40) - 24).abs() < 6
    speck = from_(8, 72) < 2
    positions = TokenSet.from_grid(torch.zeros(1, 1, 20, 30)).positions

    def targets(*masks):
        objects = Targets(torch.zeros(len(masks), dtype=torch.int64), torch.stack(masks))
        return middle_targets(objects, positions, (20, 30), 4).view(20, 30)

    heat = targets(disk)
    assert heat[7, 7] == 1
    assert heat[7, 5].item() == pytest.approx(math.exp(-(2**2) / (2 * 2.5**2)), rel=0.01)
    assert heat[7, 14:].max() < 1e-3
    row, column = divmod(int(targets(ring).argmax()), 30)
    assert 18 < from_(84, 40)[4 * row + 2, 4 * column + 2] < 30
    assert targets(speck).max() == 1
    torch.testing.assert_close(targets(disk, ring), torch.maximum(targets(disk), targets(ring)))
    shares = torch.nn.functional.avg_pool2d(disk[None].float(), 2)  # in cells of two pixels
    coarse = Targets(torch.zeros(1, dtype=torch.int64), shares, 2)
    found = middle_targets(coarse, positions, (20, 30), 4).view(20, 30)
    torch.testing.assert_close(found, heat, atol=0.02, rtol=0)


def test_the_loss_of_middles_is_the_literal_one():
    g = torch.Generator().manual_seed(6)
    maps = torch.randn(2, 3, 4, 5, generator=g)
    grid = TokenSet.from_grid(maps)
    rows = torch.tensor([0, 3, 7, 19, 20, 31])
    tokens = grid.select(rows, (4, 2)).with_features(torch.randn(6, 1, generator=g))
    out = replace(predictions_of(torch.randn(2, 3, 4), maps), middles=tokens)
    targets = [
        Targets(torch.tensor([1, 0]), torch.rand(2, 16, 20, generator=g) > 0.6),
        Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 16, 20)),
    ]
    wanted = [middle_targets(targets[0], tokens.positions[:4], (4, 5), 4), torch.zeros(2)]
    assert wanted[0].max() == 1
    expected = 0.0
    for logit, target in zip(
        tokens.features[:, 0].tolist(), torch.cat(wanted).tolist(), strict=True
    ):
        p = 1 / (1 + math.exp(-logit))
        entropy = -target * math.log(p) - (1 - target) * math.log(1 - p)
        expected += (p - target) ** 2 * entropy
    assert middle_loss(out, targets).item() == pytest.approx(expected, rel=1e-5)
    terms = segmentation_loss(out, targets, points=10)
    assert terms["middles"].item() == pytest.approx(2 * expected / 2, rel=1e-5)  # of two objects


def test_nothing_that_counts_costs_nothing():
    class_logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3))
    out = predictions_of(class_logits, torch.randn(1, 3, 4, 4))
    none = [Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 4))]
    losses = segmentation_loss(out, none, points=10, weights=LossWeights(no_object=0.0))
    assert all(float(value) == 0 for value in losses.values())
    one = [Targets(torch.tensor([1], dtype=torch.int32), torch.ones(1, 4, 4), 4)]
    assert all(float(value) > 0 for value in segmentation_loss(out, one, points=10).values())


def test_masks_stay_in_the_graph_where_there_is_no_object():
    maps = torch.randn(1, 3, 4, 4, requires_grad=True)
    none = [Targets(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 4))]
    sum(segmentation_loss(predictions_of(torch.randn(1, 3, 4), maps), none).values()).backward()
    assert maps.grad is not None
    assert maps.grad.abs().sum() == 0


def test_matching_costs_are_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    logits, maps = torch.randn(3, 4, generator=generator), torch.randn(3, 50, generator=generator)
    labels, classes = torch.rand(2, 50, generator=generator), torch.tensor([0, 2])
    expected = matching_cost(logits, maps, classes, labels, WEIGHTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matching_cost(logits, maps, classes, labels, WEIGHTS), expected)
