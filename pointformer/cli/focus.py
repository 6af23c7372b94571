"""Show where a model put its tokens.

Writes one picture: the tokens that each merge kept, and the importance scores that decided it; of a
point cloud as seen from above.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pointformer.cli.common import (
    add_feature_argument,
    add_model_arguments,
    add_picture_arguments,
    add_result_arguments,
    check_file,
    printable,
    say,
)
from pointformer.cli.inputs import inputs_of, model_for
from pointformer.cli.results import Results, save_sealed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", type=Path)
    parser.add_argument("--out", required=True, type=Path, help="the picture to write, as PNG")
    add_result_arguments(parser)
    add_picture_arguments(parser)
    add_feature_argument(parser)
    add_model_arguments(parser, by_inputs=True)


def run(options: argparse.Namespace) -> int:
    import torch

    if options.out.suffix.lower() != ".png":
        raise ValueError(f"{options.out}: expected a file name that ends in .png")
    if not options.out.parent.is_dir():
        raise ValueError(f"{options.out.parent}: there is no such folder")
    results = Results(overwrite=options.overwrite)
    model = model_for(options, [options.input])
    results.protect([options.input, options.model])
    results.check(options.out)
    inputs = inputs_of(model, options)
    check_file(options.input, inputs.noun)
    inputs.check(options.input)
    if options.threads is None and inputs.are_small([options.input]):
        torch.set_num_threads(1)
    picture, tokens = inputs.focus(options.input)
    with results.write(options.out) as temporary:
        save_sealed(temporary, picture)
    numbers = " -> ".join(map(str, tokens))
    say(printable(f"{options.input}: tokens {numbers}; picture in {options.out}"))
    return 0
