"""Reading pictures, instance maps and folders of them, and augmenting them."""

from pointformer.data.augment import random_colors, random_crop
from pointformer.data.folders import Sample, load_split
from pointformer.data.images import read_image, read_instances

__all__ = [
    "Sample",
    "load_split",
    "random_colors",
    "random_crop",
    "read_image",
    "read_instances",
]
