"""List the models with parameters and multiply-adds; of trained ones also what they are for.

Billions of multiply-adds for one picture: of the Linear and convolution layers ("dense"), the
backbone's attention and merges, and what heads add: attention of their queries, sums over near
tokens ("points"), and queries times mask features. "as papers" are those that the paper's tools
count, beside its own figure (Tables 2 and 3, where it has one): without the attention of
neighborhoods, the merges and the points, but for masks with the semantic map made of them.

Of NAME.TAG and FILE follow the head, the task, the classes, the normalization and how the model
was trained, as the file says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pointformer.cli.common import printable

if TYPE_CHECKING:
    from pointformer.models import Model, Preprocess

_COLUMNS = ("dense", "attention", "merge", "decoder", "points", "masks", "total")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME[.TAG]|FILE",
        help="models to list (default: all by NAME that the head fits)",
    )
    parser.add_argument(
        "--head",
        help="classification, dense, features, mask2former, hcformer or stars; of points "
        "point_classification or point_segmentation (default: of trained models their own, "
        "otherwise classification)",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of the picture (default: the model's own for classification, otherwise 512)",
    )
    parser.add_argument(
        "--classes",
        type=int,
        help="default: of trained models their own, otherwise 1000 for classification and 150",
    )


def run(options: argparse.Namespace) -> int:
    from pointformer.models import complexity_of, create_model, list_models
    from pointformer.models.complexity import PUBLISHED
    from pointformer.models.config import CONFIGS, PointConfig
    from pointformer.models.heads import HEADS

    for name in ("size", "classes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    untrained = list_models()
    names = options.names or [
        name
        for name in untrained
        if options.head not in HEADS  # said by the first model
        or HEADS[options.head].of_points == isinstance(CONFIGS[name], PointConfig)
    ]
    width = max(18, *(len(printable(name)) for name in names))
    title = (
        f"{'model':{width}}{'size':>8}{'parameters':>14}"
        + "".join(f"{column:>11}" for column in _COLUMNS)
        + f"{'as papers':>11}{'paper':>8}\n"
    )
    trained = {}
    for name in names:
        head, classes = options.head, options.classes
        if name in untrained:
            of_points = isinstance(CONFIGS[name], PointConfig)
            head = head or ("point_classification" if of_points else "classification")
            classes = classes or (1000 if head == "classification" else 150)
        # With another head it is not the trained model.
        pretrained = False if head or classes else None
        model = create_model(name, pretrained, classes, head)
        if name not in untrained:
            trained[name] = model
        classifies = model.head_name == "classification"
        if isinstance(model.config, PointConfig):
            size = model.config.points
            c = complexity_of(model, points=size)
        else:
            size = options.size or (model.image_config.image_size if classifies else 512)
            c = complexity_of(model, size, size)
        published = PUBLISHED.get((name, model.head_name))
        if (size, model.num_classes) != ((224, 1000) if classifies else (512, 150)):
            published = None
        print(  # under the title, once there is something
            f"{title}{printable(name):{width}}{size:>8}{c.parameters:>14,}"
            + "".join(f"{getattr(c, column) / 1e9:>11.3f}" for column in _COLUMNS)
            + f"{c.published / 1e9:>11.3f}{published or '-':>8}"
        )
        title = ""
    for name, model in trained.items():
        print(f"\n{printable(name)}")
        for line in _lines(_described(model), "  "):
            print(line)
    weights = list_models(pretrained=True)
    print(f"\nweights in the package: {', '.join(weights) or 'none'}")
    return 0


def _described(model: Model) -> dict[str, object]:
    """Description of a model by its file, without the configuration."""
    categories = [
        category.name if category.is_thing else f"{category.name} (uncountable)"
        for category in model.categories or ()
    ]
    return {
        "model": model.name,
        "head": {"name": model.head_name, "classes": model.num_classes, **model.head_options},
        "task": model.task,
        "categories": categories or None,
        **_inputs(model),
        "diameter of objects": model.object_diameter and f"{model.object_diameter:g} pixels",
        "objects are shown from a score of": model.min_score,
        "trained": model.trained or "not said",
    }


def _inputs(model: Model) -> dict[str, object]:
    """Normalization of raw inputs."""
    from pointformer.models import PointPreprocess

    look: Preprocess | PointPreprocess = model.preprocess
    if isinstance(look, PointPreprocess):
        return {"unit of positions": look.unit or "of each sample"}
    return {"mean of inputs": list(look.mean), "deviation of inputs": list(look.std)}


def _lines(values: dict[str, object], indent: str) -> Iterator[str]:
    """Names and values, what is in values one step deeper."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{printable(name)}:"
            yield from _lines(value, f"{indent}  ")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{indent}{printable(name)}: {printable(text)}"
