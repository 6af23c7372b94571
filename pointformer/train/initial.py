"""The model that a run starts from."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from pointformer.data import Category
from pointformer.models import Model, create_model, load_released
from pointformer.models.config import CONFIGS
from pointformer.models.heads import head_for
from pointformer.models.state import WHOLE_HEAD, copy_weights, is_safetensors
from pointformer.train.recipe import Recipe


def make_model(
    recipe: Recipe, categories: Sequence[Category], channels: int | None = None
) -> Model:
    """The model in the state that a run starts from; nothing is known of a training before.

    Args:
        categories: of the data.
        channels: features of points; `None`: the data are pictures.

    Raises:
        ValueError, TypeError: model, head, options, initial weights or classes do not fit.
    """
    model = _made(recipe, categories, channels)
    model.forget_training()
    return model


def _made(recipe: Recipe, categories: Sequence[Category], channels: int | None) -> Model:
    head, classes = _head(recipe, len(categories))
    options: dict[str, Any] = {"head": head, "num_classes": classes, "task": recipe.task}
    options["categories"] = list(categories)
    if channels is not None:
        options["in_channels"] = channels
    for name in options:
        if name in recipe.options:
            raise ValueError(
                f"options.{name}: {name} follows from the recipe's fields and the data"
            )
    options |= recipe.options
    torch.manual_seed(recipe.seed)
    if recipe.model is not None and recipe.model not in CONFIGS:
        name, _, tag = recipe.model.rpartition(".")
        if (name in CONFIGS and tag) or os.path.isfile(recipe.model):
            raise ValueError(
                f"model: expected a name, not weights; to start from {recipe.model}, pass it as "
                "init (--init)"
            )
    default = "aff_tiny" if channels is None else "point_nano"
    if recipe.init is None:
        return create_model(recipe.model or default, pretrained=False, **options)
    if recipe.init_stages is None:
        model = _trained_model(recipe, **options)
        if recipe.model not in (None, model.name):
            raise ValueError(
                f"init: {recipe.init} holds weights of {model.name}, not of {recipe.model}"
            )
        return model
    trained = _trained_model(recipe)
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model or trained.name, pretrained=False, **options)
    stages = len(model.config.dims)
    if not 0 <= recipe.init_stages <= stages:
        raise ValueError(f"init_stages: expected 0 to {stages}, got {recipe.init_stages}")
    fresh = [f"backbone.stages.{stage}." for stage in range(recipe.init_stages, stages)]
    copy_weights(model, trained.state_dict(), recipe.init, fresh=(*WHOLE_HEAD, *fresh))
    return model


def _head(recipe: Recipe, kinds: int) -> tuple[str, int]:
    """Name of the head, and how many classes it must have: that of the initial weights where it can
    learn the task and nothing else is asked for."""
    if recipe.head is None and recipe.init is not None and recipe.init_stages is None:
        with warnings.catch_warnings(), contextlib.suppress(ValueError):
            warnings.simplefilter("ignore")  # of what does not fit, which is not what is asked for
            return head_for(recipe.task, kinds, _trained_model(recipe).head_name)
    return head_for(recipe.task, kinds, recipe.head)


def _trained_model(recipe: Recipe, **options: Any) -> Model:
    """The trained model that `init` names: NAME.TAG, a file of `save_model` or a released one."""
    init = recipe.init
    assert init is not None
    if not os.path.isfile(init) or is_safetensors(init):
        return create_model(init, pretrained=True, **options)
    if recipe.model is None:
        raise ValueError(f"model: needed, as {init} does not say what it holds")
    return load_released(init, recipe.model, **options)
