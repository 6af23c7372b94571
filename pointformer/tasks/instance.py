"""Instance segmentation: the objects in a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pointformer.annotations import VOID, Category, Objects, SegmentMap
from pointformer.data import CITYSCAPES_THINGS
from pointformer.metrics import CityscapesAP, CocoAP, InstanceAP, Metric
from pointformer.models import Output
from pointformer.models.mask2former import MaskPredictions
from pointformer.models.postprocess import instances
from pointformer.nn.parallel import WHOLE, BatchPart
from pointformer.segmentation.tiling import Tile, stitch_maps, stitch_objects
from pointformer.tasks.borders import dense_loss, instance_target, instances_from_logits
from pointformer.tasks.masks import MaskTask
from pointformer.tasks.stars import any_in_cells, star_loss, star_targets, stars_to_objects
from pointformer.tasks.task import MapTask, Size, Truth, on_device


class Instance(MapTask):
    """Objects of countable classes."""

    name, counts = "instance", "objects"

    def truth(self, annotation: Any) -> Any:
        """Without what is no object: segments of uncountable classes, but for crowds."""
        things = self.things
        kept = tuple(s for s in annotation.segments if s.crowd or s.category in things)
        return replace(annotation, segments=kept)

    def metrics(self, min_scores: Sequence[float] = ()) -> list[Metric]:
        """AP of what is shown, regardless of class; that of COCO and, for its classes, that of
        Cityscapes, where their packages are installed.

        Args:
            min_scores: to choose from, see `InstanceAP`; none: the task's own.
        """
        metrics: list[Metric] = [InstanceAP(min_scores=min_scores or (self.min_score,))]
        if importlib.util.find_spec("pycocotools"):
            metrics.append(CocoAP(self.categories))
        if self.categories == CITYSCAPES_THINGS and importlib.util.find_spec("cityscapesscripts"):
            metrics.append(CityscapesAP(self.categories))
        return metrics

    def shown(self, prediction: Any, min_score: float | None = None) -> SegmentMap:
        least = self.min_score if min_score is None else min_score
        found: SegmentMap = prediction.confident(least).segment_map()
        return found


class InstanceBorders(Instance):
    """Of a head of three classes: background, inside, and border between objects of one kind.

    Predictions are `SegmentMap`s; the objects have no scores. Crowds do not count in the loss.

    Args:
        inside_weight, border_weight: of the classes in the cross-entropy; background has 1.
    """

    output = Output.BORDERS

    def __init__(
        self,
        categories: Sequence[Category],
        inside_weight: float = 1.0,
        border_weight: float = 3.0,
    ) -> None:
        super().__init__(categories)
        self.class_weights = torch.tensor([1.0, inside_weight, border_weight])

    def loss(
        self,
        output: Tensor | Sequence[Tensor],
        annotations: Sequence[Truth],
        part: BatchPart = WHOLE,
    ) -> dict[str, Tensor]:
        targets = []
        for annotation in annotations:
            ids, crowds = self.truth(annotation).instances()
            classes = np.where(crowds, VOID, instance_target(ids).astype(np.int64))
            targets.append(on_device(classes, output[0]))
        weights = self.class_weights.to(output[0].device)
        if isinstance(output, Tensor):
            return dense_loss(output, torch.stack(targets), weights, part)
        pixels = torch.cat([logits.flatten(1) for logits in output], 1)  # of all sizes, in a row
        target = torch.cat([target.flatten() for target in targets])
        return dense_loss(pixels[None, :, None], target[None, None], weights, part)

    def decode(
        self,
        output: Tensor | Sequence[Tensor],
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[SegmentMap]:
        wanted = sizes if output_sizes is None else output_sizes
        found = []
        for logits, size in zip(output, wanted, strict=True):
            if tuple(logits.shape[1:]) != tuple(size):
                logits = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
            ids = instances_from_logits(logits.float().cpu().numpy())
            count = int(ids.max(initial=0))
            found.append(SegmentMap.of(ids, [0] * count, [1.0] * count))
        return found

    def join(self, shape: Size, windows: Sequence[Tile], parts: Iterable[SegmentMap]) -> SegmentMap:
        return stitch_maps(shape, list(zip(windows, parts, strict=True)))

    def shown(self, prediction: SegmentMap, min_score: float | None = None) -> SegmentMap:
        return prediction


class InstanceStars(Instance):
    """Of a head that gives cells scores and the lengths of rays. Predictions are `Objects` with all
    scores from 0.2 on.

    Crowds do not count in the loss.
    """

    output = Output.STARS

    def loss(
        self,
        output: Tensor | Sequence[Tensor],
        annotations: Sequence[Truth],
        part: BatchPart = WHOLE,
    ) -> dict[str, Tensor]:
        kinds = len(self.categories)
        targets, classes, known = [], [], []
        for maps, annotation in zip(output, annotations, strict=True):
            truth = self.truth(annotation)
            ids, crowds = truth.instances()
            target = star_targets(ids, len(maps) - kinds)
            targets.append(target)
            table = [0, *(0 if s.crowd else s.category for s in truth.segments)]
            classes.append(np.array(table)[target.ids])
            known.append(~any_in_cells(crowds))
        return star_loss(list(output), targets, classes, known, kinds, part)

    def decode(
        self,
        output: Tensor | Sequence[Tensor],
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[Objects]:
        found = []
        wanted = sizes if output_sizes is None else output_sizes
        for maps, seen, size in zip(output, sizes, wanted, strict=True):
            values = maps.float()
            scores = values[: len(self.categories)].sigmoid().cpu().numpy()
            lengths = values[len(self.categories) :].exp().cpu().numpy()
            stuff = [n for n in range(len(scores)) if n not in self.things]
            scores[stuff] = 0
            scale = size[0] / seen[0], size[1] / seen[1]
            found.append(stars_to_objects(scores, lengths, size, scale))
        return found

    def join(self, shape: Size, windows: Sequence[Tile], parts: Iterable[Objects]) -> Objects:
        return stitch_objects(shape, list(zip(windows, parts, strict=True)))


class InstanceMasks(MaskTask, Instance):
    """Of a head that gives queries classes and masks. Predictions are `Objects` with all scores."""

    def decode(
        self,
        output: MaskPredictions,
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[Objects]:
        return instances(output, sizes, output_sizes, top=None, things=self.things)

    def join(self, shape: Size, windows: Sequence[Tile], parts: Iterable[Objects]) -> Objects:
        return stitch_objects(shape, list(zip(windows, parts, strict=True)))
