"""Tasks: which there are, what they learn, and that parts of a data set score as the whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pointformer import segment
from pointformer.annotations import VOID, Category, Segment
from pointformer.data import Annotation, Dataset, open_picture
from pointformer.data.annotations import Entry
from pointformer.data.transforms import CenterCrop, Resize
from pointformer.evaluation import evaluate
from pointformer.models import AFFConfig, Model, Output
from pointformer.models.inference import evaluating
from pointformer.prediction import predict, to_tensor, windows_for
from pointformer.scored_parts import PartsFolder
from pointformer.tasks import TASKS, MapTask, task_of
from pointformer.tasks.masks import targets_of

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
]


def made(head, task, classes=3):
    torch.manual_seed(0)
    options = QUERIES if head == "hcformer" else {}
    categories = CATEGORIES[1:2] if (head, task) == ("dense", "instance") else CATEGORIES
    return Model("small", SMALL, head, classes, task=task, categories=categories, **options)


def annotated(size=(40, 52), seed=0):
    """Tissue with two cells, a crowd and void; the picture's label is 2."""
    ids = np.ones(size, np.int32)
    ids[4:14, 5:20], ids[20:33, 30:45], ids[-6:, :9], ids[:3] = 2, 3, 4, 0
    kinds = ((1, 0, False), (2, 1, False), (3, 1, False), (4, 1, True))
    segments = tuple(Segment(n, k, int((ids == n).sum()), crowd) for n, k, crowd in kinds)
    return Annotation(f"picture{seed}", None, size, seed, ids=ids, segments=segments, label=2)


def test_every_output_has_the_tasks_that_it_says():
    assert len({(task.output, task.name) for task in TASKS}) == len(TASKS)
    for output in Output:
        assert {task.name for task in TASKS if task.output is output} == set(output.tasks)


@pytest.mark.parametrize(("head", "task", "classes"), MADE)
def test_what_is_learned_reaches_the_weights(head, task, classes):
    """Of batches, of images of different sizes, and where nothing is annotated."""
    model = made(head, task, classes).train()
    own = task_of(model, task)
    assert (own.name, own.output) == (task, model.output)
    g = torch.Generator().manual_seed(0)
    batch = torch.randn(2, 3, 40, 52, generator=g)
    empty = replace(annotated(), ids=np.zeros((40, 52), np.int32), segments=(), label=VOID)
    for images, annotations in (
        (batch, [annotated(), empty]),
        ([*batch, torch.randn(3, 36, 44, generator=g)], [annotated(), empty, annotated((36, 44))]),
        (batch, [empty, empty]),
    ):
        model.zero_grad()
        terms = own.loss(model(images), annotations)
        loss = torch.stack(list(terms.values())).sum()
        assert loss.isfinite()
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)
        learns = annotations[0] is not empty or task in ("instance", "panoptic") or head != "dense"
        if learns and not (head == "classification" and annotations[0] is empty):
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


@pytest.mark.parametrize(("head", "task", "classes"), MADE[1:])
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
