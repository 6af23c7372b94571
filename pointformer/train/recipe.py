"""Recipes of training runs: typed, in YAML, each field changeable as `field=value`."""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pointformer._checks import brief
from pointformer.data.images import Reading
from pointformer.data.point_transforms import (
    RandomDrop,
    RandomJitter,
    RandomMirror,
    RandomRegion,
    RandomRotation,
    RandomScale,
)
from pointformer.data.transforms import (
    CenterCrop,
    Chain,
    ColorJitter,
    Mix,
    RandAugment,
    RandomCrop,
    RandomCurves,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    RandomTurn,
    Resize,
)
from pointformer.models.config import AFFConfig, PointConfig, SwinConfig
from pointformer.models.heads import HEADS, TASK_NAMES, options_of
from pointformer.rates import Rates
from pointformer.tasks import TASKS
from pointformer.train.optimization import Budget, Optimizer, Schedule

TaskName = Literal[TASK_NAMES]  # type: ignore[valid-type]
RECIPES = Path(__file__).parent / "recipes"
"""Of the package: files that `read_recipe` finds by their names."""


@dataclass(frozen=True)
class Data:
    """Which pictures.

    Attributes:
        path: folder or file, see `pointformer.data.open_dataset`.
        format: of the data set; `None`: what it looks like.
        categories: names of the classes where the data set does not have them.
        void: labels that mean void; `None`: as the format has it.
        train, val: names of the splits; `None`: as the format calls them.
        val_share: of the training pictures that are kept for validation where there is no split.
        draw: "evenly", or "by_objects": crowded pictures more often, by the root of the number of
            their objects.
        skip_bad: leave out what cannot be read.
        channel, plane, project: of pictures, see `pointformer.data.Reading`. Files are then read so
            by the trained model too, unless it is told otherwise.
        features: of points, by their names in the files, see `pointformer.data.point_sets`.
    """

    path: str | None = None
    format: str | None = None
    categories: tuple[str, ...] | None = None
    void: tuple[int, ...] | None = None
    train: str | None = None
    val: str | None = None
    val_share: float = 0.1
    draw: Literal["evenly", "by_objects"] = "evenly"
    skip_bad: bool = False
    channel: int | str | None = None
    plane: int | str | None = None
    project: Literal["max", "mean"] | None = None
    features: tuple[str, ...] = ()

    @property
    def reading(self) -> Reading:
        """How pictures are read."""
        return {"channel": self.channel, "plane": self.plane, "project": self.project}


@dataclass(frozen=True)
class PointAugmentation:
    """Random changes of point sets, in this order; `None`: not so. See the classes.

    Attributes:
        region, drop: parts of the points.
        mirror, rotate, scale, jitter: of their positions.
    """

    region: RandomRegion | None = None
    drop: RandomDrop | None = None
    mirror: RandomMirror | None = None
    rotate: RandomRotation | None = None
    scale: RandomScale | None = None
    jitter: RandomJitter | None = None


@dataclass(frozen=True)
class Augmentation:
    """Random changes of pictures, in this order; `None`: not so. See the classes.

    Attributes:
        resized_crop, crop: windows of one size.
        flip, turn: mirror images, quarter turns.
        jitter, curves, rand_augment: of colors and brightness, of these in microscopy, and for
            classes of pictures.
        erase: a rectangle.
        mix: of pictures of a batch, for classes of pictures.
        points: what is done with points, in the place of all others.
    """

    resized_crop: RandomResizedCrop | None = None
    crop: RandomCrop | None = None
    flip: RandomFlip | None = None
    turn: RandomTurn | None = None
    jitter: ColorJitter | None = None
    curves: RandomCurves | None = None
    rand_augment: RandAugment | None = None
    erase: RandomErasing | None = None
    mix: Mix | None = None
    points: PointAugmentation = field(default_factory=PointAugmentation)

    def transform(self, of_points: bool = False) -> Chain:
        """All that is done with a picture, or with a point set."""
        if of_points:
            changes = [getattr(self.points, f.name) for f in fields(self.points)]
        else:
            names = (f.name for f in fields(self) if f.name not in ("mix", "points"))
            changes = [getattr(self, name) for name in names]
        return Chain([change for change in changes if change is not None])


@dataclass(frozen=True)
class Checkpoints:
    """Times at which the run is saved: whatever comes first.

    Attributes:
        minutes: of training in between.
        steps: in between; `None`: only the minutes count.
        keep: how many of the newest are kept.
    """

    minutes: float = 5.0
    steps: int | None = None
    keep: int = 3

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"checkpoints.keep: expected at least 1, got {self.keep}")
        if not self.minutes > 0:
            raise ValueError(f"checkpoints.minutes: expected more than 0, got {self.minutes}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"checkpoints.steps: expected at least 1, got {self.steps}")


@dataclass(frozen=True)
class Validation:
    """Scores of the model on the way; at the end they are of all pictures of the split.

    Attributes:
        times: how often on the way, at equal shares of the budget.
        pictures: how many are scored then, the same ones each time.
        token_maps: of how many it is drawn where the model puts its tokens, for the report.
        resize, crop: what the model sees of a picture, see `pointformer.evaluation.evaluate`.
        tile: side of the windows in pixels; `None`: whole pictures, and for heads with queries,
            which know their place in a window, that of the crops.
    """

    times: int = 4
    pictures: int = 16
    token_maps: int = 2
    resize: Resize | None = None
    crop: CenterCrop | None = None
    tile: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("times", 0), ("pictures", 1), ("token_maps", 0), ("tile", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"validation.{name}: expected at least {least}, got {value}")


_MOST = 2**20  # pictures per step
_FILES = {"data.path", "init"}  # fields with names of files, which may look like anything
_UNIONS = (Union, UnionType)  # the first of what typing has, such as Literal["max"] | None
_FREE = {"free": True}  # of fields that may change between two parts of a run


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run.

    Attributes:
        task: what is learned, by its name in `pointformer.tasks`.
        model: name, as of `create_model`; `None`: that of `init`, or else aff_tiny, and for points
            point_nano.
        init: NAME.TAG or a file whose weights to start from: of `save_model`, such as that of
            another run, or a released checkpoint of `model`. `None`: random ones.
        init_stages: how many stages of its backbone to take, and nothing of its head; `None`: all,
            and of the head what fits. The deep stages of a model with a dense head, which hardly
            needs them, can be worse than random ones.
        head: as of `create_model`; `None`: the simplest that can learn the task.
        options: of the backbone and the head, as `create_model` takes them.
        loss: options of the task's loss, see its class in `pointformer.tasks`.
        score_weight: of `pointformer.tasks.scores.score_loss` beside the task's loss: the scores by
            which merges keep and weight tokens learn where the annotation has outlines. 0: they
            learn from the task's loss only, through what they weight.
        rates: from which a step draws the share of the tokens that merges keep, for a model that
            can be used at each of them; it is scored at that of `options.rate`. `None`: always at
            that.
        batch: pictures per step, over all processes.
        accumulate: in how many parts a batch is worked through, for less memory.
        precision: of the network's layers where they can do with less; weights stay float32.
        average: decay per step of the weights' moving average, which is what is scored and saved;
            0: the weights themselves.
        gradient_checkpointing: keep less for the backward pass and compute it again.
        freeze_batch_norm: use the statistics of BatchNorm that the model starts with; otherwise
            they are those of the part of a batch that a process works on at a time.
        strategy: of several processes. "ddp": each has the whole model; "fsdp": each a part of its
            weights, their gradients and the optimizer's state, whole only within a step; for models
            that are large for their GPUs.
        workers: processes that read and augment pictures; they do not change the result.
        log_every: steps per line of the log.
    """

    task: TaskName = "semantic"
    model: str | None = None
    init: str | None = None
    init_stages: int | None = None
    head: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    budget: Budget = field(default_factory=Budget, metadata=_FREE)
    score_weight: float = 0.0
    rates: Rates | None = None
    batch: int = 8
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    average: float = 0.0
    gradient_checkpointing: bool = False
    freeze_batch_norm: bool = False
    strategy: Literal["ddp", "fsdp"] = field(default="ddp", metadata=_FREE)
    seed: int = 0
    workers: int = field(default=0, metadata=_FREE)
    checkpoints: Checkpoints = field(default_factory=Checkpoints, metadata=_FREE)
    validation: Validation = field(default_factory=Validation, metadata=_FREE)
    log_every: int = field(default=20, metadata=_FREE)

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch > _MOST:
            raise ValueError(f"batch: expected at most {_MOST} pictures, got {self.batch}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of the batch, {self.batch}, got {self.accumulate}"
            )
        if self.init_stages is not None and self.init is None:
            raise ValueError(
                f"init_stages: expected none without init, whose stages these are, got "
                f"{self.init_stages}"
            )
        counts = [task.counts for task in TASKS if task.name == self.task]
        if self.augmentation.mix is not None and "pictures" not in counts:
            raise ValueError(
                f"augmentation.mix: only for classes of whole pictures, not for {self.task!r}"
            )
        if not 0 <= self.score_weight < math.inf:
            raise ValueError(
                f"score_weight: expected a number of at least 0, got {self.score_weight}"
            )
        if self.score_weight and {"pixels", "objects"}.isdisjoint(counts):
            raise ValueError(f"score_weight: no outlines are annotated for {self.task!r}")
        if {"points", "sets"} & set(counts):
            for name in ("resize", "crop", "tile"):
                if getattr(self.validation, name) is not None:
                    raise ValueError(f"validation.{name}: is for pictures, not for {self.task!r}")
            for name, value in self.data.reading.items():
                if value is not None:
                    raise ValueError(f"data.{name}: is for pictures, not for {self.task!r}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average: expected a decay in [0, 1), got {self.average}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected a number from 0 to 2^32 - 1, got {self.seed}")

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields that decide the result and differ in `other`, a recipe's `asdict`, in words."""
        fixed = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata.get("free")}
        own = _flat({name: asdict(self)[name] for name in fixed})
        others = _flat({name: other.get(name) for name in fixed})
        for name in ("data.path", "data.skip_bad"):  # what is in it counts, not where it lies
            own.pop(name, None), others.pop(name, None)

        def value(values: dict[str, Any], name: str) -> Any:
            """`None` of an option is not its default; of a field that a recipe lacks it is."""
            if name in ("options", "loss"):  # there are none in one of the two
                return values.get(name, {})
            free = name.startswith(("options.", "loss."))
            return values.get(name, _NOT_GIVEN if free else None)

        return [
            f"{name} {before!r}, now {now!r}"
            for name in dict.fromkeys((*own, *others))
            if _plain(now := value(own, name)) != _plain(before := value(others, name))
        ]


class _NotGiven:
    def __repr__(self) -> str:
        return "not given"


_NOT_GIVEN = _NotGiven()


def _flat(values: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{start}{name}.")
        else:
            flat[start + name] = value
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class _Text(str):
    """The value of a change, as it was given: YAML, or plain text where a field takes text."""


def _loaded(text: str) -> Any:
    """The value of a YAML text, in which 1e-3 is a number, as since version 1.2.

    Raises:
        ValueError: the text is no YAML; the message says where.
    """
    try:
        import yaml
    except ImportError:
        raise ImportError("training needs PyYAML: pip install 'pointformer[train]'") from None

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in names:
                    problem = f"{key.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                names.add(key.value)
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise ValueError(f"expected YAML, but{line} {problem}") from None


def read_recipe(
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    **values: Any,
) -> Recipe:
    """The recipe in a file, with changes.

    Args:
        file: YAML; a name without a folder may be one of `RECIPES`. `None`: that of the task there,
            for pictures of one's own.
        overrides: "field=value", as "optimizer.learning_rate=1e-3", values in YAML.
        values: fields of the recipe, before `overrides`; `None` for those of the file.

    Raises:
        ValueError: naming the file or the field, if a field is unknown or its value does not fit.
        ImportError: packages of the extra [train] are missing.
    """
    if values.get("task") is not None:
        _checked(TaskName, values["task"], "task")
    file = f"{values.get('task') or Recipe.task}.yaml" if file is None else file
    try:
        content = _loaded(find_recipe(file).read_text("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{file}: expected a recipe, but it is no text") from None
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(file)) else f"{file}: {text}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected the fields of a recipe, got {brief(content)}")
    changed = {**content, **{name: value for name, value in values.items() if value is not None}}
    for text in overrides:
        match = re.fullmatch(r"(\w+(?:\.\w+)*)=(.*)", text, re.DOTALL)
        if match is None:
            raise ValueError(
                f"{brief(text)}: expected field=value, as optimizer.learning_rate=1e-3"
            )
        *outer, last = match[1].split(".")
        place = changed
        for name in outer:
            inside = place.get(name)
            inside = _read(inside, name) if isinstance(inside, _Text) else inside
            place[name] = place = dict(inside) if isinstance(inside, Mapping) else {}
        place[last] = _Text(match[2])
    try:
        return _made(Recipe, changed)
    except ValueError as error:
        try:
            _made(Recipe, content)
        except ValueError as own:
            if str(own) == str(error):
                raise ValueError(f"{file}: {error}") from None
        raise


def _made(kind: Any, value: Any, path: str = "") -> Any:
    """Value of a field of this type, out of YAML.

    Raises:
        ValueError: in one line with the field's path, what is expected and what was given.
    """
    kinds = get_args(kind) if get_origin(kind) in _UNIONS else (kind,)
    listed = path not in _FILES and str(value).startswith(("[", "{"))
    if isinstance(value, _Text) and (str not in kinds or value == "null" or listed):
        value = _read(value, path)
    group: Any = next((k for k in kinds if is_dataclass(k)), None)
    if group is None:
        return _checked(kind, value, path)
    if value is None and NoneType in kinds:
        return None
    hints = get_type_hints(group)
    known = [each.name for each in fields(group)]
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: expected its fields, {_some(known)}, got {brief(value)}")
    parts = {}
    for name, part in value.items():
        where = f"{path}.{name}" if path else str(name)
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {_some(known)}"
            raise ValueError(f"{where[:100]}: no such field; {hint}")
        parts[name] = _made(hints[name], part, where)
    for each in fields(group):
        needed = each.default is MISSING and each.default_factory is MISSING
        if needed and each.name not in parts:
            raise ValueError(f"{path}.{each.name}: expected {_words(hints[each.name])}, got none")
    try:
        return group(**parts)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(path) else f"{path}.{text}") from None


def _read(value: _Text, path: str) -> Any:
    try:
        return _loaded(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _checked(kind: Any, value: Any, path: str) -> Any:
    """A value that is no group of fields, converted to its type."""
    parser = _parser()
    parser.add_argument("--value", type=kind)
    try:
        if value is None and NoneType not in get_args(kind):  # which it would take as not given
            raise ValueError
        if value == "":  # as what is not given
            raise ValueError
        return parser.parse_object({"value": _plain_text(value)}).value
    except (argparse.ArgumentError, TypeError, ValueError):
        raise ValueError(f"{path}: expected {_words(kind)}, got {brief(value)}") from None


def _plain_text(value: Any) -> Any:
    """Changes within a value that has names of its own, read."""
    if isinstance(value, Mapping):
        return {
            key: _loaded(part) if isinstance(part, _Text) else _plain_text(part)
            for key, part in value.items()
        }
    return str(value) if isinstance(value, _Text) else value


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names)
    return listed if len(listed) < 120 else f"{', '.join(names[:5])}, ... (train --fields)"


def _words(kind: Any) -> str:
    """Description of the values that a type takes, for errors."""
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false",
             NoneType: "null"}  # fmt: skip
    if kind in plain:
        return plain[kind]
    arguments = get_args(kind)
    if get_origin(kind) in _UNIONS:
        return " or ".join(map(_words, arguments))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(arguments)}"
    if get_origin(kind) is tuple:
        many = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        each = {int: "whole numbers", float: "numbers", str: "texts"}[arguments[0]]
        return f"a list of {many}{each}"
    return "names and their values"


def describe_fields() -> str:
    """All fields of recipes, what they are and their defaults, as text."""
    parser = _parser()
    parser.add_class_arguments(Recipe)
    # Without what is of the parser: files and help of groups, with the lines that explain them.
    foreign = r"(?m)^  --[\w.]+( CONFIG|\.help)\b.*\n( {8,}.*\n)*"
    text = re.sub(r"(?m)^  --", "    ", re.sub(foreign, "", parser.format_help())).rstrip()
    parts = [_line(name, _defaults(part)) for name, part in _parts(Recipe)]
    backbones = {"aff": AFFConfig, "swin": SwinConfig, "point": PointConfig}
    options = [_line(f"of {name}_*", _defaults(kind)) for name, kind in backbones.items()]
    options += [_line(f"of the head {head}", own) for head in HEADS if (own := options_of(head))]
    lines = [text, "", "Of what is not there unless it is given:", *parts, ""]
    lines += ["What options may say, see the classes and heads in `pointformer.models`:", *options]
    return "\n".join(lines)


def _parts(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and classes of the fields that may be `None` and have fields of their own."""
    for name, hint in get_type_hints(kind).items():
        optional = [part for part in get_args(hint) if is_dataclass(part)]
        if is_dataclass(hint):
            yield from _parts(hint, f"{prefix}{name}.")
        for part in optional:
            yield f"{prefix}{name}", part


def _defaults(kind: Any) -> dict[str, object]:
    return {part.name: part.default for part in fields(kind)}


def _line(title: str, defaults: Mapping[str, object]) -> str:
    words = [name if d is MISSING else f"{name}={d}" for name, d in defaults.items()]
    first, others = "    ", " " * 24
    text = f"{title}: {', '.join(words)}" if words else title
    return textwrap.fill(
        text, 79, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
    )


def _parser() -> Any:
    """A parser of jsonargparse, which checks types."""
    try:
        import jsonargparse
    except ImportError:
        raise ImportError("training needs jsonargparse: pip install 'pointformer[train]'") from None
    return jsonargparse.ArgumentParser(
        usage=argparse.SUPPRESS, add_help=False, print_config=None, exit_on_error=False
    )


def find_recipe(file: str | Path) -> Path:
    """The file, or that of the package with this name.

    Raises:
        ValueError: there is neither.
    """
    path = Path(file)
    if path.is_file():
        return path
    packaged = RECIPES / path.name
    if path.name == str(file) and packaged.is_file():
        return packaged
    known = ", ".join(sorted(recipe.name for recipe in RECIPES.glob("*.yaml")))
    raise ValueError(f"{file}: no such file, nor a recipe of the package: {known}")


def write_recipe(recipe: Recipe) -> str:
    """YAML of a recipe, which `read_recipe` reads."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, tuple | list) else value

    return yaml.safe_dump(plain(asdict(recipe)), sort_keys=False, allow_unicode=True)
