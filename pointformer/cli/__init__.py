"""The command line: `pointformer segment | evaluate | train | ...`."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from pointformer.cli import evaluate, focus, models, profile, report, segment, train, warmup
from pointformer.cli.common import abandon, complain, printable, say

_COMMANDS = {
    "segment": segment,
    "evaluate": evaluate,
    "focus": focus,
    "train": train,
    "report": report,
    "models": models,
    "profile": profile,
    "warmup": warmup,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pointformer", description="Adaptive tokens: find objects, see where a model looks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        text = (module.__doc__ or "").strip()
        sub = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show where errors come from")
    return parser


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of a command; `sources` of training may stand between its options, which argparse
    does not know of commands."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    wrong = [text for text in more if text.startswith("-") or not hasattr(options, "sources")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if more:
        options.sources += more
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 if all was done, 1 if not, 2 for a wrong usage."""
    if arguments is None:  # the process is this command: what was imported stays to its end,
        gc.freeze()  # and searching it for garbage, at the end too, takes 0.7 s
    with _open_streams(), _any_characters(), _orderly_end(), _warnings_as_lines():
        options = _parsed(arguments)
        try:
            code = _COMMANDS[options.command].run(options)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            say("pointformer: interrupted", error=True)
            return 130
        except BrokenPipeError:  # `| head` has read enough
            abandon(sys.stdout)
            return 0
        except Exception as error:
            complain(error, debug=options.debug)
            return 1


@contextlib.contextmanager
def _open_streams() -> Iterator[None]:
    """Let what is printed vanish where the command was started with a closed stream (`>&-`).

    Python has `None` in its place, and the next file that is opened would take its number.
    """
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
                stack.callback(setattr, sys, name, None)
        yield


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show warnings as what they say, without the line of code that they come from."""

    def show(message: Warning | str, *where: object, **more: object) -> None:
        say(f"pointformer: warning: {printable(str(message))}", error=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _any_characters() -> Iterator[None]:
    """Print names of files whatever their characters, if need be as escapes."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    handlers = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, handlers, strict=True):
            stream.reconfigure(errors=errors)


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Leave no temporary files when the process is told to end (SIGTERM) or loses its terminal."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    old = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                old[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
