"""Curves and the page of a run, which opens without a network."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from helpers.training import KINDS, TINY, dataset_of, recipe_of, trainer_of, write_folder
from pointformer import cli
from pointformer.data import Annotation, Category
from pointformer.models import create_model
from pointformer.tasks.semantic import SemanticClasses
from pointformer.train import report
from pointformer.train.curves import plot_curves
from pointformer.train.logs import Logs
from pointformer.train.report import write_report


class Page(HTMLParser):
    """What a browser would fetch, and the headings and cells that it would show."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = write_folder(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("runs") / "<run> & more"
    arguments = ["--task", "instance", "--out", out, "--threads", "1"]
    changes = ["budget.steps=4", "log_every=1", "validation.times=1"]
    assert cli.main(["train", str(TINY), str(data), *map(str, arguments), *changes]) == 0
    return data, out


def test_a_run_leaves_curves_and_token_maps(run):
    _, out = run
    assert Image.open(out / "curves.png").size == (1100, 700)
    names = sorted(path.name for path in (out / "tokens").iterdir())
    assert names == [f"{step:08d}-{n}.jpg" for step in (2, 4) for n in (0, 1)]


def test_the_page_has_all_and_fetches_nothing(run, capsys):
    _, out = run
    assert cli.main(["report", str(out)]) == 0
    page = Page((out / "report.html").read_text("utf-8"))
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert page.texts.count("<run> & more") == 2  # the title and the heading, escaped in the file
    for heading in ("Curves", "Scores", "What is found, by class and size", "Worst pictures",
                    "Tokens through training", "step 2", "step 4"):  # fmt: skip
        assert heading in page.texts
    assert len(page.sources) == 1 + 2 + 4  # curves, the worst of 2 pictures, token maps
    rows = re.findall(r"<tr><td>\d+</td>", (out / "report.html").read_text("utf-8"))
    assert len(rows) == 2  # of scores
    assert cli.main(["report", str(out), "--pictures", "0"]) == 0  # replaces its own
    assert "Worst pictures" not in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize("task", ["semantic", "panoptic", "classification"])
def test_every_task_has_its_page(task, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    for folder in (data, run):
        folder.mkdir()
    dataset = dataset_of(data, task, count=4)
    trainer = trainer_of(dataset, recipe_of(data, task=task))
    with Logs(run, 0) as logs:
        logs.add_training(1, {"epoch": 0.5, "loss": 2.0, "learning_rate": 1e-3, "gradient": 1.0,
                              "seconds": 1.0, "images_per_second": 3.0})  # fmt: skip
    write_report(run, trainer.model.eval(), dataset, run / "a.html", worst=3, say=lambda text: None)
    page = Page((run / "a.html").read_text("utf-8"))
    assert len(page.sources) == 1 + 3
    names = {category.name for category in dataset.categories}
    assert names & set(page.texts)
    assert ("IoU" in page.texts) == (task == "semantic")


@pytest.fixture
def annotations(monkeypatch):
    """Four pictures, in which a model finds an mIoU of 0, 0.5, 1 and 0.25."""
    truth = np.repeat([0, 1], 6)[:, None].repeat(12, 1).astype(np.int32)
    half = truth.copy()
    half[4:8] = 1 - half[4:8]
    found = [1 - truth, half, truth, 0 * truth]
    annotations = [Annotation(f"picture {n}", None, (12, 12), n, semantic=truth) for n in range(4)]
    image = np.zeros((12, 12, 3), np.uint8)
    monkeypatch.setattr(report, "predictions", lambda model, task, dataset, indices, **seen: (
        (dataset[n], image, found[n]) for n in indices
    ))  # fmt: skip
    return annotations


def test_the_worst_pictures_come_first(run, tmp_path, annotations):
    model, task = create_model(run[1] / "model.safetensors"), SemanticClasses(KINDS[:2])
    write_report(run[1], model, annotations, tmp_path / "a.html", task=task, worst=2,
                 say=lambda text: None)  # fmt: skip
    page = Page((tmp_path / "a.html").read_text("utf-8"))
    shown = [text for text in page.texts if text.startswith("picture ")]
    assert shown == ["picture 0: 0.000", "picture 3: 0.250"]
    said = []
    for pictures in (1, 2):
        write_report(run[1], model, annotations, tmp_path / "a.html", task=task, pictures=pictures,
                     say=said.append)  # fmt: skip
    assert said == ["1 picture looked at", "2 pictures looked at"]


def test_bad_input_is_one_line(run, capsys, tmp_path):
    _, out = run
    foreign = tmp_path / "notes.html"
    foreign.write_text("mine")
    for arguments, message in (
        ([tmp_path], f"{tmp_path / 'recipe.yaml'}: no such file: expected the folder of a run"),
        ([out, "--pictures", "-1"], "--pictures: expected at least 0, got -1"),
        ([out, "--out", foreign], f"{foreign}: is there, and not as this program wrote it"),
        ([out, "--out", out / "recipe.yaml", "--overwrite"], "is an input"),
        ([out, "--data", tmp_path], f"{tmp_path}"),
    ):
        capsys.readouterr()
        assert cli.main(["report", *map(str, arguments)]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert message in lines[0]
    assert foreign.read_text() == "mine"


def test_what_the_page_says_of_the_run_and_of_all_pictures(tmp_path, annotations):
    """The median of what was waited, of which scores the last are, IoU of all pictures together."""
    with Logs(tmp_path, 0) as logs:
        for step, waiting in enumerate((0.1, 0.9, 0.2), 1):
            logs.add_training(step, {"loss": 2.0, "learning_rate": 1e-3, "gradient": 1.0,
                                     "waiting": waiting})  # fmt: skip
        logs.add_scores(2, {"final": 0, "pictures": 1, "mIoU": 0.5})
        logs.add_scores(3, {"final": 1, "pictures": 4, "mIoU": 0.25})
    model = create_model("aff_nano", head="dense", num_classes=2, task="semantic", dims=(8, 8),
                         depths=1, heads=1)  # fmt: skip
    options = {"task": SemanticClasses(KINDS[:2]), "say": lambda text: None}
    write_report(tmp_path, model, annotations, tmp_path / "a.html", **options)
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "<td>20.0% of the time</td>" in text
    assert "The last row is of all validation pictures." in text
    assert "<td>background</td><td>0.421</td>" in text  # (0 + 48 + 72 + 72) / (144 + 96 + 72 + 144)
    assert "<td>small</td><td>0.312</td>" in text
    assert "Worst pictures" in text
    write_report(tmp_path, model, annotations, tmp_path / "a.html", worst=0, **options)
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "<td>small</td><td>0.312</td>" in text
    assert "Worst pictures" not in text
    (tmp_path / "scores.csv").write_text("step,final,pictures,mIoU\nx,0,1,0.5\n3,1,4,0.25\n")
    log = tmp_path / "log.csv"
    log.write_text(re.sub(r"0\.[192]$", "x", log.read_text(), flags=re.MULTILINE))
    write_report(tmp_path, model, None, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "<tr><td>–</td><td>1</td><td>0.500</td></tr>" in text
    assert "waited" not in text


def test_the_curves_have_what_was_logged(tmp_path):
    with Logs(tmp_path, 0) as logs:
        for step in (1, 2):
            logs.add_training(step, {
                "epoch": 0.5, "seconds": 1.0, "loss": 2.0, "dice": 1.0, "learning_rate": step - 1.0,
                "gradient": 1.0, "images_per_second": 3.0, "loaded_per_second": 9.0, "waiting": 0.0,
            })  # fmt: skip
        logs.add_scores(2, {"final": 0, "pictures": 3, "AP": 0.5, "none": float("nan")})
    panels = plot_curves(tmp_path).axes
    assert {panel.get_title(): [line.get_label() for line in panel.lines] for panel in panels} == {
        "loss": ["loss", "dice"],
        "score": ["AP"],
        "learning rate, gradient": ["learning_rate", "gradient"],
        "pictures per second, learned and to be loaded": [
            "images_per_second", "loaded_per_second"
        ],
    }  # fmt: skip
    # A rate of 0 has no logarithm.
    assert [panel.get_yscale() for panel in panels] == ["log", "linear", "linear", "log"]
    assert panels[1].get_ylim() == (0, 1)


def test_of_large_pictures_the_middle_is_drawn():
    image = np.arange(600)[:, None, None].repeat(400, 1).repeat(3, 2)
    middle = report._middle(image)
    assert middle.shape == (512, 400, 3)
    assert (middle[0, 0, 0], middle[-1, 0, 0]) == (44, 555)


def test_what_is_found_is_a_share_of_what_is_annotated(monkeypatch):
    truth = np.repeat([0, 1], 6)[:, None].repeat(12, 1).astype(np.int32)
    annotation = Annotation("a", None, (12, 12), 0, semantic=truth)
    seen = annotation, np.zeros((12, 12, 3), np.uint8), 0 * truth
    monkeypatch.setattr(report, "predictions", lambda *args, **options: [seen])
    task = SemanticClasses([Category(0, "a"), Category(1, "b")])
    model = SimpleNamespace(of_points=False)
    found = report._examined(model, task, [None], 1, 0, lambda line: None)
    assert [row["cells"][1] for row in found["classes"]] == [(1, 1), (0, 1)]
