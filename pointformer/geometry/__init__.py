"""Geometry of tokens: curves, balanced clustering, selection of centers,
neighbor search, sampling."""

from pointformer.geometry.clustering import balanced_cluster
from pointformer.geometry.curves import hilbert_code, morton_code, peano_code, snake_code
from pointformer.geometry.neighbors import knn, nearest_clusters, radius
from pointformer.geometry.sampling import curve_sample, farthest_point_sample, random_sample
from pointformer.geometry.selection import best_of_runs, select_centers, spread_scores
from pointformer.geometry.voxel import Voxels, voxel_pool

__all__ = [
    "Voxels",
    "balanced_cluster",
    "best_of_runs",
    "curve_sample",
    "farthest_point_sample",
    "hilbert_code",
    "knn",
    "morton_code",
    "nearest_clusters",
    "peano_code",
    "radius",
    "random_sample",
    "select_centers",
    "snake_code",
    "spread_scores",
    "voxel_pool",
]
