"""Argument checks with errors that name the argument, what was given and what was expected."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import reprlib
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_ROWS = 2**31 - 64  # rows, and entries of lists: int32, with room for the last tile
_LARGEST = 2.0**62  # squared distances of larger positions may overflow
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
_BATCH_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_CERTAINLY = 16  # sizes as many as tokens are no sizes from here on

_LARGEST_NUMBER = torch.finfo(torch.float32).max  # kernels compute in float32
_LARGEST_COUNT = 2**31 - 1  # kernels count in int32
_LARGEST_SIDE = 2.0**64  # of a canvas: it holds any positions
_PLAIN = 2**53  # integers up to here are floats, too


class _Repr(reprlib.Repr):
    """Arrays by what they are, not by what is in them; integers of any length."""

    def repr1(self, x: object, level: int) -> str:
        if isinstance(x, Tensor):
            name = str(x.dtype).removeprefix("torch.")
            return f"a {name} tensor of shape {tuple(x.shape)} on {x.device}"
        if isinstance(x, np.ndarray):
            return f"a {x.dtype} array of shape {x.shape}"
        if isinstance(x, int) and x.bit_length() > 128:
            return f"an integer of {x.bit_length()} bits"
        return super().repr1(x, level)


_repr = _Repr()
_repr.maxlevel, _repr.maxtuple, _repr.maxlist, _repr.maxstring, _repr.maxother = 3, 8, 8, 60, 60


def brief(value: object) -> str:
    """`value` in at most a line, however long: for error messages and `repr`."""
    text = " ".join(_repr.repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def describe(value: object) -> str:
    """Type of `value` and what is in it in a few words, for error messages."""
    if value is None or isinstance(value, Tensor | np.ndarray):
        return brief(value)
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
        remedy = f"; use torch.as_tensor({name})" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}{remedy}")
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


def lacks_gradient_of(**positions: Tensor | None) -> str | None:
    """For `choose`: which positions require a gradient, in words. Only references give one."""
    if torch.is_grad_enabled():
        for name, tensor in positions.items():
            if tensor is not None and tensor.requires_grad:
                return f"{name} requires a gradient"
    return None


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


def check_sizes(
    name: str, sizes: Sequence[int] | None, total: int | None, batch: Tensor | None = None
) -> tuple[int, ...]:
    """Tokens per sample as a tuple; `None` means one sample. They must add up to `total`.

    Without a `total` they must be given, and may add up to anything. In their place there may be a
    batch vector, whose argument is called so too: `query_batch` where the name is `query_sizes`.
    """
    if batch is not None:
        vector = name.replace("sizes", "batch")
        if sizes is not None:
            raise ValueError(f"{vector}: expected None where {name} is given")
        check_tensor(vector, batch, (total,))
        return check_batch(vector, batch)
    if sizes is None and total is not None:
        return (total,)
    if isinstance(sizes, Tensor) and torch.compiler.is_compiling():
        return sizes  # unread, see `PerSample`
    sizes = check_integers(name, sizes, "the number of tokens of each sample")
    compiling = torch.compiler.is_compiling()  # each size has a guard of its own then
    if any(s < 0 for s in sizes) if compiling else min(sizes, default=0) < 0:
        raise ValueError(f"{name}: sizes must not be negative, got {brief(sizes)}")
    added = sum(sizes)
    if total is None:
        total = added
    if _is_batch_vector(sizes, total):
        raise ValueError(
            f"{name}: expected the number of tokens of each sample, got {brief(sizes)}, which "
            f"looks like the sample of each of the {total} tokens; use "
            f"{name.replace('sizes', 'batch')}=batch, or {name}=pointformer.sizes_from_batch(batch)"
        )
    if added != total:
        remedy = ""
        if len(sizes) > 1 and sizes[0] == 0 and sizes[-1] == total and _ascend(sizes):
            remedy = f"; these look like offsets, use {name}=pointformer.sizes_from_ptr(ptr)"
        raise ValueError(
            f"{name}: sizes {brief(sizes)} add up to {brief(added)}, expected {total} tokens"
            f"{remedy}"
        )
    return sizes


def check_integers(name: str, values: object, meaning: str) -> tuple[int, ...]:
    """A sequence, tensor or array of integers as a tuple of host integers."""
    numbers = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    try:
        if not isinstance(numbers, list | tuple | range | Sequence):  # the first ones are fast
            raise TypeError
        if not torch.compiler.is_compiling() and set(map(type, numbers)) == {int}:
            return tuple(numbers)
        integers: tuple = tuple(
            n if type(n) is int or isinstance(n, torch.SymInt) else _index(n) for n in numbers
        )
    except TypeError:
        raise TypeError(f"{name}: expected integers, {meaning}, got {brief(values)}") from None
    return integers


def check_query_sizes(
    sizes: Sequence[int] | None,
    batch: Tensor | None,
    total: int,
    query_sizes: Sequence[int] | None,
    query_batch: Tensor | None,
    queries: int,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens and queries per sample, of equally many samples."""
    sizes = check_sizes("sizes", sizes, total, batch)
    query_sizes = check_sizes("query_sizes", query_sizes, queries, query_batch)
    vectors = batch is not None, query_batch is not None
    if isinstance(sizes, Tensor) or isinstance(query_sizes, Tensor):  # while compiling
        sizes, query_sizes = on_host(sizes), on_host(query_sizes)
        if certain(len(sizes) == len(query_sizes)):
            return sizes, query_sizes
        return _untraced_same_samples(sizes, query_sizes, *vectors)
    return _same_samples(sizes, query_sizes, *vectors)


def _same_samples(
    sizes: tuple[int, ...], query_sizes: tuple[int, ...], batch: bool, query_batch: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of equally many samples. Those that are from a `batch` vector, which cannot tell how
    many of the last samples are empty, may have fewer."""
    if batch:
        sizes += (0,) * (len(query_sizes) - len(sizes))
    if query_batch:
        query_sizes += (0,) * (len(sizes) - len(query_sizes))
    if len(query_sizes) != len(sizes):
        raise ValueError(
            f"query_sizes: expected {len(sizes)} samples as in sizes, got {len(query_sizes)}"
        )
    return sizes, query_sizes


@torch.library.custom_op("pointformer::same_samples", mutates_args=())
def _untraced_same_samples(
    sizes: Tensor, query_sizes: Tensor, batch: bool, query_batch: bool
) -> tuple[Tensor, Tensor]:
    """`_same_samples` within compiled code."""
    given = tuple(sizes.tolist()), tuple(query_sizes.tolist())
    same, of_queries = _same_samples(*given, batch, query_batch)
    return torch.tensor(same, dtype=torch.int64), torch.tensor(of_queries, dtype=torch.int64)


@_untraced_same_samples.register_fake
def _fake_same_samples(sizes, query_sizes, batch, query_batch):
    samples = torch.library.get_ctx().new_dynamic_size()
    return sizes.new_empty(samples), sizes.new_empty(samples)


def check_batch(name: str, batch: object, batch_size: int | None = None) -> tuple[int, ...]:
    """Tokens per sample, from the sample of each token in ascending order. Waits for the device.

    While compiling they are a tensor on the host, see `PerSample`.
    """
    batch = check_tensor(name, batch, ("T",), _BATCH_DTYPES).long()
    if torch.compiler.is_compiling():
        return _untraced_batch(name, batch, batch_size)
    if len(batch):
        if bool((batch.diff() < 0).any()):
            raise ValueError(
                f"{name}: expected the tokens of a sample in consecutive rows, samples in order, "
                f"got one that descends; put all rows in the order {name}.argsort(stable=True) "
                "first"
            )
        first, last = int(batch[0]), int(batch[-1])
        if first < 0:
            raise ValueError(f"{name}: expected samples from 0 on, got {first}")
        if batch_size is not None and last >= batch_size:
            raise ValueError(f"{name}: expected samples below batch_size={batch_size}, got {last}")
        if last > MOST_ROWS:
            raise ValueError(f"{name}: expected at most {MOST_ROWS} samples, got {last}")
    return tuple(batch.bincount(minlength=batch_size or 0).tolist())


@torch.library.custom_op("pointformer::sizes_from_batch", mutates_args=())
def _untraced_batch(name: str, batch: Tensor, batch_size: int | None) -> Tensor:
    """`check_batch` within compiled code."""
    return torch.tensor(check_batch(name, batch, batch_size), dtype=torch.int64)


@_untraced_batch.register_fake
def _fake_batch(name, batch, batch_size):
    samples = torch.library.get_ctx().new_dynamic_size() if batch_size is None else batch_size
    return torch.empty(samples, dtype=torch.int64)


def _index(value: object) -> int:
    if isinstance(value, bool | np.bool_ | str):
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]


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


def check_rows(
    name: str,
    rows: Tensor,
    count: int,
    what: str = "rows",
    *,
    none: bool = False,
    wait: bool = True,
) -> None:
    """Raise if one of them is negative, which would count from the end, or not below `count`.

    -1 may stand for `none`. Skipped where values cannot be read, see `can_read`, and on GPUs where
    it may not `wait`.
    """
    if not can_read(rows) or not (wait or rows.device.type == "cpu") or rows.numel() == 0:
        return  # the first comes first: traced rows may have no size yet
    least, most = map(int, rows.aminmax())
    lowest = -1 if none else 0
    if least < lowest or most >= count:
        bad = least if least < lowest else most
        remedy = "; leave those out that stand for none" if bad == -1 else ""
        absent = ", or -1 for none" if none else ""
        raise IndexError(
            f"{name}: expected {what} from 0 to below {count}{absent}, got {bad}{remedy}"
        )


def check_listed_rows(name: str, rows: Tensor, count: int, impl: str) -> None:
    """`check_rows` of lists of neighbors, where -1 stands for none: "triton" leaves out those that
    do not exist."""
    if impl != "triton":
        check_rows(name, rows, count, none=True, wait=False)


def check_count(name: str, value: object, least: int = 1, most: int = _LARGEST_COUNT) -> None:
    """Raise if `value` is no integer from `least` to `most`."""
    if type(value) is int or isinstance(value, torch.SymInt | np.integer):
        if least <= value <= most:
            return
        if value > least:
            raise ValueError(f"{name}: expected at most {most}, got {brief(value)}")
    wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
    raise ValueError(f"{name}: expected {wanted}, got {_given(value)}")


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float = -_LARGEST_NUMBER,
    most: float = _LARGEST_NUMBER,
) -> Any:
    """Return `value`, see `plain_number`; raise if it is no finite number of the host above `above`
    and from `least` to `most`."""
    real = isinstance(value, _NUMBERS) and type(value) is not bool
    number: Any = plain_number(value) if real else value
    if real and least <= number <= most and (above is None or number > above):
        return number
    lowest = least if above is None else above
    wanted = "a finite number"
    if most != _LARGEST_NUMBER:
        wanted = f"a number in {'[' if above is None else '('}{lowest:g}, {most:g}]"
    elif above == 0:
        wanted = "a positive number"
    elif lowest != -_LARGEST_NUMBER:
        wanted = f"a number {'of at least' if above is None else 'above'} {lowest:g}"
    if isinstance(value, int | float) and _LARGEST_NUMBER < abs(value) < math.inf:
        wanted += " that float32 holds"
    raise ValueError(f"{name}: expected {wanted}, got {_given(value)}")


_NUMBERS = (float, int, torch.SymInt, torch.SymFloat, np.integer, np.floating)


def check_power(power: object, device: torch.device) -> Any:
    """Return `power`, see `plain_number`; raise if it is no positive number and no floating tensor
    of one element.

    What is in a tensor is not looked at, which would wait for the device.
    """
    if not isinstance(power, Tensor):
        return check_number("power", power, above=0)
    check_tensor("power", power, dtypes=FLOATS, device=device)
    if power.numel() != 1:
        raise ValueError(f"power: expected one number, got {describe(power)}")
    return power


def check_option(name: str, value: object, known: Sequence[str | None]) -> None:
    """Raise if `value` is none of a few names."""
    if not (value is None or isinstance(value, str)) or value not in known:
        names = ", ".join(str(option) for option in known)
        raise ValueError(f"{name}: expected one of {names}, got {brief(value)}")


def check_flags(**flags: object) -> None:
    """Raise if one of them, by its name, is neither True nor False."""
    for name, value in flags.items():
        if value is not True and value is not False:
            raise TypeError(f"{name}: expected True or False, got {describe(value)}")


def check_device(device: object) -> torch.device | None:
    """The device that this is or names."""
    if device is None or isinstance(device, torch.device):
        return device
    try:
        if isinstance(device, str | int) and not isinstance(device, bool):
            return torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError):  # as its text or number is wrong
        pass
    raise ValueError(f"device: expected one such as 'cpu' or 'cuda', got {brief(device)}")


def _given(value: object) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        return f"{brief(value)}; use .item()"
    return brief(value)


def certain(condition: bool) -> bool:
    """Whether this holds; while compiling only where it does for all inputs, for else what is
    compiled would be for these alone.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def on_host(numbers: int | Sequence[int] | Tensor) -> Tensor:
    """A tensor of integers of the host; `torch.as_tensor` would compile for these alone."""
    return numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.int64)


def alike(numbers: Sequence) -> bool:
    """Whether all host numbers are equal, in the way of `certain`."""
    if not torch.compiler.is_compiling():
        return not numbers or numbers.count(numbers[0]) == len(numbers)
    return all(certain(number == numbers[0]) for number in numbers[1:])


def too_many(*rows: int) -> bool:
    """Whether one of these numbers of rows is above `MOST_ROWS`, in the way of `certain`."""
    return any(certain(count > MOST_ROWS) for count in rows)


def can_read(values: Tensor) -> bool:
    """Whether checks may look at the values: not while a graph is traced or a GPU's captured, nor
    in a function that `torch.func` transforms."""
    if torch.compiler.is_compiling() or values.device.type == "meta":
        return False
    if torch._C._are_functorch_transforms_active():
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


def check_same_positions(
    name: str, positions: Tensor, sizes: Sequence[int], check_values: bool
) -> None:
    """Raise if samples differ in size or, where values may be looked at, in their positions."""
    if any(size != sizes[0] for size in sizes[1:]):
        raise ValueError(f"same_positions: expected samples of one size, got {brief(sizes)}")
    if not check_values or not can_read(positions) or positions.numel() == 0:
        return
    samples = positions.view(len(sizes), -1, positions.shape[1])
    same = (samples == samples[:1]).flatten(1).all(1)
    if not bool(same.all()):
        raise ValueError(
            f"same_positions: {name} of sample {int(same.int().argmin())} are not those of sample "
            "0; do not promise it, for clusters by replace(clusters, same_positions=False)"
        )


def check_per_sample(
    name: str, value: object, samples: int | None, dimensions: int, least: float = -_LARGEST_SIDE
) -> tuple[tuple[float, ...], ...]:
    """B rows of D finite host numbers of at least `least`, from one row for all samples, B rows, or
    a tensor. Without a number of samples as many rows as there are, one for a single row.
    """
    given = value
    if isinstance(value, Tensor) and torch.compiler.is_compiling():
        return value  # type: ignore[return-value]  # unread, see `PerSample`
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}: expected {dimensions} numbers per sample, got {describe(given)}")
    rows = [row.tolist() if isinstance(row, Tensor | np.ndarray) else row for row in value]
    if rows and not isinstance(rows[0], list | tuple):
        rows = [rows] * (1 if samples is None else samples)
    if (samples is not None and len(rows) != samples) or any(
        not isinstance(row, list | tuple) or len(row) != dimensions for row in rows
    ):
        of_all = "each sample" if samples is None else f"{samples} samples"
        raise ValueError(
            f"{name}: expected {dimensions} numbers per sample for {of_all}, got {brief(given)}"
        )
    checked: tuple[tuple[float, ...], ...] = tuple(tuple(row) for row in rows)
    different: Collection[tuple[float, ...]] = checked
    compiling = torch.compiler.is_compiling()
    # Equal ones need one look. What is compiled would be for these numbers alone.
    if not compiling:
        with contextlib.suppress(TypeError):  # there is no hash of lists
            different = set(checked)
    plain = compiling
    if not compiling:  # many at once, quickly
        numbers = list(itertools.chain.from_iterable(checked))
        plain = set(map(type, numbers)) <= {int, float} and not any(
            map(operator.ne, numbers, numbers)
        )
        low, high = (min(numbers), max(numbers)) if plain and numbers else (0, 0)
        plain = plain and low >= -_PLAIN and high <= _PLAIN
        if plain and least <= low:
            return checked
    for row in different:
        for number in row:
            known = isinstance(number, _NUMBERS) and type(number) is not bool
            if not known or not least <= number <= _LARGEST_SIDE:
                wanted = (
                    "finite numbers" if least == -_LARGEST_SIDE else f"finite numbers >= {least:g}"
                )
                raise ValueError(f"{name}: expected {wanted}, got {brief(row)}")
    return checked if plain else tuple(tuple(map(plain_number, row)) for row in checked)


def plain_number(number: Any) -> Any:
    """One of Python for one of NumPy, which files would keep as an object; a float for an integer
    beyond 2**53, which may be too large for int64."""
    if isinstance(number, np.generic):
        number = number.item()
    if type(number) is int and abs(number) > _PLAIN:
        if abs(number) < 2**1023:
            return float(number)
        return math.inf if number > 0 else -math.inf
    return number
