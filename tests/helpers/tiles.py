"""Made-up files of points, far from the origin, and a small model of points."""

from pathlib import Path

import laspy
import numpy as np
import torch

from pointformer.annotations import Category
from pointformer.data.points import write_points
from pointformer.models import create_model, save_model
from pointformer.tokens import TokenSet

CORNER = np.array([651_000.0, 6_861_000.0, 30.0])  # in a map projection, in meters
CLASSES = ("ground", "building", "odd thing")
TINY = {
    "dims": (16, 16),
    "depths": 1,
    "heads": (2, 2),
    "neighborhood_size": 16,
    "embed_neighbors": 6,
    "unit": 1.0,
}


def write_point_model(path, features=("intensity",), task="point_segmentation", **options):
    """The file of a model with the classes `CLASSES`, as training leaves it."""
    torch.manual_seed(0)
    categories = [Category(n + 1, c, False, (80 * n, 90, 200)) for n, c in enumerate(CLASSES)]
    model = create_model(
        "point_nano", head=task, num_classes=3, categories=categories,
        in_channels=len(features), **TINY, **options,
    )  # fmt: skip
    recipe = {"data": {"features": list(features)}}
    save_model(model, path, trained={"recipe": recipe})
    return str(path)


def write_cloud(path, count=60, intensity=True, world=None, point_format=6):
    """Points in the format of the suffix."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    if world is None:
        world = CORNER + rng.random((count, 3)) * [20, 30, 5]
    columns = {"intensity": rng.integers(1, 65_536, len(world)).astype(np.int32)}
    if path.suffix not in (".las", ".laz"):
        fields = {n: torch.from_numpy(rows) for n, rows in columns.items()} if intensity else {}
        write_points(path, TokenSet.from_world(torch.from_numpy(world), fields=fields))
        return path
    version = "1.4" if point_format >= 6 else "1.2"
    header = laspy.LasHeader(version=version, point_format=point_format)
    header.scales, header.offsets = np.full(3, 0.01), CORNER
    header.vlrs.append(laspy.VLR("owner", 4711, "of a survey", b"\1\2\3"))
    cloud = laspy.LasData(header)
    cloud.points = laspy.ScaleAwarePointRecord.zeros(len(world), header=header)
    cloud.x, cloud.y, cloud.z = world.T
    cloud.intensity, cloud.classification = columns["intensity"], np.full(len(world), 9)
    cloud.write(path)
    return path
