"""Annotations and predictions of pictures as plain data: classes, masks, objects, maps of segments.

Classes are numbered 0 to K - 1 in the order of a data set's category table; the numbers that files
use are the table's ids. Maps of classes have VOID where nothing is annotated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VOID = -1
OBJECT = "object"  # the one class of objects whose class nobody has named


@dataclass(frozen=True)
class Category:
    """A class: its number in files, its name, whether it is countable, and a color (R, G, B)."""

    id: int
    name: str
    is_thing: bool = True
    color: tuple[int, int, int] = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class Mask:
    """The pixels of one object of a picture, kept as the part of the picture that has them.

    Attributes:
        top, left: where `pixels` lies in the picture.
        pixels: (h, w) bool, the object's bounding box; (0, 0) of an object without a pixel.
    """

    top: int
    left: int
    pixels: np.ndarray = field(repr=False)

    @staticmethod
    def of(pixels: Any, top: int = 0, left: int = 0) -> Mask:
        """The object in an array (h, w) whose corner is at `top` and `left` of the picture."""
        pixels = np.asarray(pixels).astype(bool, copy=False)
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        if not len(rows):
            return Mask(0, 0, np.zeros((0, 0), bool))
        first, start = int(rows[0]), int(columns[0])
        box = pixels[first : int(rows[-1]) + 1, start : int(columns[-1]) + 1]
        if box.size < pixels.size:
            box = box.copy()  # a view would keep the whole array
        return Mask(top + first, left + start, box)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom; ends exclusive."""
        height, width = self.pixels.shape
        return self.left, self.top, self.left + width, self.top + height

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the picture."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(np.count_nonzero(self.pixels))

    def dense(self, size: tuple[int, int]) -> np.ndarray:
        """(H, W) bool of the whole picture."""
        picture = np.zeros(size, bool)
        picture[self.window] = self.pixels
        return picture

    def within(self, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """(h, w) bool: the pixels in the part of the picture that this box and `box` share."""
        rows = slice(max(top - self.top, 0), max(bottom - self.top, 0))
        columns = slice(max(left - self.left, 0), max(right - self.left, 0))
        return self.pixels[rows, columns]


def masks_of(values: np.ndarray, wanted: Sequence[int | str]) -> list[Mask]:
    """The pixels of each wanted value of a map (H, W) of integers."""
    from scipy import ndimage  # slow to import

    known, place = np.unique(np.asarray(wanted, np.int64), return_inverse=True)
    if not len(known):
        return []
    number = np.minimum(np.searchsorted(known, values), len(known) - 1)
    number = np.where(known[number] == values, number + 1, 0).astype(np.int32)
    masks = []
    for value, box in zip(known, ndimage.find_objects(number, len(known)), strict=True):
        if box is None:
            masks.append(Mask(0, 0, np.zeros((0, 0), bool)))
        else:
            masks.append(Mask(box[0].start, box[1].start, values[box] == value))
    return [masks[n] for n in place]


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Pairs of values of two maps that share pixels.

    Attributes:
        first, second: (N,), (M,) the values of each map, ascending.
        rows, columns: (P,) the places in these of each pair, ordered by the first, then the second.
        pixels: (P,) int64 that a pair shares.
    """

    first: np.ndarray
    second: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    pixels: np.ndarray

    @staticmethod
    def of(first: np.ndarray, second: np.ndarray) -> Overlaps:
        """Of two maps of integers of one shape."""
        one, other = np.ravel(first), np.ravel(second)
        begins = np.ones(one.size, bool)  # runs of equal pairs are far fewer than pixels
        begins[1:] = (one[1:] != one[:-1]) | (other[1:] != other[:-1])
        starts = np.flatnonzero(begins)
        first, row = np.unique(one[starts], return_inverse=True)
        second, column = np.unique(other[starts], return_inverse=True)
        pairs, pair = np.unique(row * len(second) + column, return_inverse=True)
        rows, columns = np.divmod(pairs, max(len(second), 1))
        lengths = np.diff(starts, append=one.size)
        return Overlaps(first, second, rows, columns, _sums(pair, lengths, len(pairs)))

    def first_areas(self) -> np.ndarray:
        """(N,) int64 pixels of each value of the first map."""
        return _sums(self.rows, self.pixels, len(self.first))

    def second_areas(self, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(M,) int64 pixels of each value of the second map, of the chosen pairs alone."""
        return _sums(self.columns[chosen], self.pixels[chosen], len(self.second))

    def most_shared(self) -> dict[int, int]:
        """By value of the first map, the value of the second that has most of its pixels; of
        equals the least."""
        order = np.lexsort((-self.columns, self.pixels, self.rows))  # of a row the last is right
        names, values = self.first[self.rows[order]], self.second[self.columns[order]]
        return dict(zip(names.tolist(), values.tolist(), strict=True))


def _sums(places: np.ndarray, pixels: np.ndarray, count: int) -> np.ndarray:
    """Numbers of pixels by place; float64, which bincount adds in, holds them exactly."""
    return np.bincount(places, pixels, count).astype(np.int64)


class Objects:
    """Objects of one picture; their masks may overlap. Memory is that of their bounding boxes.

    Attributes:
        size: height and width of the picture.
        masks: N masks.
        classes: (N,) int64.
        scores: (N,) float32.
    """

    def __init__(
        self,
        masks: Iterable[Any],
        classes: Any,
        scores: Any,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Objects from masks of any form.

        Args:
            masks: (N, H, W), or one by one: each a `Mask`, or (H, W), arrays or tensors on the CPU.
            classes: N integers.
            scores: N numbers.
            size: height and width; needed unless `masks` has the shape (N, H, W).

        Raises:
            ValueError: if the lengths differ or a mask is not of this size.
        """
        if size is None:
            shape = tuple(getattr(masks, "shape", ()))
            if len(shape) != 3:
                raise ValueError(f"masks: expected shape (N, H, W), or a size, got {shape or None}")
            size = shape[1], shape[2]
        self.size = int(size[0]), int(size[1])
        self.classes = np.asarray(classes).astype(np.int64).reshape(-1)
        self.scores = np.asarray(scores).astype(np.float32).reshape(-1)
        self.masks = tuple(self._checked(mask) for mask in masks)
        if not len(self.masks) == len(self.classes) == len(self.scores):
            raise ValueError(
                f"masks, classes, scores: expected one length, got {len(self.masks)}, "
                f"{len(self.classes)} and {len(self.scores)}"
            )

    def _checked(self, mask: Any) -> Mask:
        if isinstance(mask, Mask):
            _, _, right, bottom = mask.box
            fits = mask.top >= 0 and mask.left >= 0
            if fits and bottom <= self.size[0] and right <= self.size[1]:
                return mask
            raise ValueError(f"masks: expected boxes within {self.size}, got {mask.box}")
        if np.shape(mask) != self.size:
            raise ValueError(
                f"masks: expected height and width {self.size}, got {tuple(np.shape(mask))}"
            )
        return Mask.of(mask)

    @staticmethod
    def of(predicted: Any, size: tuple[int, int] | None = None) -> Objects:
        """`predicted` if it is `Objects`, the segments of a `SegmentMap`, or else its `masks`,
        `classes` and `scores` as such.

        Raises:
            ValueError: if the lengths differ or the picture's height and width are not `size`.
        """
        if isinstance(predicted, SegmentMap):
            predicted = predicted.objects()
        if not isinstance(predicted, Objects):
            return Objects(predicted.masks, predicted.classes, predicted.scores, size)
        if size is not None and predicted.size != tuple(size):
            raise ValueError(
                f"predicted: expected masks of height and width {tuple(size)}, got {predicted.size}"
            )
        return predicted

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        return f"Objects({len(self)} of a picture of {self.size[0]} x {self.size[1]})"

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) int64 left, top, right, bottom, ends exclusive; zeros for an empty mask."""
        return np.array([mask.box for mask in self.masks], np.int64).reshape(-1, 4)

    def dense(self) -> np.ndarray:
        """(N, H, W) bool: for few objects of small pictures."""
        masks = np.zeros((len(self), *self.size), bool)
        for mask, picture in zip(self.masks, masks, strict=True):
            picture[mask.window] = mask.pixels
        return masks

    def chosen(self, index: Any) -> Objects:
        """The objects that `index` chooses: (N,) bool, or integers from 0 to N - 1."""
        index = np.asarray(index)
        places = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        masks = [self.masks[n] for n in places]
        return Objects(masks, self.classes[places], self.scores[places], self.size)

    def confident(self, min_score: float = 0.5) -> Objects:
        """The objects with a score of at least `min_score`."""
        return self.chosen(self.scores >= min_score)

    def segment_map(self) -> SegmentMap:
        """A map without overlaps: a pixel goes to the highest score, of equals to the first.

        Segments are numbered from 1 in the order of the objects; hidden ones are left out.
        """
        owner = np.zeros(self.size, np.int32)
        for n in np.argsort(-self.scores, kind="stable")[::-1].tolist():
            owner[self.masks[n].window][self.masks[n].pixels] = n + 1
        areas = np.bincount(owner.ravel(), minlength=len(self) + 1)
        visible = areas > 0
        visible[0] = False
        number = (np.cumsum(visible) * visible).astype(np.int32)
        rows = zip(number[1:].tolist(), self.classes.tolist(), areas[1:].tolist(), strict=True)
        segments = (
            Segment(id, kind, area, score=score)
            for (id, kind, area), score in zip(rows, self.scores.tolist(), strict=True)
            if id
        )
        return SegmentMap(number[owner], tuple(segments))


@dataclass(frozen=True)
class Segment:
    """One object, or one region of stuff.

    Attributes:
        id: its value in the map of ids, or what the file calls it.
        category: class, 0 to K - 1; VOID for a crowd that may be of any class.
        area: in pixels; from the file where that says so, which COCO sizes objects by.
        crowd: a region of several objects that are not told apart; scores ignore it.
        score: confidence of a prediction.
        mask: `None` where the map of ids has it.
        whole: area of the object before a crop took a part of it; `None`: `area`.
    """

    id: int | str
    category: int
    area: float
    crowd: bool = False
    score: float = 1.0
    mask: Mask | None = field(default=None, repr=False, compare=False)
    whole: float | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class SegmentMap:
    """Segments of one picture that do not overlap.

    Attributes:
        ids: (H, W) int32, 0 where there is no segment.
        segments: one for each id.
    """

    ids: np.ndarray = field(repr=False)
    segments: tuple[Segment, ...]

    @staticmethod
    def of(ids: np.ndarray, classes: Iterable[int], scores: Iterable[float]) -> SegmentMap:
        """From ids (H, W) int32, 0 and 1 to N, with the class and the score of each id from 1 on.

        Raises:
            ValueError: if there are not N classes and scores.
        """
        areas = np.bincount(ids.ravel())[1:].tolist()
        rows = zip(areas, classes, scores, strict=True)
        return SegmentMap(
            ids, tuple(Segment(n, kind, area, score=s) for n, (area, kind, s) in enumerate(rows, 1))
        )

    def objects(self) -> Objects:
        """The segments, stuff too, as objects."""
        return Objects(
            masks_of(self.ids, [segment.id for segment in self.segments]),
            [segment.category for segment in self.segments],
            [segment.score for segment in self.segments],
            self.ids.shape,
        )
