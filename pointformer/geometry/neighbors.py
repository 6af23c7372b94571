"""Exact nearest neighbors: the clusters around each token, and the k nearest points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointformer import reference
from pointformer._checks import check_finite, check_positions, check_sizes, describe
from pointformer._dispatch import choose
from pointformer.clusters import Clusters, Neighborhoods
from pointformer.reference.neighbors import squared_distance
