"""Top-1 and top-5 accuracy against a literal sort."""

import numpy as np
import pytest

from pointformer.annotations import VOID
from pointformer.data import Annotation
from pointformer.metrics import Accuracy


def labeled(label):
    return Annotation("a", None, (4, 4), "a", label=label)


def test_against_a_sort_in_which_the_first_of_equals_comes_first():
    g = np.random.default_rng(0)
    metric, ranks = Accuracy(), []
    for _ in range(200):
        scores, label = g.integers(0, 6, 12) / 4, int(g.integers(12))
        metric.update(scores, labeled(label))
        order = sorted(range(12), key=lambda k: (-scores[k], k))
        ranks.append(order.index(label))
    found = metric.scores()
    assert (found.top1, found.top5) == (np.mean(np.array(ranks) < 1), np.mean(np.array(ranks) < 5))
    assert found.pictures == 200
    assert metric.compute() == {"top-1 accuracy": found.top1, "top-5 accuracy": found.top5}


def test_parts_add_up_and_pictures_without_a_class_are_left_out():
    first, second = Accuracy(), Accuracy()
    first.update(np.array([0.1, 0.9]), labeled(1))
    first.update(np.array([0.1, 0.9]), labeled(VOID))
    second.update(np.array([0.1, 0.9]), labeled(0))
    again = Accuracy()
    again.load(first.state())
    again.merge(second)
    assert (again.scores().top1, again.scores().top5, again.scores().pictures) == (0.5, 1.0, 2)
    assert np.isnan(Accuracy().scores().top1)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.1, np.nan, 0.2], "predicted: the scores of a have NaN"),
        ([0.1, 0.2], "a has class 2, the prediction 2 classes"),
    ],
)
def test_scores_that_are_none(scores, message):
    with pytest.raises(ValueError, match=message):
        Accuracy().update(np.array(scores), labeled(2))
