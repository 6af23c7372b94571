"""Defaults are part of what functions promise: the table of all that choose something."""

import inspect

import pointformer

EVERYWHERE = {
    "batch": None,
    "check_values": True,
    "impl": None,
    "query_batch": None,
    "same_positions": False,
    "sizes": None,
}
CLUSTERS = {
    "cluster_size": 8,
    "curve": "hilbert",
    "anchors": True,
    "remainder": "spread",
    "global_size": 0,
    "adaptive": None,
}
NEIGHBORHOODS = {
    "num_clusters": 6,
    "scope": "token",
    "tile_size": 16,
    "include_own": False,
}
GRAPH = {"loop": False, "flow": "source_to_target", "along_curve": False}
SAMPLE = {"rate": None, "count": None}
SEGMENTS = {"offsets": None, "index": None, "count": None}
DEFAULTS = {
    "balanced_cluster": CLUSTERS | {"extent": None, "origin": None},
    "nearest_clusters": NEIGHBORHOODS,
    "neighborhood_attention": {
        "query_positions": None,
        "position_weight": None,
        "position_value": None,
        "position_bias": None,
        "blank_key": None,
        "blank_value": None,
        "scale": None,
    },
    "scored_merge": {"eps": 1e-5},
    "point_conv": {"center_positions": None, "eps": 1e-5},
    "select_centers": {
        "extent": None,
        "origin": None,
        "alpha": 4.0,
        "prior": "adaptive",
        "reserve": True,
        "reserve_share": None,
        "lattice": True,
        "along_curve": False,
    },
    "best_of_runs": {},
    "spread_scores": {"neighbors": 8, "along_curve": False},
    "interpolate": {
        "query_sizes": None,
        "neighbor_index": None,
        "k": 4,
        "power": 6.0,
        "eps": 1e-11,
    },
    "weighted_gather": {},
    "segment_reduce": SEGMENTS | {"reduce": "sum", "correction": 1},
    "segment_logsumexp": SEGMENTS,
    "segment_softmax": SEGMENTS,
    "add_norm": {"scale": None, "eps": 1e-5},
    "deformable_attention": {"power": 6.0, "eps": 1e-11},
    "knn": {
        "query_positions": None,
        "query_sizes": None,
        "include_self": True,
        "return_distance": False,
        "along_curve": False,
    },
    "radius": {
        "k": None,
        "query_positions": None,
        "query_sizes": None,
        "include_self": True,
        "return_distance": False,
        "along_curve": False,
    },
    "farthest_point_sample": SAMPLE | {"start": 0, "generator": None},
    "curve_sample": SAMPLE | {"curve": "hilbert"},
    "random_sample": SAMPLE | {"generator": None, "device": None},
    "voxel_pool": {"reduce": "mean"},
    "TokenSet.interpolate_to": {"k": 4, "power": 6.0},
    "knn_graph": GRAPH,
    "radius_graph": GRAPH | {"k": None},
    "to_edge_index": {"flow": "source_to_target"},
    "collate": {},
    "sizes_from_ptr": {},
    "sizes_from_batch": {"batch_size": None},
    "batch_from_sizes": {"device": None},
    "TokenSet.cluster": CLUSTERS,
    "TokenSet.neighborhoods": NEIGHBORHOODS,
    "TokenSet.to_grid": {"fill": 0.0},
    "Neighborhoods.from_lists": {},
    "Neighborhoods.with_plan": {"training": True},
}


def test_defaults():
    for name, expected in DEFAULTS.items():
        function = pointformer
        for part in name.split("."):
            function = getattr(function, part)
        parameters = inspect.signature(function).parameters.values()
        given = {p.name: p.default for p in parameters if p.default is not p.empty}
        shared = {key: value for key, value in EVERYWHERE.items() if key in given}
        assert given == shared | expected, name


def test_every_public_function_is_in_the_table():
    functions = {
        name for name in pointformer.__all__ if inspect.isfunction(getattr(pointformer, name))
    }
    assert functions - {"segment"} <= DEFAULTS.keys()
