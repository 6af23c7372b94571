"""The opt-in tuner, with made-up times: what it chooses and refuses, and that all it may choose
computes the same."""

import itertools
import json
import warnings

import pytest
import torch
import triton

from helpers.fake_gpu import dirty_memory
from helpers.ops import op_calls
from pointformer.kernels.triton import merge, tuning
from pointformer.kernels.triton.runtime import INTERPRETED, Variant
from pointformer.kernels.triton.tuning import Tuner, size_class

CHOICES = list(tuning.choices(4, 2, {"KEYS": (32, 16)}))


class Kernel:
    """Launches that take `times[warps, stages, keys]`, or 9, and write the same numbers, but for
    those that are wrong; counts them."""

    def __init__(self, times, spills=(), fails=(), wrong=()):
        self.times, self.spills, self.fails, self.wrong = times, spills, fails, wrong
        self.error = triton.runtime.errors.OutOfResources(1, 0, "registers")
        self.launches = 0
        self.n_spills = 0
        self.output = torch.arange(6.0)

    def run(self, choice):
        place = tuple(({"num_warps": 4, "num_stages": 2, "KEYS": 32} | choice).values())
        if place in self.fails:
            raise self.error
        self.launches += 1
        self.last = self.times.get(place, 9.0)
        self.n_spills = int(place in self.spills)
        self.output[:4] = torch.tensor([1e-3, -2.0, torch.inf, torch.nan])
        if place in self.wrong:
            self.output[1] = 3.0
        return self

    def time(self, run):
        run()
        return self.last

    def tuned(self, tuner, key="a"):
        return tuner.best(key, CHOICES, self.run, [self.output])


def test_choices_begin_with_the_default():
    assert CHOICES[0] == {}
    assert len(CHOICES) == 12
    assert {"num_warps": 8, "KEYS": 16} in CHOICES
    assert {"num_warps": 2, "num_stages": 3, "KEYS": 16} in CHOICES


def test_fastest_is_chosen_and_remembered(tmp_path):
    path = tmp_path / "cache" / "autotune.json"
    kernel = Kernel({(8, 2, 16): 1.0, (2, 3, 32): 2.0, (8, 3, 32): 3.0})
    tuner = Tuner(path, kernel.time)
    assert kernel.tuned(tuner) == {"num_warps": 8, "KEYS": 16}
    launches = kernel.launches
    assert launches == 2 * len(CHOICES)
    kernel.tuned(tuner)
    assert kernel.tuned(Tuner(path, kernel.time))["num_warps"] == 8
    assert kernel.launches == launches
    kernel.tuned(Tuner(path, kernel.time), "b")
    assert kernel.launches == 2 * launches
    assert set(json.loads(path.read_text())) == {"a", "b"}
    assert [file.name for file in path.parent.iterdir()] == ["autotune.json"]


def test_what_spills_or_does_not_fit_is_left_out(tmp_path):
    times = {(8, 2, 32): 1.0, (2, 2, 32): 2.0}
    kernel = Kernel(times, spills=[(8, 2, 32)], fails=[(8, 3, 32)])
    assert kernel.tuned(Tuner(tmp_path / "a.json", kernel.time)) == {"num_warps": 2}
    nothing_fits = Kernel({}, fails=[(4, 2, 32)])
    with pytest.raises(triton.runtime.errors.OutOfResources):  # the default must
        nothing_fits.tuned(Tuner(tmp_path / "b.json", kernel.time))


@pytest.mark.parametrize("error", [RuntimeError("PassManager::run failed"), AssertionError()])
def test_what_the_compiler_fails_on_is_left_out(tmp_path, error):
    kernel = Kernel({(8, 2, 32): 1.0, (2, 2, 32): 2.0}, fails=[(8, 2, 32)])
    kernel.error = error
    assert kernel.tuned(Tuner(tmp_path / "a.json", kernel.time)) == {"num_warps": 2}


def test_a_device_that_failed_is_said(tmp_path):
    kernel = Kernel({}, fails=[(8, 2, 32)])
    kernel.error = torch.AcceleratorError("an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError):
        kernel.tuned(Tuner(tmp_path / "a.json", kernel.time))


def test_without_memory_for_a_comparison_there_is_none(tmp_path, monkeypatch):
    clone = torch.Tensor.clone
    for last in (0, 1):  # before the first launch, and after it
        kernel, copies = Kernel({(8, 2, 32): 1.0}), []

        def copy(self, last=last, copies=copies):
            if len(copies) == last:
                raise torch.OutOfMemoryError("out of memory")
            copies.append(self)
            return clone(self)

        monkeypatch.setattr(torch.Tensor, "clone", copy)
        assert kernel.tuned(Tuner(tmp_path / "a.json", kernel.time)) == {}
        assert not (tmp_path / "a.json").exists()  # there may be enough the next time


def test_what_computes_something_else_is_refused_with_a_warning(tmp_path):
    kernel = Kernel({(8, 2, 32): 1.0, (2, 2, 32): 2.0}, wrong=[(8, 2, 32)])
    with pytest.warns(
        RuntimeWarning, match=r"^a_kernel: \{'num_warps': 8\} computes other results"
    ):
        chosen = kernel.tuned(Tuner(tmp_path / "a.json", kernel.time), "a_kernel of a card")
    assert chosen == {"num_warps": 2}
    assert json.loads((tmp_path / "a.json").read_text()) == {"a_kernel of a card": chosen}


def test_outputs_are_left_as_they_were(tmp_path):
    """Some begin with values that the kernel leaves alone."""
    kernel = Kernel({})
    kernel.tuned(Tuner(tmp_path / "a.json", kernel.time))
    assert kernel.output.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("choice", [{"num_warps": 3}, {"KEYS": 7}, {"num_warps": "8"}, 8, None])
def test_choices_of_a_file_that_are_none_are_searched_anew(tmp_path, choice):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": choice}))
    kernel = Kernel({(2, 2, 32): 1.0})
    assert kernel.tuned(Tuner(path, kernel.time)) == {"num_warps": 2}


def test_agreement():
    """Integers bit for bit; floats by their own size or what is typical of the tensor."""
    budget = tuning.budget_of([torch.float32, "i32"])
    assert budget < tuning.budget_of([torch.float32, torch.float16])
    assert tuning.budget_of([torch.bfloat16]) < 0.05
    numbers = torch.tensor([1.0, -1e3, 1e-6, -3e38, torch.inf, torch.nan])
    assert tuning.agree(numbers, numbers, budget)
    assert tuning.agree(numbers * (1 + budget / 2), numbers, budget)
    for place, value in itertools.product(range(6), (7.0, torch.inf, -torch.inf, torch.nan)):
        changed = numbers.clone()
        changed[place] = value
        same = numbers[place] == value or (place == 5 and value != value)
        assert tuning.agree(changed, numbers, budget) == bool(same), (place, value)
    counts = torch.arange(4, dtype=torch.int32)
    assert tuning.agree(counts, counts.clone(), budget)
    assert not tuning.agree(counts, counts + (counts == 3), budget)
    assert tuning.agree(numbers[:0], numbers[:0], budget)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_unreadable_file_counts_as_empty(tmp_path, content):
    path = tmp_path / "autotune.json"
    path.write_text(content)
    kernel = Kernel({(2, 2, 32): 1.0})
    assert kernel.tuned(Tuner(path, kernel.time))["num_warps"] == 2
    assert "a" in json.loads(path.read_text())


def test_choices_last_without_a_place_for_them(tmp_path):
    (tmp_path / "file").write_text("")
    kernel = Kernel({(2, 2, 32): 1.0})
    tuner = Tuner(tmp_path / "file" / "autotune.json", kernel.time)
    for key in "abab":
        assert kernel.tuned(tuner, key)["num_warps"] == 2
    assert kernel.launches == 4 * len(CHOICES)


def test_a_choice_stays_when_another_process_chooses_otherwise(tmp_path):
    path = tmp_path / "autotune.json"
    ours, theirs = Kernel({(2, 2, 32): 1.0}), Kernel({(8, 2, 32): 1.0})
    tuner = Tuner(path, ours.time)
    ours.tuned(tuner)
    path.unlink()
    theirs.tuned(Tuner(path, theirs.time))
    ours.tuned(tuner, "b")
    assert ours.tuned(tuner)["num_warps"] == 2


def test_off_by_default(monkeypatch):
    monkeypatch.delenv("POINTFORMER_AUTOTUNE", raising=False)
    assert not tuning.enabled()
    monkeypatch.setenv("POINTFORMER_AUTOTUNE", "1")
    assert tuning.enabled()


def test_graphs_get_what_is_known(tmp_path, monkeypatch):
    kernel = Kernel({(2, 2, 32): 1.0})
    tuner = Tuner(tmp_path / "a.json", kernel.time)
    kernel.tuned(tuner, "known")
    launches = kernel.launches
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert kernel.tuned(tuner, "known")["num_warps"] == 2
    assert kernel.tuned(tuner, "new") == {}
    assert kernel.launches == launches


def test_keys_tell_specializations_and_sizes_apart(monkeypatch):
    variants = [v for v in merge.variants() if v.kernel is merge.scored_merge_fwd_kernel]
    # Interpreted kernels are not hashed.
    monkeypatch.setattr(type(variants[0].kernel), "cache_key", "0" * 64, raising=False)
    distinct = {(v.arguments, tuple(v.constants.items())) for v in variants}
    assert len(distinct) > 20
    assert len({v._key("a GPU", 64) for v in variants}) == len(distinct)
    sizes = [size_class(grid) for grid in ((3, 5), (4, 4), (16,), (17,))]
    assert sizes == [16, 16, 16, 32]
    assert len({variants[0]._key(gpu, size) for gpu in "ab" for size in sizes}) == 4


LONG = (
    "merge",
    "attention",
    "attention in 3-D",
    "merge in 3-D",
    "point_conv",
    "deformable",
    "select",
    "knn",
    "knn, long lists",
)


def same_bits(tensor, other):
    return torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if INTERPRETED and name in LONG else [])
        for name in op_calls()
    ],
)
def test_all_that_can_be_chosen_computes_the_same(tmp_path, monkeypatch, name):
    """And kernels write what they are said to write, and do not read it."""
    call = op_calls()[name]
    if not INTERPRETED:
        call = call.to("cuda")
    launched = []
    first_launch = Variant._first_launch

    def launch(variant, grid, arguments):
        given = dict(zip(variant.kernel.arg_names, arguments, strict=False))
        before = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
        compiled = first_launch(variant, grid, arguments)
        changed = {name for name, x in before.items() if not same_bits(given[name], x)}
        launched.append(variant)
        if variant.writes:
            assert changed <= set(variant.writes), variant.name
        return compiled

    def one_at_a_time(variant):
        """Warps and stages mean nothing to the interpreter."""
        tiles = [(name, x) for name, values in variant.tiles.items() for x in values]
        return [{}, *({name: x} for name, x in tiles if x != variant.constants[name])]

    tuner = Tuner(tmp_path / "a.json", lambda run: -len(launched))  # the last is the fastest
    monkeypatch.setattr(Variant, "_first_launch", launch)
    if INTERPRETED:
        monkeypatch.setattr(Variant, "choices", property(one_at_a_time))
    monkeypatch.setattr(tuning, "tuner", lambda: tuner)
    monkeypatch.setenv("POINTFORMER_AUTOTUNE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with dirty_memory():
            tuned = call.run("triton")
    monkeypatch.delenv("POINTFORMER_AUTOTUNE")
    with dirty_memory():
        expected = call.run("triton")
    assert tuner.choices
    if any(variant.tiles for variant in launched):
        assert any(tuner.choices.values())
    assert all(tuning.agree(*pair, 1e-3) for pair in zip(tuned, expected, strict=True))


def test_what_reads_its_output_is_not_tuned(monkeypatch):
    """Kernels that go on where an earlier launch has ended."""
    launched = []
    monkeypatch.setattr(Variant, "launch", lambda variant, *given: launched.append(variant))
    op_calls()["knn, long lists"].run("triton")
    names = {variant.name for variant in launched if not variant.writes}
    assert names == {"box_tree_fwd_kernel", "nearest_fwd_kernel"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", op_calls())
def test_tuned_results_are_right(tmp_path, monkeypatch, name):
    """With real times, which need no wrong choice to be refused."""
    call = op_calls()[name].to("cuda")
    monkeypatch.setenv("POINTFORMER_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "tuner", lambda: Tuner(tmp_path / "a.json", tuning._median_time))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        tuned = call.run("triton")
    monkeypatch.delenv("POINTFORMER_AUTOTUNE")
    for ours, expected in zip(tuned, call.run("triton"), strict=True):
        assert tuning.agree(ours, expected, 1e-3)
    assert json.loads((tmp_path / "a.json").read_text())
