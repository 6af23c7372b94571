"""Scores of a model on an annotated data set."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pointformer.data.annotations import Annotation, Dataset, Objects, Segment
from pointformer.data.images import read_image
from pointformer.metrics import average_precision
from pointformer.metrics.instances import IOU_THRESHOLDS
from pointformer.segmentation import segment, to_tensor

if TYPE_CHECKING:
    from pointformer.models import Model


def evaluate(
    model: Model,
    dataset: Dataset,
    task: str,
    *,
    annotations: Iterable[Annotation] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: int | None = None,
) -> dict[str, float]:
    """Run a model over a data set and score it by the field's measures, in [0, 1].

    Args:
        model: with a mask head; for the task "instance" also the three-class dense one.
        dataset: with the classes of the model, in its order.
        task: "semantic" (mean IoU), "instance" (AP of COCO where pycocotools is installed; AP as
            StarDist counts it, regardless of class) or "panoptic" (PQ, for things and stuff).
        annotations: what to go through in the place of `dataset`, for example with a progress bar.
        scales, flip: see `predict_semantic`; only for that task, because the queries of different
            copies do not correspond.
        tile: side of the windows in pixels; see `predict_semantic`, and `segment` for other tasks.

    Raises:
        ValueError: an option does not fit the task, the model and the data set have different
            classes, or a picture another size than its annotation; the message names it.
    """
    if model.task not in (None, task):
        raise ValueError(f"task: the model is made for {model.task!r}, not for {task!r}")
    if model.task is not None and len(dataset.categories) != model.num_classes:
        raise ValueError(
            f"model: has {model.num_classes} classes, the data set {len(dataset.categories)}"
        )
    if task != "semantic" and (flip or tuple(scales) != (1.0,)):
        raise ValueError(f"scales, flip: only for the task 'semantic', not for {task!r}")
    score = {"semantic": _semantic, "instance": _instance, "panoptic": _panoptic}[task]
    options = {"scales": scales, "flip": flip, "tile": tile}
    return score(model, dataset, dataset if annotations is None else annotations, options)


def _pixels(annotation: Annotation) -> np.ndarray:
    if annotation.image is None:
        raise ValueError(f"{annotation.name}: an annotation without its picture")
    image = read_image(annotation.image)
    if image.shape[:2] != annotation.size:
        height, width = annotation.size
        raise ValueError(
            f"{annotation.image}: has {image.shape[0]} x {image.shape[1]} pixels, its annotation "
            f"{height} x {width}"
        )
    return image


def _normalized(model: Model, image: np.ndarray) -> torch.Tensor:
    device = next(model.parameters()).device
    return model.preprocess(to_tensor(image).to(device))


def _semantic(
    model: Model, dataset: Dataset, annotations: Iterable[Annotation], options: dict
) -> dict[str, float]:
    from pointformer.metrics.semantic import SemanticIoU
    from pointformer.models.inference import predict_semantic

    metric = SemanticIoU(len(dataset.categories))
    for annotation in annotations:
        scores = predict_semantic(model, _normalized(model, _pixels(annotation)), **options)
        metric.update(scores.argmax(0).cpu().numpy(), annotation.classes())
    result = metric.compute()
    return {
        "mIoU": result.mean_iou,
        "mean accuracy": result.mean_accuracy,
        "pixel accuracy": result.pixel_accuracy,
    }


def _instance(
    model: Model, dataset: Dataset, annotations: Iterable[Annotation], options: dict
) -> dict[str, float]:
    from pointformer.models.inference import predict

    coco = None
    if importlib.util.find_spec("pycocotools"):
        from pointformer.metrics.coco import CocoAP

        coco = CocoAP(dataset.categories)
    pairs = []
    for annotation in annotations:
        image = _pixels(annotation)
        if model.task is None or options["tile"]:
            shown = segment(model, image, tile=options["tile"])
            labels = shown.labels
            masks = labels == np.arange(1, shown.count + 1)[:, None, None]
            classes = np.array(shown.classes, np.int64)
            found = Objects(masks, classes, np.array(shown.scores, np.float32))
        else:
            result = predict(model, _normalized(model, image))
            labels = _confident(result).painted().ids.cpu().numpy()
            found = Objects(
                *(x.cpu().numpy() for x in (result.masks, result.classes, result.scores))
            )
        if coco is not None:
            coco.update(found, annotation)
        truth = annotation.ids
        if truth is None:
            truth = np.zeros(annotation.size, np.int32)
            for number, mask in enumerate(annotation.objects().masks, 1):
                truth[mask] = number
        pairs.append((labels, truth))
    scores = average_precision(pairs)
    result = {"AP at IoU 0.5 (TP / (TP + FP + FN))": scores.at(IOU_THRESHOLDS[0])}
    result["mean AP (TP / (TP + FP + FN))"] = scores.mean
    if coco is not None:
        summary = coco.compute()
        result |= {
            "COCO AP": summary.ap,
            "COCO AP50": summary.ap50,
            "COCO AP75": summary.ap75,
            "COCO AP small": summary.ap_small,
            "COCO AP medium": summary.ap_medium,
            "COCO AP large": summary.ap_large,
        }
    return result


def _confident(found, min_score: float = 0.5):
    """The objects that `segment` shows by default."""
    kept = found.scores >= min_score
    return type(found)(found.masks[kept], found.classes[kept], found.scores[kept])


def _panoptic(
    model: Model, dataset: Dataset, annotations: Iterable[Annotation], options: dict
) -> dict[str, float]:
    from pointformer.metrics.panoptic import PanopticQuality
    from pointformer.models.inference import predict
    from pointformer.models.postprocess import Panoptic

    metric = PanopticQuality(dataset.categories)
    for annotation in annotations:
        image = _pixels(annotation)
        if options["tile"]:
            tiled = segment(model, image, tile=options["tile"], min_score=0.8)
            areas = np.bincount(tiled.labels.ravel(), minlength=tiled.count + 1)[1:]
            rows = zip(tiled.classes, areas.tolist(), tiled.scores, strict=True)
            segments = [
                Segment(number, kind, area, score=score)
                for number, (kind, area, score) in enumerate(rows, 1)
            ]
            found = Panoptic(torch.from_numpy(tiled.labels), tuple(segments))
        else:
            found = predict(model, _normalized(model, image))  # type: ignore[assignment]
        metric.update(found, annotation)
    result = metric.compute()
    return {
        f"{name}{kind}": getattr(group, name.lower())
        for kind, group in (
            ("", result.all),
            (" things", result.things),
            (" stuff", result.stuff),
        )
        for name in ("PQ", "SQ", "RQ")
    }
