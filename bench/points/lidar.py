"""Classes of airborne lidar points: a model's scores, and those of boosted trees on features.

    python bench/points/lidar.py model FILE DATA [--voxels] [--write]
    python bench/points/lidar.py boosted DATA [--points N] [--iterations N] [--write]

IoU of the classes that are annotated, over the points of the validation and of the test tiles,
dense and sparse ones apart, and all together. A model sees regions
of a tile as in its training, trees the whole. `model` takes what training
wrote, `--voxels` one of `voxel.py`. `boosted` needs scikit-learn.

`--write` adds the line to results/points.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lines import add_options, prepare, report
from torch import Tensor
from voxel import use_voxels

from pointformer import TokenSet, knn, segment_reduce, voxel_pool
from pointformer.data.point_sets import PointAnnotation, PointDataset, read_scenes
from pointformer.metrics import SemanticIoU
from pointformer.models import create_model
from pointformer.prediction import predict_points
from pointformer.tasks import task_of

FEATURES = ("intensity", "return_number", "number_of_returns")
NEAREST = (8, 16, 32, 64)  # points that the features of a neighborhood are of
GROUND = (2.0, 8.0, 24.0)  # meters: sides of the cells whose lowest points are looked for
SPLITS = ("val", "test")


def dataset(data: Path, split: str) -> PointDataset:
    return read_scenes(data, split, features=FEATURES)


def features_of(tokens: TokenSet) -> np.ndarray:
    """(T, F) of each point: what it has itself, heights, and the shape of its neighborhoods."""
    positions = tokens.with_origin(None).positions
    z = positions[:, 2:]
    columns = [tokens.features]
    for side in GROUND:
        cells = voxel_pool(positions[:, :2].contiguous(), z.contiguous(), side, reduce="min")
        assert cells.features is not None
        around = knn(cells.positions, min(9, len(cells.positions)))
        lowest = cells.features[around].amin(1)
        columns.append(z - lowest[cells.assignment])
    nearest = knn(positions, NEAREST[-1])
    for k in NEAREST:
        columns.append(_shape(positions, nearest[:, :k]))
    return torch.cat(columns, 1).numpy()


def _shape(positions: Tensor, nearest: Tensor) -> Tensor:
    """(T, 9) of the k nearest points of each: eigenvalues of their scatter, heights, size."""
    count, k = nearest.shape
    offsets = positions[nearest] - positions[:, None]
    sizes = torch.arange(0, count * k + 1, k)
    mean = segment_reduce(offsets.reshape(-1, 3), "mean", offsets=sizes)
    centered = (offsets - mean[:, None]).double()
    scatter = centered.transpose(1, 2) @ centered / k
    values, vectors = torch.linalg.eigh(scatter)
    small, middle, large = values.clamp(min=0).float().sqrt().unbind(1)
    most = large.clamp(min=1e-6)
    heights = offsets[..., 2].reshape(-1, 1)
    lowest = segment_reduce(heights, "min", offsets=sizes)
    highest = segment_reduce(heights, "max", offsets=sizes)
    spread = segment_reduce(heights, "std", offsets=sizes)
    shape = [
        (large - middle) / most,  # as a line
        (middle - small) / most,  # as a plane
        small / most,  # as a ball
        small / (small + middle + large).clamp(min=1e-6),
        vectors[:, 2, 0].abs().float(),  # of the normal, upward
        large,
    ]
    return torch.cat([torch.stack(shape, 1), lowest, highest, spread], 1)


def scores(data: Path, predict: Callable[[PointAnnotation], np.ndarray]) -> dict[str, Any]:
    """IoU in percent by split and kind of tile."""
    found: dict[str, Any] = {}
    for split in SPLITS:
        tiles = dataset(data, split)
        names = [category.name for category in tiles.categories]
        groups: dict[str, SemanticIoU] = {}
        for index in range(len(tiles)):
            annotation = tiles[index]
            assert isinstance(annotation, PointAnnotation)
            predicted = predict(annotation)
            for group in (annotation.name.partition("_")[0], "all"):
                metric = groups.setdefault(group, SemanticIoU(len(names)))
                metric.update(predicted, annotation)  # type: ignore[arg-type]
        for group, metric in groups.items():
            values = metric.scores()
            # Of annotated classes alone, so that all methods are averaged over the same ones.
            iou = np.where(np.isnan(values.accuracy), np.nan, values.iou)
            found[f"{split}, {group}"] = {
                "mIoU": _percent(np.nanmean(iou)),
                "accuracy": _percent(values.pixel_accuracy),
                "IoU": {n: _percent(v) for n, v in zip(names, iou, strict=True)},
            }
    return found


def _percent(value: float) -> float | None:
    return None if np.isnan(value) else round(100 * float(value), 2)


def model(options: argparse.Namespace) -> dict[str, Any]:
    if options.voxels:
        use_voxels()
    trained = create_model(options.file).eval()
    learned: Any = trained.trained
    task = task_of(trained)
    start = time.process_time()
    found = scores(options.data, lambda a: predict_points(trained, task, a.tokens))
    return {
        "method": f"{trained.name}{', voxels' if options.voxels else ''}",
        "parameters": sum(p.numel() for p in trained.parameters()),
        **{name: learned[name] for name in ("steps", "minutes")},
        "seed": learned["recipe"]["seed"],
        "predict_cpu_seconds": round(time.process_time() - start, 1),
        "scores": found,
    }


def boosted(options: argparse.Namespace) -> dict[str, Any]:
    from sklearn.ensemble import HistGradientBoostingClassifier

    start = time.process_time()
    tables, labels = [], []
    tiles = dataset(options.data, "train")
    for index in range(len(tiles)):
        annotation = tiles[index]
        assert isinstance(annotation, PointAnnotation)
        tables.append(features_of(annotation.tokens))
        labels.append(annotation.classes())
    table, truth = np.concatenate(tables), np.concatenate(labels)
    featured = time.process_time() - start
    rng = np.random.default_rng(options.seed)
    rows = np.sort(rng.permutation(len(table))[: options.points])
    trees = HistGradientBoostingClassifier(
        max_iter=options.iterations, early_stopping=False, random_state=options.seed
    )
    trees.fit(table[rows], truth[rows])
    fitted = time.process_time() - start - featured
    found = scores(options.data, lambda a: trees.predict(features_of(a.tokens)).astype(np.int32))
    return {
        "method": "boosted trees",
        "features": table.shape[1],
        "points": len(rows),
        "iterations": options.iterations,
        "seed": options.seed,
        "features_cpu_seconds": round(featured, 1),
        "fit_cpu_seconds": round(fitted, 1),
        "scores": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    of_model = commands.add_parser("model")
    of_model.add_argument("file", help="a model's name or a file of one")
    of_model.add_argument("--voxels", action="store_true", help="of voxel.py")
    of_model.set_defaults(run=model)
    of_trees = commands.add_parser("boosted")
    of_trees.add_argument("--points", type=int, default=632_000, help="to learn from")
    of_trees.add_argument("--iterations", type=int, default=200)
    of_trees.set_defaults(run=boosted)
    for command in (of_model, of_trees):
        command.add_argument("data", type=Path, help="folder of the tiles")
        add_options(command)
    options = parser.parse_args()
    prepare(options)
    report("lidar", [options.run(options)], options)


if __name__ == "__main__":
    main()
