"""The report of a run: one page of HTML, and the token maps on it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pointformer._files import atomic_path
from pointformer.annotations import VOID, Category, SegmentMap
from pointformer.data import Annotation, Dataset, Reading
from pointformer.data.statistics import samples_in_words
from pointformer.data.transforms import CenterCrop, Resize
from pointformer.evaluation import predictions
from pointformer.metrics import RecallBySize, SemanticIoU, size_names
from pointformer.metrics.sizes import SIDES
from pointformer.models import Model
from pointformer.models.inference import evaluating
from pointformer.prediction import to_tensor
from pointformer.segmentation.cloud_drawing import cloud_from_above
from pointformer.segmentation.drawing import focus_picture, outline, panels, with_legend
from pointformer.tasks import MapTask, Task, task_of
from pointformer.tokens import TokenSet
from pointformer.train.curves import plot_curves
from pointformer.train.logs import read_table

try:
    from jinja2 import Environment, PackageLoader
except ImportError as error:
    raise ImportError(f"training needs {error.name}: pip install 'pointformer[train]'") from None

TOKEN_MAPS = "tokens"  # folder of a run
_SEEN = 512  # side in pixels of the largest picture that is shown


def draw_token_maps(
    model: Model, pictures: Sequence[Annotation], run: Path, step: int, reading: Reading
) -> None:
    """Write where a model in training puts its tokens, for the run's report.

    Args:
        pictures: what to look at, each the middle `512 x 512` pixels.
        run: folder, in which tokens/STEP-NUMBER.jpg are written.
        reading: how pictures are read, see `pointformer.data.Reading`.
    """
    device = next(model.parameters()).device
    for number, annotation in enumerate(pictures):
        image = _middle(annotation.read_image(**reading))
        with evaluating(model):
            stages = model.backbone(model.preprocess(to_tensor(image).to(device))[None])
        drawn = focus_picture(image, stages, model.image_config.patch_stride)
        (run / TOKEN_MAPS).mkdir(parents=True, exist_ok=True)
        with atomic_path(run / TOKEN_MAPS / f"{step:08d}-{number}.jpg") as temporary:
            drawn.save(temporary, quality=85)


def _middle(image: np.ndarray) -> np.ndarray:
    rows, columns = (slice(max(0, (n - _SEEN) // 2), (n + _SEEN) // 2) for n in image.shape[:2])
    return np.ascontiguousarray(image[rows, columns])


@dataclass(frozen=True)
class _Case:
    """A picture and how well the model did on it."""

    name: str
    score: float
    picture: Image.Image


def write_report(
    run: Path,
    model: Model,
    dataset: Dataset | None,
    out: Path,
    *,
    task: Task | None = None,
    pictures: int = 200,
    worst: int = 8,
    tile: int | None = None,
    resize: Resize | None = None,
    crop: CenterCrop | None = None,
    region: int | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> None:
    """Write one page of HTML that opens without a network.

    It has the curves, the scores, the token maps of sample pictures through training, what is found
    of each class and size, and the pictures that the model does worst on.

    Args:
        run: folder of a run.
        model: trained by it.
        dataset: what to look for the worst pictures in; `None`: the page does without.
        out: the file.
        task: of the model; `None`: as it says.
        pictures: how many of the data set, drawn at random, are looked at.
        worst: how many are shown.
        tile, resize, crop, region: see `pointformer.evaluation.evaluate`.

    Pictures are read as in the model's training.

    Raises:
        ValueError: nothing was logged yet, or a picture cannot be read.
    """
    curves = io.BytesIO()
    plot_curves(run).savefig(curves, format="png", dpi=100)
    scores = read_table(run / "scores.csv")
    content: dict[str, Any] = {
        "title": run.resolve().name,
        "noun": "point set" if model.of_points else "picture",
        "facts": _facts(model, run),
        "curves": _uri(curves.getvalue(), "png"),
        "scores": {n: v.tolist() for n, v in scores.items() if n not in ("step", "final")},
        "steps": scores.get("step", np.zeros(0)).tolist(),
        "final": bool(scores and scores["final"][-1]),
        "token_maps": _token_maps(run),
    }
    if dataset is not None:
        task = task or task_of(model, None, dataset.categories)
        content |= _examined(
            model,
            task,
            dataset,
            pictures,
            worst,
            say,
            tile=tile,
            resize=resize,
            crop=crop,
            region=region,
        )
    environment = Environment(
        loader=PackageLoader("pointformer.train", "."), autoescape=True, trim_blocks=True
    )
    text = environment.get_template("report.html").render(content)
    with atomic_path(out) as temporary:
        temporary.write_text(text, "utf-8")


def _facts(model: Model, run: Path) -> dict[str, Any]:
    trained = model.trained or {}
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": f"{model.name} with head {model.head_name}",
        "task": model.task,
        "parameters": f"{parameters:,}",
        "data": trained.get("data"),
        "steps": trained.get("steps"),
        "minutes of training": trained.get("minutes"),
        "waited for pictures": _waited(run),
        "pointformer": trained.get("pointformer"),
        "recipe": (run / "recipe.yaml").name,
    }


def _waited(run: Path) -> str | None:
    """Share of the time that was waited for data: the median over the lines of the log."""
    shares = read_table(run / "log.csv").get("waiting")
    if shares is None or np.isnan(shares).all():
        return None
    return f"{100 * float(np.nanmedian(shares)):.1f}% of the time"


def _token_maps(run: Path) -> list[list[tuple[int, str]]]:
    """For each sample picture: step and picture, in the order of the steps."""
    found: dict[str, list[tuple[int, str]]] = {}
    for path in sorted((run / TOKEN_MAPS).glob("*-*.jpg")):
        step, _, number = path.stem.partition("-")
        found.setdefault(number, []).append((int(step), _uri(path.read_bytes(), "jpeg")))
    return list(found.values())


def _examined(
    model: Model,
    task: Task,
    dataset: Dataset,
    pictures: int,
    worst: int,
    say: Callable[[str], None],
    **seen: Any,
) -> dict[str, Any]:
    """Findings on pictures: counts by class and size, and the worst pictures.

    Args:
        seen: how the model sees them, see `evaluate`.
    """
    order = np.random.default_rng(0).permutation(len(dataset))[:pictures].tolist()
    bar = tqdm(order, "looking at pictures", leave=False)
    sides = () if model.of_points else SIDES
    sizes = RecallBySize(task.categories, sides, task.min_score)
    cases: list[_Case] = []
    whole = task.metrics()[0]
    for annotation, image, prediction in predictions(model, task, dataset, bar, **seen):
        truth = task.truth(annotation)
        sizes.update(prediction, truth)
        single = task.metrics()[0]
        single.update(prediction, truth)
        whole.merge(single)
        score = next(iter(single.compute().values()))
        if worst and not math.isnan(score) and (len(cases) < worst or score < cases[-1].score):
            cases.append(_Case(annotation.name, score, _compared(task, image, truth, prediction)))
            cases = sorted(cases, key=lambda case: case.score)[:worst]
    say(f"{samples_in_words(len(order), task.counts)} looked at")
    counts = sizes.scores()
    iou = whole.scores().iou if isinstance(whole, SemanticIoU) else None
    rows = [
        {
            "name": category.name,
            "iou": None if iou is None else float(iou[number]),
            "cells": list(
                zip(counts.found[number].tolist(), counts.annotated[number].tolist(), strict=True)
            ),
        }
        for number, category in enumerate(task.categories)
        if counts.annotated[number].any()
    ]
    return {
        "looked_at": len(order),
        "groups": size_names(counts.sides),
        "classes": rows,
        "measure": next(iter(whole.compute())),
        "worst": [(case.name, case.score, _uri_of(case.picture)) for case in cases],
    }


def _compared(task: Task, image: Any, truth: Any, prediction: Any) -> Image.Image:
    """Annotations beside findings; of a whole picture or point set, in words."""
    shown: Sequence[Category] = ()
    if isinstance(task, MapTask):
        annotated = SegmentMap.of(*_regions(truth))
        sides = [
            (_tinted(image, annotated, task.categories), "annotated"),
            (_tinted(image, task.shown(prediction), task.categories), "found"),
        ]
    elif isinstance(image, TokenSet) and truth.labels is not None:
        sides = [
            (cloud_from_above(image, classes, task.categories), caption)
            for classes, caption in ((truth.labels, "annotated"), (prediction, "found"))
        ]
        seen = np.union1d(truth.labels, prediction)
        shown = [task.categories[number] for number in seen.tolist() if number != VOID]
    else:
        guess = task.categories[int(np.argmax(prediction))].name
        picture = cloud_from_above(image) if isinstance(image, TokenSet) else image
        sides = [(picture, f"{task.categories[truth.label].name}, taken for {guess}")]
    height, width = sides[0][0].shape[:2]
    scale = min(1.0, _SEEN / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    row = [(Image.fromarray(side).resize(size), caption) for side, caption in sides]
    return with_legend(panels([row], size), shown)


def _regions(truth: Annotation) -> tuple[np.ndarray, list[int], list[float]]:
    """Ids (H, W) from 1 on of what is annotated, the class and a score of each."""
    if truth.semantic is not None:
        classes = truth.semantic
        known = [kind for kind in np.unique(classes).tolist() if kind != VOID]
        ids = np.searchsorted(known, classes) + 1 if known else np.zeros_like(classes)
        ids = np.where(classes == VOID, 0, ids)
    else:
        owner, _ = truth.instances()
        numbers = np.unique(owner[owner > 0])
        ids = np.where(owner > 0, np.searchsorted(numbers, owner) + 1, 0)
        known = [truth.segments[number - 1].category for number in numbers.tolist()]
    return ids.astype(np.int32), known, [1.0] * len(known)


def _tinted(image: np.ndarray, found: SegmentMap, categories: Sequence[Category]) -> np.ndarray:
    """The picture with rims, in the classes' colors where there are several."""
    if len(categories) > 1:
        colors = np.zeros((found.ids.max(initial=0) + 1, 3))
        for segment in found.segments:
            colors[int(segment.id)] = categories[segment.category].color
        tinted = 0.5 * image + 0.5 * colors[found.ids]
        image = np.where(found.ids[..., None] > 0, tinted, image).astype(np.uint8)
    return outline(image, found.ids)


def _uri_of(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "jpeg", quality=88)
    return _uri(content.getvalue(), "jpeg")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
