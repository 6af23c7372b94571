"""Wrong arguments of all public functions: one line that names the argument, or a documented use.

`CALLS` has good arguments of each public function and method. The test puts every kind of wrong
value in the place of each of them. What is accepted all the same is in `ACCEPTED`, with the reason.
"""

import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import pointformer
import pointformer.models
import pointformer.nn
from pointformer import (
    Clusters,
    Neighborhoods,
    Segmentation,
    TokenSet,
    balanced_cluster,
    integrations,
    knn,
    nearest_clusters,
)
from pointformer._dispatch import choose, lacks_nothing
from pointformer.annotations import Category
from pointformer.models import (
    AFFConfig,
    GridBackbone,
    Model,
    PointConfig,
    PointPreprocess,
    SwinConfig,
)
from pointformer.segmentation.segment import open_picture

R = {"impl": "reference"}
POSITIONS = torch.rand(24, 2, generator=torch.Generator().manual_seed(0))
BATCH = torch.arange(24) // 12
FEATURES = torch.rand(24, 8, generator=torch.Generator().manual_seed(1))
HEADS = FEATURES.view(24, 2, 4)
TOKENS = TokenSet(POSITIONS, FEATURES, (12, 12), (1.0, 1.0)).cluster(4, **R)
AROUND = nearest_clusters(TOKENS.positions, TOKENS.clusters, 2, **R)
INDEX = knn(POSITIONS, 3, **R)
GRID = TokenSet.from_grid(torch.rand(2, 3, 4, 4))
NET = {
    "weight": torch.ones(4, 5),
    "bias": torch.ones(4),
    "norm_weight": torch.ones(4),
    "norm_bias": torch.zeros(4),
    "eps": 1e-5,
}
CLUSTERING = {
    "cluster_size": 4,
    "curve": "morton",
    "anchors": True,
    "remainder": "last",
    "global_size": 0,
    "adaptive": True,
    "check_values": True,
    **R,
}
AFF = {
    "dims": (8, 8),
    "depths": (1, 1),
    "heads": (2, 2),
    "mlp_ratio": 1.0,
    "cluster_size": 4,
    "neighborhood_size": (8, 8),
    "reach": (8, 16),
    "rate": 0.25,
    "alpha": 4.0,
    "image_size": 32,
    "patch_stride": 4,
    "layer_scale": 0.1,
    "drop_path": 0.1,
    "merge_center": True,
    "ranking": "gradient",
    "spread": 0.5,
    "in_channels": 3,
    "curve": "hilbert",
    "anchors": True,
    "remainder": "spread",
    "scope": "token",
    "include_own": False,
    "prior": "grid",
    "reserve": True,
    "reserve_share": 0.5,
    "expanded_position": True,
    "blank_token": True,
    "merge": "adaptive",
}
SWIN = {name: AFF[name] for name in inspect.signature(SwinConfig).parameters if name in AFF}
SWIN["patch_merge"] = 2
MODEL = {
    "name": "small",
    "config": AFFConfig(**AFF),
    "head": "dense",
    "num_classes": 3,
    **R,
    "task": "instance",
    "categories": [Category("nucleus", (0, 0, 0))],
}
SMALL = Model(**MODEL).eval()
POINT = {
    **{name: AFF[name] for name in ("dims", "depths", "heads", "neighborhood_size")},
    **{"mlp_ratio": 1.5, "cluster_size": 4, "rate": 0.5, "layer_scale": 0.5, "drop_path": 0.5},
    **{"in_channels": 2, "dimensions": 3, "coordinates": "z", "unit": 0.5, "embed_neighbors": 3},
    **{"curve": "morton", "points": 64},
}
SMALL_POINTS = Model("small", PointConfig(**POINT), "point_segmentation", 3, **R).eval()
CLOUD = TokenSet(torch.rand(24, 3), FEATURES[:, :2], (12, 12))
TRAINED = Model(**MODEL).eval()
TRAINED.object_diameter = 8.0
FOREIGN = GridBackbone(nn.Identity(), (8, 8))
WEIGHTS = Path(pointformer.models.__file__).parent / "weights/aff_nano.nuclei.safetensors"
PIXELS = np.zeros((16, 16, 3), np.uint8)
FOUND = Segmentation(open_picture(PIXELS), np.eye(2, dtype=np.int32), (4,), 0.1, (0,), (1.0,))


def made(**changes):
    return {**MODEL, "config": FOREIGN, "task": "panoptic", "categories": None, **changes}


# By name; what stands in parentheses tells several calls of one function apart.
LISTING = {
    "num_clusters": 2,
    "scope": "tile",
    "tile_size": 4,
    "include_own": True,
    "check_values": True,
    **R,
}
CALLS = {
    "TokenSet": (
        TokenSet,
        {
            "positions": TOKENS.positions,
            "features": TOKENS.features,
            "sizes": (12, 12),
            "extent": (1.0, 1.0),
            "origin": torch.zeros(2, 2, dtype=torch.float64),
            "clusters": TOKENS.clusters,
            "same_positions": False,
            "fields": {"label": torch.zeros(24, dtype=torch.int64)},
            "batch": None,
        },
    ),
    "TokenSet (batch)": (
        lambda batch=None: TokenSet(POSITIONS, batch=batch),
        {"batch": BATCH},
    ),
    "TokenSet.with_features": (TOKENS.with_features, {"features": FEATURES}),
    "TokenSet.with_fields": (TOKENS.with_fields, {"label": torch.zeros(24, 2)}),
    "TokenSet.with_positions": (
        TOKENS.with_positions,
        {"positions": POSITIONS, "extent": (1.0, 1.0)},
    ),
    "TokenSet.map": (TOKENS.map, {"function": torch.relu}),
    "TokenSet.sample": (TOKENS.sample, {"b": 1}),
    "TokenSet.select": (
        TOKENS.select,
        {
            "index": torch.tensor([0, 3, 12, 13, 14, 20]),
            "sizes": (2, 4),
            "features": FEATURES[:6],
            "check_values": True,
        },
    ),
    "TokenSet.cluster": (TOKENS.cluster, CLUSTERING),
    "TokenSet.interpolate_to": (
        TOKENS.interpolate_to,
        {"target": TOKENS, "k": 3, "power": 2.0, "check_values": True, **R},
    ),
    "TokenSet.neighborhoods": (TOKENS.neighborhoods, LISTING),
    "TokenSet.from_world": (
        TokenSet.from_world,
        {
            "positions": POSITIONS.double(),
            "features": FEATURES,
            "sizes": (12, 12),
            "extent": (1.0, 1.0),
            "origin": torch.zeros(2, 2, dtype=torch.float64),
            "fields": {"label": torch.zeros(24, dtype=torch.int64)},
            "batch": None,
        },
    ),
    "TokenSet.with_origin": (
        TOKENS.with_origin,
        {"origin": torch.zeros(2, 2, dtype=torch.float64)},
    ),
    "TokenSet.from_grid": (TokenSet.from_grid, {"maps": torch.rand(2, 3, 4, 4)}),
    "TokenSet.from_grid (list)": (TokenSet.from_grid, {"maps": [torch.rand(3, 4, 4)]}),
    "TokenSet.to_grid": (GRID.to_grid, {"fill": 0.0, "check_values": True}),
    "TokenSet.cat": (TokenSet.cat, {"sets": [GRID, GRID]}),
    "TokenSet.from_list": (TokenSet.from_list, {"samples": [GRID, GRID]}),
    "TokenSet.to": (
        TOKENS.to,
        {"device": "cpu", "dtype": torch.float32, "non_blocking": False},
    ),
    "collate": (pointformer.collate, {"samples": [GRID, GRID]}),
    "Neighborhoods.with_plan": (AROUND.with_plan, {"training": True, **R}),
    "Neighborhoods.from_lists": (
        Neighborhoods.from_lists,
        {"neighbor_index": INDEX, "positions": POSITIONS, "check_values": True},
    ),
    "Neighborhoods.nearest": (AROUND.nearest, {"num_clusters": 2}),
    "Neighborhoods.thinned": (AROUND.thinned, {"num_clusters": 2}),
    "Neighborhoods.select": (AROUND.select, {"rows": torch.arange(3)}),
    "Segmentation.class_name": (FOUND.class_name, {"id": 1}),
    "balanced_cluster": (
        balanced_cluster,
        {
            "positions": POSITIONS,
            "sizes": (12, 12),
            "batch": None,
            "extent": (1.0, 1.0),
            "origin": (0.0, 0.0),
            "same_positions": False,
            **CLUSTERING,
        },
    ),
    "batch_from_sizes": (pointformer.batch_from_sizes, {"sizes": (12, 12), "device": "cpu"}),
    "sizes_from_batch": (
        pointformer.sizes_from_batch,
        {"batch": torch.tensor([0, 0, 1]), "batch_size": 2},
    ),
    "sizes_from_ptr": (pointformer.sizes_from_ptr, {"ptr": torch.tensor([0, 2, 3])}),
    "deformable_attention": (
        pointformer.deformable_attention,
        {
            "value": HEADS,
            "positions": POSITIONS,
            "offsets": torch.zeros(3, 2, 1, 2, 2),
            "weights": torch.ones(3, 2, 1, 2),
            "query_positions": POSITIONS[:3],
            "query_sample": torch.tensor([0, 0, 1]),
            "lookup": torch.zeros(8, 1, 2, dtype=torch.int64),
            "extent": (2, 2),
            "power": 2.0,
            "eps": 1e-9,
            **R,
        },
    ),
    "interpolate": (
        pointformer.interpolate,
        {
            "features": FEATURES,
            "positions": POSITIONS,
            "query_positions": POSITIONS,
            "sizes": (12, 12),
            "batch": None,
            "query_sizes": (12, 12),
            "query_batch": None,
            "neighbor_index": INDEX,
            "k": 3,
            "power": 2.0,
            "eps": 1e-9,
            "same_positions": False,
            "check_values": True,
            **R,
        },
    ),
    "interpolate (learned power)": (
        lambda power: pointformer.interpolate(
            FEATURES, POSITIONS, POSITIONS, neighbor_index=INDEX, power=power, **R
        ),
        {"power": torch.ones((), requires_grad=True)},
    ),
    "knn": (
        knn,
        {
            "positions": POSITIONS,
            "k": 2,
            "query_positions": POSITIONS,
            "sizes": (12, 12),
            "batch": None,
            "query_sizes": (12, 12),
            "query_batch": None,
            "include_self": True,
            "return_distance": True,
            "along_curve": True,
            "same_positions": False,
            "check_values": True,
            **R,
        },
    ),
    "radius": (
        pointformer.radius,
        {
            "positions": POSITIONS,
            "r": 0.5,
            "k": 2,
            "query_positions": POSITIONS,
            "sizes": (12, 12),
            "batch": None,
            "query_sizes": (12, 12),
            "query_batch": None,
            "include_self": True,
            "return_distance": True,
            "along_curve": True,
            "same_positions": False,
            "check_values": True,
            **R,
        },
    ),
    **{
        name: (
            getattr(pointformer, name),
            {
                "positions": POSITIONS,
                **size,
                "k": 2,
                "sizes": (12, 12),
                "batch": None,
                "loop": False,
                "flow": "target_to_source",
                "along_curve": True,
                "check_values": True,
                **R,
            },
        )
        for name, size in (("knn_graph", {}), ("radius_graph", {"r": 0.5}))
    },
    "farthest_point_sample": (
        pointformer.farthest_point_sample,
        {
            "positions": POSITIONS,
            "count": 2,
            "sizes": (12, 12),
            "batch": None,
            "start": 1,
            "generator": None,
            "check_values": True,
            **R,
        },
    ),
    "farthest_point_sample (rate)": (
        lambda rate: pointformer.farthest_point_sample(POSITIONS, rate=rate, **R),
        {"rate": 0.5},
    ),
    "farthest_point_sample (generator)": (
        lambda generator=None: pointformer.farthest_point_sample(
            POSITIONS, rate=0.5, generator=generator, **R
        ),
        {"generator": torch.Generator()},
    ),
    "curve_sample": (
        pointformer.curve_sample,
        {
            "positions": POSITIONS,
            "rate": 0.5,
            "sizes": (12, 12),
            "batch": None,
            "curve": "morton",
            "check_values": True,
            **R,
        },
    ),
    "curve_sample (count)": (
        lambda count: pointformer.curve_sample(POSITIONS, count=count, **R),
        {"count": 3},
    ),
    "random_sample": (
        pointformer.random_sample,
        {"sizes": (12, 12), "rate": 0.5, "generator": torch.Generator(), "device": "cpu"},
    ),
    "random_sample (count)": (
        lambda count: pointformer.random_sample((12, 12), count=count),
        {"count": (3, 4)},
    ),
    "voxel_pool": (
        pointformer.voxel_pool,
        {
            "positions": POSITIONS,
            "features": FEATURES,
            "side": 0.25,
            "sizes": (12, 12),
            "batch": None,
            "reduce": "max",
            "check_values": True,
            **R,
        },
    ),
    "to_edge_index": (
        pointformer.to_edge_index,
        {"neighbor_index": INDEX, "flow": "target_to_source"},
    ),
    "knn (batch)": (
        lambda batch=None, query_batch=None: knn(
            POSITIONS, 2, query_positions=POSITIONS, batch=batch, query_batch=query_batch, **R
        ),
        {"batch": BATCH, "query_batch": BATCH},
    ),
    "nearest_clusters": (
        nearest_clusters,
        {
            "positions": TOKENS.positions,
            "clusters": TOKENS.clusters,
            **LISTING,
        },
    ),
    "neighborhood_attention": (
        pointformer.neighborhood_attention,
        {
            "query": HEADS,
            "key": HEADS,
            "value": HEADS,
            "positions": TOKENS.positions,
            "neighborhoods": AROUND,
            "query_positions": TOKENS.positions,
            "position_weight": torch.ones(2, 5),
            "position_value": torch.ones(2, 4, 5),
            "position_bias": torch.ones(2),
            "blank_key": torch.ones(2, 4),
            "blank_value": torch.ones(2, 4),
            "scale": 0.5,
            **R,
        },
    ),
    "point_conv": (
        pointformer.point_conv,
        {
            "features": FEATURES,
            "positions": POSITIONS,
            "neighbor_index": INDEX,
            "center_positions": POSITIONS,
            **NET,
            "check_values": True,
            **R,
        },
    ),
    "scored_merge": (
        pointformer.scored_merge,
        {
            "features": TOKENS.features,
            "scores": FEATURES[:, 0],
            "positions": TOKENS.positions,
            "center_index": torch.arange(3),
            "neighborhoods": AROUND,
            **NET,
            **R,
        },
    ),
    "segment": (
        pointformer.segment,
        {
            "model": SMALL,
            "image": PIXELS,
            "tile": 16,
            "overlap": 2,
            "min_score": 0.5,
            "scale": 1.0,
            "diameter": None,
            "budget": None,
            "channel": (0, 1, 2),
            "plane": 0,
            "project": "max",
            "intensities": "full",
            "max_pixels": 2**20,
        },
    ),
    "segment (diameter)": (
        lambda diameter: pointformer.segment(TRAINED, PIXELS, diameter=diameter),
        {"diameter": 8.0},
    ),
    "select_centers": (
        pointformer.select_centers,
        {
            "scores": torch.rand(32),
            "positions": GRID.positions,
            "sizes": (16, 16),
            "batch": None,
            "extent": (4, 4),
            "rate": 0.25,
            "alpha": 4.0,
            "stride": 2,
            "prior": "grid",
            "reserve": True,
            "reserve_share": 0.5,
            "origin": (0.0, 0.0),
            "lattice": True,
            "along_curve": True,
            "check_values": True,
            **R,
        },
    ),
    "spread_scores": (
        pointformer.spread_scores,
        {
            "scores": torch.rand(32),
            "positions": GRID.positions,
            "sizes": (16, 16),
            "batch": None,
            "spread": 0.5,
            "neighbors": 4,
            "along_curve": True,
            "check_values": True,
            **R,
        },
    ),
    "best_of_runs": (
        pointformer.best_of_runs,
        {"scores": torch.rand(32), "batch": None, "rate": 0.25, "check_values": True},
    ),
    "best_of_runs (sizes)": (
        lambda sizes: pointformer.best_of_runs(torch.rand(32), sizes=sizes, rate=0.25),
        {"sizes": (16, 16)},
    ),
    "select_centers (free)": (
        lambda stride: pointformer.select_centers(
            FEATURES[:, 0], POSITIONS, rate=0.5, stride=stride, lattice=False, **R
        ),
        {"stride": 0.5},
    ),
    **{
        f"{name} ({next(iter(way))})": (
            getattr(pointformer, name),
            {"values": FEATURES, **way, **rest, "check_values": True, **R},
        )
        for name, rest in (
            ("segment_reduce", {"reduce": "max", "correction": 1}),
            ("segment_softmax", {}),
            ("segment_logsumexp", {}),
        )
        for way in (
            {"sizes": (12, 12)},
            {"offsets": torch.tensor([0, 7, 24])},
            {"index": torch.arange(24) // 8, "count": 3},
        )
    },
    "weighted_gather": (
        pointformer.weighted_gather,
        {"features": FEATURES, "index": INDEX, "weights": torch.ones(24, 3), **R},
    ),
    "add_norm": (
        pointformer.add_norm,
        {
            "x": FEATURES, "branch": FEATURES, "weight": FEATURES[0], "bias": FEATURES[0],
            "scale": FEATURES[0], "eps": 1e-5, **R,
        },
    ),
    "models.AFFConfig": (AFFConfig, AFF),
    "models.SwinConfig": (SwinConfig, {**SWIN, "window_size": 4}),
    "models.PointConfig": (PointConfig, POINT),
    "models.PointPreprocess": (PointPreprocess, {"unit": 0.5}),
    "models.PointPreprocess.forward": (PointPreprocess().forward, {"tokens": TOKENS}),
    "models.Model.forward (points)": (SMALL_POINTS.forward, {"images": CLOUD, "with_stages": True}),
    "nn.Block": (
        pointformer.nn.Block,
        {
            "attention": pointformer.nn.NeighborhoodAttention(8, 2),
            **{"dim": 8, "hidden": 16, "layer_scale": 0.5, "drop_path_rate": 0.5},
        },
    ),
    "nn.WeightNet": (pointformer.nn.WeightNet, {"features": 5, "mid": 4}),
    "nn.init_linear": (pointformer.nn.init_linear, {"module": nn.Linear(2, 2)}),
    "nn.NeighborhoodAttention": (
        pointformer.nn.NeighborhoodAttention,
        {
            "dim": 8,
            "heads": 2,
            "dimensions": 3,
            "expanded_position": True,
            "blank_token": True,
            "relative_value": True,
        },
    ),
    "nn.PointConv": (
        pointformer.nn.PointConv,
        {"dim": 8, "out_dim": 8, "k": 4, "mid": 4, "dimensions": 3},
    ),
    "nn.ScoredMerge": (
        pointformer.nn.ScoredMerge,
        {"dim": 8, "out_dim": 8, "mid": 4, "dimensions": 3, "expanded_position": True}
        | {"center": True},
    ),
    "models.GridBackbone": (
        GridBackbone,
        {"module": nn.Identity(), "dims": (8, 8), "in_channels": 3, "image_size": 32},
    ),
    "models.Model": (Model, {**MODEL, "channels": 8, "pixel_channels": 4}),
    "models.Model (mask2former)": (
        Model,
        made(
            head="mask2former", queries=4, position_norm="image", power=6.0, learn_power=True,
            pixel_layers=1, decoder_layers=1, dim=16, hidden=8, pixel_hidden=8,
        ),
    ),
    "models.Model (hcformer)": (
        Model,
        made(
            head="hcformer", queries=4, neighbors=3, temperature=0.1, encoder_layers=1,
            decoder_layers=1, dim=16, hidden=8,
        ),
    ),
    "models.Model.forward": (
        SMALL.forward,
        {"images": torch.zeros(1, 3, 16, 16), "with_stages": False},
    ),
    "models.Model.reconfigure": (
        Model(**MODEL).reconfigure,
        {"rate": 0.5, "alpha": 4.0, "neighborhood_size": 8},
    ),
    "models.Preprocess": (
        pointformer.models.Preprocess,
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    ),
    "models.Preprocess.forward": (SMALL.preprocess.forward, {"image": torch.zeros(3, 8, 8)}),
    "models.complexity_of": (
        pointformer.models.complexity_of,
        {"model": SMALL, "height": 16, "width": 16, "points": None, "parts": [SMALL.backbone]},
    ),
    "models.create_model": (
        pointformer.models.create_model,
        {
            "name": "aff_nano", "pretrained": False, "num_classes": 3, "head": "dense", **R,
            "task": "instance", "categories": MODEL["categories"], "dims": (8, 8, 8, 8),
            "depths": 1, "heads": 2, "rate": 0.5, "channels": 8,
        },
    ),
    "models.load_model": (
        pointformer.models.load_model,
        {
            "path": WEIGHTS, "name": "aff_nano", "key": None, "head": "dense", "num_classes": 3,
            **R, "task": "instance", "categories": MODEL["categories"], "rate": 0.5,
        },
    ),
    "models.list_models": (
        pointformer.models.list_models, {"filter": "aff_*", "pretrained": True},
    ),
    "integrations.from_pointcept": (
        integrations.from_pointcept, {"points": integrations.to_pointcept(TOKENS)},
    ),
    **{
        f"integrations.{function.__name__}": (function, {"tokens": TOKENS})
        for function in (integrations.to_nested, integrations.to_pointcept)
    },
    "models.token_sets": (
        pointformer.models.token_sets,
        {"maps": [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]},
    ),
}  # fmt: skip

# Made by functions, with fields for reading: no one passes arguments to these.
RESULTS = {"Clusters", "Neighborhoods", "Segmentation", "Voxels", "models.Complexity"}
# Files: what is wrong with them is tested in test_model_files and test_tiles.
FILES = {
    "integrations.map_tiles",
    "models.load_released",
    "models.load_state",
    "models.save_model",
}
GPU = {"models.capture"}  # see test_graphs
# Nested tensors have no variants of their own; torch_geometric takes seconds: test_integrations.
FOREIGN_ARGUMENTS = {"integrations.from_nested", "integrations.from_pyg", "integrations.to_pyg"}
NO_FUNCTIONS = {
    *RESULTS,
    *FILES,
    *GPU,
    *FOREIGN_ARGUMENTS,
    "models.CheckpointError",
    "models.Output",
}

ACCEPTED = {
    "TokenSet.with_origin": "origin None",
    "TokenSet.from_grid": "maps shape",  # (B, C, Z, H, W)
    "models.Preprocess.forward": "image shape",  # (..., C, H, W)
    "batch_from_sizes": "sizes numbers",
    "TokenSet.with_fields": "label complex, label other dtype",  # of any dtype
    # As torch's own function does.
    "collate": "samples list, samples nested list, samples numbers",
    # Any number, also a negative one.
    "TokenSet.to_grid": "fill nan, fill inf, fill negative, fill fraction",
    "neighborhood_attention": "scale negative, scale fraction",
    "select_centers": "alpha negative, alpha fraction, prior None",
    # Positive numbers.
    "deformable_attention": "power fraction, eps fraction",
    "interpolate": "power fraction, eps fraction",
    "TokenSet.interpolate_to": "power fraction",
    "voxel_pool": "side fraction, features None",
    "random_sample": "sizes numbers",
    "best_of_runs": "scores tensor",  # of any length
    "best_of_runs (sizes)": "sizes None",
    "radius": "r fraction",
    "radius_graph": "r fraction",
    "interpolate (learned power)": "power fraction, power shape",
    "point_conv": "eps fraction",
    "add_norm": "eps fraction",
    "scored_merge": "eps fraction",
    "select_centers (free)": "stride fraction",
    "segment": "scale fraction",
    "segment (diameter)": "diameter None, diameter fraction",
    "models.AFFConfig": "prior None, reserve_share None, mlp_ratio fraction, alpha fraction, "
    "layer_scale fraction",
    "models.SwinConfig": "mlp_ratio fraction, layer_scale fraction",
    "models.PointConfig": "mlp_ratio fraction, layer_scale fraction, unit fraction",
    "models.PointPreprocess": "unit fraction",
    "nn.Block": "layer_scale fraction",
    "models.list_models": "filter text, filter long text",
    # A model can have any name.
    "models.Model": "name text, name long text",
    "models.Model (mask2former)": "power fraction, name text, name long text",
    "models.Model (hcformer)": "temperature fraction, name text, name long text",
    "models.Model.reconfigure": "alpha fraction",
}

NOTHING = object()


def wrong_values(good):
    """Values by the name of their kind that are not of the kind of `good`."""
    values = {
        "None": None,
        "text": "seven",
        "long text": " ".join(["seven"] * 2000),
        "list": [0.5] * 10_000,
        "numbers": [7] * 10_000,
        "nested list": [[0.5] * 3] * 5000,
        "bool": True,
        "nan": math.nan,
        "inf": math.inf,
        "negative": -3,
        "fraction": 2.5,
        "huge": 2**200,
        "immense": 10**5000,
        "object": SimpleNamespace(rows=3),
        "dict": dict.fromkeys(range(10_000)),
        "array": np.zeros((60, 60)),
        "tensor": torch.zeros(7, dtype=torch.float16),
        "complex": torch.zeros((), dtype=torch.complex64),
    }
    if isinstance(good, torch.Tensor):
        values["complex"] = good.detach().to(torch.complex64)
        values["other dtype"] = good.detach().to(torch.bool)
        values["shape"] = good.detach()[None]
    if isinstance(good, bool):
        del values["bool"]
    return values


def parameters_of(function):
    found = inspect.signature(function).parameters.values()
    return [p for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def public_names():
    """Functions, classes that are called, and methods with arguments."""
    modules = {
        "": pointformer,
        "models.": pointformer.models,
        "nn.": pointformer.nn,
        "integrations.": integrations,
    }
    for prefix, module in modules.items():
        yield from (prefix + name for name in module.__all__)
    for kind in (TokenSet, Clusters, Neighborhoods, Segmentation):
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", member)
            takes = inspect.isfunction(function) and len(inspect.signature(function).parameters) > 1
            if takes and not name.startswith("_"):
                yield f"{kind.__name__}.{name}"


def test_all_public_functions_are_here():
    tried = {name.partition(" ")[0] for name in CALLS}
    assert set(public_names()) - NO_FUNCTIONS <= tried
    for name, (function, _) in CALLS.items():
        calls = [
            good
            for other, (_, good) in CALLS.items()
            if other.split(" (")[0] == name.split(" (")[0]
        ]
        assert {p.name for p in parameters_of(function)} <= set().union(*calls), name


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name):
    function, good = CALLS[name]
    function(**good)
    defaults = {p.name: p.default for p in parameters_of(function)}
    accepted, faults = set(), []
    for parameter, value in good.items():
        for kind, wrong in wrong_values(value).items():
            if wrong is None and defaults.get(parameter) is None:
                continue  # the default, or an option that functions which take it document
            try:
                function(**good | {parameter: wrong})
            except (TypeError, ValueError) as error:
                message = str(error)
                named = re.search(rf"\b{parameter}\b", message)
                if parameter in ("image", "path") and isinstance(wrong, str):
                    named = named or re.search("seven'?: .*no such file", message)
                if len(message) > 300 or "\n" in message or not named:
                    faults.append(f"{parameter} {kind}: {message[:200]!r}")
            except Exception as error:
                faults.append(f"{parameter} {kind}: {type(error).__name__} {str(error)[:200]!r}")
            else:
                accepted.add(f"{parameter} {kind}")
    expected = set(filter(None, ACCEPTED.get(name, "").split(", ")))
    faults += [f"{use}: accepted" for use in sorted(accepted - expected)]
    faults += [f"{use}: refused" for use in sorted(expected - accepted)]
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])


@pytest.mark.parametrize(
    ("impl", "device", "interpret", "why"),
    [
        ("cpu", "cuda", "1", "it needs tensors on the CPU, not on cuda"),
        ("triton", "meta", "1", "it needs a CUDA or ROCm device, not meta"),
        ("triton", "cpu", "0", "start Python with TRITON_INTERPRET=1"),
    ],
)
def test_implementations_that_cannot_run_there(impl, device, interpret, why, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(ValueError, match=rf"f: impl='{impl}' cannot run .*{why}; use impl="):
        choose("f", impl, {impl: lacks_nothing}, torch.device(device))
