"""How a command's process begins and ends: PyTorch, Ray and MLflow take seconds to import and to unload."""

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
"""The garbage collector's thresholds while modules are imported: these stay, and looking at them again and
again takes a fifth of the time."""
_usual = gc.get_threshold()


def begin() -> None:
    """Before the imports: a SIGINT until `begun` ends the process with a word, not a traceback."""
    gc.set_threshold(*_RARELY)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored
        signal.signal(signal.SIGINT, _interrupted)


def begun() -> None:
    """After the imports: a SIGINT is a KeyboardInterrupt again."""
    gc.set_threshold(*_usual)
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that come later."""
    gc.set_threshold(*_RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*_usual)


def end(code: int) -> NoReturn:
    """Leave, after what is registered with `atexit`, but without unloading every module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):  # the reader has gone; closed
            pass
        except OSError:  # such as a disk that is full
            code = code or 1
    os._exit(code)


def _interrupted(number: int, frame: FrameType | None) -> None:
    # Not an exception: imports catch and wrap those. Nothing has begun that could be left half done.
    print("prunetune: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
