"""Show where a model put its tokens.

Writes one picture: the tokens that each merge kept, and the importance scores that decided it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pointformer.cli.common import (
    add_model_arguments,
    add_picture_arguments,
    add_result_arguments,
    check_file,
    is_small,
    model_from,
    printable,
    reading_from,
    say,
)
from pointformer.cli.results import Results, save_sealed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--out", required=True, type=Path, help="the picture to write, as PNG")
    add_result_arguments(parser)
    add_picture_arguments(parser)
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    import torch

    from pointformer.data import read_image
    from pointformer.prediction import to_tensor
    from pointformer.segmentation.drawing import focus_picture

    if options.out.suffix.lower() != ".png":
        raise ValueError(f"{options.out}: expected a file name that ends in .png")
    if not options.out.parent.is_dir():
        raise ValueError(f"{options.out.parent}: there is no such folder")
    results = Results(overwrite=options.overwrite)
    results.protect([options.image, options.model])
    results.check(options.out)
    check_file(Path(options.image))
    image = read_image(options.image, **reading_from(options))
    model = model_from(options, small=is_small([options.image]))
    with torch.inference_mode():
        stages = model.backbone(model.preprocess(to_tensor(image).to(options.device))[None])
    picture = focus_picture(image, stages, model.image_config.patch_stride)
    with results.write(options.out) as temporary:
        save_sealed(temporary, picture)
    tokens = " -> ".join(str(stage.tokens.num_tokens) for stage in stages)
    say(printable(f"{options.image}: tokens {tokens}; picture in {options.out}"))
    return 0
