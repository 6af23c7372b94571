"""Argument checks with errors that name the argument, what was given and what was expected."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_LARGEST = 2.0**62  # squared distances of larger positions may overflow
_CERTAINLY = 16  # sizes as many as tokens are no sizes from here on

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxtuple, _repr.maxlist, _repr.maxstring, _repr.maxother = 3, 8, 8, 60, 60


def brief(value: object) -> str:
    """`value` in at most a line, however long: for error messages and `repr`."""
    text = _repr.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def describe(value: object) -> str:
    """Type, shape and dtype of `value` in a few words, for error messages."""
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"a {name} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {brief(value)}"


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return `value` if it is a tensor of that shape (ints are fixed, other entries free)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    if shape is not None:
        fits = value.dim() == len(shape) and all(
            not isinstance(want, int) or have == want
            for have, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            wanted = "(" + ", ".join(str(s) for s in shape) + ")"
            raise ValueError(f"{name}: expected shape {wanted}, got {describe(value)}")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {describe(value)}")
    return value


def check_positions(name: str, positions: object, dimensions: int | None = None) -> Tensor:
    """Return `positions` if it is a float32 (T, 2) or (T, 3) tensor."""
    positions = check_tensor(name, positions, ("T", dimensions or "D"))
    if positions.shape[1] not in (2, 3):
        raise ValueError(f"{name}: expected shape (T, 2) or (T, 3), got {describe(positions)}")
    if positions.dtype == torch.float64:
        raise TypeError(
            f"{name}: expected dtype float32, got {describe(positions)}; "
            "TokenSet.from_world(positions, features, sizes) subtracts an origin per sample in "
            "float64 first, so that no digits are lost, and has the positions to use here"
        )
    if positions.dtype != torch.float32:
        raise TypeError(
            f"{name}: expected dtype float32, got {describe(positions)}; use {name}.float()"
        )
    return positions


def check_sizes(name: str, sizes: Sequence[int] | None, total: int) -> tuple[int, ...]:
    """Tokens per sample as a tuple; `None` means one sample. They must add up to `total`."""
    if sizes is None:
        return (total,)
    if isinstance(sizes, Tensor | np.ndarray):
        sizes = sizes.tolist()
    try:
        sizes = tuple(s if isinstance(s, int | torch.SymInt) else operator.index(s) for s in sizes)
    except TypeError:
        raise TypeError(
            f"{name}: expected integers, the number of tokens of each sample, got {brief(sizes)}"
        ) from None
    if any(s < 0 for s in sizes):
        raise ValueError(f"{name}: sizes must not be negative, got {brief(sizes)}")
    if _is_batch_vector(sizes, total):
        raise ValueError(
            f"{name}: expected the number of tokens of each sample, got {brief(sizes)}, which "
            f"looks like the sample of each of the {total} tokens; use "
            f"{name}=pointformer.sizes_from_batch(batch)"
        )
    if sum(sizes) != total:
        remedy = ""
        if len(sizes) > 1 and sizes[0] == 0 and sizes[-1] == total and _ascend(sizes):
            remedy = "; these look like offsets, sizes are the differences between them"
        raise ValueError(
            f"{name}: sizes {brief(sizes)} add up to {sum(sizes)}, expected {total} tokens{remedy}"
        )
    return sizes


def _is_batch_vector(sizes: tuple[int, ...], total: int) -> bool:
    """Whether these are the samples of `total` tokens rather than sizes.

    There are as many as tokens, and they ascend from 0 without gaps: as sizes, samples of one token
    on average, in order of size, would be a strange batch. Long ones that add up need no order.
    """
    if len(sizes) != total or total < 4 or all(s == 1 for s in sizes):
        return False
    steps = sizes[0] == 0 and all(0 <= b - a <= 1 for a, b in pairwise(sizes))
    return steps or (total >= _CERTAINLY and (sum(sizes) == total or _ascend(sizes)))


def _ascend(numbers: Sequence[int]) -> bool:
    return all(a <= b for a, b in pairwise(numbers))


def as_int32(index: Tensor) -> Tensor:
    """Rows as int32; those that it does not hold, which no tensor has, stay out of range."""
    limits = torch.iinfo(torch.int32)
    return index.clamp(limits.min, limits.max).int() if index.dtype == torch.int64 else index


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise if `value` is no integer of at least `least`."""
    if not isinstance(value, int | torch.SymInt | np.integer) or not value >= least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name}: expected {wanted}, got {brief(value)}")


def can_read(values: Tensor) -> bool:
    """Whether checks may look at the values: not while a graph is traced or a GPU's captured."""
    if torch.compiler.is_compiling() or values.device.type == "meta":
        return False
    return values.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def check_finite(
    name: str, positions: Tensor, sizes: Sequence[int], largest: float = _LARGEST
) -> None:
    """Raise if a position is NaN, infinite or too large to be squared, naming sample and row.

    Waits for the device; skipped where values cannot be read, see `can_read`.
    """
    if not can_read(positions) or positions.numel() == 0:
        return
    low, high = torch.aminmax(positions)  # NaN survives
    if bool((low >= -largest) & (high <= largest)):
        return
    bad = (~(positions.abs() <= largest)).any(1).nonzero()[:, 0]
    row = int(bad[0])
    place = f"{positions[row].tolist()} in row {{}} ({len(bad)} such rows in all)"
    kind = "has a NaN or infinite position"
    if bool(positions[row].isfinite().all()):
        kind = f"is farther than {largest:.1e} from the origin, so that squared distances overflow"
        place += "; use larger units"
    start = 0
    for sample, size in enumerate(sizes):
        if row < start + size:
            raise ValueError(f"{name}: sample {sample} {kind}: {place.format(row - start)}")
        start += size


def check_per_sample(
    name: str, value: object, samples: int, dimensions: int, least: float = -math.inf
) -> tuple[tuple[float, ...], ...]:
    """B rows of D finite host numbers of at least `least`, from one row for all samples, B rows, or
    a tensor.
    """
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected {dimensions} numbers per sample, got {describe(value)}")
    rows = list(value)
    if rows and not isinstance(rows[0], list | tuple | Tensor | np.ndarray):
        rows = [rows] * samples
    if len(rows) != samples or any(len(row) != dimensions for row in rows):
        raise ValueError(
            f"{name}: expected {dimensions} numbers per sample for {samples} samples, "
            f"got {brief(value)}"
        )
    rows = [tuple(row.tolist() if isinstance(row, Tensor | np.ndarray) else row) for row in rows]
    for row in set(rows):
        for number in row:
            known = isinstance(number, int | float | torch.SymInt | torch.SymFloat | np.number)
            if not known or not (-math.inf < number < math.inf and number >= least):
                wanted = "finite numbers" if least == -math.inf else f"finite numbers >= {least:g}"
                raise ValueError(f"{name}: expected {wanted}, got {brief(row)}")
    return tuple(rows)
