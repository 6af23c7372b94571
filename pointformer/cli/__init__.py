"""The command line: `pointformer segment | evaluate | focus | models | profile`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pointformer.cli import evaluate, focus, models, profile, segment

_COMMANDS = {
    "segment": segment,
    "evaluate": evaluate,
    "focus": focus,
    "models": models,
    "profile": profile,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pointformer", description="Adaptive tokens: find objects, see where a model looks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        text = (module.__doc__ or "").strip()
        sub = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(sub)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, 0 if all went well."""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command].run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"pointformer: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        print("pointformer: error: out of memory: use smaller pictures or --tile", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pointformer: interrupted", file=sys.stderr)
        return 130
