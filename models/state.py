"""State dicts: out of files and the containers of training code, and into models."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pointformer._checks import brief, describe
from pointformer.models.model import WRAPPERS, Model

T = TypeVar("T")


class CheckpointError(ValueError):
    """A file cannot be used as the checkpoint it was given as; the message names the file."""


_OWN_FIRST = ("patch_embed.conv1.weight", "patch_embed.linear.weight")  # of pictures, of points
# The name that every backbone's weights begin with: ours, the released.
_FIRST_WEIGHT = r"(?:backbone\.)?patch_embed\.(?:conv1|linear|proj1)\.weight"
_AVERAGES = {"ema", "averaged", "teacher", "swa"}  # words for averages of weights in containers
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NOT_WEIGHTS = {"n_averaged", "criterion.empty_weight"}  # of averaged models, and of a loss
WHOLE_HEAD = ("head.",)


def check_file(path: object) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a file, got {describe(path)}")
    if not os.path.isfile(path):
        reason = "expected a file, this is a folder" if os.path.isdir(path) else "no such file"
        name = os.fspath(path)
        raise CheckpointError(f"{name if len(name) <= 200 else brief(name)}: {reason}")


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether it is such a file, by its name or by its begin: the size of a header of JSON."""
    check_file(path)
    with open(path, "rb") as file:
        return os.fspath(path).endswith(".safetensors") or file.read(9)[8:] == b"{"


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata.

    Raises:
        CheckpointError: the file is unreadable or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return weights, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def unpickle(path: str | os.PathLike) -> Mapping:
    """Content of a file by `torch.save`, of kinds that cannot run code.

    Raises:
        CheckpointError: the file is unreadable, holds other kinds or no dict.
    """
    check_file(path)
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


def _random_state_globals() -> list[Callable | tuple[Callable, str]]:
    """Functions that pickled NumPy random states refer to, by the names of NumPy 1 and 2."""
    allowed: list[Callable | tuple[Callable, str]] = [
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


def without_wrappers(state: Mapping[str, T], source: object) -> dict[str, T]:
    """Entries by their names without the parts that wrappers add, and none that is no weight."""
    plain: dict[str, T] = {}
    for key, value in state.items():
        name = plain_name(key)
        if name in plain:
            raise CheckpointError(f"{source}: two entries are {name}, with and without a wrapper")
        if name not in _NOT_WEIGHTS:
            plain[name] = value
    return plain


def plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def state_of(
    container: Mapping, source: object, key: str | None = None, first: str = _FIRST_WEIGHT
) -> dict[str, Tensor]:
    """The weights of one model in a container, by names without wrappers' parts. Those of a
    backbone alone have the names that it has in a model.

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
        wanted = plain_name(key)
        matching = [n for n in names if n == wanted]
        matching = matching or [n for n in names if f".{wanted}." in f".{n}."]
        if len(matching) != 1:
            raise CheckpointError(
                f"{source}: key {brief(key)} fits {len(matching)} of the weights in it: {names}"
            )
        return _in_a_model(found[matching[0]])
    plain = [n for n in names if not _AVERAGES & {word.lower() for word in _WORD.findall(n)}]
    name = (plain or names)[0]
    if len(names) > 1:
        _warn(f"{source}: took {name!r} of the weights in it, {names}; key chooses others")
    return _in_a_model(found[name])


def _in_a_model(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if any(name in weights for name in _OWN_FIRST):
        return {f"backbone.{name}": value for name, value in weights.items()}
    return weights


def _weights_in(
    container: Mapping, source: object, first: str | None, depth: int = 2
) -> dict[str, dict[str, Tensor]]:
    """Each model's weights, by where they are: a path with dots, "" for the container itself."""
    tensors = without_wrappers(
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
        ".".join(part for part in (plain_name(name), below) if part): weights
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
        new_head: whether weights of the head may be left out; a warning says what is kept.

    Raises:
        CheckpointError: naming `source`, how many entries differ and the first of them.
    """
    first = plain_name(next(iter(model.state_dict()))).removeprefix("backbone.")
    weights = state_of(state, source, key, rf"(?:backbone\.)?{re.escape(first)}")
    copy_weights(model, weights, source, fresh=() if new_head else None)


def weights_digest(model: Model) -> str:
    """SHA-256 of all weights and buffers and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def copy_weights(
    model: Model,
    weights: Mapping[str, Tensor],
    source: object,
    *,
    fresh: tuple[str, ...] | None = None,
) -> None:
    """Copy weights by their plain names: all, or all of the backbone and what fits of the head.

    Args:
        fresh: `None`: all must fit. Otherwise the head's need not, and those whose names begin so
            keep their initial values even if others fit, as what gave the scores of other classes,
            or deep stages of the backbone.

    Raises:
        CheckpointError: see `load_state`.
    """
    state = model.state_dict()
    own = {plain_name(name): value for name, value in state.items()}
    left = [n for n in weights if n.startswith(fresh or ())]
    missing = sorted(n for n in own if n not in weights or n in left)
    unknown = sorted(n for n in weights if n not in own)
    misfits = [n for n in own if n not in missing and own[n].shape != weights[n].shape]
    initial: list[str] = []
    if fresh is not None:
        initial = [n for n in (*missing, *misfits) if n.startswith(("head.", *fresh))]
        left += [n for n in (*unknown, *misfits) if not n.startswith("backbone.")]
    missing, unknown, misfits = (
        [n for n in names if n not in initial and n not in left]
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
            f"{len(misfits)} have another shape (first: {name} is {tuple(weights[name].shape)}, "
            f"expected {tuple(own[name].shape)})"
        )
    if problems:
        raise CheckpointError(f"{source}: not a checkpoint of {model.name}: {'; '.join(problems)}")
    taken = {name: weights[plain_name(name)] for name in state if plain_name(name) not in initial}
    broken = [n for n, value in taken.items() if not value.to(state[n].dtype).isfinite().all()]
    if broken:  # which finds nothing, without a word
        raise CheckpointError(
            f"{source}: holds NaN or infinity in {len(broken)} of its weights (first: "
            f"{broken[0]}): the training that wrote it went wrong"
        )
    model.load_state_dict(taken, strict=not initial)
    if initial or left:
        parts = []
        for part, start in (("backbone", "backbone."), ("head", "head.")):
            whole, few = (sum(n.startswith(start) for n in names) for names in (own, initial))
            some = few > 0 or part == "head"
            parts.append(
                f"{whole - few} of {whole} weights of the {part}" if some else f"the {part}"
            )
        kept = " and ".join(parts)
        _warn(
            f"{source}: kept: {kept}; fresh in {model.name}: {_some(initial)}; left out of the "
            f"file: {_some(dict.fromkeys(left))}"
        )


def _warn(message: str) -> None:
    """Warn where the user called this package, whatever was called in between."""
    frame, depth = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith("pointformer."):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth + 1)


def _some(names: Collection[str]) -> str:
    """Number of the keys, and the first of them."""
    names = list(names)
    return f"{len(names)} ({', '.join([*names[:3], '...'][: len(names)])})" if names else "none"
