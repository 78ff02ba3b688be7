"""Ctrl-C while trials run: noted, so that what is running ends in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final


@final
class Interruption:
    """Set by the first SIGINT or SIGTERM; a second one acts as it did before.

    Signals reach the main thread alone. In any other thread nothing is listened to, and nothing is changed.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def is_set(self) -> bool:
        """Whether somebody wants to stop."""
        return self._event.is_set()

    def listen(self) -> None:
        """Handle the signals from now on (again)."""
        if threading.current_thread() is threading.main_thread() and not self.is_set():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._handle)

    def stop_listening(self) -> None:
        """Put the handlers of before back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
        self.stop_listening()


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within: the first SIGINT or SIGTERM is noted, not raised."""
    interruption = Interruption()
    interruption.listen()
    try:
        yield interruption
    finally:
        interruption.stop_listening()
