"""Made-up inputs of neighborhood attention, and what its implementations are held to."""

import contextlib

import numpy as np
import torch

from pointformer.clusters import Clusters, Neighborhoods
from pointformer.ops import neighborhood_attention
from pointformer.reference.relative_position import relative_position

# As the registered op takes them.
LEARNED = ("position_weight", "position_bias", "position_value", "blank_key", "blank_value")


def cut(sizes, cluster_size):
    """Cluster lengths of every sample, as even as possible (some are shorter than others)."""
    return [
        [len(part) for part in np.array_split(range(n), -(-n // cluster_size))] if n else []
        for n in sizes
    ]


def clusters_of(positions, lengths, cluster_size):
    flat = [length for sample in lengths for length in sample]
    offsets = torch.tensor([0, *np.cumsum(flat)], dtype=torch.int32)
    centers = torch.stack([p.mean(0) for p in positions.split(flat)]) if flat else positions[:0]
    return Clusters(
        order=torch.arange(len(positions)),
        offsets=offsets,
        centers=centers,
        sizes=tuple(sum(sample) for sample in lengths),
        counts=tuple(len(sample) for sample in lengths),
        cluster_size=cluster_size,
    )


def nearest(positions, clusters, num_clusters):
    """Brute-force nearest clusters of each sample, -1 where it has fewer than `num_clusters`."""
    index = torch.full((len(positions), num_clusters), -1, dtype=torch.int32)
    token = cluster = 0
    for size, count in zip(clusters.sizes, clusters.counts, strict=True):
        centers = clusters.centers[cluster : cluster + count]
        distance = torch.cdist(positions[token : token + size].double(), centers.double())
        found = distance.sort(dim=1, stable=True).indices[:, :num_clusters] + cluster
        index[token : token + size, : found.shape[1]] = found.int()
        token, cluster = token + size, cluster + count
    return Neighborhoods(index, clusters)


def make_inputs(
    sizes=(19, 5),
    dimensions=2,
    heads=2,
    channels=8,
    cluster_size=3,
    num_clusters=3,
    features=None,
    bias=True,
    blank=True,
    dtype=torch.float64,
    lattice=False,
    seed=0,
    value_features=0,
):
    """(tensors that take gradients, positions, neighborhoods) of a made-up token set."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = sum(sizes)
    positions = torch.rand(tokens, dimensions, generator=generator) * 10
    if lattice:  # equal positions within a neighborhood
        positions = positions.round() / 2
    lengths = cut(sizes, cluster_size)
    neighborhoods = nearest(positions, clusters_of(positions, lengths, cluster_size), num_clusters)
    if features is None:
        features = 5 if dimensions == 2 else 7
    tensors = {name: normal(tokens, heads, channels) for name in ("query", "key", "value")}
    if features:
        tensors["position_weight"] = normal(heads, features) / 2
    if bias:
        tensors["position_bias"] = normal(heads)
    if blank:
        tensors["blank_key"] = normal(heads, channels)
        tensors["blank_value"] = normal(heads, channels)
    if value_features:
        tensors["position_value"] = normal(heads, channels, value_features) / 2
    return tensors, positions, neighborhoods


def make_lists(
    tokens=23,
    queries=None,
    k=5,
    dimensions=3,
    heads=2,
    channels=8,
    features=None,
    blank=True,
    seed=0,
    value_features=0,
):
    """As `make_inputs`, with lists of tokens in the place of clusters, some shorter than others.

    With `queries` these are others than the tokens, and the positions are a pair: of the tokens,
    and of the queries.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = tokens if queries is None else queries

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    positions = torch.rand(tokens, dimensions, generator=generator) * 10
    index = torch.rand(rows, tokens, generator=generator).argsort(1)[:, :k]
    index = torch.nn.functional.pad(index, (0, k - index.shape[1]), value=-1)
    short = torch.rand(rows, k, generator=generator) < 0.2
    neighborhoods = Neighborhoods.from_lists(index.masked_fill(short, -1), positions)
    tensors = {
        "query": normal(rows, heads, channels),
        "key": normal(tokens, heads, channels),
        "value": normal(tokens, heads, channels),
        "position_bias": normal(heads),
    }
    if features != 0:
        tensors["position_weight"] = normal(heads, features or 2 * dimensions + 1) / 2
    if blank:
        tensors["blank_key"] = normal(heads, channels)
        tensors["blank_value"] = normal(heads, channels)
    if value_features:
        tensors["position_value"] = normal(heads, channels, value_features) / 2
    if queries is not None:
        positions = positions, torch.rand(rows, dimensions, generator=generator) * 10
    return tensors, positions, neighborhoods


def places_of(positions):
    """Of the tokens, and of the queries, from either or both."""
    return positions if isinstance(positions, tuple) else (positions, positions)


def attend(tensors, positions, neighborhoods, **options):
    tensors = dict(tensors)
    if isinstance(positions, tuple):
        positions, options["query_positions"] = positions
    query, key, value = (tensors.pop(name) for name in ("query", "key", "value"))
    if query.dtype == torch.float64:
        options.setdefault("impl", "reference")
    return neighborhood_attention(query, key, value, positions, neighborhoods, **tensors, **options)


def gradients(tensors, positions, neighborhoods, cotangent, function=attend, **options):
    """The output, and the gradient of each tensor by its name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = function(leaves, positions, neighborhoods, **options)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output.dtype))
    return output.detach(), dict(zip(leaves, grads, strict=True))


def _features(positions, rows, weight):
    """Those that a weight (..., F) is for, of queries and rows (Q, M)."""
    points, places = places_of(positions)
    return relative_position(points[rows] - places[:, None], weight.shape[-1] > 3)


def low_precision(tensors, positions, neighborhoods):
    """What one would write without a kernel: products in the rows' dtype, softmax in float32."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    rows, mask = neighborhoods.members()
    scale = query.shape[2] ** -0.5
    logits = torch.einsum("thd,tmhd->thm", query * scale, key[rows]).float()
    if "position_weight" in tensors:
        weight = tensors["position_weight"]
        phi = _features(positions, rows, weight)
        logits = logits + torch.einsum("tmf,hf->thm", phi, weight)
    if "position_bias" in tensors:
        logits = logits + tensors["position_bias"][:, None]
    logits = logits.masked_fill(~mask[:, None], -1e30)
    values = value[rows]
    if "blank_key" in tensors:
        blank = torch.einsum("thd,hd->th", query * scale, tensors["blank_key"].to(query.dtype))
        logits = torch.cat([logits, blank[..., None].float()], -1)
        blank = tensors["blank_value"].to(value.dtype).expand(len(query), 1, -1, -1)
        values = torch.cat([values, blank], 1)
    attention = logits.softmax(-1).to(value.dtype)
    output = torch.einsum("thm,tmhd->thd", attention, values)
    if "position_value" in tensors:
        weight = tensors["position_value"].to(value.dtype)
        phi = _features(positions, rows, weight).to(value.dtype)
        moments = torch.einsum("thm,tmf->thf", attention[..., : rows.shape[1]], phi)
        output = output + torch.einsum("thf,hdf->thd", moments, weight)
    return output


def error(result, exact):
    return (result.double() - exact).abs().max().item() if exact.numel() else 0.0


def check_against_float64(
    inputs, dtype=torch.float32, seed=0, impl="cpu", eager=None, memory=contextlib.nullcontext
):
    """The fused op errs at most twice as much as a plain evaluation in the same precision.

    That is the reference's, or that of `eager`, with the arguments of `attend`. The fused op runs
    within `memory()`.
    """
    tensors, positions, neighborhoods = inputs
    cast = ("query", "key", "value")
    rounded = {n: t.to(dtype) if n in cast else t.float() for n, t in tensors.items()}
    exact = {name: tensor.double() for name, tensor in rounded.items()}
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(tensors["query"].shape, generator=generator)
    cotangent = cotangent.to(tensors["query"].device, dtype)
    want, want_grads = gradients(exact, positions, neighborhoods, cotangent.double())
    options = {"impl": "reference"} if eager is None else {"function": eager}
    plain = gradients(rounded, positions, neighborhoods, cotangent, **options)
    with memory():
        fused = gradients(rounded, positions, neighborhoods, cotangent, impl=impl)
    named = [("output", want, plain[0], fused[0])]
    named += [(n, want_grads[n], plain[1][n], fused[1][n]) for n in tensors]
    for name, true, theirs, ours in named:
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == theirs.shape, name
        # The floor: a few roundings of the terms of a sum, which may cancel.
        term = tensors["query"].shape[2] ** 0.5
        if len(tensors["query"]):
            places = torch.cat(places_of(positions))  # a difference is of either
            farthest = places.abs().max().item()
            if name == "position_weight":
                term *= farthest
            # Gradients of logits, which these are sums of, are of the size of values.
            through_logits = ("query", "key", "position_weight", "position_bias", "blank_key")
            if "position_value" in tensors and name in through_logits:
                term *= max(1.0, farthest * tensors["position_value"].abs().max().item())
        size = true.abs().max().item() if true.numel() else 0.0
        if "position_value" in tensors and name == "output" and size:
            # A sum of what differences of places are worth, which cancel.
            size = max(size, farthest * tensors["position_value"].abs().max().item())
        terms = 4 * max(size, term)
        if "position_weight" in tensors and len(tensors["query"]):
            # And a weight errs by a rounding of its logit, which far places make large.
            terms += size * farthest * tensors["position_weight"].abs().max().item()
        floor = torch.finfo(torch.float32).eps * terms
        assert error(ours, true) <= 2 * error(theirs, true) + floor, name


def check_nan(name, impl, **options):
    """A NaN reaches the outputs that the reference gives it to, and no others."""
    tensors, positions, neighborhoods = make_inputs(dtype=torch.float32, **options)
    tensors[name][0, 1, 3] = float("nan")
    expected = attend(tensors, positions, neighborhoods, impl="reference").isnan()
    assert expected.any()
    assert torch.equal(attend(tensors, positions, neighborhoods, impl=impl).isnan(), expected)


def check_large_logits(impl, **options):
    """Logits of several thousand: no overflow, the winner takes all."""
    tensors, positions, neighborhoods = make_inputs(sizes=(40,), **options)
    tensors["query"] *= 1000
    want = attend(tensors, positions, neighborhoods)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    got = attend(tensors, positions, neighborhoods, impl=impl)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3)


def neighborhood_lists(neighborhoods):
    clusters = neighborhoods.clusters
    return neighborhoods.cluster_index, clusters.offsets, clusters.cluster_size


def registered_arguments(tensors, positions, neighborhoods, impl="cpu"):
    return (
        *(tensors[name] for name in ("query", "key", "value")),
        *reversed(places_of(positions)),
        *neighborhood_lists(neighborhoods),
        list(neighborhoods.plan),
        *(tensors.get(name) for name in LEARNED),
        0.25,
        impl,
    )
