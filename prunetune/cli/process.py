"""Starts and ends a command's process fast, although PyTorch, Ray and MLflow load and unload slowly."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_RARELY = (100_000, 50, 100)
"""The garbage collector's thresholds during imports: imported objects stay, and scanning them again and again
would take a fifth of the time."""
_usual = gc.get_threshold()


def begin() -> None:
    """Call before the imports: until `begun`, SIGINT ends the process with a message and no traceback."""
    gc.set_threshold(*_RARELY)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # SIGINT is not ignored
        signal.signal(signal.SIGINT, _interrupted)


def begun() -> None:
    """Call after the imports: from now on SIGINT raises KeyboardInterrupt again."""
    gc.set_threshold(*_usual)
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def importing() -> Iterator[None]:
    """Within the context, collect garbage rarely; to be used around slow imports."""
    gc.set_threshold(*_RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*_usual)


def end(code: int) -> NoReturn:
    """Run the functions registered with `atexit`, then exit without unloading every module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command's work is done
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):  # the reader has ended; the stream is closed
            pass
        except OSError:  # such as a full disk
            code = code or 1
    os._exit(code)


def _interrupted(number: int, frame: FrameType | None) -> None:
    # Exit instead of raising, because imports catch and wrap exceptions. No work has begun yet.
    print("prunetune: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
