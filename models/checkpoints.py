"""Reading and writing weights: our safetensors files, and the released AFF checkpoints."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pointformer._files import atomic_path
from pointformer.data.annotations import Category
from pointformer.models.config import GridConfig, config_from
from pointformer.models.model import Model

_METADATA = "pointformer"


class CheckpointError(ValueError):
    """A file cannot be used as the checkpoint it was given as; the message names the file."""


def save_model(model: Model, path: str | os.PathLike) -> None:
    """Write weights and configuration as one safetensors file, complete or not at all.

    Raises:
        ValueError: the backbone is a `GridBackbone`, which `load_model` could not make again.
    """
    if isinstance(model.config, GridConfig):
        raise ValueError(f"{model.name}: a foreign backbone is not saved; use torch.save")
    description = {
        "name": model.name,
        "head": model.head_name,
        "head_options": model.head_options,
        "task": model.task,
        "categories": model.categories and [dataclasses.asdict(c) for c in model.categories],
        "num_classes": model.num_classes,
        "config": dataclasses.asdict(model.config),
        "object_diameter": model.object_diameter,
    }
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={_METADATA: json.dumps(description)})


def load_model(path: str | os.PathLike, **overrides: object) -> Model:
    """The model that `save_model` wrote, in eval mode; `overrides` are fields of its config.

    Raises:
        CheckpointError: the file is unreadable, not from `save_model`, or does not fit.
    """
    state, description = _read_safetensors(path)
    try:
        config = config_from(description["config"]).override(**overrides)
        model = Model(
            description["name"],
            config,
            description["head"],
            description["num_classes"],
            task=description.get("task"),
            categories=_categories(description.get("categories")),
            **description.get("head_options", {}),
        )
    except KeyError as error:
        raise CheckpointError(f"{path}: its description lacks {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    model.object_diameter = description.get("object_diameter")
    load_state(model, state, source=path)
    return model.eval()


def _categories(rows: list[dict] | None) -> list[Category] | None:
    return rows and [Category(**row | {"color": tuple(row["color"])}) for row in rows]


def _read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    if text is None:
        raise CheckpointError(f"{path}: a safetensors file, but not one that save_model wrote")
    return state, json.loads(text)


def load_state(model: Model, state: Mapping[str, Tensor], source: object) -> None:
    """Copy `state` into `model`; every key and shape must fit.

    Raises:
        CheckpointError: naming `source`, how many entries differ and the first of them.
    """
    own = model.state_dict()
    problems = []
    missing = sorted(set(own) - set(state))
    if missing:
        problems.append(f"{len(missing)} entries are missing (first: {missing[0]})")
    unexpected = sorted(set(state) - set(own))
    if unexpected:
        problems.append(f"{len(unexpected)} are unknown (first: {unexpected[0]})")
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if shapes:
        key = shapes[0]
        problems.append(
            f"{len(shapes)} have another shape (first: {key} is {tuple(state[key].shape)}, "
            f"expected {tuple(own[key].shape)})"
        )
    if problems:
        raise CheckpointError(f"{source}: not a checkpoint of {model.name}: {'; '.join(problems)}")
    model.load_state_dict(dict(state))


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
        r"stages\.(\d+)\.blocks\.(\d+)\.((?:attn\.(?:q|kv|proj)|norm1|norm2|mlp\.fc1|mlp\.fc2)"
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


def released_name(key: str, head: str = "classification") -> str:
    """The released checkpoint's name for an entry of our state dict."""
    for pattern, replacement in _RELEASED_NAMES.get(head, ()):
        if re.fullmatch(pattern, key):
            return re.sub(pattern, replacement, key)
    raise KeyError(f"no released name is known for {key} of head {head!r}")


def from_released(state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """A released state dict under our names and conventions; unknown entries keep their name."""
    ours = {released_name(key, model.head_name): key for key in model.state_dict()}
    renamed = {}
    for key, value in state.items():
        if key == "criterion.empty_weight":  # of the loss
            continue
        if key.endswith("static_query.weight"):  # the old name
            key = key.replace("static_query", "query_feat")
        own = ours.get(key, key)
        if own.endswith("attn.power"):  # theirs is the exponent of the squared distance
            value = 2 * value
        if own == "head.pixel_decoder.conv.weight_net.0.weight":
            # Theirs looks from the neighbor to the center: only the distance keeps its sign.
            value = value * value.new_tensor([-1, -1, 1, -1, -1])
        renamed[own] = value
    return renamed


def load_released(path: str | os.PathLike, name: str, **overrides: object) -> Model:
    """A model with the weights of a released AFF checkpoint, in eval mode.

    The file may be a container (a dict whose "model" entry is the state dict, next to optimizer and
    random states) or a bare state dict. It is unpickled with `weights_only=True` and an allow-list
    for NumPy's random states, so that it cannot run code.

    Args:
        path: the downloaded file.
        name: which model it is, for example "aff_mini".
        overrides: as for `create_model`, for example `head="mask2former", task="semantic"` for a
            segmentation checkpoint. The numbers of classes and queries are read from the file
            unless given. Segmentation models normalize positions by batch, as they were trained;
            `position_norm="image"` makes an image's result independent of the others. Those of
            Cityscapes, with 8 or 19 classes, get `alpha=8`. The original pads images with zeros to
            multiples of 32 before it cuts the masks: do so to get its numbers for other sizes.

    Raises:
        CheckpointError: the file is unreadable, no checkpoint, or another model's.
    """
    from pointformer.models.registry import create_model

    container = _unpickle(path)
    state = container.get("model", container)
    if isinstance(state, Mapping):  # detectron2 stores arrays
        state = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()
        }
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: a pickle, but it holds no state dict of tensors")
    head = overrides.get("head") or "classification"
    if head not in _RELEASED_NAMES:
        known = ", ".join(_RELEASED_NAMES)
        raise CheckpointError(f"{path}: head {head!r} was not released, only {known}")
    if "head.bias" in state:
        overrides.setdefault("num_classes", len(state["head.bias"]))
    if head == "mask2former":
        if f"{_DECODER}.class_embed.bias" in state:
            overrides.setdefault("num_classes", len(state[f"{_DECODER}.class_embed.bias"]) - 1)
        if f"{_DECODER}.query_embed.weight" in state:
            overrides.setdefault("queries", len(state[f"{_DECODER}.query_embed.weight"]))
        if not any(key.endswith("shepard_power") for key in state):  # COCO's
            overrides.setdefault("power", 4.0)
            overrides.setdefault("learn_power", False)
        if overrides.get("num_classes") in (8, 19):  # Cityscapes'
            overrides.setdefault("alpha", 8.0)
        overrides.setdefault("position_norm", "batch")
    model = create_model(name, **overrides)  # type: ignore[arg-type]
    load_state(model, from_released(state, model), source=path)
    return model.eval()


def _unpickle(path: str | os.PathLike) -> Mapping:
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(_random_state_globals()):
            container = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
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
