"""Statistics and problems of a data set, found before a training starts."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from pointformer._files import atomic_path
from pointformer.annotations import VOID, Category
from pointformer.data.annotations import Dataset, Entry
from pointformer.data.images import Reading
from pointformer.data.point_sets import read_sample
from pointformer.tokens import TokenSet

Counts = Literal["objects", "pixels", "pictures", "points", "sets"]
"""Counts of each class, see `examine`."""


def samples_in_words(count: int, counts: Counts) -> str:
    """How many samples a data set has, of what they are: "3 pictures", "1 point set"."""
    noun = "point set" if counts in ("points", "sets") else "picture"
    return f"{count} {noun}{'s' * (count != 1)}"


_FORM = 4  # of the file that keeps what was found
_NAMED = 5  # of a list, so many are named


@dataclass(frozen=True)
class PictureFacts:
    """Counts of one picture.

    Attributes:
        name: of the picture.
        size: height and width in pixels, or how many points; zeros if it cannot be read.
        classes: for each class that is in it, how many objects, pixels, points, or pictures (1).
        areas: of its objects in pixels; crowds are none.
        void: pixels without a class, in maps of classes; points.
        problem: why it cannot be read, in one line.
    """

    name: str
    size: tuple[int, ...] = (0, 0)
    classes: tuple[tuple[int, int], ...] = ()
    areas: tuple[int, ...] = ()
    void: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Statistics:
    """Counts over the readable pictures of a data set.

    Attributes:
        categories: its classes.
        facts: of each picture, in order; also of those that cannot be read.
        counts: "objects", "pixels", "points", "pictures" or "sets": what is counted for each class.
    """

    categories: tuple[Category, ...]
    facts: tuple[PictureFacts, ...]
    counts: Counts

    @property
    def problems(self) -> dict[str, str]:
        """Errors of unreadable pictures by name."""
        return {f.name: f.problem for f in self.facts if f.problem is not None}

    @property
    def good(self) -> list[PictureFacts]:
        return [f for f in self.facts if f.problem is None]

    @property
    def per_class(self) -> list[int]:
        """Objects, pixels or pictures of each class."""
        total: Counter[int] = Counter()
        for facts in self.good:
            total.update(dict(facts.classes))
        return [total[number] for number in range(len(self.categories))]

    @property
    def diameters(self) -> np.ndarray:
        """Of the objects: sides of squares of their areas, in pixels."""
        return np.sqrt([area for facts in self.good for area in facts.areas])

    def check(self) -> None:
        """Raise a `ValueError` in one line where nothing can be learned."""
        self.check_content("data")
        what = self._have()
        if self.counts != "objects" and len(self.categories) < 2:
            names = ", ".join(category.name for category in self.categories)
            raise ValueError(
                f"data: expected at least two classes to be told apart, got one ({names})"
            )
        used = [number for number, count in enumerate(self.per_class) if count]
        if len(used) == 1 and self.counts != "objects":
            raise ValueError(
                f"data: expected at least two classes to be told apart, {what} only "
                f"{self.categories[used[0]].name!r}"
            )

    def check_content(self, about: str) -> None:
        """Raise a `ValueError`, in one line that begins with `about`, where there is nothing of any
        class."""
        what = self._have()
        if not self.good:
            several = samples_in_words(0, self.counts).removeprefix("0 ")
            raise ValueError(f"{about}: expected {several}, there is none that can be read")
        if not any(self.per_class):
            missing = {
                "objects": f"an object, {what} none",
                "pixels": f"a pixel with a class, {what} none but void",
                "pictures": f"a picture with a class, {what} none",
                "points": f"a point with a class, {what} none",
                "sets": f"a point set with a class, {what} none",
            }
            raise ValueError(f"{about}: expected {missing[self.counts]}")

    def _have(self) -> str:
        many = len(self.good)
        samples = samples_in_words(many, self.counts)
        return f"the {samples.removeprefix('1 ')} {'has' if many == 1 else 'have'}"

    def lines(self) -> list[str]:
        """Lines of text that describe the data set."""
        good = self.good
        samples = samples_in_words(len(good), self.counts)
        sizes = Counter(facts.size for facts in good)
        if self.counts in ("points", "sets"):
            numbers = [size for (size,) in sizes.elements()]
            low, high = min(numbers), max(numbers)
            lines = [f"{samples} of {low:,}{f' to {high:,}' * (high > low)} points"]
        else:
            common = ", ".join(f"{w} x {h} ({n})" for (h, w), n in sizes.most_common(3))
            more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
            lines = [f"{samples}, width x height {common}{more}"]
        counts, total = self.per_class, max(1, sum(self.per_class))
        order = sorted(range(len(counts)), key=lambda k: -counts[k])
        shares = [f"{self.categories[k].name} {100 * counts[k] / total:.3g}%" for k in order[:8]]
        more = f", and {len(counts) - 8} more" if len(counts) > 8 else ""
        lines.append(
            f"{len(counts)} class{'es' if len(counts) > 1 else ''}, by {self.counts}: "
            f"{', '.join(shares)}{more}"
        )
        if self.counts in ("pixels", "points"):
            pixels = sum(math.prod(facts.size) for facts in good)
            lines.append(f"{100 * sum(f.void for f in good) / max(1, pixels):.3g}% void")
        diameters = self.diameters
        if self.counts == "objects" and len(diameters):
            low, middle, high = np.percentile(diameters, (5, 50, 95))
            lines.append(
                f"{len(diameters)} objects, up to {max(len(f.areas) for f in good)} in a picture, "
                f"diameters {low:.3g} to {high:.3g} px (5% to 95%), median {middle:.3g}"
            )
        return lines

    def advice(
        self, token: int = 4, crop: tuple[int, int] | None = None, scale: float = 1.0
    ) -> list[str]:
        """Advice where a setting will not do well.

        Args:
            token: side of the model's first tokens, in pixels of what the model sees.
            crop: height and width of the crops that it is trained on.
            scale: side of a picture as the model sees it over its own, at the most.
        """
        lines, good = [], self.good
        if len(good) == 1:
            one = samples_in_words(1, self.counts)
            lines.append(f"{one}: the model will learn it by heart and nothing else")
        absent = [c.name for c, n in zip(self.categories, self.per_class, strict=True) if not n]
        if absent:
            lines.append(
                f"{_some(absent, 'class', 'classes')} without {self.counts}: nothing is learned "
                "of these"
            )
        if self.counts == "objects" and len(good) > 1 and max(len(f.areas) for f in good) == 1:
            lines.append(
                "no picture has more than one object; where a map shows several, each needs a "
                "number of its own"
            )
        diameters = self.diameters * scale
        small = int((diameters < token).sum())
        if small:
            share = small / len(diameters)
            factor = token / max(float(np.percentile(diameters, 5)), 0.1)
            remedy = f"; enlarge the pictures {max(2, math.ceil(factor))} times" * (share > 0.05)
            lines.append(
                f"{small} of {len(diameters)} objects ({100 * share:.3g}%) are smaller than a "
                f"token of {token} x {token} px, and are easily missed{remedy}"
            )
        if crop is not None:
            over = [f for f in good if f.size[0] * scale < crop[0] or f.size[1] * scale < crop[1]]
            if over:
                height, width = min(facts.size for facts in over)
                lines.append(
                    f"crops of {crop[1]} x {crop[0]} px are larger than {len(over)} of the "
                    f"{len(good)} pictures (as {width} x {height}), which are filled up; use "
                    "smaller crops"
                )
        return lines


def examine(
    dataset: Dataset,
    counts: Counts,
    *,
    cache: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: bool = False,
    **reading: Unpack[Reading],
) -> Statistics:
    """Read each picture and annotation of a data set once.

    Args:
        counts: what is counted for each class, as `Task.counts` says: annotated "objects" and
            segments, "pixels" of maps of classes, or whole "pictures"; "points" with a class, or
            whole point "sets".
        cache: a file that keeps what was found: pictures whose files are as they were are not read
            again. `None`: none is kept.
        threads: that read at a time; `None`: one per core.
        progress: whether to show a bar.
        reading: how pictures are read, see `pointformer.data.Reading`.
    """
    labels = [f"{c.id} {c.name}" for c in dataset.categories]
    whole = json.dumps([_FORM, counts, labels, str(dataset.source), reading], default=str)
    states = [json.dumps([entry.state, entry.label]) for entry in dataset.entries]
    known = _kept(cache, whole)
    found: list[PictureFacts | None] = [
        known[entry.name][1] if entry.name in known and known[entry.name][0] == state else None
        for entry, state in zip(dataset.entries, states, strict=True)
    ]
    missing = [n for n, facts in enumerate(found) if facts is None]

    def look(index: int) -> PictureFacts:
        return _facts(dataset, index, counts, reading)

    if missing:
        with _pool(threads) as pool:
            results: Iterator[PictureFacts] = pool.map(look, missing)
            if progress:
                from tqdm import tqdm

                bar = tqdm(results, "checking", total=len(missing), unit="sample", leave=False)
                results = iter(bar)
            for index, result in zip(missing, results, strict=True):
                found[index] = result
    facts = tuple(item for item in found if item is not None)
    if cache is not None and missing:
        _keep(Path(cache), whole, states, facts)
    return Statistics(dataset.categories, facts, counts)


@contextlib.contextmanager
def _pool(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads that end with what they are at when the process is told to end."""
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def without_bad(dataset: Dataset, statistics: Statistics) -> Dataset:
    """The pictures that can be read.

    Raises:
        ValueError: naming those that cannot, unless the data set is one with `skip_bad`; what it
            leaves out is in its `skipped` then.
    """
    problems = statistics.problems
    if not problems:
        return dataset
    if not dataset.skip_bad:
        first = "; ".join(list(problems.values())[:_NAMED])
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(
            f"{len(problems)} of {samples_in_words(len(dataset), statistics.counts)} cannot be "
            f"used: {first}{more} "
            "(--skip-bad leaves them out)"
        )
    part = dataset.subset(
        n for n, entry in enumerate(dataset.entries) if entry.name not in problems
    )
    part.skipped.update(problems)
    return part


def _facts(dataset: Dataset, index: int, counts: Counts, reading: Reading) -> PictureFacts:
    entry: Entry = dataset.entries[index]
    try:
        annotation = dataset[index]
        sample = read_sample(annotation, reading)
        size = (sample.num_tokens,) if isinstance(sample, TokenSet) else sample.shape[:2]
        if counts in ("pictures", "sets"):
            classes = Counter([annotation.label])
        elif counts in ("pixels", "points"):
            values, pixels = np.unique(annotation.classes(), return_counts=True)
            classes = Counter(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
        else:
            kept = [segment for segment in annotation.segments if not segment.crowd]
            # The pixels: what a file says of an area may be anything.
            areas = [int(s.area) if s.mask is None else s.mask.area for s in kept]
            classes = Counter(segment.category for segment in kept)
            return PictureFacts(entry.name, size, tuple(classes.items()), tuple(areas))
    except (ValueError, OSError) as error:
        return PictureFacts(entry.name, problem=str(error))
    void = classes.pop(VOID, 0)
    return PictureFacts(entry.name, size, tuple(classes.items()), void=void)


def _kept(cache: str | os.PathLike[str] | None, whole: str) -> dict[str, tuple[str, PictureFacts]]:
    """By name, the state of the files and what was found; nothing if the file is of no use."""
    if cache is None:
        return {}
    try:
        content = json.loads(Path(cache).read_bytes())
        if content["whole"] != whole:
            return {}
        return {
            row["facts"]["name"]: (row["state"], _read_facts(row["facts"]))
            for row in content["pictures"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read_facts(row: dict[str, Any]) -> PictureFacts:
    classes = tuple((int(k), int(n)) for k, n in row["classes"])
    return PictureFacts(
        row["name"], tuple(row["size"]), classes, tuple(row["areas"]), row["void"], row["problem"]
    )


def _keep(cache: Path, whole: str, states: Sequence[str], facts: Sequence[PictureFacts]) -> None:
    rows = [{"state": s, "facts": asdict(f)} for s, f in zip(states, facts, strict=True)]
    cache.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(cache) as temporary:
        temporary.write_text(json.dumps({"whole": whole, "pictures": rows}), "utf-8")


def left_out_lines(errors: Iterable[str]) -> list[str]:
    """Lines of text about what was left out: the first errors, and how many more."""
    errors = list(errors)
    more = len(errors) - _NAMED
    return [*errors[:_NAMED], *([f"and {more} more"] if more > 0 else [])]


def _some(names: Sequence[str], one: str, many: str) -> str:
    listed = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{len(names)} {one if len(names) == 1 else many} ({listed})"
