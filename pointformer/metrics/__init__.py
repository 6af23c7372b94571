"""Scores of predictions against annotations."""

from pointformer.metrics.boundary import boundary_iou, mask_boundary
from pointformer.metrics.cityscapes import CityscapesAP, CityscapesScores
from pointformer.metrics.coco import CocoAP, CocoScores
from pointformer.metrics.instances import (
    IOU_THRESHOLDS,
    AveragePrecision,
    average_precision,
    match_instances,
)
from pointformer.metrics.panoptic import PanopticQuality, PanopticScores, Quality
from pointformer.metrics.semantic import SemanticIoU, SemanticScores

__all__ = [
    "IOU_THRESHOLDS",
    "AveragePrecision",
    "CityscapesAP",
    "CityscapesScores",
    "CocoAP",
    "CocoScores",
    "PanopticQuality",
    "PanopticScores",
    "Quality",
    "SemanticIoU",
    "SemanticScores",
    "average_precision",
    "boundary_iou",
    "mask_boundary",
    "match_instances",
]
