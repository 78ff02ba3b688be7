"""Note Ctrl-C (SIGINT) and SIGTERM instead of raising, so that running trials can end in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final


@final
class Interruption:
    """A flag that the first SIGINT or SIGTERM sets; a second signal reaches the previous handler.

    Python handles signals only in the main thread. In another thread no handler is installed, and the flag
    is never set.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._before: dict[signal.Signals, Any] = {}

    def is_set(self) -> bool:
        """Whether SIGINT or SIGTERM has arrived."""
        return self._event.is_set()

    def listen(self) -> None:
        """Install the signal handlers, again if something else has replaced them."""
        if threading.current_thread() is threading.main_thread() and not self.is_set():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._handle)

    def stop_listening(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._event.set()
        self.stop_listening()


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within the context, note the first SIGINT or SIGTERM in the `Interruption` instead of raising."""
    interruption = Interruption()
    interruption.listen()
    try:
        yield interruption
    finally:
        interruption.stop_listening()
