"""Reading and writing weights: our safetensors files, and the released AFF checkpoints."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pointformer._checks import brief, check_count, check_option, describe
from pointformer._files import atomic_path
from pointformer.annotations import Category
from pointformer.models.backbone import Backbone
from pointformer.models.config import AFFConfig, GridConfig, config_from
from pointformer.models.grid import GridBackbone
from pointformer.models.heads import HEADS
from pointformer.models.model import TASKS, Model, Preprocess, configured

T = TypeVar("T")

_METADATA = "pointformer"


class CheckpointError(ValueError):
    """A file cannot be used as the checkpoint it was given as; the message names the file."""


# What wraps modules leaves these in the names of weights: torch.compile; DataParallel,
# DistributedDataParallel and averaged models; FSDP; activation checkpointing.
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# The name that every backbone's weights begin with: ours, the released.
_FIRST_WEIGHT = r"(?:backbone\.)?patch_embed\.(?:conv1|proj1)\.weight"
_AVERAGES = ("ema", "averaged", "teacher", "swa")  # what containers call averages of weights
_NOT_WEIGHTS = {"n_averaged", "criterion.empty_weight"}  # of averaged models, and of a loss


def save_model(model: nn.Module, path: str | os.PathLike) -> None:
    """Write weights, configuration and normalization as one safetensors file, complete or not at
    all.

    Args:
        model: a `Model`, or one in wrappers of torch (compiled, data-parallel, sharded, averaged),
            around the model or around modules of it. The file is as if there were none.
        path: of the file.

    Raises:
        TypeError: there is no `Model` in the wrappers.
        ValueError: the backbone is a `GridBackbone`, which `load_model` could not make again, or
            weights are no plain tensors with values; the message names the first.
    """
    inner = _unwrapped(model)
    if not isinstance(inner, Model):
        raise TypeError(f"model: expected a Model, wrapped or not, got {type(inner).__name__}")
    config = _unwrapped(inner.backbone).config
    if isinstance(config, GridConfig):
        raise ValueError(f"{inner.name}: a foreign backbone is not saved; use torch.save")
    description = {
        "name": inner.name,
        "head": inner.head_name,
        "head_options": inner.head_options,
        "task": inner.task,
        "categories": inner.categories and [dataclasses.asdict(c) for c in inner.categories],
        "num_classes": inner.num_classes,
        "config": dataclasses.asdict(config),
        "object_diameter": inner.object_diameter,
        "preprocess": {"mean": inner.preprocess.mean, "std": inner.preprocess.std},
    }
    state = _without_wrappers(model.state_dict(), inner.name)
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
    metadata = {_METADATA: json.dumps(description, default=_plain)}
    with atomic_path(path) as temporary:
        save_file(copies, temporary, metadata=metadata)


def _unwrapped(module: nn.Module) -> nn.Module:
    """What is in the wrappers: a `Model`, a backbone, or whatever has none of their names."""
    while not isinstance(module, Model | Backbone | GridBackbone):
        inside = [module._modules[name] for name in _WRAPPERS if name in module._modules]
        if not inside or inside[0] is None:
            break
        module = inside[0]
    return module


def _can_save(value: object) -> bool:
    """Whether it is a dense tensor with values: not sparse, quantized, distributed or meta."""
    if not isinstance(value, Tensor) or type(value.detach()) is not Tensor:
        return False
    plain = value.layout == torch.strided and not value.is_meta
    return plain and not value.is_quantized and not value.is_complex()


def _plain(value: object) -> object:
    """Numbers and arrays of NumPy and torch as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"model: its options hold a {type(value).__name__}, which a file cannot")


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

    To fine-tune, ask for another head, number of classes or option of the head: all weights of the
    backbone are loaded, and those of the head that fit. A warning says which do not.

    Args:
        path: of the file. What torch's wrappers (compiled, data-parallel, ...) and training code
            put before the names of weights is removed.
        name: as for `create_model`, where the file does not say.
        key: which weights, where the file has several: an entry of a container, such as "model" or
            "model_ema", or what names begin with, such as "student". Default: the first that is
            not named as an average ("ema", "averaged", "teacher", "swa"), and a warning says so.
        head, num_classes, impl, task, categories, overrides: as for `create_model`.

    Raises:
        CheckpointError: the file is unreadable, says nothing of its model, or does not fit.
        TypeError: an option that neither the backbone nor the head has.
    """
    _check_choices(name, key, head, num_classes, task)
    if _is_safetensors(path):
        kind, (weights, description) = "a safetensors file", _read_safetensors(path)
    else:
        kind, weights, description = "a pickle", _unpickle(path), None
    state = _state_of(weights, path, key)
    if "patch_embed.proj1.weight" in state or "backbone.patch_embed.proj1.weight" in state:
        raise CheckpointError(f"{path}: has the names of a released checkpoint: use load_released")
    if "patch_embed.conv1.weight" in state:  # of a backbone alone
        state = {f"backbone.{key}": value for key, value in state.items()}
    made = {"impl": impl, "task": task, "categories": categories}
    if description is not None:
        model, same_head = _described(
            description, path, name, head=head, num_classes=num_classes, **made, **overrides
        )
    elif name is None:
        raise CheckpointError(
            f"{path}: {kind}, but not one that save_model wrote: name the model, as in "
            "load_model(path, 'aff_nano')"
        )
    else:
        from pointformer.models.registry import create_model

        own_head, own_classes = _head_of(state)
        classes = own_classes if num_classes is None else num_classes
        model = create_model(name, head=head or own_head, num_classes=classes, **made, **overrides)  # type: ignore[arg-type]
        same_head = (model.head_name, classes) == (own_head, own_classes)
    load_state(model, state, path, new_head=not same_head)
    return model.eval()


def _described(
    description: dict,
    path: str | os.PathLike,
    name: str | None,
    *,
    head: str | None,
    num_classes: int | None,
    impl: str | None,
    task: str | None,
    categories: Sequence[Category] | None,
    **overrides: object,
) -> tuple[Model, bool]:
    """The model that a file of `save_model` describes, with changes; and whether its head is that
    of the file."""
    try:
        own_name, own_head = description["name"], description["head"]
        own_classes, own_config = description["num_classes"], config_from(description["config"])
        own_options, own_task = description.get("head_options", {}), description.get("task")
        own_categories = _categories(description.get("categories"))
        normalization = description.get("preprocess")
        preprocess = None if normalization is None else Preprocess(**normalization)
    except KeyError as error:
        raise CheckpointError(f"{path}: its description lacks {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description cannot be read: {error}") from None
    if name not in (None, own_name):
        raise CheckpointError(f"{path}: holds {own_name}, not {name[:60]} (name)")
    head = head or own_head
    classes = own_classes if num_classes is None else num_classes
    config, options = configured(own_name, own_config, head, overrides, own_head)
    if head == own_head:
        options = {**own_options, **options}
        task = task or own_task
    if classes == own_classes:
        categories = own_categories if categories is None else categories
    try:
        model = Model(own_name, config, head, classes, impl, task, categories, **options)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if preprocess is not None and len(preprocess.mean) == config.in_channels:
        model.preprocess = preprocess
    model.object_diameter = description.get("object_diameter")
    return model, (head, classes, options) == (own_head, own_classes, own_options)


def _categories(rows: list[dict] | None) -> list[Category] | None:
    if rows is None:
        return None
    return [Category(**row | {"color": tuple(row["color"])}) for row in rows]


def _head_of(state: Mapping[str, Tensor]) -> tuple[str | None, int | None]:
    """Name and number of classes of the head whose weights these are; `None` if not known."""
    for entry, head in (
        ("head.linear.bias", "classification"),
        ("head.classify.1.bias", "dense"),
        ("head.pixel_decoder.level_embed", "mask2former"),
        ("head.assignments.0.temperature", "hcformer"),
        ("head.norms.0.weight", "features"),
    ):
        if entry in state:
            if "head.decoder.classify.bias" in state:
                return head, len(state["head.decoder.classify.bias"]) - 1
            return head, None if head == "features" else len(state[entry])
    return None, None


def _check_file(path: object) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a file, got {describe(path)}")
    if not os.path.isfile(path):
        reason = "expected a file, this is a folder" if os.path.isdir(path) else "no such file"
        name = os.fspath(path)
        raise CheckpointError(f"{name if len(name) <= 200 else brief(name)}: {reason}")


def _check_choices(
    name: object, key: object, head: object = None, num_classes: object = None, task: object = None
) -> None:
    for argument, value in (("name", name), ("key", key)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{argument}: expected text or None, got {describe(value)}")
    check_option("head", head, (*HEADS, None))
    check_option("task", task, (*TASKS, None))
    if num_classes is not None:
        check_count("num_classes", num_classes)


def _is_safetensors(path: str | os.PathLike) -> bool:
    """By its name, or by what it begins with: the size of a header of JSON."""
    _check_file(path)
    with open(path, "rb") as file:
        return os.fspath(path).endswith(".safetensors") or file.read(9)[8:] == b"{"


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict | None]:
    """Weights and, if `save_model` wrote them, the description."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return state, None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def _without_wrappers(state: Mapping[str, T], source: object) -> dict[str, T]:
    """Entries by their names without the parts that wrappers add, and none that is no weight."""
    plain: dict[str, T] = {}
    for key, value in state.items():
        name = _plain_name(key)
        if name in plain:
            raise CheckpointError(f"{source}: two entries are {name}, with and without a wrapper")
        if name not in _NOT_WEIGHTS:
            plain[name] = value
    return plain


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _state_of(
    container: Mapping, source: object, key: str | None = None, first: str = _FIRST_WEIGHT
) -> dict[str, Tensor]:
    """The weights of one model in a container, by names without wrappers' parts.

    Args:
        container: a state dict, or a dict that has some, not deeper than two levels.
        key: see `load_model`.
        first: pattern of a name that every model's weights have. What stands before it is what
            training code put before all names.
    """
    found = _weights_in(container, source, first) or _weights_in(container, source, None)
    if not found:
        raise CheckpointError(f"{source}: no state dict of tensors")
    names = list(found)
    if key is not None:
        wanted = _plain_name(key)
        matching = [n for n in names if n == wanted]
        matching = matching or [n for n in names if f".{wanted}." in f".{n}."]
        if len(matching) != 1:
            raise CheckpointError(
                f"{source}: key {brief(key)} fits {len(matching)} of the weights in it: {names}"
            )
        return found[matching[0]]
    plain = [n for n in names if not any(word in n.lower() for word in _AVERAGES)]
    name = (plain or names)[0]
    if len(names) > 1:
        message = f"{source}: took {name!r} of the weights in it, {names}; key chooses others"
        warnings.warn(message, stacklevel=3)
    return found[name]


def _weights_in(
    container: Mapping, source: object, first: str | None, depth: int = 2
) -> dict[str, dict[str, Tensor]]:
    """Each model's weights, by where they are: a path with dots, "" for the container itself."""
    tensors = _without_wrappers(
        {
            key: value if isinstance(value, Tensor) else torch.from_numpy(value)
            for key, value in container.items()
            if isinstance(key, str)
            and (isinstance(value, Tensor) or _is_numeric(value))  # arrays are detectron2's
        },
        source,
    )
    if first is not None:
        # Lazy groups: "backbone" belongs to the pattern if it can.
        pattern = re.compile(rf"(?:(.+?)\.)??{first}")
        starts = {match[1] or "": None for match in map(pattern.fullmatch, tensors) if match}
    else:
        starts = {"": None} if tensors and len(tensors) == len(container) else {}
    if starts:
        return {
            start: {
                name.removeprefix(f"{start}."): value
                for name, value in tensors.items()
                if not start or name.startswith(f"{start}.")
            }
            for start in starts
        }
    return {
        ".".join(part for part in (_plain_name(name), below) if part): weights
        for name, value in container.items()
        if isinstance(name, str) and isinstance(value, Mapping) and depth
        for below, weights in _weights_in(value, source, first, depth - 1).items()
    }


def _is_numeric(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"


def load_state(
    model: Model,
    state: Mapping,
    source: object,
    *,
    key: str | None = None,
    new_head: bool = False,
) -> None:
    """Copy weights into `model`; every name and shape must fit, or those of the backbone.

    Args:
        state: a state dict, or a container of some; wrappers' parts of names, here and in the
            model, do not matter.
        source: what messages call the state, such as its file.
        key: see `load_model`.
        new_head: whether weights of the head may be left out; a warning says which.

    Raises:
        CheckpointError: naming `source`, how many entries differ and the first of them.
    """
    own = {_plain_name(name): name for name in model.state_dict()}
    expected = {plain: model.state_dict()[name] for plain, name in own.items()}
    first = next(iter(own)).removeprefix("backbone.")
    state = _state_of(state, source, key, rf"(?:backbone\.)?{re.escape(first)}")
    missing = sorted(set(own) - set(state))
    unknown = sorted(set(state) - set(own))
    misfits = [n for n in own if n in state and expected[n].shape != state[n].shape]
    kept, unused = [], []  # where the head is new
    if new_head:
        kept = [n for n in (*missing, *misfits) if n.startswith("head.")]
        unused = [n for n in (*unknown, *misfits) if not n.startswith("backbone.")]
    missing, unknown, misfits = (
        [n for n in names if n not in kept and n not in unused]
        for names in (missing, unknown, misfits)
    )
    problems = []
    if missing:
        problems.append(f"{len(missing)} entries are missing (first: {missing[0]})")
    if unknown:
        problems.append(f"{len(unknown)} are unknown (first: {unknown[0]})")
    if misfits:
        name = misfits[0]
        problems.append(
            f"{len(misfits)} have another shape (first: {name} is {tuple(state[name].shape)}, "
            f"expected {tuple(expected[name].shape)})"
        )
    if problems:
        raise CheckpointError(f"{source}: not a checkpoint of {model.name}: {'; '.join(problems)}")
    fitting = {own[n]: value for n, value in state.items() if n not in unused}
    model.load_state_dict(fitting, strict=not new_head)
    if kept or unused:
        warnings.warn(
            f"{source}: the head of {model.name} is new: {_some(kept)} of its weights keep their "
            f"initial values, {_some(unused)} of the file's are left out",
            stacklevel=3,
        )


def _some(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    return f"{len(names)} ({', '.join([*names[:3], '...'][: len(names)])})" if names else "none"


# The released names, ours on the left. Kept explicit: a name that no rule covers is an error.
_BACKBONE_NAMES = (
    (r"patch_embed\.conv1\.(.+)", r"patch_embed.proj1.\1"),
    (r"patch_embed\.conv2\.(.+)", r"patch_embed.proj2.\1"),
    (r"patch_embed\.(bn|norm)\.(.+)", r"patch_embed.\1.\2"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.attn\.blank_key", r"layers.\1.blocks.\2.attn.blank_k"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.attn\.blank_value", r"layers.\1.blocks.\2.attn.blank_v"),
    (
        r"stages\.(\d+)\.blocks\.(\d+)\.attn\.position\.(.+)",
        r"layers.\1.blocks.\2.attn.pos_embed.\3",
    ),
    (
        r"stages\.(\d+)\.blocks\.(\d+)\.((?:attn\.(?:qkv|proj)|norm1|norm2|mlp\.fc1|mlp\.fc2)"
        r"\.(?:weight|bias)|gamma1|gamma2)",
        r"layers.\1.blocks.\2.\3",
    ),
    (r"stages\.(\d+)\.merge\.score\.(.+)", r"layers.\1.prob_net.\2"),
    (
        r"stages\.(\d+)\.merge\.((?:weight_net\.[01]|norm|linear)\.(?:weight|bias))",
        r"layers.\1.downsample.\2",
    ),
)
_CLASSIFICATION_NAMES = (
    *((rf"backbone\.{ours}", theirs) for ours, theirs in _BACKBONE_NAMES),
    (r"head\.norm\.(.+)", r"norm.\1"),
    (r"head\.linear\.(.+)", r"head.\1"),
)
_PIXEL = "sem_seg_head.pixel_decoder"
_ENCODER = rf"{_PIXEL}.transformer.encoder.layers"
_DECODER = "sem_seg_head.predictor"
_SIZES = ("class_embed.bias", "query_embed.weight")  # a row for each class and query
_SEGMENTATION_NAMES = (
    *((rf"backbone\.{ours}", rf"backbone.{theirs}") for ours, theirs in _BACKBONE_NAMES),
    (r"head\.features\.norms\.(\d)\.(.+)", r"backbone.norm\1.\2"),
    (r"head\.pixel_decoder\.projections\.(.+)", rf"{_PIXEL}.input_proj.\1"),
    (r"head\.pixel_decoder\.level_embed", rf"{_PIXEL}.transformer.level_embed"),
    (
        r"head\.pixel_decoder\.layers\.(\d)\.attn\.power",
        rf"{_ENCODER}.\1.self_attn.shepard_power",
    ),
    (
        r"head\.pixel_decoder\.layers\.(\d)\.attn\.offsets\.(.+)",
        rf"{_ENCODER}.\1.self_attn.sampling_offsets.\2",
    ),
    (
        r"head\.pixel_decoder\.layers\.(\d)\.attn\.weights\.(.+)",
        rf"{_ENCODER}.\1.self_attn.attention_weights.\2",
    ),
    (
        r"head\.pixel_decoder\.layers\.(\d)\.attn\.value\.(.+)",
        rf"{_ENCODER}.\1.self_attn.value_proj.\2",
    ),
    (
        r"head\.pixel_decoder\.layers\.(\d)\.attn\.proj\.(.+)",
        rf"{_ENCODER}.\1.self_attn.output_proj.\2",
    ),
    (r"head\.pixel_decoder\.layers\.(\d)\.(norm[12]\..+)", rf"{_ENCODER}.\1.\2"),
    (r"head\.pixel_decoder\.layers\.(\d)\.mlp\.fc([12])\.(.+)", rf"{_ENCODER}.\1.linear\2.\3"),
    (r"head\.pixel_decoder\.lateral\.(.+)", rf"{_PIXEL}.adapter_1.\1"),
    (r"head\.pixel_decoder\.conv\.(.+)", rf"{_PIXEL}.layer_1.0.\1"),
    (r"head\.pixel_decoder\.conv_norm\.(.+)", rf"{_PIXEL}.layer_1.1.\1"),
    (r"head\.pixel_decoder\.mask_features\.(.+)", rf"{_PIXEL}.mask_features.\1"),
    *(
        (
            rf"head\.decoder\.layers\.(\d)\.{ours}\.{own}",
            rf"{_DECODER}.transformer_{theirs}_layers.\1.{name}",
        )
        for ours, theirs, module in (
            ("cross", "cross_attention", "multihead_attn"),
            ("attn", "self_attention", "self_attn"),
        )
        for own, name in (
            (r"in_proj\.(weight|bias)", rf"{module}.in_proj_\2"),
            (r"proj\.(weight|bias)", rf"{module}.out_proj.\2"),
        )
    ),
    *(
        (
            rf"head\.decoder\.layers\.(\d)\.{ours}_norm\.(.+)",
            rf"{_DECODER}.transformer_{theirs}_layers.\1.norm.\2",
        )
        for ours, theirs in (
            ("cross", "cross_attention"),
            ("attn", "self_attention"),
            ("mlp", "ffn"),
        )
    ),
    (
        r"head\.decoder\.layers\.(\d)\.mlp\.fc([12])\.(.+)",
        rf"{_DECODER}.transformer_ffn_layers.\1.linear\2.\3",
    ),
    (r"head\.decoder\.norm\.(.+)", rf"{_DECODER}.decoder_norm.\1"),
    (r"head\.decoder\.query", rf"{_DECODER}.query_feat.weight"),
    (r"head\.decoder\.query_position", rf"{_DECODER}.query_embed.weight"),
    (r"head\.decoder\.level_embed", rf"{_DECODER}.level_embed.weight"),
    (r"head\.decoder\.classify\.(.+)", rf"{_DECODER}.class_embed.\1"),
    *(
        (rf"head\.decoder\.mask_embed\.{2 * i}\.(.+)", rf"{_DECODER}.mask_embed.layers.{i}.\1")
        for i in range(3)
    ),
)
_RELEASED_NAMES = {
    "classification": _CLASSIFICATION_NAMES,
    "mask2former": _SEGMENTATION_NAMES,
}


def _released_name(key: str, head: str) -> str:
    """The released checkpoint's name for an entry of our state dict, but for joined projections."""
    for pattern, replacement in _RELEASED_NAMES.get(head, ()):
        if re.fullmatch(pattern, key):
            return re.sub(pattern, replacement, key)
    raise KeyError(f"no released name is known for {key} of head {head!r}")


# Of the released attention, whose query has a projection of its own.
_JOINED = re.compile(r"((?:backbone\.)?layers\.(\d+)\.blocks\.\d+\.attn)\.qkv\.(weight|bias)")


def _factor(own: str) -> float | list[float]:
    """What turns an entry of theirs into ours, where conventions differ."""
    if own.endswith("attn.power"):  # theirs is the exponent of the squared distance
        return 2
    if own == "head.pixel_decoder.conv.weight_net.0.weight":
        # Theirs looks from the neighbor to the center: only the distance keeps its sign.
        return [-1, -1, 1, -1, -1]
    return 1


def to_released(
    state: Mapping[str, Tensor], config: AFFConfig, head: str = "classification"
) -> dict[str, Tensor]:
    """An AFF's state dict, or a part of it, under the released names and conventions.

    Raises:
        KeyError: the released models have no such entry.
    """
    released = {}
    for own, value in state.items():
        name = _released_name(own, head)
        joined = _JOINED.fullmatch(name)
        if joined:  # per head: the key's channels, then the value's
            attention, stage, kind = joined.groups()
            query, key, val = value.unflatten(0, (3, config.heads[int(stage)], -1)).unbind(0)
            released[f"{attention}.q.{kind}"] = query.flatten(0, 1)
            released[f"{attention}.kv.{kind}"] = torch.stack([key, val], 1).flatten(0, 2)
        else:
            factor = _factor(own)
            released[name] = value if factor == 1 else value / value.new_tensor(factor)
    return released


def from_released(
    state: Mapping[str, Tensor], model: Model, head: str | None = None
) -> dict[str, Tensor]:
    """A released state dict under our names and conventions; unknown entries keep their name.

    Args:
        head: that the state is of, if it is not the model's. Its entries are then unknown.
    """
    head = head or model.head_name
    names = [_plain_name(name) for name in model.state_dict()]
    shared = [name for name in names if head == model.head_name or name.startswith("backbone.")]
    ours = {_released_name(name, head): name for name in shared}
    left, renamed = dict(state), {}
    for name, own in ours.items():
        joined = _JOINED.fullmatch(name)
        if joined is None:
            continue
        attention, stage, kind = joined.groups()
        parts = [f"{attention}.{part}.{kind}" for part in ("q", "kv")]
        if all(part in left for part in parts):
            query, pairs = (left.pop(part) for part in parts)
            if len(query) * 2 == len(pairs) and len(query) % model.config.heads[int(stage)] == 0:
                pairs = pairs.unflatten(0, (model.config.heads[int(stage)], 2, -1))
                pairs = pairs.transpose(0, 1).flatten(0, 2)
            renamed[own] = torch.cat([query, pairs])
    for key, value in left.items():
        if key.endswith("static_query.weight"):  # the old name
            key = key.replace("static_query", "query_feat")
        own = ours.get(key, key)
        if head != model.head_name and re.match(r"backbone\.norm\d", own):  # the head's, with us
            own = own.removeprefix("backbone.")
        factor = _factor(own)
        renamed[own] = value if factor == 1 else value * value.new_tensor(factor)
    return renamed


def load_released(
    path: str | os.PathLike, name: str, *, key: str | None = None, **overrides: object
) -> Model:
    """A model with the weights of a released AFF checkpoint, in eval mode.

    The file may be a container (a dict whose "model" entry is the state dict, next to optimizer and
    random states) or a bare state dict. It is unpickled with `weights_only=True` and an allow-list
    for NumPy's random states, so that it cannot run code.

    To fine-tune, ask for another head or number of classes than the file's, as for `load_model`.

    Args:
        path: the downloaded file.
        name: which model it is, for example "aff_mini".
        key: see `load_model`.
        overrides: as for `create_model`, for example `task="semantic"` for a segmentation
            checkpoint. The head and the numbers of classes and queries are read from the file
            unless given. Segmentation models normalize positions by batch, as they were trained;
            `position_norm="image"` makes an image's result independent of the others. Those of
            Cityscapes, with 8 or 19 classes, get `alpha=8`. The original pads images with zeros to
            multiples of 32 before it cuts the masks: do so to get its numbers for other sizes.

    Raises:
        CheckpointError: the file is unreadable, no checkpoint, or another model's.
    """
    from pointformer.models.registry import create_model

    chosen = (overrides.get(option) for option in ("head", "num_classes", "task"))
    _check_choices(name, key, *chosen)
    state = _state_of(_unpickle(path), path, key)
    if any(_plain_name(entry).endswith("patch_embed.conv1.weight") for entry in state):
        raise CheckpointError(f"{path}: has this library's own names: use load_model")
    segments = any(entry.startswith("sem_seg_head.") for entry in state)
    own_head = "mask2former" if segments else "classification"
    own: dict[str, object] = {"head": own_head}
    settings: dict[str, object] = {}
    if segments:
        classes, queries = (state.get(f"{_DECODER}.{n}") for n in _SIZES)
        own["num_classes"] = None if classes is None else len(classes) - 1
        own["queries"] = None if queries is None else len(queries)
        settings["position_norm"] = "batch"
        if not any(entry.endswith("shepard_power") for entry in state):  # COCO's
            settings |= {"power": 4.0, "learn_power": False}
        if own["num_classes"] in (8, 19):  # Cityscapes'
            overrides.setdefault("alpha", 8.0)
    elif "head.bias" in state:
        own["num_classes"] = len(state["head.bias"])
    own = {option: value for option, value in own.items() if value is not None}
    if overrides.setdefault("head", own_head) == own_head:
        overrides = {**own, **settings, **overrides}
    new_head = any(overrides.get(option) != value for option, value in own.items())
    model = create_model(name, **overrides)  # type: ignore[arg-type]
    load_state(model, from_released(state, model, own_head), path, new_head=new_head)
    return model.eval()


def _unpickle(path: str | os.PathLike) -> Mapping:
    _check_file(path)
    try:
        with (
            torch.serialization.safe_globals(_random_state_globals()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of a pickle protocol: it is read, or refused below
            container = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        # torch begins with advice to read the file unsafely, and says later what is wrong with it.
        text = str(error)
        text = text.partition("WeightsUnpickler error:")[2].strip() or text
        reason = text.partition(". Please use")[0].partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: not a checkpoint that can be read safely ({reason})"
        ) from None
    if not isinstance(container, Mapping):
        raise CheckpointError(f"{path}: expected a dict of weights, got {type(container).__name__}")
    return container


def _random_state_globals() -> list[tuple[Callable, str]]:
    """What pickled NumPy random states refer to, under the names of NumPy 1 and 2."""
    allowed: list[tuple[Callable, str]] = [
        (np.ndarray, "numpy.ndarray"),
        (np.dtype, "numpy.dtype"),
        (np.dtypes.UInt32DType, "numpy.dtypes.UInt32DType"),
        (np.random.RandomState, "numpy.random.mtrand.RandomState"),
        (np.random.MT19937, "numpy.random._mt19937.MT19937"),
    ]
    reconstruct = importlib.import_module("numpy._core.multiarray")._reconstruct
    random_pickle = importlib.import_module("numpy.random._pickle")
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed.append((reconstruct, f"{module}._reconstruct"))
    for constructor in ("__randomstate_ctor", "__bit_generator_ctor"):
        allowed.append((getattr(random_pickle, constructor), f"numpy.random._pickle.{constructor}"))
    return allowed
