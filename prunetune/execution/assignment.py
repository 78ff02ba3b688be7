"""What a worker is told to run, and where it is written: nothing here knows Ray."""

from __future__ import annotations

from typing import Protocol, TypedDict


class Assignment(TypedDict):
    """What a worker must know of a trial; the rest is in its record in the store."""

    uid: str
    density: float
    number: int


class Board(Protocol):
    """Where the driver writes what each worker is to run."""

    def write(self, worker: str, assignments: list[Assignment] | None) -> None:
        """From now on the worker is to run these; None: nothing is left for it."""
