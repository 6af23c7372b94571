"""What models look at, pictures or point clouds, as `segment` and `focus` need it.

`inputs_of` is the one place that asks which of them a model takes.
"""

from __future__ import annotations

import abc
import argparse
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pointformer.cli.common import (
    CLOUD_MODEL,
    DEFAULT_MODEL,
    find_files,
    model_from,
    printable,
    reading_from,
)
from pointformer.cli.results import Found
from pointformer.data.discovery import CLOUD_SUFFIXES, PICTURE_SUFFIXES, has_picture_name

if TYPE_CHECKING:
    from PIL import Image

    from pointformer.data import Reading
    from pointformer.models import Model
    from pointformer.rates import TimeBudget

_SUMMARY = "summary.json"
_ALL = PICTURE_SUFFIXES | CLOUD_SUFFIXES


class Inputs(abc.ABC):
    """The files that a model looks at.

    Attributes:
        noun: what one is, for messages.
        key: what summaries and progress bars call one.
        suffixes: of those in folders.
        endings: what the names of results leave out.
        budget: time for each, once `prepare` has been called, if there is one.
        only: options of the commands that are for this kind alone, with their defaults.
        summary: the kind of result that lists the others.
    """

    noun: ClassVar[str]
    key: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    endings: ClassVar[frozenset[str]]
    only: ClassVar[Mapping[str, object]]
    summary = _SUMMARY
    budget: TimeBudget | None = None

    def __init__(self, model: Model, options: argparse.Namespace) -> None:
        self.model, self.options = model, options
        for other in _KINDS:
            for name, default in other.only.items():
                value = getattr(options, name, default)
                if name not in self.only and value != default:
                    raise ValueError(
                        f"--{name.replace('_', '-')}: is for models of {other.noun}s, {model.name} "
                        f"takes {self.noun}s"
                    )

    def find(self, arguments: Sequence[str]) -> tuple[list[Path], list[str], int]:
        """See `find_files`; files of another kind are named, with the remedy."""
        paths, problems, own = find_files(arguments, self.noun, self.suffixes)
        for other in _KINDS:
            if not isinstance(self, other):
                named = [path for path in paths if self._is_of(other, path)]
                paths = [path for path in paths if path not in named]
                problems += [self._refused(path, other) for path in named]
                problems = [self._explained(problem, arguments, other) for problem in problems]
        return paths, problems, own

    def check(self, path: Path) -> None:
        """Raise an error that says what to do with a file of another kind."""
        for other in _KINDS:
            if not isinstance(self, other) and self._is_of(other, path):
                raise ValueError(self._refused(path, other))

    def _is_of(self, other: type[Inputs], path: Path) -> bool:
        """Whether a file's name says that it is of another kind."""
        return has_picture_name(path, other.suffixes - self.suffixes)

    def _refused(self, path: Path, other: type[Inputs]) -> str:
        return printable(
            f"{path}: is a {other.noun}, {self.model.name} takes {self.noun}s; choose another "
            "--model"
        )

    def _explained(self, problem: str, arguments: Sequence[str], other: type[Inputs]) -> str:
        """A folder in which there is nothing but files of another kind is not called empty."""
        for argument in arguments:
            if problem.startswith(f"{printable(argument)}: no {self.noun} found ("):
                count = len(find_files([argument], other.noun, other.suffixes)[0])
                if count:
                    return (
                        f"{printable(argument)}: no {self.noun} found but {count} {other.noun}"
                        f"{'s' * (count > 1)}, which {self.model.name} does not take; choose "
                        "another --model"
                    )
        return problem

    @cached_property
    def weights(self) -> str:
        """What tells the model's weights from others."""
        from pointformer.models.state import weights_digest

        return weights_digest(self.model)

    @abc.abstractmethod
    def prepare(self) -> None:
        """Check for `segment` what the user asks of the model."""

    def _allow_time(self) -> None:
        from pointformer.rates import TimeBudget

        if self.options.budget is not None:
            if self.options.rate is not None:
                raise ValueError("--rate, --budget: only one of them can be given")
            self.budget = TimeBudget(self.model, self.options.budget)

    @abc.abstractmethod
    def are_small(self, paths: Sequence[Path]) -> bool:
        """Whether each is so small that one thread is enough (or cannot be read)."""

    @abc.abstractmethod
    def kinds(self, path: Path) -> tuple[str, ...]:
        """The kinds of files that `segment` may write for one input, the summary last."""

    def unchecked(self) -> frozenset[str]:
        """Kinds that are seldom written, and so do not keep back the others beforehand."""
        return frozenset()

    @abc.abstractmethod
    def open(self, path: Path) -> Any:
        """An input, read ahead unless it is large."""

    @abc.abstractmethod
    def is_large(self, opened: Any) -> bool:
        """Whether memory is for one of its size at a time."""

    @abc.abstractmethod
    def segment(self, opened: Any, path: Path) -> Found:
        """Find what is in it."""

    @abc.abstractmethod
    def focus(self, path: Path) -> tuple[Image.Image, list[int]]:
        """A picture of the tokens that each merge kept, and their numbers."""


class Pictures(Inputs):
    noun, key = "picture", "image"
    suffixes = endings = PICTURE_SUFFIXES
    only: ClassVar[Mapping[str, object]] = {
        **dict.fromkeys(("tile", "overlap", "min_score", "diameter")),
        **dict.fromkeys(("channel", "plane", "project")),
        "intensities": "percentiles",
        "max_pixels": 2**30,
    }
    small = 2**22  # pixels
    _read_ahead = 2**26  # pixels: larger pictures are opened before their turn, but not read

    def _segmenting(self) -> dict[str, Any]:
        names = ("tile", "overlap", "min_score", "scale", "diameter")
        return {name: getattr(self.options, name) for name in names}

    @property
    def _reading(self) -> Reading:
        from pointformer.prediction import reading_of

        return reading_of(self.model, reading_from(self.options))

    def prepare(self) -> None:
        from pointformer.segmentation.segment import check_options

        given = self._segmenting()
        check_options(self.model, **given)
        if given["overlap"] is not None and given["tile"] is None:
            raise ValueError("--overlap: is of windows; say their side as well, with --tile")
        self._allow_time()

    def are_small(self, paths: Sequence[Path]) -> bool:
        from pointformer.data.images import image_size

        def is_small(path: Path) -> bool:
            try:
                return math.prod(image_size(path)) <= self.small
            except (OSError, ValueError):
                return True

        return getattr(self.options, "tile", None) is None and all(map(is_small, paths))

    def kinds(self, path: Path) -> tuple[str, ...]:
        from pointformer.cli.pictures import KINDS

        return (*KINDS, self.summary)

    def unchecked(self) -> frozenset[str]:
        from pointformer.cli.pictures import MANY

        return frozenset({MANY})

    def open(self, path: Path) -> Any:
        from pointformer.data.images import open_picture

        picture = open_picture(path, **self._reading)
        small = math.prod(picture.shape) <= self._read_ahead
        return picture.loaded() if small and self.options.tile is None else picture

    def is_large(self, opened: Any) -> bool:
        return bool(math.prod(opened.shape) > self.small)

    def segment(self, opened: Any, path: Path) -> Found:
        from pointformer.cli.pictures import found
        from pointformer.segmentation.segment import segment

        return found(segment(self.model, opened, budget=self.budget, **self._segmenting()))

    def focus(self, path: Path) -> tuple[Image.Image, list[int]]:
        import torch

        from pointformer.data import read_image
        from pointformer.prediction import to_tensor
        from pointformer.segmentation.drawing import focus_picture

        image = read_image(path, **self._reading)
        with torch.inference_mode():
            pixels = to_tensor(image).to(self.options.device)
            stages: Any = self.model.backbone(self.model.preprocess(pixels)[None])
        picture = focus_picture(image, stages, self.model.image_config.patch_stride)
        return picture, [stage.tokens.num_tokens for stage in stages]


class Clouds(Inputs):
    noun, key = "point cloud", "cloud"
    suffixes, endings = CLOUD_SUFFIXES, CLOUD_SUFFIXES | {".txt", ".csv"}
    only: ClassVar[Mapping[str, object]] = {"features": None}
    small = 2**20  # bytes of the file
    _large = 2**17  # points

    @property
    def _features(self) -> list[str] | None:
        given = self.options.features
        return (
            None if given is None else [name.strip() for name in given.split(",") if name.strip()]
        )

    def prepare(self) -> None:
        from pointformer.segmentation.clouds import check_model

        check_model(self.model)
        self._allow_time()

    def are_small(self, paths: Sequence[Path]) -> bool:
        def is_small(path: Path) -> bool:
            try:
                return path.stat().st_size <= self.small
            except OSError:
                return True

        return all(map(is_small, paths))

    def kinds(self, path: Path) -> tuple[str, ...]:
        from pointformer.cli.clouds import KINDS
        from pointformer.data.points import points_suffix

        return (f"points{points_suffix(path)}", *KINDS, self.summary)

    def open(self, path: Path) -> Any:
        from pointformer.segmentation.clouds import read_cloud

        scale = getattr(self.options, "scale", None)
        return read_cloud(path, self.model, self._features, 1.0 if scale is None else scale)

    def is_large(self, opened: Any) -> bool:
        return bool(opened.num_tokens > self._large)

    def segment(self, opened: Any, path: Path) -> Found:
        from tqdm import tqdm

        from pointformer.cli.clouds import found
        from pointformer.segmentation.clouds import segment_points

        # Of what takes long, where somebody sees it move.
        bar: Any = partial(tqdm, unit="region", leave=False, delay=2, disable=None)
        result = segment_points(self.model, opened, progress=bar, budget=self.budget)
        return found(result, path)

    def focus(self, path: Path) -> tuple[Image.Image, list[int]]:
        from pointformer.segmentation.cloud_drawing import focus_cloud
        from pointformer.segmentation.clouds import focus_points

        tokens = self.open(path)
        stages = focus_points(self.model, tokens)
        return focus_cloud(tokens, stages), [len(stage.rows) for stage in stages]


_KINDS: tuple[type[Inputs], ...] = (Pictures, Clouds)


def model_for(options: argparse.Namespace, arguments: Sequence[str | Path]) -> Model:
    """The model that is asked for, which is set in the options where it is not: by the names of
    the inputs."""
    if options.model is None:
        clouds = all(_holds_clouds(Path(argument)) for argument in arguments)
        options.model = CLOUD_MODEL if clouds else DEFAULT_MODEL
        for folder in () if clouds else (str(a) for a in arguments if os.path.isdir(a)):
            others, _, _ = find_files([folder], Clouds.noun, Clouds.suffixes)
            if others:
                count = f"{len(others)} {Clouds.noun}{'s' * (len(others) > 1)}"
                warnings.warn(
                    f"{folder}: {count} left out, beside pictures; --model {CLOUD_MODEL} takes "
                    "point clouds",
                    stacklevel=2,
                )
    return model_from(options)


def _holds_clouds(path: Path) -> bool:
    """Whether it is named like a cloud, or is a folder of nothing else that a model takes."""
    try:
        files = list(path.iterdir()) if path.is_dir() else [path]
    except OSError:  # said where files are looked for
        files = [path]
    only = [has_picture_name(p, CLOUD_SUFFIXES) for p in files if has_picture_name(p, _ALL)]
    return bool(only) and all(only)


def inputs_of(model: Model, options: argparse.Namespace) -> Inputs:
    """What a model takes, with the options of the command.

    Raises:
        ValueError: an option is for what it does not take.
    """
    return (Clouds if model.of_points else Pictures)(model, options)
