"""Random changes of pictures for training, which what is annotated follows.

A transform is called with a picture (H, W, 3) uint8, its `Annotation` and a generator of random
numbers, and returns both; it writes to neither. Equal generators give equal results, bit for bit.
Pixels of maps and masks are those nearest to the new pixels' centers. Segments that a crop leaves
no pixel of are dropped, the others have their areas anew.

Probabilities and shares are from 0 to 1. What cannot be is a `ValueError` when a transform is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from pointformer._checks import check_count, check_number
from pointformer.annotations import VOID, Mask, Segment
from pointformer.data.annotations import Annotation

Sample = tuple[np.ndarray, Annotation]
Interpolation = Literal["bilinear", "bicubic"]
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_GRAY = 128


class Transform(Protocol):
    """A random change of a picture and its annotation; may return them as they are."""

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


class _Checked:
    """Checks of fields by their names."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            name, value = field.name, getattr(self, field.name)
            if name in ("size", "short", "longest", "choices"):
                for side in value if isinstance(value, tuple | list) else (value,):
                    if side is not None:
                        check_count(name, side)
            elif name in ("scales", "areas", "ratios"):
                if len(value) != 2 or not 0 < value[0] <= value[1]:
                    raise ValueError(
                        f"{name}: expected two positive numbers that rise, got {tuple(value)}"
                    )
            elif name == "operations":
                check_count(name, value, least=0)
            elif name in ("magnitude", "spread"):
                check_number(name, value, least=0, most=10)
            elif name in ("mixup", "cutmix"):
                check_number(name, value, least=0)
            elif isinstance(value, float | int) and not isinstance(value, bool):
                check_number(name, value, least=0, most=1)


@dataclass(frozen=True)
class RandomCrop(_Checked):
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
        choices: draw one of so many scales at equal distances, the least and the largest with
            them; `None`: any in between.
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
    choices: int | None = None
    logarithmic: bool = False
    beyond: Literal["void", "mirror"] = "void"
    interpolation: Interpolation = "bilinear"

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        size, shape = _pair(self.size), image.shape[:2]
        least, largest = np.log(self.scales) if self.logarithmic else self.scales
        if self.choices is None:
            scale = float(rng.uniform(least, largest))
        else:
            scale = float(rng.choice(np.linspace(least, largest, self.choices)))
        scale = float(np.exp(scale)) if self.logarithmic else scale
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
class RandomResizedCrop(_Checked):
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

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        height, width = image.shape[:2]
        place = _random_rectangle((height, width), self.areas, self.ratios, rng)
        if place is None:  # a long picture: the largest window of an allowed shape, in the middle
            least, largest = self.ratios
            ratio = min(max(width / height, least), largest)
            rows = max(1, min(height, round(width / ratio)))
            columns = max(1, min(width, round(height * ratio)))
            place = ((height - rows) // 2, rows), ((width - columns) // 2, columns)
        return _window(image, annotation, *place, _pair(self.size), self.interpolation)


@dataclass(frozen=True)
class RandomFlip(_Checked):
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
class RandomCurves(_Checked):
    """Random gamma, contrast, brightness and color balance, and now and then more: for pictures
    from microscopes, which differ in stain and light.

    Attributes:
        invert: probability of the negative (fluorescence is bright on black, stains are dark on
            white).
        gray: probability of dropping the colors.
        noise: probability of adding Gaussian noise.
        hot: probability of white pixels here and there, at most 2% of all, as cameras have them: a
            model that has not seen any takes them for small objects.
    """

    invert: float = 0.15
    gray: float = 0.15
    noise: float = 0.2
    hot: float = 0.1

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
        colored = np.array(Image.fromarray(image).point(curves.ravel().tolist()))
        if rng.random() < self.noise:
            amplitude = rng.uniform(1, 12)
            grain = (rng.standard_normal(image.shape[:2], dtype=np.float32) * amplitude)[..., None]
            colored = np.clip(colored + grain, 0, 255).astype(np.uint8)
        if rng.random() < self.hot:
            colored[rng.random(image.shape[:2]) < rng.uniform(0, 0.02)] = 255
        return colored, annotation


@dataclass(frozen=True)
class ColorJitter(_Checked):
    """Random brightness, contrast, saturation and hue, as SSD was trained with (Liu et al. 2016).

    Attributes:
        brightness: at most such a share of the range from black to white is added.
        contrast, saturation: factors are in 1 - this to 1 + this.
        hue: at most such a share of a turn; 18 of OpenCV's 180 levels, as published.
        probability: of each of the four.
    """

    brightness: float = 32 / 255
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 18 / 180
    probability: float = 0.5

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        chosen = rng.random(4) < self.probability
        limits = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        drawn = np.where(chosen, limits * rng.uniform(-1, 1, 4), 0)
        shift, contrast, saturation, turn = (drawn + np.array([0, 1, 1, 0])).tolist()
        levels = np.arange(256)
        early = rng.random() < 0.5  # the contrast, which clips
        image = _levels(image, levels * (contrast if early else 1) + 255 * shift)
        if turn or saturation != 1:
            hue, colorfulness, value = Image.fromarray(image).convert("HSV").split()
            hue = hue.point(((levels + round(256 * turn)) % 256).tolist())
            colorfulness = colorfulness.point(np.clip(levels * saturation, 0, 255).tolist())
            image = np.array(Image.merge("HSV", (hue, colorfulness, value)).convert("RGB"))
        return _levels(image, levels * (1 if early else contrast)), annotation


def _levels(image: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """A picture whose 256 levels are others."""
    table = np.clip(np.rint(levels), 0, 255).astype(int).tolist()
    return np.array(Image.fromarray(image).point(table * 3))


@dataclass(frozen=True)
class RandAugment(_Checked):
    """A few operations, each chosen at random among many (Cubuk et al. 2020).

    Where places are annotated the operations are those of colors only. They are Pillow's, with the
    strengths of the recipes that transformers such as AFF are trained with: what grows with the
    magnitude is the distance from the picture as it is, in a random direction.

    Attributes:
        operations: how many.
        magnitude: their strength, 0 to 10.
        spread: standard deviation of the magnitude.
        probability: of each operation being done at all.
    """

    operations: int = 2
    magnitude: float = 9.0
    spread: float = 0.5
    probability: float = 0.5

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        possible = _COLOR_OPERATIONS if _has_places(annotation) else _OPERATIONS
        picture = Image.fromarray(image)
        for _ in range(self.operations):
            operation = possible[rng.integers(len(possible))]
            level = np.clip(rng.normal(self.magnitude, self.spread), 0, 10) / 10
            level *= 1 if rng.random() < 0.5 else -1
            if rng.random() < self.probability:
                picture = operation(picture, float(level))
        return np.array(picture), annotation


def _has_places(annotation: Annotation) -> bool:
    maps = annotation.semantic, annotation.ids
    return bool(annotation.segments) or any(values is not None for values in maps)


def _enhanced(
    enhancer: Callable[[Image.Image], Any],
) -> Callable[[Image.Image, float], Image.Image]:
    return lambda picture, level: enhancer(picture).enhance(max(0.1, 1 + 0.9 * level))


def _moved(picture: Image.Image, *matrix: float) -> Image.Image:
    """The picture at `matrix` @ (x, y, 1), coordinates relative to the center."""
    x, y = picture.width / 2, picture.height / 2
    a, b, c, d, e, f = matrix
    about_center = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        about_center,
        Image.Resampling.BILINEAR,
        fillcolor=(_GRAY,) * 3,
    )


def _turned(picture: Image.Image, level: float) -> Image.Image:
    angle = np.deg2rad(30 * level)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return _moved(picture, cos, -sin, 0, sin, cos, 0)


_COLOR_OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda picture, _: ImageOps.autocontrast(picture),
    lambda picture, _: ImageOps.equalize(picture),
    lambda picture, _: ImageOps.invert(picture),
    lambda picture, level: ImageOps.posterize(picture, max(1, 4 - int(4 * abs(level)))),
    lambda picture, level: ImageOps.solarize(picture, 256 - int(256 * abs(level))),
    lambda picture, level: picture.point(
        [v + (int(110 * abs(level)) if v < 128 else 0) for v in range(256)] * 3
    ),
    _enhanced(ImageEnhance.Color),
    _enhanced(ImageEnhance.Contrast),
    _enhanced(ImageEnhance.Brightness),
    _enhanced(ImageEnhance.Sharpness),
)
_OPERATIONS = (
    *_COLOR_OPERATIONS,
    _turned,
    lambda picture, level: _moved(picture, 1, 0.3 * level, 0, 0, 1, 0),
    lambda picture, level: _moved(picture, 1, 0, 0, 0.3 * level, 1, 0),
    lambda picture, level: _moved(picture, 1, 0, 0.45 * level * picture.width, 0, 1, 0),
    lambda picture, level: _moved(picture, 1, 0, 0, 0, 1, 0.45 * level * picture.height),
)


@dataclass(frozen=True)
class RandomErasing(_Checked):
    """Noise in the place of a rectangle (Zhong et al. 2020); what is annotated stays.

    Attributes:
        probability: of erasing.
        areas: least and largest share of the picture's area.
        ratios: least and largest width over height, drawn in the logarithm.
    """

    probability: float = 0.25
    areas: tuple[float, float] = (0.02, 1 / 3)
    ratios: tuple[float, float] = (0.3, 1 / 0.3)

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        if rng.random() >= self.probability:
            return image, annotation
        place = _random_rectangle(image.shape[:2], self.areas, self.ratios, rng)
        if place is None:
            return image, annotation
        (top, height), (left, width) = place
        # Of the spread of natural pictures, as normalization makes it 1.
        noise = _GRAY + 57 * rng.standard_normal((height, width, 3), np.float32)
        image = image.copy()
        image[top : top + height, left : left + width] = np.clip(noise, 0, 255)
        return image, annotation


@dataclass(frozen=True)
class Resize(_Checked):
    """The whole picture in another size.

    Attributes:
        size: height and width in pixels; one number is the shorter side, and the shape stays.
        longest: the longer side has at most so many pixels, where `size` is one number.
        interpolation: of the picture; antialiased.
    """

    size: int | tuple[int, int]
    longest: int | None = None
    interpolation: Interpolation = "bicubic"

    def size_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a picture of this height and width gets."""
        if not isinstance(self.size, int):
            return _pair(self.size)
        scale = self.size / min(shape)
        if self.longest is not None:
            scale = min(scale, self.longest / max(shape))
        height, width = (max(1, round(side * scale)) for side in shape)
        return height, width

    def __call__(
        self, image: np.ndarray, annotation: Annotation, rng: np.random.Generator
    ) -> Sample:
        height, width = image.shape[:2]
        size = self.size_of((height, width))
        return _window(image, annotation, (0, height), (0, width), size, self.interpolation)


@dataclass(frozen=True)
class CenterCrop(_Checked):
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


@dataclass(frozen=True)
class Mix(_Checked):
    """Mixtures of two pictures each in a batch: mixup (Zhang et al. 2018) or CutMix (Yun et al.
    2019), for the classes of pictures.

    Pictures are mixed with their neighbors, two by two, so that the parts of a batch that several
    processes have are mixed as the whole would be, if they are even.

    Attributes:
        mixup, cutmix: shares of the first picture are drawn from a beta distribution with both
            parameters equal to this; 0: never.
        probability: of mixing a batch at all.
        switch: probability of CutMix where both are possible.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
        """Mix a batch; all of it alike.

        Args:
            images: (B, 3, H, W) float.

        Returns:
            The mixtures; (B,) int64, which picture each is mixed with; and the share of the first,
            so that the loss is that share of the loss for a picture's own class, the rest for the
            other's.
        """
        partners = torch.arange(len(images), device=images.device)
        partners[: len(images) // 2 * 2] ^= 1
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch)
        strength = self.cutmix if cut else self.mixup
        if strength == 0 or rng.random() >= self.probability:
            return images, partners, 1.0
        share = float(rng.beta(strength, strength))
        if not cut:
            return images[partners].lerp(images, share), partners, share
        height, width = images.shape[2:]
        ends = []
        for side in (height, width):
            middle, half = int(rng.integers(side)), int(side * (1 - share) ** 0.5) // 2
            ends.append(slice(max(middle - half, 0), min(middle + half, side)))
        rows, columns = ends
        mixed = images.clone()
        mixed[:, :, rows, columns] = images[partners][:, :, rows, columns]
        covered = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, partners, 1 - covered / (height * width)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _random_rectangle(
    shape: tuple[int, int],
    areas: tuple[float, float],
    ratios: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """First row and height, first column and width; `None` if none is found that fits."""
    for _ in range(10):
        area = shape[0] * shape[1] * rng.uniform(*areas)
        ratio = float(np.exp(rng.uniform(*np.log(ratios))))
        height, width = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if 0 < height <= shape[0] and 0 < width <= shape[1]:
            top = int(rng.integers(shape[0] - height, endpoint=True))
            left = int(rng.integers(shape[1] - width, endpoint=True))
            return (top, height), (left, width)
    return None


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
        return resized(image, size, interpolation), _without_empty(changed)
    (top, bottom), row_place, row_map = _inside(rows, height, size[0])
    (left, right), column_place, column_map = _inside(columns, width, size[1])
    picture = image[top:bottom, left:right]
    wanted = row_place.stop - row_place.start, column_place.stop - column_place.start
    if wanted == size:
        canvas = resized(picture, size, interpolation)
    else:
        canvas = np.full((*size, 3), _GRAY, np.uint8)
        if picture.size and min(wanted):
            canvas[row_place, column_place] = resized(picture, wanted, interpolation)
    return canvas, _without_empty(_resampled(annotation, row_map, column_map))


def resized(image: np.ndarray, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """A picture (H, W, 3) uint8 in another size, antialiased."""
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
    """Annotation at these rows and columns; nothing at those that are -1."""
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
