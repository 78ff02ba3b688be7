"""Arguments, exit codes and error messages that all commands have in common."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable

from rich.console import Console

from prunetune.cli import process
from prunetune.errors import UserError, WorkError

EXIT_OK, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def run(command: Callable[[list[str]], int], arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; print the user's errors as one message without a traceback."""
    argv = sys.argv[1:] if arguments is None else arguments
    process.begun()
    try:
        code = command(argv)
    except UserError as error:
        print(f"prunetune: {error}", file=sys.stderr)
        code = EXIT_WRONG_INPUT
    except WorkError as error:
        print(f"prunetune: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except KeyboardInterrupt:
        print("prunetune: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the program that read our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_OK
    return code


def console() -> Console:
    """Return a console on standard output; it is 140 columns wide where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 140)


def parser(command: str, description: str, *, example: str) -> argparse.ArgumentParser:
    """Make the parser of `python -m prunetune.COMMAND`; the help ends with the arguments `example`."""
    prog = f"python -m prunetune.{command}"
    return argparse.ArgumentParser(prog=prog, description=description, epilog=f"example: {prog} {example}")


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments CONFIG and `dotted.key=value` to a parser."""
    parser.add_argument("config", nargs=None if required else "?", metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="dotted.key=value",
        help="replace a value of the file, parsed as YAML: densities=[0.1,0.01] pre_pruning.mask=null",
    )


def command_line(module: str, arguments: list[str]) -> str:
    """Return a command line that can be copied to a shell."""
    return shlex.join(["python", "-m", f"prunetune.{module}", *arguments])
