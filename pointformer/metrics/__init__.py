"""Scores of predictions against annotations.

Each metric is a `Metric`: `update` with pictures, `merge` with other parts of a data set, `compute`
scores by name, or see them in detail in `scores()`.
"""

from pointformer.metrics.average_precision import (
    IOU_THRESHOLDS,
    AveragePrecision,
    InstanceAP,
    average_precision,
    match_instances,
)
from pointformer.metrics.boundary import boundary_iou, mask_boundary
from pointformer.metrics.cityscapes import CityscapesAP, CityscapesScores
from pointformer.metrics.classification import Accuracy, AccuracyScores
from pointformer.metrics.coco import CocoAP, CocoScores
from pointformer.metrics.metric import Metric
from pointformer.metrics.panoptic import PanopticQuality, PanopticScores, Quality
from pointformer.metrics.semantic import SemanticIoU, SemanticScores
from pointformer.metrics.sizes import RecallBySize, SizeScores, size_names

__all__ = [
    "IOU_THRESHOLDS",
    "Accuracy",
    "AccuracyScores",
    "AveragePrecision",
    "CityscapesAP",
    "CityscapesScores",
    "CocoAP",
    "CocoScores",
    "InstanceAP",
    "Metric",
    "PanopticQuality",
    "PanopticScores",
    "Quality",
    "RecallBySize",
    "SemanticIoU",
    "SemanticScores",
    "SizeScores",
    "average_precision",
    "boundary_iou",
    "mask_boundary",
    "match_instances",
    "size_names",
]
