"""TokenSet as a batch of samples: fields, parts, collating, other descriptions of a batch."""

import io
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

import pointformer
from helpers.strategies import tokens as token_strategy
from pointformer import (
    Neighborhoods,
    TokenSet,
    balanced_cluster,
    batch_from_sizes,
    interpolate,
    knn,
    nearest_clusters,
    neighborhood_attention,
    scored_merge,
    select_centers,
    sizes_from_batch,
    sizes_from_ptr,
)


def numbered(*sizes, dimensions=3, channels=2, seed=0):
    """A set whose fields say which token is where: `row` counts them, `label` repeats features."""
    g = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    features = torch.randn(total, channels, generator=g)
    return TokenSet(
        torch.rand(total, dimensions, generator=g) * 50,
        features,
        sizes,
        [(50.0,) * dimensions] * len(sizes),
        torch.arange(len(sizes) * dimensions).double().view(len(sizes), dimensions) * 1e6,
        fields={"row": torch.arange(total), "pair": torch.stack([features, -features], 2)},
    )


def assert_together(tokens, original):
    """Everything of a token is that of one token of the original."""
    rows = tokens.fields["row"]
    assert torch.equal(tokens.positions, original.positions[rows])
    assert torch.equal(tokens.features, original.features[rows])
    assert torch.equal(tokens.fields["pair"], original.fields["pair"][rows])
    assert torch.equal(tokens.world_positions(), original.world_positions()[rows])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_fields_stay_with_their_tokens(sizes, seed):
    tokens = numbered(*sizes, seed=seed)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(sum(sizes), generator=g) < 0.5
    clustered = tokens.cluster(4)
    ways = {
        "cluster": clustered,
        "back": clustered.input_order(),
        "mask": tokens.select(mask),
        "mask of clustered": clustered.select(mask),
        "cat of samples": TokenSet.cat(list(clustered)),
        "moved": clustered.to("cpu"),
        "with_fields": clustered.with_fields(other=torch.zeros(sum(sizes))),
        "pytree": pytree.tree_map_only(torch.Tensor, torch.clone, clustered),
        "detached": clustered.detach(),
    }
    for name, found in ways.items():
        assert_together(found, tokens), name
        assert sum(found.sizes) == found.num_tokens
    assert torch.equal(ways["back"].fields["row"], torch.arange(sum(sizes)))
    kept = mask.split(sizes)
    assert ways["mask"].sizes == tuple(int(part.sum()) for part in kept)
    assert ways["mask"].extent == tokens.extent
    centers, counts = select_centers(
        torch.rand(sum(sizes), generator=g), tokens.positions, sizes=sizes, extent=tokens.extent,
        rate=0.5, stride=8, lattice=False,
    )  # fmt: skip
    merged = tokens.select(centers, counts, features=torch.rand(len(centers), 7))
    assert merged.channels == 7
    assert torch.equal(merged.fields["row"], centers)


def test_samples_one_by_one():
    tokens = numbered(5, 0, 7).cluster(3)
    assert len(tokens) == 3
    for b, part in enumerate(tokens):
        alone = tokens.sample(b)
        assert alone.sizes == part.sizes == (tokens.sizes[b],)
        assert alone.extent == part.extent == tokens.extent[b : b + 1]
        assert torch.equal(alone.origin, tokens.origin[b : b + 1])
        assert torch.equal(alone.origin, part.origin)
        assert torch.equal(alone.fields["pair"], part.fields["pair"])
        assert torch.equal(alone.features, tokens.features[tokens.sample_index == b])
        assert torch.equal(alone.positions, part.positions)
    assert torch.equal(tokens.sample(-1).positions, part.positions)
    for b in (3, -4):
        with pytest.raises(ValueError, match=r"\bb: expected"):
            tokens.sample(b)


def test_without_features():
    tokens = TokenSet(torch.rand(30, 3), sizes=(10, 20), fields={"label": torch.arange(30)})
    assert tokens.features.shape == (30, 0)
    again = TokenSet.cat(list(tokens.cluster(4).to("cpu", torch.bfloat16)))
    assert (again.channels, again.sizes) == (0, (10, 20))
    assert tokens.neighborhoods if tokens.clusters else tokens.cluster().neighborhoods(2)
    assert tokens.with_features(torch.rand(30, 4)).map(torch.nn.Linear(4, 9)).channels == 9
    assert TokenSet.from_world(torch.rand(4, 2).double()).channels == 0


def test_fields_that_do_not_fit():
    positions = torch.rand(6, 2)
    with pytest.raises(ValueError, match=r"fields\['label'\]: expected shape \(6, \.\.\.\)"):
        TokenSet(positions, fields={"label": torch.zeros(5)})
    with pytest.raises(TypeError, match=r"fields\['label'\]: expected a tensor"):
        TokenSet(positions, fields={"label": [1] * 6})
    with pytest.raises(TypeError, match=r"fields: expected tensors \(T, \.\.\.\) by name"):
        TokenSet(positions, fields={3: torch.zeros(6)})
    with_label = TokenSet(positions, fields={"label": torch.zeros(6)})
    with pytest.raises(ValueError, match=r"sets: expected all with the same fields, got \['label"):
        TokenSet.cat([with_label, TokenSet(positions)])
    with pytest.raises(ValueError, match="sets: field label has entries of different shapes"):
        TokenSet.cat([with_label, TokenSet(positions, fields={"label": torch.zeros(6, 2)})])
    assert with_label.with_fields(label=None, row=torch.arange(6)).fields.keys() == {"row"}
    with_label.fields.clear()
    assert TokenSet(positions, fields=with_label.fields).fields == {}


def test_fields_of_different_dtypes_are_joined_but_not_rounded():
    def joined(*rows):
        sets = [TokenSet(torch.rand(len(x), 2), fields={"id": x}) for x in rows]
        return TokenSet.cat(sets).fields["id"]

    small, large = torch.tensor([1, 2**24]), torch.tensor([1, 2**24 + 1])
    assert joined(small, torch.tensor([0.5])).tolist() == [1, 2**24, 0.5]
    assert joined(large, torch.tensor([0.5]).double()).tolist() == [1, 2**24 + 1, 0.5]
    assert joined(torch.tensor([7], dtype=torch.uint8), large).tolist() == [7, 1, 2**24 + 1]
    assert joined(torch.tensor([torch.nan]), torch.zeros(1).double()).isnan().tolist() == [1, 0]
    for rows in (large, torch.tensor([0.5])), (torch.tensor([0.5]), large, small):
        with pytest.raises(ValueError, match=r"sets: field id is of different dtypes, .*rounded"):
            joined(*rows)


def test_other_positions():
    tokens = numbered(8, 9).cluster(4)
    turned = tokens.with_positions(tokens.positions[:, [1, 0, 2]], (50, 50, 50))
    assert turned.clusters is None
    assert turned.extent == ((50, 50, 50),) * 2
    assert torch.equal(turned.fields["row"], tokens.fields["row"])
    assert torch.equal(turned.origin, tokens.origin)
    flat = tokens.with_positions(tokens.positions[:, :2])
    assert (flat.dimensions, flat.origin, flat.extent) == (2, None, None)
    with pytest.raises(ValueError, match=r"positions: expected shape \(17, D\)"):
        tokens.with_positions(tokens.positions[:3])


@pytest.mark.parametrize("row", [-1, -11, -12, 11, 2**40])
def test_rows_that_do_not_exist(row):
    tokens, index = numbered(5, 6), torch.tensor([7, row])
    message = f"expected rows from 0 to below 11, got {row}"
    for select in (
        tokens.cluster(2).neighborhoods(2).select,
        tokens.select,
        partial(tokens.select, sizes=(0, 2)),
        partial(TokenSet(tokens.positions).select, sizes=(2,)),
    ):
        with pytest.raises(IndexError, match=message):
            select(index)


def test_rows_of_other_samples():
    tokens = numbered(5, 6)
    with pytest.raises(ValueError, match=r"index\[1\] = 7 is a row of sample 1"):
        tokens.select(torch.tensor([0, 7, 8]), (2, 1))
    with pytest.raises(ValueError, match="samples in order, got one that descends"):
        tokens.select(torch.tensor([7, 0]))
    assert tokens.select(torch.tensor([0, 7, 8])).sizes == (1, 2)
    with pytest.raises(ValueError, match="sizes: expected 2 samples, as in the set"):
        tokens.select(torch.tensor([0, 7]), (1, 1, 0))


IMPLEMENTATIONS = ["reference", "cpu"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("where", [0.0, 5e6])
@pytest.mark.parametrize("kind", ["scattered", "grid", "ragged"])
def test_rows_in_input_order(impl, where, kind):
    if kind == "grid":
        given_ = TokenSet.from_grid(torch.randn(2, 16, 20, 30))
    else:
        sizes = (300,) if kind == "scattered" else (40, 3, 0, 257)
        given_ = TokenSet(torch.rand(300, 3) * 1000, torch.randn(300, 16), sizes)
    given_ = given_.with_positions(given_.positions + where)
    tokens = given_.cluster(8)
    clusters, total = tokens.clusters, tokens.num_tokens
    around = tokens.neighborhoods(3)
    net = {
        "weight": torch.randn(4, 2 * tokens.dimensions + 1),
        **dict.fromkeys(("bias", "norm_weight", "norm_bias"), torch.ones(4)),
    }
    scores, centers = torch.rand(total), torch.arange(0, total, 4)

    def run(positions, around=around):
        heads = tokens.features.view(total, 2, 8)
        neighborhood_attention(heads, heads, heads, positions, around, impl=impl)
        scored_merge(tokens.features, scores, positions, centers, around, **net, impl=impl)

    wrong = given_.positions
    for call in (
        lambda: nearest_clusters(wrong, clusters, 3, impl=impl),
        lambda: TokenSet(wrong, tokens.features, tokens.sizes, clusters=clusters),
        lambda: run(wrong),
    ):
        with pytest.raises(ValueError, match="positions: expected rows in cluster order, got them"):
            call()
    run(tokens.positions)
    run(tokens.positions * 0.01)  # in other units
    run(torch.randn_like(wrong))
    run(wrong * 0)
    same = replace(clusters, order=torch.arange(total))  # in input order these are in that order
    run(tokens.positions, Neighborhoods(around.cluster_index, same))


class Clouds(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, item):
        tokens = numbered(3 + item, seed=item)
        return {"tokens": tokens, "name": f"cloud {item}", "pair": (tokens, item)}


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers):
    loader = DataLoader(Clouds(), batch_size=4, num_workers=workers, collate_fn=pointformer.collate)
    batches = list(loader)
    assert [len(batch["tokens"]) for batch in batches] == [4, 4, 2]
    expected = TokenSet.cat([Clouds()[item]["tokens"] for item in range(4, 8)])
    found = batches[1]["tokens"]
    assert found.sizes == (7, 8, 9, 10)
    assert torch.equal(found.world_positions(), expected.world_positions())
    assert torch.equal(found.fields["pair"], expected.fields["pair"])
    assert batches[1]["name"] == [f"cloud {item}" for item in range(4, 8)]
    assert batches[1]["pair"][0].sizes == found.sizes
    assert batches[1]["pair"][1].tolist() == [4, 5, 6, 7]


def test_pinned_and_moved(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x.clone())
    tokens = numbered(4, 5).cluster(2).pin_memory()
    assert tokens.clusters.num_tokens == 9
    for shape in ((9, 3), (9, 2), (9,), (9, 2, 2), (2, 3)):
        assert shape in pinned, shape
    assert tokens.to("cpu", non_blocking=True).sizes == (4, 5)


def test_detached():
    features = torch.rand(6, 2, requires_grad=True)
    weight = torch.rand(6, requires_grad=True)
    tokens = TokenSet(torch.rand(6, 2), features * 2, fields={"weight": weight * 2}).cluster(2)
    assert tokens.features.requires_grad
    detached = tokens.detach()
    assert not detached.features.requires_grad
    assert not detached.fields["weight"].requires_grad
    assert detached.clusters is not tokens.clusters
    assert detached.clusters.counts == tokens.clusters.counts


def test_saved_and_loaded_with_fields():
    tokens = numbered(6, 7)
    buffer = io.BytesIO()
    torch.save(tokens, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert_together(again, tokens)
    assert again.sizes == (6, 7)


def test_repr_says_where_and_what():
    tokens = TokenSet.from_world(
        torch.tensor([[652_000.25, 6_862_000.0, 40.0]] * 2).double(),
        sizes=(1, 1),
        fields={"label": torch.zeros(2, dtype=torch.uint8)},
    )
    assert repr(tokens) == (
        "TokenSet(2 tokens in 3-D, 0 channels float32 on cpu, 2 samples: 1 each, "
        "origin (652000.25, 6862000, 40), fields label uint8)"
    )
    assert re.search(r"origin \(0, 1000000, 2000000\) \.\.\.", repr(numbered(1, 2)))


@pytest.mark.parametrize("kind", [tuple, list, torch.tensor, torch.Tensor.numpy])
def test_sizes_are_host_integers(kind):
    sizes = torch.tensor([2, 4])
    given_ = kind(sizes) if kind is torch.Tensor.numpy else kind(sizes.tolist())
    tokens = TokenSet(torch.rand(6, 2), sizes=given_)
    assert tokens.sizes == (2, 4)
    assert all(type(size) is int for size in tokens.sizes)


def test_ragged_lists():
    clouds = [torch.rand(n, 3) for n in (4, 0, 5)]
    tokens = TokenSet.from_list(clouds)
    assert (tokens.sizes, tokens.channels) == ((4, 0, 5), 0)
    tokens = TokenSet.from_list([(cloud, cloud[:, :2]) for cloud in clouds])
    assert torch.equal(tokens.features, tokens.positions[:, :2])
    assert TokenSet.from_list(list(tokens)).sizes == tokens.sizes
    with pytest.raises(ValueError, match="samples: expected positions with one number of columns"):
        TokenSet.from_list([clouds[0], clouds[0][:, :2]])
    with pytest.raises(ValueError, match=r"pairs .* of all samples, got"):
        TokenSet.from_list([clouds[0], (clouds[0], clouds[0])])


@given(token_strategy(max_size=30))
@settings(max_examples=25)
def test_batch_vectors_in_place_of_sizes(sample):
    positions, sizes = sample.positions, sample.sizes
    batch = batch_from_sizes(sizes)
    while sizes and sizes[-1] == 0:  # which a batch vector does not tell
        sizes = sizes[:-1]
    assert sizes_from_batch(batch) == sizes
    assert TokenSet(positions, batch=batch).sizes == sizes
    assert TokenSet.from_world(positions.double(), batch=batch.int()).sizes == sizes
    assert torch.equal(knn(positions, 3, batch=batch), knn(positions, 3, sizes=sizes))
    expected = balanced_cluster(positions, 4, sizes=sizes)
    found = balanced_cluster(positions, 4, batch=batch)
    assert found.counts == expected.counts
    assert torch.equal(found.order, expected.order)
    assert sizes_from_ptr(TokenSet(positions, sizes=sizes).batch_offsets) == sizes


def test_queries_with_batch_vectors():
    """The last samples may have no points, or no queries, which such vectors do not tell."""
    positions, queries = torch.rand(5, 2), torch.rand(4, 2)
    batch, query_batch = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 2, 3])
    rows = {"sizes": (3, 2, 0, 0), "query_sizes": (2, 0, 1, 1)}
    for given_ in (
        {"batch": batch, "query_batch": query_batch},
        {"batch": batch, "query_sizes": rows["query_sizes"]},
        {"sizes": rows["sizes"], "query_batch": query_batch},
    ):
        index = knn(positions, 2, query_positions=queries, **given_)
        assert torch.equal(index, knn(positions, 2, query_positions=queries, **rows))
        out = interpolate(positions, positions, queries, **given_)
        assert torch.equal(out, interpolate(positions, positions, queries, **rows))
    assert index[2:].unique().tolist() == [-1]
    with pytest.raises(ValueError, match="batch: expected None where sizes is given"):
        knn(positions, 2, sizes=(3, 2), batch=batch)
    with pytest.raises(ValueError, match="query_batch: expected None where query_positions"):
        knn(positions, 2, query_batch=batch)
    with pytest.raises(ValueError, match=r"batch: expected shape \(5\)"):
        knn(positions, 2, batch=batch[:3])
    with pytest.raises(ValueError, match="batch: expected the tokens of a sample in consecutive"):
        knn(positions, 2, batch=batch.flip(0))
    with pytest.raises(ValueError, match=r"sizes: .* use batch=batch, or sizes=pointformer"):
        knn(positions, 2, sizes=batch)


def test_ptr_that_is_none():
    for ptr in ([0, 3, 2], [1, 2], [], torch.tensor([0, 5, 4])):
        with pytest.raises(ValueError, match="ptr: expected"):
            sizes_from_ptr(ptr)
    with pytest.raises(
        ValueError, match=r"look like offsets, use sizes=pointformer\.sizes_from_ptr"
    ):
        knn(torch.rand(5, 2), 2, sizes=(0, 2, 5))


def test_a_mask_of_rows_of_other_samples():
    tokens, mask = numbered(5, 6), torch.arange(11) > 2
    assert tokens.select(mask, (2, 6)).sizes == (2, 6)
    with pytest.raises(ValueError, match=r"index\[2\] = 5 is a row of sample 1"):
        tokens.select(mask, (4, 4))
    assert tokens.select(mask, (4, 4), check_values=False).sizes == (4, 4)


def test_cat_has_a_canvas_where_all_have_one():
    on, off = TokenSet(torch.rand(3, 2), extent=(2, 2)), TokenSet(torch.rand(4, 2))
    assert TokenSet.cat([on, on]).extent == ((2, 2), (2, 2))
    assert TokenSet.cat([on, off]).extent is None
    assert TokenSet.cat([off, on]).extent is None


def test_to_casts_no_fields():
    tokens = numbered(4, 5).cluster(2)
    moved = tokens.to(dtype=torch.float16)
    assert moved.dtype == torch.float16
    for name, rows in tokens.fields.items():
        assert moved.fields[name].dtype == rows.dtype
        assert torch.equal(moved.fields[name], rows)


def test_fields_are_those_that_were_given():
    given_ = {"row": torch.arange(6)}
    tokens = TokenSet(torch.rand(6, 2), fields=given_)
    given_["other"] = torch.zeros(1)
    assert tokens.fields.keys() == {"row"}


def test_numbers_of_numpy_are_loaded_again():
    """As weights are: files of them hold no objects of NumPy."""
    size = np.float64(4)
    tokens = TokenSet(torch.rand(9, 2), extent=(size, np.int64(5))).cluster(np.int64(4))
    tokens = tokens.cluster(np.int32(3), global_size=np.int64(2))
    buffer = io.BytesIO()
    torch.save(tokens, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=True)
    assert again.extent == ((4.0, 5),)
    assert again.clusters.cluster_size == 3


def test_large_integers_are_numbers_too():
    positions = torch.rand(9, 2)
    assert TokenSet(positions, extent=(2**64, 1)).extent == ((2.0**64, 1),)
    pointformer.balanced_cluster(positions, extent=(1, 1), origin=(2**64, 0))
    scores = torch.rand(9)
    options = {"rate": 0.5, "stride": 2, "lattice": False}
    index, _ = pointformer.select_centers(scores, positions, alpha=10**30, **options)
    assert torch.equal(
        index, pointformer.select_centers(scores, positions, alpha=1e30, **options)[0]
    )
    pointformer.voxel_pool(positions, positions, 10**30)
    pointformer.select_centers(scores, positions, extent=(2**64, 1), **options)


def test_what_is_no_origin_and_no_sample():
    positions = torch.rand(1, 2)
    with pytest.raises(ValueError, match="origin: expected finite numbers, got"):
        TokenSet(positions, origin=torch.tensor([[float("nan"), 0]]).double())
    with pytest.raises(TypeError, match="samples: expected token sets only, got"):
        TokenSet.from_list([TokenSet(positions), positions])
