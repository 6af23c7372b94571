"""Random crops and colors for training on microscopy, a few milliseconds each."""

from __future__ import annotations

import numpy as np
from PIL import Image


def random_crop(
    image: np.ndarray,
    instances: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    scales: tuple[float, float] = (0.7, 1.6),
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of random place, scale, flip and quarter turn.

    Args:
        image: (H, W, 3) uint8.
        instances: (H, W) ids, 0 is background.
        size: height and width of the crop, in pixels.
        scales: least and largest magnification, drawn uniformly in its logarithm. Where a picture
            is too small, its mirror images continue it.

    Returns:
        (size, size, 3) uint8 colors and (size, size) integer instances. Mirror images that do not
        touch what they mirror have new ids.
    """
    scale = np.exp(rng.uniform(*np.log(scales)))
    side = max(1, round(size / scale))
    most = instances.max(initial=0)
    window = []
    for length in instances.shape:
        start = rng.integers(0, max(length - side, 0), endpoint=True)
        overhang = max(side - length, 0)
        before = rng.integers(0, overhang, endpoint=True)
        window.append((slice(start, start + side), (before, overhang - before)))
    (rows, row_pad), (columns, column_pad) = window
    image, instances = image[rows, columns], instances[rows, columns]
    if any(row_pad + column_pad):
        image = np.pad(image, (row_pad, column_pad, (0, 0)), "symmetric")
        from skimage.measure import label  # slow to import

        inside = np.pad(np.ones(instances.shape, bool), (row_pad, column_pad))
        instances = np.pad(instances, (row_pad, column_pad), "symmetric")
        # Mirror images are objects of their own, if they do not touch what they mirror.
        pieces = label(instances, connectivity=2)
        apart = (pieces > 0) & ~np.isin(pieces, pieces[inside])
        instances = np.where(apart, most + pieces, instances)
    if side != size:
        image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
        nearest = (np.arange(size) * 2 + 1) * side // (2 * size)
        instances = instances[nearest[:, None], nearest]
    turns = int(rng.integers(4))
    if rng.random() < 0.5:
        image, instances = image[:, ::-1], instances[:, ::-1]
    return np.rot90(image, turns), np.rot90(instances, turns)


def random_colors(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    invert: float = 0.15,
    grey: float = 0.15,
    noise: float = 0.2,
) -> np.ndarray:
    """Random gamma, contrast, brightness and color balance, and now and then more.

    Args:
        image: (H, W, 3) uint8.
        invert: probability of the negative (fluorescence is bright on black, stains are dark on
            white).
        grey: probability of dropping the colors.
        noise: probability of adding Gaussian noise.

    Returns:
        (H, W, 3) uint8.
    """
    if rng.random() < grey:
        image = np.repeat(np.asarray(Image.fromarray(image).convert("L"))[..., None], 3, axis=2)
    # Grey pictures stay grey: the channels' curves differ only where the channels do.
    spread = 0.1 if (image[..., 0] != image[..., 2]).any() else 0.0
    levels = np.linspace(0, 1, 256)
    if rng.random() < invert:
        levels = 1 - levels
    levels = levels ** np.exp(rng.normal(0, 0.3))
    gains = np.exp(rng.normal(0, 0.2) + rng.normal(0, spread, 3))
    curves = gains[:, None] * levels + rng.normal(0, 0.04)
    curves = np.clip(np.rint(curves * 255), 0, 255).astype(np.uint8)
    colored = np.asarray(Image.fromarray(image).point(curves.ravel().tolist()))
    if rng.random() < noise:
        amplitude = rng.uniform(1, 12)
        grain = (rng.standard_normal(image.shape[:2], dtype=np.float32) * amplitude)[..., None]
        colored = np.clip(colored + grain, 0, 255).astype(np.uint8)
    return colored
