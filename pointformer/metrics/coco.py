"""COCO's average precision of objects, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pointformer.annotations import VOID, Category, Mask, Objects
from pointformer.data import Annotation
from pointformer.data.coco import encode_mask, mask_tools
from pointformer.metrics.boundary import boundary_distance, boundary_of


@dataclass(frozen=True, eq=False)
class CocoScores:
    """Scores in [0, 1]; NaN where there is no annotated object.

    Attributes:
        ap: mean over classes and the IoU thresholds 0.5 to 0.95; `ap50` and `ap75` at one.
        ap_small, ap_medium, ap_large: of objects below 32 x 32 pixels, up to 96 x 96, and above.
        recall: mean recall over classes and thresholds.
        per_class: (K,) AP.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    recall: float
    per_class: np.ndarray


class CocoAP:
    """Average precision of objects over a data set.

    Args:
        boundary: compare by the lesser of mask IoU and boundary IoU, but crowds by mask IoU alone.
        max_detections: at most as many objects of a class per picture count, best first.
        dilation_ratio: see `mask_boundary`.
    """

    def __init__(
        self,
        categories: Sequence[Category],
        *,
        boundary: bool = False,
        max_detections: int = 100,
        dilation_ratio: float = 0.02,
    ) -> None:
        mask_tools()
        self.categories = tuple(categories)
        self.boundary = boundary
        self.max_detections = max_detections
        self.dilation_ratio = dilation_ratio
        self._images: list[dict] = []
        self._annotated: list[dict] = []
        self._predicted: list[dict] = []

    def update(self, predicted: Any, annotation: Annotation) -> None:
        """Add one picture.

        Args:
            predicted: see `Objects.of`.

        Raises:
            ValueError: if sizes differ or a class is out of range.
        """
        found = Objects.of(predicted, annotation.size)
        classes = found.classes.tolist()
        if any(not 0 <= category < len(self.categories) for category in classes):
            raise ValueError(f"predicted: unknown class in the objects of {annotation.name}")
        image = len(self._images) + 1
        height, width = annotation.size
        self._images.append({"id": image, "height": height, "width": width})
        for segment, mask in zip(annotation.segments, annotation.masks(), strict=True):
            row = {"area": segment.area, "iscrowd": int(segment.crowd)}
            anything = segment.category == VOID
            for category in sorted(set(classes)) if anything else [segment.category]:
                self._add(self._annotated, image, category, mask, row)
        for mask, category, score in zip(found.masks, classes, found.scores.tolist(), strict=True):
            row = {"area": float(mask.area), "iscrowd": 0, "score": score}
            self._add(self._predicted, image, category, mask, row)

    def _add(self, rows: list[dict], image: int, category: int, mask: Mask, row: dict) -> None:
        size = self._images[-1]["height"], self._images[-1]["width"]
        row = {**row, "id": len(rows) + 1, "image_id": image, "category_id": category}
        row["segmentation"] = encode_mask(mask, size)
        if self.boundary:
            rim = boundary_of(mask, boundary_distance(size, self.dilation_ratio))
            row["boundary"] = encode_mask(rim, size)
        rows.append(row)

    def merge(self, other: CocoAP) -> None:
        """Add the pictures of another part of the data set."""
        pictures = len(self._images)
        self._images += [{**row, "id": row["id"] + pictures} for row in other._images]
        for mine, theirs in (
            (self._annotated, other._annotated),
            (self._predicted, other._predicted),
        ):
            count = len(mine)
            mine += [
                {**row, "id": row["id"] + count, "image_id": row["image_id"] + pictures}
                for row in theirs
            ]

    def state(self) -> dict[str, np.ndarray]:
        """The sizes of pictures, the numbers of objects and their masks' run lengths."""
        sizes = [(row["height"], row["width"]) for row in self._images]
        state = {"sizes": np.array(sizes, np.int64).reshape(-1, 2)}
        for side, rows in (("annotated", self._annotated), ("predicted", self._predicted)):
            for name, kind in self._numbers(side).items():
                state[f"{side}_{name}"] = np.array([row[name] for row in rows], kind)
            for name in self._masks:
                runs = [row[name]["counts"] for row in rows]
                state[f"{side}_{name}"] = np.frombuffer("".join(runs).encode(), np.uint8)
                state[f"{side}_{name}_lengths"] = np.array([len(run) for run in runs], np.int64)
        return state

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Take the pictures of a `state`."""
        sizes = state["sizes"].tolist()
        self._images = [{"id": n, "height": h, "width": w} for n, (h, w) in enumerate(sizes, 1)]
        for side, rows in (("annotated", self._annotated), ("predicted", self._predicted)):
            columns = {name: state[f"{side}_{name}"].tolist() for name in self._numbers(side)}
            for name in self._masks:
                lengths = state[f"{side}_{name}_lengths"]
                ends = np.cumsum(lengths)
                places = zip(columns["image_id"], ends - lengths, ends, strict=True)
                runs = state[f"{side}_{name}"].tobytes().decode()
                columns[name] = [
                    {"size": sizes[image - 1], "counts": runs[start:end]}
                    for image, start, end in places
                ]
            rows[:] = (
                {"id": n, **dict(zip(columns, values, strict=True))}
                for n, values in enumerate(zip(*columns.values(), strict=True), 1)
            )

    @property
    def _masks(self) -> tuple[str, ...]:
        return ("segmentation", "boundary") if self.boundary else ("segmentation",)

    @staticmethod
    def _numbers(side: str) -> dict[str, type]:
        """Properties of each object besides its masks."""
        known = {"image_id": np.int64, "category_id": np.int64, "iscrowd": np.int64}
        more = {"area": np.float64, "score": np.float64}
        return {**known, **(more if side == "predicted" else {"area": np.float64})}

    def compute(self) -> dict[str, float]:
        """The means of `scores` by name."""
        scores = self.scores()
        return {
            "COCO AP": scores.ap,
            "COCO AP50": scores.ap50,
            "COCO AP75": scores.ap75,
            "COCO AP small": scores.ap_small,
            "COCO AP medium": scores.ap_medium,
            "COCO AP large": scores.ap_large,
        }

    def scores(self) -> CocoScores:
        """Scores of all pictures so far."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        class BoundaryEval(COCOeval):
            def computeIoU(self, imgId: int, catId: int) -> Any:
                iou = super().computeIoU(imgId, catId)
                annotated, predicted = self._gts[imgId, catId], self._dts[imgId, catId]
                if len(iou) == 0:
                    return iou
                order = np.argsort([-row["score"] for row in predicted], kind="mergesort")
                best = [predicted[n]["boundary"] for n in order[: self.params.maxDets[-1]]]
                crowd = [row["iscrowd"] for row in annotated]
                near = mask_tools().iou(best, [row["boundary"] for row in annotated], crowd)
                return np.where(crowd, iou, np.minimum(iou, near))

        with contextlib.redirect_stdout(io.StringIO()):
            sides = []
            for rows in (self._annotated, self._predicted):
                side = COCO()
                side.dataset = {
                    "images": self._images,
                    "annotations": [dict(row) for row in rows],  # COCOeval writes into them
                    "categories": [
                        {"id": n, "name": category.name}
                        for n, category in enumerate(self.categories)
                    ],
                }
                side.createIndex()
                sides.append(side)
            evaluation = (BoundaryEval if self.boundary else COCOeval)(*sides, iouType="segm")
            evaluation.params.maxDets = [self.max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        # (thresholds, recalls, classes, sizes, limits); -1 where there is no annotated object.
        precision = evaluation.eval["precision"][..., -1]
        recall = evaluation.eval["recall"][:, :, 0, -1]
        everything, small, medium, large = range(4)
        return CocoScores(
            ap=_mean(precision[..., everything]),
            ap50=_mean(precision[0, ..., everything]),
            ap75=_mean(precision[5, ..., everything]),
            ap_small=_mean(precision[..., small]),
            ap_medium=_mean(precision[..., medium]),
            ap_large=_mean(precision[..., large]),
            recall=_mean(recall),
            per_class=np.array(
                [_mean(precision[:, :, n, everything]) for n in range(len(self.categories))]
            ),
        )


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")
