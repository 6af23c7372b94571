"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import sys
import traceback
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pointformer.cli.results import is_result
from pointformer.data.discovery import (
    PICTURE_SUFFIXES,
    has_picture_name,
    unread_format,
    without_suffix,
)

if TYPE_CHECKING:
    from pointformer.data.images import Reading
    from pointformer.models import Model
    from pointformer.processes import Processes

_MOST_THREADS = 1024  # of some thousands starting takes seconds, of more the process dies
DEFAULT_MODEL, CLOUD_MODEL = "aff_nano.nuclei", "point_nano.lidar"

FORMATS = (
    "folder",
    "classes",
    "ade20k",
    "cityscapes",
    "coco",
    "coco-panoptic",
    "shards",
    "objects",
    "scenes",
    "arrays",
)
"""Of data sets, by name: those of `pointformer.data.FORMATS`, which takes a second to import."""


def add_model_arguments(parser: argparse.ArgumentParser, by_inputs: bool = False) -> None:
    """`by_inputs`: the default is `None`, for `inputs.model_for` to choose."""
    default = f"{DEFAULT_MODEL}{f', for point clouds {CLOUD_MODEL}' * by_inputs}"
    parser.add_argument(
        "--model",
        default=None if by_inputs else DEFAULT_MODEL,
        help=f"NAME.TAG of weights in the package, or a .safetensors file (default: {default})",
    )
    parser.add_argument(
        "--rate",
        type=_rates,
        help="share of tokens kept by each merge, in (0, 1]; with commas, one for each. Models "
        "that reserve a grid keep that at least, as aff_nano.nuclei one token in 16",
    )
    parser.add_argument("--alpha", type=float, help="weight of the learned score, 0 = uniform grid")
    parser.add_argument("--device", default="cpu", help="for example cuda (default: cpu)")
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads (default: all cores, but one for one small picture)",
    )


def _rates(text: str) -> float | tuple[float, ...]:
    """A number, or several with commas between."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between, got {text!r}"
        ) from None
    return numbers if len(numbers) > 1 else numbers[0]


def add_task_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """`--task`, whose name is checked when the command runs, as that loads the models."""
    parser.add_argument(
        "--task",
        help="semantic, instance, panoptic, classification, point_segmentation or "
        f"point_classification (default: {default})",
    )


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that this program did not write, or that were changed since; its own "
        "earlier results are replaced anyway, and what it reads never is",
    )


@contextlib.contextmanager
def joined_processes(options: argparse.Namespace) -> Iterator[Processes]:
    """All that `torchrun` started for this command, each with a device of its own in `options`;
    they may be done long after each other, and say what is wrong at once."""
    from pointformer.processes import Processes, started_processes

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    complain_now = partial(complain, debug=options.debug)
    with started_processes(options.device, 7 * 24 * 60, complain_now) as processes:
        options.device = str(processes.device)
        yield processes


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of how pictures are read: see `reading_from`."""
    group = parser.add_argument_group("what of a picture is read")
    group.add_argument(
        "--channel",
        help="number from 0 or name; three, as 0,2,1, are red, green and blue (default: as in the "
        "model's training, or the colors of a color picture or the only channel; of several "
        "channels one must be chosen)",
    )
    group.add_argument(
        "--plane",
        help="number from 0 over all planes, pages or frames, or by axes, as z=3,t=0 (default: as "
        "in the model's training, or the only one; of several, --plane or --project must choose)",
    )
    group.add_argument(
        "--project",
        choices=("max", "mean"),
        help="of all planes, or of those that --plane leaves (default: as in the model's training, "
        "unless --plane is given)",
    )
    group.add_argument(
        "--intensities",
        choices=("percentiles", "full"),
        default="percentiles",
        help="of more than 8 bits: fitted to robust percentiles of the picture, or the full range "
        "of integers and 0 to 1 of floats (default: %(default)s)",
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        default=2**30,
        help="height times width of the largest picture to read (default: %(default)s)",
    )


def add_feature_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        metavar="NAME,...",
        help="what of each point a model of point clouds sees beside its place, as columns of the "
        "files, in the order of its training (default: as the model's file says)",
    )


def reading_from(options: argparse.Namespace) -> Reading:
    return {
        "channel": options.channel,
        "plane": options.plane,
        "project": options.project,
        "intensities": options.intensities,
        "max_pixels": options.max_pixels,
    }


def use_threads(threads: int | None) -> None:
    """What `--threads` asks for; `None` leaves the number as it is.

    Raises:
        ValueError: there cannot be so many.
    """
    import torch

    if threads is None:
        return
    if not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"--threads: expected 1 to {_MOST_THREADS}, got {threads}")
    torch.set_num_threads(threads)


def model_from(options: argparse.Namespace, *, pretrained: bool = True, **changes: object) -> Model:
    """The model that `--model`, `--rate` and `--alpha` ask for, in eval mode, on its device.

    `pretrained` and `changes` are those of `create_model`. Sets the number of threads too.
    """
    from pointformer.models import create_model

    use_threads(options.threads)
    overrides = {
        name: getattr(options, name)
        for name in ("rate", "alpha")
        if getattr(options, name) is not None
    }
    model = create_model(options.model, pretrained, **changes, **overrides).eval()  # type: ignore[arg-type]
    return placed(model, options.device)


def placed(model: Model, device: str) -> Model:
    """The model on a device.

    Raises:
        ValueError: there is no such device.
    """
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {device} cannot be used: {reason}") from None


def find_files(
    arguments: Sequence[str], noun: str, suffixes: frozenset[str]
) -> tuple[list[Path], list[str], int]:
    """Files named by themselves, by folders (what is in them, not deeper) and by glob patterns.

    Args:
        noun: what they are, for messages.
        suffixes: of what is meant in folders and by patterns.

    Returns:
        Paths in the order of the arguments, each file once; what is wrong with arguments that
        give none and with what is no file; and how many files were left out because they are
        results of earlier runs.
    """
    found: dict[tuple[str, str], Path] = {}
    own: set[tuple[str, str]] = set()
    problems: list[str] = []
    for argument in arguments:
        try:
            paths = _files_of(argument, noun, suffixes)
        except (OSError, ValueError) as error:
            problems.append(reason(error, argument))
            continue
        for path in paths:
            key = os.path.realpath(path.parent), path.name
            try:
                check_file(path, noun)
            except (OSError, ValueError) as error:
                problems.append(reason(error, path))
                continue
            if is_result(path):
                own.add(key)
            else:
                found.setdefault(key, path)
    if own and not found and not problems:
        problems = [f"{printable(arguments[0])}: no {noun} found but results of earlier runs"]
    return list(found.values()), problems, len(own)


def _files_of(argument: str, noun: str, suffixes: frozenset[str]) -> list[Path]:
    path = Path(argument)
    if argument and path.is_dir():
        # Links that lead nowhere too: they are not passed over in silence.
        there = sorted(p for p in path.iterdir() if not p.is_dir())
    elif argument and os.path.lexists(path):
        return [path]
    else:
        there = [p for p in map(Path, sorted(glob.glob(argument, recursive=True))) if p.is_file()]
    found = [path for path in there if has_picture_name(path, suffixes)]
    if not found:
        unread = next(filter(None, map(unread_format, (path, *there))), "")
        reason = unread or "a file, a folder or a pattern"
        raise ValueError(f"{argument or repr('')}: no {noun} found ({reason})")
    return found


def check_file(path: Path, noun: str) -> None:
    """Raise an error that names a path which is no file: to read a pipe could take forever.

    Raises:
        ValueError: it is missing, a folder, a pipe, a device or a link that leads nowhere.
    """
    if path.is_file():
        return
    kind = "this is a pipe or a device"
    if path.is_dir():
        kind = "this is a folder"
    elif not path.exists():
        kind = "this link leads nowhere" if path.is_symlink() else "there is no such file"
    raise ValueError(f"{path}: expected a {noun}, but {kind}")


def result_names(paths: Sequence[Path], suffixes: frozenset[str] = PICTURE_SUFFIXES) -> list[str]:
    """Name of the results of each file, of those that have these suffixes, in the output folder,
    all different.

    "c" for a/c.png. Beside an a/c.jpg both keep their suffix: "c.png". If files in several
    folders have one name, all keep their folders, from the deepest one on that has them all:
    "a/c". Names that differ only in case count as one, since some file systems take them so.
    """
    folders = [os.path.abspath(path.parent) for path in paths]
    names = stems = [without_suffix(path.name, suffixes) for path in paths]
    while True:
        counts = Counter(zip(folders, map(_caseless, names), strict=True))
        longer = [
            path.name if counts[folder, _caseless(name)] > 1 else name
            for path, folder, name in zip(paths, folders, names, strict=True)
        ]
        if longer == names:
            break
        names = longer
    if _in_several(folders, stems) or _in_several(folders, names):
        common = os.path.commonpath(folders)
        names = [
            Path(os.path.relpath(folder, common), name).as_posix()
            for folder, name in zip(folders, names, strict=True)
        ]
    return names


def _in_several(folders: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a name is in more than one folder."""
    places = set(zip(folders, map(_caseless, names), strict=True))
    return len({name for _, name in places}) < len(places)


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def reason(error: BaseException, about: object = "") -> str:
    """One line that says what went wrong and names the file that it is `about`.

    Of errors that nobody foresaw, it names the type and how to see more.
    """
    text = str(error) or type(error).__name__
    if is_out_of_memory(error):
        text = "out of memory: use smaller inputs, of pictures --tile"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    elif not isinstance(error, (ValueError, TypeError, OSError, ImportError, FloatingPointError)):
        first = next(iter(str(error).splitlines()), "")
        text = f"unexpected {type(error).__name__}: {first} (see --debug)"
    name = printable(str(about))
    text = text.replace(str(about), name) if name else text
    text = printable(" ".join(line.strip() for line in text.splitlines()))
    return text if name in text else f"{name}: {text}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy or torch says that there is no memory left, on any device.

    On a CPU torch raises a plain RuntimeError.
    """
    signs = ("out of memory", "allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)
    )


def printable(text: str) -> str:
    """The text in one line: control characters, which names of files may have, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def complain(error: BaseException, about: object = "", *, debug: bool = False) -> None:
    """Print an error as one line, and with `debug` where it comes from."""
    if debug:
        traceback.print_exception(error)
    say(f"pointformer: error: {reason(error, about)}", error=True)


def say(text: str, *, error: bool = False) -> None:
    """Print a line beside progress bars, whether or not anybody still reads it."""
    from tqdm import tqdm

    stream = sys.stderr if error else sys.stdout
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except BrokenPipeError:
        abandon(stream)


def abandon(stream: TextIO) -> None:
    """Let what is still written to a stream vanish: its reader is gone."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
