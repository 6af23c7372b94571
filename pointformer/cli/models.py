"""List the models with parameters and multiply-adds.

Billions of multiply-adds for one picture: of the Linear and convolution layers ("dense"), the
backbone's attention and merges, and what heads add: attention of their queries, sums over near
tokens ("points"), and queries times mask features. "as papers" are those that the paper's tools
count, beside its own figure (Tables 2 and 3, where it has one): without the attention of
neighborhoods, the merges and the points, but for masks with the semantic map made of them.
"""

from __future__ import annotations

import argparse

_COLUMNS = ("dense", "attention", "merge", "decoder", "points", "masks", "total")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to list (default: all)")
    parser.add_argument(
        "--head",
        default="classification",
        help="classification (default), dense, features, mask2former or hcformer",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="side of the picture (default: the model's own for classification, otherwise 512)",
    )
    parser.add_argument(
        "--classes", type=int, help="default: 1000 for classification, otherwise 150"
    )


def run(options: argparse.Namespace) -> int:
    from pointformer.models import count, create_model, list_models
    from pointformer.models.complexity import PUBLISHED

    classifies = options.head == "classification"
    for name in ("size", "classes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    classes = options.classes or (1000 if classifies else 150)
    print(
        f"{'model':18}{'pixels':>8}{'parameters':>14}"
        + "".join(f"{column:>11}" for column in _COLUMNS)
        + f"{'as papers':>11}{'paper':>8}"
    )
    for name in options.names or list_models():
        model = create_model(name, head=options.head, num_classes=classes)
        size = options.size or (model.config.image_size if classifies else 512)
        c = count(model, size, size)
        published = PUBLISHED.get((name, options.head))
        if (size, classes) != ((224, 1000) if classifies else (512, 150)):
            published = None
        print(
            f"{name:18}{size:>8}{c.parameters:>14,}"
            + "".join(f"{getattr(c, column) / 1e9:>11.3f}" for column in _COLUMNS)
            + f"{c.published / 1e9:>11.3f}{published or '-':>8}"
        )
    weights = list_models(pretrained=True)
    print(f"weights in the package: {', '.join(weights) or 'none'}")
    return 0
