"""Deformable attention over points: parity, gradients, the fused CPU path, odd inputs."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from helpers.deformable import LEARNED, check_half_way, make_case, with_gradients
from helpers.gradients import assert_same_for_any_threads
from pointformer import deformable_attention

PARITY = np.load(Path(__file__).parents[1] / "parity" / "ops.npz")


def test_parity():
    """The released module's core, values and gradients, in float64."""

    def get(name):
        return torch.from_numpy(PARITY[f"deform_{name}"])

    counts, samples = (7, 19, 40), 2
    value = get("value").flatten(0, 1).requires_grad_()  # rows (sample, level, token)
    levels = [get(f"l{i}_positions") for i in range(3)]
    positions = torch.cat(levels, 1).flatten(0, 1).float()
    starts = np.cumsum((0, *counts))[:3]
    tables = [get(f"l{i}_lookup").long() + int(starts[i]) for i in range(3)]
    lookup = torch.stack(tables, 2)  # (b, cells, L, 4)
    lookup = (lookup + sum(counts) * torch.arange(samples)[:, None, None, None]).flatten(0, 1)
    total = torch.zeros_like(value)
    power_gradient = torch.zeros(1, dtype=torch.float64)
    for i, count in enumerate(counts):
        offsets = get(f"l{i}_offsets").flatten(0, 1).requires_grad_()
        logits = get(f"l{i}_attn_logits").flatten(0, 1).requires_grad_()
        power = (2 * get("param_shepard_power")).requires_grad_()
        out = deformable_attention(
            value,
            positions,
            offsets,
            logits.flatten(2).softmax(-1).view_as(logits),
            levels[i].flatten(0, 1).float(),
            torch.arange(samples).repeat_interleave(count),
            lookup,
            [PARITY["deform_canvas_wh"].tolist()] * samples,
            power=power,
            impl="reference",
        )
        expected = get(f"l{i}_core_out").flatten(0, 1)
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
        cotangent = get(f"l{i}_grad_core_out").flatten(0, 1)
        grads = torch.autograd.grad(out, (value, offsets, logits, power), cotangent)
        for ours, name in ((grads[1], "offsets"), (grads[2], "attn_logits")):
            theirs = get(f"l{i}_grad_{name}").flatten(0, 1)
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
        total += grads[0]
        power_gradient += 2 * grads[3]
    torch.testing.assert_close(total, get("grad_value").flatten(0, 1), atol=1e-10, rtol=0)
    torch.testing.assert_close(power_gradient, get("grad_shepard_power"), atol=1e-9, rtol=1e-9)


def test_gradcheck():
    case = make_case(queries=3, heads=2, points=2, channels=2)
    leaves = [case[n].double().requires_grad_() for n in LEARNED]

    def run(*given):
        return deformable_attention(
            **{**case, **dict(zip(LEARNED, given, strict=True))}, impl="reference"
        )

    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


@pytest.mark.parametrize("power", [6.0, 4.0, 2.5])
@pytest.mark.parametrize("channels", [5, 32])
def test_cpu_is_as_exact_as_plain_float32(channels, power):
    """Within twice the largest error of the reference in float32, against float64."""
    errors = {"cpu": {}, "reference": {}}
    for seed in range(6):
        case = make_case(channels=channels, seed=seed) | {"power": torch.tensor([power])}
        exact = with_gradients(case, torch.float64, impl="reference")
        for impl, largest in errors.items():
            for name, ours in with_gradients(case, impl=impl).items():
                error = (ours - exact[name]).abs().max().item()
                largest[name] = max(largest.get(name, 0), error)
    for name, error in errors["cpu"].items():
        budget = 2 * errors["reference"][name]
        if name == "power":  # a sum over all queries and channels, which may cancel
            budget += 5e-7 * exact["out"].numel() ** 0.5
        assert error <= budget, name


def test_results_do_not_depend_on_threads():
    case = make_case(queries=200)
    assert_same_for_any_threads(partial(with_gradients, case, impl="cpu"))


def test_places_half_way_between_cells_round_to_even():
    check_half_way("cpu")


def test_a_place_on_a_token_is_that_token():
    case = make_case(points=1)
    target = case["lookup"][0, 0, 0].long()
    case["query_sample"] = torch.zeros_like(case["query_sample"])
    case["query_positions"] = case["positions"][target].expand(13, 2).contiguous()
    case["offsets"] = torch.zeros_like(case["offsets"])
    case["weights"] = torch.zeros_like(case["weights"])
    case["weights"][:, :, 0] = 1
    for impl in ("cpu", "reference"):
        out = deformable_attention(**case, impl=impl)
        torch.testing.assert_close(out, case["value"][target].expand_as(out))


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_places_far_away_and_on_tokens(impl):
    """Where distance ** power is far too large or small for float32."""
    case = make_case()
    steps = torch.tensor([-1e9, -1e7, 0.0, 1e-9, 0.01, 1e7])
    picks = torch.randint(0, 6, case["offsets"].shape, generator=torch.Generator().manual_seed(5))
    case["offsets"] = steps[picks]
    case["query_positions"][:9] = case["positions"][:9]
    exact = with_gradients(case, torch.float64, impl="reference")
    found = with_gradients(case, impl=impl)
    for name, value in exact.items():
        error = (found[name] - value).abs().max()
        assert error <= 2e-5 * value.abs().max(), name


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_nothing_to_look_at(impl):
    """No tokens, or no sample and so no canvas and no query."""
    case = make_case()
    nothing = {
        "value": case["value"][:0],
        "positions": case["positions"][:0],
        "lookup": torch.full_like(case["lookup"], -1),
    }
    assert deformable_attention(**case | nothing, impl=impl).eq(0).all()
    nothing["lookup"] = nothing["lookup"][:0]
    nothing["extent"] = (7, 5)
    names = ("offsets", "weights", "query_positions", "query_sample")
    nothing |= {name: case[name][:0] for name in names}
    shape = (0, *case["value"].shape[1:])
    assert deformable_attention(**case | nothing, impl=impl).shape == shape


def test_opcheck():
    case = make_case()
    canvas = torch.zeros(13, 3, dtype=torch.int32)
    canvas[:, 1:] = torch.tensor([7, 5])
    tensors = [case[n].requires_grad_() for n in LEARNED]
    torch.library.opcheck(
        torch.ops.pointformer.deformable_attention,
        (
            tensors[0], case["positions"], tensors[1], tensors[2], case["query_positions"],
            canvas, case["lookup"].int(), tensors[3], 1e-11, "cpu",
        ),
    )  # fmt: skip


def test_half_precision_keeps_its_dtype():
    case = make_case()
    half = {n: case[n].bfloat16() for n in ("value", "offsets", "weights")}
    out = deformable_attention(**{**case, **half})
    assert out.dtype == torch.bfloat16
    exact = deformable_attention(**{**case, **{n: v.float() for n, v in half.items()}})
    torch.testing.assert_close(out, exact.bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"offsets": torch.zeros(13, 3, 2, 4, 3)}, ValueError, "offsets"),
        ({"weights": torch.zeros(13, 3, 2, 5)}, ValueError, "weights"),
        ({"extent": ((7, 5), (4, 5))}, ValueError, "lookup: expected 55 cells"),
        ({"power": 0.0}, ValueError, "power"),
        ({"eps": 0.0}, ValueError, "eps"),
        (
            {"lookup": torch.full((59, 2, 4), 99, dtype=torch.int32)},
            IndexError,
            "lookup: .* got 99",
        ),
        ({"query_sample": torch.full((13,), -1)}, IndexError, "query_sample: .* got -1"),
        ({"query_sample": torch.zeros(13)}, TypeError, "query_sample"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        deformable_attention(**{**make_case(), **change}, impl="cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("eps", [1e-3, 0.5, 40.0])
def test_shares_are_those_of_the_definition(impl, eps):
    """1 / (distance ** power + eps), in units of the positions."""
    positions = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    value, place = torch.tensor([1.0, 5.0, 20.0]), torch.tensor([0.3, 0.4])
    shares = 1 / ((positions - place).double().norm(dim=1) ** 2.5 + eps)
    expected = (shares / shares.sum() * value).sum()
    found = deformable_attention(
        value.view(3, 1, 1), positions, place.view(1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1),
        torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.tensor([[[0, 1, 2]]]), (1, 1),
        power=2.5, eps=eps, impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(found.double().view(()), expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("eps", [1e-3, 0.5, 40.0])
def test_gradients_where_eps_matters(impl, eps):
    case = make_case() | {"eps": eps, "power": torch.tensor([2.5])}
    exact = with_gradients(case, torch.float64, impl="reference")
    found = with_gradients(case, impl=impl)
    for name, value in exact.items():
        assert (found[name] - value).abs().max() <= 5e-5 * value.abs().max(), name


def two_tokens(**changes):
    """Of the values 1 and 5, at 0 and 1; a place at 0.3."""
    arguments = {
        "value": torch.tensor([[[1.0]], [[5.0]]]),
        "positions": torch.tensor([[0.0, 0.0], [1.0, 0.0]]),
        "offsets": torch.full((1, 1, 1, 1, 2), 0.3),
        "weights": torch.ones(1, 1, 1, 1),
        "query_positions": torch.zeros(1, 2),
        "query_sample": torch.zeros(1, dtype=torch.int64),
        "lookup": torch.tensor([[[0, 1]]]),
        "extent": (1, 1),
    }
    return deformable_attention(**arguments | changes)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["offsets", "query_positions", "positions"])
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_not_a_number_gives_none(impl, name, axis):
    """A loss that looks fine with gradients that are not would hide where training broke."""
    shape = {"offsets": (1, 1, 1, 1, 2), "query_positions": (1, 2), "positions": (2, 2)}[name]
    places = torch.zeros(shape)
    places[(-1,) * (len(shape) - 1) + (axis,)] = torch.nan
    assert two_tokens(**{name: places}, impl=impl).isnan().all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("eps", [1e-20, 1e-30, 1e-310, np.float16(0.5), 10**30])
def test_eps_of_any_size(impl, eps):
    near = two_tokens(offsets=torch.full((1, 1, 1, 1, 2), 1e-7), eps=eps, impl=impl)
    assert torch.isfinite(near).all()
    if eps < 1e-11:
        assert near.item() == 1


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_powers_beyond_64_bits(impl):
    assert two_tokens(power=10**19, impl=impl).item() == 1


def test_autocast_changes_no_bits():
    torch.manual_seed(0)
    value = torch.rand(2, 1, 1)
    expected = two_tokens(value=value, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(two_tokens(value=value, impl="reference"), expected)


def test_more_queries_than_a_thread_takes_at_once():
    case = make_case(queries=70)
    exact = with_gradients(case, torch.float64, impl="reference")
    for name, found in with_gradients(case, impl="cpu").items():
        assert (found - exact[name]).abs().max() <= 5e-5 * exact[name].abs().max(), name
