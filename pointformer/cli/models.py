"""List the models with parameters and multiply-adds.

Multiply-adds are for one picture of the model's native size: of the Linear and convolution layers
(what papers report), and of the attention and the merges (which papers leave out).
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to list (default: all)")


def run(options: argparse.Namespace) -> int:
    from pointformer.models import count, create_model, list_models

    print(
        f"{'model':18}{'pixels':>8}{'parameters':>14}"
        f"{'dense G':>10}{'attention G':>13}{'merge G':>9}"
    )
    for name in options.names or list_models():
        model = create_model(name)
        size = model.config.image_size
        c = count(model, size, size)
        print(
            f"{name:18}{size:>8}{c.parameters:>14,}{c.dense / 1e9:>10.3f}"
            f"{c.attention / 1e9:>13.3f}{c.merge / 1e9:>9.3f}"
        )
    weights = list_models(pretrained=True)
    print(f"weights in the package: {', '.join(weights) or 'none'}")
    return 0
