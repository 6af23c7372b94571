"""Values that no op should trust: lists that point nowhere, NaN that no one looked for, torch's
default dtype set to another."""

import pytest
import torch

from pointformer import (
    TokenSet,
    balanced_cluster,
    deformable_attention,
    interpolate,
    knn,
    nearest_clusters,
    neighborhood_attention,
    scored_merge,
    select_centers,
    weighted_gather,
)
from pointformer.models import create_model

CPU_AND_TRITON = ["cpu", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore"))]


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return TokenSet(torch.rand(60, 2), torch.randn(60, 16)).cluster(8)


def test_attention_refuses_clusters_that_do_not_exist(tokens):
    around = nearest_clusters(tokens.positions, tokens.clusters, 3)
    around.cluster_index[5, 1] = 100
    rows = tokens.features.view(60, 2, 8).requires_grad_()
    with pytest.raises(IndexError, match="cluster 100 of 8"):
        neighborhood_attention(rows, rows, rows, tokens.positions, around, impl="cpu")


def test_unchecked_nan_gives_lists_that_stay_inside(tokens):
    positions = tokens.positions.clone()
    positions[7] = torch.nan
    index = nearest_clusters(positions, tokens.clusters, 3, check_values=False).cluster_index
    assert index.min() >= -1
    assert index.max() < len(tokens.clusters.offsets) - 1
    nearest = knn(positions, 4, check_values=False)
    assert nearest.min() >= -1
    assert nearest.max() < 60


@pytest.mark.parametrize("row", [12, 2**31 - 1, 2**32 + 5])
def test_rows_that_do_not_exist(row):
    """An error where that costs no wait; GPU kernels leave them out."""
    features, weights = torch.randn(10, 5), torch.rand(1, 2)
    index = torch.tensor([[3, row]])
    with pytest.raises(IndexError):
        weighted_gather(features, index, weights, impl="cpu")
    found = weighted_gather(features, index, weights, impl="triton")
    torch.testing.assert_close(found, weights[:, :1] * features[3])


def test_deformable_attention_leaves_out_tokens_that_do_not_exist():
    g = torch.Generator().manual_seed(0)
    value, positions = torch.randn(16, 1, 8, generator=g), torch.rand(16, 2, generator=g) * 4
    lookup = torch.randint(0, 16, (16, 1, 2), generator=g)
    place = (
        torch.zeros(3, 1, 1, 1, 2),
        torch.ones(3, 1, 1, 1),
        torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 3.0]]),
        torch.zeros(3, dtype=torch.int64),
    )
    wrong = lookup.clone()
    wrong[:, :, 1] = 20
    known = lookup.clone()
    known[:, :, 1] = -1
    options = {"extent": [(4, 4)], "impl": "triton"}
    found = deformable_attention(value, positions, *place, wrong, **options)
    expected = deformable_attention(value, positions, *place, known, **options)
    torch.testing.assert_close(found, expected)


def test_one_pair_of_sides_for_all_samples():
    lookup = torch.zeros(32, 1, 1, dtype=torch.int64)
    place = (
        torch.zeros(2, 1, 1, 1, 2),
        torch.ones(2, 1, 1, 1),
        torch.zeros(2, 2),
        torch.tensor([0, 1]),
    )
    value, positions = torch.randn(3, 1, 8), torch.rand(3, 2)
    found = deformable_attention(value, positions, *place, lookup, extent=(4, 4))
    torch.testing.assert_close(found, value[:1].expand(2, 1, 8))


@pytest.mark.parametrize("impl", CPU_AND_TRITON)
def test_default_dtype_does_not_matter(tokens, impl):
    """Float64 is what gradient checks set it to."""

    def run():
        clusters = balanced_cluster(tokens.positions, 8, impl=impl)
        around = nearest_clusters(tokens.positions, tokens.clusters, 3, impl=impl)
        rows = tokens.features.view(60, 2, 8).clone().requires_grad_()
        net = {name: torch.ones(4, dtype=torch.float32) for name in ("bias", "norm_weight")}
        net |= {"weight": torch.ones(4, 5).float(), "norm_bias": torch.zeros(4).float()}
        score = torch.linspace(0, 1, 60, dtype=torch.float32)
        flat = rows.flatten(1)
        index = knn(tokens.positions, 3, impl=impl)
        attended = neighborhood_attention(rows, rows, rows, tokens.positions, around, impl=impl)
        centers = torch.arange(60)
        out = [
            attended.flatten(1),
            scored_merge(flat, score, tokens.positions, centers, around, **net, impl=impl),
            interpolate(flat, tokens.positions, tokens.positions, k=3, impl=impl),
            weighted_gather(flat, index, score[:, None].expand(60, 3), impl=impl),
        ]
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in out), rows)
        lattice = TokenSet.from_grid(torch.zeros(1, 1, 8, 8))
        kept, _ = select_centers(
            torch.linspace(0, 1, 64, dtype=torch.float32), lattice.positions, sizes=lattice.sizes,
            extent=lattice.extent, rate=0.25, stride=2, impl=impl,
        )  # fmt: skip
        return [clusters.order, clusters.centers, kept, *out, gradient]

    expected = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = run()
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_models_run_under_another_default_dtype():
    model = create_model("aff_nano", num_classes=3).eval()
    images = torch.randn(1, 3, 64, 64)
    before = torch.get_default_dtype()
    with torch.no_grad():
        expected = model(images)
        torch.set_default_dtype(torch.float64)
        try:
            found = model(images)
        finally:
            torch.set_default_dtype(before)
    assert torch.equal(found, expected)


def test_arguments_that_do_not_fit_are_named(tokens):
    outside = TokenSet(torch.tensor([[5.0, 0.0]]), torch.ones(1, 1), extent=[(4, 4)])
    with pytest.raises(ValueError, match="to_grid: a token lies outside of its canvas"):
        outside.to_grid()
    with pytest.raises(ValueError, match=r"clusters: expected samples of \(30, 30\) tokens"):
        TokenSet(tokens.positions, tokens.features, (30, 30), clusters=tokens.clusters)
    with pytest.raises(ValueError, match=r"cluster_size: expected a positive integer, got 8\.5"):
        balanced_cluster(tokens.positions, 8.5)
    with pytest.raises(ValueError, match=r"k: expected a positive integer, got 2\.5"):
        knn(tokens.positions, 2.5)
    with pytest.raises(TypeError, match="sizes: expected integers"):
        knn(tokens.positions, 2, sizes=[60.0])
    with pytest.raises(TypeError, match="extent: expected 2 numbers per sample, got int 8"):
        balanced_cluster(tokens.positions, 8, extent=8)
    net = {"weight": torch.ones(4, 5), **dict.fromkeys(("bias", "norm_weight", "norm_bias"))}
    with pytest.raises(TypeError, match="neighborhoods: expected Neighborhoods"):
        scored_merge(
            tokens.features, torch.rand(60), tokens.positions, torch.arange(3), torch.ones(3), **net
        )
