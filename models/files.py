"""Files of models: weights, and all that makes a model of them again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from pointformer._checks import (
    brief,
    check_count,
    check_flags,
    check_number,
    check_option,
    describe,
)
from pointformer._files import atomic_path
from pointformer.annotations import OBJECT, Category
from pointformer.models.config import GridConfig, ModelConfig, PointConfig, config_from
from pointformer.models.heads import (
    CLASSIFIERS,
    HEADS,
    TASK_NAMES,
    check_options,
    options_of,
    output_of,
    tasks_of,
)
from pointformer.models.model import Model, Preprocess, configured, new_model, unwrapped
from pointformer.models.points import PointPreprocess
from pointformer.models.state import (
    WHOLE_HEAD,
    CheckpointError,
    copy_weights,
    is_safetensors,
    read_safetensors,
    state_of,
    unpickle,
    without_wrappers,
)

_METADATA = "pointformer"  # the entry of a safetensors file's metadata that describes the model
_FORMAT = 1  # of the description; files from before it was written are of the first


def save_model(
    model: nn.Module, path: str | os.PathLike, *, trained: Mapping[str, Any] | None = None
) -> None:
    """Write a model as one safetensors file, complete or not at all.

    The file has the weights, the configuration, the head with its options, the task, the
    categories, the normalization and how the model was trained.

    Args:
        model: a `Model`, or one in wrappers of torch (compiled, data-parallel, sharded, averaged),
            around the model or around modules of it. The file is as if there were none.
        path: of the file.
        trained: how it was trained, for those who load it: the recipe, the data, the steps, the
            scores and so on, of what JSON can hold; keys become text. Default: the model's own.

    Raises:
        TypeError: there is no `Model` in the wrappers, or `trained` holds what JSON cannot.
        ValueError: the backbone is a `GridBackbone`, or the preprocessing not this package's, which
            `load_model` could not make again; weights are no plain tensors with values, the first
            of which is named; or the model has been given what it cannot have, such as too few
            categories.
    """
    inner = unwrapped(model)
    if not isinstance(inner, Model):
        raise TypeError(f"model: expected a Model, wrapped or not, got {type(inner).__name__}")
    config: Any = unwrapped(inner.backbone).config
    if isinstance(config, GridConfig):
        raise ValueError(f"{inner.name}: a foreign backbone is not saved; use torch.save")
    look: Any = unwrapped(inner.preprocess)
    if type(look) is not (PointPreprocess if isinstance(config, PointConfig) else Preprocess):
        raise ValueError(
            f"{inner.name}: preprocess: a foreign {type(look).__name__} is not saved; use "
            "torch.save"
        )
    if isinstance(config, PointConfig):
        config = config.override(unit=look.unit)
    if trained is not None and not isinstance(trained, Mapping):
        raise TypeError(f"trained: expected a dict, got {describe(trained)}")
    description = {
        "format": _FORMAT,
        "name": inner.name,
        "head": inner.head_name,
        "head_options": inner.head_options,
        "task": inner.task,
        "categories": inner.categories and [dataclasses.asdict(c) for c in inner.categories],
        "num_classes": inner.num_classes,
        "config": dataclasses.asdict(config),
        "object_diameter": inner.object_diameter,
        "min_score": inner.min_score,
    }
    if isinstance(look, Preprocess):  # that of points is in the configuration
        description["preprocess"] = {"mean": look.mean, "std": look.std}
    how = json.loads(_json("trained", inner.trained if trained is None else trained))
    metadata = {_METADATA: _json("model", {**description, "trained": how})}
    _Description.of(json.loads(metadata[_METADATA]))  # what cannot be read is not written
    state = without_wrappers(model.state_dict(), inner.name)
    refused = [key for key, value in state.items() if not _can_save(value)]
    if refused:
        raise ValueError(
            f"{inner.name}: {len(refused)} weights are no dense tensors with values "
            f"(first: {refused[0]}), which a safetensors file cannot hold"
        )
    # Copies, because the format refuses weights that share memory.
    copies = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    with atomic_path(path) as temporary:
        # Not `save_file`, whose files only their owner can read.
        temporary.write_bytes(serialized(copies, metadata))


def _can_save(value: object) -> bool:
    """Whether it is a dense tensor with values: not sparse, quantized, distributed or meta."""
    if not isinstance(value, Tensor) or type(value.detach()) is not Tensor:
        return False
    plain = value.layout == torch.strided and not value.is_meta
    return plain and not value.is_quantized and not value.is_complex()


def _json(argument: str, value: object) -> str:
    """JSON of a value, in which numbers and arrays of NumPy and torch are Python's."""

    def plain(part: object) -> object:
        if hasattr(part, "tolist"):
            return part.tolist()
        raise TypeError(f"it holds a {type(part).__name__}")

    try:
        return json.dumps(value, default=plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{argument}: cannot be written as JSON: {error}") from None


def load_model(
    path: str | os.PathLike,
    name: str | None = None,
    *,
    key: str | None = None,
    head: str | None = None,
    num_classes: int | None = None,
    impl: str | None = None,
    task: str | None = None,
    categories: Sequence[Category] | None = None,
    **overrides: object,
) -> Model:
    """The model in a file, in eval mode and float32.

    Files of `save_model` say what they hold; what is given here replaces it. Other safetensors
    files, and those of `torch.save`, hold weights only: give the `name` and the options that the
    model was made with. Its head and number of classes are read off the weights.

    To fine-tune, ask for another head, other classes or options of the head. The weights of the
    backbone are kept; so are those of the same head that fit, but for those that gave the scores of
    other classes. A warning says what is kept and what is fresh.

    Args:
        path: of the file. What torch's wrappers (compiled, data-parallel, ...) and training code
            put before the names of weights is removed.
        name: as for `create_model`, where the file does not say.
        key: which weights, where the file has several: an entry of a container, such as "model" or
            "model_ema", or what names begin with, such as "student". Default: the first that is
            not named as an average ("ema", "averaged", "teacher", "swa"), and a warning says so.
        head, impl, overrides: as for `create_model`.
        num_classes: outputs of the head; default: those of the file, or of files of `save_model` as
            many as `categories`.
        task: default: that of the file, if the head can serve it.
        categories: default: those of the file, if there are as many classes. Other names than the
            file's are other classes; but not where either is the one class "object", which nobody
            has named.

    Raises:
        CheckpointError: the file is unreadable, of a newer version, says nothing of its model, or
            does not fit.
        TypeError: an option that neither the backbone nor the head has.
    """
    check_choices(name, key, head, num_classes, task)
    description = None
    weights: Mapping
    if is_safetensors(path):
        weights, metadata = read_safetensors(path)
        if _METADATA in metadata:
            description = _Description.read(metadata[_METADATA], path)
    else:
        weights = unpickle(path)
    state = state_of(weights, path, key)
    if "patch_embed.proj1.weight" in state or "backbone.patch_embed.proj1.weight" in state:
        raise CheckpointError(f"{path}: has the names of a released checkpoint: use load_released")
    if description is not None:
        if name not in (None, description.name):
            raise CheckpointError(f"{path}: holds {description.name}, not {name:.60} (name)")
        model, fresh = description.make(
            path, head, num_classes, impl, task, categories, **overrides
        )
    elif name is not None:
        own_head, own_classes = _head_of(state)
        classes = own_classes if num_classes is None else num_classes
        model = new_model(name, head or own_head, classes, impl, task, categories, **overrides)
        fresh = None if classes == own_classes else ()
        if model.head_name != own_head:
            fresh = WHOLE_HEAD
    else:
        kind = "a safetensors file" if is_safetensors(path) else "a pickle"
        raise CheckpointError(
            f"{path}: {kind}, but not one that save_model wrote: name the model, as in "
            "load_model(path, 'aff_nano')"
        )
    copy_weights(model, state, path, fresh=fresh)
    return model.eval()


def untrained_model(path: str | os.PathLike, **changes: Any) -> Model:
    """The model in a file of `save_model`, but with random weights; see `load_model`."""
    chosen = {name: changes.get(name) for name in ("head", "num_classes", "task")}
    check_choices(None, None, **chosen)
    _, metadata = read_safetensors(path)
    description = _Description.read(metadata.get(_METADATA, "{}"), path)
    model, _ = description.make(path, **changes)
    model.forget_training()
    return model


@dataclass(frozen=True)
class _Description:
    """The description of a model in its file; see `Model`."""

    name: str
    config: ModelConfig
    head: str
    head_options: dict[str, Any]
    num_classes: int
    task: str | None
    categories: tuple[Category, ...] | None
    preprocess: Preprocess | None
    object_diameter: float | None
    min_score: float | None
    trained: dict[str, Any] | None

    @classmethod
    def read(cls, text: str, path: str | os.PathLike) -> _Description:
        """Raise `CheckpointError` if it cannot be read, or was written by a newer version."""
        try:
            values = json.loads(text)
            version = values.get("format", 1)
            check_count("format", version)
            if version <= _FORMAT:
                return cls.of(values)
        except KeyError as error:
            raise CheckpointError(f"{path}: its description lacks {error}") from None
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its description cannot be read: {error}") from None
        raise CheckpointError(
            f"{path}: was saved in format {version}, by a newer pointformer than this one, which "
            f"reads up to format {_FORMAT}: upgrade it"
        )

    @classmethod
    def of(cls, values: dict[str, Any]) -> _Description:
        """Raise `KeyError`, `TypeError` or `ValueError` if something is missing or cannot be."""
        head, classes, rows = values["head"], values["num_classes"], values.get("categories")
        normalization, diameter = values.get("preprocess"), values.get("object_diameter")
        task, options = values.get("task"), values.get("head_options", {})
        least, trained = values.get("min_score"), values.get("trained")
        check_option("head", head, tuple(HEADS))
        check_option("task", task, (*TASK_NAMES, None))
        check_count("num_classes", classes)
        if diameter is not None:
            check_number("object_diameter", diameter, above=0)
        if least is not None:
            check_number("min_score", least, least=0, most=1)
        for name, value, expected in (
            ("name", values["name"], str),
            ("head_options", options, dict),
            ("trained", trained, dict | None),
        ):
            if not isinstance(value, expected):
                raise TypeError(f"{name} is {describe(value)}")
        if not set(options) <= set(options_of(head)):
            raise ValueError(f"head {head!r} has only the options {', '.join(options_of(head))}")
        check_options(head, options)
        kinds = output_of(head, classes, task).kinds(classes)
        if rows is not None and len(rows) != kinds:
            raise ValueError(f"{len(rows)} categories for {kinds} kinds of things")
        return cls(
            name=values["name"],
            config=config_from(values["config"]),
            head=head,
            head_options=options,
            num_classes=classes,
            task=task,
            categories=None if rows is None else tuple(map(_category, rows)),
            preprocess=None if normalization is None else Preprocess(**normalization),
            object_diameter=diameter,
            min_score=least,
            trained=trained,
        )

    def make(
        self,
        path: str | os.PathLike,
        head: str | None = None,
        num_classes: int | None = None,
        impl: str | None = None,
        task: str | None = None,
        categories: Sequence[Category] | None = None,
        **overrides: object,
    ) -> tuple[Model, tuple[str, ...] | None]:
        """The model with what is given in the place of its own, and what of its head is fresh: see
        `copy_weights`."""
        head = head or self.head
        own = output_of(self.head, self.num_classes, self.task)
        own_task, own_kinds = self.task or own.only_task, own.kinds(self.num_classes)
        if num_classes is None:
            others = isinstance(categories, list | tuple) and len(categories) != own_kinds
            num_classes = self.num_classes if head == self.head else own_kinds
            num_classes = len(categories or ()) if others else num_classes
        if task is None and own_task in tasks_of(head, num_classes):
            task = own_task
        kinds = output_of(head, num_classes, task).kinds(num_classes)
        if categories is None and self.categories and len(self.categories) == kinds:
            categories = self.categories
        config, options = configured(self.name, self.config, head, overrides, self.head)
        if head == self.head:
            options = {**self.head_options, **options}
        try:
            model = Model(self.name, config, head, num_classes, impl, task, categories, **options)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        fits = self.preprocess and len(self.preprocess.mean) == config.in_channels
        if self.preprocess is not None and fits and not isinstance(config, PointConfig):
            model.preprocess = self.preprocess
        if head != self.head:
            return model, WHOLE_HEAD
        names = [[c.name for c in table or ()] for table in (self.categories, model.categories)]
        renamed = all(names) and names[0] != names[1] and [OBJECT] not in names
        if renamed or (num_classes, kinds) != (self.num_classes, own_kinds):
            return model, tuple(f"head.{name}." for name in CLASSIFIERS[head])
        if {**options_of(head), **options} != {**options_of(head), **self.head_options}:
            return model, ()
        model.object_diameter, model.min_score = self.object_diameter, self.min_score
        model.trained = self.trained
        return model, None


def _category(row: dict[str, Any]) -> Category:
    category = Category(**row | {"color": tuple(row["color"])})
    check_count("category's id", category.id, least=0)
    check_flags(**{"category's is_thing": category.is_thing})
    if not isinstance(category.name, str):
        raise TypeError(f"category's name is {describe(category.name)}")
    if len(category.color) != 3:
        raise ValueError(f"category's color is {brief(category.color)}")
    for part in category.color:
        check_count("category's color", part, least=0, most=255)
    return category


def _head_of(state: Mapping[str, Tensor]) -> tuple[str | None, int | None]:
    """Name and number of classes of the head whose weights these are; `None` if not known."""
    for entry, head in (
        ("head.hidden.bias", "point_classification"),
        ("head.decoder.up.0.0.bias", "point_segmentation"),
        ("head.linear.bias", "classification"),
        ("head.classify.1.bias", "dense"),
        ("head.classify.bias", "stars"),
        ("head.pixel_decoder.level_embed", "mask2former"),
        ("head.assignments.0.temperature", "hcformer"),
        ("head.norms.0.weight", "features"),
    ):
        if entry in state:
            if "head.decoder.classify.bias" in state:
                return head, len(state["head.decoder.classify.bias"]) - 1
            entry = "head.linear.bias" if head.startswith("point_") else entry
            return head, None if head == "features" else len(state[entry])
    return None, None


def check_choices(
    name: object, key: object, head: object = None, num_classes: object = None, task: object = None
) -> None:
    """Raise if what is asked of a file is of another kind, before the file is read."""
    for argument, value in (("name", name), ("key", key)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{argument}: expected text or None, got {describe(value)}")
    check_option("head", head, (*HEADS, None))
    check_option("task", task, (*TASK_NAMES, None))
    if num_classes is not None:
        check_count("num_classes", num_classes)
