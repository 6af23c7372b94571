"""The released AutoFocusFormer checkpoints: their names and conventions."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pointformer.annotations import Category
from pointformer.models.config import AFFConfig
from pointformer.models.files import check_choices
from pointformer.models.model import Model, new_model
from pointformer.models.state import (
    WHOLE_HEAD,
    CheckpointError,
    copy_weights,
    plain_name,
    state_of,
    unpickle,
)

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
    """Factor from a released entry to ours, where conventions differ."""
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
    names = [plain_name(name) for name in model.state_dict()]
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
    path: str | os.PathLike,
    name: str,
    *,
    key: str | None = None,
    head: str | None = None,
    num_classes: int | None = None,
    impl: str | None = None,
    task: str | None = None,
    categories: Sequence[Category] | None = None,
    **overrides: object,
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
        head, num_classes: read from the file unless given.
        impl, task, categories: as for `create_model`, for example `task="semantic"` for a
            segmentation checkpoint.
        overrides: as for `create_model`. The number of queries is read from the file unless given.
            Segmentation models normalize positions by batch, as they were trained;
            `position_norm="image"` makes an image's result independent of the others. Those of
            Cityscapes, with 8 or 19 classes, get `alpha=8`. The original pads images with zeros to
            multiples of 32 before it cuts the masks: do so to get its numbers for other sizes.

    Raises:
        CheckpointError: the file is unreadable, no checkpoint, or another model's.
    """
    check_choices(name, key, head, num_classes, task)
    state = state_of(unpickle(path), path, key)
    if any(plain_name(entry).endswith("patch_embed.conv1.weight") for entry in state):
        raise CheckpointError(f"{path}: has this library's own names: use load_model")
    segments = any(entry.startswith("sem_seg_head.") for entry in state)
    own_head = "mask2former" if segments else "classification"
    scores = state.get(f"{_DECODER}.class_embed.bias" if segments else "head.bias")
    own: dict[str, object] = {} if scores is None else {"num_classes": len(scores) - segments}
    settings: dict[str, object] = {}
    if segments:
        if f"{_DECODER}.query_embed.weight" in state:
            own["queries"] = len(state[f"{_DECODER}.query_embed.weight"])
        settings["position_norm"] = "batch"
        if not any(entry.endswith("shepard_power") for entry in state):  # COCO's
            settings |= {"power": 4.0, "learn_power": False}
        if own.get("num_classes") in (8, 19):  # Cityscapes'
            overrides.setdefault("alpha", 8.0)
    head = head or own_head
    if num_classes is not None:
        overrides["num_classes"] = num_classes
    if head == own_head:
        overrides = {**own, **settings, **overrides}
    made: dict[str, Any] = {"impl": impl, "task": task, "categories": categories, **overrides}
    model = new_model(name, head, **made)
    fresh: tuple[str, ...] | None = None
    if head != own_head:
        fresh = WHOLE_HEAD
    elif any(overrides[option] != value for option, value in own.items()):
        fresh = ()
    copy_weights(model, from_released(state, model, own_head), path, fresh=fresh)
    return model.eval()
