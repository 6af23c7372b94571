"""A backbone and a head as one module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pointformer import TokenSet
from pointformer._checks import (
    brief,
    check_count,
    check_finite,
    check_flags,
    check_number,
    check_option,
    describe,
)
from pointformer.annotations import Category
from pointformer.models.aff import AFF
from pointformer.models.backbone import Backbone, StageOutput
from pointformer.models.config import (
    AFFConfig,
    GridConfig,
    ModelConfig,
    PointConfig,
    SwinConfig,
    config_of,
)
from pointformer.models.grid import GridBackbone
from pointformer.models.heads import HEADS, TASK_NAMES, check_options, options_of, output_of
from pointformer.models.points import PointBackbone, PointPreprocess
from pointformer.models.swin import Swin
from pointformer.nn import Block
from pointformer.nn.parallel import BatchPart

IMPLS = ("reference", "cpu", "triton", None)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What wraps modules leaves these in the names of weights: torch.compile; DataParallel,
# DistributedDataParallel and averaged models; FSDP; activation checkpointing.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in gray


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of wrappers: a `Model`, a backbone, or whatever has none of their names."""
    while not isinstance(module, Model | Backbone | GridBackbone):
        inside = [module._modules[name] for name in WRAPPERS if name in module._modules]
        if not inside or inside[0] is None:
            break
        module = inside[0]
    return module


class Preprocess(nn.Module):
    """Normalization that a model expects, which `save_model` keeps with its weights.

    Maps uint8 or [0, 1] float images (..., C, H, W) to float32, `(image - mean) / std` per channel.
    Gray pictures become RGB and RGB ones gray (by ITU-R 601) where the model takes the other.

    Args:
        mean, std: one number for each of the C channels, of values from 0 to 1.
    """

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.mean: tuple[float, ...]
        self.std: tuple[float, ...]
        for name, given, kind, above in (
            ("mean", mean, "finite", None),
            ("std", std, "positive", 0),
        ):
            values = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
            try:
                if not isinstance(values, list | tuple) or not values:
                    raise ValueError
                for value in values:
                    check_number(name, value, above=above)
            except ValueError:
                raise ValueError(
                    f"{name}: expected {kind} numbers, one per channel, got {brief(given)}"
                ) from None
            setattr(self, name, tuple(map(float, values)))
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"std: expected one number for each of mean's {len(self.mean)}, got {brief(std)}"
            )

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"

    @classmethod
    def of_channels(cls, channels: int) -> Preprocess:
        """ImageNet's for three channels; for others the means over its three, for every channel."""
        if channels == len(IMAGENET_MEAN):
            return cls()
        gray = (sum(values) / len(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return cls(*((value,) * channels for value in gray))

    def forward(self, image: Tensor) -> Tensor:
        if not isinstance(image, Tensor) or image.dim() < 3:
            raise TypeError(f"image: expected a tensor (..., C, H, W), got {describe(image)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise TypeError(f"image: expected uint8, or floats of 0 to 1, got {describe(image)}")
        values = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        given, channels = values.shape[-3], len(self.mean)
        if (given, channels) == (3, 1):
            values = (values * values.new_tensor(_LUMA).view(3, 1, 1)).sum(-3, keepdim=True)
        elif given != channels and (given, channels) != (1, 3):
            raise ValueError(
                f"image: the model takes {channels} channels, got {tuple(image.shape)} "
                "(channels, height, width last)"
            )
        mean, std = (values.new_tensor(x).view(-1, 1, 1) for x in (self.mean, self.std))
        return (values - mean) / std


def configured(
    name: str,
    config: ModelConfig,
    head: str,
    options: Mapping[str, object],
    made_for: str = "classification",
) -> tuple[ModelConfig, dict[str, object]]:
    """The configuration with changes, and the options of the head, out of a model's options.

    Args:
        name: of the model, for messages.
        made_for: the head that `config` was made for.

    Raises:
        ValueError, TypeError: an unknown head or option; the message lists the known ones.
    """
    _check_head(head)
    known = {name: [field.name for field in fields(config)], f"head {head!r}": [*options_of(head)]}
    _check_options(options, known)
    own = {key: value for key, value in options.items() if key in options_of(head)}
    changes = {key: value for key, value in options.items() if key not in own}
    if made_for == "classification" != head and isinstance(config, AFFConfig):
        # As the released backbones: the last stage is local too.
        changes.setdefault("neighborhood_size", min(config.neighborhood_size))
    return config.override(**changes), own


def _check_head(head: str) -> None:
    check_option("head", head, tuple(HEADS))


def _check_options(options: Mapping[str, object], known: Mapping[str, list[str]]) -> None:
    unknown = sorted(set(options).difference(*known.values()))
    if not unknown:
        return
    lists = "; ".join(f"of {whose}: {', '.join(sorted(names))}" for whose, names in known.items())
    others = [head for head in HEADS if unknown[0] in options_of(head)]
    hint = f" ({unknown[0]} is of the head {' or '.join(others)})" if others else ""
    raise TypeError(f"unknown option {', '.join(unknown)}{hint}; known options: {lists}")


class Model(nn.Module):
    """A backbone with a head, as `create_model` makes it.

    Another backbone is given in the place of the configuration: `Model("resnet50",
    GridBackbone(module, dims), "mask2former", 150)`.

    Attributes:
        name: the name it was made with.
        backbone: `AFF`, `Swin`, `GridBackbone` or `PointBackbone`; `backbone(images)` gives each
            stage's tokens.
        head: maps the stages to the output of `forward`.
        output: what the head says, an `Output`; it decides which tasks the model can serve.
        task: name of what is made of the output; `None`: nothing, or nobody said which of several.
        categories: names, colors and countability of the classes of what the model finds, or
            `None`.
        head_options: the options that the head was made with.
        preprocess: normalization of raw images, see `Preprocess`; not applied by `forward`. For
            other values: `model.preprocess = Preprocess(mean, std)`.
        object_diameter: typical diameter in pixels of the objects in the training data, or `None`.
        min_score: confidence from which objects are shown, the best one on the pictures that the
            trained model was scored on; `None`: 0.5.
        trained: how it was trained, as `save_model` was told, or `None`.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig | GridBackbone,
        head: str,
        num_classes: int,
        impl: str | None = None,
        task: str | None = None,
        categories: Sequence[Category] | None = None,
        **head_options: object,
    ) -> None:
        super().__init__()
        _check_head(head)
        _check_options(head_options, {f"head {head!r}": [*options_of(head)]})
        check_options(head, head_options)
        if not isinstance(name, str):
            raise TypeError(f"name: expected text, got {describe(name)}")
        if not isinstance(config, ModelConfig | GridBackbone):
            raise TypeError(
                "config: expected AFFConfig, SwinConfig, PointConfig or GridBackbone, got "
                f"{describe(config)}"
            )
        if HEADS[head].of_points != isinstance(config, PointConfig):
            own, other = ("images", "points") if HEADS[head].of_points else ("points", "images")
            raise ValueError(f"head: {name:.60} is a model of {own}, {head!r} is for {other}")
        check_count("num_classes", num_classes)
        check_option("impl", impl, IMPLS)
        check_option("task", task, (*TASK_NAMES, None))
        if categories is not None and not (
            isinstance(categories, list | tuple)
            and all(isinstance(category, Category) for category in categories)
        ):
            raise TypeError(f"categories: expected a list of Category, got {describe(categories)}")
        self.output = output_of(head, num_classes, task)
        kinds = self.output.kinds(num_classes)
        if categories is not None and len(categories) != kinds:
            found = (
                f"one for each of {num_classes} classes"
                if self.output.channels is None
                else "one, of the objects: the classes of a dense head that finds instances are "
                "background, inside and border (task='semantic' for a map of 3 classes)"
            )
            raise ValueError(f"categories: expected {found}, got {len(categories)}")
        self.name = name
        self.head_name = head
        self.num_classes = num_classes
        self.backbone: AFF | Swin | PointBackbone | GridBackbone
        if isinstance(config, GridBackbone):
            self.backbone = config
            self.backbone.impl = impl
        elif isinstance(config, AFFConfig):
            self.backbone = AFF(config, impl)
        elif isinstance(config, SwinConfig):
            self.backbone = Swin(config, impl)
        else:
            self.backbone = PointBackbone(config, impl)
        self.head = HEADS[head](self.config, num_classes, **head_options)
        self.head_options = head_options
        self.task = task or self.output.only_task
        self.categories = None if categories is None else tuple(categories)
        self.preprocess: Preprocess | PointPreprocess
        if isinstance(self.config, PointConfig):
            self.preprocess = PointPreprocess(self.config.unit)
        else:
            self.preprocess = Preprocess.of_channels(self.config.in_channels)
        self.forget_training()

    def forget_training(self) -> None:
        """Make what is known of the training unknown, as that of other data or weights is."""
        self.object_diameter: float | None = None
        self.min_score: float | None = None
        self.trained: dict[str, Any] | None = None

    @property
    def config(self) -> ModelConfig | GridConfig:
        return self.backbone.config

    @property
    def image_config(self) -> AFFConfig | SwinConfig | GridConfig:
        """The configuration of a model of images; a `ValueError` if it is one of points."""
        if isinstance(self.config, PointConfig):
            raise ValueError(f"model: {self.name} takes points, expected a model of images")
        return self.config

    @property
    def of_points(self) -> bool:
        """Whether it takes point sets, not images."""
        return isinstance(self.config, PointConfig)

    def reconfigure(self, **changes: object) -> None:
        """Change `rate`, `neighborhood_size` or, of an AFF, `alpha`, `spread` or `reach` for the
        following calls."""
        backbone = unwrapped(self.backbone)
        if not isinstance(backbone, AFF | PointBackbone):
            raise ValueError(
                f"reconfigure: the tokens of {self.name} are a grid, nothing can change"
            )
        backbone.reconfigure(**changes)

    @contextlib.contextmanager
    def reconfigured(self, **changes: object) -> Iterator[None]:
        """`reconfigure` for the calls within this context only."""
        backbone: Any = unwrapped(self.backbone)
        before = backbone.config
        self.reconfigure(**changes)
        try:
            yield
        finally:
            backbone.config = before

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the inputs of the backbone's blocks, and runs each again in
        the backward pass: less memory, a third more work. The gradients are the same.

        Raises:
            ValueError: a foreign backbone cannot.
        """
        blocks = [module for module in self.backbone.modules() if isinstance(module, Block)]
        for block in blocks:
            block.recompute = enable
        backbone = unwrapped(self.backbone)
        if isinstance(backbone, GridBackbone):
            if not hasattr(backbone.module, "set_grad_checkpointing"):
                raise ValueError(f"set_grad_checkpointing: the backbone of {self.name} has none")
            backbone.module.set_grad_checkpointing(enable)  # type: ignore[operator]

    def set_batch_part(self, part: BatchPart) -> None:
        """Which part of the batches in training this process has, for random numbers by sample."""
        for module in self.backbone.modules():
            if isinstance(module, Block):
                module.part = part

    def forward(
        self, images: Tensor | Sequence[Tensor] | TokenSet, with_stages: bool = False
    ) -> Any:
        """Run on normalized images or points.

        Args:
            images: (B, C, H, W), or a list of (C, H, W) whose sizes may differ, of C
                `config.in_channels`; they are converted to the dtype of the weights. For a model of
                points a `TokenSet` with as many features.
            with_stages: return the backbone's `StageOutput`s too, as (output, stages).

        Returns:
            head "classification": logits (B, num_classes). "dense": logits (B, num_classes, H, W),
            or a list of (num_classes, H, W) for a list. "features": four `TokenSet`s.
            "mask2former" and "hcformer": `MaskPredictions`. "stars": (B, num_classes + rays, H / 2,
            W / 2), see `StarHead`, or a list. "point_classification": logits (B, num_classes).
            "point_segmentation": (T, num_classes), rows as in the `TokenSet`.
        """
        check_flags(with_stages=with_stages)
        dtype = next(self.parameters()).dtype
        inputs: Any = images
        if isinstance(self.config, PointConfig):
            inputs = _checked_points(images, self.config)
            inputs = inputs.to(dtype=dtype)
        else:
            self._check(images)
            if isinstance(inputs, Tensor):
                inputs = inputs.to(dtype)
            else:
                inputs = [image.to(dtype) for image in inputs]
        stages: list[StageOutput] = self.backbone(inputs)
        output = self.head(stages, inputs, self.backbone.impl)
        return (output, stages) if with_stages else output

    def _check(self, images: object) -> None:
        channels = self.config.in_channels
        if not isinstance(images, Tensor | list | tuple):
            raise TypeError(
                f"images: expected (B, {channels}, H, W) or a list of ({channels}, H, W), got "
                f"{describe(images)}"
            )
        given = [images] if isinstance(images, Tensor) else images
        dims = 4 if isinstance(images, Tensor) else 3
        if not given:
            raise ValueError("images: expected at least one image, got an empty list")
        for image in given:
            shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            if (
                not isinstance(image, Tensor)
                or image.dim() != dims
                or image.shape[-3] != channels
                or image.numel() == 0
            ):
                raise ValueError(
                    f"images: expected (B, {channels}, H, W) or a list of ({channels}, H, W), "
                    f"got {shape}"
                )
            if not image.is_floating_point():
                raise TypeError(
                    f"images: expected a float tensor, got {image.dtype}; "
                    "use model.preprocess(image) first"
                )


def _checked_points(tokens: object, config: PointConfig) -> TokenSet:
    wanted = f"a TokenSet of {config.dimensions}-D positions and {config.in_channels} features"
    if not isinstance(tokens, TokenSet):
        raise TypeError(
            f"images: this is a model of points; expected {wanted}, got {describe(tokens)}"
        )
    if (tokens.dimensions, tokens.channels) != (config.dimensions, config.in_channels):
        raise ValueError(f"images: expected {wanted}, got {tokens}")
    known = not isinstance(tokens.sizes, Tensor)  # else compiled
    empty = [sample for sample, size in enumerate(tokens.sizes) if size == 0] if known else []
    if empty or not len(tokens):
        which = f"sample {empty[0]} has" if empty else "there are"
        raise ValueError(f"images: expected points in every sample, {which} none")
    check_finite("images", tokens.positions, tokens.sizes)
    return tokens if tokens.clusters is None else tokens.input_order()


def new_model(
    name: str,
    head: str | None = None,
    num_classes: int | None = None,
    impl: str | None = None,
    task: str | None = None,
    categories: Sequence[Category] | None = None,
    **overrides: object,
) -> Model:
    """A model by name with random weights; see `create_model`."""
    config = config_of(name)
    if head is None:
        head = "point_classification" if isinstance(config, PointConfig) else "classification"
    config, options = configured(name, config, head, overrides)
    num_classes = 1000 if num_classes is None else num_classes
    return Model(name, config, head, num_classes, impl, task, categories, **options)
