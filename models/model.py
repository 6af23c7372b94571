"""A backbone and a head as one module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pointformer.data.annotations import Category
from pointformer.models.aff import AFF
from pointformer.models.config import AFFConfig, GridConfig, SwinConfig
from pointformer.models.grid import GridBackbone
from pointformer.models.heads import HEADS
from pointformer.models.swin import Swin

TASKS = ("semantic", "instance", "panoptic")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Preprocess(nn.Module):
    """Normalization that a model expects: uint8 or [0, 1] float RGB (..., 3, H, W) to float32."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            values = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        if image.dtype == torch.uint8:
            image = image.float() / 255
        return (image.float() - self.mean) / self.std


class Model(nn.Module):
    """What `create_model` returns.

    Another backbone is given in the place of the configuration: `Model("resnet50",
    GridBackbone(module, dims), "mask2former", 150)`.

    Attributes:
        name: the name it was made with.
        backbone: `AFF`, `Swin` or `GridBackbone`; `backbone(images)` gives each stage's tokens.
        head: maps the stages to the output of `forward`.
        task: "semantic", "instance" or "panoptic", what masks are turned into; `None` where the
            head makes none.
        categories: names, colors and countability of the K classes, or `None`.
        head_options: the options that the head was made with.
        preprocess: normalization of raw images; not applied by `forward`.
        object_diameter: typical diameter in pixels of the objects in the training data, or `None`.
    """

    def __init__(
        self,
        name: str,
        config: AFFConfig | SwinConfig | GridBackbone,
        head: str,
        num_classes: int,
        impl: str | None = None,
        task: str | None = None,
        categories: Sequence[Category] | None = None,
        **head_options: object,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {head!r}")
        if task is not None and task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        dense = {None, "semantic"} | ({"instance"} if num_classes == 3 else set())
        possible = {"mask2former": {None, *TASKS}, "hcformer": {None, *TASKS}, "dense": dense}
        if task not in possible.get(head, {None}):
            raise ValueError(
                f"task: head {head!r} with {num_classes} classes is not made for {task!r}"
            )
        if categories is not None and len(categories) != num_classes:
            raise ValueError(
                f"categories: expected one for each of {num_classes} classes, got {len(categories)}"
            )
        self.name = name
        self.head_name = head
        self.num_classes = num_classes
        self.backbone: AFF | Swin | GridBackbone
        if isinstance(config, GridBackbone):
            self.backbone = config
            self.backbone.impl = impl
        else:
            self.backbone = (
                AFF(config, impl) if isinstance(config, AFFConfig) else Swin(config, impl)
            )
        self.head = HEADS[head](self.config, num_classes, **head_options)
        self.head_options = head_options
        self.task = task
        self.categories = None if categories is None else tuple(categories)
        self.preprocess = Preprocess()
        self.object_diameter: float | None = None

    @property
    def config(self) -> AFFConfig | SwinConfig | GridConfig:
        return self.backbone.config

    def reconfigure(self, **changes: object) -> None:
        """Change `rate`, `alpha` or `neighborhood_size` of an AFF for the following calls."""
        if not isinstance(self.backbone, AFF):
            raise ValueError(
                f"reconfigure: the tokens of {self.name} are a grid, nothing can change"
            )
        self.backbone.reconfigure(**changes)

    def forward(self, images: Tensor | Sequence[Tensor]):
        """Run on normalized images.

        Args:
            images: (B, 3, H, W), or a list of (3, H, W) whose sizes may differ.

        Returns:
            head "classification": logits (B, num_classes). "dense": logits (B, num_classes, H, W),
            or a list of (num_classes, H, W) for a list. "features": four `TokenSet`s.
            "mask2former" and "hcformer": `MaskPredictions`.
        """
        self._check(images)
        return self.head(self.backbone(images), images, self.backbone.impl)

    def _check(self, images: Tensor | Sequence[Tensor]) -> None:
        channels = self.config.in_channels
        given = [images] if isinstance(images, Tensor) else list(images)
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
