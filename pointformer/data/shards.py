"""Shards: tar files of samples, as webdataset writes and reads them.

A sample is all files of a shard whose paths agree up to the first dot of the name: "site1/07.jpg",
"site1/07.cls" and "site1/07.seg.png" are parts of "site1/07". They need not be neighbors.

webdataset reads shards as streams, whose order is that of buffers and workers. Here the members of
a shard are listed once, and are read where they lie: a data set of shards is one as any other, of
which a run that goes on, or one of several processes, reads just the pictures of its steps.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pointformer._files import atomic_path, cache_folder
from pointformer.annotations import OBJECT, Category
from pointformer.data.annotations import (
    Annotation,
    CategoryTable,
    Dataset,
    Entry,
    category_table,
    named_categories,
)
from pointformer.data.classes import ClassNumbers, labeled_classes, read_class
from pointformer.data.discovery import (
    MAP_SUFFIXES,
    PICTURE_SUFFIXES,
    is_litter,
    pictures_in,
)
from pointformer.data.folders import read_objects
from pointformer.data.json_files import WHOLE, parse_json
from pointformer.data.labels import LabelTable, found_classes, read_label_file
from pointformer.data.packed import FileState, Packed
from pointformer.data.stored import PictureError

_FORM = 1  # of the files that keep what is in shards
_SHARD = re.compile(r".+\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))", re.IGNORECASE)
_END = re.compile(r"\.t[^./]+(\.[^./]+)?$", re.IGNORECASE)
_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_SUFFIXES = frozenset(
    {".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".lz4"}
)
_MOST_SHARDS = 1_000_000
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
_LONGEST_LABEL = 2**16  # bytes of a file that may be one

# What parts are called that hold the class of a picture, the surest first.
_LABELS = ("cls", "class", "label", "lbl", "target", "cls.txt", "class.txt", "label.txt",
           "target.txt", "cls.json", "label.json", "json", "txt")  # fmt: skip
_LABEL_KEYS = ("label", "cls", "class", "target", "class_id", "label_id", "category_id",
               "class_index", "category", "class_name", "label_name")  # fmt: skip
_CLASS_MAPS = {"seg", "segmentation", "semantic", "sem", "mask", "masks", "label", "labels", "gt",
               "annotation", "annotations", "target", "segmap"}  # fmt: skip
_OBJECT_MAPS = {"instances", "instance", "inst", "ids", "objects"}
_SHOWN = {"image", "img", "input", "rgb", "picture", "photo"}


@dataclass(frozen=True, slots=True)
class TarMember(Packed):
    """A file in a tar file.

    Attributes:
        offset, size: where its bytes are.
    """

    offset: int
    size: int

    def read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                self.check(os.fstat(file.fileno()))
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise PictureError(f"{self.path}: cannot be read: {error.strerror}") from None


class Member(NamedTuple):
    """A file in a shard.

    Attributes:
        name: of the file, without "./" before it.
        offset, size: where its bytes are.
        label: what it says of the class of its sample, if it does.
        problem: why it is of no use, in words.
    """

    name: str
    offset: int
    size: int
    label: int | str | None = None
    problem: str | None = None


class Shard(NamedTuple):
    """Members of a tar file; `problem` is what is wrong with it as a whole, in words."""

    path: Path
    state: FileState
    members: list[Member]
    problem: str | None = None

    def file(self, member: Member) -> TarMember:
        return TarMember(self.path, self.state, member.name, member.offset, member.size)


# Which files -------------------------------------------------------------------------------------


def shard_files(path: str | os.PathLike[str]) -> list[Path]:
    """The shards that a path stands for, sorted; none if it stands for something else.

    Args:
        path: a tar file, a folder, whose folders are looked into too, or a pattern, as
            "train-{0000..0146}.tar" or "train-*.tar". Files that braces name are listed whether
            they exist or not.
    """
    path = Path(path)
    if path.is_dir():
        found = pictures_in(path, deep=True, suffixes=_SUFFIXES)
    elif path.exists():
        found = [path]
    elif set(str(path)) & set("{*?["):
        named: set[Path] = set()
        for pattern in _braces_expanded(str(path)):
            wild = set(pattern) & set("*?[")
            names = sorted(glob.glob(pattern, recursive=True)) if wild else [pattern]
            named.update(map(Path, names))
        found = sorted(named)
    else:
        found = []
    return [file for file in found if _SHARD.fullmatch(file.name)]


def _braces_expanded(pattern: str) -> list[str]:
    """Braces as a shell expands them: "{a,b}" is "a" and "b", "{08..10}" is "08", "09" and "10"."""
    match = re.search(r"\{([^{}]*)\}", pattern)  # the innermost first
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span is not None:
        low, high = int(span[1]), int(span[2])
        if abs(high - low) >= _MOST_SHARDS:
            raise ValueError(f"{pattern}: {match[0]} stands for more than {_MOST_SHARDS:,} names")
        padded = any(len(end) > 1 and end[0] == "0" for end in span.groups())
        width = max(map(len, span.groups())) if padded else 1
        numbers = range(low, high + 1) if low <= high else range(low, high - 1, -1)
        parts = [f"{number:0{width}d}" for number in numbers]
    else:
        parts = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for part in parts for name in _braces_expanded(before + part + after)]


# What is in them ---------------------------------------------------------------------------------


def list_shards(files: Sequence[Path]) -> list[Shard]:
    """Members of each of some tar files.

    What was found is kept in the cache folder, so that a shard is read once as long as it stays as
    it is.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_list_shard, files))


def _list_shard(path: Path) -> Shard:
    try:
        with open(path, "rb") as file:
            state = FileState.of(os.fstat(file.fileno()))
            kept = cache_folder() / "shards" / f"{_digest(path)}.json"
            known = _read_kept(kept, path, state)
            if known is not None:
                return known
            members, problem = _list_members(file, state.size)
    except OSError as error:
        reason = "there is no such file" if error.errno == errno.ENOENT else error.strerror
        return Shard(path, FileState(0, 0), [], f"{path}: expected a shard, but {reason}")
    shard = Shard(path, state, members, problem and f"{path}: {problem}")
    with contextlib.suppress(OSError):  # without a cache it takes longer
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as temporary:
            temporary.write_text(json.dumps([_FORM, state, shard.problem, members]), "utf-8")
    return shard


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]


def _read_kept(kept: Path, path: Path, state: FileState) -> Shard | None:
    try:
        form, seen, problem, rows = json.loads(kept.read_bytes())
        if form == _FORM and FileState(*seen) == state:
            return Shard(path, state, [Member(*row) for row in rows], problem)
    except (OSError, ValueError, TypeError):
        pass
    return None


def _list_members(file: BinaryIO, size: int) -> tuple[list[Member], str | None]:
    """Of an open tar file; and what is wrong with it."""
    head = file.read(6)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return [], (
                f"is compressed ({name}); shards are read at any place, unpack it to a plain tar "
                "file (pictures in it are compressed already)"
            )
    file.seek(0)
    infos: list[tarfile.TarInfo] = []
    problem = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            infos.extend(archive)
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if not infos:
            return [], f"expected a tar file: {error}"
        problem = f"is cut off or damaged after {infos[-1].name!r}"
    else:
        problem = _problem_at_end(file, end, size)
    places = {_plain(info.name): info for info in infos if info.isreg()}
    members = [_member(info, places, size) for info in infos if not info.isdir()]
    return [_labeled(member, file) for member in members], problem


def _problem_at_end(file: BinaryIO, end: int, size: int) -> str | None:
    """Fault of a tar file whose last member is followed by something at `end`."""
    file.seek(end)
    if end >= size:
        return "is cut off: a tar file ends with a block of zeros"
    while chunk := file.read(2**20):
        if chunk.count(0) < len(chunk):
            return (
                f"holds more after its end at byte {end}: it is damaged, or several tar files were "
                "joined without tar --concatenate"
            )
    return None


def _member(info: tarfile.TarInfo, places: Mapping[str, tarfile.TarInfo], size: int) -> Member:
    name, problem = _plain(info.name), None
    if info.islnk() or info.issym():
        folder = posixpath.dirname(name) if info.issym() else ""
        target = places.get(_plain(posixpath.normpath(posixpath.join(folder, info.linkname))))
        if target is None:
            problem = f"is a link to {info.linkname!r}, which is not in the shard"
        else:
            info = target
    if problem is None and not info.isreg():
        problem = "is no file"
    elif info.issparse():
        problem = "is a sparse file; make the shard anew without --sparse"
    elif info.offset_data + info.size > size:
        problem = "is cut off"
    return Member(name, info.offset_data, info.size, None, problem)


def _plain(name: str) -> str:
    while name.startswith(("./", "/")):
        name = name.removeprefix(".").removeprefix("/")
    return name


def _labeled(member: Member, file: BinaryIO) -> Member:
    """With what it says of a class."""
    match = _KEY.fullmatch(member.name)
    kind = "" if match is None else match[2].lower()
    if kind not in _LABELS or member.problem is not None or member.size > _LONGEST_LABEL:
        return member
    file.seek(member.offset)
    try:
        return member._replace(label=_label(file.read(member.size), kind))
    except ValueError as error:
        return member._replace(problem=str(error))


def _label(content: bytes, kind: str) -> int | str | None:
    """Class by a file's content: a number or a name; `None`: nothing."""
    try:
        value = content.decode("utf-8-sig").strip()
        if kind.endswith("json"):
            value = json.loads(value)
    except ValueError:
        raise ValueError("expected the number or the name of a class, it is none") from None
    if isinstance(value, dict):
        value = next((value[key] for key in _LABEL_KEYS if value.get(key) is not None), None)
        if isinstance(value, list | dict):
            return None
    number = WHOLE.read(value)
    if number is not None:
        return number
    if value is None or (isinstance(value, str) and (len(value) > 200 or "\n" in value)):
        return None
    if not isinstance(value, str):
        raise ValueError(f"expected the number or the name of a class, got {value!r:.80}")
    return value or None


# Samples -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sample:
    """Members of a shard under one key.

    Attributes:
        name: in the data set.
        parts: files by what follows the key in their names, in lower case.
        picture, map, label: what is of use for a task.
        problem: why the sample is of none, in words.
    """

    name: str
    key: str
    shard: Shard
    parts: dict[str, Member]
    picture: Member | None = None
    map: Member | None = None
    label: int | str | None = None
    problem: str | None = None


_NEEDED = {
    "classification": 'class, as a number or name in NAME.cls or as "label" in NAME.json',
    "semantic": "map of classes, such as NAME.seg.png",
    "instance": "map of objects, such as NAME.instances.png",
}
"""Members that samples must have for a task."""


def _samples(shards: Sequence[Shard], root: Path, task: str) -> list[_Sample]:
    samples: list[_Sample] = []
    for shard in shards:
        prefix = _END.sub("", Path(os.path.relpath(shard.path, root)).as_posix())
        found: dict[str, _Sample] = {}
        for member in shard.members:
            match = _KEY.fullmatch(member.name)
            if match is None or is_litter(member.name):
                continue
            key, kind = match[1], match[2].lower()
            sample = found.setdefault(key, _Sample(f"{prefix}/{key}", key, shard, {}))
            if kind in sample.parts:
                sample.problem = f"has a second file {member.name!r}"
            sample.parts[kind] = member
        samples += found.values()
    for sample in samples:
        try:
            _choose(sample, task)
        except ValueError as error:
            sample.problem = sample.problem or str(error)
    # What is beside no picture anywhere stands for itself: README.txt.
    usual = {kind for sample in samples if _pictures(sample) for kind in sample.parts}
    return [sample for sample in samples if usual.issuperset(sample.parts)]


def _pictures(sample: _Sample) -> list[str]:
    return [kind for kind in sample.parts if _suffix(kind) in PICTURE_SUFFIXES]


def _choose(sample: _Sample, task: str) -> None:
    """Find what a task needs.

    Raises:
        ValueError: it is not there, or it is not clear which it is, or it is bad.
    """
    pictures = {kind: _words(kind) for kind in _pictures(sample)}
    of_objects = [kind for kind, words in pictures.items() if words & _OBJECT_MAPS]
    of_classes = [kind for kind, words in pictures.items() if words & _CLASS_MAPS - _OBJECT_MAPS]
    rest = [kind for kind in pictures if kind not in (*of_objects, *of_classes)]
    if len(rest) == 2 and not of_objects + of_classes:  # "jpg" and "png", or one is named
        named = [kind for kind in rest if pictures[kind] & _SHOWN]
        maps = [kind for kind in rest if _suffix(kind) in MAP_SUFFIXES and kind not in named]
        if len(maps) == 1:
            of_classes = maps
            rest.remove(maps[0])
    sample.picture = _only(sample, rest, "picture")
    if sample.picture is None:
        raise ValueError("has no picture")
    needed = [sample.picture]
    if task == "classification":
        sample.label = _label_of(sample)
        missing = sample.label is None or (isinstance(sample.label, int) and sample.label < 0)
    else:
        maps = of_objects or of_classes if task == "instance" else of_classes
        sample.map = _only(sample, maps, "map")
        missing = sample.map is None
        needed += [] if sample.map is None else [sample.map]
    if missing:
        raise ValueError(f"has no {_NEEDED[task]}")
    for member in needed:
        if member.problem is not None:
            raise ValueError(f"cannot be read: {member.name!r} {member.problem}")


def _suffix(kind: str) -> str:
    return "." + kind.rpartition(".")[2]


def _words(kind: str) -> set[str]:
    return set(re.split(r"[^a-z]+", kind.rpartition(".")[0]))


def _only(sample: _Sample, kinds: Sequence[str], what: str) -> Member | None:
    if len(kinds) > 1:
        raise ValueError(
            f"has two files that may be its {what}, .{kinds[0]} and .{kinds[1]} (names of samples "
            "end at the first dot)"
        )
    return sample.parts[kinds[0]] if kinds else None


def _label_of(sample: _Sample) -> int | str | None:
    members = [sample.parts[kind] for kind in _LABELS if kind in sample.parts]
    for member in members:
        if member.problem is not None:
            raise ValueError(f"cannot be used: {member.name!r} {member.problem}")
        if member.label is not None:
            return member.label
    return None


def read_shards(
    files: Sequence[Path],
    task: str = "classification",
    *,
    root: str | os.PathLike[str] | None = None,
    categories: Sequence[Category] | Sequence[str] | None = None,
    void: Sequence[int] | None = None,
    beside: Sequence[Path] = (),
    skip_bad: bool = False,
) -> Dataset:
    """Tar files of samples, as webdataset has them: NAME.jpg beside NAME.cls in SHARD.tar.

    A picture is called SHARD/NAME. Its class is the number or name in NAME.cls, or that of the key
    "label" in NAME.json; maps are pictures as NAME.seg.png or NAME.instances.png, or NAME.png
    beside NAME.jpg. What is in NAME.json under "segments", as `read_folder` has it, tells the
    classes of objects; else all are of the first class.

    Args:
        files: see `shard_files`.
        task: "classification", "semantic" or "instance".
        root: what names of shards are relative to; `None`: the folder that has them all.
        categories: classes or their names, whose ids, or names, the labels are. `None`: the labels
            that there are, in `files` and in `beside`.
        void: labels that mean void (default: 255), or ids of regions with objects of any class
            that are not told apart (default: none).
        beside: the shards of other splits.

    Raises:
        ValueError: naming the file, if a shard is missing, compressed, cut off or damaged, or a
            sample lacks its picture or what is to be learned, or has either twice.
    """
    if task not in _NEEDED:
        raise ValueError(f"task: expected one of {', '.join(_NEEDED)}, got {task!r}")
    root = Path(root or os.path.commonpath([file.parent for file in files]))
    source = files[0] if len(files) == 1 else root
    shards = list_shards(files)
    problems = {str(shard.path): shard.problem for shard in shards if shard.problem is not None}
    samples = _samples(shards, root, task)
    if samples and all(sample.problem == f"has no {_NEEDED[task]}" for sample in samples):
        kinds = ", ".join(f".{kind}" for kind in sorted({k for s in samples for k in s.parts})[:10])
        damaged = "".join(f"; {problem}" for problem in list(problems.values())[:1])
        raise ValueError(
            f"{source}: none of the {len(samples)} samples has a {_NEEDED[task]}; there are {kinds}"
            f"{damaged}"
        )
    if task == "classification":
        table = category_table(categories)
        if table is None:
            others = _samples(list_shards(beside), root, task)
            found = [s.label for s in (*samples, *others) if s.problem is None]
            table = labeled_classes((label for label in found if label is not None), source)
        entries = _labeled_entries(samples, table)
    elif task == "semantic":
        void = (255,) if void is None else void
        maps = [s.shard.file(s.map) for s in samples if s.problem is None and s.map is not None]
        table = category_table(categories) or found_classes(maps, source, void)
        entries = _semantic_entries(samples, table, void)
    else:
        table = category_table(categories) or named_categories((OBJECT,))
        entries = _instance_entries(samples, table, void or ())
    for sample in samples:
        if sample.problem is not None:
            problems[sample.name] = f"{sample.shard.path}: {sample.key!r} {sample.problem}"
    return Dataset(source, table, entries, problems, skip_bad)


def _labeled_entries(samples: Sequence[_Sample], table: Sequence[Category]) -> list[Entry]:
    entries, numbers = [], ClassNumbers(table)
    for sample in samples:
        if sample.problem is None:
            assert sample.picture is not None
            assert sample.label is not None
            try:
                number = numbers.of(sample.label)
            except ValueError as error:
                sample.problem = f"has a class that is not known: {error}"
                continue
            image = sample.shard.file(sample.picture)
            read = partial(read_class, sample.name, image, number)
            entries.append(Entry(sample.name, image, None, read, number))
    return entries


def _semantic_entries(
    samples: Sequence[_Sample], table: Sequence[Category], void: Sequence[int]
) -> list[Entry]:
    labels = LabelTable(CategoryTable(tuple(table)).numbers(), void)
    entries = []
    for name, image, path, _ in _mapped(samples):
        read = partial(read_label_file, name, image, path, labels)
        entries.append(Entry(name, image, path, read))
    return entries


def _instance_entries(
    samples: Sequence[_Sample], table: Sequence[Category], void: Sequence[int]
) -> list[Entry]:
    numbers = CategoryTable(tuple(table)).numbers()
    entries = []
    for name, image, path, listed in _mapped(samples):
        read = partial(_read_objects, name, image, path, listed, numbers, void)
        entries.append(Entry(name, image, path, read))
    return entries


def _mapped(
    samples: Sequence[_Sample],
) -> Iterator[tuple[str, TarMember, TarMember, TarMember | None]]:
    """Names, pictures, maps, and JSON files where there are any, of good samples."""
    for sample in samples:
        if sample.problem is None:
            assert sample.picture is not None
            assert sample.map is not None
            listed = sample.parts.get("json")
            yield (
                sample.name,
                sample.shard.file(sample.picture),
                sample.shard.file(sample.map),
                None if listed is None else sample.shard.file(listed),
            )


def _read_objects(
    name: str,
    image: TarMember,
    path: TarMember,
    listed: TarMember | None,
    numbers: dict[int, int],
    void: Sequence[int],
) -> Annotation:
    content = {} if listed is None else parse_json(listed.read(), listed, object)
    rows = content.get("segments") if isinstance(content, dict) else None
    listing = None if listed is None or rows is None else (listed, rows)
    return read_objects(name, image, path, listing, numbers, void)
