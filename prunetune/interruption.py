"""Ctrl-C in the first seconds, while PyTorch and the like are imported: a word, not a traceback."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def while_importing() -> None:
    """End the process at a SIGINT, until `over`; a command calls it before its imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored
        signal.signal(signal.SIGINT, _end)


def over() -> None:
    """A SIGINT is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    # Not an exception: imports catch and wrap those. Nothing has begun that could be left half done.
    print("prunetune: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
