"""Models of point sets: what they depend on and what not, and their files."""

import pytest
import torch

from helpers.clouds import write_scenes
from pointformer import TokenSet, interpolate
from pointformer.data import open_dataset
from pointformer.evaluation import evaluate
from pointformer.models import (
    PointConfig,
    PointPreprocess,
    complexity_of,
    create_model,
    list_models,
    load_model,
    save_model,
)

TINY = {
    "dims": (16, 16, 24),
    "depths": 1,
    "heads": (2, 2, 3),
    "neighborhood_size": 16,
    "embed_neighbors": 6,
    "rate": 0.25,
}


def tiny(head="point_classification", classes=3, **options):
    torch.manual_seed(0)
    return create_model("point_nano", num_classes=classes, head=head, **TINY, **options).eval()


def cloud(sizes=(90, 40), channels=0, seed=0, dimensions=3):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(sum(sizes), dimensions, generator=generator)
    return TokenSet(positions, torch.rand(sum(sizes), channels, generator=generator), sizes)


def run(model, points):
    with torch.no_grad():
        return model(model.preprocess(points))


@pytest.mark.parametrize("name", list_models("point_*"))
@pytest.mark.parametrize("head", ["point_classification", "point_segmentation"])
def test_forward_is_finite(name, head):
    model = create_model(name, num_classes=7, head=head).eval()
    out = run(model, cloud((300, 70)))
    assert out.shape == ((2, 7) if head == "point_classification" else (370, 7))
    assert out.isfinite().all()


@pytest.mark.parametrize("head", ["point_classification", "point_segmentation"])
@pytest.mark.parametrize("unit", [None, 0.05])
def test_samples_do_not_see_each_other(head, unit):
    model = tiny(head, unit=unit)
    points = cloud((90, 1, 40))
    together = run(model, points)
    alone = torch.cat([run(model, sample) for sample in points])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_order_of_rows_is_no_matter():
    points = cloud((80,))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    shuffled = TokenSet(points.positions[order], points.features[order])
    model = tiny()
    torch.testing.assert_close(run(model, shuffled), run(model, points), rtol=1e-4, atol=1e-5)
    model = tiny("point_segmentation")
    want = run(model, points)[order]
    torch.testing.assert_close(run(model, shuffled), want, rtol=1e-4, atol=1e-5)


def test_objects_of_any_size_and_place_are_alike():
    model, points = tiny(), cloud((64, 64))
    moved = TokenSet(points.positions * 40 + 7, points.features, points.sizes)
    torch.testing.assert_close(run(model, moved), run(model, points), rtol=1e-3, atol=1e-4)
    spread = model.preprocess(points).positions.view(2, 64, 3)
    torch.testing.assert_close(spread.mean(1), torch.zeros(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(spread.square().sum(2).mean(1).sqrt(), torch.full((2,), 8.0))


def test_scenes_keep_their_units():
    points = cloud((90,))
    seen = PointPreprocess(0.25)(points).positions
    torch.testing.assert_close(seen.diff(dim=0), points.positions.diff(dim=0) / 0.25)
    same = TokenSet(torch.ones(4, 3))
    assert torch.equal(PointPreprocess()(same).positions, torch.zeros(4, 3))


def test_scenes_begin_at_zero_whatever_lies_far_below():
    sizes = (2500, 0, 40, 1, 0)
    points = cloud(sizes)
    seen = PointPreprocess(2.0)(points)
    for sample, count in zip(seen, sizes, strict=True):
        if count:
            low = sample.positions.sort(0).values[min(-(-count // 1000), count // 10)]
            assert torch.equal(low, torch.zeros(3))
    assert len(PointPreprocess(2.0)(TokenSet(torch.zeros(0, 3)))) == 1
    noisy = points.positions.clone()
    noisy[[3, 70, 2510], 2] -= 50
    moved = PointPreprocess(2.0)(TokenSet(noisy - 100, sizes=sizes)).positions
    kept = (noisy == points.positions).all(1)
    torch.testing.assert_close(moved[kept], seen.positions[kept], rtol=0, atol=0.02)


@pytest.mark.parametrize("head", ["point_classification", "point_segmentation"])
def test_all_parameters_learn(head):
    model = tiny(head, in_channels=2).train()
    model(model.preprocess(cloud(channels=2))).square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize("coordinates", ["z", "xyz", ""])
def test_points_are_embedded_by_these_coordinates_and_their_neighbors(coordinates):
    points = cloud(channels=1)
    embed = tiny(in_channels=1, coordinates=coordinates).backbone.patch_embed
    columns = [points.positions[:, "xyz".index(axis), None] / 8 for axis in coordinates]
    with torch.no_grad():
        inputs = torch.cat([*columns, points.features], 1)
        x = torch.nn.functional.gelu(embed.norm1(embed.linear(inputs)))
        around = embed.conv(points.with_features(x)).features
        found = embed(points, None).features
        torch.testing.assert_close(found, embed.norm2(x + around))


def test_two_dimensions():
    model = tiny("point_segmentation", dimensions=2, coordinates="xy")
    assert run(model, cloud(dimensions=2)).shape == (130, 3)


def test_clustered_points_come_back_in_their_order():
    model, points = tiny("point_segmentation"), cloud((60,))
    clustered = model.preprocess(points).cluster(8)
    with torch.no_grad():
        assert torch.equal(model(clustered), run(model, points))


@pytest.mark.parametrize("head", ["point_classification", "point_segmentation"])
def test_a_file_makes_the_same_model(head, tmp_path):
    model = tiny(head, unit=0.1, in_channels=1)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert loaded.preprocess.unit == 0.1
    points = cloud(channels=1)
    assert torch.equal(run(loaded, points), run(model, points))
    other = load_model(tmp_path / "model.safetensors", num_classes=5)
    assert run(other, points).shape[1] == 5


def test_work_is_counted():
    few, many = (complexity_of(tiny(), points=n) for n in (64, 1024))
    assert 0 < few.attention < many.attention
    assert few.parameters == sum(p.numel() for p in tiny().parameters())
    with pytest.raises(ValueError, match="points: expected a positive integer, got None"):
        complexity_of(tiny(), 64, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: create_model("point_nano", head="dense"),
            "model of points, 'dense' is for images",
        ),
        (lambda: create_model("aff_nano", head="point_segmentation"), "is for points"),
        (lambda: PointConfig(8, 1, 1), "dims: expected the channels"),
        (lambda: tiny(coordinates=""), "coordinates: expected some where in_channels is 0"),
        (lambda: tiny(coordinates="yx"), "coordinates: expected one of"),
        (lambda: tiny()(cloud(channels=1)), "images: expected a TokenSet of 3-D positions and 0"),
        (lambda: tiny()(cloud((3, 0))), "expected points in every sample, sample 1 has none"),
        (lambda: tiny()(cloud(dimensions=2)), "images: expected a TokenSet of 3-D"),
        (lambda: tiny().image_config, "takes points"),
        (lambda: tiny().reconfigure(alpha=3), "alpha cannot change"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_images_are_refused():
    with pytest.raises(TypeError, match="images: this is a model of points; expected a TokenSet"):
        tiny()(torch.zeros(1, 3, 8, 8))


def test_a_lower_rate_keeps_fewer():
    model, points = tiny(), cloud((200,))
    counts = []
    for rate in (0.25, 0.5, (0.25, 0.5)):
        model.reconfigure(rate=rate)
        with torch.no_grad():
            _, stages = model(model.preprocess(points), with_stages=True)
        counts.append([stage.tokens.num_tokens for stage in stages])
    assert counts == [[200, 50, 13], [200, 100, 50], [200, 50, 25]]


def test_neighborhoods_are_the_nearest_number_of_clusters():
    """23 of clusters of 8 are 3 of these, as 24 are."""
    model, points, found = tiny("point_segmentation"), cloud((200,)), {}
    for size in (16, 23, 24):
        model.reconfigure(neighborhood_size=size)
        found[size] = run(model, points)
    assert torch.equal(found[23], found[24])
    assert not torch.allclose(found[16], found[24])


@pytest.mark.parametrize(
    ("count", "strays"), [(9, 0), (10, 1), (19, 1), (1000, 1), (1001, 2), (3000, 3)]
)
def test_one_of_ten_points_and_one_of_each_thousand_may_be_strays(count, strays):
    seen = PointPreprocess(2.0)(cloud((count,))).positions
    assert (seen < 0).sum(0).tolist() == [strays] * 3


def test_the_decoder_adds_what_three_near_tokens_say():
    """By their squared distances, from the coarsest stage to the finest."""
    model = tiny("point_segmentation")
    decoder = model.head.decoder
    decoder.blocks = torch.nn.ModuleList(torch.nn.ModuleList() for _ in decoder.blocks)
    with torch.no_grad():
        _, stages = model(model.preprocess(cloud()), with_stages=True)
        expected = stages[-1].tokens
        for stage, up in ((stages[1], decoder.up[1]), (stages[0], decoder.up[0])):
            fine = stage.tokens
            raised = interpolate(
                up(expected.features), expected.positions, fine.positions,
                sizes=expected.sizes, query_sizes=fine.sizes, k=3, power=2.0,
            )  # fmt: skip
            expected = fine.with_features(fine.features + raised)
        torch.testing.assert_close(decoder(stages, None).features, expected.features)


def test_work_on_three_points_by_hand():
    """Stages of 3, 1 and 1 tokens: each sees all and a blank one, and all are near."""
    counts = complexity_of(tiny(), points=3)
    pairs, tokens, dims, heads = (9, 1, 1), (3, 1, 1), (16, 16, 24), (2, 2, 3)
    assert counts.attention == sum(
        2 * (p + t) * dim + 7 * h * p
        for p, t, dim, h in zip(pairs, tokens, dims, heads, strict=True)
    )
    assert counts.merge == (3 + 1) * 4 * (16 + 7)
    assert counts.points == 9 * 4 * (16 + 7)


def test_large_objects_are_centered():
    """A million points, far from zero."""
    generator = torch.Generator().manual_seed(0)
    points = TokenSet(torch.rand(1_000_000, 3, generator=generator) + 100)
    seen = PointPreprocess()(points).positions.double()
    assert seen.mean(0).abs().max() < 1e-3
    assert seen.square().sum(1).mean().sqrt().item() == pytest.approx(8, rel=1e-4)


def test_work_of_points_takes_no_picture_size():
    with pytest.raises(ValueError, match="height, width: expected None, point_nano takes points"):
        complexity_of(tiny(), 64, 64, points=64)


@pytest.mark.parametrize("reading", [{"channel": 5}, {"plane": "z=9"}, {"project": "max"},
                                     {"intensities": "full"}, {"max_pixels": 5}])  # fmt: skip
def test_choices_for_pictures_are_not_for_points(tmp_path, reading):
    write_scenes(tmp_path, 1)
    dataset = open_dataset(tmp_path, task="point_segmentation", split="val")
    model = tiny("point_segmentation", classes=2)
    (name,) = reading
    with pytest.raises(ValueError, match=f"{name}: is for models of pictures; point_nano takes"):
        evaluate(model, dataset, **reading)
    unsaid = {"channel": None, "intensities": "percentiles", "max_pixels": 2**30}
    assert "mIoU" in evaluate(model, dataset, **unsaid).scores


def test_interpolation_to_points_is_work():
    """Of two stages of 16 channels: to 320 points, and to 80."""
    one, three = (
        complexity_of(tiny("point_segmentation", neighbors=k), points=320).points for k in (1, 3)
    )
    assert three - one == 2 * 16 * (320 + 80)


def test_fields_stay_with_their_points():
    tokens = TokenSet(torch.rand(9, 3), fields={"segment": torch.arange(9)})
    for unit in (None, 0.5):
        assert PointPreprocess(unit)(tokens).fields["segment"].tolist() == list(range(9))
