"""Random changes of pictures for training, which what is annotated follows.

A transform is called with a picture (H, W, 3) uint8, its `Annotation` and a generator of random
numbers, and returns both anew; equal generators give equal results, bit for bit. Numbers of
probabilities are shares from 0 to 1. Pixels of maps and masks are those nearest to the new pixels'
centers. Segments that a crop leaves no pixel of are dropped, the others have their areas anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from pointformer.annotations import VOID, Mask, Segment
from pointformer.data.annotations import Annotation

Sample = tuple[np.ndarray, Annotation]
Interpolation = Literal["bilinear", "bicubic"]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_GRAY = 128


class Transform(Protocol):
    """What changes a picture and its annotation, or returns them as they are."""

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample: ...


@dataclass(frozen=True)
class Chain:
    """Transforms, one after the other."""

    transforms: Sequence[Transform]

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        for transform in self.transforms:
            image, annotation = transform(image, annotation, rng)
        return image, annotation


@dataclass(frozen=True)
class RandomCrop:
    """A window of random place and magnification.

    Attributes:
        size: height and width of the result, in pixels; one number for a square.
        scales: least and largest scale. 1 is, as `measure` says,
            "pixels": the picture as it is;
            "short": its shorter side has `short` pixels;
            "fit": it just fits into `size`. With scales 0.1 to 2 this is large-scale jitter.
        measure: see `scales`.
        short: see `scales`; `None`: the shorter side of `size`.
        longest: the magnified picture's longer side has at most so many pixels, if not `None`.
        logarithmic: draw the logarithm of the scale uniformly, not the scale.
        beyond: what lies beyond the picture, where the window is larger: "void": gray pixels of no
            class and of no object; "mirror": mirror images, whose objects are objects of their own
            unless they touch what they mirror (so are segments of uncountable classes: this is for
            pictures of objects).
        interpolation: of the picture; antialiased.
    """

    size: int | tuple[int, int]
    scales: tuple[float, float] = (1.0, 1.0)
    measure: Literal["pixels", "short", "fit"] = "pixels"
    short: int | None = None
    longest: int | None = None
    logarithmic: bool = False
    beyond: Literal["void", "mirror"] = "void"
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        _check_range("scales", self.scales)

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        size, shape = _pair(self.size), image.shape[:2]
        if self.logarithmic:
            scale = float(np.exp(rng.uniform(*np.log(self.scales))))
        else:
            scale = float(rng.uniform(*self.scales))
        if self.measure == "short":
            scale *= (self.short or min(size)) / min(shape)
        elif self.measure == "fit":
            scale *= min(wanted / side for wanted, side in zip(size, shape, strict=True))
        if self.longest is not None:
            scale = min(scale, self.longest / max(shape))
        windows = []
        for wanted, side in zip(size, shape, strict=True):
            length = max(1, round(wanted / scale))
            start = rng.integers(min(side - length, 0), max(side - length, 0), endpoint=True)
            windows.append((int(start), length))
        rows, columns = windows
        return _window(
            image, annotation, rows, columns, size, self.interpolation, self.beyond == "mirror"
        )


@dataclass(frozen=True)
class RandomResizedCrop:
    """A window of random place, area and shape, resized: what classifiers are trained with.

    Attributes:
        size: height and width of the result, in pixels; one number for a square.
        areas: least and largest share of the picture's area.
        ratios: least and largest width over height of the window, drawn in the logarithm.
        interpolation: of the picture; antialiased.
    """

    size: int | tuple[int, int]
    areas: tuple[float, float] = (0.08, 1.0)
    ratios: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _check_range("areas", self.areas)
        _check_range("ratios", self.ratios)

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        height, width = image.shape[:2]
        for _ in range(10):
            area = height * width * rng.uniform(*self.areas)
            ratio = float(np.exp(rng.uniform(*np.log(self.ratios))))
            rows, columns = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
            if 0 < rows <= height and 0 < columns <= width:
                break
        else:  # a long picture: the largest window of an allowed shape, in the middle
            least, largest = self.ratios
            ratio = min(max(width / height, least), largest)
            rows = max(1, min(height, round(width / ratio)))
            columns = max(1, min(width, round(height * ratio)))
            place = ((height - rows) // 2, rows), ((width - columns) // 2, columns)
            return _window(image, annotation, *place, _pair(self.size), self.interpolation)
        top = int(rng.integers(height - rows, endpoint=True))
        left = int(rng.integers(width - columns, endpoint=True))
        place = (top, rows), (left, columns)
        return _window(image, annotation, *place, _pair(self.size), self.interpolation)


@dataclass(frozen=True)
class RandomFlip:
    """Mirror images: probabilities of left to right, and of top to bottom."""

    horizontal: float = 0.5
    vertical: float = 0.0

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        down = -1 if rng.random() < self.vertical else 1
        right = -1 if rng.random() < self.horizontal else 1
        height, width = image.shape[:2]
        rows, columns = np.arange(height)[::down], np.arange(width)[::right]
        flipped = np.ascontiguousarray(image[::down, ::right])
        return flipped, _resampled(annotation, rows, columns)


@dataclass(frozen=True)
class RandomTurn:
    """A turn by 0, 90, 180 or 270 degrees."""

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        turns = int(rng.integers(4))
        if turns % 2:
            image, annotation = image.swapaxes(0, 1), _transposed(annotation)
        # A turn is a transposition and a mirror image; half a turn is two mirror images.
        down, right = -1 if turns in (1, 2) else 1, -1 if turns in (2, 3) else 1
        height, width = image.shape[:2]
        rows, columns = np.arange(height)[::down], np.arange(width)[::right]
        turned = np.ascontiguousarray(image[::down, ::right])
        return turned, _resampled(annotation, rows, columns)


@dataclass(frozen=True)
class RandomCurves:
    """Random gamma, contrast, brightness and color balance, and now and then more: for pictures
    from microscopes, which differ in stain and light.

    Attributes:
        invert: probability of the negative (fluorescence is bright on black, stains are dark on
            white).
        gray: probability of dropping the colors.
        noise: probability of adding Gaussian noise.
    """

    invert: float = 0.15
    gray: float = 0.15
    noise: float = 0.2

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        if rng.random() < self.gray:
            image = np.repeat(np.asarray(Image.fromarray(image).convert("L"))[..., None], 3, axis=2)
        # Gray pictures stay gray: the channels' curves differ only where the channels do.
        spread = 0.1 if (image[..., 0] != image[..., 2]).any() else 0.0
        levels = np.linspace(0, 1, 256)
        if rng.random() < self.invert:
            levels = 1 - levels
        levels = levels ** np.exp(rng.normal(0, 0.3))
        gains = np.exp(rng.normal(0, 0.2) + rng.normal(0, spread, 3))
        curves = gains[:, None] * levels + rng.normal(0, 0.04)
        curves = np.clip(np.rint(curves * 255), 0, 255).astype(np.uint8)
        colored = np.asarray(Image.fromarray(image).point(curves.ravel().tolist()))
        if rng.random() < self.noise:
            amplitude = rng.uniform(1, 12)
            grain = (rng.standard_normal(image.shape[:2], dtype=np.float32) * amplitude)[..., None]
            colored = np.clip(colored + grain, 0, 255).astype(np.uint8)
        return colored, annotation


@dataclass(frozen=True)
class Resize:
    """The picture with a shorter side of `short` pixels and a longer one of at most `longest`."""

    short: int
    longest: int | None = None
    interpolation: Interpolation = "bicubic"

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        height, width = image.shape[:2]
        scale = self.short / min(height, width)
        if self.longest is not None:
            scale = min(scale, self.longest / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        return _window(image, annotation, (0, height), (0, width), size, self.interpolation)


@dataclass(frozen=True)
class CenterCrop:
    """The middle, of height and width `size`; void where the picture is smaller."""

    size: int | tuple[int, int]

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        size = _pair(self.size)
        rows, columns = (
            ((side - wanted) // 2, wanted)
            for side, wanted in zip(image.shape[:2], size, strict=True)
        )
        return _window(image, annotation, rows, columns, size)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _check_range(name: str, values: Sequence[float]) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise ValueError(f"{name}: expected two positive numbers that rise, got {tuple(values)}")


def _window(
    image: np.ndarray,
    annotation: Annotation,
    rows: tuple[int, int],
    columns: tuple[int, int],
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    mirror: bool = False,
) -> Sample:
    """A window of a picture, resized.

    Args:
        rows, columns: first row or column and how many; they may lie outside.
        mirror: the picture goes on in its mirror images outside, not as gray and void.
    """
    height, width = image.shape[:2]
    if mirror:
        image, row_map, own_rows = _mirrored(image, rows, size[0], 0)
        image, column_map, own_columns = _mirrored(image, columns, size[1], 1)
        changed = _resampled(annotation, row_map, column_map)
        if not (own_rows.all() and own_columns.all()):
            changed = _split(changed, own_rows[:, None] & own_columns)
        return _resized(image, size, interpolation), _without_empty(changed)
    (top, bottom), row_place, row_map = _inside(rows, height, size[0])
    (left, right), column_place, column_map = _inside(columns, width, size[1])
    picture = image[top:bottom, left:right]
    wanted = row_place.stop - row_place.start, column_place.stop - column_place.start
    if wanted == size:
        canvas = _resized(picture, size, interpolation)
    else:
        canvas = np.full((*size, 3), _GRAY, np.uint8)
        if picture.size and min(wanted):
            canvas[row_place, column_place] = _resized(picture, wanted, interpolation)
    return canvas, _without_empty(_resampled(annotation, row_map, column_map))


def _resized(image: np.ndarray, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    if image.shape[:2] == size:
        return np.ascontiguousarray(image)
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize(size[::-1], _FILTERS[interpolation])).copy()


def _nearest(length: int, wanted: int) -> np.ndarray:
    """(wanted,) which of `length` pixels have the centers of `wanted` pixels of the same extent."""
    return (np.arange(wanted) * 2 + 1) * length // (2 * wanted)


def _inside(
    window: tuple[int, int], length: int, wanted: int
) -> tuple[tuple[int, int], slice, np.ndarray]:
    """Of `length` pixels those in a window; where they are in its resized copy of `wanted` pixels;
    and which of them is at each of these, -1 where none is."""
    start, extent = window
    first, end = min(max(start, 0), length), max(min(start + extent, length), 0)
    place = slice(*(round((pixel - start) * wanted / extent) for pixel in (first, end)))
    if place.start == place.stop and first < end:  # less than a pixel is left of it
        where = min(place.start, wanted - 1)
        place = slice(where, where + 1)
    which = np.full(wanted, -1)
    which[place] = first + _nearest(end - first, max(place.stop - place.start, 0))
    return (first, end), place, which


def _mirrored(
    image: np.ndarray, window: tuple[int, int], wanted: int, axis: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A window along one axis of a picture that goes on in mirror images; which of the picture's
    pixels is at each of `wanted` pixels of the window's resized copy; and which of these are of the
    picture, not of a mirror image."""
    start, extent = window
    length = image.shape[axis]
    places = np.arange(start, start + extent)
    folded = places % (2 * length)
    folded = np.where(folded < length, folded, 2 * length - 1 - folded)
    nearest = _nearest(extent, wanted)
    own = (places == folded)[nearest]
    return image.take(folded, axis), folded[nearest], own


def _resampled(annotation: Annotation, rows: np.ndarray, columns: np.ndarray) -> Annotation:
    """What is annotated at these rows and columns; nothing at those that are -1."""
    size = len(rows), len(columns)

    def picked(values: np.ndarray, empty: int) -> np.ndarray:
        values = values.take(rows, 0).take(columns, 1)
        values[rows < 0] = empty
        values[:, columns < 0] = empty
        return values

    def part(whole: Mask) -> Mask:
        places = []
        for first, length, lines in zip(
            (whole.top, whole.left), whole.pixels.shape, (rows, columns), strict=True
        ):
            hit = (lines >= first) & (lines < first + length)
            where = np.flatnonzero(hit)
            if not len(where):
                return Mask.of(np.zeros((0, 0), bool))
            span = slice(where[0], where[-1] + 1)
            places.append((where[0], np.where(hit, lines - first, 0)[span], hit[span]))
        (top, row_map, row_hit), (left, column_map, column_hit) = places
        pixels = whole.pixels.take(row_map, 0).take(column_map, 1)
        return Mask.of(pixels & row_hit[:, None] & column_hit, int(top), int(left))

    if annotation.ids is None:
        annotation.masks()  # an error where there are none
    return replace(
        annotation,
        size=size,
        semantic=None if annotation.semantic is None else picked(annotation.semantic, VOID),
        ids=None if annotation.ids is None else picked(annotation.ids, 0),
        segments=tuple(
            segment if segment.mask is None else _with_mask(segment, part(segment.mask))
            for segment in annotation.segments
        ),
    )


def _with_mask(segment: Segment, mask: Mask) -> Segment:
    """A segment whose mask is what is left of it, with its share of the area."""
    assert segment.mask is not None
    return replace(
        segment,
        mask=mask,
        area=segment.area * mask.area / max(segment.mask.area, 1),
        whole=segment.area if segment.whole is None else segment.whole,
    )


def _without_empty(annotation: Annotation) -> Annotation:
    """Without segments that have no pixel; those in the map of ids have their areas counted."""
    counts: dict[Any, int] = {}
    if annotation.ids is not None:
        values, numbers = np.unique(annotation.ids, return_counts=True)
        counts = dict(zip(values.tolist(), numbers.tolist(), strict=True))
    segments = []
    for segment in annotation.segments:
        if segment.mask is None and segment.id in counts:
            segments.append(replace(segment, area=counts[segment.id]))
        elif segment.mask is not None and segment.mask.pixels.size:
            segments.append(segment)
    return replace(annotation, segments=tuple(segments))


def _transposed(annotation: Annotation) -> Annotation:
    def turned(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else values.T

    return replace(
        annotation,
        size=annotation.size[::-1],
        semantic=turned(annotation.semantic),
        ids=turned(annotation.ids),
        segments=tuple(
            s if s.mask is None else replace(s, mask=Mask(s.mask.left, s.mask.top, s.mask.pixels.T))
            for s in annotation.segments
        ),
    )


def _split(annotation: Annotation, own: np.ndarray) -> Annotation:
    """Pieces of objects that have no pixel in `own` (H, W) bool as objects of their own."""
    from skimage.measure import label  # slow to import

    numbers = [s.id for s in annotation.segments if isinstance(s.id, int)]
    highest = 0 if annotation.ids is None else int(annotation.ids.max(initial=0))
    new = count(max([highest, *numbers]) + 1)
    ids = None if annotation.ids is None else annotation.ids.astype(np.int32)
    segments = []
    for segment, mask in zip(annotation.segments, annotation.masks(), strict=True):
        pieces = label(mask.pixels, connectivity=2)
        every = range(1, int(pieces.max(initial=0)) + 1)
        kept = set(pieces[mask.pixels & own[mask.window]].tolist()) or {1}
        apart = set() if segment.crowd else set(every) - kept
        groups = [(segment.id, [n for n in every if n not in apart])]
        groups += [(next(new), [n]) for n in sorted(apart)]
        for id, numbers in groups:
            piece = Mask.of(np.isin(pieces, numbers), mask.top, mask.left)
            if segment.mask is not None:
                segments.append(replace(_with_mask(segment, piece), id=id))
            else:
                segments.append(replace(segment, id=id))
                assert ids is not None
                ids[piece.window][piece.pixels] = id
    return replace(annotation, ids=ids, segments=tuple(segments))
