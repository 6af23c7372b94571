"""Models by name."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pointformer._checks import brief, check_flags, describe
from pointformer.annotations import Category
from pointformer.models.config import CONFIGS, config_of
from pointformer.models.files import load_model, untrained_model
from pointformer.models.model import Model, new_model

_WEIGHTS = Path(__file__).parent / "weights"


def list_models(filter: str | Sequence[str] = "*", pretrained: bool = False) -> list[str]:
    """Names that `create_model` knows.

    Args:
        filter: pattern, or several, with the wildcards of file names: "aff_*". One without a tag is
            for all tags.
        pretrained: those with weights in the package, as "name.tag".
    """
    check_flags(pretrained=pretrained)
    patterns = [filter] if isinstance(filter, str) else filter
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"filter: expected a pattern or a list of some, got {describe(filter)}")
    names = [path.stem for path in _WEIGHTS.glob("*.safetensors")] if pretrained else list(CONFIGS)
    return sorted(
        name
        for name in names
        if any(
            fnmatch.fnmatchcase(text, pattern)
            for pattern in patterns
            for text in (name, name.partition(".")[0])
        )
    )


def create_model(
    name: str | os.PathLike,
    pretrained: bool | None = None,
    num_classes: int | None = None,
    head: str | None = None,
    impl: str | None = None,
    task: str | None = None,
    categories: Sequence[Category] | None = None,
    **overrides: Any,
) -> Model:
    """A model by name, or from a file.

    "aff_nano" has random weights; "aff_nano.nuclei" is the trained model of that tag, in eval mode,
    with its head, task, categories and normalization. Where another head or other classes are asked
    for, the backbone is the trained one, and the head is fresh as far as `load_model` says.

    Args:
        name: one of `list_models()` or of `list_models(pretrained=True)`, or a file of
            `save_model`. Released AFF weights: `load_released`.
        pretrained: `True`: load weights also where the name has no tag; those of its only one.
            `False`: random weights also where it has one.
        num_classes: outputs of the head (default: the trained model's, or 1000). With
            `in_channels` other than 3, raw images are normalized by the mean of ImageNet's
            channels, see `Preprocess`.
        head: "classification" (default), "dense" (per-pixel scores), "features" (four
            `TokenSet`s, for decoders), "mask2former" or "hcformer" (a class and a mask per query),
            "stars" (star-convex objects).
        impl: implementation of the ops, see `pointformer.ops`.
        task: "semantic", "instance" or "panoptic": what the masks of a head are turned into. Other
            heads have one task each ("dense" with three classes, which are background, inside and
            border of objects: "instance", unless "semantic" is asked for).
        categories: names, colors and countability of the classes, for pictures and panoptic maps.
        overrides: fields of `AFFConfig`, for example `rate=0.2`, `alpha=8`, `patch_stride=2`, or of
            `SwinConfig`, and options of the head, for example `queries=250`.

    Raises:
        ValueError, TypeError: unknown name, tag or option; the message lists the known ones.
        CheckpointError: a file that cannot be used.
    """
    if pretrained is not None and pretrained is not True and pretrained is not False:
        hint = ""
        if isinstance(pretrained, str) and len(pretrained) < 30:
            hint = f"; a tag is part of the name: {name}.{pretrained}"
        raise TypeError(
            f"pretrained: expected True, False or None, got {describe(pretrained)}{hint}"
        )
    path = _file_of(name, bool(pretrained))
    if path is None:
        assert isinstance(name, str)
        return new_model(name, head, num_classes, impl, task, categories, **overrides)
    make = untrained_model if pretrained is False else load_model
    return make(
        path,
        head=head,
        num_classes=num_classes,
        impl=impl,
        task=task,
        categories=categories,
        **overrides,
    )


def _file_of(name: object, pretrained: bool) -> Path | None:
    """File of the weights that a name, or a file, stands for; `None`: random ones."""
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"name: expected a model's name or a file, got {describe(name)}")
    text = os.fspath(name)
    base, dot, tag = text.partition(".")
    separators = [s for s in (os.sep, os.altsep) if s]
    is_name = isinstance(name, str) and not any(s in text for s in separators)
    if (
        not is_name
        or text.endswith(".safetensors")
        or (base not in CONFIGS and os.path.isfile(text))
    ):
        return Path(text)
    config_of(base if dot else text)
    tags = [known.partition(".")[2] for known in list_models(base, pretrained=True)]
    if dot and tag in tags:
        return _WEIGHTS / f"{text}.safetensors"
    if not dot and not pretrained:
        return None
    if not dot and len(tags) == 1:
        return _WEIGHTS / f"{base}.{tags[0]}.safetensors"
    if tags:
        known = ", ".join(f"{base}.{known}" for known in tags)
        problem = "there are no such weights" if dot else "has several weights"
        raise ValueError(f"{brief(text).strip(chr(39))}: {problem}; those of {base}: {known}")
    raise ValueError(
        f"{base}: has no weights in the package, which are of "
        f"{', '.join(list_models(pretrained=True))}; released ones: load_released"
    )
