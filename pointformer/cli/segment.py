"""Find the objects in pictures.

Writes, for each picture NAME.EXT: NAME_overlay.png (objects outlined, or classes in colors with a
legend), NAME_labels.png (16-bit ids; with more than 65,535 objects NAME_labels.tif, 32 bits),
NAME_objects.csv (id, class, score, area, centroid, box) and NAME_summary.json (count, time, tokens
per stage). Pictures of one name keep their suffixes (a.png and a.jpg: a.png_labels.png) or, in
different folders, their folders (x/a_labels.png). Results of earlier runs that nobody
changed are no pictures, and are replaced. A picture whose results would replace another file is
left out, as is one that cannot be read: each is named, the rest is done, and the exit code is 1.

Several processes, on one machine or several, share the pictures:

    torchrun --nproc-per-node 4 -m pointformer.cli segment FOLDER --out RESULTS --resume
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pointformer._files import make_folder, path_inside, sync, temporary_path
from pointformer.cli.common import (
    SMALL,
    add_model_arguments,
    add_picture_arguments,
    add_result_arguments,
    complain,
    find_pictures,
    is_small,
    joined_processes,
    model_from,
    printable,
    reading_from,
    reason,
    result_names,
    say,
)
from pointformer.cli.results import Results, content_of, is_complete, is_result, write_sealed

if TYPE_CHECKING:
    from pointformer.data.images import Picture
    from pointformer.models import Model
    from pointformer.processes import Processes
    from pointformer.segmentation.segment import Segmentation

_FEW, _MANY = "labels.png", "labels.tif"  # which ids of 16 bits are enough for, or not
_SUMMARY = "summary.json"
_AHEAD, _BEHIND = 2, 2  # pictures that are read before, or written after, their turn
_READ_AHEAD = 2**26  # pixels: larger pictures are opened before their turn, but not read
_KINDS = (_FEW, _MANY, "objects.csv", "overlay.png", _SUMMARY)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or glob pattern")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    add_result_arguments(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave pictures alone whose results by this model are there, whole and unchanged, "
        "whatever its other options were",
    )
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="work in windows of this side (large pictures)"
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PIXELS", help="of the windows (default: 64, at most half)"
    )
    parser.add_argument(
        "--min-score",
        type=float,
        help="of mask models' objects (default: 0.5) and panoptic segments (default: 0.8)",
    )
    parser.add_argument(
        "--diameter",
        type=float,
        metavar="PIXELS",
        help="typical diameter of the objects: pictures are resized to the size that the model "
        "knows them in (default: as they are)",
    )
    parser.add_argument(
        "--scale", type=float, metavar="FACTOR", help="resize pictures for the network by this"
    )
    add_picture_arguments(parser)
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    with joined_processes(options) as processes:
        return _run(options, processes)


def _run(options: argparse.Namespace, processes: Processes) -> int:
    from tqdm import tqdm

    results = Results(overwrite=options.overwrite)
    paths, problems, left_out = find_pictures(options.images)
    for problem in problems if processes.main else ():
        say(f"pointformer: error: {problem}", error=True)
    if not paths:
        return 1
    processes.gathered(None)  # all have listed the pictures before the first writes beside them
    results.protect([*paths, options.model])

    def prepared() -> Model:
        from pointformer.segmentation.segment import check_options

        model = model_from(options, small=is_small(paths))
        check_options(
            model,
            tile=options.tile,
            overlap=options.overlap,
            min_score=options.min_score,
            scale=options.scale,
            diameter=options.diameter,
        )
        make_folder(options.out)
        return model

    model = processes.alike(prepared)
    failures = len(problems) if processes.main else 0
    total = len(paths) + len(problems)
    todo = processes.own(list(zip(paths, result_names(paths), strict=True)))
    if options.resume:
        todo = [pair for pair in todo if not _is_done(pair[1], options)]
    paths, names = [path for path, _ in todo], [name for _, name in todo]
    # No bar where nobody sees it move: in a log, or for one picture.
    bar = tqdm(
        total=len(paths), disable=True if total == 1 or not processes.main else None, unit="image"
    )
    with contextlib.closing(_segment_files(model, paths, names, options, results)) as done:
        for path, outcome in done:
            bar.update()
            try:
                summary = outcome.result().result()
            except Exception as error:
                failures += 1
                complain(error, path, debug=options.debug)
            else:
                if total == 1 and not left_out:
                    out = printable(str(options.out))
                    say(f"{printable(path.name)}: {summary}; results in {out}")
    bar.close()
    failures = sum(processes.gathered(failures))
    if processes.main and (total > 1 or left_out):
        more = f", {left_out} results of earlier runs left out" if left_out else ""
        say(
            f"{total - failures} of {total} pictures done{more}; "
            f"results in {printable(str(options.out))}"
        )
    return 1 if failures else 0


def _segment_files(
    model: Model,
    paths: Sequence[Path],
    names: Sequence[str],
    options: argparse.Namespace,
    results: Results,
) -> Generator[tuple[Path, Future[Future[str]]], None, None]:
    """Each picture, in order, with what was found in it in words, or the error, once it is done.

    While the network looks at pictures, see `_looking`, the next ones are read and those before are
    written. Where this is ended early, what is being written becomes complete, and what is not
    begun never is.
    """
    from pointformer.segmentation.segment import segment

    # One picture has nothing to overlap with, and is ended at once.
    executor = partial(ThreadPoolExecutor, 1) if len(paths) > 1 else _InThisThread
    large = threading.Lock()  # one at a time, as its memory is

    def look(name: str, opened: Future[Picture]) -> Future[str]:
        """Find what is in a picture; its results are written next."""
        files = _files_of(name, options.out, results)
        picture = opened.result()
        if ended.is_set():
            raise CancelledError
        with large if math.prod(picture.shape) > SMALL else contextlib.nullcontext():
            result = segment(
                model,
                picture,
                tile=options.tile,
                overlap=options.overlap,
                min_score=options.min_score,
                scale=options.scale,
                diameter=options.diameter,
            )
        return writing.submit(write, result, name, files, options.model, results)

    ended = threading.Event()
    with executor() as reading, executor() as writing, _looking(paths, options) as (looking, looks):
        ahead: deque[Future[Picture]] = deque()
        behind: deque[tuple[Path, Future[Future[str]]]] = deque()
        todo = iter(paths)
        try:
            for path, name in zip(paths, names, strict=True):
                for following in islice(todo, _AHEAD - len(ahead)):
                    ahead.append(reading.submit(_read, following, options))
                behind.append((path, looking.submit(look, name, ahead.popleft())))
                while behind and (_is_over(behind[0][1]) or len(behind) >= looks + _BEHIND):
                    yield behind.popleft()
            yield from behind
        finally:
            ended.set()
            for executing in (reading, looking, writing):
                executing.shutdown(cancel_futures=True)


def _is_over(looked: Future[Future[str]]) -> bool:
    """Whether a picture's results are written, or what went wrong is known."""
    return looked.done() and (looked.exception() is not None or looked.result().done())


@contextlib.contextmanager
def _looking(
    paths: Sequence[Path], options: argparse.Namespace
) -> Generator[tuple[Executor, int], None, None]:
    """Device and threads of the network, and how many pictures at a time.

    With two or three threads, small pictures are looked at side by side, by a thread each: in
    threads that share one picture, one waits while the other does what cannot be shared. Large
    ones, and more threads, are for one picture after the other, in this thread, which can be
    interrupted.
    """
    import torch

    threads = torch.get_num_threads()
    sample = paths[:: len(paths) // 16 + 1]
    small = options.tile is None and all(is_small([path]) for path in sample)
    if len(paths) == 1 or not 1 < threads < 4 or not small or options.device != "cpu":
        yield _InThisThread(), 1
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool, threads
    finally:
        torch.set_num_threads(threads)


class _InThisThread(Executor):
    """Does at once what it is given."""

    def submit(
        self, function: Callable[..., Any], /, *arguments: Any, **options: Any
    ) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def _read(path: Path, options: argparse.Namespace) -> Picture:
    """A picture that is open, and in memory unless it is large."""
    from pointformer.data.images import open_picture

    picture = open_picture(path, **reading_from(options))
    small = math.prod(picture.shape) <= _READ_AHEAD
    return picture.loaded() if small and options.tile is None else picture


def _files_of(name: str, out: Path, results: Results) -> dict[str, Path]:
    """Paths of a picture's results; an error if one cannot be written there."""
    # Names are the file system's own here: in "./C:x.png" the colon makes no drive.
    files = {kind: path_inside(out, f"./{name}_{kind}") for kind in _KINDS}
    for kind in _KINDS:
        if kind != _MANY:
            results.check(files[kind])
    return files


def _is_done(name: str, options: argparse.Namespace) -> bool:
    with contextlib.suppress(OSError, ValueError):
        summary = path_inside(options.out, f"./{name}_{_SUMMARY}")
        return is_complete(summary, image=name, model=options.model)
    return False


def write(
    result: Segmentation, name: str, files: Mapping[str, Path], model: str, results: Results
) -> str:
    """Write the four files of one picture; one that cannot be made does not keep back the others.

    Args:
        name: of the picture, for the summary.
        files: where each of `_KINDS` goes. Of the two kinds of label maps the one that holds the
            ids is written. Those of an earlier run that get no new content are removed.

    Returns:
        What was found, in words.

    Raises:
        ValueError: naming each file that could not be written, and why.
    """
    labels = _FEW if result.num_objects <= 65535 else _MANY
    files[labels].parent.mkdir(parents=True, exist_ok=True)
    failures: dict[Path, Exception] = {}
    made: dict[Path, Path] = {}
    with contextlib.ExitStack() as stack:
        for kind in (labels, "objects.csv", "overlay.png", _SUMMARY):
            file = files[kind]
            try:
                temporary = stack.enter_context(temporary_path(file))
                if kind == _SUMMARY:
                    contents = {other.name: content_of(path) for other, path in made.items()}
                    _write_summary(temporary, result, name, model, contents)
                else:
                    _WRITERS[kind](temporary, result)
                sync(temporary)
                made[file] = temporary
            except Exception as error:
                failures[file] = error
        stale = [file for file in files.values() if file not in made and is_result(file)]
        # All at the end, and the summary, which lists the others, first: a run that is ended leaves
        # no results that would look foreign to the next one.
        failures |= results.publish({file: made[file] for file in reversed(made)})
    for file in stale:
        file.unlink(missing_ok=True)
    if failures:
        raise ValueError("; ".join(f"not written: {reason(failures[f], f)}" for f in failures))
    tokens = " -> ".join(str(n) for n in result.tokens)
    return f"{result.num_objects} objects in {result.seconds:.2f} s, tokens {tokens}"


def _write_labels(path: Path, result: Segmentation) -> None:
    from PIL import Image

    Image.fromarray(result.labels.astype("uint16")).save(path)


def _write_many_labels(path: Path, result: Segmentation) -> None:
    import tifffile

    # A PNG has no 32 bits. Fiji, napari and scikit-image read this.
    tifffile.imwrite(path, result.labels.astype("uint32"), compression="zlib")


def _write_objects(path: Path, result: Segmentation) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "class", "score", "area", "x", "y", "left", "top", "right", "bottom"])
        for item in result.objects():
            x, y = item.centroid
            kind, score = result.class_name(item.id), result.scores[item.id - 1]
            rows.writerow(
                [item.id, kind, f"{score:.3f}", item.area, f"{x:.2f}", f"{y:.2f}", *item.box]
            )


def _write_overlay(path: Path, result: Segmentation) -> None:
    from pointformer.segmentation.drawing import overlay

    overlay(result).save(path)


def _write_summary(
    path: Path, result: Segmentation, name: str, model: str, files: Mapping[str, str]
) -> None:
    height, width = result.labels.shape
    description = {
        "image": name,
        "width": width,
        "height": height,
        "model": model,
        "count": result.num_objects,
        "seconds": round(result.seconds, 4),
        "tokens": list(result.tokens),
        "files": files,
    }
    write_sealed(path, description)


_WRITERS = {
    _FEW: _write_labels,
    _MANY: _write_many_labels,
    "objects.csv": _write_objects,
    "overlay.png": _write_overlay,
}
