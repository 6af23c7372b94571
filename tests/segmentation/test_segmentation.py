"""The main job: a picture in, objects out, with the weights that come with the package."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pointformer import TokenSet, segment
from pointformer.annotations import SegmentMap
from pointformer.data import Category, open_picture, read_image, read_instances
from pointformer.metrics import average_precision
from pointformer.models import create_model
from pointformer.models.mask2former import MaskPredictions
from pointformer.prediction import to_tensor
from pointformer.segmentation.drawing import (
    caption_font,
    focus_picture,
    heat,
    outline,
    overlay,
    panels,
    with_legend,
)
from pointformer.segmentation.segment import Segmentation

EXAMPLE = Path(__file__).parents[2] / "docs/nuclei.png"
TRUTH = Path(__file__).parents[1] / "cases/nuclei_instances.png"


@pytest.fixture(scope="module")
def nuclei_model():
    return create_model("aff_nano.nuclei").eval()


@pytest.fixture(scope="module")
def result(nuclei_model):
    return segment(nuclei_model, EXAMPLE)


def test_finds_the_nuclei_of_the_example(result):
    truth = read_instances(TRUTH)
    score = average_precision([(result.labels, truth)])
    assert score.at(0.5) > 0.6
    assert abs(result.num_objects - len(np.unique(truth)) + 1) < 0.25 * result.num_objects


def test_objects_describe_the_labels(result):
    objects = result.objects()
    assert [item.id for item in objects] == list(range(1, result.num_objects + 1))
    for item in objects[:5]:
        rows, columns = np.nonzero(result.labels == item.id)
        assert item.area == len(rows)
        assert item.centroid == pytest.approx((columns.mean(), rows.mean()))
        assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_tokens_follow_the_content(nuclei_model, result):
    """More of the kept tokens lie on nuclei than a uniform grid would put there."""
    truth = read_instances(TRUTH) > 0
    with torch.inference_mode():
        pixels = nuclei_model.preprocess(to_tensor(result.image))[None]
        stages = nuclei_model.backbone(pixels)
    x, y = (stages[1].tokens.positions.long() * 4 + 2).T.numpy()
    assert truth[y, x].mean() > 1.5 * truth.mean()
    assert result.tokens == tuple(stage.tokens.num_tokens for stage in stages)


def test_same_picture_in_every_form(nuclei_model, result):
    image = read_image(EXAMPLE)
    for form in (image, image[..., 0], to_tensor(image), str(EXAMPLE)):
        assert np.array_equal(segment(nuclei_model, form).labels, result.labels)


def test_rate_and_alpha_can_change_after_training(result):
    model = create_model("aff_nano.nuclei", rate=0.4, alpha=1.0).eval()
    assert model.config.rate == 0.4
    assert segment(model, EXAMPLE).tokens[1] == int(0.4 * result.tokens[0])


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((8, 8), complex), ValueError, "expected integers or real numbers"),
        (np.zeros((8, 8, 5), np.uint8), ValueError, r"expected the shape .*, got \(8, 8, 5\)"),
        (7, TypeError, "expected a file, an array, a tensor or a picture of Pillow, got int"),
        ("nowhere.png", ValueError, r"nowhere\.png: .*there is no such file"),
    ],
    ids=["complex", "channels", "number", "missing"],
)
def test_bad_pictures(nuclei_model, image, error, message):
    with pytest.raises(error, match=message):
        segment(nuclei_model, image)


def test_outline_leaves_the_rest_alone(result):
    picture = outline(result.image, result.labels)
    changed = (picture != result.image).any(-1)
    assert 0 < changed.sum() < (result.labels > 0).sum()
    assert not changed[result.labels == 0].any()


def test_focus_picture_has_a_panel_per_merge(nuclei_model, result):
    with torch.inference_mode():
        stages = nuclei_model.backbone(nuclei_model.preprocess(to_tensor(result.image))[None])
    sheet = np.asarray(focus_picture(result.image, stages, 4))
    assert sheet.shape[1] == 8 + 4 * 408
    assert heat(np.array([0.0, 0.5, 1.0])).sum(-1).tolist() == sorted(
        heat(np.array([0.0, 0.5, 1.0])).sum(-1).tolist()
    )


# Mask models -----------------------------------------------------------------------------------

CATEGORIES = (
    Category(1, "nucleus", True, (220, 60, 60)),
    Category(2, "tissue", False, (60, 160, 60)),
)


@pytest.fixture(scope="module", params=["semantic", "instance", "panoptic"])
def mask_model(request):
    torch.manual_seed(0)
    return create_model(
        "aff_nano", head="hcformer", num_classes=2, task=request.param, categories=CATEGORIES,
        queries=6, dim=32, hidden=32, decoder_layers=1,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("tile", [None, 96])
def test_mask_models_give_ids_with_classes(mask_model, tile):
    result = segment(mask_model, EXAMPLE, tile=tile, overlap=32, min_score=0.1)
    assert result.labels.shape == result.image.shape[:2]
    assert len(result.classes) == len(result.scores) == result.num_objects
    assert set(np.unique(result.labels)) <= set(range(result.num_objects + 1))
    if mask_model.task == "semantic":
        assert (result.labels > 0).all()
        assert len(set(result.classes)) == len(result.classes)
    for number in range(1, result.num_objects + 1):
        assert result.class_name(number) in ("nucleus", "tissue")
    picture = overlay(result)
    assert picture.width == result.image.shape[1]
    assert picture.height > result.image.shape[0] or result.num_objects == 0


def test_every_query_can_be_an_object_and_scores_are_the_published_ones(mask_model, monkeypatch):
    """150 queries, each sure of a pixel column of its own, with a probability of 0.6."""
    queries, width = 150, 600
    masks = torch.full((1, queries, 2, queries), -9.0)
    masks[0, range(queries), :, range(queries)] = 9.0
    grid = TokenSet.from_grid(masks)
    classes = torch.tensor([0.6, 0.0, 0.4]).clamp(min=1e-6).log().expand(1, queries, 3)
    predictions = MaskPredictions(classes, grid.features, grid)

    def forward(self, images, with_stages=False):
        return predictions, []

    monkeypatch.setattr(mask_model.__class__, "forward", forward)
    picture = np.zeros((8, width, 3), np.uint8)
    found = segment(mask_model, picture).num_objects
    assert found == {"semantic": 1, "instance": queries, "panoptic": 0}[mask_model.task]
    assert (
        mask_model.task != "panoptic"
        or segment(mask_model, picture, min_score=0.5).num_objects == 150
    )
    surer = segment(mask_model, picture, min_score=0.7).num_objects
    assert surer == (mask_model.task == "semantic")


def test_objects_that_are_lost_in_the_pictures_own_pixels_take_their_classes_along(monkeypatch):
    """Seen twice as large, of 2 x 2 pixels the last counts; others may have an object of their
    own."""
    seen = np.zeros((12, 16), np.int32)
    seen[2, 2], seen[4:8, 4:8], seen[10:, 12:], seen[6, 14] = 1, 2, 3, 4
    found = SegmentMap.of(seen, [1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6])
    monkeypatch.setattr("pointformer.segmentation.segment.predict", lambda *a, **k: (found, ()))
    torch.manual_seed(0)
    model = create_model("aff_nano", head="dense", num_classes=3, categories=[CATEGORIES[0]])
    result = segment(model.eval(), np.zeros((6, 8, 3), np.uint8), scale=2.0)
    expected = np.zeros((6, 8), np.int32)
    expected[2:4, 2:4], expected[5, 6:] = 1, 2
    np.testing.assert_array_equal(result.labels, expected)
    assert (result.classes, result.scores) == ((0, 1), (0.8, 0.7))


def test_a_dense_head_can_have_a_task():
    torch.manual_seed(0)
    model = create_model("aff_nano", head="dense", num_classes=5, task="semantic").eval()
    result = segment(model, EXAMPLE)
    assert (result.labels > 0).all()
    assert set(result.classes) <= set(range(5))


def test_tiles_of_a_dense_model_find_the_same_nuclei(nuclei_model, result):
    tiled = segment(nuclei_model, EXAMPLE, tile=160, overlap=48)
    score = average_precision([(tiled.labels, result.labels)])
    assert score.at(0.5) > 0.85


def test_tiles_may_lie_side_by_side(nuclei_model, result):
    """Without an overlap no pixel is seen twice."""
    assert segment(nuclei_model, EXAMPLE, tile=128, overlap=0).tokens[0] == result.tokens[0]
    assert segment(nuclei_model, EXAMPLE, tile=128, overlap=1).tokens[0] > result.tokens[0]


def test_seconds_are_those_of_the_call(mask_model):
    start = time.perf_counter()
    result = segment(mask_model, EXAMPLE)
    assert 0 < result.seconds <= time.perf_counter() - start


def test_a_mask_model_without_a_task_is_an_error():
    model = create_model("aff_nano", head="hcformer", num_classes=2, queries=2, decoder_layers=1)
    with pytest.raises(ValueError, match="has no task; possible: semantic, instance, panoptic"):
        segment(model.eval(), EXAMPLE)


def test_objects_of_a_map_with_gaps():
    """Ids that have no pixel are passed by."""
    labels = np.array([[0, 1, 1, 4]], np.int32)
    found = Segmentation(open_picture(np.zeros((1, 4, 3), np.uint8)), labels, (), 0.0)
    assert [(item.id, item.area, item.box) for item in found.objects()] == [
        (1, 2, (1, 0, 3, 1)), (4, 1, (3, 0, 4, 1)),
    ]  # fmt: skip


def test_objects_are_tinted_in_the_colors_of_their_classes():
    """Half picture, half color inside of an object; all else as it was, but the rims."""
    labels = np.zeros((20, 30), np.int32)
    labels[2:12, 2:12], labels[2:12, 16:26] = 1, 2
    image = np.full((20, 30, 3), 100, np.uint8)
    result = Segmentation(open_picture(image), labels, (), 0.0, (1, 0), (1.0, 1.0), CATEGORIES)
    shown = np.asarray(overlay(result))[:20, :30]  # without the legend
    assert shown[7, 7].tolist() == [80, 130, 80]  # of tissue, (60, 160, 60)
    assert shown[7, 20].tolist() == [160, 80, 80]  # of a nucleus, (220, 60, 60)
    assert (shown[labels == 0] == 100).all()


def test_rims_of_neighbors_differ():
    labels = np.arange(1, 9, dtype=np.int32).repeat(4)[None].repeat(4, 0)
    picture = outline(np.zeros((4, 32, 3), np.uint8), labels).astype(int)
    rims = picture[0, 3:28:4]  # the last column of each but the last
    assert (picture[:, 4:28:4] == rims[None, 1:]).all()  # each is of one color
    assert (np.abs(np.diff(rims, axis=0)).max(1) > 80).all()


def test_names_of_classes_take_as_many_lines_as_the_picture_is_narrow():
    wide, narrow = (
        with_legend(Image.new("RGB", (width, 50)), CATEGORIES).size for width in (600, 100)
    )
    assert (wide, narrow) == ((600, 50 + 36), (100, 50 + 56))


def test_the_scores_of_a_stage_are_drawn_in_its_cells(nuclei_model, result):
    """Under the first merge each cell has the color of its own token's score."""
    with torch.inference_mode():
        stages = nuclei_model.backbone(nuclei_model.preprocess(to_tensor(result.image))[None])
    sheet = np.asarray(focus_picture(result.image, stages, 4)).astype(int)
    height, width = result.image.shape[:2]
    pitch = 4 * 400 / max(height, width)
    panel = sheet[-(round(height * 400 / max(height, width)) + 8) : -8, 8 + 408 :]
    places = stages[0].tokens.positions.numpy()
    colors = heat(stages[0].scores.numpy()).astype(int)
    rows, columns = ((places[:, n] + 0.5) * pitch for n in (1, 0))
    inside = (rows < len(panel)) & (columns < 400)
    shown = panel[rows[inside].astype(int), columns[inside].astype(int)]
    assert np.mean(np.abs(shown - colors[inside]).max(1) <= 1) > 0.99


def test_captions_are_not_cut():
    """Beside pictures narrower than their captions, and of classes with long names."""
    text = "a caption that is longer than its picture is wide"
    length = caption_font().getlength(text)
    sheet = panels([[(Image.new("RGB", (20, 20)), text)] * 2], (20, 20))
    assert sheet.width >= 2 * length
    assert with_legend(Image.new("RGB", (20, 20)), [Category(0, text)]).width >= 20 + length
