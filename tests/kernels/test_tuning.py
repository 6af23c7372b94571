"""The opt-in tuner, with made-up times; that tuned kernels are right is tested on GPUs."""

import json

import pytest
import torch
import triton

from pointformer.kernels.triton import merge, tuning
from pointformer.kernels.triton.tuning import Tuner, candidates, size_class

DEFAULT = {"num_warps": 4, "num_stages": 2, "maxnreg": 255}


class Kernel:
    """Launches that take `times[num_warps, num_stages]`, or 9; counts them."""

    def __init__(self, times, spills=(), fails=()):
        self.times, self.spills, self.fails = times, spills, fails
        self.launches = 0
        self.n_spills = 0

    def run(self, options):
        assert options["maxnreg"] == 255
        place = options["num_warps"], options["num_stages"]
        if place in self.fails:
            raise triton.runtime.errors.OutOfResources(1, 0, "registers")
        self.launches += 1
        self.last = self.times.get(place, 9.0)
        self.n_spills = int(place in self.spills)
        return self

    def time(self, run):
        run()
        return self.last


def test_fastest_is_chosen_and_remembered(tmp_path):
    path = tmp_path / "cache" / "autotune.json"
    kernel = Kernel({(8, 2): 1.0, (2, 3): 2.0, (8, 3): 3.0})
    tuner = Tuner(path, kernel.time)
    assert tuner.best("a", DEFAULT, kernel.run) == DEFAULT | {"num_warps": 8}
    launches = kernel.launches
    assert launches == 2 * len(list(candidates(DEFAULT))) == 12
    tuner.best("a", DEFAULT, kernel.run)
    assert Tuner(path, kernel.time).best("a", DEFAULT, kernel.run)["num_warps"] == 8
    assert kernel.launches == launches
    Tuner(path, kernel.time).best("b", DEFAULT, kernel.run)
    assert kernel.launches == 2 * launches
    assert set(json.loads(path.read_text())) == {"a", "b"}
    assert [file.name for file in path.parent.iterdir()] == ["autotune.json"]


def test_what_spills_or_does_not_fit_is_left_out(tmp_path):
    kernel = Kernel({(8, 2): 1.0, (2, 2): 2.0}, spills=[(8, 2)], fails=[(8, 3)])
    best = Tuner(tmp_path / "a.json", kernel.time).best("a", DEFAULT, kernel.run)
    assert best == DEFAULT | {"num_warps": 2}
    nothing_fits = Kernel({}, fails=[(4, 2)])
    with pytest.raises(triton.runtime.errors.OutOfResources):  # the default must
        Tuner(tmp_path / "b.json", kernel.time).best("a", DEFAULT, nothing_fits.run)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_unreadable_file_counts_as_empty(tmp_path, content):
    path = tmp_path / "autotune.json"
    path.write_text(content)
    kernel = Kernel({(2, 2): 1.0})
    assert Tuner(path, kernel.time).best("a", DEFAULT, kernel.run)["num_warps"] == 2
    assert "a" in json.loads(path.read_text())


def test_choices_last_without_a_place_for_them(tmp_path):
    (tmp_path / "file").write_text("")
    kernel = Kernel({(2, 2): 1.0})
    tuner = Tuner(tmp_path / "file" / "autotune.json", kernel.time)
    for key in "abab":
        assert tuner.best(key, DEFAULT, kernel.run)["num_warps"] == 2
    assert kernel.launches == 24


def test_a_choice_stays_when_another_process_chooses_otherwise(tmp_path):
    path = tmp_path / "autotune.json"
    ours, theirs = Kernel({(2, 2): 1.0}), Kernel({(8, 2): 1.0})
    tuner = Tuner(path, ours.time)
    tuner.best("a", DEFAULT, ours.run)
    path.unlink()
    Tuner(path, theirs.time).best("a", DEFAULT, theirs.run)
    tuner.best("b", DEFAULT, ours.run)
    assert tuner.best("a", DEFAULT, ours.run)["num_warps"] == 2


def test_off_by_default(monkeypatch):
    monkeypatch.delenv("POINTFORMER_AUTOTUNE", raising=False)
    assert not tuning.enabled()
    monkeypatch.setenv("POINTFORMER_AUTOTUNE", "1")
    assert tuning.enabled()


def test_graphs_get_what_is_known(tmp_path, monkeypatch):
    kernel = Kernel({(2, 2): 1.0})
    tuner = Tuner(tmp_path / "a.json", kernel.time)
    tuner.best("known", DEFAULT, kernel.run)
    launches = kernel.launches
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert tuner.best("known", DEFAULT, kernel.run)["num_warps"] == 2
    assert tuner.best("new", DEFAULT, kernel.run) == DEFAULT
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


@pytest.mark.gpu
def test_tuned_results_are_right(tmp_path, monkeypatch):
    from pointformer import weighted_gather

    monkeypatch.setenv("POINTFORMER_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "tuner", lambda: Tuner(tmp_path / "a.json", tuning._median_time))
    features = torch.randn(500, 64, device="cuda")
    index = torch.randint(-1, 500, (300, 9), device="cuda")
    weights = torch.rand(300, 9, device="cuda")
    tuned = weighted_gather(features, index, weights)
    expected = weighted_gather(features, index, weights, impl="reference")
    torch.testing.assert_close(tuned, expected)
    assert json.loads((tmp_path / "a.json").read_text())
