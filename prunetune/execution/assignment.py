"""The message that tells a worker which trials to run, and the interface that delivers it; free of Ray."""

from __future__ import annotations

from typing import Protocol, TypedDict


class Assignment(TypedDict):
    """The fields by which a worker finds a trial's record in the store; the record holds everything else."""

    uid: str
    density: float
    number: int


class Board(Protocol):
    """The place where the driver writes each worker's assignments."""

    def write(self, worker: str, assignments: list[Assignment] | None) -> None:
        """Replace the worker's assignments; None tells the worker that no work is left for it."""
