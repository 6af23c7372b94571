"""Scores of a model on an annotated data set."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch

from pointformer.annotations import Category, Objects, SegmentMap
from pointformer.data.annotations import Annotation, Dataset
from pointformer.data.categories import CITYSCAPES_THINGS
from pointformer.data.images import Reading, open_picture, read_image
from pointformer.metrics import average_precision
from pointformer.metrics.instances import IOU_THRESHOLDS
from pointformer.segmentation import look, to_tensor
from pointformer.tiling import windows_of

if TYPE_CHECKING:
    from pointformer.models import Model


@dataclass(frozen=True)
class Evaluation:
    """Scores by name, in [0, 1] or NaN where nothing is to be scored, and of how many pictures."""

    scores: dict[str, float]
    pictures: int


def evaluate(
    model: Model,
    dataset: Dataset,
    task: str,
    *,
    annotations: Iterable[Annotation] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: int | None = None,
    **reading: Unpack[Reading],
) -> Evaluation:
    """Run a model over a data set and score it by the field's measures.

    Args:
        model: with a mask head made for the task, or a dense one: of one class per class of the
            data set for "semantic", of three for "instance" (background, inside, border).
        dataset: with the classes of the model, in its order. With `skip_bad` pictures that cannot
            be read are left out too, and listed in `dataset.skipped`.
        task: "semantic" (mean IoU), "instance" (AP of COCO where pycocotools is installed, of
            Cityscapes for its classes where cityscapesscripts is; AP as StarDist counts it,
            regardless of class) or "panoptic" (PQ, for things and stuff).
        annotations: what to go through in the place of `dataset`, for example with a progress bar.
        scales, flip: see `predict_semantic`; only for that task, because the queries of different
            copies do not correspond.
        tile: side of the windows in pixels; see `predict_semantic`, and `segment` for other tasks.
        reading: how the pictures are read, see `pointformer.data.images.Reading`.

    Raises:
        ValueError: an option does not fit the task, the model and the data set have different
            classes, there is no picture, or one has another size than its annotation; the message
            names it.
    """
    _check_model(model, len(dataset.categories), task)
    if task != "semantic" and (flip or tuple(scales) != (1.0,)):
        raise ValueError(f"scales, flip: only for the task 'semantic', not for {task!r}")
    scorers: dict[str, Callable[..., _Semantic | _Instance | _Panoptic]] = {
        "semantic": _Semantic,
        "instance": _Instance,
        "panoptic": _Panoptic,
    }
    options = {"scales": scales, "flip": flip, "tile": tile}
    scorer = scorers[task](model, dataset.categories, options)
    pictures = 0
    for annotation, image in _with_pictures(
        dataset if annotations is None else annotations, dataset, reading
    ):
        scorer.update(image, annotation)
        pictures += 1
    if pictures == 0:
        raise ValueError(f"no picture to score ({len(dataset.skipped)} skipped)")
    return Evaluation(scorer.compute(), pictures)


def _check_model(model: Model, classes: int, task: str) -> None:
    if model.task not in (None, task):
        raise ValueError(f"task: the model is made for {model.task!r}, not for {task!r}")
    if model.task is None and (model.head_name != "dense" or task == "panoptic"):
        raise ValueError(
            f"model: {model.name} with head {model.head_name!r} is not made for {task!r}"
        )
    dense_objects = model.head_name == "dense" and task == "instance"
    if dense_objects and not model.finds_instances:
        raise ValueError(
            f"model: a dense head needs 3 classes to find objects, it has {model.num_classes}"
        )
    own = 1 if dense_objects else model.num_classes
    if own != classes:
        raise ValueError(f"model: has {own} classes, the data set {classes}")


def _with_pictures(
    annotations: Iterable[Annotation], dataset: Dataset, reading: Reading
) -> Iterator[tuple[Annotation, np.ndarray]]:
    for annotation in annotations:
        try:
            image = _pixels(annotation, reading)
        except ValueError as error:
            if not dataset.skip_bad:
                raise
            dataset.skipped[annotation.name] = str(error)
        else:
            yield annotation, image


def _pixels(annotation: Annotation, reading: Reading) -> np.ndarray:
    if annotation.image is None:
        raise ValueError(f"{annotation.name}: an annotation without its picture")
    image = read_image(annotation.image, **reading)
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


def _found(model: Model, image: np.ndarray, tile: int | None) -> Objects | SegmentMap:
    picture = open_picture(image)
    found, _ = look(model, picture, windows_of(*picture.shape, tile, None))
    return found


class _Semantic:
    def __init__(self, model: Model, categories: Sequence[Category], options: dict) -> None:
        from pointformer.metrics.semantic import SemanticIoU

        self.model, self.options = model, options
        self.metric = SemanticIoU(len(categories))

    def update(self, image: np.ndarray, annotation: Annotation) -> None:
        from pointformer.models.inference import predict_semantic

        scores = predict_semantic(self.model, _normalized(self.model, image), **self.options)
        self.metric.update(scores.argmax(0).cpu().numpy(), annotation.classes())

    def compute(self) -> dict[str, float]:
        result = self.metric.compute()
        return {
            "mIoU": result.mean_iou,
            "mean accuracy": result.mean_accuracy,
            "pixel accuracy": result.pixel_accuracy,
        }


class _Instance:
    def __init__(self, model: Model, categories: Sequence[Category], options: dict) -> None:
        self.model, self.tile = model, options["tile"]
        self.things = [number for number, category in enumerate(categories) if category.is_thing]
        self.coco = self.cityscapes = None
        if importlib.util.find_spec("pycocotools"):
            from pointformer.metrics.coco import CocoAP

            self.coco = CocoAP(categories)
        if tuple(categories) == CITYSCAPES_THINGS and importlib.util.find_spec("cityscapesscripts"):
            from pointformer.metrics.cityscapes import CityscapesAP

            self.cityscapes = CityscapesAP(categories)
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, image: np.ndarray, annotation: Annotation) -> None:
        found, labels = self._objects(image)
        kept = (s for s in annotation.segments if s.crowd or s.category in self.things)
        annotation = replace(annotation, segments=tuple(kept))
        if self.coco is not None:
            self.coco.update(found, annotation)
        if self.cityscapes is not None:
            self.cityscapes.update(found, annotation)
        self.pairs.append(self._countable(labels, annotation))

    def _objects(self, image: np.ndarray) -> tuple[Objects, np.ndarray]:
        """Objects with all their scores, and the ids that `segment` shows."""
        found = _found(self.model, image, self.tile)
        if isinstance(found, SegmentMap):
            return found.objects(), found.ids
        return found, found.confident().painted().ids

    def _countable(
        self, labels: np.ndarray, annotation: Annotation
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids found, without what lies on crowds, and the ids of annotated objects."""
        truth, crowd = annotation.instances()
        return np.where(crowd, 0, labels), truth

    def compute(self) -> dict[str, float]:
        scores = average_precision(self.pairs)
        result = {
            "AP at IoU 0.5 (TP / (TP + FP + FN))": scores.at(IOU_THRESHOLDS[0]),
            "mean AP (TP / (TP + FP + FN))": scores.mean,
        }
        if self.coco is not None:
            summary = self.coco.compute()
            result |= {
                "COCO AP": summary.ap,
                "COCO AP50": summary.ap50,
                "COCO AP75": summary.ap75,
                "COCO AP small": summary.ap_small,
                "COCO AP medium": summary.ap_medium,
                "COCO AP large": summary.ap_large,
            }
        if self.cityscapes is not None:
            averages = self.cityscapes.compute()
            result |= {"Cityscapes AP": averages.ap, "Cityscapes AP50": averages.ap50}
        return result


class _Panoptic:
    def __init__(self, model: Model, categories: Sequence[Category], options: dict) -> None:
        from pointformer.metrics.panoptic import PanopticQuality

        self.model, self.tile = model, options["tile"]
        self.metric = PanopticQuality(categories)

    def update(self, image: np.ndarray, annotation: Annotation) -> None:
        self.metric.update(_found(self.model, image, self.tile), annotation)

    def compute(self) -> dict[str, float]:
        result = self.metric.compute()
        return {
            f"{name}{kind}": getattr(group, name.lower())
            for kind, group in (
                ("", result.all),
                (" things", result.things),
                (" stuff", result.stuff),
            )
            for name in ("PQ", "SQ", "RQ")
        }
