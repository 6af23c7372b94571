"""Made-up archives of point sets: objects, and scenes far from the origin."""

import numpy as np


def write_objects(path, train=12, test=4, points=32, seed=0):
    """Long things and flat things."""
    rng = np.random.default_rng(seed)
    arrays = {"classes": np.array(["long", "flat"])}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % 2
        shapes = np.array([[0.1, 0.1, 1.0], [1.0, 1.0, 0.1]])[labels]
        xyz = rng.uniform(-1, 1, (count, points, 3)) * shapes[:, None]
        arrays[f"{split}_xyz"] = np.round(2047 * xyz).astype(np.int16)
        arrays[f"{split}_label"] = labels.astype(np.uint8)
    np.savez(path, **arrays)


def write_scenes(folder, count=3, points=200, seed=0):
    """Ground with boxes on it, far from the origin, in hundredths."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        xyz = rng.uniform(0, 20, (points, 3))
        high = (xyz[:, 0] % 5 < 2) & (xyz[:, 1] % 5 < 2)
        xyz[:, 2] = np.where(high, 4.0, 0.0) + rng.normal(0, 0.05, points)
        labels = 1 + high.astype(np.uint8)
        labels[:5] = 0
        np.savez(
            folder / f"scene{number}.npz",
            xyz_cm=np.round(100 * xyz).astype(np.int32),
            origin=np.array([800_000.0, 6_300_000.0, 100.0]),
            label=labels,
            split=(np.arange(points) % 10 // 8).astype(np.uint8),
            intensity=rng.integers(0, 60_000, points).astype(np.uint16),
            classes=np.array(["ignored", "ground", "box"]),
        )
