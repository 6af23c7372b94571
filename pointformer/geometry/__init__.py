"""Geometry of tokens: curves, balanced clustering, selection of centers, neighbor search."""

from pointformer.geometry.clustering import balanced_cluster
from pointformer.geometry.curves import hilbert_code, morton_code, snake_code
from pointformer.geometry.neighbors import knn, nearest_clusters, radius
from pointformer.geometry.selection import select_centers

__all__ = [
    "balanced_cluster",
    "hilbert_code",
    "knn",
    "morton_code",
    "nearest_clusters",
    "radius",
    "select_centers",
    "snake_code",
]
