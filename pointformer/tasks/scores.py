"""A loss of the scores by which merges keep and weight tokens: they learn where outlines are.

Without it a merge's score learns only through what it weights in the merged tokens. Whether a token
should have been kept, the loss of a task does not say: no gradient goes through the choice. Here
each score is a classifier of its own, which learns from the annotation, as proposals are in
detectors that look closer at a few places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pointformer.models.backbone import StageOutput
from pointformer.nn.parallel import WHOLE, BatchPart
from pointformer.tasks.task import Truth


def outlines(annotation: Truth) -> np.ndarray:
    """(H, W) bool: pixels with another class, or another object, above, below or beside them."""
    labels, unknown = annotation.label_map()
    found = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        a = [slice(None), slice(None)]
        b = list(a)
        a[axis], b[axis] = slice(1, None), slice(None, -1)
        first, second = tuple(a), tuple(b)
        differs = (labels[first] != labels[second]) & ~unknown[first] & ~unknown[second]
        found[first] |= differs
        found[second] |= differs
    return found


def score_loss(
    stages: Sequence[StageOutput],
    annotations: Sequence[Truth],
    stride: int,
    part: BatchPart = WHOLE,
) -> Tensor:
    """Binary cross-entropy of all scores, as to whether an outline goes through a token's cell.

    Cells with and without one count as much as each other in the whole batch, however few there
    are of one kind; all stages that score count alike.

    Args:
        stages: of the backbone, for B images; those without learned scores do not count.
        annotations: B, of the images' sizes.
        stride: pixels per cell of the first stage's grid, in both directions.

    Raises:
        ValueError: no merge scores its tokens.
    """
    scored = [(s.tokens, s.logits) for s in stages if s.logits is not None]
    if not scored:
        raise ValueError("score_weight: expected a backbone whose merges score their tokens")
    cells = []
    for annotation in annotations:
        found = torch.from_numpy(outlines(annotation)).float()[None]
        cells.append(F.max_pool2d(found, stride, ceil_mode=True)[0])
    sums = []
    for tokens, logits in scored:
        places = [p.long().cpu() for p in tokens.positions.split(tokens.sizes)]
        wanted = torch.cat([cell[p[:, 1], p[:, 0]] for cell, p in zip(cells, places, strict=True)])
        wanted = wanted.to(logits.device)
        # Not of the scores: of one that is 1 to the last bit, the gradient would be 0.
        entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        sums += [(entropy * of).sum() for of in (wanted, 1 - wanted)]
        sums += [wanted.sum(), (1 - wanted).sum()]
    with_outline, without, many, others = part.total(torch.stack(sums)).view(-1, 4).unbind(1)
    return (with_outline / many.clamp(min=1) + without / others.clamp(min=1)).mean() / 2
