"""The model that a run starts from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from pointformer.data import Category
from pointformer.models import Model, create_model, load_released
from pointformer.models.state import is_safetensors
from pointformer.train.recipe import Recipe

_BORDER_CLASSES = 3  # background, inside, border


def make_model(recipe: Recipe, categories: Sequence[Category]) -> Model:
    """The model in the state that a run starts from.

    Raises:
        ValueError, TypeError: model, head, options, initial weights or classes do not fit.
    """
    task, kinds = recipe.task, len(categories)
    head = recipe.head
    if head is None:
        simple = "classification" if task == "classification" else "dense"
        many = task == "panoptic" or (task == "instance" and kinds > 1)
        head = "mask2former" if many else simple
    options: dict[str, Any] = {"head": head, "task": task, "categories": list(categories)}
    if (head, task) == ("dense", "instance"):
        if kinds > 1:
            raise ValueError(
                f"head: 'dense' finds objects of one class, the data set has {kinds}; use "
                "mask2former"
            )
        kinds = _BORDER_CLASSES
    options |= {"num_classes": kinds, **recipe.options}
    name, trained = recipe.model, None
    if recipe.init is not None and recipe.init_stages is not None:
        trained = _trained_model(recipe)
        name = name or trained.name
    torch.manual_seed(recipe.seed)
    if recipe.init is None or trained is not None:
        model = create_model(name or "aff_tiny", pretrained=False, **options)
    else:
        model = _trained_model(recipe, **options)
    if trained is not None and recipe.init_stages is not None:
        _copy_stages(trained, model, recipe.init_stages)
    if name not in (None, model.name):
        raise ValueError(f"init: {recipe.init} holds weights of {model.name}, not of {name}")
    return model


def _trained_model(recipe: Recipe, **options: Any) -> Model:
    """The model that `init` stands for: of a tag, in a file of ours, or a released checkpoint."""
    init = recipe.init
    assert init is not None
    if not os.path.isfile(init) or is_safetensors(init):
        return create_model(init, pretrained=True, **options)
    if recipe.model is None:
        raise ValueError(f"model: needed, as {init} does not say what it holds")
    return load_released(init, recipe.model, **options)


def _copy_stages(trained: Model, model: Model, stages: int) -> None:
    if not 0 <= stages <= len(model.config.dims):
        raise ValueError(f"init_stages: expected 0 to {len(model.config.dims)}, got {stages}")
    source: Any = trained.backbone
    target: Any = model.backbone
    parts: list[tuple[Any, Any]] = [(source.patch_embed, target.patch_embed)]
    parts += list(zip(source.stages, target.stages, strict=True))[:stages]
    try:
        for old, new in parts:
            new.load_state_dict(old.state_dict())
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"init: the backbone of {trained.name} does not fit: {first}") from None
