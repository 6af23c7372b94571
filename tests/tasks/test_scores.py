"""The loss of merges' scores: where outlines are, and what is learned from it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.training import dataset_of, recipe_of, trainer_of
from pointformer.annotations import VOID, Segment
from pointformer.data import Annotation
from pointformer.models import create_model
from pointformer.nn.parallel import BatchPart
from pointformer.tasks.scores import outlines, score_loss
from pointformer.train.loading import Batches

SIDE = 48


def of_classes(classes):
    return Annotation("a", None, classes.shape, "a", semantic=classes.astype(np.int32))


def scored(**options):
    torch.manual_seed(0)
    model = create_model(
        "aff_nano", head="features", dims=(16, 16, 16), depths=(1, 1, 1), heads=(2, 2, 2), **options
    )
    for stage in model.backbone.stages[:-1]:
        torch.nn.init.normal_(stage.merge.score.weight)
    return model


def test_outlines_lie_between_what_differs():
    """Classes in a map of classes, objects of one class elsewhere; not beside what is unknown."""
    classes = np.zeros((6, 7), np.int64)
    classes[:, 4:] = 2
    classes[5] = VOID
    expected = np.zeros((6, 7), bool)
    expected[:5, 3:5] = True
    assert np.array_equal(outlines(of_classes(classes)), expected)
    ids = np.zeros((6, 7), np.int32)
    ids[:, :2], ids[:, 2:4], ids[:, 6] = 1, 2, 3
    touching = Annotation.of_objects(ids)
    expected = np.zeros((6, 7), bool)
    expected[:, [1, 2, 3, 4, 5, 6]] = True
    assert np.array_equal(outlines(touching), expected)
    crowd = tuple(replace(s, crowd=s.id == 3) for s in touching.segments)
    expected[:, 5:] = False
    assert np.array_equal(outlines(replace(touching, segments=crowd)), expected)
    assert not outlines(of_classes(np.full((6, 7), VOID))).any()


def test_outlines_are_the_same_in_mirror_images_and_turns():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, (9, 12)).repeat(2, 0).repeat(2, 1)
    classes[rng.random(classes.shape) < 0.2] = VOID
    found = outlines(of_classes(classes))
    assert 0.1 < found[classes != VOID].mean() < 0.9
    assert not found[classes == VOID].any()
    for change in (np.flipud, np.fliplr, np.rot90):
        assert np.array_equal(outlines(of_classes(change(classes))), change(found))


@pytest.mark.parametrize("stride", [4, 2])
def test_it_is_the_mean_of_both_kinds_of_cells_in_the_whole_batch(stride):
    rng = np.random.default_rng(0)
    sizes = [(SIDE, SIDE), (30, 50)]
    annotations = [of_classes(rng.random(size) < 0.02) for size in sizes]
    model = scored(patch_stride=stride)
    stages = model.backbone([torch.randn(3, *size) for size in sizes])
    terms = []
    for stage in stages[:2]:
        pairs = []
        for sample, scores, annotation in zip(
            stage.tokens, stage.scores.split(stage.tokens.sizes), annotations, strict=True
        ):
            marks = outlines(annotation)
            for (x, y), score in zip(sample.positions.int().tolist(), scores, strict=True):
                top, left = stride * y, stride * x
                pairs.append((marks[top : top + stride, left : left + stride].any(), score))
        for kind in (True, False):
            losses = [
                F.binary_cross_entropy(score, torch.tensor(float(has)))
                for has, score in pairs
                if has == kind
            ]
            terms.append(torch.stack(losses).mean())
    loss = score_loss(stages, annotations, stride)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    for number in (0, 1):
        alone = score_loss([stages[number]], annotations, stride)
        torch.testing.assert_close(alone, torch.stack(terms[2 * number :][:2]).mean())
    loss.backward()
    for stage in model.backbone.stages[:2]:
        assert stage.merge.score.weight.grad.abs().max() > 0
    nothing = [of_classes(np.zeros(size)) for size in sizes]
    assert score_loss(stages, nothing, stride).isfinite()


def test_scores_that_are_all_1_still_learn():
    """As those of a merge that no head has read for long."""
    model = scored()
    for stage in model.backbone.stages[:2]:
        torch.nn.init.constant_(stage.merge.score.bias, 50.0)
    stages = model.backbone(torch.randn(1, 3, SIDE, SIDE))
    assert all((stage.scores == 1).all() for stage in stages[:2])
    score_loss(stages, [of_classes(np.eye(SIDE) > 0)], 4).backward()
    for stage in model.backbone.stages[:2]:
        assert stage.merge.score.bias.grad > 0


def test_processes_share_it(monkeypatch):
    """Counts and sums are of the whole batch: parts of few outlines count as many cells as they
    have."""
    seen = []

    def total(self, sums):
        seen.append(sums)
        return 2 * sums

    annotation = of_classes(np.eye(SIDE) > 0)
    stages = scored().backbone(torch.randn(1, 3, SIDE, SIDE))
    alone = score_loss(stages, [annotation], 4)
    monkeypatch.setattr(BatchPart, "total", total)
    torch.testing.assert_close(score_loss(stages, [annotation], 4, BatchPart(0, 2)), alone)
    assert len(seen) == 1


@pytest.mark.parametrize("ranking", ["gradient", "lattice"])
def test_scores_that_only_weight_learn_too(ranking):
    model = scored(ranking=ranking)
    stages = model.backbone(torch.randn(1, 3, SIDE, SIDE))
    score_loss(stages, [of_classes(np.eye(SIDE))], 4).backward()
    for stage in model.backbone.stages[:2]:
        assert stage.merge.score.weight.grad.abs().max() > 0


def test_it_needs_merges_that_score():
    model = create_model("swin_mini", head="features")
    stages = model.backbone(torch.randn(1, 3, SIDE, SIDE))
    with pytest.raises(ValueError, match="score_weight: expected a backbone whose merges score"):
        score_loss(stages, [of_classes(np.eye(SIDE))], 4)


@pytest.mark.parametrize("stride", [4, 2])
def test_it_has_its_weight_in_the_loss_of_a_step(stride, tmp_path):
    dataset = dataset_of(tmp_path, "instance", 2, 32)
    for weight in (1, 0.25):
        changes = [f"score_weight={weight}", f"options.patch_stride={stride}", "budget.steps=1"]
        trainer = trainer_of(dataset, recipe_of(tmp_path, *changes))
        batch = next(Batches(dataset, None, batch=2, seed=0).steps())
        model = trainer.model.train()
        _, stages = model(model.preprocess(batch.images), with_stages=True)
        expected = weight * score_loss(stages, batch.annotations, stride).item()
        trainer.step(batch)
        trainer.check()
        (row,) = trainer.recent
        assert row["scores"] == pytest.approx(expected, rel=1e-5)
        terms = row["cross_entropy"] + row["dice"] + row["scores"]
        assert row["loss"] == pytest.approx(terms, rel=1e-5)


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_training_teaches_the_scores_what_outlines_are(task, tmp_path):
    """They tell cells with outlines from others better than by chance, which they do not before."""
    dataset = dataset_of(tmp_path, task)
    changes = ["score_weight=1", "optimizer.learning_rate=3e-3", "augmentation.crop.size=48"]
    trainer = trainer_of(dataset, recipe_of(tmp_path, *changes, "budget.steps=30", task=task))
    before = trainer.model.state_dict()["backbone.stages.0.merge.score.weight"].clone()
    batches = Batches(dataset, trainer.recipe.augmentation.transform(), batch=2, seed=0)
    steps = batches.steps(0)
    for _ in range(30):
        trainer.step(next(steps))
    trainer.check()
    assert not torch.equal(
        before, trainer.model.state_dict()["backbone.stages.0.merge.score.weight"]
    )
    values = [row["scores"] for row in trainer.recent]
    assert np.mean(values[-5:]) < 0.95 * np.mean(values[:5])


def test_segments_of_panoptic_maps_have_outlines_too():
    ids = np.repeat([[1, 1, 2, 2]], 3, 0).astype(np.int32)
    annotation = Annotation(
        "a", None, (3, 4), "a", ids=ids, segments=(Segment(1, 0, 6), Segment(2, 1, 6))
    )
    assert np.array_equal(outlines(annotation), np.repeat([[0, 1, 1, 0]], 3, 0) > 0)
