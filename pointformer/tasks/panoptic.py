"""Panoptic segmentation: a segment for each object and each uncountable class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pointformer.annotations import SegmentMap
from pointformer.metrics import Metric, PanopticQuality
from pointformer.models.mask2former import MaskPredictions
from pointformer.models.postprocess import panoptic
from pointformer.segmentation.tiling import Tile, stitch_maps
from pointformer.tasks.masks import MaskTask
from pointformer.tasks.task import MapTask, Size


class Panoptic(MaskTask, MapTask):
    """Of a head that gives queries classes and masks. Predictions are `SegmentMap`s."""

    name, counts = "panoptic", "objects"

    def decode(
        self,
        output: MaskPredictions,
        sizes: Sequence[Size],
        output_sizes: Sequence[Size] | None = None,
        *,
        min_score: float | None = None,
    ) -> list[SegmentMap]:
        """`min_score`: that queries need to compete for pixels; `None`: 0.8, as published."""
        least = 0.8 if min_score is None else min_score
        return panoptic(output, sizes, output_sizes, things=self.things, min_score=least)

    def join(self, shape: Size, windows: Sequence[Tile], parts: Iterable[SegmentMap]) -> SegmentMap:
        stuff = sorted(set(range(len(self.categories))) - set(self.things))
        return stitch_maps(shape, list(zip(windows, parts, strict=True)), uncountable=stuff)

    def shown(self, prediction: SegmentMap, min_score: float | None = None) -> SegmentMap:
        return prediction

    def metrics(self) -> list[Metric]:
        return [PanopticQuality(self.categories)]
