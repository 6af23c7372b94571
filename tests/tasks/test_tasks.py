"""Tasks: which there are, what they learn, and that parts of a data set score as the whole."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pointformer import TokenSet, segment
from pointformer.annotations import VOID, Category, Mask, Objects, Segment, SegmentMap
from pointformer.data import Annotation, Dataset, open_picture
from pointformer.data.annotations import Entry
from pointformer.data.point_sets import PointAnnotation, PointDataset
from pointformer.data.transforms import CenterCrop, Resize
from pointformer.evaluation import evaluate
from pointformer.models import AFFConfig, Model, Output, PointConfig
from pointformer.models.inference import evaluating
from pointformer.models.mask2former import MaskPredictions
from pointformer.prediction import predict, predict_points, to_tensor, windows_for
from pointformer.scored_parts import PartsFolder
from pointformer.segmentation.tiling import Tile
from pointformer.tasks import TASKS, MapTask, task_of
from pointformer.tasks.borders import instances_from_logits
from pointformer.tasks.classification import Classification
from pointformer.tasks.instance import InstanceBorders, InstanceMasks, InstanceStars
from pointformer.tasks.masks import targets_of
from pointformer.tasks.panoptic import Panoptic
from pointformer.tasks.points import PointSegmentation
from pointformer.tasks.semantic import SemanticClasses

SMALL = AFFConfig(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)
QUERIES = {"queries": 4, "dim": 32, "hidden": 32, "decoder_layers": 1}
CATEGORIES = (Category(0, "tissue", False), Category(1, "cell"), Category(2, "nerve"))
MADE = [
    ("classification", "classification", 3),
    ("dense", "semantic", 3),
    ("dense", "instance", 3),
    ("hcformer", "semantic", 3),
    ("hcformer", "instance", 3),
    ("hcformer", "panoptic", 3),
    ("stars", "instance", 3),
    ("point_classification", "point_classification", 3),
    ("point_segmentation", "point_segmentation", 3),
]
MAPS = [kind for kind in MADE if "classification" not in kind[0] and "point" not in kind[0]]
SMALL_OF_POINTS = PointConfig(dims=(16, 16), depths=(1, 1), heads=(2, 2), neighborhood_size=(8, 8))


def made(head, task, classes=3):
    torch.manual_seed(0)
    options = QUERIES if head == "hcformer" else {}
    categories = CATEGORIES[1:2] if (head, task) == ("dense", "instance") else CATEGORIES
    config = SMALL_OF_POINTS if head.startswith("point") else SMALL
    return Model("small", config, head, classes, task=task, categories=categories, **options)


def annotated(size=(40, 52), seed=0):
    """Tissue with two cells, a crowd and void; the picture's label is 2."""
    ids = np.ones(size, np.int32)
    ids[4:14, 5:20], ids[20:33, 30:45], ids[-6:, :9], ids[:3] = 2, 3, 4, 0
    kinds = ((1, 0, False), (2, 1, False), (3, 1, False), (4, 1, True))
    segments = tuple(Segment(n, k, int((ids == n).sum()), crowd) for n, k, crowd in kinds)
    return Annotation(f"picture{seed}", None, size, seed, ids=ids, segments=segments, label=2)


def annotated_points(count=40, seed=0):
    """Points of three classes and void; the class of all is 2."""
    positions = np.random.default_rng(seed).normal(size=(count, 3))
    tokens = TokenSet.from_world(torch.from_numpy(positions), torch.zeros(count, 0))
    labels = np.where(np.arange(count) < 3, VOID, np.arange(count) % 3).astype(np.int32)
    return PointAnnotation(f"set{seed}", tokens, 2, labels)


def test_every_output_has_the_tasks_that_it_says():
    assert len({(task.output, task.name) for task in TASKS}) == len(TASKS)
    for output in Output:
        assert {task.name for task in TASKS if task.output is output} == set(output.tasks)


def batches_of_pictures():
    g = torch.Generator().manual_seed(0)
    batch = torch.randn(2, 3, 40, 52, generator=g)
    empty = replace(annotated(), ids=np.zeros((40, 52), np.int32), segments=(), label=VOID)
    yield batch, [annotated(), empty]
    images = [*batch, torch.randn(3, 36, 44, generator=g)]
    yield images, [annotated(), empty, annotated((36, 44))]
    yield batch, [empty, empty]


def batches_of_points():
    first, other = annotated_points(), annotated_points(25, 1)
    empty = replace(other, label=VOID, labels=np.full(25, VOID, np.int32))
    for annotations in ([first, empty], [first, empty, annotated_points(33, 2)], [empty, empty]):
        yield TokenSet.cat([annotation.tokens for annotation in annotations]), annotations


@pytest.mark.parametrize(("head", "task", "classes"), MADE)
def test_what_is_learned_reaches_the_weights(head, task, classes):
    """Of batches, of images of different sizes, and where nothing is annotated."""
    model = made(head, task, classes).train()
    own = task_of(model, task)
    assert (own.name, own.output) == (task, model.output)
    for inputs, annotations in batches_of_points() if model.of_points else batches_of_pictures():
        model.zero_grad()
        terms = own.loss(model(inputs), annotations)
        loss = torch.stack(list(terms.values())).sum()
        assert loss.isfinite()
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)
        empty = annotations[0].label == VOID
        if not empty or head in ("hcformer", "stars") or (head, task) == ("dense", "instance"):
            assert any(grad.abs().max() > 0 for grad in grads)


def test_void_and_crowds_teach_nothing():
    annotation = annotated()
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 40, 52, generator=g)
    semantic = task_of(made("dense", "semantic"))
    known = torch.from_numpy(annotation.classes() != VOID)
    assert 0 < known.sum() < known.numel()
    target = torch.from_numpy(annotation.classes()).long()
    expected = F.cross_entropy(logits[0].movedim(0, -1)[known], target[known])
    torch.testing.assert_close(semantic.loss(logits, [annotation])["cross_entropy"], expected)
    borders = task_of(made("dense", "instance"))
    annotation = replace(
        annotation, segments=tuple(replace(s, category=0) for s in annotation.segments[1:])
    )
    before = borders.loss(logits, [annotation])
    changed = logits.clone()
    changed[..., -6:, :9] += torch.randn(3, 6, 9, generator=g)
    for name, term in borders.loss(changed, [annotation]).items():
        torch.testing.assert_close(term, before[name])
    changed[..., :5] += 1 + torch.randn(3, 40, 5, generator=g)
    assert borders.loss(changed, [annotation])["cross_entropy"] != before["cross_entropy"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_unknown_is_not_in_the_mean(smoothing):
    """Of points, and of pictures."""
    points = [annotated_points(), annotated_points(25, 1)]
    pictures = [replace(annotated(), label=label) for label in (2, VOID, 0, VOID)]
    for task, truth, labels in (
        (PointSegmentation, points, np.concatenate([a.labels for a in points])),
        (Classification, pictures, np.array([2, VOID, 0, VOID])),
    ):
        known = labels != VOID
        logits = np.random.default_rng(0).normal(size=(len(labels), 3))
        logs = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[known]
        wanted = (1 - smoothing) * np.eye(3)[labels[known]] + smoothing / 3
        (term,) = task(CATEGORIES, smoothing).loss(torch.from_numpy(logits), truth).values()
        assert term.item() == pytest.approx(-(wanted * logs).sum(1).mean(), rel=1e-5)


def test_scores_of_classes_add_up_to_1_in_any_size():
    """Bilinear, from the middles of pixels."""
    logits = np.random.default_rng(0).normal(size=(3, 2, 2)).astype(np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(0)
    task, output = SemanticClasses(CATEGORIES), torch.from_numpy(logits)[None]
    (found,) = task.decode(output, [(2, 2)])
    np.testing.assert_allclose(found, shares, rtol=1e-5)
    (found,) = task.decode(output, [(2, 2)], [(4, 4)])
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(found, weights @ shares @ weights.T, rtol=1e-5)


def test_windows_count_by_their_areas():
    windows = [Tile(0, 0, 10, 10, (0, 0, 10, 10)), Tile(0, 10, 10, 40, (0, 10, 10, 40))]
    parts = [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    found = Classification(CATEGORIES[:2]).join((10, 40), windows, parts)
    assert found.tolist() == [0.25, 0.75]


def test_stuff_of_all_windows_is_one_segment():
    """Wherever it is; of objects each window has its own."""
    windows = [Tile(0, 0, 10, 10, (0, 0, 10, 10)), Tile(0, 10, 10, 20, (0, 10, 10, 20))]
    first, second = np.zeros((2, 10, 10), np.int32)
    first[:, :3], first[4:6, 5:7] = 1, 2
    second[:, 6:], second[4:6, 2:4] = 2, 1
    parts = [SegmentMap.of(first, [0, 1], [0.9, 0.8]), SegmentMap.of(second, [1, 0], [0.8, 0.9])]
    found = Panoptic(CATEGORIES).join((10, 20), windows, parts)
    assert [(s.category, s.area) for s in found.segments] == [(0, 70), (1, 4), (1, 4)]
    assert (found.ids == 1)[:, [*range(3), *range(16, 20)]].all()


def test_pixels_of_some_classes_count_more():
    annotation = annotated()
    logits = torch.randn(2, 3, 40, 52, generator=torch.Generator().manual_seed(0))
    model, weights = made("dense", "semantic"), [1, 5.0, 0]
    terms = task_of(model, class_weights=weights).loss(logits, [annotation, annotation])
    target = torch.from_numpy(annotation.classes()).long().expand(2, -1, -1)
    expected = F.cross_entropy(logits, target, torch.tensor(weights), ignore_index=VOID)
    torch.testing.assert_close(terms["cross_entropy"], expected)
    for wrong in ([1, 2], 3, [1, 2, -1.0], [1, 2, "x"]):
        with pytest.raises((ValueError, TypeError), match="class_weights: expected"):
            task_of(model, class_weights=wrong)


def test_objects_are_told_from_stuff():
    annotation = task_of(made("hcformer", "instance")).truth(annotated())
    assert [segment.id for segment in annotation.segments] == [2, 3, 4]
    assert len(annotation.objects()) == 2
    assert task_of(made("hcformer", "panoptic")).truth(annotated()).segments[0].id == 1


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng(0)
    entries = []
    for seed in range(5):
        annotation = replace(annotated(seed=seed), image=tmp_path / f"{seed}.png", label=seed % 3)
        pixels = rng.integers(0, 255, (*annotation.size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(annotation.image)
        read = lambda annotation=annotation: annotation  # noqa: E731
        entries.append(Entry(annotation.name, annotation.image, None, read))
    return Dataset(tmp_path, CATEGORIES, entries)


def sets_of_points(count=5):
    """More points than are seen at once, if sets are small and large in turn."""
    annotations = [
        replace(annotated_points(20 + 17 * seed, seed), label=seed % 3) for seed in range(count)
    ]
    entries = [Entry(a.name, None, None, lambda a=a: a) for a in annotations]
    return PointDataset("points", CATEGORIES, entries, 0)


def noted(seen):
    """A way to go through numbers that lists them."""
    return lambda numbers: (seen.append(number) or number for number in numbers)


@pytest.mark.parametrize(("head", "task", "classes"), MADE)
def test_parts_score_as_the_whole(dataset, tmp_path, monkeypatch, head, task, classes):
    model = made(head, task, classes)
    if head == "dense" and task == "instance":
        dataset = Dataset("cells", CATEGORIES[1:2], [
            replace(entry, read=lambda entry=entry: replace(
                entry.read(), segments=tuple(
                    replace(s, category=0) for s in entry.read().segments[1:])))
            for entry in dataset.entries
        ])  # fmt: skip
    if model.of_points:
        dataset = sets_of_points()
    whole = evaluate(model, dataset)
    assert whole.pictures == 5
    first = evaluate(model, dataset.subset((0, 1)), task)
    rest = evaluate(model, dataset.subset((2, 3, 4)), task)
    scores = {}
    for mine, other in zip(first.metrics, rest.metrics, strict=True):
        mine.merge(other)
        scores |= mine.compute()
    np.testing.assert_equal(scores, whole.scores)
    # And of a run that kept three of its pictures.
    monkeypatch.setattr("pointformer.evaluation._SETS_AT_ONCE", 1)
    monkeypatch.setattr(PartsFolder, "due", True)
    assert evaluate(model, dataset, resume=tmp_path / "kept").pictures == 5
    for number in (2, 4):
        (lost,) = (tmp_path / "kept").glob(f"part-{number:08d}-*.safetensors")
        lost.unlink()
    seen = []
    again = evaluate(model, dataset, resume=tmp_path / "kept", progress=noted(seen))
    assert seen == [2, 4]
    assert again.pictures == 5
    np.testing.assert_equal(again.scores, whole.scores)


@pytest.mark.parametrize("skipped", [(), (0,), (2, 3), (6,)])
def test_small_point_sets_are_seen_together(monkeypatch, skipped):
    """With the predictions of each alone; as many at once as there is room for."""
    monkeypatch.setattr("pointformer.evaluation._POINTS_AT_ONCE", 150)
    model, metric = made("point_classification", None), Seen()
    task = task_of(model)
    dataset = sets_of_points(7)
    for number in skipped:
        dataset.entries[number] = replace(dataset.entries[number], read=unreadable)
    dataset.skip_bad = True
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].sizes))
    assert evaluate(model, dataset, metrics=lambda: [metric]).pictures == 7 - len(skipped)
    left = [dataset[n] for n in range(7) if n not in skipped]
    assert [size for sizes in seen for size in sizes] == [a.tokens.num_tokens for a in left]
    assert max(map(len, seen)) > 1
    assert all(sum(sizes) <= 150 for sizes in seen)
    assert list(dataset.skipped) == [f"set{number}" for number in skipped]
    for annotation, (prediction, truth) in zip(left, metric.pairs, strict=True):
        assert truth is annotation
        np.testing.assert_allclose(
            prediction, predict_points(model, task, annotation.tokens), atol=1e-6
        )


def unreadable():
    raise ValueError("cannot be read")


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("point_segmentation", {"tile": 64}, "tile: is for models of pictures; small takes points"),
        ("point_segmentation", {"resize": Resize(8)}, "resize: is for models of pictures"),
        ("point_classification", {"crop": CenterCrop(8)}, "crop: is for models of pictures"),
        ("point_classification", {"region": 8}, "region: is for scenes of points"),
        ("point_segmentation", {"flip": True}, "only for the tasks classification, semantic"),
        ("dense", {"region": 8}, "region: is for scenes of points"),
    ],
)
def test_what_is_not_for_pictures_or_for_points(dataset, head, options, message):
    model = made(head, "semantic" if head == "dense" else None)
    with pytest.raises(ValueError, match=message):
        evaluate(model, sets_of_points() if model.of_points else dataset, **options)


def test_scenes_are_scored_in_regions():
    model, metric = made("point_segmentation", None), Seen()
    task, dataset = task_of(model), sets_of_points()
    evaluate(model, dataset, region=30, metrics=lambda: [metric])
    for annotation, (prediction, _) in zip(dataset, metric.pairs, strict=True):
        expected = predict_points(model, task, annotation.tokens, 30)
        np.testing.assert_array_equal(prediction, expected)


class Seen:
    """A metric that keeps what it is given."""

    def __init__(self):
        self.pairs = []

    def update(self, prediction, annotation):
        self.pairs.append((prediction, annotation))

    def merge(self, other):
        self.pairs += other.pairs

    def compute(self):
        return {}


@pytest.mark.parametrize(
    ("head", "task", "tile"),
    [("dense", "semantic", None), ("dense", "semantic", 40), ("dense", "instance", None),
     ("hcformer", "instance", None), ("hcformer", "panoptic", 40),
     ("stars", "instance", None), ("stars", "instance", 40),
     ("classification", "classification", None)],
)  # fmt: skip
def test_pictures_that_are_seen_in_another_size_are_scored_in_their_own(dataset, head, task, tile):
    model, metric, resize = made(head, task), Seen(), Resize(48, interpolation="bilinear")
    shapes = []
    model.backbone.register_forward_pre_hook(lambda _, images: shapes.append(images[0].shape[2:]))
    own = task_of(model)
    evaluate(model, dataset, own, resize=resize, tile=tile, metrics=lambda: [metric])
    seen_shapes = list(shapes)
    for number, (annotation, (prediction, truth)) in enumerate(
        zip(dataset, metric.pairs, strict=True)
    ):
        assert truth.size == annotation.size
        if task != "classification":
            assert own.shown(prediction).ids.shape == annotation.size
        if tile is not None:
            continue
        seen, _ = resize(annotation.read_image(), annotation, np.random.default_rng(0))
        assert seen_shapes[number] == seen.shape[:2]
        with evaluating(model):
            output = model(model.preprocess(to_tensor(seen))[None])
        (expected,) = own.decode(output, [seen.shape[:2]], [annotation.size])
        if task == "semantic":
            np.testing.assert_array_equal(prediction, expected.argmax(0).numpy())
        elif isinstance(own, MapTask):
            np.testing.assert_array_equal(own.shown(prediction).ids, own.shown(expected).ids)
        else:
            np.testing.assert_array_equal(prediction, expected)
    assert max(max(shape) for shape in seen_shapes) <= (64 if tile is None else tile + 1)
    assert len(seen_shapes) > len(dataset) or tile is None


def test_classes_of_the_middle_of_pictures(dataset):
    """As classifiers are published; what has places is scored on all of a picture."""
    model, metric = made("classification", None), Seen()
    resize, crop = Resize(48), CenterCrop(32)
    evaluate(model, dataset, resize=resize, crop=crop, metrics=lambda: [metric])
    for annotation, (prediction, truth) in zip(dataset, metric.pairs, strict=True):
        seen = annotation.read_image()
        for change in (resize, crop):
            seen, _ = change(seen, annotation, np.random.default_rng(7))
        assert seen.shape == (32, 32, 3)
        picture = open_picture(seen)
        found, _ = predict(model, task_of(model), picture, windows_for(model, picture))
        np.testing.assert_array_equal(prediction, found)
        assert truth.size == annotation.size
    with pytest.raises(ValueError, match="crop: for classes of pictures, not for 'semantic'"):
        evaluate(made("dense", "semantic"), dataset, crop=crop, metrics=lambda: [metric])


def test_a_classifier_is_scored_but_finds_no_regions(dataset):
    model = made("classification", None)
    assert model.task == "classification"
    with torch.no_grad():
        model.head.linear.weight.zero_()
        model.head.linear.bias.copy_(torch.tensor([0.0, 2.0, 1.0]))
    scores = evaluate(model, dataset, scales=(1.0, 0.5), flip=True).scores
    assert scores == {"top-1 accuracy": 2 / 5, "top-5 accuracy": 1.0}
    assert evaluate(model, dataset, tile=32).scores == scores
    with pytest.raises(ValueError, match="model: small is made for 'classification' and finds no"):
        segment(model, dataset[0].image)
    with pytest.raises(TypeError, match="model: expected one of create_model"):
        task_of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(("head", "task", "classes"), MAPS)
@pytest.mark.parametrize("tile", [None, 32])
def test_segment_shows_what_is_scored(dataset, head, task, classes, tile):
    """One way of looking at pictures, with the tokens of all windows and copies."""
    model = made(head, task, classes)
    own = task_of(model)
    assert isinstance(own, MapTask)
    picture = open_picture(dataset[0].image)
    windows = windows_for(model, picture, tile)
    found, tokens = predict(model, own, picture, windows, min_score=0.2)
    result = segment(model, dataset[0].image, tile=tile, min_score=0.2)
    np.testing.assert_array_equal(result.labels, own.shown(found, 0.2).ids)
    assert result.tokens == tokens
    assert tokens[0] == sum(-(-w.size[0] // 4) * -(-w.size[1] // 4) for w in windows)
    if own.averages:
        _, more = predict(model, own, picture, windows, flip=True)
        assert more == tuple(2 * n for n in tokens)


def test_copies_are_averaged(dataset):
    """Scores of the picture and of its mirror image, mirrored back."""
    model = made("hcformer", "semantic").eval()
    own = task_of(model)
    picture = open_picture(dataset[0].image)
    windows = windows_for(model, picture)
    image = model.preprocess(torch.from_numpy(picture.read()).movedim(2, 0))[None]
    with torch.no_grad():
        (plain,) = own.decode(model(image), [picture.shape])
        (mirrored,) = own.decode(model(image.flip(3)), [picture.shape])
    expected = ((plain + mirrored.flip(2)) / 2).argmax(0)
    found, _ = predict(model, own, picture, windows, flip=True)
    np.testing.assert_array_equal(found, expected)
    scaled, _ = predict(model, own, picture, windows_for(model, picture, 32), scales=(0.5, 1.0))
    assert scaled.shape == picture.shape
    assert set(np.unique(scaled)) <= {0, 1, 2}


def test_scaled_copies_are_averaged(dataset):
    """Smaller ones without aliases, larger ones as bilinear interpolation makes them."""
    model, seen = made("hcformer", "semantic").eval(), []
    own = task_of(model)
    picture = open_picture(dataset[0].image)
    image = model.preprocess(torch.from_numpy(picture.read()).movedim(2, 0))[None]
    scores = []
    for scale in (0.5, 1.5):
        size = tuple(round(side * scale) for side in picture.shape)
        seen.append(F.interpolate(image, size, mode="bilinear", antialias=scale < 1))
        with torch.no_grad():
            scores += own.decode(model(seen[-1]), [size], [picture.shape])
    expected = list(seen)
    model.backbone.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    found, _ = predict(model, own, picture, windows_for(model, picture), scales=(0.5, 1.5))
    for ours, copy in zip(seen[2:], expected, strict=True):
        assert torch.equal(ours, copy)
    np.testing.assert_array_equal(found, ((scores[0] + scores[1]) / 2).argmax(0))


@pytest.mark.parametrize(
    "scales", [(), (0.0,), (1.0, -1.0), (math.inf,), (math.nan,), ("1",), (True,), np.array([0.0])]
)
def test_scales_that_cannot_be(dataset, scales):
    model = made("dense", "semantic")
    picture = open_picture(dataset[0].image)
    with pytest.raises(ValueError, match="scales: expected positive numbers, got"):
        predict(model, task_of(model), picture, windows_for(model, picture), scales=scales)


@pytest.mark.parametrize("scales", [0.5, None, "1"])
def test_scales_are_a_list(dataset, scales):
    model = made("dense", "semantic")
    picture = open_picture(dataset[0].image)
    with pytest.raises(TypeError, match="scales: expected positive numbers, got"):
        predict(model, task_of(model), picture, windows_for(model, picture), scales=scales)
    windows = windows_for(model, picture)
    predict(model, task_of(model), picture, windows, scales=np.array([1.0, 0.5]))


def test_windows_are_as_large_as_the_model_sees_them(monkeypatch):
    """Tiles in its pixels, on the side that is magnified most, and memory of its pixels."""
    model = made("dense", "semantic")
    picture = open_picture(np.zeros((60, 100, 3), np.uint8))
    sides = {side for w in windows_for(model, picture, 50, 4, Resize((30, 200))) for side in w.size}
    assert sides == {25}
    sysconf = os.sysconf
    pages = 2**27 // sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sysconf", lambda n: pages if n == "SC_PHYS_PAGES" else sysconf(n))
    large = Resize((600, 1000))
    with pytest.raises(ValueError, match="600 x 1000 pixels at once need more than"):
        windows_for(model, picture, resize=large)
    assert len(windows_for(model, picture)) == 1
    assert len(windows_for(model, picture, 500, 10, large)) > 1
    assert len(windows_for(model, picture, resize=Resize((400, 1000)))) == 1


def test_objects_as_targets_of_queries():
    ids = np.zeros((5, 6), np.int32)
    ids[:2, :4] = 7
    ids[4, 5] = 3
    targets = targets_of(Annotation.of_objects(ids).objects(), 2)
    assert targets.classes.tolist() == [0, 0]
    np.testing.assert_array_equal(targets.masks[0], [[0, 0, 0], [0, 0, 0], [0, 0, 0.25]])
    np.testing.assert_array_equal(targets.masks[1], [[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    empty = Annotation.of_objects(np.zeros((5, 6), np.int32)).objects()
    assert targets_of(empty, 2).masks.shape == (0, 3, 3)


@pytest.mark.parametrize("options", [{"flip": True}, {"scales": (1.0, 0.5)}])
def test_point_sets_have_no_copies(options):
    with pytest.raises(ValueError, match=r"only for the tasks classification, semantic, not for"):
        evaluate(made("point_classification", None), sets_of_points(), **options)


def test_borders_are_read_in_the_pixels_of_the_picture():
    """Of logits between the middles of those that the model saw, as bilinear interpolation has
    them."""
    logits = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 6
    at = (np.arange(48) + 0.5) / 3 - 0.5

    def weights(count, side):
        place = at[:count].clip(0, side - 1)
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(side)))

    down, right = weights(36, 12), weights(48, 16)
    large = np.einsum("yi,kij,xj->kyx", down, logits[0].numpy(), right)
    task = InstanceBorders(CATEGORIES[1:2])
    (found,) = task.decode(logits, [(12, 16)], [(36, 48)])
    expected = instances_from_logits(large.astype(np.float32))
    assert expected.max() > 2
    np.testing.assert_array_equal(found.ids, expected)


def test_options_of_the_loss_of_masks_are_used(monkeypatch):
    seen = {}

    def loss(output, targets, **options):
        seen.update(options, targets=targets)
        return {}

    monkeypatch.setattr("pointformer.tasks.masks.segmentation_loss", loss)
    model = made("hcformer", "panoptic")
    task = task_of(model, points=77, stride=4, weights={"mask": 3.0})
    task.loss(model.train()(torch.randn(1, 3, 40, 52)), [annotated()])
    assert (seen["points"], seen["weights"].mask, seen["weights"].dice) == (77, 3.0, 5.0)
    (target,) = seen["targets"]
    assert (target.stride, target.masks.shape[1:]) == (4, (10, 13))


def test_probabilities_of_copies_are_averaged():
    copies = [(np.array([0.75, 0.25]), False), (np.array([0.25, 0.75]), True)]
    assert Classification(CATEGORIES[:2]).average(copies).tolist() == [0.5, 0.5]


def test_borders_are_learned_alike_in_a_batch_and_in_a_list():
    logits = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    ids = np.repeat([0, 1, 2, 2, 0], 4)[None].repeat(16, 0).astype(np.int32)
    pictures = [Annotation.of_objects(ids), Annotation.of_objects(ids[:, ::-1])]
    task = InstanceBorders(CATEGORIES[1:2], inside_weight=2.0)
    torch.testing.assert_close(task.loss(list(logits), pictures), task.loss(logits, pictures))


def test_queries_find_no_stuff():
    grid = TokenSet.from_grid(torch.ones(1, 3, 4, 4))
    output = MaskPredictions(9 * torch.eye(4)[None, :3], grid.features, grid)
    (found,) = InstanceMasks(CATEGORIES).decode(output, [(16, 16)])
    assert set(found.classes.tolist()) == {1, 2}


def test_points_go_back_to_their_sets():
    classes = torch.tensor([0, 1, 2, 2, 1])
    found = PointSegmentation(CATEGORIES).decode(torch.eye(3)[classes], [(2, 1), (3, 1)])
    assert [part.tolist() for part in found] == [[0, 1], [2, 2, 1]]


def test_objects_of_any_score_can_be_shown():
    masks = [Mask.of(np.ones((4, 4), bool))]
    found = Objects(masks, np.array([0]), np.array([0.3], np.float32), (4, 4))
    task = InstanceStars(CATEGORIES[1:2])
    assert [task.shown(found, least).ids.max() for least in (None, 0.0, 0.4)] == [0, 1, 0]


def test_objects_are_shown_and_scored_from_the_score_of_the_model_on():
    model = made("hcformer", "instance")
    model.min_score = 0.3
    task = task_of(model)
    assert task.min_score == 0.3
    assert task.metrics()[0].min_scores == (0.3,)
    assert task.metrics((0.2, 0.4))[0].min_scores == (0.2, 0.4)
