"""bench/study: its cells, its queue through kills, and its tables."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.training import ROOT, dataset_of, write_folder
from pointformer import TokenSet
from pointformer.annotations import Mask, Objects
from pointformer.data import Category
from pointformer.metrics import Accuracy, InstanceAP, RecallBySize, SemanticIoU
from pointformer.models import Model, complexity_of, create_model, save_model
from pointformer.models.config import config_of
from pointformer.tasks import task_of
from pointformer.train.initial import make_model
from pointformer.train.recipe import read_recipe

FOLDER = ROOT / "bench" / "study"
# A cell in seconds.
QUICK = (
    "options.dims=[16,16]", "options.heads=[2,2]", "options.depths=[1,1]", "budget.steps=6",
    "augmentation.crop.size=64", "batch=2", "checkpoints.steps=1", "validation.times=1",
    "log_every=1",
)  # fmt: skip


def loaded(name, monkeypatch):
    """A module of the study, which finds the others by their names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for other in ("cells", "ablations", "objects", "tables", "trained"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_arms_differ_in_their_choice_only(monkeypatch):
    """Of each data set, head and budget: the same fields but for these, the same weights."""
    cells = loaded("cells", monkeypatch)
    assert len({cell.name for cell in cells.CELLS}) == len(cells.CELLS)
    assert {cell.budget for cell in cells.CELLS if cell.arm == "swin"} == {4, 16, 64}
    first = cells.CELLS[: len(cells.ARMS)]
    assert {cell.arm for cell in first} == set(cells.ARMS)
    assert len({(cell.data, cell.head, cell.budget, cell.seed) for cell in first}) == 1
    assert {cell.seed for cell in cells.CELLS if cell.data != "hit_uav"} == set(cells.SEEDS)
    assert cells.CELLS[-1].seed in cells.LATER_SEEDS
    for cell in [c for c in cells.CELLS if (c.budget, c.seed) in ((16, 0), (4, 3))]:
        recipe, alike = cell.recipe(Path("data")), cell.recipe(Path("elsewhere"))
        grid = cells.Cell(cell.data, cell.head, cell.budget, "grid", cell.seed).recipe(Path("data"))
        assert not recipe.differences(asdict(alike))
        assert recipe.budget.steps == cells.STEPS[cell.head] * (2 if cell.seed == 3 else 1)
        if cell.arm != "swin":
            names = {text.split()[0] for text in recipe.differences(asdict(grid))}
            assert names <= {"options.ranking", "options.spread", "options.reach", "score_weight"}
            assert bool(names) == (cell.arm != "grid")
    for head, task in (("dense", "semantic"), ("mask2former", "instance")):
        data = next(name for name, own in cells.DATA.items() if own[head]["task"] == task)
        shapes = {}
        for arm in cells.ARMS:
            recipe = cells.Cell(data, head, 16, arm, 0).recipe(Path("data"))
            model = make_model(recipe, [Category(1, "one")] * (1 if task == "instance" else 5))
            shapes[arm] = {name: p.shape for name, p in model.named_parameters()}
        assert all(shapes[arm] == shapes["grid"] for arm in cells.ARMS if arm != "swin")


def line(cells, arm="grid", seed=0, budget=16, small=0.5, main=0.4, loss=(1.0, 0.99), size=2,
         steps=3000):  # fmt: skip
    cell = cells.Cell("hit_uav", "dense", budget, arm, seed)
    found = [[0, 1, 1, 0]] * size
    return {
        "cell": asdict(cell),
        "scores": {"mIoU": main, "IoU, a": 0.09, "small": small, "kinds": ["a", "b"],
                   "sides": [16, 32, 96], "found": found, "annotated": [[2, 1, 4, 0]] * size,
                   "pictures": 7},
        "parameters": 400_000, "size": [64, 64], "multiply_adds": 2_000_000_000,
        "multiply_adds_after": 64_000_000 // budget, "cpu_seconds": 0.25,
        "curve": {"loss": list(loss), "steps": steps}, "recipe": {"task": "semantic"},
    }  # fmt: skip


def test_tables_say_what_the_lines_say(monkeypatch, tmp_path):
    cells, tables = loaded("cells", monkeypatch), loaded("tables", monkeypatch)
    lines = [
        line(cells, small=0.1),  # done again
        line(cells, "learned", 0, small=0.75, main=0.41),
        line(cells, "learned", 1, small=0.65, main=0.40, loss=(1.0, 0.9)),
        line(cells, seed=0, small=0.5),
        line(cells, seed=1, small=0.6),
        line(cells, "gradient", 2, small=0.9),
        line(cells, "gradient", 3, small=0.8, steps=6000),
        line(cells, "learned", 3, small=0.9, steps=6000),
        line(cells, seed=3, small=0.7, steps=6000),
    ]
    page = tables.page(tables.newest(lines))
    rows = [
        re.split(r" *\| *", row)[1:-1] for row in page.splitlines() if row.startswith("| dense")
    ]
    by_arm = {row[3]: row[4:] for row in rows if len(row) == 13 and row[2] == "3000"}
    assert by_arm["learned"] == [
        "2", "70.0 (7.1)", "40.5 (0.7)", "9", "0 / 100 / 25 / –", "4", "2000", "0.40", "1 of 2"
    ]  # fmt: skip
    assert by_arm["grid"][1] == "55.0 (7.1)"
    assert by_arm["gradient"][:2] == ["1", "90.0"]
    assert page.index("points over grid") < page.index("points over gradient")
    assert [row for row in rows if len(row) == 8] == [
        [
            "dense",
            "1/16",
            "3000",
            "learned",
            "2",
            "15.0 (14.1)",
            "0.5 (0.7)",
            "open: too few seeds",
        ],
        ["dense", "1/16", "6000", "learned", "1", "20.0", "0.0", "open: too few seeds"],
        ["dense", "1/16", "6000", "gradient", "1", "10.0", "0.0", "open: too few seeds"],
        ["dense", "1/16", "6000", "learned", "1", "10.0", "0.0", "open: too few seeds"],
    ]
    assert tables.verdict([2, 3, 4], [0, -1, -2]) == "pays"
    assert tables.verdict([2, 2, 2], [0, 0, 0]) == "pays"
    assert tables.verdict([0.5, 1.0, 1.5], [0, 0, 0]) == "does not pay"  # 2 errors below 2
    assert tables.verdict([0.5, 1.2, 1.9], [0, 0, 0]) == "open"
    assert [tables.is_flat(losses) for losses in ([1, 0.97], [1, 0.969], [1], [2, 1, 1])] == [
        True, False, False, True
    ]  # fmt: skip
    assert tables.verdict([2, 3, 4], [0, -1, -2.1]) == "open"
    assert tables.verdict([2, 3, 4], [0, -1, -2], 1) == "would pay, but 1 of 6 curves are not flat"
    assert tables.verdict([-4, 3, 8], [1, 1, 1]) == "open"  # less than twice its error
    assert tables.verdict([1, 2, 2.9], [1, 1, 1]) == "open"  # it may well be 2
    assert tables.verdict([0, 0.5, 1], [1, 1, 1]) == "does not pay"
    assert tables.verdict([0, 0.5, 1], [1, 1, 1], 2).startswith("would not pay, but 2 of 6 curves")
    flat, steep = line(cells), line(cells, loss=(1.0, 0.9))
    pairs = [(flat, flat), (flat, steep), (steep, flat), (steep, steep)]
    assert [tables.rising([pair]) for pair in pairs] == [0, 1, 1, 2]
    kinds = [(4, 3000), (4, 6000), (16, 3000), (16, 6000)]
    of_kinds = [line(cells, budget=budget, steps=steps) for budget, steps in kinds]
    assert [key[1:3] for key in tables.grouped(of_kinds[::-1])] == kinds
    metrics = (SemanticIoU(2), InstanceAP(), Accuracy())
    scores = [name for metric in metrics for name in metric.compute()]
    assert set(tables.MAIN.values()) <= set(scores)
    results = tmp_path / "study.jsonl"
    results.write_text("".join(json.dumps(one) + "\n" for one in lines))
    tables.main(["--results", str(results)])
    assert (tmp_path / "study.md").read_text() == page
    assert (tmp_path / "study_hit_uav.png").stat().st_size > 10_000
    assert not (tmp_path / "study_camvid.png").exists()


def test_few_tokens_against_a_grid_of_many(monkeypatch):
    """Seed by seed, after as many steps; with more tokens there is nothing to be compared."""
    cells, tables = loaded("cells", monkeypatch), loaded("tables", monkeypatch)
    lines = [
        *(line(cells, "grid", seed, 4, small=0.6 + seed / 100, main=0.5) for seed in (0, 1)),
        line(cells, "grid", 3, 4, small=0.1, steps=6000),
        line(cells, "learned", 0, 4),
        line(cells, "learned", 0, 16, small=0.65, main=0.48),
        line(cells, "learned", 1, 16, small=0.62, main=0.51),
        line(cells, "learned", 2, 16, small=0.99),
        line(cells, "grid", 1, 32, small=0.01, main=0.4),
    ]
    table = tables.with_fewer(lines, "mIoU")
    assert [re.split(r" *\| *", row)[1:-1] for row in table.splitlines()[2:]] == [
        ["dense", "1/16", "3000", "learned", "2", "25", "3.0 (2.8)", "-0.5 (2.1)"],
        ["dense", "1/32", "3000", "grid", "1", "12", "-60.0", "-10.0"],
    ]
    assert table in tables.page(lines)
    assert tables.with_fewer(lines[:4], "mIoU") == ""


def test_the_page_has_the_tables_of_the_results(monkeypatch, tmp_path):
    """Of today's lines, and those are what makes the tables."""
    evidence, tables = loaded("evidence", monkeypatch), loaded("tables", monkeypatch)
    text, results = evidence.PAGE.read_text("utf-8"), ROOT / "bench" / "results"
    assert evidence.renewed(text, results) == text
    tables.main(["--results", str(results / "study.jsonl"), "--out", str(tmp_path)])
    for made in tmp_path.glob("*.md"):
        assert made.read_text("utf-8") == (results / made.name).read_text("utf-8")
    (tmp_path / "study.md").write_text("# Title\n\nMade by x.\n\n## A\n\n| 1 |\n\n## B\n")
    page = "1\n<!-- study.md -->\nold\n<!-- end -->\n2\n<!-- no.md -->\nold\n<!-- end -->\n"
    assert evidence.renewed(page, tmp_path) == (
        "1\n<!-- study.md -->\n### A\n\n| 1 |\n\n### B\n<!-- end -->\n2\n<!-- no.md -->\n"
        "*Not measured yet.*\n<!-- end -->\n"
    )


def test_ablations_change_one_thing(monkeypatch):
    """And what they change is another recipe, and a model that can be made."""
    ablations = loaded("ablations", monkeypatch)
    first = ablations.ABLATIONS[: len(ablations.CHANGES)]
    assert [cell.change for cell in first] == list(ablations.CHANGES)
    assert len({cell.name for cell in ablations.ABLATIONS}) == 3 * len(first)
    base = first[0].recipe(Path("data"))
    for cell in first[1:]:
        recipe = cell.recipe(Path("data"))
        names = {text.split()[0] for text in recipe.differences(asdict(base))}
        changed = ablations.CHANGES[cell.change]
        assert names == {
            f"{name}.{part}" if isinstance(value, dict) else name
            for name, value in changed.items()
            for part in (value if isinstance(value, dict) else [name])
        }
        model = make_model(recipe, [Category(n, str(n)) for n in range(5)])
        assert model.config.dims == (32, 64, 96)
        if recipe.rates is not None:
            recipe.rates.check(model)


def test_the_table_of_ablations(monkeypatch, tmp_path):
    cells, ablations = loaded("cells", monkeypatch), loaded("ablations", monkeypatch)
    tables = loaded("tables", monkeypatch)

    def of(change, seed, **values):
        cell = ablations.Ablation("hit_uav", change, seed)
        return {**line(cells, **values), "cell": cell.as_dict()}

    lines = [
        of("alpha_0", 0, small=0.3, main=0.38),
        of("alpha_0", 1, small=0.4, main=0.41, loss=(1.0, 0.9)),
        of("base", 0, small=0.4, main=0.40),
        of("base", 1, small=0.6, main=0.40),
        of("center", 2, small=0.7),
    ]
    (tmp_path / "ablations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    tables.main(["--results", str(tmp_path / "study.jsonl")])
    rows = [
        re.split(r" *\| *", row)[1:-1]
        for row in (tmp_path / "ablations.md").read_text().splitlines()
        if row.startswith("| ")
    ]
    assert rows[2:] == [
        ["base", "2", "50.0 (14.1)", "", "40.0 (0.0)", "", "2000", "250", "2 of 2"],
        ["alpha_0", "2", "35.0 (7.1)", "-15.0 (7.1)", "39.5 (2.1)", "-0.5 (2.1)", "2000", "250",
         "1 of 2"],
        ["center", "1", "70.0", "", "40.0", "", "2000", "250", "1 of 1"],
    ]  # fmt: skip


def test_the_recipe_of_three_merges_is_the_cells(monkeypatch):
    """But for the stages: with the figures of one the other is compared."""
    cells = loaded("cells", monkeypatch)
    recipe = read_recipe(str(FOLDER / "three_merges.yaml"), ["data.path=hit_uav"])
    (cell,) = (c for c in cells.CELLS if c.name == "hit_uav-dense-16-spread-0")
    differences = recipe.differences(asdict(cell.recipe(Path("."))))
    names = {text.split()[0].removeprefix("options.") for text in differences}
    assert names == {"dims", "depths", "heads", "first_stage", "rate", "ranking"}
    model = make_model(recipe, [Category(n, str(n)) for n in range(5)])
    assert model.config.rates == (0.25, 0.5, 0.5)


SMALL = {"dims": (8, 8, 8), "depths": 1, "heads": 1, "neighborhood_size": 16}


def test_scores_of_a_merge_are_changed_within_samples(monkeypatch):
    """And only there, and only within the context; of pictures and of points."""
    stages = loaded("stages", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    pictures = create_model("aff_nano", **SMALL).eval()
    points = create_model("point_nano", **SMALL, num_classes=2).eval()
    places = torch.rand(300, 3, generator=generator)
    for model, inputs in (
        (pictures, torch.randn(2, 3, 48, 64, generator=generator)),
        (points, points.preprocess(TokenSet(places, sizes=(100, 200)))),
    ):
        with torch.no_grad():
            plain = model.backbone(inputs)
            for change in stages.CHANGES:
                with stages.changed_scores(model, 1, change, seed=1):
                    found = model.backbone(inputs)
                assert torch.equal(found[0].scores, plain[0].scores)
                sizes = plain[1].tokens.sizes
                for before, after in zip(
                    plain[1].scores.split(sizes), found[1].scores.split(sizes), strict=True
                ):
                    if change == "shuffled":
                        assert torch.equal(before.sort()[0], after.sort()[0])
                        assert not torch.equal(before, after)
                    else:
                        assert after.max() - after.min() < 1e-3  # noise, by which some are kept
                        assert len(after.unique()) > 0.9 * len(after)
            again = model.backbone(inputs)
        assert torch.equal(again[1].scores, plain[1].scores)


def test_points_lost_are_those_that_are_gone(monkeypatch):
    stages = loaded("stages", monkeypatch)
    about = {"model": "m", "weights": "w", "data": "d", "pictures": 1, "score": "mIoU"}
    lines = [
        {**about, "change": change, "merge": merge, "seed": seed, "scores": {"mIoU": score}}
        for change, merge, seed, score in (
            ("none", None, 0, 0.5), ("shuffled", 0, 0, 0.45), ("shuffled", 1, 0, 0.52),
            ("shuffled", 1, 1, 0.5), ("constant", 1, 0, 0.2),
        )
    ]  # fmt: skip
    assert stages.page(lines).splitlines()[-2:] == [
        "| m | d (1) | mIoU | 50.0 | 1 | 5.0 | 1 |  | 0 |",
        "| m | d (1) | mIoU | 50.0 | 2 | -1.0 (1.4) | 2 | 30.0 | 1 |",
    ]


def a_trained(trained, classes, scores, monkeypatch):
    """A `Trained` of background and classes a and b that finds these scores, with six tokens."""
    positions = torch.tensor([[0, 0], [1, 1], [0, 1], [5, 5], [15, 15], [4, 10]])
    tokens = TokenSet(positions.float(), torch.zeros(6, 1))

    class Network:
        config = SimpleNamespace(patch_stride=4)
        preprocess = staticmethod(lambda picture: picture)

        def __call__(self, image, with_stages):
            return scores[None], [SimpleNamespace(tokens=tokens)]

    picture = SimpleNamespace(
        name="p", classes=classes.numpy, read_image=lambda: np.zeros((64, 64, 3), np.uint8)
    )
    categories = [Category(n, name) for n, name in enumerate(("background", "a", "b"))]
    task = SimpleNamespace(categories=categories, decode=lambda output, sizes: list(output))
    about = {"model": "m", "weights": "w", "data": "d", "pictures": 1}
    monkeypatch.setattr(trained.Trained, "about", lambda self: dict(about))
    return trained.Trained("m", "w", Network(), task, [picture], None)


def test_what_is_found_of_small_objects(monkeypatch):
    """Below 32 pixels, and of classes that are objects."""
    trained = loaded("trained", monkeypatch)
    categories = [Category(n, name) for n, name in enumerate(("a", "background"))]
    metric = RecallBySize(categories, trained.SIDES)
    metric.counts[:] = [[1, 1, 5, 7], [3, 4, 0, 0]], [[2, 2, 5, 7], [3, 4, 9, 9]]
    share, found, annotated = trained.recall_of([InstanceAP(), metric])
    assert share == 0.5
    assert (found.tolist(), annotated.tolist()) == ([[1, 1, 5, 7]], [[2, 2, 5, 7]])


def test_lines_of_another_model_or_other_data_are_not_its_own(monkeypatch, tmp_path):
    script = loaded("trained", monkeypatch)
    trained = a_trained(script, torch.zeros(1), None, monkeypatch)
    about, results = trained.about(), tmp_path / "lines.jsonl"
    assert trained.lines(results) == []
    for name in about:
        script.add_line(results, about | {name: "other"})
    script.add_line(results, about | {"versions": "any"})
    assert trained.lines(results) == [about | {"versions": "any"}]


def test_lines_of_what_was_seen_otherwise_are_not_its_own(monkeypatch, tmp_path):
    script = loaded("trained", monkeypatch)
    model, results = create_model("aff_nano", head="dense", num_classes=2), tmp_path / "lines.jsonl"
    changes = ([], ["validation.resize={size: 64}"], ["validation.tile=32"])
    sides = [
        script.Trained("m", "w", model, task_of(model), [None], read_recipe("nuclei.yaml", some))
        for some in changes
    ]
    for number, trained in enumerate(sides):
        assert trained.lines(results) == []
        script.add_line(results, trained.about() | {"number": number, "seen": [1, 2]})
        (line,) = trained.lines(results)
        assert line["number"] == number


def test_small_objects_and_their_tokens(monkeypatch):
    """Found, seen as another class, and missed; with two tokens, one, and none."""
    objects = loaded("objects", monkeypatch)
    classes = torch.zeros(64, 64, dtype=torch.long)
    predicted = classes.clone()
    classes[2:10, 2:8] = predicted[2:10, 2:8] = 1
    classes[20:24, 20:28], predicted[20:24, 20:28] = 1, 2
    classes[10:14, 40:50] = 2
    classes[30:64, :40] = 2  # not small
    scores = torch.nn.functional.one_hot(predicted, 3).movedim(-1, 0).float()
    trained = a_trained(objects, classes, scores, monkeypatch)
    # Middles of the tokens' cells: (2, 2), (6, 6), (2, 6), (22, 22), (62, 62), (18, 42).
    expected = [(3, True, True), (1, False, True), (0, False, False)]
    assert objects.small(trained, 0) == expected
    line = objects.measure(trained)
    assert (line["objects"], line["found"], line["seen"]) == (
        [1, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 0]
    )  # fmt: skip
    row = objects.page([trained.about() | line]).splitlines()[-1]
    assert row == (
        "| m | d (1) | 3 | 1.3 | 33 / 33 / 33 / 0 | 67 / 0 / 100 / 100 / – | 33 / 0 / 0 / 100 / – |"
    )


def test_a_model_has_one_line(monkeypatch, tmp_path):
    classes = torch.zeros(64, 64, dtype=torch.long)
    scores = torch.nn.functional.one_hot(classes, 3).movedim(-1, 0).float()
    for name in ("objects", "thresholds"):
        script, results = loaded(name, monkeypatch), tmp_path / f"{name}.jsonl"
        trained = a_trained(script, classes, scores, monkeypatch)
        monkeypatch.setattr(script.Trained, "open", lambda options, trained=trained: trained)
        monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
        for _ in range(2):
            script.main(["m", "recipe", "--results", str(results)])
        (line,) = map(json.loads, results.read_text().splitlines())
        assert line.items() >= trained.about().items()
        assert results.with_suffix(".md").read_text() == script.page([line])


def test_thresholds_paint_less_and_less(monkeypatch):
    """Two small objects, one of them surer, a false one, and a large one that does not count."""
    thresholds = loaded("thresholds", monkeypatch)
    classes = torch.zeros(64, 64, dtype=torch.long)
    scores = torch.zeros(3, 64, 64)
    scores[0] = 0.5
    for rows, columns, kind, score, real in (
        (slice(0, 8), slice(0, 8), 1, 1.2, 1),
        (slice(10, 18), slice(0, 8), 1, 0.6, 1),
        (slice(20, 28), slice(0, 8), 1, 0.8, 0),
        (slice(30, 64), slice(0, 64), 2, 9.0, 2),
    ):
        classes[rows, columns], scores[kind, rows, columns] = real, score
    trained = a_trained(thresholds, classes, scores, monkeypatch)
    line = thresholds.measure(trained)
    assert line["factors"] == (0.5, 1, 1.5, 2, 3, 4)
    assert line["small"] == [1, 1, 0.5, 0.5, 0, 0]
    background = 64 * 30 - 128  # pixels, with the false object's
    whole, two, one, none = (
        np.mean([(background - false) / (background + 128 - hit), hit / (128 + false), 1])
        for hit, false in ((128, 64), (64, 64), (64, 0), (0, 0))
    )
    np.testing.assert_allclose(line["main"], [whole, whole, two, one, none, none], atol=1e-4)
    row = thresholds.page([trained.about() | line]).splitlines()[-1]
    assert row.startswith(f"| m | d (1) | 100.0 / **{100 * whole:.1f}** | ")
    assert row.endswith(f" | {100 * (0.8 * one + 0.2 * none):.1f} / {100 * two:.1f} / "
                        f"{100 * (0.8 * two + 0.2 * whole):.1f} |")  # fmt: skip
    assert thresholds.at_equal({"small": [0.5, 0.3], "main": [0.2, 0.3]}, 0.6) == "–"


def test_a_trained_model_is_looked_at_again(monkeypatch, tmp_path):
    """At budgets, and with scores of merges changed: lines, tables, and what is done is skipped."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    data = write_folder(tmp_path / "nuclei")
    model = create_model("aff_nano", head="dense", num_classes=3, task="instance", **SMALL)
    model.trained = {"recipe": {"rates": {"least": 1 / 32, "most": 1 / 2, "merges": "alike"}}}
    (tmp_path / "run").mkdir()
    save_model(model, tmp_path / "run" / "model.safetensors")
    about = [str(tmp_path / "run/model.safetensors"), "nuclei.yaml", str(data), "--limit", "1"]
    for name, many in (("budgets", 5), ("stages", 1 + 2 * (2 + 1))):
        script, results = loaded(name, monkeypatch), tmp_path / f"{name}.jsonl"
        more = ["--seeds", "2"] if name == "stages" else []
        for _ in range(2):
            script.main([*about, "--results", str(results), *more])
            lines = [json.loads(text) for text in results.read_text().splitlines()]
            assert len(lines) == many
        assert {(line["model"], line["data"], line["pictures"]) for line in lines} == {
            ("run", "nuclei", 1)
        }
        table = results.with_suffix(".md").read_text()
        assert str(tmp_path) not in table + results.read_text()
        assert table.count("| run | nuclei (1) |") == (5 if name == "budgets" else 4)
        assert all(0 <= line["scores"]["small"] <= 1 for line in lines)
        assert table.count("| small objects found |") == (0 if name == "budgets" else 2)
        if name == "budgets":
            assert [line["rates"] for line in lines] == [[1 / n] * 2 for n in (2, 4, 8, 16, 32)]
            work = [line["multiply_adds"] for line in lines]
            assert work == sorted(work, reverse=True)
            assert len(set(work)) > 3
            assert results.with_suffix(".png").stat().st_size > 10_000


def test_models_of_objects_by_score_kind_and_size(monkeypatch, tmp_path):
    """Two pictures, all and half of whose objects are found; what is shown in vain scores less."""
    instances = loaded("instances", monkeypatch)
    data = dataset_of(tmp_path, "instance", count=2)
    (tmp_path / "index.csv").write_text("name,mode\n0,gray\n1,stained\n2,gray\n", "utf-8")
    found = []
    for annotation, every in zip(data, (1, 2), strict=True):
        objects = annotation.objects()
        right = [*zip(objects.masks, objects.classes, strict=True)][::every]
        masks = [mask for mask, _ in right]
        empty = np.argwhere(annotation.ids == 0)[0]
        masks.append(Mask(*empty.tolist(), np.ones((1, 1), bool)))
        classes = [*(kind for _, kind in right), 0]
        found.append(Objects(masks, classes, [0.61] * len(right) + [0.42], annotation.size))
    seen = iter(zip(data, data, found, strict=True))
    monkeypatch.setattr(instances, "predictions", lambda *a, **k: seen)
    model = create_model("aff_nano", head="dense", num_classes=3, task="instance", **SMALL)
    recipe = read_recipe("nuclei.yaml", [f"data.path={tmp_path}"])
    task = task_of(model, recipe.task, data.categories)
    trained = instances.Trained("m", "w", model, task, data, recipe)
    line = instances.measure(trained)
    many = [len(annotation.segments) for annotation in data]
    hits = [many[0], -(-many[1] // 2)]
    assert line["min_score"] == 0.5  # 0.45 to 0.6 are the best, and this is nearest to 0.5
    assert line["counts"] == [sum(hits), 0, sum(many) - sum(hits)]
    assert line["precision"] == line["mean"] == round(sum(hits) / sum(many), 4)
    assert line["kinds"] == {"gray": [1, 1.0], "stained": [1, round(hits[1] / many[1], 4)]}
    sides = np.concatenate([[s.area**0.5 for s in a.segments] for a in data])
    groups = np.histogram(sides, [0, 7, 16, 32, 1000])[0]
    assert line["annotated"] == [groups.tolist()]
    assert np.sum(line["found"]) == sum(hits)
    assert line["parameters"] == complexity_of(model, 32, 32).parameters
    row = instances.page([trained.about() | line]).splitlines()[-1]
    share = f"{100 * line['precision']:.1f}"
    assert row.startswith(f"| m | {tmp_path.name} (2) | 0.5 | {share} | 100.0 (gray, 1), ")
    (tmp_path / "index.csv").unlink()
    assert instances.kinds_in(tmp_path) == {}


def test_times_are_taken_in_turns(monkeypatch, tmp_path):
    """Of the networks alone; beside the first, and the last call of a data set counts."""
    times = loaded("times", monkeypatch)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    data, clock, called = write_folder(tmp_path / "nuclei"), iter(range(1000)), []
    model = create_model("aff_nano", head="dense", num_classes=3, task="instance", **SMALL)
    for name in "ab":
        (tmp_path / name).mkdir()
        save_model(model, tmp_path / name / "model.safetensors")
    monkeypatch.setattr(Model, "forward", lambda self, images: called.append(id(self)))
    monkeypatch.setattr(time, "process_time", lambda: next(clock) ** 2)
    files = [str(tmp_path / name / "model.safetensors") for name in "ab"]
    for names in (files, files[::-1]):
        times.main([str(data), *names, "--results", str(tmp_path / "times.jsonl")])
    assert len(called) == 2 * 2 * 3  # calls, models, two pictures and the first one to warm up
    assert called[:4:2] != called[1:4:2]
    lines = [json.loads(text) for text in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert lines[0]["cpu_seconds"] == [(9 + 17) / 2, (13 + 21) / 2]  # (n + 1) ** 2 - n ** 2
    rows = (tmp_path / "times.md").read_text().splitlines()[-2:]
    assert [row.split(" | ")[0] for row in rows] == ["| b", "| a"]
    assert rows[0].endswith("| 1.00 |")


def test_classifiers_and_how_often_they_are_right(monkeypatch, tmp_path):
    """Of the pictures that changes of the recipe choose, by the model's own mouth."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    script, g = loaded("classification", monkeypatch), np.random.default_rng(0)
    pictures, labels = g.integers(0, 256, (12, 16, 16, 3), np.uint8), np.arange(12) % 7
    arrays = {"x_train": pictures[:7], "y_train": labels[:7], "x_test": pictures, "y_test": labels}
    np.savez(tmp_path / "small.npz", **arrays)
    options = {**SMALL, "patch_stride": 1}
    model = create_model(
        "aff_nano", head=None, num_classes=7, task="classification", **options
    ).eval()
    save_model(model, tmp_path / "model.safetensors")
    with torch.inference_mode():
        right = [
            model(model.preprocess(torch.tensor(picture).movedim(-1, 0))[None]).argsort(-1)[0]
            for picture in pictures
        ]
    tops = [
        sum(int(label) in order[-k:] for order, label in zip(right, labels, strict=True)) / 12
        for k in (1, 5)
    ]
    results = tmp_path / "classification.jsonl"
    script.main(
        [str(tmp_path / "model.safetensors"), "cifar10.yaml", str(tmp_path / "small.npz"),
         "data.val=test", "--name", "m", "--results", str(results)]
    )  # fmt: skip
    (line,) = map(json.loads, results.read_text().splitlines())
    assert [*line["scores"].values()] == [round(top, 4) for top in tops]
    row = results.with_suffix(".md").read_text().splitlines()[-1]
    scores = " | ".join(f"{100 * round(top, 4):.1f}" for top in tops)
    assert row.startswith(f"| m | small.npz (12) | 100 epochs | {scores} | ")


def test_the_unet_takes_the_place_of_the_backbone(monkeypatch, tmp_path):
    """Through training and scoring, by the same commands; odd sides too."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    unet = loaded("unet", monkeypatch)
    monkeypatch.setattr(unet.model, "AFF", unet.model.AFF)  # put back at the end
    data, out = write_folder(tmp_path / "nuclei", side=50), tmp_path / "run"
    changes = ["budget.steps=2", "augmentation.crop.size=32", "batch=2", "score_weight=0"]
    train = ["train", "nuclei_stars.yaml", str(data), "--out", str(out), *changes]
    assert unet.main(train) == 0
    results = tmp_path / "instances.jsonl"
    scored = ["instances", str(out / "model.safetensors"), str(out / "recipe.yaml"), str(data)]
    assert unet.main([*scored, "--results", str(results)]) == 0
    (line,) = map(json.loads, results.read_text().splitlines())
    assert (line["model"], line["pictures"], line["kinds"]) == ("run", 2, {})
    assert 1_000_000 < line["parameters"] < 2_000_000  # about as many as aff_nano has with stars
    stages = unet.UNet(config_of("aff_nano"))(torch.zeros(1, 3, 50, 33))
    assert [stage.tokens.num_tokens for stage in stages] == [13 * 9, 7 * 5, 4 * 3, 2 * 2]


def command(root, *more):
    return [
        sys.executable, str(FOLDER / "run.py"), str(root), "--out", str(root / "runs"),
        "--results", str(root / "study.jsonl"), "--only", "hit_uav-dense-16-supervised-0", *more,
        *QUICK,
    ]  # fmt: skip


@pytest.mark.long
def test_a_killed_cell_goes_on_and_a_finished_one_is_skipped(tmp_path):
    write_folder(tmp_path / "hit_uav")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(tmp_path), env=environment)
    checkpoints = tmp_path / "runs" / "hit_uav-dense-16-supervised-0" / "checkpoints"
    while process.poll() is None and not any(
        int(path.name.split("-")[1]) > 0 for path in checkpoints.glob("step-*.pt")
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "study.jsonl").exists()
    subprocess.run(command(tmp_path), env=environment, check=True)
    (done,) = [json.loads(text) for text in (tmp_path / "study.jsonl").read_text().splitlines()]
    assert done["cell"] == {
        "data": "hit_uav", "head": "dense", "budget": 16, "arm": "supervised", "seed": 0
    }  # fmt: skip
    assert done["curve"]["steps"] == 6
    assert done["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(done)
    assert sum(map(sum, done["scores"]["annotated"])) > 0
    assert 0 < done["multiply_adds_after"] < done["multiply_adds"]
    again = subprocess.run(command(tmp_path), env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")
    assert len((tmp_path / "study.jsonl").read_text().splitlines()) == 1
    other = subprocess.run(
        [*command(tmp_path, "--list"), "seed=5"], env=environment, capture_output=True, text=True
    )
    assert other.stdout.split() == ["hit_uav-dense-16-supervised-0"]  # of another recipe
    table = [sys.executable, str(FOLDER / "tables.py"), "--results", str(tmp_path / "study.jsonl")]
    subprocess.run(table, env=environment, check=True)
    assert "| dense | 1/16 | 6 | supervised | 1 |" in (tmp_path / "study.md").read_text()


@pytest.mark.parametrize(
    "name",
    ["budgets", "classification", "instances", "objects", "stages", "thresholds", "times"],
)
def test_pages_are_those_of_their_lines(monkeypatch, name):
    results = ROOT / "bench" / "results"
    lines = loaded("cells", monkeypatch).read_lines(results / f"{name}.jsonl")
    page = loaded(name, monkeypatch).page(lines)
    assert page == (results / f"{name}.md").read_text("utf-8")


def test_todays_cells_are_those_of_the_results(monkeypatch):
    """What is trained from now on is compared with what was: one of each kind."""
    cells, ablations = loaded("cells", monkeypatch), loaded("ablations", monkeypatch)
    tables = loaded("tables", monkeypatch)
    for kind, results in (
        (cells.Cell, cells.RESULTS),
        (ablations.Ablation, ablations.ABLATION_RESULTS),
    ):
        chosen = {}
        for line in tables.newest(cells.read_lines(results)):
            cell, about = kind(**line["cell"]), line["cell"]
            chosen[about.get("arm"), about.get("change"), cell.data] = cell, line["recipe"]
        assert len(chosen) > 10
        for cell, recipe in chosen.values():
            assert cell.recipe(Path("data")).differences(recipe) == [], cell.name


def test_the_most_telling_cells_come_first(monkeypatch):
    """The budget of the goal, the scarcest, that with which the goal compares; one data set and the
    dense head before the others."""
    cells = loaded("cells", monkeypatch).CELLS
    first = [c for c in cells if (c.data, c.head, c.seed) == ("hit_uav", "dense", 0)]
    assert list(dict.fromkeys(cell.budget for cell in first)) == [16, 64, 4, 32, 8]
    assert list(dict.fromkeys((cell.head, cell.data) for cell in cells)) == [
        (head, data)
        for head in ("dense", "mask2former")
        for data in ("hit_uav", "nuclei_dsb2018", "camvid")
    ]
    assert list(dict.fromkeys(cell.seed for cell in cells)) == [0, 1, 2, 3, 4, 5]


def test_the_curve_of_a_run(monkeypatch, tmp_path):
    """Of the loss means of tenths, and the scores on the way, not those of the end."""
    script = loaded("run", monkeypatch)
    rows = [f"{step},{step / 10},{6 * step}" for step in range(1, 41)]
    (tmp_path / "log.csv").write_text("\n".join(["step,loss,seconds", *rows]))
    scores = ["step,final,pictures,mIoU,accuracy", "10,0,3,0.25,0.5", "40,0,3,0.5,1", "40,1,9,1,1"]
    (tmp_path / "scores.csv").write_text("\n".join(scores))
    assert script.curve_of(tmp_path) == {
        "steps": 40,
        "minutes": 4.0,
        "loss": [round(0.25 + 0.4 * tenth, 2) for tenth in range(10)],
        "score": "mIoU",
        "scores": [[10, 0.25], [40, 0.5]],
    }
    (tmp_path / "log.csv").write_text("\n".join(["step,loss,seconds", *rows[:3]]))
    (tmp_path / "scores.csv").write_text("\n".join([scores[0], scores[-1]]))
    curve = script.curve_of(tmp_path)
    assert (curve["loss"], curve["score"], curve["scores"]) == ([0.1, 0.2, 0.3], "", [])


def test_costs_are_of_the_most_frequent_size(monkeypatch):
    """After the first stage: its merge and the later stages, without the head."""
    script = loaded("run", monkeypatch)
    model = create_model("aff_nano", head="dense", num_classes=3, **SMALL).eval()
    pictures = [
        SimpleNamespace(read_image=lambda size=size: np.zeros((*size, 3), np.uint8))
        for size in ((64, 64), (32, 48), (32, 48))
    ]
    costs = script.costs_of(model, pictures, None)
    stages = model.backbone.stages
    later = complexity_of(model, 32, 48, parts=[stages[0].merge, *stages[1:]])
    assert costs["size"] == [32, 48]
    assert costs["multiply_adds"] == complexity_of(model, 32, 48).total
    assert costs["multiply_adds_after"] == later.total > 0
