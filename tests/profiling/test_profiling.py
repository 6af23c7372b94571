"""The profiler's counts, times and predictions, and what the GPU benchmarks compare."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from helpers.strategies import tokens as token_sets
from pointformer import (
    TokenSet,
    balanced_cluster,
    cli,
    knn,
    nearest_clusters,
    neighborhood_attention,
    point_conv,
    weighted_gather,
)
from pointformer.cli.warmup import compile_for
from pointformer.models import AFFConfig, GridBackbone, Model, complexity_of
from pointformer.profiling import Limits, Work, measure_limits, profile, record, table, work
from pointformer.profiling.machine_code import Code
from pointformer.profiling.record import _signature
from pointformer.profiling.report import _tensors
from pointformer.profiling.traffic import TILE, group_queries, tile_unions

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "gpu"))

import parts
import peers
import small

CONFIG = AFFConfig(dims=(16, 16, 32, 32), depths=(2, 1, 3, 1), heads=(2, 2, 2, 2), mlp_ratio=1.0)
CPU = torch.device("cpu")


def made(head="classification", impl=None, size=64, batch=2, **changes):
    torch.manual_seed(0)
    model = Model("small", CONFIG.override(**changes), head, 5, impl)
    return model, torch.randn(batch, 3, size, size)


def by_op(rows, direction="forward"):
    sums = {}
    for row in rows:
        if row.direction == direction:
            sums[row.op] = sums.get(row.op, Work()) + row.work
    return sums


def neighborhoods_of(positions, sizes, extent, cluster_size=8):
    clusters = balanced_cluster(positions, cluster_size, sizes=sizes, extent=extent)
    positions = positions[clusters.order]
    return positions, nearest_clusters(positions, clusters)


def test_operations_are_those_of_the_models_complexity():
    model, images = made(batch=1)
    expected = complexity_of(model, 64, 64)
    counted = by_op(profile(model.eval(), images))
    dense = counted["linear"].operations + counted["convolution"].operations
    outputs = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.bias is not None:
            module.register_forward_hook(lambda _, args, output: outputs.append(output.numel()))
    model(images)
    assert dense == 2 * expected.dense + sum(outputs)
    assert counted["neighborhood_attention"].operations == 2 * expected.attention
    assert counted["scored_merge"].operations == pytest.approx(2 * expected.merge, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_attention(dtype):
    """8 C + 24 + 8 bytes per token in bfloat16 and small change, twice that backward: the formulas
    of the roofline."""
    model, images = made()
    calls = record(model.to(dtype), images.to(dtype), backward=True)
    (call,) = (c for c in calls if c.name == "neighborhood_attention" and c.stage == "1")
    tokens, channels, heads = 2 * 16 * 16, 16, 2
    size = dtype.itemsize
    offsets = 4 * (tokens // 8 + 1)
    learned = size * (heads * 5 + heads + 2 * channels)
    forward = tokens * (4 * size * channels + 24 + 8) + offsets + learned
    assert call.work["forward"].bytes == forward
    backward = tokens * (8 * size * channels + 24 + 8 + 24 + 4 * heads) + 2 * offsets + 2 * learned
    assert call.work["backward"].bytes == backward
    pairs, features = tokens * 48, 5
    assert call.work["backward"].operations == (
        10 * (pairs + tokens) * channels + 4 * pairs * heads * features
    )


def test_record_sees_every_call_once():
    model, images = made("dense")
    calls = record(model, images, backward=True)
    counts = {}
    for call in calls:
        counts[call.name] = counts.get(call.name, 0) + call.count
    linear = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    # The layers of position biases and weight nets are not called, only their weights are used.
    assert counts.pop("linear") == linear - sum(CONFIG.depths) - 3
    assert counts.pop("convolution") == 2 + 4
    assert counts == {
        "clustering": 4,
        "nearest_clusters": 4,
        "plan": 4,
        "neighborhood_attention": sum(CONFIG.depths),
        "select_centers": 3,
        "scored_merge": 3,
        "interpolate": 3,
    }
    stages = {call.stage: call.count for call in calls if call.name == "neighborhood_attention"}
    assert stages == dict(zip("1234", CONFIG.depths, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert sys.getprofile() is None
    assert not any("backward" in call.work for call in record(model, images))
    forward_only = record(model, images, keep=False)
    assert not any(call.arguments for call in forward_only)


def test_calls_with_other_fields_are_apart():
    tokens = TokenSet(torch.rand(5, 2), fields={"label": torch.arange(5)})
    key = _signature(tokens)
    assert {key: 1}[_signature(tokens.with_fields(label=torch.ones(5).long()))] == 1
    for other in ({"label": torch.rand(5)}, {"label": torch.ones(5, 2).long()}, {"label": None}):
        assert _signature(tokens.with_fields(**other)) != key


@pytest.mark.parametrize("head", ["classification", "mask2former"])
def test_calls_run_again_with_gradients(head):
    """A recorded call gives what it gave, and its backward pass a gradient per input."""
    model, images = made(head)
    outputs = []
    model.backbone.stages[0].blocks[0].attn.proj.register_forward_hook(
        lambda _, args, output: outputs.append(args[0])
    )
    calls = record(model, images, backward=True)
    attention = next(c for c in calls if c.name == "neighborhood_attention")
    assert torch.equal(attention.run().flatten(1), outputs[0])
    for call in calls:
        if "backward" in call.work:
            grads = call.differentiable().backward()()
            assert all(torch.isfinite(grad).all() for grad in grads)
            given = (call.arguments[name] for name in call.op.inputs)
            inputs = sum(isinstance(value, torch.Tensor) for value in given)
            if call.name in ("linear", "convolution"):
                bias = call.arguments["self"].bias is not None
                inputs = call.arguments["input"].requires_grad + 1 + bias
            assert len(grads) == inputs
    first = next(c for c in calls if c.name == "convolution")
    assert not first.arguments["input"].requires_grad  # images take no gradient
    assert first.work["backward"].operations == first.work["forward"].operations
    names = {call.name for call in calls}
    assert {"knn", "point_conv", "deformable_attention"} <= names or head == "classification"


def test_work_of_lists():
    """Counted by hand for six tokens of five channels and three queries."""
    features, weights = torch.randn(6, 5), torch.rand(3, 2)
    index = torch.tensor([[0, 1], [1, -1], [4, 0]], dtype=torch.int32)
    a = {"features": features, "index": index, "weights": weights}
    output = weighted_gather(**a)
    listed, lists, out = 3 * 20, 24 + 24, 60  # rows 0, 1 and 4
    assert work.weighted_gather(a, output) == Work(listed + lists + out, 5 * 2 * 5)
    assert work.weighted_gather_backward(a, output) == Work(
        listed + lists + out + 6 * 20 + 24, 5 * 4 * 5
    )
    points, query = torch.rand(6, 2), torch.rand(3, 2)
    found = knn(points, 2, query_positions=query)
    assert work.knn({"positions": points, "query_positions": query}, found) == Work(
        48 + 24 + 24, 6 * 5
    )
    net = {"weight": torch.rand(4, 5), "bias": torch.rand(4)}
    net |= {"norm_weight": torch.rand(4), "norm_bias": torch.rand(4)}
    a = {"features": features, "positions": points, "neighbor_index": index} | net
    output = point_conv(**a, center_positions=query)
    a["center_positions"] = query
    read = 3 * (20 + 8) + 24 + 24 + 4 * (20 + 4 + 4 + 4)
    operations = 5 * 2 * 4 * (5 + 5)
    assert work.point_conv(a, output) == Work(read + 3 * 80, operations)
    assert work.point_conv_backward(a, output) == Work(
        read + 3 * 80 + 6 * 20 + 4 * 32, 2 * operations
    )


def test_profile_times_every_pass_beside_its_floor():
    model, images = made()
    limits = Limits(bandwidth=1e9, rate=1e10)
    rows = profile(model, images, limits, backward=True, repeats=3)
    for row in rows:
        q20, q50, q80 = row.times.quantiles
        if row.op == "rest":
            continue
        assert 0 < q20 <= q50 <= q80
        assert row.ratio == q50 / row.floor
        if row.calls == 1 and row.op != "total":
            assert row.floor == max(row.work.bytes / 1e9, row.work.operations / 1e10)
    for direction in ("forward", "backward"):
        parts = [r for r in rows if r.direction == direction]
        *ops, rest, total = parts
        assert (rest.op, total.op) == ("rest", "total")
        assert total.work == sum((r.work for r in ops), Work())
        assert total.floor == pytest.approx(sum(r.floor for r in ops))
        assert rest.times.q50 == pytest.approx(total.times.q50 - sum(r.times.q50 for r in ops))
    lines = table(rows).splitlines()
    assert len(lines) == len(rows) + 1
    assert "50% ms" in lines[0]
    assert "ratio" in lines[0]
    counted = profile(model, images, limits, backward=True)
    assert [r.work for r in counted] == [r.work for r in rows if r.op != "rest"]
    assert all(r.times is None for r in counted)
    only = profile(model, images, only="scored_merge", backward=True)
    assert {r.op for r in only} == {"scored_merge"}
    assert len(only) == 2 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["dense", "stars", "mask2former", "hcformer"])
def test_foreign_backbones_and_mask_heads(head, dtype):
    """Layers of a module that tells no stages, called by keyword too; the whole backward pass."""

    class Maps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, 4, 4)
            self.second = torch.nn.Conv2d(8, 12, 2, 2)

        def forward(self, x):
            x = self.first(input=x)
            return [x, self.second(x)]

    torch.manual_seed(0)
    options = {} if head in ("dense", "stars") else {"dim": 16, "hidden": 16, "queries": 3}
    model = Model("maps", GridBackbone(Maps(), (8, 12)), head, 3, **options).to(dtype).train()
    images = torch.randn(1, 3, 32, 48).to(dtype)
    rows = profile(model, images, backward=True, repeats=1)
    (convolutions,) = (r for r in rows if (r.stage, r.direction) == ("backbone", "forward"))
    assert convolutions.calls == 2
    assert convolutions.work.operations == 2 * (96 * 8 * 48 + 24 * 12 * 32) + 96 * 8 + 24 * 12
    assert {row.stage for row in rows} == {"backbone", "head", ""}
    outputs = list(_tensors(model(images)))
    assert len(outputs) == {"dense": 1, "stars": 1, "mask2former": 20, "hcformer": 19}[head]
    silent = torch.autograd.grad(
        outputs, model.parameters(), [torch.ones_like(x) for x in outputs], allow_unused=True
    )
    assert all(grad is not None for grad in silent)


def test_a_model_in_training_is_left_as_it_was():
    """Timing training runs it, but its statistics, modes and torch's random numbers stay."""
    model, images = made()
    model.train()
    model.backbone.stages[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    profile(model, images, backward=True, repeats=1)
    complexity_of(model, 64, 64)
    assert torch.equal(random, torch.get_rng_state())
    compile_for(model)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model(images)
    assert not all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_limits_of_this_machine():
    """Slower than any machine, or faster than all, would be a wrong unit."""
    limits = measure_limits(CPU, torch.float32)
    assert 1e8 < limits.bandwidth < 1e13
    assert 1e8 < limits.rate < 1e14


@given(token_sets(kinds=("uniform", "lattice", "duplicates"), max_size=150))
@settings(max_examples=25)
def test_unions_and_groups_against_sets(tokens):
    _, neighborhoods = neighborhoods_of(tokens.positions, tokens.sizes, tokens.extent)
    lists = [{c for c in row if c >= 0} for row in neighborhoods.cluster_index.tolist()]
    unions = [set().union(*lists[at : at + TILE]) for at in range(0, len(lists), TILE)]
    found = tile_unions(neighborhoods).tolist()
    assert [{c for c in row if c >= 0} for row in found] == unions
    assert [sum(c >= 0 for c in row) for row in found] == [len(union) for union in unions]
    group = 2  # of 8 keys: the rows of a matrix product
    pairs = {(q, c // group) for q, clusters in enumerate(lists) for c in clusters}
    assert group_queries(neighborhoods) == len(pairs)


def test_traffic_of_attention():
    """Rows per token lie between one and a neighborhood's, and make up the bytes."""
    model, images = made(size=128)
    call = next(
        c for c in record(model, images, backward=True) if c.name == "neighborhood_attention"
    )
    tokens, heads, channels = call.arguments["query"].shape
    clusters = int((tile_unions(call.arguments["neighborhoods"]) >= 0).sum())
    forward = call.traffic["forward"]
    assert 2 < forward.rows < 12
    rows = round(forward.rows * tokens)
    assert rows == 8 * clusters  # all are full
    row = 4 * channels
    expected = tokens * (2 * row + 16) + rows * (2 * row + 8) + 12 * clusters
    assert forward.bytes == heads * expected
    assert forward.rows < call.traffic["backward"].rows < forward.rows + 6
    merge = next(c for c in record(model, images) if c.name == "scored_merge")
    assert merge.traffic["forward"].rows == 12  # 48 for a quarter of the tokens


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = cli.main(["profile", *(str(a) for a in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


LIMITS = ("--bandwidth", 4300, "--rate", 790)


def test_command_prints_a_table_or_json(run, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    arguments = ("aff_nano", "--size", "32x64", "--batch", 1, "--repeats", 1, "--device", "cpu")
    code, text, _ = run(*arguments, *LIMITS)
    assert code == 0
    assert text.startswith("aff_nano, 1 x 3 x 32 x 64 fp32")
    assert ", 1 thread, torch" in text
    assert "4,300.0 GB/s, 790 TFLOP/s" in text
    code, text, _ = run(*arguments, *LIMITS, "--json", "--backward", "--dtype", "bf16")
    assert code == 0
    report = json.loads(text)
    assert report["images"] == [1, 3, 32, 64]
    assert report["machine"]["device"] == "cpu"
    assert {row["pass"] for row in report["rows"]} == {"forward", "backward"}
    total = report["rows"][-1]
    assert total["ratio"] == pytest.approx(total["time_us"][1] / total["floor_us"], rel=0.01)


def test_command_predicts_and_profiles_one_op(run, monkeypatch):
    # Kernels are interpreted here; test_instructions.py compiles some.
    machine = Code((), {"other": 100})
    monkeypatch.setattr("pointformer.profiling.launches.code_of", lambda variant: machine)
    code, text, _ = run("aff_nano", "--predict", "--size", 64, "--batch", 1, "--device", "cpu")
    assert code == 0
    assert "rows/token" in text
    assert "issue ms" in text
    assert "% ms" not in text
    code, text, _ = run(
        "scored_merge", "--model", "aff_nano", "--predict", "--size", 64, "--json", *LIMITS
    )
    assert code == 0
    rows = json.loads(text)["rows"]
    assert [(row["stage"], row["op"]) for row in rows] == [(s, "scored_merge") for s in "123"]
    assert all(row["bound_us"] >= max(row["floor_us"], row["issue_us"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no such model or op; models: aff_base"),
        (["aff_nano", "--size", "0"], "--size: expected pixels"),
        (["aff_nano", "--size", "1x2x3"], "--size: expected pixels"),
        (["aff_nano", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["aff_nano", "--repeats", "-1"], "--repeats"),
        (["aff_nano", "--threads", "0"], "--threads"),
        (["aff_nano", "--rate", "0"], "--rate: expected a positive number"),
        (["aff_nano", "--predict", "--rate", "1"], "give both"),
        (["aff_nano", "--device", "cpu", "--warm"], "--warm: is for GPUs"),
        (["aff_nano", "--size", "32", "--impl", "fast", *map(str, LIMITS)], "impl: expected"),
        (["interpolate", "--model", "aff_nano", "--predict", "--size", "32"], "does not call it"),
        (["aff_nano.none"], "there are no such weights"),
    ],
)
def test_bad_input_is_one_clear_line(run, arguments, message):
    code, text, error = run(*arguments)
    assert (code, text) == (1, "")
    assert message in error
    assert error.count("\n") == 1


def test_no_gpu_is_an_error(run):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "--device" in run("aff_nano", "--device", "cuda")[2]


@pytest.mark.parametrize(("cluster_size", "block"), [(8, 16), (5, 8)])
def test_rivals_compute_the_same(cluster_size, block):
    torch.manual_seed(0)
    batch, length, heads, channels = 2, 90, 2, 8
    positions = torch.rand(batch * length, 2) * 20
    positions, neighborhoods = neighborhoods_of(
        positions, (length,) * batch, (20.0, 20.0), cluster_size
    )
    query, key, value = torch.randn(3, batch * length, heads, channels).unbind()
    weight, bias = torch.randn(heads, 5) / 5, torch.randn(heads)
    flex = peers.Flex(positions, neighborhoods, block, compiled=False)
    for weights in ((weight, bias), (weight, None), (None, None)):
        expected = neighborhood_attention(
            query,
            key,
            value,
            positions,
            neighborhoods,
            position_weight=weights[0],
            position_bias=weights[1],
            impl="reference",
        )
        gathered = peers.gathered_attention(query, key, value, positions, neighborhoods, *weights)
        torch.testing.assert_close(gathered, expected)
        torch.testing.assert_close(flex(query, key, value, *weights), expected)
    # Uncompiled FlexAttention looks at pairs, not at the lists of blocks: those must cover them.
    rows, mask = neighborhoods.members()
    query_row, place = torch.nonzero(mask, as_tuple=True)
    key_row = rows[query_row, place]
    blocks = -(-length // block)
    needed = torch.zeros(batch, 1, blocks, blocks, dtype=torch.int32)
    needed[query_row // length, 0, query_row % length // block, key_row % length // block] = 1
    assert torch.equal(flex.mask.to_dense(), needed)
    assert not needed.all()


def test_benchmarks_of_attention_and_of_a_model(monkeypatch):
    """The parts that compare, on the CPU, where FlexAttention has no backward pass."""
    monkeypatch.setattr(parts, "device", lambda: CPU)
    monkeypatch.setattr(parts, "REPEATS", 1)
    model, images = made()
    call = next(
        c for c in record(model, images, backward=True) if c.name == "neighborhood_attention"
    )
    sides = parts.compare(call, compiled=False)
    assert list(sides) == parts.SIDES
    ours, gathered = sides["ours"](), sides["gathered + SDPA"]()
    assert gathered["largest_difference"] < 1e-5
    assert ours["largest_difference"] == 0
    assert 0 < ours["forward_us"][1] < ours["forward_backward_us"][1] * 10
    with pytest.raises(NotImplementedError):
        sides["FlexAttention 128"]()
    inference = parts.inference((64, 64), 1, Limits(1e9, 1e10))
    assert 0 < inference["search_share"] < 1
    assert inference["rows"][-1]["op"] == "total"
    training = parts.training((64, 64), 1, Limits(1e9, 1e10))
    assert {row["pass"] for row in training["rows"]} == {"forward", "backward"}


def test_rivals_refuse_ragged_batches():
    positions, neighborhoods = neighborhoods_of(torch.rand(50, 2), (20, 30), (1.0, 1.0))
    with pytest.raises(ValueError, match="samples of one size"):
        peers.Flex(positions, neighborhoods, compiled=False)


def test_a_small_run_of_every_op():
    lists = 2 * len(small.CURVES)  # besides outputs and gradients
    assert small.check(CPU, "float32", 2) == lists + 35


def test_kept_tensors_show_a_score_matrix():
    """The fused path keeps nothing of tokens by neighbors; the reference does, and it is seen."""
    dims = (32, 32, 32, 32)  # no layer is as wide as a neighborhood, of 48 tokens
    model, images = made(dims=dims)
    fused = parts.kept_tensors(model, images)
    assert fused["tokens_by_neighbors"] == []
    assert fused["kept"] > fused["linear_inputs"] > 0
    model, images = made(impl="reference", dims=dims)
    assert parts.kept_tensors(model, images)["tokens_by_neighbors"]
