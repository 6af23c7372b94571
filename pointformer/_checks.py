"""Argument checks with errors that name the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def describe(value: object) -> str:
    """Type, shape and dtype of `value` in a few words, for error messages."""
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"a {name} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r:.60}"


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
    positions = check_tensor(name, positions, ("T", dimensions or "D"), (torch.float32,))
    if positions.shape[1] not in (2, 3):
        raise ValueError(f"{name}: expected shape (T, 2) or (T, 3), got {describe(positions)}")
    return positions


def check_sizes(name: str, sizes: Sequence[int] | None, total: int) -> tuple[int, ...]:
    """Tokens per sample as a tuple; `None` means one sample. They must add up to `total`."""
    if sizes is None:
        return (total,)
    if isinstance(sizes, Tensor):
        sizes = sizes.tolist()
    sizes = tuple(sizes)
    if any(isinstance(s, float) for s in sizes):
        raise TypeError(f"{name}: expected integers, got {sizes!r:.80}")
    if any(s < 0 for s in sizes):
        raise ValueError(f"{name}: sizes must not be negative, got {sizes}")
    if sum(sizes) != total:
        raise ValueError(f"{name}: sizes {sizes} add up to {sum(sizes)}, expected {total} tokens")
    return sizes


def as_int32(index: Tensor) -> Tensor:
    """Rows as int32; those that it does not hold, which no tensor has, stay out of range."""
    limits = torch.iinfo(torch.int32)
    return index.clamp(limits.min, limits.max).int() if index.dtype == torch.int64 else index


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise if `value` is no integer of at least `least`."""
    if isinstance(value, float) or not value >= least:  # type: ignore[operator]
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")


def can_read(values: Tensor) -> bool:
    """Whether checks may look at the values: not while a graph is traced or a GPU's captured."""
    if torch.compiler.is_compiling() or values.device.type == "meta":
        return False
    return values.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def check_finite(name: str, positions: Tensor, sizes: Sequence[int]) -> None:
    """Raise if a position is NaN or infinite, naming the sample and the row.

    Waits for the device; skipped where values cannot be read, see `can_read`.
    """
    if not can_read(positions):
        return
    if bool(torch.isfinite(positions.sum())):  # one pass; NaN and infinity survive a sum
        return
    bad = (~torch.isfinite(positions)).any(1).nonzero()[:, 0]
    if len(bad) == 0:  # the sum overflowed
        return
    row = int(bad[0])
    start = 0
    for sample, size in enumerate(sizes):
        if row < start + size:
            raise ValueError(
                f"{name}: sample {sample} has a NaN or infinite position "
                f"{positions[row].tolist()} in row {row - start} ({len(bad)} such rows in all)"
            )
        start += size


def check_per_sample(
    name: str, value: object, samples: int, dimensions: int
) -> tuple[tuple[float, ...], ...]:
    """B rows of D host numbers, from one row for all samples, B rows, or a tensor."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected {dimensions} numbers per sample, got {describe(value)}")
    rows = list(value)
    if rows and not isinstance(rows[0], list | tuple):
        rows = [rows] * samples
    if len(rows) != samples or any(len(row) != dimensions for row in rows):
        raise ValueError(
            f"{name}: expected {dimensions} numbers per sample for {samples} samples, "
            f"got {value!r:.80}"
        )
    return tuple(tuple(row) for row in rows)
