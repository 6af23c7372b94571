"""Data sets in folders: SPLIT/images/NAME.EXT beside SPLIT/instances/NAME.png."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pointformer.data.images import read_image, read_instances


@dataclass(frozen=True)
class Sample:
    """A picture (H, W, 3) uint8 and its instance map (H, W) int32, 0 being background."""

    name: str
    image: np.ndarray
    instances: np.ndarray


def load_split(root: str | os.PathLike[str], split: str) -> list[Sample]:
    """Read `root`/`split` into memory, sorted by name.

    Every file in its folder `images` needs an instance map of the same size and stem, as PNG, in
    its folder `instances`.

    Raises:
        ValueError: naming the folder or file, if there are no pictures, a map is missing or
            unreadable, or its size differs from the picture's.
    """
    folder = Path(root) / split
    paths = sorted(path for path in (folder / "images").glob("[!.]*") if path.is_file())
    if not paths:
        raise ValueError(f"{folder}: expected pictures in its folder 'images', found none")
    samples = []
    for path in paths:
        image = read_image(path)
        map_path = folder / "instances" / f"{path.stem}.png"
        instances = read_instances(map_path)
        if instances.shape != image.shape[:2]:
            raise ValueError(
                f"{map_path}: expected the picture's height and width {image.shape[:2]}, "
                f"got {instances.shape}"
            )
        samples.append(Sample(path.stem, image, instances))
    return samples
