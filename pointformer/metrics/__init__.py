"""Scores of predictions against annotations."""

from pointformer.metrics.instances import (
    IOU_THRESHOLDS,
    AveragePrecision,
    average_precision,
    match_instances,
)

__all__ = ["IOU_THRESHOLDS", "AveragePrecision", "average_precision", "match_instances"]
