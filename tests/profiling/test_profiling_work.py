"""Bytes and operations of every op, counted by hand for a few tokens."""

import pytest
import torch

from pointformer import (
    Neighborhoods,
    TokenSet,
    deformable_attention,
    interpolate,
    knn,
    nearest_clusters,
    neighborhood_attention,
    scored_merge,
    select_centers,
    weighted_gather,
)
from pointformer.clusters import Clusters
from pointformer.profiling import Limits, Times, Work, profile, time_call, traffic, work
from pointformer.profiling.traffic import Traffic

# Seven tokens in 2-D in clusters of 3, 3 and 1; two clusters each, two lists are shorter.
POSITIONS = torch.tensor([[0, 0], [1, 0], [0, 1], [5, 5], [6, 5], [5, 6], [9, 9]]).float()
CLUSTERS = Clusters(
    order=torch.arange(7),
    offsets=torch.tensor([0, 3, 6, 7], dtype=torch.int32),
    centers=torch.tensor([[1 / 3, 1 / 3], [16 / 3, 16 / 3], [9, 9]]),
    sizes=(7,),
    counts=(3,),
    cluster_size=3,
)
LISTS = torch.tensor([[0, 1], [0, 1], [0, -1], [1, 0], [1, 2], [1, 2], [2, -1]], dtype=torch.int32)
NEIGHBORHOODS = Neighborhoods(LISTS, CLUSTERS)
PAIRS = 6 + 6 + 3 + 6 + 4 + 4 + 1
ENTRIES = 12
HEADS, CHANNELS = 2, 8


def attention(dtype=torch.float32, **more):
    query, key, value = torch.randn(3, 7, HEADS, CHANNELS, dtype=dtype).unbind()
    names = ("query_positions", "position_weight", "position_bias", "position_value", "blank_key")
    names += ("blank_value",)
    given = {"query": query, "key": key, "value": value, "positions": POSITIONS}
    given |= {"neighborhoods": NEIGHBORHOODS} | dict.fromkeys(names) | more
    return given, neighborhood_attention(**given)


def test_attention():
    rows = 7 * 16
    lists = 4 * 14 + 4 * 4
    a, out = attention(torch.bfloat16)
    forward = Work(2 * 4 * rows + 8 * 7 + lists, 4 * PAIRS * 16)
    assert work.neighborhood_attention(a, out) == forward
    inverse = 4 * (ENTRIES + 4)
    assert work.neighborhood_attention_backward(a, out) == Work(
        2 * 8 * rows + 8 * 7 + lists + 4 * 7 * HEADS + inverse, 10 * PAIRS * 16
    )
    learned = {
        "position_weight": torch.randn(HEADS, 5),
        "position_bias": torch.randn(HEADS),
        "blank_key": torch.randn(HEADS, CHANNELS),
        "blank_value": torch.randn(HEADS, CHANNELS),
    }
    own = 4 * (10 + 2 + 16 + 16)
    a, out = attention(**learned)
    assert work.neighborhood_attention(a, out) == Work(
        4 * 4 * rows + 8 * 7 + lists + own, 4 * (PAIRS + 7) * 16 + 2 * PAIRS * 10
    )
    assert work.neighborhood_attention_backward(a, out) == Work(
        4 * 8 * rows + 8 * 7 + lists + 4 * 7 * HEADS + inverse + 2 * own,
        10 * (PAIRS + 7) * 16 + 4 * PAIRS * 10,
    )


def test_relative_values():
    """The sums of five numbers per pair and head, and their products with as many rows."""
    plain, own = attention(), 4 * HEADS * CHANNELS * 5
    a, out = attention(position_value=torch.randn(HEADS, CHANNELS, 5))
    term = 2 * PAIRS * HEADS * 5 + 2 * 7 * HEADS * CHANNELS * 5
    forward = work.neighborhood_attention(*plain)
    expected = Work(forward.bytes + own, forward.operations + term)
    assert work.neighborhood_attention(a, out) == expected
    backward = work.neighborhood_attention_backward(*plain)
    expected = Work(backward.bytes + 2 * own, backward.operations + 2 * term)
    assert work.neighborhood_attention_backward(a, out) == expected


def test_attention_of_other_queries():
    """Two queries elsewhere, one to the clusters 0 and 1, one to the last: seven pairs."""
    elsewhere = {
        "query": torch.randn(2, HEADS, CHANNELS),
        "query_positions": POSITIONS[:2] + 0.25,
        "neighborhoods": Neighborhoods(LISTS[[0, 6]], CLUSTERS),
    }
    blank = {name: torch.randn(HEADS, CHANNELS) for name in ("blank_key", "blank_value")}
    rows, points, lists, own = 2 * 2 + 2 * 7, 8 * (2 + 7), 4 * 4 + 4 * 4, 4 * 32
    a, out = attention(**elsewhere, **blank)
    assert work.neighborhood_attention(a, out) == Work(
        4 * 16 * rows + points + lists + own, 4 * (7 + 2) * 16
    )
    inverse = 4 * (3 + 4)
    assert work.neighborhood_attention_backward(a, out) == Work(
        2 * 4 * 16 * rows + points + lists + 4 * 2 * HEADS + inverse + 2 * own, 10 * (7 + 2) * 16
    )


def test_traffic_of_attention():
    """All seven queries are one tile, of all three clusters; of each group of five clusters there
    is one, which all queries attend to."""
    a, out = attention()
    row = 4 * CHANNELS
    per_head = 7 * (2 * row + 8 + 8) + 7 * (2 * row + 8) + 12 * 3
    assert traffic.neighborhood_attention(a, out) == Traffic(HEADS * per_head, 1.0)
    tiles = 7 * (4 * row + 8 + 12) + 7 * (2 * row + 8) + 12 * 3
    groups = 7 * (4 * row + 8) + 7 * (2 * row + 8 + 12 + 8)
    assert traffic.group_queries(NEIGHBORHOODS) == 7
    assert traffic.neighborhood_attention_backward(a, out) == Traffic(HEADS * (tiles + groups), 2.0)
    # Relative values: five numbers of each query and head, written and read.
    a, out = attention(position_value=torch.randn(HEADS, CHANNELS, 5))
    moved = HEADS * (tiles + groups + 2 * 7 * 4 * 5)
    assert traffic.neighborhood_attention_backward(a, out) == Traffic(moved, 2.0)


def test_merge():
    """Around the tokens 0 and 6: clusters 0, 1 and 2, of seven tokens; seven pairs."""
    features, scores = torch.randn(7, 5), torch.rand(7)
    net = {"weight": torch.randn(4, 5), "bias": torch.randn(4)}
    net |= {"norm_weight": torch.randn(4), "norm_bias": torch.randn(4)}
    a = {
        "features": features,
        "scores": scores,
        "positions": POSITIONS,
        "center_index": torch.tensor([0, 6]),
        "neighborhoods": NEIGHBORHOODS,
    } | net
    out = scored_merge(**a)
    assert out.shape == (2, 20)
    weights = 4 * (20 + 4 + 4 + 4)
    read = 7 * (20 + 4 + 8) + 2 * 8 + 2 * 8 + (4 * 4 + 4 * 4) + weights
    operations = 2 * 7 * 4 * (5 + 5)
    assert work.scored_merge(a, out) == Work(read + 2 * 80, operations)
    assert work.scored_merge_backward(a, out) == Work(
        read + 2 * 80 + 7 * 20 + 7 * 4 + weights, 2 * operations
    )
    pair = 20 + 4 + 8
    assert traffic.scored_merge(a, out) == Traffic(7 * pair + 2 * 80, 1.0)
    assert traffic.scored_merge_backward(a, out) == Traffic(
        7 * (80 + 8) + 2 * 7 * (20 + 4) + 7 * 8, 1.0
    )


def test_clustering_search_and_selection():
    tokens = TokenSet(
        torch.cat([POSITIONS, POSITIONS[:2]]), torch.randn(9, 3), (7, 2), [(10.0, 10.0)] * 2
    )
    clustered = tokens.cluster(3, global_size=2)
    order, offsets, centers = 8 * 9, 4 * 5, 4 * 4 * 2
    a = {"self": tokens, "global_size": 2}
    assert work.clustering(a, clustered) == Work(
        2 * 9 * (8 + 12) + order + offsets + centers, 7 * 11 + 9 * 2
    )
    labeled = tokens.with_fields(label=torch.arange(9), color=torch.rand(9, 3))
    a = {"self": labeled, "global_size": 2}
    assert work.clustering(a, labeled.cluster(3, global_size=2)) == Work(
        2 * 9 * (8 + 12 + 8 + 12) + order + offsets + centers, 7 * 11 + 9 * 2
    )
    found = nearest_clusters(clustered.positions, clustered.clusters, 2)
    entries = 7 * 2 + 2  # the small sample has one cluster
    a = {"positions": clustered.positions, "clusters": clustered.clusters}
    assert work.nearest_clusters(a, found) == Work(9 * 8 + centers + 4 * 18, entries * 5)
    planned = {"training": False}
    assert work.plan(planned, found) == Work(4 * 18)
    assert work.plan({"training": True}, found) == Work(4 * 18 + 4 * (4 + 1 + entries))
    scores = torch.rand(7)
    a = {"scores": scores, "positions": POSITIONS}
    kept = select_centers(scores, POSITIONS, extent=(10, 10), rate=0.5, stride=8)
    assert work.select_centers(a, kept) == Work(4 * 7 + 8 * 7 + 8 * len(kept[0]), 14)
    a = {"positions": POSITIONS, "query_positions": None}
    assert work.knn(a, knn(POSITIONS, 3, return_distance=True)) == Work(56 + 2 * 84, 21 * 5)


def test_interpolation():
    features, queries = torch.randn(7, 5), POSITIONS[:3] + 0.25
    a = {"features": features, "positions": POSITIONS, "query_positions": queries}
    a |= {"neighbor_index": torch.tensor([[0, 1], [1, 2], [2, -1]], dtype=torch.int32)}
    out = interpolate(**a)
    points, lists = 3 * 8 + 3 * 8, 24  # of the queries, and of the tokens 0, 1 and 2
    assert work.interpolate(a, out) == Work(points + lists + 3 * 20 + 60, 5 * (5 + 5 + 10))
    assert work.interpolate_backward(a, out) == Work(points + lists + 60 + 7 * 20, 5 * (5 + 5 + 10))
    assert traffic.interpolate(a, out) == Traffic(5 * (20 + 3 * 12) + 3 * 8 + 60, 5 / 7)
    sums, gather = 5 * 2 * 12 + 3 * (8 + 8), 5 * (20 + 8 + 8 + 8) + 7 * (20 + 8)
    fixed, learned = a | {"power": 6.0}, a | {"power": torch.tensor(6.0)}
    assert traffic.interpolate_backward(fixed, out) == Traffic(sums + gather, 5 / 7)
    power = 5 * (20 + 12) + 60
    assert traffic.interpolate_backward(learned, out) == Traffic(sums + power + gather, 10 / 7)
    a |= {"neighbor_index": None, "k": 1, "sizes": None, "query_sizes": None}
    out = interpolate(features, POSITIONS, queries, k=1)
    assert work.interpolate(a, out) == Work(points + 3 * 20 + 60, 3 * 20)
    assert work.interpolate_backward(a, out) == Work(points + 4 * 3 + 60 + 7 * 20, 3 * 20)


def test_deformable_attention():
    """Two queries, two heads of three channels, one level, five places, two tokens each."""
    a = {
        "value": torch.randn(7, 2, 3),
        "positions": POSITIONS,
        "offsets": torch.randn(2, 2, 1, 5, 2),
        "weights": torch.rand(2, 2, 1, 5),
        "query_positions": torch.rand(2, 2) * 4,
        "query_sample": torch.zeros(2, dtype=torch.int64),
        "lookup": torch.randint(0, 7, (12, 1, 2)),
        "extent": [(4, 3)],
    }
    out = deformable_attention(**a)
    read = 7 * 6 * 4 + 7 * 8 + 40 * 4 + 20 * 4 + 4 * 4 + 2 * 8 + 24 * 8
    pairs = 20 * 2
    assert work.deformable_attention(a, out) == Work(read + 12 * 4, pairs * (10 + 6))
    assert work.deformable_attention_backward(a, out) == Work(
        read + 12 * 4 + 7 * 6 * 4 + 40 * 4 + 20 * 4, pairs * (20 + 12)
    )
    read = 40 * 4 + 20 * 4 + 20 * 2 * 4
    moved = pairs * (12 + 8) + read + 12 * 4
    assert traffic.deformable_attention(a, out) == Traffic(moved, pairs / 14)
    moved = pairs * (12 + 12 + 12 + 12) + read + 12 * 4 + (40 + 20 + 20) * 4 + 7 * 6 * 4
    assert traffic.deformable_attention_backward(a, out) == Traffic(moved, 2 * pairs / 14)


def test_traffic_of_lists():
    """Four pairs of three queries and seven tokens of five channels."""
    index = torch.tensor([[0, 1], [1, -1], [6, -1]], dtype=torch.int32)
    a = {"features": torch.randn(7, 5), "index": index, "weights": torch.rand(3, 2)}
    out = weighted_gather(**a)
    lists = 6 * 4 + 6 * 4
    assert traffic.weighted_gather(a, out) == Traffic(4 * 20 + lists + 3 * 20, 4 / 7)
    assert traffic.weighted_gather_backward(a, out) == Traffic(
        4 * (3 * 20 + 12) + lists + 7 * 20, 12 / 7
    )
    a = {"features": a["features"], "positions": POSITIONS, "neighbor_index": index}
    out = torch.empty(3, 20)
    assert traffic.point_conv(a, out) == Traffic(4 * (20 + 8 + 4) + 3 * 80, 4 / 7)
    assert traffic.point_conv_backward(a, out) == Traffic(
        4 * (80 + 8 + 8) + 2 * 7 * 20 + 7 * 8, 4 / 7
    )


def test_layers():
    """A convolution of 3 to 4 channels, 3x3, on 5x6 pixels, and a Linear layer of 4 to 2."""
    conv, linear = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4, 2, bias=False)
    x = torch.randn(1, 3, 5, 6)
    y = conv(x)
    read, adds = 4 * (90 + 108 + 4), 120 * 27
    assert work.layer({"self": conv, "input": x}, y) == Work(read + 4 * 120, 2 * adds + 120)
    assert work.layer_backward({"self": conv, "input": x}, y) == Work(
        4 * (120 + 90 + 108) + 4 * (108 + 4), 2 * adds + 120
    )
    rows = torch.randn(7, 4).requires_grad_()
    assert work.layer({"self": linear, "input": rows}, linear(rows)) == Work(
        4 * (28 + 8 + 14), 2 * 7 * 8
    )
    assert work.layer_backward({"self": linear, "input": rows}, linear(rows)) == Work(
        4 * (14 + 28 + 8) + 4 * (8 + 28), 4 * 7 * 8
    )


def test_calls_are_timed_after_a_warm_up():
    calls = []
    times = time_call(lambda: calls.append(0), torch.device("cpu"), 5)
    assert len(calls) == 6
    assert 0 <= times.q20 <= times.q50 <= times.q80
    assert Times.of([1.0, 2.0, 3.0, 4.0, 6.0]).quantiles == pytest.approx((1.8, 3.0, 4.4))
    both = Times(1, 2, 3) + Times(4, 5, 6) * 2 - Times(1, 1, 1)
    assert both == Times(8, 11, 14)


def test_rows_of_repeated_calls_count_all_of_them():
    """Two blocks of a stage are one row of two calls: work, traffic and floor of both."""
    from pointformer.models import AFFConfig, Model

    config = {"dims": (16,) * 4, "heads": (2,) * 4, "mlp_ratio": 1.0}
    images = torch.randn(1, 3, 32, 32)
    limits = Limits(bandwidth=1e6, rate=1e6)
    rows = {}
    for depth in (1, 3):
        torch.manual_seed(0)
        model = Model("small", AFFConfig(depths=(depth, 1, 1, 1), **config), "features", 1)
        for row in profile(model.eval(), images, limits, only="neighborhood_attention"):
            rows[depth, row.stage] = row
    one, three = rows[1, "1"], rows[3, "1"]
    assert three.calls == 3
    assert three.work == one.work * 3
    assert three.traffic == 3 * one.traffic
    assert three.rows == one.rows
    assert three.floor == 3 * one.floor == 3 * max(one.work.bytes, one.work.operations) / 1e6
