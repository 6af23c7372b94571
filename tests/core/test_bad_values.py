"""Values that no op should trust: lists that point nowhere, NaN that no one looked for, torch's
default dtype set to another."""

import pytest
import torch

from pointformer import (
    TokenSet,
    balanced_cluster,
    batch_from_sizes,
    curve_sample,
    deformable_attention,
    farthest_point_sample,
    interpolate,
    knn,
    nearest_clusters,
    neighborhood_attention,
    point_conv,
    scored_merge,
    select_centers,
    sizes_from_batch,
    spread_scores,
    voxel_pool,
    weighted_gather,
)
from pointformer.geometry import hilbert_code, morton_code, peano_code, snake_code
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


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("impl", ["reference", *CPU_AND_TRITON])
def test_directions_do_not_depend_on_units(impl, dimensions):
    """Down to the border of what float32 can square; attention on GPUs adds 1e-36 to squares."""
    torch.manual_seed(0)
    places = torch.cartesian_prod(*[torch.arange(8.0 if dimensions == 2 else 4.0)] * dimensions)
    tokens = TokenSet(places, torch.randn(len(places), 16)).cluster(8)
    around = nearest_clusters(tokens.positions, tokens.clusters, 3)
    rows = tokens.features.view(-1, 2, 8)
    directions = torch.arange(2 * dimensions + 1) > dimensions  # not what has a unit
    bias = torch.randn(2, 2 * dimensions + 1) * directions
    net = {"weight": torch.randn(4, 2 * dimensions + 1) * directions}
    net |= {name: torch.randn(4) for name in ("bias", "norm_weight", "norm_bias")}
    scores, centers = torch.rand(len(places)), torch.arange(0, len(places), 5)

    def attend(scale):
        where = (tokens.positions * scale, around)
        return neighborhood_attention(rows, rows, rows, *where, position_weight=bias, impl=impl)

    def merge(scale):
        where = (tokens.positions * scale, centers, around)
        return scored_merge(tokens.features, scores, *where, **net, impl=impl)

    for run, scales in ((attend, (2.0**-48, 2.0**58)), (merge, (2.0**-62, 2.0**58))):
        expected = run(1.0)
        for scale in scales:
            torch.testing.assert_close(run(scale), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", [10, 2**31 - 1, -2])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rows_that_do_not_exist_are_named(impl, row):
    """Only -1 stands for none."""
    g = torch.Generator().manual_seed(0)
    value, positions = torch.randn(10, 1, 8, generator=g), torch.rand(10, 2, generator=g)
    features, index = value[:, 0], torch.tensor([[3, row]])
    net = {name: torch.randn(4) for name in ("bias", "norm_weight", "norm_bias")}
    net["weight"] = torch.randn(4, 5)
    place = torch.zeros(1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1), positions[:1], torch.zeros(1).long()
    for run in (
        lambda: weighted_gather(features, index, torch.rand(1, 2), impl=impl),
        lambda: interpolate(features, positions, positions[:1], neighbor_index=index, impl=impl),
        lambda: point_conv(
            features, positions, index, center_positions=positions[:1], **net, impl=impl
        ),
        lambda: deformable_attention(value, positions, *place, index[None], (1, 1), impl=impl),
    ):
        with pytest.raises(IndexError, match=f"(index|lookup): .* 10, or -1 for none, got {row}"):
            run()


@pytest.mark.parametrize("row", [12, 2**31 - 1, 2**32 + 5])
def test_gpu_kernels_leave_out_rows_that_do_not_exist(row):
    """Others, for which finding out costs no wait, say so."""
    features, weights = torch.randn(10, 5), torch.rand(1, 2)
    index = torch.tensor([[3, row]])
    with pytest.raises(IndexError, match=r"index: .* below 10"):
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


BATCH = torch.arange(3).repeat_interleave(20)


@pytest.mark.parametrize(
    "sizes",
    [
        BATCH,
        BATCH.tolist(),
        BATCH.numpy(),
        torch.arange(60) % 3,
        torch.arange(4).repeat_interleave(torch.tensor([5, 40, 10, 5])),
        torch.arange(60),
    ],
)
def test_a_batch_vector_is_no_sizes(tokens, sizes):
    positions, features = tokens.positions, tokens.features
    for call in (
        lambda: knn(positions, 3, sizes=sizes),
        lambda: knn(positions, 3, query_positions=positions, query_sizes=sizes),
        lambda: balanced_cluster(positions, 8, sizes=sizes),
        lambda: interpolate(features, positions, positions, sizes=sizes),
        lambda: select_centers(features[:, 0], positions, sizes=sizes, rate=0.5, stride=2),
        lambda: TokenSet(positions, features, sizes),
    ):
        with pytest.raises(ValueError, match=r"sizes_from_batch\(batch\)") as error:
            call()
        assert len(str(error.value)) < 250
    with pytest.raises(ValueError, match="sizes_from_batch"):
        knn(torch.rand(4, 2), 1, sizes=[0, 1, 1, 2])


@pytest.mark.parametrize("sizes", [[1] * 60, [60], [0, 60], [0, 0, 30, 30], [0, 1, 2, 57]])
def test_unusual_sizes_are_sizes(tokens, sizes):
    assert TokenSet(tokens.positions, tokens.features, sizes).sizes == tuple(sizes)


def test_offsets_are_no_sizes(tokens):
    with pytest.raises(ValueError, match="add up to 120, expected 60 tokens; these look like off"):
        knn(tokens.positions, 2, sizes=[0, 20, 40, 60])


def test_errors_and_repr_are_short():
    many = torch.rand(5000, 2)
    sizes = (2,) * 2499 + (1, 1)
    tokens = TokenSet(many, many, sizes, [(1.0, 1.0)] * 2501)
    assert len(repr(tokens)) < 200
    clusters = tokens.cluster(2).clusters
    lookup = torch.zeros(9, 1, 1, dtype=torch.int64)
    place = (torch.zeros(2, 1, 1, 1, 2), torch.ones(2, 1, 1, 1), many[:2], torch.tensor([0, 1]))
    for call in (
        lambda: knn(many, 1, sizes=sizes[:-1]),
        lambda: knn(many, 1, sizes=[-1] * 5000),
        lambda: knn(many, 1, sizes=[0.5] * 5000),
        lambda: knn(many, [1] * 5000),
        lambda: balanced_cluster(many, 8, extent=[[1.0]] * 5000),
        lambda: balanced_cluster(many, 8, extent=[(torch.nan, 1.0)] * 5000, sizes=[1] * 5000),
        lambda: TokenSet(many, many, clusters=clusters),
        lambda: TokenSet(many, many, sizes[::-1], clusters=clusters),
        lambda: TokenSet(many * 3, many, sizes, [(1.0, 1.0)] * 2501).to_grid(),
        lambda: deformable_attention(
            torch.rand(3, 1, 8), many[:3], *place, lookup, extent=[(4, 4)] * 5000
        ),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert len(str(error.value)) < 300
        assert "\n" not in str(error.value)


def test_batch_vectors_and_sizes():
    batch = torch.tensor([0, 0, 2, 2, 2])
    assert sizes_from_batch(batch) == (2, 0, 3)
    assert sizes_from_batch(batch.int(), 5) == (2, 0, 3, 0, 0)
    assert sizes_from_batch(batch[:0], 2) == (0, 0)
    assert sizes_from_batch(batch[:0]) == ()
    assert torch.equal(batch_from_sizes((2, 0, 3, 0)), batch)
    assert batch_from_sizes(()).shape == (0,)
    with pytest.raises(ValueError, match=r"descends; .*argsort\(stable=True\)"):
        sizes_from_batch(batch.flip(0))
    with pytest.raises(ValueError, match="below batch_size=2, got 2"):
        sizes_from_batch(batch, 2)
    with pytest.raises(ValueError, match="from 0 on, got -1"):
        sizes_from_batch(batch - 1)
    with pytest.raises(TypeError, match="batch: expected dtype"):
        sizes_from_batch(batch.float())


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
    for sizes in ([60.0], 60, "ab"):
        with pytest.raises(TypeError, match="sizes: expected integers"):
            knn(tokens.positions, 2, sizes=sizes)
    for curve, count in (("spiral", 0), (["hilbert"], 60)):
        with pytest.raises(
            ValueError, match="curve: expected one of hilbert, morton, peano, snake"
        ):
            balanced_cluster(tokens.positions[:count], 8, curve=curve)
    with pytest.raises(ValueError, match="global_size: expected an integer of at least 0, got -1"):
        balanced_cluster(tokens.positions, 8, global_size=-1)
    for extent in ((torch.nan, 1.0), (torch.inf, 1), (-1, 1), ("8", 1), (None, 1)):
        with pytest.raises(ValueError, match="extent: expected finite numbers >= 0, got"):
            balanced_cluster(tokens.positions, 8, extent=extent)
        with pytest.raises(ValueError, match="extent: expected finite numbers >= 0, got"):
            TokenSet(tokens.positions, tokens.features, extent=extent)
    with pytest.raises(ValueError, match="extent: expected finite numbers"):
        select_centers(
            torch.rand(60), tokens.positions, rate=0.5, stride=2, extent=(torch.nan, 9),
            lattice=False,
        )  # fmt: skip
    with pytest.raises(TypeError, match=r"features: expected a floating dtype, .* features.float"):
        TokenSet(tokens.positions, torch.ones(60, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"positions: expected dtype float32.*positions.float\(\)"):
        knn(tokens.positions.half(), 2)
    with pytest.raises(TypeError, match="extent: expected 2 numbers per sample, got int 8"):
        balanced_cluster(tokens.positions, 8, extent=8)
    net = {"weight": torch.ones(4, 5), **dict.fromkeys(("bias", "norm_weight", "norm_bias"))}
    with pytest.raises(TypeError, match="neighborhoods: expected Neighborhoods"):
        scored_merge(
            tokens.features, torch.rand(60), tokens.positions, torch.arange(3), torch.ones(3), **net
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_batch_vectors_of_all_integers(dtype):
    assert sizes_from_batch(torch.tensor([0, 2, 2], dtype=dtype)) == (1, 0, 2)
    with pytest.raises(ValueError, match="got one that descends"):
        sizes_from_batch(torch.tensor([0, 2, 1], dtype=dtype))


def test_more_samples_than_there_can_be():
    with pytest.raises(ValueError, match="batch: expected at most 2147483584 samples"):
        sizes_from_batch(torch.tensor([0, 2**40]))


def test_results_have_their_type_whatever_the_default():
    positions, scores = torch.rand(9, 2), torch.rand(9)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _, distance = knn(positions.requires_grad_(), 3, return_distance=True)
        spread = spread_scores(scores, positions, spread=0.5)
    finally:
        torch.set_default_dtype(before)
    assert distance.dtype == spread.dtype == torch.float32
    assert torch.equal(spread, spread_scores(scores, positions, spread=0.5))


def test_cells_that_are_no_tensors_are_named():
    for code in (hilbert_code, morton_code, peano_code):
        with pytest.raises(TypeError, match="cells: expected a tensor"):
            code([[1, 2]])
    with pytest.raises(TypeError, match="shape: expected a tensor"):
        snake_code(torch.tensor([[1, 2]]), (3, 2))
    with pytest.raises(ValueError, match="cells: expected int64 of shape"):
        hilbert_code(torch.tensor(3))


@pytest.mark.parametrize("name", ["farthest", "curve", "voxel", "interpolate", "point_conv"])
def test_positions_that_no_one_is_to_look_at(name):
    """Whoever says that they are fine, is not asked again: no wait for a look at them."""
    positions, features = torch.rand(12, 2), torch.rand(12, 3)
    positions[2] = 1e20
    net = {name: torch.ones(4) for name in ("bias", "norm_weight", "norm_bias")}
    net["weight"] = torch.ones(4, 5)
    index = torch.zeros(12, 2, dtype=torch.int64)
    run = {
        "farthest": lambda **own: farthest_point_sample(positions, count=3, **own)[0],
        "curve": lambda **own: curve_sample(positions, count=3, **own)[0],
        "voxel": lambda **own: voxel_pool(positions, features, 1.0, **own).assignment,
        "interpolate": lambda **own: interpolate(features, positions, positions, **own),
        "point_conv": lambda **own: point_conv(features, positions, index, **net, **own),
    }[name]
    with pytest.raises(ValueError, match=r"positions: sample 0 is farther than|side: expected a"):
        run()
    assert len(run(check_values=False)) == (3 if name in ("farthest", "curve") else 12)
