"""The numbers by which LAS files call classes (ASPRS, LAS 1.4 R15, table 17)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pointformer.annotations import Category

_CODES = {
    "never classified": 0,
    "created never classified": 0,
    "unclassified": 1,
    "unassigned": 1,
    "ground": 2,
    "low vegetation": 3,
    "medium vegetation": 4,
    "high vegetation": 5,
    "building": 6,
    "low point": 7,
    "low noise": 7,
    "noise": 7,
    "water": 9,
    "rail": 10,
    "road surface": 11,
    "road": 11,
    "wire guard": 13,
    "wire conductor": 14,
    "transmission tower": 15,
    "wire structure connector": 16,
    "bridge deck": 17,
    "bridge": 17,
    "high noise": 18,
    "overhead structure": 19,
    "ignored ground": 20,
    "snow": 21,
    "temporal exclusion": 22,
}
_DEFINED = range(23)
_USERS = range(64, 256)  # of point formats 6 to 10, for whom it pleases; formats 0 to 5 have none


def standard_name(code: int) -> str:
    """The standard's name of a class, the code itself in digits where it has none."""
    return next((name for name, number in _CODES.items() if number == code), str(code))


def class_codes(categories: Sequence[Category], most: int = 255) -> list[int]:
    """The code in files of points of each class, all different.

    It is that of the LAS standard for a class of a name that is in it, in lower or upper case,
    singular or plural, with spaces, "_" or "-". Other classes keep the number that they have in the
    data set that they were learned from, unless another class has it or the standard gives it
    another meaning beside classes of it: these get codes from 64 on, or, where a file cannot hold
    them, from `most` down. A class that is called by its number, as those of files are for which
    the standard has no name, keeps it.

    Args:
        most: see `class_limit`.

    Raises:
        ValueError: there are more classes than codes.
    """
    if len(categories) > most + 1:
        raise ValueError(
            f"classes: a file with codes from 0 to {most} cannot hold {len(categories)}"
        )
    codes: dict[int, int] = {}
    for number, category in enumerate(categories):
        code = standard_code(category.name)
        if code is not None and code <= most and code not in codes.values():
            codes[number] = code
    taken = {*codes.values(), *(_DEFINED if codes else ())}
    for number, category in enumerate(categories):
        own = category.id if 0 <= category.id <= most else -1
        # 12 is defined, as none, and what files call so nevertheless.
        called = category.name == str(own) == standard_name(own) and own not in codes.values()
        if number not in codes and own >= 0 and (called or own not in taken):
            codes[number] = own
            taken.add(own)
    taken = set(codes.values())
    free = [*(_USERS if most >= _USERS.stop - 1 else ()), *range(most, -1, -1)]
    rest = iter([code for code in dict.fromkeys(free) if code not in taken])
    return [codes[n] if n in codes else next(rest) for n in range(len(categories))]


def standard_code(name: str) -> int | None:
    """The standard's code of a class of this name, see `class_codes`; `None` if it has none."""
    words = re.sub(r"[^a-z]+", " ", name.lower()).strip()
    return _CODES.get(words, _CODES.get(words.removesuffix("s")))
