"""How a command's process begins and ends: PyTorch, Ray and MLflow take seconds to import and to unload."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def begin() -> None:
    """Before the imports: a SIGINT until `begun` ends the process with a word, not a traceback.

    The garbage collector looks less often: what is imported stays, and looking at it again and again is a
    fifth of the imports' time.
    """
    gc.set_threshold(100_000, 50, 100)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored
        signal.signal(signal.SIGINT, _interrupted)


def begun() -> None:
    """A SIGINT is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end(code: int) -> NoReturn:
    """Leave, after what is registered with `atexit`, but without unloading every module."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone
            stream.flush()
    os._exit(code)


def _interrupted(number: int, frame: FrameType | None) -> None:
    # Not an exception: imports catch and wrap those. Nothing has begun that could be left half done.
    print("prunetune: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
