"""Use the installed wheel, from outside the checkout: run and type-checked by `.ci/run`."""

import sys
from pathlib import Path

import torch

import pointformer
from pointformer import Clusters, TokenSet, balanced_cluster, nearest_clusters
from pointformer.models import Model, create_model, list_models

assert "site-packages" in Path(pointformer.__file__).parts, pointformer.__file__
assert "numba" not in sys.modules
assert "triton" not in sys.modules

tokens: TokenSet = TokenSet.from_grid(torch.rand(2, 16, 20, 30)).cluster(8)
clusters: Clusters = balanced_cluster(torch.rand(100, 3), 8)
assert tokens.clusters is not None
edges: torch.Tensor = nearest_clusters(tokens.positions, tokens.clusters).to_edge_index()
assert edges.shape == (2, 2 * 600 * 48), edges.shape

model: Model = create_model("aff_nano", num_classes=10)
with torch.no_grad():
    logits = model(torch.rand(1, 3, 64, 64))
assert logits.shape == (1, 10)
assert create_model("aff_nano.nuclei").trained is not None
names: list[str] = list_models()
print(f"wheel works: {len(names)} models, {clusters}, {tokens}")
