"""Models by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pointformer._checks import brief, check_flags, describe
from pointformer.annotations import Category
from pointformer.models.checkpoints import load_model
from pointformer.models.config import CONFIGS
from pointformer.models.model import Model, configured

_WEIGHTS = Path(__file__).parent / "weights"


def list_models(pretrained: bool = False) -> list[str]:
    """Names that `create_model` knows; with `pretrained`, those whose weights are in the package
    (as "name.tag")."""
    check_flags(pretrained=pretrained)
    if pretrained:
        return sorted(path.stem for path in _WEIGHTS.glob("*.safetensors"))
    return sorted(CONFIGS)


def create_model(
    name: str,
    pretrained: bool | str = False,
    num_classes: int | None = None,
    head: str | None = None,
    impl: str | None = None,
    task: str | None = None,
    categories: Sequence[Category] | None = None,
    **overrides: object,
) -> Model:
    """A model by name.

    Args:
        name: one of `list_models()`.
        pretrained: `True` or a tag, for the weights that come with the package ("nuclei"); they
            fix what the head is and finds. Released AFF weights: `load_released`.
        num_classes: outputs of the head (default 1000). With `in_channels` other than 3, raw
            images are normalized by the mean of ImageNet's channels, see `Preprocess`.
        head: "classification" (default), "dense" (per-pixel scores), "features" (four
            `TokenSet`s, for decoders), "mask2former" or "hcformer" (a class and a mask per query).
        impl: implementation of the ops, see `pointformer.ops`.
        task: "semantic", "instance" or "panoptic": what the masks of a head are turned into.
        categories: names, colors and countability of the classes, for pictures and panoptic maps.
        overrides: fields of `AFFConfig`, for example `rate=0.2`, `alpha=8`, `patch_stride=2`, or of
            `SwinConfig`, and options of the head, for example `queries=250`.

    Raises:
        ValueError, TypeError: unknown name, tag or option; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in CONFIGS:
        known = ", ".join(list_models())
        raise ValueError(f"name: unknown model {brief(name)}; known models: {known}")
    if not isinstance(pretrained, bool | str):
        raise TypeError(f"pretrained: expected True, False or a tag, got {describe(pretrained)}")
    if not pretrained:
        head = "classification" if head is None else head
        config, options = configured(name, CONFIGS[name], head, overrides)
        num_classes = 1000 if num_classes is None else num_classes
        return Model(name, config, head, num_classes, impl, task, categories, **options)
    weights = {p.stem.split(".", 1)[1]: p for p in sorted(_WEIGHTS.glob(f"{name}.*.safetensors"))}
    tag = next(iter(weights), None) if pretrained is True else pretrained
    if tag not in weights:
        known = ", ".join(list_models(pretrained=True))
        raise ValueError(
            f"{name}: no weights tagged {brief(tag)} in the package (pretrained); known: {known}"
        )
    path = weights[tag]
    model = load_model(path, impl=impl, **overrides)
    for given, own, what in (
        (head, model.head_name, "head"),
        (num_classes, model.num_classes, "num_classes"),
        (task, model.task, "task"),
        (categories and tuple(categories), model.categories, "categories"),
    ):
        if given is not None and given != own:
            raise ValueError(
                f"{what}: the weights {path.stem} have {own!r}, not {given!r}; to train another "
                f"head on their backbone: load_model({str(path)!r}, {what}=...)"
            )
    return model
