"""Find the objects in pictures, or the classes of points in point clouds.

Writes, for each picture NAME.EXT: NAME_overlay.png (objects outlined, or classes in colors with a
legend), NAME_labels.png (16-bit ids; with more than 65,535 objects NAME_labels.tif, 32 bits),
NAME_objects.csv (id, class, score, area, centroid, box) and NAME_summary.json (count, time, tokens
per stage).

For each point cloud (LAS, LAZ, PLY, NPZ, XYZ), by point_nano.lidar or a --model of points:
NAME_points.EXT (the same file with a class per point, "classification", all else as it was),
NAME_above.png and NAME_side.png (points in the colors of their classes with a legend),
NAME_classes.csv (code, class, points, share and mean score of each class, and in total) and
NAME_summary.json. Codes are those of
the LAS standard for classes that have its names (ground: 2, building: 6), else the numbers of the
data set that the model was trained on, or, where the standard means something else by them, numbers
from 64 on (in LAS point formats 0 to 5, which end at 31: from there down); the table lists them.

Inputs of one name keep their suffixes (a.png and a.jpg: a.png_labels.png) or, in different folders,
their folders (x/a_labels.png). Results of earlier runs that nobody changed are no inputs, and are
replaced. An input whose results would replace another file is left out, as is one that cannot be
read: each is named, the rest is done, and the exit code is 1.

Several processes, on one machine or several, share the inputs:

    torchrun --nproc-per-node 4 -m pointformer.cli segment FOLDER --out RESULTS --resume
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
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
    add_feature_argument,
    add_model_arguments,
    add_picture_arguments,
    add_result_arguments,
    complain,
    joined_processes,
    printable,
    reason,
    result_names,
    say,
)
from pointformer.cli.inputs import Inputs, inputs_of, model_for
from pointformer.cli.results import Found, Results, content_of, is_complete, is_result, write_sealed
from pointformer.data.packed import FileState

if TYPE_CHECKING:
    from pointformer.processes import Processes

_AHEAD, _BEHIND = 2, 2  # inputs that are read before, or written after, their turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder or glob pattern")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    add_result_arguments(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave inputs alone whose results by this model are there, whole and unchanged as the "
        "inputs are, whatever its other options were",
    )
    parser.add_argument(
        "--tile", type=int, metavar="PIXELS", help="work in windows of this side (large pictures)"
    )
    parser.add_argument(
        "--overlap",
        type=int,
        metavar="PIXELS",
        help="of the windows of --tile (default: 64, at most half)",
    )
    parser.add_argument(
        "--min-score",
        type=float,
        help="of objects (default: the model's own, or 0.5) and panoptic segments (default: 0.8)",
    )
    parser.add_argument(
        "--diameter",
        type=float,
        metavar="PIXELS",
        help="typical diameter of the objects: pictures are resized to the size that the model "
        "knows them in (default: as they are)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="FACTOR",
        help="resize pictures for the network by this; of point clouds, what coordinates are "
        "multiplied by: 0.3048 for feet and a model that was trained in meters",
    )
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="TIME",
        help="for each input, as 50ms or 2s: the largest rate that fits is found by measuring, on "
        "the first one of each size",
    )
    add_picture_arguments(parser)
    add_feature_argument(parser)
    add_model_arguments(parser, by_inputs=True)


def _seconds(text: str) -> float:
    """Of a time with its unit."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(ms|s)\s*", text)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a time such as 50ms or 2s, got {text!r:.40}")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def run(options: argparse.Namespace) -> int:
    with joined_processes(options) as processes:
        return _run(options, processes)


def _run(options: argparse.Namespace, processes: Processes) -> int:
    import torch
    from tqdm import tqdm

    results = Results(overwrite=options.overwrite)

    def prepared() -> Inputs:
        inputs = inputs_of(model_for(options, options.inputs), options)
        inputs.prepare()
        return inputs

    inputs = processes.alike(prepared)
    paths, problems, left_out = inputs.find(options.inputs)
    for problem in problems if processes.main else ():
        say(f"pointformer: error: {problem}", error=True)
    if not paths:
        return 1
    processes.gathered(None)  # all have listed the inputs before the first writes beside them
    results.protect([*paths, options.model])
    processes.alike(partial(make_folder, options.out))
    if options.threads is None and len(paths) == 1 and inputs.are_small(paths):
        # Compiling the kernels for several threads, on a first run, takes longer than it saves.
        torch.set_num_threads(1)
    failures = len(problems) if processes.main else 0
    total = len(paths) + len(problems)
    own = processes.own(list(zip(paths, result_names(paths, inputs.endings), strict=True)))
    todo = [pair for pair in own if not (options.resume and _is_done(*pair, inputs))]
    out = printable(str(options.out))
    alone = total == 1 and not left_out  # then what was found in it is said
    if alone and len(todo) < len(own):
        say(f"{printable(paths[0].name)}: done already; results in {out}")
    paths, names = [path for path, _ in todo], [name for _, name in todo]
    # No bar where nobody sees it move: in a log, or for one input.
    bar = tqdm(
        total=len(paths),
        disable=True if total == 1 or not processes.main else None,
        unit=inputs.key,
    )
    with contextlib.closing(_segment_files(inputs, paths, names, results)) as done:
        for path, outcome in done:
            bar.update()
            try:
                summary = outcome.result().result()
            except Exception as error:
                failures += 1
                complain(error, path, debug=options.debug)
            else:
                if alone:
                    say(f"{printable(path.name)}: {summary}; results in {out}")
    bar.close()
    failures = sum(processes.gathered(failures))
    if processes.main and not alone:
        more = f", {left_out} result{'s' * (left_out > 1)} of earlier runs left out"
        say(
            f"{total - failures} of {total} {inputs.noun}s done{more if left_out else ''}; "
            f"results in {out}"
        )
    return 1 if failures else 0


def _segment_files(
    inputs: Inputs, paths: Sequence[Path], names: Sequence[str], results: Results
) -> Generator[tuple[Path, Future[Future[str]]], None, None]:
    """Each input, in order, with what was found in it in words, or the error, once it is done.

    While the network looks at inputs, see `_looking`, the next ones are read and those before are
    written. Where this is ended early, what is being written becomes complete, and what is not
    begun never is.
    """
    # One input has nothing to overlap with, and is ended at once.
    executor = partial(ThreadPoolExecutor, 1) if len(paths) > 1 else _InThisThread
    large = threading.Lock()  # one at a time, as its memory is

    def read(path: Path, name: str) -> tuple[Any, dict[str, Any]]:
        made_of = _made_of(path, name, inputs)  # before it is read: it may change meanwhile
        return inputs.open(path), made_of

    def look(path: Path, name: str, reading: Future[Any]) -> Future[str]:
        """Find what is in an input; its results are written next."""
        files = _files_of(path, name, inputs, results)
        opened, made_of = reading.result()
        if ended.is_set():
            raise CancelledError
        with large if inputs.is_large(opened) else contextlib.nullcontext():
            result = inputs.segment(opened, path)
        return writing.submit(write, result, made_of, files, inputs, results)

    ended = threading.Event()
    with executor() as reading, executor() as writing, _looking(paths, inputs) as (looking, looks):
        ahead: deque[Future[Any]] = deque()
        behind: deque[tuple[Path, Future[Future[str]]]] = deque()
        todo = zip(paths, names, strict=True)
        try:
            for path, name in zip(paths, names, strict=True):
                for following in islice(todo, _AHEAD - len(ahead)):
                    ahead.append(reading.submit(read, *following))
                behind.append((path, looking.submit(look, path, name, ahead.popleft())))
                while behind and (_is_over(behind[0][1]) or len(behind) >= looks + _BEHIND):
                    yield behind.popleft()
            yield from behind
        finally:
            ended.set()
            for executing in (reading, looking, writing):
                executing.shutdown(cancel_futures=True)


def _is_over(looked: Future[Future[str]]) -> bool:
    """Whether an input's results are written, or what went wrong is known."""
    return looked.done() and (looked.exception() is not None or looked.result().done())


@contextlib.contextmanager
def _looking(paths: Sequence[Path], inputs: Inputs) -> Generator[tuple[Executor, int], None, None]:
    """Device and threads of the network, and how many inputs at a time.

    With two or three threads, small inputs are looked at side by side, by a thread each: in
    threads that share one input, one waits while the other does what cannot be shared. Large
    ones, more threads, and what is to be done in a time, are for one input after the other, in
    this thread, which can be interrupted.
    """
    import torch

    threads = torch.get_num_threads()
    sample = paths[:: len(paths) // 16 + 1]
    few = len(paths) == 1 or not 1 < threads < 4 or inputs.options.device != "cpu"
    if few or inputs.budget is not None or not inputs.are_small(sample):
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


def _files_of(path: Path, name: str, inputs: Inputs, results: Results) -> dict[str, Path]:
    """Paths of an input's results by kind; an error if one cannot be written there."""
    # Names are the file system's own here: in "./C:x.png" the colon makes no drive.
    files = {
        kind: path_inside(inputs.options.out, f"./{name}_{kind}") for kind in inputs.kinds(path)
    }
    for kind, file in files.items():
        if kind not in inputs.unchecked():
            results.check(file)
    return files


def _is_done(path: Path, name: str, inputs: Inputs) -> bool:
    with contextlib.suppress(OSError, ValueError):
        summary = path_inside(inputs.options.out, f"./{name}_{inputs.summary}")
        return is_complete(summary, **_made_of(path, name, inputs))
    return False


def _made_of(path: Path, name: str, inputs: Inputs) -> dict[str, Any]:
    """What results are of: the input, as it is now, and the model."""
    state = FileState.of(os.stat(path))
    return {
        inputs.key: name,
        "bytes": state.size,
        "modified": state.modified,
        "model": inputs.options.model,
        "weights": inputs.weights,
    }


def write(
    found: Found,
    made_of: Mapping[str, Any],
    files: Mapping[str, Path],
    inputs: Inputs,
    results: Results,
) -> str:
    """Write the files of one input; one that cannot be made does not keep back the others.

    Args:
        made_of: for the summary, see `_made_of`.
        files: where each kind goes. Those of an earlier run that get no new content are removed.

    Returns:
        What was found, in words.

    Raises:
        ValueError: naming each file that could not be written, and why.
    """
    files[inputs.summary].parent.mkdir(parents=True, exist_ok=True)
    failures: dict[Path, Exception] = {}
    made: dict[Path, Path] = {}

    def summarize(path: Path) -> None:
        contents = {file.name: content_of(temporary) for file, temporary in made.items()}
        write_sealed(path, {**made_of, **found.description, "files": contents})

    with contextlib.ExitStack() as stack:
        for kind, writer in {**found.writers, inputs.summary: summarize}.items():
            file = files[kind]
            try:
                temporary = stack.enter_context(temporary_path(file))
                writer(temporary)
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
    return found.words
